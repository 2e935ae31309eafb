"""The published Sana-1.6B on your own pictures, at 1024 px.

Paper: rate and number of steps are those of SANA-1.5's last stage, https://arxiv.org/abs/2501.18427.
Hardware: 1 H200, 32 rows; on a smaller GPU optim.accumulate=8.
Cost, an estimate: 10,000 steps x 32 pictures x 8.9 TFLOP (3 x 2.97 forward) at 316 TFLOP/s are 2.5 hours with
cached features, 4.5 with live ones.

    python train.py configs/sana_1600m_1024_finetune.py workdir=runs/mine data.source=data/mine
"""

from sana_jax.experiment import derived

config = derived(__file__, "sana_1600m_1024", {
    "init.weights": "sana-1.6b",
    "data.batch": 32,
    "optim.lr": 2e-5,
    "optim.lr_rule": "none",
    "optim.warmup": 500,
    "optim.ema": 0.999,
    "steps": 10_000,
})  # fmt: skip
