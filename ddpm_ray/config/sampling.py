"""Sampling options: one class for configs of runs and jobs, and for keyword arguments in Python."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from ddpm_ray.choices import SamplingVariance
from ddpm_ray.config.caption_rule import CaptionError, cleaned
from ddpm_ray.config.option_fields import arguments, option, out_of_range

Sampler: TypeAlias = Literal[
    "ddim", "ancestral", "dpm_solver_pp", "dpm_solver_pp_sde", "unipc", "heun", "plms"
]
Spacing: TypeAlias = Literal["uniform", "quadratic", "log_snr"]

PROMPTS_REMEDY = "give one or more texts, or leave it out; '' is an image without text"
MOST_IMAGES = 2**32  # of one seed: random numbers are keyed by the index of an image, 32 bits


@dataclass(frozen=True)
class SamplingSettings:
    """Settings of the sampler.

    They are the group `sampling` of a config, or keyword arguments in Python.
    """

    sampler: Sampler = option("ddim", "sampling algorithm")
    steps: int = option(
        50, "sampling steps, at most T; heun: two network calls per step", at_least=1
    )
    spacing: Spacing = option(
        "uniform", "spacing of these steps in 0..T; log_snr: uniform in log-SNR"
    )
    eta: float = option(
        0.0, "ddim: noise per step; 0: deterministic, 1: as ancestral", at_least=0, at_most=1
    )
    variance: SamplingVariance = option(
        "fixed_small", "variance of the noise per step; learned: predicted by the network"
    )
    clip: bool | None = option(
        None,
        "clip each estimate of x_0 to [-1, 1] and recompute epsilon; null: true for pixels, false "
        "for latents",
    )
    dynamic_quantile: float = option(
        0.0,
        "dynamic thresholding: clip to this quantile of |x_0|, then rescale; 0: off",
        at_least=0,
        at_most=1,
    )
    seed: int = option(0, "random seed; (seed, image index) determines an image", at_least=0)
    batch_size: int = option(64, "images per network call", at_least=1, at_most=MOST_IMAGES)
    labels: tuple[int | str, ...] = option(
        (), "classes to sample in turn, by number or name; empty: all classes of the model"
    )
    prompts: tuple[str, ...] = option(
        (), "texts to sample in turn; empty: no text, in a training run captions of its data"
    )
    negative_prompt: str = option(
        "", "text to guide away from, in place of no text; needs guidance_scale above 1"
    )
    guidance_scale: float = option(
        1.0, "classifier-free guidance scale; 1: no guidance", at_least=0
    )
    guidance_rescale: float = option(
        0.0,
        "guidance rescale factor phi against overexposure (Lin et al. 2023)",
        at_least=0,
        at_most=1,
    )
    guidance_above_sigma: float = option(0.0, "guidance interval: lower end in sigma", at_least=0)
    guidance_below_sigma: float = option(
        0.0,
        "guidance interval: upper end in sigma (sigma^2 = 1/alpha_bar - 1); 0: no limit",
        at_least=0,
    )

    def problems(self, prefix: str = "", model: "SampledModel | None" = None) -> Iterator[str]:
        """Yield a line for each invalid setting, and for each that `model` does not support.

        `prefix` is the group of the keys: "sampling" in a config, "" for function arguments.
        """
        at, num_steps = prefix and f"{prefix}.", None if model is None else model.num_steps
        if num_steps is not None and 0 < num_steps < self.steps:
            yield (
                f"{at}steps is {self.steps}; it cannot exceed schedule.num_steps {num_steps}, the "
                f"T that the model was trained with"
            )
        yield from self._variance_problems(at, num_steps)
        yield from self._prompt_problems(at)
        if self.dynamic_quantile and self.clip is False:
            yield (
                f"{at}dynamic_quantile is {self.dynamic_quantile} and {at}clip false; it is a way "
                f"to clip: set one of the two"
            )
        if 0 < self.guidance_below_sigma <= self.guidance_above_sigma:
            yield (
                f"{at}guidance_below_sigma is {self.guidance_below_sigma}; it must lie above "
                f"{at}guidance_above_sigma {self.guidance_above_sigma}"
            )
        if model is not None:
            yield from self._unsupported(at, model)

    def _variance_problems(self, at: str, num_steps: int | None) -> Iterator[str]:
        partial = num_steps is not None and self.steps < num_steps
        if self.variance == "fixed_large" and partial:
            yield (
                f"{at}variance is 'fixed_large', which at {self.steps} of {num_steps} steps adds "
                f"more noise than the next step expects (FID 367 at 10 steps: Song et al. 2021, "
                f"table 1); use {at}variance=fixed_small"
            )
        elif self.variance == "fixed_large" and self.sampler == "ddim" and self.eta != 1:
            yield (
                f"{at}variance is 'fixed_large' and {at}eta {self.eta}; that variance is defined "
                f"for eta=1 alone (Song et al. 2021, section 4.1): use fixed_small"
            )
        if self.variance == "learned" and self.sampler != "ancestral":
            yield (
                f"{at}variance is 'learned' and {at}sampler {self.sampler!r}, which has no "
                f"variance to learn: use {at}sampler=ancestral or fixed_small"
            )

    def _prompt_problems(self, at: str) -> Iterator[str]:
        """Yield a line for the first text that breaks the rule of captions, for each option."""
        for key, texts in (("prompts", self.prompts), ("negative_prompt", (self.negative_prompt,))):
            for number, text in enumerate(texts, 1):
                try:
                    cleaned(text, f"prompt {number}" if key == "prompts" else "the text")
                except CaptionError as error:
                    yield f"{at}{key} cannot be used: {error}"
                    break

    def _unsupported(self, at: str, model: "SampledModel") -> Iterator[str]:
        """Yield a line for labels, guidance, variance and clip that `model` does not support."""
        classes = model.num_classes
        conditional = classes or model.takes_text or model.takes_embedding
        if not model.takes_text and (self.prompts or self.negative_prompt):
            key = "prompts" if self.prompts else "negative_prompt"
            yield (
                f"{at}{key} is given, but the model takes no text (text.encoder=none): leave it out"
            )
        elif self.negative_prompt and self.guidance_scale <= 1:
            yield (
                f"{at}negative_prompt is given and {at}guidance_scale is {self.guidance_scale:g}, "
                f"with which nothing is guided away: set {at}guidance_scale above 1"
            )
        if not model.has_range and (self.clip or self.dynamic_quantile):
            given = "clip is true" if self.clip else f"dynamic_quantile is {self.dynamic_quantile}"
            yield f"{at}{given}, but latents have no range to clip to: leave it out"
        if self.variance == "learned" and not model.learns_variance:
            yield (
                f"{at}variance is 'learned', and the network predicts none "
                f"(objective.variance=fixed): use {at}variance=fixed_small"
            )
        if (not conditional and self.guidance_scale != 1) or (
            not classes and self.labels and not model.guided_by_model
        ):
            yield (
                f"{at}guidance_scale is {self.guidance_scale:g} and {at}labels "
                f"{list(self.labels)}, but the model is trained without labels "
                f"(model.num_classes=0): leave both as they are by default"
            )
        elif self.guidance_scale != 1 and not model.drops_labels:
            yield (
                f"{at}guidance_scale is {self.guidance_scale:g}, but no image was trained "
                f"without {model.guided_inputs}: use {at}guidance_scale=1"
            )
        if classes := classes or model.guidance_classes:
            numbers = [k for k in self.labels if isinstance(k, int)]
            if wrong := [k for k in numbers if not 0 <= k < classes]:
                yield (
                    f"{at}labels has {wrong[0]}; the model knows 0 to {classes - 1} "
                    f"(model.num_classes={classes})"
                )

    @property
    def has_names(self) -> bool:
        """Whether some label is a class name and not a number."""
        return any(isinstance(label, str) for label in self.labels)

    def numbered(self, names: Sequence[str] | None) -> tuple[int, ...]:
        """Return `labels` as class numbers; `names` are the names of classes 0, 1, ..., if known.

        Raises ValueError for an unknown name.
        """
        for label in self.labels:
            if isinstance(label, int) or label in (names or ()):
                continue
            if not names:
                raise ValueError(
                    f"labels has {label!r}, and the names of the model's classes are not known; "
                    f"give their numbers"
                )
            near = difflib.get_close_matches(label, names, n=1)
            hint = f"did you mean {near[0]!r}" if near else f"there are {', '.join(names[:20])}"
            raise ValueError(f"labels has {label!r}, which is no class of the data; {hint}?")
        return tuple(k if isinstance(k, int) else (names or ()).index(k) for k in self.labels)

    @property
    def clean_prompts(self) -> tuple[str, ...]:
        """`prompts` as captions are stored: in NFC, without white space around them.

        Raises CaptionError, which names the prompt's number.
        """
        return tuple(cleaned(one, f"prompt {n}") for n, one in enumerate(self.prompts, 1))

    def overridden(
        self, values: Mapping[str, Any], num_steps: int | None = None
    ) -> "SamplingSettings":
        """Return these settings with `values` replaced; a value of None is ignored.

        A variance that the new sampler or number of steps does not support becomes fixed_small, and
        dynamic_quantile becomes 0 if `clip` is false, unless they are in `values` themselves.
        Raises ValueError for values out of range.
        """
        given = arguments(SamplingSettings, values)
        chosen = replace(self, **given)
        if "variance" not in given and any(chosen._variance_problems("", num_steps)):
            chosen = replace(chosen, variance="fixed_small")
        if "dynamic_quantile" not in given and chosen.clip is False:
            chosen = replace(chosen, dynamic_quantile=0.0)
        if wrong := [*out_of_range(chosen)]:
            raise ValueError("; ".join(wrong))
        return chosen

    def for_repaint(self) -> "SamplingSettings":
        """Return these settings with RePaint's defaults: ancestral sampler, fixed_small."""
        return replace(self, sampler="ancestral", variance="fixed_small")


@dataclass(frozen=True)
class SampledModel:
    """The facts of a model that sampling settings depend on."""

    num_steps: int  # T
    num_classes: int = 0
    drops_labels: bool = True  # label dropout, needed for classifier-free guidance
    learns_variance: bool = False
    guided_by_model: bool = False  # a guidance model takes the labels
    guidance_classes: int = 0  # number of labels that it knows; 0: unknown, and not checked
    has_range: bool = True  # diffuses pixels, in [-1, 1], not latents
    takes_text: bool = False
    takes_embedding: bool = False  # of an image

    @property
    def guided_inputs(self) -> str:
        """The inputs that guidance amplifies, with the options of their dropout."""
        if not self.takes_embedding:
            return f"its {'label' if self.num_classes else 'text'} (objective.label_dropout=0)"
        text = "its text (objective.label_dropout) and " if self.takes_text else ""
        return f"{text}its embedding (embedding.dropout); neither may be 0"
