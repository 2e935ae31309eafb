"""Compares a checkpoint here with itself in PyTorch, rung by rung, and says whether they agree.

    python -m sana_jax.parity MODEL [--output DIR]

MODEL is a pipeline folder in diffusers layout, a Hugging Face id or a short name.  Needs the extra
`parity` (PyTorch, diffusers, accelerate), no GPU, and memory for the largest part in float32 (about 12 GB
with Gemma-2-2b).  A .pth file holds a transformer alone; this makes a pipeline folder of it:
python -m sana_jax.convert FILE DIR --dc-ae X --text Y, where X and Y may be one published pipeline.
Exit status: 0 all lines within their bounds, 1 not, 2 bad input, 130 interrupted.
"""

import os
import re
import sys

# Both frameworks share the card, one after the other; set before jax looks for one.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "platform")

from sana_jax.cli.parser import Parser
from sana_jax.errors import InputError, NonFiniteError, require_choice
from sana_jax.parity import case as cases
from sana_jax.parity import ladder, peers, report

PROMPT = "A photo of a Red cat that sits on a blue chair"


def parse(argv):
    words = __doc__.split("\n\n")
    parser = Parser(prog="python -m sana_jax.parity", description=words[0], epilog=words[2], allow_abbrev=False)
    add = parser.add_argument
    add("model", metavar="MODEL", help="pipeline folder in diffusers layout, Hugging Face id or short name")
    add("--reference", metavar="FOLDER", help="what PyTorch reads in place of MODEL, e.g. what MODEL was converted from")
    add("--only", metavar="RUNGS", help=f"some of {','.join(cases.RUNGS)}")
    add("--size", metavar="WxH", default="320x256", help="of the latents and the picture, in pixels (320x256, for a CPU's sake)")
    add("--steps", type=int, help="of the picture (20, or 2 for a SANA-Sprint)")
    add("--prompt", default=PROMPT, help=f"text of the text and picture lines ({PROMPT!r})")
    add("--dtype", default="fp32", help="fp32 (default), or bf16 for further lines: our bfloat16 error over PyTorch's own")
    add("--revision", help="branch, tag or commit of a Hugging Face id")
    add("--output", metavar="DIR", help="write parity.md, parity.json and side_by_side.png there")
    return parser.parse_args(argv)


def make_case(args):
    """The Case of the arguments.  Raises InputError."""
    rungs = tuple(args.only.split(",")) if args.only is not None else cases.RUNGS
    for rung in rungs:
        require_choice("only", rung, cases.RUNGS)
    require_choice("dtype", args.dtype, ("fp32", "bf16"))
    if not (match := re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", args.size)):
        raise InputError(f"size={args.size!r}: must be WIDTHxHEIGHT in pixels, e.g. 1024x1024")
    if not args.prompt.strip():
        raise InputError(f"prompt={args.prompt!r}: must not be empty; the null prompt is compared anyway")
    if args.output is not None:
        report.check_writable(args.output)
    peers.require()
    model = cases.find(args.model, args.revision)
    reference = model if args.reference is None else cases.find(args.reference)
    size = int(match[2]), int(match[1])
    return cases.make(
        model, reference, prompt=args.prompt, size=size, steps=args.steps, rungs=rungs, bfloat16=args.dtype == "bf16"
    )


def main(argv=None):
    args = parse(argv)
    try:
        case = make_case(args)
        device = peers.prepare()
        name = peers.device_name(device)
        result = ladder.climb(case, device, say)
        put(report.markdown(case, result, name), sys.stdout)
        for path in report.write(args.output, case, result, name) if args.output is not None else ():
            say(f"wrote {path}")
    except InputError as error:
        say(f"sana_jax.parity: error: {error}")
        return 2
    except NonFiniteError as error:
        say(f"sana_jax.parity: FAILS: {error}")
        return 1
    except KeyboardInterrupt:
        say("sana_jax.parity: error: interrupted")
        return 130
    return 1 if result.failed else 0


def put(line, stream):
    """Prints to a stream whose reader may have gone (`| head`): the exit status is told all the same."""
    try:
        print(line, file=stream, flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def say(line):
    put(line, sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
