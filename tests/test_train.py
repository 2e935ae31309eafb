"""train.py as a user calls it, on toy experiments, in this process; `tests/chaos` kills it."""

import json
import textwrap

import numpy as np
import pytest
from PIL import Image

import train
from sana_jax.training import lock
from sana_jax.training.reading import read_params
from tests import sample_runs

TINY = """
    import dataclasses

    import jax.numpy as jnp

    from sana_jax.data.folder import Folder
    from sana_jax.data.synthetic import Synthetic
    from sana_jax.experiment import Checkpoint, Data, Experiment, Frozen, Init, Log, Optim, Preview
    from sana_jax.models.gemma2 import Gemma2
    from sana_jax.training.objectives import LanguageModel
    from sana_jax.training.optimizer import AdamW

    SOURCE = Synthetic(records=20, size=32)


    def language_model(**changes):
        fields = dict(
            model=Gemma2(
                vocab_size=280, width=16, depth=1, heads=2, kv_heads=1, head_dim=8, hidden=16, query_scale=8
            ),
            objective=LanguageModel(),
            data=Data(SOURCE, batch=8, size=32, buckets=False, tokens=12),
            optim=Optim(AdamW(), lr=1e-2), steps=6, checkpoint=Checkpoint(every=2), log=Log(every=1),
            preview=Preview(every=0),
        )
        return Experiment(**fields | changes)
"""


compile_cache = sample_runs.compile_cache


@pytest.fixture
def experiment(tmp_path):
    """experiment(text) writes a config that ends in it, and returns call(*overrides) -> exit status."""

    def write(ending, workdir="run"):
        path = tmp_path / "config.py"
        path.write_text(textwrap.dedent(TINY) + "\n" + textwrap.dedent(ending))
        return lambda *overrides: train.main([str(path), f"workdir={tmp_path / workdir}", *overrides])

    return write


def lines(folder, name="metrics"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def events(folder, kind):
    return [event for event in lines(folder, "events") if event["kind"] == kind]


def test_a_run_in_two_parts_has_the_lines_and_the_state_of_one_in_one(experiment, tmp_path, capfd):
    whole, parts = experiment("config = language_model()", "whole"), experiment("config = language_model()", "parts")
    assert whole() == 0
    assert parts("steps=3") == 0 and parts("--steps=5") == 0 and parts("steps=6", "optim.lr=1e-2") == 0
    assert "changed since the last start: steps: 3 -> 5" in capfd.readouterr().err
    read = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert read[0] == read[1] and len(read[0].splitlines()) == 6
    hashes = [events(tmp_path / name, "done")[-1]["state_hash"] for name in ("whole", "parts")]
    assert hashes[0] == hashes[1]
    losses = [line["loss"] for line in lines(tmp_path / "whole")]
    assert losses[-1] < losses[0] and all(line["grad_norm"] > 0 for line in lines(tmp_path / "whole"))

    other = experiment("config = language_model(seed=1)", "other")  # the comparison can fail
    assert other() == 0
    assert (tmp_path / "other" / "metrics.jsonl").read_bytes() != read[0]


def test_a_finished_run_does_nothing_more(experiment, tmp_path):
    call = experiment("config = language_model(steps=2)")
    assert call() == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert call() == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    first, second = events(tmp_path / "run", "done")
    assert first["state_hash"] == second["state_hash"]


def test_stages_follow_each_other_and_use_each_other(experiment, tmp_path):
    call = experiment("""
        first = language_model(name="first", steps=2, optim=Optim(AdamW(), lr=1e-2, ema=0.5))
        second = dataclasses.replace(
            first, name="second", init=Init("stage:first"), frozen=Frozen(text="stage:first"), steps=1
        )
        config = Experiment(stages=(first, second))
    """)
    assert call("second.optim.lr=1e-20") == 0
    run = tmp_path / "run"
    assert {"first", "second"} == {path.name for path in run.iterdir() if path.is_dir()}
    assert (run / "first" / "tokenizer").is_dir() and not (run / "second" / "tokenizer").exists()
    average, raw = (read_params(run / "first", ema=ema) for ema in (True, False))
    begun = read_params(run / "second", ema=False)
    same = [np.array_equal(a, b) for a, b in zip(leaves(average), leaves(begun), strict=True)]
    assert all(same) and not np.array_equal(raw["embedding"], begun["embedding"])


NAN_AT = """
    @dataclasses.dataclass(frozen=True)
    class Poisoned(LanguageModel):
        first: int = 0
        last: int = 0

        def __call__(self, model, frozen, params, batch, keys):
            terms = super().__call__(model, frozen, params, batch, keys)
            bad = (batch["position"] >= self.first) & (batch["position"] < self.last)
            return terms._replace(loss=jnp.where(bad, jnp.nan, terms.loss))


    config = language_model(objective=Poisoned(first={first}, last={last}))
"""


def test_a_step_that_is_not_finite_is_skipped_whole_and_told(experiment, tmp_path, capfd):
    call = experiment(NAN_AT.format(first=17, last=18))
    assert call("steps=3", "checkpoint.every=1") == 0
    run = tmp_path / "run"
    before, after = (read_params(run, ema=False, step=step) for step in (2, 3))
    assert all(np.array_equal(a, b) for a, b in zip(leaves(before), leaves(after), strict=True))
    (skipped,) = events(run, "skipped")
    assert skipped["step"] == 3 and skipped["samples"] == [16, 24] and len(skipped["records"]) == 8
    assert "step 3: loss or gradient is not finite" in capfd.readouterr().err
    assert [line["skipped"] for line in lines(run)] == [0, 0, 1]
    assert lines(run)[2]["loss"] is None


def leaves(tree):
    import jax

    return jax.tree.leaves(tree)


def test_several_in_a_row_end_the_run_and_keep_the_last_checkpoint(experiment, tmp_path, capfd):
    assert experiment(NAN_AT.format(first=16, last=1000))("steps=20") == 4
    message = capfd.readouterr().err
    assert "step 5: loss or gradient was not finite 3 times in a row" in message
    kept = read_params(tmp_path / "run", ema=False)
    assert all(np.isfinite(leaf).all() for leaf in leaves(kept))


def test_too_many_bad_records_end_the_run(experiment, tmp_path, capfd):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        (pictures / f"{i}.txt").write_text("a caption" if i % 3 else "")
        Image.new("RGB", (32, 32)).save(pictures / f"{i}.png")
    call = experiment(f"config = language_model(data=Data(Folder({str(pictures)!r}), batch=8, size=32, buckets=False, tokens=12))")
    assert call("data.bad_window=10") == 3
    assert "data.bad_share" in capfd.readouterr().err
    assert call("data.bad_share=1.0") == 0
    assert any(line["bad"].get("caption") for line in lines(tmp_path / "run", "timing"))
    assert min(line["weight"] for line in lines(tmp_path / "run")) > 0


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("optim.warmpu=1",), ("optim.warmpu", "'warmup'")),
        (("steps=0", "data.batch=0"), ("steps=0", "data.batch=0")),
        (("optim.freeze=('nothing',)",), ("nothing",)),
        (("mesh.tensor=3",), ("mesh.tensor=3",)),
        (("data.batch=12",), ("data.batch=12", "8 devices")),
    ],
)
def test_bad_input_is_one_message(experiment, overrides, words, capfd, tmp_path):
    assert experiment("config = language_model()")(*overrides) == 2
    message = capfd.readouterr().err
    assert message.startswith("train.py: ") and "Traceback" not in message
    assert all(word in message for word in words), message
    assert not (tmp_path / "run" / "checkpoints").exists() or not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_run_is_not_taken_over_nor_changed_under_way(experiment, tmp_path, capfd):
    call = experiment("config = language_model(steps=2)")
    with lock.locked(tmp_path / "run"):
        assert call() == 2
    assert "another job holds it" in capfd.readouterr().err
    assert call() == 0
    assert call("data.batch=16", "steps=4") == 2
    assert "data.batch: 8 -> 16" in capfd.readouterr().err
    assert call("model.width=32", "steps=4") == 2
    assert "model.width: 16 -> 32" in capfd.readouterr().err
    assert call("steps=3") == 0


def test_data_may_move_but_not_change_under_way(experiment, tmp_path, capfd):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        (pictures / f"{i}.txt").write_text("a caption")
        Image.new("RGB", (32, 32)).save(pictures / f"{i}.png")
    call = experiment("config = language_model(data=Data(Folder('x'), batch=8, size=32, buckets=False, tokens=12))")
    assert call("steps=1", f"data.source.path={pictures}") == 0
    moved = pictures.rename(tmp_path / "moved")
    assert call("steps=2", f"data.source.path={moved}") == 0
    (moved / "0.png").unlink()
    assert call("steps=3", f"data.source.path={moved}") == 2
    assert "data.source: is not what this run was trained on until step 2" in capfd.readouterr().err


def test_help_and_no_arguments(capfd):
    assert train.main(["--help"]) == 0 and "Exit status" in capfd.readouterr().out
    assert train.main([]) == 2
