"""Compiling for cards that are not there: the real GPU compiler, and a summary that sees what it must see."""

import subprocess

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from sana_jax import aot
from sana_jax.aot import registers, targets
from sana_jax.aot.compiling import overheard
from sana_jax.errors import InputError

pytestmark = pytest.mark.static
needs_compiler = pytest.mark.skipif(not aot.available(), reason="needs the extra `static`")

TOKENS, WIDTH = 64, 256
X = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16)
W = jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.bfloat16)


def dense(params, x):
    return jax.nn.gelu(x @ params["kernel"])


@needs_compiler
@pytest.mark.parametrize(
    "target, kind, gib",
    [("h200", "NVIDIA H200", 140), ("h100", "NVIDIA H100 80GB HBM3", 79), ("a100", "NVIDIA A100-SXM4-80GB", 79),
     ("rtx4090", "NVIDIA GeForce RTX 4090", 23)],
)  # fmt: skip
def test_compiles_for_each_card(target, kind, gib):
    compiled = aot.compile_for(target, dense, {"kernel": W}, X)
    device = compiled.input_shardings[0][1].mesh.devices.flat[0]
    assert device.device_kind == kind and aot.device_bytes(target) // 2**30 == gib
    found = aot.summary(compiled)
    assert found["argument_bytes"] == 2 * (TOKENS + WIDTH) * WIDTH and found["output_bytes"] == 2 * TOKENS * WIDTH
    assert found["collectives"] == {} and found["custom_calls"] == {} and found["fusions"] > 0
    assert "__triton" in compiled.as_text()  # a kind of fusion that only the GPU compiler makes


def test_a_card_must_be_known():
    with pytest.raises(InputError, match="target='h20': must be one of .*; did you mean 'h200'"):
        aot.devices("h20", 1)


def test_without_the_compiler_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(targets, "available", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'sana_jax\[static\]'"):
        aot.devices("h200", 1)


@needs_compiler
def test_the_cpu_stays_the_default():
    aot.compile_for("h200", dense, {"kernel": W}, X)
    assert jax.default_backend() == "cpu"
    assert {d.platform for d in jnp.ones(3).devices()} == {"cpu"}


@needs_compiler
def test_the_cache_of_programs_keeps_none():
    """jax could not read them back, and would warn about each."""
    name, seen = "jax_persistent_cache_min_compile_time_secs", []
    before = getattr(jax.config, name)
    aot.compile_for("h200", lambda x: seen.append(getattr(jax.config, name)) or x + 1, X)
    assert set(seen) == {float("inf")} and getattr(jax.config, name) == before


@needs_compiler
def test_temp_bytes_counts_a_large_intermediate():
    n, c = 4096, 32
    row = jax.ShapeDtypeStruct((n, c), jnp.bfloat16)
    scores = 2 * n * n  # a bfloat16 [n, n]: it cannot stay in registers or shared memory

    def softmax_attention(q, k, v):
        return jax.nn.softmax(q @ k.T) @ v

    def linear_attention(q, k, v):
        return q @ (k.T @ v)

    def temp(fn):
        found = aot.summary(aot.compile_for("h200", fn, row, row, row))
        assert found["peak_bytes"] == found["temp_bytes"] + found["argument_bytes"] + found["output_bytes"]
        return found["temp_bytes"]

    assert temp(softmax_attention) >= scores
    assert temp(linear_attention) < scores / 8


@needs_compiler
def test_custom_calls_are_named():
    square = jax.ShapeDtypeStruct((128, 128), jnp.float32)
    compiled = aot.compile_for("h200", jnp.linalg.cholesky, square)
    assert any("potrf" in name for name in aot.summary(compiled)["custom_calls"])


@needs_compiler
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
    compiled = aot.compile_for("h200", dense, {"kernel": W}, X, mesh={"data": 8}, in_specs=specs)
    assert aot.summary(compiled)["collectives"] == collectives


@needs_compiler
def test_a_mesh_of_two_axes_and_a_tree_of_specs():
    specs = {"kernel": P(None, "tensor")}, P("data")
    compiled = aot.compile_for("h200", dense, {"kernel": W}, X, mesh={"data": 4, "tensor": 2}, in_specs=specs)
    found = aot.summary(compiled)
    assert found["collectives"] == {}
    assert found["argument_bytes"] == 2 * (TOKENS // 4 + WIDTH // 2) * WIDTH


@needs_compiler
def test_an_argument_keeps_its_own_sharding():
    mesh = aot.mesh_of("h200", data=4)
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=jax.sharding.NamedSharding(mesh, P("data")))
    found = aot.summary(aot.compile_for("h200", dense, {"kernel": W}, x, mesh=mesh))
    assert found["argument_bytes"] == 2 * (TOKENS // 4 + WIDTH) * WIDTH


@needs_compiler
def test_a_jitted_function_keeps_its_donation():
    found = aot.summary(aot.compile_for("h200", jax.jit(lambda x: x + 1, donate_argnums=0), X))
    assert found["donated_bytes"] == found["peak_bytes"] == 2 * TOKENS * WIDTH


@needs_compiler
def test_what_xla_says_is_overheard():
    def awkward(x):
        x = jax.lax.with_sharding_constraint(x * 2, P("data", None, "fsdp"))
        x = x.reshape(8, 4, 2, 2, 64)
        return jax.lax.with_sharding_constraint(x + 1, P(None, ("fsdp", "data")))

    x = jax.ShapeDtypeStruct((8, 16, 64), jnp.float32)
    with overheard() as said:
        aot.compile_for("h200", awkward, x, mesh={"data": 4, "fsdp": 2})
    assert "Involuntary full rematerialization" in "\n".join(said)


def test_registers_are_read_from_the_assembler(tmp_path, monkeypatch):
    """The words of ptxas, of two kernels; the first one spills."""
    said = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'fusion_1' for 'sm_90a'
ptxas info    : Function properties for fusion_1
    48 bytes stack frame, 32 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack size
ptxas info    : Compiling entry function 'fusion_2' for 'sm_90a'
ptxas info    : Function properties for fusion_2
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers"""
    done = subprocess.CompletedProcess([], 0, "", said)
    monkeypatch.setattr(registers.subprocess, "run", lambda *args, **kwargs: done)
    assert list(registers.assemble("ptxas", tmp_path / "a.ptx", "sm_90a")) == [
        {"kernel": "fusion_1", "registers": 255, "spill_bytes": 32},
        {"kernel": "fusion_2", "registers": 40, "spill_bytes": 0},
    ]
    done.returncode, done.stderr = 255, "ptxas a.ptx, line 5; fatal   : Unsupported .version 9.0"
    with pytest.raises(InputError, match="Unsupported .version"):
        list(registers.assemble("ptxas", tmp_path / "a.ptx", "sm_90a"))
