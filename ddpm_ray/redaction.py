"""Removes secrets in URLs and control characters from text before it is logged, shown or saved.

Sample keys, file names and label names come with the data: a newline or an escape sequence in one
could forge a log line or change what a terminal shows.
"""

import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

NO_SECRET = (
    "a password or token in a URL would be saved with it; remove it, and set AWS_ACCESS_KEY_ID "
    "and AWS_SECRET_ACCESS_KEY, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
)
_HIDDEN = "***"
# `user:password@` after `://`; S3's secret keys may contain a slash. A number before the next slash
# is a port. A user name alone is a token over HTTP; elsewhere it is a user or a container.
_USER = re.compile(r"(?<=://)[^/?#@\s]*:(?!\d{1,5}(?:[/?#\s]|$))\S*@")
_TOKEN = re.compile(r"(?i)\b(https?://)[^/?#@\s:]+@")
# A parameter of a URL's query or fragment: the separator and the name, then the value.
_PARAMETER = re.compile(r"([?&#;](?:amp;)?)([^?&#;=\s]+)=([^?&#;\s]+)(\?[^&#;\s]*)?")
# Parameters whose names end in one of these words hold a secret, in any case and with any
# separators between words: sslpassword, X-Goog-Signature, refresh_token, AWSAccessKeyId; but not
# tokenizer or keyframes.
_SECRET_NAME = re.compile(
    r"(?:password|passwd|passphrase|pwd|secrets?|token|credentials?|signature|jwt|bearer|assertion|"
    r"authorization|sessionid|^(?:sig|sas|pass|auth|hmac|creds?)|"
    r"(?:api|app|auth|access|account|private|secret|shared|master|subscription|encryption|signing|"
    r"storage)key(?:id)?)$"
)
# Values that are secrets under any name: signed JSON web tokens, keys of Google, GitHub, Hugging
# Face and GitLab.
_SECRET_VALUE = re.compile(
    r"eyJ[\w-]{8,}\.[\w-]+\.|AIza[\w-]{20,}|gh[opsu]_\w{20,}|hf_\w{20,}|glpat-[\w-]{16,}"
)


def _is_secret(name: str, value: str) -> bool:
    """Return whether a URL parameter is a secret, by its name or by the form of its value."""
    word = re.sub(r"[\W_]+", "", unquote(name)).lower()
    return bool(_SECRET_NAME.search(word) or _SECRET_VALUE.match(value))


def _hide(match: re.Match[str]) -> str:
    start, name, value, more = match.groups("")
    if _is_secret(name, value):
        return f"{start}{name}={_HIDDEN}"
    return f"{start}{name}={value}{_PARAMETER.sub(_hide, more)}"


def redacted(text: str) -> str:
    """Replace each password, token or signature in a URL in `text` by `***`."""
    text = _USER.sub(f"{_HIDDEN}@", text)
    return _PARAMETER.sub(_hide, _TOKEN.sub(rf"\1{_HIDDEN}@", text))


def has_secret(value: object) -> bool:
    """Return whether a URL anywhere in `value` contains a password, token or signature."""
    return any(redacted(text) != text for text in texts(value))


def texts(value: object) -> Iterator[str]:
    """Yield every string in a JSON value, at any depth, including keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for pair in value.items():
            yield from texts(pair)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from texts(one)


def printable(text: str) -> str:
    """Escape control characters, line ends and text direction marks: the result is one line."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def sanitize(text: str) -> str:
    """Make `text` safe for a terminal or a log: one line, no secret, no control character."""
    return printable(redacted(text))


def counted(number: float, noun: str, plural: str = "") -> str:
    """Format a count with its noun: 1 worker, 2 workers; `plural` if it does not end with s."""
    return f"{number:.12g} {noun if number == 1 else plural or f'{noun}s'}"


def brief(error: Exception) -> str:
    """Return the error as one line of at most 200 characters."""
    text = sanitize(" ".join(str(error).split()))
    return text if len(text) <= 200 else f"{text[:197]}..."
