"""Rows of docs/parity.md for single modules: float32, published sizes, bfloat16; see benchmarks/parity.py."""

import copy
import functools
import tempfile

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import torch

import sana_jax
from sana_jax import components
from sana_jax.checkpoints import rules
from sana_jax.models.dc_ae import DC_AE_F32C32_SANA
from sana_jax.models.sana import SANA_600M, SANA_1600M
from sana_jax.parameters import parameter_shapes
from sana_jax.parity.peers import first, last
from sana_jax.parity.rows import Ratio, compare, rms
from tests import dc_ae_toys, peers, toy_pipeline
from tests.toy_pipeline import run_transformer, transformer_case

TRANSFORMERS = {
    "1.0": "SANA-1.0",
    "1.5": "SANA-1.5 (qk-norm)",
    "4K": "2K/4K position embedding",
    "sprint": "Sprint (guidance embedding)",
}


def load(kind, module, **overrides):
    """A torch module through a file on disk and our loader."""
    with tempfile.TemporaryDirectory() as folder:
        module.save_pretrained(folder)
        return getattr(sana_jax, f"load_{kind}")(folder, **overrides)


def transformer(module, params, case):
    out = jax.jit(module.apply)({"params": params}, *case.values())
    return np.asarray(out.astype(jnp.float32))


def autoencoder(module, params, x, method):
    return dc_ae_toys.run(module, params, x, method=method).astype(jnp.float32)


def halves(peer, images):
    """diffusers' latents of images, and its images of those latents."""
    latents = peer.encode(torch.tensor(first(images))).latent
    return last(latents), last(peer.decode(latents).sample)


def dc_ae_rows(name, module, params, images, peer, scaled):
    """Latent and image; a bound that is scaled by the rms of the reference is marked."""
    latents, decoded = halves(peer, images)
    for what, x, reference, method in (("latent", images, latents, "encode"), ("image", latents, decoded, "decode")):
        yield compare(f"{name} {what}{' *' if scaled else ''}", autoencoder(module, params, x, method), reference, what, scaled)


def toy_rows():
    for variant, changes in toy_pipeline.VARIANTS.items():
        peer = toy_pipeline.make_transformer(**changes)
        case = transformer_case(guidance=variant == "sprint")
        ours, reference = transformer(*load("sana", peer), case), run_transformer(peer, **case)
        yield compare(f"DiT, {TRANSFORMERS[variant]}", ours, reference, "dit")

    peer = toy_pipeline.make_dc_ae()
    images = np.random.default_rng(1).uniform(-1, 1, (2, 256, 320, 3)).astype("f")
    yield from dc_ae_rows("DC-AE", *load("dc_ae", peer), images, peer, scaled=False)
    for name, module in dc_ae_toys.TOYS.items():
        peer = dc_ae_toys.make_peer(module)
        images = np.random.default_rng(1).uniform(-1, 1, (1, 256, 384, 3)).astype("f")
        yield from dc_ae_rows(f"DC-AE {name}", *load("dc_ae", peer), images, peer, scaled=True)

    peer = toy_pipeline.make_gemma2()
    module, params = load("gemma2", peer)
    rng = np.random.default_rng(2)
    ids, mask = rng.integers(4, 600, (2, 300)), np.arange(300) < np.array([[300], [40]])
    states = peer(torch.tensor(ids), attention_mask=torch.tensor(mask.astype("int64")))[0].numpy()
    ours = module.apply({"params": params}, ids.astype("int32"), mask)
    yield compare("Gemma-2 states at valid tokens", np.asarray(ours)[mask], states[mask], "text")


def convert(module, peer):
    """Parameters of a torch module without a copy of them in between."""
    state = peer.state_dict()
    leaves = rules.to_flax(
        components.published_rules(module),
        parameter_shapes(module),
        {name: (tuple(tensor.shape), "F32") for name, tensor in state.items()},
        ((name, tensor.numpy()) for name, tensor in state.items()),
        np.dtype("float32"),
    )
    params = {path: jnp.asarray(leaves.pop(path)) for path in list(leaves)}
    return flax.traverse_util.unflatten_dict(params, sep="/")


def full_rows():
    """Published sizes, random weights: widths of 2240 and sums over 5600 channels, as users run them."""
    import diffusers

    for name, module in (("0.6B", SANA_600M), ("1.6B", SANA_1600M)):
        config = toy_pipeline.config_of(module)
        peer = peers.randomise(diffusers.SanaTransformer2DModel(**config), 1)
        params = convert(module, peer)
        case = transformer_case(16, 12, caption=module.caption_width)
        reference = run_transformer(peer, **case)
        del peer
        yield compare(f"DiT {name}, published size", transformer(module, params, case), reference, "dit")
    module = DC_AE_F32C32_SANA
    peer = diffusers.AutoencoderDC(**toy_pipeline.config_of(module))
    peers.randomise(peer, 2, gain=0.5)  # latents of rms 2.8; published ones have 1 / 0.41407 = 2.4
    images = np.random.default_rng(1).uniform(-1, 1, (1, 256, 320, 3)).astype("f")
    for row in dc_ae_rows("DC-AE", module, convert(module, peer), images, peer, scaled=False):
        yield row.renamed(f"{row.name}, published size")


def bfloat16_ratios(seeds):
    """rms error against float32, ours and torch's own, mean of several inputs."""
    yield mean("DiT", seeds, *transformer_errors())
    for method, field, shape in (("encode", "latent", (128, 128, 3)), ("decode", "sample", (4, 4, 32))):
        yield mean(f"DC-AE {method}", seeds, *dc_ae_errors(method, field, shape))
    yield mean("Gemma-2", seeds, *gemma2_errors())


def mean(name, seeds, ours, theirs, exact, inputs):
    """The Ratio of mean errors over `inputs(seed)`."""
    errors = []
    for seed in range(seeds):
        x = inputs(seed)
        reference = exact(x)
        errors.append([rms(np.asarray(run(x), np.float32) - reference) for run in (ours, theirs)])
    return Ratio(name, *map(float, np.mean(errors, axis=0)))


def transformer_errors():
    peer = toy_pipeline.make_transformer()
    low = copy.deepcopy(peer).to(torch.bfloat16)
    run = functools.partial(transformer, *load("sana", peer, dtype="bf16"))
    theirs, exact = (lambda case, m=m: run_transformer(m, **case) for m in (low, peer))
    return run, theirs, exact, lambda seed: transformer_case(seed=seed)


def dc_ae_errors(method, field, shape):
    peer = toy_pipeline.make_dc_ae()
    low = copy.deepcopy(peer).to(torch.bfloat16)
    run = functools.partial(autoencoder, *load("dc_ae", peer, dtype="bf16"), method=method)

    def theirs(x, module=low):
        x = torch.tensor(first(x)).to(next(module.parameters()).dtype)
        return last(getattr(getattr(module, method)(x), field))

    def inputs(seed):
        return np.random.default_rng(seed).uniform(-1, 1, (1, *shape)).astype("f")

    return run, theirs, functools.partial(theirs, module=peer), inputs


def gemma2_errors():
    peer = toy_pipeline.make_gemma2()
    low = copy.deepcopy(peer).to(torch.bfloat16)
    module, params = load("gemma2", peer, dtype="bf16")

    def ours(ids):
        return module.apply({"params": params}, ids.astype("int32"), np.ones(ids.shape, bool)).astype(jnp.float32)

    theirs, exact = (lambda ids, m=m: m(torch.tensor(ids))[0].float().numpy() for m in (low, peer))
    return ours, theirs, exact, lambda seed: np.random.default_rng(seed).integers(4, 600, (2, 40))
