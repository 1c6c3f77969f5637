"""Collect the captions of a source's images by name; bad ones end the job, or are counted.

`on_bad_caption` of the options decides: stop raises DatasetError at the first one, and skip leaves
it out and lists it in the packing report.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa

from ddpm_ray.config.caption_rule import CaptionError, cleaned
from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.captions import MAX_CAPTIONS
from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.data.samples import NamedGroup, named_groups, printable_name
from ddpm_ray.redaction import counted

CAPTION_KEYS = ("caption", "captions", "text")  # columns and keys, unless caption_key names one
NONE = "none"  # as the option captions: packs no captions
MAX_SHOWN = 3

TOO_MANY = f"captions beyond the {MAX_CAPTIONS} of one image"
NO_TEXT = "captions that are no text"
BAD_LINE = "lines of caption files that hold no image and caption"
MISSING = "images that a caption file names but that do not exist"
UNCAPTIONED = "images without a caption (packed as well)"


class CaptionCollector:
    """Captions by image, each once and in order of their addition."""

    def __init__(self, options: PackConfig) -> None:
        self._skips = options.on_bad_caption == "skip"
        self._texts: dict[str, list[str]] = {}
        self._refused: dict[str, list[str]] = defaultdict(list)
        self._missing: dict[str, None] = {}  # in order

    @property
    def is_empty(self) -> bool:
        """Whether no image has a caption."""
        return not any(self._texts.values())

    def add(self, image: str, value: object, url: str, place: str = "") -> None:
        """Add the caption or list of captions `value` of an image; empty ones are dropped.

        `url` and `place`, as in "line 3: ", are those of errors. Raises DatasetError (stop).
        """
        for text in value if isinstance(value, list | tuple) else [value]:
            if text is None:
                continue
            if not isinstance(text, str):
                problem = f"{place}a caption is {text!r:.60}"
                self.refuse(NO_TEXT, image, url, problem, "write it as text")
                continue
            try:
                clean = cleaned(text)
            except CaptionError as error:
                problem, remedy, kind = error.args
                self.refuse(kind, image, url, f"{place}{problem}", remedy)
                continue
            held = self._texts.setdefault(image, [])
            if not clean or clean in held:
                continue
            if len(held) < MAX_CAPTIONS:
                held.append(clean)
            else:
                problem = f"{place}{image} has more than {MAX_CAPTIONS} captions"
                self.refuse(TOO_MANY, image, url, problem, "delete some of them")

    def add_lines(self, image: str, data: bytes, url: str, name: str = "") -> None:
        """Add the captions of a text file with one caption a line. Raises DatasetError (stop)."""
        for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            place = f"{name}line {number}: "
            try:
                self.add(image, line.decode(), url, place)
            except UnicodeDecodeError:
                self.refuse_line(image, url, f"{place}not UTF-8")

    def refuse_line(self, name: str, url: str, problem: str) -> None:
        """Leave out a line that cannot be read. Raises DatasetError (stop)."""
        self.refuse(BAD_LINE, name, url, problem, "correct or delete it")

    def refuse(self, kind: str, name: str, url: str, problem: str, remedy: str) -> None:
        """Leave out one caption, counted as of this kind. Raises DatasetError (stop)."""
        if not self._skips:
            raise DatasetError(url, problem, f"{remedy}, or use on_bad_caption=skip")
        self._refused[kind].append(printable_name(name))

    def miss(self, image: str) -> None:
        """Note that a caption file names an image that does not exist; see `require_images`."""
        self._missing[image] = None

    def require_images(self, url: str) -> None:
        """Raise DatasetError if images are missing (stop), or all that have captions (also skip).

        `url` is that of the caption file.
        """
        if not self._missing or (self._skips and not self.is_empty):
            return
        first = ", ".join(list(self._missing)[:MAX_SHOWN])
        more = ", ..." if len(self._missing) > MAX_SHOWN else ""
        if self.is_empty:
            problem = f"no file for any image that it names: {first}{more}"
            raise DatasetError(url, problem, "name images relative to the folder of images")
        problem = f"no file for {counted(len(self._missing), 'image')} that it names: {first}{more}"
        remedy = "add them, delete these lines, or use on_bad_caption=skip"
        raise DatasetError(url, problem, remedy)

    def column(self, images: Sequence[str]) -> pa.LargeListArray | None:
        """Return the captions of these images; None if they have none at all."""
        if not any(self._texts.get(image) for image in images):
            return None
        texts = [self._texts.get(image, []) for image in images]
        return pa.array(texts, pa.large_list(pa.large_string()))

    def left_out(self, images: Sequence[str]) -> tuple[NamedGroup, ...]:
        """Return the report: refused captions, missing images, and images without a caption."""
        groups: list[tuple[str, Iterable[str]]] = [*self._refused.items(), (MISSING, self._missing)]
        without = [image for image in images if not self._texts.get(image)]
        if len(without) < len(images):
            groups.append((UNCAPTIONED, map(printable_name, without)))
        return named_groups(groups)


def caption_key_of(
    names: Iterable[str], options: PackConfig, url: str, what: str = "columns"
) -> str | None:
    """Return which of these columns or keys holds captions, or None.

    Raises DatasetError if several may.
    """
    if options.caption_key:
        return options.caption_key if options.caption_key in names else None
    found = sorted(set(CAPTION_KEYS) & set(names))
    if len(found) > 1:
        problem = f"the {what} {' and '.join(found)} may hold captions"
        raise DatasetError(url, problem, f"choose one, as in caption_key={found[0]}")
    return found[0] if found else None


def require_caption_key(found: bool, options: PackConfig, url: str) -> None:
    """Raise DatasetError if caption_key names a column or key that the source does not have."""
    if options.caption_key and not found:
        problem = f"nothing has a value in {options.caption_key!r} (caption_key)"
        raise DatasetError(url, problem, "check its spelling, or leave caption_key empty")


def captions_of(row: Mapping[str, object], options: PackConfig, url: str) -> object:
    """Return the caption or captions of a row of a caption file; None if it has none."""
    key = caption_key_of(row.keys(), options, url, "keys")
    return None if key is None else row[key]
