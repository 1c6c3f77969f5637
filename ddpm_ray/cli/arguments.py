"""The arguments of a job: parsed, checked, and explained by `--help`."""

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from ddpm_ray.cli.help_text import explained, option_overview
from ddpm_ray.cli.job import CONFIG, Job
from ddpm_ray.config.loading import ConfigError, given_keys
from ddpm_ray.config.reading.shipped import shipped_names
from ddpm_ray.redaction import NO_SECRET, has_secret

EVERY_JOB = """\
The last line of stdout is the result, as JSON. Exit codes: 0: done; 1: failed; 2: invalid config;
3: some parts failed, the others are in the result; 130: interrupted.
"""
OPTIONS = """\
Options, as key=default and meaning. Set them on the command line as key=value{or_in_file};
--help KEY says all about one option or group.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; see --help")


class _Help(argparse.Action):
    """Prints the help of the job, or that of one option or group, and exits."""

    def __init__(self, *args: Any, job: Job[Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._config = job.config
        self._options = OPTIONS.format(
            or_in_file=" or in CONFIG" if CONFIG in job.arguments else ""
        )

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, key: object, _: object = None
    ) -> NoReturn:
        """Called by argparse for `--help`; `key` is None where none was given."""
        if key is None:
            text = f"{parser.format_help()}\n{self._options}\n{option_overview(self._config)}"
        else:
            text = explained(self._config, str(key))
        try:
            print(text, flush=True)
        except BrokenPipeError:  # `--help | head`: the rest is not wanted
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit()


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
        description=f"{job.description.strip()}\n\n{_shipped(job)}{EVERY_JOB}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    group = parser.add_argument_group("arguments")
    for one in job.arguments:
        if one.name.startswith("--"):
            group.add_argument(
                one.name, required=one.required, default="", metavar="PATH", help=one.help
            )
        else:
            group.add_argument(one.name, metavar=one.name.upper(), help=one.help)
    group.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="an option of the list below"
    )
    group.add_argument(
        "--print-config", action="store_true", help="print the complete config and exit"
    )
    group.add_argument(
        "-h",
        "--help",
        action=_Help,
        job=job,
        nargs="?",
        metavar="KEY",
        help="print this help, or that of one option or group, and exit",
    )
    return parser


def _shipped(job: Job[Any]) -> str:
    """A paragraph with the configs that are shipped for the job; empty if it takes none."""
    if CONFIG not in job.arguments:
        return ""
    text = f"Configs that ddpm_ray ships: {', '.join(shipped_names(job.config))}."
    return f"{textwrap.fill(text, 100, break_on_hyphens=False)}\n\n"
