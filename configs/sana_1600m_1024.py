"""Sana-1.6B at 1024 px, from the 512 px run: the second step of the cascade.

Paper: SANA, https://arxiv.org/abs/2410.10629, section 3.1; batch size and number of steps were not published.
Hardware: 32 H200, 32 rows each; on 8 of them optim.accumulate=4.
Cost, an estimate: 100,000 steps x 1024 pictures x 8.9 TFLOP (3 x 2.97 forward) at 316 TFLOP/s are 800 H200
hours with cached features; see sana_1600m_512.py.

    python train.py configs/sana_1600m_1024.py workdir=runs/sana_1600m_1024 data.source=data/cached_1024
"""

from sana_jax.experiment import derived

config = derived(__file__, "sana_1600m_512", {
    "init.weights": "runs/sana_1600m_512",
    "model.sample_size": 32,
    "data.size": 1024,
    "steps": 100_000,
    "frozen.dc_ae": "sana-1.6b",
    "frozen.text": "sana-1.6b",
})  # fmt: skip
