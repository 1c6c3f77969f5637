"""Malicious shards raise one-line errors; no code runs, no file is deleted, no memory is filled."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_ray.data import arrow_io, shard_index, shards
from ddpm_ray.data.arrow_io import ArrowFileError
from ddpm_ray.data.dataset import Dataset, DatasetError, open_dataset
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.loader import ShardStream
from ddpm_ray.data.manifest import FORMATS, Recipe, ShardRow, manifest_of
from ddpm_ray.data.packing.image_files import encode_image
from ddpm_ray.data.shard_cache import ShardCache
from ddpm_ray.data.shards import fetch_shard
from ddpm_ray.storage.errors import StorageError
from tests.data.damaged_files import check_damage_is_found
from tests.data.test_image_files import bomb

SHAPE = (2, 3, 1)
RECIPE = Recipe(ImageShape(*SHAPE), "raw", "none", (), "0" * 64)
SCHEMA = pa.schema(
    {"image": pa.fixed_shape_tensor(pa.uint8(), SHAPE), "label": pa.int64(), "key": pa.string()}
)
IMAGES = np.arange(24, dtype=np.uint8).reshape(4, *SHAPE)
GOOD = shards.shard_bytes(IMAGES, [0, 1, 2, 3], list("abcd"))


def row(data: bytes, samples: int = 4, **changes: Any) -> ShardRow:
    """Return a correct index row for the shard `data`, with `changes` applied."""
    sha256 = hashlib.sha256(data).hexdigest()
    true = ShardRow("shard-00000.arrow", samples, len(data), sha256, [9], [9])
    return dataclasses.replace(true, **changes)


def publish(folder: Path, data: bytes, recipe: Recipe = RECIPE, **changes: Any) -> str:
    """Write a data set with consistent hashes and arbitrary contents."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "shard-00000.arrow").write_bytes(data)
    table = pa.Table.from_pylist(
        [dataclasses.asdict(row(data, **changes))],
        schema=shard_index.SCHEMA.with_metadata({"recipe": json.dumps(dataclasses.asdict(recipe))}),
    )
    index = arrow_io.serialize_table(table)
    (folder / "index.arrow").write_bytes(index)
    digest = hashlib.sha256(index).hexdigest()
    manifest = {"format": FORMATS["pixels"], "index_sha256": digest}
    # Some indexes have no totals (no samples, no numbers). They get this minimal manifest and are
    # refused before the rest of it is compared.
    with contextlib.suppress(ValueError, TypeError, ZeroDivisionError):
        manifest = json.loads(manifest_of(table, digest).to_json())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


def with_recipe(folder: Path, text: str) -> str:
    """Write a data set whose index has `text` as its recipe, with a matching manifest."""
    url = publish(folder, GOOD)
    rows = [dataclasses.asdict(row(GOOD))]
    schema = shard_index.SCHEMA.with_metadata({"recipe": text})
    index = arrow_io.serialize_table(pa.Table.from_pylist(rows, schema=schema))
    (folder / "index.arrow").write_bytes(index)
    manifest = {"format": FORMATS["pixels"], "index_sha256": hashlib.sha256(index).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return url


def test_a_true_one_is_read(tmp_path: Path) -> None:
    dataset = open_dataset(publish(tmp_path, GOOD))
    assert np.array_equal(np.asarray(fetch_shard(dataset, 0).images), IMAGES)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"name": "../../secret"}, r"name is '../../secret'; it must match"),
        ({"name": "/etc/passwd"}, r"name is '/etc/passwd'; it must match"),
        ({"name": "shard-00000.arrow\n\x1b[2J"}, r"name is 'shard-00000.arrow\\n\\x1b\[2J'"),
        ({"name": "s3://other/shard-00000.arrow"}, r"name is 's3://other"),
        ({"sha256": "/home/me/thesis.tex"}, r"sha256 is '/home/me/thesis.tex'; it must match"),
        ({"sha256": "../" * 21 + "x"}, r"sha256 is '../../"),
        ({"sha256": "A" * 64}, r"sha256 is 'AAAA"),
        ({"samples": 0}, r"samples ranges from 0 to 0; it must be in 1.."),
        ({"samples": -(2**62)}, r"samples ranges from -4611"),
        ({"stored_bytes": 2**50}, r"stored_bytes ranges from 1125899906842624"),
        ({"pixel_sum": [1, 2, 3]}, r"pixel_sum does not have 1 number for each shard"),
    ],
)
def test_an_index_names_nothing_but_shards(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    url = publish(tmp_path, GOOD, **changes)
    with pytest.raises(DatasetError, match=rf"index.arrow: {problem}.*; pack the data") as refused:
        open_dataset(url)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "changes",
    [
        {"image_shape": (2**20, 2**20, 3)},
        {"image_shape": (2, 3, 2)},
        {"image_shape": (0, 3, 1)},
        {"image_shape": (2, 3)},
        {"image_shape": "233"},
        {"encoding": "eps"},
        {"encoding": ["raw"]},
        {"image_shape": ("2", 3, 1)},
        {"image_shape": (2.0, 3, 1)},
        {"label_names": 3},
        {"label_names": (3,)},
        {"resize": None},
        {"source_sha256": ["0"]},
    ],
)
def test_a_recipe_of_no_picture_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    url = publish(tmp_path, GOOD, dataclasses.replace(RECIPE, **changes))
    named = "|".join((*changes, "its recipe"))
    with pytest.raises(DatasetError, match=rf"index.arrow: ({named}).*; pack the data set again"):
        open_dataset(url)


@pytest.mark.parametrize("key", RECIPE.to_json())
def test_a_recipe_that_lacks_a_value_is_refused(key: str, tmp_path: Path) -> None:
    recipe = RECIPE.to_json()
    del recipe[key]
    with pytest.raises(DatasetError, match=rf"index.arrow: its recipe .*KeyError\('{key}'\)"):
        open_dataset(with_recipe(tmp_path, json.dumps(recipe)))


DEEP = "[" * 200_000


def test_json_too_deep_to_parse_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"index.arrow: its recipe .*RecursionError"):
        open_dataset(with_recipe(tmp_path, DEEP))
    (tmp_path / "manifest.json").write_text(DEEP)
    with pytest.raises(DatasetError, match=r"manifest.json: not readable \(.*recursion"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["manifest.json", "index.arrow", "shard-00000.arrow"])
def test_a_folder_in_a_files_place_is_one_line(name: str, tmp_path: Path) -> None:
    url = publish(tmp_path, GOOD)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(StorageError, match=rf"{name}: a folder is where an object should be"):
        fetch_shard(open_dataset(url), 0)


def test_a_folder_in_the_cache_is_passed_over(tmp_path: Path) -> None:
    """A copied cache may contain one; the shard is then read from the object store."""
    cache = ShardCache(tmp_path / "cache", 10**6)
    (cache.folder / hashlib.sha256(GOOD).hexdigest()).mkdir(parents=True)
    dataset = open_dataset(publish(tmp_path / "set", GOOD))
    assert np.array_equal(np.asarray(fetch_shard(dataset, 0, cache).images), IMAGES)


def test_no_file_but_a_shard_of_the_cache_is_ever_deleted(tmp_path: Path) -> None:
    """The cache deletes a damaged copy under the name that the index gives."""
    precious = tmp_path / "thesis.tex"
    precious.write_text("three years")
    url = publish(tmp_path / "set", GOOD, sha256=str(precious))
    with pytest.raises(DatasetError, match="sha256 is '/"):
        fetch_shard(open_dataset(url), 0, ShardCache(tmp_path / "cache", 10**6))
    assert precious.read_text() == "three years"


class Bomb:
    """A pickle that creates a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize(
    "name",
    [
        "arrow.py_extension_type",
        "ray.data.arrow_tensor",
        "ray.data.arrow_tensor_v2",
        "ray.data.arrow_variable_shaped_tensor",
        "ray.data.arrow_pickled_object",
        "arrow.fixed_shape_tensor",
        "arrow.opaque",
        "nobody.knows",
    ],
)
def test_an_extension_type_runs_nothing(name: str, tmp_path: Path) -> None:
    """Ray Data registers extension types, which used to unpickle metadata of the file."""
    pytest.importorskip("ray.data")
    kind, payload = pa.list_(pa.uint8(), 6), pickle.dumps(Bomb(tmp_path / "run"))
    reported = {"ARROW:extension:name": name, "ARROW:extension:metadata": payload}
    fields = [
        pa.field("image", kind, metadata=reported),
        SCHEMA.field("label"),
        SCHEMA.field("key"),
    ]
    images = pa.array(IMAGES.reshape(4, 6).tolist(), kind)
    columns, schema = [images, pa.array(range(4)), pa.array(list("abcd"))], pa.schema(fields)
    data = arrow_io.serialize_table(pa.Table.from_arrays(columns, schema=schema))
    dataset = open_dataset(publish(tmp_path / "set", data))
    with pytest.raises(DatasetError, match=r"shard-00000.arrow: not a shard: (its columns|not an)"):
        fetch_shard(dataset, 0)
    assert not (tmp_path / "run").exists()


def compressed(codec: str) -> bytes:
    table = pa.Table.from_batches([arrow_io.parse_batch(GOOD, SCHEMA)])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA, options=pa.ipc.IpcWriteOptions(compression=codec)) as file:
        file.write_table(table)
    return bytes(sink.getvalue())


def with_columns(**columns: pa.Array) -> bytes:
    true = dict(zip(SCHEMA.names, arrow_io.parse_batch(GOOD, SCHEMA).columns, strict=True))
    return arrow_io.serialize_table(pa.table(true | columns))


HOSTILE = {
    "lz4": (lambda: compressed("lz4"), "it is compressed"),
    "zstd": (lambda: compressed("zstd"), "it is compressed"),
    "cut": (lambda: GOOD[:700], "not an Arrow file"),
    "empty": (lambda: b"", "not an Arrow file"),
    "text": (lambda: b"<html>404</html>" * 20, "not an Arrow file"),
    "a pickle": (lambda: pickle.dumps([1] * 100), "not an Arrow file"),
    "no key": (lambda: with_columns(key=pa.array(range(4))), "its columns are .*key int64, not"),
    "more": (lambda: with_columns(more=pa.array(range(4))), "its columns are .*more int64, not"),
    "no label": (lambda: with_columns(label=pa.array([1, None, 2, 3])), "it has null values"),
    "fewer": (
        lambda: shards.shard_bytes(IMAGES[:2], [0, 1], ["a", "b"]),
        "its bytes and samples are",
    ),
    "larger images": (
        lambda: shards.shard_bytes(np.zeros((4, 9, 9, 1), np.uint8), [0] * 4, list("abcd")),
        r"its columns are image extension.*shape=\[9,9,1\]",
    ),
}


@pytest.mark.parametrize("which", HOSTILE)
def test_a_shard_is_its_columns_uncompressed_and_whole(which: str, tmp_path: Path) -> None:
    data, problem = HOSTILE[which][0](), HOSTILE[which][1]
    url = publish(tmp_path, data, stored_bytes=max(len(data), 1))
    with pytest.raises(DatasetError, match=f"shard-00000.arrow: not a shard: {problem}") as refused:
        fetch_shard(open_dataset(url), 0)
    assert str(refused.value).isprintable()


def test_an_offset_that_leads_out_of_its_buffer_is_seen() -> None:
    """Without validation Arrow reads at any offset in the memory of this process."""
    keys = pa.array(["abcdefgh"] * 4).buffers()[1].to_pybytes()
    wild = bytearray(keys)
    wild[4:8] = (2**30).to_bytes(4, "little")
    data = shards.shard_bytes(IMAGES, [0] * 4, ["abcdefgh"] * 4)
    assert data.count(keys[:20]) == 1
    with pytest.raises(ArrowFileError, match="not an Arrow file"):
        arrow_io.parse_batch(data.replace(keys[:20], bytes(wild[:20])), SCHEMA)


SCRIPT = """
import random, sys
from ddpm_ray.data import arrow_io
from tests.data.test_hostile_shards import GOOD, SCHEMA
read = refused = 0
draw = random.Random(int(sys.argv[1]))
for _ in range(4000):
    data = bytearray(GOOD)
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(len(data))] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
    try:
        batch = arrow_io.parse_batch(bytes(data), SCHEMA)
        batch.to_pylist()
        read += 1
    except arrow_io.ArrowFileError:
        refused += 1
print(read, refused)
"""


@pytest.mark.parametrize("seed", [0, 1])
def test_damage_is_an_error_or_other_values_never_a_crash(seed: int) -> None:
    check_damage_is_found(SCRIPT, str(seed))


def test_shards_are_parsed_from_memory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truncating a memory-mapped file would kill the process with SIGBUS."""
    for name in ("memory_map", "OSFile", "input_stream"):
        monkeypatch.delattr(pa, name, raising=False)
    monkeypatch.setattr(np, "memmap", None)
    monkeypatch.setattr("mmap.mmap", None)
    dataset = open_dataset(publish(tmp_path, GOOD))
    images = fetch_shard(dataset, 0).images
    (tmp_path / "shard-00000.arrow").write_bytes(b"")  # what was read stays
    assert np.array_equal(np.asarray(images), IMAGES)


@pytest.mark.parametrize(
    "file, problem",
    [
        (bomb(30_000, 30_000), "30000 x 30000 pixels, but the manifest says 3 x 2"),
        (
            encode_image(np.zeros((3, 2, 1), np.uint8), "png"),
            "2 x 3 pixels, but the manifest says 3 x",
        ),
        (encode_image(IMAGES[0], "webp"), "not a readable png image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 3 2\n", "not a readable png image"),
        (b"", "not a readable png image"),
    ],
)
def test_an_encoded_image_is_of_the_manifests_format_and_size(
    file: bytes, problem: str, tmp_path: Path
) -> None:
    """Refused by the header: the first would decode to 2.7 GB of pixels."""
    data = shards.shard_bytes([file] * 4, [0] * 4, ["a\x1b[2J\n"] * 4)
    url = publish(tmp_path, data, dataclasses.replace(RECIPE, encoding="png"))
    stream = ShardStream(
        open_dataset(url),
        seed=0,
        global_batch_size=4,
        positions=range(4),
        lanes=1,
        window_samples=100,
    )
    with pytest.raises(DatasetError, match=problem) as refused:
        stream.batch(0)
    assert r"a\x1b[2J\n" in str(refused.value)
    assert str(refused.value).isprintable()


@given(st.lists(st.text(max_size=8), min_size=4, max_size=4))
@settings(max_examples=50)
def test_any_key_is_kept_as_it_is(keys: list[str]) -> None:
    """They are data; messages escape them (tests/test_redaction.py)."""
    clean = [key.encode("utf-8", "replace").decode() for key in keys]
    found = arrow_io.parse_batch(shards.shard_bytes(IMAGES, [0] * 4, clean), SCHEMA)
    assert found["key"].to_pylist() == clean


def test_a_data_set_travels_without_its_tables_bytes_changing(tmp_path: Path) -> None:
    dataset: Dataset = open_dataset(publish(tmp_path, GOOD))
    assert pickle.loads(pickle.dumps(dataset)).index.equals(dataset.index)
