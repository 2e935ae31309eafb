"""The rungs in their order, one part in memory at a time."""

import tempfile
import time
from typing import NamedTuple

import jax
import numpy as np

from sana_jax.parity import dc_ae, dit, gemma, peers, solver
from sana_jax.parity.rows import compare, counted


class Result(NamedTuple):
    """Everything that the ladder found; `pictures` are ours and PyTorch's [H W 3] in [0, 1], or None."""

    rows: list
    ranges: list
    ratios: list
    pictures: tuple | None

    @property
    def failed(self):
        """Lines that fail, in the order of the ladder: what stands first is where to look."""
        return [row for row in (*self.rows, *self.ratios) if not row.ok]


def climb(case, device, say=None):
    """Runs the rungs that the case wants; `say` is called with a line of progress."""
    rows, ranges, ratios, pictures = [], [], [], None
    start, highest = time.perf_counter(), lambda: jax.default_matmul_precision("highest")

    def part(name, run, *rungs):
        if not case.wants(*rungs):
            return
        if say:
            say(f"[{time.perf_counter() - start:6.1f} s] {name} ...")
        for found, new in zip((rows, ranges, ratios), run()):
            found += new

    with tempfile.TemporaryDirectory(prefix="sana_jax_parity_") as folder, highest():
        shelf = peers.Shelf(folder)
        part("text encoder", lambda: gemma.run(case, shelf, device), "gemma", "pipeline")
        part("transformer", lambda: dit.run(case, shelf, device), "block", "dit", "pipeline")
        part("autoencoder", lambda: dc_ae.run(case, shelf, device), "dc-ae", "pipeline")
        part("solver", lambda: [solver.rows(case)], "solver")
        if case.wants("pipeline"):
            what = f"pipeline, {counted(case.steps)}"
            rows.append(compare(f"{what}, latent", shelf["our latents"], shelf["latents"], "pipeline", scaled=True))
            rows.append(compare(f"{what}, image", shelf["our picture"], shelf["picture"], "pipeline", scaled=True))
            pictures = tuple(np.array(shelf[name][0]) for name in ("our picture", "picture"))
    if say:
        say(f"[{time.perf_counter() - start:6.1f} s] done")
    return Result(rows, ranges, ratios, pictures)
