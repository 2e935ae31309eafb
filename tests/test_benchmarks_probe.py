"""The probe of the text encoder: its prompts, and that ridge regression finds what is there and nothing else."""

import numpy as np
import pytest

from benchmarks import shapes_text_probe as probe
from sana_jax.data.shapes_scene import COLOURS, RELATIONS, SHAPES, held_out_pair


def test_prompts_end_where_they_say():
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        for line in probe.prompts(rng, 40, held_out):
            names = [(list(COLOURS)[line["labels"][f"colour of {k}"]], SHAPES[line["labels"][f"shape of {k}"]]) for k in ("first", "second")]
            assert [line["ends"][f"{k} noun"].split()[-2:] for k in ("first", "second")] == [list(name) for name in names]
            assert line["text"] == line["ends"]["second noun"] and line["ends"]["relation"].startswith(line["ends"]["first noun"])
            assert any(held_out_pair(*name) for name in names) == held_out
            assert 0 <= line["labels"]["relation"] < len(RELATIONS)
    both = probe.prompts(rng, 5, False, related=False)
    assert all(" and " in line["ends"]["second noun, both"] for line in both)


def test_ridge_finds_what_is_there_and_nothing_else():
    rng = np.random.default_rng(1)
    labels, directions = rng.integers(4, size=900), rng.normal(size=(4, 32))
    x = 5 + directions[labels] + 0.3 * rng.normal(size=(900, 32))
    answer = probe.fit(x[:600], labels[:600])
    assert (answer(x[600:]) == labels[600:]).mean() > 0.99
    within = 0.09 * 32
    assert probe.share(x, labels) == pytest.approx(1 - within / x.var(axis=0).sum(), abs=0.01)
    assert probe.share(rng.permutation(x), labels) < 0.02
    small = x + np.where(labels == 3, 0.5, 0)[:, None]
    assert probe.share_between_opposites(x * (labels < 2)[:, None] + small * (labels > 1)[:, None], labels) == pytest.approx(
        min(probe.share(x[labels < 2], labels[labels < 2]), probe.share(small[labels > 1], labels[labels > 1]))
    )
    chance = probe.fit(rng.permutation(x[:600]), labels[:600])
    assert (chance(x[600:]) == labels[600:]).mean() < 0.5
