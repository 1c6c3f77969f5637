"""The shard format: readable with Arrow alone, self-checking, deterministic."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ddpm_ray.data import shards
from ddpm_ray.data.dataset import Dataset, DatasetError, open_dataset
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.manifest import Manifest
from ddpm_ray.data.shards import ShardCorruptError, fetch_shard

MakeDataset = Callable[..., Dataset]


def test_arrow_alone_reads_a_shard(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(10, 4)
    table = pa.ipc.open_file(Path(dataset.url) / "shard-00002.arrow").read_all()
    assert table.column_names == ["image", "label", "key"]
    assert table.schema.field("image").type == pa.fixed_shape_tensor(pa.uint8(), [2, 3, 1])
    assert table.column("key").to_pylist() == ["n-000008", "n-000009"]
    assert table.column("label").to_pylist() == [1, 2]
    image = table.column("image").chunk(0).to_numpy_ndarray()
    assert image[:, 1, 2, 0].tolist() == [8, 9]


def test_the_index_holds_what_numpy_finds_in_the_images(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(1000, 300)
    images = np.concatenate([np.asarray(fetch_shard(dataset, n).images) for n in range(4)])
    assert dataset.counts.tolist() == [300, 300, 300, 100]
    assert sum(s[0] for s in dataset.index["pixel_sum"].to_pylist()) == images.sum(dtype=int)
    assert dataset.manifest.pixel_mean[0] == pytest.approx(images.mean(), rel=1e-12)
    assert dataset.manifest.pixel_std[0] == pytest.approx(images.std(), rel=1e-12)


def test_a_parsed_shard_is_a_view_of_the_files_bytes() -> None:
    images = np.arange(48, dtype=np.uint8).reshape(2, 2, 4, 3)
    data = shards.shard_bytes(images, [5, -1], ["a", "b"])
    manifest = Manifest(
        "", ImageShape(2, 4, 3), "raw", "none", (), "", 2, 1, len(data), (0.0,), (0.0,), ""
    )
    shard = shards.parse_shard(data, manifest)
    assert isinstance(shard.images, np.ndarray)
    assert np.array_equal(shard.images, images)
    inside = np.frombuffer(data, np.uint8)
    assert np.shares_memory(shard.images, inside)


def test_what_was_written_opens_with_the_same_fingerprint(make_dataset: MakeDataset) -> None:
    written = make_dataset(10, 4)
    opened = open_dataset(written.url)
    assert opened.manifest == written.manifest
    assert opened.fingerprint == written.fingerprint
    assert pickle.loads(pickle.dumps(opened)).fingerprint == written.fingerprint  # to Ray workers


def test_the_manifest_has_no_path_and_no_time(make_dataset: MakeDataset, tmp_path: Path) -> None:
    here, there = make_dataset(10, 4), make_dataset(10, 4, str(tmp_path / "elsewhere"))
    assert here.fingerprint == there.fingerprint
    text = (Path(here.url) / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert list(json.loads(text)) == sorted(json.loads(text))


@pytest.mark.parametrize(
    "field, value",
    [
        ("samples", 11),
        ("shards", 2),
        ("stored_bytes", 1),
        ("image_shape", [3, 2, 1]),
        ("encoding", "png"),
        ("resize", "centre-crop-box-bicubic"),
        ("label_names", ["cat"]),
        ("source_sha256", "0"),
        ("pixel_mean", [1.0]),
        ("pixel_std", [1.0]),
        ("index_sha256", "0123456789abcdef"),
        ("format", "ddpm-ray shards nine"),
        ("colour", "blue"),
    ],
)
def test_an_edited_manifest_names_the_field(
    make_dataset: MakeDataset, field: str, value: object
) -> None:
    dataset = make_dataset(10, 4)
    edit(dataset, lambda manifest: manifest.update({field: value}))
    with pytest.raises(DatasetError, match=rf"manifest.json: {field} is "):
        open_dataset(dataset.url)


def test_a_field_that_was_taken_out_is_named(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(10, 4)
    edit(dataset, lambda manifest: manifest.pop("resize"))
    with pytest.raises(DatasetError, match="resize is None, but"):
        open_dataset(dataset.url)


def edit(dataset: Dataset, change: Callable[[dict[str, Any]], object]) -> None:
    path = Path(dataset.url) / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_an_index_that_changed_is_refused(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(10, 4)
    path = Path(dataset.url) / "index.arrow"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DatasetError, match=r"index_sha256 is .* but the sha256 of index.arrow is"):
        open_dataset(dataset.url)


@pytest.mark.parametrize("text", ["", "{", "[]", "\\x00"])
def test_a_manifest_that_is_no_json_is_refused(make_dataset: MakeDataset, text: str) -> None:
    dataset = make_dataset(10, 4)
    (Path(dataset.url) / "manifest.json").write_text(text)
    with pytest.raises(DatasetError, match="not readable"):
        open_dataset(dataset.url)


def test_a_half_packed_folder_is_no_data_set(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(10, 4)
    (Path(dataset.url) / "manifest.json").unlink()
    with pytest.raises(DatasetError, match=r"no manifest.json, so this is not a complete data set"):
        open_dataset(dataset.url)


def test_errors_arrive_whole_after_a_trip_through_pickle() -> None:
    for error in (
        ShardCorruptError("s3://b/shard-00001.arrow", "ab" * 32, "cd" * 32, 3),
        DatasetError("s3://b", "samples is 3", "pack it again"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), copy.args, str(copy)) == (type(error), error.args, str(error))
        assert "\n" not in str(error)
