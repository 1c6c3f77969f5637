"""The KL autoencoder: its size, its shapes, its posterior against torch's own normal."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ddpm_ray.models.autoencoder import Autoencoder, AutoencoderSpec, Posterior

SMALL = AutoencoderSpec(
    image_channels=3,
    latent_channels=2,
    base_channels=8,
    channel_mults=(1, 2),
    blocks_per_level=1,
    groups=4,
    middle_attention=True,
)
STABLE_DIFFUSION = AutoencoderSpec(3, 4, 128, (1, 2, 4, 4), 2, 32, True)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_stable_diffusions_spec_has_its_83_653_863_parameters() -> None:
    with torch.device("meta"):
        model = Autoencoder(STABLE_DIFFUSION)
    assert sum(parameter.numel() for parameter in model.parameters()) == 83_653_863
    assert STABLE_DIFFUSION.factor == 8
    assert STABLE_DIFFUSION.latent_shape((512, 768)) == (4, 64, 96)


@settings(deadline=None, max_examples=15)
@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.booleans(),
    st.booleans(),
)
def test_an_image_comes_back_with_its_shape(
    channels: int,
    latents: int,
    levels: int,
    sides: tuple[int, int],
    attends: bool,
    convs: bool,
) -> None:
    spec = AutoencoderSpec(channels, latents, 4, (1, 2, 1)[:levels], 1, 2, attends, convs)
    height, width = (side * spec.factor for side in sides)
    x = torch.randn(2, channels, height, width)
    noise = torch.zeros(2, *spec.latent_shape((height, width)))
    model = Autoencoder(spec)
    image, posterior = model(x, noise)
    assert image.shape == x.shape
    assert posterior.mean.shape == posterior.log_variance.shape == noise.shape
    image.sum().backward()
    assert model.last_layer.grad is not None
    assert model.last_layer.grad.any()


@given(st.integers(0, 2**31))
def test_the_divergence_is_that_of_torchs_normals_summed_over_an_image(seed: int) -> None:
    mean, log_variance = torch.randn(2, 3, 2, 2, 2, dtype=torch.float64, generator=seeded(seed))
    normal = Normal(mean, (log_variance / 2).exp())
    expected = kl_divergence(normal, Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    torch.testing.assert_close(Posterior(mean, log_variance).kl(), expected)


def test_the_divergence_is_exact_near_the_prior() -> None:
    """exp(v) - 1 - v is v^2 / 2 for small v; float32 must not lose it in the subtraction."""
    near = torch.full((1, 1, 1, 1), 1e-3)
    found = Posterior(torch.zeros_like(near), near).kl()
    torch.testing.assert_close(found, torch.tensor([2.5e-7]), rtol=1e-3, atol=0)


def test_samples_have_the_mean_and_variance_of_the_posterior() -> None:
    mean, log_variance = torch.tensor([[[[0.5]]]]), torch.tensor([[[[-1.5]]]])
    noise = torch.randn(200_000, 1, 1, 1, generator=seeded(3))
    drawn: Tensor = Posterior(mean, log_variance).sample(noise)
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.005)
    assert drawn.var().log().item() == pytest.approx(-1.5, abs=0.02)


def test_log_variances_are_clamped() -> None:
    model = Autoencoder(replace(SMALL, latent_convs=False))
    with torch.no_grad():
        assert model.encoder.conv_out.bias is not None
        model.encoder.conv_out.bias.copy_(torch.tensor([1e3, -1e3, 1e3, -1e3]))
        mean, log_variance = model.encode(torch.zeros(1, 3, 4, 4))
    assert mean[0, :, 0, 0].tolist() == [1e3, -1e3]
    assert log_variance[0, :, 0, 0].tolist() == [20, -30]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"latent_channels": 0}, "latent_channels is 0; an autoencoder needs at least 1"),
        ({"channel_mults": ()}, r"channel_mults is \(\); an autoencoder needs at least 1"),
        ({"channel_mults": (1, 0)}, r"channel_mults is \(1, 0\); an autoencoder needs at least 1"),
        ({"groups": 3}, "groups is 3, which does not divide a level's 8 channels"),
    ],
)
def test_a_spec_that_does_not_fit_is_refused_by_name(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Autoencoder(replace(SMALL, **changes))  # type: ignore[arg-type]


def test_sides_that_do_not_halve_are_refused_with_the_nearest_that_do() -> None:
    with pytest.raises(ValueError, match=r"images are 5 x 8, .* nearest valid: 4 x 8"):
        Autoencoder(SMALL).encode(torch.zeros(1, 3, 5, 8))
