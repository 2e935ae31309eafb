"""Floating-point operations of the models, counted on the programs themselves.

A traced program is walked, and its matrix products and convolutions are counted, 2 for each multiply
and add; what is elementwise (the depthwise convolution of shifted sums too, 0.2% of SANA) is not.  So
a count holds for every variant and size.  A training step is taken as three forward passes of what
is trained and one of what is frozen, whatever is recomputed to save memory: the convention of MFU,
the share of a device's peak that useful work gets.
"""

import math

import jax
import jax.numpy as jnp

from sana_jax import ops
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.parameters import abstract_parameters

# Peak of dense bfloat16 products with float32 sums, FLOP/s, from the makers' data sheets, by
# jax.Device.device_kind; the first that it begins with.
PEAK = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak(device_kind):
    """Peak FLOP/s of one device in bfloat16, None where the table has none (a CPU)."""
    return next((value for kind, value in PEAK.items() if device_kind.startswith(kind)), None)


def forward(module, *inputs, method="__call__"):
    """FLOPs of one call of a Linen module.

    Args:
      inputs: arrays or jax.ShapeDtypeStructs.
    """
    module = ops.plain(module)  # a kernel hides its loops
    params = abstract_parameters(module)
    return of(lambda params, *inputs: module.apply({"params": params}, *inputs, method=method), params, *inputs)


def of(fn, *args):
    """FLOPs of fn(*args) as it is traced; args are trees of arrays or jax.ShapeDtypeStructs."""
    return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def train_flops(model, batch, frozen=None):
    """FLOPs of one training step on a batch.

    Args:
      model: Sana, DCAE or Gemma2, what is trained.
      batch: {name: array or shape}, see `training.objectives`; of the global batch, or a part.
      frozen: an `objectives.Frozen`, whose networks the batch goes through if it needs to.
    """
    if isinstance(model, DCAE):
        image = batch["image"].shape
        network = 0 if frozen is None or "lpips" not in frozen.params else _lpips(frozen.params["lpips"], image)
        return 3 * forward(model, _like(image)) + network
    if isinstance(model, Gemma2):
        b, m = batch["ids"].shape
        head = 2 * b * (m - 1) * model.width * model.vocab_size
        return 3 * (forward(model, batch["ids"], batch["ids_mask"]) + head)

    total, modules, params = 0, *((frozen.modules, frozen.params) if frozen else ({}, {}))
    if "latent" in batch:
        latent = batch["latent"].shape
    else:
        b, height, width, _ = image = batch["image"].shape
        dc_ae = modules["dc_ae"]
        total += forward(dc_ae, _like(image), method="encode")
        latent = (b, height // dc_ae.compression, width // dc_ae.compression, dc_ae.latent_channels)
    if "states" in batch:
        tokens = batch["states"].shape[1]
    else:
        tokens, (b, m), prefix = params["null"].shape[0], batch["ids"].shape, params.get("prefix")
        new = m if prefix is None else m - prefix.keys.shape[2]
        total += forward(modules["text"], _like((b, new), jnp.int32), _like((b, new), bool), prefix)
    b = latent[0]
    inputs = _like(latent), _like((b,)), _like((b, tokens, model.caption_width)), _like((b, tokens), bool)
    return total + 3 * forward(model.clone(remat=None), *inputs)


def _like(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _lpips(params, image):
    """Two forward passes, and one backward pass that needs no gradient of weights."""
    from sana_jax.training.lpips import LPIPS

    apply = LPIPS().apply
    return 1.5 * of(lambda p, a, b: apply({"params": p}, a, b), params, _like(image), _like(image))


def _count(jaxpr):
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        inner = [_count(jaxpr) for jaxpr in _inside(params)]
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
        elif name == "conv_general_dilated":
            kernel, spec = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
            depth = math.prod(kernel) // kernel[spec[0]]  # the inputs and positions of one output
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * depth
        elif name == "cond":  # of forms of one function for several platforms some cut a product into two
            total += (max if params.get("branches_platforms") is None else min)(inner)
        elif name == "while" and any(inner):
            raise ValueError("the program has a loop of unknown length: its operations cannot be counted")
        else:
            total += sum(inner) * (params["length"] if name == "scan" else 1)
    return total


def _inside(params):
    """The programs in the parameters of an equation."""
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            one = getattr(one, "jaxpr", one)
            if hasattr(one, "eqns"):
                yield one
