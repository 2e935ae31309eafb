"""Damage to what is on the disk: never a wrong state, and never a step lost that was whole."""

import collections
import gc
import os
import random
import shutil

import pytest

from sana_jax.training.fingerprint import state_hash
from sana_jax.training.store import Store, read_meta, read_params
from sana_jax.training.reading import DamagedError
from tests.sana_jax.training.toy_state import abstract, make_state

# What fails leaves the rest of its work to a loop that orbax has closed: noise on stderr.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def noise_in_its_own_test():
    yield
    gc.collect()

TRIALS = 200
MUST_HURT = ("state/manifest.ocdbt", "meta/metadata")  # every byte of these counts


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A run with steps 1 and 2, and the hash of each."""
    run = tmp_path_factory.mktemp("whole")
    store = Store(run / "checkpoints")
    for step in (1, 2):
        store.save(step, make_state(step), {"samples": step})
    store.close()
    return run, {step: state_hash(make_state(step)) for step in (1, 2)}


def flip(path, rng):
    data = bytearray(path.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def cut(path, rng):
    os.truncate(path, rng.randrange(max(path.stat().st_size, 1)))


def zero(path, rng):
    path.write_bytes(bytes(path.stat().st_size))


def delete(path, rng):
    path.unlink()


KINDS = (flip, flip, flip, flip, cut, zero, delete)


def damaged_copy(run, to, step):
    shutil.copytree(run, to)
    return sorted(path for path in (to / "checkpoints" / str(step)).rglob("*") if path.is_file())


def test_no_damage_gives_a_wrong_state(two_steps, tmp_path):
    run, hashes = two_steps
    outcomes, seen = collections.Counter(), collections.Counter()
    for trial in range(TRIALS):
        rng, copy, told = random.Random(trial), tmp_path / str(trial), []
        files = damaged_copy(run, copy, step=2)
        path, damage = files[trial % len(files)], KINDS[trial // len(files) % len(KINDS)]
        before = path.read_bytes()
        damage(path, rng)
        store = Store(copy / "checkpoints", log=told.append)
        step, state, meta = store.restore(abstract(make_state()))
        store.close()
        assert state_hash(state) == hashes[step] and meta == {"samples": step}, (path, damage)  # 0 wrong loads
        name = str(path.relative_to(copy / "checkpoints" / "2"))
        hurt = not path.exists() or path.read_bytes() != before
        if step == 1:
            assert hurt and len(told) == 1 and "checkpoints/2 cannot be used: " in told[0], told
            assert [n[:6] for n in os.listdir(copy / "checkpoints") if n.startswith("bad")] == ["bad-2-"]
        outcomes[step] += 1
        seen[name, step] += 1
        shutil.rmtree(copy)
    assert outcomes[1] > 40 and outcomes[2] > 20, outcomes  # both happened, or the trials say nothing
    assert all(seen[name, 1] and not seen[name, 2] for name in MUST_HURT), seen


def test_without_the_fingerprint_flipped_bits_would_be_loaded(two_steps, tmp_path, monkeypatch):
    """The control: with the content check off, the same trials do load wrong states."""
    monkeypatch.setattr("sana_jax.training.reading._check_content", lambda *_: None)
    run, hashes = two_steps
    wrong = 0
    for trial in range(40):
        copy = tmp_path / str(trial)
        arrays = [p for p in damaged_copy(run, copy, step=2) if p.parent.name == "d" and p.stat().st_size > 2000]
        flip(arrays[trial % len(arrays)], random.Random(trial))
        store = Store(copy / "checkpoints", log=lambda _: None)
        step, state, _ = store.restore(abstract(make_state()))
        store.close()
        wrong += state_hash(state) != hashes[step]
    assert wrong > 0


def test_all_damaged_is_an_error_that_names_each_and_stays_one(two_steps, tmp_path):
    run, _ = two_steps
    copy = tmp_path / "run"
    for step in (1, 2):
        files = damaged_copy(run, copy, step) if not copy.exists() else None
        (copy / "checkpoints" / str(step) / "meta" / "metadata").write_text("{}")
    assert files is None or files
    for attempt in range(2):  # a restart must not begin at step 0 as if nothing had ever been saved
        store = Store(copy / "checkpoints", log=lambda _: None)
        with pytest.raises(DamagedError) as caught:
            store.restore(abstract(make_state()))
        store.close()
        assert "checkpoints/2 cannot be used" in str(caught.value) if attempt == 0 else "/bad-2-" in str(caught.value)
        assert "checkpoints/1 cannot be used" in str(caught.value) if attempt == 0 else "/bad-1-" in str(caught.value)


def test_a_step_under_another_number_is_damage(two_steps, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(two_steps[0], copy)
    os.rename(copy / "checkpoints" / "2", copy / "checkpoints" / "9")
    told = []
    store = Store(copy / "checkpoints", log=told.append)
    assert store.restore(abstract(make_state()))[0] == 1
    store.close()
    assert "it says that it is step 2" in told[0]


def test_reading_parameters_checks_them_and_touches_nothing(two_steps, tmp_path):
    copy = tmp_path / "run"
    files = damaged_copy(two_steps[0], copy, step=2)
    for path in files:
        if path.parent.name == "d":
            zero(path, None)
    with pytest.raises(DamagedError):
        read_params(copy)
    (copy / "checkpoints" / "2" / "meta" / "metadata").write_text('{"meta": {}}')
    with pytest.raises(DamagedError, match="meta is not what was saved"):
        read_meta(copy)
    assert sorted(os.listdir(copy / "checkpoints")) == ["1", "2"]


def test_a_file_that_may_not_be_read_is_no_damage(two_steps, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(two_steps[0], copy)

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("orbax.checkpoint.JsonCheckpointHandler.restore", refuse)
    store = Store(copy / "checkpoints")
    with pytest.raises(PermissionError):
        store.restore(abstract(make_state()))
    store.close()
    assert store.steps() == [1, 2]


CALLS = ("rename", "replace", "mkdir", "unlink", "remove", "rmdir", "open", "fsync")


def test_killed_before_or_behind_any_call_every_listed_step_is_whole(tmp_path, monkeypatch):
    """What a kill would leave: the folder is copied at every call that changes it, and each copy is restored."""
    directory, copies = tmp_path / "checkpoints", []
    store = Store(directory, keep=1)
    store.save(0, make_state(0))
    store.wait()

    def watched(name, original):
        def call(*args, **kwargs):
            snapshot()
            return original(*args, **kwargs)

        return call

    busy = []

    def snapshot():
        if not busy:
            busy.append(1)  # the copy's own calls are not the store's
            copies.append(tmp_path / f"copy{len(copies)}")
            shutil.copytree(directory, copies[-1], ignore_dangling_symlinks=True, copy_function=copy_if_there)
            busy.clear()

    with monkeypatch.context() as patch:
        for name in CALLS:
            patch.setattr(os, name, watched(name, getattr(os, name)))
        for step in (1, 2):
            store.save(step, make_state(step))
            store.wait()
            snapshot()
    store.close()
    hashes = {step: state_hash(make_state(step)) for step in range(3)}
    newest, known = [], set()
    for copy in copies:
        present = sorted(int(name) for name in os.listdir(copy) if name.isdigit())
        assert present, copy  # the newest whole step is never lost
        for step in present:
            content = bytes_below(copy / str(step))
            if content not in known:  # most copies show the same steps
                alone = tmp_path / f"alone{len(known)}"
                shutil.copytree(copy / str(step), alone / str(step))
                again = Store(alone)
                assert state_hash(again.restore(abstract(make_state()))[1]) == hashes[step]
                again.close()
                known.add(content)
        newest.append(present[-1])
        reopened = Store(copy)
        assert sorted(os.listdir(copy)) == [str(step) for step in present]  # what was half done is swept
        reopened.close()
    assert len(copies) > 30 and newest == sorted(newest) and set(newest) == {0, 1, 2}, (len(copies), newest)


def bytes_below(folder):
    return frozenset((str(path.relative_to(folder)), path.read_bytes()) for path in folder.rglob("*") if path.is_file())


def copy_if_there(source, to):
    """A file that the writer's own threads renamed a moment ago is no part of the picture."""
    try:
        shutil.copyfile(source, to)
    except FileNotFoundError:
        pass


def test_the_copies_show_a_step_that_is_removed_in_place(tmp_path, monkeypatch):
    """The control: removal without the rename does leave listed steps that are not whole."""
    for step in (1, 2):
        store = Store(tmp_path / "run", keep=1)
        monkeypatch.setattr(store, "_tidy", lambda: None)
        store.save(step, make_state(step))
        store.close()
    calls, original = [], os.unlink

    def stop_half_way(*args, **kwargs):
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        original(*args, **kwargs)

    monkeypatch.setattr(os, "unlink", stop_half_way)
    with pytest.raises(KeyboardInterrupt):
        shutil.rmtree(tmp_path / "run" / "1")
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "run" / "2")
    store = Store(tmp_path / "run", log=lambda _: None)
    assert store.steps() == [1]
    with pytest.raises(DamagedError):
        store.restore(abstract(make_state()))
    store.close()
