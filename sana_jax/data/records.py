"""What a reader gives back for one record, and why one may be bad.

A reader has `len(reader)`, `reader.sizes` (int32 [n 2], width and height, 0 0 where unknown),
`reader[i]` (a Record, or BadRecord raised) and `reader.fingerprint()`; it can be pickled.  Two more are
used where a reader has them: `reader.key(i)`, the name of a record without reading it, and, where the
records are scenes that the device paints, `reader.paint(scenes, height, width)`: float32 [b P], each
the "scene" of a record or zeros, -> uint8 [b height width 3], to be jitted.
"""

from typing import NamedTuple

import numpy as np

from sana_jax.errors import InputError

# A batch carries 0 for a good row and 1 + the place in this table for a placeholder.  Append only:
# the numbers are in logs.
REASONS = (
    "unreadable",  # the bytes cannot be read: missing, no permission, I/O error
    "empty",  # zero bytes
    "format",  # not JPEG, PNG or WEBP, whatever the name says
    "damaged",  # cut short, a bad checksum, an impossible header
    "too_large",  # more pixels or bytes than a picture may have
    "too_small",  # a side too short to be of use
    "caption",  # no usable caption
    "features",  # a cached array is missing, of another shape, or not finite
    "metadata",  # a side file (JSON) that cannot be understood
    "duplicate",  # a key that an earlier record already has
    "error",  # anything else that failed; most likely a mistake in a reader
)


class BadRecord(Exception):
    """One record cannot be used.  The loader puts a placeholder of weight 0 in its place."""

    def __init__(self, reason, detail=""):
        if reason not in REASONS:
            raise ValueError(f"reason={reason!r}: must be one of {REASONS}")
        super().__init__(reason, detail)  # both, so that it survives the way between processes

    @property
    def reason(self):
        return self.args[0]

    @property
    def detail(self):
        return self.args[1]

    @property
    def number(self):
        return 1 + REASONS.index(self.reason)

    def __str__(self):
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


class TooManyBadRecords(InputError):
    """More of the last records were bad than the experiment allows; counts them by reason."""


class Record(NamedTuple):
    """One picture with its texts, as stored; nothing is decoded yet."""

    key: str  # for people: names the record in messages
    image: bytes | None = None  # an encoded picture
    captions: dict[str, str] = {}  # {captioner: text}
    scores: dict[str, float] = {}  # {captioner: CLIP score}
    arrays: dict[str, np.ndarray] = {}  # cached: latent [h w c], states [m d], mask [m], ids, ...; scene [P]
