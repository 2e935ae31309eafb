"""The loader against PyTorch's DataLoader: rows a second from folder, tar and cached features.

    python -m benchmarks.data --output DIR [--workers 2] [--records 512] [--rounds 5] [--smoke]

Both sides read the same records with the same reader, decode them with the same function to 512 x 512
and choose captions by the same rule, in the same number of worker processes of one thread each.  What
differs is what a loader is: order, batches, and the way to the parent.  Torch's side is a map-style
dataset with its own shuffling sampler and its default collation, with the cached states padded row by
row.  Sides take turns within a round, the figures are medians of the rounds, timed once the consumer
waits for every batch.  The time of all processors for a row says the same on a machine that is busy
with other things.  Neither side touches an accelerator.

Pictures are JPEGs of 768 x 576, of smooth noise (about as many bytes as a photograph); cached rows are
latents [16 16 32] and states [n 2304] of 20 to 220 tokens in float16.  Needs the extra `parity`.
The exit status is 1 if a ratio is below its bound: 0.95 where decoding is the limit, 1 for cached rows.
"""

import argparse
import collections
import multiprocessing
import os
import pathlib
import statistics
import sys
import tempfile
import time

from benchmarks import environment
from benchmarks.data_rows import SIZE, TOKENS, Rows, Texts, make

COLUMNS = ("source", "workers", "batch", "ours_per_s", "torch_per_s", "ratio", "bound", "ours_cpu_ms", "torch_cpu_ms", "ok")
BOUNDS = {"folder": 0.95, "tar": 0.95, "cached": 1.0}


def ours(source, batch, workers, count):
    """Batches of the loader."""
    from sana_jax.data.loader import Loader
    from sana_jax.experiment import Data

    data = Data(source, batch, SIZE, buckets=False, tokens=TOKENS, workers=workers, threads=1, buffer=2 * workers)
    return Loader(source.open(), data, tokenize=Texts())


def torchs(source, batch, workers, count):
    """`count` batches of torch.utils.data.DataLoader."""
    import torch

    dataset = Rows(source.open())
    sampler = torch.utils.data.RandomSampler(dataset, num_samples=count * batch, replacement=True)
    loader = torch.utils.data.DataLoader(
        dataset, batch, sampler=sampler, num_workers=workers, prefetch_factor=2, multiprocessing_context="spawn"
    )
    return iter(loader)


def cpu_seconds():
    """Of this process and its workers, so far."""
    ticks = 0
    for pid in ["self", *(process.pid for process in multiprocessing.active_children())]:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def rate(make, source, batch, workers, count):
    """(rows a second of `count` batches, milliseconds of all processors for a row)."""
    skip = 2 * workers + 2
    batches = make(source, batch, workers, skip + count + 4 * workers)  # no worker may be idle at the end
    for _ in range(skip):
        next(batches)
    begin, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(count):
        found = next(batches)
    seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    assert len(found["image" if "image" in found else "latent"]) == batch
    if make is ours:
        batches.close()
    else:  # torch's workers are at times aborted, with a message, unless they come to their end
        collections.deque(batches, maxlen=0)
    return batch * count / seconds, 1e3 * cpu / (batch * count)


def compare(name, source, options):
    """One row of the table."""
    batch, workers, count = options.batch, options.workers, options.batches[name]
    sides = {"ours": ours, "torch": torchs}
    found = {side: [] for side in sides}
    for turn in range(options.rounds):
        for side in list(sides)[:: 1 if turn % 2 else -1]:  # who is first changes
            found[side].append(rate(sides[side], source, batch, workers, count))
    rows, cpu = ({side: statistics.median(pair[i] for pair in found[side]) for side in sides} for i in (0, 1))
    ratio = rows["ours"] / rows["torch"]
    return {
        **{f"{side}_per_s": round(rows[side], 1) for side in sides},
        **{f"{side}_cpu_ms": round(cpu[side], 2) for side in sides},
        "ratio": round(ratio, 3),
        "bound": BOUNDS[name],
        "ok": ratio >= BOUNDS[name],
        "rounds": {side: [round(pair[0], 1) for pair in found[side]] for side in sides},
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--records", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sources", default="folder,tar,cached")
    parser.add_argument("--smoke", action="store_true", help="a few records, to check the script")
    options = parser.parse_args(arguments)
    options.batches = {"folder": 24, "tar": 24, "cached": 100}
    if options.smoke:
        options.batch, options.records, options.rounds, options.workers = 4, 12, 1, 1
        options.batches = dict.fromkeys(BOUNDS, 2)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.output.mkdir(parents=True, exist_ok=True) or options.output) as folder:
        sources = make(pathlib.Path(folder), options.records)
        for name in options.sources.split(","):
            row = {"source": name, "workers": options.workers, "batch": options.batch}
            rows.append(environment.attempt(row, lambda: compare(name, sources[name], options)))
            environment.write_result(options.output / "data.json", rows)
    print(environment.table(rows, COLUMNS + ("error",)))
    return 0 if options.smoke else int(not all(row.get("ok") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
