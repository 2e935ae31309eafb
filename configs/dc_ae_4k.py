"""DC-AE f32c32 at 4096 px: the latent adapted a last time; see dc_ae_1k.py.

Paper: DC-AE, https://arxiv.org/abs/2410.10733, section 3.3.  Hardware: 8 H200, 1 picture each.
Cost, an estimate: 5,000 steps x 8 pictures x 650 TFLOP (3 x 64 x 3.4 forward) at 316 TFLOP/s are 23 H200 hours.

    python train.py configs/dc_ae_4k.py workdir=runs/dc_ae_4k data.source=data/train
"""

from sana_jax.experiment import derived

config = derived(__file__, "dc_ae_2k", {
    "init.weights": "runs/dc_ae_2k",
    "data.size": 4096,
    "data.batch": 8,
    "steps": 5_000,
})  # fmt: skip
