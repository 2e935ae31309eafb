"""Latents and text states, made once by the frozen networks of an experiment and kept as shards.

    python -m sana_jax.data.cache CONFIG OUT [field=value ...]

    python -m sana_jax.data.cache configs/sana_1600m_512.py features data.source.path=pictures
    python train.py configs/sana_1600m_512.py workdir=runs/a data.source=features

OUT gets shards of records with `latent` [h w c] float16, the autoencoder's own, and `states` [n d]
float16, those of the n valid tokens (of one caption, chosen as `data.captions` says), null.npy with
the states of the empty caption, and cache.json, which says what all was made from.  Row i is row i of
the source; what was bad there stays a bad record.

A shard has its name when it is whole, so the same command, given again, makes what is not there yet.
It stops (exit status 1) at a shard of which a record could not be read because of an I/O error, or
failed for no known reason: what may be good next time is not kept as bad.
Several machines share the work with --hosts and --host.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from sana_jax import compile_cache, experiment, sharding
from sana_jax.data import buckets, images
from sana_jax.data.array_record import Writer
from sana_jax.data.assemble import finite, read_one
from sana_jax.data.cached import MADE_FROM, META, NULL, Cached, read_meta, shard_names, write_meta
from sana_jax.data.captions import Captions
from sana_jax.data.records import BadRecord, Record
from sana_jax.errors import InputError, require_positive, require_range
from sana_jax.programs import apply
from sana_jax.training import frozen, layout
from sana_jax.training.fingerprint import state_hash
from sana_jax.training.lock import locked
from sana_jax.training.objectives import Flow
from sana_jax.training.objectives.flow import signed, text_states

VERSION = 1
EXAMPLES = 10  # of records that failed, in a message


class NotWhole(RuntimeError):
    """Records of a shard failed for reasons that are not theirs; the shard is not written."""


@dataclasses.dataclass
class Options:
    """batch: pictures that go through the networks together.  shard_records: in one file.
    text: states of captions too.  host, hosts: every hosts-th shard, from `host` on, is made here."""

    batch: int = 32
    shard_records: int = 2048
    text: bool = True
    host: int = 0
    hosts: int = 1

    def __post_init__(self):
        require_positive("--batch", self.batch)
        require_positive("--shard-records", self.shard_records)
        require_positive("--hosts", self.hosts)
        require_range("--host", self.host, 0, self.hosts - 1)


def make(config, out, options=Options()):
    """Makes the shards of this host that are not there yet.

    Args:
      config: an `Experiment` with a Flow objective; `data`, `frozen`, `mesh` and `seed` are used.
      out: a folder, new or of the same cache.
    Returns:
      {reason: bad records} of the shards that were made.
    Raises:
      InputError: a network is not given, nothing can be used, or `out` holds something else.
      NotWhole: records could not be read now.
    """
    if not isinstance(config.objective, Flow) or isinstance(config.data.source, Cached):
        raise InputError("objective, data.source: only the pictures and captions of a Flow experiment can be cached")
    config = dataclasses.replace(config, preview=dataclasses.replace(config.preview, every=0))
    out = pathlib.Path(out)
    mesh = sharding.make_mesh(**layout.mesh_sizes(config.mesh))
    devices = math.prod(mesh.shape.get(axis, 1) for axis in layout.ROWS)
    if options.batch % devices:
        near = " or ".join(str(n) for n in (options.batch // devices * devices, -(-options.batch // devices) * devices) if n)
        raise InputError(f"--batch={options.batch}: must be a multiple of the {devices} devices along data and fsdp; {near}")
    layout.check_batch(options.batch, 1, mesh)
    with locked(out / f".host-{options.host}-of-{options.hosts}"), jax.set_mesh(mesh):
        reader = config.data.source.open()
        tokenize = frozen.tokenizer(config, reader) if options.text else None
        if options.text and tokenize is None:
            raise InputError("frozen.text='': is needed for text states; --no-text leaves them out")
        names = {"image"} | ({"ids", "ids_mask"} if options.text else {"states"})  # that no network has to make
        constants, _ = frozen.load(config, names, reader, mesh)
        wanted, found = config.objective.scaling_factor, constants.modules["dc_ae"].scaling_factor
        if wanted != found:
            raise InputError(f"objective.scaling_factor={wanted}: the autoencoder's is {found}")
        meta = _describe(config, options, reader, tokenize, constants)
        _claim(out, meta)
        if options.text:
            _write_array(out / NULL, np.asarray(constants.params["null"], np.float16))
        work = _Work(reader, config, options, tokenize, constants, mesh)
        return work.make(out, shard_names(meta)[options.host :: options.hosts])


def _describe(config, options, reader, tokenize, constants):
    """cache.json: whatever a row depends on, and what all was made from, for those who read of it later."""
    data = config.data
    meta = {
        "version": VERSION,
        "rows": len(reader),
        "shard_records": options.shard_records,
        "source": reader.fingerprint(),
        "size": data.size,
        "buckets": experiment.describe(data.buckets),
        "dc_ae": state_hash(constants.params["dc_ae"]),
        "scaling_factor": constants.modules["dc_ae"].scaling_factor,
        "dc_ae_dtype": np.dtype(constants.modules["dc_ae"].dtype).name,
        "text": options.text,
    }
    if options.text:
        meta |= {
            "text_encoder": state_hash(constants.params["text"]),
            "text_encoder_dtype": np.dtype(constants.modules["text"].dtype).name,
            "instruction": hashlib.sha256(tokenize.instruction.encode()).hexdigest(),
            "tokens": data.tokens,
            "captions": json.loads(json.dumps(dataclasses.asdict(data.captions or Captions()))),
            "seed": config.seed,
        }
    fingerprint = hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:32]
    return meta | {"fingerprint": fingerprint, MADE_FROM: experiment.describe(data.source)}


def _claim(out, meta):
    """Writes cache.json.  Raises InputError: the folder has another one, or files that are none of ours."""
    if (out / META).is_file():
        old = read_meta(out)
        if changed := sorted(
            name for name in (meta.keys() | old.keys()) - {"fingerprint", MADE_FROM} if meta.get(name) != old.get(name)
        ):
            raise InputError(f"{out}: was begun with other {', '.join(changed)}; choose another folder, or delete it")
        if MADE_FROM not in old:  # begun by an older version, from the same source: their fingerprints are one
            write_meta(out, old | {MADE_FROM: meta[MADE_FROM]})
        return
    if others := sorted(entry.name for entry in out.iterdir() if not entry.name.startswith(".")):
        raise InputError(f"{out}: holds {others[0]} and no {META}; choose a new folder")
    write_meta(out, meta)


def _write_array(path, array):
    partial = path.with_suffix(f".{os.getpid()}.partial")
    with open(partial, "wb") as file:
        np.save(file, array)
    os.replace(partial, path)


def _passing(bad):
    """Whether a BadRecord may be a good one next time: I/O, or an unknown failure, and nothing in its content."""
    return bad.reason == "error" or bad.reason == "unreadable" and isinstance(bad.__cause__, OSError)


@functools.partial(jax.jit, static_argnames="dc_ae")
def _latents(params, images, *, dc_ae):
    """uint8 [b H W 3] -> the autoencoder's own latents [b h w c]."""
    return apply(dc_ae, params, signed(images), method="encode").astype(jnp.float32)


class _Work:
    """All that a shard is made with."""

    def __init__(self, reader, config, options, tokenize, constants, mesh):
        self.reader, self.options, self.tokenize, self.constants, self.mesh = reader, options, tokenize, constants, mesh
        self.seed, self.threads, self.captions = config.seed, config.data.threads, config.data.captions or Captions()
        self.shapes = buckets.shapes(config.data.size, config.data.buckets)
        self.paint = layout.painter(reader, mesh)
        sizes = reader.sizes
        self.places = buckets.assign(sizes, config.data.size, config.data.buckets)

    def make(self, out, names):
        """Writes the shards `names` that are not there.  Returns {reason: bad records}."""
        todo = [name for name in names if not (out / name).exists()]
        shards = [(name, self._rows(name)) for name in todo]
        counts = collections.Counter()
        with (
            tqdm.tqdm(total=sum(len(rows) for _, rows in shards), unit=" records", disable=None) as progress,
            concurrent.futures.ThreadPoolExecutor(self.threads) as pool,
        ):
            for name, rows in shards:
                found = {}
                for batch in self._ahead(pool, rows):
                    made = self._encode(*batch)
                    found |= made
                    progress.update(len(made))
                self._require_whole(out / name, found)
                with Writer(out / name) as writer:
                    for row in rows:
                        height, width = self.shapes[self.places[row]]
                        record = found[row]
                        bad = record if isinstance(record, BadRecord) else None
                        counts.update([bad.reason] if bad else [])
                        writer.write(Record(self.reader.key(row)) if bad else record, (width, height), bad)
        return counts

    def _require_whole(self, path, found):
        """Raises NotWhole: some of {row: Record or BadRecord} failed for a reason that is not theirs."""
        failed = [(row, bad) for row, bad in found.items() if isinstance(bad, BadRecord) and _passing(bad)]
        if failed:
            told = "".join(f"\n  {self.reader.key(row)}: {bad}" for row, bad in failed[:EXAMPLES])
            raise NotWhole(
                f"{path}: not written, {len(failed)} of {len(found)} records could not be read now; the same command "
                f"tries again:{told}" + (f"\n  and {len(failed) - EXAMPLES} more" if len(failed) > EXAMPLES else "")
            )

    def _rows(self, name):
        start = int(name.partition(".")[0]) * self.options.shard_records
        return range(start, min(start + self.options.shard_records, len(self.reader)))

    def _ahead(self, pool, rows):
        """What `_decode` makes of the rows, batch by batch of one shape; a few are decoded in advance."""
        rows, pending = np.array(rows), collections.deque()
        for place in np.unique(self.places[rows]):
            of_shape = rows[self.places[rows] == place]
            for start in range(0, len(of_shape), self.options.batch):
                pending.append(
                    pool.submit(self._decode, int(place), of_shape[start : start + self.options.batch].tolist())
                )
                if len(pending) > self.threads:
                    yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _decode(self, place, rows):
        """({"image": [b H W 3]} or {"scene": [b P]}, (H, W), rows, a Record or a BadRecord for each,
        captions [b]); b is always the same."""
        height, width = self.shapes[place]
        pixels = np.zeros((self.options.batch, height, width, 3), np.uint8)
        scenes, texts, records = {}, [""] * self.options.batch, []
        for i, row in enumerate(rows):
            try:
                record = read_one(self.reader, row)
                if isinstance(record, BadRecord):
                    raise record
                if self.tokenize is not None:
                    key = np.array([self.seed, row], np.uint64)
                    texts[i] = self.captions.choose(record, np.random.Generator(np.random.Philox(key=key)))[1]
                if "scene" in record.arrays:
                    scenes[i] = record.arrays["scene"]
                elif record.image is None:
                    raise BadRecord("unreadable", "no picture")
                else:
                    pixels[i] = images.decode(record.image, height, width)
                records.append(record)
            except BadRecord as bad:
                texts[i] = ""
                records.append(bad)
        pictures = {"image": pixels}
        if scenes:
            some = next(iter(scenes.values()))
            pictures = {"scene": np.stack([scenes.get(i, 0 * some) for i in range(self.options.batch)])}
        return pictures, (height, width), rows, records, texts

    def _encode(self, pictures, shape, rows, records, texts):
        """{row: Record with features, or BadRecord}."""
        modules, params = self.constants.modules, self.constants.params
        tokens = {} if self.tokenize is None else self.tokenize(texts)
        batch = self.paint(layout.put_batch(pictures | tokens, self.mesh), shape)
        arrays = {"latent": _latents(params["dc_ae"], batch["image"], dc_ae=modules["dc_ae"])}
        if tokens:
            arrays["states"], mask = map(np.asarray, text_states(self.constants, batch))
        with np.errstate(over="ignore"):  # an infinity is found below
            arrays = {name: np.asarray(array, np.float32).astype(np.float16) for name, array in arrays.items()}
        found = {}
        for i, (row, record) in enumerate(zip(rows, records)):
            if isinstance(record, BadRecord):
                found[row] = record
            elif name := next((name for name in arrays if not finite(arrays[name][i])), None):
                found[row] = BadRecord("features", f"{name} is not finite in float16")
            else:
                own = {name: array[i] for name, array in arrays.items()}
                if tokens:
                    own["states"] = own["states"][: int(mask[i].sum())]  # padding is at the end
                found[row] = record._replace(image=None, arrays=own)
        return found


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m sana_jax.data.cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="an experiment, see configs/")
    parser.add_argument("out", metavar="OUT", help="the folder of the features")
    defaults = Options()
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--shard-records", type=int, default=defaults.shard_records)
    parser.add_argument("--no-text", dest="text", action="store_false", help="latents only; captions are kept")
    parser.add_argument("--host", type=int, default=0, help="the number of this machine")
    parser.add_argument("--hosts", type=int, default=1, help="machines that share the work")
    options, overrides = parser.parse_known_args(arguments)
    try:
        config = experiment.load_one(options.config, overrides)
        if warning := compile_cache.keep_programs():
            print(warning, file=sys.stderr)
        chosen = {field.name: getattr(options, field.name) for field in dataclasses.fields(Options)}
        counts = make(config, options.out, Options(**chosen))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NotWhole as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: done" + "".join(f", {count} {reason}" for reason, count in counts.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
