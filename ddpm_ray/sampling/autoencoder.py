"""A trained autoencoder: uint8 images to latents and back."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.models.autoencoder import Autoencoder, Posterior
from ddpm_ray.redaction import counted
from ddpm_ray.sampling.array_arguments import as_images
from ddpm_ray.sampling.sampling import Images
from ddpm_ray.sampling.tiles import in_tiles

TILE = 64  # side of a tile in latent pixels: 512 pixels at factor 8
LEAST_TILE = 4  # latent pixels, of which neighbours share a quarter


@dataclass(frozen=True, eq=False)
class TrainedAutoencoder:
    """An autoencoder ready for use; returned by `trained_autoencoder`.

    Canvases of more than `tile` latent pixels a side are encoded and decoded in tiles, which
    overlap by a quarter and are blended, so that the memory is that of one tile; tile=0 takes the
    canvas whole. Results differ slightly from those of the whole canvas, since group norms see one
    tile at a time.
    """

    model: Autoencoder  # in eval mode, parameters frozen
    image_shape: ImageShape  # of the images that it was trained on; it takes others too
    url: str
    sha256: str  # of its weights file
    core_seconds: float | None = None  # of its training (training.core_seconds); None: unknown

    def __repr__(self) -> str:
        """URL, image shape and factor, in one line."""
        factor, c = self.model.spec.factor, self.model.spec.latent_channels
        return f"TrainedAutoencoder({self.url}, {self.image_shape}, factor {factor}, {c} channels)"

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.model.last_layer.device

    def latent_shape(self, image_shape: ImageShape) -> tuple[int, int, int]:
        """(c, h, w) of the latents of images of `image_shape`.

        Raises ValueError for other channels than the model's and for sides that its factor does not
        divide.
        """
        if image_shape.channels != self.model.spec.image_channels:
            raise ValueError(
                f"images have {counted(image_shape.channels, 'channel')}, but the autoencoder "
                f"{self.url} takes {self.model.spec.image_channels}"
            )
        return self.model.spec.latent_shape(image_shape[:2])

    @torch.no_grad()
    def encode_uint8(self, images: Any, *, tile: int = TILE) -> Posterior:
        """q(z | x), float32 [N, c, h, w], of uint8 images [N, H, W, C], an array or a tensor.

        Raises ValueError for other images and for a `tile` below 4 other than 0.
        """
        found = as_images(images, self.model.spec.image_channels)
        x = PIXELS.encode(torch.from_numpy(found).to(self.device))
        moments = self._tiled(x, tile, encodes=True)
        return Posterior(*moments.float().chunk(2, dim=1))

    @torch.no_grad()
    def decode_uint8(self, z: Tensor, *, tile: int = TILE) -> Images:
        """uint8 images [N, H, W, C] from latents z [N, c, h, w].

        Raises ValueError for other latents and for a `tile` below 4 other than 0.
        """
        c = self.model.spec.latent_channels
        if z.ndim != 4 or z.shape[1] != c:
            raise ValueError(f"latents are {list(z.shape)}; the autoencoder decodes [N, {c}, h, w]")
        return PIXELS.decode(self._tiled(z.to(self.device, torch.float32), tile, encodes=False))

    def _tiled(self, x: Tensor, tile: int, *, encodes: bool) -> Tensor:
        """The moments [N, 2c, h, w] of images x, or the images of latents x."""
        spec, function = self.model.spec, self._moments if encodes else self.model.decode
        if tile == 0:
            return function(x)
        if tile < LEAST_TILE:
            raise ValueError(
                f"tile is {tile}; it is at least {LEAST_TILE} latent pixels, or 0 for no tiles"
            )
        if encodes:
            spec.latent_shape(x.shape[2:])  # raises for sides that do not divide
        scale = (spec.factor, 1) if encodes else (1, spec.factor)
        return in_tiles(function, x, tile, tile // 4, scale)

    def _moments(self, x: Tensor) -> Tensor:
        """Mean and log variance [N, 2c, h, w] of images x [N, C, H, W]."""
        return torch.cat(self.model.encode(x), dim=1)
