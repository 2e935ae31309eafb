"""The kernels of jax-triton run by Triton's interpreter: a process of its own, `python interpreted.py`.

Prints {case: [[error, bound] of what is too large]} as JSON.  float32 only, which is all that the
interpreter gets right.  Each array lies between guards: NaN around what is read, and around what is
written a number that has to be there afterwards.
"""

import json
import os
import pathlib
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import jax
import numpy as np

GUARD = 4096
CANARY = 12345.0


class Pointer:
    """The little that the interpreter needs of a tensor: where it lies and of what type it is."""

    dtype, device = "fp32", "cpu"

    def __init__(self, array, fill):
        self.size_ = array.size
        self.memory = np.full(array.size + 2 * GUARD, fill, np.float32)
        self.memory[GUARD:-GUARD] = array.reshape(-1)

    def data_ptr(self):
        return self.memory.ctypes.data + 4 * GUARD

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
    from triton.runtime import interpreter

    executor = interpreter.GridExecutor(kernel.fn, kernel.arg_names, grid)
    # The interpreter copies torch tensors to the CPU and back; ours are there, so nothing is to be done.
    executor._init_args_hst = lambda args, kwargs: (args, kwargs)
    executor._restore_args_dev = lambda *args: None
    executor(*arguments, **constants)


def main():
    import jax_triton

    jax_triton.triton_call = triton_call
    from tests.pallas_kernels import accuracy, test_linear_attention, test_mix_ffn

    found = {}
    for name, case in {"normed": (2, 37, 2, 16, "float32", True), "plain": (1, 33, 1, 16, "float32", False)}.items():
        args, gradient = test_linear_attention.arrays(*case)
        got = test_linear_attention.run("jax_triton")(args, gradient)
        want = test_linear_attention.truth(args, gradient)
        found[f"linear_attention {name}"] = accuracy.problems(got, want)
    args, gradient = test_mix_ffn.arrays(1, 5, 7, 40, "float32")
    for first_silu in (True, False):
        got = test_mix_ffn.run("jax_triton", first_silu)(args, gradient)
        want = test_mix_ffn.truth(args, gradient, first_silu)
        found[f"mix_ffn {first_silu}"] = accuracy.problems(got, want)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
