"""Options of a sweep: the base run, the search space, and how trials are compared.

Holds a complete RunConfig: each trial is an ordinary training run.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.jobs.search_space import is_list, space_problems
from ddpm_ray.config.option_fields import group, option
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.task import TRAITS, TaskTraits

DATA_URL = "data.url"
RETRIEVAL = tuple(  # scores of a contrastive model
    f"eval/{way}_r{most}" for way in ("image_to_text", "text_to_image") for most in (1, 5, 10)
)
SIMILARITIES = "eval/psnr", "eval/ssim"  # of an autoencoder
HIGHER_IS_BETTER = (*SIMILARITIES, *RETRIEVAL)  # of all other scores lower is better


@dataclass(frozen=True)
class SearchConfig:
    """Choice of the trials' values."""

    kind: Literal["grid", "random", "tpe"] = option(
        "grid", "search method; grid: all combinations; tpe: Optuna's, uses earlier results"
    )
    trials: int = option(0, "number of trials; 0 (grid only): all combinations", at_least=0)
    seed: int = option(0, "random seed of random and tpe", at_least=0)


@dataclass(frozen=True)
class StoppingConfig:
    """Early stopping of the trials with a higher loss."""

    kind: Literal["asha", "median", "none", "pbt"] = option(
        "asha",
        "early stopping; asha: keep the best 1/reduction_factor of a rung; "
        "median: stop if worse than the median; pbt: refused, weights do not fit another schedule",
    )
    every_steps: int = option(
        1000, "optimiser steps between early-stopping decisions, by eval/loss_common", at_least=1
    )
    first_step: int = option(0, "step of the first decision; 0: every_steps", at_least=0)
    reduction_factor: float = option(3, "asha: ratio of successive rungs", above=1)
    min_trials: int = option(
        3, "median: number of other trials that must have reached the step", at_least=1
    )

    @property
    def grace_steps(self) -> int:
        """The step of the first decision."""
        return self.first_step or self.every_steps


@dataclass(frozen=True)
class PruningConfig:
    """Schedules that are rejected before any training."""

    max_prior_bits_per_dim: float = option(
        0.01,
        "largest prior KL in bits/dim, the information on the image in x_T; above: rejected",
        above=0,
    )
    max_wasted_fraction: float = option(
        0.6,
        "largest fraction of wasted steps, in which there is nothing to learn; above: rejected",
        above=0,
        at_most=1,
        formerly="max_useless_share",
    )


@dataclass(frozen=True)
class SweepConfig:
    """One sweep: its trials, which differ in some options, and the score that compares them."""

    shipped_in: ClassVar = "sweep"  # folder of conf/

    name: str = option("", "name of the sweep; the same name in the same storage continues it")
    run_from: str = option(
        "",
        "base run: a YAML file or the name of a config, as digits; run.* keys override it",
        loads_group="run",
    )
    space: tuple[dict[str, Any], ...] = option(
        (),
        "search space: mappings of keys of the run to choices, [a, b], or a range, {low:, high:, "
        "log:, step:}",
        keys_of="run",
    )
    metric: str = option(
        "",
        "final score to minimise (PSNR, SSIM: to maximise); empty: the first that trials report",
    )
    core_seconds: float = option(
        0.0,
        "core-seconds of each trial, as training.core_seconds counts them, of which those of "
        "autoencoder and encoding are a part; 0: trials are compared as run.training says",
        at_least=0,
    )
    trials_at_once: int = option(0, "parallel trials; 0: as many as fit the cluster", at_least=0)
    max_starts: int = option(3, "attempts per trial in total if its driver dies", at_least=1)
    register_as: str = option(
        "", "MLflow model name to register the winner as `champion`; empty: name"
    )
    search: SearchConfig = field(default_factory=SearchConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    run: RunConfig = group(RunConfig, whole_config=True)

    @property
    def score(self) -> str:
        """The metric that trials are compared by."""
        return self.metric or self.reported[0]

    @property
    def reported(self) -> list[str]:
        """The names of the final scores of trials."""
        return reported_metrics(self.run.evaluation, self.run.traits)

    @property
    def data_urls(self) -> tuple[str, ...]:
        """The data sets that trials are trained on."""
        found = [url for branch in self.space for url in branch.get(DATA_URL, [self.run.data.url])]
        return tuple(dict.fromkeys(found))

    @property
    def compares_losses(self) -> bool:
        """Whether trials have validation losses, and all of the same x_0."""
        return self.run.traits.draws_images and not any(DATA_URL in one for one in self.space)

    def problems(self) -> Iterator[str]:
        """Yield the problems of the run, the search space, the metric and early stopping."""
        if not self.name:
            yield "name is empty; give it a value, as in name=..."
        if "/" in self.name or self.name.startswith("."):
            yield f"name is {self.name!r}; it names a folder: no '/' and no leading '.'"
        yield from (f"run.{line}" for line in self.example_run().problems())
        if self.run.cluster.min_workers:
            yield (
                f"run.cluster.min_workers is {self.run.cluster.min_workers}; trials would take "
                f"each other's resources: leave it 0"
            )
        yield from self._metric_problems()
        yield from space_problems(self.space, self.search.kind)
        yield from self._data_problems()
        yield from self._search_problems()
        yield from self._stopping_problems()

    def example_run(self) -> RunConfig:
        """Return the base run with the name and data of a trial, where it has none."""
        named = [branch.get(DATA_URL) for branch in self.space]
        url = self.run.data.url
        if not url and named and all(is_list(choices) and choices for choices in named):
            url = str(named[0][0])  # type: ignore[index]  # a list
        data = dataclasses.replace(self.run.data, url=url)
        return dataclasses.replace(self.run, name=self.run.name or "trial", data=data)

    def _data_problems(self) -> Iterator[str]:
        """Yield a line for each rule that trials on several data sets, or their budget, break."""
        searched = any(DATA_URL in branch for branch in self.space)
        if searched and not self.run.traits.has_noise:
            yield (
                f"space.{DATA_URL} cannot be varied: the scores of {self.run.traits.name} on "
                f"different data cannot be compared; set run.{DATA_URL} for all trials"
            )
        elif searched and not self.run.evaluation.reference_url:
            yield (
                f"space.{DATA_URL} is given, and run.evaluation.reference_url is empty; name the "
                f"images that the samples of all trials are compared with"
            )
        if self.core_seconds and (own := self.run.training.core_seconds):
            yield (
                f"core_seconds is {self.core_seconds:g} and run.training.core_seconds {own:g}; set "
                f"the first to count autoencoder and encoding, the second to count training alone"
            )

    def _metric_problems(self) -> Iterator[str]:
        if self.run.evaluation.num_images < 2:
            yield (
                f"run.evaluation.num_images is {self.run.evaluation.num_images}; trials are "
                f"compared by their final score: give it at least 2, better thousands"
            )
        known = self.reported
        if self.metric and self.metric not in known:
            yield (
                f"metric is {self.metric!r}, which no trial reports; with run.evaluation.features="
                f"{self.run.evaluation.features} they report {', '.join(known)}"
            )

    def _search_problems(self) -> Iterator[str]:
        if self.search.kind != "grid" and not self.search.trials:
            yield f"search.trials is 0; say how many trials search.kind={self.search.kind} makes"

    def _stopping_problems(self) -> Iterator[str]:
        stopping, steps = self.stopping, self.run.training.steps
        if stopping.kind == "pbt":
            yield (
                "stopping.kind is 'pbt'; population-based training copies weights between trials, "
                "but a beta schedule or T defines the model, so weights do not carry over (and "
                "Ray's, over Train V2, silently does nothing): use asha or median"
            )
        if stopping.kind in ("asha", "median") and not self.compares_losses:
            why = f"{self.run.traits.name} has no loss by log-SNR"
            if self.run.traits.draws_images:
                why = "losses on different latents cannot be compared"
            yield f"stopping.kind is {stopping.kind!r}, but {why}: use stopping.kind=none"
        elif stopping.kind in ("asha", "median") and stopping.grace_steps >= steps:
            yield (
                f"stopping.every_steps is {stopping.every_steps} and stopping.first_step "
                f"{stopping.first_step}; the first decision must come before run.training.steps "
                f"{steps}, or use stopping.kind=none"
            )


def reported_metrics(
    config: EvaluationConfig, traits: TaskTraits = TRAITS["denoiser"]
) -> list[str]:
    """Return the names of the final scores that a trial reports."""
    if traits.reconstructs:
        frechet = [] if config.features == "none" else _frechet_metrics(config)
        names = [f"eval/r{name.removeprefix('eval/')}" for name in frechet]
        return [*names, *SIMILARITIES]
    if traits.embeds:
        return [*RETRIEVAL]
    names = _frechet_metrics(config)
    return names + _kernel_metrics(config) if config.kernel_distance else names


def _frechet_metrics(config: EvaluationConfig) -> list[str]:
    if config.features == "digits":
        return ["eval/fd_digits"]
    widths = config.widths
    return ["eval/sfid" if w == 2023 else f"eval/fid{'' if w == 2048 else w}" for w in widths]


def _kernel_metrics(config: EvaluationConfig) -> list[str]:
    if config.features == "digits":
        return ["eval/kd_digits"]
    return [f"eval/kid{'' if w == 2048 else w}" for w in config.widths if w != 2023]
