"""Options of packing a data set into shards."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ddpm_ray.config.data import MIB
from ddpm_ray.config.option_fields import option

Encoding: TypeAlias = Literal["raw", "png", "jpeg", "webp"]
Resize: TypeAlias = Literal["none", "centre-crop-box-bicubic", "shorter-side-box-bicubic"]
Split: TypeAlias = Literal["train", "test"]


@dataclass(frozen=True)
class PackConfig:
    """One data set to pack into shards."""

    image_size: int = option(
        0,
        "centre crop: height, shorter side: length of that side, in pixels; 0: unchanged",
        at_least=0,
    )
    image_width: int = option(
        0, "width of the centre crop in pixels; 0: square, as image_size", at_least=0
    )
    resize: Resize = option(
        "none",
        "how to resize; centre-crop-box-bicubic: as guided-diffusion; shorter-side-box-bicubic: "
        "keeps the aspect ratio and crops nothing",
    )
    channels: int = option(
        0,
        "channels of the packed images; 1: grey, 3: RGB; 0: as the first image",
        at_least=0,
        at_most=3,
    )
    encoding: Encoding = option("raw", "encoding of the images in the shards; raw: pixels")
    shard_bytes: int = option(
        32 * MIB, "decoded bytes per shard", at_least=3 * MIB // 2, at_most=1024 * MIB
    )
    split: Split = option("train", "split of mnist, fashion-mnist and cifar10")
    url: str = option("", "URL of mnist, fashion-mnist or cifar10; empty: the public one")
    sha256: str = option(
        "", "sha256 of the files at url, comma-separated: images, labels; cifar10: archive"
    )
    image_key: str = option(
        "", "which image to use if samples have several: tar suffix (left.png) or table column"
    )
    label_key: str = option(
        "", "label column of a table or metadata file, or key of .json files; empty: label"
    )
    captions: str = option(
        "",
        "captions: path or URL of a .tsv (file, tab, caption) or .jsonl file; none: pack no "
        "captions; empty: those of the source",
    )
    caption_key: str = option(
        "",
        "caption column of a table or metadata file, or key of .json and .jsonl files; empty: "
        "caption, captions or text",
    )
    on_bad_caption: Literal["stop", "skip"] = option(
        "stop",
        "on a caption that is invalid or whose image does not exist: stop, or skip and report it",
    )
    on_bad_image: Literal["stop", "skip"] = option(
        "stop", "on an unreadable image: stop, or skip and report it"
    )
    max_pixels: int = option(
        64_000_000, "largest image in pixels; larger ones are rejected before decoding", at_least=1
    )
    max_file_bytes: int = option(
        256 * MIB, "largest file in bytes; larger ones are rejected before reading", at_least=1
    )
    num_workers: int = option(0, "parallel Ray tasks; 0: one per CPU of the cluster", at_least=0)
    address: str = option("", "Ray cluster to join; empty: $RAY_ADDRESS or a local Ray")

    def problems(self) -> Iterator[str]:
        """Yield a line for an invalid channel count, and for sizes without a recipe for them."""
        if self.channels == 2:
            yield "channels is 2; use 1 (grey) or 3 (RGB)"
        if (self.resize == "none") != (self.image_size == 0):
            yield (
                f"image_size is {self.image_size} and resize {self.resize!r}; a size needs a "
                f"recipe: resize=centre-crop-box-bicubic image_size=64, or neither"
            )
        if self.image_width and self.resize != "centre-crop-box-bicubic":
            yield (
                f"image_width is {self.image_width} and resize {self.resize!r}; only a centre crop "
                f"has a width: resize=centre-crop-box-bicubic, or leave image_width out"
            )

    @property
    def file_hashes(self) -> tuple[str, ...]:
        """`sha256`, split at the commas."""
        return tuple(filter(None, self.sha256.replace(" ", "").split(",")))
