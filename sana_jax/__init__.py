"""SANA in JAX and Flax: text-to-image with a linear diffusion transformer.

    import sana_jax
    pipeline = sana_jax.load_pipeline()      # the bundled model; or a folder in diffusers layout
    images = pipeline.generate("a red circle above a blue square")     # uint8 [1 H W 3]
"""

from sana_jax.errors import CheckpointError as CheckpointError
from sana_jax.errors import InputError as InputError
from sana_jax.errors import NonFiniteError as NonFiniteError
from sana_jax.loading import load_dc_ae as load_dc_ae
from sana_jax.loading import load_gemma2 as load_gemma2
from sana_jax.loading import load_pipeline as load_pipeline
from sana_jax.loading import load_sana as load_sana
from sana_jax.models.dc_ae import DCAE as DCAE
from sana_jax.models.gemma2 import Gemma2 as Gemma2
from sana_jax.models.sana import Sana as Sana
from sana_jax.pipeline import Pipeline as Pipeline
from sana_jax.pipeline import TextEncoder as TextEncoder
from sana_jax.stacks import DIFFUSERS as DIFFUSERS
from sana_jax.stacks import NVLABS as NVLABS
from sana_jax.stacks import Stack as Stack

__version__ = "0.1.0"
