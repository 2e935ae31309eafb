"""scheduler_config.json and the pipeline classes of diffusers: which we read, which we write.

Our sampler follows from the transformer, not from these files: a SANA-Sprint transformer, which
embeds guidance, is sampled by "scm", every other one by Flow-DPM-Solver++ unless the caller says
otherwise.  What is read here is the flow shift, and whether the folder asks for something else.
"""

import pathlib
import warnings

from sana_jax.checkpoints.read import read_json
from sana_jax.errors import InputError, require_choice, require_positive

PIPELINES = {  # _class_name of model_index.json: whether its transformer is a SANA-Sprint
    "SanaPipeline": False,
    "SanaPAGPipeline": False,
    "SanaSprintPipeline": True,
    "SanaSprintImg2ImgPipeline": True,
}

FLOW = {  # keys that change the pictures: the values that our samplers follow, the default first
    "prediction_type": ("flow_prediction",),
    "algorithm_type": ("dpmsolver++",),
    "solver_order": (2,),
    "solver_type": ("midpoint",),
    "final_sigmas_type": ("zero",),
    "use_flow_sigmas": (True,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_dynamic_shifting": (False, None),
    "thresholding": (False,),
    "euler_at_final": (False,),
    "num_train_timesteps": (1000,),
}
SCHEDULERS = {  # the same by _class_name of scheduler_config.json
    "DPMSolverMultistepScheduler": FLOW,
    "FlowMatchEulerDiscreteScheduler": FLOW,
    "SCMScheduler": {
        "prediction_type": ("trigflow",),
        "sigma_data": (0.5,),
        "num_train_timesteps": (1000,),
    },
}

DPM_CONFIG = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "final_sigmas_type": "zero",
    "lower_order_final": True,
    "num_train_timesteps": 1000,
}
SCM_CONFIG = {
    "_class_name": "SCMScheduler",
    "prediction_type": "trigflow",
    "sigma_data": 0.5,
    "num_train_timesteps": 1000,
}


def read_flow_shift(folder):
    """The flow shift of a scheduler folder, or None where there is none.

    Raises InputError: a scheduler that none of our samplers follows.  Warns of Euler's, since the
    sampler is chosen by the caller.
    """
    path = pathlib.Path(folder) / "scheduler_config.json"
    if not path.is_file():
        return None
    config = read_json(path)
    name = config.get("_class_name", "DPMSolverMultistepScheduler")
    require_choice(f"{path}: _class_name", name, tuple(SCHEDULERS))
    for key, allowed in SCHEDULERS[name].items():
        require_choice(f"{path}: {key}", config.get(key, allowed[0]), allowed)
    if name == "SCMScheduler":
        return None
    if name == "FlowMatchEulerDiscreteScheduler":
        warnings.warn(f"{path}: these weights came with Euler; sampler='flow-euler' follows it", stacklevel=3)
    shift = config.get("flow_shift", config.get("shift"))
    return require_positive(f"{path}: flow_shift", shift, float, none=True)


def check_pipeline_class(path, name, module):
    """Raises InputError where the pipeline class in model_index.json is not one of `module`, a Sana."""
    if PIPELINES[name] != module.guidance_embed:
        kind = {True: "a SANA-Sprint", False: "another"}
        raise InputError(
            f"{path}: _class_name={name!r} has {kind[PIPELINES[name]]} transformer, "
            f"but guidance_embeds={module.guidance_embed} makes this one {kind[module.guidance_embed]}"
        )


def scheduler_config(module, flow_shift):
    """scheduler_config.json that belongs to `module`, a Sana."""
    return SCM_CONFIG if module.guidance_embed else DPM_CONFIG | {"flow_shift": flow_shift}


def pipeline_entries(module):
    """What model_index.json says of the pipeline class and the scheduler of `module`, a Sana."""
    name = "SanaSprintPipeline" if module.guidance_embed else "SanaPipeline"
    return {"_class_name": name, "scheduler": ["diffusers", scheduler_config(module, None)["_class_name"]]}
