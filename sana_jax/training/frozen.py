"""The networks that a run uses and does not train, and the tokenizer of its captions."""

import dataclasses
import hashlib
import itertools
import pathlib
import shutil

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sana_jax import extras, precision, programs, text
from sana_jax.data.records import BadRecord
from sana_jax.data.tokens import Tokenizer
from sana_jax.data.vocabulary import Words, learn
from sana_jax.errors import InputError
from sana_jax.hub.download import find_model
from sana_jax.models.dc_ae import DCAE
from sana_jax.models.gemma2 import Gemma2
from sana_jax.saving import new_folder
from sana_jax.stacks import NVLABS
from sana_jax.training import initialise, processes
from sana_jax.training.objectives import Flow, Frozen

OWN_TOKENIZER = "tokenizer"  # of a run that trains a text encoder, in its folder
LEARNED_FROM = 100_000  # records whose captions make a tokenizer


def load(config, names, reader, mesh):
    """(`Frozen` with what the objective needs, laid over the mesh; remarks for the log).

    Args:
      names: of the arrays in a batch; what is cached already needs no network.
      reader: of the data, which brings the states of the empty caption where text states are cached.
    Raises InputError: a network that is needed is not given, or is another kind of model.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(array):
        return jax.make_array_from_process_local_data(everywhere, np.asarray(array))

    params, remarks = config.objective.load()
    params = jax.tree.map(put, params)
    _require_scale(config.objective, names, reader)
    needed = config.objective.frozen_needed(names)
    if config.preview.every and isinstance(config.objective, Flow):
        needed = needed | {"dc_ae"} | ({"text"} if config.preview.prompts else set())
    modules = {}
    for name, cls in (("dc_ae", DCAE), ("text", Gemma2)):
        if name in needed:
            if not (source := getattr(config.frozen, name)):
                raise InputError(f"frozen.{name}='': is needed for these data; name a folder or a published model")
            modules[name], params[name] = _read(source, cls, mesh)
            _require_fit(config, name, modules[name])
    if "text" in modules:
        params |= _fixed_texts(config, modules["text"], params["text"])
    null = getattr(reader, "null", None)
    if null is not None and "states" in names:  # made by the encoder that made the states
        params["null"] = put(null)
    return Frozen(modules, params), remarks


def _require_scale(objective, names, reader):
    """Raises InputError: latents of an autoencoder with another scaling factor than the objective's."""
    made = getattr(reader, "scaling_factor", None)
    if "latent" in names and made is not None and made != objective.scaling_factor:
        raise InputError(f"objective.scaling_factor={objective.scaling_factor}: these latents were made for {made}")


def _require_fit(config, name, module):
    """Raises InputError: a frozen network whose width is not what the transformer reads."""
    own, given = {"dc_ae": ("latent_channels", "latent_channels"), "text": ("caption_width", "width")}[name]
    if (wanted := getattr(config.model, own)) != (found := getattr(module, given)):
        raise InputError(f"model.{own}={wanted}: frozen.{name}={getattr(config.frozen, name)!r} has {given}={found}")


def _read(source, cls, mesh):
    module, read = initialise.open_weights(source, cls)
    # Activations of both networks exceed float16 (docs/numerics.md 8).
    return module.clone(dtype=precision.without_float16(module.dtype)), read(mesh)


def _fixed_texts(config, gemma2, params):
    """{"null": [m d], "prefix": Prefix}, see `Frozen` (docs/numerics.md 5.6, 6)."""
    tokenizer, words = text.load_tokenizer(tokenizer_folder(config)), instruction(config)
    null = text.tokenize(tokenizer, [""], "", config.data.tokens)
    states, _ = programs.text_program(params, null.ids, null.mask, null.selection, None, gemma2=gemma2)
    found = {"null": states[0]}
    if words:
        head, _ = text.split_instruction(text.tokenize(tokenizer, [""], words, config.data.tokens))
        found["prefix"] = programs.prefix_program(params, head, gemma2=gemma2)
    return found


def tokenizer(config, reader):
    """What turns captions into ids for this experiment, None where it reads none.

    A text encoder that is trained without a tokenizer gets one from the captions, once: process 0
    writes it to the run's folder while the others wait.
    """
    if not _reads_captions(config, reader):
        return None
    if not config.frozen.text:
        if not isinstance(config.model, Gemma2):
            return None
        if config.init.weights:
            raise InputError(
                f"frozen.text='': init.weights={config.init.weights!r} knows the tokens of its own tokenizer; name where it "
                "is (of a run, the run itself)"
            )
        folder = tokenizer_folder(config)
        if jax.process_index() == 0 and not initialise.has_steps(config.workdir):
            shutil.rmtree(folder, ignore_errors=True)  # of a start that came to nothing, perhaps of other data
            words = Words()
            learned = learn(words.of(_all_captions(reader)), config.model.vocab_size)
            with new_folder(folder) as partial:
                learned.save_pretrained(partial)
                words.write(partial)
        processes.meet("tokenizer")
    found = Tokenizer(tokenizer_folder(config), instruction(config), config.data.tokens)
    if isinstance(config.model, Gemma2) and found.vocab_size > config.model.vocab_size:
        raise InputError(
            f"model.vocab_size={config.model.vocab_size}: {tokenizer_folder(config)} has {found.vocab_size} tokens"
        )
    return found


def _reads_captions(config, reader):
    """Whether captions are turned into ids: cached states need none, but for prompts of previews."""
    if "texts" not in config.objective.reads:
        return False
    return getattr(reader, "null", None) is None or bool(config.preview.every and config.preview.prompts)


def tokenizer_folder(config):
    """Where the tokenizer is: with the frozen text encoder, else in the run's own folder."""
    source = config.frozen.text
    if not source:
        return pathlib.Path(config.workdir, OWN_TOKENIZER)
    folder = _folder(source)
    beside = folder.parent / "tokenizer" if folder.name == "text_encoder" else folder / "tokenizer"
    return beside if beside.is_dir() else folder


def with_instruction(config, reader):
    """The experiment with the words of its instruction in `frozen.chi`, where "auto" may stand.

    What "auto" finds depends on the machine; a run, and what is exported of it, keeps the words.
    Raises InputError: text states were cached with other words.
    """
    made = getattr(reader, "meta", {}).get("instruction")
    if not config.frozen.text or not (made or _reads_captions(config, reader)):
        return config
    words = instruction(config)
    if made and made != hashlib.sha256(words.encode()).hexdigest():
        raise InputError(f"frozen.chi={config.frozen.chi!r}: these text states were cached with another instruction")
    return dataclasses.replace(config, frozen=dataclasses.replace(config.frozen, chi=words or "none"))


def instruction(config):
    """The text before every caption, "" for none: NVlabs' words, with which SANA was trained."""
    source = config.frozen.text
    if not source or config.frozen.chi == "none" or isinstance(config.model, Gemma2):
        return ""
    said = extras.read(_folder(source)).get("complex_human_instruction")
    return text.find_instruction(config.frozen.chi, NVLABS, said).text


def _folder(source):
    return pathlib.Path(source if initialise.is_run(source) else find_model(source, part="text_encoder"))


def _all_captions(reader):
    """Every caption of the first records, in order."""
    for index in itertools.islice(range(len(reader)), LEARNED_FROM):
        try:
            yield from reader[index].captions.values()
        except BadRecord:  # counted where it is trained on
            continue
