"""Rows of docs/parity.md for samplers and whole pictures; see benchmarks/parity.py."""

import numpy as np
import pytest

import sana_jax
from sana_jax.parity import solver
from sana_jax.parity.peers import last
from sana_jax.parity.rows import compare, counted
from tests import toy_pipeline

PROMPTS = ["A photo of a Red cat", "the dog runs along the beach in the morning light"]
RECTANGLE = toy_pipeline.Rectangle(256, 320)
SIZE = dict(height=256, width=320)
OUTPUTS = (("latent", "latent"), ("float", "np"))  # ours, diffusers'


def solver_rows(shift=3.0):
    for sampler, steps in (("flow-dpm-solver", 20), ("flow-euler", 20), ("scm", 1), ("scm", 2), ("scm", 4)):
        ours, exact = solver.ours(sampler, steps, shift), solver.closed_form(sampler, steps, shift)
        yield compare(f"{solver.WORDS[sampler]}, {counted(steps)}, against float64", ours, exact, "solver")


def generate(pipeline, latents, output, **arguments):
    return pipeline.generate(PROMPTS, latents=latents, output=output, bin_resolution=False, **SIZE, **arguments)


def paint(pipeline, kind, **arguments):
    """diffusers' latents or images, channels last."""
    out = pipeline(PROMPTS, output_type=kind, use_resolution_binning=False, **SIZE, **arguments).images
    return out if kind == "np" else last(out)


def flow_rows(folder):
    ours, theirs = sana_jax.load_pipeline(folder), toy_pipeline.load_peer(folder)
    latents = RECTANGLE.noise(2)
    there = dict(latents=toy_pipeline.torch_latents(latents), num_inference_steps=20)
    for output, kind in OUTPUTS:
        name = f"pipeline, 20 steps, {'image' if output == 'float' else output}"
        yield compare(name, generate(ours, latents, output), paint(theirs, kind, **there), "pipeline")

    nvlabs = sana_jax.load_pipeline(folder, stack="nvlabs")
    oracle = toy_pipeline.nvlabs_oracle(
        theirs, nvlabs.instruction().text, PROMPTS, "", latents, 20, "flow-dpm-solver"
    )
    yield compare("pipeline, stack nvlabs, 20 steps, latent", generate(nvlabs, latents, "latent", steps=20), oracle, "pipeline")

    for decay in (0.0, 0.004):
        peer = toy_pipeline.make_pag_pipeline(theirs, [1])
        reference = paint(peer, "latent", pag_scale=3.0, pag_adaptive_scale=decay, **there)
        image = generate(ours, latents, "latent", pag_scale=3.0, pag_layers=[1], pag_adaptive_scale=decay)
        name = f"pipeline, perturbed attention{', adaptive' if decay else ''}, 20 steps, latent"
        yield compare(name, image, reference, "pipeline")


def sprint_rows(folder):
    """One, two and four steps, and from an image; both sides are handed the same draws."""
    theirs = toy_pipeline.make_sprint_pipeline()
    theirs.save_pretrained(folder)
    ours, noise = sana_jax.load_pipeline(folder), RECTANGLE.noise(2)
    fresh = np.stack([RECTANGLE.noise(2, seed) for seed in range(1, 5)])

    def pair(peer, steps, output, kind, **there):
        reference = fed(peer, [noise, *fresh[:steps]], kind, steps, **there)
        here = {key: value[0] if key == "image" else value for key, value in there.items()}
        return generate(ours, noise, output, steps=steps, step_noise=fresh[:steps], **here), reference

    for steps in (1, 2, 4):
        for output, kind in OUTPUTS:
            name = f"pipeline, Sprint, {counted(steps)}, {'image' if output == 'float' else output}"
            yield compare(name, *pair(theirs, steps, output, kind), "pipeline")
    picture = np.random.default_rng(5).uniform(size=(*SIZE.values(), 3)).astype("f")
    peer = toy_pipeline.make_sprint_pipeline("SanaSprintImg2ImgPipeline")
    latents = pair(peer, 2, "latent", "latent", image=picture[None], strength=0.6)
    yield compare("pipeline, Sprint, from an image, 2 steps, latent", *latents, "pipeline")


def fed(peer, noise, kind, steps, **arguments):
    """diffusers' Sprint pipeline, which draws what it is given."""
    with pytest.MonkeyPatch.context() as patch:
        left = toy_pipeline.feed_noise(patch, *noise)
        middle = 1.3 if steps == 2 else None
        out = paint(peer, kind, num_inference_steps=steps, intermediate_timesteps=middle, **arguments)
        if left:
            raise RuntimeError(f"{len(left)} draws were not made")
    return out
