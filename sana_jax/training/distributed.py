"""One process for each host or accelerator, joined by JAX's own runtime.

A process learns who it is from the first of these that says something:

    the configuration        distributed.coordinator=host:port processes=4 process=0
    the environment          JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID
    a launcher               srun, mpirun, an indexed Kubernetes job (GKE), through JAX's detection

With none of them it is alone, and `jax.distributed` is never called.
"""

import dataclasses
import importlib.util
import os
import re
import socket
import sys
import time
from typing import NamedTuple

import jax

from sana_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Who this process is, and how long it waits for the others; seconds.

    Attributes:
      coordinator: "host:port" of process 0, or "" to be found out.
      processes: how many there are, or None to be found out; 1 is alone whatever the launcher says.
      process: the number of this one, from 0, or None to be found out.
      join_seconds: how long the others may take to appear.
      heartbeat_seconds: how long a process may be silent before the others give up.
      shutdown_seconds: how long a process that is done waits for the others.
    """

    coordinator: str = ""
    processes: int | None = None
    process: int | None = None
    join_seconds: int = 300
    heartbeat_seconds: int = 100
    shutdown_seconds: int = 300


class Launcher(NamedTuple):
    """What a launcher tells its processes through environment variables.

    Attributes:
      count, rank: variables with the number of processes, and of this one.
      neighbours, seat: the same two, of the processes on this host.
      address: the variable from which JAX makes the coordinator's address; "" where there is none.
    """

    count: str
    rank: str
    neighbours: str
    seat: str
    address: str = ""


LAUNCHERS = (
    # srun.  Inside `sbatch` or `salloc` alone the counts are there too, though nobody else was
    # started; only a step of `srun` has the list of its nodes.
    Launcher(
        "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_LOCALID",
        "SLURM_STEP_NODELIST",
    ),
    # Open MPI; its version 5 says no address
    Launcher(
        "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_MCA_orte_hnp_uri",
    ),
    Launcher("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),  # MPICH, Intel MPI
)  # fmt: skip
FIELDS = {  # field: (argument of jax.distributed.initialize, environment variable)
    "coordinator": ("coordinator_address", "JAX_COORDINATOR_ADDRESS"),
    "processes": ("num_processes", "JAX_NUM_PROCESSES"),
    "process": ("process_id", "JAX_PROCESS_ID"),
}


def initialize(config=Distributed()):
    """Joins the other processes; returns whether there are any.  Call before any array exists.

    XLA ends a process that waited in vain for the others; so what is waited for is said before.
    Raises:
      InputError: a value that cannot be right, one that is missing, or nobody at the address.
    """
    arguments = plan(config, os.environ)
    if arguments is None:
        return False
    process, processes = arguments.get("process_id", "?"), arguments.get("num_processes", "?")
    address = arguments.get("coordinator_address", "")
    print(
        f"distributed: process {process} of {processes} waits up to {config.join_seconds} s for the others"
        + f" at {address}" * bool(address),
        file=sys.stderr,
        flush=True,
    )
    if address and process == 0:
        _check_free(address)
    elif address:
        _wait_for(address, config.join_seconds)
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=config.join_seconds,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            shutdown_timeout_seconds=config.shutdown_seconds,
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"distributed: process {process} of {processes} cannot join {address} ({reason})") from error
    return True


def _check_free(address):
    """Raises InputError: process 0 cannot listen at the port of "host:port", with which XLA would crash."""
    try:
        socket.create_server(("", int(address.rpartition(":")[2]))).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"distributed.coordinator={address!r}: process 0 cannot listen there ({error})") from error


def _wait_for(address, seconds):
    """Returns when something listens at "host:port".  Raises InputError: nothing did in time."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=max(seconds, 1)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"distributed.coordinator={address!r}: nobody answered for {seconds} s ({error.strerror or error}); "
                    "process 0 listens there, once it is started"
                ) from error
            time.sleep(0.1)


def plan(config, environment):
    """Arguments of `jax.distributed.initialize` that say who this process is, or None: it is alone.

    Args:
      config: a `Distributed`.
      environment: mapping, such as os.environ.
    Raises:
      InputError: as `initialize`.
    """
    given = {
        "coordinator": config.coordinator or environment.get(FIELDS["coordinator"][1]) or None,
        "processes": _whole(config, environment, "processes", least=1),
        "process": _whole(config, environment, "process", least=0),
    }
    if given["processes"] == 1:
        return None
    launcher = next((row for row in LAUNCHERS if _launched(row, environment)), None)
    pod = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    if launcher is not None:
        for field, variable in (("processes", launcher.count), ("process", launcher.rank)):
            if given[field] is None:
                given[field] = int(environment[variable])
    detected = (launcher is not None and launcher.address in environment) or (
        pod and importlib.util.find_spec("kubernetes") is not None
    )
    if all(value is None for value in given.values()) and not pod:
        return None
    missing = [field for field, value in given.items() if value is None]
    if missing and not detected:
        why = "a Kubernetes job; `pip install kubernetes` finds them out, or " if pod else ""
        raise InputError(
            f"distributed.{', distributed.'.join(missing)}: missing; {why}"
            f"set {', '.join(FIELDS[field][1] for field in missing)} or the fields themselves "
            "(distributed.processes=1: this process is alone)"
        )
    _check(given)
    arguments = {FIELDS[field][0]: value for field, value in given.items() if value is not None}
    return arguments | _local_devices(launcher, environment)


def _whole(config, environment, field, least):
    """A field as int: the configuration's, else the environment's, else None."""
    value, variable = getattr(config, field), FIELDS[field][1]
    name = f"distributed.{field}"
    if value is None:
        value, name = environment.get(variable) or None, variable
    if value is None:
        return None
    if not re.fullmatch(r"\d+", str(value)) or int(value) < least:
        raise InputError(f"{name}={value!r}: must be a whole number, at least {least}")
    return int(value)


def _launched(launcher, environment):
    """Whether this process is one of several that a launcher started."""
    count, rank = environment.get(launcher.count, ""), environment.get(launcher.rank, "")
    step = not launcher.count.startswith("SLURM") or launcher.address in environment
    return step and rank.isdigit() and count.isdigit() and int(count) > 1


def _check(given):
    address, processes, process = given.values()
    if address is not None and not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^\s:\[\]]+):\d{1,5}", address):
        raise InputError(f"distributed.coordinator={address!r}: must be host:port, such as 10.0.0.1:8476")
    if processes is not None and process is not None and process >= processes:
        raise InputError(
            f"distributed.process={process}: must be below distributed.processes={processes}; they count from 0"
        )


def _local_devices(launcher, environment):
    """Which GPUs are this process's: all ([] to JAX) where it has the host to itself, else one.

    JAX by itself gives a process of srun or mpirun one GPU even where seven others then idle, and
    with a launcher that it does not know gives each process all of them."""
    if launcher is None or environment.get("JAX_LOCAL_DEVICE_IDS"):
        return {}
    alone = re.fullmatch(r"1(\(x\d+\))?", environment.get(launcher.neighbours, ""))
    seat = environment.get(launcher.seat, "")
    if alone:
        return {"local_device_ids": []}
    return {"local_device_ids": [int(seat)]} if seat.isdigit() else {}
