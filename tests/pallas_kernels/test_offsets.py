"""Where the kernels of jax-triton count elements with 64 bits: a batch may have more than 2^31, an image not."""

import re

import pytest

from pallas_kernels import adaln, dispatch, rms_residual, rows
from tests.pallas_kernels import gpu, test_static


def narrow(ir):
    """What Triton IR does with the number of an image, the third of a program, while it has 32 bits."""
    found = []
    for function in ir.split("tt.func")[1:]:
        for number in re.findall(r"(%\S+) = tt\.get_program_id z", function):
            lines = [line for line in function.splitlines() if re.search(rf"{number}\b", line)]
            found += [line for line in lines if not re.search(r"tt\.get_program_id|arith\.extsi", line)]
    return found


@pytest.mark.parametrize(
    "op, kernels",
    [pytest.param("linear_attention", 4, marks=gpu.STATIC), pytest.param("mix_ffn", 3, marks=gpu.STATIC)],
)
def test_an_image_has_a_wide_number(op, kernels, monkeypatch):
    """Then so has every offset that it is a part of, those into the partial sums too."""
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    program = test_static.PROGRAMS[op]("bfloat16", "32", "jax_triton")
    found = [ir for ir, _ in gpu.compile_jax_triton(monkeypatch, *program)]
    assert len(found) == kernels
    for ir in found:
        assert "tt.get_program_id z" in ir and narrow(ir) == [] and "arith.trunci" not in ir
        # The control: what it would be, were there arithmetic before it is wide.
        assert len(narrow(re.sub(r"arith\.extsi (%\S+) : i32 to i64", r"arith.addi \1, \1 : i32", ir))) > 0


@pytest.mark.parametrize("folder", [adaln.FOLDER, rms_residual.FOLDER])
def test_sums_over_rows_are_few(folder):
    """The kernels on whole rows count the elements of vectors and partial sums with 32 bits."""
    for device, dtype, name in gpu.rows_of(folder):
        for tile in dispatch.table(folder)["tiles"][device][dtype][name].values():
            # At most this many programs, and no row is wider than `elements`.
            assert (tile["programs"] + dispatch.MAX_GRID) * tile["elements"] <= dispatch.MAX_ELEMENTS
            for b in (1, 100, dispatch.MAX_GRID):
                *_, runs = rows.blocks(b, 10**6, tile["elements"], tile)
                assert runs * b <= tile["programs"] + dispatch.MAX_GRID
