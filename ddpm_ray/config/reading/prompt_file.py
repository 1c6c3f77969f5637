"""Prompts in a file, one a line, read line by line: most of a long file is only checked."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import BinaryIO

from ddpm_ray.config.caption_rule import (
    MAX_CAPTION_BYTES,
    MAX_RAW_BYTES,
    TOO_LONG,
    CaptionError,
    cleaned,
)
from ddpm_ray.config.reading.errors import ConfigError

MOST_PROBLEMS = 5  # that an error names
LONGEST_LINE = MAX_RAW_BYTES + 6  # bytes that are read of a line: with a byte order mark


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file."""

    prompts: tuple[str, ...]  # of its first lines
    lines: int  # all of them
    sha256: str  # of the file


def read_prompt_file(option: str, path: str, most: int) -> PromptFile:
    """Read the first `most` lines of the file at `path`, and check all of its lines.

    Each line is a prompt, in UTF-8. Raises ConfigError, which names `option` and the numbers of the
    first lines that are blank or cannot be prompts.
    """
    digest, kept, wrong, lines = hashlib.sha256(), list[str](), list[str](), 0
    try:
        with Path(path).open("rb") as file:
            for lines, raw in _numbered(file):
                digest.update(raw)
                try:
                    text = _prompt(raw)
                except CaptionError as error:
                    wrong.append(f"line {lines}: {error}")
                    if len(wrong) == MOST_PROBLEMS:
                        break
                    continue
                if len(kept) < most:
                    kept.append(text)
    except OSError as error:
        raise ConfigError(f"{option} is {path}, which cannot be read ({error.strerror})") from error
    if wrong:
        more = " (the first of them; there may be more)" if len(wrong) == MOST_PROBLEMS else ""
        raise ConfigError(f"{option} is {path}: {'; '.join(wrong)}{more}")
    if not lines:
        raise ConfigError(f"{option} is {path}, which is empty; write one prompt a line")
    return PromptFile(tuple(kept), lines, digest.hexdigest())


def _numbered(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the lines with their numbers from 1, until one of LONGEST_LINE bytes, which is cut."""
    for number in count(1):
        if not (line := file.readline(LONGEST_LINE)):
            return
        yield number, line
        if len(line) == LONGEST_LINE:
            return


def _prompt(line: bytes) -> str:
    """The prompt of a line. Raises CaptionError."""
    if len(line) == LONGEST_LINE:
        remedy = f"shorten it to at most {MAX_CAPTION_BYTES} bytes"
        raise CaptionError(f"it has {LONGEST_LINE} bytes or more", remedy, TOO_LONG)
    try:
        text = cleaned(line.decode("utf-8-sig"), "the prompt")
    except UnicodeDecodeError:
        raise CaptionError("it is not UTF-8", "save the file as UTF-8", "") from None
    if not text:
        raise CaptionError("it is blank", "write a prompt, or remove the line", "")
    return text
