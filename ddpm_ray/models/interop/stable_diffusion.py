"""Stable Diffusion's pipeline of diffusers: its parts, the arguments of its call, and its limits.

It draws latents of a text by a UNet2DConditionModel, guided by the text "" or a negative prompt.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from ddpm_ray.models.dit import DiTSpec
from ddpm_ray.models.interop import autoencoder_kl, clip_text, diffusers_text_unet
from ddpm_ray.models.interop.diffusers_pipelines import BY_HAND, Export
from ddpm_ray.models.interop.diffusers_schedulers import (
    Facts,
    settings_without_equivalent,
    to_sampling_scheduler,
)
from ddpm_ray.models.unet_spec import UNetSpec

PIPELINE = "StableDiffusionPipeline"
PARTS = {  # folder: library and class
    "unet": ("diffusers", diffusers_text_unet.CLASS),
    "text_encoder": ("transformers", clip_text.CLASS),
    "tokenizer": ("transformers", "PreTrainedTokenizerFast"),
    "vae": ("diffusers", autoencoder_kl.CLASS),
}
ABSENT = "safety_checker", "feature_extractor", "image_encoder"
NO_UNET = (
    "unet (a stage of ours attends to the pixels and then to the text, with a group norm for each; "
    "UNet2DConditionModel has a spatial transformer there: train with model.transformer_depth=1)"
)
NO_POOLED = (
    "unet (UNet2DConditionModel adds no vector of the whole text to the embedding of t: train with "
    "text.pooled=false)"
)
NO_EMBEDDING = "unet (UNet2DConditionModel takes no image embedding)"
NO_DIT = "transformer (DiTTransformer2DModel takes no text)"


def network_limit(spec: UNetSpec | DiTSpec) -> str:
    """Why a network with text has no equivalent in diffusers; empty: it has one."""
    if isinstance(spec, DiTSpec):
        return NO_DIT
    if not spec.transformer_depth:
        return NO_UNET
    if spec.pools_text:
        return NO_POOLED
    return NO_EMBEDDING if spec.embedding_width else ""


def to_stable_diffusion(
    facts: Facts, spec: UNetSpec | DiTSpec, parts: tuple[str, ...], limits: tuple[str, ...]
) -> Export:
    """The scheduler, pipeline and call that draw as the run does, as closely as diffusers can.

    `parts` are those of PARTS that the model has; without one of them no pipeline draws it, and
    `limits` say why. Raises UnsupportedModelError for a model that no scheduler fits.
    """
    scheduler = to_sampling_scheduler(facts, spec.image_channels)
    missing = [*limits, *settings_without_equivalent(facts, scheduler)]
    if "unet" in parts and "vae" not in parts:
        missing.append(f"pipeline ({PIPELINE} draws latents alone: {BY_HAND})")
    if {*parts} != {*PARTS}:
        return Export(scheduler, "", {}, tuple(missing), parts)
    missing += _limits(facts["sampling"], spec)
    scheduler["steps_offset"] = 1  # which the pipeline demands, and which trailing steps ignore
    return Export(scheduler, PIPELINE, _call(facts, scheduler), tuple(missing), parts)


def model_index(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """model_index.json of the pipeline with this scheduler."""
    return {
        "_class_name": PIPELINE,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        **{part: [*names] for part, names in PARTS.items()},
        **{part: [None, None] for part in ABSENT},
        "requires_safety_checker": False,
    }


def _call(facts: Facts, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of the pipeline's call."""
    sampling = facts["sampling"]
    call: dict[str, Any] = {
        "prompt": [*(sampling.get("prompts") or [""])],
        "guidance_scale": sampling.get("guidance_scale", 1.0),
        "num_inference_steps": sampling.get("steps") or scheduler["num_train_timesteps"],
    }
    if negative := sampling.get("negative_prompt"):
        call["negative_prompt"] = [negative] * len(call["prompt"])
    if rescale := sampling.get("guidance_rescale"):
        call["guidance_rescale"] = rescale
    if scheduler["_class_name"] == "DDIMScheduler":
        call["eta"] = sampling.get("eta", 0.0)
    return call


def _limits(sampling: Mapping[str, Any], spec: UNetSpec | DiTSpec) -> Iterator[str]:
    """Yield a line for each input and setting of guidance that the pipeline does not have."""
    scale = sampling.get("guidance_scale", 1.0)
    if scale < 1:
        yield f"guidance_scale={scale:g} ({PIPELINE}: 1)"
    for key in ("guidance_above_sigma", "guidance_below_sigma"):
        if scale != 1 and sampling.get(key):
            yield f"{key}={sampling[key]:g} ({PIPELINE} has none)"
    if spec.learns_variance and scale > 1:
        yield f"guidance_scale={scale:g} ({PIPELINE} guides the learned variance, too)"
    if spec.num_classes:
        yield (
            f"num_classes={spec.num_classes} ({PIPELINE} passes no labels, which this network "
            f"needs: {BY_HAND})"
        )
    if spec.condition_channels:
        yield f"conditioning images ({PIPELINE} passes none: {BY_HAND})"
