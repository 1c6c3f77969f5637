"""Captioned sets: what the loader delivers, hostile shards refused, other sets unchanged."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_ray.data import arrow_io, captions, shard_index, shards
from ddpm_ray.data.dataset import Dataset, DatasetError, open_dataset
from ddpm_ray.data.loader import ShardStream, read_captions, read_images
from ddpm_ray.data.manifest import manifest_of
from ddpm_ray.data.shards import fetch_shard
from tests.data.captioned_sets import SHAPE, write_captioned
from tests.data.damaged_files import check_damage_is_found
from tests.data.divided_streams import divided_streams
from tests.data.latent_sets import random_latents, write_latents

CAPTIONS = [[f"{n} of {k}" for k in range(n % 4)] for n in range(11)]  # 0 to 3 for each sample
GREEK = [["\u03b1\u03b2", "x"], [], ["\u00e9t\u00e9"], ["y"]]

MakeDataset = Callable[..., Dataset]


def test_a_set_opens_as_it_was_written(tmp_path: Path) -> None:
    written = write_captioned(tmp_path, CAPTIONS, 4)
    opened = open_dataset(written.url)
    assert opened.manifest == written.manifest
    assert opened.fingerprint == written.fingerprint
    assert opened.recipe == written.recipe
    held = json.loads((tmp_path / "manifest.json").read_text())
    assert (held["format"], held["captioned"]) == ("ddpm-ray shards 2", True)
    assert held["captions"] == sum(map(len, CAPTIONS))
    assert opened.index["captions"].to_pylist() == [6, 6, 3]


def test_arrow_alone_reads_a_shard(tmp_path: Path) -> None:
    write_captioned(tmp_path, GREEK, 4)
    table = pa.ipc.open_file(tmp_path / "shard-00000.arrow").read_all()
    assert table.column_names == ["image", "label", "key", "captions"]
    assert table.schema.field("captions").type == pa.list_(pa.string())
    assert table["captions"].to_pylist() == GREEK


@settings(max_examples=12)
@given(st.data())
def test_any_division_of_a_batch_delivers_the_captions_of_its_samples(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    samples = data.draw(st.integers(1, 30))
    texts = [[f"{n}-{k}" for k in range(data.draw(st.integers(0, 3)))] for n in range(samples)]
    dataset = write_captioned(tmp_path_factory.mktemp("set"), texts, data.draw(st.integers(1, 9)))
    for stream in divided_streams(dataset, data):
        memory = stream.batch(0).map(lambda part: part.clone())
        for step in range(3):
            batch = stream.batch(step, memory)
            numbers = batch.images[:, 0, 0, 0].tolist()
            assert batch.captions == [tuple(texts[n]) for n in numbers]
            assert batch.images is memory.images


def test_a_set_without_captions_has_none(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(20, 7)
    stream = ShardStream(
        dataset, seed=7, global_batch_size=4, positions=range(4), lanes=1, window_samples=9
    )
    memory = stream.batch(0)
    assert memory.captions is None
    assert stream.batch(1, memory) is memory
    stream.close()
    assert next(read_images(dataset, [0])).captions is None
    with pytest.raises(DatasetError, match=r"set: the data set has no captions; pack it again"):
        next(read_captions(dataset, [0]))


def test_all_captions_are_read_in_the_packed_order(tmp_path: Path) -> None:
    dataset = write_captioned(tmp_path, CAPTIONS, 4, "png")
    expected = [tuple(texts) for texts in CAPTIONS]
    assert [one for batch in read_images(dataset, range(3)) for one in batch.captions or ()] == (
        expected
    )
    assert list(read_captions(dataset, range(3))) == expected
    assert list(read_captions(dataset, [2])) == expected[8:]


def republished(folder: Path, data: bytes, captions: int) -> Dataset:
    """The set of GREEK with other bytes as its shard, whose hash is right."""
    dataset = write_captioned(folder, GREEK, 4)
    (row,) = dataset.index.to_pylist()
    row |= {"stored_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    row |= {"captions": captions}
    index = shard_index.serialize_index(dataset.recipe.to_json(), [row])
    table = shard_index.parse_index(index)
    (folder / "shard-00000.arrow").write_bytes(data)
    return dataclasses.replace(dataset, manifest=manifest_of(table, ""), index=table)


def with_captions(captions: pa.Array | None) -> bytes:
    table = pa.ipc.open_file(pa.py_buffer(shard_of(GREEK))).read_all().drop_columns(["captions"])
    if captions is not None:
        table = table.append_column("captions", captions)
    return arrow_io.serialize_table(table)


def shard_of(texts: list[list[str]]) -> bytes:
    images = np.zeros((len(texts), *SHAPE), np.uint8)
    return shards.shard_bytes(images, [0] * len(texts), list("abcd"[: len(texts)]), texts)


def column(texts: list[Any], kind: pa.DataType = captions.COLUMN_TYPE) -> pa.Array:
    return pa.array(texts, kind)


@pytest.mark.parametrize(
    "data, problem",
    [
        (with_captions(None), "its columns are image .*, key string, not"),
        (with_captions(column([["a"]] * 4, pa.list_(pa.binary()))), "its columns are .*binary"),
        (with_captions(column([["a"]] * 4, pa.large_list(pa.string()))), "its columns are .*large"),
        (with_captions(column(["a"] * 4, pa.string())), "its columns are .*captions string, not"),
        (with_captions(column([["a"], None, ["b", "c"], ["d"]])), "it has null values"),
        (with_captions(column([["a", None], [], ["b"], ["c"]])), "it has null values in captions"),
        (shard_of([["a"], [], ["e\u0301"], ["b", "c"]]), "a caption is not in NFC"),
        (shard_of([["a"], [], ["b\nc"], ["b", "c"]]), "a caption is invalid: .*U\\+000A"),
        (shard_of([["a"], [], ["", "x"], ["b"]]), "a caption is empty"),
        (shard_of([["a"] * 65, [], [], []]), "a sample has 65 captions; at most 64"),
        (shard_of([["a"], [], [], []]), "it has 1 caption, the index says 4; pack"),
        (shards.shard_bytes(np.zeros((4, *SHAPE), np.uint8), [0] * 4, "abcd"), "its columns are"),
    ],
    ids=range(12),
)
def test_a_shard_of_other_captions_is_refused(data: bytes, problem: str, tmp_path: Path) -> None:
    """Its hash is right: whoever made the set wrote it."""
    dataset = republished(tmp_path, data, 4)
    with pytest.raises(DatasetError, match=f"shard-00000.arrow: not a shard: {problem}") as refused:
        fetch_shard(dataset, 0)
    assert str(refused.value).isprintable()


def test_a_shard_with_captions_is_none_of_a_set_without(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(4, 4)
    data = shards.shard_bytes(np.zeros((4, 2, 3, 1), np.uint8), [0] * 4, "abcd", GREEK)
    with pytest.raises(arrow_io.ArrowFileError, match=r"its columns are .*captions list<.*, not"):
        shards.parse_shard(data, dataset.manifest)


@pytest.mark.parametrize(
    "recipe, row, problem",
    [
        ({}, {"captions": -1}, r"captions is -1; it must be in 0..64 per sample"),
        ({}, {"captions": 4 * 64 + 1}, r"captions is 257; it must be in 0..64 per sample"),
        ({"captioned": "yes"}, {}, "captioned is 'yes'; it must be true or false"),
        ({"captioned": 1}, {}, "captioned is 1; it must be true or false"),
        ({"captioned": False}, {}, "its columns are not those of the codec pixels without capt"),
    ],
)
def test_an_index_of_impossible_captions_is_refused(
    recipe: dict[str, Any], row: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    dataset = write_captioned(tmp_path, GREEK, 4)
    (true,) = dataset.index.to_pylist()
    held = json.dumps(dataset.recipe.to_json() | recipe)
    schema = shard_index.SCHEMA.append(shard_index.CAPTIONS).with_metadata({"recipe": held})
    index = arrow_io.serialize_table(pa.Table.from_pylist([true | row], schema=schema))
    (tmp_path / "index.arrow").write_bytes(index)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["index_sha256"] = hashlib.sha256(index).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match=rf"index.arrow: {problem}.*; pack the data set again"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    "field, value",
    [("captions", 5), ("captions", None), ("captioned", False), ("format", "ddpm-ray shards 1")],
)
def test_an_edited_manifest_is_refused(field: str, value: object, tmp_path: Path) -> None:
    write_captioned(tmp_path, GREEK, 4)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(DatasetError, match=f"manifest.json: {field} is .*, but by the index it is"):
        open_dataset(str(tmp_path))


def test_sets_without_captions_keep_their_fingerprints(
    make_dataset: MakeDataset, tmp_path: Path
) -> None:
    """Commit 3d80003, before there were captions, wrote these; test_packing.py has the digits'."""
    raw, png = make_dataset(10, 4), make_dataset(10, 4, str(tmp_path / "png"), "png")
    latents = write_latents(tmp_path / "latents", random_latents(10), 4)
    assert [dataset.fingerprint[:16] for dataset in (raw, png, latents)] == [
        "3759d60b8f3e4161",
        "fa339e91660f01e6",
        "6ea860141b9cc03e",
    ]
    assert [dataset.manifest.format[-1] for dataset in (raw, png, latents)] == ["1", "1", "2"]


SCRIPT = """
import pathlib, random, sys
from ddpm_ray.data import arrow_io, captions, dataset, shards
manifest = dataset.open_dataset(sys.argv[1]).manifest
good, read, refused = pathlib.Path(sys.argv[1], "shard-00000.arrow").read_bytes(), 0, 0
draw = random.Random(0)
for _ in range(2000):
    data = bytearray(good)
    for _ in range(draw.randint(1, 8)):
        data[draw.randrange(len(data))] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
    try:
        shard = shards.parse_shard(bytes(data), manifest)
        for text in sum(captions.caption_tuples(shard.captions), ()):
            assert captions.cleaned(text) == text != ""
        read += 1
    except arrow_io.ArrowFileError:
        refused += 1
print(read, refused)
"""


def test_damage_is_an_error_or_other_captions_never_a_crash(tmp_path: Path) -> None:
    write_captioned(tmp_path, GREEK, 4)
    check_damage_is_found(SCRIPT, str(tmp_path))
