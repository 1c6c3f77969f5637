"""The index of a data set, `index.arrow`: a row for each shard, and the recipe of them all.

Its names become addresses and its hashes the names of files in the cache (one that said
`/home/me/thesis.tex` had that file deleted as a damaged copy), so each is held against its form.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ddpm_ray.data import arrow_io
from ddpm_ray.data.arrow_io import ArrowFileError

SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "samples": pa.int64(),
        "stored_bytes": pa.int64(),
        "sha256": pa.string(),
        "pixel_sum": pa.list_(pa.int64()),
        "pixel_sum_of_squares": pa.list_(pa.int64()),
    }
)
FORMS = {"name": "^shard-[0-9]{5,}[.]arrow$", "sha256": "^[0-9a-f]{64}$"}
MOST = {"samples": 2**32, "stored_bytes": 2**33}  # of one shard; packing makes 2**30 bytes at most
MOST_PIXELS = 2**28  # of one image
ENCODINGS = ("raw", "png", "jpeg", "webp")
TEXTS = ("encoding", "resize", "source_sha256")  # of a recipe


def write(recipe: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bytes:
    """The file; the recipe is kept here and in the manifest, so that an edited manifest shows."""
    schema = SCHEMA.with_metadata({"recipe": json.dumps(recipe, sort_keys=True)})
    return arrow_io.write(pa.Table.from_pylist(rows, schema=schema))


def read(data: bytes) -> pa.Table:
    """The table in `data`, its names, numbers and recipe in range. Raises ArrowFileError."""
    batch = arrow_io.read(data, SCHEMA)
    for column, form in FORMS.items():
        values = batch[column]
        for strange in values.filter(pc.invert(pc.match_substring_regex(values, form))):
            raise ArrowFileError(f"{column} is {strange.as_py()!r}; it must match {form}")
    for column, most in MOST.items():
        low, high = pc.min_max(batch[column]).as_py().values()
        if not 1 <= low <= high <= most:
            raise ArrowFileError(f"{column} goes from {low} to {high}; it must lie in 1..{most}")
    height, width, channels = _checked_recipe(batch)["image_shape"]
    if channels not in (1, 3) or min(height, width) < 1 or height * width > MOST_PIXELS:
        raise ArrowFileError(f"image_shape is {[height, width, channels]}")
    for column in ("pixel_sum", "pixel_sum_of_squares"):
        lengths = pc.list_value_length(batch[column])
        if batch[column].flatten().null_count or pc.unique(lengths).to_pylist() != [channels]:
            raise ArrowFileError(f"{column} has not {channels} numbers for each shard")
    return pa.Table.from_batches([batch])


def _checked_recipe(batch: pa.RecordBatch) -> dict[str, Any]:
    """`recipe`, each value of its type; raises ArrowFileError."""
    try:
        found = recipe(batch)
        shape, names = found["image_shape"], found["label_names"]
        texts = {key: found[key] for key in TEXTS}
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise ArrowFileError(f"its recipe cannot be understood ({error!r})") from error
    if not isinstance(shape, list) or [type(length) for length in shape] != [int] * 3:
        raise ArrowFileError(f"image_shape is {shape!r}; it must be three whole numbers")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ArrowFileError("label_names is not a list of texts")
    for key, text in texts.items():
        if not isinstance(text, str):
            raise ArrowFileError(f"{key} is {text!r}; it must be a text")
    if texts["encoding"] not in ENCODINGS:
        raise ArrowFileError(f"encoding is {texts['encoding']!r}")
    return found


def recipe(index: pa.Table | pa.RecordBatch) -> dict[str, Any]:
    """What was said to `write`."""
    found: dict[str, Any] = json.loads((index.schema.metadata or {})[b"recipe"])
    return found
