"""CAME's rule for what is factored, against the formulas in float64, one layer at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.models.sana import Sana
from sana_jax.parameters import parameter_shapes
from sana_jax.training.came import is_factored, layer_axes, scale_by_came

B1, B2, B3, EPS1, EPS2 = 0.9, 0.999, 0.9999, 1e-30, 1e-16
STEPS = 5
MODELS = {
    "sana": Sana(width=64, depth=2, heads=2, cross_heads=4, qk_norm=True, guidance_embed=True),
    "dc_ae": DCAE(
        widths=(8, 16, 32), latent_channels=8, encoder_depths=(1, 1, 1), decoder_depths=(1, 1, 1),
        encoder_attention=(None, None, (5,)), decoder_attention=(None, None, (5,)),
        decoder_relu=(0,), decoder_batch_norm=(0,),
    ),
    "gemma2": Gemma2(64, 16, 2, 2, 1, 8, 32),
}  # fmt: skip


def reference(gradients, factored):
    """The updates of one parameter of torch, [STEPS ...], as the paper and SANA's training have them."""
    shape = gradients[0].shape
    m, full, row, col, res_row, res_col = np.zeros(shape), np.zeros(shape), 0.0, 0.0, 0.0, 0.0
    out = []
    for g in gradients.astype(np.float64):
        square = g * g + EPS1
        if factored:
            row, col = B2 * row + (1 - B2) * square.mean(1), B2 * col + (1 - B2) * square.mean(0)
            u = g / np.sqrt(np.outer(row, col) / row.mean())
        else:
            full = B2 * full + (1 - B2) * square
            u = g / np.sqrt(full)
        u /= max(1.0, np.sqrt(np.mean(u * u)))
        m = B1 * m + (1 - B1) * u
        out.append(m)
        if factored:
            residue = (u - m) ** 2 + EPS2
            res_row, res_col = B3 * res_row + (1 - B3) * residue.mean(1), B3 * res_col + (1 - B3) * residue.mean(0)
            out[-1] = m / np.sqrt(np.outer(res_row, res_col) / res_row.mean())
    return np.stack(out)


def ours(path, gradients):
    tx = scale_by_came()
    tree = unflatten_dict({path: jnp.asarray(gradients[0])}, sep="/")
    state, out = tx.init(tree), []
    for g in gradients:
        update, state = jax.jit(tx.update)(unflatten_dict({path: jnp.asarray(g)}, sep="/"), state)
        out.append(flatten_dict(update, sep="/")[path])
    return np.stack(out), state


def draw(*shape):
    rng = np.random.default_rng(len(shape))
    scale = 10.0 ** rng.integers(-3, 3, (STEPS, *shape[:1], *[1] * (len(shape) - 1)))
    return (scale * rng.normal(size=(STEPS, *shape))).astype(np.float32)


@pytest.mark.parametrize(
    "path, shape, factored",
    [
        ("blocks/mix_ffn/depthwise/kernel", (2, 3, 3, 6), False),
        ("blocks/mix_ffn/depthwise/bias", (2, 6), False),
        ("blocks/mix_ffn/expand/kernel", (2, 5, 6), True),
        ("blocks/modulation", (2, 6, 5), True),
        ("key_value/key_norm/scale", (2, 5), False),
        ("layers/query/kernel", (2, 5, 4), True),
        ("patch_embed/kernel", (5, 4), True),
        ("patch_embed/bias", (5,), False),
        ("encoder/stage_0/block_0/conv_1/kernel", (3, 3, 2, 4), False),
        ("encoder/stage_2/block_0/mix_ffn/depthwise/kernel", (3, 3, 4), False),
    ],
)
def test_one_parameter(path, shape, factored):
    gradients = draw(*shape)
    found, state = ours(path, gradients)
    kept = {name.rpartition("/")[2] for name in flatten_dict(state.square, sep="/")}
    assert kept == ({"row", "col"} if factored else {"full"})
    assert bool(jax.tree.leaves(state.instability)) == factored
    layers = range(shape[0]) if layer_axes(path) else [...]
    for layer in layers:
        expected = reference(gradients[:, layer], factored)
        np.testing.assert_allclose(found[:, layer], expected, rtol=3e-5, atol=3e-5 * np.abs(expected).max())
        if not factored and len(shape) - layer_axes(path) > 2:  # came-pytorch's own rule gives something else
            last_two = reference(gradients[:, layer].reshape(STEPS, -1, shape[-1]), True).reshape(found[:, layer].shape)
            assert np.abs(found[:, layer] - last_two).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_factored(name):
    """Exactly what torch keeps as matrices or as 1x1 convolutions, but for grouped ones of DC-AE."""
    shapes = parameter_shapes(MODELS[name])
    factored = {path for path, shape in shapes.items() if is_factored(path, shape)}
    assert {path for path, shape in shapes.items() if layer_axes(path)} == {
        path for path in shapes if path.split("/")[0] in ("blocks", "key_value", "layers")
    }
    expected = {
        path
        for path, shape in shapes.items()
        if path.endswith(("/kernel", "modulation", "embedding")) and not any(w in path for w in ("depthwise", "conv", "scale_5"))
    }
    assert factored == expected
    assert len(factored) >= 6


def test_state_is_small_and_float32():
    shapes = parameter_shapes(MODELS["sana"])
    tree = unflatten_dict({path: jnp.zeros(shape, jnp.bfloat16) for path, shape in shapes.items()}, sep="/")
    state = scale_by_came().init(tree)
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in state]
    assert sizes[0] == sum(np.prod(shape) for shape in shapes.values())
    assert sizes[1] < 0.12 * sizes[0] and sizes[2] < sizes[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
