"""DC-AE f32c32 at 1024 px: the second stage, which adapts the latent and leaves pixels alone.

Paper: DC-AE, https://arxiv.org/abs/2410.10733, section 3.3: at high resolution only the encoder's last and the
decoder's first layers move.  Hardware: 8 H200, 8 pictures each.
Cost, an estimate: 20,000 steps x 64 pictures x 41 TFLOP (3 x 4 x 3.4 forward) at 316 TFLOP/s are 46 H200 hours.

    python train.py configs/dc_ae_1k.py workdir=runs/dc_ae_1k data.source=data/train
"""

from sana_jax.experiment import derived

config = derived(__file__, "dc_ae_512", {
    "init.weights": "runs/dc_ae_512",
    "data.size": 1024,
    "data.batch": 64,
    "optim.lr": 2e-5,
    "optim.freeze": (r"encoder/(conv_in|stage_[0-3])/.*", r"decoder/(norm_out|conv_out|stage_[0-3])/.*"),
    "optim.no_decay": (),
    "optim.rule.weight_decay": 0.0,
    "steps": 20_000,
})  # fmt: skip
