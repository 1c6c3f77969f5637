"""Export a run's sampling settings to diffusers: scheduler, pipeline and call arguments."""

from typing import Any, NamedTuple

from ddpm_ray.models.interop.diffusers_config import SAMPLING, Facts, to_scheduler

OF_TRAINING = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas",
    "prediction_type", "rescale_betas_zero_snr",
)  # fmt: skip
NO_LIMIT = 1e6  # sample_max_value for dynamic thresholding: diffusers requires an upper bound
DPM_SOLVER = {"dpm_solver_pp": "dpmsolver++", "dpm_solver_pp_sde": "sde-dpmsolver++"}


class Export(NamedTuple):
    """What diffusers samples with, and which of the run's settings it cannot represent."""

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
        "thresholding": bool(quantile), "dynamic_thresholding_ratio": quantile or 0.995,
        "sample_max_value": NO_LIMIT if quantile else 1.0,
    }  # fmt: skip
    scheduler = {**trained, **threshold}
    if sampler == "ddim" and not learned:
        scheduler = {"_class_name": "DDIMScheduler", **of_training, **threshold,
                     "clip_sample": clip, "set_alpha_to_one": True}  # fmt: skip
        pipeline = "DDIMPipeline"
        call = {"eta": sampling.get("eta", 0.0), "use_clipped_model_output": bool(clip)}
    elif sampler in DPM_SOLVER:
        # Thresholding with sample_max_value = 1 is a clip to [-1, 1].
        scheduler = {"_class_name": "DPMSolverMultistepScheduler", **of_training, **threshold,
                     "thresholding": bool(clip), "algorithm_type": DPM_SOLVER[sampler],
                     "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True,
                     "final_sigmas_type": "zero",
                     "variance_type": trained["variance_type"] if learned else None}  # fmt: skip
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
