"""What is read from checkpoints: a whole state onto any mesh, or only the parameters, checked either way."""

import contextlib
import hashlib
import json
import os
import pathlib
import re

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from sana_jax.errors import CheckpointError, InputError
from sana_jax.training.fingerprint import describe, fingerprint, named_leaves
from sana_jax.training.processes import together

LISTED = 20  # names in one message, then a count


class StructureError(CheckpointError):
    """The state asked for is not the state saved: a user's mistake, never a reason to take another step."""


class DamagedError(RuntimeError):
    """A checkpoint whose content is not what was saved; the message names the step and the cause."""


def listed_steps(directory):
    """The steps in a folder of checkpoints, oldest first."""
    return sorted(int(name) for name in os.listdir(directory) if re.fullmatch(r"\d+", name))


def read_meta(run_dir, step=None):
    """(step, what was saved beside the state) of a run's newest step, or of `step`; see `read_params`."""
    directory, step = _find(run_dir, step)
    return step, _read_record(directory / str(step))["meta"]


def read_params(run_dir, ema=True, step=None):
    """The parameters of a run as nested dict of numpy arrays; nothing else of the step is read.

    Args:
      ema: the running average; False for the parameters that are being trained.
      step: None for the newest.
    Raises:
      InputError: no such run, no such step, or the run keeps no average.
      DamagedError: the content is not what was saved.
    """
    directory, step = _find(run_dir, step)
    field = "ema" if ema else "params"
    expected = {name: found for name, found in _read_record(directory / str(step))["fingerprint"].items() if name.startswith(f"{field}/")}
    if not expected:
        hint = "; the run keeps no running average: ask for the raw parameters" if ema else ""
        raise InputError(f"{directory / str(step)}: holds no {field}{hint}")
    abstract = {}
    for name, (_, _, dtype, shape) in expected.items():
        *parents, last = name.split("/")
        node = abstract
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = jax.ShapeDtypeStruct(shape, jax.numpy.dtype(dtype))
    whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), abstract)
    with _damage():
        found = ocp.PyTreeCheckpointHandler().restore(
            epath.Path(directory / str(step) / "state"),
            args=ocp.args.PyTreeRestore(item=abstract, restore_args=whole, partial_restore=True),
        )
    _check_content(found, expected)
    return found[field]


def _find(run_dir, step):
    directory = pathlib.Path(run_dir).absolute() / "checkpoints"
    if not directory.is_dir():
        raise InputError(f"{run_dir}: is no folder of a run, there is no {directory}")
    steps = listed_steps(directory)
    if not steps or step not in (None, *steps):
        raise InputError(f"step={step!r}: {directory} has {', '.join(map(str, steps)) or 'no steps'}")
    return directory, steps[-1] if step is None else step


def read_step(directory, step, abstract_state):
    """(state, meta) of one step; all processes call it, and either all of them get it or none.

    Raises StructureError, DamagedError: see `Store.restore`.
    """
    folder = directory / str(step)

    def read():
        with _damage():
            args = ocp.args.StandardRestore(abstract_state)
            return ocp.StandardCheckpointHandler().restore(epath.Path(folder / "state"), args=args)

    kinds = (DamagedError, StructureError, RuntimeError)
    record = together(lambda: _read_fitting_record(folder, step, abstract_state), kinds)
    state = together(read, kinds)
    _check_content(state, record["fingerprint"])  # the processes compute it as one, and find the same
    return state, record["meta"]


def _read_fitting_record(folder, step, abstract_state):
    record = _read_record(folder)
    if record["step"] != step:
        raise DamagedError(f"it says that it is step {record['step']}")
    want = {name: describe(leaf) for name, leaf in named_leaves(abstract_state)}
    have = {name: found[2:] for name, found in record["fingerprint"].items()}
    both = want.keys() & have.keys()
    problems = [
        f"{len(names)} arrays are {words}: {listing(names)}"
        for words, names in (
            ("missing in the checkpoint", sorted(want.keys() - have.keys())),
            ("not in the state asked for", sorted(have.keys() - want.keys())),
            (
                "of another type or shape",
                [f"{n} (saved {_kind(have[n])}, asked for {_kind(want[n])})" for n in sorted(both) if want[n] != have[n]],
            ),
        )
        if names
    ]
    if problems:
        raise StructureError(f"{folder}: does not fit this experiment; {'; '.join(problems)}")
    return record


def _read_record(folder):
    """The item `meta`, which guards itself: a flipped digit in a position is as bad as a flipped weight."""
    with _damage():
        record = ocp.JsonCheckpointHandler().restore(epath.Path(folder / "meta"), args=ocp.args.JsonRestore())
    if not isinstance(record, dict) or record.get("sha256") != sha256_of(record):
        raise DamagedError("meta is not what was saved")
    return record


def sha256_of(record):
    text = json.dumps({key: value for key, value in record.items() if key != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _check_content(tree, expected):
    found, _ = fingerprint(tree)
    if wrong := [name for name, saved in expected.items() if found.get(name) != saved]:
        raise DamagedError(f"the content of {len(wrong)} arrays is not what was saved: {listing(wrong)}")


@contextlib.contextmanager
def _damage():
    """Whatever the readers raise is damage, but for what is no property of the files."""
    try:
        yield
    except Exception as error:  # ValueError, KeyError, FileNotFoundError, UnicodeDecodeError, bare Exception ...
        if isinstance(error, (MemoryError, PermissionError)) or "RESOURCE_EXHAUSTED" in str(error) or "PERMISSION_DENIED" in str(error):
            raise
        raise DamagedError(f"{type(error).__name__}: {one_line(error)}") from error


def listing(names):
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _kind(described):
    return f"{described[0]} {described[1]}"


def one_line(error):
    return " ".join(str(error).split())[:300]
