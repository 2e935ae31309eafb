"""From batches to PNG files: what `sample.py` does once it knows what to paint."""

import concurrent.futures
import dataclasses
import hashlib
import math
import platform
import re
import time
import warnings

import jax
import jaxlib
import numpy as np

from sana_jax import bundled, images, precision, requests, text
from sana_jax.cli import jobs, records
from sana_jax.errors import InputError, NonFiniteError
from sana_jax.hub import download, fingerprints, folders
from sana_jax.resolution import PATCH, painted_size

PLANNED = (
    "sampler", "steps", "guidance_scale", "guidance_interval", "flow_shift", "pag_scale", "pag_layers",
    "pag_adaptive_scale",
)  # fmt: skip
LARGE = 100_000_000  # parameters that make a CPU slow
ODD = 5  # times more or fewer pixels than the model's own, as 640 x 512 has for 256 x 256: pictures lose their sense
SAVERS = 4  # threads: a PNG of a megapixel takes a third of a second, and Pillow frees the others meanwhile


def complete(picture, model, ratio=None):
    """The picture with everything in its settings that the model decides.

    `ratio` is (width, height) of --ar and stands for a size.  Raises InputError: a setting that this
    model has no use for.
    """
    module, strength = model.sana[0], None
    settings = requests.filled(picture.settings, model.defaults)

    def plan(strength):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again with the pictures
            asked = {name: settings[name] for name in PLANNED}
            return requests.plan(module, model.stack, model.flow_shift, **asked, strength=strength, guided=True)

    found = behind = plan(None)
    sprint = found.static["sampler"] == "scm"
    if sprint and settings["negative_prompt"]:
        where = f"{picture.place}: " if picture.place else ""
        raise InputError(f"{where}negative_prompt: SANA-Sprint has no unconditional half that could take one; leave it empty")
    if settings["init_image"] is not None:
        strength = requests.STRENGTH if settings["strength"] is None else settings["strength"]
        behind = plan(strength)  # the steps that are left of those asked for
    side = module.sample_size * PATCH
    height, width = (side if settings[name] is None else settings[name] for name in ("height", "width"))
    if ratio is not None:
        tall = math.sqrt(ratio[1] / ratio[0])
        height, width = painted_size(round(side * tall), round(side / tall), module.sample_size)
    if model.stack.strip_flags and (flag := text.FLAGS.search(settings["prompt"])):
        warnings.warn(
            f"{picture.place or 'prompt'}: {flag[0]} and what follows is no part of the prompt in stack "
            f"{model.stack.name!r}; a size is given with --ar, --size, --height and --width"
        )
    shift, layers = settings["flow_shift"], settings["pag_layers"]
    full = settings | {
        "height": height,
        "width": width,
        "sampler": found.static["sampler"],
        "steps": found.steps,
        "flow_shift": None if sprint else model.flow_shift if shift is None else shift,
        "pag_layers": list(model.stack.pag_layers) if settings["pag_scale"] and layers is None else layers,
        "strength": strength,
    }
    return dataclasses.replace(picture, settings=full, evaluations=behind.steps)


def description(model, pictures, axes):
    """One line for people about what is painted, as far as it is common to all pictures."""
    first, module = pictures[0].settings, model.sana[0]
    painted = painted_size(first["height"], first["width"], module.sample_size)
    size = f"{first['width']} x {first['height']}"
    if painted != (first["height"], first["width"]):
        size += f" (painted at {painted[1]} x {painted[0]})"
    words = {"sampler": "{}", "steps": "{} steps", "guidance_scale": "guidance {}", "pag_scale": "perturbed attention {}", "seed": "seed {}"}
    common = [word.format(first[name]) for name, word in words.items() if name not in axes and (first[name] or name == "seed")]
    grid = "".join(f"; {name.replace('_', '-')} in {values}" for name, values in axes.items())
    return f"painting: {len(pictures)} of {size}, {', '.join(common)}{grid}"


def slowness(model):
    """A warning where a picture takes minutes, else None."""
    count = sum(leaf.size for leaf in jax.tree.leaves(model.sana[1]))
    if jax.default_backend() != "cpu" or count < LARGE:
        return None
    return f"this is a CPU, and the transformer has {count / 1e9:.1f} billion parameters: expect minutes for each picture"


def strangeness(model, pictures):
    """A warning where a picture is painted far from the size that the model was trained on, else None."""
    side = model.sana[0].sample_size * PATCH
    for picture in pictures:
        settings = picture.settings
        height, width = painted_size(settings["height"], settings["width"], model.sana[0].sample_size)
        if not side**2 / ODD <= height * width <= side**2 * ODD:
            return f"{width} x {height}: this model was trained at {side} x {side}, and paints well only near that"
    return None


def fingerprint(loading):
    """One sha256 for all that `load_pipeline` reads for `records.LOADING`."""
    loading = loading | {"model": loading["model"] or bundled.require()}
    wanted, lines = precision.short(loading["dtype"]), []
    for name, part in {"model": None, "dc_ae": "vae", "text": "text_encoder"}.items():
        if loading[name] is not None:
            revision, variant = (loading[key] if name == "model" else None for key in ("revision", "variant"))
            path = download.find_model(loading[name], revision, wanted=wanted, variant=variant, part=part, report=None)
            lines.append(f"{_part_sha256(path, variant, wanted, part)}  {name}\n")
    if len(lines) == 1:
        return lines[0].split()[0]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _part_sha256(path, variant, wanted, part):
    """`fingerprints.model_sha256`, or that of all its files for a folder that is no whole model.

    It may be weights without a configuration, a pipeline whose autoencoder comes from elsewhere, or a
    text_encoder/ with the tokenizer/ beside it.
    """
    whole = (path / "model_index.json").is_file()
    beside = path.parent / "tokenizer"
    if whole or not (part == "text_encoder" and path.name == part and beside.is_dir()):
        try:
            return fingerprints.model_sha256(path, variant, wanted=wanted, part=part if whole else None)
        except InputError:
            if not path.is_dir():
                raise
        beside = None
    digests = {}
    for folder, prefix in ((path, ""), (beside, "tokenizer/")):
        if folder is not None:
            names = [name for name in folders.names_in(folder) if name.endswith((".json", ".safetensors", ".model"))]
            digests |= {prefix + name: digest for name, digest in fingerprints.files_sha256(folder, names).items()}
    return hashlib.sha256("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()).hexdigest()


def identity(model, model_sha256, instruction):
    """What must be the same for the same bits: `records.MODEL` and `records.MACHINE`."""
    import sana_jax

    return {
        "model_sha256": model_sha256,
        "chi_sha256": instruction.sha256,
        "stack": model.stack.name,
        "dtype": jax.numpy.dtype(model.sana[0].dtype).name,
        "device": jax.devices()[0].device_kind,
        "sana_jax": sana_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": platform.python_version(),
    }


def paint(model, batches, loading, identity, *, chi, init_image=None, on_step=None):
    """Paints batches and saves their pictures, one (picture, path, error) after the other.

    One of path and error is None; the path is the picture's own, or, if it is numbered and somebody
    else came first, that with the next free number.  A batch is written while the next is painted.  A
    picture that is not finite, or for which memory does not suffice, is an error of its own: the
    others of its batch are painted again, each by itself.

    Args:
      loading, identity: for the records, see `records.make`.
      chi: as in `Pipeline.generate`.
      init_image: uint8 [H W 3], or None.
      on_step: as in `Pipeline.generate`.
    Raises:
      InputError: a picture that cannot be written.
      jax.errors.JaxRuntimeError: any other failure of the device.
    """
    saving = []  # (picture, future) of the batch before

    def settled():
        while saving:
            picture, saved = saving[0]
            path = saved.result()
            saving.pop(0)
            yield picture, path, None

    with concurrent.futures.ThreadPoolExecutor(SAVERS) as pool:
        try:
            for batch in batches:
                started, problem = time.perf_counter(), None
                try:
                    pixels = _generate(model, batch, init_image, chi=chi, on_step=on_step)
                except NonFiniteError as error:
                    problem = str(error)
                except jax.errors.JaxRuntimeError as error:
                    if "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    problem = _out_of_memory(batch, model)
                    if len(batch.rows) > 1:
                        warnings.warn(f"{problem}; its pictures are painted one by one", stacklevel=1)
                if problem is not None:  # outside of `except`, whose traceback would keep what the device holds
                    yield from settled()
                    if len(batch.rows) == 1:
                        yield batch.kept[0], None, problem
                    else:
                        alone = [one for picture in batch.kept for one in jobs.batches([picture], 1)]
                        yield from paint(
                            model, alone, loading, identity, chi=chi, init_image=init_image, on_step=on_step
                        )
                    continue
                seconds = round(time.perf_counter() - started, 3)
                yield from settled()
                for position, picture in enumerate(batch.rows):
                    if picture is not None:
                        row = {"position": position, **batch.described}
                        record = records.make(picture.settings, row, loading, identity, seconds=seconds)
                        other = jobs.next_path if picture.numbered else None
                        saved = pool.submit(images.save_png, picture.path, pixels[position], records.texts(record), other)
                        saving.append((picture, saved))
        except KeyboardInterrupt:
            yield from settled()
            raise
        yield from settled()


def _out_of_memory(batch, model):
    settings, dtype = batch.settings, jax.numpy.dtype(model.sana[0].dtype)
    smaller = ["a smaller --batch-size"] * (len(batch.rows) > 1) + ["a smaller --size"] + ["--dtype bf16"] * (dtype.itemsize > 2)
    return (
        f"out of memory for a batch of {len(batch.rows)} of {settings['width']} x {settings['height']} "
        f"in {dtype.name}; try {' or '.join(smaller)}"
    )


def _generate(model, batch, init_image, *, chi, on_step):
    """The pixels of a batch; warnings about a prompt name its place in the file."""
    extra = {"on_step": on_step} if on_step else {}
    caught = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            return model.generate(chi=chi, **jobs.call(batch, init_image), **extra)
    finally:
        for warning in caught:
            warnings.warn(_with_place(str(warning.message), batch), warning.category, stacklevel=1)


def _with_place(message, batch):
    """A warning about prompts[i] of a call, with the place in its file where that prompt has one."""

    def place(match):
        i = int(match[1])
        row = batch.rows[i] if len(batch.described["prompts"]) > 1 else next(iter(batch.kept), None)
        return (row and row.place) or match[0]

    return re.sub(r"^(?:negative_)?prompts\[(\d+)\]", place, message)


class Sheets:
    """Contact sheets, each written when the last of its pictures is there, or has failed."""

    def __init__(self, pictures, axes, count, pending):
        """Args: all pictures of a run, its grid, its images per prompt, and what is to be painted."""
        self.axes, self.count = axes, count
        self.all, self.open, self.written = {}, {}, []
        self.paths = {id(picture): picture.path for picture in pictures}
        if axes:
            for picture in pictures:
                self.all.setdefault(picture.sheet, []).append(picture)
            waiting = {id(picture) for picture in pending}
            for path, shown in self.all.items():
                left = {id(picture) for picture in shown} & waiting
                if left:
                    self.open[path] = left
                elif not path.exists():
                    self._write(path)

    def done(self, picture, path):
        """To be called for each picture that was painted, with the path that it has, or failed, with None."""
        if path or picture.numbered:  # what has a name of its own may still be there from an earlier run
            self.paths[id(picture)] = path
        left = self.open.get(picture.sheet, set())
        left.discard(id(picture))
        if picture.sheet in self.open and not left:
            del self.open[picture.sheet]
            self._write(picture.sheet)

    def _write(self, path):
        shown, columns = self.all[path], len(list(self.axes.values())[-1])
        # From (row, column, image) to (row, image, column): the last axis runs from left to right.
        order = np.arange(len(shown)).reshape(-1, columns, self.count).transpose(0, 2, 1).ravel()
        cells = []
        for picture in (shown[i] for i in order):
            where = self.paths[id(picture)]
            there = where is not None and where.exists()
            pixels = images.read_picture(where)[0] if there else None
            cells.append((pixels, picture.label if there else f"{picture.label}: failed"))
        prompt = shown[0].settings["prompt"]
        sheet = images.contact_sheet(cells, columns, prompt)
        names = [(self.paths[id(picture)] or picture.path).name for picture in shown]
        other = jobs.next_path if shown[0].numbered else None
        self.written.append(images.save_png(path, sheet, records.sheet_texts(prompt, self.axes, names), other))
