"""What README promises of training: configs/debug.py, from nothing to a picture, interrupted once.

    python -m benchmarks.debug_run --output DIR

Trains the three stages, stops the last one in the middle with SIGTERM, goes on, exports, paints with
sample.py, and with diffusers where it is installed.  Exit status 1 unless all of it holds: 20 dB, latents
of the flow at half their first distance to the data, 4 minutes of training, two pictures.
"""

import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image

from benchmarks import environment

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROMPT = "a large white ring on red"
COLUMNS = ("what", "value", "bound", "ok")
PEER = """
import sys
from diffusers import SanaPipeline
pipeline = SanaPipeline.from_pretrained(sys.argv[1])
pipeline.text_encoder.set_attn_implementation("eager")  # SDPA drops Gemma's soft cap
pipeline(sys.argv[2], height=64, width=64, complex_human_instruction=None, use_resolution_binning=False).images[0].save(sys.argv[3])
"""


def events(run, kind):
    path = run / "events.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def start(*command):
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)


def finish(process):
    if status := process.wait():
        raise SystemExit(f"{' '.join(process.args)}: exit status {status}")


def train(run):
    """The seconds of both parts together."""
    command, flow, began = ("train.py", "configs/debug.py", f"workdir={run}"), run / "flow", time.monotonic()
    process = start(*command)
    while process.poll() is None and not events(flow, "preview"):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    finish(process)
    if not events(flow, "stopped"):
        raise SystemExit("the run was not stopped in the middle")
    finish(start(*command))
    return time.monotonic() - began


def main(argv=None):
    args = environment.arguments(__doc__).parse_args(argv)
    output = pathlib.Path(args.output).absolute()
    run, model = output / "run", output / "model"
    os.environ["XDG_CACHE_HOME"] = str(output / "cache")  # nothing is compiled yet
    rows = []

    def add(what, value, bound, ok):
        rows.append({"what": what, "value": value, "bound": bound, "ok": bool(ok)})

    seconds = train(run)
    add("training, s", seconds, "<= 240", seconds <= 240)
    psnr = events(run / "autoencoder", "preview")[-1]["psnr"]
    add("autoencoder, dB", psnr, ">= 20", psnr >= 20)
    distances = [event["distance"] for event in events(run / "flow", "preview")]
    add("distance of sampled latents, first", distances[0], "", True)
    add("distance of sampled latents, last", distances[-1], "<= half", distances[-1] <= distances[0] / 2)
    add("gone on in the middle of the flow", len(events(run / "flow", "resume")), "1", len(events(run / "flow", "resume")) == 1)
    finish(start("-m", "sana_jax.export", run / "flow", model))
    finish(start("sample.py", "--model", model, "--prompt", PROMPT, "-o", output / "ours"))
    painted = {"ours": next((output / "ours").glob("*.png"))}
    if importlib.util.find_spec("diffusers"):
        painted["diffusers"] = output / "diffusers.png"
        finish(start("-c", PEER, model, PROMPT, painted["diffusers"]))
    for name, path in painted.items():
        spread = float(np.asarray(Image.open(path), np.float32).std())
        add(f"picture of {name}, spread of its levels", spread, "> 20", spread > 20)
    environment.write_result(output / "debug_run.json", rows, command="python -m benchmarks.debug_run")
    print(environment.table(rows, COLUMNS))
    return int(not all(row["ok"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
