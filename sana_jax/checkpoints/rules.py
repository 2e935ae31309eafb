"""Checkpoint conversion as data: one total table of Rules per format, one engine, both directions.

A layout is a *view*.  It maps a leaf of ours to the strided view of that same memory which has the
elements of the torch tensor in the torch order.  Reading a checkpoint is `view(leaf)[...] = tensor`,
writing one is `tensor = view(leaf)`; there is no second, inverse table that could disagree, and a
tensor goes from the file to its final place in one copy.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np

from sana_jax.errors import CheckpointError

LISTED = 20  # problems of each kind that an error lists before it only counts


@dataclasses.dataclass(frozen=True)
class Layout:
    """`view`: leaf -> view; `shape`: view shape -> torch shape (equal unless the view is split)."""

    view: Callable[[np.ndarray], np.ndarray]
    shape: Callable[[tuple], tuple] = lambda s: s


SAME = Layout(lambda a: a)
LINEAR = Layout(lambda a: a.T)  # [in, out] <-> (out, in)
CONV = Layout(lambda a: a.transpose(3, 2, 0, 1))  # HWIO <-> OIHW
POINTWISE = Layout(lambda a: a.T[:, :, None, None])  # Dense <-> 1x1 convolution
DEPTHWISE = Layout(lambda a: a.transpose(2, 0, 1)[:, None])  # [k, k, c] <-> (c, 1, k, k)
GROUPED = Layout(  # [group, in, out] <-> grouped 1x1 convolution (group * out, in, 1, 1)
    lambda a: a.transpose(0, 2, 1),
    lambda s: (s[0] * s[1], s[2], 1, 1),
)


def third(part, parts, layout=SAME):
    """Contiguous slice `part` of `parts` along the last axis of the leaf."""

    def view(a):
        width = a.shape[-1] // parts
        return layout.view(a[..., part * width : (part + 1) * width])

    return Layout(view, layout.shape)


def packed_kernel(part, parts, heads):
    """Head-major packed projection: leaf [in, heads * parts * c], torch (heads * c, in).

    Our columns run (head, part, channel), so one token of one head is a contiguous run of
    parts * c numbers: one wide load for a kernel, and a slice over heads is a contiguous shard.
    """
    return Layout(
        lambda a: a.reshape(a.shape[0], heads, parts, -1)[:, :, part].transpose(1, 2, 0),
        lambda s: (s[0] * s[1], s[2]),
    )


def packed_bias(part, parts, heads):
    """Bias of a head-major packed projection: leaf [heads * parts * c], torch (heads * c,)."""
    return Layout(
        lambda a: a.reshape(heads, parts, -1)[:, part],
        lambda s: (s[0] * s[1],),
    )


def fused_kernel(parts, heads):
    """The same leaf as `packed_kernel` where torch fuses its parts: torch (parts * heads * c, in)."""
    return Layout(
        lambda a: a.reshape(a.shape[0], heads, parts, -1).transpose(2, 1, 3, 0),
        lambda s: (s[0] * s[1] * s[2], s[3]),
    )


def fused_bias(parts, heads):
    """Bias of such a fused projection: leaf [heads * parts * c], torch (parts * heads * c,)."""
    return Layout(
        lambda a: a.reshape(heads, parts, -1).transpose(1, 0, 2),
        lambda s: (s[0] * s[1] * s[2],),
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """`torch` name <-> `flax` path ("a/b/kernel").  `{i}` ranges over axis 0 of the leaf."""

    torch: str
    flax: str
    layout: Layout = SAME


def dense(torch, flax, bias=True, layout=LINEAR):
    """The rows of a linear layer or, with `layout=POINTWISE`, of a 1x1 convolution."""
    rows = [Rule(f"{torch}.weight", f"{flax}/kernel", layout)]
    return rows + [Rule(f"{torch}.bias", f"{flax}/bias")] if bias else rows


@dataclasses.dataclass(frozen=True)
class Slot:
    """The place of one torch tensor: a leaf, perhaps one layer of it, through a layout."""

    path: str
    layer: int | None
    layout: Layout

    def view(self, leaf):
        return self.layout.view(leaf if self.layer is None else leaf[self.layer])

    def shape(self, leaf_shape):
        # Shapes are found by viewing one byte broadcast to the leaf's shape: nothing is allocated.
        leaf = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), leaf_shape, [0] * len(leaf_shape))
        return tuple(self.layout.shape(self.view(leaf).shape))


def slots(rules: Iterable[Rule], shapes: Mapping[str, tuple]) -> dict[str, Slot]:
    """{torch name: Slot} for leaves of these shapes ({path: shape}).

    Raises ValueError when the table itself is not total: a leaf without a rule, a rule without a
    leaf, a name twice, or elements of a leaf that no rule or two rules cover.
    """
    out, problems = {}, []
    covered = {path: 0 for path in shapes}
    sharing = collections.defaultdict(list)  # path -> slots of the whole leaf, or of its first layer
    for rule in rules:
        if rule.flax not in shapes:
            problems.append(f"{rule.torch} -> {rule.flax}: no such parameter")
            continue
        layers = range(shapes[rule.flax][0]) if "{i}" in rule.torch else [None]
        for layer in layers:
            name = rule.torch if layer is None else rule.torch.replace("{i}", str(layer))
            if name in out:
                problems.append(f"{name}: two rules")
            out[name] = Slot(rule.flax, layer, rule.layout)
            covered[rule.flax] += math.prod(out[name].shape(shapes[rule.flax]))
            if not layer:
                sharing[rule.flax].append(out[name])
    for path, count in covered.items():
        if count != math.prod(shapes[path]):
            problems.append(f"{path}: rules cover {count} of {math.prod(shapes[path])} elements")
        elif len(sharing[path]) > 1 and _overlap(sharing[path], shapes[path]):
            problems.append(f"{path}: rules cover elements twice and leave others out")
    if problems:
        raise ValueError("the conversion table is not total:\n  " + "\n  ".join(problems))
    return out


def _overlap(several, shape):
    """Whether slots that share a leaf, or its first layer, meet; all layers are alike."""
    if several[0].layer is not None:
        shape = shape[1:]
    count = np.zeros(shape, np.uint8)
    for slot in several:
        view = slot.layout.view(count)
        view += 1
    return bool((count > 1).any())


def _listed(title, items):
    more = [f"... and {len(items) - LISTED} more"] if len(items) > LISTED else []
    return [f"{title} ({len(items)}):"] + [f"  {_shown(i)}" for i in items[:LISTED] + more] if items else []


def _shown(text):
    """A foreign name as one short line, whatever a file put into it."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:200]) + "..." * (len(text) > 200)


def check(table: Mapping[str, Slot], shapes: Mapping[str, tuple], header: Mapping[str, tuple], source):
    """Compares a checkpoint's header {name: (shape, dtype)} with the table, before any data is read.

    Raises CheckpointError listing missing, extra, mis-shaped and wrong-dtype tensors together.
    """
    missing = [n for n in table if n not in header]
    extra = [n for n in header if n not in table]
    shaped, typed = [], []
    for name in table.keys() & header.keys():
        shape, dtype = header[name]
        expected = table[name].shape(shapes[table[name].path])
        if tuple(shape) != expected:
            shaped.append(f"{name}: file has {tuple(shape)}, the model needs {expected}")
        if dtype not in ("F64", "F32", "F16", "BF16"):
            typed.append(f"{name}: stored as {dtype}, must be F64, F32, F16 or BF16")
    lines = (
        _listed("missing", sorted(missing))
        + _listed("not part of this model", sorted(extra))
        + _listed("wrong shape", sorted(shaped))
        + _listed("wrong dtype", sorted(typed))
    )
    if lines:
        raise CheckpointError(f"{source} does not fit the model\n  " + "\n  ".join(lines))


def _finite(a):
    if a.dtype.kind == "f" and a.dtype.itemsize >= 4:  # one pass without a temporary: NaN/inf poison a sum
        with np.errstate(over="ignore", invalid="ignore"):
            return bool(np.isfinite(a.sum(dtype=np.float64)))
    bits, exponent = a.view(np.uint16), {"float16": 0x7C00, "bfloat16": 0x7F80}[a.dtype.name]
    return not bool(((bits & exponent) == exponent).any())


def _aligned_empty(shape, dtype, alignment=64):
    """An array that jax takes over on a CPU without a copy: it wants 64-byte alignment."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype).reshape(shape)


def _put(view, tensor, name):
    """Writes a tensor through its view; returns what is wrong with its numbers, a list of one or none."""
    broken = [] if _finite(tensor) else [name]
    with np.errstate(over="ignore"):
        view[...] = tensor.reshape(view.shape)
    narrower = ml_dtypes.finfo(tensor.dtype).max > ml_dtypes.finfo(view.dtype).max
    if narrower and not broken and not np.isfinite(view).all():
        broken.append(f"{name} (overflows {view.dtype.name})")
    return broken


def _raise_if_broken(broken, source):
    if broken:
        raise CheckpointError("\n  ".join([f"{source} holds NaN or infinity"] + _listed("tensors", broken)))


def to_flax(rules, shapes, header, tensors, dtype, source="checkpoint") -> dict[str, np.ndarray]:
    """A stream of tensors into new leaves of `dtype`, {path: array}, all of them on the host.

    Args:
      rules: the format's table.
      shapes: {path: shape} of every parameter of the model.
      header: {torch name: (shape, safetensors dtype)}; checked whole before the first read.
      tensors: iterable of (torch name, array); each array may be dropped once consumed, so the host
        holds the leaves plus whatever the reader keeps, at most one shard.
      dtype: of the leaves, a numpy dtype.
      source: what the checkpoint is called in messages.
    Raises:
      CheckpointError: the checkpoint does not fit, or holds NaN or infinity.
    """
    table = slots(rules, shapes)
    check(table, shapes, header, source)
    leaves = {path: _aligned_empty(shape, dtype) for path, shape in shapes.items()}
    filled, broken = set(), []
    for name, tensor in tensors:
        broken += _put(table[name].view(leaves[table[name].path]), tensor, name)
        filled.add(name)
    if unread := table.keys() - filled:
        raise CheckpointError(f"{source}: announced but not read: {', '.join(sorted(unread)[:LISTED])}")
    _raise_if_broken(broken, source)
    return leaves


def leaf_by_leaf(rules, shapes, header, read, dtype, put, pieces=None, source="checkpoint") -> dict:
    """The same one leaf after the other, for arrays that go elsewhere: {path: put(path, arrays)}.

    Args:
      rules, shapes, header, dtype, source: as in `to_flax`.
      read: torch name -> array.
      put: takes a path and the arrays of its pieces, which it may keep.
      pieces: path -> the parts of that leaf which are wanted, each a tuple of slices; None is one
        part, the whole.
    The host holds the pieces of one leaf, one tensor, and one layer where a piece is not the whole.
    """
    table = slots(rules, shapes)
    check(table, shapes, header, source)
    of_leaf = {path: collections.defaultdict(list) for path in shapes}
    for name, slot in table.items():
        of_leaf[slot.path][slot.layer].append((name, slot))
    out, broken = {}, []
    for path, shape in shapes.items():
        wanted = pieces(path) if pieces else [tuple(slice(0, n) for n in shape)]
        arrays = [
            _aligned_empty([len(range(*s.indices(n))) for s, n in zip(piece, shape, strict=True)], dtype)
            for piece in wanted
        ]
        whole = arrays[0] if len(arrays) == 1 and arrays[0].shape == shape else None
        for layer, entries in of_leaf[path].items():
            if whole is not None:
                place = whole if layer is None else whole[layer]
            else:
                place = np.empty(shape if layer is None else shape[1:], dtype)
            for name, slot in entries:
                broken += _put(slot.layout.view(place), read(name), name)
            for array, piece in zip(arrays, wanted):
                if whole is None and layer is None:
                    array[...] = place[piece]
                elif whole is None and layer in range(*piece[0].indices(shape[0])):
                    array[layer - piece[0].indices(shape[0])[0]] = place[piece[1:]]
        out[path] = put(path, arrays)
        arrays = whole = place = array = None  # gone before the next leaf is made
    _raise_if_broken(broken, source)
    return out


def to_torch(rules, leaves: Mapping[str, np.ndarray]) -> Iterable[tuple[str, np.ndarray]]:
    """The same table read from right to left: yields (torch name, contiguous array)."""
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    for name, slot in slots(rules, shapes).items():
        leaf = leaves[slot.path]
        yield name, np.ascontiguousarray(slot.view(leaf)).reshape(slot.shape(leaf.shape))


def names(rules, shapes):
    """{torch name: shape} that this table reads and writes; compare with a published key list."""
    return {n: s.shape(shapes[s.path]) for n, s in slots(rules, shapes).items()}


def layer_count(pattern, header):
    """Number of layers that match `pattern` (with `{i}`), for inferring a depth from names."""
    rx = re.compile(re.escape(pattern).replace(r"\{i\}", r"(\d+)"))
    return len({m[1] for name in header if (m := rx.fullmatch(name))})
