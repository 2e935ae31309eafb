"""The pictures of one run: which there are, what they are called, what is painted at once."""

import dataclasses
import itertools
import json
import pathlib
import tempfile

from sana_jax import images
from sana_jax.cli import records
from sana_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Picture:
    """One PNG: where it goes and its settings (`records.SETTINGS`)."""

    path: pathlib.Path
    settings: dict
    sheet: pathlib.Path  # of the contact sheet that shows it, where there is a grid
    label: str = ""  # how it differs from the others of its prompt, for people
    place: str = ""  # of its prompt in a file
    numbered: bool = False  # named after the next free number, which somebody else may take first
    evaluations: int = 0  # of the network, once a model was asked


def check_output(output):
    """(folder, stem) of --output, found to be writable now rather than after the work.

    A .png file has a stem, a folder has None; without --output it is outputs/.  Nothing is left
    behind: a folder that is not there yet is made with the first picture.
    Raises InputError: another suffix, or no permission.
    """
    target = pathlib.Path("outputs" if output is None else output)
    try:
        single = target.suffix.lower() == ".png" and not target.is_dir()
        if target.suffix and not single and not target.is_dir():
            raise InputError(f"output={str(output)!r}: must end in .png, or be a folder")
        folder = target.parent if single else target
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"output={str(target)!r}: cannot be written ({error.strerror})") from error
    return folder, target.stem if single else None


def _first_free_number(folder):
    taken = [int(n) for p in folder.glob("*_*.png") if (n := p.name.split("_")[0]).isdecimal()]
    return max(taken, default=-1) + 1


def next_path(path):
    """The path with the next free number, for one whose number was taken."""
    number, rest = path.name.split("_", 1)
    return path.with_name(f"{max(_first_free_number(path.parent), int(number) + 1):05d}_{rest}")


def cells(axes):
    """The cells of a grid, {setting: value} each, the last axis fastest; one empty cell without axes."""
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def label(cell):
    return " ".join(f"{name.replace('_', '-')}={str(value).removesuffix('.0')}" for name, value in cell.items())


def pictures(entries, settings, axes, count, output, suffix=".png"):
    """All pictures of a run, prompt by prompt, cell by cell, image by image.

    Args:
      entries: `prompt_files.Entry`s, or None for the one prompt of `settings`.
      settings: of `records.SETTINGS`; "index" is the number of the first image.
      axes: {setting: values} of a grid.
      count: images of each prompt and cell.
      output: (folder, stem) of `check_output`.  Pictures of a file are named after its lines or ids,
        those of one prompt after the stem, or the next free number and the seed.
    Raises:
      InputError: an entry sets what is an axis of the grid; or a file and a stem.
    """
    folder, stem = output
    if entries is not None and stem is not None:
        raise InputError(f"output={str(folder / stem) + suffix!r}: must be a folder, for the pictures of a file")
    numbers = itertools.count(_first_free_number(folder)) if entries is None and stem is None else None
    found = []
    for entry in [None] if entries is None else entries:
        own, place = {}, ""
        if entry is not None:
            own = {k: v for k, v in entry._asdict().items() if k in settings and v is not None}
            place = entry.place
        if both := [name for name in own if name in axes]:
            raise InputError(f"{place}: sets {both[0]}, which --grid sets too")
        made = []
        for cell in cells(axes):
            for i in range(count):
                now = settings | own | cell | {"index": settings["index"] + i}
                base = f"{next(numbers):05d}_{now['seed']}" if numbers else stem or entry.name
                parts = [base, label(cell).replace(" ", "_")]
                number = f"-{i}" if count > 1 and not numbers else ""
                name = "_".join(filter(None, parts)) + number
                made.append((folder / (name + suffix), now, label(cell) + (f" image {now['index']}" if count > 1 else "")))
        base = f"{next(numbers):05d}_{settings['seed']}" if numbers and axes else stem or (entry and entry.name) or ""
        sheet = folder / f"{base}_grid{suffix}"
        found += [Picture(*one[:2], sheet, one[2].strip(), place, numbers is not None) for one in made]
    return found


def check(pictures):
    """Raises InputError for settings that are wrong for every model, each kind of them once."""
    seen = set()
    for picture in pictures:
        key = json.dumps(picture.settings | {"prompt": "", "index": 0})
        if key not in seen:
            records.check(picture.settings)
        seen.add(key)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images that one call paints, which differ in prompt and index alone.

    `rows` are their pictures, None for an image that nobody keeps; `described` is what a record says
    of the batch (`records.BATCH`, without the position).
    """

    rows: list
    described: dict
    settings: dict

    def keep(self, pictures):
        """The same images, of which only these pictures are kept."""
        kept = {id(picture) for picture in pictures}
        return dataclasses.replace(self, rows=[row if id(row) in kept else None for row in self.rows])

    @property
    def kept(self):
        return [row for row in self.rows if row is not None]


def batches(pictures, size):
    """`Batch`es of at most `size`, the same ones for the same pictures, in the order of their first."""
    alike, free = {}, {"prompt": "", "negative_prompt": "", "index": 0}
    for picture in pictures:
        alike.setdefault(json.dumps(picture.settings | free, sort_keys=True), []).append(picture)
    order = {id(picture): i for i, picture in enumerate(pictures)}
    cut = [group[i : i + size] for group in alike.values() for i in range(0, len(group), size)]
    return [_batch(rows) for rows in sorted(cut, key=lambda rows: order[id(rows[0])])]


def _batch(rows):
    texts = [(p.settings["prompt"], p.settings["negative_prompt"]) for p in rows]
    if len(set(texts)) == 1:
        texts = texts[:1]  # encoded once
    prompts, negatives = map(list, zip(*texts))
    indices = [p.settings["index"] for p in rows]
    return Batch(rows, {"prompts": prompts, "negative_prompts": negatives, "indices": indices}, rows[0].settings)


def recorded(picture, batch):
    """The `Batch` that a record tells of, of which only its own picture is kept."""
    rows = [None] * len(batch["indices"])
    rows[batch["position"]] = picture
    described = {name: batch[name] for name in ("prompts", "negative_prompts", "indices")}
    return Batch(rows, described, picture.settings)


def call(batch, init_image=None):
    """Arguments of `Pipeline.generate` for a `Batch`; `init_image` is uint8 [H W 3]."""
    described, settings = batch.described, batch.settings
    same = ("seed", "height", "width", "steps", "sampler", "guidance_scale", "flow_shift", "pag_scale", "pag_layers",
            "pag_adaptive_scale", "max_sequence_length")  # fmt: skip
    arguments = {name: settings[name] for name in same} | {
        "prompts": described["prompts"],
        "negative_prompts": described["negative_prompts"],
        "num_images": len(described["indices"]) // len(described["prompts"]),
        "first_image": described["indices"],
        "guidance_interval": tuple(settings["guidance_interval"]),
    }
    if settings["init_image"] is not None:
        arguments |= {"image": init_image, "strength": settings["strength"]}
    return arguments


def unfinished(pictures, identity, drawn=False):
    """The pictures of a prompts file that are not there yet; `drawn`: their seed was drawn for this run.

    Raises InputError: a picture is there that this run would paint differently, or that is not ours.
    """
    missing = []
    for picture in pictures:
        if not picture.path.exists() or not images.is_whole(picture.path):
            missing.append(picture)
            continue
        recipe, _ = records.read(picture.path)
        if found := records.difference(recipe, picture.settings, identity):
            name, there, here = found
            seed = f"--seed {there} to go on with those, " if drawn and name == "seed" else ""
            raise InputError(
                f"{name}={here!r}: {picture.path} is there, with {there!r}; use {seed}another --output, or --overwrite"
            )
    return missing
