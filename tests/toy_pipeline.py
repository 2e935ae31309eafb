"""A SanaPipeline of diffusers' own classes, toy-sized, with random weights that do something.

Random weights of an untrained network make a guided velocity of size 1e-2 that forgets its text.
Here they are scaled so that the output is of order 1 and depends on text, time and mask: the parity
tests check that before they compare anything.
"""

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
