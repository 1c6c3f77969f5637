"""Format numbers of stored files, and whether this version can read them.

Each kind of stored file carries its format number; a file without one is of format 1. The number
rises when an earlier version would misread the new content, not for a key that it can ignore.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ddpm_ray.redaction import sanitize

FORMAT = "format"  # the key


class NewerFormatError(RuntimeError):
    """A file in a format of a later version; args are (url, reason, remedy).

    The file is neither damaged nor out of reach: do not retry, nor fall back to an earlier file.
    """

    def __str__(self) -> str:
        url, reason, remedy = self.args
        return sanitize(f"{url}: {reason}; {remedy}")


@cache
def package_version() -> str:
    """Return the version of ddpm_ray; `unknown` where the package is not installed."""
    try:
        return version("ddpm-ray")
    except PackageNotFoundError:
        return "unknown"


def require_readable(url: str, found: Any, newest: int) -> None:
    """Check the format number `found` in the file at `url`; None, as in early files, is 1.

    Raises NewerFormatError above `newest`, and ValueError for anything but a positive integer.
    """
    if found is None:
        return
    if type(found) is not int or found < 1:
        raise ValueError(f"format is {found!r}")
    if found > newest:
        reason = f"its format is {found}, and ddpm_ray {package_version()} reads up to {newest}"
        raise NewerFormatError(url, reason, "upgrade ddpm_ray to the version that wrote it")


def not_of_this_version(saved_by: str) -> str:
    """Return the end of an error line: this version does not know a key, and the remedy."""
    here = f"ddpm_ray {package_version()} does not know"
    if saved_by in ("", package_version()):
        return f"{here}; a later version saved it: upgrade ddpm_ray"
    return f"{here}; ddpm_ray {saved_by} saved it: upgrade to that version"
