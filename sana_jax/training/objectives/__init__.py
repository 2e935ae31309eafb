"""What a run minimises: frozen dataclasses, their own configuration, called with a model and a batch.

    terms = objective(model, frozen, params, batch, keys)

`keys` [b] are PRNG keys, one for each row and made of its global number: no row depends on its
neighbours, on the batch's layout or on the number of devices.  Each objective also has
    reads: what it can use of records; of "latent" and "image" one, of "states" and "texts" one;
    frozen_needed(names of the batch) -> which of "dc_ae", "text" it calls;
    load() -> ({name: frozen parameters that it reads from files of its own}, remarks for the log).
"""

from sana_jax.training.objectives.autoencoder import Autoencoder
from sana_jax.training.objectives.flow import Flow
from sana_jax.training.objectives.language_model import LanguageModel
from sana_jax.training.objectives.terms import Frozen, Terms

__all__ = ["Autoencoder", "Flow", "Frozen", "LanguageModel", "Terms"]
