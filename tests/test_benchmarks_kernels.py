"""`benchmarks.kernels` on a CPU: what it judges right, writes and leaves out; its programs for an H200."""

import functools
import json
import pathlib
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest

from benchmarks import environment, kernels, kernels_measure, kernels_timing, kernels_torch
from benchmarks.kernels_cases import MODELS, OPS, TOY, Case, cases
from pallas_kernels import dispatch
from sana_jax import aot
from sana_jax.models.dc_ae import DC_AE_F32C32_SANA
from sana_jax.models.sana import SANA_600M, SANA_1600M
from tests.pallas_kernels import accuracy, gpu


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
        case = Case(op, 2048, MODELS["1.6B"][0].sizes, "bfloat16")
        moved = case.traffic()
        assert moved["forward"] / unit == pytest.approx(forward, rel=0.03), op
        assert moved["both"] / unit == pytest.approx(both, rel=0.05), op
        assert case.tiles() == dispatch.tiles(*_where(case))


def _where(case):
    folder = pathlib.Path(dispatch.__file__).parent / case.table.folder
    return folder, case.dtype, case.width()


def asked_for(fn, *args, monkeypatch):
    """{(operation, its sizes)} that a traced function chooses implementations by."""
    calls, choose = [], dispatch.choose

    def noted(op, folder, implementation, dtype, sizes, check):
        calls.append((op, sizes))
        return choose(op, folder, "xla", dtype, sizes, check)

    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "choose", noted)
        jax.eval_shape(fn, *args)
    return {(op, *((name, sizes.get(name, 1)) for name in AUTO[op])) for op, sizes in calls}


AUTO = {"linear_attention": ("tokens", "k", "c"), "mix_ffn": ("tokens", "c"), "add_rms_norm": ("tokens", "d")}
AUTO |= dict.fromkeys(("modulate", "add_gated"), ("tokens", "d", "gated"))


def measured_sizes(model, **options):
    found = [(case.table.name, case.auto()) for case in cases(model, "bfloat16", **options)]
    return {(op, *((name, sizes[name]) for name in AUTO[op])) for op, sizes in found}


def test_the_dc_ae_is_measured_at_its_own_sizes(monkeypatch):
    """Every operation of every stage, at 512 and 1024 px, and nothing that it does not have."""
    fn = functools.partial(DC_AE_F32C32_SANA.init, jax.random.key(0))
    images = (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32) for side in (512, 1024))
    want = set().union(*(asked_for(fn, image, monkeypatch=monkeypatch) for image in images))
    assert measured_sizes("DC-AE") == want
    assert ("linear_attention", ("tokens", 16384), ("k", 32), ("c", 32)) in want, "control"


@pytest.mark.parametrize("model, module", [("1.6B", SANA_1600M), ("0.6B", SANA_600M)])
def test_transformers_are_measured_at_their_own_sizes(model, module, monkeypatch):
    module, one = module.clone(depth=1, dtype=jnp.bfloat16), (1, 300, module.caption_width)
    shapes = (2, 32, 32, 32), (2,), (2, *one[1:]), (2, 300)
    inputs = [jax.ShapeDtypeStruct(s, d) for s, d in zip(shapes, (jnp.float32, jnp.float32, jnp.bfloat16, bool))]
    want = asked_for(functools.partial(module.init, jax.random.key(0)), *inputs, monkeypatch=monkeypatch)
    assert measured_sizes(model, tokens=[2048]) == want


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


def test_an_operation_that_the_model_lacks_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(SystemExit):
        kernels.main(["--output", str(tmp_path), "--model", "DC-AE", "--ops", "mix_ffn;modulate"])
    assert "--ops modulate: not in the DC-AE" in capsys.readouterr().err


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
    forward, backward, both = kernels.summary(found.rows)
    assert [line["pass"] for line in (forward, backward, both)] == ["forward", "backward", "both"]
    assert forward["xla"] == xla["forward_us"] and backward["xla"] == round(xla["both_us"] - xla["forward_us"], 2)
    assert backward["floor"] == round(both["floor"] - forward["floor"], 2) > 0
    assert forward["jax_triton"] == "failed" and "upstream" not in forward


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


STATIC = [*gpu.STATIC, pytest.mark.filterwarnings("ignore:.*Triton.*:DeprecationWarning")]  # of Pallas, since jax 0.11


@pytest.mark.parametrize("name", [pytest.param(name, marks=STATIC) for name in ("pallas", "upstream")])
def test_a_timed_program_holds_nothing_but_the_calls(name):
    """Compiled for an H200: as many kernels as calls have, and no array is copied to tie them together."""
    case = Case("linear_attention", 512, MODELS["1.6B"][0].sizes, "bfloat16")
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
        "from benchmarks import kernels_upstream; from benchmarks.kernels_cases import TOY, Case\n"
        "case = Case('linear_attention', 150, TOY, 'float32'); given = case.draw(0)\n"
        "print(case.judge(kernels_upstream.forward(*given), case.truth(given))['forward_error'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) < accuracy.FORWARD
