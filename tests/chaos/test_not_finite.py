"""Losses that are not finite: the step is left out, counted and told, and no checkpoint ever holds one."""

import numpy as np
import pytest

from sana_jax.training.store import read_params
from tests.chaos.runs import Run


def test_a_step_is_left_out_and_its_records_are_named(tmp_path, cache, alone):
    run = Run(tmp_path / "run", cache, "data.source.poison=17").finish()
    skipped = run.events("skipped")
    assert skipped and all("latent-17" in event["records"] for event in skipped)
    assert all(len(event["positions"]) == 8 for event in skipped)
    steps = {event["step"] for event in skipped}
    losses, undisturbed = run.losses(), alone.losses()
    before = range(1, min(steps))
    assert [losses[s] for s in before] == [undisturbed[s] for s in before]
    assert all(np.isfinite(losses[s]) for s in losses.keys() - steps)
    for ema in (True, False):
        assert all(np.isfinite(leaf).all() for leaf in leaves(read_params(run.folder, ema=ema)))


def test_three_in_a_row_end_the_run_with_4_and_cost_no_good_checkpoint(tmp_path, cache):
    run = Run(tmp_path / "run", cache).finish("steps=12")
    good = read_params(run.folder, ema=False, step=12)
    with run.start("data.source.poison=0", "data.source.poison_all=true"):
        assert run.wait() == [4]
        assert "3 times in a row" in run.said()
    assert [event["step"] for event in run.events("skipped")] == [13, 14, 15]
    assert 12 in run.checkpoints()
    for step in run.checkpoints():
        found = read_params(run.folder, ema=False, step=step)
        assert all(np.isfinite(leaf).all() for leaf in leaves(found))
    assert all((a == b).all() for a, b in zip(leaves(good), leaves(read_params(run.folder, ema=False, step=12)), strict=True))


def leaves(tree):
    for value in tree.values():
        yield from leaves(value) if isinstance(value, dict) else (value,)


@pytest.mark.parametrize("share, code", [("0.01", 3), ("0.9", 0)])
def test_bad_records_are_counted_and_too_many_end_the_run_with_3(tmp_path, cache, share, code):
    run = Run(tmp_path / "run", cache, f"data.bad_share={share}", "steps=20")
    with run.start():
        assert run.wait() == [code], run.said()
        assert ("damaged" in run.said()) == (code == 3)
