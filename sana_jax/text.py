"""From prompts to token ids: cleaning, the instruction before every prompt, selection, buckets.

SANA does not show its text encoder the prompt alone.  A fixed "complex human instruction" (CHI)
comes first, and of all states only the first and those from the prompt on are handed to the
transformer (https://arxiv.org/abs/2410.10629; docs/numerics.md section 6).  The words of the instruction
belong to its authors and are not part of this package: they come from the checkpoint, from an
installed diffusers, or from a file.

Shapes: b prompts, m tokens, `length` (300) selected ones.  Host side, numpy only.
"""

import ast
import dataclasses
import hashlib
import importlib.util
import pathlib
import re
import warnings
from typing import NamedTuple

import numpy as np

from sana_jax.errors import InputError, nearest
from sana_jax.files import read_bounded

LENGTH = 300  # tokens that SANA was trained with
BUCKETS = (64, 128, 300)
MOST_NAMED = 10  # unknown words of one prompt in a warning
LARGEST_FILE = 1 << 20  # bytes of an instruction; the published ones have a few thousand
FLAGS = re.compile(r"--(?:aspect_ratio|ar|hw)")

SHA256_DIFFUSERS = "48290080bb4fd4a264bdc81d0647ac0221359a36506e2b3e954616d6cb48c3da"
SHA256_NVLABS = "62b9ab89eebb0ac5ee4d264bf96bf19d2b81f504bc3852500efeaf5a34d638b1"

# Stands in where the published words cannot be had.  Same purpose, other words: pictures differ.
OWN_WORDS = "\n".join(
    [
        "You turn short requests for a picture into full descriptions of that picture.",
        "- If the request is a few words long, decide what a painter would have to decide: the"
        " place, the light, colours and materials, and how things stand to each other.",
        "- If it is already detailed, smooth it and change nothing that it says.",
        "Two samples:",
        "- lighthouse -> A white lighthouse on a black cliff at dusk, its lamp lit, surf breaking"
        " below, thin fog over a violet sea.",
        "- bowl of fruit -> A blue ceramic bowl of ripe figs and pears on linen, window light from"
        " the left, oil on canvas.",
        "Answer with the description of the request below and with nothing else.",
        "User Prompt: ",
    ]
)


def clean(prompt, stack):
    """The prompt as `stack` hands it to its tokenizer.  Lower-casing changes tokens, and pictures.

    diffusers lower-cases.  NVlabs takes --ar, --hw and --aspect_ratio for flags of its command line
    and drops everything from the first of them on.
    """
    if stack.strip_flags:
        prompt = FLAGS.split(prompt, maxsplit=1)[0]
    if stack.lower_case:
        prompt = prompt.lower()
    return prompt.strip()


def words(text):
    """The words of a text, lower-case, in order: runs of letters and digits."""
    return re.findall(r"[^\W_]+", text.lower())


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The words that a model was trained with, lower-case: its prompts are lower-cased too.

    owner, advice: for people, whose they are, and what to do about another word.
    """

    words: frozenset
    owner: str = "the model"
    advice: str = ""

    def remark(self, prompt, asked=True):
        """A sentence that names the words of a prompt that are none of these, "" without any.

        asked: the prompt says what is wanted, not what is not.
        """
        found = words(prompt)
        unknown = list(dict.fromkeys(word for word in found if word not in self.words))
        if not unknown:
            return ""
        more = f" and {len(unknown) - MOST_NAMED} more" if len(unknown) > MOST_NAMED else ""
        nothing = "" if set(found) & self.words or not asked else "; the picture is of anything, since no word of it is"
        listed = ", ".join(unknown[:MOST_NAMED])
        return f"not in {self.owner}'s vocabulary: {listed}{more}{nothing}{self.advice and '; '}{self.advice}"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """The text that goes before every prompt, joined to it with nothing between; "" for none."""

    text: str
    source: str  # for people: "checkpoint", "installed diffusers 0.42.1", "file chi.txt", ...

    @property
    def sha256(self):
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()


def find_instruction(chi, stack, checkpoint_text=None):
    """The instruction to use.

    Args:
      chi: "auto", "none", or the joined text itself.  "auto" takes the first there is of the
        checkpoint's own text, that of an installed diffusers, and OWN_WORDS; `source` says which.
      stack: whose quotation marks, where the text is not the checkpoint's or the caller's.
      checkpoint_text: the text that came with the weights, joined or as a list of lines; "" or []
        if they want none, None if they do not say.
    Raises:
      InputError: `chi` is neither a text nor quite "auto" or "none".
    """
    if not isinstance(chi, str):
        raise InputError(f"chi={chi!r}: must be a str, is a {type(chi).__name__}")
    if chi in ("", "none"):
        return Instruction("", "none")
    if chi != "auto":
        if close := nearest(chi.strip().lower(), ("auto", "none")):
            raise InputError(f"chi={chi!r}: must be 'auto', 'none' or a whole text{close}")
        return Instruction(chi, "given text")
    if checkpoint_text is not None:  # "" too: a checkpoint that was trained without one
        joined = checkpoint_text if isinstance(checkpoint_text, str) else "\n".join(checkpoint_text)
        return Instruction(joined, "checkpoint")
    return _installed(stack)


def read_instruction_file(path):
    """An instruction from a UTF-8 file, byte for byte: a newline at its end is part of it.

    Raises InputError: no plain file, more than a megabyte, or not UTF-8.
    """
    try:
        text = read_bounded(path, LARGEST_FILE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8 ({error.reason}, byte {error.start})") from error
    return Instruction(text, f"file {path}")


def _installed(stack):
    """The default argument of diffusers' SanaPipeline, read from its source, not imported."""
    try:
        spec = importlib.util.find_spec("diffusers")  # a top-level name: its __init__ does not run
    except ValueError:  # a module without a spec stands in sys.modules
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return Instruction(OWN_WORDS, "own words (diffusers is not installed)")
    root = pathlib.Path(list(spec.submodule_search_locations)[0])
    version = re.search(r'^__version__ = "([^"]+)"', _source(root / "__init__.py"), re.MULTILINE)
    name = f"installed diffusers {version[1] if version else 'of unknown version'}"

    lines = _default(_source(root / "pipelines" / "sana" / "pipeline_sana.py"))
    text, expected = "\n".join(lines), SHA256_DIFFUSERS
    if stack.chi_double_quotes:
        text, expected = text.replace("'Enhanced prompt'", '"Enhanced prompt"'), SHA256_NVLABS
    found = Instruction(text, name)
    if found.sha256 != expected:
        return Instruction(OWN_WORDS, f"own words ({name} does not hold the published instruction)")
    return found


def _source(path):
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _default(source):
    """The default of `complex_human_instruction` in SanaPipeline.__call__, a list of str, or []."""
    try:
        classes = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
        body = [n for c in classes if c.name == "SanaPipeline" for n in c.body]
        call = next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == "__call__")
        names = [arg.arg for arg in call.args.args]
        defaults = dict(zip(reversed(names), reversed(call.args.defaults)))
        value = ast.literal_eval(defaults["complex_human_instruction"])
    except (SyntaxError, StopIteration, KeyError, ValueError):
        return []
    return value if isinstance(value, list) and all(isinstance(v, str) for v in value) else []


def load_tokenizer(folder):
    """Gemma's tokenizer from local files, padding on the right.

    Raises InputError: no such folder, or what it holds does not tokenise as Gemma's does.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected one with tokenizer.json")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise InputError(f"{folder}: no tokenizer here, expected tokenizer.json or tokenizer.model")
    from transformers import GemmaTokenizer

    try:
        tokenizer = GemmaTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer.encode("a cat")
        back = tokenizer.decode(ids, skip_special_tokens=True)
    except Exception as error:  # whatever a foreign or broken file makes the library raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise InputError(f"{folder}: not a Gemma tokenizer ({reason})") from error
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    if bos is None or pad is None or ids.count(bos) != 1 or ids[0] != bos or back != "a cat":
        raise InputError(
            f"{folder}: not a Gemma tokenizer: 'a cat' gives {ids}, and that {back!r}; it must "
            f"begin with one BOS ({bos}), come back unchanged, and padding ({pad}) must have an id"
        )
    tokenizer.padding_side = "right"  # as published it is "left"
    return tokenizer


class Tokens(NamedTuple):
    """What the text encoder reads, and which of its states are used."""

    ids: np.ndarray  # [b m] int32
    mask: np.ndarray  # [b m] bool
    selection: np.ndarray  # [length] int32, positions: the first, and the last length - 1

    @property
    def selected_mask(self):
        """[b length], the mask that goes with the selected states."""
        return self.mask[:, self.selection]


def tokenize(tokenizer, prompts, instruction="", length=LENGTH):
    """Tokenizes `instruction + prompt`, padded on the right, truncated at the end.

    The instruction ends in a space, a token by itself that merges with the first word of a prompt.
    So prompts begin one position before the end of the n_chi tokens of the instruction, and
    m = n_chi + length - 2 leaves room for length - 1 tokens of theirs.  Without an instruction
    m = length, BOS included.
    A prompt that does not fit is cut, with a warning that names it.

    Args:
      prompts: cleaned strings; empty ones are fine.
      instruction: a text, not an Instruction; "" for the null prompt, which never has one.
    Raises:
      InputError: a prompt that is not a string.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise InputError("prompts=[]: must hold at least one prompt")
    if length < 2:
        raise InputError(f"length={length!r}: must be at least 2, BOS and a token of the prompt")
    for i, prompt in enumerate(prompts):
        what = f"prompts[{i}]={prompt!r}"
        if not isinstance(prompt, str):
            raise InputError(f"{what}: must be a str, is a {type(prompt).__name__}")
        try:
            prompt.encode("utf-8")
        except UnicodeEncodeError as error:  # undecodable bytes of a command line
            raise InputError(f"{what}: not valid Unicode at character {error.start}") from error
    total = len(tokenizer.encode(instruction)) + length - 2 if instruction else length
    texts = [instruction + prompt for prompt in prompts]
    batch = tokenizer(
        texts, padding="max_length", padding_side="right", max_length=total, truncation=True
    )
    tokens = Tokens(
        np.asarray(batch["input_ids"], np.int32),
        np.asarray(batch["attention_mask"], bool),
        np.r_[0, total - length + 1 : total].astype(np.int32),
    )
    for i in np.flatnonzero(tokens.mask.all(axis=1)):
        excess = len(tokenizer.encode(texts[i], verbose=False)) - total
        if excess > 0:
            cut = f"prompts[{i}] is too long: its last {excess} tokens are cut"
            warnings.warn(cut, stacklevel=2)
    return tokens


def text_bucket(valid_counts, length=LENGTH, buckets=BUCKETS):
    """The smallest of the buckets below `length`, or `length`, that holds the longest valid text.

    `valid_counts` are sums of `selected_mask`.  Few sizes, so that each is compiled once; masked
    tokens have no influence, so a smaller one only saves their cost.
    """
    longest = max(int(n) for n in np.ravel(valid_counts))
    if longest > length:
        raise ValueError(f"{longest} valid tokens do not fit into length={length}")
    return min([b for b in buckets if longest <= b < length], default=length)


def trim(tokens, bucket):
    """The same texts with `bucket` selected positions; the encoder sees that much less padding.

    Attention is causal, so the states of valid tokens stay what they are.
    """
    cut = tokens.selection.size - bucket
    keep = tokens.ids.shape[1] - cut
    if cut < 0 or tokens.mask[:, keep:].any():
        size = tokens.selection.size
        raise ValueError(f"bucket={bucket}: must hold every valid token and be <= {size}")
    return Tokens(tokens.ids[:, :keep], tokens.mask[:, :keep], tokens.selection[:bucket])


def split_instruction(tokens):
    """(head ids [1 p], rest Tokens) where all texts begin with the same p tokens, else None.

    p is where the selected positions begin after the first: the instruction but for its last token.
    With prefix = Gemma2.encode_prefix(head), the selected states are that of the head's first token
    and all of the rest's.  The head is the same for every prompt and worth keeping.
    """
    p = int(tokens.selection[1])
    head = tokens.ids[:1, :p]
    if not (tokens.mask[:, :p].all() and (tokens.ids[:, :p] == head).all()):
        return None
    rest = tokens.selection.size - 1
    return head, Tokens(tokens.ids[:, p:], tokens.mask[:, p:], np.arange(rest, dtype=np.int32))
