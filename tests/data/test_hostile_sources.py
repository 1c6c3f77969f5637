"""Malicious images and tars raise one-line errors before memory or time is spent."""

import dataclasses
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.data.packing import packer
from ddpm_ray.data.packing.image_files import FORMATS, SUFFIXES, BadImageError, open_image
from ddpm_ray.data.packing.sources import open_source
from ddpm_ray.data.shards import fetch_shard
from tests.data.test_image_files import bomb, saved
from tests.data.test_sources import png

EVIL = "../../x\x1b[2J\nerror: disk full\u202e"
SPELT = r"../../x\x1b[2J\nerror: disk full\u202e"


def add(archive: tarfile.TarFile, name: str, data: bytes, **changes: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changes.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def tar(tmp_path: Path) -> Callable[[dict[str, bytes]], Path]:
    """Write a tar with members of exactly these names."""

    def make(files: dict[str, bytes], mode: str = "w", name: str = "a.tar") -> Path:
        path = tmp_path / "tars" / name
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
            for name, data in files.items():
                add(archive, name, data)
        return path

    return make


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n"
OTHERS = {
    "eps": POSTSCRIPT,  # Pillow would start Ghostscript
    "pdf": saved(Image.new("L", (4, 4)), "pdf"),
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>',
    "psd": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\4\0\0\0\4\0\10\0\3" + bytes(12),
    "wmf": b"\xd7\xcd\xc6\x9a" + bytes(40),
    "ico": saved(Image.new("RGB", (16, 16)), "ico"),
    "jpeg2000": saved(Image.new("RGB", (4, 4)), "jpeg2000"),
    "pcx": saved(Image.new("RGB", (4, 4)), "pcx"),
    "tga": saved(Image.new("RGB", (4, 4)), "tga"),
    "sgi": saved(Image.new("RGB", (4, 4)), "sgi"),
    "dds": saved(Image.new("RGB", (4, 4)), "dds"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_format_that_is_not_listed_is_not_opened_whatever_its_suffix(kind: str) -> None:
    with pytest.raises(BadImageError, match=r"^a.png: not a readable image \(it is none of PNG"):
        open_image(OTHERS[kind], "a.png", 0, 10**6)


def test_every_suffix_that_is_looked_for_belongs_to_a_listed_format() -> None:
    Image.init()
    assert {Image.EXTENSION[suffix] for suffix in SUFFIXES} == set(FORMATS)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "gif", "tiff", "ppm"])
def test_listed_ones_are_opened(kind: str) -> None:
    assert open_image(saved(Image.new("RGB", (4, 3)), kind), "a", 3, 100).size == (4, 3)


def test_a_bomb_costs_no_memory(tmp_path: Path) -> None:
    """A header that claims 10^12 pixels is refused before decoding."""
    (tmp_path / "a.png").write_bytes(bomb(10**6, 10**6))
    with pytest.raises(BadImageError, match="1000000 x 1000000 pixels, and max_pixels is 64000000"):
        packer.make_plan(str(tmp_path), str(tmp_path / "set"), PackConfig())


def test_a_file_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, options = tmp_path / "images", PackConfig(max_file_bytes=2**20)
    source.mkdir()
    (source / "b.png").write_bytes(png(7))
    with (source / "a.png").open("wb") as huge:
        huge.truncate(2**40)  # no blocks: a terabyte on paper
    with pytest.raises(BadImageError, match=r"a.png: a file of more than 1048576 bytes \(max_file"):
        packer.make_plan(str(source), str(tmp_path / "set"), options)
    plan = packer.make_plan(
        str(source), str(tmp_path / "set"), dataclasses.replace(options, on_bad_image="skip")
    )
    packed = packer.pack_shard(plan, 0)
    assert packed.row is not None
    assert packed.row.samples == 1
    assert "a.png: a file of more than" in packed.skipped[0]


def test_one_inside_a_tar_is_not_decoded(tar: Callable[..., Path]) -> None:
    path = tar({"a.png": bytes(2**21), "b.png": png(1)})
    source = open_source(str(path), PackConfig(max_file_bytes=2**20))
    assert [sample.image is None for sample in source.read(range(2))] == [True, False]


def test_names_are_no_paths_and_are_spelt_out(tar: Callable[..., Path], tmp_path: Path) -> None:
    """Members named ../../x and /etc/x are ordinary samples: tars are never unpacked."""
    before = set(tmp_path.rglob("*"))
    path = tar({f"{EVIL}.png": png(1), "/etc/cron.d/x.png": png(2), "ok.png": b"broken"})
    options = PackConfig(on_bad_image="skip", encoding="png")
    plan = packer.make_plan(str(path), str(tmp_path / "set"), options)
    packed = packer.pack_shard(plan, 0)
    dataset = packer.finish_dataset(plan, [packed])
    assert fetch_shard(dataset, 0).keys.to_pylist() == [EVIL, "etc/cron.d/x"]
    made = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} - set(map(str, before))
    assert made == {
        "tars",
        "tars/a.tar",
        "set",
        "set/index.arrow",
        "set/manifest.json",
        "set/packing.json",
        "set/shard-00000.arrow",
    }
    (line,) = packed.skipped
    assert line.isprintable()


def test_an_error_that_names_one_stays_a_line(tar: Callable[..., Path], tmp_path: Path) -> None:
    path = tar({f"{EVIL}.png": POSTSCRIPT})
    with pytest.raises(BadImageError, match="not a readable image") as refused:
        packer.make_plan(str(path), str(tmp_path / "set"), PackConfig())
    assert SPELT in str(refused.value)
    assert str(refused.value).isprintable()
    path = tar({f"{EVIL}.png": png(1), "b.png": png(1), "b.cls": b"1"}, name="b.tar")
    with pytest.raises(DatasetError, match=r"but .* has none; give every sample") as half:
        open_source(str(path))
    assert str(half.value).isprintable()


def test_a_name_that_is_no_text_is_packed_all_the_same(
    tar: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Path(os.fsdecode(os.fsencode(folder) + b"/a\xff.png")).write_bytes(png(3))
    for place in (str(folder), str(tar({"a\udcff.png": png(3)}))):
        plan = packer.make_plan(place, str(tmp_path / f"set{len(place)}"), PackConfig())
        dataset = packer.finish_dataset(plan, [packer.pack_shard(plan, 0)])
        (key,) = fetch_shard(dataset, 0).keys.to_pylist()
        assert key.removesuffix(".png") == r"a\xff"


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_tar_is_no_tar(mode: str, tar: Callable[..., Path]) -> None:
    """A megabyte could decompress to a terabyte, and offsets refer to the decompressed data."""
    path = tar({"a.png": bytes(10**6)}, mode=mode)
    with pytest.raises(DatasetError, match=r"a.tar: not a readable tar \("):
        open_source(str(path))


def test_a_sparse_member_is_left_alone(tmp_path: Path, tar: Callable[..., Path]) -> None:
    """Its header may claim any size, and reading it would fill that with zeros."""
    path = tar({"b.png": png(1)})
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in ("a.png", "a.cls"):
            info = tarfile.TarInfo(name)
            info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
            header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
            header[386:410] = b"00000000000\0" + b"00000001000\0"  # one run of 512 bytes at 0
            header[483:495] = b"77777777777\0"  # of 8 GiB in all
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            archive.fileobj.write(bytes(header) + bytes(512))
            archive.offset += 1024
        add(archive, "b.png", png(1))
    source = open_source(str(path))
    assert [sample.key for sample in source.read(range(len(source)))] == ["b"]


@pytest.mark.parametrize(
    "name, content, problem",
    [
        (
            "a.cls",
            b"999999999999",
            r"a.cls: label 999999999999 is too large; it must be below 1048576",
        ),
        ("a.cls", b"9" * 5000, "a.cls holds '9{40}', which is not a label"),
        ("a.json", b"[" * 200_000, r"a.json is not JSON \(maximum recursion depth exceeded"),
        (
            "a.json",
            b'{"label": 4294967296}',
            "a.json: label 4294967296 is too large; it must be below",
        ),
        ("a.json", b'{"label": "' + b"x" * 5000 + b'"}', "the label in a.json has 5000 char"),
        ("a.json", b" " * 2**20 + b'{"label": 1}', "a.json has more than 1048576 bytes"),
    ],
    ids=["large", "endless", "deep", "above", "long", "late"],
)
def test_a_label_costs_no_more_than_it_says(
    name: str, content: bytes, problem: str, tar: Callable[..., Path]
) -> None:
    path = tar({"a.png": png(1), name: content})
    with pytest.raises(DatasetError, match=rf"a.tar: .*{problem}"):
        open_source(str(path))


def test_other_kinds_of_members_are_no_files(tmp_path: Path, tar: Callable[..., Path]) -> None:
    """The link's target would be read with the permissions of the packing user."""
    path = tar({})
    with tarfile.open(path, "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            add(archive, f"{kind!r}.png", b"", type=kind, linkname="/etc/passwd")
    with pytest.raises(DatasetError, match="its tars have no image"):
        open_source(str(path))
