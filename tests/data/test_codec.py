"""The codec of pixels, its name in a data set, and that no other module repeats it."""

import ast
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.data import arrow_io, shard_index
from ddpm_ray.data.codec import PIXELS, channels_first, channels_last
from ddpm_ray.data.dataset import Dataset, DatasetError, open_dataset
from ddpm_ray.data.dataset_codec import codec_of
from ddpm_ray.data.image_shape import ImageShape

MakeDataset = Callable[..., Dataset]

ROOT = Path(__file__).parents[2] / "ddpm_ray"


def grey(level: int) -> Tensor:
    return torch.full((1, 2, 2, 3), level, dtype=torch.uint8)


def test_the_range_is_minus_one_to_one_with_channels_first() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 8, 16, 2)
    x_0 = PIXELS.encode(images)
    assert (x_0.shape, x_0.dtype) == ((1, 2, 8, 16), torch.float32)
    assert tuple(x_0.shape[1:]) == PIXELS.shape(ImageShape(8, 16, 2))
    assert x_0.is_contiguous()
    assert (x_0.min().item(), x_0.max().item()) == (-1, 1)
    assert x_0[0, 1, 0, 3] == x_0.unique()[7]  # row 0, column 3, channel 1: level 7


@given(st.integers(0, 255))
def test_every_grey_level_survives_encoding_and_decoding(level: int) -> None:
    assert (PIXELS.decode(PIXELS.encode(grey(level))) == level).all()


def test_decoding_rounds_half_up_and_clamps() -> None:
    x_0 = torch.tensor([-7.0, -1.0, -0.9961, -0.996, 0.0, 0.9999, 1.0, 7.0])
    levels = PIXELS.decode(x_0.view(8, 1, 1, 1))
    assert levels.dtype == np.uint8
    assert levels.ravel().tolist() == [0, 0, 0, 1, 128, 255, 255, 255]


def test_decoded_channels_are_last() -> None:
    x_0 = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 5)
    assert PIXELS.decode(x_0).shape == (1, 4, 5, 3)
    assert PIXELS.decode(x_0)[0, 3, 4].tolist() == [0, 128, 255]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_never_becomes_a_grey_level(poison: float) -> None:
    x_0 = torch.zeros(3, 1, 2, 2)
    x_0[1, 0, 1, 1] = poison
    with pytest.raises(ValueError, match="1 of 3 images: values that are not finite"):
        PIXELS.decode(x_0)


@pytest.mark.parametrize("flip", [[False, True], [True, False]])
def test_only_the_chosen_images_are_mirrored(flip: list[bool]) -> None:
    images = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    plain, flipped = PIXELS.encode(images), PIXELS.encode(images, torch.tensor(flip))
    for n, mirrored in enumerate(flip):
        columns = list(range(5))[:: -1 if mirrored else 1]
        assert torch.equal(flipped[n], plain[n][..., columns])


def test_dequantized_images_fill_the_bins_of_their_grey_levels() -> None:
    """All noise rounds back to its level, the levels' bins tile, and uniform ones cost 8 bits."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    low = PIXELS.dequantize(images, torch.zeros(1, 1, 16, 16, dtype=torch.float64))
    high = PIXELS.dequantize(images, torch.full((1, 1, 16, 16), 1 - 1e-9, dtype=torch.float64))
    for x_0 in (low + 1e-5, high - 1e-5):  # decoding rounds to float32
        assert (PIXELS.decode(x_0) == images.numpy()).all()
    torch.testing.assert_close(high.flatten()[:-1], low.flatten()[1:])
    width = float(high.max() - low.min())
    assert math.log2(width) + math.log2(PIXELS.levels_per_unit) == pytest.approx(8, abs=1e-9)


def test_statistics_of_the_manifest_are_those_of_the_encoded_images() -> None:
    pixels = torch.randint(0, 256, (50, 4, 5, 3), dtype=torch.uint8)
    mean = pixels.double().mean((0, 1, 2)).tolist()
    std = pixels.double().std((0, 1, 2), correction=0).tolist()
    x_0 = PIXELS.encode(pixels).double()
    assert PIXELS.mean_square(mean, std) == pytest.approx(float(x_0.square().mean()), rel=1e-6)
    variance = x_0.var((0, 2, 3), correction=0).mean()
    assert PIXELS.variance(std) == pytest.approx(float(variance), rel=1e-6)


def test_estimates_are_clipped_to_the_range() -> None:
    x_0 = torch.tensor([[-3.0, 0.5, 2.0]])
    PIXELS.clip()(x_0)
    assert x_0.tolist() == [[-1, 0.5, 1]]
    x_0 = torch.tensor([[-4.0, 0.5, 2.0]])
    PIXELS.clip(quantile=1.0)(x_0)
    assert x_0.tolist() == [[-1, 0.125, 0.5]]


def test_views_of_the_axes_are_inverse() -> None:
    images = torch.rand(2, 4, 5, 3)
    assert channels_first(images).shape == (2, 3, 4, 5)
    assert torch.equal(channels_last(channels_first(images)), images)


def test_a_set_without_a_name_holds_pixels(make_dataset: MakeDataset) -> None:
    """As every set of format 1, whose manifests and fingerprints stay as they are."""
    dataset = open_dataset(make_dataset(10, 4).url)
    assert "codec" not in json.loads((Path(dataset.url) / "manifest.json").read_text())
    assert codec_of(dataset.manifest) is PIXELS


def test_an_unknown_codec_is_refused_by_its_name(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(10, 4)
    recipe = dataset.recipe.to_json() | {"codec": "frames"}
    index = arrow_io.serialize_table(
        dataset.index.replace_schema_metadata({"recipe": json.dumps(recipe)})
    )
    with pytest.raises(
        ValueError, match="codec is 'frames'; this version reads pixels, latents, embeddings"
    ):
        shard_index.parse_index(index)


def test_an_edited_codec_is_refused(make_dataset: MakeDataset) -> None:
    path = Path(make_dataset(10, 4).url) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"codec": "latents"}))
    with pytest.raises(DatasetError, match="codec is 'latents', but by the index"):
        open_dataset(str(path.parent))


def repeats(source: str) -> Iterator[str]:
    """Yield each expression that converts pixels or orders axes, which only the codec may do."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=float(value)) if value in (127.5, 1 / 127.5):
                yield f"line {node.lineno}: {value}"
            case ast.Constant(value=str(text)) if "127.5" in text:
                yield f"line {node.lineno}: {text}"
            case ast.Call(func=ast.Attribute(attr="permute" | "movedim")):
                yield f"line {node.lineno}: {ast.unparse(node)}"
            case ast.Call(func=ast.Attribute(attr=name), args=[*_, low, high]) if re.fullmatch(
                "clamp_?|clip_?", name
            ) and (ast.unparse(low), ast.unparse(high)) == ("-1", "1"):
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_no_other_module_converts_pixels_or_orders_their_axes() -> None:
    """The papers of diffusion/ scale images to [-1, 1], so it may clip to that range."""
    found = [
        f"{path.relative_to(ROOT)} {fault}"
        for path in sorted(ROOT.rglob("*.py"))
        if path != ROOT / "data/codec.py" and ROOT / "diffusion" not in path.parents
        for fault in repeats(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source", ["x / 127.5 - 1", "x.permute(0, 3, 1, 2)", "x.clamp_(-1, 1)", "torch.clamp(x, -1, 1)"]
)
def test_a_second_place_is_found(source: str) -> None:
    assert list(repeats(source))
