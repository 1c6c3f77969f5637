"""Sources and the order of their samples, in formats written by the standard library."""

import dataclasses
import gzip
import hashlib
import io
import json
import struct
import sys
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.data.packing import builtin_datasets
from ddpm_ray.data.packing.sources import open_source
from ddpm_ray.data.samples import Source
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "png")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def listed(source: Source) -> list[tuple[str, int, bytes]]:
    samples = source.read(range(len(source)))
    return [(s.key, s.label, s.image) for s in samples if isinstance(s.image, bytes)]


def test_digits_are_the_scans_of_scikit_learn_in_the_full_range() -> None:
    source = open_source("digits")
    images = np.stack([np.asarray(s.image) for s in source.read(range(1797))])
    assert len(source) == 1797
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8
    assert np.unique(images).tolist() == [round(level * 255 / 16) for level in range(17)]
    labels = [s.label for s in source.read(range(10))]
    assert labels == list(range(10))  # the bundled set begins with 0 to 9
    assert source.label_names == tuple("0123456789")


def test_digits_without_scikit_learn_say_what_to_install() -> None:
    with (
        mock.patch.dict(sys.modules, {"sklearn.datasets": None}),
        pytest.raises(DatasetError, match=r"digits: .*pip install 'ddpm-ray\[digits\]'"),
    ):
        open_source("digits")


@pytest.mark.parametrize("remote", [False, True])
def test_a_folder_with_a_class_per_sub_folder(
    remote: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = f"{request.getfixturevalue('s3')}/classes" if remote else str(tmp_path)
    files = {"dog/2.png": 2, "cat/b/1.PNG": 1, "dog/10.png": 3, "ant/0.jpeg": 0}
    for name, value in files.items():
        object_store.write_bytes(object_store.join(root, name), png(value))
    object_store.write_bytes(object_store.join(root, "dog/notes.txt"), b"no image")
    source = open_source(root)
    assert source.label_names == ("ant", "cat", "dog")
    expected = [
        ("ant/0.jpeg", 0, 0),
        ("cat/b/1.PNG", 1, 1),
        ("dog/10.png", 2, 3),
        ("dog/2.png", 2, 2),
    ]
    assert listed(source) == [(key, label, png(value)) for key, label, value in expected]
    assert [s.key for s in source.read(range(1, 3))] == ["cat/b/1.PNG", "dog/10.png"]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for n in (2, 0, 1):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    source = open_source(str(tmp_path))
    assert source.label_names == ()
    assert listed(source) == [(f"{n}.png", -1, png(n)) for n in range(3)]


def test_webdataset_tars_in_the_order_of_their_names(tmp_path: Path) -> None:
    second = {"z.png": png(0), "z.cls": b"1\n", "d/a.b.png": png(1), "d/a.json": b'{"label": 2}'}
    write_tar(tmp_path / "00001.tar", second | {"d/a.txt": b"a caption"})
    write_tar(tmp_path / "00000.tar", {"y.cls": b"0", "y.jpg": png(3)})
    source = open_source(str(tmp_path))
    assert listed(source) == [("y", 0, png(3)), ("d/a", 2, png(1)), ("z", 1, png(0))]
    assert source.label_names == ("0", "1", "2")
    assert len(open_source(str(tmp_path / "00001.tar"))) == 2


def test_the_digest_differs_between_sources(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    first = open_source(str(tmp_path)).digest
    assert open_source(str(tmp_path)).digest == first
    (tmp_path / "1.png").write_bytes(png(0))
    assert open_source(str(tmp_path)).digest != first


def idx(values: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> bytes:
    head = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(
        f">{values.ndim}I", *values.shape
    )
    return gzip.compress(head + values.tobytes())


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("name, first_label", [("mnist", "0"), ("fashion-mnist", "t-shirt")])
def test_idx_files_from_a_folder(name: str, first_label: str, tmp_path: Path) -> None:
    pixels = np.arange(3 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(3, 28, 28)
    images, labels = idx(pixels), idx(np.array([7, 0, 9], np.uint8))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(images)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(labels)
    source = open_source(
        name, PackConfig(split="test", url=str(tmp_path), sha256=f"{sha(images)}, {sha(labels)}")
    )
    samples = list(source.read(range(3)))
    assert np.array_equal(np.stack([np.asarray(s.image) for s in samples])[..., 0], pixels)
    assert [s.label for s in samples] == [7, 0, 9]
    assert source.label_names[0] == first_label
    assert len(source.label_names) == 10


def test_the_binary_cifar10_archive(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
    records = [bytes([n]) + pixels[n].tobytes() for n in range(10)]
    files = {
        f"cifar-10-batches-bin/data_batch_{n + 1}.bin": b"".join(records[2 * n : 2 * n + 2])
        for n in range(5)
    }
    write_tar(tmp_path / "cifar-10-binary.tar.gz", files)
    path = tmp_path / "cifar-10-binary.tar.gz"
    options = PackConfig(url=str(path), sha256=sha(path.read_bytes()))
    source = open_source("cifar10", options)
    images = np.stack([np.asarray(s.image) for s in source.read(range(10))])
    assert np.array_equal(images, pixels.transpose(0, 2, 3, 1))
    assert source.label_names[7] == "horse"
    with pytest.raises(DatasetError, match=r"not the binary archive of CIFAR-10 .*test_batch"):
        open_source("cifar10", dataclasses.replace(options, split="test"))


def test_the_published_hash_is_asked_for_wherever_the_files_come_from(tmp_path: Path) -> None:
    for kind in ("images-idx3", "labels-idx1"):
        (tmp_path / f"train-{kind}-ubyte.gz").write_bytes(b"not it")
    with pytest.raises(StorageError, match=r"train-images.* expected 440fcabf73cc546f"):
        open_source("mnist", PackConfig(url=str(tmp_path)))
    assert all(len(h) == 64 for hashes in builtin_datasets.SHA256.values() for h in hashes)


def broken(folder: Path, how: str) -> str:
    match how:
        case "empty":
            (folder / "readme.txt").write_text("no images")
        case "mixed":
            (folder / "cat").mkdir()
            (folder / "cat/1.png").write_bytes(png(1))
            (folder / "2.png").write_bytes(png(1))
        case "half labelled":
            write_tar(folder / "a.tar", {"a.png": png(0), "a.cls": b"1", "b.png": png(0)})
        case "negative":
            write_tar(folder / "a.tar", {"a.png": png(0), "a.cls": b"-1"})
        case "words":
            write_tar(
                folder / "a.tar",
                {"a.png": png(0), "a.json": json.dumps([1]).encode(), "a.cls": b"x"},
            )
        case "empty tar":
            write_tar(folder / "a.tar", {"a.txt": b"a"})
        case "no tar":
            (folder / "a.tar").write_bytes(b"\x01" * 2000)
        case "nowhere":
            return str(folder / "nowhere")
    return str(folder)


@pytest.mark.parametrize(
    "how, message",
    [
        ("empty", r"it has no image \(it holds other files: 1 \(readme.txt\)\); give a folder"),
        ("mixed", r"it has both images \(2.png\) and sub-folders \(cat\); put each image"),
        ("half labelled", r"some samples have a label, but b has none; give every sample"),
        ("negative", r"a.tar: a.cls: label -1 is negative; write a whole number"),
        ("words", r"a.tar: a.cls holds 'x', which is not a label; write a whole number"),
        ("empty tar", r"its tars have no image"),
        ("no tar", r"a.tar: not a readable tar"),
        ("nowhere", r"nowhere: there is no such file or folder; give a folder .* digits, mnist"),
    ],
)
def test_a_source_that_cannot_be_packed_says_why(how: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=message):
        open_source(broken(tmp_path, how))
