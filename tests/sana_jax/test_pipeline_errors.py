"""Bad input to a Pipeline: one line that names the field, the value and what is allowed."""

import numpy as np
import pytest

import sana_jax
from tests.toy_pipeline import Rectangle

SIZE = dict(height=64, width=96, bin_resolution=False)
RECTANGLE = Rectangle(64, 96)


@pytest.fixture(scope="module")
def ours(toy_folder):
    return sana_jax.load_pipeline(toy_folder)


@pytest.mark.parity
@pytest.mark.parametrize(
    "message,change",
    [
        (r"states: shape \(1, 300\), must be \[batch, tokens, 64\]", dict(states=np.ones((1, 300)))),
        (r"mask: shape \(1, 2\), must be \(1, 300\)", dict(mask=np.ones((1, 2)))),
        (r"negative_states: shape \(2, 300, 64\)", dict(negative_states=np.ones((2, 300, 64)))),
        (r"negative_states: shape \(1, 9, 64\)", dict(negative_states=np.ones((1, 9, 64)))),
        (r"latents: shape \(2,\)", dict(latents=np.ones(2))),
        ("latents: must be an array of numbers", dict(latents="noise")),
        ("latents=None", dict(latents=None)),
        ("steps=0", dict(steps=0)),
    ],
)
def test_bad_arguments_of_denoise(ours, message, change):
    states, mask = np.ones((1, 300, 64), "f"), np.ones((1, 300), bool)
    good = dict(states=states, mask=mask, negative_states=states, negative_mask=mask, latents=RECTANGLE.noise(1))
    with pytest.raises(sana_jax.InputError, match=message):
        ours.denoise(**(good | change))


@pytest.mark.parity
def test_bad_arguments_of_encode_and_decode(ours):
    with pytest.raises(sana_jax.InputError, match="images: uint8, must be floating point in"):
        ours.encode(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(sana_jax.InputError, match="must be floating point in"):
        ours.encode(np.full((1, 32, 32, 3), 2, "f"))
    with pytest.raises(sana_jax.InputError, match="latents: must be finite"):
        ours.decode(np.full((1, 1, 1, 32), np.nan))


@pytest.mark.parity
def test_overflow_names_the_first_bad_block(ours):
    """Finite weights, infinite activations: an error with the place, never a black picture."""
    module, params = ours.sana
    kernel = params["blocks"]["mix_ffn"]["project"]["kernel"].at[1].set(3e38)
    huge = params | {"blocks": params["blocks"] | {"mix_ffn": params["blocks"]["mix_ffn"] | {"project": {"kernel": kernel}}}}
    broken = sana_jax.Pipeline((module, huge), ours.dc_ae, ours.text)
    with pytest.raises(sana_jax.NonFiniteError, match="step 0, blocks/1 is not finite in float32"):
        broken.generate("a cat", steps=2, **SIZE)
    module, params = ours.dc_ae
    stage = params["decoder"]["stage_2"]
    kernel = stage["block_0"]["conv_2"]["kernel"] * np.inf
    bad = params["decoder"] | {"stage_2": stage | {"block_0": stage["block_0"] | {"conv_2": {"kernel": kernel}}}}
    broken = sana_jax.Pipeline(ours.sana, (module, params | {"decoder": bad}), ours.text)
    with pytest.raises(sana_jax.NonFiniteError, match="decoder/stage_2/block_0/conv_2"):
        broken.generate("a cat", steps=2, **SIZE)


BAD = {
    "prompts": dict(prompts=[]),
    r"prompts\[1\]": dict(prompts=["a", 3]),
    "negative_prompts: 2 entries for 1": dict(negative_prompts=["a", "b"]),
    "steps=0": dict(steps=0),
    "steps=2.5": dict(steps=2.5),
    "guidance_scale=nan": dict(guidance_scale=float("nan")),
    "num_images=0": dict(num_images=0),
    "seed=-1": dict(seed=-1),
    "sampler='dpm'": dict(sampler="dpm"),
    "flow_shift=0": dict(flow_shift=0),
    "height=0": dict(height=0),
    "width=-32": dict(width=-32),
    "height=100000.*nearest valid 8192": dict(height=100_000),
    "width=100.*multiple of 32.*nearest valid 96": dict(width=100, bin_resolution=False),
    "output='png'": dict(output="png"),
    "max_sequence_length=1": dict(max_sequence_length=1),
    r"latents: shape \(1, 1, 1, 32\), must be": dict(latents=np.ones((1, 1, 1, 32))),
    "latents: must be finite": dict(latents=np.full((1, 16, 16, 32), np.nan)),
    r"guidance_interval\[1\]": dict(guidance_interval=(0.5, 0.2)),
    "chi='Auto'": dict(chi="Auto"),
}


@pytest.mark.parity
@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(ours, message):
    with pytest.raises(sana_jax.InputError, match=message) as error:
        ours.generate(**({"prompts": "a cat"} | BAD[message]))
    assert "\n" not in str(error.value)


@pytest.mark.parity
def test_parts_must_belong_together(ours):
    module, params = ours.sana
    with pytest.raises(sana_jax.InputError, match="caption_width=8 .* belong together"):
        sana_jax.Pipeline((module.clone(caption_width=8), params), ours.dc_ae, ours.text)
    with pytest.raises(sana_jax.InputError, match="text=None"):
        sana_jax.Pipeline(ours.sana, ours.dc_ae).generate("a cat")
    with pytest.raises(sana_jax.InputError, match="stack='nvlab'.*did you mean 'nvlabs'"):
        sana_jax.Pipeline(ours.sana, ours.dc_ae, stack="nvlab")
