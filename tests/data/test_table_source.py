"""Parquet and Arrow files with a column of images, written by pyarrow."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.data.packing import packer
from ddpm_ray.data.packing.image_files import BadImageError
from ddpm_ray.data.packing.sources import open_source
from ddpm_ray.data.samples import Source
from ddpm_ray.data.shards import fetch_shard
from ddpm_ray.storage import object_store
from tests.data.test_source_files import keys, left_out, write
from tests.data.test_sources import png
from tests.data.test_tar_source import labels

STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def table(rows: int, names: list[str] | None = None, **columns: Any) -> pa.Table:
    """Store images as Hugging Face Datasets does: a struct, and its features in the schema."""
    images = [{"bytes": png(n % 256), "path": f"{n}.png"} for n in range(rows)]
    held = {"image": pa.array(images, STRUCT), **columns}
    features: dict[str, object] = {"image": {"_type": "Image"}}
    if names is not None:
        features["label"] = {"names": names, "_type": "ClassLabel"}
    reported = json.dumps({"info": {"features": features}})
    return pa.table(held).replace_schema_metadata({"huggingface": reported})


def save(path: Path, what: pa.Table, **options: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(what, path, **options)
    else:
        new = pa.ipc.new_file if options.pop("as_file", False) else pa.ipc.new_stream
        batch = options.pop("batch", 3)
        with new(str(path), what.schema, **options) as writer:
            writer.write_table(what, max_chunksize=batch)
    return str(path)


def images(source: Source, samples: range | None = None) -> list[object]:
    samples = range(len(source)) if samples is None else samples
    return [sample.image for sample in source.read(samples)]


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "parquet": ("a.parquet", {"row_group_size": 3}),
    "one group": ("a.parquet", {"compression": "zstd"}),
    "stream": ("a.arrow", {}),
    "file": ("a.arrow", {"as_file": True}),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_samples_in_any_range(form: str, tmp_path: Path) -> None:
    name, options = FORMS[form]
    numbers = pa.array([n % 3 for n in range(10)], pa.int64())
    text = pa.array(["a caption"] * 10)
    what = table(10, ["ant", "bee", "cow", "dog"], label=numbers, note=text)
    source = open_source(save(tmp_path / name, what, **options))
    assert source.label_names == ("ant", "bee", "cow", "dog")
    assert keys(source) == [f"{name}:{n:06d}" for n in range(10)]
    assert labels(source) == [n % 3 for n in range(10)]
    for start in range(11):
        for stop in range(start, 11):
            assert images(source, range(start, stop)) == [png(n) for n in range(start, stop)]
    assert left_out(source) == {"columns of tables not supported in shards": (1, ("note",))}


@pytest.mark.parametrize("remote", [False, True])
def test_the_tables_of_a_folder_are_packed_in_order(
    remote: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = f"{request.getfixturevalue('s3')}/tables" if remote else str(tmp_path / "in")
    for number, rows in enumerate((4, 1, 5)):
        name = f"data/train-0000{number}-of-00003.parquet"
        path = save(tmp_path / "made" / name, table(rows, label=pa.array([number] * rows)))
        object_store.write_bytes(object_store.join(root, name), Path(path).read_bytes())
    object_store.write_bytes(object_store.join(root, "README.md"), b"a card")
    plan = packer.make_plan(root, str(tmp_path / "set"), PackConfig(shard_bytes=16 * 3))
    dataset = packer.finish_dataset(plan, [packer.pack_shard(plan, n) for n in range(plan.shards)])
    assert dataset.manifest.shards == 4
    assert dataset.manifest.label_names == ("0", "1", "2")
    shards = [fetch_shard(dataset, n) for n in range(4)]
    assert np.concatenate([shard.labels for shard in shards]).tolist() == [0] * 4 + [1] + [2] * 5
    assert shards[1].keys.to_pylist()[1] == "data/train-00001-of-00003.parquet:000000"
    values = [int(image[0, 0, 0]) for shard in shards for image in np.asarray(shard.images)]
    assert values == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4]
    assert left_out(plan.source)["other files"] == (1, ("README.md",))


def test_texts_and_categories_are_classes_in_order(tmp_path: Path) -> None:
    texts = ["dog", "ant", "dog", "10"]
    plain, coded = pa.array(texts), pa.array(texts).dictionary_encode()
    for name, column in (("a.parquet", plain), ("b.parquet", coded), ("c.arrow", plain)):
        source = open_source(
            save(tmp_path / name, table(4, kind=column)), PackConfig(label_key="kind")
        )
        assert (source.label_names, labels(source)) == (("10", "ant", "dog"), [2, 1, 2, 0])


def test_minus_one_and_null_in_every_row_are_no_labels(tmp_path: Path) -> None:
    for name, column in (("a", pa.array([-1, -1])), ("b", pa.array([None, None], pa.int64()))):
        source = open_source(save(tmp_path / f"{name}.parquet", table(2, ["ant"], label=column)))
        assert (source.label_names, labels(source)) == ((), [-1, -1])


def test_a_plain_column_of_files_is_found_by_its_name_or_chosen(tmp_path: Path) -> None:
    files = pa.array([png(1), png(2)], pa.large_binary())
    found = open_source(save(tmp_path / "a.parquet", pa.table({"jpg": files, "id": [1, 2]})))
    assert images(found) == [png(1), png(2)]
    both = save(tmp_path / "b.parquet", pa.table({"x": files, "mask": files.take([1, 0])}))
    chosen = open_source(both, PackConfig(image_key="mask"))
    assert images(chosen) == [png(2), png(1)]
    assert left_out(chosen) == {"columns of tables not supported in shards": (1, ("x",))}


LABELS = pa.array([0, 1])
FILES = pa.array([png(1), png(2)])


@pytest.mark.parametrize(
    "what, options, message",
    [
        (pa.table({"x": FILES}), {}, r"no column named image, .* image files; it has x binary"),
        (pa.table({"image": [[1, 2], [3]]}), {}, r"it has image list<.*int64>; name a column"),
        (pa.table({"image": FILES, "jpg": FILES}), {}, r"2 columns of images .* image_key=image"),
        (pa.table({"image": FILES}), {"image_key": "x"}, r"'x' \(image_key\) is not a column of"),
        (pa.table({"image": FILES}), {"label_key": "x"}, r"no column 'x' \(label_key\); choose"),
        (
            pa.table({"image": FILES, "label": [0.5, 1]}),
            {},
            "column 'label' is double, which cannot",
        ),
        (
            pa.table({"image": FILES, "label": [0, None]}),
            {},
            "1 of 2 rows have no label; the first is row 1",
        ),
        (
            pa.table({"image": FILES, "label": [0, -1]}),
            {},
            "1 of 2 rows have no label; the first is row 1",
        ),
        (pa.table({"image": FILES, "label": [0, -2]}), {}, "label -2 is negative"),
        (
            pa.table({"image": FILES, "label": [0, 10**12]}),
            {},
            "label 10{12} is too large; it must be below 1048576",
        ),
        (table(2, ["ant"], label=LABELS), {}, "label 1 occurs, but the schema names only 1 class;"),
        (pa.table({"image": FILES[:0]}), {}, "its tables have no rows; give tables with images"),
    ],
    ids=range(12),
)
def test_what_cannot_be_told_ends_with_a_line(
    what: pa.Table, options: dict[str, str], message: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "a.parquet", what)
    with pytest.raises(DatasetError, match=message):
        open_source(path, PackConfig(**options))  # type: ignore[arg-type]


def test_splits_and_tables_of_two_kinds_are_not_mixed(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save(tmp_path / f"a/{split}-00000-of-00001.parquet", table(1))
    with pytest.raises(
        DatasetError, match=r"tables belong to the splits test, train; give one file"
    ):
        open_source(str(tmp_path / "a"))
    for split in ("train", "test"):  # as Hugging Face's save_to_disk has them
        save(tmp_path / f"b/{split}/data-00000-of-00001.arrow", table(1))
    with pytest.raises(
        DatasetError, match=r"tables belong to the splits test, train; give one file"
    ):
        open_source(str(tmp_path / "b"))
    assert len(open_source(str(tmp_path / "b/train"))) == 1
    for number, names in enumerate((["ant", "bee"], ["bee", "ant"])):
        save(tmp_path / f"c/{number}.parquet", table(2, names, label=LABELS))
    with pytest.raises(
        DatasetError, match=r"1.parquet: its image column or its class names differ"
    ):
        open_source(str(tmp_path / "c"))


def test_a_row_without_a_file_is_a_bad_image(tmp_path: Path) -> None:
    rows = [{"bytes": png(1), "path": None}, {"bytes": None, "path": "x.png"}, None]
    path = save(tmp_path / "a.parquet", pa.table({"image": pa.array(rows, STRUCT)}))
    plan = packer.make_plan(path, str(tmp_path / "set"), PackConfig())
    message = r"row 1 of column 'image': not a readable image \(the file is empty\)"
    with pytest.raises(BadImageError, match=message):
        packer.pack_shard(plan, 0)
    options = PackConfig(on_bad_image="skip", max_file_bytes=len(png(1)))
    plan = packer.make_plan(path, str(tmp_path / "set"), options)
    packed = packer.pack_shard(plan, 0)
    assert packed.row is not None
    assert (packed.row.samples, len(packed.skipped)) == (1, 2)


def test_a_file_in_a_cell_that_is_too_large_is_refused(tmp_path: Path) -> None:
    what = pa.table({"image": [bytes(2**20), png(1)]})
    source = open_source(save(tmp_path / "a.parquet", what), PackConfig(max_file_bytes=2**19))
    assert images(source) == [None, png(1)]


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
def test_compressed_arrow_files_are_refused(compression: str, tmp_path: Path) -> None:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    path = save(tmp_path / "a.arrow", pa.table({"image": [bytes(10**6)]}), options=options)
    with pytest.raises(
        DatasetError, match=r"compressed, so its size in memory is unknown.*; write it"
    ):
        open_source(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_damaged_or_cut_table_is_one_line(name: str, tmp_path: Path) -> None:
    path = Path(save(tmp_path / name, table(6, label=pa.array(range(6)))))
    data, reported = path.read_bytes(), list[str]()
    rng = np.random.default_rng(0)
    for trial in range(120):
        broken = bytearray(data[: rng.integers(len(data))] if trial % 2 else data)
        for at in rng.integers(0, max(len(broken), 1), 3) if len(broken) else ():
            broken[at] ^= int(rng.integers(1, 256))
        path.write_bytes(broken)
        try:
            assert len(images(open_source(str(path)))) <= 6
        except DatasetError as error:
            reported.append(str(error))
    assert len(reported) > 60
    assert all(line.isprintable() and len(line) < 1000 for line in reported)


def test_a_page_that_names_one_image_many_times_costs_one_image(tmp_path: Path) -> None:
    """40,000 rows of 1 MiB in a file of 0.4 MB: batches of the usual size would be gigabytes."""
    rows = pa.array([0] * 40_000, pa.int32())
    image = pa.DictionaryArray.from_arrays(rows, pa.array([bytes(2**20)]))
    label = pa.DictionaryArray.from_arrays(rows, pa.array(["x" * 900]))
    noise = np.random.default_rng(0).bytes(400_000)
    what = pa.table({"image": image, "label": label, "pad": [noise] + [b""] * 39_999})
    path = save(tmp_path / "a.parquet", what, compression="zstd", store_schema=False)
    assert Path(path).stat().st_size < 2**19
    pool = pa.default_memory_pool()
    before = pool.max_memory()
    source = open_source(path)
    assert len(source) == 40_000
    assert sum(sample.image == bytes(2**20) for sample in source.read(range(20_000, 20_300))) == 300
    assert pool.max_memory() - before < 2**28


def test_a_table_cannot_claim_more_rows_than_bytes(tmp_path: Path) -> None:
    image = pa.DictionaryArray.from_arrays(pa.array([0] * 40_000, pa.int32()), pa.array([png(1)]))
    path = save(tmp_path / "a.parquet", pa.table({"image": image}), store_schema=False)
    with pytest.raises(
        DatasetError, match=r"not a readable table \(it claims 40000 rows in \d+ by"
    ):
        open_source(path)


def test_tables_beside_images_are_not_packed_by_half(tmp_path: Path) -> None:
    save(tmp_path / "a.parquet", table(1))
    write(tmp_path, "b.png")
    with pytest.raises(DatasetError, match=r"images \(b.png\) and tables \(a.parquet\)"):
        open_source(str(tmp_path))
