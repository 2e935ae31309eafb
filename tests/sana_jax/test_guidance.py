"""Perturbed-attention and interval guidance through the public API, against diffusers' SanaPAGPipeline
and against guidance written out branch by branch, in both stacks and with both flow samplers.

float32 at highest precision; latents within 1e-4 after all steps.
"""

import dataclasses

import numpy as np
import pytest

import sana_jax
from sana_jax.errors import InputError
from tests.guidance_oracle import guided_latents, peer_scheduler
from tests.toy_pipeline import Rectangle, load_peer, make_pag_pipeline, make_transformer, nvlabs_transformer, torch_latents

pytestmark = pytest.mark.parity
BOUND = 1e-4
PROMPTS = ["a photo of a red cat", "the dog runs along the beach"]
RECTANGLE = Rectangle(64, 96)
SIZE = dict(height=64, width=96, bin_resolution=False)
NOISE = RECTANGLE.noise(2)
COMMON = dict(latents=NOISE, steps=4, output="latent", **SIZE)
SAMPLERS = ("flow-dpm-solver", "flow-euler")


@pytest.fixture(scope="module")
def ours(toy_folder):
    return sana_jax.load_pipeline(toy_folder)


@pytest.fixture(scope="module")
def nvlabs(ours):
    return sana_jax.Pipeline(ours.sana, ours.dc_ae, ours.text, "nvlabs")


@pytest.fixture(scope="module")
def theirs(toy_folder):
    return load_peer(toy_folder)


@pytest.fixture(scope="module")
def texts(theirs):
    return theirs.encode_prompt(PROMPTS)


def distance(a, b):
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


def generate(pipeline, **arguments):
    return pipeline.generate(PROMPTS, chi="none", **(COMMON | arguments))


def paint(pipeline, **arguments):
    """diffusers' SanaPAGPipeline on the same prompts."""
    out = pipeline(
        PROMPTS, latents=torch_latents(NOISE), output_type="latent", num_inference_steps=4,
        complex_human_instruction=None, height=64, width=96, use_resolution_binning=False, **arguments,
    ).images  # fmt: skip
    return np.moveaxis(out.numpy(), 1, -1)


@pytest.mark.parametrize("decay", [0.0, 0.004], ids=["", "adaptive"])
@pytest.mark.parametrize("scale", [4.5, 1.0], ids=["cfg", "no-cfg"])
@pytest.mark.parametrize("layers", [[0], [1], [0, 2]], ids=str)
def test_pag_is_that_of_diffusers(ours, theirs, layers, scale, decay):
    peer = make_pag_pipeline(theirs, layers)
    reference = paint(peer, guidance_scale=scale, pag_scale=3.0, pag_adaptive_scale=decay)
    image = generate(ours, guidance_scale=scale, pag_scale=3.0, pag_layers=layers, pag_adaptive_scale=decay)
    assert distance(image, reference) <= BOUND


def test_pag_controls(ours, theirs, texts):
    """Each part of it, left out or turned around, is seen."""
    peer = make_pag_pipeline(theirs, [1])
    reference = paint(peer, pag_scale=3.0, pag_adaptive_scale=0.004)
    good = dict(pag_scale=3.0, pag_layers=[1], pag_adaptive_scale=0.004)
    for change in ({"pag_layers": [2]}, {"pag_layers": [0]}, {"pag_scale": 2.9}, {"pag_adaptive_scale": 0.003}, {"guidance_scale": 4.0}):
        assert distance(generate(ours, **(good | change)), reference) > 10 * BOUND, change
    assert distance(generate(ours), reference) > 10 * BOUND
    swapped = guided_latents(theirs.transformer, peer_scheduler("flow-dpm-solver"), texts, NOISE, 4, pag_scale=-3.0, pag_layers=[1])
    assert distance(generate(ours, pag_scale=3.0, pag_layers=[1]), swapped) > 10 * BOUND


def test_layers_are_data(ours):
    """Other layers and scales are no other programs."""
    generate(ours, pag_scale=3.0)
    count = sana_jax.pipeline.programs.paint_program._cache_size()
    for arguments in (dict(pag_layers=(2, 1)), dict(pag_scale=1.5, pag_adaptive_scale=0.001), dict(guidance_scale=3.0)):
        generate(ours, **({"pag_scale": 3.0} | arguments))
    assert sana_jax.pipeline.programs.paint_program._cache_size() == count


def test_default_layer_is_the_stacks(ours, nvlabs):
    np.testing.assert_array_equal(generate(ours, pag_scale=3.0), generate(ours, pag_scale=3.0, pag_layers=[0]))
    with pytest.raises(InputError, match=r"pag_layers=\(8,\): this transformer has layers 0 to 2"):
        generate(nvlabs, pag_scale=3.0)
    one = sana_jax.Pipeline(ours.sana, ours.dc_ae, ours.text, dataclasses.replace(nvlabs.stack, pag_layers=(1,)))
    np.testing.assert_array_equal(generate(one, pag_scale=3.0), generate(nvlabs, pag_scale=3.0, pag_layers=[1]))


def test_nvlabs_perturbs_above_one_only(nvlabs):
    plain = generate(nvlabs)
    with pytest.warns(UserWarning, match="pag_scale=1.0: stack 'nvlabs' perturbs above 1 only"):
        np.testing.assert_array_equal(generate(nvlabs, pag_scale=1.0, pag_layers=[1]), plain)
    assert distance(generate(nvlabs, pag_scale=1.01, pag_layers=[1]), plain) > 1e-2


INTERVAL = dict(interval=(0.3, 0.95))
PAG = dict(pag_scale=2.0, pag_layers=[1])
MIXED = INTERVAL | dict(pag_scale=2.0, pag_layers=[0, 2], decay=0.002)
CASES = [  # all four mixed, and each part by itself in one of them
    *((stack, sampler, MIXED) for stack in ("diffusers", "nvlabs") for sampler in SAMPLERS),
    ("diffusers", "flow-euler", INTERVAL),
    ("nvlabs", "flow-dpm-solver", INTERVAL),
    ("nvlabs", "flow-dpm-solver", PAG),
    ("nvlabs", "flow-euler", PAG | INTERVAL | dict(scale=1.0)),
]


@pytest.mark.parametrize("stack, sampler, case", CASES, ids=lambda c: c if isinstance(c, str) else ",".join(c))
def test_written_out(ours, nvlabs, theirs, texts, stack, sampler, case):
    """Interval, PAG, classifier-free guidance and their mixtures; latents that have seen all four steps."""
    transformer, (states, mask, negative_states, negative_mask) = theirs.transformer, texts
    if stack == "nvlabs":
        transformer, negative_mask = nvlabs_transformer(transformer), mask
    reference = guided_latents(
        transformer, peer_scheduler(sampler), (states, mask, negative_states, negative_mask), NOISE, 4, **case
    )
    arguments = dict(
        sampler=sampler, guidance_scale=case.get("scale", 4.5), guidance_interval=case.get("interval", (0, 1)),
        pag_scale=case.get("pag_scale", 0.0), pag_layers=case.get("pag_layers"), pag_adaptive_scale=case.get("decay", 0.0),
    )  # fmt: skip
    pipeline = {"diffusers": ours, "nvlabs": nvlabs}[stack]
    assert distance(generate(pipeline, **arguments), reference) <= BOUND
    if "interval" in case:  # the interval is seen, and which steps lie in it
        for wrong in ((0, 1), (0.3, 0.7), (0.7, 0.95)):
            assert distance(generate(pipeline, **(arguments | {"guidance_interval": wrong})), reference) > 10 * BOUND


def test_an_interval_up_to_one_takes_in_the_first_step(ours, theirs, texts):
    """Euler begins at 1 itself."""
    scheduler = peer_scheduler("flow-euler")
    reference = guided_latents(theirs.transformer, scheduler, texts, NOISE, 4, interval=(0.3, 1.1))
    image = generate(ours, sampler="flow-euler", guidance_interval=(0.3, 1))
    assert float(scheduler.sigmas[0]) == 1 and distance(image, reference) <= BOUND
    assert distance(generate(ours, sampler="flow-euler", guidance_interval=(0.3, 0.9999)), reference) > 10 * BOUND


def test_denoise_takes_them_too(ours):
    arguments = dict(pag_scale=2.0, pag_layers=[1], guidance_interval=(0.3, 0.95))
    image = generate(ours, **arguments)  # a program of the test above
    parts = ours.denoise(
        *ours.encode_prompt(PROMPTS, chi="none"), *ours.encode_prompt("", chi="none"), NOISE, steps=4, **arguments
    )
    assert distance(np.asarray(parts), image) <= 2e-5


def test_qk_norm_is_kept(ours, theirs, texts):
    """diffusers' PAG drops the norms of queries and keys of SANA-1.5; ours is the written-out guidance."""
    from sana_jax.components import published_rules
    from tests.sana_jax.models.test_sana import convert

    transformer = make_transformer(sample_size=16, qk_norm="rms_norm_across_heads")
    pipeline = sana_jax.Pipeline(convert(transformer), ours.dc_ae, ours.text)
    assert any("norm" in rule.torch for rule in published_rules(pipeline.sana[0]))
    reference = guided_latents(transformer, peer_scheduler("flow-dpm-solver"), texts, NOISE, 4, pag_scale=3.0, pag_layers=[1])
    image = generate(pipeline, pag_scale=3.0, pag_layers=[1])
    assert distance(image, reference) <= BOUND
    dropped = paint(make_pag_pipeline(theirs, [1], transformer=transformer), pag_scale=3.0)
    assert distance(image, dropped) > 100 * BOUND


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("sampler='scm': only samples SANA-Sprint", dict(sampler="scm")),
        ("image: only sampler='scm'", dict(image=np.zeros((64, 96, 3), np.uint8))),
        ("step_noise: sampler 'flow-dpm-solver' draws none", dict(step_noise=np.zeros((4, 2, 2, 3, 32)))),
        ("pag_scale=-1", dict(pag_scale=-1)),
        (r"pag_layers=\(3,\): this transformer has layers 0 to 2", dict(pag_scale=2.0, pag_layers=[3])),
        (r"pag_layers\[0\]=-1", dict(pag_scale=2.0, pag_layers=[-1])),
        (r"pag_layers=\[\]: must be a non-empty list", dict(pag_scale=2.0, pag_layers=[])),
        (r"pag_layers=1: must be a non-empty list", dict(pag_scale=2.0, pag_layers=1)),
        (r"pag_layers=\[1\]: acts only with pag_scale", dict(pag_layers=[1])),
        ("pag_adaptive_scale=0.1: acts only with pag_scale", dict(pag_adaptive_scale=0.1)),
        ("on_step=3: must be a function", dict(on_step=3)),
    ],
)
def test_bad_arguments(ours, message, arguments):
    with pytest.raises(InputError, match=message) as error:
        generate(ours, **arguments)
    assert "\n" not in str(error.value)


def test_only_one_compression_is_painted_with(ours):
    module, params = ours.dc_ae
    wrong = module.clone(widths=(*module.widths, 64))
    with pytest.raises(InputError, match="compression=64 of the autoencoder: .* 32 x 32 pixels"):
        sana_jax.Pipeline(ours.sana, (wrong, params))
