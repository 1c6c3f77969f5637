"""Text that may be told, logged and saved: no secret in a URL, no control character of a stranger.

Sample keys, file names and label names come with the data. Printed as they are, one with a newline
or an escape sequence would forge a line of the log or change what a terminal shows.
"""

import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

NO_SECRET = (
    "a password or token in a URL would be saved with it; take it out, and set AWS_ACCESS_KEY_ID "
    "and AWS_SECRET_ACCESS_KEY, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
)
_HIDDEN = "***"
# `user:password@` behind `://`, where secret keys of S3 may hold a slash; a number before the next
# slash is a port. A name alone is a secret over HTTP only: elsewhere it is a user or a container.
_USER = re.compile(r"(?<=://)[^/?#@\s]*:(?!\d{1,5}(?:[/?#\s]|$))\S*@")
_TOKEN = re.compile(r"(?i)\b(https?://)[^/?#@\s:]+@")
# A parameter of a URL's query or fragment: the separator and the name, then the value.
_PARAMETER = re.compile(r"([?&#;](?:amp;)?)([^?&#;=\s]+)=([^?&#;\s]+)(\?[^&#;\s]*)?")
# Names that end in one of these words hold a secret, in any case and with any separators between
# words: sslpassword, X-Goog-Signature, refresh_token, AWSAccessKeyId; not `tokenizer`, `keyframes`.
_SECRET_NAME = re.compile(
    r"(?:password|passwd|passphrase|pwd|secrets?|token|credentials?|signature|jwt|bearer|assertion|"
    r"authorization|sessionid|^(?:sig|sas|pass|auth|hmac|creds?)|"
    r"(?:api|app|auth|access|account|private|secret|shared|master|subscription|encryption|signing|"
    r"storage)key(?:id)?)$"
)
# Values that are a secret under any name: a signed JSON web token, keys of Google, GitHub, Hugging
# Face and GitLab.
_SECRET_VALUE = re.compile(
    r"eyJ[\w-]{8,}\.[\w-]+\.|AIza[\w-]{20,}|gh[opsu]_\w{20,}|hf_\w{20,}|glpat-[\w-]{16,}"
)


def _is_secret(name: str, value: str) -> bool:
    """Whether a URL's parameter holds a secret, by its name or by the form of its value."""
    word = re.sub(r"[\W_]+", "", unquote(name)).lower()
    return bool(_SECRET_NAME.search(word) or _SECRET_VALUE.match(value))


def _hide(match: re.Match[str]) -> str:
    start, name, value, more = match.groups("")
    if _is_secret(name, value):
        return f"{start}{name}={_HIDDEN}"
    return f"{start}{name}={value}{_PARAMETER.sub(_hide, more)}"


def redacted(text: str) -> str:
    """`text` with `***` for each password, token or signature that stands in a URL."""
    text = _USER.sub(f"{_HIDDEN}@", text)
    return _PARAMETER.sub(_hide, _TOKEN.sub(rf"\1{_HIDDEN}@", text))


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


def sanitize(text: str) -> str:
    """`text` as it may stand in a terminal or a log: one line, no secret, no control character."""
    return printable(redacted(text))


def counted(number: float, noun: str, plural: str = "") -> str:
    """The number and what it counts: 1 worker, 2 workers, 0 rows; `plural` if not with an s."""
    return f"{number:.12g} {noun if number == 1 else plural or f'{noun}s'}"


def brief(error: Exception) -> str:
    """The error as one line of at most 200 characters."""
    text = sanitize(" ".join(str(error).split()))
    return text if len(text) <= 200 else f"{text[:197]}..."
