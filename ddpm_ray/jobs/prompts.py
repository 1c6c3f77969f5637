"""The prompts of the jobs that draw images: of the option, or of a file."""

from argparse import Namespace
from dataclasses import replace
from typing import Any, TypeVar

from ddpm_ray.cli.paths import home_folder, input_file
from ddpm_ray.config.jobs.edit import EditConfig
from ddpm_ray.config.jobs.sample import SampleConfig
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.config.reading.prompt_file import read_prompt_file
from ddpm_ray.config.sampling import PROMPTS_REMEDY

T = TypeVar("T", SampleConfig, EditConfig)
KEY = "sampling.prompts"


def with_prompts_of_file(config: T, arguments: Namespace) -> T:
    """Return `config` with the prompts of its `prompts_file`, if it names one.

    Keeps what identifies the file for `prompts_facts`. Raises ConfigError for a file that is not
    there or holds no prompts, and for an empty list.
    """
    if KEY in arguments.given and not config.sampling.prompts:
        raise ConfigError(f"{KEY} is empty; {PROMPTS_REMEDY}")
    if not config.prompts_file:
        return config
    if KEY in arguments.given:
        raise ConfigError(f"prompts_file is {config.prompts_file} and {KEY} is given: give one")
    path = input_file("prompts_file", config.prompts_file, home_folder())
    found = read_prompt_file("prompts_file", path, config.num_images)
    arguments.given = {*arguments.given, KEY}
    arguments.prompts_file = {"lines": found.lines, "sha256": found.sha256}
    return replace(
        config, prompts_file=path, sampling=replace(config.sampling, prompts=found.prompts)
    )


def prompts_facts(arguments: Namespace) -> dict[str, Any]:
    """Lines and sha256 of the file of prompts, for a job's result; empty without a file."""
    found = getattr(arguments, "prompts_file", None)
    return {"prompts_file": found} if found else {}
