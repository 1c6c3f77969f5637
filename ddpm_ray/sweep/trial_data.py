"""The data sets that the trials of a sweep are trained on, and their cost.

Trials on several sets compare autoencoders: the sets are latents of the same images, or the images
themselves. Each set is opened once; each trial's network is built for its own set.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ddpm_ray.assembly import latents
from ddpm_ray.config.jobs.sweep import SweepConfig
from ddpm_ray.config.loading import ConfigError, with_values
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data import encoding_record
from ddpm_ray.data.dataset import Dataset, open_dataset
from ddpm_ray.runs.absolute_paths import with_absolute_paths
from ddpm_ray.runs.training_data import open_or_pack


@dataclass(frozen=True)
class TrialData:
    """A data set, with the core-seconds of its autoencoder and encoding; None: not recorded."""

    dataset: Dataset
    core_s: float | None


class SweepData:
    """The data sets of a sweep by their absolute URLs, in the order in which they are named."""

    def __init__(self, config: SweepConfig, home: Path) -> None:
        """Open all sets. Raises DatasetError, and ConfigError for sets of different images."""
        self._config, self._home = config, home
        self._known: dict[str, TrialData] = {}
        named = [self._run_on(url) for url in config.data_urls]
        for run in named:
            dataset = open_or_pack(run) if len(named) == 1 else open_dataset(run.data.url)
            if not any("data.autoencoder" in branch for branch in config.space):
                latents.codec_of_data(run.data, dataset)  # raises for another autoencoder
            self._known[run.data.url] = TrialData(dataset, _core_s(dataset))
        first, *others = (known.dataset for known in self._known.values())
        for other in others:
            if (mine := other.images_fingerprint) != (wanted := first.images_fingerprint):
                raise ConfigError(
                    f"space.data.url names sets of different images: those of {first.url} are of "
                    f"data set {wanted[:12]}, those of {other.url} of {mine[:12]}; encode one set "
                    f"of images with each autoencoder"
                )

    @property
    def first(self) -> Dataset:
        """The set that is named first."""
        return next(iter(self._known.values())).dataset

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each set by its URL as the config names it; empty if there is only one."""
        named = self._config.data_urls
        if len(named) < 2:
            return {}
        return {url: self.of(self._run_on(url)).dataset.fingerprint for url in named}

    def of(self, run: RunConfig) -> TrialData:
        """Return the data set of a trial's run."""
        return self._known[run.data.url]

    def trial_run(self, values: dict[str, Any], where: str) -> RunConfig:
        """Return the run config of a trial with these values, without its name and storage.

        Raises ConfigError, also if nothing of core_seconds is left for training.
        """
        config = self._config
        run = replace(config.example_run(), name=config.run.name or where)
        every = config.stopping.every_steps if config.compares_losses else 0
        fixed = {"evaluation.validation_every_steps": every, "data.source": ""}
        run = with_absolute_paths(with_values(run, values | fixed, where), self._home)
        if not config.core_seconds:
            return run
        spent = self.of(run).core_s
        if spent is None:
            raise ConfigError(
                f"core_seconds is {config.core_seconds:g}, but the core-seconds of the autoencoder "
                f"or encoding of {run.data.url} are not recorded: set run.training.core_seconds "
                f"instead, which counts training alone"
            )
        if spent >= config.core_seconds:
            raise ConfigError(
                f"core_seconds is {config.core_seconds:g}, of which autoencoder and encoding of "
                f"{run.data.url} take {spent:.0f}: nothing is left for training, set it higher"
            )
        return with_values(run, {"training.core_seconds": config.core_seconds - spent}, where)

    def _run_on(self, url: str) -> RunConfig:
        """Return the base run on the data set at `url`, with absolute paths."""
        run = self._config.example_run()
        return with_absolute_paths(replace(run, data=replace(run.data, url=url)), self._home)


def _core_s(dataset: Dataset) -> float | None:
    """Return the core-seconds spent before training on this set; 0 for pixels."""
    if dataset.manifest.codec == "pixels":
        return 0.0
    cost = encoding_record.read_cost(dataset)
    return None if cost is None or cost.network is None else cost.encoding + cost.network
