"""Where one denoising step spends its time, and what XLA made of it.

    python -m benchmarks.profile_step --output DIR [--model 1.6B] [--size 1024] [--seconds 400] [--smoke]

Each part runs alone with the shapes of one guided pair: 16 copies of it in one program, each on
another of 8 random inputs (together larger than the L2 cache), tied into a sequence so that nothing
merges; the time is that of the program over 16.  Inside the network neighbours fuse and activations
may stay in L2, so parts need not add up to the block: the differences are the point.  Matrix parts
report tflops; the others gbs, counting each input and output once.  `expected_us` is the larger of
the two floors at 790 TFLOP/s and 4300 GB/s.

Also written: the optimized HLO of the 20-step program (gzip), and the kernels of one step by kind.
A trace is not taken: profiling switches command buffers off, and with them what is to be measured.
"""

import functools
import gzip
import pathlib
import time

from benchmarks import environment, hlo, models

COPIES, SETS = 16, 8
COLUMNS = ("part", "us", "expected_us", "tflops", "gbs", "compile_s", "error")


def chained(fn, copies):
    """A program of `copies` calls of fn in sequence over the given argument tuples, keeping all results."""
    import jax

    @jax.jit
    def run(sets):
        outs = []
        for i in range(copies):
            arguments = sets[i % len(sets)]
            if outs:  # the next call may not start, nor be merged, before this one is done
                outs[-1], arguments = jax.lax.optimization_barrier((outs[-1], arguments))
            outs.append(fn(*arguments))
        return outs

    return run


def parts(module, size, length=300):
    """(name, fn, shapes of what varies, weights, FLOPs) of everything in a block.

    fn(*inputs, *weights); shapes and weights are lists of shapes, in module.dtype.
    """
    import jax
    import jax.numpy as jnp

    from sana_jax import ops

    d, f, side = module.width, int(module.ffn_ratio * module.width), size // 32
    heads, cross, b = module.heads, module.cross_heads, 2
    n, t = side * side, 2 * side * side
    grid, wide = (b, side, side, d), (b, side, side, 2 * f)

    def gemm(name, k, m):
        return name, lambda x, w: x @ w, [(b, side, side, k)], [(k, m)], 2 * t * k * m

    def barrier(x):
        return jax.lax.optimization_barrier(x)

    def library(x, kernel, bias):
        out = jax.lax.conv_general_dilated(
            x, kernel[:, :, None], (1, 1), ((1, 1), (1, 1)), feature_group_count=x.shape[-1],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return out + bias

    def narrow(x, kernel, bias):
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [
            padded[:, i : i + side, j : j + side] * kernel[i, j] for i in range(3) for j in range(3)
        ]
        return sum(taps[1:], taps[0]) + bias

    def glu(x):
        value, gate = jnp.split(x, 2, axis=-1)
        return value * jax.nn.silu(gate)

    conv = [(3, 3, 2 * f), (2 * f,)]
    shifted, silu = ops.depthwise_conv, jax.nn.silu
    yield gemm("qkv", d, 3 * d)
    yield gemm("attention out, cross query, cross out: each", d, d)
    yield gemm("expand", d, 2 * f)
    yield "expand + bias + silu", lambda x, w, c: silu(x @ w + c), [grid], [(d, 2 * f), (2 * f,)], 4 * t * d * f
    yield gemm("project", f, d)
    qkv = [(b, n, heads, 3 * d // heads)]
    attention = functools.partial(ops.relu_linear_attention, eps=module.attention_eps)
    yield "linear attention", attention, qkv, [], 4 * t * d * (d // heads + 1)
    kv = [(b, length, cross, 2 * d // cross), (b, length)]
    yield "cross attention", ops.cross_attention, [(b, n, cross, d // cross), *kv], [], 4 * t * length * d
    yield "modulate", ops.modulate, [grid], [(b, 1, 1, d), (b, 1, 1, d)], None
    yield "gated add", lambda x, y, gate: ops.add_gated(x, gate, y), [grid, grid], [(b, 1, 1, d)], None
    yield "silu", silu, [wide], [], None
    yield "glu", glu, [wide], [], None
    yield "depthwise, library conv NHWC", library, [wide], conv, None
    yield "depthwise, shifted, float32 sum", shifted, [wide], conv, None
    yield "depthwise, shifted, bfloat16 sum", narrow, [wide], conv, None
    yield "silu + depthwise + glu, library", lambda x, *w: glu(library(silu(x), *w)), [wide], conv, None
    yield "silu + depthwise + glu, float32", lambda x, *w: glu(shifted(silu(x), *w)), [wide], conv, None
    yield "silu | depthwise + glu, float32", lambda x, *w: glu(shifted(barrier(silu(x)), *w)), [wide], conv, None
    yield "silu | depthwise + glu, bfloat16", lambda x, *w: glu(narrow(barrier(silu(x)), *w)), [wide], conv, None
    yield "silu | depthwise | glu, float32", lambda x, *w: glu(barrier(shifted(barrier(silu(x)), *w))), [wide], conv, None


def timed(run, copies, *arguments):
    """Microseconds of one of the copies, and the seconds that compiling took."""
    import jax

    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    seconds = time.perf_counter() - start
    row = environment.measure(lambda: run(*arguments))
    microseconds = {key: round(1e3 * row[key] / copies, 2) for key in ("ms", "p10", "p90")}
    return {"us": microseconds.pop("ms"), **microseconds, "repeats": row["repeats"], "compile_s": round(seconds, 1)}


def time_part(fn, shapes, weights, flops, dtype, copies):
    import jax
    import jax.numpy as jnp

    def draw(seed, shapes, scaled=False):
        keys = jax.random.split(jax.random.key(seed), max(1, len(shapes)))
        scale = [s[-2] ** -0.5 if scaled and len(s) == 2 else 1.0 for s in shapes]
        return [jax.random.normal(k, s, dtype) * jnp.asarray(c, dtype) for k, s, c in zip(keys, shapes, scale)]

    fixed = draw(1000, weights, scaled=True)
    sets = [(*draw(i, shapes), *fixed) for i in range(SETS)]
    out = jax.eval_shape(fn, *sets[0])
    moved = sum(a.size * a.dtype.itemsize for a in (*sets[0], out))
    row = timed(chained(fn, copies), copies, sets)
    expected = 1e6 * max((flops or 0) / 790e12, moved / 4.3e12)
    rate = {"tflops": flops / row["us"] / 1e6} if flops else {}
    return row | rate | {"gbs": moved / row["us"] / 1e3, "expected_us": round(expected, 2)}


def shrink(module, params, depth):
    """The same network with its first `depth` blocks."""
    import jax

    stacked = {"blocks", "key_value"}
    params = {k: jax.tree.map(lambda a: a[:depth], v) if k in stacked else v for k, v in params.items()}
    return module.clone(depth=depth), params


def network(module, params, size, copies, unrolled=False):
    """One evaluation of the guided pair, text and time prepared.

    unrolled: blocks in sequence on arrays of their own.  The scan slices stacked weights, and XLA
    may copy every slice before it multiplies with it; this variant shows what that costs.
    """
    import jax
    import jax.numpy as jnp

    from sana_jax.models.sana import SanaBlock

    side, draw = size // 32, functools.partial(jax.random.normal, dtype=module.dtype)
    keys = jax.random.split(jax.random.key(7), 3)
    mask = jnp.arange(300)[None] < jnp.array([[1], [60]])
    states = draw(keys[0], (2, 300, module.caption_width))
    text = jax.jit(lambda p: module.apply({"params": p}, states, mask, method="embed_text"))(params)
    moment = jax.jit(lambda p: module.apply({"params": p}, jnp.array([500.0]), method="embed_time"))(params)

    def evaluate(x, params, moment, text):
        return module.apply({"params": params}, x, moment, text, method="velocity")

    if unrolled:
        block = SanaBlock(
            module.heads, module.cross_heads, int(module.ffn_ratio * module.width), module.qk_norm,
            module.attention_eps, module.cross_norm_eps, module.clamp, module.kernels, module.dtype,
            module.param_dtype,
        )  # fmt: skip
        layers = [jax.tree.map(lambda a: a[i], (params["blocks"], text.kv)) for i in range(module.depth)]
        width = module.width

        def evaluate(x, layers, moment, bias):
            x = jnp.tile(x, (1, 1, 1, width // x.shape[-1]))  # in place of the two small ends
            for weights, kv in layers:
                x, _ = block.apply({"params": weights}, x, kv, moment.rows, bias)
            return x

        params, text = layers, text.bias
    shape = 2, side, side, module.latent_channels
    sets = [(draw(k, shape), params, moment, text) for k in jax.random.split(keys[1], 2)]
    return timed(chained(evaluate, copies), copies, sets)


def denoise_hlo(module, params, size, output):
    """Compiles the 20-step program, writes its HLO, returns the summary row."""
    import jax
    import numpy as np

    from sana_jax import programs

    side, shape = size // 32, jax.ShapeDtypeStruct
    states = shape((1, 300, module.caption_width), module.dtype), shape((1, 300), bool)
    schedule = programs.SAMPLERS["flow-dpm-solver"][0](models.STEPS, models.FLOW_SHIFT)
    lowered = programs.denoise_program.lower(
        params, (*states, *states), shape((1, side, side, module.latent_channels), np.float32), schedule,
        np.float32(models.GUIDANCE), (np.float32(0), np.float32(1)),
        sana=module, sampler="flow-dpm-solver", guided=True, limited=False,
    )  # fmt: skip
    compiled = lowered.compile()
    text = compiled.as_text()
    with gzip.open(output / "denoise_program.hlo.txt.gz", "wt", compresslevel=9) as file:
        file.write(text)
    return hlo.summary(text) | {"temp_gb": compiled.memory_analysis().temp_size_in_bytes / 1e9}


def main(argv=None):
    parser = environment.arguments(__doc__)
    parser.add_argument("--model", default="1.6B", choices=("1.6B", "0.6B"))
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=400, help="no part starts after this long")
    args = parser.parse_args(argv)
    if args.smoke:
        environment.LIMIT, args.size = 0.1, 64
    else:
        environment.LIMIT = 5.0
    copies, end = (2 if args.smoke else COPIES), time.perf_counter() + args.seconds
    output, rows, more = pathlib.Path(args.output), [], {}
    module = models.modules(args.smoke)[args.model]
    params = environment.random_params(module)

    def add(name, work):
        if time.perf_counter() < end:
            rows.append(environment.attempt({"part": name}, work))
            environment.write_result(output / "profile_step.json", rows, **more)
            print(environment.table([rows[-1]], COLUMNS).splitlines()[1], flush=True)
            return rows[-1].get("us")

    more |= environment.attempt({}, lambda: {"denoise": denoise_hlo(module, params, args.size, output)})
    whole = add("whole network", lambda: network(module, params, args.size, 2))
    add("all blocks, no scan", lambda: network(module, params, args.size, 2, unrolled=True))
    one = add("network of one block", lambda: network(*shrink(module, params, 1), args.size, 2))
    if whole and one:
        add("one block, by difference", lambda: {"us": (whole - one) / (module.depth - 1)})
    for name, fn, shapes, weights, flops in parts(module, args.size):
        add(name, lambda: time_part(fn, shapes, weights, flops, module.dtype, copies))
    print(environment.table(rows, COLUMNS))
    summary = more.get("denoise", {})
    print(summary.get("kernels_per_step"), summary.get("by_kind"), more.get("error", ""))


if __name__ == "__main__":
    main()
