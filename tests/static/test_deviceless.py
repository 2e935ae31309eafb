"""The deviceless H200 compile: the real GPU compiler, and a summary that sees what it must see."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from tests.static import deviceless

pytestmark = [
    pytest.mark.static,
    pytest.mark.skipif(not deviceless.available(), reason="needs the extra `static`"),
]

TOKENS, WIDTH = 64, 256
X = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16)
W = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)


def dense(params, x):
    return jax.nn.gelu(x @ params["kernel"])


def test_compiles_for_an_h200():
    compiled = deviceless.compile_for_h200(dense, {"kernel": W}, X)
    device = compiled.input_shardings[0][1].mesh.devices.flat[0]
    assert device.device_kind == "NVIDIA H200"
    found = deviceless.summary(compiled)
    assert found["argument_bytes"] == 2 * (TOKENS + WIDTH) * WIDTH
    assert found["collectives"] == {} and found["custom_calls"] == {}
    assert "__triton" in compiled.as_text()  # a kind of fusion that only the GPU compiler makes


def test_the_cpu_stays_the_default():
    deviceless.compile_for_h200(dense, {"kernel": W}, X)
    assert jax.default_backend() == "cpu"
    assert {d.platform for d in jnp.ones(3).devices()} == {"cpu"}


def test_temp_bytes_counts_a_large_intermediate():
    n, c = 4096, 32
    row = jax.ShapeDtypeStruct((n, c), jnp.bfloat16)
    scores = 2 * n * n  # a bfloat16 [n, n]: it cannot stay in registers or shared memory

    def softmax_attention(q, k, v):
        return jax.nn.softmax(q @ k.T) @ v

    def linear_attention(q, k, v):
        return q @ (k.T @ v)

    def temp(fn):
        return deviceless.summary(deviceless.compile_for_h200(fn, row, row, row))["temp_bytes"]

    assert temp(softmax_attention) >= scores
    assert temp(linear_attention) < scores / 8


def test_custom_calls_are_named():
    square = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    compiled = deviceless.compile_for_h200(jnp.linalg.cholesky, square)
    assert any("potrf" in name for name in deviceless.summary(compiled)["custom_calls"])


@pytest.mark.parametrize(
    "specs, collectives",
    [
        ((P(), P("data")), {}),  # each device its own rows: nothing to exchange
        ((P("data"), P(None, "data")), {"all-reduce": 1}),  # each device a part of every sum
        ((P("data"), P("data")), {"all-gather": 1}),  # the parameters spread over the batch axis
    ],
    ids=["batch", "contraction", "fsdp"],
)
def test_collectives_follow_the_sharding(specs, collectives):
    compiled = deviceless.compile_for_h200(dense, {"kernel": W}, X, devices=8, in_specs=specs)
    assert deviceless.summary(compiled)["collectives"] == collectives


def test_a_mesh_of_two_axes_and_a_tree_of_specs():
    compiled = deviceless.compile_for_h200(
        dense,
        {"kernel": W},
        X,
        devices={"data": 4, "tensor": 2},
        in_specs=({"kernel": P(None, "tensor")}, P("data")),
    )
    found = deviceless.summary(compiled)
    assert found["collectives"] == {}
    assert found["argument_bytes"] == 2 * (TOKENS // 4 + WIDTH // 2) * WIDTH


def test_a_jitted_function_keeps_its_donation():
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    memory = deviceless.compile_for_h200(step, X).memory_analysis()
    assert memory.alias_size_in_bytes == 2 * TOKENS * WIDTH
