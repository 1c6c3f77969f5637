"""Tiles add up to the whole canvas, in the memory of one tile; uint8 images in and out."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec
from ddpm_ray.sampling.autoencoder import TrainedAutoencoder
from ddpm_ray.sampling.tiles import in_tiles

SPEC = AutoencoderSpec(
    image_channels=3,
    latent_channels=2,
    base_channels=8,
    channel_mults=(1, 1, 1),
    blocks_per_level=1,
    groups=2,
    middle_attention=False,
)


def trained(spec: AutoencoderSpec = SPEC, strength: float = 0.05) -> TrainedAutoencoder:
    torch.manual_seed(0)
    model = Autoencoder(spec).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=strength)
    return TrainedAutoencoder(model, ImageShape(32, 32, spec.image_channels), "memory", "")


def local(spec: AutoencoderSpec = SPEC) -> TrainedAutoencoder:
    """Without group norms: the receptive field is that of the convolutions."""
    autoencoder = trained(spec, strength=0.3)
    for module in [*autoencoder.model.modules()]:
        for name, child in module.named_children():
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return autoencoder


class Largest(TorchDispatchMode):
    """Records the most numbers that one tensor has had."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, getattr(result, "numel", int)())
        return result


def pixels(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (1, height, width, 3), generator=generator, dtype=torch.uint8)


@settings(deadline=None, max_examples=50)
@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.integers(2, 12).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size - 1))),
    st.sampled_from([(1, 1), (1, 4), (4, 1)]),
)
def test_a_pixelwise_function_in_tiles_is_the_function_of_the_whole(
    sides: tuple[int, int], tile: tuple[int, int], scale: tuple[int, int]
) -> None:
    """The weights of all tiles add up to 1 at each pixel, for any canvas, tile and overlap."""

    def resized(x: Tensor) -> Tensor:
        small = F.max_pool2d(x, scale[0])
        return F.interpolate(small, scale_factor=float(scale[1])) ** 2 + 1

    height, width = (side * scale[0] for side in sides)
    x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(in_tiles(resized, x, *tile, scale), resized(x))


def require_close(found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, atol=1e-5 * scale, rtol=0)


def test_a_tiled_decode_is_the_whole_decode_where_the_receptive_field_is_small() -> None:
    """Its convolutions reach 13 latents, a quarter of the overlap of tiles of 208."""
    autoencoder = local()
    z = torch.randn(1, 2, 240, 16, generator=torch.Generator().manual_seed(1))
    decode = autoencoder.model.decode
    whole = decode(z)
    require_close(in_tiles(decode, z, 208, 52, (1, 4)), whole)
    narrow = in_tiles(decode, z, 208, 12, (1, 4))
    with pytest.raises(AssertionError, match="not close"):
        require_close(narrow, whole)
    far = 4 * (240 - 208 - 13), 4 * (208 + 13)  # from the cuts at 32 and 208
    for away in (slice(0, far[0]), slice(far[1], None)):
        require_close(narrow[:, :, away], whole[:, :, away])
    grey = autoencoder.decode_uint8(z, tile=208).astype(int) - autoencoder.decode_uint8(z, tile=0)
    assert np.abs(grey).max() <= 1


def test_a_tiled_encoding_is_the_whole_encoding_where_the_receptive_field_is_small() -> None:
    autoencoder, images = local(), pixels(4 * 240, 32)
    whole = autoencoder.encode_uint8(images, tile=0)
    tiled = autoencoder.encode_uint8(images, tile=208)
    require_close(tiled.mean, whole.mean)
    require_close(tiled.log_variance, whole.log_variance)


def test_group_norms_differ_in_tiles_but_the_seam_is_smooth() -> None:
    """No step at a tile's edge: tiles of other statistics are blended."""
    level = torch.zeros(1, 1, 1, 64)
    level[..., 32:] = 1

    def tile_mean(x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True).expand_as(x)

    steps = in_tiles(tile_mean, level, 32, 16).diff(dim=3).abs()
    assert steps.max() <= 1 / 8 + 1e-6  # 8 pixels are half of the overlap


def test_a_canvas_of_1024_pixels_takes_no_larger_tensor_than_its_image() -> None:
    """Whole, the last level would have 4 channels of 1,024 x 1,024."""
    autoencoder = trained(AutoencoderSpec(3, 2, 4, (1, 1, 1, 1), 1, 2, middle_attention=True))
    canvas = 3 * 1024 * 1024
    with Largest() as decoding:
        image = autoencoder.decode_uint8(torch.zeros(1, 2, 128, 128), tile=32)
    assert image.shape == (1, 1024, 1024, 3)
    with Largest() as encoding:
        posterior = autoencoder.encode_uint8(image, tile=32)
    assert posterior.mean.shape == (1, 2, 128, 128)
    assert decoding.numel == encoding.numel == canvas
    with Largest() as tile:
        autoencoder.decode_uint8(torch.zeros(1, 2, 32, 32), tile=0)
    assert tile.numel == 4 * 256 * 256


def test_a_canvas_of_one_tile_is_taken_whole() -> None:
    autoencoder, z = trained(), torch.randn(2, 2, 8, 4)
    assert (autoencoder.decode_uint8(z) == autoencoder.decode_uint8(z, tile=0)).all()


def test_images_are_encoded_as_the_model_sees_them_in_training() -> None:
    """Grey level 0 is -1 and 255 is 1; arrays and tensors are equal."""
    autoencoder, images = trained(), pixels(8, 12)
    x = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = autoencoder.model.encode(x)
    for given_images in (images, images.numpy()):
        found = autoencoder.encode_uint8(given_images)
        torch.testing.assert_close(found.mean, expected.mean)
        torch.testing.assert_close(found.log_variance, expected.log_variance)
        assert not found.mean.requires_grad


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a: a.encode_uint8(pixels(8, 8)[..., :1]), r"give uint8 \[N, H, W, 3\]"),
        (lambda a: a.encode_uint8(pixels(8, 10)), "images are 8 x 10, which 3 levels"),
        (lambda a: a.encode_uint8(pixels(8, 8), tile=3), "tile is 3; it is at least 4"),
        (lambda a: a.decode_uint8(torch.zeros(1, 3, 4, 4)), r"decodes \[N, 2, h, w\]"),
        (lambda a: a.latent_shape(ImageShape(8, 8, 1)), "images have 1 channel, but the"),
        (lambda a: in_tiles(a.model.decode, torch.zeros(1), 4, 4), "overlap is 4 for tiles of 4"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(trained())


def test_the_shape_of_latents_follows_from_the_images() -> None:
    assert trained().latent_shape(ImageShape(16, 24, 3)) == (2, 4, 6)
    assert "memory" in repr(trained())
