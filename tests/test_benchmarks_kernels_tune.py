"""`benchmarks.kernels --tune`: tiles that are right and faster, and the tables that "auto" reads."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import environment, kernels, kernels_cases, kernels_measure, kernels_timing, kernels_tune
from benchmarks.kernels_cases import MODELS, OPS, TOY, Case, Part, tuned
from pallas_kernels import dispatch


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


def test_each_width_has_rows_of_its_own():
    """Runs of tokens are of one width, whatever order they were measured in."""
    rows = [
        dict(op="add_rms_norm", implementation=name, tokens=tokens, auto=dict(tokens=tokens, d=d), right=True,
             forward_us=us, both_us=us, forward_error=0, forward_bound=1, gradient_error=0, gradient_bound=1)
        for tokens, d, pallas in ((4096, 1024, 5), (65536, 512, 5), (256, 1024, 20), (4096, 512, 2))
        for name, us in (("xla", 10), ("pallas", pallas))
    ]  # fmt: skip
    found = kernels_tune.auto_rows(rows, "card", "bfloat16")["rms_residual"]
    wheres = [row["where"] for row in found]
    many = kernels_tune.MANY
    assert wheres == [dict(tokens=[4096, many], d=[1024] * 2), dict(tokens=[4096, many], d=[512] * 2)]
    assert [row["speedup"] for row in found] == [2, 2]


def test_what_is_written_is_what_dispatch_reads(tmp_path, monkeypatch):
    old = dict(device="card", dtype="bfloat16", implementation="pallas", error=0, bound=1, speedup=9,
               where=dict(tokens=[1, 9999], c=[5600, 5600], first_silu=[1, 1]))  # fmt: skip
    rows = [old, old | {"device": "other"}, old | {"where": old["where"] | {"c": [72, 72]}}]
    given = kernels_tune.table("mix_ffn")
    monkeypatch.setattr(kernels_tune, "table", lambda name: {**given, "auto": rows})
    kernels_tune.write(tmp_path, ["mix_ffn"], mix_rows({2048: (10, 5, 6)}), "card", "bfloat16")
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


@pytest.fixture
def as_on_a_gpu(tmp_path, monkeypatch):
    """A book, with quick measurements, tables that no other test sees, and plain JAX in place of kernels."""
    monkeypatch.setattr(dispatch, "table", dispatch.functools.cache(dispatch.table.__wrapped__))
    monkeypatch.setattr(kernels_timing, "COPIES", (2, 2))
    monkeypatch.setattr(environment, "LIMIT", 0.01)
    monkeypatch.setattr(environment, "nvidia_smi", dict)
    monkeypatch.setattr(kernels_tune, "neighbours", lambda tile: [{**tile, "warps": 2}])
    function = Case.function
    kernels_as = dict.fromkeys(("pallas", "jax_triton"), "reference")
    monkeypatch.setattr(Case, "function", lambda case, name: function(case, kernels_as.get(name, name)))
    return kernels.Book(tmp_path, kernels_timing.Clock(1e6, kernels.SHARES))


def test_a_tile_is_judged_by_every_form_and_the_rest_goes_on(as_on_a_gpu, monkeypatch):
    """The normed form of attention is wrong with one tile, which is then not taken; modulate has no memory."""
    truth, judge, saved = Case.truth, Case.judge, []

    def no_memory(case, given):
        if case.op == "modulate":
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return truth(case, given)

    def judged(case, got, want):
        wrong = case.op == "linear_attention, norm" and case.tiles()["state"]["warps"] == 2
        return judge(case, got, want) | {"right": not wrong}

    monkeypatch.setattr(Case, "truth", no_memory)
    monkeypatch.setattr(Case, "judge", judged)
    monkeypatch.setattr(kernels_tune, "GAIN", 0.0)  # whatever is right is fast enough
    monkeypatch.setitem(MODELS, "0.6B", (Part(TOY, ("modulate", *kernels_cases.ATTENTION), (64,), 64),))
    groups, book = tuned("0.6B", "bfloat16"), as_on_a_gpu
    attentions = groups["linear_attention", 32]
    before = attentions[0].tiles()
    with kernels.concurrent.futures.ThreadPoolExecutor(2) as pool:
        kernels_measure.tune(groups, book, pool, lambda: saved.append(len(book.more["tuned"])))
    broken, attention = book.more["tuned"]
    assert "RESOURCE_EXHAUSTED" in broken["error"] and saved == [1, 2]
    wrong = [row for row in attention["tried"] if row["tile"]["warps"] == 2 and row["pass"] == "state"]
    assert len(wrong) == 1 and not wrong[0]["right"] and [row["right"] for row in wrong[0]["of"]] == [True, False]
    assert attention["finished"] and attention["tiles"]["apply"]["warps"] == 2
    assert attention["tiles"]["state"] == before["state"]
    assert attentions[1].tiles() == attention["tiles"]
    assert all(row["us"] == pytest.approx(sum(one["us"] for one in row["of"]), abs=0.01) for row in attention["tried"])


def test_forms_and_sizes_share_tiles():
    groups = tuned("1.6B", "bfloat16")
    assert [case.op for case in groups["linear_attention", 32]] == list(kernels_cases.ATTENTION)
    assert all(case.tokens == 8192 for cases in groups.values() for case in cases)
    (norms,) = (cases for (folder, _), cases in tuned("DC-AE", "bfloat16").items() if folder == "rms_residual")
    assert {case.sizes.width for case in norms} == {1024, 512, 256, 128}


def test_the_command_as_on_a_gpu(as_on_a_gpu, tmp_path, monkeypatch, capsys):
    """Tunes and times, writing as it goes; what the table then has is not sought again."""
    part = Part(TOY, ("add_gated",), (64, 32), 32)
    monkeypatch.setitem(MODELS, "0.6B", (part,))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernels_timing, "bandwidth", lambda: {"gbs": 100.0})
    monkeypatch.setattr(kernels_measure.accuracy, "quickly_compiled", jax.jit)
    argv = ["--output", str(tmp_path), "--model", "0.6B", "--tune", "--implementations", "xla;pallas"]
    assert kernels.main(argv) == 0
    assert "backward" in capsys.readouterr().out
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert [row["tokens"] for row in written["rows"] if "auto" in row] == [64, 64, 32, 32]
    device = jax.devices()[0].device_kind
    table = json.loads((tmp_path / "tiles" / "adaln.json").read_text())
    assert table["tiles"][device]["bfloat16"]["add_gated"] == written["tuned"][0]["tiles"]
    assert kernels.main(argv) == 0
    assert json.loads((tmp_path / "kernels.json").read_text())["tuned"][0]["note"].startswith("not sought")
