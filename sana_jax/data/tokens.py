"""Captions to token ids, in whatever process the loader works."""

import threading
import warnings

import numpy as np

from sana_jax import text
from sana_jax.stacks import NVLABS


class Tokenizer:
    """`tokenizer(texts)` is {"ids": int32 [b M], "ids_mask": bool [b M]}.

    Captions are cleaned as by the code that SANA was trained with.  M = `length`, and `selection`
    [tokens] names the states that the transformer sees (`text.tokenize`); both never change.
    Longer captions are cut.  A copy in another process reads the folder again.

    Args:
      folder: a Gemma tokenizer's.
      instruction: text before every caption, "" for none (`text.find_instruction`).
      tokens: selected positions, BOS included.
    Raises:
      InputError: no tokenizer there.
    """

    def __init__(self, folder, instruction="", tokens=text.LENGTH):
        self.folder, self.instruction, self.tokens = str(folder), instruction, tokens
        self._open()
        empty = self.tokenize([""])
        self.length, self.selection = empty.ids.shape[1], empty.selection
        self.vocab_size = len(self._tokenizer)

    def _open(self):
        self._tokenizer = text.load_tokenizer(self.folder)
        self._lock = threading.Lock()  # tokenizing sets padding, which no two threads may do at once

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name not in ("_tokenizer", "_lock")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._open()

    def tokenize(self, captions):
        """`text.Tokens` of captions as they are stored."""
        captions = [text.clean(caption, NVLABS) for caption in captions]
        with self._lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a caption is cut, for one in three of them
            return text.tokenize(self._tokenizer, captions, self.instruction, self.tokens)

    def __call__(self, captions):
        tokens = self.tokenize(captions)
        return {"ids": tokens.ids, "ids_mask": np.asarray(tokens.mask)}
