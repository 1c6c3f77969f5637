"""The pipeline of diffusers that draws a model, the arguments of its call, and its limits.

| a model of | is drawn by | its network is in | its autoencoder in |
| --- | --- | --- | --- |
| pixels, U-Net | DDPMPipeline, DDIMPipeline | unet/ | |
| latents, U-Net | LDMPipeline | unet/ | vqvae/ |
| latents, DiT | DiTPipeline | transformer/ | vae/ |
| pixels, DiT | none | transformer/ | |

LDMPipeline and DiTPipeline divide latents by `scaling_factor` and decode them; they read no other
key of the autoencoder's config. Only DiTPipeline passes labels, and it passes the scheduler no
learned variance.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ddpm_ray.models.dit import DiTSpec
from ddpm_ray.models.interop import autoencoder_kl, diffusers_dit
from ddpm_ray.models.interop.diffusers_schedulers import (
    Facts,
    settings_without_equivalent,
    to_sampling_scheduler,
)
from ddpm_ray.models.unet_spec import UNetSpec

PART_CLASSES = {
    "unet": "UNet2DModel",
    "transformer": diffusers_dit.NAME,
    "vqvae": autoencoder_kl.CLASS,
    "vae": autoencoder_kl.CLASS,
}
"""The class of the part in each folder."""
BY_HAND = "sample it step by step, as docs/toolbox.md shows"


@dataclass(frozen=True)
class ModelTraits:
    """The traits of a model that decide how diffusers draws it, apart from sampling settings."""

    network: str = "unet"  # the folder of the network
    latents: bool = False
    channels: int = 3  # of x_0
    image_size: tuple[int, int] = (8, 8)  # (H, W) of x_0
    num_classes: int = 0
    condition_channels: int = 0

    @classmethod
    def of(
        cls, spec: UNetSpec | DiTSpec, image_size: tuple[int, int], latents: bool
    ) -> "ModelTraits":
        """Return the traits of a network with this spec; `image_size` is (H, W) of x_0."""
        return cls(
            "transformer" if isinstance(spec, DiTSpec) else "unet",
            latents,
            spec.image_channels,
            image_size,
            spec.num_classes,
            spec.condition_channels,
        )

    @property
    def by_dit_pipeline(self) -> bool:
        """Whether DiTPipeline draws the model."""
        return self.network == "transformer" and self.latents

    @property
    def is_guided(self) -> bool:
        """Whether the pipeline can guide the model."""
        return self.by_dit_pipeline and 0 < self.num_classes <= diffusers_dit.NULL_LABEL


class Export(NamedTuple):
    """The scheduler for diffusers, and the run's settings that it cannot represent."""

    scheduler: dict[str, Any]  # scheduler_config.json
    pipeline: str  # class name of the pipeline; empty: none draws this model
    call: dict[str, Any]  # keyword arguments of the pipeline's call
    no_equivalent: tuple[str, ...]  # "key=value (what diffusers does instead)"
    parts: tuple[str, ...] = ("unet",)  # folders of network and autoencoder

    @property
    def model_index(self) -> dict[str, Any]:
        """model_index.json."""
        classes = {part: ["diffusers", PART_CLASSES[part]] for part in self.parts}
        scheduler = ["diffusers", self.scheduler["_class_name"]]
        return {"_class_name": self.pipeline, "scheduler": scheduler, **classes}


def to_pipeline(facts: Facts, traits: ModelTraits) -> Export:
    """The scheduler, pipeline and call that sample as the run does, as closely as diffusers can.

    Raises UnsupportedModelError for a model that no scheduler fits.
    """
    sampling = facts["sampling"]
    scheduler = to_sampling_scheduler(
        facts, traits.channels, splits_variance=traits.by_dit_pipeline
    )
    ddim = scheduler["_class_name"] == "DDIMScheduler"
    parts: tuple[str, ...] = (traits.network,)
    call: dict[str, Any] = {}
    if traits.network == "unet":
        pipeline = "DDIMPipeline" if ddim else "DDPMPipeline"
        call = {"eta": sampling.get("eta", 0.0)} if ddim else {}
        if traits.latents:
            pipeline, parts = "LDMPipeline", ("unet", "vqvae")
        elif ddim:
            call["use_clipped_model_output"] = bool(sampling["clip"])
    elif traits.latents:
        pipeline, parts = "DiTPipeline", ("transformer", "vae")
        scale = sampling.get("guidance_scale", 1.0) if traits.is_guided else 1.0
        call = {"class_labels": list(sampling.get("labels") or [0]), "guidance_scale": scale}
    else:
        pipeline = ""
    if steps := sampling.get("steps"):
        call["num_inference_steps"] = steps
    missing = settings_without_equivalent(facts, scheduler)
    missing += _label_limits(sampling, traits) + _pipeline_limits(sampling, traits, pipeline)
    return Export(scheduler, pipeline, call, tuple(missing), parts)


def _label_limits(sampling: Mapping[str, Any], traits: ModelTraits) -> list[str]:
    """Settings of labels and guidance that no pipeline, or DiTPipeline, can represent."""
    scale, labels = sampling.get("guidance_scale", 1), sampling.get("labels")
    if not traits.by_dit_pipeline:
        if scale != 1:
            return [f"guidance_scale={scale:g} (pipelines pass no labels)"]
        return [f"labels={list(labels)} (pipelines pass no labels)"] if labels else []
    if scale != 1 and not traits.is_guided:
        null = diffusers_dit.NULL_LABEL
        return [f"guidance_scale={scale:g} (DiTPipeline guides models with labels, at most {null})"]
    found = [f"guidance_scale={scale:g} (DiTPipeline: 1)"] if scale < 1 else []
    others = ("guidance_rescale", "guidance_above_sigma", "guidance_below_sigma")
    return found + [
        f"{key}={sampling[key]:g} (DiTPipeline has none)"
        for key in others
        if scale != 1 and sampling.get(key)
    ]


def _pipeline_limits(sampling: Mapping[str, Any], traits: ModelTraits, pipeline: str) -> list[str]:
    """Inputs, shapes and eta of the model that the pipeline cannot handle, a line for each."""
    if not pipeline:
        return [f"pipeline (diffusers has none for a DiT of pixels: {BY_HAND})"]
    found, (height, width) = list[str](), traits.image_size
    if (classes := traits.num_classes) and not traits.by_dit_pipeline:
        found.append(
            f"num_classes={classes} ({pipeline} passes no labels, which this network needs: "
            f"{BY_HAND})"
        )
    if traits.condition_channels:
        found.append(f"conditioning images ({pipeline} passes none: {BY_HAND})")
    if pipeline == "LDMPipeline" and height != width:
        found.append(f"latents of {height} x {width} (LDMPipeline draws squares: {BY_HAND})")
    if pipeline == "DiTPipeline" and sampling.get("sampler") == "ddim" and sampling.get("eta"):
        found.append(f"eta={sampling['eta']:g} (DiTPipeline: 0)")
    return found
