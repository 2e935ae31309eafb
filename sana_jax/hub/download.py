"""Models from the Hugging Face hub: a name in, a local folder out, only the files that are read.

    folder = find_model("sana-1.6b")        # or owner/name, owner/name@revision, hf://owner/name/file

The files lie in the hub's own cache (HF_HOME), where other programs find them too.  What was fetched
and its sha256 is recorded beside our other caches.
"""

import contextlib
import json
import os
import pathlib
import re
import shutil
import sys
from typing import NamedTuple

from sana_jax import memory, precision
from sana_jax.checkpoints.read import read_json
from sana_jax.errors import InputError, nearest, require_choice
from sana_jax.hub import folders
from sana_jax.hub.errors import explain, is_unreachable
from sana_jax.hub.fingerprints import cache_folder, files_sha256, write_atomically
from sana_jax.hub.known_files import KNOWN
from sana_jax.hub.names import BETTER, SHORT_NAMES, parse

LICENCE = (
    "licence: the weights are not under this program's licence. Read that of https://huggingface.co/{repo} "
    "(NVIDIA's for SANA and DC-AE, often not for commercial use) and, for the text encoder, Google's Gemma "
    "terms (https://ai.google.dev/gemma/terms); see LICENSES.md"
)
COMMIT = re.compile("[0-9a-f]{40}")


def say(line):
    """Where reports go unless the caller says otherwise: standard error."""
    print(line, file=sys.stderr)


def _once(report):
    """`report` without repetitions; of None, nothing at all."""
    said = set()

    def line(text):
        if report is not None and text not in said:
            report(text)
        said.add(text)

    return line


class File(NamedTuple):
    """What is known of a file of a repository; None is unknown."""

    size: int | None
    sha256: str | None


class Listing(NamedTuple):
    """The files of a repository at a commit."""

    commit: str
    files: dict  # {name: File}
    unreachable: str | None = None  # why no file can be added to those that are cached


def find_model(model, revision=None, *, wanted=None, variant=None, part=None, report=say):
    """The local folder (or file) of a model, downloaded if need be.

    Args:
      model: an existing path, which is returned as it is; a short name (`SHORT_NAMES`); owner/name of a
        pipeline or of a component; either with @revision; or hf://owner/name/path for one file (the only
        way to fetch a pickle) or one folder of a repository.
      revision: branch, tag or commit.
      wanted: preferred weights, "fp32", "bf16" or "fp16", see `checkpoints.read.choose_variant`; None is
        the published dtype of a known repository, which halves what float32 would be to fetch.
      variant: the weights that must be there; None leaves it to `wanted`.
      part: of a pipeline only "transformer", "vae" or "text_encoder" (and tokenizer).
      report: called with each line that a person should see before and after a download, or None.
    Returns:
      pathlib.Path.  Of a repository: its snapshot, which holds at least the files that are read.
    Raises:
      InputError: one line that names the model and what to do: no such model, no right to it, no
      network, no room, or a file that is not what it should be.
    """
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(f"model={model!r}: must be a path or a Hugging Face id, not a {type(model).__name__}")
    if part is not None:
        require_choice("part", part, tuple(folders.PARTS))
    if os.path.exists(model):
        if revision is not None:
            raise InputError(f"revision={revision!r}: {model} is a local path, and has no revisions")
        return pathlib.Path(model)
    reference = parse(model, revision)
    report = _once(report)
    if wanted is None and (dtype := precision.published(reference.repo.split("/")[1])) is not None:
        wanted = precision.short(dtype)
    if better := BETTER.get(reference.repo):
        report(f"note: {reference.repo} paints blobs in some programs; {better} is the same model in bfloat16")
    listing = _listing(reference, report)
    try:
        path = _fetch_all(reference, listing, report, wanted, variant, part)
        if listing.unreachable is None:  # not before: a ref without its files would hide the commit that is whole
            _remember_branch(reference, listing.commit)
        return path
    except InputError as error:
        if listing.unreachable is None or listing.unreachable in str(error):
            raise
        raise _failed(reference, f"{listing.unreachable}, and the cache is not complete: {error}") from error


def _failed(reference, reason):
    return InputError(f"model={reference.model!r}: not a local folder, and the download failed: {reason}")


def _fetch_all(reference, listing, report, wanted, variant, part):
    inside, prefix = set(listing.files), ""
    if reference.path in listing.files:  # one file, named as such
        names = [reference.path]
    else:
        if reference.path:
            prefix = reference.path + "/"
            inside = {n.removeprefix(prefix) for n in inside if n.startswith(prefix)}
            if not inside:
                raise _failed(reference, f"the repository has no {reference.path!r}{nearest(reference.path, listing.files)}")
        source = reference.repo + "/" * bool(prefix) + reference.path
        names = folders.small_files(inside, source, part)
        weights = [
            folders.weight_index(inside, folder, source, wanted, variant)
            for folder in folders.component_folders(inside, source, part)
        ]
        snapshot = _snapshot(reference.repo, listing.commit)
        indices = [name for name in weights if name.endswith(".json")]
        _fetch(reference, listing, [prefix + name for name in indices], report)
        for name in indices:
            weights += folders.shards(snapshot / prefix / name, name)
        names = [prefix + name for name in names + weights]
    _fetch(reference, listing, names, report)
    return _snapshot(reference.repo, listing.commit) / reference.path


def _cache(repo):
    from huggingface_hub import constants

    return pathlib.Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _snapshot(repo, commit):
    return _cache(repo) / "snapshots" / commit


def _record(repo, commit):
    return cache_folder() / "fetched" / repo.replace("/", "--") / f"{commit}.json"


def _recorded(repo, commit):
    """The Listing that was recorded with an earlier download, or None (none, or a damaged one)."""
    try:
        files = read_json(_record(repo, commit))[repo]["files"]
        return Listing(commit, {str(name): File(file["size"], file["sha256"]) for name, file in files.items()})
    except (InputError, AttributeError, KeyError, TypeError, RecursionError):
        return None


def _cached(reference):
    """What the cache holds of a model, or None.  Asks nobody."""
    commit = reference.revision or "main"
    if not COMMIT.fullmatch(commit):
        try:
            commit = (_cache(reference.repo) / "refs" / commit).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return None
    snapshot = _snapshot(reference.repo, commit)
    if not COMMIT.fullmatch(commit) or not snapshot.is_dir():
        return None
    files = {name: File((snapshot / name).stat().st_size, None) for name in folders.names_in(snapshot)}
    return _recorded(reference.repo, commit) or Listing(commit, files)


def _listing(reference, report):
    """The files of a repository: as recorded for a commit, else as the hub says, else as cached."""
    from huggingface_hub import HfApi, constants

    if COMMIT.fullmatch(reference.revision or "") and (recorded := _recorded(reference.repo, reference.revision)):
        return recorded._replace(unreachable=_offline())
    cached = _cached(reference)
    if offline := _offline():
        if cached is None:
            where = _cache(reference.repo).parent
            raise _failed(
                reference,
                f"{offline}, and {reference.repo} is not in {where}; unset it, or fetch the model where there is a "
                f"network (`hf download {reference.repo}`) and copy that folder",
            )
        return cached._replace(unreachable=offline)
    try:
        info = HfApi(endpoint=constants.ENDPOINT).model_info(
            reference.repo, revision=reference.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except Exception as error:  # the library raises many kinds; each becomes one line
        reason = _explain(error, reference)
        if cached is None or not is_unreachable(error):
            raise _failed(reference, reason) from error
        report(f"{reason}; going on with the cached commit {cached.commit[:10]} of {reference.repo}")
        return cached._replace(unreachable=reason)
    if not COMMIT.fullmatch(info.sha or ""):
        raise _failed(reference, f"{constants.ENDPOINT} does not answer as the hub does (no commit); check HF_ENDPOINT")
    files = {s.rfilename: File(s.size, s.lfs.sha256 if s.lfs else None) for s in info.siblings or ()}
    if recorded := _recorded(reference.repo, info.sha):  # which knows the small files too
        files |= {name: recorded.files[name] for name in files.keys() & recorded.files if files[name].sha256 is None}
    return Listing(info.sha, files)


def _offline():
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE=1 forbids it" if constants.HF_HUB_OFFLINE else None


def _explain(error, reference):
    from huggingface_hub import constants

    hint = nearest(reference.repo, SHORT_NAMES.values())
    return explain(error, reference.repo, reference.revision, constants.ENDPOINT, hint)


def _remember_branch(reference, commit):
    """Notes in the hub's cache where a branch points, for later runs without a network."""
    ref = _cache(reference.repo) / "refs" / (reference.revision or "main")
    if reference.revision != commit:
        with contextlib.suppress(OSError):  # a cache that is only read, where nothing is fetched into either
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit, encoding="utf-8")


def _size(count):
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _fetch(reference, listing, names, report):
    """Downloads those of the named files that are not cached yet, and checks all of them.

    Raises InputError.
    """
    import huggingface_hub
    from huggingface_hub import constants

    snapshot = _snapshot(reference.repo, listing.commit)
    missing = [name for name in names if not (snapshot / name).is_file()]
    if missing:
        if listing.unreachable:
            listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
            raise _failed(reference, f"{listing.unreachable}, and the cache ({snapshot}) lacks {listed}")
        needed = sum(listing.files[name].size or 0 for name in missing if name in listing.files)
        report(LICENCE.format(repo=reference.repo))
        report(f"download: {len(missing)} of {len(names)} files, {_size(needed)}, to {snapshot}")
        if needed > (memory.host_memory()[0] or needed):
            report(f"warning: that is more than this machine's memory; it suits only a device that has {_size(needed)} itself")
        _require_room(reference, snapshot, needed)
    for name in missing:
        try:
            huggingface_hub.hf_hub_download(
                reference.repo,
                name,
                revision=listing.commit,
                endpoint=constants.ENDPOINT,
                cache_dir=constants.HF_HUB_CACHE,
            )
        except Exception as error:  # as above
            raise _failed(reference, f"{name}: {_explain(error, reference)}") from error
    _check(reference, listing, names, missing)


def _require_room(reference, folder, needed):
    while not folder.exists():
        folder = folder.parent
    if (free := shutil.disk_usage(folder).free) < needed:
        raise _failed(
            reference,
            f"it needs {_size(needed)} in {folder}, which has {_size(free)} left; free some space, or set HF_HOME to "
            "a folder on another disk",
        )


def _check(reference, listing, names, fresh):
    """Compares sizes and sha256 with the table's and the hub's, and records those of fetched files.

    A fetched file that is wrong is removed again.  Raises InputError.
    """
    snapshot, repo = _snapshot(reference.repo, listing.commit), reference.repo
    known = KNOWN.get(repo, {})
    pinned = known.get("files", {}) if known.get("revision") == listing.commit else {}
    expected = {name: listing.files.get(name, File(None, None)) for name in names}
    expected |= {name: File(pinned[name]["size"], pinned[name]["sha256"]) for name in names if name in pinned}
    digests = files_sha256(snapshot, [n for n in names if n in fresh or expected[n].sha256])
    for name in names:
        path = snapshot / name
        size, sha256 = expected[name]
        if sha256 is not None and digests[name] != sha256:
            problem = f"its sha256 is {digests[name]}, must be {sha256}"
        elif size is not None and path.stat().st_size != size:
            problem = f"has {path.stat().st_size} bytes, must have {size}"
        else:
            continue
        if name in fresh:
            blob = path.resolve()
            path.unlink()
            blob.unlink(missing_ok=True)
        advice = "removed, run again" if name in fresh else "delete it and run again"
        raise InputError(f"model={reference.model!r}: {path} is not the published file: {problem}; {advice}")
    if fresh:
        earlier = _recorded(repo, listing.commit)  # that of the indices, say
        held = listing.files | (earlier.files if earlier else {})
        files = {n: {"size": f.size, "sha256": digests.get(n, f.sha256)} for n, f in held.items()}
        try:
            write_atomically(
                _record(repo, listing.commit), json.dumps({repo: {"revision": listing.commit, "files": files}}, indent=1)
            )
        except OSError as error:
            raise _failed(reference, f"{_record(repo, listing.commit)}: cannot be written ({error.strerror})") from error
