"""A trained model with its settings: it draws images and shows noisy ones."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Self, TypeAlias

import torch
from torch import Tensor

from ddpm_ray.config.option_fields import checks_arguments, limits, shown
from ddpm_ray.config.sampling import (
    MOST_IMAGES,
    PROMPTS_REMEDY,
    SampledModel,
    SamplingSettings,
)
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.tokenizer import warn_of_cut_prompts
from ddpm_ray.diffusion.samplers import OnStep
from ddpm_ray.sampling.array_arguments import as_images
from ddpm_ray.sampling.conditioning import NO_EMBEDDING_MODEL
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import Images, SamplingPlan, draw_uint8, sampling_plan

Count: TypeAlias = Annotated[int, limits(at_least=1)]
NumImages: TypeAlias = Annotated[int, limits(at_least=1, at_most=MOST_IMAGES)]
Index: TypeAlias = Annotated[int, limits(at_least=0, at_most=MOST_IMAGES - 1)]


def _unknown() -> None:
    """The label names of a model that has none."""


@dataclass(frozen=True, eq=False)
class DrawingModel:
    """A trained model that draws images, with the settings of its run.

    `settings`, the `sampling` group of the run's config, holds the defaults; `settings.steps` is
    the number of steps per image. Every method accepts its fields as keyword arguments for one
    call, `with_settings` for all calls; None keeps the run's value. They are `sampler`, `steps`,
    `spacing`, `eta`, `variance`, `clip`, `dynamic_quantile`, `seed`, `batch_size`, `labels`,
    `prompts`, `negative_prompt`, and `guidance_` with `scale`, `rescale`, `above_sigma` and
    `below_sigma`.

    Image i is determined by `seed` and i. If the model has classes, image i has the label
    labels[i % len(labels)], given by number or name; without `labels`, all classes in turn.
    `batch_size` is the number of images per network call; it changes results only by rounding (one
    grey level in few pixels). All methods raise ValueError for invalid arguments.
    """

    denoiser: Denoiser  # network in eval mode on `device`
    image_shape: ImageShape
    provenance: dict[str, Any]  # config, step and sha256 of the weights
    device: torch.device | str = "cpu"
    settings: SamplingSettings = field(default_factory=SamplingSettings)  # of the run
    find_label_names: Callable[[], Sequence[str] | None] = _unknown  # lazy: may read the data set
    drops_labels: bool = True  # trained with label dropout, which guidance needs

    def __repr__(self) -> str:
        """Checkpoint, step if known, image shape and device, in one line."""
        where, step = (self.provenance.get(key) for key in ("checkpoint", "step"))
        at = "" if step is None else f", step {step}"
        return f"{type(self).__name__}({where}{at}, {self.image_shape}, {self.device})"

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the model's images."""
        return self.image_shape[:2]

    @property
    def drawn_shape(self) -> ImageShape:
        """The shape of the images that `sample` draws."""
        return self.image_shape

    @property
    def label_names(self) -> Sequence[str] | None:
        """Names of classes 0, 1, ...; None without classes or if their names are unknown."""
        return self.find_label_names()

    def with_settings(self, **settings: Any) -> Self:
        """A copy of the model with these settings as defaults for all calls."""
        chosen = self._chosen(settings)
        self._plan(chosen)  # raises for settings that this model does not support
        return replace(self, settings=chosen)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The steps that the settings visit, from T down to 0."""
        return self._plan(self.settings).steps

    @checks_arguments
    def sample(
        self,
        num_images: NumImages,
        *,
        first: Index = 0,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Images:
        """Draw uint8 images [num_images, H, W, C] with the run's settings.

        Their numbers are `first` and those after it, so that several calls draw parts of a set.
        Each batch takes about `settings.steps` network calls, 1,000 for many runs; fewer `steps`
        with a sampler such as unipc are an order of magnitude faster. `on_step(t, x_t,
        x_0_estimate)` is called at each step of each batch and must copy tensors that it keeps;
        `preview` shows them.
        """
        require_callable(on_step)
        chosen = self._chosen(settings)
        plan, shape = self._plan(chosen), self.image_shape
        indices = range(first, first + num_images)
        return draw_uint8(
            self.denoiser, plan, indices, shape, self.device, chosen.batch_size, on_step
        )

    def preview(self, x: Tensor) -> Images:
        """Show x_t or an estimate of x_0, as `on_step` gets them, as uint8 images [N, H, W, C].

        Latents are shown by their linear map to colours, without a call of the decoder; each latent
        is a square of one colour. A model without that map (imported, or trained by an earlier
        version) decodes them.
        """
        return self.denoiser.codec.show_noisy(x)

    def problems(self, prefix: str = "", *, guided_by_model: bool | None = None) -> Iterator[str]:
        """Yield a line for each of `settings` that this model does not support.

        `prefix` is the group of their keys. `guided_by_model`: a guidance model takes the labels;
        None: if there is one.
        """
        return self.settings.problems(prefix, self._sampled_model(guided_by_model))

    def _sampled_model(self, guided_by_model: bool | None = None) -> SampledModel:
        """The facts of the model that settings depend on."""
        return self.denoiser.sampled_model(self.drops_labels, guided_by_model)

    @property
    def _window(self) -> tuple[int, int]:
        """(h, w) of x_0 for images of the model's shape: what the network sees at once."""
        return self.denoiser.codec.shape(self.image_shape)[1:]

    def _plan(self, settings: SamplingSettings) -> SamplingPlan:
        """The sampling plan of `settings`; raises ValueError for unsupported ones."""
        if problems := list(settings.problems("", self._sampled_model())):
            raise ValueError("; ".join(problems))
        names = self.label_names if settings.has_names else None
        plan = sampling_plan(settings, self.denoiser.schedule, names)
        if (tokenizer := self.denoiser.takes.tokenizer) is not None:
            negative = filter(None, [settings.negative_prompt])
            warn_of_cut_prompts(tokenizer, (*plan.settings.prompts, *negative))
        return plan

    def _chosen(self, given: dict[str, Any], *, repaint: bool = False) -> SamplingSettings:
        own = self.settings.for_repaint() if repaint else self.settings
        return self._overridden(own, given)

    def _deterministic(self, given: dict[str, Any]) -> SamplingSettings:
        own = replace(self.settings, sampler="ddim", eta=0.0, variance="fixed_small")
        return self._overridden(own, given)

    def _overridden(self, own: SamplingSettings, given: dict[str, Any]) -> SamplingSettings:
        """`own` with the values of a call.

        Raises ValueError, also for an empty list of prompts, unless the model takes no text: its
        own settings have none.
        """
        chosen = own.overridden(given, self.denoiser.schedule.num_steps)
        takes_text = self.denoiser.takes.tokenizer is not None
        if takes_text and given.get("prompts") is not None and not chosen.prompts:
            raise ValueError(f"prompts is empty; {PROMPTS_REMEDY}")
        return chosen


def fields_of(model: DrawingModel) -> dict[str, Any]:
    """The fields that every drawing model has, by name."""
    return {name: getattr(model, name) for name in DrawingModel.__dataclass_fields__}


def require_callable(on_step: OnStep | None) -> None:
    """Raise ValueError for what cannot be called at each step."""
    if on_step is not None and not callable(on_step):
        raise ValueError(f"on_step is {shown(on_step)}; give a function of (t, x_t, x_0)")


def in_turn(rows: Tensor, first: int) -> Tensor:
    """Shift the rows [N, ...] of inputs so that image first + j has row j: image i has i % N."""
    return rows.roll(first % len(rows), 0)


def embedded(model: DrawingModel, images: Images, per_image: int) -> Tensor:
    """Embeddings [N * per_image, D] of images of the model's size, each `per_image` times.

    Raises ValueError for a model that is given no embeddings, and for images of another size.
    """
    encoder = model.denoiser.takes.image_encoder
    if encoder is None:
        raise ValueError(NO_EMBEDDING_MODEL)
    found = as_images(images, model.image_shape.channels)
    if found.shape[1:] != model.image_shape:
        raise ValueError(
            f"images are {' x '.join(map(str, found.shape[1:3]))}; variations are drawn of images "
            f"of the model's size, {' x '.join(map(str, model.image_size))}"
        )
    pixels = PIXELS.encode(torch.from_numpy(found).to(model.device))  # of a model of latents, too
    return encoder.embed(pixels).repeat_interleave(per_image, dim=0)
