"""One guided step and one decode on a CPU, ours and PyTorch's, published sizes, float32.

    python -m benchmarks.laptop --output DIR [--model 0.6B] [--size 512] [--smoke]

Random weights; both sides get the same shapes and all cores, one after the other in one process.  A
step is the network on a pair of latents with 300 caption tokens.  Ours is timed as it runs inside the
loop (`velocity`, text prepared outside) and in the plain form that does everything again.
"""

import pathlib

import jax
import numpy as np

from benchmarks import environment, models

COLUMNS = ("what", "ms", "p10", "p90", "repeats")


def ours(module, params, side, rows, add):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, side, side, module.latent_channels)).astype("f")
    t = np.full(2, 500, "f")
    states = rng.normal(size=(2, 300, module.caption_width)).astype("f")
    mask = np.arange(300) < np.array([[1], [60]])

    def call(method):
        return jax.jit(lambda p, *a: module.apply({"params": p}, *a, method=method))

    text, time = call("embed_text")(params, states, mask), call("embed_time")(params, t)
    step, plain = call("velocity"), call("__call__")
    add("step, ours", lambda: step(params, x, time, text))
    add("step with text, ours", lambda: plain(params, x, t, states, mask))


def main(argv=None):
    parser = environment.arguments(__doc__)
    parser.add_argument("--model", default="0.6B", choices=("0.6B", "1.6B"))
    parser.add_argument("--size", type=int, default=512)
    args = parser.parse_args(argv)
    import diffusers
    import torch

    rows, side = [], args.size // 32

    def add(what, work, wait=None):
        rows.append({"what": what} | environment.measure(work, repeats=10, warmups=2, wait=wait))
        environment.write_result(path, rows, model=args.model, size=args.size)

    path = pathlib.Path(args.output) / "laptop.json"
    found = {name: m.clone(dtype=np.float32, param_dtype=np.float32) for name, m in models.modules(args.smoke).items()}
    module, dc_ae = found[args.model], found["dc_ae"]
    params = environment.random_params(module)
    ours(module, params, side, rows, add)
    params = environment.random_params(dc_ae)
    z = np.random.default_rng(1).normal(size=(1, side, side, 32)).astype("f")
    decode = jax.jit(lambda p, z: dc_ae.apply({"params": p}, z, method="decode"))
    add("decode, ours", lambda: decode(params, z))
    params = None

    with torch.inference_mode():
        config = models.peer_config(args.model, args.smoke)
        peer = models.build(lambda: diffusers.SanaTransformer2DModel(**config), dtype=torch.float32)
        x, states = torch.randn(2, 32, side, side), torch.randn(2, 300, module.caption_width)
        t, mask = torch.full((2,), 500.0), (torch.arange(300) < torch.tensor([[1], [60]])).long()
        add("step with text, diffusers", lambda: peer(x, states, t, encoder_attention_mask=mask), lambda _: None)
        config = models.peer_config("dc_ae", args.smoke)
        peer = models.build(lambda: diffusers.AutoencoderDC(**config), dtype=torch.float32)
        z = torch.randn(1, 32, side, side)
        add("decode, diffusers", lambda: peer.decode(z), lambda _: None)
    print(environment.table(rows, COLUMNS))


if __name__ == "__main__":
    main()
