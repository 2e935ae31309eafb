"""Prompts to tokens: the traps of docs/numerics.md section 6, one by one and against diffusers."""

import functools
import hashlib
import json
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import text
from sana_jax.errors import InputError
from sana_jax.stacks import DIFFUSERS, NVLABS
from tests import peers, toy_tokenizer

CHI = "Enhance the prompt.\nUser Prompt: "
PROMPTS = ["a red cat", "", "猫 café 🎨, naïve", "the dog " * 200, "User Prompt: \n a  house "]


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer.make_tokenizer()


@functools.partial(jax.jit, static_argnums=0)
def encode(module, params, ids, mask, prefix=None):
    return module.apply({"params": params}, ids, mask, prefix)


# Cleaning


@pytest.mark.parametrize(
    "prompt, diffusers, nvlabs",
    [
        ("  A Red CAT\n", "a red cat", "A Red CAT"),
        ("A cat --ar 16:9", "a cat --ar 16:9", "A cat"),
        ("A cat --hw 512:1024 on a mat", "a cat --hw 512:1024 on a mat", "A cat"),
        ("A cat --aspect_ratio 1:2", "a cat --aspect_ratio 1:2", "A cat"),
        ("A cat -- or a dog", "a cat -- or a dog", "A cat -- or a dog"),
        ("ÀÉ Straße", "àé straße", "ÀÉ Straße"),
        ("", "", ""),
    ],
)
def test_clean(prompt, diffusers, nvlabs):
    assert text.clean(prompt, DIFFUSERS) == diffusers
    assert text.clean(prompt, NVLABS) == nvlabs


def test_case_changes_tokens(tokenizer):
    assert tokenizer.encode("A Cat") != tokenizer.encode("a cat")


# The instruction


def fake_diffusers(monkeypatch, folder, source):
    """A package that must not be imported, holding this pipeline source."""
    pipeline = folder / "diffusers" / "pipelines" / "sana" / "pipeline_sana.py"
    pipeline.parent.mkdir(parents=True)
    init = '__version__ = "9.9"\nraise RuntimeError("imported")\n'
    (folder / "diffusers" / "__init__.py").write_text(init)
    if source is not None:
        pipeline.write_text(source, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    monkeypatch.syspath_prepend(str(folder))


CALL = """
class SanaPipeline:
  def __call__(self, prompt=None, complex_human_instruction={}, negative="", *, x=1):
    pass
"""


@pytest.mark.parametrize(
    "source",
    [
        CALL.format("['Other words', 'User Prompt: ']"),
        CALL.format("None"),
        CALL.format("SOME_NAME"),
        CALL.format("[1, 2]"),
        "class Other:\n  pass\n",
        "class SanaPipeline:\n  x = 1\n",
        "this is not python",
        None,
    ],
)
def test_another_diffusers_gives_own_words(monkeypatch, tmp_path, source):
    fake_diffusers(monkeypatch, tmp_path, source)
    for stack in (DIFFUSERS, NVLABS):
        found = text.find_instruction("auto", stack)
        why = "installed diffusers 9.9 does not hold the published instruction"
        assert found == text.Instruction(text.OWN_WORDS, f"own words ({why})")


def test_a_text_with_the_right_sum_is_taken(monkeypatch, tmp_path):
    lines = ["Make an 'Enhanced prompt'.", "User Prompt: "]
    fake_diffusers(monkeypatch, tmp_path, CALL.format(lines))
    single = text.Instruction("\n".join(lines), "")
    double = text.Instruction(single.text.replace("'", '"'), "")
    monkeypatch.setattr(text, "SHA256_DIFFUSERS", single.sha256)
    monkeypatch.setattr(text, "SHA256_NVLABS", double.sha256)
    for stack, expected in ((DIFFUSERS, single), (NVLABS, double)):
        assert text.find_instruction("auto", stack) == text.Instruction(
            expected.text, "installed diffusers 9.9"
        )


def test_no_diffusers_gives_own_words(monkeypatch):
    monkeypatch.setattr(text.importlib.util, "find_spec", lambda name: None)
    found = text.find_instruction("auto", DIFFUSERS)
    assert found == text.Instruction(text.OWN_WORDS, "own words (diffusers is not installed)")
    assert found.text.endswith("User Prompt: ")


def test_given_instructions(tmp_path):
    assert text.find_instruction("none", DIFFUSERS) == text.Instruction("", "none")
    assert text.find_instruction("", DIFFUSERS, "x") == text.Instruction("", "none")
    assert text.find_instruction("Draw: ", NVLABS, "x") == text.Instruction("Draw: ", "given text")
    assert text.find_instruction("auto", NVLABS, "'q' ") == text.Instruction("'q' ", "checkpoint")
    assert text.find_instruction("auto", DIFFUSERS, ["a", "b "]).text == "a\nb "
    path = tmp_path / "chi.txt"
    path.write_bytes("Zeichne schön:\r\n".encode())
    found = text.read_instruction_file(path)
    assert found == text.Instruction("Zeichne schön:\r\n", f"file {path}")
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_instruction_errors(tmp_path):
    for near in ("Auto", " none", "atuo"):
        with pytest.raises(InputError, match="did you mean '(auto|none)'"):
            text.find_instruction(near, DIFFUSERS)
    with pytest.raises(InputError, match="chi=None.*NoneType"):
        text.find_instruction(None, DIFFUSERS)
    with pytest.raises(InputError, match="absent.txt: cannot be read"):
        text.read_instruction_file(tmp_path / "absent.txt")
    (tmp_path / "latin").write_bytes("schön".encode("latin-1"))
    with pytest.raises(InputError, match="must be UTF-8.*byte 3"):
        text.read_instruction_file(tmp_path / "latin")


@pytest.mark.parity
def test_the_published_instruction_is_found_without_torch():
    code = """
import sys
from sana_jax import stacks, text
for stack in stacks.STACKS.values():
    found = text.find_instruction("auto", stack)
    assert found.source.startswith("installed diffusers 0."), found.source
    assert len(found.text) == 1057 and found.text.endswith("User Prompt: ")
    print(found.sha256)
print(sorted({"torch", "diffusers", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == [text.SHA256_DIFFUSERS, text.SHA256_NVLABS, "[]"]


@pytest.mark.parity
def test_own_words_are_our_own():
    published = text.find_instruction("auto", DIFFUSERS)
    assert published.source.startswith("installed")
    words = published.text.lower().split()
    fours = {tuple(words[i : i + 4]) for i in range(len(words))}
    own = text.OWN_WORDS.lower().split()
    assert not [own[i : i + 4] for i in range(len(own) - 3) if tuple(own[i : i + 4]) in fours]


# The tokenizer


def test_load_tokenizer(tokenizer, tmp_path):
    assert tokenizer.padding_side == "left"  # as the published one
    tokenizer.save_pretrained(tmp_path)
    loaded = text.load_tokenizer(tmp_path)
    assert loaded.padding_side == "right"
    assert loaded.encode("a red cat 猫") == tokenizer.encode("a red cat 猫")


def test_load_tokenizer_errors(tokenizer, tmp_path):
    def check(folder, *words):
        with pytest.raises(InputError) as error:
            text.load_tokenizer(folder)
        message = str(error.value)
        assert message.startswith(f"{folder}: ") and "\n" not in message
        assert all(word in message for word in words), message

    check(tmp_path / "absent", "no such folder", "tokenizer.json")
    check(tmp_path, "no tokenizer here", "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    check(tmp_path, "not a Gemma tokenizer")
    tokenizer.save_pretrained(tmp_path / "no_bos")
    for name, change in (
        ("tokenizer.json", {"post_processor": None}),
        ("tokenizer_config.json", {"add_bos_token": False}),
    ):
        path = tmp_path / "no_bos" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    check(tmp_path / "no_bos", "must begin with one BOS")

    from tokenizers import Tokenizer, models

    (tmp_path / "foreign").mkdir()
    foreign = Tokenizer(models.WordLevel({"cat": 0, "?": 1}, unk_token="?"))
    foreign.save(str(tmp_path / "foreign" / "tokenizer.json"))
    check(tmp_path / "foreign", "not a Gemma tokenizer")


def test_code_in_a_tokenizer_folder_is_not_run(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    path.write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert type(text.load_tokenizer(tmp_path)).__name__ == "GemmaTokenizer"
    assert not (tmp_path / "ran").exists()


# Tokens


def test_the_last_space_of_the_instruction_merges_with_the_prompt(tokenizer):
    alone, joined = tokenizer.encode(CHI), tokenizer.encode(CHI + "cat")
    assert tokenizer.convert_ids_to_tokens(alone[-1]) == "▁"
    assert tokenizer.convert_ids_to_tokens(joined[-1]) == "▁cat"
    assert len(joined) == len(alone) and joined[:-1] == alone[:-1]


def test_selection_is_bos_and_the_prompt(tokenizer):
    length, n_chi = 16, len(tokenizer.encode(CHI))
    tokens = text.tokenize(tokenizer, ["a red cat", ""], CHI, length)
    assert tokens.ids.shape == tokens.mask.shape == (2, n_chi + length - 2)
    assert (tokens.ids.dtype, tokens.mask.dtype) == (np.int32, np.bool_)
    assert list(tokens.selection) == [0, *range(n_chi - 1, n_chi + length - 2)]
    selected = tokens.ids[:, tokens.selection]
    words = tokenizer.encode(" a red cat")
    assert list(selected[0, : len(words)]) == words and not selected[0, len(words) :].any()
    assert list(selected[1, :2]) == tokenizer.encode(" ")  # the empty prompt keeps the space
    assert list(tokens.selected_mask.sum(axis=1)) == [len(words), 2]


def test_the_null_prompt_has_no_instruction(tokenizer):
    tokens = text.tokenize(tokenizer, [""], "", 300)
    assert tokens.ids.shape == (1, 300) and list(tokens.selection) == list(range(300))
    assert tokens.ids[0, 0] == 2 and not tokens.ids[0, 1:].any()
    assert tokens.mask.sum() == tokens.selected_mask.sum() == 1


def test_padding_is_on_the_right_whatever_is_stored(tokenizer):
    assert tokenizer.padding_side == "left"
    mask = text.tokenize(tokenizer, ["cat", "a red cat"], CHI, 16).mask
    assert mask[:, 0].all() and (np.diff(mask.astype(int), axis=1) <= 0).all()
    assert tokenizer.padding_side == "left"  # the caller's object is left alone


def test_a_long_prompt_is_cut_with_a_warning(tokenizer):
    exact = "cat" + " cat" * 14  # with BOS, 16 tokens
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert text.tokenize(tokenizer, [exact], CHI, 16).selected_mask.all()
    with pytest.warns(UserWarning, match=r"prompts\[1\] is too long: its last 3 tokens are cut"):
        tokens = text.tokenize(tokenizer, [exact, exact + " dog" * 3], CHI, 16)
    np.testing.assert_array_equal(tokens.ids[0], tokens.ids[1])


def test_bad_prompts(tokenizer):
    for bad, name in ((None, "NoneType"), (b"cat", "bytes"), (3, "int")):
        with pytest.raises(InputError, match=rf"prompts\[1\]={bad!r}: .*{name}"):
            text.tokenize(tokenizer, ["cat", bad], CHI)
    with pytest.raises(InputError, match=r"prompts\[0\]=.*not valid Unicode at character 1"):
        text.tokenize(tokenizer, ["a\udcff"], CHI)
    with pytest.raises(InputError, match="at least one prompt"):
        text.tokenize(tokenizer, [], CHI)
    with pytest.raises(InputError, match="length=1"):
        text.tokenize(tokenizer, ["cat"], CHI, 1)
    one = text.tokenize(tokenizer, "cat", CHI, 8)  # one string is one prompt, not three
    np.testing.assert_array_equal(one.ids, text.tokenize(tokenizer, ["cat"], CHI, 8).ids)


# Buckets


@pytest.mark.parametrize(
    "counts, length, bucket",
    [
        ([1], 300, 64), ([64, 3], 300, 64), ([65], 300, 128), ([128], 300, 128), ([129], 300, 300),
        ([300], 300, 300), ([10], 64, 64), ([10], 32, 32), ([70], 100, 100), ([400], 512, 512),
    ],
)  # fmt: skip
def test_text_bucket(counts, length, bucket):
    assert text.text_bucket(np.asarray(counts), length) == bucket


def test_buckets_and_limits(tokenizer):
    assert text.text_bucket([3, 9], 32, buckets=(8, 16)) == 16
    with pytest.raises(ValueError, match="301"):
        text.text_bucket([301], 300)
    tokens = text.tokenize(tokenizer, ["a red cat"], CHI, 32)
    for bucket in (3, 33):
        with pytest.raises(ValueError, match=f"bucket={bucket}"):
            text.trim(tokens, bucket)
    assert text.trim(tokens, 32).ids.shape == tokens.ids.shape


@pytest.mark.parity
def test_buckets_and_a_kept_instruction_leave_the_states_alone(tokenizer):
    _, module, params = toy_tokenizer.make_gemma2(0, sliding_window=20)
    whole = text.tokenize(tokenizer, ["a red cat", "", "the dog and the house"], CHI, 48)
    n_chi = whole.ids.shape[1] - 48 + 2
    valid = whole.selected_mask
    expected = encode(module, params, whole.ids, whole.mask)[:, whole.selection]

    bucket = text.text_bucket(valid.sum(axis=1), 48, (8, 16, 32))
    short = text.trim(whole, bucket)
    assert bucket == 8 and short.ids.shape[1] == n_chi + 8 - 2
    np.testing.assert_array_equal(short.selected_mask, valid[:, :8])
    assert not valid[:, 8:].any()
    states = encode(module, params, short.ids, short.mask)[:, short.selection]
    np.testing.assert_allclose(states[valid[:, :8]], expected[valid], atol=2e-5)

    head, rest = text.split_instruction(short)
    assert head.shape == (1, n_chi - 1) and rest.ids.shape == (3, 7)
    make = jax.jit(functools.partial(module.apply, method="encode_prefix"))
    prefix = make({"params": params}, head)
    states = encode(module, params, rest.ids, rest.mask, prefix)
    first = jnp.broadcast_to(prefix.states[:, :1], states[:, :1].shape)
    states = jnp.concatenate([first, states], axis=1)
    np.testing.assert_allclose(states[valid[:, :8]], expected[valid], atol=2e-5)


def test_split_instruction_wants_a_common_head(tokenizer):
    tokens = text.tokenize(tokenizer, ["cat", "dog"], CHI, 16)
    assert text.split_instruction(tokens) is not None
    tokens.ids[1, 2] += 1
    assert text.split_instruction(tokens) is None
    null = text.split_instruction(text.tokenize(tokenizer, ["", "cat"], "", 16))
    assert null[0].tolist() == [[2]] and null[1].ids.shape == (2, 15)


# diffusers


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:prompts.* is too long")
@pytest.mark.parametrize("published, length", [(False, 48), (True, 300)])
def test_diffusers_encodes_the_same(tokenizer, tmp_path, published, length):
    """The same ids go in and the same states and masks come out, positive and negative."""
    import torch
    from diffusers import SanaPipeline
    from transformers import AutoTokenizer

    peer, module, params = toy_tokenizer.make_gemma2(1)
    tokenizer.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    pipeline = SanaPipeline(theirs, peer, vae=None, transformer=None, scheduler=None)
    seen = []
    peer.register_forward_pre_hook(lambda module, args: seen.append(args[0].numpy()))
    chi = text.find_instruction("auto", DIFFUSERS).text if published else CHI
    negative = ["", "Blurry, BAD ", "", "猫", ""]
    with torch.no_grad():
        outputs = pipeline.encode_prompt(
            PROMPTS,
            negative_prompt=negative,
            device=torch.device("cpu"),
            max_sequence_length=length,
            complex_human_instruction=chi.split("\n"),
        )
    states, mask, negative_states, negative_mask = (x.numpy() for x in outputs)

    ours = text.load_tokenizer(tmp_path)
    for prompts, instruction, ids, expected, expected_mask in (
        (PROMPTS, chi, seen[0], states, mask),
        (negative, "", seen[1], negative_states, negative_mask),
    ):
        cleaned = [text.clean(prompt, DIFFUSERS) for prompt in prompts]
        tokens = text.tokenize(ours, cleaned, instruction, length)
        np.testing.assert_array_equal(tokens.ids, ids)
        np.testing.assert_array_equal(tokens.selected_mask, expected_mask.astype(bool))
        got = np.asarray(encode(module, params, tokens.ids, tokens.mask))[:, tokens.selection]
        error = np.abs(got - expected).max()
        print(f"{ids.shape[1]} tokens: max error {error:.1e}, rms {peers.rms(expected):.2f}")
        assert error <= 5e-5
