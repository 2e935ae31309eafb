"""What people may type for a model that lies on the Hugging Face hub."""

import re
from typing import NamedTuple

from sana_jax.errors import InputError, nearest
from sana_jax.hub.known_files import KNOWN

SHORT_NAMES = {  # docs/numerics.md 3.1; at 1.6B and 1024 px the bfloat16 weights paint clean pictures
    "sana-0.6b": "Efficient-Large-Model/Sana_600M_1024px_diffusers",
    "sana-0.6b-512": "Efficient-Large-Model/Sana_600M_512px_diffusers",
    "sana-1.6b": "Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers",
    "sana-1.6b-512": "Efficient-Large-Model/Sana_1600M_512px_diffusers",
    "sana-1.6b-512-multiling": "Efficient-Large-Model/Sana_1600M_512px_MultiLing_diffusers",
    "sana-1.6b-fp16": "Efficient-Large-Model/Sana_1600M_1024px_diffusers",
    "sana-1.6b-multiling": "Efficient-Large-Model/Sana_1600M_1024px_MultiLing_diffusers",
    "sana-1.6b-2k": "Efficient-Large-Model/Sana_1600M_2Kpx_BF16_diffusers",
    "sana-1.6b-4k": "Efficient-Large-Model/Sana_1600M_4Kpx_BF16_diffusers",
    "sana-1.5-1.6b": "Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers",
    "sana-1.5-4.8b": "Efficient-Large-Model/SANA1.5_4.8B_1024px_diffusers",
    "sana-sprint-0.6b": "Efficient-Large-Model/Sana_Sprint_0.6B_1024px_diffusers",
    "sana-sprint-1.6b": "Efficient-Large-Model/Sana_Sprint_1.6B_1024px_diffusers",
}
BETTER = {  # what to take instead of the first float16 weights, of which blobs are reported
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": "sana-1.6b",
}


class Reference(NamedTuple):
    """What a name stands for."""

    model: str  # as it was typed
    repo: str  # owner/name
    revision: str | None  # branch, tag or commit; None is the table's, else the main branch
    path: str  # a file or folder of the repository, "" for all of it


def parse(model, revision=None):
    """The `Reference` of a short name, owner/name or hf://owner/name/path, each with or without @revision.

    Raises InputError: none of these, a path that does not exist, or two revisions.
    """
    text = str(model)
    if text.startswith((".", "/", "~")):  # a path, and never the name of a repository
        raise InputError(f"model={text!r}: no such folder or file")
    name, _, at = text.partition("@")
    repo = r"(?P<repo>[\w.-]+/[\w.-]+)"
    if text.startswith("hf://"):
        match = re.fullmatch(rf"hf://{repo}(?:@(?P<at>refs/\w+/[^/@]+|[^/@]+))?(?:/(?P<path>[^/].*?))?/?", text)
    else:
        match = re.fullmatch(rf"{repo}(?:@(?P<at>[^@]+))?(?P<path>)", SHORT_NAMES.get(name, name) + text[len(name) :])
    if not match:
        raise InputError(
            f"model={text!r}: must be a folder in diffusers layout, or a Hugging Face id (owner/name), "
            f"hf://owner/name/file, or one of {', '.join(SHORT_NAMES)}{nearest(name, SHORT_NAMES)}"
        )
    at = match["at"]
    if revision is not None and at is not None and revision != at:
        raise InputError(f"revision={revision!r}: model={text!r} names another")
    if revision is None:
        revision = at or KNOWN.get(match["repo"], {}).get("revision")
    return Reference(text, match["repo"], revision, match["path"] or "")
