"""The arguments of sample.py: our names, and those that people bring from other tools.

Every name may be written with underscores.  A setting is given once, under whichever name.
"""

import argparse
import difflib
import os
import re
import secrets
from typing import NamedTuple

from sana_jax import bundled, images, ops, precision
from sana_jax.cli import records
from sana_jax.errors import InputError, nearest, require_choice, require_range

PROGRESS = ("auto", "images", "steps", "none")


class Setting(NamedTuple):
    """A setting of one picture that is a number or a word: a flag, and an axis of --grid."""

    kind: type
    names: tuple  # other tools' words for it
    help: str


def sampler_name(word):
    """Our name of a sampler that may be written as in NVlabs' configurations."""
    return word.replace("_", "-")


SETTINGS = {
    "steps": Setting(int, ("num-inference-steps", "step"), "network evaluations per image (the model's: 20, 2 for Sprint)"),
    "guidance-scale": Setting(float, ("cfg", "cfg-scale"), "classifier-free guidance (the model's, 4.5 as published); 1 is none"),
    "seed": Setting(int, (), "image i starts from noise keyed (seed, i) (0); -1 draws one"),
    "sampler": Setting(sampler_name, ("vis-sampler", "sampling-algo"), "flow-dpm-solver, flow-euler, or scm (Sprint)"),
    "flow-shift": Setting(float, (), "of the noise schedule (the checkpoint's)"),
    "pag-scale": Setting(float, (), "perturbed-attention guidance (0, which is none)"),
    "pag-adaptive-scale": Setting(float, (), "how fast that guidance fades (0)"),
    "strength": Setting(float, (), "with --image: how much of it is repainted (0.6)"),
    "max-sequence-length": Setting(int, (), "prompt tokens that count (the model's, 300 as published)"),
}


def _once(parser, namespace, dest, option):
    before = namespace.spelled.get(dest)
    if before == option:
        parser.error(f"{option}: given twice")
    if before:
        parser.error(f"{before} and {option}: the same setting, given twice")
    namespace.spelled[dest] = option


class Once(argparse.Action):
    """Stores a value; `namespace.spelled` has the name under which it came."""

    def __call__(self, parser, namespace, values, option_string=None):
        _once(parser, namespace, self.dest, option_string)
        setattr(namespace, self.dest, True if self.nargs == 0 else values)


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows our name of a flag, and its short one."""

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        short = [s for s in action.option_strings if len(s) == 2]
        shown = short + [s for s in action.option_strings if s not in short][:1]
        value = "" if action.nargs == 0 else " " + self._format_args(action, action.dest.upper())
        return ", ".join(shown) + value


class Parser(argparse.ArgumentParser):
    """argparse with one line per error, and the nearest flag for an unknown one."""

    def error(self, message):
        message = re.sub(r"^argument (\S+?)/\S+:", r"argument \1:", " ".join(message.split()))
        ours = {s: next(o for o in a.option_strings if len(o) > 2) for a in self._actions for s in a.option_strings}
        if message.startswith("unrecognized arguments:"):
            flag = message.split()[2:3] or [""]
            if close := difflib.get_close_matches(flag[0].split("=")[0], ours, 1):
                message += f"; did you mean {ours[close[0]]}?"
        self.exit(2, f"sample.py: error: {message}\n")


def _pair(text, sign, kind, example):
    """Two positive numbers with a sign between them."""
    try:
        a, b = (kind(part) for part in text.lower().split(sign))
        if not (0 < a < float("inf") and 0 < b < float("inf")):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be two positive numbers, as in {example}") from None
    return a, b


def _size(text):
    return _pair(text, "x", int, "1024x768")


def _ratio(text):
    width, height = _pair(text, ":", float, "16:9")
    if not 0.25 <= width / height <= 4:
        raise argparse.ArgumentTypeError(f"{text!r} must be between 1:4 and 4:1, width before height")
    return width, height


def _layers(text):
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers of layers, as in 8 or 8,14") from None


def make_parser(description, groups=SETTINGS):
    parser = Parser(description=description, allow_abbrev=False, formatter_class=Help, usage="sample.py [PROMPT] [flags]")
    parser.set_defaults(spelled={})
    also = []

    def add(group, name, *others, action=Once, **options):
        long = [other if other.startswith("-") else f"--{other}" for other in others]
        group.add_argument(f"--{name}", *long, action=action, **options)
        if words := [other for other in long if len(other) > 2]:
            also.append(f"  --{name}: {', '.join(words)}")

    what = parser.add_argument_group("what to paint")
    what.add_argument("positional", nargs="?", metavar="PROMPT", help="one prompt")
    add(what, "prompt", "-p", metavar="TEXT", help="the same, as a flag")
    add(what, "prompts-file", "txt-file", "json-file", metavar="FILE",
        help='one prompt per line, or JSON: {"id": {"prompt": ...}}')
    add(what, "from-image", metavar="PNG", help="repaint it from what it says of itself; flags given beside it change that")
    add(what, "negative-prompt", "neg", metavar="TEXT", help="what to stay away from")
    add(what, "num-images", "-n", "bs", "num-images-per-prompt", type=int, metavar="N", help="images of each prompt (1)")
    add(what, "height", type=int, metavar="PIXELS", help="the model's own if left out; so is")
    add(what, "width", type=int, metavar="PIXELS", help="this")
    add(what, "size", type=_size, metavar="WxH", help="both: width, then height")
    add(what, "image-size", type=int, metavar="PIXELS", help="a square")
    add(what, "ar", "aspect-ratio", type=_ratio, metavar="W:H", help="the model's published size nearest to it; 16:9 is wide")
    add(what, "image", metavar="FILE", help="start from this picture (Sprint models)")

    how = parser.add_argument_group("how to paint it")
    for name, setting in SETTINGS.items():
        metavar = "NAME" if setting.kind is sampler_name else "N" if setting.kind is int else "X"
        add(how, name, *setting.names, type=setting.kind, metavar=metavar, help=setting.help)
    add(how, "guidance-interval", "interval-guidance", nargs=2, type=float, metavar=("LO", "HI"),
        help="noise levels between which guidance acts (0 1)")
    add(how, "pag-layers", type=_layers, metavar="L,L", help="layers that --pag-scale perturbs (the stack's)")
    add(how, "grid", action="append", default=[], metavar="KEY=V,V",
        help=f"a picture for every value, and a contact sheet; again for a product ({', '.join(SETTINGS)})")

    model = parser.add_argument_group("model")
    add(model, "model", "model-path", "pretrained-model-name-or-path", metavar="MODEL",
        help="folder in diffusers layout, Hugging Face id (owner/name[@revision]), short name, or file of weights; "
        "left out: the bundled model, which knows shapes and nothing else")
    add(model, "revision", metavar="NAME", help="branch, tag or commit of a Hugging Face id")
    add(model, "variant", metavar="NAME", help="which weight files, where there are several: bf16, fp16")
    add(model, "dc-ae", metavar="PATH", help="another autoencoder; needed with a file of weights")
    add(model, "text", metavar="PATH", help="another text encoder with its tokenizer; the same")
    add(model, "dtype", "weights-dtype", metavar="NAME", help="auto (default), fp32, bf16 or fp16")
    add(model, "stack", metavar="NAME", help="auto (default), diffusers or nvlabs: whose pictures to match")
    add(model, "kernels", metavar="NAME",
        help="auto (default), xla, pallas or jax_triton: how attention, Mix-FFN and norms run on a GPU")
    add(model, "chi", metavar="FILE", help="instruction that goes before the prompt; 'none' for none")

    run = parser.add_argument_group("run")
    add(run, "output", "-o", "output-path", metavar="PATH", help="a .png file or a folder (outputs/)")
    add(run, "overwrite", nargs=0, help="paint again what a prompts file has painted already")
    add(run, "batch-size", type=int, metavar="N", help="images painted at once (1)")
    add(run, "progress", metavar="WHAT", help="auto (default), images, steps or none")
    add(run, "compile-cache", metavar="DIR", help="where compiled programs are kept; 'none' to keep none")
    add(run, "allow-mismatch", action="append", default=[], metavar="NAME",
        help="with --from-image: go on although this is not what it was")
    add(run, "dry-run", nargs=0, help="say what would be painted, and end")
    parser.epilog = "\n".join([
        "Other names that are understood, with - or _:", *also, "",
        "GPU memory is taken as it is needed (XLA_PYTHON_CLIENT_PREALLOCATE=false, unless it is set).",
    ])  # fmt: skip
    return parser


def parse(argv, description):
    """The arguments, of which none has a default: what is None was not given.

    Further attributes: `prompt`, from wherever it was given; `form`, "json" or "lines", of the
    prompts file; `ratio`, (width, height), or None; `axes`, {setting: values} of the grid.
    """
    parser = make_parser(description)
    end = argv.index("--") if "--" in argv else len(argv)
    argv = [_dashes(word) if i < end else word for i, word in enumerate(argv)]
    args = parser.parse_args(argv)
    sources = [args.positional, args.prompt, args.prompts_file]
    given = sum(source is not None for source in sources)
    if given > 1 or (given == 0 and args.from_image is None):
        parser.error(
            "prompt: give it once, as the only word without a flag or with --prompt, --prompts-file or --from-image"
        )
    if args.prompts_file is not None and args.from_image is not None:
        parser.error("--prompts-file and --from-image: give one of them")
    args.prompt = args.prompt if args.positional is None else args.positional
    spelled = args.spelled.get("prompts_file")
    is_json = spelled == "--json-file" or spelled == "--prompts-file" and args.prompts_file.lower().endswith(".json")
    args.form = "json" if is_json else "lines"
    _set_size(parser, args)
    args.axes = _axes(parser, args)
    return args


def _dashes(word):
    """--some_flag=a_b -> --some-flag=a_b."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if re.fullmatch(r"--[A-Za-z_-]+", name) else word


def _set_size(parser, args):
    ways = [["size"], ["image_size"], ["ar"], ["height", "width"]]
    used = [flag for way in ways for flag in way if getattr(args, flag) is not None]
    if sum(any(flag in used for flag in way) for way in ways) > 1:
        parser.error(f"{' and '.join(args.spelled[flag] for flag in used)}: the size is given twice")
    if args.size is not None:
        args.width, args.height = args.size
    if args.image_size is not None:
        args.width = args.height = args.image_size
    args.ratio = args.ar


def _axes(parser, args):
    """{setting with underscores: values} in the order given.  Ends the program for a bad one."""
    names = {other: name for name, setting in SETTINGS.items() for other in (name, *setting.names)}
    axes = {}
    for axis in args.grid:
        key, equals, values = axis.partition("=")
        name = names.get(key.strip().replace("_", "-"))
        if not equals or name is None:
            listed = ", ".join(SETTINGS)
            parser.error(f"--grid {axis!r}: must be KEY=VALUE,VALUE with one of {listed}{nearest(key, names)}")
        dest = name.replace("-", "_")
        if dest in axes or getattr(args, dest) is not None:
            parser.error(f"--grid {axis!r}: {name} is given twice")
        try:
            axes[dest] = [SETTINGS[name].kind(value.strip()) for value in values.split(",") if value.strip()]
        except ValueError:
            parser.error(f"--grid {axis!r}: every value of {name} must be {_kind_words(SETTINGS[name].kind)}")
        if dest == "seed" and -1 in axes[dest]:
            parser.error(f"--grid {axis!r}: -1 draws a seed, and a grid compares seeds that are known; list them")
        if not axes[dest] or len(set(axes[dest])) < len(axes[dest]):
            parser.error(f"--grid {axis!r}: must have values, each of them once")
    return axes


def _kind_words(kind):
    return {int: "an int", float: "a number"}[kind]


def check_words(args):
    """Raises InputError for words and counts that are none of those allowed."""
    if args.dtype == "int8":
        raise InputError("dtype='int8': not available yet; must be one of auto, fp32, bf16, fp16")
    if args.dtype not in (None, "auto"):
        precision.parse(args.dtype)
    require_choice("stack", args.stack or "auto", ("auto", "diffusers", "nvlabs"))
    require_choice("kernels", args.kernels or "auto", ops.KERNELS)
    require_choice("progress", args.progress or "auto", PROGRESS)
    require_range("num_images", 1 if args.num_images is None else args.num_images, 1, 4096)
    require_range("batch_size", 1 if args.batch_size is None else args.batch_size, 1, records.LARGEST_BATCH)
    for name in args.allow_mismatch:
        require_choice("allow_mismatch", name, records.NAMES)


def settings(args, recipe=None):
    """(settings, pixels of the picture to begin with or None): the recipe's or the usual ones, and the flags.

    Raises InputError: the picture to begin with cannot be read, or is not the recorded one.
    """
    found = dict(recipe.settings if recipe else records.SETTINGS)
    found |= {name: getattr(args, name) for name in records.SETTINGS if getattr(args, name, None) is not None}
    if args.seed == -1:
        found["seed"] = secrets.randbelow(2**32)
    if args.ar is not None:
        found |= {"height": None, "width": None}
    if args.prompts_file is not None:
        found["prompt"] = ""  # that of each entry takes its place
    if args.image is not None:
        found["init_image"] = args.image
    if found["init_image"] is None:
        return found, None
    pixels, sha256 = images.read_picture(found["init_image"])
    found["init_image"] = os.path.abspath(found["init_image"])  # a record may be read in any folder
    name, before = "init_image_sha256", found["init_image_sha256"]
    if args.image is None and sha256 != before and name not in args.allow_mismatch:
        raise InputError(
            f"{name}={sha256!r}: {args.from_image} began with {before!r}, which {found['init_image']} is not; "
            f"pass the right file with --image, or --allow-mismatch {name}"
        )
    return found | {name: sha256}, pixels


def loading(args, recipe=None):
    """How the model is asked for, `records.LOADING`, with local paths from the root: elsewhere a
    relative one could be the name of a repository.  Raises InputError."""
    given = {name: getattr(args, name) for name in records.LOADING if getattr(args, name) is not None}
    found = recipe.loading if recipe else records.LOADING
    if recipe:
        records.refuse_pickles(recipe, given, args.from_image)
        if given.get("model", found["model"]) != found["model"]:
            found = found | {"revision": None}  # of another model
    found = found | given
    if found["model"] is None:  # and it stays so: a record is read where the bundled folder is another
        bundled.require()
    words = {"chi": ("auto", "none")}
    for name in ("model", "dc_ae", "text", "chi"):
        if found[name] is not None and found[name] not in words.get(name, ()) and os.path.exists(found[name]):
            found = found | {name: os.path.abspath(found[name])}
    return found


def may_differ(args):
    """Names of what need not be as it was recorded: what was allowed, or asked for by a flag."""
    asked = {"dtype": args.dtype, "stack": args.stack, "chi_sha256": args.chi}
    return [*args.allow_mismatch, *(name for name, value in asked.items() if value is not None)]
