"""Run a job from the command line: arguments, config, log, one-line errors, JSON result."""

import json
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddpm_ray.cli.arguments import parsed
from ddpm_ray.cli.job import (
    DONE,
    FAILED,
    PARTLY_FAILED,
    WRONG_CONFIG,
    InterruptedRunError,
    Job,
    PartlyFailedError,
)
from ddpm_ray.config.loading import Config, ConfigError, load_config, to_yaml
from ddpm_ray.config.reading.job_files import job_of_file
from ddpm_ray.distributed.signals import exit_code, interrupt_on_first
from ddpm_ray.redaction import sanitize
from ddpm_ray.tracking import mlflow_settings


def main(job: Job[Any], words: Sequence[str] | None = None, command: str = "") -> int:
    """Run `job` with the arguments `words` (None: sys.argv) and return its exit code.

    The last line of stdout is the result, as JSON. `command` is what the user typed before
    `words`. The config is checked before the job imports torch, Ray or MLflow.
    """
    words = sys.argv[1:] if words is None else words
    command = command or f"python {sys.argv[0]}"
    try:
        arguments = parsed(job, words, command)
        config = _config(job, arguments, command)
    except ConfigError as error:
        return _say(error, WRONG_CONFIG)
    _start_log()
    mlflow_settings.apply()
    try:
        with interrupt_on_first():  # before the workers start, SIGTERM acts as Ctrl-C
            try:
                if job.prepare is not None:
                    config = job.prepare(config, arguments)
                if arguments.print_config:
                    print(to_yaml(config), end="")
                    return DONE
                result = job.run(config, arguments)
            finally:
                _leave_ray()
    except PartlyFailedError as error:
        message, result = error.args
        return _print_result(result, _say(message, PARTLY_FAILED))
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - reported in one line
        return _failure(error, job)
    return _print_result(result, DONE)


def _config(job: Job[Config], arguments: Namespace, command: str) -> Config:
    """Load the job's config. If the file belongs to another job, the ConfigError names that job."""
    file = getattr(arguments, "config", None)
    try:
        return load_config(job.config, file, arguments.overrides)
    except ConfigError:
        if not file or not (other := job_of_file(job.config, file)):
            raise
        right = other.join(command.rsplit(job.name, 1))
        raise ConfigError(f"{file}: this is a config of {other}; run `{right} {file}`") from None


def _print_result(result: dict[str, Any], code: int) -> int:
    """Print the result as JSON, and return `code`, or FAILED where stdout takes nothing."""
    try:
        print(json.dumps(result), flush=True)
    except OSError as error:  # a full disk, or a reader that is gone
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - Python flushes it at its exit
        return _say(f"the result cannot be written to stdout: {error.strerror}", FAILED)
    return code


def _failure(error: BaseException, job: Job[Any]) -> int:
    """Say how a job failed or was interrupted, and return the exit code."""
    match error:
        case ConfigError():
            return _say(error, WRONG_CONFIG)
        case InterruptedRunError():
            return _say(error, exit_code())
        case KeyboardInterrupt():
            how = "; the same command continues from the last commit" if job.continues else ""
            return _say(f"interrupted{how}", exit_code())
    if os.environ.get("DDPM_RAY_TRACEBACK"):
        raise error
    text = " ".join(str(error).split()) or type(error).__name__
    expected = type(error).__module__.startswith("ddpm_ray")
    hint = "" if expected else f" ({type(error).__name__}; DDPM_RAY_TRACEBACK=1 shows where)"
    return _say(text + hint, FAILED)


def _start_log() -> None:
    """Log our messages from INFO and those of libraries from WARNING, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("ddpm_ray").setLevel(logging.INFO)
    logging.getLogger("aiobotocore").setLevel(logging.WARNING)  # not where it found credentials


class _Formatter(logging.Formatter):
    """Sanitizes log lines, so that names in the data cannot forge one."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        return sanitize(super().formatMessage(record))


def _leave_ray() -> None:
    """Shut Ray down, so that no worker output follows the result, which must be the last line."""
    if (ray := sys.modules.get("ray")) is not None:
        ray.shutdown()


def _say(message: object, code: int) -> int:
    start = "" if code > 128 else "error: "
    lines = [f"{start}{sanitize(line)}" for line in str(message).split("\n")]
    print(*lines, sep="\n", file=sys.stderr, flush=True)
    return code
