"""The arithmetic of a parity line, and our side's tools, without PyTorch."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sana_jax.parity import forcing, ladder, report, solver
from sana_jax.parity.rows import Range, Ratio, compare, count, ratio


def test_a_line_within_and_beyond_its_bound():
    reference = np.float32([[1, -3], [2, 0]])
    row = compare("a", reference + np.float32(1e-3), reference, 2e-3)
    assert row.ok and row.error == pytest.approx(1e-3, rel=1e-3) and row.largest == 3
    assert row.markdown() == "| a | 1.0e-03 | 2.0e-03 | 1.87 | ok |"
    row = compare("a", reference + np.float32(1e-3), reference, 5e-4)
    assert not row.ok and row.markdown().endswith("FAILS |")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_fails_on_either_side(bad):
    good = np.ones(4, np.float32)
    broken = good.copy()
    broken[2] = bad
    for ours, reference in ((broken, good), (good, broken), (broken, broken)):
        with np.errstate(invalid="ignore"):
            assert not compare("a", ours, reference, 1e9, scaled=True).ok


def test_errors_are_divided_by_the_scale_of_their_channel():
    x = np.random.default_rng(0).normal(size=(4096, 3)).astype("f")
    reference = x * np.float32([0.01, 1, 1e5])
    off = reference.copy()
    off[5] += np.float32([1e-3, 1e-3, 1.0])
    assert compare("a", off, reference, "dit").error == 1.0
    for channel, error in ((0, 1e-3), (1, 1e-3), (2, 1e-5)):
        one = reference.copy()
        one[5, channel] = off[5, channel]
        assert compare("a", one, reference, "dit", scaled=True).error == pytest.approx(error, rel=0.05)
    # One channel of 1e5 does not hide that another is off.
    assert not compare("a", off, reference, "dit", scaled=True).ok


def test_a_lone_large_value_may_be_off_by_its_own_rounding():
    reference = np.zeros((2**16, 1), np.float32)
    reference[7] = 1e5
    spacing = np.spacing(np.float32(1e5))  # 2^-7
    row = {n: compare("a", reference + n * spacing, reference, "dit", scaled=True) for n in (1, 3, 5)}
    assert row[1].ok and row[3].ok and not row[5].ok


def test_a_bound_is_as_wide_as_the_reference_is_unsteady():
    reference, moved = np.ones((4, 2), np.float32), np.float32([[1, 1 + 1e-4]] * 4)
    ours = reference + np.float32(5e-4)
    assert not compare("a", ours, reference, "dit", scaled=True).ok
    row = compare("a", ours, reference, "dit", scaled=True, moved=moved)
    assert row.ok and row.bound == pytest.approx(8e-4, rel=1e-3)
    assert row.widened and row.markdown().endswith("| ok, widened |") and report.entries([row])[0]["widened"] is True
    assert not compare("a", ours + np.float32(5e-4), reference, "dit", scaled=True, moved=moved).ok
    assert compare("a", ours, reference, "dit", moved=reference).bound == 2e-5
    assert compare("a", ours, reference, "dit", moved=reference + np.float32(np.inf)).bound == 2e-5


def test_a_bound_is_only_widened_so_far():
    reference = np.ones((4, 2), np.float32)
    for change in (0.01, 1e6):
        row = compare("a", reference + np.float32(3e-3), reference, "dit", scaled=True, moved=reference * (1 + change))
        assert row.bound == pytest.approx(2e-3) and row.widened and not row.ok and row.markdown().endswith("| FAILS |")
    row = compare("a", reference, reference, "dit", scaled=True, moved=reference + np.float32(1e-7))
    assert not row.widened and row.markdown().endswith("| ok |")


def test_the_verdict_tells_of_widened_bounds():
    plain, wide = (compare("a", np.ones(2), np.ones(2), "dit", moved=np.ones(2) + change) for change in (0, 1e-3))
    assert report.verdict(ladder.Result([plain], [], [], None)) == "PARITY: ok, 1 lines"
    result = ladder.Result([plain, wide], [], [], None)
    assert report.verdict(result) == "PARITY: ok, 2 lines, 1 of them by a widened bound"


def test_what_must_be_the_same_is_counted():
    assert count("a", 0).ok and not count("a", 1).ok
    assert count("a", 0).markdown() == "| a | 0.0e+00 | 0.0e+00 | 0.00 | ok |"


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"a: shape \(2,\), the reference's is \(3,\)"):
        compare("a", np.zeros(2), np.zeros(3), 1.0)


def test_bfloat16_lines_compare_errors():
    reference = np.random.default_rng(0).normal(size=1000)
    better = ratio("a", reference + 0.01, reference - 0.02, reference)
    assert better.ok and better.ratio == pytest.approx(0.5, rel=1e-3)
    assert not ratio("a", reference + 0.03, reference - 0.02, reference).ok
    assert not Ratio("a", float("nan"), 0.1).ok


@pytest.mark.parametrize(
    "theirs, ours, attention, remark",
    [
        (100.0, 100.0, 50.0, ""),
        (20000.0, 20000.0, 50.0, "within 4x of float16's end"),
        (100.0, 100.0, 70000.0, "beyond float16"),
        (100000.0, 100000.0, None, "beyond float16"),
        (100.0, float("nan"), None, "beyond float16"),
    ],
)
def test_ranges_are_judged_against_float16(theirs, ours, attention, remark):
    assert Range("block 7", theirs, ours, 1.0, attention).remark == remark


@pytest.mark.parametrize("steps", [1, 2, 4, 20])
@pytest.mark.parametrize("sampler", solver.WORDS)
def test_samplers_follow_their_closed_forms_in_float64(sampler, steps):
    ours, exact = solver.ours(sampler, steps, 3.0), solver.closed_form(sampler, steps, 3.0)
    assert compare(sampler, ours, exact, "solver").ok
    if steps == 1:  # one step from sigma near 1 to 0 is the same with any of them
        return
    for other in solver.WORDS.keys() - {sampler}:
        assert not compare(other, ours, solver.closed_form(other, steps, 3.0), "solver").ok
    if sampler != "scm":  # which has no shift
        assert not compare("shift", ours, solver.closed_form(sampler, steps, 3.03), "solver").ok


class Two(nn.Module):
    """double(x) + 1, then + 10."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1, name="b")(nn.Dense(1, name="a")(x))


def test_layers_run_on_what_they_are_fed():
    x, one = jnp.ones((1, 1)), jnp.ones((1, 1))
    params = {"a": {"kernel": 2 * one, "bias": one[0]}, "b": {"kernel": one, "bias": 10 * one[0]}}

    def run(actions):
        return float(forcing.intercepted(Two(), params, (x,), actions)[0, 0])

    assert run({}) == 13
    assert run({("a",): forcing.feed(5 * x)}) == 21
    assert run({("a",): forcing.give(5 * x)}) == 15
    assert run({("b",): forcing.first}) == 3
    with pytest.raises(KeyError, match="Two has no .'c'."):
        run({("c",): forcing.first})


def test_one_layer_keeps_its_axis():
    stacked = {"kernel": jnp.arange(12.0).reshape(3, 2, 2)}
    assert jax.tree.map(jnp.shape, forcing.layer(stacked, 1)) == {"kernel": (1, 2, 2)}
    assert forcing.layer(stacked, 2)["kernel"][0, 0, 0] == 8


def test_the_picture_shows_both_sides_and_what_is_between(tmp_path):
    theirs = np.full((32, 48, 3), 0.5)
    ours = theirs.copy()
    ours[:, 24:] += 1 / 64
    sheet = report.side_by_side(ours, theirs)
    sheet.save(tmp_path / "a.png")
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (32 + report.BAR, 3 * 48, 3)
    row = pixels[report.BAR + 5, :, 0].astype(int)
    assert [row[10], row[40], row[48 + 40], row[96 + 10], row[96 + 40]] == [128, 131, 128, 0, 128]
    labels = pixels[: report.BAR]
    assert all((labels[:, i * 48 : i * 48 + 48] < 128).any() for i in range(3))


def test_broken_numbers_do_not_break_the_json():
    row = compare("a", np.float32([np.nan]), np.float32([1]), 1.0)
    assert json.loads(json.dumps(report.entries([row])))[0]["error"] == "nan"
