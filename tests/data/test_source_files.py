"""Listing of source folders: other files are reported, links are followed without loops."""

import os
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.data.packing.source_files import is_hidden
from ddpm_ray.data.packing.sources import open_source
from ddpm_ray.data.samples import Source
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError
from tests.data.test_sources import png, write_tar


def write(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(1))


def left_out(source: Source) -> dict[str, tuple[int, tuple[str, ...]]]:
    return {group.kind: (group.count, group.examples) for group in source.left_out}


def keys(source: Source) -> list[str]:
    return [sample.key for sample in source.read(range(len(source)))]


STRAY = {
    "hidden or system files": [
        ".DS_Store",
        ".git/a.png",
        "Thumbs.db",
        "__MACOSX/._a.png",
        "cat/.ipynb_checkpoints/1.png",
        "cat/._1.png",
        "cat/@eaDir/1.png/SYNOPHOTO_THUMB_XL.jpg",
        "dog/desktop.ini",
    ],
    "images of unsupported formats (convert them to PNG)": ["cat/1.HEIC", "cat/2.avif"],
    "compressed archives (unpack them)": ["cat.tar.gz", "cat.zip"],
    "other files": ["LICENSE", "cat/notes.txt", "labels.csv"],
}


@pytest.mark.parametrize("remote", [False, True])
def test_every_file_is_a_sample_or_is_named(
    remote: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = f"{request.getfixturevalue('s3')}/stray" if remote else str(tmp_path)
    samples = ["cat/1.png", "cat/2.JFIF", "dog/3.pnm"]
    for name in [*samples, *(name for names in STRAY.values() for name in names)]:
        object_store.write_bytes(object_store.join(root, name), png(1))
    source = open_source(root)
    assert keys(source) == samples
    assert source.label_names == ("cat", "dog")
    reported = left_out(source)
    assert {kind: count for kind, (count, _) in reported.items()} == {
        kind: len(names) for kind, names in STRAY.items()
    }
    # A hidden folder is named by itself, and no list grows without bound.
    assert reported["hidden or system files"][1] == (
        ".DS_Store",
        ".git",
        "Thumbs.db",
        "__MACOSX",
        "cat/._1.png",
    )
    assert reported["other files"][1] == ("LICENSE", "cat/notes.txt", "labels.csv")


def test_a_format_is_known_by_each_suffix_that_pillow_knows(tmp_path: Path) -> None:
    """But for .pfm, whose values are floats."""
    formats = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
    known = Image.registered_extensions()
    names = sorted(f"a{suffix}" for suffix, kind in known.items() if kind in formats)
    write(tmp_path, *names)
    source = open_source(str(tmp_path))
    assert keys(source) == [name for name in names if name != "a.pfm"]
    assert [names for _, names in left_out(source).values()] == [("a.pfm",)]


def test_a_class_folder_that_is_a_link_is_a_class(tmp_path: Path) -> None:
    write(tmp_path / "photos", "dog/1.png", "fox/1.png")
    write(tmp_path / "disk", "cat/1.png", "cat/deep/2.png", "3.png")
    (tmp_path / "photos/cat").symlink_to(tmp_path / "disk/cat")
    (tmp_path / "photos/dog/3.png").symlink_to(tmp_path / "disk/3.png")
    source = open_source(str(tmp_path / "photos"))
    assert source.label_names == ("cat", "dog", "fox")
    assert keys(source) == ["cat/1.png", "cat/deep/2.png", "dog/1.png", "dog/3.png", "fox/1.png"]
    assert source.digest == open_source(str(tmp_path / "photos")).digest


def test_loops_of_links_end_and_an_own_folder_goes_before_a_link_to_it(tmp_path: Path) -> None:
    write(tmp_path, "dog/1.png", "dog/sub/2.png")
    (tmp_path / "a-link").symlink_to(tmp_path / "dog")
    (tmp_path / "dog/up").symlink_to(tmp_path)
    for n in range(40):  # each level twice: 2 ** 40 paths
        level = tmp_path / f"dog/sub/level{n}"
        level.mkdir()
        if n:
            for side in "xy":
                (tmp_path / f"dog/sub/level{n - 1}/{side}").symlink_to(level)
    source = open_source(str(tmp_path))
    assert keys(source) == ["dog/1.png", "dog/sub/2.png"]
    count, examples = left_out(source)["links to folders that are listed already"]
    assert count == 2 + 2 * 39
    assert examples[0] == "a-link"


def test_what_would_block_or_never_end_is_named_and_not_read(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    source = open_source(str(tmp_path))
    assert keys(source) == ["a.png"]
    named = (4, ("gone.png", "pipe.png", "self.png", "zero.png"))
    assert left_out(source) == {"pipes, devices and broken links": named}
    os.mkfifo(tmp_path / "pipe.tar")
    for stray in (tmp_path / "pipe.tar", Path("/dev/zero")):
        with pytest.raises(DatasetError, match=f"{stray}: it is a pipe or a device; give a folder"):
            open_source(str(stray))


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    """Path.rglob skips such a folder, which would lose its images."""
    write(tmp_path, "cat/1.png", "dog/1.png")
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    with (
        mock.patch.object(os, "scandir", refuse),
        pytest.raises(StorageError, match=r"dog: cannot be listed \(Permission denied\)"),
    ):
        open_source(str(tmp_path))


def test_folders_that_give_no_label_are_named(tmp_path: Path) -> None:
    write(tmp_path, "cat/1.png", "cat/siamese/2.png", "dog/3.png", "bird/notes.txt")
    (tmp_path / "ant").mkdir()
    source = open_source(str(tmp_path))
    assert source.label_names == ("cat", "dog")
    reported = left_out(source)
    assert reported["folders without an image, which are not used as classes"] == (
        2,
        ("ant", "bird"),
    )
    below = "names of folders inside the class folders"
    assert reported[below] == (1, ("cat/siamese",))


@pytest.mark.parametrize(
    "names, message",
    [
        (["a.tar", "b.png"], r"it holds images \(b.png\) and tars \(a.tar\).* give the .tar"),
        (["a.parquet", "b.png"], r"it holds images \(b.png\) and tables \(a.parquet\)"),
        (["a.arrow", "b.tar"], r"it holds tars \(b.tar\) and tables \(a.arrow\)"),
        (["train/cat/1.png", "test/cat/1.png"], r"\(test, train\) are splits, .* give one of them"),
        (["index.arrow", "manifest.json"], "it is already a packed data set; train on it"),
        (["a.tar.gz"], r"it has no image \(it holds compressed archives .*a.tar.gz"),
    ],
    ids=["tar", "table", "tables", "splits", "packed", "compressed"],
)
def test_two_kinds_in_one_folder_are_ambiguous(
    names: list[str], message: str, tmp_path: Path
) -> None:
    for name in names:
        if name.endswith(".tar"):
            write_tar(tmp_path / name, {"a.png": png(1)})
        else:
            write(tmp_path, name)
    with pytest.raises(DatasetError, match=message):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    "name, message",
    [
        ("a.tar.gz", r"a.tar.gz: it is compressed; unpack it first"),
        ("a.png", r"a.png: it is a single image; give a folder"),
        ("a.csv", r"a.csv: it is a file of an unknown type; give a folder"),
    ],
)
def test_a_file_that_is_no_source_says_what_to_give(
    name: str, message: str, tmp_path: Path
) -> None:
    write(tmp_path, name)
    with pytest.raises(DatasetError, match=message):
        open_source(str(tmp_path / name))


def test_class_folders_that_are_whole_numbers_are_ordered_as_numbers(tmp_path: Path) -> None:
    write(tmp_path / "numbers", *(f"{n}/0.png" for n in range(1, 13)))
    assert open_source(str(tmp_path / "numbers")).label_names == tuple(map(str, range(1, 13)))
    write(tmp_path / "mixed", "1/0.png", "10/0.png", "2/0.png", "two/0.png")
    assert open_source(str(tmp_path / "mixed")).label_names == ("1", "10", "2", "two")
    write(tmp_path / "padded", "01/0.png", "1/0.png", "002/0.png")
    assert open_source(str(tmp_path / "padded")).label_names == ("01", "1", "002")


def test_the_version_shows_a_file_that_was_written_anew_and_the_digest_does_not(
    tmp_path: Path,
) -> None:
    write(tmp_path, "a.png")
    before = open_source(str(tmp_path), PackConfig())
    os.utime(tmp_path / "a.png", ns=(1, 1))
    after = open_source(str(tmp_path), PackConfig())
    assert after.digest == before.digest
    assert after.version != before.version


def test_names_of_systems_are_known_in_any_case() -> None:
    assert all(map(is_hidden, (".x", "THUMBS.DB", "Desktop.ini", "lost+found", "__MACOSX")))
    assert not any(map(is_hidden, ("a.png", "thumbs.png", "_x", "macosx")))
