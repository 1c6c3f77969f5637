"""From a source to a whole data set: same bytes from any tasks, resumable, never half."""

import errno
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from ddpm_ray.data import packer, storage
from ddpm_ray.data.image_files import BadImageError
from ddpm_ray.data.packer import PackOptions
from ddpm_ray.data.shards import Dataset, DatasetError, fetch_shard, open_dataset
from ddpm_ray.data.storage import StorageError
from ddpm_ray.data.stream import read_images


def pack(source: str, destination: Path, **options: object) -> Dataset:
    plan = packer.plan(source, str(destination), PackOptions(**options))  # type: ignore[arg-type]
    return packer.finish(plan, [packer.pack_shard(plan, n) for n in range(plan.shards)])


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
        "shard-00000.arrow",
    ]
    assert not (tmp_path / "digits/parts").exists()
    images = fetch_shard(open_dataset(dataset.url), 0).images
    assert np.asarray(images)[0, :, :, 0].tolist()[0] == [0, 0, 80, 207, 143, 16, 0, 0]


def test_the_order_of_the_tasks_does_not_matter(pictures: Path, tmp_path: Path) -> None:
    first = pack(str(pictures), tmp_path / "a", shard_bytes=2 * 12 * 9 * 3)
    plan = packer.plan(str(pictures), str(tmp_path / "b"), PackOptions(shard_bytes=2 * 12 * 9 * 3))
    assert plan.shards == 4
    second = packer.finish(plan, [packer.pack_shard(plan, n) for n in (3, 0, 2, 1)])
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert first.fingerprint == second.fingerprint


def test_a_killed_packer_goes_on_where_it_was(pictures: Path, tmp_path: Path) -> None:
    whole = pack(str(pictures), tmp_path / "whole", shard_bytes=700)
    plan = packer.plan(str(pictures), str(tmp_path / "set"), PackOptions(shard_bytes=700))
    for n in (0, 2):
        packer.pack_shard(plan, n)
    with pytest.raises(DatasetError, match=r"there is no manifest\.json"):
        open_dataset(plan.destination)
    with mock.patch.object(storage, "write_bytes", wraps=storage.write_bytes) as write:
        again = packer.plan(str(pictures), plan.destination, PackOptions(shard_bytes=700))
        done = [packer.pack_shard(again, n) for n in range(again.shards)]
        written = sorted(Path(call.args[0]).name for call in write.call_args_list)
    missing = [f"shard-0000{n}.arrow" for n in (1, 3)]
    missing = [f"shard-0000{n}.arrow" for n in (1, 3)]
    assert written == sorted([*missing, *(f"{name}.json" for name in missing)])
    assert packer.finish(again, done).fingerprint == whole.fingerprint
    assert files(tmp_path / "set") == files(tmp_path / "whole")


def test_parts_of_another_source_are_not_used(pictures: Path, tmp_path: Path) -> None:
    plan = packer.plan("digits", str(tmp_path / "set"), PackOptions())
    packer.pack_shard(plan, 0)
    dataset = pack(str(pictures), tmp_path / "set")
    assert dataset.manifest.image_shape == (9, 12, 3)
    assert fetch_shard(dataset, 0).keys.to_pylist()[0] == "even/0.png"


def test_a_finished_set_is_found_and_another_is_not_overwritten(
    pictures: Path, tmp_path: Path
) -> None:
    dataset = pack(str(pictures), tmp_path / "set")
    before = files(tmp_path / "set")
    found = packer.finished(packer.plan(str(pictures), dataset.url, PackOptions()))
    assert found is not None
    assert found.fingerprint == dataset.fingerprint
    with pytest.raises(DatasetError, match="another data set is here already; remove it, or"):
        packer.finished(packer.plan("digits", dataset.url, PackOptions()))
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
    options = PackOptions(shard_bytes=1, on_bad_image="skip")  # an image to a shard
    plan = packer.plan(str(pictures), str(tmp_path / "set"), options)
    done = [packer.pack_shard(plan, n) for n in range(plan.shards)]
    dataset = packer.finish(plan, done)
    assert dataset.manifest.samples == dataset.manifest.shards == 5
    assert [len(shard.skipped) for shard in done] == [1, 0, 0, 0, 0, 1, 0]
    assert "even/0.png: not a readable image" in done[0].skipped[0]
    keys = [fetch_shard(dataset, n).keys.to_pylist()[0] for n in range(5)]
    assert keys == ["even/2.png", "even/4.png", "even/6.png", "odd/1.png", "odd/5.png"]


def test_nothing_but_bad_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"broken")
    with pytest.raises(DatasetError, match="it has no good image"):
        packer.plan(str(tmp_path), "x", PackOptions(on_bad_image="skip"))


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
