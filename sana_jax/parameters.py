"""What parameters a model has: names, shapes and types, without making any and without asking a device."""

import contextlib
import functools
import hashlib
import json
import pathlib

import flax
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from sana_jax import ops
from sana_jax.checkpoints.write import write_json

_traced = {}  # a trace of SANA-1.6B or of DC-AE takes a second, and train.py asks four times before its first step
_folder = []  # at most one, where tables outlive the process


def keep_tables(folder):
    """Lets tables of parameters outlive the process, in a folder that nobody else can write to.

    To trace them is a fifth of a start of sample.py.  What a file there says is of this source of the models, this
    jax and this flax; without the source there are none, and none are made under a mesh, as training makes them.
    """
    _folder[:] = [pathlib.Path(folder)] if _source() else []


def abstract_parameters(module):
    """The parameters of a Sana, DCAE or Gemma2 as a tree of ShapeDtypeStructs.

    The random key is traced as well, for in a job of several processes no device may be asked for before
    they have met.
    """
    module = ops.plain(module)
    # Not the module itself: one with width=32 equals one with width=32.0, which is none, and lists have no hash.
    key = repr(module), jax.config.jax_enable_x64, jax.sharding.get_abstract_mesh()
    if key not in _traced:
        _traced[key] = _kept(module, key) if _folder and key[-1].empty else _trace(module)
    return jax.tree.map(lambda leaf: leaf, _traced[key])  # dicts of the caller's own


def parameter_shapes(module):
    """{path: shape} of them, with paths such as "blocks/self_attn/qkv/kernel"."""
    return {path: leaf.shape for path, leaf in flatten_dict(abstract_parameters(module), sep="/").items()}


def _trace(module):
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *module.example_inputs()))["params"]


def _kept(module, key):
    """The table in the folder, or the traced one, which is then there."""
    name = _sha256(repr((*key[:2], jax.__version__, flax.__version__, _source())))
    path = _folder[0] / f"parameters-{name[:32]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # none yet, or a damaged one: it is made again
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["sha256"] == _sha256(repr(kept["rows"])):
            return unflatten_dict({name: jax.ShapeDtypeStruct(shape, dtype) for name, shape, dtype in kept["rows"]}, sep="/")
    found = _trace(module)
    rows = [[name, list(leaf.shape), leaf.dtype.name] for name, leaf in flatten_dict(found, sep="/").items()]
    with contextlib.suppress(OSError):  # the next start traces again
        write_json(path, {"sha256": _sha256(repr(rows)), "rows": rows})
    return found


@functools.cache
def _source():
    """sha256 of the source that tables depend on, "" where a package has none."""
    package = pathlib.Path(__file__).parent
    try:
        parts = [path.read_bytes() for path in (pathlib.Path(__file__), *sorted((package / "models").glob("*.py")))]
    except OSError:
        return ""
    return _sha256(repr(parts)) if len(parts) > 1 else ""


def _sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()
