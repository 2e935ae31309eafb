"""DC-AE f32c32 at 2048 px: the latent adapted once more; see dc_ae_1k.py.

Paper: DC-AE, https://arxiv.org/abs/2410.10733, section 3.3.  Hardware: 8 H200, 2 pictures each.
Cost, an estimate: 10,000 steps x 16 pictures x 163 TFLOP (3 x 16 x 3.4 forward) at 316 TFLOP/s are 23 H200 hours.

    python train.py configs/dc_ae_2k.py workdir=runs/dc_ae_2k data.source=data/train
"""

from sana_jax.experiment import derived

config = derived(__file__, "dc_ae_1k", {
    "init.weights": "runs/dc_ae_1k",
    "data.size": 2048,
    "data.batch": 16,
    "steps": 10_000,
})  # fmt: skip
