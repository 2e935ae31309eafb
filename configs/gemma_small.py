"""A small text encoder of Gemma-2's kind, trained on captions, for a SANA that downloads nothing.

Paper: architecture of Gemma 2, https://arxiv.org/abs/2408.00118; the size and the recipe are ours.  Its
tokenizer is learned from the captions first.  A Sana for it has model.caption_width=512.
Hardware: 1 H200.  Cost, an estimate: 20,000 steps x 512 captions x 77 tokens x 6 x 30 M parameters are 0.14
EFLOP, 15 minutes at 160 TFLOP/s (such narrow products reach half of what wide ones do).

    python train.py configs/gemma_small.py workdir=runs/gemma_small data.source=data/train
"""

from sana_jax.data.folder import Folder
from sana_jax.experiment import Data, Experiment, Optim, Preview
from sana_jax.models.gemma2 import Gemma2
from sana_jax.training.objectives import LanguageModel
from sana_jax.training.optimizer import AdamW

config = Experiment(
    model=Gemma2(
        vocab_size=8192, width=512, depth=8, heads=8, kv_heads=4, head_dim=64, hidden=1536, query_scale=64,
        sliding_window=64, dtype="bf16",
    ),
    objective=LanguageModel(),
    data=Data(Folder("data/train", recursive=True), batch=512, buckets=False, tokens=77),
    optim=Optim(
        AdamW(b2=0.95, eps=1e-8, weight_decay=0.1),
        lr=1e-3, warmup=500, decay="cosine", clip=1.0, no_decay=(r".*norm/scale",),
    ),
    steps=20_000,
    preview=Preview(every=0),
    seed=1,
)  # fmt: skip
