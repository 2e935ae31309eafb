"""Every published DC-AE against diffusers' `AutoencoderDC`, at toy widths and with random weights.

Errors are max |ours - theirs| / rms(theirs), and BOUND is test_dc_ae.py's: 3 seeds of each variant
gave at most 4.8e-6 for latents and 5.4e-6 for images.  One tensor of one block off by 1 % costs at
least 1e-4, every other control 2e-2 or more.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from sana_jax.errors import InputError
from sana_jax.models import dc_ae
from sana_jax.models import dc_ae_blocks as blocks
from tests import dc_ae_toys, peers
from tests.dc_ae_toys import TOYS, error, image, nchw, nhwc, run

BOUND = 1.5e-5
OTHERS = [name for name in TOYS if name != "f32c32-sana"]  # which has test_dc_ae.py


@functools.cache
def case(name):
    """(peer, our parameters, image, its latent, the picture of that): theirs, channels last."""
    model = TOYS[name]
    peer = dc_ae_toys.make_peer(model)
    side = model.compression
    x = image(1, 3 * side, 5 * side) if side == 32 else image(1, side, 2 * side)
    z = peer.encode(nchw(x)).latent
    return peer, dc_ae_toys.to_params(model, peer), x, nhwc(z), nhwc(peer.decode(z).sample)


def latent_error(name, params=None):
    """Of our model, perhaps with other parameters."""
    _, own, x, z, _ = case(name)
    return error(run(TOYS[name], own if params is None else params, x, method="encode"), z)


def picture_error(name, params=None, **changes):
    """Of our model, perhaps with other parameters or fields."""
    _, own, _, z, y = case(name)
    model, params = TOYS[name].clone(**changes), own if params is None else params
    return error(run(model, params, z.astype(np.float32), method="decode"), y)


def changed(params, change):
    """`change` takes a path and a leaf."""
    leaves = flatten_dict(params, sep="/")
    return unflatten_dict({path: change(path, leaf) for path, leaf in leaves.items()}, sep="/")


@pytest.mark.parity
@pytest.mark.parametrize("name", OTHERS)
def test_variant(name):
    _, _, _, z, y = case(name)
    assert peers.rms(z) >= 1 and peers.rms(y) >= 1
    assert latent_error(name) <= BOUND and picture_error(name) <= BOUND


# --- Controls: what tells the variants apart, taken for the other, must break the bound.


@pytest.mark.parity
@pytest.mark.parametrize("name", ["lite-f32c32", "f32c32-in"])
def test_bound_catches_the_other_activation_at_the_end(name):
    assert picture_error(name, silu_out=not TOYS[name].silu_out) > 5 * BOUND


@pytest.mark.parity
@pytest.mark.parametrize("relu", [(), (0, 1), (0, 2)])
def test_bound_catches_the_other_activation_in_a_stage(relu):
    assert picture_error("f32c32-in", decoder_relu=relu) > 5 * BOUND


@pytest.mark.parity
@pytest.mark.parametrize("statistic", ["mean", "var"])
def test_bound_catches_statistics_that_are_ignored(statistic):
    fresh = {"mean": np.zeros_like, "var": np.ones_like}[statistic]
    params = changed(case("f32c32-in")[1], lambda path, leaf: fresh(leaf) if path.endswith(f"/{statistic}") else leaf)
    assert picture_error("f32c32-in", params) > 5 * BOUND


@pytest.mark.parity
@pytest.mark.parametrize("name", ["lite-f32c32", "f32c32-in"])
def test_bound_catches_one_tensor_off_by_a_percent(name):
    """Not `conv_2`: RMSNorm takes its scale out again."""

    def off(half):
        path = f"{half}/stage_2/block_0/conv_1/kernel"
        return changed(case(name)[1], lambda p, leaf: leaf * np.float32(1.01) if p == path else leaf)

    assert latent_error(name, off("encoder")) > 5 * BOUND and picture_error(name, off("decoder")) > 5 * BOUND
    assert latent_error(name, off("decoder")) <= BOUND and picture_error(name, off("encoder")) <= BOUND


# --- Layer by layer, with gradients: (variant, name in the peer, path in ours, module, input).

LAYERS = {
    "batch norm": ("f32c32-in", "decoder.up_blocks.1.1", "decoder/stage_1/block_0",
                   blocks.ResBlock(act=jax.nn.relu, batch_norm=True), (2, 12, 10, 32)),
    "down": ("f32c32-in", "encoder.down_blocks.2.2", "encoder/stage_2/down",
             blocks.Down(64, rearrange=True), (2, 6, 10, 32)),
    "up": ("f32c32-in", "decoder.up_blocks.2.0", "decoder/stage_2/up",
           blocks.Up(32, rearrange=True), (2, 6, 5, 64)),
    "first": ("f32c32-in", "encoder.conv_in", "encoder/conv_in",
              blocks.Down(32, rearrange=True, shortcut=False), (2, 6, 10, 3)),
    "last": ("lite-f32c32", "decoder.conv_out", "decoder/conv_out",
             blocks.Up(3, rearrange=True, shortcut=False), (2, 6, 5, 32)),
}  # fmt: skip


def layer(name):
    variant, theirs, path, module, shape = LAYERS[name]
    peer, params, *_ = case(variant)
    for key in path.split("/"):
        params = params[key]
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    return peer.get_submodule(theirs), module, params, x


@pytest.mark.parity
@pytest.mark.parametrize("name", LAYERS)
def test_layer_and_its_gradient(name):
    peer, module, params, x = layer(name)
    theirs_in = nchw(x).requires_grad_()
    theirs = peer(theirs_in)
    ours, pullback = jax.vjp(jax.jit(lambda x: module.apply({"params": params}, x)), x)
    assert error(ours, nhwc(theirs)) <= BOUND
    probe = np.random.default_rng(1).standard_normal(ours.shape, np.float32)
    theirs.backward(nchw(probe))
    assert error(pullback(probe)[0], nhwc(theirs_in.grad)) <= BOUND


def tensorflow_order(patch):
    def space_to_channel(x):
        b, h, w, d = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, d).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * d)

    def channel_to_space(x):
        b, h, w, d = x.shape
        return x.reshape(b, h, w, 2, 2, d // 4).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, d // 4)

    patch.setattr(blocks, "space_to_channel", space_to_channel)
    patch.setattr(blocks, "channel_to_space", channel_to_space)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["down", "up", "first", "last"])
def test_bound_catches_another_order_of_channels(name, monkeypatch):
    peer, module, params, x = layer(name)
    theirs = nhwc(peer(nchw(x)))
    tensorflow_order(monkeypatch)
    assert error(module.apply({"params": params}, x), theirs) > 5 * BOUND


@pytest.mark.parity
@pytest.mark.parametrize("name", ["down", "up"])
def test_bound_catches_a_shortcut_left_out(name):
    peer, module, params, x = layer(name)
    theirs = nhwc(peer(nchw(x)))
    assert error(module.clone(shortcut=False).apply({"params": params}, x), theirs) > 5 * BOUND


# --- BatchNorm by hand, and without the peer.


def test_batch_norm_by_hand_and_its_gradients():
    x = jnp.array([[1.0, 2.0], [3.0, -2.0]])
    params = {"scale": [2.0, 1.0], "bias": [0.5, 0.0], "mean": [1.0, -2.0], "var": [4.0, 0.25]}
    params = jax.tree.map(jnp.array, params, is_leaf=lambda a: isinstance(a, list))
    norm = blocks.BatchNorm(eps=0.0)
    np.testing.assert_allclose(norm.apply({"params": params}, x), [[0.5, 8.0], [2.5, 0.0]], atol=1e-6)
    assert not np.allclose(blocks.BatchNorm(eps=1e-2).apply({"params": params}, x), [[0.5, 8.0], [2.5, 0.0]], atol=1e-3)
    gradient = jax.grad(lambda p: norm.apply({"params": p}, x).sum())(params)
    assert not gradient["mean"].any() and not gradient["var"].any()
    assert gradient["scale"].any() and gradient["bias"].any()


def test_batch_norm_eps_is_torchs():
    """1e-5 and 1e-6 are told apart only where the variance is no larger than that."""
    params = {"scale": jnp.ones(1), "bias": jnp.zeros(1), "mean": jnp.zeros(1), "var": jnp.array([1e-5])}
    out = blocks.BatchNorm().apply({"params": params}, jnp.ones((1, 1)))
    np.testing.assert_allclose(out, 1 / np.sqrt(2e-5), rtol=1e-6)


def test_batch_norm_rounds_once():
    x = jnp.array([[3.0]], jnp.bfloat16)
    params = {"scale": [1.0], "bias": [-1.0], "mean": [1.0 / 3], "var": [1.0]}
    params = {name: jnp.array(value, jnp.float32) for name, value in params.items()}
    out = blocks.BatchNorm(eps=0.0).apply({"params": params}, x)
    assert out.dtype == jnp.bfloat16 and out[0, 0] == jnp.bfloat16(3 - 1 / 3 - 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_depths": (0, 1, 0, 1, 1, 1)}, r"encoder_depths=\(0, 1, 0, 1, 1, 1\): only the first"),
        ({"decoder_batch_norm": (1, 3)}, r"decoder_batch_norm=\(1, 3\): stages \[3\] have no ResBlocks"),
        ({"decoder_relu": (6,)}, r"decoder_relu=\(6,\): must be numbers of stages, 0 to 5"),
        ({"widths": (16, 32, 32, 34, 34, 128)}, "32 and 34 must divide"),
        ({"widths": (16, 30, 30, 30, 30, 30), "latent_channels": 30}, "must be multiples of 4"),
    ],
)
def test_impossible_fields(fields, message):
    with pytest.raises(InputError, match=message):
        dc_ae_toys.shapes_of(TOYS["f32c32-in"].clone(**fields))


def test_width_of_an_empty_stage_has_no_effect():
    model = TOYS["f32c32-in"]
    assert dc_ae_toys.shapes_of(model) == dc_ae_toys.shapes_of(model.clone(widths=(999, *model.widths[1:])))


# Parameters, of which the statistics of BatchNorm are the last number; docs/numerics.md 1.1.
SIZES = [
    (dc_ae.DC_AE_F32C32_SANA, 32, 0.41407, 153_027_104 + 159_223_171, 0),
    (dc_ae.DC_AE_LITE_F32C32_SANA, 32, 0.41407, 153_027_104 + 268_154_124, 0),
    (dc_ae.DC_AE_F32C32_IN, 32, 0.3189, 323_356_460, 12_800),
    (dc_ae.DC_AE_F32C32_MIX, 32, 0.4552, 323_356_460, 12_800),
    (dc_ae.DC_AE_F64C128_IN, 64, 0.2889, 676_896_140, 12_800),
    (dc_ae.DC_AE_F64C128_MIX, 64, 0.4538, 676_896_140, 12_800),
    (dc_ae.DC_AE_F128C512_IN, 128, 0.4883, 1_120_682_252, 12_800),
    (dc_ae.DC_AE_F128C512_MIX, 128, 0.3620, 1_120_682_252, 12_800),
]


@pytest.mark.parametrize(("model", "compression", "scale", "trained", "statistics"), SIZES)
def test_preset_sizes(model, compression, scale, trained, statistics):
    assert (model.compression, model.scaling_factor) == (compression, scale) and hash(model)
    counts = [0, 0]
    for path, shape in dc_ae_toys.shapes_of(model).items():
        counts[path.endswith(("/mean", "/var"))] += int(np.prod(shape))
    assert counts == [trained, statistics]
