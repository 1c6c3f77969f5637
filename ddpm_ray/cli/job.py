"""Jobs as the command line sees them, and the ways in which a job ends."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

from ddpm_ray.config.loading import Config

DONE, FAILED, WRONG_CONFIG, PARTLY_FAILED = 0, 1, 2, 3  # exit codes; see also signals.exit_code


class InterruptedRunError(Exception):
    """A run that was stopped on request; the message says how to continue it."""


class PartlyFailedError(Exception):
    """A job of which some parts failed; args are (message, result)."""


@dataclass(frozen=True)
class Argument:
    """An argument other than the `key=value` options: `model_uri`, or `--out` with a file."""

    name: str
    help: str
    required: bool = True  # else the default is an empty text

    @property
    def attribute(self) -> str:
        """Its name in the parsed arguments."""
        return self.name.removeprefix("--")


CONFIG = Argument("config", "YAML file, or the name of a config that ddpm_ray ships (above)")


@dataclass(frozen=True)
class Job(Generic[Config]):
    """A job: what it is called, what it is given, and what it does.

    `description`: one line, a blank line, then usage and details; shown by `--help`. `prepare` runs
    before `run`: it checks paths and merges the keys that were given (`arguments.given`) into the
    settings of a trained model; `--print-config` shows its result. Neither imports torch, Ray or
    MLflow before the paths are checked. `run` returns the result, which is printed as JSON.
    """

    name: str
    description: str
    config: type[Config]
    run: Callable[[Config, Namespace], dict[str, Any]]
    arguments: tuple[Argument, ...] = ()
    prepare: Callable[[Config, Namespace], Config] | None = None
    continues: bool = False  # whether the same command continues after an interruption

    @property
    def summary(self) -> str:
        """The first line of the description."""
        return self.description.partition("\n")[0]
