"""One line of a parity table: how far a result is from its reference, and whether that will do.

Bounds are absolute where a reference is of order 1, as the tests hold them (docs/parity.md).  Real
activations are not: SANA's residual stream reaches 1e5 in a few channels.  There an error is divided
by the scale of its channel,

    scale = max(1, rms, largest / 64)      of the reference, over all but the last axis

Errors of sums grow with the rms of what is added, channel by channel: a large channel must not hide
what is wrong in the others, which a block changes by amounts of order 1.  But a single float32 of size
M is itself only known to M 2^-24, so where few values of a channel stick out (largest > 64 rms; Gaussian
ones reach 5), `largest / 64` takes over: 2e-5 is then 2.6 float32 epsilons (2^-23) of the largest value.

A layer may also enlarge what it is given: softmax over logits of 1e4 makes much of their last bit.  So
PyTorch's layer is run a second time, on its input moved by one float32 spacing, and where ROUNDINGS times
the change is more than the bound, it is the bound, but at most WIDEST times the plain one; the line says
so.  Within any bound of an output a wrong weight may hide: that none is wrong, weights.py tells.
"""

import dataclasses

import numpy as np

BOUNDS = {  # of a float32 comparison; those of docs/parity.md
    "tokens": 0.0,
    "text": 2e-4,
    "dit": 2e-5,
    "latent": 5e-5,
    "image": 2e-5,
    "solver": 1e-5,
    "pipeline": 1e-4,
}
ROUNDINGS = 8  # of an input, as many as a layer is allowed
WIDEST = 100  # plain bounds
RATIO = 1.2  # bfloat16: our error over PyTorch's own
FLOAT16_MAX = 65504.0
COLUMNS = "| what | max error | bound | rms of the reference | |\n|---|---|---|---|---|"


def rms(x):
    """Root mean square in float64."""
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


def largest(x):
    """max |x|; NaN if there is one."""
    return float(np.abs(np.asarray(x, np.float32)).max())


@dataclasses.dataclass(frozen=True)
class Row:
    """A float32 comparison; an error that is not finite fails."""

    name: str
    error: float
    bound: float
    rms: float
    largest: float  # of the reference
    ours: float  # largest of ours
    widened: bool = False  # the bound is not the plain one, see above

    @property
    def ok(self):
        return bool(np.isfinite(self.error)) and self.error <= self.bound

    def renamed(self, name):
        return dataclasses.replace(self, name=name)

    def markdown(self):
        verdict = ("ok, widened" if self.widened else "ok") if self.ok else "FAILS"
        return f"| {self.name} | {self.error:.1e} | {self.bound:.1e} | {self.rms:.2f} | {verdict} |"


def compare(name, ours, reference, bound, scaled=False, moved=None):
    """The Row of two arrays of one shape.

    Args:
      bound: a number, or a key of BOUNDS.
      scaled: divide errors by the scale of their channel, see above; else they are absolute.
      moved: the reference with its input moved by a spacing, which may widen the bound, see above.
    """
    ours, reference = (np.asarray(x, np.float32) for x in (ours, reference))
    if ours.shape != reference.shape:
        raise ValueError(f"{name}: shape {ours.shape}, the reference's is {reference.shape}")
    with np.errstate(invalid="ignore"):  # infinity less infinity is NaN, and fails
        unit = scale(reference) if scaled else 1.0
        error = largest((ours - reference) / unit)
    plain = bound = BOUNDS.get(bound, bound)
    if moved is not None and np.isfinite(change := largest((moved - reference) / unit)):
        bound = min(max(plain, ROUNDINGS * change), WIDEST * plain)
    return Row(name, error, bound, rms(reference), largest(reference), largest(ours), widened=bound > plain)


def count(name, differing):
    """The Row of how many things differ that must be the same."""
    return Row(name, float(differing), 0.0, 0.0, 0.0, 0.0)


def scale(reference):
    """[... c] -> [c], see above."""
    channels = np.abs(reference.reshape(-1, reference.shape[-1]))
    return np.maximum(1.0, np.maximum([rms(channel) for channel in channels.T], channels.max(axis=0) / 64))


def counted(steps):
    """1 -> "1 step", 20 -> "20 steps"."""
    return f"{steps} step{'s' if steps > 1 else ''}"


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A bfloat16 comparison: rms errors against PyTorch's float32 result, ours and PyTorch's own."""

    name: str
    error: float
    theirs: float

    @property
    def ratio(self):
        return self.error / self.theirs

    @property
    def ok(self):
        return self.ratio <= RATIO

    def markdown(self):
        verdict = "ok" if self.ok else "FAILS"
        return f"| {self.name} | {self.error:.2e} | {self.theirs:.2e} | {self.ratio:.2f} | {verdict} |"


def ratio(name, ours, theirs, reference):
    """The Ratio of two bfloat16 results to one float32 reference."""
    reference = np.asarray(reference, np.float32)
    return Ratio(name, *(rms(np.asarray(x, np.float32) - reference) for x in (ours, theirs)))


@dataclasses.dataclass(frozen=True)
class Range:
    """Activations of one layer: largest values on both sides, and of its self-attention's output."""

    name: str
    theirs: float
    ours: float
    rms: float
    attention: float | None = None

    @property
    def remark(self):
        peak = np.max([self.theirs, self.ours, self.attention or 0.0])
        if not peak <= FLOAT16_MAX:
            return "beyond float16"
        return "within 4x of float16's end" if 4 * peak > FLOAT16_MAX else ""

    def markdown(self):
        attention = "" if self.attention is None else f"{self.attention:.4g}"
        return f"| {self.name} | {self.theirs:.4g} | {self.ours:.4g} | {self.rms:.3g} | {attention} | {self.remark} |"


def range_of(row, attention=None):
    """The Range that a Row saw."""
    return Range(row.name, row.largest, row.ours, row.rms, attention)
