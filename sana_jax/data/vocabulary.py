"""A tokenizer learned from captions, for a text encoder that is trained from nothing, and their words.

Of Gemma's kind, so that everything which reads Gemma's reads it: byte-pair encoding, spaces as "▁",
bytes for what the vocabulary lacks, and the special tokens pad 0, eos 1, bos 2, unk 3, mask 4.
"""

import collections
import json
import pathlib

from sana_jax.errors import InputError
from sana_jax.text import words

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SMALLEST = len(SPECIAL) + len(BYTES) + 1
FILE = "vocabulary.txt"  # beside a tokenizer: the words that it was learned from, one a line
RARE = 20_000  # a word that fewer than one in so many texts has is taken for noise, a misspelling say


def learn(texts, vocab_size):
    """A `transformers.GemmaTokenizer` of at most `vocab_size` tokens; `save_pretrained` writes it.

    Words are learned with the space before them, the first of a caption without it as well: a space at
    the end of an instruction merges with it, as it does in Gemma's (docs/numerics.md 6), but where there
    is no instruction there is no space.  Marks stay tokens of their own, whatever word is before them.
    Args:
      texts: iterable of str; the same texts in the same order give the same tokenizer.
      vocab_size: that of the model.
    Raises InputError: too few tokens for the special ones and the bytes.
    """
    if vocab_size < SMALLEST:
        raise InputError(f"model.vocab_size={vocab_size}: must be at least {SMALLEST}, for bytes and special tokens")
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split(Regex(r"[^\w\s▁]"), "isolated")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL, *BYTES], show_progress=False,
        limit_alphabet=vocab_size - len(SPECIAL) - len(BYTES),  # what has no room is spelled in bytes
    )  # fmt: skip
    learner.train_from_iterator((start + text for text in texts for start in ("", " ")), trainer)
    model = json.loads(learner.to_str())["model"]
    return GemmaTokenizer(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], add_bos_token=True
    )


class Words:
    """Which words texts have, told by those that pass through `of`."""

    def __init__(self):
        self._counts, self._texts, self._capitals = collections.Counter(), 0, False

    def of(self, texts):
        """The same texts, one after the other."""
        for text in texts:
            self._texts += 1
            self._capitals |= text != text.lower()
            self._counts.update(set(words(text)))
            yield text

    def write(self, folder):
        """Writes them beside the tokenizer; none where texts have capitals, which a model then knows too."""
        least = self._texts / RARE
        known = sorted(word for word, count in self._counts.items() if count >= least)
        if known and not self._capitals:
            pathlib.Path(folder, FILE).write_text("".join(f"{word}\n" for word in known), encoding="utf-8")


def read_words(folder):
    """The words beside a tokenizer, a sorted list; None where there is no such file."""
    file = pathlib.Path(folder, FILE)
    return sorted(file.read_text(encoding="utf-8").split()) if file.is_file() else None
