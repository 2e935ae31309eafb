"""Every tiles.json: what `auto` takes on its word is a kernel that was right and faster, and can be found."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import adaln, dispatch, linear_attention, mix_ffn, rms_residual

OPS = {
    adaln: lambda a, v: (adaln.modulate(a, v[None], v[None]), adaln.add_gated(a, v[None], a)),
    linear_attention: lambda a, v: linear_attention.linear_attention(a[None], 1e-15),
    mix_ffn: lambda a, v: mix_ffn.mix_ffn(a[None], jnp.ones((3, 3, 48)), v),
    rms_residual: lambda a, v: rms_residual.add_rms_norm(a, a, v, v),
}


def sizes_of(op, monkeypatch):
    """The names of the sizes that the operation looks its rows up by."""
    names, choose = set(), dispatch.choose

    def noted(op, folder, implementation, dtype, sizes, check):
        names.update(sizes)
        return choose(op, folder, "xla", dtype, sizes, check)

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "choose", noted)
        jax.eval_shape(OPS[op], *(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 8, 48), (48,))))
    return names


def faults(row, tiles, sizes):
    """What is wrong with a row of `auto`, in words."""
    ranges = row["where"].items()
    said = {
        "device": any(part in row["device"] for part in dispatch.CAPABILITY),
        "dtype": row["dtype"] in tiles["default"],
        "implementation": row["implementation"] in ("pallas", "jax_triton"),
        "error": 0 <= row["error"] <= row["bound"] < 1,
        "speedup": row["speedup"] > 1,
        "where": set(row["where"]) <= sizes and all(low <= high for _, (low, high) in ranges),
    }
    return [name for name, right in said.items() if not right]


def test_every_operation_has_its_table():
    folders = {path.parent for path in pathlib.Path(dispatch.__file__).parent.glob("*/tiles.json")}
    assert folders == {op.FOLDER for op in OPS}


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_rows_of_auto(op, monkeypatch):
    table, sizes = dispatch.table(op.FOLDER), sizes_of(op, monkeypatch)
    assert sizes
    for row in table["auto"]:
        assert faults(row, table["tiles"], sizes) == [], row
    good = dict(device="NVIDIA H200", dtype="bfloat16", implementation="pallas", where={min(sizes): [1, 9]},
                error=1e-3, bound=2e-3, speedup=1.5)  # fmt: skip
    assert faults(good, table["tiles"], sizes) == []
    for name, value in (
        ("device", "cpu"),
        ("dtype", "float16"),
        ("implementation", "xla"),
        ("implementation", "pallas_interpret"),
        ("error", 3e-3),
        ("error", float("nan")),
        ("speedup", 1.0),
        ("where", {"pixels": [1, 9]}),
        ("where", {min(sizes): [9, 1]}),
    ):
        assert faults({**good, name: value}, table["tiles"], sizes) == [name]
