"""Weight files of both layouts, and files that are neither."""

import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_ray.evaluation.features.inception import Inception
from ddpm_ray.evaluation.features.inception_weights import InceptionWeightsError, load_inception

STEM = {  # layer: out, in, kernel side; as in the release file
    "Conv2d_1a_3x3": (32, 3, 3),
    "Conv2d_2a_3x3": (32, 32, 3),
    "Conv2d_2b_3x3": (64, 32, 3),
    "Conv2d_3b_1x1": (80, 64, 1),
    "Conv2d_4a_3x3": (192, 80, 3),
}
IMAGES = torch.randint(0, 256, (2, 24, 24, 3), generator=torch.Generator().manual_seed(1)).byte()


def release(layers: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random numbers under the release file's names."""
    generator = torch.Generator().manual_seed(0)

    def spread(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    state = {}
    for layer, (channels, inputs, *kernel) in layers.items():
        rows, columns = kernel * 2 if len(kernel) == 1 else kernel
        bound = (6 / (inputs * rows * columns)) ** 0.5
        state[f"{layer}.conv.weight"] = spread(-bound, bound, channels, inputs, rows, columns)
        state[f"{layer}.bn.weight"] = spread(0.5, 2, channels)
        state[f"{layer}.bn.bias"] = spread(-0.3, 0.3, channels)
        state[f"{layer}.bn.running_mean"] = spread(-0.3, 0.3, channels)
        state[f"{layer}.bn.running_var"] = spread(1e-3, 2, channels)  # the least is about eps
        state[f"{layer}.bn.num_batches_tracked"] = torch.tensor(7)
    return state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


def separate_batch_norm(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The 192 features with every batch norm on its own, straight from the release names."""
    h = pixels
    for layer in STEM:
        stride, padding = 2 if "1a" in layer else 1, 1 if "2b" in layer else 0
        h = F.conv2d(h, state[f"{layer}.conv.weight"], stride=stride, padding=padding)
        mean, variance, scale, shift = (
            state[f"{layer}.bn.{part}"]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        h = F.relu(F.batch_norm(h, mean, variance, scale, shift, eps=0.001))
        if layer.startswith(("Conv2d_2b", "Conv2d_4a")):
            h = F.max_pool2d(h, 3, 2)
    return h.mean((2, 3))


def test_release_file_folded_is_the_network_with_its_batch_norms(tmp_path: Path) -> None:
    state, path = release(STEM), tmp_path / "weights"  # a cache keeps no suffix
    torch.save(state, path)
    pixels = F.interpolate(IMAGES.permute(0, 3, 1, 2) / 127.5 - 1, (299, 299), mode="bilinear")
    expected = separate_batch_norm(state, pixels)
    found = load_inception(path, (192,), "pytorch-fid")(IMAGES)[192]
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_whole_release_file_fills_every_layer(legacy: bool, tmp_path: Path) -> None:
    """The published file is of the older kind, which is no zip archive."""
    with torch.device("meta"):
        shapes = Inception((768,)).layers.state_dict()
    layers = {
        name.removesuffix(".weight"): tuple(value.shape)
        for name, value in shapes.items()
        if name.endswith(".weight")
    }
    torch.save(release(layers), tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    network = load_inception(tmp_path / "w.pth", (768,))
    assert not any(parameter.is_meta for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in network.parameters())
    kernel = network.layers.get_parameter("Mixed_6e.branch7x7_2.weight")
    assert kernel.is_contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(network(IMAGES)[768]).all()


def test_the_last_layer_makes_logits_without_its_bias(tmp_path: Path) -> None:
    """And only where the features that it reads are wanted."""
    torch.manual_seed(0)
    whole = Inception((2048,)).layers.state_dict()
    weight = torch.randn(1008, 2048)
    arrays = {name: value.numpy() for name, value in whole.items()}
    arrays["fc.weight"] = weight.numpy()
    np.savez(tmp_path / "w.npz", allow_pickle=False, **arrays)
    assert load_inception(tmp_path / "w.npz", (768,)).class_weight is None
    network = load_inception(tmp_path / "w.npz", (2048,))
    features = torch.rand(3, 2048)
    expected = (features.double() @ weight.double().T).float()
    found = network.class_logits({2048: features})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)
    arrays["fc.weight"] = weight[:1000].numpy()
    np.savez(tmp_path / "v.npz", allow_pickle=False, **arrays)
    with pytest.raises(InceptionWeightsError, match=r"fc.weight is \[1000, 2048\], it must be"):
        load_inception(tmp_path / "v.npz", (2048,))


def test_folded_npz_is_read_as_it_stands(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Inception((192,))
    arrays = {name: value.numpy() for name, value in network.layers.state_dict().items()}
    np.savez(tmp_path / "folded.npz", **arrays)
    (tmp_path / "folded.npz").rename(tmp_path / "cached")
    torch.testing.assert_close(load_inception(tmp_path / "cached", (192,))(IMAGES), network(IMAGES))


def without(name: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        state = release(STEM)
        del state[name]
        torch.save(state, path)

    return write


def of_wrong_shape(path: Path) -> None:
    torch.save(release(STEM | {"Conv2d_3b_1x1": (80, 64, 3)}), path)


def for_192_only(path: Path) -> None:
    torch.save(release(STEM), path)


class Bomb:
    """A pickle that, once believed, makes a folder."""

    def __init__(self, path: Path) -> None:
        self.folder = str(path.with_name("executed"))

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (self.folder,)


def cut_off(path: Path) -> None:
    torch.save(release(STEM), path)
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    "write, message",
    [
        (without("Conv2d_2a_3x3.conv.weight"), "it has no Conv2d_2a_3x3.weight"),
        (without("Conv2d_2b_3x3.bn.running_var"), "it has no Conv2d_2b_3x3.bn.running_var"),
        (of_wrong_shape, r"Conv2d_3b_1x1.weight is \[80, 64, 3, 3\], it must be \[80, 64, 1, 1\]"),
        (for_192_only, "it has no Mixed_5b.branch1x1.weight"),
        (lambda path: torch.save([1, 2], path), "it holds a list, not weights"),
        (lambda path: path.write_bytes(b"<html>404</html>"), "it cannot be read"),
        (lambda path: path.write_bytes(b""), "it cannot be read"),
        (lambda path: path.write_bytes(pickle.dumps(Bomb(path), protocol=2)), "it cannot be read"),
        (lambda path: torch.save({"weights": Bomb(path)}, path), "it cannot be read"),
        (cut_off, "it cannot be read"),
        (lambda path: None, "it cannot be read: .*No such file"),
    ],
)
def test_other_files_get_one_clear_line(
    write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "weights.pth"
    write(path)
    with pytest.raises(InceptionWeightsError, match=message) as caught:
        load_inception(path, (768,))
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert not (tmp_path / "executed").exists()
