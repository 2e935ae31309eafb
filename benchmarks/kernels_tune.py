"""From measurements to the tables that `pallas_kernels.dispatch` reads: tiles, and rows of `auto`."""

import importlib
import itertools
import json
import math
import pathlib

from benchmarks.kernels_cases import OPS
from pallas_kernels import dispatch

CANDIDATES = ("pallas", "jax_triton")
MANY = 2**40  # tokens: more than the most that were measured are more of the same work
LEAST = {"elements": 4096}  # one row of tiles serves all widths of a model family, up to this one
MOST = {"warps": 16}
GAIN = 1.02  # what a tile has to be faster by, to be worth a change


def table(name):
    """The tiles.json of a folder of pallas_kernels, as this process has it."""
    return dispatch.table(importlib.import_module(f"pallas_kernels.{name}").FOLDER)


def has_tiles(folder, device, dtype, width):
    """Whether the table has tiles of this very card."""
    return str(width) in table(folder)["tiles"].get(device, {}).get(dtype, {})


def install(op, device, dtype, width, tiles):
    """Makes `tiles` those that this process compiles with on the device."""
    table(OPS[op].folder)["tiles"].setdefault(device, {}).setdefault(dtype, {})[str(width)] = tiles


def neighbours(tile):
    """Tiles that differ from this one in one number: twice or half of it, or one stage more or less."""
    for name, value in tile.items():
        for other in (value + 1, value - 1) if name == "stages" else (value * 2, value // 2):
            if LEAST.get(name, 1) <= other <= MOST.get(name, other):
                yield {**tile, name: other}


def climb(tiles, measure, left):
    """The best tiles found, by going from each pass's tile to a better neighbour until there is none.

    Args:
      tiles: {pass: tile} to start from.
      measure: {pass: tile} -> a row with "us" if it is right; anything else does not count.
      left: () -> whether there is time for another.
    Returns:
      ({pass: tile}, the rows of all that were tried, whether nothing was left to try).
    """
    def tried(pass_, tile):
        row = {"pass": pass_, "tile": tile} | measure({**best, pass_: tile})
        rows.append(row)
        return row["us"] if row.get("right") else math.inf

    rows, best = [], dict(tiles)
    least = None
    for pass_ in tiles:
        if not left():
            return best, rows, False
        least, better, seen = tried(pass_, best[pass_]) if least is None else least, True, [best[pass_]]
        while better:
            better = False
            for tile in neighbours(best[pass_]):
                if tile in seen:
                    continue
                if not left():
                    return best, rows, False
                seen.append(tile)
                if (us := tried(pass_, tile)) * GAIN < least:
                    best[pass_], least, better = tile, us, True
                    break
    return best, rows, True


def winner(rows, ops):
    """{"implementation", "speedup", "error", "bound"} of the kernel to take at one size, or None.

    rows: measured at that size.  ops: the operations that a row of `auto` would speak for; a kernel has to be
    right in all of them and faster than "xla" in each pass.  Its error is the one that is worst for its bound.
    """
    at = {(row["op"], row["implementation"]): row for row in rows}
    found = []
    for name in CANDIDATES:
        pairs = [(at.get((op, name), {}), at.get((op, "xla"), {})) for op in ops]
        if all(a.get("right") and b.get("right") for a, b in pairs):
            speedup = min(b[us] / a[us] for a, b in pairs for us in ("forward_us", "both_us"))
            errors = [(a[f"{of}_error"], a[f"{of}_bound"]) for a, _ in pairs for of in ("forward", "gradient")]
            error, bound = max(errors, key=lambda pair: pair[0] / pair[1])
            found.append(dict(implementation=name, speedup=round(speedup, 3), error=error, bound=bound))
    best = max(found, key=lambda row: row["speedup"], default=None)
    return best if best and best["speedup"] > 1 else None


def auto_rows(rows, device, dtype):
    """{folder: rows of `auto`}: a row for each run of neighbouring tokens at which one kernel wins.

    rows: of `benchmarks.kernels`; each has "auto", the sizes that the operation chooses by.
    """
    found, widths = {OPS[row["op"]].folder: [] for row in rows}, {}
    for row in rows:
        others = tuple((name, size) for name, size in row["auto"].items() if name != "tokens")
        widths.setdefault((OPS[row["op"]].name, others), []).append(row)
    for (name, _), of_width in widths.items():
        ops = [op for op in OPS if OPS[op].name == name]
        of_width.sort(key=lambda row: row["tokens"])
        by_size = [list(group) for _, group in itertools.groupby(of_width, lambda row: row["tokens"])]
        won = [(winner(group, ops), group[0]["auto"]) for group in by_size]
        for kernel, run in itertools.groupby(won, lambda entry: entry[0] and entry[0]["implementation"]):
            if kernel:
                best, sizes = zip(*run)
                where = {key: [sizes[0][key], sizes[-1][key]] for key in sizes[0]}
                if sizes[-1] == won[-1][1]:
                    where["tokens"][1] = MANY
                worst = max(best, key=lambda row: row["error"] / row["bound"])
                numbers = dict(error=worst["error"], bound=worst["bound"], speedup=min(b["speedup"] for b in best))
                row = dict(device=device, dtype=dtype, implementation=kernel, where=where)
                found[OPS[ops[0]].folder].append(row | numbers)
    return found


def write(output, folders, rows, device, dtype):
    """Writes output/tiles/<folder>.json for each of the folders, to replace its tiles.json.

    Tiles are those in force; of the rows of `auto` those of this device, type and sizes are replaced.
    """
    output = pathlib.Path(output, "tiles")
    output.mkdir(parents=True, exist_ok=True)
    found = auto_rows(rows, device, dtype)
    for name in folders:
        measured = [dict(row["auto"]) for row in rows if OPS[row["op"]].folder == name]
        given = table(name)
        kept = [
            row for row in given["auto"]
            if (row["device"], row["dtype"]) != (device, dtype)
            or not any(all(low <= sizes[k] <= high for k, (low, high) in row["where"].items()) for sizes in measured)
        ]  # fmt: skip
        text = json.dumps({"tiles": given["tiles"], "auto": kept + found.get(name, [])}, indent=1)
        (output / f"{name}.json").write_text(text + "\n", encoding="utf-8")
