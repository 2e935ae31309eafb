"""Sana-1.6B at 2K, from the 1024 px run: the third step of the cascade; the position embedding returns.

Paper: SANA, https://arxiv.org/abs/2410.10629, section 3.1 and appendix B: about 10,000 steps suffice.
Hardware: 64 H200, 4 rows each as published.
Cost, an estimate: 10,000 steps x 256 pictures x 36 TFLOP (3 x 4 x 2.97 forward) at 316 TFLOP/s are 80 H200
hours with cached features; see sana_1600m_512.py.

    python train.py configs/sana_1600m_2k.py workdir=runs/sana_1600m_2k data.source=data/cached_2k
"""

from sana_jax.experiment import derived

config = derived(__file__, "sana_1600m_1024", {
    "init.weights": "runs/sana_1600m_1024",
    "model.sample_size": 64,
    "model.position_scale": 1.0,
    "data.size": 2048,
    "data.batch": 256,
    "steps": 10_000,
    "frozen.dc_ae": "sana-1.6b-2k",
    "frozen.text": "sana-1.6b-2k",
})  # fmt: skip
