"""The shapes of the images of a data set or model, and of their latents."""

from __future__ import annotations

from typing import NamedTuple


class ImageShape(NamedTuple):
    """Height, width and channels, in the order in which images are stored: [H, W, C]."""

    height: int
    width: int
    channels: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


class LatentShape(NamedTuple):
    """Channels, height and width, in the order in which latents are stored: [c, h, w]."""

    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        return "x".join(map(str, self))
