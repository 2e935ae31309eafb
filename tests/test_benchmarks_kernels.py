"""`benchmarks.kernels` on a CPU: what it judges right, tunes, writes and leaves out; its programs for an H200."""

import importlib.util
import json
import pathlib
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest

from benchmarks import environment, kernels, kernels_measure, kernels_timing, kernels_torch, kernels_tune
from benchmarks.kernels_cases import OPS, SIZES, Case
from pallas_kernels import dispatch
from sana_jax import aot
from tests.pallas_kernels import accuracy

TOY = SIZES["toy"]


class Time:
    """A clock that moves when it is told to."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def book(tmp_path, **shares):
    time = Time()
    return kernels.Book(tmp_path, kernels_timing.Clock(100, {**kernels.SHARES, **shares}, time)), time


# --- Cases.


def test_sizes_of_the_published_model():
    """Traffic in activations of tokens x width: 4 and 7 for attention, 7.5 and 12.5 for Mix-FFN."""
    unit = 2048 * 2240 * 2
    floors = {"linear_attention": (4, 11), "mix_ffn": (7.5, 20), "modulate": (2, 5), "add_gated": (3, 6)}
    for op, (forward, both) in floors.items():
        case = Case(op, 2048, SIZES["1.6B"], "bfloat16")
        moved = case.traffic()
        assert moved["forward"] / unit == pytest.approx(forward, rel=0.03), op
        assert moved["both"] / unit == pytest.approx(both, rel=0.05), op
        assert case.tiles() == dispatch.tiles(*_where(case))


def _where(case):
    folder = pathlib.Path(dispatch.__file__).parent / case.table.folder
    return folder, case.dtype, case.width()


def test_the_command_without_a_gpu(tmp_path, capsys, monkeypatch):
    argv = ["--output", str(tmp_path), "--smoke", "--ops", "add_gated"]
    assert kernels.main(argv) == 0
    assert "No GPU" in capsys.readouterr().out
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert len(rows) == 2 * 3 and all(row["right"] for row in rows)
    assert {row["implementation"] for row in rows} == {"plain", "xla", "pallas_interpret"}
    assert not any("us" in key for row in rows for key in row)
    wrong = OPS["add_gated"]._replace(exact=lambda dtype, x, gate, y: x + 1.01 * gate[:, None] * y)
    monkeypatch.setitem(OPS, "add_gated", wrong)
    assert kernels.main(argv) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("option", [["--ops", "conv"], ["--implementations", "xla;cuda"]])
def test_unknown_names_are_refused(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        kernels.main(["--output", str(tmp_path), *option])
    assert "must be of" in capsys.readouterr().err


# --- Time.


def test_a_clock_limits_the_whole_and_each_kind():
    time = Time()
    clock = kernels_timing.Clock(100, {"a": 0.2, "b": 1.0}, time)
    with clock.spending("a"):
        time.seconds = 19
    assert clock.left("a")
    with clock.spending("a"):
        time.seconds = 21
    assert not clock.left("a") and clock.left("b")
    time.seconds = 100
    assert not clock.left("b")


def test_what_does_not_fit_is_said(tmp_path, monkeypatch):
    found, time = book(tmp_path)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None if name == "torch" else object())

    def work(seconds):
        def run():
            time.seconds += seconds
            return {"right": True, "forward_us": 1.0}

        return run

    found.add({"op": "mix_ffn", "implementation": "eager"}, work(0))
    found.add({"op": "mix_ffn", "implementation": "xla"}, work(66))
    found.add({"op": "mix_ffn", "implementation": "pallas"}, work(1))
    found.clock.shares["jax"] = 1
    found.compiling["mix_ffn", "plain"] = 31.0
    found.add({"op": "mix_ffn", "implementation": "plain"}, work(1))
    found.add({"op": "add_gated", "implementation": "plain"}, work(1))
    notes = [row.get("note") for row in found.rows]
    slow = "not run: compiling another size took 31 s"
    assert notes == ["not there: torch", None, "not run: no time left", slow, None]
    assert found.failed() == []
    found.write()
    assert [row.get("note") for row in json.loads(found.path.read_text())["rows"]] == notes


def test_a_failure_is_kept_and_fails_the_run(tmp_path):
    found, _ = book(tmp_path)
    for name in ("plain", "pallas"):
        found.add({"op": "mix_ffn", "implementation": name}, lambda: 1 / 0)
    found.add({"op": "mix_ffn", "implementation": "xla"}, lambda: {"right": True})
    assert [row["implementation"] for row in found.failed()] == ["pallas"]
    assert "ZeroDivisionError" in found.rows[0]["error"]


def test_many_calls_of_what_is_short():
    assert kernels_timing.copies(5 << 20) == 48 and kernels_timing.copies(2 << 30) == 4
    assert kernels_timing.sets(9 << 20, 48) == 48 and kernels_timing.sets(1 << 30, 4) == 2


def test_the_rows_of_a_case_measured(tmp_path, monkeypatch):
    """As on a GPU, with what a CPU has in place of two kernels, one of which does not work."""
    monkeypatch.setattr(kernels_timing, "COPIES", (2, 2))
    monkeypatch.setattr(environment, "LIMIT", 0.01)
    function = Case.function

    def on_a_cpu(case, name):
        if name == "jax_triton":
            raise ValueError("no card")
        return function(case, {"pallas": "reference"}.get(name, name))

    monkeypatch.setattr(Case, "function", on_a_cpu)
    found, _ = book(tmp_path)
    found.more["gbs"] = 100.0
    with kernels.concurrent.futures.ThreadPoolExecutor(2) as pool:
        case = Case("add_gated", 64, TOY, "bfloat16")
        kernels_measure.measure(case, ("xla", "pallas", "jax_triton", "upstream"), found, pool)
    xla, pallas, broken = found.rows
    for row in (xla, pallas):
        assert row["right"] and row["auto"] == dict(tokens=64, d=64, gated=1)
        assert row["both_share"] == round(row["both_floor_us"] / row["both_us"], 3)
        for which in ("forward", "both"):
            assert row[f"{which}_us"] > 0 and row[f"{which}_warm_us"] > 0 and row[f"{which}_floor_us"] > 0
    assert broken["error"] == "ValueError: no card"
    (forward, both) = kernels.summary(found.rows)
    assert (forward["pass"], both["pass"]) == ("forward", "both") and forward["xla"] == xla["forward_us"]
    assert forward["jax_triton"] == "failed" and "upstream" not in forward


# --- Tables.


def measured(op, tokens, implementation, us, right=True, error=1e-3):
    side = int((tokens // 2) ** 0.5)
    auto = OPS[op].auto(2, side, side, 11200) if op == "mix_ffn" else OPS[op].auto(2, tokens // 2, 70, 96)
    return dict(op=op, tokens=tokens, implementation=implementation, forward_us=us, both_us=3 * us, right=right,
                forward_error=error, forward_bound=2e-3, gradient_error=1e-3, gradient_bound=2e-3, auto=auto)  # fmt: skip


def mix_rows(times):
    """times: {tokens: (xla, pallas, jax_triton)}; 0 is wrong, None was not run."""
    return [
        measured("mix_ffn", tokens, name, us or 1.0, right=bool(us))
        for tokens, row in times.items()
        for name, us in zip(("xla", "pallas", "jax_triton"), row)
        if us is not None
    ]


def test_rows_of_auto_are_for_what_is_right_and_wins():
    rows = mix_rows({
        512: (10, 9, 12),  # wins
        2048: (10, 8, 0),
        8192: (10, 12, 11),  # loses: the run ends
        32768: (10, 0, 5),  # one is wrong, the other wins, at the largest
    })  # fmt: skip
    (first, second) = kernels_tune.auto_rows(rows, "card", "bfloat16")["mix_ffn"]
    assert first["implementation"] == "pallas" and first["speedup"] == pytest.approx(10 / 9, abs=1e-3)
    assert first["where"] == dict(tokens=[512, 2048], c=[5600, 5600], first_silu=[1, 1])
    assert second["implementation"] == "jax_triton" and second["speedup"] == 2
    assert second["where"]["tokens"] == [32768, kernels_tune.MANY]
    assert dispatch.holds(first, "card", "bfloat16", dict(tokens=1200, c=5600, first_silu=1))
    assert not dispatch.holds(first, "card", "bfloat16", dict(tokens=8192, c=5600, first_silu=1))
    assert not dispatch.holds(first, "other", "bfloat16", dict(tokens=1200, c=5600, first_silu=1))


@pytest.mark.parametrize("times", [(10, 10, 11), (10, 0, 0), (10, None, None), (None, 1, 1), (0, 5, 5)])
def test_no_row_without_a_win(times):
    assert kernels_tune.auto_rows(mix_rows({2048: times}), "card", "bfloat16") == {"mix_ffn": []}


def test_a_row_needs_every_form_of_the_operation():
    """One row speaks for attention with the norm and without; both passes have to win."""
    plain = [measured("linear_attention", 2048, "xla", 10), measured("linear_attention", 2048, "pallas", 5)]
    normed = [row | {"op": "linear_attention, norm", "forward_us": us} for row, us in zip(plain, (10, 8))]
    assert kernels_tune.auto_rows(plain, "card", "bfloat16")["linear_attention"] == []
    (row,) = kernels_tune.auto_rows(plain + normed, "card", "bfloat16")["linear_attention"]
    assert row["speedup"] == 1.25 and row["where"]["tokens"] == [2048, kernels_tune.MANY]
    slow = [*normed[:1], normed[1] | {"both_us": 31}]
    assert kernels_tune.auto_rows(plain + slow, "card", "bfloat16")["linear_attention"] == []


def test_what_is_written_is_what_dispatch_reads(tmp_path, monkeypatch):
    old = dict(device="card", dtype="bfloat16", implementation="pallas", error=0, bound=1, speedup=9,
               where=dict(tokens=[1, 9999], c=[5600, 5600], first_silu=[1, 1]))  # fmt: skip
    rows = [old, old | {"device": "other"}, old | {"where": old["where"] | {"c": [72, 72]}}]
    given = kernels_tune.table("mix_ffn")
    monkeypatch.setattr(kernels_tune, "table", lambda name: {**given, "auto": rows})
    kernels_tune.write(tmp_path, mix_rows({2048: (10, 5, 6)}), "card", "bfloat16")
    written = json.loads((tmp_path / "tiles" / "mix_ffn.json").read_text())
    assert written["tiles"] == given["tiles"] and written["auto"][:2] == rows[1:]
    (new,) = written["auto"][2:]
    folder = tmp_path / "op"
    folder.mkdir()
    (folder / "tiles.json").write_text(json.dumps(written))
    monkeypatch.setattr(dispatch, "device_kind", lambda: "card")
    sizes = dict(tokens=2048, b=2, h=32, w=32, c=5600, first_silu=1)
    assert dispatch.choose("mix_ffn", folder, "auto", jnp.dtype("bfloat16"), sizes, lambda: None) == "pallas"
    assert dispatch.choose("mix_ffn", folder, "auto", jnp.dtype("bfloat16"), sizes | {"tokens": 2047}, lambda: None) == "xla"
    assert new["speedup"] == 2


# --- Tiles.


def test_climbing_takes_what_is_right_and_faster():
    tried = []

    def measure(tiles):
        tried.append(tiles["a"])
        rows, warps = tiles["a"]["rows"], tiles["a"]["warps"]
        if warps == 8:
            return {"error": "spilled"}
        return {"us": 100 / rows, "right": rows <= 128}  # 256 is fastest and wrong

    start = {"a": dict(rows=32, warps=4), "b": dict(rows=1, warps=1)}
    best, rows, finished = kernels_tune.climb(start, measure, lambda: True)
    assert best == {"a": dict(rows=128, warps=4), "b": dict(rows=1, warps=1)} and finished
    assert dict(rows=256, warps=4) in tried and len(rows) == len(tried)
    best, rows, finished = kernels_tune.climb(start, measure, lambda: len(tried) < 0)
    assert best == start and rows == [] and not finished


def test_an_installed_tile_is_compiled_with(monkeypatch):
    monkeypatch.setattr(dispatch, "table", dispatch.functools.cache(dispatch.table.__wrapped__))
    case = Case("linear_attention", 256, TOY, "float32")
    fn = case.passes(case.function("pallas_interpret"))["forward"]

    def grids():
        from tests.pallas_kernels import gpu

        calls = gpu.pallas_calls(lambda *one: fn(*one), *case.shapes())
        return [call.params["grid_mapping"].grid for call in calls]

    before = grids()
    tiles = {**case.tiles(), "apply": {**case.tiles()["apply"], "rows": 64}}
    kernels_tune.install(case.op, dispatch.device_kind(), case.dtype, case.width(), tiles)
    assert before[1] == (2, 4, 2) and grids()[1] == (2, 2, 2)


# --- The others.


@pytest.mark.parity
@pytest.mark.parametrize("op", OPS)
def test_torch_computes_the_same(op):
    case = Case(op, 32, TOY, "float32")
    given = case.draw(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the memory of a jax array is not to be written to
        tensors = kernels_torch.tensors(given)
    passes = kernels_torch.passes(case)
    verdict = case.judge(kernels_torch.arrays(passes["both"](*tensors)), case.truth(given))
    assert verdict["right"], verdict
    row = kernels_timing.torch_timed(lambda *one: passes["forward"](*one), 2, [tensors])
    assert row["us"] > 0


STATIC = [
    pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning"),  # of Pallas, since jax 0.11
    pytest.mark.static,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("jax_plugins", "triton", "jax_triton")),
        reason="needs the extra `static`",
    ),
]


@pytest.mark.parametrize("name", [pytest.param(name, marks=STATIC) for name in ("pallas", "upstream")])
def test_a_timed_program_holds_nothing_but_the_calls(name):
    """Compiled for an H200: as many kernels as calls have, and no array is copied to tie them together."""
    case = Case("linear_attention", 512, SIZES["1.6B"], "bfloat16")
    if name == "upstream":
        from benchmarks import kernels_upstream

        fn = kernels_upstream.forward
    else:
        fn = case.passes(case.function(name))["both"]

    def kernels_of(copies):
        text = aot.compile_for("h200", kernels_timing.chained(jax.jit(fn), copies), [case.shapes()] * 2).as_text()
        assert " copy(" not in text
        return text.count(" fusion(") + text.count(" custom-call(")

    assert kernels_of(3) == 3 * kernels_of(1) > 0


@pytest.mark.parametrize("_", [pytest.param(None, marks=STATIC)])
def test_upstream_computes_the_same(_):
    """Run by Triton's interpreter, which a process has from its start or not at all."""
    code = (
        "from tests.pallas_kernels import interpreted\n"
        "import jax_triton; jax_triton.triton_call = interpreted.triton_call\n"
        "from benchmarks import kernels_upstream; from benchmarks.kernels_cases import SIZES, Case\n"
        "case = Case('linear_attention', 150, SIZES['toy'], 'float32'); given = case.draw(0)\n"
        "print(case.judge(kernels_upstream.forward(*given), case.truth(given))['forward_error'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < accuracy.FORWARD
