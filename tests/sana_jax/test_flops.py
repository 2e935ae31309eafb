"""The count of operations, against arithmetic, against XLA's own and against published sizes."""

import jax
import jax.numpy as jnp
import pytest

from sana_jax import flops
from sana_jax.models.dc_ae import DC_AE_F32C32_SANA, DCAE
from sana_jax.models.gemma2 import GEMMA2_2B, Gemma2
from sana_jax.models.sana import SANA_600M, SANA_1600M, Sana
from sana_jax.training import lpips
from sana_jax.training.objectives import Frozen

TERA = 1e12


def of(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def sana_batch(rows, side, tokens=300, width=2304):
    return {
        "latent": of(rows, side, side, 32),
        "states": of(rows, tokens, width),
        "mask": of(rows, tokens, dtype=bool),
    }


def forward(module, side):
    return flops.forward(module, of(1, side, side, 32), of(1), of(1, 300, 2304), of(1, 300, dtype=bool))


@pytest.mark.parametrize(
    "module, side, tera", [(SANA_600M, 32, 1.12), (SANA_1600M, 16, 0.837), (SANA_1600M, 32, 2.97)]
)
def test_published_transformers(module, side, tera):
    """Independent counts by torch's FlopCounterMode, which has the depthwise convolution too."""
    assert forward(module, side) == pytest.approx(tera * TERA, rel=0.005)


def test_published_autoencoder_and_text_encoder():
    assert flops.forward(DC_AE_F32C32_SANA, of(1, 1024, 1024, 3), method="encode") == pytest.approx(
        5.18 * TERA, rel=0.005
    )
    assert flops.forward(DC_AE_F32C32_SANA, of(1, 32, 32, 32), method="decode") == pytest.approx(
        8.37 * TERA, rel=0.005
    )
    # The other count takes causal attention as half of the matrix, ours is of what is computed.
    assert flops.forward(GEMMA2_2B, of(1, 300, dtype=jnp.int32), of(1, 300, dtype=bool)) == pytest.approx(
        1.22 * TERA, rel=0.02
    )


def test_products_convolutions_and_loops_by_hand():
    assert flops.of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), of(2, 3, 5), of(2, 5, 7)) == 2 * 2 * 3 * 5 * 7
    kernel = of(3, 3, 2, 6)  # two groups of two channels each

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
        )

    assert flops.of(convolve, of(1, 8, 8, 4), kernel) == 2 * 64 * 6 * 9 * 2

    def loop(x):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(lambda x: x @ x)(x), None), x, length=5)[0]

    assert flops.of(loop, of(4, 4)) == 5 * 2 * 4**3
    with pytest.raises(ValueError, match="unknown length"):
        flops.of(lambda x: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, x), of(4, 4))


@pytest.mark.parametrize(
    "module, inputs",
    [
        (Sana(256, 1, 8, 8, caption_width=256), (of(2, 8, 8, 32), of(2), of(2, 32, 256), of(2, 32, dtype=bool))),
        (Gemma2(512, 256, 1, 4, 2, 64, 1024), (of(2, 64, dtype=jnp.int32), of(2, 64, dtype=bool))),
        (DCAE(8, widths=(64, 128), encoder_depths=(1, 1), decoder_depths=(1, 1), encoder_attention=(None,) * 2,
              decoder_attention=(None,) * 2), (of(1, 128, 128, 3),)),
    ],
    ids=["sana", "gemma2", "dc_ae"],
)  # fmt: skip
def test_xla_counts_the_same(module, inputs):
    """XLA counts what is elementwise too, no products with padding, and loops once: so one layer, and a wide one."""
    params = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())
    found = jax.jit(module.apply).lower(params, *inputs).compile().cost_analysis()
    found = found[0] if isinstance(found, list) else found
    assert flops.forward(module, *inputs) == pytest.approx(found["flops"], rel=0.06)


def test_a_step_is_three_passes_of_what_is_trained():
    whole = flops.train_flops(SANA_1600M.clone(remat="full"), sana_batch(4, 16))
    assert whole == 3 * 4 * forward(SANA_1600M, 16)


def test_live_features_add_a_pass_of_each_network():
    model = Sana(64, 1, 2, 2, caption_width=32)
    text, dc_ae = (
        Gemma2(64, 32, 1, 2, 1, 16, 64),
        DCAE(32, widths=(8, 8, 8, 8, 8, 32), encoder_attention=(None,) * 6, decoder_attention=(None,) * 6),
    )
    frozen = Frozen({"text": text, "dc_ae": dc_ae}, {"null": of(6, 32)})
    live = {"image": of(2, 64, 64, 3), "ids": of(2, 9, dtype=jnp.int32), "ids_mask": of(2, 9, dtype=bool)}
    more = flops.train_flops(model, live, frozen) - flops.train_flops(model, sana_batch(2, 2, 6, 32))
    encoded = flops.forward(dc_ae, live["image"], method="encode")
    assert more == encoded + flops.forward(text, live["ids"], live["ids_mask"])
    prefix = jax.eval_shape(
        lambda ids: text.init_with_output(jax.random.key(0), ids, method="encode_prefix")[0],
        of(1, 3, dtype=jnp.int32),
    )
    less = flops.train_flops(model, live, Frozen(frozen.modules, frozen.params | {"prefix": prefix}))
    assert less - flops.train_flops(model, sana_batch(2, 2, 6, 32)) - encoded < 0.8 * (more - encoded)


def test_the_other_objectives():
    dc_ae = DCAE(8, widths=(8, 16), encoder_depths=(1, 1), decoder_depths=(1, 1), encoder_attention=(None,) * 2,
                 decoder_attention=(None,) * 2)  # fmt: skip
    image = of(2, 32, 32, 3)
    plain = flops.train_flops(dc_ae, {"image": image})
    assert plain == 3 * flops.forward(dc_ae, image)
    weights = jax.eval_shape(
        lambda: lpips.LPIPS().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 32, 32, 3)))
    )
    assert flops.train_flops(dc_ae, {"image": image}, Frozen({}, {"lpips": weights["params"]})) > 2 * plain
    text = Gemma2(512, 32, 1, 2, 1, 16, 64)
    ids, mask = of(2, 9, dtype=jnp.int32), of(2, 9, dtype=bool)
    head = 2 * 2 * 8 * 32 * 512
    assert flops.train_flops(text, {"ids": ids, "ids_mask": mask}) == 3 * (flops.forward(text, ids, mask) + head)


def test_peaks():
    assert flops.peak("NVIDIA H200") == 989e12 and flops.peak("NVIDIA A100-SXM4-80GB") == 312e12
    assert flops.peak("NVIDIA H100 80GB HBM3") > flops.peak("NVIDIA H100 PCIe")
    assert flops.peak("cpu") is None
