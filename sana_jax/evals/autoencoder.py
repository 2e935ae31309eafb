"""What an autoencoder makes of scenes that no training shows: PSNR, SSIM, and the spread of its latents.

    python -m sana_jax.evals.autoencoder [--model DIR] --sizes 256,512 --count 256 --output OUT

DIR is a pipeline folder, a DC-AE folder, or a run of train.py, whose average is taken if it keeps one; the
bundled model if left out.  Prints a table and writes OUT/autoencoder.json: means over pictures with their
95 % intervals, of the pictures in 8 bits as people see them.
Exit status: 0, 1 below a --minimum or not finite, 2 bad input or a file that fails.
"""

import pathlib
import sys

import numpy as np

from sana_jax import bundled
from sana_jax.checkpoints.write import write_json
from sana_jax.cli.parser import Parser
from sana_jax.data.shapes import Shapes
from sana_jax.errors import InputError, NonFiniteError, require_positive, require_range
from sana_jax.evals.shapes import painters
from sana_jax.evals.shapes.intervals import Interval, average
from sana_jax.models.dc_ae import DCAE
from sana_jax.programs import decode_program, encode_program
from sana_jax.training.similarity import ssim

LEAST_ERROR = 1 / 12  # mean square that rounding to 8 bits alone makes: 58.9 dB, also of what is equal


def measure(module, params, size, count, batch=8):
    """{"psnr", "ssim": Interval of the means, "deviation": of latents in model space}.

    The scenes are the first `count` of `Shapes(held_out=True)`, size x size pixels.
    Raises NonFiniteError: a decoded picture is not.
    """
    reader, rows, latents = Shapes(held_out=True).open(), [], []
    for begin in range(0, count, batch):
        numbers = [min(i, count - 1) for i in range(begin, begin + batch)]  # the last batch filled up
        real = painters.painted([reader.scene(i) for i in numbers], (size, size)).astype(np.float32)
        encoded = encode_program(params, real / 127.5 - 1, dc_ae=module)
        decoded, finite = decode_program(params, encoded, dc_ae=module)
        if not finite:
            raise NonFiniteError(f"autoencoder: pictures {begin} to {numbers[-1]} of {size} px are not finite")
        made = np.rint(np.asarray(decoded, np.float32) * 127.5 + 127.5)
        error = np.maximum(np.mean((made - real) ** 2, axis=(1, 2, 3)), LEAST_ERROR)
        rows += zip(10 * np.log10(255**2 / error), np.asarray(ssim(made, real, peak=255.0)))
        latents.append(np.asarray(encoded))
    psnr, similar = zip(*rows[:count])
    return {"psnr": average(psnr), "ssim": average(similar), "deviation": float(np.concatenate(latents)[:count].std())}


def load(model):
    """(module, params) of a pipeline folder, as it is sampled with, or of a component or a run."""
    from sana_jax.loading import load_pipeline
    from sana_jax.training.initialise import open_weights

    path = pathlib.Path(bundled.require() if model is None else model)
    if (path / "model_index.json").is_file():
        return load_pipeline(path).dc_ae
    module, read = open_weights(model, DCAE)
    return module, read(None)


def parse(argv):
    words = __doc__.split("\n\n")
    prog = "python -m sana_jax.evals.autoencoder"
    parser = Parser(prog=prog, description=words[0], epilog=words[2], allow_abbrev=False)
    add = parser.add_argument
    add("--model", help="pipeline folder, DC-AE folder or run; the bundled model if left out")
    add("--sizes", default="256,512", help="pixels a side (256,512)")
    add("--count", type=int, default=256, help="scenes of each size (256)")
    add("--output", required=True, metavar="OUT")
    add("--minimum-psnr", type=float, metavar="DB", help="exit with status 1 if the mean at a size is below")
    add("--minimum-ssim", type=float, metavar="SHARE")
    return parser.parse_args(argv)


def run(args):
    """The measurement of these arguments; returns whether it reaches the minima.  Raises InputError."""
    minima = {"psnr": args.minimum_psnr, "ssim": args.minimum_ssim}
    require_positive("minimum_psnr", minima["psnr"], float, none=True)
    require_range("minimum_ssim", minima["ssim"] or 0, 0, 1, float)
    require_range("count", args.count, 2, 10**6)
    module, params = load(args.model)
    sizes = [_size(text, module.compression) for text in args.sizes.split(",")]
    found = {str(size): measure(module, params, size, args.count) for size in sizes}
    told = {
        size: {name: value._asdict() if isinstance(value, Interval) else value for name, value in row.items()}
        for size, row in found.items()
    }
    pathlib.Path(args.output).mkdir(parents=True, exist_ok=True)
    write_json(pathlib.Path(args.output) / "autoencoder.json", {"count": args.count, "sizes": told})
    print(f"{args.count} held-out scenes of a size\n{'size':>5}  {'PSNR in dB':22}  {'SSIM':25}  deviation of latents")
    for size, row in found.items():
        psnr, similar = "{:.2f} [{:.2f}, {:.2f}]".format(*row["psnr"]), "{:.4f} [{:.4f}, {:.4f}]".format(*row["ssim"])
        print(f"{size:>5}  {psnr:22}  {similar:25}  {row['deviation']:.3f}", flush=True)
    return all(bound is None or row[name].score >= bound for row in found.values() for name, bound in minima.items())


def _size(text, multiple):
    if not text.strip().isdecimal() or int(text) == 0 or int(text) % multiple:
        raise InputError(f"sizes: {text!r}: must be multiples of {multiple}, with commas between them")
    return int(text)


def main(argv=None):
    args = parse(argv)
    try:
        return int(not run(args))
    except (InputError, OSError) as error:
        print(f"sana_jax.evals.autoencoder: error: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"sana_jax.evals.autoencoder: FAILS: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
