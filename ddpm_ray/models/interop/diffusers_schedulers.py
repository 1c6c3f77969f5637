"""Convert noise schedule and sampling settings to diffusers' schedulers, and back."""

from collections.abc import Mapping
from typing import Any, TypeAlias

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
OF_A_CALL = {  # keys of a sampling call, or of options that are refused
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
DPM_SOLVER_CHANNELS = 3  # that their solver takes from an output with a learned variance


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


def to_sampling_scheduler(
    facts: Facts, channels: int = 3, *, splits_variance: bool = False
) -> dict[str, Any]:
    """The scheduler equivalent to the run's sampler; DDPMScheduler where diffusers has none.

    `channels` are those of x_0. With `splits_variance`, the pipeline drops a learned variance
    before it calls the scheduler. The run's settings are also stored in the config under an extra
    key, which diffusers ignores and `from_scheduler` reads. Raises UnsupportedModelError for a
    model that no scheduler fits.
    """
    trained, sampling = to_scheduler(facts), facts["sampling"]
    learned = facts["objective"].get("variance", "fixed") != "fixed" and not splits_variance
    if splits_variance and trained["variance_type"] == "learned_range":
        large = sampling["variance"] == "fixed_large"
        trained["variance_type"] = "fixed_large" if large else "fixed_small"
    sampler, clip = sampling.get("sampler", "ancestral"), sampling["clip"]
    quantile = sampling.get("dynamic_quantile", 0.0)
    of_training = {key: trained[key] for key in OF_TRAINING}
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
    elif sampler in DPM_SOLVER and (channels == DPM_SOLVER_CHANNELS or not learned):
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
    return scheduler | {"timestep_spacing": "trailing", SAMPLING: dict(sampling)}


def settings_without_equivalent(facts: Facts, scheduler: Config) -> list[str]:
    """Settings of the run that this scheduler cannot represent, apart from those of labels."""
    sampling, name, found = facts["sampling"], scheduler["_class_name"], list[str]()
    sampler, variance = sampling.get("sampler", "ancestral"), scheduler.get("variance_type")
    if name == "DDPMScheduler" and sampler != "ancestral":
        found.append(f"sampler={sampler} (DDPMScheduler is ancestral)")
    if name == "DDIMScheduler" and sampling["variance"] == "fixed_large":
        found.append("variance=fixed_large (DDIMScheduler: fixed_small)")
    learned = variance == "learned_range"
    if sampler == "ancestral" and learned != (sampling["variance"] == "learned"):
        found.append(f"variance={sampling['variance']} (DDPMScheduler: {variance})")
    if (spacing := sampling.get("spacing", "uniform")) != "uniform":
        found.append(f"spacing={spacing} (steps are uniform)")
    elif (steps := sampling.get("steps", 0)) and scheduler["num_train_timesteps"] % steps:
        found.append(f"steps={steps} (it does not divide T, and steps are rounded differently)")
    elif learned and sampler == "ancestral" and steps and steps < scheduler["num_train_timesteps"]:
        found.append(f"steps={steps} (a learned variance adds noise to the last step, too)")
    if sampling.get("dynamic_quantile"):
        found.append("dynamic_quantile (the quantile is interpolated between two pixels)")
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
