"""LPIPS by the package lpips: a fake one with its public interface, as torchvision is not here."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_ray.assembly import autoencoder as assembly
from ddpm_ray.assembly.autoencoder import require_fitting
from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.models.lpips_distance import (
    LpipsDistance,
    NoLpipsError,
    load_lpips,
    require_lpips,
)

CPU = torch.device("cpu")
RUN = ("name=a", "data.url=b", "task=autoencoder", "autoencoder.perceptual=lpips")


class LPIPS(nn.Module):
    """The constructor and the forward of lpips.LPIPS; a squared difference in RGB of weight w."""

    def __init__(
        self,
        pretrained: bool = True,
        net: str = "alex",
        version: str = "0.1",
        *,
        eval_mode: bool = True,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        assert (pretrained, net, version, verbose) == (True, "vgg", "0.1", False)
        self.w = nn.Parameter(torch.randn(1, 3, 1, 1).abs())
        self.train(not eval_mode)

    def forward(
        self,
        in0: Tensor,
        in1: Tensor,
        retPerLayer: bool = False,  # noqa: N803 - theirs
        normalize: bool = False,
    ) -> Tensor:
        assert not retPerLayer
        assert not normalize  # images in [-1, 1]
        assert in0.shape == in1.shape
        assert in0.shape[1] == 3
        difference: Tensor = self.w * (in0 - in1) ** 2
        return difference.sum(1, keepdim=True).mean((2, 3), keepdim=True)


@pytest.fixture
def lpips(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("lpips")
    monkeypatch.setattr(module, "LPIPS", LPIPS, raising=False)
    monkeypatch.setitem(sys.modules, "lpips", module)
    return module


@pytest.mark.usefixtures("lpips")
@pytest.mark.parametrize("channels", [1, 3])
def test_images_have_one_distance_each_with_a_gradient_for_the_second_alone(channels: int) -> None:
    drawn = torch.get_rng_state()
    distance = load_lpips(CPU)
    assert torch.equal(torch.get_rng_state(), drawn)  # weights of the run do not depend on it
    assert not distance.network.training
    x, x_hat = torch.zeros(2, channels, 16, 16), torch.ones(2, channels, 16, 16) * 0.5
    x_hat[1] = 0
    found = distance(x, x_hat.requires_grad_())
    weight = next(distance.network.parameters())
    torch.testing.assert_close(found, torch.stack([weight.sum() / 4, torch.tensor(0.0)]))
    found.sum().backward()
    assert x_hat.grad is not None
    assert x_hat.grad[0].abs().min() > 0
    assert weight.grad is None


@pytest.mark.usefixtures("lpips")
def test_a_run_takes_it_by_its_option() -> None:
    config = load_config(RunConfig, None, [*RUN, "autoencoder.perceptual_weight=1"])
    found = assembly._perceptual(config, CPU, Path())
    assert isinstance(found, LpipsDistance)
    assert isinstance(found.network, LPIPS)
    require_fitting(config, ImageShape(16, 16, 3))
    with pytest.raises(ValueError, match=r"images of 15 x 20 .* needs 16 pixels a side"):
        require_fitting(config, ImageShape(15, 20, 3))


@pytest.mark.parametrize(
    "error", [ImportError("No module named 'lpips'"), RuntimeError("operator nms does not\nexist")]
)
def test_a_package_that_does_not_load_is_one_line_with_the_remedy(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        """Finds lpips, whose import fails, as with a torchvision of another torch."""

        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name == "lpips":
                raise error

    monkeypatch.delitem(sys.modules, "lpips", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    says = r"lpips, but this package does not load \(.*\): install it .*belongs to torch 2.*=incep"
    with pytest.raises(NoLpipsError, match=says) as reported:
        require_lpips()
    assert "\n" not in str(reported.value)


@pytest.mark.usefixtures("lpips")
def test_weights_that_are_not_fetched_are_one_line(
    lpips: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(**_: object) -> None:
        raise OSError("<urlopen error: no route to host>")

    monkeypatch.setattr(lpips, "LPIPS", fails)
    says = r"VGG16 are not fetched \(<urlopen error: no route to host>\).*TORCH_HOME"
    with pytest.raises(OSError, match=says):  # transient: the driver starts the workers again
        load_lpips(CPU)


def test_the_option_without_a_weight_is_refused() -> None:
    says = r"perceptual is lpips, which autoencoder.perceptual_weight 0 leaves out: set it above 0"
    with pytest.raises(ConfigError, match=says):
        load_config(RunConfig, None, list(RUN))
