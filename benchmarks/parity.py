"""Measures how far every part is from its PyTorch original and writes docs/parity.md.

    python -m benchmarks.parity [--full]   # needs the extras `parity` and `test`; CPU, a few minutes

With --full also the 0.6B and 1.6B transformers and the DC-AE in their published sizes (16 GB).

Peers are built by diffusers' and transformers' own classes with random weights (tests/peers.py);
float32 at highest matmul precision.  The bounds are those that the tests hold.  The same for a
checkpoint on disk: `python -m sana_jax.parity`.
"""

import argparse
import datetime
import importlib.metadata
import os
import pathlib
import platform
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import torch

from benchmarks import parity_parts, parity_pictures
from sana_jax.parity.report import PACKAGES
from sana_jax.parity.rows import COLUMNS, RATIO
from tests import toy_pipeline

jax.config.update("jax_default_matmul_precision", "highest")

HEAD = """# Parity with PyTorch

Written by `python -m benchmarks.parity`; do not edit.  {date}, {machine}, {versions}.

## float32

Peers of the original classes with random weights, toy-sized unless it says otherwise, highest matmul
precision, on a CPU.  Errors are absolute; where a name ends in *, they are divided by max(1, rms, largest / 64)
of their channel in the reference, as `python -m sana_jax.parity` does.

{columns}
{float32}
{full}
## bfloat16

rms error against the float32 result of the PyTorch module, mean over {seeds} inputs.

| what | ours | PyTorch's bfloat16 | ratio (bound {ratio}) | |
|---|---|---|---|---|
{bfloat16}

Real published checkpoints have not been compared: none could be had where this was measured.
`python -m sana_jax.parity MODEL` compares one that you have.
"""

FULL = """
The DC-AE in published size has weights of gain 0.5, which give latents about as large as published ones
(rms 1 / 0.41407 = 2.4). With gain 1 (rms 8.9) the latents differed by 1.2e-4 and missed the bound;
docs/log.md compares both sides with float64 there.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("docs/parity.md"))
    parser.add_argument("--full", action="store_true", help="published sizes too; needs 16 GB")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        toy_pipeline.make_pipeline().save_pretrained(f"{folder}/flow")
        rows = [
            *parity_parts.toy_rows(),
            *parity_pictures.solver_rows(),
            *parity_pictures.flow_rows(f"{folder}/flow"),
            *parity_pictures.sprint_rows(f"{folder}/sprint"),
        ]
    rows += parity_parts.full_rows() if args.full else []
    seeds = 6
    ratios = list(parity_parts.bfloat16_ratios(seeds))
    page = HEAD.format(
        date=datetime.date.today().isoformat(),
        machine=f"{platform.machine()} CPU, Python {platform.python_version()}",
        versions=", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES),
        columns=COLUMNS,
        float32="\n".join(row.markdown() for row in rows),
        full=FULL if args.full else "",
        ratio=RATIO,
        bfloat16="\n".join(ratio.markdown() for ratio in ratios),
        seeds=seeds,
    )
    args.output.write_text(page, encoding="utf-8")
    print(page)
    return 0 if all(line.ok for line in (*rows, *ratios)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
