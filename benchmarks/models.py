"""The models that the benchmarks run, ours and the peers', in full and in toy size, random weights.

Not a script.  Ours come as (module, params) in bfloat16; the peers' are diffusers' and transformers'
own classes, built directly on the device.
"""

import dataclasses
import functools

FLOW_SHIFT, GUIDANCE, STEPS = 3.0, 4.5, 20


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the end-to-end matrix: `length` caption tokens, `size` pixels a side."""

    model: str
    size: int
    batch: int = 1
    length: int = 300


# Milliseconds at 790 TFLOP/s in bfloat16, batch 1, from the operation counts: one step of the guided
# pair with 300 tokens, keys and values of the text computed in every step; a decode; a text.
STEP_FLOOR = {
    ("0.6B", 512): 0.80, ("0.6B", 1024): 2.84, ("0.6B", 2048): 11.0,
    ("1.6B", 512): 2.12, ("1.6B", 1024): 7.51, ("1.6B", 2048): 29.1,
}  # fmt: skip
DECODE_FLOOR = {512: 2.65, 1024: 10.6, 2048: 42.4}
TEXT_FLOOR = {300: 1.55, 504: 2.62}


def floor(case, part):
    """The bf16 floor of a part in milliseconds, or None where there is no figure."""
    step, decode = STEP_FLOOR.get((case.model, case.size)), DECODE_FLOOR.get(case.size)
    if part == "decode":
        return decode and case.batch * decode
    if step is None or decode is None:
        return None
    return case.batch * (STEPS * step + (decode if part == "total" else 0))


@functools.cache
def modules(smoke):
    """{name: module} of ours in bfloat16."""
    import jax.numpy as jnp

    from sana_jax.models.dc_ae import DC_AE_F32C32_SANA, DCAE
    from sana_jax.models.gemma2 import GEMMA2_2B, Gemma2
    from sana_jax.models.sana import SANA_600M, SANA_1600M, Sana

    found = {"0.6B": SANA_600M, "1.6B": SANA_1600M, "dc_ae": DC_AE_F32C32_SANA, "gemma2": GEMMA2_2B}
    if smoke:
        toy = Sana(width=64, depth=2, heads=2, cross_heads=4, caption_width=32)
        gemma2 = Gemma2(64, 32, 2, 4, 2, 8, 48)
        dc_ae = DCAE(widths=(16, 16, 32, 32, 64, 64), encoder_depths=(1,) * 6, decoder_depths=(1,) * 6)
        found = {"0.6B": toy, "1.6B": toy.clone(depth=3), "dc_ae": dc_ae, "gemma2": gemma2}
    types = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    return {name: module.clone(**types) for name, module in found.items()}


def peer_config(name, smoke):
    """Arguments of the peer's class (or of Gemma2Config) for one of `modules`."""
    from sana_jax.saving import component_config

    config = component_config(modules(smoke)[name])
    return {k: v for k, v in config.items() if k[0] != "_" and k not in ("architectures", "model_type")}


def torch_device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def build(make, seed=0, dtype=None):
    """make() on the device with random weights at the scale of trained ones, in `dtype` (bfloat16)."""
    import torch

    with torch.device(torch_device()):
        module = make()
    generator = torch.Generator(torch_device()).manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.named_parameters():
            if name.endswith("weight") and tensor.ndim >= 2:
                scale = tensor[0].numel() ** -0.5 if "embed_tokens" not in name else 0.02
                tensor.normal_(0, scale, generator=generator)
            elif name.endswith("weight"):
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator, device=tensor.device))
            else:
                tensor.normal_(0, 0.02, generator=generator)
    return module.to(dtype or torch.bfloat16).eval().requires_grad_(False)


def make_scheduler():
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, prediction_type="flow_prediction",
        use_flow_sigmas=True, flow_shift=FLOW_SHIFT, final_sigmas_type="zero",
    )  # fmt: skip
