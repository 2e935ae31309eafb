"""A toy DC-AE run by the kernels, interpreted, is the one run by their specifications: images and a gradient."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from sana_jax.models.dc_ae import DCAE
from tests.pallas_kernels import accuracy

BOUND = 1e-5
TOY = DCAE(
    latent_channels=8,
    widths=(16,),
    encoder_depths=(1,),
    decoder_depths=(1,),
    encoder_attention=((5,),),
    decoder_attention=(None,),
    head_dim=16,
    kernels="reference",
)


def inputs():
    """Parameters, image, gradient.  Of 4 x 5 pixels, more than head_dim, attention is linear."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(TOY.init, jax.random.key(0), *TOY.example_inputs())
    params = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape) / 2, a.dtype), shapes)
    return params, *(jnp.asarray(rng.standard_normal((1, 4, 5, 3)), jnp.float32) for _ in range(2))


def compiled(kernels):
    """((parameters, image), gradient) -> (the reconstruction, gradients of parameters and image)."""
    return accuracy.quickly_compiled(accuracy.with_gradients(TOY.clone(kernels=kernels).apply))


def worst(got, want):
    return max(accuracy.error(a, b) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


def test_kernels_change_nothing(monkeypatch):
    chosen, choose = set(), dispatch.choose

    def noted(op, *args):
        name = choose(op, *args)
        chosen.add((op, name))
        return name

    monkeypatch.setattr(dispatch, "choose", noted)
    accuracy.coarse(monkeypatch, rows=1)  # less to compile
    params, x, gradient = inputs()
    reference = compiled("reference")
    want = reference((params, x), gradient)
    got = compiled("pallas_interpret")((params, x), gradient)
    ops = ("linear_attention", "mix_ffn", "add_rms_norm")
    assert chosen == {(op, name) for op in ops for name in ("reference", "pallas_interpret")}
    assert worst(got, want) <= BOUND
    # The bound tells apart: the first scale and bias of one norm off by a thousandth.
    off = jax.tree.map_with_path(
        lambda path, a: a.at[0].multiply(1.001) if "mix_ffn_norm" in str(path) else a, params
    )
    assert worst(got, reference((off, x), gradient)) > 5 * BOUND
