"""The arguments of a job: parsed, checked, and explained by `--help`."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from ddpm_ray.cli.job import Job
from ddpm_ray.config.loading import ConfigError, given_keys, help_lines
from ddpm_ray.redaction import NO_SECRET, has_secret

EVERY_JOB = """\
The last line of stdout is the result, as JSON. Exit codes: 0: done; 1: failed; 2: invalid config;
3: some parts failed, the others are in the result; 130: interrupted.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; see --help")


def parsed(job: Job[Any], words: Sequence[str], command: str) -> argparse.Namespace:
    """Parse `words`: the job's own arguments, `overrides` and their keys, `given`.

    `command` is what the user typed before `words`. Exits after `--help`. Raises ConfigError.
    """
    arguments = _parser(job, command).parse_intermixed_args(words)
    for one in job.arguments:
        if has_secret(value := getattr(arguments, one.attribute)):
            raise ConfigError(f"command line: {one.name} is {value}: {NO_SECRET}")
    arguments.given = given_keys(job.config, arguments.overrides)
    return arguments


def _parser(job: Job[Any], command: str) -> _Parser:
    parser = _Parser(
        prog=command,
        description=f"{job.description.strip()}\n\n{EVERY_JOB}",
        epilog="\n".join(["Options, their defaults, and their meaning:", *help_lines(job.config)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for one in job.arguments:
        if one.name.startswith("--"):
            parser.add_argument(
                one.name, required=one.required, default="", metavar="FILE", help=one.help
            )
        else:
            parser.add_argument(one.name, metavar=one.name.upper(), help=one.help)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="an option of the list below"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the complete config and exit"
    )
    return parser
