"""Who a process is, from fake environments; and two real processes that add numbers."""

import os
import socket
import subprocess
import sys

import pytest
from jax._src import clusters  # what JAX itself makes of an environment

from sana_jax.errors import InputError
from sana_jax.training import distributed
from sana_jax.training.distributed import Distributed, plan
from tests.quick import xla_flags

SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_STEP_NODELIST": "node[007-008]", "SLURM_NTASKS": "16", "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip
MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "1", "MPI_LOCALRANKID": "0"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}


def given(coordinator, processes, process):
    return {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}


def without(environment, *names):
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    "config, environment, expected",
    [
        (Distributed(), {}, None),
        (Distributed("h:1", 2, 0), {}, given("h:1", 2, 0)),
        (Distributed("[fe80::1]:9", 2, 1), {}, given("[fe80::1]:9", 2, 1)),
        (
            Distributed(),
            {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"},
            given("h:1", 3, 2),
        ),
        (Distributed(process=0), {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "3"}, given("h:1", 3, 0)),
        (Distributed(), SLURM, {"num_processes": 16, "process_id": 11, "local_device_ids": [3]}),
        # one process on each host: it has all GPUs, where JAX would give it one
        (
            Distributed(),
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x16)", "SLURM_LOCALID": "0"},
            {"num_processes": 16, "process_id": 11, "local_device_ids": []},
        ),
        (Distributed(), {**SLURM, "JAX_LOCAL_DEVICE_IDS": "0,1"}, {"num_processes": 16, "process_id": 11}),
        # sbatch without srun: nobody else was started
        (Distributed(), without(SLURM, "SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE"), None),
        (Distributed(), {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (Distributed(processes=1), SLURM, None),
        (Distributed(), OPEN_MPI, {"num_processes": 4, "process_id": 2, "local_device_ids": [0]}),
        (Distributed("h:1"), MPICH, given("h:1", 2, 1) | {"local_device_ids": []}),
        (Distributed(processes=1), POD, None),
        (Distributed(), without(POD, "JOB_COMPLETION_INDEX"), None),  # a plain pod
        (Distributed("h:1", 2, 1), POD, given("h:1", 2, 1)),
    ],
)
def test_plan(config, environment, expected):
    assert plan(config, environment) == expected


@pytest.mark.parametrize(
    "config, environment, words",
    [
        (Distributed("h:1"), {}, ["distributed.processes", "distributed.process:", "JAX_NUM_PROCESSES"]),
        (Distributed(processes=2, process=0), {}, ["distributed.coordinator: missing", "JAX_COORDINATOR_ADDRESS"]),
        (Distributed("h", 2, 0), {}, ["distributed.coordinator='h'", "host:port"]),
        (Distributed("fe80::1:9", 2, 0), {}, ["host:port"]),
        (Distributed("h:1", 2, 2), {}, ["distributed.process=2", "below"]),
        (Distributed("h:1", 0, 0), {}, ["distributed.processes=0", "at least 1"]),
        (Distributed("h:1", 2), {"JAX_PROCESS_ID": "first"}, ["JAX_PROCESS_ID='first'", "whole number"]),
        (Distributed(), MPICH, ["distributed.coordinator: missing"]),
        (Distributed(), without(OPEN_MPI, "OMPI_MCA_orte_hnp_uri"), ["distributed.coordinator: missing"]),
        (Distributed(), POD, ["pip install kubernetes", "distributed.processes=1"]),
    ],
)
def test_what_is_missing_or_wrong_is_named(config, environment, words):
    with pytest.raises(InputError) as error:
        plan(config, environment)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize("environment, address", [(SLURM, "node007:"), (OPEN_MPI, "10.96.0.1:")])
def test_jax_finds_the_address_that_is_left_to_it(environment, address, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    arguments = plan(Distributed(), environment)
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        None, arguments["num_processes"], arguments["process_id"], arguments["local_device_ids"], None, 1
    )
    assert found[0].startswith(address)
    assert list(found[1:]) == [arguments[name] for name in ("num_processes", "process_id", "local_device_ids")]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_nobody_at_the_address():
    with pytest.raises(InputError, match="nobody answered for 0 s .*process 0 listens there"):
        distributed.initialize(Distributed(f"127.0.0.1:{free_port()}", 2, 1, join_seconds=0))


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match="process 0 cannot listen there .*in use"):
            distributed.initialize(Distributed(address, 2, 0))


TWO = """
import sys
import jax
from sana_jax.training.distributed import Distributed, initialize
assert initialize(Distributed(sys.argv[1], 2, int(sys.argv[2]), join_seconds=60, heartbeat_seconds=10, shutdown_seconds=30))
assert jax.device_count() == 4 and jax.local_device_count() == 2
mesh = jax.make_mesh((4,), ("data",))
P = jax.sharding.PartitionSpec
own = 1.0 + 2 * jax.process_index() + jax.numpy.arange(2.0)
rows = jax.make_array_from_process_local_data(jax.sharding.NamedSharding(mesh, P("data")), own)
total = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()))(rows)
import numpy as np
from sana_jax.data import shapes
from sana_jax.sharding import make_mesh
from sana_jax.training import layout
reader, mesh = shapes.Shapes(size=64).open(), make_mesh(data=4)
scenes = np.stack([reader[i].arrays["scene"] for i in range(4)])
mine = slice(2 * jax.process_index(), 2 * jax.process_index() + 2)
painted = layout.painter(reader, mesh)(layout.put_batch({"scene": scenes[mine]}, mesh), (64, 64))["image"]
seen = np.concatenate([np.asarray(shard.data) for shard in sorted(painted.addressable_shards, key=lambda s: s.index[0].start)])
wanted = np.asarray(reader.paint(scenes, 64, 64))
assert np.abs(seen.astype(int) - wanted[mine]).max() <= 1 < np.abs(seen.astype(int) - wanted[mine][::-1]).max()
print(jax.process_index(), total.tolist())
"""


def test_two_processes_add_and_paint_their_own_rows():
    environment = os.environ | {"XLA_FLAGS": xla_flags(devices=2)}
    address = f"127.0.0.1:{free_port()}"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, address, str(i)], env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [out.splitlines()[-1:] for out, _ in said] == [["0 [10.0]"], ["1 [10.0]"]], said
    assert f"process 1 of 2 waits up to 60 s for the others at {address}" in said[1][1]
