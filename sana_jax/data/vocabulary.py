"""A tokenizer learned from captions, for a text encoder that is trained from nothing.

Of Gemma's kind, so that everything which reads Gemma's reads it: byte-pair encoding, spaces as "▁",
bytes for what the vocabulary lacks, and the special tokens pad 0, eos 1, bos 2, unk 3, mask 4.
"""

import json

from sana_jax.errors import InputError

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SMALLEST = len(SPECIAL) + len(BYTES) + 1


def learn(texts, vocab_size):
    """A `transformers.GemmaTokenizer` of at most `vocab_size` tokens; `save_pretrained` writes it.

    Words are learned with the space before them: a space at the end of an instruction then merges with
    the first word of a caption, as it does in Gemma's (docs/numerics.md 6).
    Args:
      texts: iterable of str; the same texts in the same order give the same tokenizer.
      vocab_size: that of the model.
    Raises InputError: too few tokens for the special ones and the bytes.
    """
    if vocab_size < SMALLEST:
        raise InputError(f"model.vocab_size={vocab_size}: must be at least {SMALLEST}, for bytes and special tokens")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import GemmaTokenizer

    learner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learner.normalizer = normalizers.Replace(" ", "▁")
    learner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL, *BYTES], show_progress=False,
        limit_alphabet=vocab_size - len(SPECIAL) - len(BYTES),  # what has no room is spelled in bytes
    )  # fmt: skip
    learner.train_from_iterator((" " + text for text in texts), trainer)
    model = json.loads(learner.to_str())["model"]
    return GemmaTokenizer(
        vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], add_bos_token=True
    )
