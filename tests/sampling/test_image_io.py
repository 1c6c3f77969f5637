"""A picture that a job writes: whole in its format, or one line that says why not."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_ray.cli.paths import PICTURES
from ddpm_ray.sampling.gif import Film
from ddpm_ray.sampling.image_io import read_image, read_mask, write_picture
from ddpm_ray.storage.errors import StorageError

PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


def test_images_and_masks_are_read_with_rows_first(tmp_path: Path) -> None:
    wide = np.arange(2 * 5 * 3, dtype=np.uint8).reshape(2, 5, 3)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert np.array_equal(read_image(str(tmp_path / "wide.png"), channels=3), wide)
    Image.fromarray(np.array([[255, 0, 0, 0, 0], [0] * 5], np.uint8)).save(tmp_path / "mask.png")
    mask = read_mask(str(tmp_path / "mask.png"))
    assert mask.shape == (2, 5)
    assert (mask != mask[1, 4]).nonzero() == (0, 0)


@pytest.mark.parametrize(
    "mode, channels, says",
    [
        ("RGB", 1, ["colours turned to grey: the model is one of grey images"]),
        ("RGBA", 3, ["transparent pixels composited on white"]),
        ("RGB", 3, []),
        ("L", 3, []),
        ("L", 1, []),
    ],
)
def test_a_change_of_pixels_is_told(
    mode: str, channels: int, says: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGBA", (2, 2), (200, 100, 50, 0)).convert(mode).save(file := tmp_path / "a.png")
    assert read_image(str(file), channels).shape == (2, 2, channels)
    assert caplog.messages == [f"{file}: {line}" for line in says]


@pytest.mark.parametrize("suffix", PICTURES)
def test_a_picture_is_written_in_the_format_of_its_suffix(tmp_path: Path, suffix: str) -> None:
    write_picture(file := tmp_path / f"a{suffix.upper()}", PICTURE)
    with Image.open(file) as shown:
        assert (shown.size, Image.registered_extensions()[suffix]) == ((4, 4), shown.format)


@pytest.mark.parametrize("name", ["grid.png", "film.gif"])
def test_a_full_disk_is_reported_in_one_line_and_keeps_the_picture_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On commit 820f16a: `[Errno 28] No space left on device (OSError; ...)`, without the place."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (file := tmp_path / name).write_bytes(b"before")
    monkeypatch.setattr("ddpm_ray.storage.object_store.os.fsync", full)
    said = rf"{name}: the disk is full; free some space or choose another path"
    save = Film().save if file.suffix == ".gif" else lambda path, _: write_picture(path, PICTURE)
    with pytest.raises(StorageError, match=said):
        save(file, np.zeros((2, 8, 8, 1), np.uint8))
    assert file.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [file]
