"""The conversion engine: layouts by hand, totality of a table, what a checkpoint may not hold."""

import re

import jax
import ml_dtypes
import numpy as np
import pytest

from sana_jax.checkpoints import rules
from sana_jax.checkpoints.rules import Rule
from sana_jax.errors import CheckpointError
from tests import peers

BF16 = ml_dtypes.bfloat16


def convert(table, leaves, state, dtype="float32"):
    shapes = {path: np.shape(leaf) for path, leaf in leaves.items()}
    return rules.to_flax(table, shapes, peers.header(state), state.items(), np.dtype(dtype), "toy.safetensors")


# layout, leaf, the torch tensor; indices written out, so that no transpose checks another.
HEADS, WIDE = 2, np.arange(24.0).reshape(2, 12)  # [in, (head, part, channel)] = [2, 2 * 3 * 2]
BY_HAND = {
    "same": (rules.SAME, [1.0, 2.0], [1.0, 2.0]),
    "linear": (rules.LINEAR, [[1, 2, 3], [4, 5, 6]], [[1, 4], [2, 5], [3, 6]]),
    "pointwise": (rules.POINTWISE, [[1, 2], [3, 4]], [[[[1]], [[3]]], [[[2]], [[4]]]]),
    "conv": (  # [height 2, width 1, in 2, out 1] -> (out, in, height, width)
        rules.CONV, [[[[1], [2]]], [[[3], [4]]]], [[[[1], [3]], [[2], [4]]]],
    ),
    "depthwise": (rules.DEPTHWISE, [[[1, 2], [3, 4]]], [[[[1, 3]]], [[[2, 4]]]]),
    "grouped": (  # [group 2, in 2, out 1] -> (group * out, in, 1, 1)
        rules.GROUPED, [[[1], [2]], [[3], [4]]], [[[[1]], [[2]]], [[[3]], [[4]]]],
    ),
    "grouped, two outputs": (
        rules.GROUPED, [[[1, 2], [3, 4]]], [[[[1]], [[3]]], [[[2]], [[4]]]],
    ),
    "middle third": (rules.third(1, 3), [1, 2, 3, 4, 5, 6], [3, 4]),
    "last third, linear": (rules.third(2, 3, rules.LINEAR), [[1, 2, 3], [4, 5, 6]], [[3, 6]]),
    "packed kernel 0": (rules.packed_kernel(0, 3, HEADS), WIDE, [[0, 12], [1, 13], [6, 18], [7, 19]]),
    "packed kernel 2": (rules.packed_kernel(2, 3, HEADS), WIDE, [[4, 16], [5, 17], [10, 22], [11, 23]]),
    "packed bias 0": (rules.packed_bias(0, 2, HEADS), np.arange(8.0), [0, 1, 4, 5]),
    "packed bias 1": (rules.packed_bias(1, 2, HEADS), np.arange(8.0), [2, 3, 6, 7]),
    "fused kernel": (  # rows: both heads of part 0, then of part 1, then of part 2
        rules.fused_kernel(3, HEADS), WIDE,
        [[0, 12], [1, 13], [6, 18], [7, 19], [2, 14], [3, 15], [8, 20], [9, 21], [4, 16], [5, 17], [10, 22], [11, 23]],
    ),
    "fused bias": (rules.fused_bias(2, HEADS), np.arange(8.0), [0, 1, 4, 5, 2, 3, 6, 7]),
}  # fmt: skip


@pytest.mark.parametrize("case", BY_HAND)
def test_layout_by_hand(case):
    layout, leaf, torch = BY_HAND[case]
    leaf, torch = np.array(leaf, "f"), np.array(torch, "f")
    view = layout.view(leaf)
    assert np.shares_memory(view, leaf), "a layout is a view, never a copy"
    assert layout.shape(view.shape) == torch.shape
    np.testing.assert_array_equal(view.reshape(torch.shape), torch)
    written = np.full(leaf.shape, -1, "f")
    written_view = layout.view(written)
    written_view[...] = torch.reshape(written_view.shape)
    assert (written != -1).sum() == torch.size
    np.testing.assert_array_equal(written[written != -1], leaf[written != -1])


PACKED = [
    *(Rule(f"b.{{i}}.{n}.weight", "b/qkv/kernel", rules.packed_kernel(p, 3, HEADS)) for p, n in enumerate("qkv")),
    *(Rule(f"b.{{i}}.{n}.bias", "b/qkv/bias", rules.packed_bias(p, 3, HEADS)) for p, n in enumerate("qkv")),
    *rules.dense("b.{i}.out", "b/out"),
    *(Rule(f"mix.{n}.weight", "mix/kernel", rules.third(p, 3, rules.LINEAR)) for p, n in enumerate("qkv")),
    Rule("groups.weight", "groups/kernel", rules.GROUPED),
    Rule("table", "table"),
]  # fmt: skip
LEAVES = {
    "b/qkv/kernel": (2, 5, 12), "b/qkv/bias": (2, 12), "b/out/kernel": (2, 4, 3), "b/out/bias": (2, 3),
    "mix/kernel": (4, 9), "groups/kernel": (3, 2, 4), "table": (6, 2),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_is_bit_exact(dtype):
    rng = np.random.default_rng(0)
    leaves = {path: rng.normal(size=shape).astype(dtype) for path, shape in LEAVES.items()}
    state = dict(rules.to_torch(PACKED, leaves))
    assert {name: array.shape for name, array in state.items()} == rules.names(PACKED, LEAVES)
    assert len(state) == 2 * 8 + 3 + 2 and all(array.flags.c_contiguous for array in state.values())
    back = convert(PACKED, leaves, state, dtype)
    for path, leaf in leaves.items():
        assert back[path].dtype == leaf.dtype and back[path].tobytes() == leaf.tobytes(), path


def test_layers_are_axis_0():
    table = rules.dense("blocks.{i}.f", "blocks/f")
    state = {f"blocks.{i}.f.weight": np.full((3, 2), i, "f") for i in range(11)}
    state |= {f"blocks.{i}.f.bias": np.full(3, i, "f") for i in range(11)}
    out = convert(table, {"blocks/f/kernel": np.empty((11, 2, 3)), "blocks/f/bias": np.empty((11, 3))}, state)
    for leaf in out.values():
        np.testing.assert_array_equal(leaf.reshape(11, -1)[:, 0], np.arange(11))
    assert rules.layer_count("blocks.{i}.f.weight", state) == 11
    assert rules.layer_count("blocks.{i}.g.weight", state) == 0


@pytest.mark.parametrize(
    "table, shapes, message",
    [
        ([Rule("a", "a")], {"a": (2,), "b": (3,)}, "b: rules cover 0 of 3 elements"),
        ([Rule("a", "a"), Rule("b", "b")], {"a": (2,)}, "b -> b: no such parameter"),
        ([Rule("a", "a"), Rule("b", "a")], {"a": (2,)}, "a: rules cover 4 of 2 elements"),
        ([Rule("a", "a"), Rule("a", "b")], {"a": (2,), "b": (2,)}, "a: two rules"),
        ([Rule("a.{i}", "a"), Rule("a.1", "b")], {"a": (2, 1), "b": (1,)}, "a.1: two rules"),
        ([Rule("a", "a", rules.third(0, 3))], {"a": (6,)}, "a: rules cover 2 of 6 elements"),
        # as many elements as there are, but one part twice and another never
        ([Rule(n, "a", rules.third(0, 2)) for n in "ab"], {"a": (6,)}, "a: rules cover elements twice"),
        (
            [Rule(f"{n}.{{i}}", "a", rules.packed_bias(1, 2, 2)) for n in "ab"],
            {"a": (3, 8)},
            "a: rules cover elements twice",
        ),
    ],
)  # fmt: skip
def test_a_table_that_is_not_total_is_refused(table, shapes, message):
    with pytest.raises(ValueError, match="not total") as caught:
        rules.slots(table, shapes)
    assert message in str(caught.value)
    assert not isinstance(caught.value, CheckpointError), "our mistake, not the file's"


def test_all_problems_of_a_table_come_at_once():
    with pytest.raises(ValueError) as caught:
        rules.slots([Rule("a", "a"), Rule("a", "a"), Rule("c", "c")], {"a": (2,), "b": (3,)})
    lines = str(caught.value).splitlines()[1:]
    assert len(lines) == 4, lines  # two rules, no such parameter, 4 of 2, 0 of 3


def test_check_lists_every_kind_of_problem_in_one_error():
    table = rules.dense("a.{i}", "a")
    shapes = {"a/kernel": (30, 2, 3), "a/bias": (30, 3)}
    header = {f"a.{i}.weight": ((2, 3), "F32") for i in range(25)}  # 25 transposed, 5 missing
    header |= {f"a.{i}.bias": ((3,), "I64" if i < 2 else "F64") for i in range(4)}  # 26 missing
    header |= {f"extra.{i}": ((1,), "F32") for i in range(21)}
    with pytest.raises(CheckpointError) as caught:
        rules.check(rules.slots(table, shapes), shapes, header, "some/folder")
    lines = str(caught.value).splitlines()
    assert lines[0] == "some/folder does not fit the model"
    for title, number in {"missing": 31, "not part of this model": 21, "wrong shape": 25}.items():
        start = lines.index(f"  {title} ({number}):")
        listed = [line for line in lines[start + 1 : start + 21] if re.fullmatch(r"    [a-z]+\..*", line)]
        assert len(listed) == rules.LISTED == 20
        assert lines[start + 21] == f"    ... and {number - 20} more"
    assert "    a.0.weight: file has (2, 3), the model needs (3, 2)" in lines
    assert lines[lines.index("  wrong dtype (2):") + 1] == "    a.0.bias: stored as I64, must be F64, F32, F16 or BF16"
    assert lines[-1].startswith("    a.1.bias"), "two problems leave nothing to count"


def test_nothing_is_read_from_a_checkpoint_that_does_not_fit():
    def never():
        raise AssertionError("read")
        yield

    with pytest.raises(CheckpointError, match=r"missing \(1\)"):
        rules.to_flax([Rule("a", "a")], {"a": (2,)}, {}, never(), np.dtype("f"))


def test_a_tensor_that_the_reader_leaves_out_is_named():
    with pytest.raises(CheckpointError, match="announced but not read: a"):
        rules.to_flax([Rule("a", "a")], {"a": (2,)}, {"a": ((2,), "F32")}, [], np.dtype("f"))


@pytest.mark.parametrize("stored", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("to", ["float32", "bfloat16", "float16"])
def test_nan_and_infinity_are_named(stored, bad, to):
    state = {name: np.full((3, 5), 0.5).astype(stored) for name in "abc"}
    state["b"][2, 3] = bad
    table, leaves = [Rule(n, n) for n in "abc"], {n: np.empty((3, 5)) for n in "abc"}
    with pytest.raises(CheckpointError) as caught:
        convert(table, leaves, state, to)
    assert str(caught.value).splitlines()[1:] == ["  tensors (1):", "    b"]
    state["b"][2, 3] = -60000  # large, and finite in each of these
    assert all(np.isfinite(leaf).all() for leaf in convert(table, leaves, state, to).values())


@pytest.mark.parametrize("cut", [(slice(None),), (slice(0, 1), slice(1, 2)), (slice(0, 2), slice(2, 4))])
def test_pieces_of_a_leaf_are_those_of_the_whole(cut):
    """One leaf after the other, whole or in pieces along its first or its last axis."""
    rng = np.random.default_rng(0)
    leaves = {path: rng.normal(size=shape).astype("f") for path, shape in LEAVES.items()}
    state, got = dict(rules.to_torch(PACKED, leaves)), []

    def pieces(path):
        rest = (slice(None),) * (len(LEAVES[path]) - 1)
        return [(c, *rest) for c in cut] + [(*rest, c) for c in cut]

    def put(path, arrays):
        got.append(path)
        for array, piece in zip(arrays, pieces(path), strict=True):
            np.testing.assert_array_equal(array, leaves[path][piece])
        return len(arrays)

    args = PACKED, LEAVES, peers.header(state), state.__getitem__, np.dtype("f"), put
    assert rules.leaf_by_leaf(*args, pieces=pieces) == dict.fromkeys(LEAVES, 2 * len(cut))
    assert got == list(LEAVES)
    whole = rules.leaf_by_leaf(*args[:-1], lambda path, arrays: arrays)
    assert all(np.array_equal(whole[path][0], leaves[path]) and whole[path][0].ctypes.data % 64 == 0 for path in LEAVES)
    state["b.1.k.bias"][0] = np.nan
    with pytest.raises(CheckpointError, match=r"tensors \(1\):\n    b.1.k.bias$"):
        rules.leaf_by_leaf(*args[:-1], lambda path, arrays: None, pieces=pieces)


def test_infinities_of_both_signs_do_not_cancel():
    state = {"a": np.float32([np.inf, -np.inf])}
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        convert([Rule("a", "a")], {"a": np.empty(2)}, state)


def test_large_finite_values_are_finite():
    """The check adds up; the sum of these leaves float32."""
    state = {"a": np.full(1000, np.finfo(np.float32).max)}
    np.testing.assert_array_equal(convert([Rule("a", "a")], {"a": np.empty(1000)}, state)["a"], state["a"])


@pytest.mark.parametrize("stored", ["float64", "float32", "bfloat16"])
def test_overflow_on_narrowing_is_named(stored):
    """bfloat16 is no wider than float16, and holds much larger numbers."""
    state = {"a": np.array([1, -70000.0]).astype(stored), "b": np.ones(2, stored)}
    table, leaves = [Rule("a", "a"), Rule("b", "b")], {"a": np.empty(2), "b": np.empty(2)}
    with pytest.raises(CheckpointError) as caught:
        convert(table, leaves, state, "float16")
    assert str(caught.value).splitlines()[1:] == ["  tensors (1):", "    a (overflows float16)"]
    assert convert(table, leaves, state, "bfloat16")["a"][1] < -65504


def test_narrowing_rounds_to_nearest():
    state = {"a": np.float32([1 + 2**-8, 1 + 3 * 2**-8, 3.14159265])}  # ties to even, twice
    out = convert([Rule("a", "a")], {"a": np.empty(3)}, state, "bfloat16")["a"]
    assert out.dtype == BF16
    np.testing.assert_array_equal(out.astype("f"), [1, 1 + 2**-6, 3.140625])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_cpu_takes_the_leaves_over_without_a_copy(dtype):
    """So that the parameters are on the host once, not twice."""
    state = {"a.weight": np.ones((333, 77), dtype), "a.bias": np.ones(333, dtype)}
    leaves = convert(rules.dense("a", "a"), {"a/kernel": np.empty((77, 333)), "a/bias": np.empty(333)}, state, dtype)
    for leaf in leaves.values():
        assert leaf.ctypes.data % 64 == 0 and leaf.flags.c_contiguous
        on_device = jax.device_put(leaf, jax.devices("cpu")[0])
        assert on_device.unsafe_buffer_pointer() == leaf.ctypes.data
