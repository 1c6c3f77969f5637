"""Convert noise schedule and sampling settings to diffusers' schedulers, and back.

An export is a scheduler, a pipeline and the arguments of its call.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from ddpm_ray.models.interop.diffusers_config import (
    Config,
    UnsupportedModelError,
    full_config,
    require_equal,
)

Facts: TypeAlias = Mapping[str, Mapping[str, Any]]
SCHEDULER: Config = {  # defaults of DDPMScheduler
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "variance_type": "fixed_small",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "prediction_type": "epsilon",
    "thresholding": False,
    "rescale_betas_zero_snr": False,
}
OF_A_CALL = {  # keys of one sampling call, or of options that are refused
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "timestep_values",
    "tensor_format",
}
OF_SAMPLING = {"variance_type", "clip_sample", "clip_sample_range", "thresholding"}
KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "epsilon", "sample": "x_0", "v_prediction": "v"}
COSINE = {"offset": 0.008, "max_beta": 0.999}
VARIANCES = {  # variance_type: (objective.variance, sampling.variance)
    "fixed_small": ("fixed", "fixed_small"),
    "fixed_large": ("fixed", "fixed_large"),
    "learned_range": ("learned_range", "learned"),
}
LEARNED = (
    "'learned'; diffusers reads the model output as the variance, ddpm-ray as its logarithm: train "
    "with learned_range, which means the same in both"
)
SAMPLING = "_ddpm_ray_sampling"  # extra key of a scheduler's config: the run's sampling settings
OF_TRAINING = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
NO_LIMIT = 1e6  # sample_max_value for dynamic thresholding: diffusers requires an upper bound
DPM_SOLVER = {"dpm_solver_pp": "dpmsolver++", "dpm_solver_pp_sde": "sde-dpmsolver++"}


class Export(NamedTuple):
    """The scheduler for diffusers, and the run's settings that it cannot represent."""

    scheduler: dict[str, Any]  # scheduler_config.json
    pipeline: str  # class name of the pipeline
    call: dict[str, Any]  # keyword arguments of the pipeline call
    no_equivalent: tuple[str, ...]  # "key=value (what diffusers does instead)"

    @property
    def model_index(self) -> dict[str, Any]:
        """model_index.json."""
        return {
            "_class_name": self.pipeline,
            "scheduler": ["diffusers", self.scheduler["_class_name"]],
            "unet": ["diffusers", "UNet2DModel"],
        }


def from_scheduler(config: Config) -> dict[str, dict[str, Any]]:
    """Settings from a scheduler_config.json (DDPM or DDIM); raises UnsupportedModelError.

    A file written by ddpm-ray, of any scheduler class, holds the run's sampling settings in an
    extra key, which is read instead.
    """
    if (noted := config.get(SAMPLING)) is not None:
        if not isinstance(noted, Mapping):
            raise UnsupportedModelError("scheduler", f"{SAMPLING} is {noted!r}; it holds settings")
        learned = config.get("variance_type") == "learned_range"
        trained = {
            key: config[key] for key in SCHEDULER if key in config and key not in OF_SAMPLING
        }
        trained |= {"variance_type": "learned_range"} if learned else {}
        return {**from_scheduler(trained), "sampling": dict(noted)}
    full = full_config(config, SCHEDULER, "DDPMScheduler", "DDIMScheduler")
    full = {key: value for key, value in full.items() if key not in OF_A_CALL}
    try:
        betas = full["trained_betas"] and tuple(float(beta) for beta in full["trained_betas"])
    except (TypeError, ValueError) as error:
        raise UnsupportedModelError(
            "scheduler", "trained_betas is not a list of numbers"
        ) from error
    if full["variance_type"] == "learned":
        raise UnsupportedModelError("scheduler", f"variance_type is {LEARNED}")
    kind = "betas" if betas is not None else _one_of(KINDS, full, "beta_schedule")
    trained, sampled = _one_of(VARIANCES, full, "variance_type")
    schedule = {
        "kind": kind,
        "num_steps": full["num_train_timesteps"],
        "beta_start": full["beta_start"],
        "beta_end": full["beta_end"],
        "zero_terminal_snr": full["rescale_betas_zero_snr"],
    }
    schedule |= {"betas": betas} if betas is not None else {}
    schedule |= COSINE if kind == "cosine" else {}
    prediction = _one_of(PREDICTIONS, full, "prediction_type")
    facts = {
        "schedule": schedule,
        "objective": {"prediction": prediction, "variance": trained},
        "sampling": {"variance": sampled, "clip": full["clip_sample"]},
    }
    stated = {**full, "beta_schedule": "linear"} if betas is not None else full
    require_equal(stated, _scheduler_config(facts), "scheduler")
    return facts


def to_scheduler(facts: Facts) -> dict[str, Any]:
    """The scheduler_config.json of a DDPMScheduler; raises UnsupportedModelError."""
    return {"_class_name": "DDPMScheduler", **_scheduler_config(facts)}


def to_pipeline(facts: Facts) -> Export:
    """The scheduler equivalent to the run's sampler; DDPMScheduler where diffusers has none.

    The run's settings are also stored in its config under an extra key, which diffusers ignores and
    `from_scheduler` reads. Raises UnsupportedModelError for a model that no scheduler fits.
    """
    sampling, trained = facts["sampling"], to_scheduler(facts)
    sampler, clip = sampling.get("sampler", "ancestral"), sampling["clip"]
    quantile = sampling.get("dynamic_quantile", 0.0)
    learned = facts["objective"].get("variance", "fixed") != "fixed"
    of_training = {key: trained[key] for key in OF_TRAINING}
    pipeline, call = "DDPMPipeline", dict[str, Any]()
    threshold = {
        "thresholding": bool(quantile),
        "dynamic_thresholding_ratio": quantile or 0.995,
        "sample_max_value": NO_LIMIT if quantile else 1.0,
    }
    scheduler = {**trained, **threshold}
    if sampler == "ddim" and not learned:
        scheduler = {
            "_class_name": "DDIMScheduler",
            **of_training,
            **threshold,
            "clip_sample": clip,
            "set_alpha_to_one": True,
        }
        pipeline = "DDIMPipeline"
        call = {"eta": sampling.get("eta", 0.0), "use_clipped_model_output": bool(clip)}
    elif sampler in DPM_SOLVER:
        # Thresholding with sample_max_value = 1 is a clip to [-1, 1].
        scheduler = {
            "_class_name": "DPMSolverMultistepScheduler",
            **of_training,
            **threshold,
            "thresholding": bool(clip),
            "algorithm_type": DPM_SOLVER[sampler],
            "solver_order": 2,
            "solver_type": "midpoint",
            "lower_order_final": True,
            "final_sigmas_type": "zero",
            "variance_type": trained["variance_type"] if learned else None,
        }
    scheduler |= {"timestep_spacing": "trailing", SAMPLING: dict(sampling)}
    if steps := sampling.get("steps"):
        call["num_inference_steps"] = steps
    return Export(scheduler, pipeline, call, tuple(_no_equivalent(facts, scheduler)))


def _no_equivalent(facts: Facts, scheduler: dict[str, Any]) -> list[str]:
    """Settings of the run that this scheduler class cannot represent."""
    sampling, name, found = facts["sampling"], scheduler["_class_name"], list[str]()
    sampler = sampling.get("sampler", "ancestral")
    if name == "DDPMScheduler" and sampler != "ancestral":
        found.append(f"sampler={sampler} (DDPMScheduler is ancestral)")
    if name == "DDIMScheduler" and sampling["variance"] == "fixed_large":
        found.append("variance=fixed_large (DDIMScheduler: fixed_small)")
    if (spacing := sampling.get("spacing", "uniform")) != "uniform":
        found.append(f"spacing={spacing} (steps are uniform)")
    elif (steps := sampling.get("steps", 0)) and scheduler["num_train_timesteps"] % steps:
        found.append(f"steps={steps} (it does not divide T, and steps are rounded differently)")
    if sampling.get("dynamic_quantile"):
        found.append("dynamic_quantile (the quantile is interpolated between two pixels)")
    if sampling.get("guidance_scale", 1) != 1:
        found.append(f"guidance_scale={sampling['guidance_scale']:g} (pipelines pass no labels)")
    elif sampling.get("labels"):
        found.append(f"labels={list(sampling['labels'])} (pipelines pass no labels)")
    return found


def _scheduler_config(facts: Facts) -> dict[str, Any]:
    """The full config of a run's settings; those without a diffusers key must have the default."""
    schedule, objective, sampling = (facts[key] for key in ("schedule", "objective", "sampling"))
    kind, betas = schedule["kind"], schedule.get("betas") or None
    plain: dict[str, Any] = {"rescale": False} | (COSINE if kind == "cosine" else {})
    require_equal(
        {key: schedule.get(key, value) for key, value in plain.items()}, plain, "DDPMScheduler"
    )
    trained = objective.get("variance", "fixed")
    if trained == "learned":
        raise UnsupportedModelError("DDPMScheduler", f"objective.variance is {LEARNED}")
    sampled = sampling["variance"] if trained == "fixed" else "learned"
    return {
        **SCHEDULER,
        "num_train_timesteps": len(betas) if kind == "betas" and betas else schedule["num_steps"],
        "beta_start": schedule.get("beta_start", SCHEDULER["beta_start"]),
        "beta_end": schedule.get("beta_end", SCHEDULER["beta_end"]),
        "beta_schedule": "linear" if kind == "betas" else _key_of(KINDS, kind, "kind"),
        "trained_betas": list(betas) if kind == "betas" and betas else None,
        "variance_type": _key_of(VARIANCES, (trained, sampled), "variance"),
        "clip_sample": sampling["clip"],
        "prediction_type": _key_of(PREDICTIONS, objective["prediction"], "prediction"),
        "rescale_betas_zero_snr": schedule.get("zero_terminal_snr", False),
    }


def _one_of(table: Mapping[str, Any], config: Config, key: str) -> Any:
    if config[key] not in list(table):
        raise UnsupportedModelError(
            "scheduler", f"{key} is {config[key]!r}; supported is {', '.join(table)}"
        )
    return table[config[key]]


def _key_of(table: Mapping[str, Any], value: Any, name: str) -> str:
    for theirs, ours in table.items():
        if ours == value:
            return theirs
    known = ", ".join(map(str, table.values()))
    raise UnsupportedModelError("DDPMScheduler", f"{name} is {value!r}; it knows {known}")
