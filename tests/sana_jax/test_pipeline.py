"""`generate` from a folder that diffusers wrote, against diffusers' own pipeline on that folder.

Same prompts, same initial latents, float32 at highest precision; latents and images within 1e-4
after all steps (measured: about 1e-5, see docs/parity.md).  Everything goes through the public API.
"""

import dataclasses

import numpy as np
import pytest

import sana_jax
from tests.peers import rms
from tests.toy_pipeline import Rectangle, load_peer, nvlabs_oracle, torch_latents

BOUND = 1e-4
PROMPTS = ["A photo of a Red cat --ar 1:2", "the dog runs along the beach"]
SIZE = dict(height=64, width=96, bin_resolution=False)
RECTANGLE = Rectangle(64, 96)


@pytest.fixture(scope="module")
def ours(toy_folder):
    return sana_jax.load_pipeline(toy_folder)


@pytest.fixture(scope="module")
def theirs(toy_folder):
    return load_peer(toy_folder)


def paint(pipeline, prompts, latents, output="latent", **arguments):
    """diffusers' pipeline with our names and layout."""
    out = pipeline(
        prompts,
        latents=torch_latents(latents),
        output_type={"latent": "latent", "float": "np"}[output],
        num_inference_steps=arguments.pop("steps", 8),
        **({"height": 64, "width": 96, "use_resolution_binning": False} | arguments),
    ).images
    return np.moveaxis(out.numpy(), 1, -1) if output == "latent" else out


def distance(a, b):
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


@pytest.mark.parity
@pytest.mark.parametrize("output", ["latent", "float"])
def test_twenty_steps(ours, theirs, output):
    latents = RECTANGLE.noise(2)
    image = ours.generate(PROMPTS, latents=latents, steps=20, output=output, **SIZE)
    reference = paint(theirs, PROMPTS, latents, output, steps=20)
    assert rms(reference) >= (1 if output == "latent" else 0.2)
    assert distance(image, reference) <= BOUND


@pytest.mark.parity
@pytest.mark.parametrize(
    "case",
    [
        dict(prompts=[""]),
        dict(prompts=["Ein Café, 猫が眠る 🎨"]),
        dict(prompts=["cat " * 400]),
        dict(prompts=["a cat on a chair"], max_sequence_length=32),
        dict(prompts=["a cat"], guidance=1.0),
        dict(prompts=["a cat"], guidance=7.5, steps=1),
        dict(prompts=["a cat", "a dog"], negative=["blue sky, clouds", ""]),
        dict(prompts=["a cat"], negative="An Old House"),
    ],
    ids=lambda case: ascii(",".join(f"{k}={str(v)[:12]}" for k, v in case.items())),
)
@pytest.mark.parametrize("chi", [True, False], ids=["chi", "no-chi"])
@pytest.mark.filterwarnings("ignore:.*too long:UserWarning")
def test_prompts(ours, theirs, case, chi):
    prompts, steps = case["prompts"], case.get("steps", 3)
    length = case.get("max_sequence_length", 300)
    latents, negative = RECTANGLE.noise(len(prompts)), case.get("negative", "")
    image = ours.generate(
        prompts, negative_prompts=negative, latents=latents, steps=steps, output="latent",
        guidance_scale=case.get("guidance", 4.5), chi="auto" if chi else "none",
        max_sequence_length=length, **SIZE,
    )  # fmt: skip
    extra = {} if chi else {"complex_human_instruction": None}
    reference = paint(
        theirs, prompts, latents, steps=steps, negative_prompt=negative,
        guidance_scale=case.get("guidance", 4.5), max_sequence_length=length, **extra,
    )  # fmt: skip
    assert distance(image, reference) <= BOUND


@pytest.mark.parity
def test_the_reference_depends_on_its_inputs(theirs):
    latents = RECTANGLE.noise(1)
    reference = paint(theirs, ["a cat"], latents)
    changes = (
        dict(prompts=["a busy street at night"]),
        dict(complex_human_instruction=None),
        dict(negative_prompt="a dog"),
        dict(guidance_scale=1.0),
    )
    for change in changes:
        changed = paint(theirs, latents=latents, **({"prompts": ["a cat"]} | change))
        assert rms(changed - reference) > 0.05 * rms(reference), change


@pytest.mark.parity
def test_flow_euler(ours, theirs):
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

    parts = theirs.components | {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    euler, latents = SanaPipeline(**parts), RECTANGLE.noise(1)
    euler.set_progress_bar_config(disable=True)
    image = ours.generate(PROMPTS[:1], latents=latents, steps=8, sampler="flow-euler", output="latent", **SIZE)
    reference = paint(euler, PROMPTS[:1], latents)
    assert distance(image, reference) <= BOUND
    assert distance(paint(theirs, PROMPTS[:1], latents), reference) > 100 * BOUND


@pytest.mark.parity
def test_flow_shift(ours, theirs):
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    scheduler = DPMSolverMultistepScheduler.from_config(theirs.scheduler.config, flow_shift=6.0)
    shifted, latents = SanaPipeline(**theirs.components | {"scheduler": scheduler}), RECTANGLE.noise(1)
    shifted.set_progress_bar_config(disable=True)
    image = ours.generate("a cat", latents=latents, steps=8, flow_shift=6.0, output="latent", **SIZE)
    assert distance(image, paint(shifted, ["a cat"], latents)) <= BOUND


@pytest.mark.parity
def test_resolution_binning(ours, theirs):
    """500 x 600 is painted at 448 x 544, resized to cover and cropped."""
    latents = Rectangle(448, 544).noise(1)
    image = ours.generate("a cat", latents=latents, height=500, width=600, steps=1, output="float")
    reference = paint(
        theirs, ["a cat"], latents, "float", steps=1, height=500, width=600, use_resolution_binning=True
    )
    assert image.shape == (1, 500, 600, 3) and distance(image, reference) <= BOUND


@pytest.mark.parity
def test_several_images_of_several_prompts(ours, theirs):
    """diffusers pairs such a batch with the wrong masks, so it paints one prompt at a time here."""
    latents = RECTANGLE.noise(4)
    prompts = ["a cat", "a busy city street at night, neon lights, people walking in the rain"]
    image = ours.generate(prompts, num_images=2, latents=latents, steps=4, output="latent", **SIZE)
    for i, prompt in enumerate(prompts):
        mine = slice(2 * i, 2 * i + 2)
        reference = paint(theirs, [prompt], latents[mine], steps=4, num_images_per_prompt=2)
        assert distance(image[mine], reference) <= BOUND
    wrong = paint(theirs, prompts, latents, steps=4, num_images_per_prompt=2)
    assert distance(image, wrong) > 10 * BOUND


@pytest.mark.parity
@pytest.mark.parametrize("sampler", ["flow-dpm-solver", "flow-euler"])
def test_nvlabs_stack(toy_folder, theirs, sampler):
    """Their habits put into diffusers' modules: prompt's mask, case, quotes, eps, truncated times."""
    pipeline = sana_jax.load_pipeline(toy_folder, stack="nvlabs")
    instruction = pipeline.instruction()
    assert '"Enhanced prompt"' in instruction.text
    latents = RECTANGLE.noise(2)
    image = pipeline.generate(
        PROMPTS, negative_prompts="Blue sky", latents=latents, steps=8, sampler=sampler, output="latent", **SIZE
    )
    reference = nvlabs_oracle(theirs, instruction.text, PROMPTS, "Blue sky", latents, 8, sampler)
    assert distance(image, reference) <= BOUND
    changes = [{"negative_uses_prompt_mask": False}, {"lower_case": True}, {"strip_flags": False}]
    changes += [{"chi_double_quotes": False}] + [{"integer_time": False}] * (sampler == "flow-euler")
    for change in changes:  # each habit by itself is seen
        wrong = dataclasses.replace(sana_jax.NVLABS, **change)
        other = sana_jax.Pipeline(pipeline.sana, pipeline.dc_ae, pipeline.text, wrong)
        image = other.generate(
            PROMPTS, negative_prompts="Blue sky", latents=latents, steps=8, sampler=sampler, output="latent", **SIZE
        )
        assert distance(image, reference) > 1e-3, change


@pytest.mark.parity
def test_encode_and_decode(ours, theirs):
    import torch

    images = np.random.default_rng(0).uniform(-1, 1, (2, 64, 96, 3)).astype("f")
    scale = theirs.vae.config.scaling_factor
    latents = theirs.vae.encode(torch.tensor(np.moveaxis(images, -1, 1))).latent * scale
    assert distance(np.asarray(ours.encode(images)), np.moveaxis(latents.detach().numpy(), 1, -1)) <= 5e-5
    back = theirs.vae.decode(latents / scale).sample.detach().numpy()
    decoded = ours.decode(np.moveaxis(latents.detach().numpy(), 1, -1))
    assert distance(np.asarray(decoded), np.clip(np.moveaxis(back, 1, -1), -1, 1)) <= 2e-5


@pytest.mark.parity
def test_encode_prompt(ours, theirs):
    states, mask = ours.encode_prompt(PROMPTS)
    chi = ours.instruction().text.split("\n")
    reference = theirs.encode_prompt(PROMPTS, False, complex_human_instruction=chi)
    assert states.shape == (2, 300, 64)
    np.testing.assert_array_equal(mask, reference[1].numpy().astype(bool))
    assert np.abs(states - reference[0].detach().numpy())[np.asarray(mask)].max() <= 2e-4


@pytest.mark.parity
@pytest.mark.parametrize("stack", ["diffusers", "nvlabs"])
def test_denoise_is_generate(ours, stack):
    """One negative for two prompts, 300 tokens here and a bucket of 64 there."""
    pipeline, latents = sana_jax.Pipeline(ours.sana, ours.dc_ae, ours.text, stack), RECTANGLE.noise(2)
    image = pipeline.generate(PROMPTS, latents=latents, steps=4, output="latent", **SIZE)
    states, mask = pipeline.encode_prompt(PROMPTS)
    nothing = pipeline.encode_prompt("", chi="none")
    parts = pipeline.denoise(states, mask, *nothing, latents, steps=4)
    assert distance(np.asarray(parts), image) <= 2e-5
    image = pipeline.generate(PROMPTS, latents=latents, steps=4, output="latent", guidance_scale=1, **SIZE)
    assert distance(np.asarray(pipeline.denoise(states, mask, latents=latents, steps=4)), image) <= 2e-5


@pytest.mark.parity
def test_other_words_are_announced(ours, monkeypatch):
    monkeypatch.setattr(sana_jax.pipeline.text.importlib.util, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="own words .*pictures differ"):
        assert ours.instruction().text == sana_jax.pipeline.text.OWN_WORDS


@pytest.mark.parity
def test_flow_shift_comes_from_stack_then_checkpoint_then_publication(ours):
    parts, five = (ours.sana, ours.dc_ae), dataclasses.replace(sana_jax.DIFFUSERS, flow_shift=5.0)
    assert sana_jax.Pipeline(*parts, stack=five, flow_shift=4.0).flow_shift == 5.0
    assert sana_jax.Pipeline(*parts, flow_shift=4.0).flow_shift == 4.0
    assert sana_jax.Pipeline(*parts).flow_shift == 3.0
    module, params = ours.sana
    assert sana_jax.Pipeline((module.clone(sample_size=128), params), ours.dc_ae).flow_shift == 6.0


@pytest.mark.parity
def test_given_instruction_precedes_the_prompt_directly(ours):
    latents = RECTANGLE.noise(1)
    arguments = dict(latents=latents, steps=2, output="latent", **SIZE)
    automatic = ours.generate("a cat", **arguments)
    given = ours.generate("a cat", chi=ours.instruction().text, **arguments)
    np.testing.assert_array_equal(automatic, given)
    assert distance(automatic, ours.generate("a cat", chi="Paint this: ", **arguments)) > 1e-2


@pytest.mark.parity
def test_guidance_interval(ours):
    arguments = dict(steps=8, output="latent", latents=RECTANGLE.noise(1), **SIZE)
    whole = ours.generate("a cat", guidance_interval=(0.0, 0.99999), **arguments)
    assert distance(whole, ours.generate("a cat", **arguments)) <= 1e-5
    none = ours.generate("a cat", guidance_interval=(0.0, 0.0), **arguments)
    assert distance(none, ours.generate("a cat", guidance_scale=1.0, **arguments)) <= 1e-5
    part = ours.generate("a cat", guidance_interval=(0.4, 0.9), **arguments)
    assert distance(part, whole) > 1e-2 and distance(part, none) > 1e-2


@pytest.mark.parity
def test_outputs(ours):
    arguments = dict(steps=2, seed=3, **SIZE)
    whole, unit = ours.generate("a cat", **arguments), ours.generate("a cat", output="float", **arguments)
    assert whole.dtype == np.uint8 and unit.dtype == np.float32
    assert 0 <= unit.min() and unit.max() <= 1
    np.testing.assert_array_equal(whole, np.round(unit * 255).astype(np.uint8))


@pytest.mark.parity
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_low_precision_paints_nearly_the_same(toy_folder, ours, dtype):
    """Also that a CPU can run what a GPU is for: products of halves that are added in float32."""
    arguments = dict(latents=RECTANGLE.noise(2), steps=4, output="latent", **SIZE)
    reference = ours.generate(PROMPTS, **arguments)
    low = sana_jax.load_pipeline(toy_folder, dtype=dtype)
    error = rms(low.generate(PROMPTS, **arguments) - reference)
    assert 1e-5 < error / rms(reference) < 0.1
