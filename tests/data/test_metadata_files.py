"""Labels from metadata.csv and metadata.jsonl; other columns are listed as not packed.

Captions from them: test_caption_sources.py.
"""

import json
from pathlib import Path

import pytest

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.data.packing.sources import open_source
from ddpm_ray.data.samples import Source
from tests.data.test_source_files import keys, left_out, write
from tests.data.test_tar_source import labels

TEXT = "columns of metadata.csv not supported in shards"


def opened(
    folder: Path, metadata: str | bytes, name: str = "metadata.csv", **options: str
) -> Source:
    data = metadata if isinstance(metadata, bytes) else metadata.encode()
    (folder / name).write_bytes(data)
    return open_source(str(folder), PackConfig(**options))  # type: ignore[arg-type]


def jsonl(*rows: object) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def test_numbers_are_labels_and_other_columns_are_named(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png", "c.png")
    rows = 'file_name,text,label\nc.png,"a cat, ""sitting""\non two lines",2\na.png,,0\nb.png,x,0\n'
    data = b"\xef\xbb\xbf" + rows.replace("\n", "\r\n").encode()
    source = opened(tmp_path, data, captions="none")
    assert (keys(source), labels(source)) == (["a.png", "b.png", "c.png"], [0, 0, 2])
    assert source.label_names == ("0", "1", "2")
    assert left_out(source) == {TEXT: (1, ("text",))}


def test_names_are_classes_and_folders_are_not(tmp_path: Path) -> None:
    write(tmp_path, "x/a.png", "x/b.png", "y/c.png", "d.png")
    rows = [("x/a.png", "fox"), ("x/b.png", "ant"), ("./y/../y/c.png", "fox"), ("d.png", "cow")]
    metadata = jsonl(*({"file_name": name, "label": label} for name, label in rows))
    source = opened(tmp_path, metadata, "metadata.jsonl")
    assert source.label_names == ("ant", "cow", "fox")
    assert dict(zip(keys(source), labels(source), strict=True)) == {
        "d.png": 1,
        "x/a.png": 2,
        "x/b.png": 0,
        "y/c.png": 2,
    }
    unused = "names of folders, not used as classes because a metadata file has the labels"
    assert left_out(source) == {unused: (2, ("x", "y"))}


def test_captions_alone_leave_the_folders_of_classes(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "dog/2.png")
    for name in ("cat/1.png", "dog/2.png"):
        folder, _, file = name.partition("/")
        (tmp_path / folder / "metadata.csv").write_text(f"file_name,text\n{file},a {folder}\n")
    source = open_source(str(tmp_path))
    assert (source.label_names, labels(source)) == (("cat", "dog"), [0, 1])
    assert [sample.captions for sample in source.read(range(2))] == [("a cat",), ("a dog",)]
    assert left_out(source) == {}


def test_one_folder_beside_a_metadata_file_is_no_class(tmp_path: Path) -> None:
    write(tmp_path, "images/1.png", "images/2.png")
    source = opened(tmp_path, "file_name,text\nimages/1.png,x\n")
    assert (source.label_names, labels(source)) == ((), [-1, -1])
    unknown = "images that no metadata file names (packed as well)"
    assert left_out(source)[unknown] == (1, ("images/2.png",))


def test_the_label_is_the_column_that_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "a.png", "b.png")
    rows = "file_name,label,style\na.png,0,oil\nb.png,1,ink\n"
    source = opened(tmp_path, rows, label_key="style")
    assert source.label_names == ("ink", "oil")
    assert left_out(source) == {TEXT: (1, ("label",))}
    with pytest.raises(
        DatasetError, match=r"no row has a value in 'stlye' \(label_key\); check its"
    ):
        opened(tmp_path, rows, label_key="stlye")


CSV, JSONL, HEAD = "metadata.csv", "metadata.jsonl", "file_name,label\n"


def row(name: str, label: object) -> str:
    return jsonl({"file_name": name, "label": label})


@pytest.mark.parametrize(
    "name, metadata, message",
    [
        (CSV, "file,label\na.png,1\n", "its columns are file, label: none is file_name"),
        (CSV, HEAD + "a.png,1\n", "1 of 2 images have no label; the first is b.png"),
        (CSV, HEAD + "a.png,1\nb.png,\n", "1 of 2 images have no label; the first is b.png"),
        (CSV, HEAD + "a.png,1\nb.png,x\nc.png,2\n", "line 4 names 'c.png', and"),
        (CSV, HEAD + "../a.png,1\n", "line 2 names '../a.png', and there is no"),
        (CSV, HEAD + "a.png,1\na.png,1\n", "line 3 names 'a.png' a second time"),
        (CSV, HEAD + "a.png,1,2\n", "line 2: it does not have 2 cells"),
        (CSV, HEAD + "a.png\n", "line 2: it does not have 2 cells"),
        (CSV, "file_name,x,x\na.png,1,2\n", "two columns have the same name"),
        (CSV, HEAD + '"a.png,1\n', "line 1: unexpected end of data"),
        (CSV, HEAD.encode() + b"\xff.png,1\n", "'utf-8' codec can't decode"),
        (CSV, HEAD + "a.png," + "9" * 200_000, "field larger than field limit"),
        (JSONL, '{"file_name": "a.png"\n', "line 1: Expecting"),
        (JSONL, "[1]\n", "line 1: not a JSON object"),
        (JSONL, "[" * 100_000, "line 1: maximum recursion depth"),
        (JSONL, jsonl({"label": 1}), "line 1 has no file_name"),
        (JSONL, row("a.png", -1), "line 1: label -1 is negative"),
        (JSONL, row("a.png", [1]), "label in line 1 is"),
        (JSONL, row("a.png", 10**12), "is too large; it must be below 1048576"),
        (
            JSONL,
            row("a.png", 1) + row("b.png", "x"),
            r"some labels are numbers \(1\) and some are names \('x'\)",
        ),
    ],
    ids=range(20),
)
def test_what_would_be_lost_ends_with_a_line(
    name: str, metadata: str | bytes, message: str, tmp_path: Path
) -> None:
    write(tmp_path, "a.png", "b.png")
    with pytest.raises(DatasetError, match=f"{name}: .*{message}.*; "):
        opened(tmp_path, metadata, name)


def test_rows_of_images_that_are_missing_are_named_where_wished(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    rows = "file_name,label\na.png,1\nb.png,0\n"
    source = opened(tmp_path, rows, on_bad_image="skip")
    assert labels(source) == [1]
    missing = "images that a metadata file names but that do not exist"
    assert left_out(source) == {missing: (1, ("b.png",))}


def test_a_metadata_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    with (tmp_path / "metadata.csv").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(
        DatasetError, match=r"metadata.csv: a file of more than .* \(max_file_bytes\)"
    ):
        open_source(str(tmp_path))


@pytest.mark.parametrize("key", ["image_key", "label_key"])
def test_a_key_that_chooses_nothing_in_a_folder_is_refused(key: str, tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    with pytest.raises(DatasetError, match=f"{key} is 'x', but .* leave {key} empty"):
        open_source(str(tmp_path), PackConfig(**{key: "x"}))  # type: ignore[arg-type]
