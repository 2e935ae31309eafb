"""What cache.json says of where features come from."""

import dataclasses
import hashlib
import json

from sana_jax.data import cache
from sana_jax.data.cached import MADE_FROM, META, made_from, read_meta, write_meta
from tests.sana_jax.data import test_cache
from tests.sana_jax.data.test_cache import OPTIONS, SOURCE, contents

networks, config, made = test_cache.networks, test_cache.config, test_cache.made
SAID = {"class": "Synthetic", **dataclasses.asdict(SOURCE), "aspects": [1.0]}


def test_what_it_was_made_from(made):
    assert made_from(made) == SAID
    rows_depend_on = {name: value for name, value in read_meta(made).items() if name not in ("fingerprint", MADE_FROM)}
    digest = hashlib.sha256(json.dumps(rows_depend_on, sort_keys=True).encode()).hexdigest()
    assert read_meta(made)["fingerprint"] == digest[:32], "runs on older features go on"


def test_an_older_one_goes_on_and_says_it_then(config, made, tmp_path):
    for name, data in contents(made).items():
        (tmp_path / name).write_bytes(data)
    meta = json.loads((tmp_path / META).read_text())
    write_meta(tmp_path, {name: value for name, value in meta.items() if name != MADE_FROM} | {"fingerprint": "old"})
    assert made_from(tmp_path) == {}
    assert cache.make(config, tmp_path, OPTIONS) == {}
    assert made_from(tmp_path) == SAID and read_meta(tmp_path)["fingerprint"] == "old"
