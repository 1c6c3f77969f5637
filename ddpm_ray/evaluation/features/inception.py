"""The network of the Frechet inception distance: Inception-v3 of 2015-12-05, batch norm folded.

It is the graph that Heusel et al. 2017 (arXiv:1706.08500) measured FID with, which differs from
the published Inception-v3: average pools leave the padding out of the count, and the last block
pools by maximum. A convolution followed by a batch norm with fixed statistics is a convolution,
so each pair is one here, in channels_last: 1.4 x as fast, features 3e-7 (relative) away.
Layers keep the names of the release file.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Set

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_ray.config.evaluation import InceptionResize
from ddpm_ray.data.codec import channels_first

SIDE = 299  # pixels
SPATIAL = 2023  # numbers in 7 channels of 17 x 17, which no mean is taken of
FIRST_STAGES = "Conv2d_1a_3x3", "Conv2d_2b_3x3", "Conv2d_4a_3x3"  # read by `first_stages`
LEAST_SIDE = 19  # pixels, for which the last of these stages has a side of 1
WIDTH_AFTER = {"pool_2": 192, "Mixed_6d": SPATIAL, "Mixed_6e": 768, "Mixed_7c": 2048}


class Inception(nn.Module):
    """Images uint8 [N, H, W, 3 or 1] -> for each of `widths` its features, float32 [N, width].

    Features are the spatial means of a layer: of the second max pool (192), of Mixed_6e (768), of
    the last block (2048, the standard); 2023 are the first 7 channels of Mixed_6d in their places,
    as sFID looks at them (Nash et al. 2021, arXiv:2103.03841): the graph calls that block mixed_6.
    One pass gives all and stops after the last layer that is needed. `resize` says how images
    come to 299x299: `original` is the bilinear filter of TensorFlow 1, as in the graph itself and
    in the papers; `pytorch-fid` is torch's. Grey images count as three equal channels. Raises
    ValueError for other widths, recipes or images.

    `class_weight` [1008, 2048], where the file has it and 2048 is a width, makes class_logits.
    """

    def __init__(
        self, widths: Iterable[int] = (2048,), resize: InceptionResize = "original"
    ) -> None:
        super().__init__()
        self.widths, self.resize = frozenset(widths), resize
        if not self.widths or not self.widths <= {*WIDTH_AFTER.values()}:
            raise ValueError(f"widths are {sorted(self.widths)}; there are 192, 768, 2023 and 2048")
        if resize not in RESIZE:
            raise ValueError(f"resize is {resize!r}; it must be one of {', '.join(RESIZE)}")
        self.layers = nn.Sequential(_layers_to(self.widths))
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", None)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        """Features by width, as in `features`."""
        return self.features(images)

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[int, Tensor]:
        """Features float32 [N, width] under each width, of uint8 images [N, H, W, 3 or 1]."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(
                f"images are {images.dtype} {list(images.shape)}; "
                "Inception reads uint8 [N, H, W, 3] or [N, H, W, 1]"
            )
        h = RESIZE[self.resize](channels_first(images).float())
        h = h.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        found = {}
        for name, layer in self.layers.named_children():
            h = layer(h)
            if (width := WIDTH_AFTER.get(name)) in self.widths:
                found[width] = h[:, :7].flatten(1) if width == SPATIAL else h.mean(dim=(2, 3))
        return found

    def first_stages(self, x: Tensor) -> list[Tensor]:
        """Feature maps [N, C_i, h_i, w_i] of FIRST_STAGES, with gradients, for a perceptual loss.

        x is float [N, 3 or 1, H, W] in [-1, 1] and not resized: maps have 32, 64 and 192 channels
        and about H / 2, H / 2 and H / 4 rows. Raises ValueError for other channels and for sides
        below 19 pixels.
        """
        if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < LEAST_SIDE:
            raise ValueError(
                f"images are {list(x.shape)}; Inception's first stages read [N, 3 or 1, H, W] of "
                f"at least {LEAST_SIDE} x {LEAST_SIDE} pixels: set autoencoder.perceptual_weight=0"
            )
        h, maps = x.expand(-1, 3, -1, -1), list[Tensor]()
        for name, layer in self.layers.named_children():
            h = layer(h)
            if name in FIRST_STAGES:
                maps.append(h)
            if name == FIRST_STAGES[-1]:
                break
        return maps

    def class_logits(self, features: Mapping[int, Tensor]) -> Tensor:
        """Logits [N, 1008] of the features of width 2048, for the Inception score.

        Without the bias, as in the code of Salimans et al. 2016 (arXiv:1606.03498) and all since.
        """
        assert self.class_weight is not None
        return features[2048] @ self.class_weight.T


def resize_as_tensorflow_1(pixels: Tensor) -> Tensor:
    """[N, C, H, W] in 0..255 -> [N, C, 299, 299] in -1..1.

    Output pixel i lies at i * H / 299: the corners, not the centres, of both grids coincide.
    """
    for dim in (2, 3):
        count = pixels.shape[dim]
        at = torch.arange(SIDE, dtype=torch.float64) * count / SIDE
        low = at.long()
        share = (at - low).to(pixels).view(-1, *[1] * (3 - dim))
        low = low.to(pixels.device)
        high = (low + 1).clamp(max=count - 1)
        pixels = pixels.index_select(dim, low).lerp(pixels.index_select(dim, high), share)
    return (pixels - 128) / 128


def resize_as_pytorch_fid(pixels: Tensor) -> Tensor:
    """[N, C, H, W] in 0..255 -> [N, C, 299, 299] in -1..1; the centres of the grids coincide."""
    resized = F.interpolate(pixels / 255, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return 2 * resized - 1


RESIZE = {"original": resize_as_tensorflow_1, "pytorch-fid": resize_as_pytorch_fid}


class Unit(nn.Conv2d):
    """A convolution with its batch norm folded in, then ReLU."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        """Convolution and ReLU."""
        return F.relu_(super().forward(x))


def mean_pool(x: Tensor) -> Tensor:
    """The mean of the 3x3 neighbours that lie inside the image."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed5(nn.Module):
    """35x35: 1x1, 5x5 and double 3x3 convolutions next to a mean pool."""

    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Unit(channels, 64, 1)
        self.branch5x5_1 = Unit(channels, 48, 1)
        self.branch5x5_2 = Unit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = Unit(channels, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, padding=1)
        self.branch_pool = Unit(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of the branches, concatenated by channel."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        single = self.branch5x5_2(self.branch5x5_1(x))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(mean_pool(x))], 1)


class Mixed6a(nn.Module):
    """35x35 -> 17x17: 3x3 and double 3x3 convolutions next to a max pool."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3 = Unit(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = Unit(288, 64, 1)
        self.branch3x3dbl_2 = Unit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = Unit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of the branches, concatenated by channel; H and W are halved."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], 1)


class Mixed6(nn.Module):
    """17x17: 7x7 and double 7x7 convolutions, each cut into 1x7 and 7x1, next to a mean pool."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        row: tuple[tuple[int, int], int, tuple[int, int]] = (1, 7), 1, (0, 3)
        column: tuple[tuple[int, int], int, tuple[int, int]] = (7, 1), 1, (3, 0)
        self.branch1x1 = Unit(768, 192, 1)
        self.branch7x7_1 = Unit(768, inner, 1)
        self.branch7x7_2 = Unit(inner, inner, *row)
        self.branch7x7_3 = Unit(inner, 192, *column)
        self.branch7x7dbl_1 = Unit(768, inner, 1)
        self.branch7x7dbl_2 = Unit(inner, inner, *column)
        self.branch7x7dbl_3 = Unit(inner, inner, *row)
        self.branch7x7dbl_4 = Unit(inner, inner, *column)
        self.branch7x7dbl_5 = Unit(inner, 192, *row)
        self.branch_pool = Unit(768, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, 17, 17] -> [B, 768, 17, 17]."""
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(mean_pool(x))], 1)


class Mixed7a(nn.Module):
    """17x17 -> 8x8: 3x3 and 7x7 convolutions, each ending at stride 2, next to a max pool."""

    def __init__(self) -> None:
        super().__init__()
        self.branch3x3_1 = Unit(768, 192, 1)
        self.branch3x3_2 = Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = Unit(768, 192, 1)
        self.branch7x7x3_2 = Unit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = Unit(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = Unit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """The outputs of the branches, concatenated by channel; H and W are halved."""
        small = self.branch3x3_2(self.branch3x3_1(x))
        large = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        return torch.cat([small, self.branch7x7x3_4(large), F.max_pool2d(x, 3, stride=2)], 1)


class Mixed7(nn.Module):
    """8x8: 3x3 and double 3x3 convolutions that fork into 1x3 and 3x1, next to a pool."""

    def __init__(self, channels: int, pools_by_maximum: bool) -> None:
        super().__init__()
        self.pools_by_maximum = pools_by_maximum
        self.branch1x1 = Unit(channels, 320, 1)
        self.branch3x3_1 = Unit(channels, 384, 1)
        self.branch3x3_2a = Unit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = Unit(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = Unit(channels, 448, 1)
        self.branch3x3dbl_2 = Unit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = Unit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = Unit(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = Unit(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, 8, 8] -> [B, 2048, 8, 8]."""
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.pools_by_maximum else mean_pool(x)
        forked = [
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
        ]
        return torch.cat([self.branch1x1(x), *forked, self.branch_pool(pooled)], 1)


def _layers_to(widths: Set[int]) -> OrderedDict[str, nn.Module]:
    """The layers in order, up to the last one that a width is read from."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        Conv2d_1a_3x3=Unit(3, 32, 3, stride=2),
        Conv2d_2a_3x3=Unit(32, 32, 3),
        Conv2d_2b_3x3=Unit(32, 64, 3, padding=1),
        pool_1=nn.MaxPool2d(3, stride=2),
        Conv2d_3b_1x1=Unit(64, 80, 1),
        Conv2d_4a_3x3=Unit(80, 192, 3),
        pool_2=nn.MaxPool2d(3, stride=2),
        Mixed_5b=Mixed5(192, pooled=32),
        Mixed_5c=Mixed5(256, pooled=64),
        Mixed_5d=Mixed5(288, pooled=64),
        Mixed_6a=Mixed6a(),
        Mixed_6b=Mixed6(128),
        Mixed_6c=Mixed6(160),
        Mixed_6d=Mixed6(160),
        Mixed_6e=Mixed6(192),
        Mixed_7a=Mixed7a(),
        Mixed_7b=Mixed7(1280, pools_by_maximum=False),
        Mixed_7c=Mixed7(2048, pools_by_maximum=True),
    )
    while WIDTH_AFTER.get(next(reversed(layers))) not in widths:
        layers.popitem()
    return layers
