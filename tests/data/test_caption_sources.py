"""Captions of sources: every one is packed once, counted as left out, or an error that names it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.captions import caption_tuples
from ddpm_ray.data.dataset import Dataset, DatasetError
from ddpm_ray.data.loader import read_captions
from ddpm_ray.data.packing import pack_report, packer
from ddpm_ray.data.packing.sources import open_source
from ddpm_ray.data.samples import Source
from ddpm_ray.storage import object_store
from tests.data.test_source_files import left_out, write
from tests.data.test_sources import png, write_tar

UNCAPTIONED = "images without a caption (packed as well)"
MISSING = "images that a caption file names but that do not exist"


def captions(source: Source) -> dict[str, tuple[str, ...]]:
    found = {sample.key: sample.captions for sample in source.read(range(len(source)))}
    if source.captions is not None:
        assert caption_tuples(source.captions) == list(found.values())
    middle = range(len(source) // 2, len(source))
    assert [s.captions for s in source.read(middle)] == list(found.values())[middle.start :]
    return found


def opened(folder: Path, **options: Any) -> Source:
    return open_source(str(folder), PackConfig(**options))


def tsv(folder: Path, text: str | bytes, name: str = "captions.tsv") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(*rows: object) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def test_a_tsv_beside_images_with_and_without_a_header(tmp_path: Path) -> None:
    write(tmp_path, "b/a.png", "b/c.png", "b/d.png")
    text = "b/a.png\ta cat\n./b/c.png\t cafe\u0301 \r\nb/a.png\tone more\nb/a.png\ta cat\n"
    text += "b/c.png\t\n\n"
    expected = {"b/a.png": ("a cat", "one more"), "b/c.png": ("caf\u00e9",), "b/d.png": ()}
    for header in ("", "file\tcaption\n", "\ufefffile_name\ttext\n"):
        tsv(tmp_path, header + text)
        source = opened(tmp_path)
        assert captions(source) == expected
        assert left_out(source)[UNCAPTIONED] == (1, ("b/d.png",))


def test_files_in_sub_folders_name_images_relative_to_them(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "dog/1.png")
    tsv(tmp_path / "cat", "1.png\ta cat\n")
    tsv(tmp_path / "dog", "1.png\ta dog\n")
    source = opened(tmp_path)
    assert captions(source) == {"cat/1.png": ("a cat",), "dog/1.png": ("a dog",)}
    assert source.label_names == ("cat", "dog")
    assert left_out(source) == {}


def test_rows_of_json_hold_a_caption_or_a_list_of_them(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png", "c.png")
    rows = [
        {"file": "a.png", "caption": "one"},
        {"file_name": "b.png", "captions": ["two", "three", "two"]},
        {"file": "a.png", "text": "four"},
        {"file": "c.png", "caption": None},
    ]
    tsv(tmp_path, jsonl(*rows), "captions.jsonl")
    assert captions(opened(tmp_path)) == {
        "a.png": ("one", "four"),
        "b.png": ("two", "three"),
        "c.png": (),
    }
    tsv(tmp_path, jsonl({"file": "a.png", "title": "x", "caption": "y"}), "captions.jsonl")
    assert captions(opened(tmp_path, caption_key="title"))["a.png"] == ("x",)


def test_a_text_file_beside_an_image_has_a_caption_a_line(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.jpg", "c.png")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\none\n")
    (tmp_path / "b.TXT").write_text("three")
    (tmp_path / "notes.txt").write_text("no caption\x00")
    source = opened(tmp_path)
    assert captions(source) == {"a.png": ("one", "two"), "b.jpg": ("three",), "c.png": ()}
    assert left_out(source)["other files"] == (1, ("notes.txt",))


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_metadata_have_captions_and_labels(name: str, tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png", "c.png")
    rows = [("a.png", "one", 1), ("b.png", "two", 0), ("c.png", "", 0), ("a.png", "three", 1)]
    text = "file_name,text,label\n" + "".join(f"{f},{t},{n}\n" for f, t, n in rows)
    if name.endswith("jsonl"):
        text = jsonl(*({"file_name": f, "text": t, "label": n} for f, t, n in rows))
    tsv(tmp_path, text, name)
    source = opened(tmp_path)
    assert captions(source) == {"a.png": ("one", "three"), "b.png": ("two",), "c.png": ()}
    assert [s.label for s in source.read(range(3))] == [1, 0, 0]
    assert left_out(source) == {UNCAPTIONED: (1, ("c.png",))}
    without = opened(tmp_path / ".", caption_key="label", label_key="label", on_bad_caption="skip")
    assert left_out(without)[f"columns of {name} not supported in shards"][1] == ("text",)


def test_the_option_names_a_file_elsewhere_or_none(tmp_path: Path, s3: str) -> None:
    folder = tmp_path / "pictures"
    write(folder, "a.png", "b/c.png")
    (folder / "b/a.png").write_bytes(png(1))
    (folder / "a.png").rename(folder / "b/b.png")
    tsv(folder, "b/a.png\tnot this\n")
    (folder / "b/a.txt").write_text("nor this")
    tsv(folder, "file_name,text\nb/c.png,nor that\n", "metadata.csv")
    elsewhere = tsv(tmp_path, "b/c.png\tthis\n", "mine.tsv")
    source = opened(folder, captions=str(elsewhere))
    assert captions(source)["b/c.png"] == ("this",)
    assert left_out(source)["other files"] == (2, ("b/a.txt", "captions.tsv"))
    object_store.write_bytes(f"{s3}/mine.jsonl", jsonl({"file": "b/a.png", "text": "far"}).encode())
    assert captions(opened(folder, captions=f"{s3}/mine.jsonl"))["b/a.png"] == ("far",)
    plain = opened(folder, captions="none")
    assert plain.captions is None
    assert set(captions(plain).values()) == {()}
    with pytest.raises(DatasetError, match=r"in captions.tsv and metadata.csv and b/a.txt;"):
        opened(folder)


BOTH = {"a.png": png(1), "a.txt": b"one\ntwo\n", "a.json": b'{"caption": "one", "url": "u"}'}
OTHER_KEYS = "keys of .json files not supported in shards"


def test_members_of_tars(tmp_path: Path) -> None:
    """img2dataset writes the caption to .txt and to .json."""
    write_tar(tmp_path / "0.tar", BOTH | {"b.png": png(2)})
    write_tar(tmp_path / "1.tar", {"a.png": png(3), "a.txt": b"three", "c.txt": b"no image"})
    source = opened(tmp_path)
    assert [s.captions for s in source.read(range(3))] == [("one", "two"), (), ("three",)]
    assert left_out(source)[OTHER_KEYS] == (2, ("caption", "url"))
    assert left_out(source)[UNCAPTIONED] == (1, ("0.tar: b",))
    source = opened(tmp_path, caption_key="url")
    assert [s.captions for s in source.read(range(3))] == [("u",), (), ()]
    assert left_out(source)[".txt files in tars"][0] == 3
    assert opened(tmp_path, captions="none").captions is None
    write_tar(tmp_path / "0.tar", {"a.png": png(1), "a.json": b'{"captions": ["x", "y"]}'})
    (tmp_path / "1.tar").unlink()
    assert captions(opened(tmp_path)) == {"a": ("x", "y")}


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.list_(pa.string()), pa.large_list(pa.string())]
)
def test_columns_of_tables(suffix: str, kind: pa.DataType, tmp_path: Path) -> None:
    texts: list[Any] = ["one", None, " two ", "", "one"]
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        texts = [["one", "three"], None, ["two"], [], ["one", None]]
    table = pa.table({"image": [png(n) for n in range(5)], "text": pa.array(texts, kind)})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    found = list(captions(source := opened(path)).values())
    first = ("one", "three") if isinstance(texts[0], list) else ("one",)
    assert found == [first, (), ("two",), (), ("one",)]
    assert left_out(source)[UNCAPTIONED][0] == 2
    assert opened(path, captions="none").captions is None
    with pytest.raises(DatasetError, match=r"nothing has a value in 'txt' \(caption_key\); check"):
        opened(path, caption_key="txt")
    with pytest.raises(DatasetError, match="column 'image' is binary, which cannot hold captions"):
        opened(path, caption_key="image")


def test_a_table_with_two_columns_of_captions_asks_which(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"image": [png(1)], "text": ["a"], "caption": ["b"]}), tmp_path / "a.parquet"
    )
    with pytest.raises(DatasetError, match="columns caption and text may hold captions; choose"):
        opened(tmp_path)
    assert list(captions(opened(tmp_path, caption_key="text")).values()) == [("a",)]


def of_tsv(text: str | bytes) -> Callable[[Path], object]:
    return lambda folder: tsv(folder, text)


def of_jsonl(text: str) -> Callable[[Path], object]:
    return lambda folder: tsv(folder, text, "captions.jsonl")


MANY = "".join(f"a.png\t{n}\n" for n in range(66))
GOOD = "b.png\tgood\n"
LINE = "lines of caption files"
CC = "captions with control characters"
B = {"file": "b.png", "text": "x"}
GONE = "x.png\t1\ny.png\t2\nx.png\t3"
CSV = "file_name,text\na.png,x\x1b\nb.png,y\n"
BAD: list[tuple[Callable[[Path], object], str, str, int]] = [
    (of_tsv(GOOD + "a.png"), "line 2 has no tab; correct", LINE, 1),
    (of_tsv(GOOD + "\tx"), "line 2 names no image file; correct", LINE, 1),
    (of_tsv(GOOD.encode() + b"a.png\t\xff\n"), "line 2 is not UTF-8; correct", LINE, 1),
    (of_tsv(GOOD + "a.png\tx\ty"), r"line 2: the caption holds .* U\+0009", CC, 1),
    (of_tsv(GOOD + "a.png\tx\x1b"), r"line 2: the caption holds .* U\+001B", CC, 1),
    (of_tsv(GOOD + f"a.png\t{'x' * 4097}"), "line 2: the caption has 4097", "captions of more", 1),
    (of_tsv(GOOD + MANY), "line 66: a.png has more than 64 captions", "captions beyond the 64", 2),
    (of_tsv(GOOD + GONE), "no file for 2 images that it names: x.png, y.png; add", MISSING, 2),
    (of_jsonl(jsonl(B) + "{"), "line 2 names no image", LINE, 1),
    (of_jsonl(jsonl(B) + "[" * 10**5), "line 2 names no image", LINE, 1),
    (of_jsonl(jsonl(B | {"text": ["x", 3]})), "line 1: a caption is 3", "captions that are no", 1),
    (of_jsonl(jsonl(B | {"text": ["x", "\ud800"]})), "half a surr", "captions that are not va", 1),
    (lambda folder: tsv(folder, b"x\n\xff\n", "a.txt"), "a.txt: line 2: not UTF-8", LINE, 1),
    (lambda folder: tsv(folder, CSV, "metadata.csv"), r"line 2: .*U\+001B", CC, 1),
]


@pytest.mark.parametrize("make, message, kind, count", BAD, ids=range(len(BAD)))
def test_a_bad_caption_stops_the_job_or_is_counted(
    make: Callable[[Path], object], message: str, kind: str, count: int, tmp_path: Path
) -> None:
    write(tmp_path, "a.png", "b.png")
    make(tmp_path)
    with pytest.raises(DatasetError, match=f"{message}.*, or use on_bad_caption=skip$") as error:
        opened(tmp_path)
    assert str(error.value).isprintable()
    source = opened(tmp_path, on_bad_caption="skip")
    assert source.captions is not None
    (found,) = [n for name, (n, _) in left_out(source).items() if name.startswith(kind)]
    assert found == count


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"on_bad_caption": "skip"},
            "no file for any image that it names: y.png; name",
        ),
        ({"captions": "x.csv"}, "x.csv: not a .tsv or .jsonl file; name a file of captions"),
        ({"captions": "gone.tsv"}, "gone.tsv: no such file"),
        ({"captions": "none", "caption_key": "a"}, None),
        ({"caption_key": "a"}, "no file for any|nothing has a value in 'a'"),
        ({"max_file_bytes": 3}, r"a file of more than 3 bytes \(max_file_bytes\)"),
    ],
)
def test_what_chooses_nothing_is_refused(
    options: dict[str, Any], message: str | None, tmp_path: Path
) -> None:
    write(tmp_path, "a.png")
    tsv(tmp_path, "y.png\tx\n")
    if message is None:
        assert opened(tmp_path, **options).captions is None
        return
    with pytest.raises(Exception, match=message):
        opened(tmp_path, **options)
    with pytest.raises(DatasetError, match=r"captions is 'a.tsv', but its images have no fil"):
        open_source("digits", PackConfig(captions="a.tsv"))


def pack(
    source: Path, destination: Path, numbers: list[int] | None = None, **options: Any
) -> Dataset:
    plan = packer.make_plan(str(source), str(destination), PackConfig(**options))
    order = numbers or range(plan.shards)
    return packer.finish_dataset(plan, [packer.pack_shard(plan, n) for n in order])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    write(folder, *(f"{n}.png" for n in range(9)))
    tsv(folder, "".join(f"{n}.png\t{n} {k}\n" for n in range(9) for k in range(n % 3)))
    return folder


def test_shards_do_not_depend_on_tasks_and_the_report_counts(
    pictures: Path, tmp_path: Path
) -> None:
    whole = pack(pictures, tmp_path / "a", shard_bytes=64)
    assert whole.manifest.shards == 3
    pack(pictures, tmp_path / "b", [2, 0, 1], shard_bytes=64)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    expected = [tuple(f"{n} {k}" for k in range(n % 3)) for n in range(9)]
    assert list(read_captions(whole, range(3))) == expected
    record = pack_report.read_record(whole)
    assert record is not None
    assert "captions: 9, of 6 of 9 samples" in list(pack_report.lines(whole, record.report))
    result = pack_report.job_result(whole, record.report)
    assert (result["captioned"], result["captions"]) == (6, 9)


def test_a_killed_job_goes_on_and_other_captions_are_another_set(
    pictures: Path, tmp_path: Path
) -> None:
    whole = pack(pictures, tmp_path / "whole", shard_bytes=64)
    plan = packer.make_plan(str(pictures), str(tmp_path / "set"), PackConfig(shard_bytes=64))
    for n in (0, 2):
        packer.pack_shard(plan, n)
    assert pack(pictures, tmp_path / "set", shard_bytes=64).fingerprint == whole.fingerprint
    assert files(tmp_path / "set") == files(tmp_path / "whole")
    again = packer.make_plan(str(pictures), str(tmp_path / "set"), PackConfig(shard_bytes=64))
    assert packer.find_finished(again) is not None
    packer.pack_shard(
        packer.make_plan(str(pictures), str(tmp_path / "c"), PackConfig(shard_bytes=64)), 1
    )
    text = (pictures / "captions.tsv").read_text()
    tsv(pictures, text.replace("1 0", "x y"))
    other = pack(pictures, tmp_path / "c", shard_bytes=64)
    assert list(read_captions(other, range(len(other.counts))))[1] == ("x y",)
    with pytest.raises(DatasetError, match=r"already here \(source_sha256 differ\)"):
        packer.find_finished(
            packer.make_plan(str(pictures), str(tmp_path / "set"), PackConfig(shard_bytes=64))
        )
    plain = PackConfig(shard_bytes=64, captions="none")
    with pytest.raises(DatasetError, match=r"already here \(source_sha256, captioned differ\)"):
        packer.find_finished(packer.make_plan(str(pictures), str(tmp_path / "set"), plain))


def test_a_shard_holds_no_more_bytes_with_long_captions(pictures: Path, tmp_path: Path) -> None:
    tsv(pictures, f"4.png\t{'x' * 900}\n8.png\t{'y' * 900}\n")
    dataset = pack(pictures, tmp_path / "set", shard_bytes=1000)
    assert dataset.counts.tolist() == [6, 3]
    tsv(pictures, f"4.png\t{'x' * 900}\n5.png\t{'y' * 900}\n")
    assert max(pack(pictures, tmp_path / "two", shard_bytes=1000).counts) < 6
