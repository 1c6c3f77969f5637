"""What all jobs share: arguments, help, progress, one line per error, one JSON object."""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddpm_ray.knobs import Config, ConfigError, help_lines, load, to_yaml

DONE, FAILED, WRONG_CONFIG, INTERRUPTED = 0, 1, 2, 130


def main(
    usage: str,
    kind: type[Config],
    positional: list[str],
    job: Callable[[Config, list[str]], dict[str, Any]],
    *,
    takes_yaml: bool = False,
) -> int:
    """The exit code of a job, which prints its result as the last line of stdout.

    Arguments are `positional` ones (named for the messages), then `key=value`; with `takes_yaml`
    the first one is the config file. `job(config, positional)` imports what is heavy by itself.
    """
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(usage.strip(), "", "Keys, with their defaults:", *help_lines(kind), sep="\n")
        return DONE
    given = [a for a in arguments if "=" not in a and not a.startswith("--")]
    overrides = [a for a in arguments if "=" in a]
    unknown = [a for a in arguments if a.startswith("--") and a != "--print-config"]
    try:
        if unknown:
            raise ConfigError(f"command line: {unknown[0]} is no option; see --help")
        show_only = "--print-config" in arguments
        if len(given) != len(positional) and not (show_only and not takes_yaml):
            raise ConfigError(
                f"command line: expected {' '.join(positional) or 'no arguments'} and key=value, "
                f"got {' '.join(given) or 'nothing'}; see --help"
            )
        config = load(kind, given[0] if takes_yaml else None, overrides)
        if show_only:
            print(to_yaml(config), end="")
            return DONE
    except ConfigError as error:
        return _say(error, WRONG_CONFIG)
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    return _run(job, config, given)


def home_folder() -> Path:
    """Where relative paths lie: this folder; for a submitted job $DDPM_RAY_HOME or ~/ddpm-ray.

    A submitted job runs in a copy of the working directory, which Ray deletes after it.
    """
    here = Path.cwd()
    if "working_dir_files" not in here.parts:
        return here
    home = Path(os.environ.get("DDPM_RAY_HOME", "~/ddpm-ray")).expanduser()
    home.mkdir(parents=True, exist_ok=True)
    return home


class InterruptedRunError(Exception):
    """A run that was asked to stop and did so cleanly; the message says how to continue."""


def _run(
    job: Callable[[Config, list[str]], dict[str, Any]], config: Config, given: list[str]
) -> int:
    try:
        result = job(config, given)
    except ConfigError as error:
        return _say(error, WRONG_CONFIG)
    except InterruptedRunError as error:
        return _say(error, INTERRUPTED)
    except KeyboardInterrupt:
        return _say("interrupted; the same command continues from the last checkpoint", INTERRUPTED)
    except Exception as error:
        if os.environ.get("DDPM_RAY_TRACEBACK"):
            raise
        text = str(error).strip() or type(error).__name__
        expected = type(error).__module__.startswith("ddpm_ray")
        hint = "" if expected else f" ({type(error).__name__}; DDPM_RAY_TRACEBACK=1 shows where)"
        return _say(" ".join(text.split()) + hint, FAILED)
    print(json.dumps(result), flush=True)
    return DONE


def _say(message: object, code: int) -> int:
    print(f"error: {message}" if code != INTERRUPTED else message, file=sys.stderr, flush=True)
    return code


class ProgressLine:
    """Progress on stderr: a live bar on a terminal, else a plain line every few seconds."""

    EVERY_S = 10.0  # of plain lines

    def __init__(self, batch_images: int) -> None:
        self._batch_images = batch_images
        self._shown_step, self._shown_s = -1, 0.0
        self._bar: Any = None

    def show(self, progress: Any) -> None:
        """Show a training.reporting.Progress, if it is news."""
        if progress.step == self._shown_step:
            return
        last = progress.step == progress.steps
        if not sys.stderr.isatty() and not last and time.monotonic() - self._shown_s < self.EVERY_S:
            return
        self._shown_step, self._shown_s = progress.step, time.monotonic()
        left_s = progress.left_s(self._batch_images)
        text = (
            f"step {progress.step}/{progress.steps}  loss {progress.loss:.4f}  "
            f"{progress.images_per_s:.0f} images/s  {_duration(left_s)} left"
        )
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
