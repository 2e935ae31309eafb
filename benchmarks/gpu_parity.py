"""Whether an accelerator computes what PyTorch does: toy pipeline, bfloat16, batches, one full forward.

    python -m benchmarks.gpu_parity --output DIR [--skip-full] [--smoke]

  toy, float32    transformer, autoencoder, latent and picture of a toy pipeline that diffusers
                  wrote, against diffusers on the CPU; matrix products in full float32.
  toy, bfloat16   rms error against diffusers in float32, as a ratio to the error of diffusers' own
                  bfloat16 on the same device, for 5 seeds: 1 is as good as the peer.
  batch           picture 0 of a batch of 4 against the same picture alone.
  save and load   parameters that went through a folder, bit for bit.
  full, 1.6B      one guided evaluation at 1024 pixels with the same random weights on both sides.

Each row has a value and a limit; the exit status is the number of rows beyond theirs.
"""

import pathlib
import tempfile

from benchmarks import environment, models

import jax  # isort: skip (after environment, which sets what jax reads)
import jax.numpy as jnp  # isort: skip
import numpy as np  # isort: skip

CHECKS, COLUMNS = [], ("check", "value", "limit", "ok", "note", "error")


def check(path, name, limit, work):
    """Runs work() -> (value, note) and keeps a row."""

    def evaluate():
        value, note = work()
        return {"value": float(value), "ok": bool(value <= limit), "note": note}

    row = environment.attempt({"check": name, "limit": limit}, evaluate)
    CHECKS.append(row)
    environment.write_result(path, CHECKS, device=jax.devices()[0].device_kind)
    print(environment.table([row], COLUMNS).splitlines()[1], flush=True)


def max_abs(a, b):
    return np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max()


def relative(a, reference):
    """rms(a - reference) / rms(reference), in float64."""
    a, reference = np.asarray(a, np.float64), np.asarray(reference, np.float64)
    return np.sqrt(np.mean((a - reference) ** 2) / np.mean(reference**2))


def nhwc(tensor):
    return tensor.detach().float().cpu().numpy().transpose(0, 2, 3, 1)


def nchw(array):
    import torch

    return torch.from_numpy(np.array(np.moveaxis(array, -1, 1)))


def transformer_inputs(seed, side, length, width, batch=2):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, side, side, 32), np.float32)
    states = rng.standard_normal((batch, length, width), np.float32)
    mask = np.arange(length) < np.resize([1, length // 2], batch)[:, None]
    return x, np.full(batch, 500.0, np.float32), states, mask


def run_peer(peer, x, t, states, mask):
    """diffusers' transformer on numpy inputs, in its own dtype and on its own device."""
    import torch

    place = {"device": peer.device, "dtype": peer.dtype}
    with torch.inference_mode():
        out = peer(
            nchw(x).to(**place), encoder_hidden_states=torch.from_numpy(states).to(**place),
            encoder_attention_mask=torch.from_numpy(mask.astype(np.int64)).to(peer.device),
            timestep=torch.from_numpy(t).to(peer.device), return_dict=False,
        )[0]  # fmt: skip
    return nhwc(out)


def run_ours(module, params, *inputs):
    apply = jax.jit(lambda p, *a: module.apply({"params": p}, *a))
    return np.asarray(apply(params, *inputs), np.float32)


def cast(params, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def toy(path, folder):
    """float32 of every part, then save and load, then batches."""
    import torch
    import sana_jax
    from tests import toy_pipeline

    toy_pipeline.make_pipeline().save_pretrained(folder)
    theirs, ours = toy_pipeline.load_peer(folder), sana_jax.load_pipeline(folder)
    inputs = transformer_inputs(0, 16, 300, theirs.transformer.config.caption_channels)

    def transformer():
        reference = run_peer(theirs.transformer, *inputs)
        return max_abs(run_ours(*ours.sana, *inputs), reference), f"rms {np.std(reference):.3g}"

    def autoencoder(direction):
        rng = np.random.default_rng(1)
        shape = (1, 128, 96, 3) if direction == "encode" else (1, 4, 3, 32)
        x = rng.standard_normal(shape, np.float32)
        with torch.inference_mode():
            reference = nhwc(getattr(theirs.vae, direction)(nchw(x), return_dict=False)[0])
        module, params = ours.dc_ae
        out = jax.jit(lambda p, x: module.apply({"params": p}, x, method=direction))(params, x)
        return max_abs(out, reference), f"rms {np.std(reference):.3g}"

    noise = np.random.default_rng(2).standard_normal((1, 2, 3, 32)).astype(np.float32)
    size, prompt = {"height": 64, "width": 96}, "a photo of a red cat"

    def picture(kind):
        out = ours.generate(prompt, latents=noise, output=kind, bin_resolution=False, **size)
        reference = theirs(
            prompt, latents=nchw(noise), num_inference_steps=20, use_resolution_binning=False,
            output_type="latent" if kind == "latent" else "np", **size,
        ).images  # fmt: skip
        reference = nhwc(reference) if kind == "latent" else reference
        return max_abs(out, reference), f"rms {np.std(reference):.3g}"

    check(path, "toy float32 transformer, max abs", 1e-4, transformer)
    check(path, "toy float32 encode, max abs", 1e-4, lambda: autoencoder("encode"))
    check(path, "toy float32 decode, max abs", 1e-4, lambda: autoencoder("decode"))
    check(path, "toy float32 latent after 20 steps, max abs", 2e-4, lambda: picture("latent"))
    check(path, "toy float32 picture, max abs", 2e-4, lambda: picture("float"))

    def save_and_load():
        ours.save(f"{folder}-copy")
        again = sana_jax.load_pipeline(f"{folder}-copy")
        trees = [(p.sana[1], p.dc_ae[1], p.text.params) for p in (ours, again)]
        pairs = zip(*map(jax.tree.leaves, trees), strict=True)
        return sum(int((np.asarray(a) != np.asarray(b)).sum()) for a, b in pairs), "elements that differ"

    def batch(dtype):
        pipeline = sana_jax.load_pipeline(folder, dtype=dtype)
        arguments = {"seed": 5, "output": "float", "bin_resolution": False} | size
        one = pipeline.generate(prompt, **arguments)
        four = pipeline.generate(prompt, num_images=4, **arguments)
        return max_abs(one[0], four[0]), "bit-exact" if (one[0] == four[0]).all() else "not bit-exact"

    check(path, "save and load, elements that differ", 0, save_and_load)
    check(path, "batch 1 against 4, float32, max abs", 1e-4, lambda: batch("fp32"))
    check(path, "batch 1 against 4, bfloat16, max abs", 5e-2, lambda: batch("bf16"))


def toy_bfloat16(path, folder, seeds):
    """Our error over the peer's, both in bfloat16 on this device, against float32 on the CPU."""
    import torch

    import sana_jax
    from tests import toy_pipeline

    def transformer(seed):
        peer = toy_pipeline.make_transformer(seed)
        peer.save_pretrained(f"{folder}/transformer-{seed}")
        module, params = sana_jax.load_sana(f"{folder}/transformer-{seed}", dtype="bf16")
        inputs = transformer_inputs(seed, 16, 300, peer.config.caption_channels)
        inputs = [a.astype(jnp.bfloat16).astype(np.float32) if a.ndim > 2 else a for a in inputs]
        peer = peer.bfloat16().float()  # so that only the arithmetic differs
        reference = run_peer(peer, *inputs)
        theirs = run_peer(peer.to(models.torch_device(), torch.bfloat16), *inputs)
        return relative(run_ours(module, params, *inputs), reference), relative(theirs, reference)

    def decode(seed):
        peer = toy_pipeline.make_dc_ae(seed)
        peer.save_pretrained(f"{folder}/vae-{seed}")
        module, params = sana_jax.load_dc_ae(f"{folder}/vae-{seed}", dtype="bf16")
        z = np.random.default_rng(seed).standard_normal((1, 8, 8, 32)).astype(jnp.bfloat16)
        z, peer = z.astype(np.float32), peer.bfloat16().float()
        out = jax.jit(lambda p, z: module.apply({"params": p}, z, method="decode"))(params, z)
        with torch.inference_mode():
            reference = nhwc(peer.decode(nchw(z), return_dict=False)[0])
            peer = peer.to(models.torch_device(), torch.bfloat16)
            there = nchw(z).to(peer.device, torch.bfloat16)
            theirs = nhwc(peer.decode(there, return_dict=False)[0])
        return relative(np.asarray(out, np.float32), reference), relative(theirs, reference)

    def ratio(pair):
        errors = np.array([pair(seed) for seed in range(1, 1 + seeds)])
        ratios = errors[:, 0] / errors[:, 1]
        note = f"ours {errors[:, 0].mean():.2e}, theirs {errors[:, 1].mean():.2e}, worst {ratios.max():.3f}"
        return np.median(ratios), note

    check(path, "toy bfloat16 transformer, error ratio", 1.1, lambda: ratio(transformer))
    check(path, "toy bfloat16 decode, error ratio", 1.1, lambda: ratio(decode))


def full(path, smoke):
    """The 1.6B transformer with one set of bfloat16 weights, in both frameworks and both precisions."""
    import flax.traverse_util
    import torch
    from diffusers import SanaTransformer2DModel

    from sana_jax.checkpoints import rules, sana
    from sana_jax.parameters import parameter_shapes
    from tests import peers

    module = models.modules(smoke)["1.6B"]
    peer = models.build(lambda: SanaTransformer2DModel(**models.peer_config("1.6B", smoke)))
    table = sana.diffusers_rules(module.heads, module.cross_heads, module.qk_norm, module.guidance_embed)
    state = peers.to_numpy_state(peer)
    shapes = parameter_shapes(module)
    leaves = rules.to_flax(table, shapes, peers.header(state), state.items(), np.dtype(jnp.bfloat16))
    params = flax.traverse_util.unflatten_dict(jax.tree.map(jnp.asarray, leaves), sep="/")
    del state, leaves

    inputs = transformer_inputs(3, 2 if smoke else 32, 300, module.caption_width)
    inputs = [a.astype(jnp.bfloat16).astype(np.float32) if a.ndim > 2 else a for a in inputs]
    out = {"torch bf16": run_peer(peer, *inputs)}
    out["torch f32"] = run_peer(peer.float(), *inputs)
    del peer
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with jax.default_matmul_precision("default"):
        out["ours bf16"] = run_ours(module, params, *inputs)
    wide = module.clone(dtype=jnp.float32, param_dtype=jnp.float32)
    out["ours f32"] = run_ours(wide, cast(params, jnp.float32), *inputs)

    def between(a, b):
        return lambda: (relative(out[a], out[b]), f"rms {np.std(out[b]):.3g}")

    def ratio():
        ours, theirs = (relative(out[f"{who} bf16"], out["torch f32"]) for who in ("ours", "torch"))
        return ours / theirs, f"ours {ours:.2e}, theirs {theirs:.2e}"

    check(path, "full: ours float32 against torch float32", 1e-4, between("ours f32", "torch f32"))
    check(path, "full: ours bfloat16 against ours float32", 5e-2, between("ours bf16", "ours f32"))
    check(path, "full: ours bfloat16 against torch bfloat16", 5e-2, between("ours bf16", "torch bf16"))
    check(path, "full: bfloat16 error ratio, ours over torch", 1.1, ratio)


def main(argv=None):
    parser = environment.arguments(__doc__)
    parser.add_argument("--skip-full", action="store_true", help="leave out the 1.6B forward")
    args = parser.parse_args(argv)
    jax.config.update("jax_default_matmul_precision", "highest")
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    path = pathlib.Path(args.output) / "gpu_parity.json"
    with tempfile.TemporaryDirectory() as folder:
        toy(path, f"{folder}/pipeline")
        toy_bfloat16(path, folder, seeds=1 if args.smoke else 5)
    if not args.skip_full:
        failed = environment.attempt({"check": "full"}, lambda: full(path, args.smoke) or {})
        CHECKS.extend([failed] if "error" in failed else [])
        environment.write_result(path, CHECKS, device=jax.devices()[0].device_kind)
    print(environment.table(CHECKS, COLUMNS))
    return sum(not row.get("ok") for row in CHECKS)


if __name__ == "__main__":
    raise SystemExit(main())
