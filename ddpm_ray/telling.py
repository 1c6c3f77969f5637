"""Text that may be told, logged and saved: no secret in a URL, no control character of a stranger.

Sample keys, file names and label names come with the data. Printed as they are, one with a newline
or an escape sequence would forge a line of the log or change what a terminal shows.
"""

import re
from collections.abc import Iterator, Mapping

NO_SECRET = (
    "a password or token in a URL would be saved with it; take it out, and set AWS_ACCESS_KEY_ID "
    "and AWS_SECRET_ACCESS_KEY, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
)
_HIDDEN = "***"
# `user:password@` behind `://`, where secret keys of S3 may hold a slash; a number before the next
# slash is a port. A name alone is a secret over HTTP only: elsewhere it is a user or a container.
_USER = re.compile(r"(?<=://)[^/?#@\s]*:(?!\d{1,5}(?:[/?#\s]|$))\S*@")
_TOKEN = re.compile(r"(?i)\b(https?://)[^/?#@\s:]+@")
_QUERY = re.compile(
    r"(?i)([?&](?:x-amz-(?:signature|credential|security-token)|signature|sig|password|secret|"
    r"(?:access_|auth_)?token|api_?key)=)[^&#\s]+"
)


def redacted(text: str) -> str:
    """`text` with `***` for each password, token or signature that stands in a URL."""
    text = _USER.sub(f"{_HIDDEN}@", text)
    return _QUERY.sub(rf"\1{_HIDDEN}", _TOKEN.sub(rf"\1{_HIDDEN}@", text))


def has_secret(value: object) -> bool:
    """Whether a URL somewhere in `value` holds a password, a token or a signature."""
    return any(redacted(text) != text for text in texts(value))


def texts(value: object) -> Iterator[str]:
    """Every text in a value of JSON, however deep, its keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from texts(pair)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from texts(one)


def printable(text: str) -> str:
    """One line: `text` with control characters, line ends and text direction marks spelt out."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def told(text: str) -> str:
    """`text` as it may stand in a terminal or a log: one line, no secret, no control character."""
    return printable(redacted(text))


def brief(error: Exception) -> str:
    """The error as one line of at most 200 characters."""
    text = told(" ".join(str(error).split()))
    return text if len(text) <= 200 else f"{text[:197]}..."
