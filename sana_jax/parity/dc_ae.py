"""Rung "dc-ae": each stage of both halves, and both halves whole; its share of the picture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax.parity import forcing, peers, weights
from sana_jax.parity.rows import compare, range_of, ratio

PART = "vae"
METHOD = {"encoder": "encode", "decoder": "decode"}
BOUND = {"encoder": "latent", "decoder": "image"}


def run(case, shelf, device):
    """(rows, ranges, ratios); leaves the picture, theirs and ours, on the shelf."""
    digests = theirs(case, shelf, device)
    peers.release()
    rows, ranges = ours(case, shelf, digests)
    peers.release()
    return rows, ranges, bfloat16(case, shelf, device) if case.bfloat16 and case.wants("dc-ae") else []


def halves(peer, image):
    """diffusers' (latent, image) of an image, as float32 arrays; the decoder is given that latent."""
    latent = peer.encode(peers.to_torch(peers.first(image), peer)).latent
    return peers.last(latent), peers.last(peer.decode(latent).sample)


def theirs(case, shelf, device):
    """PyTorch's latent and image, what went in and out of each stage, and its picture.

    Returns its weights' digests.
    """
    peer = peers.load(case, PART, device)
    if case.wants("dc-ae"):
        record(case, shelf, peer)
    if case.wants("pipeline"):
        shelf["picture"] = paint(shelf, peer)
    return weights.theirs(peer) if case.wants("dc-ae") else {}


def record(case, shelf, peer):
    """Puts latent and image on the shelf, and what went in and out of each stage."""
    sides = {"encoder": peer.encoder.down_blocks, "decoder": peer.decoder.up_blocks}
    # Some variants have an empty stage 0: it has no weights, and ours does not exist.
    watched = {f"{side} {i}": stage for side, stages in sides.items() for i, stage in enumerate(stages) if len(stage)}

    def see(name, module, args, kwargs, output):
        shelf[f"{name} in"], shelf[f"{name} out"] = peers.last(args[0]), peers.last(output)
        shelf[f"{name} moved"] = peers.last(module.forward(peers.nudged(args[0])))

    with peers.watching(watched, see):
        shelf["encoder"], shelf["decoder"] = halves(peer, case.picture())


def paint(shelf, peer):
    """The picture in [0, 1] as diffusers' pipeline decodes its latents."""
    from diffusers.image_processor import PixArtImageProcessor

    latents = peers.to_torch(peers.first(shelf["latents"]), peer)
    image = peer.decode(latents / peer.config.scaling_factor).sample
    return PixArtImageProcessor(vae_scale_factor=32).postprocess(image, output_type="np")


def ours(case, shelf, digests):
    """(rows, ranges); our picture is left on the shelf."""
    module, params = case.load(PART)
    rows, ranges = [], []
    if case.wants("dc-ae"):
        rows += weights.rows(PART, weights.ours(module, params), digests)
        inputs = {"encoder": case.picture(), "decoder": shelf["encoder"]}
        for side, method in METHOD.items():
            stages = stage_rows(module, params, shelf, side, inputs[side])
            ranges += [range_of(row) for row in stages if "stage" in row.name]
            out = forward(params, inputs[side], module=module, method=method)
            rows += [*stages, compare(f"DC-AE {method}", out, shelf[side], BOUND[side], scaled=True)]
    if case.wants("pipeline"):
        image = case.pipeline(vae=params).decode(shelf["our latents"])
        shelf["our picture"] = (np.asarray(image) + 1) / 2
    return rows, ranges


@functools.partial(jax.jit, static_argnames=("module", "method"))
def forward(params, x, *, module, method):
    return module.apply({"params": params}, x, method=method)


@functools.partial(jax.jit, static_argnames=("module", "method", "stages"))
def run_stages(params, x, recorded, *, module, method, stages):
    """(result behind the last stage, {"SIDE i in", "SIDE i out"}) with recorded values between stages."""
    found = {}

    def action(name):
        def act(run, args):
            found[f"{name} in"], found[f"{name} out"] = args[0], run(recorded[f"{name} in"])
            return recorded[f"{name} out"]

        return act

    actions = {(side, f"stage_{i}"): action(f"{side} {i}") for side, i in map(str.split, stages)}
    return forcing.intercepted(module, params, (x,), actions, method), found


def stage_rows(module, params, shelf, side, x):
    """Every stage on the input that PyTorch's had, and the layers before the first and after the last."""
    order = range(len(module.widths)) if side == "encoder" else reversed(range(len(module.widths)))
    stages = tuple(f"{side} {i}" for i in order if f"{side} {i} in" in shelf)
    recorded = {f"{name} {end}": shelf[f"{name} {end}"] for name in stages for end in ("in", "out")}
    out, found = run_stages(params, x, recorded, module=module, method=METHOD[side], stages=stages)
    check = functools.partial(compare, bound=BOUND[side], scaled=True)
    start = f"{stages[0]} in"
    rows = [check(f"DC-AE {side} input", found[start], recorded[start])]
    for name in stages:
        label = f"DC-AE {side} stage {name.split()[1]}"
        rows.append(check(label, found[f"{name} out"], recorded[f"{name} out"], moved=shelf[f"{name} moved"]))
    return [*rows, check(f"DC-AE {side} output", out, shelf[side])]


def bfloat16_theirs(case, shelf, device):
    """PyTorch's latent of the picture, and its image of the float32 latent."""
    peer = peers.load(case, PART, device, "bfloat16")
    latent, _ = halves(peer, case.picture())
    return latent, peers.last(peer.decode(peers.to_torch(peers.first(shelf["encoder"]), peer)).sample)


def bfloat16(case, shelf, device):
    """Both halves in bfloat16, ours and PyTorch's, against PyTorch's in float32."""
    latent, image = bfloat16_theirs(case, shelf, device)
    peers.release()
    module, params = case.load(PART, jnp.bfloat16)
    found = []
    for method, x, theirs, side in (
        ("encode", case.picture(), latent, "encoder"),
        ("decode", shelf["encoder"], image, "decoder"),
    ):
        out = forward(params, x, module=module, method=method)
        found.append(ratio(f"DC-AE {method}", out.astype(jnp.float32), theirs, shelf[side]))
    return found
