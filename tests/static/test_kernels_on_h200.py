"""The kernels inside the whole 1.6B model, compiled for an H200: what it holds, exchanges and computes.

Units: A is one activation, tokens x batch x width x 2 bytes.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks.kernels_cases import MODELS, Case
from sana_jax import aot, flops
from sana_jax.aot.compiling import NO_TRITON_GEMM
from sana_jax.models.sana import SANA_1600M, SANA_1600M_4K
from tests.pallas_kernels.accuracy import NIGHT
from tests.static.test_sana_on_h200 import BF16, GIB, denoiser, parameters

pytestmark = [
    pytest.mark.static,
    pytest.mark.skipif(not aot.available(), reason="needs the extra `static`"),
    pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning"),  # of Pallas, since jax 0.11
]

# 1.34 GiB in Pallas, 1.54 in plain XLA and ~3.0 with the library's convolution.
@pytest.mark.parametrize("kernels", ["pallas", "jax_triton"])
@pytest.mark.parametrize("module, side, gib", [(SANA_1600M, 32, 0.6), (SANA_1600M_4K, 128, 1.45)])
def test_denoiser_fits(module, side, gib, kernels):
    denoise, avals = denoiser(module.clone(kernels=kernels, **BF16), side)
    found = aot.summary(aot.compile_for("h200", denoise, *avals))
    assert found["temp_bytes"] < gib * GIB and found["collectives"] == {}
    # Of a block: state and apply, Mix-FFN, two modulations, two gates; of the head: a modulation.
    assert sum(found["custom_calls"].values()) == 8 and all("triton" in name for name in found["custom_calls"])


# Temporary memory in A, forward and with gradients.  Library operations: 6.06 / 9.13, 6.06 / 12.07, 10.00 / 10.00.
@pytest.mark.parametrize(
    "op, most",
    [("linear_attention", (3.1, 8.2)), ("linear_attention, norm", (6.1, 9.2)), ("mix_ffn", (0.1, 5.1))],
)
def test_plain_jax_writes_out_less_than_the_library(op, most):
    case = Case(op, 32768, MODELS["1.6B"][0].sizes, "bfloat16")
    programs = (aot.compile_for("h200", fn, *case.shapes()) for fn in case.passes(case.function("xla")).values())
    found = [aot.summary(program)["temp_bytes"] / (32768 * 2240 * 2) for program in programs]
    assert all(a <= b for a, b in zip(found, most, strict=True)), found


@pytest.mark.parametrize("kernels", ["pallas", "jax_triton"])
def test_data_parallel_needs_no_collectives(kernels):
    denoise, avals = denoiser(SANA_1600M.clone(depth=1, kernels=kernels, **BF16), 32, batch=8)
    specs = (P(), P("data"), P("data"))
    compiled = aot.compile_for("h200", denoise, *avals, mesh={"data": 8}, in_specs=specs)
    assert aot.summary(compiled)["collectives"] == {}


def training(depth, side, batch, **fields):
    """(gradient of a loss, its arguments): parameters in float32, activations in bfloat16, 300 text tokens."""
    module = SANA_1600M.clone(depth=depth, dtype=jnp.bfloat16, **fields)
    shapes = (batch, side, side, 32), (batch,), (batch, 300, module.caption_width), (batch, 300)
    inputs = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, (jnp.float32, jnp.float32, jnp.bfloat16, bool))]

    def loss(params, *inputs):
        return jnp.mean(module.apply({"params": params}, *inputs).astype(jnp.float32) ** 2)

    return jax.grad(loss), (parameters(module), *inputs)


# (side of the latent, batch, bound in A): the products of a block are 12 A, its input one more, and the
# rest is mostly the keys and values of the text, 0.6 A and 2.3 A.  Measured: 13.6 and 15.6.
@pytest.mark.parametrize("kernels", ["pallas"] + ["jax_triton"] * NIGHT)
@pytest.mark.parametrize("side, batch, most", [(16, 64, 17), (32, 16, 14.5)])
def test_what_a_block_keeps_for_the_backward_pass(side, batch, most, kernels):
    def temporary(depth):
        fn, avals = training(depth, side, batch, kernels=kernels, remat="products")
        # Without a card jax 0.10.2 has no tiles for one of the products, see aot.compiling.
        return aot.summary(aot.compile_for("h200", fn, *avals, options=NO_TRITON_GEMM))["temp_bytes"]

    activation = side * side * batch * SANA_1600M.width * 2
    assert most - 4 < (temporary(20) - temporary(10)) / 10 / activation <= most


@pytest.mark.parametrize("side", [16, 32])
def test_no_product_with_a_weight_is_computed_again(side):
    """Attention is, to tokens and to text; the smallest product with a weight would be 2% more."""

    def counted(remat):
        fn, avals = training(2, side, 4, kernels="xla", remat=remat)
        return flops.of(fn, *avals)

    plain = counted(None)
    assert plain <= counted("products") < 1.012 * plain
    assert counted("full") > 1.25 * plain, "control"
