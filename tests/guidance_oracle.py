"""Guidance written out plainly around diffusers' own transformer and schedulers.

One pass of the network for each branch, no batch of branches, no processors that split one: what
`sana_jax.sampling.guidance` and `sana_jax.programs.denoise` must agree with.
"""

import contextlib

import numpy as np

from tests.toy_pipeline import torch_latents


class _Identity:
    """Self-attention in which each token attends to itself alone."""

    def __call__(self, attn, hidden_states, **_):
        return attn.to_out[0](attn.to_v(hidden_states))


@contextlib.contextmanager
def without_attention(transformer, layers):
    blocks = [transformer.transformer_blocks[i] for i in layers]
    processors = [block.attn1.processor for block in blocks]
    for block in blocks:
        block.attn1.set_processor(_Identity())
    yield
    for block, processor in zip(blocks, processors):
        block.attn1.set_processor(processor)


def guided_latents(
    transformer, scheduler, texts, latents, steps, *, scale=4.5, interval=None, pag_scale=0.0,
    pag_layers=(), decay=0.0,
):  # fmt: skip
    """Latents [b h w c]; texts are (states, mask, negative states, negative mask), as torch tensors.

    A negative `pag_scale` guides towards the perturbed network, as a swapped sign would.
    """
    import torch

    states, mask, negative_states, negative_mask = texts
    scheduler.set_timesteps(steps)
    x = torch_latents(latents)

    def network(states, mask):
        times = t.float().expand(len(x))
        return transformer(x, encoder_hidden_states=states, encoder_attention_mask=mask, timestep=times).sample

    with torch.no_grad():
        for k, t in enumerate(scheduler.timesteps):
            inside = interval is None or interval[0] < float(scheduler.sigmas[k]) < interval[1]
            v = conditional = network(states, mask)
            if inside and scale > 1:
                unconditional = network(negative_states, negative_mask)
                v = unconditional + scale * (conditional - unconditional)
            if inside and pag_scale != 0:
                with without_attention(transformer, pag_layers):
                    perturbed = network(states, mask)
                strength = max(abs(pag_scale) - decay * (1000 - float(t)), 0)
                v = v + np.sign(pag_scale) * strength * (conditional - perturbed)
            x = scheduler.step(v, t, x).prev_sample
    return np.moveaxis(x.numpy(), 1, -1)


def peer_scheduler(sampler):
    """A scheduler of diffusers for one of our samplers."""
    from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

    if sampler == "flow-euler":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, prediction_type="flow_prediction",
        use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero",
    )  # fmt: skip
