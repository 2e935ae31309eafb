"""The kernels of jax-triton run by Triton's interpreter: a process of its own, `python interpreted.py`.

Prints as JSON {"cases": {case: [[what, error, bound] that is too large]}, "controls": {damage to a source:
the same}}.  Each array lies between guards: NaN around what is read, and around what is written a number
that has to be there afterwards.
"""

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import pathlib
import sys
import tempfile
import types
from collections.abc import Callable
from typing import NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import jax_triton
import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

from pallas_kernels import dispatch
from pallas_kernels.adaln import add_gated, modulate
from pallas_kernels.mix_ffn import mix_ffn
from pallas_kernels.rms_residual import add_rms_norm
from tests.pallas_kernels import accuracy, test_adaln, test_linear_attention, test_mix_ffn, test_rms_residual

# Beside the cases of the other implementations: few channels, so that no error averages out, and several blocks of
# Mix-FFN's sums.
FEW = [(1, 40, 2, 16, "bfloat16", normed) for normed in (False, True)]
PARTS = (2, 17, 9, 5, "float32", True)
GUARD = 4096
CANARY = 12352.0  # bfloat16 has it too


class Pointer:
    """The little that the interpreter needs of a tensor: where it lies and of what type it is."""

    device = "cpu"

    def __init__(self, array, fill):
        self.dtype = {"float32": "fp32", "bfloat16": "bf16"}[str(array.dtype)]
        self.memory = np.full(array.size + 2 * GUARD, fill, array.dtype)
        self.memory[GUARD:-GUARD] = array.reshape(-1)

    def data_ptr(self):
        return self.memory.ctypes.data + self.memory.itemsize * GUARD

    def value(self, shape):
        return self.memory[GUARD:-GUARD].reshape(shape).copy()

    def intact(self):
        return (self.memory[:GUARD] == CANARY).all() and (self.memory[-GUARD:] == CANARY).all()


def triton_call(*operands, kernel, out_shape, grid, num_warps, num_stages, compute_capability,
                input_output_aliases=None, **constants):  # fmt: skip
    """jax_triton.triton_call on the interpreter."""
    several = isinstance(out_shape, (list, tuple))
    shapes = list(out_shape) if several else [out_shape]
    scalars = {i: x for i, x in enumerate(operands) if isinstance(x, (int, float))}

    def run(*arrays):
        arrays = iter(arrays)
        inputs = [scalars[i] if i in scalars else np.asarray(next(arrays)) for i in range(len(operands))]
        starts = [np.full(s.shape, np.nan, s.dtype) for s in shapes]
        for i, o in (input_output_aliases or {}).items():
            starts[o] = inputs[i]
        outputs = [Pointer(start, CANARY) for start in starts]
        inputs = [x if isinstance(x, (int, float)) else Pointer(x, np.nan) for x in inputs]
        launch(kernel, grid, [*inputs, *outputs], constants)
        assert all(pointer.intact() for pointer in outputs), f"{kernel} wrote outside of its array"
        return [pointer.value(s.shape) for pointer, s in zip(outputs, shapes)]

    results = jax.pure_callback(run, shapes, *(x for i, x in enumerate(operands) if i not in scalars))
    return results if several else results[0]


def launch(kernel, grid, arguments, constants):
    executor = interpreter.GridExecutor(kernel.fn, kernel.arg_names, grid)
    # The interpreter copies torch tensors to the CPU and back; ours are there, so nothing is to be done.
    executor._init_args_hst = lambda args, kwargs: (args, kwargs)
    executor._restore_args_dev = lambda *args: None
    executor(*arguments, **constants)


def teach_bfloat16():
    """The interpreter has bfloat16 as bits, which it truncates where a GPU rounds, and compares and multiplies as
    integers: here it gets numpy's extension type for it."""
    builder, known = interpreter.interpreter_builder, interpreter._get_np_dtype
    dot, memory = builder.create_dot, interpreter._interpreter

    def dtype_of(type_):
        return np.dtype(jnp.bfloat16) if type_.scalar == tl.bfloat16 else known(type_)

    def cast(x, type_):
        return interpreter.TensorHandle(x.data.astype(dtype_of(type_)), type_.scalar)

    def bits(array):
        return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array

    def load(pointers, mask, other, dtype):
        return memory.load(pointers, mask, bits(other), bits(np.empty(0, dtype)).dtype).view(dtype)

    def store(pointers, value, mask):
        return memory.store(pointers, bits(value), mask)

    interpreter._get_np_dtype = dtype_of
    interpreter._interpreter = types.SimpleNamespace(**{**vars(memory), "load": load, "store": store})
    builder.cast_impl = cast
    builder.create_dot = lambda a, b, *rest: dot(cast(a, tl.float32), cast(b, tl.float32), *rest)


def patch_once():
    """The interpreter puts its functions into Triton's modules again for every function that a kernel calls, which
    takes longer than the arithmetic: here once for each module that has kernels."""
    patch, done = interpreter._patch_lang, set()

    def first(kernel):
        if kernel.__module__ not in done:
            done.add(kernel.__module__)
            patch(kernel)
        return types.SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = first


class Case(NamedTuple):
    """A call of `op` with tiles of these sizes; `slack`: which of (result, *gradients) may be how many times its
    bound; `want`: what float64 gives."""

    op: Callable
    args: tuple
    gradient: jax.Array
    tiles: dict
    slack: dict
    want: tuple


def run(op, implementation):
    return accuracy.with_gradients(functools.partial(op, implementation=implementation))


def result(case, implementation):
    with pytest.MonkeyPatch.context() as patch:
        accuracy.coarse(patch, **case.tiles)
        return accuracy.quickly_compiled(run(case.op, implementation))(case.args, case.gradient)


def problems(case, alone=False):
    """[(which, error, bound)] of what the kernels give, against float64 and, unless `alone`, the XLA form."""
    got = result(case, "jax_triton")
    kinds, wanted = ([a.dtype for a in jax.tree.leaves(tree)] for tree in (got, (case.gradient, case.args)))
    assert kinds == wanted, f"{kinds} instead of {wanted}"
    found = accuracy.problems(got, case.want)
    found = [(i, error, bound) for i, error, bound in found if not error <= bound * case.slack.get(i, 1)]
    if not alone and got[0].dtype == jnp.float32 and not accuracy.agree(got, result(case, "xla")):
        found.append(("not what xla gives", None, accuracy.FORWARD))
    return found


def attend(q, k, v, scale, implementation):
    """Linear attention of three arrays, so that the error of no gradient hides behind another."""
    return test_linear_attention.attend(jnp.concatenate([q, k, v], axis=-1), scale, implementation)


def table(test):
    """The cases of a test's last parametrisation."""
    return test.pytestmark[0].args[1]


def cases():
    """{(operation, sizes ...): Case}.  Tiles are small: several in a run, several runs of an image, and in the last
    of them tiles past its end."""

    def case(op, made, tiles, slack):
        (args, gradient), narrow = made, made[1].dtype != jnp.float32
        want = accuracy.exact(run(op, "reference"), args, gradient)
        return Case(op, args, gradient, tiles, slack if narrow else {}, want)

    found = {}
    for sizes in [*test_linear_attention.CASES, *FEW]:
        b, n, k, c, dtype, normed = sizes
        if k <= 2 or accuracy.NIGHT:  # the interpreter takes long for many programs
            (qkv, scale), gradient = test_linear_attention.arrays(*sizes)
            made = (*jnp.split(qkv, 3, axis=-1), scale), gradient
            # Through the norm a key has two gradients, which cancel in part and are rounded each.
            slack = {2: 2} if normed else {}
            found["linear_attention", *sizes] = case(attend, made, dict(rows=16, programs=2 * b * k), slack)
    for sizes in [*test_mix_ffn.CASES, PARTS]:
        *shape, first_silu = sizes
        op = functools.partial(mix_ffn, first_silu=first_silu)
        # What stands between the two kernels of the backward pass is rounded too.
        slack = dict.fromkeys((1, 2, 3), 1.36)
        found["mix_ffn", *sizes] = case(op, test_mix_ffn.arrays(*shape), dict(rows=2, columns=32), slack)
    small = dict(elements=256, programs=4)
    for op in (modulate, add_gated):
        for sizes in table(test_adaln.test_every_implementation_is_exact):
            found[op.__name__, *sizes] = case(op, test_adaln.arrays(op, *sizes), small, {})
    for sizes in table(test_rms_residual.test_every_implementation_is_exact):
        # The result is rounded twice.
        found["add_rms_norm", *sizes] = case(add_rms_norm, test_rms_residual.arrays(*sizes), small, {0: 1.4})
    return found


# --- Negative controls.


def controls():
    """(folder, text in its kernels, what to put there, at each place of the text: the case that is to report it)."""
    attention, bare, normed = (("linear_attention", *s) for s in (test_linear_attention.CASES[0], *FEW))
    parts, row = ("mix_ffn", *PARTS), (2, 37, 40)
    modulated, gated = ((op, *row, 2, "float32") for op in ("modulate", "add_gated"))
    both = ("add_rms_norm", *row, "float32")
    yield "linear_attention", "run * TILES + t", "run + t", [attention, attention]
    yield "linear_attention", "* PARTS + run", "* PARTS", [attention, attention]
    yield "mix_ffn", "part * TILES + tile", "part + tile", [parts, parts]
    yield "mix_ffn", "image * PARTS + part", "image + part", [parts]
    yield "adaln", "run * TILES + t", "run + t", [modulated, modulated, gated, gated]
    yield "rms_residual", "run * TILES + t", "run + t", [both, both]
    # What bfloat16 leaves of a float32 factor, dropped from each product in turn.
    yield "linear_attention", "NORMED and v.dtype != tl.float32", "False", [normed]
    yield "linear_attention", "NORMED and SPLIT, SPLIT", "False, SPLIT", [normed, normed, normed]
    yield "linear_attention", ", SPLIT, ", ", False, ", [bare] * 5


@contextlib.contextmanager
def damaged(folder, text, other, place, places):
    """Inside, the kernels of a folder have `other` at one of the `places` of `text`."""
    name = f"pallas_kernels.{folder}.jax_triton"
    pieces = pathlib.Path(importlib.import_module(name).__file__).read_text(encoding="utf-8").split(text)
    assert len(pieces) == places + 1, f"{name}: {text!r} at {len(pieces) - 1} places, not {places}"
    with tempfile.TemporaryDirectory() as home, pytest.MonkeyPatch.context() as patch:
        file = pathlib.Path(home, "jax_triton.py")  # the interpreter reads functions from their file
        file.write_text(text.join(pieces[: place + 1]) + other + text.join(pieces[place + 1 :]), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        patch.setitem(sys.modules, name, module)
        yield


def main():
    dispatch.platform = lambda: "gpu"  # what stands in for it takes these kernels
    jax_triton.triton_call = triton_call
    teach_bfloat16()
    patch_once()
    all_cases = cases()
    found = {str(name): problems(case) for name, case in all_cases.items()}
    reported = {}
    for folder, text, other, places in controls():
        for place, name in enumerate(places):
            with damaged(folder, text, other, place, len(places)):
                reported[f"{folder}: {text} -> {other}, place {place}"] = problems(all_cases[name], alone=True)
    print(json.dumps({"cases": found, "controls": reported}))


if __name__ == "__main__":
    main()
