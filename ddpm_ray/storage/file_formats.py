"""Which version wrote a file, and whether this one can read it.

Each kind of file that runs leave behind carries the number of its format; a file without one is of
format 1. A number rises when an earlier version would misread the new content, never for a new key
that earlier versions can ignore.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ddpm_ray.redaction import sanitize

FORMAT = "format"  # the key


class NewerFormatError(RuntimeError):
    """A file in a format of a later version; args are (url, reason, remedy).

    No damage and no outage: to fall back to an earlier file, or to try again, would be wrong.
    """

    def __str__(self) -> str:
        url, reason, remedy = self.args
        return sanitize(f"{url}: {reason}; {remedy}")


@cache
def package_version() -> str:
    """The version of ddpm_ray; `unknown` where it runs from files that were not installed."""
    try:
        return version("ddpm-ray")
    except PackageNotFoundError:
        return "unknown"


def require_readable(url: str, found: Any, newest: int) -> None:
    """Check the format number `found` in the file at `url`; None, an earlier version's, is 1.

    Raises NewerFormatError above `newest`, and ValueError for what is no number of a format.
    """
    if found is None:
        return
    if type(found) is not int or found < 1:
        raise ValueError(f"format is {found!r}")
    if found > newest:
        reason = f"its format is {found}, and ddpm_ray {package_version()} reads up to {newest}"
        raise NewerFormatError(url, reason, "upgrade ddpm_ray to the version that wrote it")


def not_of_this_version(saved_by: str) -> str:
    """The end of a line about what a saved config holds: unknown here, and what to do."""
    here = f"ddpm_ray {package_version()} does not know"
    if saved_by in ("", package_version()):
        return f"{here}; a later version saved it: upgrade ddpm_ray"
    return f"{here}; ddpm_ray {saved_by} saved it: upgrade to that version"
