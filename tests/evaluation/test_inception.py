"""The FID network: its size as published, its parts by closed forms, and the golden distances."""

import importlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

from ddpm_ray.evaluation.features.inception import (
    Inception,
    Mixed7,
    Unit,
    mean_pool,
    resize_as_pytorch_fid,
    resize_as_tensorflow_1,
)
from ddpm_ray.evaluation.features.inception_weights import load_inception
from ddpm_ray.evaluation.frechet import Moments, frechet_distance


def random_images(count: int = 2, height: int = 32, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, height, width, 3)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


def test_size_is_what_two_other_houses_publish() -> None:
    """Keras documents 21,802,784 numbers without the top: weights and, per channel, shift, mean
    and variance. torchvision documents 27,161,264 parameters with the top (2,049,000) and the
    auxiliary head (3,326,696): weights and, per channel, shift and scale. Ours: weights and shift.
    """
    with torch.device("meta"):
        units = [module for module in Inception().modules() if isinstance(module, Unit)]
    weights = sum(unit.weight.numel() for unit in units)
    channels = sum(unit.out_channels for unit in units)
    assert weights + 3 * channels == 21_802_784
    assert weights + 2 * channels == 27_161_264 - 2_049_000 - 3_326_696
    assert weights + channels == 21_768_352
    assert len(units) == 94


@given(st.integers(2, 400))
def test_tensorflow_1_resize_puts_pixel_i_at_i_times_the_scale(side: int) -> None:
    """On a ramp, bilinear interpolation is exact: output i is min(i * side / 299, side - 1)."""
    ramp = torch.arange(side, dtype=torch.float32).view(1, 1, 1, side).expand(1, 1, 2, side)
    expected = (torch.arange(299, dtype=torch.float64) * side / 299).clamp(max=side - 1)
    for pixels in (ramp, ramp.transpose(2, 3)):
        rows = resize_as_tensorflow_1(pixels) * 128 + 128
        line = rows[0, 0, 7] if pixels is ramp else rows[0, 0, :, 7]
        torch.testing.assert_close(line, expected.float(), atol=1e-4, rtol=1e-6)


@given(st.integers(2, 299))
def test_torch_resize_puts_pixel_centres_on_pixel_centres(side: int) -> None:
    ramp = torch.arange(side, dtype=torch.float32).view(1, 1, 1, side).expand(1, 1, 2, side)
    at = (torch.arange(299, dtype=torch.float64) + 0.5) * side / 299 - 0.5
    line = (resize_as_pytorch_fid(ramp)[0, 0, 7] + 1) / 2 * 255
    torch.testing.assert_close(line, at.clamp(0, side - 1).float(), atol=1e-3, rtol=1e-5)


def test_full_range_becomes_minus_1_to_1() -> None:
    ends = torch.tensor([0.0, 255.0]).view(1, 1, 1, 2)
    for resize, highest in ((resize_as_tensorflow_1, 127 / 128), (resize_as_pytorch_fid, 1.0)):
        resized = resize(ends)
        assert (resized.min().item(), resized.max().item()) == (-1.0, highest)


def test_an_image_of_299_pixels_is_not_resampled() -> None:
    pixels = torch.rand(1, 3, 299, 299) * 255
    torch.testing.assert_close(resize_as_tensorflow_1(pixels) * 128 + 128, pixels)
    torch.testing.assert_close((resize_as_pytorch_fid(pixels) + 1) / 2 * 255, pixels)


def test_mean_pool_does_not_count_the_padding() -> None:
    assert torch.equal(mean_pool(torch.ones(1, 2, 5, 5)), torch.ones(1, 2, 5, 5))


@pytest.mark.parametrize("by_maximum, corner", [(False, 2.0), (True, 6.0)])
def test_the_last_block_pools_by_maximum_and_the_one_before_by_mean(
    by_maximum: bool, corner: float
) -> None:
    assert Inception().layers.get_submodule("Mixed_7c").pools_by_maximum
    assert not Inception().layers.get_submodule("Mixed_7b").pools_by_maximum
    block = Mixed7(1, pools_by_maximum=by_maximum)
    assert block.branch_pool.bias is not None
    nn.init.ones_(block.branch_pool.weight)
    nn.init.zeros_(block.branch_pool.bias)
    x = torch.tensor([[0.0, 0, 0], [2, 6, 0], [0, 0, 0]])
    pooled = block(x.view(1, 1, 3, 3))[0, -192:, 0, 0]
    torch.testing.assert_close(pooled, torch.full((192,), corner))


def test_one_pass_gives_each_width_and_stops_after_the_widest() -> None:
    torch.manual_seed(0)
    wide = Inception((192, 768, 2048))
    found = wide(random_images())
    assert {width: tuple(values.shape) for width, values in found.items()} == {
        192: (2, 192),
        768: (2, 768),
        2048: (2, 2048),
    }
    narrow = Inception((192,))
    assert len(narrow.layers) == 7
    narrow.load_state_dict({name: wide.state_dict()[name] for name in narrow.state_dict()})
    torch.testing.assert_close(narrow(random_images()), {192: found[192]})


def test_grey_images_are_three_equal_channels() -> None:
    network, grey = Inception((192,)), random_images()[..., :1]
    torch.testing.assert_close(network(grey), network(grey.repeat(1, 1, 1, 3)))


@pytest.mark.parametrize(
    "images",
    [torch.zeros(1, 8, 8, 3), torch.zeros(1, 3, 8, 8).byte(), torch.zeros(8, 8, 3).byte()],
)
def test_other_images_are_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images are torch.* Inception reads uint8"):
        Inception((192,))(images)


def test_spatial_features_are_those_of_the_block_that_the_graph_calls_mixed_6() -> None:
    """`mixed_6/conv`, 7 channels of 17 x 17. The graph counts its blocks: mixed, mixed_1, ..."""
    torch.manual_seed(0)
    network = Inception((2023,))
    blocks = [name for name, _ in network.layers.named_children() if name.startswith("Mixed")]
    assert len(blocks) == 7  # mixed to mixed_6; nothing behind is computed
    seen: list[Tensor] = []
    block = network.layers.get_submodule(blocks[6])
    block.get_submodule("branch1x1").register_forward_hook(lambda *call: seen.append(call[2]))
    found = network(random_images())[2023]
    assert found.std() > 0
    assert torch.equal(found.view(2, 7, 17, 17), seen[0][:, :7])
    both = Inception((192, 2023, 768))
    shapes = {width: values.shape[1] for width, values in both(random_images()).items()}
    assert shapes == {192: 192, 2023: 2023, 768: 768}


def test_other_widths_and_recipes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"widths are \[64, 192\]; there are 192, 768, "):
        Inception((192, 64))
    with pytest.raises(ValueError, match=r"widths are \[\]"):
        Inception(())
    with pytest.raises(ValueError, match="resize is 'bicubic'; it must be one of original, py"):
        Inception((192,), "bicubic")  # type: ignore[arg-type]


def test_agrees_with_an_independent_implementation(tmp_path: Path) -> None:
    """torch-fidelity's network under random weights, its state in the release file's layout."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("needs torch-fidelity: no dependency of ours")
    reference = torch_fidelity_network()
    torch.save(reference.state_dict(), tmp_path / "release.pth")
    assert sum(parameter.numel() for parameter in reference.parameters()) == 23_850_960  # with fc
    widths, images = (192, 768, 2048), random_images(height=40)
    found = load_inception(tmp_path / "release.pth", widths)(images)
    with torch.no_grad():
        expected = reference(images.permute(0, 3, 1, 2))
    for width, values in zip(widths, expected, strict=True):
        assert (found[width] - values).norm() < 1e-5 * values.norm()


def torch_fidelity_network() -> nn.Module:
    library: Any = torch.library
    torchvision = library.Library("torchvision", "DEF")  # it is imported too, and wants these two,
    for operator in ("nms", "qnms"):  # which its wheels hold for their own build of torch alone
        torchvision.define(f"{operator}(Tensor boxes, Tensor scores, float threshold) -> Tensor")
    theirs: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:  # no weights file: nothing is loaded
        patch.setattr(torch, "load", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        network: nn.Module = theirs.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["192", "768", "2048"], feature_extractor_weights_path=__file__
        )
    torch.manual_seed(0)
    for name, values in network.state_dict().items():
        if name.endswith("conv.weight"):
            nn.init.kaiming_normal_(values)
        elif name.endswith(("bn.weight", "running_var")):
            values.uniform_(0.5, 1.5)
        elif name.endswith(("bn.bias", "running_mean")):
            values.normal_(0, 0.2)
    return network.eval()


WEIGHTS = "inception_2015_12_05_to_mixed6e_folded_f32.npz"
GOLDEN = {  # by torch-fidelity 0.4.0 and pytorch-fid 0.3.0, scipy's sqrtm
    ("original", 192): 0.053981019,
    ("original", 768): 0.135493077,
    ("pytorch-fid", 768): 0.136453251,
}


@pytest.mark.slow  # 2,000 images, 3 minutes of a core each
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("resize", ["original", "pytorch-fid"])
def test_distance_of_two_real_sets_is_the_golden_one(resize: Any, assets: Path) -> None:
    network = load_inception(assets / WEIGHTS, (192, 768), resize)
    sides = []
    for first in (0, 5):
        moments = {width: Moments.zeros(width) for width in network.widths}
        for images in cifar10(assets, range(first, 10_000, 10)):
            for width, features in network(images).items():
                moments[width].update(features)
        sides.append({width: (each.mean(), each.covariance()) for width, each in moments.items()})
    for (recipe, width), golden in GOLDEN.items():
        if recipe == resize:
            distance = frechet_distance(*sides[0][width], *sides[1][width])
            assert distance == pytest.approx(golden, rel=1e-3)


def test_real_weights_separate_noise_from_photographs(assets: Path) -> None:
    """A fast look at the real file; the golden distances need 2,000 images."""
    network = load_inception(assets / WEIGHTS, (192, 768))
    photographs = next(cifar10(assets, range(24)))
    first, second = network(photographs[:12]), network(photographs[12:])
    noise = network(random_images(12))
    for width in (192, 768):
        near, far = (
            (first[width].mean(0) - other[width].mean(0)).norm() for other in (second, noise)
        )
        assert far > 3 * near


def cifar10(assets: Path, picked: range) -> Iterator[Tensor]:
    """The images at the places `picked` of the test set, 50 at a time."""
    with np.load(assets / "cifar10_test_jpeg.npz", allow_pickle=False) as file:
        data, ends = file["data"], file["offsets"]
    files = [io.BytesIO(data[ends[i] : ends[i + 1]].tobytes()) for i in picked]
    images = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))) for file in files]
    for start in range(0, len(images), 50):
        yield torch.stack(images[start : start + 50])
