"""Finds where the first NaN or infinity came from, after the fact.

The fast programs only say that a result is not finite.  These functions run the same computation
again with probes and raise a NonFiniteError that names the stage; none of them returns normally.
"""

import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from sana_jax.errors import NonFiniteError

ADVICE = "the dtype may be too small for this checkpoint: try bfloat16 or float32"


def _check_parameters(what, params):
    for path, leaf in flax.traverse_util.flatten_dict(params, sep="/").items():
        if not bool(jnp.isfinite(leaf).all()):
            raise NonFiniteError(f"{what}: parameter {path} holds NaN or infinity")


def explain_text(gemma2, params, ids, mask):
    """Names the first layer of the text encoder whose output is not finite."""
    _check_parameters("text encoder", params)
    apply = jax.jit(functools.partial(gemma2.apply, mutable=["intermediates"]))
    _, probes = apply({"params": params}, ids, mask)
    absmax = np.asarray(probes["intermediates"]["layers"]["absmax"][0])
    for layer, value in enumerate(absmax):
        if not np.isfinite(value):
            raise NonFiniteError(f"text encoder: layers/{layer} is not finite in {jnp.dtype(gemma2.dtype).name}; {ADVICE}")
    raise NonFiniteError("text encoder: the final norm is not finite; " + ADVICE)


class _Probed:
    """Stands in for a Sana in a sampler: each velocity reports the size of every block's output."""

    def __init__(self, sana, report):
        self.sana, self.report = sana, report

    def __getattr__(self, field):
        return getattr(self.sana, field)

    def apply(self, variables, *args, method):
        if method != "velocity":
            return self.sana.apply(variables, *args, method=method)
        v, probes = self.sana.apply(variables, *args, method=method, mutable=["intermediates"])
        (absmax,) = probes["intermediates"]["blocks"]["absmax"]
        jax.debug.callback(self.report, jnp.append(absmax, jnp.max(jnp.abs(v))), ordered=True)
        return v


def explain_denoise(sana, params, denoise, arguments, static):
    """Names the first sampling step, and the block in it, whose output is not finite.

    `denoise(sana, params, *arguments, **static)` is the computation to repeat.
    """
    _check_parameters("transformer", params)
    reports = []
    probed = _Probed(sana, reports.append)
    latents = jax.jit(lambda p, a: denoise(probed, p, *a, **static))(params, arguments)
    jax.block_until_ready(latents)
    jax.effects_barrier()
    for step, absmax in enumerate(reports):
        bad = np.flatnonzero(~np.isfinite(absmax))
        if bad.size:
            block = "head" if bad[0] == len(absmax) - 1 else f"blocks/{bad[0]}"
            largest = f"; largest finite activation before it {np.max(absmax[: bad[0]], initial=0):.3g}"
            raise NonFiniteError(f"transformer: step {step}, {block} is not finite in {jnp.dtype(sana.dtype).name}{largest}; {ADVICE}")
    raise NonFiniteError("sampler: the latents are not finite although every velocity is; check flow_shift and guidance_scale")


def explain_decode(dc_ae, params, decode, latents):
    """Names the first layer of the decoder whose output is not finite."""
    _check_parameters("autoencoder", params)
    paths = []  # in the order of computation, inner layers before those that hold them

    @jax.jit
    def finite(params, latents):
        flags = []

        def probe(run, args, kwargs, context):
            out = run(*args, **kwargs)
            if context.method_name == "__call__" and isinstance(out, jax.Array):  # not parameters alone
                paths.append("/".join(context.module.path))
                flags.append(jnp.isfinite(out).all())
            return out

        with nn.intercept_methods(probe):
            decode(params, latents)
        return jnp.stack(flags)

    bad = np.flatnonzero(~np.asarray(finite(params, latents)))
    if bad.size:
        name = jnp.dtype(dc_ae.dtype).name
        raise NonFiniteError(f"autoencoder: {paths[bad[0]]} is not finite in {name}; {ADVICE}")
    raise NonFiniteError("autoencoder: the image is not finite although every layer is; " + ADVICE)
