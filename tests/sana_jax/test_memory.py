"""A model that cannot fit is refused before its weights are read."""

import types
import warnings

import jax
import jax.numpy as jnp
import pytest

from sana_jax import loading, memory
from sana_jax.errors import InputError

GB = 10**9


def gpu(limit, used=0, process=0, **more):
    stats = {"bytes_limit": limit, "bytes_in_use": used} if limit else None
    return types.SimpleNamespace(
        platform="gpu", device_kind="Toy GPU", process_index=process, memory_stats=lambda: stats, **more
    )


def test_this_machine_says_what_it_has():
    total, free = memory.host_memory()
    assert 10**8 < free <= total < 10**14


@pytest.mark.parametrize("files, expected", [
    ({"/proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 40 kB\nSwapTotal: 20 kB\n"}, (120 * 1024, 40 * 1024)),
    ({"/proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 40 kB\n", memory.LIMITS[0]: "max\n"}, (100 * 1024, 40 * 1024)),
    ({"/proc/meminfo": "MemTotal: 100 kB\nMemAvailable: 40 kB\n", memory.LIMITS[0]: "20480\n"}, (20480, 20480)),
    ({"/proc/meminfo": "MemTotal: 100 kB\n", memory.LIMITS[1]: "51200"}, (51200, None)),
])  # fmt: skip
def test_machines_and_containers(monkeypatch, files, expected):
    spaced = {path: text.replace(": ", ":    ") for path, text in files.items()}
    monkeypatch.setattr(memory, "_read", lambda path: spaced.get(path, ""))
    assert memory.host_memory() == expected


def test_a_machine_that_says_nothing(monkeypatch):
    monkeypatch.setattr(memory, "_read", lambda path: "")
    monkeypatch.delattr(memory.os, "sysconf")
    assert memory.host_memory() == (None, None)
    memory.require_memory(10**20, "m")


def test_bytes_of_parameters():
    shapes = {"a": (3, 5), "b": (), "c": (7,)}
    assert memory.parameter_bytes(shapes, jnp.float32) == 4 * 23
    assert memory.parameter_bytes(shapes, jnp.bfloat16) == 2 * 23


def test_on_a_cpu(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: (8 * GB, 5 * GB))
    with pytest.raises(InputError, match=r"^model='m': its weights alone need 9.1 GB of memory, this machine has 8.0 GB; take a "):
        memory.require_memory(9.1 * GB, "m")
    with pytest.raises(InputError):  # eight devices of one machine have its memory once
        memory.require_memory(9.1 * GB, "m", jax.devices())
    with pytest.warns(UserWarning, match="need 6.0 GB of memory, this machine has 5.0 GB left; .*--dtype bf16.*height"):
        memory.require_memory(6 * GB, "m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory.require_memory(4 * GB, "m")


def test_on_gpus():
    with pytest.raises(InputError, match="Toy GPU x 1 has 8.0 GB; "):
        memory.require_memory(9 * GB, "m", [gpu(8 * GB)])
    with pytest.warns(UserWarning, match="Toy GPU x 1 has 6.0 GB left"):
        memory.require_memory(7 * GB, "m", [gpu(8 * GB, 2 * GB)])
    memory.require_memory(9 * GB, "m", [gpu(8 * GB), gpu(8 * GB)])
    memory.require_memory(9 * GB, "m", [gpu(8 * GB), gpu(8 * GB, process=1)])  # half of it is another's
    memory.require_memory(90 * GB, "m", [gpu(None)])
    with pytest.raises(InputError, match="need 9.0 GB"):
        memory.require_memory(18 * GB, "m", [gpu(8 * GB), gpu(8 * GB, process=1)])


@pytest.mark.parity
def test_a_pipeline_is_refused_before_its_weights_are_read(toy_folder, monkeypatch):
    needed = sum(file.stat().st_size for file in toy_folder.rglob("*.safetensors"))
    monkeypatch.setattr(memory, "host_memory", lambda: (needed * 2 // 3, 1))
    monkeypatch.setattr(loading.memory, "host_memory", lambda: (needed * 2 // 3, 1))
    read = []
    monkeypatch.setattr("sana_jax.components.Prepared.read", lambda self, *_: read.append(1))
    with pytest.raises(InputError, match="its weights alone need .* this machine has .*--dtype bf16"):
        loading.load_pipeline(toy_folder, dtype="fp32")
    assert read == []
    with pytest.warns(UserWarning, match="GB left"), pytest.raises(TypeError):  # half as much fits; nothing was read
        loading.load_pipeline(toy_folder, dtype="bf16")
    assert len(read) == 3
