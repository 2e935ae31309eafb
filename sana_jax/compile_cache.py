"""Compiled programs that outlive the process, and what compiling costs."""

import os
import pathlib

import jax

from sana_jax import parameters


def keep_programs(folder=None):
    """Lets jax keep what it compiles in `folder`, "none" for nowhere, None for the user's cache; beside it, `parameters`
    its tables.

    Programs are executables, so the folder is private, and one that others can write to is refused.
    Returns None, or why there is no cache, as a sentence for a warning.
    """
    if folder == "none":
        return None
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(folder) if folder else pathlib.Path(base) / "sana_jax" / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
        if hasattr(os, "getuid") and (found.st_uid != os.getuid() or found.st_mode & 0o022):
            raise PermissionError(1, "others may write to it")
    except OSError as error:
        return f"no compile cache in {folder}: {error.strerror}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    parameters.keep_tables(folder)
    return None


def count_seconds():
    """A list whose sum is the time that XLA spends compiling from now on."""
    seconds = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return seconds
