"""Options of the job import: what the weights of another library are weights of."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ddpm_ray.config.model import ModelConfig
from ddpm_ray.config.objective import ObjectiveConfig
from ddpm_ray.config.option_fields import option
from ddpm_ray.config.sampling import SampledModel, SamplingSettings
from ddpm_ray.config.schedule import ScheduleConfig

Layout: TypeAlias = Literal["diffusers", "guided-diffusion", "ho"]


@dataclass(frozen=True)
class GuidedDiffusionConfig:
    """Flags of guided-diffusion and improved-diffusion that model.* has no option for."""

    num_heads: int = option(
        4,
        "heads per attention (num_heads), unless model.head_channels (num_head_channels) is set; "
        "neither can be read from the weights",
        at_least=1,
    )
    new_attention_order: bool = option(
        False, "order of query, key and value (use_new_attention_order); the weights do not show it"
    )
    scale_shift: bool = option(True, "t scales and shifts the blocks (use_scale_shift_norm)")
    resampling_blocks: bool = option(
        False, "residual blocks change the resolution (resblock_updown); improved-diffusion: false"
    )


@dataclass(frozen=True)
class ImportConfig:
    """The network whose weights are imported; layout=diffusers reads it from the folder."""

    layout: Layout = option(
        "diffusers",
        "library whose names the tensors have; ho: the PyTorch versions of Ho et al.'s weights",
    )
    image_size: int = option(
        0, "height of the images in pixels; diffusers: as the folder says", at_least=0
    )
    image_width: int = option(0, "width in pixels; 0: square, as image_size", at_least=0)
    channels: int = option(3, "channels of the images; 1: grey, 3: RGB", at_least=1, at_most=3)
    model: ModelConfig = field(default_factory=ModelConfig)
    guided_diffusion: GuidedDiffusionConfig = field(default_factory=GuidedDiffusionConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    sampling: SamplingSettings = field(default_factory=SamplingSettings)

    def problems(self) -> Iterator[str]:
        """Yield the problems of all groups; layout=diffusers does not use them."""
        if self.layout == "diffusers":
            return
        if not self.image_size:
            yield (
                f"image_size is 0; layout={self.layout} does not name it: give the height in "
                f"pixels, as in image_size=32"
            )
        if self.model.network != "unet":
            yield f"model.network is {self.model.network}; layout={self.layout} is of U-Nets"
        if self.channels == 2:
            yield "channels is 2; use 1 (grey) or 3 (RGB)"
        yield from self.schedule.problems()
        yield from self.objective.problems(self.schedule)
        yield from self.model.problems()
        yield from self.sampling.problems("sampling", self._sampled_model)
        if self.objective.weighting == "uncertainty":
            yield (
                "objective.weighting is 'uncertainty', which these weights do not hold: use "
                "objective.weighting=unit"
            )

    def unused_keys(self, given: Collection[str]) -> Iterator[str]:
        """Yield a line for each key of `given` that has no meaning with this layout."""
        for key in given:
            group = key.partition(".")[0]
            if self.layout == "diffusers" and group not in ("layout", "sampling"):
                yield f"{key} is given; layout=diffusers reads it from the folder: leave it out"
            heads = group == "guided_diffusion" or key == "model.head_channels"
            takes_text = self.layout != "diffusers" and key == "model.transformer_depth"
            if (self.layout == "ho" and heads) or takes_text:
                yield f"{key} is given; layout={self.layout} has no such option: leave it out"

    @property
    def _sampled_model(self) -> SampledModel:
        objective = self.objective
        return SampledModel(
            self.schedule.num_steps,
            self.model.num_classes,
            objective.label_dropout > 0,
            objective.variance != "fixed",
        )
