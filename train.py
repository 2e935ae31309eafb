"""Trains SANA, its autoencoder or its text encoder: one experiment, from the devices to the last step.

    python train.py configs/debug.py workdir=runs/debug
    python train.py configs/sana_1600m_512.py workdir=runs/a data.batch=512 --optim.lr=2e-5

An experiment is a Python file, see configs/; any of its fields can be overridden.  The same command
with the same workdir goes on where the run was left, on any number of devices.

Exit status: 0 done, or saved after SIGTERM or Ctrl-C; 2 bad input; 3 too many bad records; 4 loss or
gradient not finite, several times in a row; 5 hung; 1 anything else.
"""

import contextlib
import os
import pathlib
import sys

import jax

from sana_jax import compile_cache, experiment, flops, ops, sharding
from sana_jax.checkpoints.read import read_json
from sana_jax.checkpoints.write import write_json
from sana_jax.data.loader import Loader
from sana_jax.data.records import TooManyBadRecords
from sana_jax.data.workers import WorkerDied
from sana_jax.errors import InputError, NonFiniteError
from sana_jax.parameters import abstract_parameters
from sana_jax.training import distributed, frozen, initialise, layout, lock, optimizer, plan, processes
from sana_jax.training.fingerprint import state_hash
from sana_jax.training.metrics import Lagged, Metrics
from sana_jax.training.preemption import Preemption
from sana_jax.training.previews import Previewer
from sana_jax.training.reading import DamagedError
from sana_jax.training.state import create
from sana_jax.training.step import make_step
from sana_jax.training.store import SaveError, Store
from sana_jax.training.timing import Clocks
from sana_jax.training.watchdog import Watchdog

DESCRIPTION = "config.json"  # the experiment, in its run's folder
EXIT_CODES = {  # the first that fits
    TooManyBadRecords: 3, NonFiniteError: 4, InputError: 2, DamagedError: 1, SaveError: 1, WorkerDied: 1,
}  # fmt: skip


def main(arguments):
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        config = experiment.load(arguments[0], arguments[1:], run=True)
        stages = config.stages or (config,)
        distributed.initialize(stages[0].distributed)
        if warning := compile_cache.keep_programs():
            print(f"train.py: {warning}", file=sys.stderr)
        with Preemption() as preemption:
            for stage in stages:  # most experiments are one
                with lock.locked(stage.workdir):
                    if not train(stage, preemption):
                        break
        return 0
    except tuple(EXIT_CODES) as error:
        print(f"train.py: {error}", file=sys.stderr, flush=True)
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        if jax.distributed.is_initialized():
            os._exit(code)  # a polite end waits for the other processes, which may wait for this one
        return code


def train(config, preemption):
    """Trains until `config.steps` and returns True, or until a request to stop and returns False."""
    with contextlib.ExitStack() as opened:
        # ---- devices --------------------------------------------------------------------------------
        mesh = sharding.make_mesh(**layout.mesh_sizes(config.mesh))
        layout.check_batch(config.data.batch, config.optim.accumulate, mesh)
        ops.require_runnable(getattr(config.model, "kernels", "auto"))
        opened.enter_context(jax.set_mesh(mesh))

        # ---- data, and the networks that are not trained --------------------------------------------
        reader = config.data.source.open()
        config = frozen.with_instruction(config, reader)
        tokenize = frozen.tokenizer(config, reader)
        loader = Loader(
            reader, config.data, seed=config.seed, tokenize=tokenize, inputs=config.objective.reads,
            host=jax.process_index(), hosts=jax.process_count(),
        )  # fmt: skip
        opened.enter_context(loader)
        data = processes.the_same("data.source: the records", loader.fingerprint())
        constants, remarks = frozen.load(config, loader.names, reader, mesh)
        paint = layout.painter(reader, mesh)

        # ---- state: the last checkpoint's, or a new one ---------------------------------------------
        abstract = abstract_parameters(config.model)
        tx = optimizer.make(config.optim, config.steps, config.data.batch, abstract)
        abstract = jax.eval_shape(lambda params: create(params, tx, config.optim.ema), abstract)
        placed = layout.state_shardings(abstract, config.model, mesh)
        store = Store(
            pathlib.Path(config.workdir, "checkpoints"), config.checkpoint.keep, config.checkpoint.every,
            config.checkpoint.keep_every, config.reliability.stop_on_failed_save,
        )  # fmt: skip
        opened.enter_context(contextlib.closing(store))
        store.check_space(abstract)
        require_same_run(config)
        found = store.restore(layout.with_shardings(abstract, placed))
        if found:
            start, state, meta = found
            if meta["data"] != data:
                raise InputError(
                    f"data.source: is not what this run was trained on until step {start}, the order of samples would be "
                    "another; bring the data back, or start a new run with init.weights"
                )
            loader.seek(meta["samples"])
        else:
            params = initialise.parameters(config.model, config.init, mesh, config.seed)
            start, state = 0, jax.jit(lambda p: create(p, tx, config.optim.ema), out_shardings=placed)(params)
            del params
        if jax.process_index() == 0:
            write_json(pathlib.Path(config.workdir, DESCRIPTION), experiment.describe(config))

        # ---- what is seen of it ---------------------------------------------------------------------
        metrics = Metrics(config.workdir, config.steps, start, config.log.tensorboard)
        opened.enter_context(contextlib.closing(metrics))
        for remark in remarks:
            metrics.say(remark)
        lagged, peak = Lagged(), flops.peak(jax.devices()[0].device_kind)
        clocks = Clocks(metrics.began, metrics.productive, peak and peak * mesh.size)
        preview = Previewer(config, constants, mesh, reader, tokenize)

        # ---- one step -------------------------------------------------------------------------------
        step = make_step(config.model, config.objective, tx, config.optim, constants.modules, config.seed)
        step = jax.jit(layout.on_mesh(step, mesh), donate_argnums=0, out_shardings=(placed, None))
        programs = {}  # one for each shape of batch

        def program(batch, leave):
            shapes = tuple(a.shape for a in batch.values())
            if shapes not in programs:
                with clocks.apart("compile"), watchdog.paused():
                    lowered = step.lower(state, constants.params, batch)
                    compiled = preemption.while_waiting(lowered.compile, before_leaving=leave)
                    processes.meet("compiled")
                    flop = flops.train_flops(config.model, batch, constants)
                    programs[shapes] = compiled, flop
                    for line in plan.memory_plan(abstract, placed, mesh, compiled, flop):
                        metrics.say(line)
            return programs[shapes]

        def report(rows):
            """What has come back from the device: lines of the log, skipped steps, the end of a lost run."""
            for number, values, positions in rows:
                if not values["finite"]:
                    where = loader.where(positions[:8])  # of this process
                    end = first + (number - start) * config.data.batch
                    metrics.event("skipped", step=number, samples=[end - config.data.batch, end], records=where)
                    metrics.say(f"step {number}: loss or gradient is not finite, skipped; first records: {', '.join(where)}")
                if values["skipped_in_row"] >= config.optim.max_skips_in_row:
                    raise NonFiniteError(
                        f"step {number}: loss or gradient was not finite {config.optim.max_skips_in_row} times in a row "
                        f"(optim.max_skips_in_row); the newest checkpoint is of step {store.latest()}"
                    )
                if "loss" in values:
                    metrics.log(number, values, clocks.line(bad=loader.counts))

        def save(force=False):
            """A checkpoint of `state`, if it is time for one, behind all lines of its steps."""
            done = start + taken
            if force or done % config.checkpoint.every == 0:
                report(lagged.drain())
                with clocks.apart("checkpoint"):
                    position = {"samples": first + taken * config.data.batch, "data": data}
                    if store.save(done, state, position, force=True):
                        metrics.event("save", step=done)

        def leave():
            save(force=True)
            store.close()

        # ---- the loop -------------------------------------------------------------------------------
        taken, requested, first = 0, False, loader.samples  # of which a batch may be read and not yet taken
        with Watchdog(config.reliability.hang_seconds) as watchdog:
            while start + taken < config.steps and not requested:
                with clocks.apart("data"):
                    rows = next(loader)
                batch = paint(layout.put_batch(rows, mesh), loader.shape)
                compiled, flop = program(batch, leave)
                state, values = compiled(state, constants.params, batch)
                taken += 1
                done = start + taken
                clocks.step(config.data.batch, flop)
                whole = done % config.log.every == 0 or done == config.steps
                report(lagged.push(done, values, whole, rows["position"]))
                if preview.every and done % preview.every == 0:
                    with clocks.apart("preview"), watchdog.paused():
                        preview(done, state, metrics)
                requested = preemption.requested()
                save(force=requested or done == config.steps)
                store.check()
                watchdog.beat()
            report(lagged.drain())
            store.wait()
        finished = start + taken >= config.steps
        digest = state_hash(state)
        metrics.event("done" if finished else "stopped", step=start + taken, state_hash=digest)
        metrics.say(f"{config.workdir}: step {start + taken} of {config.steps}, state {digest[:16]}")
        return finished and not requested


def require_same_run(config):
    """Of a run that goes on, says what is another than at its last start.

    Raises InputError: something that a run keeps for life.
    """
    path = pathlib.Path(config.workdir, DESCRIPTION)
    if path.is_file() and initialise.has_steps(config.workdir):
        for line in experiment.changes(read_json(path), config):
            print(f"changed since the last start: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
