"""Rung "gemma": tokens, the embedding, each layer, and the states that the transformer is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax import text
from sana_jax.parity import forcing, peers, weights
from sana_jax.parity.rows import compare, range_of, ratio
from sana_jax.stacks import DIFFUSERS

TEXTS = {"prompt": "prompt with instruction", "null": "null prompt"}
PART = "text_encoder"


def run(case, shelf, device):
    """(rows, ranges, ratios); leaves states and masks of both texts, theirs and ours, on the shelf."""
    digests = theirs(case, shelf, device)
    peers.release()
    rows, ranges = ours(case, shelf, digests)
    peers.release()
    return rows, ranges, bfloat16(case, shelf, device) if case.bfloat16 and case.wants("gemma") else []


def theirs(case, shelf, device):
    """PyTorch's ids, states and masks, and what went in and out of each layer for the prompt.

    Returns its weights' digests.
    """
    encoder = peers.load(case, PART, device)
    watched = {"encoder": encoder, "norm": encoder.norm}
    watched |= {f"layer {i}": layer for i, layer in enumerate(encoder.layers)}
    texts = iter(TEXTS)  # the order in which diffusers encodes them

    def see(name, module, args, kwargs, output):
        if name == "encoder":  # runs last of all
            current = next(texts)
            ids, mask = args[0], kwargs["attention_mask"]
            shelf[f"{current} ids"], shelf[f"{current} valid"] = ids.cpu().numpy(), mask.cpu().numpy() > 0
        elif case.wants("gemma") and "prompt ids" not in shelf:
            shelf[f"{name} in"], shelf[f"{name} out"] = peers.to_numpy(args[0]), peers.to_numpy(output)
            kwargs = {key: value for key, value in kwargs.items() if key != "past_key_values"}
            shelf[f"{name} moved"] = peers.to_numpy(module.forward(peers.nudged(args[0]), *args[1:], **kwargs))

    with peers.watching(watched, see):
        for name, (states, mask) in encode(case, encoder).items():
            shelf[f"{name} states"], shelf[f"{name} mask"] = peers.to_numpy(states), mask.cpu().numpy() > 0
    return weights.theirs(encoder) if case.wants("gemma") else {}


def encode(case, encoder):
    """{text: (states, mask)} by diffusers' own encode_prompt."""
    from diffusers import SanaPipeline

    pipeline = SanaPipeline(text.load_tokenizer(case.reference / "tokenizer"), encoder, None, None, None)
    lines = case.instruction.text.split("\n") if case.instruction.text else None
    found = pipeline.encode_prompt(
        [case.prompt], negative_prompt="", device=encoder.device, complex_human_instruction=lines
    )
    return {"prompt": found[:2], "null": found[2:]}


def ours(case, shelf, digests):
    """(rows, ranges); our own states are left on the shelf too."""
    module, params = case.load(PART)
    rows, ranges = [], []
    if case.wants("gemma"):
        rows += [tokens_row(case, shelf, name) for name in TEXTS]
        layers = layer_rows(module, params, shelf)
        rows += [*weights.rows(PART, weights.ours(module, params), digests), *layers]
        ranges = [range_of(row) for row in layers if "layer" in row.name]
    pipeline = case.pipeline(text_encoder=params)
    for name, what in TEXTS.items():
        states, mask = encode_ours(case, pipeline, name)
        shelf[f"our {name} states"], shelf[f"our {name} mask"] = states, mask
        if case.wants("gemma"):
            valid = shelf[f"{name} mask"]
            rows.append(compare(f"text states, {what}", np.asarray(states)[valid], shelf[f"{name} states"][valid], "text", scaled=True))
    return rows, ranges


def encode_ours(case, pipeline, name):
    """(states, mask) of one of TEXTS by our pipeline."""
    if name == "null":
        return pipeline.encode_prompt("", chi="none")
    return pipeline.encode_prompt(case.prompt, chi=case.instruction.text or "none")


def tokens_row(case, shelf, name):
    """How many positions differ, padding and its mask included."""
    tokenizer = text.load_tokenizer(case.model / "tokenizer")
    prompt, instruction = (case.prompt, case.instruction.text) if name == "prompt" else ("", "")
    found = text.tokenize(tokenizer, [text.clean(prompt, DIFFUSERS)], instruction)
    sides = [np.where(mask, ids, -1)[0] for ids, mask in ((found.ids, found.mask), (shelf[f"{name} ids"], shelf[f"{name} valid"]))]
    length = max(map(len, sides))
    sides = [np.pad(ids, (0, length - len(ids)), constant_values=-2) for ids in sides]
    return compare(f"token ids that differ, {TEXTS[name]}", [np.sum(sides[0] != sides[1])], [0], "tokens")


@functools.partial(jax.jit, static_argnames=("module", "stage"))
def run_stage(params, ids, valid, x, *, module, stage):
    """Hidden states [b m d] behind one stage of a Gemma2 of depth 1; "layer" and "norm" start from x."""
    actions = {
        "embedding": {("layers",): lambda run, args: (args[0], None), ("norm",): forcing.first},
        "layer": {("layers",): forcing.feed(x), ("norm",): forcing.first},
        "norm": {("layers",): lambda run, args: (x, None)},
    }[stage]
    return forcing.intercepted(module, params, (ids, valid), actions)


def layer_rows(module, params, shelf):
    """Every layer on the input that PyTorch's had, at valid tokens."""
    ids, valid = jnp.asarray(shelf["prompt ids"], jnp.int32), shelf["prompt valid"]
    every = max(ids.shape[1], module.sliding_window)  # the window of the layers without one

    def row(name, stage, reference, x=None, index=0, moved=None):
        one = module.clone(depth=1, sliding_window=every if index % 2 else module.sliding_window)
        sliced = params | {"layers": forcing.layer(params["layers"], index)}
        out = np.asarray(run_stage(sliced, ids, valid, x, module=one, stage=stage))
        moved = None if moved is None else moved[valid]
        return compare(name, out[valid], reference[valid], "dit", scaled=True, moved=moved)

    rows = [row("Gemma-2 embedding", "embedding", shelf["layer 0 in"])]
    for i in range(module.depth):
        out, given, moved = (shelf[f"layer {i} {end}"] for end in ("out", "in", "moved"))
        rows.append(row(f"Gemma-2 layer {i}", "layer", out, given, i, moved))
    return [*rows, row("Gemma-2 final norm", "norm", shelf["norm out"], shelf["norm in"])]


def bfloat16(case, shelf, device):
    """The prompt's states in bfloat16, ours and PyTorch's, against PyTorch's in float32."""
    theirs = peers.to_numpy(encode(case, peers.load(case, PART, device, "bfloat16"))["prompt"][0])
    peers.release()
    pipeline = case.pipeline(jnp.bfloat16, text_encoder=case.load(PART, jnp.bfloat16)[1])
    ours = np.asarray(encode_ours(case, pipeline, "prompt")[0].astype(jnp.float32))
    valid = shelf["prompt mask"]
    return [ratio("text states, prompt with instruction", *(x[valid] for x in (ours, theirs, shelf["prompt states"])))]
