"""WebDataset tars: every member is packed, listed or an error; damage raises an error."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.dataset import DatasetError
from ddpm_ray.data.packing.sources import open_source
from ddpm_ray.data.samples import Source
from tests.data.test_source_files import keys, left_out
from tests.data.test_sources import png, write_tar
from tests.limits import ENDS_S


def labels(source: Source) -> list[int]:
    return [sample.label for sample in source.read(range(len(source)))]


def opened(path: Path, files: dict[str, bytes], **options: str) -> Source:
    write_tar(path / "a.tar", files)
    return open_source(str(path / "a.tar"), PackConfig(**options))  # type: ignore[arg-type]


def test_what_is_no_image_and_no_label_is_named(tmp_path: Path) -> None:
    source = opened(
        tmp_path,
        {
            "a.png": png(1),
            "a.cls": b"1",
            "a.text": b"a note",
            "a.json": b'{"url": 1, "w": 2}',
            "b.png": png(1),
            "b.cls": b"0",
            "b.text": b"another",
            "b.npy": b"x",
            "c.heic": b"x",
            "c.cls": b"0",
            "._a.png": png(1),
            "README": b"x",
        },
    )
    assert (keys(source), labels(source)) == (["a", "b"], [1, 0])
    assert left_out(source) == {
        ".text files in tars": (2, ("a.text", "b.text")),
        ".npy files in tars": (1, ("b.npy",)),
        ".heic files in tars": (1, ("c.heic",)),
        "files in tars without a suffix": (1, ("README",)),
        "hidden or system files": (1, ("._a.png",)),
        "samples of tars without an image": (1, ("c",)),
        "keys of .json files not supported in shards": (2, ("url", "w")),
    }


def test_links_devices_and_sparse_members_are_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"{int(kind)}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("folder")
        info.type = tarfile.DIRTYPE
        archive.addfile(info)
        info = tarfile.TarInfo("a.png")
        info.size = len(png(1))
        archive.addfile(info, io.BytesIO(png(1)))
    source = open_source(str(tmp_path))
    assert keys(source) == ["a"]
    named = (4, ("1.png", "2.png", "3.png", "6.png"))
    assert left_out(source) == {"links, devices and sparse files in tars": named}


NAMES = {f"frame.{n:04d}.png": png(n) for n in range(6)}
PAIRS = {"x.left.png": png(1), "x.right.png": png(2), "y.left.png": png(3), "y.right.png": png(4)}


@pytest.mark.parametrize(
    "files, message",
    [
        (
            NAMES,
            r"sample 'frame' has 6 images \(frame.0000.png, .*\), because a sample.s name ends at",
        ),
        (PAIRS, r"sample 'x' has 2 images .* choose one, as in image_key=left.png"),
        ({"a.png": png(1), "a.cls": b"1", "a.json": b'{"label": 2}'}, "a.cls has label 1, but"),
        ({"a.png": png(1), "a.json": b'{"label": 1.5}'}, "the label in a.json is 1.5; it must"),
        ({"a.png": png(1), "a.json": b'{"label": true}'}, "the label in a.json is True; it must"),
        ({"a.png": png(1), "a.json": b'{"label": '}, "a.json is not JSON"),
        (
            {"a.png": png(1), "a.cls": b"1", "b.png": png(1), "b.json": b'{"label": "x"}'},
            r"some labels are numbers \(1\) and some are names \('x'\)",
        ),
        (
            {"a.heic": b"x"},
            r"its tars have no image \(they hold .heic files in tars: 1 \(a.heic\)\)",
        ),
    ],
    ids=["dots", "pairs", "contradiction", "float", "bool", "json", "mixed", "none"],
)
def test_what_would_be_lost_ends_with_a_line(
    files: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match=message):
        opened(tmp_path, files)


def test_one_of_several_images_is_chosen_by_its_suffix(tmp_path: Path) -> None:
    source = opened(tmp_path, PAIRS, image_key="right.png")
    assert [sample.image for sample in source.read(range(2))] == [png(2), png(4)]
    further = "further images of samples, not chosen by image_key"
    assert left_out(source) == {further: (2, ("x.left.png", "y.left.png"))}


def test_a_sample_without_the_chosen_image_is_named(tmp_path: Path) -> None:
    files = PAIRS | {"z.left.png": png(5)}
    source = opened(tmp_path, files, image_key="right.png")
    assert keys(source) == ["x", "y"]
    (named,) = left_out(source).values()
    assert named == (3, ("x.left.png", "y.left.png", "z.left.png"))
    with pytest.raises(DatasetError, match=r"no image .* not chosen by image_key: 5 \(x.left.png"):
        opened(tmp_path, files, image_key="middle.png")


def test_a_label_key_that_no_json_file_has_is_refused(tmp_path: Path) -> None:
    files = {"a.png": png(1), "a.json": b'{"label": 1}'}
    with pytest.raises(DatasetError, match=r"no .json file has a value in 'lable' \(label_key\)"):
        opened(tmp_path, files, label_key="lable")


def test_labels_that_are_names_are_classes_in_order(tmp_path: Path) -> None:
    files = {f"{n}.png": png(1) for n in range(3)}
    for n, name in enumerate(("dog", "ant", "dog")):
        files[f"{n}.json"] = f'{{"label": "x", "kind": "{name}"}}'.encode()
    source = opened(tmp_path, files, label_key="kind")
    assert (source.label_names, labels(source)) == (("ant", "dog"), [1, 0, 1])


def test_a_file_that_is_in_a_tar_twice_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.png": png(1)})
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        info = tarfile.TarInfo("a.png")
        info.size = len(png(2))
        archive.addfile(info, io.BytesIO(png(2)))
    with pytest.raises(DatasetError, match=r"a.tar: it holds a.png twice; remove one of"):
        open_source(str(tmp_path))


def test_tars_of_two_splits_are_not_mixed(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    for name in ("train-000.tar", "train-001.tar", "val-000.tar"):
        write_tar(tmp_path / name, {"a.png": png(1)})
    with pytest.raises(
        DatasetError, match="its tars belong to the splits train, val; give one file"
    ):
        open_source(str(tmp_path))
    (tmp_path / "val-000.tar").unlink()
    assert len(open_source(str(tmp_path))) == 2
    write_tar(tmp_path / "one/train_val.tar", {"a.png": png(1)})
    assert len(open_source(str(tmp_path / "one"))) == 1


def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path: Path) -> None:
    """tarfile stops there silently, with one of three samples (cpython issue 120740)."""
    write_tar(tmp_path / "a.tar", {f"{n}.png": png(n) for n in range(3)})
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[1024 + 150] ^= 1  # the checksum of the second header
    (tmp_path / "a.tar").write_bytes(data)
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert len(archive.getnames()) == 1
    with pytest.raises(DatasetError, match=r"not a readable tar \(its header at byte 1024 is dam"):
        open_source(str(tmp_path))


def test_tars_that_were_joined_are_not_read_by_half(tmp_path: Path) -> None:
    for name in "ab":
        write_tar(tmp_path / f"{name}.tar", {f"{name}.png": png(1)})
    whole = b"".join((tmp_path / f"{name}.tar").read_bytes() for name in "ab")
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined/c.tar").write_bytes(whole)
    with pytest.raises(DatasetError, match=r"it ends at byte 1024, but data follows at byte 10240"):
        open_source(str(tmp_path / "joined"))


def test_a_cut_tar_is_an_error_or_whole(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {f"{n}.png": png(n) for n in range(3)})
    data = (tmp_path / "a.tar").read_bytes()
    for end in range(0, len(data), 128):
        (tmp_path / "a.tar").write_bytes(data[:end])
        try:
            found = keys(open_source(str(tmp_path)))
        except DatasetError:
            # Without its two empty blocks it may be whole: some writers leave them away.
            assert end < 3 * 1024
        else:
            assert found == ["0", "1", "2"] or (end % 1024 == 0 and len(found) == end // 1024)


NEGATIVE = """
import io
from ddpm_ray.data.packing.tar_members import members

def refused(data):
    try:
        print(len(list(members(io.BytesIO(data), "a.tar"))))
    except Exception as error:
        print(type(error).__name__)

def header(name, size, kind):
    h = bytearray(512)
    h[0:len(name)] = name
    h[100:124] = (b"0" * 7 + b"\\0") * 3
    h[124:136], h[136:148] = size, b"0" * 11 + b"\\0"
    h[148:156], h[156:157], h[257:265] = b" " * 8, kind, b"ustar\\x0000"
    h[148:156] = b"%06o\\0 " % sum(h)
    return bytes(h)

def pax(text):
    body = b"%d size=%s\\n" % (len(text) + 9, text)
    body = b"%d size=%s\\n" % (len(body), text)
    return header(b"x", b"%011o\\0" % len(body), b"x") + body.ljust(512, b"\\0")

first = header(b"a.png", b"00000001000\\0", b"0") + b"x" * 512
sizes = [b"\\xff" + (256**11 - n).to_bytes(11, "big") for n in (512, 1024, 10**9)]
for kind in (b"0", b"7", b"L", b"K", b"x", b"g", b"S", b"5", b"2", b"Z"):
    for size in sizes:
        refused(first + header(b"b.png", size, kind) + bytes(1024))
for text in (b"-512", b"-1024", b"-99999999"):
    refused(first + pax(text) + header(b"b.png", b"00000001000\\0", b"0") + bytes(2048))
"""


def test_a_member_of_negative_size_is_no_endless_loop() -> None:
    """CVE-2025-8194, for each member type and in a pax header; fixed in Python 3.11.14."""
    command = [sys.executable, "-c", NEGATIVE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ENDS_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DatasetError"] * 33
