"""Every kernel and every tile, for cards that are not there: it lowers, masks, has no race and no spill.

Every tile of the tables is compiled in both languages for three generations of tensor cores.
"""

import functools
import importlib
import json
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import dispatch
from pallas_kernels.linear_attention import NORMED_HEADS, linear_attention
from pallas_kernels.mix_ffn import mix_ffn
from tests.pallas_kernels import accuracy, gpu

pytestmark = gpu.STATIC
PACKAGE = pathlib.Path(__file__).parents[2] / "pallas_kernels"
aval = jax.ShapeDtypeStruct


def attention_program(dtype, width, implementation, ragged=True, normed=True, size=(2, 16384, 70)):
    """Forward and backward, at 4096 px: there a run has several tiles, which the compiler overlaps."""
    (b, n, k), c = size, int(width)
    n -= ragged

    def attend(qkv, *scale):
        return linear_attention(qkv, 1e-15, *scale, implementation=implementation)

    args = aval((b, n, k, 3 * c), dtype), *[aval((2, k, c), jnp.float32)] * normed
    return accuracy.with_gradients(attend), args, aval((b, n, k, c), dtype)


def mix_ffn_program(dtype, _, implementation, ragged=True, normed=False):
    """Forward and backward, with the first SiLU and of odd sizes, or neither; it has no norm."""
    b, h, w, c = (2, 33, 35, 72) if ragged else (2, 32, 32, 5600)

    def mix(y, kernel, bias):
        return mix_ffn(y, kernel, bias, first_silu=ragged, implementation=implementation)

    args = aval((b, h, w, 2 * c), dtype), aval((3, 3, 2 * c), jnp.float32), aval((2 * c,), jnp.float32)
    return accuracy.with_gradients(mix), args, aval((b, h, w, c), dtype)


PROGRAMS = {"linear_attention": attention_program, "mix_ffn": mix_ffn_program}
# What kernels index themselves, so that no block says it: all accesses to it have to be masked.
IMAGES = {"mix_ffn_forward": {0, 1, 2}, "mix_ffn_down": {0, 1, 2, 3}, "mix_ffn_backward": {0, 1, 2}}


def forms(op, width):
    """Keywords of a program: everything masked and normed, and, for SANA's heads, nothing; the night has all."""
    normed = op == "linear_attention" and int(width) in NORMED_HEADS
    yield dict(ragged=True, normed=normed)
    if width == "32" or accuracy.NIGHT:
        yield dict(ragged=False, normed=False)
    if normed and accuracy.NIGHT:
        yield dict(ragged=False, normed=True)
        yield dict(ragged=True, normed=False)


ROWS = [(op, *row, form) for op in PROGRAMS for row in gpu.rows_of(PACKAGE / op) for form in forms(op, row[-1])]


@pytest.fixture(autouse=True)
def no_layout_of_the_cpu(monkeypatch):
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")  # where calls are looked at and not lowered


@pytest.mark.parametrize("op, device, dtype, width, form", ROWS)
def test_pallas_tiles_fit(op, device, dtype, width, form, monkeypatch):
    assert gpu.check_pallas(PROGRAMS[op](dtype, width, "pallas", **form), gpu.take(monkeypatch, device))


@pytest.mark.parametrize("op", PROGRAMS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_only_tiles_differ_among_cards(op, dtype, monkeypatch):
    """So that the kernels are lowered once for all cards, and compiled for each."""
    width = "32" if op == "linear_attention" else "any"

    def kernels(sm):
        return gpu.pallas_kernels(*PROGRAMS[op](dtype, width, "pallas"), sm=sm)

    with monkeypatch.context() as patch:
        gpu.take(patch, "default")
        same = [kernels(sm) for sm in gpu.SHARED]
    assert same[0] and same[1:] == same[:1] * 2
    given = dispatch.table(PACKAGE / op)["tiles"]
    passes = {name: {**tile, "warps": 2} for name, tile in given["default"][dtype][width].items()}
    tiles = {**given, "NVIDIA A100": {dtype: {width: passes}}}
    monkeypatch.setattr(dispatch, "table", lambda folder: {"tiles": tiles, "auto": []})
    assert kernels(80) != kernels(90) == same[0]  # the control


@pytest.mark.parametrize("op, device, dtype, width, form", ROWS)
def test_jax_triton_tiles_fit(op, device, dtype, width, form, monkeypatch):
    for sm in gpu.take(monkeypatch, device):
        assert gpu.check_jax_triton(monkeypatch, PROGRAMS[op](dtype, width, "jax_triton", **form), sm)


def faults(op):
    small = dict(size=(2, 1000, 3)) if op == "linear_attention" else {}
    return gpu.faults(PROGRAMS[op]("bfloat16", "32", "pallas", **small), IMAGES)


@pytest.mark.parametrize("op", PROGRAMS)
def test_what_is_ragged_is_masked_and_nothing_is_written_twice(op):
    assert faults(op) == set()


def test_jax_triton_computes_the_same():
    """Run by Triton's interpreter, which a process has from its start or not at all; and damage to them shows."""
    script = pathlib.Path(__file__).with_name("interpreted.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["cases"] and not any(found["cases"].values()), found["cases"]
    assert found["controls"] and all(found["controls"].values()), found["controls"]


@pytest.mark.parametrize("op", PROGRAMS)
def test_jax_triton_under_vmap_scan_and_remat(op):
    """Its calls know none of these; the forward and backward passes are lowered under all three."""
    shapes, fn = {
        "linear_attention": ([(64, 1, 96)], lambda x: linear_attention(x, 1e-15, implementation="jax_triton")),
        "mix_ffn": ([(8, 8, 16), (3, 3, 16), (16,)], functools.partial(mix_ffn, implementation="jax_triton")),
    }[op]
    image, *rest = (aval(shape, jnp.bfloat16) for shape in shapes)

    def loss(x, *rest):
        images = jax.checkpoint(jax.vmap(lambda one: fn(one[None], *rest)))
        return jax.lax.scan(lambda total, some: (total + images(some).sum(), None), jnp.zeros((), image.dtype), x)[0]

    assert gpu.lower(jax.grad(loss), aval((2, 3, *image.shape), image.dtype), *rest)


# --- Negative controls: each check finds what it is there for.


def small_call(kernel, n=100, rows=64, out=lambda i: (i,)):
    return pl.pallas_call(
        functools.partial(kernel, n=n),
        out_shape=aval((n,), jnp.float32),
        grid=(pl.cdiv(n, rows),),
        in_specs=[pl.BlockSpec((rows,), lambda i: (i,))],
        out_specs=pl.BlockSpec((rows,), out),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        name="control",
    )


def test_a_race_is_caught():
    def add(x, y, n):
        y[...] += x[...]

    x = aval((100,), jnp.float32)
    assert gpu.writers(*gpu.pallas_calls(small_call(add, out=lambda i: (0,)), x)) == [2]
    assert gpu.writers(*gpu.pallas_calls(small_call(add), x)) == [1]


def test_a_missing_mask_is_caught():
    def copy(x, y, n, masked=True):
        exists = pl.program_id(0) * 64 + jnp.arange(64) < n
        value = plt.load(x, mask=exists, other=0.0) if masked else x[...]
        plt.store(y, value, mask=exists)

    def found(masked, n):
        fn, x = small_call(functools.partial(copy, masked=masked), n), aval((n,), jnp.float32)
        return gpu.ragged(*gpu.pallas_calls(fn, x)) & set(gpu.unmasked(*gpu.pallas_kernels(fn, x)))

    assert found(True, 100) == set() and found(False, 128) == set()
    if jax.__version_info__ < (0, 12):  # which masks by itself
        assert found(False, 100) == {0}


def blind(module, patch):
    """A tile of tokens that is never ragged, or accesses that drop their mask."""
    if hasattr(module, "Feature"):
        init = module.Tile.__init__
        patch.setattr(module.Tile, "__init__", lambda tile, *where: init(tile, *where[:-1], False))
    else:
        bare = types.SimpleNamespace(**{**vars(plt), "load": lambda ref, **_: plt.load(ref)})
        patch.setattr(module, "plt", bare)


def racy(module, patch):
    """Every program of an image and head writes the block of the first."""
    name = "_state_parts" if hasattr(module, "_state_parts") else "_pixels"
    inner = getattr(module, name)

    def first(block):
        return pl.BlockSpec(block.block_shape, lambda c, t, i: block.index_map(c, 0, i))

    def broken(*args):
        made = inner(*args)
        return first(made) if isinstance(made, pl.BlockSpec) else (made[0], [first(block) for block in made[1]])

    patch.setattr(module, name, broken)


@pytest.mark.parametrize("op", PROGRAMS)
@pytest.mark.parametrize("damage, said", [(blind, "no mask"), (racy, "a race")])
def test_damage_to_an_operation_is_caught(op, damage, said, monkeypatch):
    damage(importlib.import_module(f"pallas_kernels.{op}.pallas_triton"), monkeypatch)
    assert said in {what for _, what in faults(op)}


@pytest.mark.parametrize(
    "op, kernel, tile",
    [
        ("linear_attention", "linear_attention_apply", dict(rows=128, programs=1)),
        ("mix_ffn", "mix_ffn_backward", dict(rows=1, columns=64, channels=32)),
    ],
)
def test_a_spill_is_caught(op, kernel, tile, monkeypatch):
    accuracy.coarse(monkeypatch, **tile, warps=1, stages=1)
    kernels = {k.name: k for k in gpu.pallas_kernels(*PROGRAMS[op]("float32", 32, "pallas"))}
    with pytest.raises(AssertionError, match="spills="):
        gpu.check(gpu.compile_pallas(kernels[kernel], 90), 90)


def test_the_tiles_of_a_device_are_compiled(monkeypatch):
    """For its own card, and they are found to be wrong where only they are."""
    given = dispatch.table(PACKAGE / "linear_attention")["tiles"]
    passes = given["default"]["float32"]["32"]
    bad = {**passes, "apply": {**passes["apply"], "rows": 128, "warps": 1}}
    tiles = {**given, "NVIDIA A10": {"float32": {"32": bad}}}
    monkeypatch.setattr(dispatch, "table", lambda folder: {"tiles": tiles, "auto": []})
    assert ("NVIDIA A10", "float32", "32") in gpu.rows_of(PACKAGE / "linear_attention")
    for device, cards, spills in (("NVIDIA A10", (89,), True), ("default", (80, 89, 90), False)):
        assert gpu.take(monkeypatch, device) == cards
        kernels = {k.name: k for k in gpu.pallas_kernels(*attention_program("float32", 32, "pallas"), sm=cards[0])}
        assert (gpu.compile_pallas(kernels["linear_attention_apply"], cards[0]).spills > 0) == spills


def test_too_much_shared_memory_is_caught():
    with pytest.raises(AssertionError, match="shared=200000"):
        gpu.check(gpu.Report(32, 0, 200_000), 80)
    gpu.check(gpu.Report(32, 0, 200_000), 90)
