"""The rule that every caption and every prompt follows."""

import re
import unicodedata

from ddpm_ray.redaction import counted, sanitize

MAX_CAPTION_BYTES = 4096  # of UTF-8, of one caption
# Normalisation to NFC makes no text shorter than a third: three letters of Hangul have 9 bytes and
# their syllable has 3. Longer texts are refused first, as its time may grow with the square.
MAX_RAW_BYTES = 3 * MAX_CAPTION_BYTES
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")  # Unicode's category Cc

TOO_LONG = f"captions of more than {MAX_CAPTION_BYTES} bytes"
CONTROL = "captions with control characters"
NOT_UNICODE = "captions that are not valid Unicode"


class CaptionError(ValueError):
    """A text that cannot be a caption; args are (problem, remedy, kind of problem)."""

    def __str__(self) -> str:
        problem, remedy, _ = self.args
        return sanitize(f"{problem}; {remedy}")

    @property
    def kind(self) -> str:
        """Name under which a report counts it: TOO_LONG, CONTROL or NOT_UNICODE."""
        return str(self.args[2])


def cleaned(text: str, what: str = "the caption") -> str:
    """Return `text` as a caption: in NFC, without white space around it; it may be empty.

    `what` names it in errors, as "prompt 2": a prompt follows the same rule.

    Raises CaptionError for more than MAX_CAPTION_BYTES of UTF-8, for control characters, line ends
    included, and for lone surrogates, which UTF-8 cannot store.
    """
    text = text.strip()
    if _utf8_bytes(text, what) <= MAX_RAW_BYTES:
        text = unicodedata.normalize("NFC", text)
    if (size := _utf8_bytes(text, what)) > MAX_CAPTION_BYTES:
        problem = f"{what} has {counted(size, 'byte')} of UTF-8"
        raise CaptionError(problem, f"shorten it to at most {MAX_CAPTION_BYTES} bytes", TOO_LONG)
    if found := _CONTROL.search(text):
        problem = f"{what} holds the control character U+{ord(found[0]):04X}"
        raise CaptionError(problem, "replace it by a space", CONTROL)
    return text


def _utf8_bytes(text: str, what: str) -> int:
    """Return the length of `text` in UTF-8. Raises CaptionError."""
    try:
        return len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        problem = f"{what} holds half a surrogate pair, U+{ord(text[error.start]):04X}"
        raise CaptionError(problem, "write the character as one code point", NOT_UNICODE) from None
