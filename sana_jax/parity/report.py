"""The page, the JSON and the picture of one run."""

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import platform
import tempfile

import jax
import numpy as np

from sana_jax.errors import InputError
from sana_jax.parity.rows import COLUMNS, FLOAT16_MAX, RATIO, ROUNDINGS, WIDEST

PACKAGES = ("jax", "flax", "torch", "diffusers", "transformers")
GAIN = 32  # of the difference in the picture
BAR = 18  # pixels of the labels

PAGE = """# Parity of {model}

Written by `python -m sana_jax.parity`.  {date}, {machine}, {versions}.
PyTorch on {torch_device}, JAX on {jax_device}; weights stored as {stored}; reference: {reference}.

## float32

Both sides in float32 at highest precision, on the same weights.  Layers, blocks and stages are each
given the input that PyTorch's had, so a line fails for its own weights alone.  Lines of weights count the
tensors that are not the same bit by bit, also where no output would show it.  The picture is {width} x
{height}, {sampler}, guidance {guidance}, from the same noise; the prompt is {prompt!r}, its instruction: {instruction}.

Bounds are those of docs/parity.md.  An error is divided by max(1, rms, largest / 64) of its channel in the
reference: sums round by their rms, a single large value M by M 2^-24; solver and tokens are not divided.
A layer that makes much of the last bit of its input is allowed as much: {roundings} times what PyTorch's own
output moves by when each input value moves to a neighbour, up to {widest} times the plain bound.  Where that
is more than the plain bound, the line says "widened".

{columns}
{rows}
{ratios}{ranges}
{verdict}
"""

RATIOS = """
## bfloat16

rms error against the float32 result of PyTorch.

| what | ours | PyTorch's bfloat16 | ratio (bound {bound}) | |
|---|---|---|---|---|
{lines}
"""

RANGES = """
## Activations

Largest absolute outputs in float32, of the transformer's blocks at the three times of its lines.  float16
ends at {limit:g}{clamp}.

| what | diffusers | ours | rms | self-attention's output | |
|---|---|---|---|---|---|
{lines}
"""

CLAMP = (
    "; for this checkpoint, which is stored in it, diffusers clips what self-attention hands on there when it runs\n"
    "in float16.  Neither side here does, being float32: where blocks leave\nthe range, float16 paints something else"
)


def environment():
    """(machine, versions) in words."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    return f"{platform.machine()}, Python {platform.python_version()}", versions


def verdict(result):
    """The last line: ok, or what fails, first things first."""
    lines = len(result.rows) + len(result.ratios)
    if not result.failed:
        widened = sum(row.widened for row in result.rows)
        return f"PARITY: ok, {lines} lines" + f", {widened} of them by a widened bound" * bool(widened)
    names = [row.name for row in result.failed]
    more = f", then: {'; '.join(names[1:6])}{'; ...' if len(names) > 6 else ''}" if names[1:] else ""
    return f"PARITY: FAILS in {len(names)} of {lines} lines; first: {names[0]}{more}"


def markdown(case, result, torch_device):
    """The whole page."""
    machine, versions = environment()
    ratios = ranges = ""
    if result.ratios:
        ratios = RATIOS.format(bound=RATIO, lines="\n".join(r.markdown() for r in result.ratios))
    if result.ranges:
        clamp = CLAMP if "F16" in case.stored["transformer"] else ""
        lines = "\n".join(r.markdown() for r in result.ranges)
        ranges = RANGES.format(limit=FLOAT16_MAX, clamp=clamp, lines=lines)
    return PAGE.format(
        model=case.model.name,
        date=datetime.date.today().isoformat(),
        machine=machine,
        versions=versions,
        torch_device=torch_device,
        jax_device=jax.devices()[0].device_kind,
        stored=", ".join(f"{part} {'/'.join(kinds)}" for part, kinds in case.stored.items()),
        reference="the same folder" if case.reference == case.model else case.reference,
        height=case.size[0],
        width=case.size[1],
        sampler=case.sampler,
        guidance=case.guidance,
        prompt=case.prompt,
        instruction=case.instruction.source,
        roundings=ROUNDINGS,
        widest=WIDEST,
        columns=COLUMNS,
        rows="\n".join(row.markdown() for row in result.rows),
        ratios=ratios,
        ranges=ranges,
        verdict=verdict(result),
    )


def entries(lines):
    """Dataclasses as dicts that JSON can hold: it has neither NaN nor infinity."""

    def number(value):
        return repr(value) if isinstance(value, float) and not np.isfinite(value) else value

    return [{key: number(value) for key, value in dataclasses.asdict(line).items()} for line in lines]


def as_json(case, result, torch_device):
    """The same as one JSON text."""

    machine, versions = environment()
    return json.dumps(
        {
            "date": datetime.date.today().isoformat(),
            "machine": machine,
            "versions": versions,
            "torch_device": torch_device,
            "jax_device": jax.devices()[0].device_kind,
            "model": str(case.model),
            "reference": str(case.reference),
            "stored": case.stored,
            "size": case.size,
            "steps": case.steps,
            "sampler": case.sampler,
            "prompt": case.prompt,
            "instruction_sha256": case.instruction.sha256,
            "float32": [entry | {"ok": row.ok} for entry, row in zip(entries(result.rows), result.rows)],
            "bfloat16": [entry | {"ok": row.ok} for entry, row in zip(entries(result.ratios), result.ratios)],
            "activations": [entry | {"remark": r.remark} for entry, r in zip(entries(result.ranges), result.ranges)],
            "ok": not result.failed,
            "verdict": verdict(result),
        },
        indent=1,
        allow_nan=False,
    )


def side_by_side(ours, theirs):
    """A picture: ours, diffusers', and their difference times GAIN, under labels."""
    from PIL import Image, ImageDraw

    panels = {"sana_jax": ours, "diffusers": theirs, f"difference x {GAIN}": np.abs(ours - theirs) * GAIN}
    height, width, _ = ours.shape
    sheet = Image.new("RGB", (3 * width, height + BAR), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (label, panel) in enumerate(panels.items()):
        pixels = np.round(np.clip(np.nan_to_num(panel), 0, 1) * 255).astype(np.uint8)
        sheet.paste(Image.fromarray(pixels), (i * width, BAR))
        draw.text((i * width + 4, 3), label, fill="black")
    return sheet


def check_writable(folder):
    """Raises InputError if `write` could not, now rather than after the work; leaves nothing behind."""
    if not str(folder):
        raise InputError("output='': must be a folder")
    path = pathlib.Path(folder).absolute()
    try:
        while not path.exists():
            path = path.parent
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"output={str(folder)!r}: cannot be written ({error.strerror or error})") from error


def write(folder, case, result, torch_device):
    """Writes parity.md, parity.json and, with a picture, side_by_side.png; returns their paths.

    Raises InputError: the folder cannot be written.
    """
    folder = pathlib.Path(folder)
    written = [folder / "parity.md", folder / "parity.json"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written[0].write_text(markdown(case, result, torch_device), encoding="utf-8")
        written[1].write_text(as_json(case, result, torch_device), encoding="utf-8")
        if result.pictures is not None:
            written.append(folder / "side_by_side.png")
            side_by_side(*result.pictures).save(written[2])
    except OSError as error:
        raise InputError(f"output={str(folder)!r}: cannot be written ({error.strerror or error})") from error
    return written
