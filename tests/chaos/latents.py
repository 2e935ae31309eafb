"""A source of made-up latents and text states: no files, no decoding, some records bad, slow on request.

In a module of its own, without jax, since the workers of a loader import it.
"""

import dataclasses
import time

import numpy as np

from sana_jax.data.records import BadRecord, Record


@dataclasses.dataclass(frozen=True)
class Latents:
    """`records` latents [side side 4] and states [2..tokens 8], a function of the record's number.

    bad_every: every so many records one is bad.
    stuck_at: reading this record never ends, -1 for none.
    leak: bytes kept of every record that is read.
    """

    records: int = 40
    side: int = 2
    tokens: int = 4
    bad_every: int = 13
    stuck_at: int = -1
    leak: int = 0

    def open(self):
        return Reader(self)


class Reader:
    """See Latents."""

    def __init__(self, source):
        self.source = source
        self.null = np.zeros((source.tokens, 8), np.float16)
        self.kept = []

    def __len__(self):
        return self.source.records

    @property
    def sizes(self):
        return np.full((len(self), 2), 32 * self.source.side, np.int32)

    def fingerprint(self):
        return repr(self.source)

    def key(self, i):
        return f"latent-{i}"

    def __getitem__(self, i):
        source = self.source
        if i == source.stuck_at:
            time.sleep(3600)
        if source.bad_every and i % source.bad_every == 5:
            raise BadRecord("damaged", "on purpose")
        if source.leak:
            self.kept.append(np.ones(source.leak, np.uint8))
        rng = np.random.default_rng(i)
        latent = rng.normal(size=(source.side, source.side, 4)).astype(np.float32)
        states = rng.normal(size=(rng.integers(2, source.tokens + 1), 8)).astype(np.float16)
        return Record(f"latent-{i}", arrays={"latent": latent, "states": states})
