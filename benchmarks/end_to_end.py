"""A picture end to end, ours and PyTorch's, with random weights of full size in bfloat16.

    python -m benchmarks.end_to_end ours  --output DIR [--models 1.6B,0.6B] [--sizes 1024,512,2048]
    python -m benchmarks.end_to_end torch --output DIR [--variants eager,compile,...]  [--seconds 500]

Run the two as separate processes, one after the other.  Both paint the same shapes with 20 steps of
Flow-DPM-Solver, guidance (a pair of evaluations per step) and 300 caption tokens; ours also with the
64 that a short prompt gets, and 16 pictures at once.  `ours` compiles each program ahead of time
(compile_s) and times it alone; `total` is the program from states to pixels.  `torch` is a plain loop
over diffusers' classes and scheduler: eager, with channels_last, and with the repeated blocks compiled.
A row is written when it is done; no row starts after --seconds.  `roof` is the share of the bfloat16
floor at 790 TFLOP/s that counts all published work; ours skips some of it exactly (text keys and
values once per picture), so its share may flatter it: compare milliseconds.
"""

import itertools
import pathlib
import time

from benchmarks import environment, models
from benchmarks.models import GUIDANCE, STEPS, Case

TEXT_LENGTHS = (504, 300)  # prompt behind the instruction, and negative prompt, as diffusers pads them
COLUMNS = ("who", "model", "size", "batch", "length", "part", "ms", "p10", "p90", "img_s", "roof",
           "compile_s", "peak_gb", "finite", "error")  # fmt: skip


def cases(args, extra):
    """The matrix in order of importance."""
    names, sizes = args.models.split(","), [int(s) for s in args.sizes.split(",")]
    plain = [Case(model, size) for model in names for size in sizes if (model, size) != ("0.6B", 2048)]
    more = [Case(names[0], sizes[0], length=64)] if extra else []
    more += [Case(names[0], sizes[0], batch=args.batch)] if args.batch > 1 else []
    return plain[:1] + more + plain[1:]


class Book:
    """Rows of one process: writes each when it comes, and knows when to stop."""

    def __init__(self, args, who):
        self.path = pathlib.Path(args.output) / f"end_to_end_{who}.json"
        self.rows, self.end = [], time.perf_counter() + args.seconds

    def closed(self):
        return time.perf_counter() > self.end

    def add(self, who, case, part, floor, work):
        """Runs work() -> dict with "ms" unless time is up, and keeps the row."""
        if self.closed():
            return
        row = {"who": who} | (vars(case) if isinstance(case, Case) else case) | {"part": part}
        row = environment.attempt(row, work)
        if "ms" in row:
            row["img_s"] = 1e3 * row.get("batch", 1) / row["ms"]
            row["roof"] = floor and round(floor / row["ms"], 3)
        self.rows.append(row)
        environment.write_result(self.path, self.rows)
        print(environment.table([row], COLUMNS).splitlines()[1], flush=True)


def compiled_row(lowered, *arguments):
    """Compiles, runs and times a lowered program."""
    import jax

    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    out = jax.block_until_ready(compiled(*arguments))
    row = environment.measure(lambda: compiled(*arguments))
    memory, stats = compiled.memory_analysis(), jax.devices()[0].memory_stats() or {}
    row |= {"compile_s": round(seconds, 1), "peak_gb": stats.get("peak_bytes_in_use", 0) / 1e9}
    if memory is not None:
        row["temp_gb"] = memory.temp_size_in_bytes / 1e9
    finite = [bool(jax.numpy.isfinite(leaf).all()) for leaf in jax.tree.leaves(out)]
    flags = [bool(leaf.all()) for leaf in jax.tree.leaves(out) if leaf.dtype == bool]
    return row | {"finite": all(finite + flags)}


def ours(args):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sana_jax import programs

    book, found, b16 = Book(args, "ours"), models.modules(args.smoke), jnp.bfloat16
    rng = np.random.default_rng(0)
    if "text" in args.parts:
        gemma2, params = found["gemma2"], environment.random_params(found["gemma2"])
        for m in TEXT_LENGTHS:
            ids = rng.integers(3, gemma2.vocab_size, (1, m), np.int32)
            inputs = params, ids, np.ones((1, m), bool), np.r_[0, m - 299 : m]
            lowered = programs.text_program.lower(*inputs, gemma2=gemma2)
            row = {"model": "gemma2", "batch": 1, "length": m}
            book.add("ours", row, "text", models.TEXT_FLOOR[m], lambda: compiled_row(lowered, *inputs))
        params = inputs = None  # the device needs the room
    dc_ae, dc_ae_params = found["dc_ae"], environment.random_params(found["dc_ae"])
    schedule = programs.SAMPLERS["flow-dpm-solver"][0](STEPS, models.FLOW_SHIFT)
    rest = schedule, np.float32(GUIDANCE), (np.float32(0), np.float32(1))
    static = {"sampler": "flow-dpm-solver", "guided": True, "limited": False}
    for model, group in itertools.groupby(cases(args, extra=True), lambda case: case.model):
        if book.closed():
            break
        sana, params = found[model], environment.random_params(found[model])
        for case in group:
            n, side, m = case.batch, case.size // 32, case.length
            keys = jax.random.split(jax.random.key(1), 3)
            draw = [jax.random.normal(key, (n, m, sana.caption_width), b16) for key in keys[:2]]
            masks = [jnp.tile(jnp.arange(m) < valid, (n, 1)) for valid in (60, 1)]
            conditions = draw[0], masks[0], draw[1], masks[1]
            latents = jax.random.normal(keys[2], (n, side, side, sana.latent_channels))
            both = {"sana": params, "dc_ae": dc_ae_params}
            size = case.size, case.size

            def total():
                lowered = programs.paint_program.lower(
                    both, conditions, latents, *rest, sana=sana, dc_ae=dc_ae, size=size,
                    output="uint8", **static,
                )  # fmt: skip
                return compiled_row(lowered, both, conditions, latents, *rest)

            def denoise():
                inputs = params, conditions, latents, *rest
                return compiled_row(programs.denoise_program.lower(*inputs, sana=sana, **static), *inputs)

            def decode():
                inputs = dc_ae_params, latents
                return compiled_row(programs.decode_program.lower(*inputs, dc_ae=dc_ae), *inputs)

            for part, work in (("denoise", denoise), ("decode", decode), ("total", total)):
                if part in args.parts and not (part == "decode" and (n > 1 or m != 300)):
                    book.add("ours", case, part, models.floor(case, part), work)
        params = None
    return book


def prepare(module, variant, repeated):
    """The module as `variant` runs it; compiled variants compile the classes named in `repeated`."""
    import torch

    if variant == "channels_last":
        return module.to(memory_format=torch.channels_last)
    if variant != "eager":
        mode = {"compile": "default"}.get(variant, variant)
        for part in module.modules():
            if type(part).__name__ in repeated:
                part.compile(fullgraph=True, dynamic=False, mode=mode)
    return module


def timed_torch(work):
    """Times work() under inference_mode; the first call compiles."""
    import torch

    cuda = torch.cuda.is_available()
    wait = (lambda _: torch.cuda.synchronize()) if cuda else (lambda _: None)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        start = time.perf_counter()
        out = work()
        wait(out)
        first = time.perf_counter() - start
        row = environment.measure(work, wait=wait)
        row["finite"] = bool(torch.isfinite(out).all())
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0
    return row | {"compile_s": round(first, 1), "peak_gb": peak}  # compile_s: the whole first call


def torch_side(args):
    import diffusers
    import torch
    import transformers

    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    book, device = Book(args, "torch"), models.torch_device()
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random, device=device).bfloat16()

    if "text" in args.parts:
        config = transformers.Gemma2Config(**models.peer_config("gemma2", args.smoke))
        gemma2 = models.build(lambda: transformers.Gemma2Model(config))
        for m in TEXT_LENGTHS:
            ids = torch.randint(3, config.vocab_size, (1, m), generator=random, device=device)
            mask, row = torch.ones_like(ids), {"model": "gemma2", "batch": 1, "length": m}

            def encode():
                return gemma2(ids, attention_mask=mask, use_cache=False)[0]

            book.add("torch eager", row, "text", models.TEXT_FLOOR[m], lambda: timed_torch(encode))
        gemma2 = None
    for variant in args.variants.split(","):
        if book.closed():
            break
        torch._dynamo.reset()
        dc_ae = models.build(lambda: diffusers.AutoencoderDC(**models.peer_config("dc_ae", args.smoke)))
        dc_ae = prepare(dc_ae, variant, ("ResBlock", "EfficientViTBlock"))
        for model, group in itertools.groupby(cases(args, extra=False), lambda case: case.model):
            config, scheduler = models.peer_config(model, args.smoke), models.make_scheduler()
            sana = models.build(lambda: diffusers.SanaTransformer2DModel(**config))
            sana = prepare(sana, variant, ("SanaTransformerBlock",))
            for case in group:
                n, side = 2 * case.batch, case.size // 32
                states = normal(n, case.length, config["caption_channels"])
                valid = torch.tensor([1] * case.batch + [60] * case.batch, device=device)[:, None]
                mask = (torch.arange(case.length, device=device) < valid).long()
                noise = normal(case.batch, 32, side, side).float()

                def denoise():
                    scheduler.set_timesteps(STEPS, device=device)
                    x = noise
                    for t in scheduler.timesteps:
                        if "autotune" in variant and "no-" not in variant:
                            torch.compiler.cudagraph_mark_step_begin()
                        v = sana(
                            torch.cat([x, x]).bfloat16(), encoder_hidden_states=states,
                            encoder_attention_mask=mask, timestep=t.expand(n), return_dict=False,
                        )[0].float()  # fmt: skip
                        u, c = v.chunk(2)
                        x = scheduler.step(u + GUIDANCE * (c - u), t, x, return_dict=False)[0]
                    return x

                def decode(x=noise):
                    z = x.bfloat16() / dc_ae.config.scaling_factor
                    return dc_ae.decode(z, return_dict=False)[0]

                def total():
                    image = decode(denoise()).float()
                    return ((image / 2 + 0.5).clamp(0, 1) * 255).round().byte()

                for part, work in (("denoise", denoise), ("decode", decode), ("total", total)):
                    if part in args.parts and not (part == "decode" and case.batch > 1):
                        floor = models.floor(case, part)
                        book.add(f"torch {variant}", case, part, floor, lambda: timed_torch(work))
            sana = None
        dc_ae = None
    return book


def main(argv=None):
    parser = environment.arguments(__doc__)
    parser.add_argument("side", choices=("ours", "torch"))
    parser.add_argument("--models", default="1.6B,0.6B")
    parser.add_argument("--sizes", default="1024,512,2048")
    parser.add_argument("--batch", type=int, default=16, help="of the throughput row; 1 leaves it out")
    parser.add_argument("--variants", default="eager,compile,channels_last,max-autotune")
    parser.add_argument("--parts", default="text,denoise,decode,total")
    parser.add_argument("--seconds", type=float, default=500, help="no row starts after this long")
    args = parser.parse_args(argv)
    if args.smoke:
        environment.LIMIT = 0.1
    book = (ours if args.side == "ours" else torch_side)(args)
    print(environment.table(book.rows, COLUMNS))


if __name__ == "__main__":
    main()
