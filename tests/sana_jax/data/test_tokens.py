"""Captions to ids in worker processes: as `text.tokenize` makes them, cleaned as in training."""

import io
import threading
from multiprocessing import reduction

import numpy as np
import pytest

from sana_jax import text
from sana_jax.data.loader import Loader
from sana_jax.data.tokens import Tokenizer
from sana_jax.errors import InputError
from tests import toy_tokenizer
from tests.toy_reader import Data, Reader

INSTRUCTION = 'Given a user prompt, write an "Enhanced prompt": '


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    toy_tokenizer.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer(folder, INSTRUCTION, 20)


def test_as_the_text_encoder_is_fed(folder, tokenizer):
    captions = ["a red cat", "", "  The Forest  --ar 16:9"]
    expected = text.tokenize(
        text.load_tokenizer(folder), ["a red cat", "", "The Forest"], INSTRUCTION, 20
    )
    found = tokenizer(captions)
    np.testing.assert_array_equal(found["ids"], expected.ids)
    np.testing.assert_array_equal(found["ids_mask"], expected.mask)
    np.testing.assert_array_equal(tokenizer.selection, expected.selection)
    assert found["ids"].shape == (3, tokenizer.length) and found["ids"].dtype == np.int32
    assert found["ids_mask"].dtype == bool and tokenizer.selection.shape == (20,)


def test_capitals_count(tokenizer):
    assert not np.array_equal(tokenizer(["The Cat"])["ids"], tokenizer(["the cat"])["ids"])


def test_long_captions_are_cut_without_a_word(tokenizer):
    found = tokenizer(["a small dog runs along the beach " * 20])
    assert found["ids"].shape == (1, tokenizer.length) and found["ids_mask"].all()


def test_without_an_instruction(folder):
    plain = Tokenizer(folder, tokens=20)
    assert plain.length == 20 and plain.selection.tolist() == list(range(20))


def test_a_copy_in_another_process_is_the_same(tokenizer):
    file = io.BytesIO()
    reduction.ForkingPickler(file).dump(tokenizer)
    assert len(file.getvalue()) < 2000  # the folder's name and the instruction, not a vocabulary
    copy = reduction.ForkingPickler.loads(file.getvalue())
    for name, array in copy(["a red cat"]).items():
        np.testing.assert_array_equal(array, tokenizer(["a red cat"])[name])


def test_in_threads(tokenizer):
    """The tokenizer itself can be used by one thread at a time only."""
    captions = [f"a photo of {n} cats on a green chair" for n in range(200)]
    expected, found = tokenizer(captions)["ids"], {}

    def work(start):
        found[start] = np.concatenate([tokenizer(captions[i : i + 5])["ids"] for i in range(start, start + 50, 5)])

    threads = [threading.Thread(target=work, args=(start,)) for start in range(0, 200, 50)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    np.testing.assert_array_equal(np.concatenate([found[start] for start in range(0, 200, 50)]), expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_in_a_loader(tokenizer, workers):
    with Loader(Reader(20, "image"), Data(batch=4, workers=workers), tokenize=tokenizer) as loader:
        batch = next(loader)
    assert batch["ids"].shape == (4, tokenizer.length) and batch["weight"].all()


def test_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match="no tokenizer here"):
        Tokenizer(tmp_path)
