"""SANA-Sprint from a folder that diffusers wrote, against diffusers' own pipelines on recorded noise.

The same prompts and the same draws, float32 at highest precision: latents and images within 1e-4.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sana_jax
from sana_jax import programs
from sana_jax.errors import InputError
from tests.peers import rms
from tests.toy_pipeline import Rectangle, feed_noise, make_sprint_pipeline

pytestmark = pytest.mark.parity
BOUND = 1e-4
PROMPTS = ["A photo of a Red cat", "the dog runs along the beach"]
RECTANGLE = Rectangle(64, 96)
SIZE = dict(height=64, width=96, bin_resolution=False)
NOISE, FRESH = RECTANGLE.noise(2), np.stack([RECTANGLE.noise(2, seed) for seed in range(1, 5)])


@pytest.fixture(scope="module")
def theirs():
    return make_sprint_pipeline()


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sprint") / "pipeline"
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return sana_jax.load_pipeline(folder)


def paint(pipeline, monkeypatch, noise, steps, output="latent", **arguments):
    """diffusers' pipeline on our arrays; everything that it draws is what is given."""
    left = feed_noise(monkeypatch, *noise)
    out = pipeline(
        arguments.pop("prompts", PROMPTS),
        num_inference_steps=steps,
        intermediate_timesteps=1.3 if steps == 2 else None,
        output_type={"latent": "latent", "float": "np"}[output],
        **({"height": 64, "width": 96, "use_resolution_binning": False} | arguments),
    ).images
    assert not left
    return np.moveaxis(out.numpy(), 1, -1) if output == "latent" else out


def distance(a, b):
    assert a.shape == b.shape
    return float(np.abs(a - b).max())


@pytest.mark.parametrize("steps, output", [(1, "latent"), (2, "latent"), (4, "latent"), (2, "float")])
def test_pipeline(ours, theirs, monkeypatch, steps, output):
    fresh = FRESH[:steps]
    image = ours.generate(PROMPTS, latents=NOISE, step_noise=fresh, steps=steps, output=output, **SIZE)
    reference = paint(theirs, monkeypatch, [NOISE, *fresh], steps, output)
    assert rms(reference) >= (0.5 if output == "latent" else 0.2)
    assert distance(image, reference) <= BOUND


def test_guidance_is_told_times_a_tenth(ours, theirs, monkeypatch):
    arguments = dict(latents=NOISE, step_noise=FRESH[:2], output="latent", **SIZE)
    reference = paint(theirs, monkeypatch, [NOISE, *FRESH[:2]], 2, guidance_scale=7.5)
    assert distance(ours.generate(PROMPTS, guidance_scale=7.5, **arguments), reference) <= BOUND
    for wrong in (4.5, 75.0):
        assert distance(ours.generate(PROMPTS, guidance_scale=wrong, **arguments), reference) > 10 * BOUND


@pytest.mark.parametrize("scale", [1.0, 4.5, 4.57, 7.3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_guidance_is_rounded_before_the_product(dtype, scale):
    import torch

    theirs = torch.full([1], scale, dtype=torch.float32).to(getattr(torch, dtype)) * 0.1
    ours = programs.embedded_guidance(np.float32(scale), jnp.dtype(dtype))
    assert ours.dtype == dtype and float(ours) == float(theirs)


@pytest.mark.parametrize("strength", [0.4, 0.6])
def test_img2img(ours, monkeypatch, strength):
    """Two steps: 0.4 enters at the second; one picture for both prompts."""
    peer = make_sprint_pipeline("SanaSprintImg2ImgPipeline")
    picture = np.random.default_rng(5).uniform(size=(64, 96, 3)).astype("f")
    left = 1 if strength < 0.5 else 2
    fresh = FRESH[:left]
    arguments = dict(latents=NOISE, step_noise=fresh, steps=2, output="latent", **SIZE)
    image = ours.generate(PROMPTS, image=picture, strength=strength, **arguments)
    reference = paint(peer, monkeypatch, [NOISE, *fresh], 2, image=picture[None], strength=strength)
    assert distance(image, reference) <= BOUND
    if strength == 0.6:
        np.testing.assert_array_equal(ours.generate(PROMPTS, image=picture, **arguments), image)
    if strength == 0.4:
        other = ours.generate(PROMPTS, image=np.stack([picture, 1 - picture]), strength=strength, **arguments)
        assert distance(other[:1], image[:1]) <= 1e-5 and distance(other[1:], image[1:]) > 0.1


def test_an_image_of_another_shape_is_cut_and_resized(ours):
    """Twice the size, with stripes beyond the shape that is painted: its middle, averaged."""
    inner = np.random.default_rng(5).integers(0, 256, (64, 96, 3), np.uint8)
    large = np.repeat(np.repeat(inner, 2, 0), 2, 1)
    framed = np.pad(large, ((40, 40), (0, 0), (0, 0)), constant_values=255)
    arguments = dict(latents=NOISE, step_noise=FRESH[:1], steps=2, strength=0.4, output="latent", **SIZE)
    plain = ours.generate(PROMPTS, image=inner, **arguments)
    assert distance(plain, ours.generate(PROMPTS, image=inner / np.float32(255), **arguments)) <= 1e-5

    def fit(image):
        return np.asarray(programs.fit_image(image[None], height=64, width=96))

    np.testing.assert_array_equal(fit(framed), fit(large))
    np.testing.assert_allclose(fit(inner)[0], inner / 127.5 - 1, atol=1e-6)
    smooth = np.broadcast_to(np.float32([0.25, 0.5, 1]), (130, 300, 3))
    np.testing.assert_allclose(fit(smooth)[0], 2 * smooth[:64, :96] - 1, atol=1e-6)
    stripes = np.zeros((256, 384, 3), "f")
    stripes[::4] = 1  # one line in four: sampled without averaging, these would be all or nothing
    np.testing.assert_allclose(fit(stripes)[0, 8:-8], -0.5, atol=0.2)


def test_step_noise_is_keyed_by_seed_image_and_step(ours):
    shape, key = (2, 3, 32), np.uint32(7)
    noise = np.asarray(programs.step_noise(key, np.arange(4), 2, shape))
    np.testing.assert_array_equal(programs.step_noise(key, np.arange(2, 4), 3, shape)[:2], noise[:, 2:])
    start = np.asarray(programs.initial_latents(key, np.arange(4), shape))
    flat = np.concatenate([noise.reshape(8, -1), start.reshape(4, -1)])
    assert np.abs(np.corrcoef(flat) - np.eye(12)).max() < 0.3 and abs(flat.std() - 1) < 0.05
    arguments = dict(steps=2, output="latent", **SIZE)
    two = ours.generate(PROMPTS, seed=7, first_image=2, **arguments)
    np.testing.assert_array_equal(two, ours.generate(PROMPTS, latents=start[2:], step_noise=noise[:, 2:], **arguments))
    assert distance(two, ours.generate(PROMPTS, seed=8, first_image=2, **arguments)) > 0.1


def test_defaults_are_the_models(ours):
    arguments = dict(latents=NOISE, step_noise=FRESH[:2], output="latent", **SIZE)
    np.testing.assert_array_equal(
        ours.generate(PROMPTS, **arguments), ours.generate(PROMPTS, sampler="scm", steps=2, guidance_scale=4.5, **arguments)
    )


def test_denoise_is_generate(ours):
    image = ours.generate(PROMPTS, latents=NOISE, step_noise=FRESH[:2], output="latent", **SIZE)
    parts = ours.denoise(*ours.encode_prompt(PROMPTS), latents=NOISE, step_noise=FRESH[:2])
    assert distance(np.asarray(parts), image) <= 2e-5


def test_both_stacks_leave_the_time_alone(ours):
    """Its times lie in [0, 1]; truncated, all but the first would be 0."""
    nvlabs = sana_jax.Pipeline(ours.sana, ours.dc_ae, ours.text, "nvlabs")
    module = nvlabs.sana[0]
    assert module.clamp and module.cross_norm_eps == 1e-6 and not module.integer_time
    assert sana_jax.NVLABS.integer_time and not ours.sana[0].integer_time


def test_saved_folder_is_the_peers_own(ours, theirs, monkeypatch, tmp_path):
    from diffusers import SanaSprintPipeline, SCMScheduler

    ours.save(tmp_path / "saved")
    peer = SanaSprintPipeline.from_pretrained(tmp_path / "saved")
    peer.text_encoder.set_attn_implementation("eager")
    peer.set_progress_bar_config(disable=True)
    assert isinstance(peer.scheduler, SCMScheduler) and peer.scheduler.config.sigma_data == 0.5
    noise = [NOISE, *FRESH[:2]]
    again = paint(peer, monkeypatch, noise, 2)
    assert distance(again, paint(theirs, monkeypatch, noise, 2)) <= 1e-5
    back = sana_jax.load_pipeline(tmp_path / "saved")
    assert back.sana[0] == ours.sana[0]
    jax.tree.map(np.testing.assert_array_equal, back.sana[1], ours.sana[1])


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("sampler='flow-euler': this is a SANA-Sprint .*only 'scm'", dict(sampler="flow-euler")),
        ("flow_shift=3.0: has no meaning for SANA-Sprint", dict(flow_shift=3.0)),
        ("guidance_interval=.*no meaning", dict(guidance_interval=(0.1, 1))),
        ("pag_scale=2.0: has no meaning", dict(pag_scale=2.0)),
        ("negative_prompts: SANA-Sprint has no unconditional half", dict(negative_prompts="ugly")),
        (r"step_noise: shape \(3, 2, 3, 32\), must be \(2, 1, 2, 3, 32\)", dict(step_noise=np.ones((3, 2, 3, 32)))),
        ("step_noise: must be finite", dict(step_noise=np.full((2, 1, 2, 3, 32), np.inf))),
        ("strength=0.5: is that of an image .*none is given", dict(strength=0.5)),
        ("strength=0: ", dict(strength=0, image=np.zeros((32, 32, 3), np.uint8))),
        (r"strength=1.5: must be a number in \[0, 1\]", dict(strength=1.5)),
        (r"image: shape \(3, 8, 8\)", dict(image=np.zeros((3, 8, 8), np.uint8))),
        ("image: int64, must be uint8", dict(image=np.zeros((8, 8, 3), np.int64))),
        (r"image: floating point must be in \[0, 1\]", dict(image=np.full((8, 8, 3), -0.5))),
        (r"image: floating point must be in \[0, 1\]", dict(image=np.full((8, 8, 3), np.nan))),
        ("image: 2 images for 1 prompts", dict(image=np.zeros((2, 8, 8, 3)))),
    ],
)
def test_bad_arguments(ours, message, arguments):
    with pytest.raises(InputError, match=message) as error:
        ours.generate(**({"prompts": "a cat"} | SIZE | arguments))
    assert "\n" not in str(error.value)


def test_bad_arguments_of_denoise(ours):
    states, mask = np.ones((1, 300, 64), "f"), np.ones((1, 300), bool)
    with pytest.raises(InputError, match=r"step_noise=None: sampler 'scm' needs noise for each step, \[2, b"):
        ours.denoise(states, mask, latents=NOISE[:1])
    with pytest.raises(InputError, match="negative_states: SANA-Sprint"):
        ours.denoise(states, mask, states, mask, NOISE[:1], step_noise=FRESH[:2, :1])


def test_overflow_is_explained(ours):
    module, params = ours.sana
    kernel = params["blocks"]["mix_ffn"]["project"]["kernel"].at[1].set(3e38)
    huge = params | {"blocks": params["blocks"] | {"mix_ffn": params["blocks"]["mix_ffn"] | {"project": {"kernel": kernel}}}}
    broken = sana_jax.Pipeline((module, huge), ours.dc_ae, ours.text)
    with pytest.raises(sana_jax.NonFiniteError, match="step 0, blocks/1 is not finite in float32"):
        broken.generate(PROMPTS, output="latent", **SIZE)
