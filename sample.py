"""Prompts to PNG files.

    python sample.py --model DIR --prompt "a red circle above a blue square"

Every PNG holds its own recipe; `python sample.py --help` lists the arguments.
"""

import argparse
import difflib
import os
import platform
import sys
import time
import warnings

# A shared card stays usable, and jax must not look for one twice: set before jax is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Only its tokenizer is used; that PyTorch is absent is no news.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

NO_MODEL = (
    "model: none given and none is bundled yet; pass --model with a folder in diffusers layout or a "
    "Hugging Face id, e.g. Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers"
)


class Parser(argparse.ArgumentParser):
    """argparse with one line per error, and the nearest flag for an unknown one."""

    def error(self, message):
        message = " ".join(message.split())
        known = [s for action in self._actions for s in action.option_strings]
        if message.startswith("unrecognized arguments:"):
            flag = message.split()[2:3] or [""]
            if close := difflib.get_close_matches(flag[0].split("=")[0], known, 1):
                message += f"; did you mean {close[0]}?"
        self.exit(2, f"sample.py: error: {message}\n")


def parse(argv):
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("positional", nargs="?", metavar="PROMPT", help="what to paint")
    add("--prompt", help="the same, as a flag")
    add("--negative-prompt", default="", help="what to stay away from")
    add("--model", help="folder in diffusers layout, or a Hugging Face id (owner/name)")
    add("--steps", type=int, default=20, help="network evaluations per image (20)")
    add("--guidance-scale", type=float, default=4.5, help="classifier-free guidance (4.5); 1 is none")
    add("--seed", type=int, default=0, help="image i starts from noise keyed (seed, i) (0)")
    add("--height", type=int, help="pixels; the model's own size if left out")
    add("--width", type=int, help="pixels; the model's own size if left out")
    add("--num-images", type=int, default=1, help="images of the prompt (1)")
    add("--output", help="a .png file or a folder (outputs/)")
    add("--sampler", default="flow-dpm-solver", help="flow-dpm-solver (default) or flow-euler")
    add("--dtype", default="auto", help="auto (default), fp32, bf16 or fp16")
    add("--stack", default="auto", help="auto (default), diffusers or nvlabs: whose pictures to match")
    add("--chi", metavar="FILE", help="file with the instruction that goes before the prompt; 'none' for none")
    add("--max-sequence-length", type=int, default=300, help="prompt tokens that count (300)")
    add("--compile-cache", metavar="DIR", help="where compiled programs are kept; 'none' to keep none")
    args = parser.parse_args(argv)
    if (args.positional is None) == (args.prompt is None):
        parser.error("prompt: give it once, as the only word without a flag or with --prompt")
    args.prompt = args.prompt if args.positional is None else args.positional
    return args


def run(args):
    started = time.perf_counter()
    if args.model is None:
        import sana_jax.errors

        raise sana_jax.errors.InputError(NO_MODEL)
    import jax
    import tqdm

    import sana_jax
    from sana_jax import compile_cache, images, pipeline, precision, text
    from sana_jax.errors import require_choice

    # Everything that can be wrong is found before a file is read or a device is touched.
    request = dict(
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        seed=args.seed,
        height=args.height,
        width=args.width,
        sampler=args.sampler,
        max_sequence_length=args.max_sequence_length,
    )
    pipeline.check_request(**request, num_images=args.num_images)
    if args.dtype != "auto":
        precision.parse(args.dtype)
    require_choice("stack", args.stack, ("auto", "diffusers", "nvlabs"))
    chi = "auto" if args.chi is None else args.chi
    if chi not in ("auto", "none"):
        chi = text.read_instruction_file(chi).text
    paths = images.output_paths(args.output, args.num_images, args.seed)

    if problem := compile_cache.keep_programs(args.compile_cache):
        warnings.warn(problem)
    compile_seconds = compile_cache.count_seconds()
    model = sana_jax.load_pipeline(args.model, dtype=args.dtype, stack=args.stack)
    loaded = time.perf_counter()
    device, module = jax.devices()[0], model.sana[0]
    instruction = model.instruction(chi)
    source = f"file {args.chi}" if args.chi not in (None, "auto", "none") else instruction.source
    dtype = jax.numpy.dtype(module.dtype).name
    print(f"device: {device.device_kind} ({device.platform}), {dtype}, stack {model.stack.name}")
    print(f"model: {args.model}, loaded in {loaded - started:.1f} s")
    print(f"instruction: {source}")

    record = {
        **request,
        "prompt": args.prompt,
        "negative_prompt": args.negative_prompt,
        "model": str(args.model),
        "stack": model.stack.name,
        "dtype": dtype,
        "flow_shift": model.flow_shift,
        "chi_source": source,
        "chi_sha256": instruction.sha256,
        "device": device.device_kind,
        "versions": {"sana_jax": sana_jax.__version__, "jax": jax.__version__, "python": platform.python_version()},
    }
    progress = tqdm.tqdm(paths, unit="image", disable=not sys.stderr.isatty())
    for i, path in enumerate(progress):
        (image,) = model.generate(
            args.prompt, negative_prompts=args.negative_prompt, chi=chi, first_image=i, **request
        )
        record |= {"image": i, "height": image.shape[0], "width": image.shape[1]}
        images.save_png(path, image, record)
    total = time.perf_counter() - started
    print(f"compile: {sum(compile_seconds):.1f} s, total: {total:.1f} s")
    for path in paths:
        print(path)


def main(argv=None):
    args = parse(argv)

    shown = set()

    def one_line(message, *_, **__):
        if str(message) not in shown:
            print(f"sample.py: warning: {message}", file=sys.stderr)
        shown.add(str(message))

    warnings.showwarning = one_line
    from sana_jax.errors import InputError, NonFiniteError

    try:
        run(args)
    except (InputError, NonFiniteError) as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
