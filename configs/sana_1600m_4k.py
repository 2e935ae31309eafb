"""Sana-1.6B at 4K, from the 2K run: the last step of the cascade; positions interpolated, flow shift 6.

Paper: SANA, https://arxiv.org/abs/2410.10629, section 3.1 and appendix B: about 10,000 steps suffice.
Hardware: 64 H200, 4 rows each as published; activations are recomputed.
Cost, an estimate: 10,000 steps x 256 pictures x 190 TFLOP (4 x 16 x 2.97 forward, the fourth for what is
recomputed) at 316 TFLOP/s are 430 H200 hours with cached features; see sana_1600m_512.py.

    python train.py configs/sana_1600m_4k.py workdir=runs/sana_1600m_4k data.source=data/cached_4k
"""

from sana_jax.experiment import derived

config = derived(__file__, "sana_1600m_2k", {
    "init.weights": "runs/sana_1600m_2k",
    "model.sample_size": 128,
    "model.position_scale": 2.0,
    "model.remat": "full",
    "objective.shift": 6.0,
    "data.size": 4096,
    "frozen.dc_ae": "sana-1.6b-4k",
    "frozen.text": "sana-1.6b-4k",
})  # fmt: skip
