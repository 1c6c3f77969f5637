"""Packing: equal bytes from any tasks, resumable, and no manifest before all shards exist."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.dataset import Dataset, DatasetError, open_dataset
from ddpm_ray.data.loader import read_images
from ddpm_ray.data.packing import pack_report, packer
from ddpm_ray.data.packing.image_files import BadImageError
from ddpm_ray.data.packing.pack_report import PackReport
from ddpm_ray.data.samples import NamedGroup
from ddpm_ray.data.shards import fetch_shard
from ddpm_ray.storage import checksummed_json, object_store
from ddpm_ray.storage.errors import StorageError
from tests.limits import ENDS_S


def pack(source: str, destination: Path, **options: object) -> Dataset:
    plan = packer.make_plan(source, str(destination), PackConfig(**options))  # type: ignore[arg-type]
    return packer.finish_dataset(plan, [packer.pack_shard(plan, n) for n in range(plan.shards)])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven noisy colour images of 12 x 9 pixels, in two classes."""
    folder = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for n in range(7):
        path = folder / ("even" if n % 2 == 0 else "odd") / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(path)
    return folder


def test_the_digits_are_one_shard_with_known_pixels(tmp_path: Path) -> None:
    dataset = pack("digits", tmp_path / "digits")
    assert (dataset.manifest.samples, dataset.manifest.shards) == (1797, 1)
    assert sorted(files(tmp_path / "digits")) == [
        "index.arrow",
        "manifest.json",
        "packing.json",
        "shard-00000.arrow",
    ]
    assert not (tmp_path / "digits/parts").exists()
    images = fetch_shard(open_dataset(dataset.url), 0).images
    assert np.asarray(images)[0, :, :, 0].tolist()[0] == [0, 0, 80, 207, 143, 16, 0, 0]


def test_the_order_of_the_tasks_does_not_matter(pictures: Path, tmp_path: Path) -> None:
    first = pack(str(pictures), tmp_path / "a", shard_bytes=2 * 12 * 9 * 3)
    plan = packer.make_plan(
        str(pictures), str(tmp_path / "b"), PackConfig(shard_bytes=2 * 12 * 9 * 3)
    )
    assert plan.shards == 4
    second = packer.finish_dataset(plan, [packer.pack_shard(plan, n) for n in (3, 0, 2, 1)])
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert first.fingerprint == second.fingerprint


def test_a_killed_packer_goes_on_where_it_was(pictures: Path, tmp_path: Path) -> None:
    whole = pack(str(pictures), tmp_path / "whole", shard_bytes=700)
    plan = packer.make_plan(str(pictures), str(tmp_path / "set"), PackConfig(shard_bytes=700))
    for n in (0, 2):
        packer.pack_shard(plan, n)
    with pytest.raises(DatasetError, match=r"no manifest\.json"):
        open_dataset(plan.destination)
    with mock.patch.object(object_store, "write_bytes", wraps=object_store.write_bytes) as write:
        again = packer.make_plan(str(pictures), plan.destination, PackConfig(shard_bytes=700))
        done = [packer.pack_shard(again, n) for n in range(again.shards)]
        written = sorted(Path(call.args[0]).name for call in write.call_args_list)
    missing = [f"shard-0000{n}.arrow" for n in (1, 3)]
    assert written == sorted([*missing, *(f"{name}.json" for name in missing)])
    assert packer.finish_dataset(again, done).fingerprint == whole.fingerprint
    assert files(tmp_path / "set") == files(tmp_path / "whole")


def test_parts_of_another_source_are_not_used(pictures: Path, tmp_path: Path) -> None:
    plan = packer.make_plan("digits", str(tmp_path / "set"), PackConfig())
    packer.pack_shard(plan, 0)
    dataset = pack(str(pictures), tmp_path / "set")
    assert dataset.manifest.image_shape == (9, 12, 3)
    assert fetch_shard(dataset, 0).keys.to_pylist()[0] == "even/0.png"


def test_a_finished_set_is_found_and_another_is_not_overwritten(
    pictures: Path, tmp_path: Path
) -> None:
    dataset = pack(str(pictures), tmp_path / "set")
    before = files(tmp_path / "set")
    found = packer.find_finished(packer.make_plan(str(pictures), dataset.url, PackConfig()))
    assert found is not None
    assert found.fingerprint == dataset.fingerprint
    with pytest.raises(
        DatasetError, match=r"already here \(image_shape, label_names, .* differ\); delete it, or"
    ):
        packer.find_finished(packer.make_plan("digits", dataset.url, PackConfig()))
    assert files(tmp_path / "set") == before


@pytest.mark.parametrize("encoding", ["png", "webp"])
def test_lossless_encodings_keep_every_pixel(encoding: str, pictures: Path, tmp_path: Path) -> None:
    raw, small = (
        pack(str(pictures), tmp_path / "a"),
        pack(str(pictures), tmp_path / "b", encoding=encoding),
    )
    (first,), (second,) = read_images(raw, [0]), read_images(small, [0])
    assert (first.images == second.images).all()
    assert raw.manifest.pixel_mean == small.manifest.pixel_mean
    assert small.manifest.encoding == encoding


def test_jpeg_sums_are_those_of_what_a_reader_sees(pictures: Path, tmp_path: Path) -> None:
    dataset = pack(str(pictures), tmp_path / "set", encoding="jpeg")
    (batch,) = read_images(dataset, [0])
    mean = batch.images.double().mean(dim=(0, 1, 2)).tolist()
    assert dataset.manifest.pixel_mean == pytest.approx(mean, rel=1e-12)


def test_channels_and_size_are_as_asked_for(pictures: Path, tmp_path: Path) -> None:
    options = {"channels": 1, "resize": "centre-crop-box-bicubic", "image_size": 4}
    dataset = pack(str(pictures), tmp_path / "grey", **options)
    assert dataset.manifest.image_shape == (4, 4, 1)
    assert dataset.manifest.resize == "centre-crop-box-bicubic"
    assert dataset.manifest.label_names == ("even", "odd")
    assert pack("digits", tmp_path / "rgb", channels=3).manifest.image_shape == (8, 8, 3)


@pytest.mark.parametrize(
    "config, problem",
    [
        (PackConfig(image_size=8), "image_size is 8 and resize 'none'; a size needs a recipe"),
        (PackConfig(image_width=8), "image_width is 8 and resize 'none'; only a centre crop has"),
        (
            PackConfig(image_size=8, image_width=8, resize="shorter-side-box-bicubic"),
            "image_width is 8 and resize 'shorter-side-box-bicubic'; only a centre crop has",
        ),
    ],
)
def test_a_size_without_a_recipe_for_it_is_refused(config: PackConfig, problem: str) -> None:
    (line,) = config.problems()
    assert line.startswith(problem)


def test_packed_images_need_not_be_square(pictures: Path, tmp_path: Path) -> None:
    """The pictures are 12 x 9, 4 : 3."""
    whole = pack(str(pictures), tmp_path / "a", resize="shorter-side-box-bicubic", image_size=6)
    assert whole.manifest.image_shape == (6, 8, 3)
    crop = pack(
        str(pictures), tmp_path / "b", resize="centre-crop-box-bicubic", image_size=8, image_width=4
    )
    assert crop.manifest.image_shape == (8, 4, 3)
    (batch,) = read_images(crop, [0])
    assert batch.images.shape == (7, 8, 4, 3)


def test_images_of_other_sizes_are_named_with_the_remedy(pictures: Path, tmp_path: Path) -> None:
    Image.new("RGB", (7, 9)).save(pictures / "odd/9.png")
    with pytest.raises(
        BadImageError,
        match=r"odd/9.png: 7 x 9 pixels, and the first image has 12 x 9; give resize=centre",
    ):
        pack(str(pictures), tmp_path / "set")
    assert not (tmp_path / "set/manifest.json").exists()


def test_bad_images_are_skipped_and_counted_where_wished(pictures: Path, tmp_path: Path) -> None:
    (pictures / "even/0.png").write_bytes(b"broken")  # the first one, too
    (pictures / "odd/3.png").write_bytes(b"broken")
    options = PackConfig(shard_bytes=1, on_bad_image="skip")  # an image to a shard
    plan = packer.make_plan(str(pictures), str(tmp_path / "set"), options)
    done = [packer.pack_shard(plan, n) for n in range(plan.shards)]
    dataset = packer.finish_dataset(plan, done)
    assert dataset.manifest.samples == dataset.manifest.shards == 5
    assert [len(shard.skipped) for shard in done] == [1, 0, 0, 0, 0, 1, 0]
    assert "even/0.png: not a readable image" in done[0].skipped[0]
    keys = [fetch_shard(dataset, n).keys.to_pylist()[0] for n in range(5)]
    assert keys == ["even/2.png", "even/4.png", "even/6.png", "odd/1.png", "odd/5.png"]


def test_nothing_but_bad_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(DatasetError, match=rf"^{tmp_path}.*: none of its images can be packed"):
        packer.make_plan(str(tmp_path), "x", PackConfig(on_bad_image="skip"))


def test_a_full_disk_leaves_no_manifest_and_can_be_gone_on_from(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, left = os.fsync, iter([None] * 4)

    def fsync(file: int) -> None:
        if next(left, "full") == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StorageError, match=r"shard-0000.* the disk is full; free some space"):
            pack(str(pictures), tmp_path / "set", shard_bytes=700)
    assert not (tmp_path / "set/manifest.json").exists()
    dataset = pack(str(pictures), tmp_path / "set", shard_bytes=700)
    assert dataset.manifest.samples == 7


def test_real_emoji_keep_their_shape_on_white(assets: Path, tmp_path: Path) -> None:
    """128 x 128 RGBA drawings: transparent corners become white."""
    with np.load(assets / "noto_emoji_128_png.npz", allow_pickle=False) as emoji:
        for n in range(5):
            data = emoji["data"][emoji["offsets"][n] : emoji["offsets"][n + 1]]
            (tmp_path / f"{n}.png").write_bytes(data.tobytes())
    options = {"resize": "centre-crop-box-bicubic", "image_size": 64}
    (batch,) = read_images(pack(str(tmp_path), tmp_path / "set", **options), [0])
    assert batch.images.shape == (5, 64, 64, 3)
    assert (batch.images[:, 0, 0] == 255).all()
    assert batch.labels.tolist() == [-1] * 5


def test_colours_are_not_lost_because_the_first_image_is_grey(
    pictures: Path, tmp_path: Path
) -> None:
    Image.new("L", (12, 9), 100).save(pictures / "even/0.png")
    message = r"even/2.png: a colour image, and the first image is grey; give channels=3 to keep"
    for policy in ("stop", "skip"):
        with pytest.raises(DatasetError, match=message):
            pack(str(pictures), tmp_path / "set", on_bad_image=policy)
    assert pack(str(pictures), tmp_path / "rgb", channels=3).manifest.image_shape == (9, 12, 3)
    assert pack(str(pictures), tmp_path / "grey", channels=1).manifest.image_shape == (9, 12, 1)


def test_grey_pixels_are_the_same_however_they_were_stored(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    (tmp_path / "in").mkdir()
    for n, mode in enumerate(("L", "RGB", "P", "LA", "RGBA")):
        Image.fromarray(ramp).convert(mode).save(tmp_path / f"in/{n}.png")
    dataset = pack(str(tmp_path / "in"), tmp_path / "set")
    (batch,) = read_images(dataset, [0])
    assert dataset.manifest.image_shape == (16, 16, 1)
    assert (batch.images[..., 0].numpy() == ramp).all()


def report_of(dataset: Dataset) -> PackReport:
    record = pack_report.read_record(dataset)
    assert record is not None
    return record.report


def test_every_image_is_counted_as_packed_skipped_changed_or_left_out(
    pictures: Path, tmp_path: Path
) -> None:
    (pictures / "even/0.png").write_bytes(b"broken")
    Image.new("RGBA", (12, 9), (0, 0, 0, 9)).save(pictures / "odd/1.png")
    Image.new("RGBA", (12, 9), (0, 0, 0, 9)).save(pictures / "odd/9.png")
    (pictures / "odd/notes.txt").write_text("a note")
    dataset = pack(str(pictures), tmp_path / "set", shard_bytes=700, on_bad_image="skip")
    report = report_of(dataset)
    assert (report.skipped, report.class_samples) == (1, (3, 4))
    (line,) = report.skipped_files
    assert "even/0.png: not a readable image (it is none of" in line
    assert line.endswith("; repair it or delete it")
    with pytest.raises(BadImageError, match=r"; repair it or delete it, or use on_bad_image=skip$"):
        pack(str(pictures), tmp_path / "stopped")
    assert report.left_out == (NamedGroup("other files", 1, ("odd/notes.txt",)),)
    on_white = NamedGroup("transparent pixels composited on white", 2, ("odd/1.png", "odd/9.png"))
    assert report.changed == (on_white,)
    reported = pack_report.job_result(dataset, report)
    assert (reported["classes"], reported["channels"], reported["samples"]) == (
        ["even", "odd"],
        3,
        7,
    )
    assert json.loads(json.dumps(reported))["changed"][0]["count"] == 2
    assert list(pack_report.lines(dataset, report))[1:] == [
        "not packed: other files: 1 (odd/notes.txt)",
        "changed: transparent pixels composited on white: 2 (odd/1.png, odd/9.png)",
        "packed: 7 samples, 1 skipped, 12 x 9 pixels, 3 channels (RGB)",
        "classes: 0 = even (3 samples), 1 = odd (4)",
    ]


def test_a_thousand_skipped_files_are_counted_and_some_are_named(tmp_path: Path) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "9999.png")
    for n in range(1003):
        (tmp_path / f"{n:04d}.png").write_bytes(b"")
    dataset = pack(str(tmp_path), tmp_path / "set", on_bad_image="skip")
    report = report_of(dataset)
    assert (report.skipped, len(report.skipped_files)) == (1003, 1000)
    lines = list(pack_report.lines(dataset, report))
    assert len(lines) == 10 + 3
    assert lines[10] == "skipped: 1003 files in total; packing.json lists 1000 of them"


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"on_bad_image": "skip"}, "packed with on_bad_image='stop', now 'skip'"),
        ({"max_pixels": 999}, "packed with max_pixels=64000000, now 999"),
        ({"max_file_bytes": 9999}, "packed with max_file_bytes=268435456, now 9999"),
        ({"shard_bytes": 700}, "packed with shard_samples=103563, now 2"),
        ({"encoding": "png"}, "encoding differ"),
        ({"channels": 1}, "image_shape differ"),
    ],
)
def test_a_set_of_other_options_is_not_taken_as_done(
    changed: dict[str, object], message: str, pictures: Path, tmp_path: Path
) -> None:
    dataset = pack(str(pictures), tmp_path / "set")
    before = files(tmp_path / "set")
    options = PackConfig(**changed)  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match=rf"already here \({message}\); delete it, or choose"):
        packer.find_finished(packer.make_plan(str(pictures), dataset.url, options))
    assert files(tmp_path / "set") == before


def test_a_source_that_was_edited_is_not_taken_as_done_and_one_that_was_copied_is(
    pictures: Path, tmp_path: Path
) -> None:
    """The edited files have the same names and sizes; only dates and contents differ."""
    for path in pictures.rglob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    dataset = pack(str(pictures), tmp_path / "set", shard_bytes=700)
    for path in pictures.rglob("*.bmp"):
        os.utime(path, ns=(1, 1))
    found = packer.find_finished(
        packer.make_plan(str(pictures), dataset.url, PackConfig(shard_bytes=700))
    )
    assert found is not None
    edited = pictures / "odd/5.bmp"
    edited.write_bytes(edited.read_bytes()[:-1] + b"\0")
    plan = packer.make_plan(str(pictures), dataset.url, PackConfig(shard_bytes=700))
    assert plan.recipe == dataset.recipe
    with pytest.raises(
        DatasetError, match=r"already here \(the source's files differ\); delete it"
    ):
        packer.find_finished(plan)


def test_shards_of_a_source_that_was_edited_meanwhile_are_packed_again(
    pictures: Path, tmp_path: Path
) -> None:
    options = PackConfig(shard_bytes=700)
    first = pictures / "even/0.png"
    Image.open(first).save(first, "bmp")
    plan = packer.make_plan(str(pictures), str(tmp_path / "set"), options)
    packer.pack_shard(plan, 0)
    first.write_bytes(first.read_bytes()[:-1] + b"\7")
    os.utime(first, ns=(1, 1))
    pack(str(pictures), tmp_path / "whole", shard_bytes=700)
    pack(str(pictures), tmp_path / "set", shard_bytes=700)
    assert files(tmp_path / "set") == files(tmp_path / "whole")


def test_a_set_of_an_earlier_version_is_found_and_has_no_report(
    pictures: Path, tmp_path: Path
) -> None:
    """Commit c58b265 wrote this fingerprint for these pixels and no packing.json."""
    dataset = pack("digits", tmp_path / "digits")
    assert dataset.fingerprint == "89d7628e765bb622e3d4e4753904f8eb966ef511fd60335451c3dbdefb60feb0"
    (tmp_path / "digits/packing.json").unlink()
    found = packer.find_finished(packer.make_plan("digits", dataset.url, PackConfig(max_pixels=99)))
    assert found is not None
    assert found.fingerprint == dataset.fingerprint
    assert pack_report.read_record(found) is None
    reported = pack_report.job_result(found, None)
    assert (reported["samples"], reported["skipped"]) == (1797, None)
    first, *_ = pack_report.lines(found, None)
    assert first.startswith("packed by an earlier version, which stored no report")


def test_a_record_of_another_set_or_none_at_all_is_no_record(tmp_path: Path) -> None:
    dataset = pack("digits", tmp_path / "a")
    record = pack_report.read_record(dataset)
    assert record is not None
    pack_report.write_record(dataset.url, dataclasses.replace(record, source_sha256="0" * 64))
    assert pack_report.read_record(dataset) is None
    checksummed_json.write(f"{dataset.url}/packing.json", {"source": "x"})
    with pytest.raises(StorageError, match=r"packing.json: not a packing record.*; delete this"):
        pack_report.read_record(dataset)


def test_the_job_shows_the_same_when_it_packs_and_when_it_finds(
    pictures: Path, tmp_path: Path
) -> None:
    (pictures / "odd/notes.txt").write_text("a note")
    (pictures / "odd/3.png").write_bytes(b"broken")
    job = Path(__file__).parents[2] / "jobs/pack_shards.py"
    command = [sys.executable, str(job), "pictures", "set", "on_bad_image=skip"]
    reported = []
    for _ in range(2):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=ENDS_S)
        assert done.returncode == 0, done.stderr
        reported.append((json.loads(done.stdout.splitlines()[-1]), done.stderr.splitlines()[-4:]))
    assert reported[0] == reported[1]
    result, lines = reported[0]
    assert (result["samples"], result["skipped"], result["channels"]) == (6, 1, 3)
    assert (result["classes"], result["class_samples"]) == (["even", "odd"], [4, 2])
    assert [group["kind"] for group in result["not_packed"]] == ["other files"]
    assert lines[0].startswith(f"skipped: {pictures}/odd/3.png: not a readable image (it is none")
    assert lines[1:] == [
        "not packed: other files: 1 (odd/notes.txt)",
        "packed: 6 samples, 1 skipped, 12 x 9 pixels, 3 channels (RGB)",
        "classes: 0 = even (4 samples), 1 = odd (2)",
    ]
