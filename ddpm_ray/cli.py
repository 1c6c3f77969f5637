"""Command line of all jobs: arguments, --help, progress, one-line errors, JSON result."""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddpm_ray.config.job_files import job_of_file
from ddpm_ray.config.loading import Config, ConfigError, given_keys, help_lines, load, to_yaml
from ddpm_ray.distributed.signals import exit_code, interrupt_on_first
from ddpm_ray.redaction import NO_SECRET, has_secret, sanitize
from ddpm_ray.tracking import mlflow_settings

DONE, FAILED, WRONG_CONFIG, PARTLY_FAILED = 0, 1, 2, 3


class InterruptedRunError(Exception):
    """A run that was stopped on request; the message says how to continue it."""


def main(
    usage: str,
    kind: type[Config],
    job: Callable[[Config, argparse.Namespace], dict[str, Any]],
    *names: str,
    prepare: Callable[[Config, argparse.Namespace], Config] | None = None,
) -> int:
    """Run a job and return its exit code; the result is the last line of stdout, as JSON.

    `names`: the arguments before `key=value`, as `model_uri` or `--out`; `config` is the YAML file,
    and `--mask?` is optional (default ""). The config is checked before `job` imports heavy
    modules. `prepare` checks output paths and merges the given keys (`arguments.given`) into the
    settings of a trained run; `--print-config` shows its result.
    """
    try:
        arguments = _parser(usage, kind, names).parse_intermixed_args()
        _refuse_secrets(arguments, names)
        config = _loaded(kind, getattr(arguments, "config", None), arguments.overrides)
        arguments.given = given_keys(kind, arguments.overrides)
    except ConfigError as error:
        return _say(error, WRONG_CONFIG)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("ddpm_ray").setLevel(logging.INFO)
    logging.getLogger("aiobotocore").setLevel(logging.WARNING)  # not where it found credentials
    mlflow_settings.apply()
    try:
        with interrupt_on_first():  # before the workers start, SIGTERM acts as Ctrl-C
            try:
                config = config if prepare is None else prepare(config, arguments)
                if arguments.print_config:
                    print(to_yaml(config), end="")
                    return DONE
                result = job(config, arguments)
            finally:
                _leave_ray()
    except ConfigError as error:
        return _say(error, WRONG_CONFIG)
    except PartlyFailedError as error:
        message, result = error.args
        print(json.dumps(result), flush=True)
        return _say(message, PARTLY_FAILED)
    except InterruptedRunError as error:
        return _say(error, exit_code())
    except KeyboardInterrupt:
        return _say("interrupted; the same command continues from the last commit", exit_code())
    except Exception as error:
        if os.environ.get("DDPM_RAY_TRACEBACK"):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        expected = type(error).__module__.startswith("ddpm_ray")
        hint = "" if expected else f" ({type(error).__name__}; DDPM_RAY_TRACEBACK=1 shows where)"
        return _say(text + hint, FAILED)
    print(json.dumps(result), flush=True)
    return DONE


def _loaded(kind: type[Config], path: str | None, overrides: list[str]) -> Config:
    """Load the config. If the file belongs to another job, the ConfigError names that job."""
    try:
        return load(kind, path, overrides)
    except ConfigError:
        if path and (job := job_of_file(kind, path)):
            raise ConfigError(
                f"{path}: this is a config of jobs/{job}; run `python jobs/{job} {path}`"
            ) from None
        raise


class _Formatter(logging.Formatter):
    """Sanitizes log lines, so that names in the data cannot forge one."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        return sanitize(super().formatMessage(record))


def _refuse_secrets(arguments: argparse.Namespace, names: tuple[str, ...]) -> None:
    for name in names:
        if has_secret(value := getattr(arguments, name.strip("-?"))):
            raise ConfigError(f"command line: {name.rstrip('?')} is {value}: {NO_SECRET}")


def _leave_ray() -> None:
    """Shut Ray down, so that no worker output follows the result, which must be the last line."""
    if (ray := sys.modules.get("ray")) is not None:
        ray.shutdown()


def home_folder() -> Path:
    """Base of relative paths: the working directory; $DDPM_RAY_HOME or ~/ddpm-ray if submitted.

    A submitted job runs in a copy of the working directory, which Ray deletes afterwards.
    """
    here = Path.cwd()
    if "working_dir_files" not in here.parts:
        return here
    home = Path(os.environ.get("DDPM_RAY_HOME", "~/ddpm-ray")).expanduser()
    home.mkdir(parents=True, exist_ok=True)
    return home


def way_to_see(tracking_uri: str, page: str) -> str:
    """Return the command or URL that shows `page` of the MLflow at `tracking_uri`."""
    if tracking_uri.startswith("http"):
        return tracking_uri.rstrip("/") + page
    command = f"mlflow ui --backend-store-uri {tracking_uri}"
    return f"make ui   (elsewhere: {command}), then http://127.0.0.1:5000{page}"


class PartlyFailedError(Exception):
    """A job of which some parts failed; args are (message, result)."""


class ProgressLine:
    """Progress on stderr: a live bar on a terminal, else plain lines at growing intervals."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        self._first: tuple[float, int] | None = None  # when, and how far it was then
        self._logged = (float("-inf"), -1)
        console = Console(stderr=True)
        self._bar = (
            Progress(
                TextColumn(unit),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=console,
            )
            if console.is_terminal
            else None
        )

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` units are done."""
        now = time.monotonic()
        since, start = self._first = self._first or (now, done)
        if done == self._logged[1]:
            return
        if self._bar is not None:
            if not self._bar.tasks:
                self._bar.start()
                self._bar.add_task(note, total=total)
            self._bar.update(self._bar.task_ids[0], completed=done, description=note)
            if done == total:
                self._bar.stop()
        elif done == total or now - self._logged[0] >= min(30.0, max(1.0, (now - since) / 10)):
            left = (now - since) / (done - start) * (total - done) if done > start else None
            ahead = f"  {_duration(left)} left" if left is not None and done < total else ""
            text = f"{self._unit} {done}/{total}  {note}".rstrip() + ahead
            print(text, file=sys.stderr, flush=True)
        else:
            return
        self._logged = (now, done)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}; see --help")


def _parser(usage: str, kind: type[Config], names: tuple[str, ...]) -> _Parser:
    parser = _Parser(
        description=usage,
        epilog="\n".join(["Options, their defaults, and their meaning:", *help_lines(kind)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for name in names:
        if name.startswith("--"):
            needed = not name.endswith("?")
            parser.add_argument(name.rstrip("?"), required=needed, default="", metavar="FILE")
        else:
            parser.add_argument(name, metavar=name.upper())
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument(
        "--print-config", action="store_true", help="print the complete config and exit"
    )
    return parser


def _say(message: object, code: int) -> int:
    start = "" if code > 128 else "error: "
    lines = [f"{start}{sanitize(line)}" for line in str(message).split("\n")]
    print(*lines, sep="\n", file=sys.stderr, flush=True)
    return code


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
