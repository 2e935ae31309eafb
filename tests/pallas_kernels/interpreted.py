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
    from pallas_kernels import dispatch
    from tests.pallas_kernels import accuracy, test_adaln, test_linear_attention, test_mix_ffn, test_rms_residual

    dispatch.platform = lambda: "gpu"  # what stands in for it takes these kernels
    found = {}
    for case in test_linear_attention.CASES:
        if case[4] == "float32":
            args, gradient = test_linear_attention.arrays(*case)
            got = test_linear_attention.run("jax_triton")(args, gradient)
            want = test_linear_attention.truth(args, gradient)
            found[f"linear_attention {case}"] = accuracy.problems(got, want)
    for case in test_mix_ffn.CASES:
        if case[4] == "float32":
            *sizes, first_silu = case
            args, gradient = test_mix_ffn.arrays(*sizes)
            got = test_mix_ffn.run("jax_triton", first_silu)(args, gradient)
            want = test_mix_ffn.truth(args, gradient, first_silu)
            found[f"mix_ffn {case}"] = accuracy.problems(got, want)
    dispatch.tiles = lambda *_: dict.fromkeys(("forward", "backward"), test_adaln.SMALL)
    for op, r in ((test_adaln.modulate, 2), (test_adaln.add_gated, 1)):
        args, gradient = test_adaln.arrays(op, 2, 19, 40, r, "float32")
        got, want = test_adaln.run(op, "jax_triton")(args, gradient), test_adaln.truth(op, args, gradient)
        found[op.__name__] = accuracy.problems(got, want)
    args, gradient = test_rms_residual.arrays(2, 19, 40, "float32")
    got, want = test_rms_residual.run("jax_triton")(args, gradient), test_rms_residual.truth(args, gradient)
    found["add_rms_norm"] = accuracy.problems(got, want)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
