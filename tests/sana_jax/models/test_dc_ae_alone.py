"""DC-AE without its peer: rearrangements, the switch of attention, names, errors, size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from sana_jax import ops
from sana_jax.errors import InputError
from sana_jax.models import dc_ae
from sana_jax.models import dc_ae_blocks as blocks

TOY = dc_ae.DCAE(
    widths=(16, 32, 32, 64, 64, 128),
    encoder_depths=(1, 1, 1, 1, 1, 1),
    decoder_depths=(1, 1, 1, 1, 1, 1),
)


def noise(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_channel_order_by_hand():
    x = jnp.arange(8.0).reshape(1, 2, 2, 2)  # x[dy, dx, c] = 4 dy + 2 dx + c
    assert blocks.space_to_channel(x).ravel().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    x = noise(2, 4, 6, 8)
    assert (blocks.channel_to_space(blocks.space_to_channel(x)) == x).all()
    x = jnp.arange(4.0).reshape(1, 1, 1, 4)
    assert blocks.average(x, 2).ravel().tolist() == [0.5, 2.5]
    assert blocks.duplicate(x, 8).ravel().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    assert blocks.nearest(x)[0, :, :, 0].tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2


def test_quadratic_attention_is_the_linear_one():
    qkv = noise(2, 9, 3, 24)
    linear = ops.relu_linear_attention(qkv, 1e-15)
    np.testing.assert_allclose(blocks.relu_quadratic_attention(qkv, 1e-15), linear, atol=2e-6)
    qkv[:, 0, :, :8] = -1  # a query that sees nothing
    assert (blocks.relu_quadratic_attention(qkv, 1e-15)[:, 0] == 0).all()


@pytest.mark.parametrize(("grid", "quadratic"), [((4, 8), True), ((3, 11), False)])
def test_attention_is_quadratic_up_to_32_tokens(monkeypatch, grid, quadratic):
    calls = []

    def spy(qkv, eps):
        calls.append(qkv.shape)
        return ops.relu_linear_attention(qkv, eps)

    monkeypatch.setattr(blocks, "relu_quadratic_attention", spy)
    x = jax.ShapeDtypeStruct((1, *grid, 64), jnp.float32)
    jax.eval_shape(blocks.MultiScaleAttention().init, jax.random.key(0), x)
    assert calls == ([(1, 32, 4, 96)] if quadratic else [])


def test_blocks_are_captured_in_the_order_they_run():
    order = []

    def run(x):
        # Read inside the trace: whatever leaves a trace has its keys sorted.
        params = TOY.init(jax.random.key(0), x)
        _, state = TOY.apply(params, x, capture_intermediates=True)
        paths = flatten_dict(state["intermediates"], sep="/")
        order.extend(path.removesuffix("/__call__") for path in paths)

    jax.eval_shape(run, jnp.zeros((1, 32, 32, 3)))
    order = [path for path in order if path.count("/") == 2 or "/conv_" in path[:15]]
    start = ["conv_in", "stage_0/block_0", "stage_0/down", "stage_1/block_0"]
    assert order[:4] == [f"encoder/{name}" for name in start]
    half = order.index("decoder/conv_in")
    assert order[half - 2 : half] == ["encoder/stage_5/block_0", "encoder/conv_out"]
    deep = ["stage_5/block_0", "stage_4/up", "stage_4/block_0", "stage_3/up"]
    assert order[half + 1 : half + 5] == [f"decoder/{name}" for name in deep]
    assert order[-2:] == ["decoder/stage_0/block_0", "decoder/conv_out"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_depths": (1, 2)}, r"encoder_depths=\(1, 2\): needs 6 entries"),
        ({"latent_channels": 48}, "latent_channels=48: must divide the last width, 128"),
        ({"widths": (16, 32, 32, 64, 64, 320)}, "64 and 320"),
    ],
)
def test_impossible_fields(fields, message):
    with pytest.raises(InputError, match=message):
        jax.eval_shape(TOY.clone(**fields).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (64, 64, 3), (1, 48, 64, 3)])
def test_impossible_images(shape):
    with pytest.raises(InputError, match="multiples of 32"):
        jax.eval_shape(TOY.init, jax.random.key(0), jnp.zeros(shape))


def test_preset_size():
    model = dc_ae.DC_AE_F32C32_SANA
    assert model.compression == 32 and model.scaling_factor == 0.41407
    assert hash(model) == hash(dc_ae.DCAE())
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 96, 3)))["params"]
    count = {half: sum(leaf.size for leaf in jax.tree.leaves(params[half])) for half in params}
    assert count == {"encoder": 153_027_104, "decoder": 159_223_171}
