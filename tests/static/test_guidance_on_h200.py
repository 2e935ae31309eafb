"""Every kind of guidance on a batch that is sharded over eight H200s: nothing is exchanged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sana_jax import aot, programs
from sana_jax.models.sana import SANA_1600M, SANA_SPRINT_1600M
from sana_jax.programs import Perturbation
from tests.static.test_sana_on_h200 import parameters

pytestmark = [
    pytest.mark.static,
    pytest.mark.skipif(not aot.available(), reason="needs the extra `static`"),
]

SMALL = dict(depth=2, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
PAG = Perturbation(np.float32(3), np.array([False, True]), np.float32(0))
CASES = {
    "pag": (SANA_1600M, "flow-dpm-solver", dict(guided=True, limited=False), PAG),
    "pag alone": (SANA_1600M, "flow-dpm-solver", dict(guided=False, limited=False), PAG),
    "interval": (SANA_1600M, "flow-euler", dict(guided=True, limited=True), None),
    "pag in an interval": (SANA_1600M, "flow-euler", dict(guided=True, limited=True), PAG),
    "sprint": (SANA_SPRINT_1600M, "scm", dict(guided=False, limited=False), None),
}


@pytest.mark.parametrize("case", CASES)
def test_data_parallel_needs_no_collectives(case):
    module, sampler, static, pag = CASES[case]
    module = module.clone(**SMALL)
    batch = (8, 32, 32, module.latent_channels)
    states, mask = jax.ShapeDtypeStruct((8, 64, module.caption_width), jnp.bfloat16), jax.ShapeDtypeStruct((8, 64), bool)
    noise, fresh = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (batch, (4, *batch)))
    schedule = programs.SAMPLERS[sampler][0](4, 0 if sampler == "scm" else 3.0)

    def denoise(params, conditions, noise, fresh):
        return programs.denoise(
            module, params, conditions, noise, schedule, 4.5, (0.3, 0.9), pag, fresh, sampler=sampler, **static
        )

    specs = (P(), P("data"), P("data"), P(None, "data"))
    avals = parameters(module), (states, mask, states, mask), noise, fresh
    compiled = aot.compile_for("h200", denoise, *avals, mesh={"data": 8}, in_specs=specs)
    assert aot.summary(compiled)["collectives"] == {}
