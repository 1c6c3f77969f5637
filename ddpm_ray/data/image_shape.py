"""The shape of the images of a data set or model."""

from __future__ import annotations

from typing import NamedTuple


class ImageShape(NamedTuple):
    """Height, width and channels, in the order in which images are stored: [H, W, C]."""

    height: int
    width: int
    channels: int

    def __str__(self) -> str:
        return "x".join(map(str, self))
