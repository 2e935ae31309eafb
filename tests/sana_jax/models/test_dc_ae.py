"""DC-AE against diffusers' `AutoencoderDC`, built from its class with random weights.

Errors are max |ours - theirs| / rms(theirs).  BOUND for float32: two correct evaluations differ by
their own rounding.  Against float64 (x86 CPU, 4 seeds, 3 sizes) diffusers in float32 is off by up
to 6e-6 and we by up to 5e-6, and we differ by up to 8e-6; BOUND is twice that.  The mildest mistake
among the controls costs 1e-1.
"""

import copy
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.models import dc_ae_blocks as blocks
from sana_jax.models.layers import RMSNorm
from tests import dc_ae_toys, peers
from tests.dc_ae_toys import error, image, nchw, nhwc, randomise

BOUND = 1.5e-5

TOY = dc_ae_toys.TOYS["f32c32-sana"]


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def peer():
    """The toy as diffusers builds it."""
    return dc_ae_toys.make_peer(TOY)


@pytest.fixture(scope="module")
def params(peer):
    return to_params(peer)


def to_params(module, dtype=np.float32):
    return dc_ae_toys.to_params(TOY, module, dtype)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def encode(params, x):
    return dc_ae_toys.run(TOY, params, x, method="encode")


def decode(params, z):
    return dc_ae_toys.run(TOY, params, z, method="decode")


# --- The whole.


@pytest.mark.parity
@pytest.mark.parametrize(
    "shape",
    [
        (1, 96, 160),  # latent 3 x 5: attention over 240 and 60 tokens is linear, over 15 quadratic
        (2, 32, 32),  # latent 1 x 1: every attention is quadratic, from 16 tokens on
    ],
)
def test_whole_model(peer, params, shape):
    x = image(*shape)
    z = peer.encode(nchw(x)).latent
    y = peer.decode(z).sample
    assert peers.rms(z) >= 1 and peers.rms(y) >= 1
    assert z.shape[2:] == (shape[1] // TOY.compression, shape[2] // TOY.compression)
    assert error(encode(params, x), nhwc(z)) <= BOUND
    assert error(decode(params, nhwc(z).astype(np.float32)), nhwc(y)) <= BOUND


@pytest.mark.parity
def test_as_close_to_float64_as_the_peer(peer, params):
    x = image(1, 64, 96)
    exact = copy.deepcopy(peer).double()
    z = exact.encode(nchw(x).double()).latent
    theirs = error(nhwc(peer.encode(nchw(x)).latent), nhwc(z))
    ours = error(encode(params, x), nhwc(z))
    z = z.float()
    y = nhwc(exact.decode(z.double()).sample)
    theirs_y = error(nhwc(peer.decode(z).sample), y)
    ours_y = error(decode(params, nhwc(z).astype(np.float32)), y)
    print(f"latent: ours {ours:.1e}, theirs {theirs:.1e}; image: {ours_y:.1e}, {theirs_y:.1e}")
    assert ours <= 3 * theirs and ours_y <= 3 * theirs_y


@pytest.mark.parity
def test_bfloat16_loses_no_more_than_the_peer(peer):
    """rms error of each against itself in float32 on the same bfloat16 weights and inputs."""
    import torch

    model = TOY.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    halves = [
        jax.jit(lambda p, x, method=method: model.apply({"params": p}, x, method=method))
        for method in ("encode", "decode")
    ]
    ratios = []
    for seed in range(5):
        low = randomise(copy.deepcopy(peer), seed).to(torch.bfloat16)
        high = copy.deepcopy(low).float()
        x = nchw(image(1, 64, 96, seed=seed)).bfloat16()
        z = low.encode(x).latent
        pairs = [
            (z, high.encode(x.float()).latent, encode, x),
            (low.decode(z).sample, high.decode(z.float()).sample, decode, z),
        ]
        exact, own_low, ratio = to_params(high), to_params(low, jnp.bfloat16), []
        for (rough, fine, own, inputs), half in zip(pairs, halves):
            inputs = nhwc(inputs).astype(np.float32)
            ours = np.asarray(half(own_low, inputs), np.float32)
            ratio.append(peers.rms(ours - own(exact, inputs)) / peers.rms(rough.float() - fine))
        ratios.append(ratio)
    print("bfloat16 error, ours / theirs, encode and decode:", np.mean(ratios, axis=0))
    assert (np.mean(ratios, axis=0) <= 1.2).all()


@pytest.mark.parity
def test_images_of_a_batch_do_not_mix(params):
    x = image(2, 32, 32)
    y, z = encode(params, x), encode(params, np.stack([x[0], -x[0]]))
    assert (y[0] == z[0]).all() and (y[1] != z[1]).any()


# --- Block by block: (name in the peer, path in ours, module, input).

RES, VIT, DOWN, UP = blocks.ResBlock(), blocks.EfficientViTBlock(), blocks.Down, blocks.Up
CASES = {
    "res": ("encoder.down_blocks.2.0", "encoder/stage_2/block_0", RES, (2, 12, 10, 32)),
    "vit": ("encoder.down_blocks.3.1", "encoder/stage_3/block_1", VIT, (2, 3, 11, 64)),
    "vit, 32 tokens": ("decoder.up_blocks.5.0", "decoder/stage_5/block_0", VIT, (2, 4, 8, 128)),
    "down, wider": ("encoder.down_blocks.2.1", "encoder/stage_2/down", DOWN(64), (2, 6, 10, 32)),
    "down, as wide": ("encoder.down_blocks.1.1", "encoder/stage_1/down", DOWN(32), (1, 6, 10, 32)),
    "up, narrower": ("decoder.up_blocks.2.0", "decoder/stage_2/up", UP(32), (2, 6, 5, 64)),
    "up, as wide": ("decoder.up_blocks.3.0", "decoder/stage_3/up", UP(64), (1, 6, 5, 64)),
}


def at(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_block_and_its_gradient(peer, params, case):
    name, path, module, shape = CASES[case]
    params, x = at(params, path), noise(*shape)
    theirs_in = nchw(x).requires_grad_()
    theirs = peer.get_submodule(name)(theirs_in)
    ours, pullback = jax.vjp(jax.jit(lambda x: module.apply({"params": params}, x)), x)
    assert error(ours, nhwc(theirs)) <= BOUND
    probe = noise(*ours.shape, seed=1)
    theirs.backward(nchw(probe))
    assert error(pullback(probe)[0], nhwc(theirs_in.grad)) <= BOUND


@pytest.mark.parity
@pytest.mark.parametrize("case", ["vit", "vit, 32 tokens"])
def test_attention_and_mix_ffn_apart(peer, params, case):
    name, path, module, shape = CASES[case]
    block, x = peer.get_submodule(name), noise(*shape)
    middle = block.attn(nchw(x))
    expected = {
        "attention_norm": middle - nchw(x),
        "mix_ffn_norm": block.conv_out(middle) - middle,
    }
    before = {"attention_norm": x, "mix_ffn_norm": nhwc(middle)}  # what the branch is added to
    variables = {"params": at(params, path)}
    _, state = module.apply(variables, x, capture_intermediates=True)
    for part, theirs in expected.items():
        ours = state["intermediates"][part]["__call__"][0] - before[part]
        assert error(ours, nhwc(theirs)) <= BOUND


@pytest.mark.parity
def test_attention_without_and_with_two_scales():
    import torch
    from diffusers.models import attention_processor as peer_attention

    for scales in ((), (3, 5)):
        theirs = peer_attention.SanaMultiscaleLinearAttention(
            64, 64, attention_head_dim=32, norm_type="rms_norm", kernel_sizes=scales
        )
        theirs.norm_out = torch.nn.Identity()
        state = peers.to_numpy_state(peers.randomise(theirs, seed=0))
        kernel = np.concatenate([state[f"to_{x}.weight"] for x in "qkv"]).T
        params = {"qkv": {"kernel": kernel}, "project": {"kernel": state["to_out.weight"].T}}
        for i, size in enumerate(scales):
            scale = state[f"to_qkv_multiscale.{i}.proj_in.weight"]
            mix = state[f"to_qkv_multiscale.{i}.proj_out.weight"]
            params[f"scale_{size}"] = {"kernel": scale[:, 0].transpose(1, 2, 0)}
            params[f"scale_{size}_mix"] = {"kernel": mix.reshape(6, 32, 32).transpose(0, 2, 1)}
        x = noise(2, 7, 9, 64)
        ours = blocks.MultiScaleAttention(scales).apply({"params": params}, x)
        assert error(ours, nhwc(theirs(nchw(x)))) <= BOUND


# --- Controls: each mistake that one could make here must break the bound.  A control changes the
# module (`patch`) or the parameters, runs the case it names, and returns the parameters to use.


def tensorflow_order(patch, params):
    def space_to_channel(x):
        b, h, w, d = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, d).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, h // 2, w // 2, 4 * d)

    def channel_to_space(x):
        b, h, w, d = x.shape
        x = x.reshape(b, h, w, 2, 2, d // 4).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, 2 * h, 2 * w, d // 4)

    patch.setattr(blocks, "space_to_channel", space_to_channel)
    patch.setattr(blocks, "channel_to_space", channel_to_space)
    return params


def groups_with_a_stride(patch, params):
    def average(x, channels):
        return x.reshape(*x.shape[:3], -1, channels).mean(axis=-2)

    patch.setattr(blocks, "average", average)
    patch.setattr(blocks, "duplicate", lambda x, n: jnp.tile(x, n // x.shape[-1]))
    return params


def same_padding(patch, params):
    conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding="SAME")
    patch.setattr(blocks, "Conv3x3", conv)
    return params


def norm_eps(eps):
    def control(patch, params):
        patch.setattr(blocks, "RMSNorm", lambda **kwargs: RMSNorm(eps=eps, **kwargs))
        return params

    return control


def no_norm_bias(patch, params):
    norm = "norm" if "norm" in params else "mix_ffn_norm"
    return params | {norm: params[norm] | {"bias": 0 * params[norm]["bias"]}}


def thirds(patch, params):
    """to_q taken for the queries of all heads: columns (part, head, c) moved to (head, part, c)."""
    attention, heads = params["attention"], params["attention_norm"]["scale"].shape[0] // 32

    def moved(kernel, c):
        shape = kernel.shape[:-1] + (3, heads, c)
        return kernel.reshape(shape).swapaxes(-3, -2).reshape(kernel.shape)

    leaves = ("qkv", "scale_5")
    changed = {name: {"kernel": moved(attention[name]["kernel"], 32)} for name in leaves}
    mix = attention["scale_5_mix"]["kernel"]
    changed["scale_5_mix"] = {"kernel": moved(mix.T, 1).T}
    return params | {"attention": attention | changed}


def swapped_gate(patch, params):
    def swapped(a):
        return np.roll(a, a.shape[-1] // 2, axis=-1)

    ffn = params["mix_ffn"]
    changed = {name: jax.tree.map(swapped, ffn[name]) for name in ("expand", "depthwise")}
    return params | {"mix_ffn": ffn | changed}


CONTROLS = [
    ("down, wider", tensorflow_order),
    ("up, narrower", tensorflow_order),
    ("down, wider", groups_with_a_stride),
    ("up, narrower", groups_with_a_stride),
    ("down, wider", same_padding),
    ("down, as wide", same_padding),
    ("res", norm_eps(1e-2)),
    ("vit", norm_eps(1e-2)),
    ("res", no_norm_bias),
    ("vit", no_norm_bias),
    ("vit", thirds),
    ("vit, 32 tokens", thirds),
    ("vit", swapped_gate),
]


@pytest.mark.parity
@pytest.mark.parametrize(("case", "control"), CONTROLS)
def test_bound_catches(peer, params, monkeypatch, case, control):
    name, path, module, shape = CASES[case]
    x = noise(*shape)
    theirs = nhwc(peer.get_submodule(name)(nchw(x)))
    assert error(module.apply({"params": at(params, path)}, x), theirs) <= BOUND
    wrong = control(monkeypatch, at(params, path))
    assert error(module.apply({"params": wrong}, x), theirs) > 5 * BOUND


@pytest.mark.parity
def test_bound_catches_silu_at_the_end(peer, params):
    z = noise(1, 3, 5, 32)
    theirs = nhwc(peer.decode(nchw(z)).sample)
    assert error(decode(params, z), theirs) <= BOUND
    wrong = dc_ae_toys.run(TOY.clone(silu_out=True), params, z, method="decode")
    assert error(wrong, theirs) > 5 * BOUND


@pytest.mark.parity
def test_norm_eps_of_faint_signals(peer, params, monkeypatch):
    """1e-5 and 1e-6 are told apart only where the signal's power is no larger than that."""
    name, path, module, shape = CASES["res"]
    faint = copy.deepcopy(peer.get_submodule(name))
    faint.conv2.weight *= 1e-3
    change = at(params, path)
    change = change | {"conv_2": {"kernel": change["conv_2"]["kernel"] * np.float32(1e-3)}}
    x = noise(*shape)
    theirs = nhwc(faint(nchw(x)))
    assert error(module.apply({"params": change}, x), theirs) <= BOUND
    norm_eps(1e-6)(monkeypatch, change)
    assert error(module.apply({"params": change}, x), theirs) > 5 * BOUND
