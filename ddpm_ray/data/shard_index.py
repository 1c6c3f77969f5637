"""The index of a data set, `index.arrow`: one row per shard, and the recipe as schema metadata.

A set of latents has further columns: exact sums of its latents (latent_sums.py), as has a set of
embeddings (embedding_sums.py). A set with captions has their number in each shard.

Names become addresses and hashes become file names in the cache (a hash of `/home/me/thesis.tex`
once made the cache delete that file as a damaged copy), so each value must match a pattern.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import pyarrow as pa
import pyarrow.compute as pc

from ddpm_ray.config.jobs.pack import Encoding
from ddpm_ray.data import arrow_io
from ddpm_ray.data.arrow_io import ArrowFileError
from ddpm_ray.data.captions import MAX_CAPTIONS
from ddpm_ray.redaction import counted

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
_SUMS = pa.list_(pa.decimal128(38, 0))  # integers below 10^38; those of a shard are below 2^125
LATENT_SUMS = ("mean_sum", "mean_sum_of_squares", "variance_sum")  # of class LatentSums
LATENT_SCHEMA = pa.schema([*SCHEMA, *(pa.field(name, _SUMS) for name in LATENT_SUMS)])
EMBEDDING_SUMS = ("embedding_sum", "embedding_sum_of_squares")  # of class EmbeddingSums
EMBEDDING_SCHEMA = pa.schema([*SCHEMA, *(pa.field(name, _SUMS) for name in EMBEDDING_SUMS)])
PATTERNS = {"name": "^shard-[0-9]{5,}[.]arrow$", "sha256": "^[0-9a-f]{64}$"}
LIMITS = {"samples": 2**32, "stored_bytes": 2**33}  # per shard; packing writes at most 2**30 bytes
MAX_PIXELS = 2**28  # of one image
MAX_LATENT_CHANNELS = 256
MAX_EMBEDDING_WIDTH = 2**16
CodecName: TypeAlias = Literal["pixels", "latents", "embeddings"]  # see codec.py
SCHEMAS: dict[str, pa.Schema] = {
    "pixels": SCHEMA,
    "latents": LATENT_SCHEMA,
    "embeddings": EMBEDDING_SCHEMA,
}
CAPTIONS = pa.field("captions", pa.int64())  # the last column, in a set with captions
VIEWS = (["plain"], ["plain", "flipped"])  # of each image, in a set of latents
ENCODINGS, CODECS = get_args(Encoding), get_args(CodecName)
STRINGS = ("encoding", "resize", "source_sha256", "codec")  # fields of a recipe


def serialize_index(recipe: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bytes:
    """Serialize the index; it repeats the recipe, so that an edited manifest is detected."""
    schema = schema_of({"codec": "pixels", "captioned": False} | recipe)
    schema = schema.with_metadata({"recipe": json.dumps(recipe, sort_keys=True)})
    return arrow_io.serialize_table(pa.Table.from_pylist(rows, schema=schema))


def schema_of(recipe: dict[str, Any]) -> pa.Schema:
    """Return the columns of the index of a data set with this recipe."""
    schema = SCHEMAS[recipe["codec"]]
    return schema.append(CAPTIONS) if recipe["captioned"] else schema


def parse_index(data: bytes) -> pa.Table:
    """Parse the index and check all values. Raises ArrowFileError."""
    kinds = ({"codec": codec, "captioned": has} for codec in SCHEMAS for has in (False, True))
    batch = arrow_io.parse_batch(data, *map(schema_of, kinds))
    for column, pattern in PATTERNS.items():
        values = batch[column]
        for bad in values.filter(pc.invert(pc.match_substring_regex(values, pattern))):
            raise ArrowFileError(f"{column} is {bad.as_py()!r}; it must match {pattern}")
    for column, limit in LIMITS.items():
        low, high = pc.min_max(batch[column]).as_py().values()
        if not 1 <= low <= high <= limit:
            raise ArrowFileError(f"{column} ranges from {low} to {high}; it must be in 1..{limit}")
    checked = _checked_recipe(batch)
    _require_columns(batch, checked)
    height, width, channels = checked["image_shape"]
    if channels not in (1, 3) or min(height, width) < 1 or height * width > MAX_PIXELS:
        raise ArrowFileError(f"image_shape is {[height, width, channels]}")
    numbers = dict.fromkeys(("pixel_sum", "pixel_sum_of_squares"), channels)
    if checked["codec"] == "latents":
        numbers |= dict.fromkeys(LATENT_SUMS, _checked_latent_channels(checked))
    if checked["codec"] == "embeddings":
        numbers |= dict.fromkeys(EMBEDDING_SUMS, _checked_embedding_width(checked))
    for column, length in numbers.items():
        lengths = pc.list_value_length(batch[column])
        if batch[column].flatten().null_count or pc.unique(lengths).to_pylist() != [length]:
            raise ArrowFileError(
                f"{column} does not have {counted(length, 'number')} for each shard"
            )
    return pa.Table.from_batches([batch])


def _require_columns(batch: pa.RecordBatch, recipe: dict[str, Any]) -> None:
    """Raise ArrowFileError for columns of another recipe, and impossible numbers of captions."""
    if not batch.schema.equals(schema_of(recipe)):
        captioned = "with captions" if recipe["captioned"] else "without captions"
        raise ArrowFileError(
            f"its columns are not those of the codec {recipe['codec']} {captioned}"
        )
    if not recipe["captioned"]:
        return
    counts, samples = batch["captions"], batch["samples"]
    wrong = pc.or_(pc.less(counts, 0), pc.greater(counts, pc.multiply(samples, MAX_CAPTIONS)))
    for bad in counts.filter(wrong):
        rule = f"it must be in 0..{MAX_CAPTIONS} per sample"
        raise ArrowFileError(f"captions is {bad.as_py()}; {rule}")


def _checked_latent_channels(recipe: dict[str, Any]) -> int:
    """Check the fields that only a recipe of latents has; return the number of channels.

    Raises ArrowFileError.
    """
    shape, views = recipe.get("latent_shape"), recipe.get("views")
    channels, height, width = _three_numbers("latent_shape", shape)
    rows, columns, _ = recipe["image_shape"]
    factor = rows // max(height, 1)
    divides = [height * factor, width * factor] == [rows, columns]
    if not (divides and 1 <= channels <= MAX_LATENT_CHANNELS):
        raise ArrowFileError(f"latent_shape is {shape} for image_shape {recipe['image_shape']}")
    if views not in VIEWS:
        raise ArrowFileError(f"views is {views!r}; it must be one of {', '.join(map(str, VIEWS))}")
    _require_sha256(recipe, "autoencoder_sha256")
    return channels


def _checked_embedding_width(recipe: dict[str, Any]) -> int:
    """Check the fields that only a recipe of embeddings has; return their width.

    Raises ArrowFileError.
    """
    width = recipe.get("embedding_width")
    if type(width) is not int or not 1 <= width <= MAX_EMBEDDING_WIDTH:
        rule = f"it must be a whole number in 1..{MAX_EMBEDDING_WIDTH}"
        raise ArrowFileError(f"embedding_width is {width!r}; {rule}")
    _require_sha256(recipe, "encoder_sha256")
    return width


def _require_sha256(recipe: dict[str, Any], name: str) -> None:
    """Raise ArrowFileError unless the field `name` is a sha256 in hex."""
    sha256 = recipe.get(name)
    if not isinstance(sha256, str) or not re.fullmatch(PATTERNS["sha256"], sha256):
        raise ArrowFileError(f"{name} is {sha256!r}; it must be a sha256 in hex")


def _checked_recipe(batch: pa.RecordBatch) -> dict[str, Any]:
    """Return the recipe and check the type of each value. Raises ArrowFileError."""
    try:
        found = recipe(batch)
        shape, names = found["image_shape"], found["label_names"]
        texts = {key: found[key] for key in STRINGS}
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise ArrowFileError(f"its recipe is invalid ({error!r})") from error
    _three_numbers("image_shape", shape)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ArrowFileError("label_names is not a list of strings")
    for key, text in texts.items():
        if not isinstance(text, str):
            raise ArrowFileError(f"{key} is {text!r}; it must be a string")
    if texts["encoding"] not in ENCODINGS:
        raise ArrowFileError(
            f"encoding is {texts['encoding']!r}; it must be one of {', '.join(ENCODINGS)}"
        )
    if texts["codec"] not in CODECS:
        raise ArrowFileError(f"codec is {texts['codec']!r}; this version reads {', '.join(CODECS)}")
    if not isinstance(found["captioned"], bool):
        raise ArrowFileError(f"captioned is {found['captioned']!r}; it must be true or false")
    return found


def _three_numbers(name: str, shape: object) -> tuple[int, int, int]:
    """Return the three whole numbers of a shape. Raises ArrowFileError for anything else."""
    if not isinstance(shape, list) or [type(length) for length in shape] != [int] * 3:
        raise ArrowFileError(f"{name} is {shape!r}; it must be three whole numbers")
    first, second, third = shape
    return first, second, third


def recipe(index: pa.Table | pa.RecordBatch) -> dict[str, Any]:
    """Return the recipe that `serialize_index` was given.

    Without a codec it means pixels, and without `captioned` no captions.
    """
    found: dict[str, Any] = json.loads((index.schema.metadata or {})[b"recipe"])
    return {"codec": "pixels", "captioned": False} | found
