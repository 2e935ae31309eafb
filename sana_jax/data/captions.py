"""Which of a picture's captions a step sees.

A picture may have several captions, each with the CLIP score of caption and picture.  SANA's paper
(https://arxiv.org/abs/2410.10629, section 3.3) draws caption i of scores s with a softmax of
temperature T; its published code takes those that reach a threshold, and a power of the score:

    softmax   p_i ~ exp(s_i / T)
    power     p_i ~ s_i ** (1 / T)   among s_i >= threshold; the best where none reaches it

Both draw among the captions with a score, and take "prompt", or else the first, where none has one.
"""

import dataclasses

import numpy as np

from sana_jax.data.records import BadRecord
from sana_jax.errors import InputError, require_choice

HOW = ("first", "uniform", "proportion", "power", "softmax")
MAIN = "prompt"  # the name of the caption that is a picture's own
LONGEST = 10_000  # characters; a longer caption is cut, 300 tokens never reach so far


@dataclasses.dataclass(frozen=True)
class Captions:
    """One caption of several.

    how: "first" ("prompt" where there is one), "uniform", "proportion", "power" or "softmax".
    threshold: lowest CLIP score of "power".
    temperature: T of "power" and "softmax".
    proportion: ((name, share), ...) of "proportion"; the shares of the names that a picture has
      are made to sum to 1.
    """

    how: str = "uniform"
    threshold: float = 25.0
    temperature: float = 0.1
    proportion: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        require_choice("captions.how", self.how, HOW)
        if not self.temperature > 0:
            raise InputError(f"captions.temperature={self.temperature!r}: must be a positive number")
        pairs = [p for p in self.proportion if len(p) == 2 and isinstance(p[0], str) and p[1] > 0]
        if len(pairs) != len(self.proportion) or (self.how == "proportion") != bool(pairs):
            raise InputError(
                f"captions.proportion={self.proportion!r}: must be pairs of a name and a positive share, and be given "
                'with how="proportion" only'
            )

    def choose(self, record, rng):
        """(name, text) for one showing of a record; takes exactly one number from `rng`.

        Raises BadRecord: no usable caption.
        """
        draw, texts = rng.random(), usable(record)
        names = list(texts)
        shares = self.probabilities(names, record.scores)
        if not shares.any():
            raise BadRecord("caption", f"none of {[name for name, _ in self.proportion]} among {names}")
        i = min(int(np.searchsorted(np.cumsum(shares), draw, side="right")), np.flatnonzero(shares)[-1])
        return names[i], texts[names[i]]

    def probabilities(self, names, scores):
        """Float64 [len(names)] that sum to 1, or all 0 where "proportion" knows none of the names."""
        shares = np.zeros(len(names))
        main = names.index(MAIN) if MAIN in names else 0
        if self.how == "uniform":
            shares[:] = 1
        elif self.how == "proportion":
            table = dict(self.proportion)
            shares[:] = [table.get(name, 0) for name in names]
        elif self.how == "first" or not any(name in scores for name in names):
            shares[main] = 1
        else:
            known = np.array([scores.get(name, -np.inf) for name in names], np.float64)
            shares[:] = _of_scores(known, self)
        return shares / shares.sum() if shares.any() else shares


def _of_scores(scores, captions):
    """Weights, the largest of them 1, from scores of which -inf stands for none."""
    best = scores.max()
    if captions.how == "softmax":
        return np.exp((scores - best) / captions.temperature)
    reached = (scores >= captions.threshold) & (scores > 0)
    if not reached.any():
        return np.where(np.arange(scores.size) == scores.argmax(), 1.0, 0.0)
    ratio = np.where(reached, scores / best, 0)
    return np.where(reached, ratio ** (1 / captions.temperature), 0)


def usable(record):
    """{name: text} of a record's captions, stripped, and cut to 10,000 characters.

    A blank caption counts as absent.  Raises BadRecord: there is none, or one that is not a text: no
    string, a NUL in it, or bytes that are not UTF-8.
    """
    texts = {}
    for name, text in record.captions.items():
        if problem := problem_of(text):
            raise BadRecord("caption", f"{name}: {problem}")
        if text := text[:LONGEST].strip():
            texts[name] = text
    if not texts:
        raise BadRecord("caption", "blank" if record.captions else "absent")
    return texts


def problem_of(text):
    """Why a caption is not a text, or None."""
    if not isinstance(text, str):
        return f"a {type(text).__name__}, not a string"
    text = text[:LONGEST]
    if "\0" in text:
        return "holds a NUL"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "not UTF-8"
    return None
