"""Prompts to PNG files.

    python sample.py --prompt "a red circle above a blue square"      # the bundled model, which knows shapes
    python sample.py --model DIR --prompt "a lighthouse at dusk"

Every PNG holds its own recipe, which --from-image paints again; --help lists the arguments.
"""

import os
import signal
import sys
import time
import warnings

# A shared card stays usable, and jax must not look for one twice: set before jax is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Only its tokenizer is used; that PyTorch is absent is no news.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import jax
import numpy as np
import tqdm

import sana_jax
from sana_jax import bundled, compile_cache, images, text
from sana_jax.cli import flags, jobs, painting, prompt_files, records
from sana_jax.errors import InputError

FINE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130  # exit statuses


def complain(message, word="error"):
    tqdm.tqdm.write(f"sample.py: {word}: {message}", file=sys.stderr)


def run(args):
    """Finds all that is wrong for every model before one is read or a device touched; then loads, and paints.

    What only this model has no use for (`painting.complete`) is found when it is there, before it paints.
    """
    flags.check_words(args)
    recipe = None
    if args.from_image is not None:
        recipe, unknown = records.read(args.from_image)
        if recipe.batch is None:
            also = f"; without meaning here: {', '.join(unknown)}" if unknown else ""
            warnings.warn(f"{args.from_image}: painted by another program, so that its bits cannot be promised{also}")
    settings, init_image = flags.settings(args, recipe)
    entries, problems, blank = None, [], 0
    if args.prompts_file is not None:
        entries, problems, blank = prompt_files.read(args.prompts_file, args.form)
    count = args.num_images or 1
    pictures = jobs.pictures(entries, settings, args.axes, count, jobs.check_output(args.output))
    jobs.check(pictures)
    for place, reason in problems:
        complain(f"{args.prompts_file}: {place}: {reason}")
    if args.dry_run:
        for picture in pictures:
            print(picture.path, picture.label, picture.place, sep="\t")
        return FAILED if problems else FINE
    if not pictures:
        report(args, [], [], problems, blank, 0, [])
        return FAILED
    loading = flags.loading(args, recipe)
    chi = loading["chi"]
    if chi not in ("auto", "none"):
        chi = text.read_instruction_file(chi).text

    if problem := compile_cache.keep_programs(args.compile_cache):
        warnings.warn(problem)
    started, compiling = time.perf_counter(), compile_cache.count_seconds()
    model, identity = load(loading, chi)
    pictures = [painting.complete(picture, model, args.ar) for picture in pictures]

    batches, pending, original = jobs.batches(pictures, args.batch_size or 1), pictures, None
    if entries is not None and not args.overwrite:
        pending = jobs.unfinished(pictures, identity, args.seed == -1)
        batches = [kept for batch in batches if (kept := batch.keep(pending)).kept]
    if recipe:
        records.require_same(recipe, identity, flags.may_differ(args), args.from_image)
        difference = records.changed(recipe, [picture.settings for picture in pictures], identity)
        if recipe.batch and not difference:  # exactly as it was, neighbours included
            batches = [jobs.recorded(pictures[0], recipe.batch)]
            original, _ = images.read_picture(args.from_image)
        print(f"{args.from_image}: {difference or 'painted again'}")
    if entries is not None and args.seed == -1:  # what --seed has to be for the rest of an interrupted run
        print(f"seed: {settings['seed']} (drawn)")
    print(painting.description(model, pictures, args.axes))
    for problem in (painting.slowness(model), painting.strangeness(model, pictures)):
        if problem:
            warnings.warn(problem)

    sheets, (bar, on_step) = painting.Sheets(pictures, args.axes, count, pending), progress(args.progress, batches)
    done, failed, marks = [], [], [(time.perf_counter(), sum(compiling))]
    work = painting.paint(model, batches, loading, identity, chi=chi, init_image=init_image, on_step=on_step)
    try:
        with bar:
            for picture, path, error in work:
                if error:
                    failed.append(picture)
                    complain(f"{picture.place or picture.path}: {error}" if len(pictures) > 1 else error)
                else:
                    done.append(path)
                bar.update(0 if on_step else 1)
                marks.append((time.perf_counter(), sum(compiling)))
                sheets.done(picture, path)
    except KeyboardInterrupt:
        drawn = f" with --seed {settings['seed']}" if args.seed == -1 else ""
        again = f"the same command{drawn} paints the rest" if entries else "those are kept"
        complain(f"interrupted after {len(done)} of {len(pending)} pictures; {again}")
        return INTERRUPTED
    report(args, done, failed, problems, blank, len(pictures) - len(pending), sheets.written)
    print(f"compile: {sum(compiling):.1f} s, {pace(marks, batches)}total: {time.perf_counter() - started:.1f} s")
    if original is not None and done:
        if not np.array_equal(images.read_picture(done[0])[0], original):
            complain(f"{args.from_image}: NOT the same bits")
            return FAILED
        print(f"{args.from_image}: the same, bit for bit")
    return FAILED if failed or problems else FINE


def load(loading, chi):
    """(pipeline, what it must agree in with a recorded one), and a report of both."""
    started = time.perf_counter()
    named = ("dtype", "stack", "revision", "variant", "dc_ae", "text", "kernels")
    chosen = {name: loading[name] for name in named if loading[name] is not None}
    model = sana_jax.load_pipeline(loading["model"], **chosen)
    seconds = time.perf_counter() - started
    instruction, device = model.instruction(chi), jax.devices()[0]
    identity = painting.identity(model, painting.fingerprint(loading), instruction)
    source = f"file {loading['chi']}" if loading["chi"] not in ("auto", "none") else instruction.source
    print(f"device: {device.device_kind} ({device.platform}), {identity['dtype']}, stack {identity['stack']}")
    print(f"model: {loading['model'] or bundled.OWNER} (sha256 {identity['model_sha256'][:10]}), loaded in {seconds:.1f} s")
    print(f"instruction: {source}")
    return model, identity


def progress(mode, batches):
    """(a bar on a terminal, or where it is asked for; what `generate` gets as on_step)."""
    mode = mode or "auto"
    steps = mode == "steps"
    total = sum(batch.kept[0].evaluations if steps else len(batch.kept) for batch in batches)
    hidden = mode == "none" or (mode == "auto" and not sys.stderr.isatty())
    bar = tqdm.tqdm(total=total, unit="step" if steps else "image", disable=hidden)
    return bar, (lambda step, _: bar.update(min(step, 1))) if steps else None


def pace(marks, batches):
    """Seconds per image without compilation; the first batch, which loads programs, counts where it is the only one."""
    first = len(batches[0].kept) if len(batches) > 1 else 0
    (start, compiled), (end, all_compiled) = marks[min(first, len(marks) - 1)], marks[-1]
    count = len(marks) - 1 - first
    return f"{(end - start - all_compiled + compiled) / count:.2f} s per image, " if count > 0 else ""


def report(args, done, failed, problems, blank, there, sheets):
    if args.prompts_file is None:
        for path in done + sheets:
            print(path)
        return
    places = [place for place, _ in problems] + sorted({picture.place for picture in failed})
    print(
        f"{args.prompts_file}: {len(done)} painted, {there} already there, {len(failed)} failed, "
        f"{len(problems)} broken, {blank} blank lines" + (f"; not painted: {', '.join(places)}" if places else "")
    )


def main(argv=None):
    args = flags.parse(sys.argv[1:] if argv is None else argv, __doc__.split("\n")[0])
    said = set()

    def warn(message, *_, **__):
        if str(message) not in said:
            complain(message, "warning")
        said.add(str(message))

    warnings.showwarning = warn
    try:
        return run(args)
    except InputError as error:
        complain(error)
        return BAD_INPUT
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice ends as Ctrl-C does
    sys.exit(main())
