"""A tokenizer learned from captions; what every user of it relies on is in test_text.py."""

import pytest

from sana_jax import text
from sana_jax.data import vocabulary
from sana_jax.data.vocabulary import SMALLEST, Words, learn
from sana_jax.errors import InputError

CAPTIONS = ["a large red circle on blue", "a small green square on white", "ein großer Kreis 圆"] * 3


@pytest.mark.parametrize("size", [SMALLEST, 270, 320, 4000])
def test_ids_stay_below_the_size_and_captions_come_back(size, tmp_path):
    learn(CAPTIONS, size).save_pretrained(tmp_path)
    tokenizer = text.load_tokenizer(tmp_path)
    for caption in [*CAPTIONS, "unseen: žluťoučký ☃", ""]:
        ids = tokenizer.encode(caption)
        assert ids[0] == 2 and max(ids) < size
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption


def test_the_same_captions_give_the_same_tokenizer_and_words_become_tokens():
    first, second = (learn(iter(CAPTIONS), 400) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first.encode("a large red circle")) == 5


def test_too_small():
    with pytest.raises(InputError, match=f"model.vocab_size=100: must be at least {SMALLEST}"):
        learn(CAPTIONS, 100)


def test_the_words_of_captions(tmp_path):
    captions = ["a red circle, a three-sided shape", "2 kreise: ähnlich"]
    words = Words()
    assert list(words.of(captions)) == captions
    words.write(tmp_path)
    assert vocabulary.read_words(tmp_path) == sorted("2 a circle kreise red shape sided three ähnlich".split())


def test_rare_words_are_noise_and_capitals_are_known(tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "RARE", 2)
    words = Words()
    list(words.of(["a a xqz", "a ring", "a ring", "a hoop"]))
    words.write(tmp_path)
    assert vocabulary.read_words(tmp_path) == ["a", "ring"]
    (tmp_path / vocabulary.FILE).unlink()
    list(words.of(["A ring"]))
    words.write(tmp_path)
    assert vocabulary.read_words(tmp_path) is None
