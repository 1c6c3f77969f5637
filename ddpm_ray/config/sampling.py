"""How images are drawn: one group of options, of a run's config, a job's and a notebook's calls."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypedDict

from ddpm_ray.config.option_fields import arguments, option, out_of_range

Sampler: TypeAlias = Literal[
    "ddim", "ancestral", "dpm_solver_pp", "dpm_solver_pp_sde", "unipc", "heun", "plms"
]
Spacing: TypeAlias = Literal["uniform", "quadratic", "log_snr"]
Variance: TypeAlias = Literal["fixed_small", "fixed_large", "learned"]


class SamplingArguments(TypedDict, total=False):
    """Keyword arguments in place of the settings of these names; None leaves one as it is."""

    sampler: Sampler | None
    steps: int | None
    spacing: Spacing | None
    eta: float | None
    variance: Variance | None
    clip: bool | None
    dynamic_quantile: float | None
    seed: int | None
    batch_size: int | None
    labels: Sequence[int | str] | int | str | None
    guidance_scale: float | None
    guidance_rescale: float | None
    guidance_above_sigma: float | None
    guidance_below_sigma: float | None


@dataclass(frozen=True)
class SamplingConfig:
    sampler: Sampler = option("ddim", "how images are drawn")
    steps: int = option(50, "steps per image, at most T; heun calls the network twice", at_least=1)
    spacing: Spacing = option("uniform", "of these steps over 0..T; log_snr: evenly in log-SNR")
    eta: float = option(0.0, "ddim: fresh noise, 0 none, 1 as ancestral", at_least=0, at_most=1)
    variance: Variance = option(
        "fixed_small", "of the fresh noise; learned: as the network answers it"
    )
    clip: bool = option(True, "clip each estimate of x_0 to [-1, 1] and derive epsilon again")
    dynamic_quantile: float = option(
        0.0, "clip each image to this quantile of its own |x_0| and rescale; 0: to [-1, 1]",
        at_least=0, at_most=1,
    )  # fmt: skip
    seed: int = option(0, "with the image's index it fixes an image", at_least=0)
    batch_size: int = option(64, "images in one network call", at_least=1, at_most=2**32)
    labels: tuple[int | str, ...] = option(
        (), "classes to draw in turn, by number or name; empty: all, of a model that knows them"
    )
    guidance_scale: float = option(
        1.0, "classifier-free guidance: 1 the class alone, above 1 more of it", at_least=0
    )
    guidance_rescale: float = option(
        0.0, "share of guided contrast that is taken back", at_least=0, at_most=1
    )
    guidance_above_sigma: float = option(0.0, "guide only at noise above this sigma", at_least=0)
    guidance_below_sigma: float = option(
        0.0, "and below this one (sigma^2 = 1/alpha_bar - 1); 0: no end", at_least=0
    )

    def problems(self, prefix: str = "", num_steps: int | None = None) -> Iterator[str]:
        """Steps and variance that do not fit a model of T = `num_steps`, if that is known.

        `prefix` is what stands before each key: `sampling.` in a config, nothing in a call.
        """
        at = prefix and f"{prefix}."
        if num_steps is not None and 0 < num_steps < self.steps:
            yield (
                f"{at}steps is {self.steps}; it cannot exceed schedule.num_steps {num_steps}, the "
                f"T that the model was trained with"
            )
        yield from self._variance_problems(at, num_steps)
        if self.dynamic_quantile and not self.clip:
            yield (
                f"{at}dynamic_quantile is {self.dynamic_quantile} and {at}clip false; it is a way "
                f"to clip: set one of the two"
            )
        if 0 < self.guidance_below_sigma <= self.guidance_above_sigma:
            yield (
                f"{at}guidance_below_sigma is {self.guidance_below_sigma}; it must lie above "
                f"{at}guidance_above_sigma {self.guidance_above_sigma}"
            )

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

    def incompatibilities(
        self,
        prefix: str,
        model: "Conditioned",
        *,
        guided_by_model: bool = False,
        guidance_classes: int = 0,
    ) -> Iterator[str]:
        """What a model that was trained so cannot do: guide without labels, answer a variance.

        `guided_by_model`: another network knows the labels, 0 to `guidance_classes` - 1 unless that
        is 0.
        """
        at, classes = prefix and f"{prefix}.", model.num_classes
        if self.variance == "learned" and not model.learns_variance:
            yield (
                f"{at}variance is 'learned', and the network answers none "
                f"(objective.variance=fixed): use {at}variance=fixed_small"
            )
        if not classes and (self.guidance_scale != 1 or (self.labels and not guided_by_model)):
            yield (
                f"{at}guidance_scale is {self.guidance_scale:g} and {at}labels "
                f"{list(self.labels)}, but the model is trained without labels "
                f"(model.num_classes=0): leave both as they are by default"
            )
        elif self.guidance_scale != 1 and not model.drops_labels:
            yield (
                f"{at}guidance_scale is {self.guidance_scale:g}, but no image was trained "
                f"without its label (objective.label_dropout=0): use {at}guidance_scale=1"
            )
        if classes := classes or guidance_classes:
            numbers = [k for k in self.labels if isinstance(k, int)]
            if wrong := [k for k in numbers if not 0 <= k < classes]:
                yield (
                    f"{at}labels has {wrong[0]}; the model knows 0 to {classes - 1} "
                    f"(model.num_classes={classes})"
                )

    @property
    def has_names(self) -> bool:
        """Whether a label is a name, to be looked up among those of the model's classes."""
        return any(isinstance(label, str) for label in self.labels)

    def numbered(self, names: Sequence[str] | None) -> tuple[int, ...]:
        """`labels` with the number of each name in `names`, those of classes 0, 1, ... if known.

        Raises ValueError for one that is not there.
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

    def overridden(
        self, values: Mapping[str, Any], num_steps: int | None = None
    ) -> "SamplingConfig":
        """These settings with `values` in place of those of their names; None leaves one as it is.

        A variance that was set for another sampler, or for all T steps, gives way to fixed_small
        where the new ones leave it no meaning, and so does a way to clip where `clip` is false;
        unless they are among `values`. Raises ValueError for values out of range.
        """
        given = arguments(SamplingConfig, values)
        chosen = replace(self, **given)
        if "variance" not in given and any(chosen._variance_problems("", num_steps)):
            chosen = replace(chosen, variance="fixed_small")
        if "dynamic_quantile" not in given and not chosen.clip:
            chosen = replace(chosen, dynamic_quantile=0.0)
        if wrong := [*out_of_range(chosen)]:
            raise ValueError("; ".join(wrong))
        return chosen

    def for_repaint(self) -> "SamplingConfig":
        """The settings that RePaint takes where it is told nothing else: it walks as ancestral."""
        return replace(self, sampler="ancestral", variance="fixed_small")


@dataclass(frozen=True)
class Conditioned:
    """What a model was trained to be given beside x_t and t, and to answer beside its mean."""

    num_classes: int = 0
    drops_labels: bool = True  # some images were shown without theirs, as guidance needs it
    learns_variance: bool = False
