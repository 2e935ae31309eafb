"""Rungs "block" and "dit": the transformer's layers one by one, and whole; its share of the picture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax.parity import forcing, peers, weights
from sana_jax.parity.rows import Range, compare, largest, range_of, ratio, rms

PART = "transformer"
SEED = 11  # of the noise drawn at each step of SCM


def run(case, shelf, device):
    """(rows, ranges, ratios); leaves the latents of the picture, theirs and ours, on the shelf."""
    captions = inputs(case, shelf)
    digests = theirs(case, shelf, device, captions)
    peers.release()
    rows, ranges = ours(case, shelf, captions, digests)
    peers.release()
    return rows, ranges, bfloat16(case, shelf, device, captions) if case.bfloat16 and case.wants("dit") else []


def inputs(case, shelf):
    """The batch of three of the whole-transformer lines, one for each of `Case.times`.

    Captions are PyTorch's own states of prompt, null prompt and prompt; random ones where the rung
    "gemma" does not run.
    """
    t, guidance = case.times()
    if "prompt states" in shelf:
        order = ("prompt", "null", "prompt")
        states, mask = (np.concatenate([shelf[f"{n} {x}"] for n in order]) for x in ("states", "mask"))
    else:
        states = np.random.default_rng(3).normal(size=(3, 20, case.modules[PART].caption_width)).astype("f")
        mask = np.arange(20) < np.array([[20], [2], [9]])
    return {"x": case.noise(3, seed=4), "t": t, "states": states, "mask": mask, "guidance": guidance}


def call(peer, x, t, states, mask, guidance, move=False):
    """diffusers' transformer, its output as a float32 array [b h w c]; `move`: see `peers.nudged`."""
    import torch

    # Times and guidance stay float32 whatever the dtype of the module, as its sinusoids do.
    t, guidance = (None if v is None else torch.tensor(v, device=peer.device) for v in (t, guidance))
    extra = {} if guidance is None else {"guidance": guidance}
    x, states = peers.to_torch(peers.first(x), peer), peers.to_torch(states, peer)
    if move:
        x, states = peers.nudged(x), peers.nudged(states)
    out = peer(
        x, states, t,
        encoder_attention_mask=peers.to_torch(mask.astype("int64"), peer), **extra,
    )  # fmt: skip
    return peers.last(out.sample)


def theirs(case, shelf, device, captions):
    """PyTorch's velocity and everything on its way there, and its latents of the picture.

    Returns its weights' digests.
    """
    peer = peers.load(case, PART, device)
    if case.wants("block", "dit"):
        record(shelf, peer, captions)
    if case.wants("pipeline"):
        shelf["latents"] = paint(case, shelf, peer)
    return weights.theirs(peer) if case.wants("block", "dit") else {}


def record(shelf, peer, captions):
    """Puts the velocity on the shelf, and what went in and out of each layer."""
    blocks = {f"block {i}": block for i, block in enumerate(peer.transformer_blocks)}
    watched = {"patches": peer.patch_embed, "caption": peer.caption_norm, "time": peer.time_embed, **blocks}
    watched |= {f"{name} attention": block.attn1 for name, block in blocks.items()}
    _, height, width, _ = captions["x"].shape

    def grid(tokens):
        return peers.to_numpy(tokens).reshape(len(tokens), height, width, -1)

    def see(name, module, args, kwargs, output):
        if name.endswith("attention"):
            if name not in shelf:  # it runs again within the block's second run, below
                shelf[name] = largest(peers.to_numpy(output))
        elif name == "patches":
            shelf["block 0 in"] = grid(output)
        elif name == "caption":
            shelf["caption"] = peers.to_numpy(output)
        elif name == "time":
            rows, embedding = map(peers.to_numpy, output)
            shelf["time rows"], shelf["time embedding"] = rows.reshape(len(rows), 6, -1), embedding
        else:
            index = int(name.split()[1])
            shelf[f"block {index + 1} in"] = grid(output)
            shelf[f"block {index} moved"] = grid(module.forward(peers.nudged(args[0]), *args[1:], **kwargs))

    with peers.watching(watched, see):
        shelf["velocity"] = call(peer, **captions)
    shelf["velocity moved"] = call(peer, **captions, move=True)


def paint(case, shelf, peer):
    """The picture's latents by diffusers' pipeline from its own states; draws of SCM from SEED."""
    import torch

    steps = {"num_inference_steps": case.steps, "guidance_scale": case.guidance}
    given = {f"prompt_{k}": shelf[f"prompt {v}"] for k, v in (("embeds", "states"), ("attention_mask", "mask"))}
    if case.sprint:
        steps |= {"generator": torch.Generator().manual_seed(SEED)}
        steps |= {} if case.steps == 2 else {"intermediate_timesteps": None}
    else:
        steps |= {"negative_prompt": None}
        given |= {f"negative_prompt_{k}": shelf[f"null {v}"] for k, v in (("embeds", "states"), ("attention_mask", "mask"))}
    given = {k: peers.to_torch(v.astype("int64") if v.dtype == bool else v, peer) for k, v in given.items()}
    noise = peers.to_torch(peers.first(case.noise(1, seed=6)), peer)
    pipeline = peers.pipeline(case, transformer=peer, scheduler=peers.scheduler(case))
    height, width = case.size
    out = pipeline(
        latents=noise, height=height, width=width, use_resolution_binning=False, output_type="latent", **steps, **given
    ).images
    return peers.last(out)


def step_noise(case):
    """[steps 1 h w c]: what SCM draws in `paint`."""
    import torch

    generator, (_, *grid, channels) = torch.Generator().manual_seed(SEED), case.noise(1, seed=6).shape
    draws = [torch.randn((1, channels, *grid), generator=generator) for _ in range(case.steps)]
    return np.stack([peers.last(draw) for draw in draws])


def ours(case, shelf, captions, digests):
    """(rows, ranges); our latents of the picture are left on the shelf."""
    module, params = case.load(PART)
    module = case.pipeline().sana[0]  # with the habits of diffusers' stack
    rows, ranges = [], []
    if case.wants("block", "dit"):
        rows += weights.rows(PART, weights.ours(module, params), digests)
    if case.wants("block"):
        layers = layer_rows(module, params, shelf, captions)
        rows += layers
        blocks = [row for row in layers if "block" in row.name]
        ranges = [range_of(row, float(shelf[f"block {i} attention"])) for i, row in enumerate(blocks)]
    if case.wants("dit"):
        velocity, absmax = whole(module, params, captions)
        for k, t in enumerate(captions["t"]):
            reference, moved = shelf["velocity"][k], shelf["velocity moved"][k]
            rows.append(compare(f"DiT, t = {t:g}", velocity[k], reference, "dit", scaled=True, moved=moved))
        ranges = [block_range(i, shelf, peak) for i, peak in enumerate(absmax)]
    if case.wants("pipeline"):
        shelf["our latents"] = paint_ours(case, shelf, params)
    return rows, ranges


def block_range(i, shelf, ours):
    out = shelf[f"block {i + 1} in"]
    return Range(f"DiT block {i}", largest(out), float(ours), rms(out), float(shelf[f"block {i} attention"]))


@functools.partial(jax.jit, static_argnames="module")
def forward(params, arguments, *, module):
    """(velocity, what the blocks report of themselves)."""
    return module.apply({"params": params}, *arguments, mutable=["intermediates"])


def whole(module, params, captions):
    """(velocity [b h w c] float32, largest output of each block [depth])."""
    velocity, probes = forward(params, present(captions), module=module)
    return np.asarray(velocity.astype(jnp.float32)), np.asarray(probes["intermediates"]["blocks"]["absmax"][0])


def present(captions):
    """Arguments of a Sana: the guidance only where it has one."""
    return tuple(value for value in captions.values() if value is not None)


@functools.partial(jax.jit, static_argnames="module")
def run_embeddings(params, arguments, *, module):
    """(the first block's input, caption, Time) of a Sana of depth 1."""
    found = {}

    def keep(name):
        def action(run, args):
            found[name] = run(*args)
            return found[name]

        return action

    actions = {(name,): keep(name) for name in ("caption_embed", "time_embed")}
    actions |= {("blocks",): lambda run, args: (args[0], None), ("head",): forcing.first}
    h = forcing.intercepted(module, params, arguments, actions)
    return h, found["caption_embed"], found["time_embed"]


@functools.partial(jax.jit, static_argnames=("module", "stage"))
def run_stage(params, arguments, h, caption, rows, embedding, *, module, stage):
    """The only block of a Sana of depth 1, or its head, on recorded values."""
    actions = {
        ("patch_embed",): forcing.give(h),
        ("caption_embed",): forcing.give(caption),
        ("time_embed",): lambda run, args: run(*args).replace(rows=rows, embedding=embedding),
    }
    actions |= {
        "block": {("head",): forcing.first},
        "head": {("blocks",): lambda run, args: (h, None)},
    }[stage]
    return forcing.intercepted(module.clone(position_scale=None), params, arguments, actions)


def layer_rows(module, params, shelf, captions):
    """Every layer on the input that PyTorch's had."""
    one, arguments, mask = module.clone(depth=1), present(captions), captions["mask"]
    common = [shelf[name] for name in ("caption", "time rows", "time embedding")]
    check = functools.partial(compare, bound="dit", scaled=True)

    def part(index):
        return params | {k: forcing.layer(params[k], index) for k in ("blocks", "key_value")}

    def run(stage, index, layer=0):
        return run_stage(part(layer), arguments, shelf[f"block {index} in"], *common, module=one, stage=stage)

    patches, caption, time = run_embeddings(part(0), arguments, module=one)
    rows = [
        check("DiT patch embedding", patches, shelf["block 0 in"]),
        check("DiT caption embedding", np.asarray(caption)[mask], shelf["caption"][mask]),
        check("DiT time embedding", time.embedding, shelf["time embedding"]),
        check("DiT modulation", time.rows, shelf["time rows"]),
    ]
    for i in range(module.depth):
        out = run("block", i, i)
        rows.append(check(f"DiT block {i}", out, shelf[f"block {i + 1} in"], moved=shelf[f"block {i} moved"]))
    return [*rows, check("DiT head", run("head", module.depth), shelf["velocity"])]


def paint_ours(case, shelf, params):
    """The picture's latents by our pipeline from our own states."""
    pipeline = case.pipeline(transformer=params)
    settings = {"steps": case.steps, "guidance_scale": case.guidance, "sampler": case.sampler}
    texts = [shelf["our prompt states"], shelf["our prompt mask"]]
    if case.sprint:
        settings |= {"step_noise": step_noise(case)}
    else:
        texts += [shelf["our null states"], shelf["our null mask"]]
    return np.asarray(pipeline.denoise(*texts, latents=case.noise(1, seed=6), **settings))


def bfloat16(case, shelf, device, captions):
    """The velocity in bfloat16, ours and PyTorch's, against PyTorch's in float32."""
    theirs = call(peers.load(case, PART, device, "bfloat16"), **captions)
    peers.release()
    module, params = case.load(PART, jnp.bfloat16)
    return [ratio("DiT", whole(module, params, captions)[0], theirs, shelf["velocity"])]
