"""What the user chose for packing one data set; the defaults are those of job_config.PackConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ddpm_ray.data.packing.builtin_datasets import Split
from ddpm_ray.data.resizing import Resize
from ddpm_ray.data.shards import Encoding


@dataclass(frozen=True)
class PackOptions:
    """Which samples of a source are packed, and how."""

    image_size: int = 0  # pixels; 0 with resize "none"
    resize: Resize = "none"
    channels: int = 0  # 1, 3, or 0: as the first image
    encoding: Encoding = "raw"
    shard_bytes: int = 32 << 20  # decoded
    split: Split = "train"
    url: str = ""
    sha256: tuple[str, ...] = ()
    image_key: str = ""  # which of several images of a sample; empty: there is one
    label_key: str = ""  # column or JSON key of the label; empty: label (in JSON also cls)
    on_bad_image: Literal["stop", "skip"] = "stop"
    max_pixels: int = 64_000_000
    max_file_bytes: int = 256 << 20


DEFAULTS = PackOptions()
