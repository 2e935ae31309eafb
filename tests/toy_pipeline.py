"""A SanaPipeline of diffusers' own classes, toy-sized, with random weights that do something.

Random weights of an untrained network make a guided velocity of size 1e-2 that forgets its text.
Here they are scaled so that the output is of order 1 and depends on text, time and mask: the parity
tests check that before they compare anything.
"""

import dataclasses

import numpy as np

from tests.peers import randomise
from tests.toy_tokenizer import VOCAB_SIZE, make_tokenizer

CAPTION = 64
TRANSFORMER = dict(
    in_channels=32, out_channels=32, num_attention_heads=2, attention_head_dim=32, num_layers=3,
    num_cross_attention_heads=4, cross_attention_head_dim=16, cross_attention_dim=64,
    caption_channels=CAPTION, mlp_ratio=2.5, sample_size=16, patch_size=1,
)  # fmt: skip
WIDTHS = [16, 16, 32, 32, 64, 64]
DC_AE = dict(
    in_channels=3, latent_channels=32, attention_head_dim=32, scaling_factor=0.41407,
    encoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    decoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    encoder_block_out_channels=WIDTHS, decoder_block_out_channels=WIDTHS,
    encoder_layers_per_block=[1] * 6, decoder_layers_per_block=[1] * 6,
    encoder_qkv_multiscales=[[], [], [], [5], [5], [5]], decoder_qkv_multiscales=[[], [], [], [5], [5], [5]],
    downsample_block_type="Conv", upsample_block_type="interpolate",
)  # fmt: skip
GEMMA2 = dict(
    vocab_size=VOCAB_SIZE, hidden_size=CAPTION, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16,
    attn_implementation="eager", bos_token_id=2, eos_token_id=1, pad_token_id=0,
)  # fmt: skip


VARIANTS = {  # structures of the published transformers, as changes to TRANSFORMER
    "1.0": {},
    "1.5": dict(qk_norm="rms_norm_across_heads"),
    "4K": dict(interpolation_scale=2.0, sample_size=8),
    "sprint": dict(qk_norm="rms_norm_across_heads", guidance_embeds=True),
}


def transformer_case(height=7, width=5, batch=2, tokens=9, seed=0, guidance=False, caption=CAPTION):
    """Odd, non-square, with one padded caption, one integer and one fractional time."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, tokens), bool)
    mask[-1, 3:] = False
    case = {
        "x": rng.normal(size=(batch, height, width, 32)).astype("f"),
        "t": np.resize(np.float32([999, 136.25, 499]), batch),
        "states": rng.normal(size=(batch, tokens, caption)).astype("f"),
        "mask": mask,
    }
    return case | ({"guidance": np.resize(np.float32([0.45, 0.2]), batch)} if guidance else {})


def run_transformer(module, x, t, states, mask, guidance=None):
    """diffusers' transformer on NHWC numpy arrays, float32 out whatever its dtype."""
    import torch

    dtype = next(module.parameters()).dtype
    x, states = (torch.tensor(a).to(dtype) for a in (np.moveaxis(x, -1, 1), states))
    mask, t = torch.tensor(mask.astype("int64")), torch.tensor(t)
    extra = {} if guidance is None else {"guidance": torch.tensor(guidance)}
    out = module(x, states, t, encoder_attention_mask=mask, **extra).sample
    return np.moveaxis(out.float().numpy(), 1, -1)


def config_of(module):
    """Arguments of the peer class for one of our modules, as its config.json would hold them."""
    from sana_jax.saving import component_config

    return {k: v for k, v in component_config(module).items() if not k.startswith("_")}


def make_transformer(seed=1, **changes):
    from diffusers import SanaTransformer2DModel

    return randomise(SanaTransformer2DModel(**(TRANSFORMER | changes)), seed, gain=1.0)


def make_dc_ae(seed=2, **changes):
    from diffusers import AutoencoderDC

    return randomise(AutoencoderDC(**(DC_AE | changes)), seed, gain=1.0)


def make_gemma2(seed=3, **changes):
    from transformers import Gemma2Config, Gemma2Model

    return randomise(Gemma2Model(Gemma2Config(**(GEMMA2 | changes))), seed, gain=1.0)


def make_pipeline(sample_size=16, flow_shift=3.0):
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", solver_order=2, prediction_type="flow_prediction",
        use_flow_sigmas=True, flow_shift=flow_shift, final_sigmas_type="zero",
    )  # fmt: skip
    return SanaPipeline(
        tokenizer=make_tokenizer(), text_encoder=make_gemma2(), vae=make_dc_ae(),
        transformer=make_transformer(sample_size=sample_size), scheduler=scheduler,
    )  # fmt: skip


def load_peer(folder):
    """diffusers' pipeline from a folder, quiet, and with Gemma's soft-capped attention.

    Some transformers load Gemma-2 with SDPA, which drops the cap: 3e-3 in these states.
    """
    from diffusers import SanaPipeline

    pipeline = SanaPipeline.from_pretrained(folder)
    pipeline.text_encoder.set_attn_implementation("eager")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclasses.dataclass(frozen=True)
class Rectangle:
    """A picture size in pixels and the noise that fits it."""

    height: int
    width: int

    def noise(self, count, seed=0):
        shape = (count, self.height // 32, self.width // 32, 32)
        return np.random.default_rng(seed).normal(size=shape).astype("f")


def torch_latents(latents):
    import torch

    return torch.tensor(np.moveaxis(latents, -1, 1))


def nvlabs_transformer(transformer):
    """A copy of diffusers' transformer with NVlabs' constants: eps 1e-8, a clip, truncated times."""
    import copy

    import torch

    class Attention:
        def __call__(self, attn, hidden_states, **_):
            b, n, d = hidden_states.shape
            q, k, v = (f(hidden_states).reshape(b, n, -1, 32) for f in (attn.to_q, attn.to_k, attn.to_v))
            q, k = q.relu(), k.relu()
            out = torch.einsum("bnhc,bmhc,bmhe->bnhe", q, k, v)
            out = out / (torch.einsum("bnhc,bmhc->bnh", q, k)[..., None] + 1e-8)
            return attn.to_out[0](out.reshape(b, n, d)).clip(-65504, 65504)

    transformer = copy.deepcopy(transformer)
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(Attention())
    forward = transformer.forward
    transformer.forward = lambda *a, timestep, **k: forward(*a, timestep=timestep.long().float(), **k)
    return transformer


def nvlabs_oracle(pipeline, instruction, prompts, negative, latents, steps, sampler):
    """Latents that NVlabs' stack would give, from diffusers' modules with its habits substituted.

    The prompt keeps its case and loses its flags, both halves attend with the prompt's mask, the
    linear attention's eps is 1e-8 and times are truncated (docs/numerics.md 1.5, 4.5, 6).
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

    transformer = nvlabs_transformer(pipeline.transformer)
    parts = pipeline.components | {"transformer": transformer}
    if sampler == "flow-euler":
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler(shift=3.0)
    oracle = SanaPipeline(**parts)
    oracle.set_progress_bar_config(disable=True)
    oracle._text_preprocessing = lambda texts, clean_caption=False: [t.split("--ar")[0].strip() for t in texts]

    states, mask, negative_states, _ = oracle.encode_prompt(
        prompts, negative_prompt=negative, complex_human_instruction=instruction.split("\n")
    )
    return np.moveaxis(
        oracle(
            prompt_embeds=states, prompt_attention_mask=mask, negative_prompt=None,
            negative_prompt_embeds=negative_states, negative_prompt_attention_mask=mask,
            latents=torch_latents(latents), num_inference_steps=steps, output_type="latent",
            height=32 * latents.shape[1], width=32 * latents.shape[2], use_resolution_binning=False,
        ).images.numpy(),
        1,
        -1,
    )  # fmt: skip


def make_sprint_pipeline(kind="SanaSprintPipeline"):
    """diffusers' SANA-Sprint pipeline, or its img2img one, on the toy parts."""
    import diffusers

    transformer = make_transformer(sample_size=32, **VARIANTS["sprint"])
    pipeline = getattr(diffusers, kind)(
        tokenizer=make_tokenizer(), text_encoder=make_gemma2(), vae=make_dc_ae(),
        transformer=transformer, scheduler=diffusers.SCMScheduler(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def feed_noise(monkeypatch, *arrays):
    """Every noise that diffusers' Sprint pipelines draw from now on is the next of these, NHWC.

    Returns the list of what is left of them.
    """
    from diffusers.pipelines.sana import pipeline_sana_sprint, pipeline_sana_sprint_img2img
    from diffusers.schedulers import scheduling_scm

    queue = [torch_latents(array) for array in arrays]

    def draw(shape, **_):
        assert queue[0].shape == tuple(shape)
        return queue.pop(0)

    for module in (pipeline_sana_sprint, pipeline_sana_sprint_img2img, scheduling_scm):
        monkeypatch.setattr(module, "randn_tensor", draw)
    return queue


def make_pag_pipeline(pipeline, layers, **changes):
    """diffusers' SanaPAGPipeline of another pipeline's parts, some of them changed."""
    from diffusers import SanaPAGPipeline

    peer = SanaPAGPipeline(
        **pipeline.components | changes, pag_applied_layers=[f"transformer_blocks.{i}" for i in layers]
    )
    peer.set_progress_bar_config(disable=True)
    return peer
