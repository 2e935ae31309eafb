"""What went wrong between here and the Hugging Face hub, as one line that says what to do.

Errors are told by the names of their classes: the library has changed its HTTP client, and the names
have stayed.
"""

import errno

CONNECTION = ("ConnectError", "TimeoutException", "OfflineModeIsEnabled", "NetworkError", "RemoteProtocolError")
ACCEPT = "accept the terms at https://huggingface.co/{repo}, then `hf auth login`"


def _kinds(error):
    return {kind.__name__ for kind in type(error).__mro__}


def _cause(error):
    """The reason behind the library's "not in the cache either"."""
    while "LocalEntryNotFoundError" in _kinds(error) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error):
    return getattr(getattr(error, "response", None), "status_code", None)


def is_unreachable(error):
    """Whether the hub could not be asked at all, so that what is cached may serve."""
    error = _cause(error)
    return bool(_kinds(error) & set(CONNECTION)) or (_status(error) or 0) >= 500


def explain(error, repo, revision=None, endpoint="https://huggingface.co", hint=""):
    """One line, what happened and what to do, for an error of the hub's library or of the disk.

    Args:
      repo: owner/name; revision: branch, tag or commit that was asked for, or None.
      endpoint: the hub's address.
      hint: a "did you mean" for a repository that is not there.
    """
    error = _cause(error)
    kinds, status = _kinds(error), _status(error)
    detail = (str(error).strip() or type(error).__name__).splitlines()[0]
    accept = ACCEPT.format(repo=repo)
    if "GatedRepoError" in kinds:
        return f"its owner asks to agree to terms first: {accept}"
    if "DisabledRepoError" in kinds:
        return "the hub has disabled this repository"
    if "RevisionNotFoundError" in kinds:
        return f"the repository has no revision {revision!r}"
    if "EntryNotFoundError" in kinds and status == 404:
        return f"the repository has no such file ({detail})"
    if status == 401 and "invalid credentials" not in str(error).lower():  # so the hub answers of any name to strangers
        return f"no public repository of this name{hint}; if it is private or gated, {accept}"
    if "RepositoryNotFoundError" in kinds:
        return f"no such repository{hint}"
    if status == 401:
        return f"the hub does not accept your token: `hf auth login` with a valid one; if it is gated, {accept}"
    if status == 403:
        return f"the hub forbids it for you: {accept} with a token that may read it"
    if status == 429:
        return "the hub asks to slow down; wait some minutes and run again, finished files are kept"
    if status is not None and status >= 500:
        return f"the hub at {endpoint} has trouble of its own (status {status}); run again later, finished files are kept"
    if "ProxyError" in kinds:
        return f"the proxy fails ({detail}); see HTTPS_PROXY and NO_PROXY"
    if "TimeoutException" in kinds:
        return (
            f"the hub at {endpoint} did not answer in time; run again, finished files are kept "
            "(HF_HUB_ETAG_TIMEOUT=60 and HF_HUB_DOWNLOAD_TIMEOUT=60 wait longer)"
        )
    if kinds & set(CONNECTION):
        return (
            f"cannot reach {endpoint} ({detail}); check the network (and HF_ENDPOINT), or pass a folder; "
            "finished files are kept"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; free some space, or set HF_HOME to a folder on another disk"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'} cannot be written ({error.strerror}); HF_HOME sets another folder"
    if "size" in detail and "check failed" in detail:
        return f"a file came incomplete; run again ({detail})"
    return f"{type(error).__name__}: {detail}"
