"""The codec of latents: standardised exactly, drawn anew by (seed, step, position) alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.data.dataset import UInt8s
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.latent_codec import LatentCodec, posterior_noise
from ddpm_ray.data.loader import read_images
from ddpm_ray.data.packing import packer
from ddpm_ray.data.shards import Latents
from ddpm_ray.models.autoencoder import Posterior
from tests.data.latent_sets import random_latents, write_latents


class Doubling:
    """Decodes a latent of one channel to 2 x 2 equal pixels."""

    url, sha256 = "memory", ""

    def encode_uint8(self, images: Tensor) -> Posterior:
        mean = images[:, ::2, ::2, 0][:, None].float()
        return Posterior(mean, torch.full_like(mean, -30))

    def decode_uint8(self, z: Tensor) -> UInt8s:
        grey = z.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, 0, :, :, None]
        images: UInt8s = grey.round().clamp(0, 255).to(torch.uint8).numpy()
        return images


def whole_set(folder: Path, latents: Latents) -> tuple[LatentCodec, Tensor]:
    dataset = write_latents(folder, latents, 5)
    stored = torch.cat([batch.images for batch in read_images(dataset, range(len(dataset.counts)))])
    return LatentCodec.of(dataset.manifest), stored


@settings(max_examples=15)
@given(samples=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_the_whole_set_has_mean_0_and_variance_1_in_each_channel(
    tmp_path_factory: pytest.TempPathFactory, samples: int, seed: int
) -> None:
    """Noise of +1 and -1 has the mean and variance of the normal, so this is E over all draws."""
    codec, stored = whole_set(tmp_path_factory.mktemp("set"), random_latents(samples, seed=seed))
    flips = (torch.zeros(samples, dtype=torch.bool), torch.ones(samples, dtype=torch.bool))
    draws = [
        codec.encode(stored, flip, torch.full((samples, 3, 2, 4), sign)).double()
        for flip in flips
        for sign in (-1.0, 1.0)
    ]
    x_0 = torch.stack(draws).transpose(0, 2).flatten(1)  # [c, draws]
    assert x_0.mean(1).tolist() == pytest.approx([0, 0, 0], abs=2e-6)
    assert x_0.square().mean(1).tolist() == pytest.approx([1, 1, 1], rel=2e-6)


def test_one_number_from_the_first_batch_is_off_by_its_chi_square_spread(tmp_path: Path) -> None:
    """As the original does: 1 / std of one batch. (n - 1) s^2 / sigma^2 is chi-square there."""
    rng, batch, batches = np.random.default_rng(1), 8, 400
    mean = rng.standard_normal((batch * batches, 1, 1, 2, 4)).astype(np.float16) * 3
    latents = Latents(mean, np.full_like(mean, -30))
    dataset = write_latents(tmp_path, latents, batch * batches, views=("plain",))
    codec = LatentCodec.of(dataset.manifest)
    (stored,) = (read.images for read in read_images(dataset, [0]))
    exact = codec.encode(stored).double()
    assert float(exact.var(correction=0)) == pytest.approx(1, rel=1e-6)
    n = batch * 8
    estimates = mean.astype(np.float64).reshape(batches, n).var(axis=1, ddof=1)
    scaled = (n - 1) * estimates / 9
    assert stats.kstest(scaled, stats.chi2(n - 1).cdf).pvalue > 0.01
    after = codec.std[0] ** 2 / estimates  # variance of the whole set after dividing by one std
    assert after.std() == pytest.approx(np.sqrt(2 / (n - 1)), rel=0.15)  # 18 % at 64 values
    assert np.abs(after - 1).max() > 0.4


@settings(max_examples=20)
@given(seed=st.integers(0, 2**64 - 1), step=st.integers(0, 2**32 - 1), data=st.data())
def test_draws_are_a_function_of_seed_step_and_position(
    seed: int, step: int, data: st.DataObject
) -> None:
    latents = random_latents(6)
    stored = torch.from_numpy(np.stack(latents, axis=1))
    codec = LatentCodec(3, 2, ("plain", "flipped"), (1.0, 2.0, 3.0), (1.0, 0.5, 2.0))
    positions = torch.tensor(
        data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6, unique=True))
    )
    flip = torch.tensor([False, True] * 3)
    whole = codec.encode(stored, flip, posterior_noise(seed, step, positions, (3, 2, 4)))
    rows = torch.tensor(data.draw(st.permutations(range(6)))[: data.draw(st.integers(1, 6))])
    noise = posterior_noise(seed, step, positions[rows], (3, 2, 4))
    assert torch.equal(codec.encode(stored[rows], flip[rows], noise), whole[rows])
    others = [(seed, (step + 1) % 2**32), ((seed + 1) % 2**64, step)]
    for other in others:
        assert not torch.equal(
            codec.encode(stored, flip, posterior_noise(*other, positions, (3, 2, 4))), whole
        )


@given(st.integers(0, 2**32 - 1))
def test_encoding_and_undoing_it_returns_the_latents(seed: int) -> None:
    latents = random_latents(4, seed=seed)
    stored = torch.from_numpy(np.stack(latents, axis=1))
    codec = LatentCodec(3, 2, ("plain", "flipped"), (5.0, 0.0, -1.0), (0.3, 2.0, 40.0))
    x_0 = codec.encode(stored, torch.tensor([True, False, True, False]))
    picked = latents.mean[range(4), [1, 0, 1, 0]]
    np.testing.assert_allclose(codec.latents(x_0), picked, rtol=1e-6, atol=1e-5)
    assert x_0.dtype == torch.float32


def test_images_come_back_through_the_autoencoder() -> None:
    levels = np.arange(24, dtype=np.float16).reshape(3, 1, 1, 2, 4) * 10
    stored = torch.from_numpy(np.stack([levels, np.full_like(levels, -30)], axis=1))
    codec = LatentCodec(1, 2, ("plain",), (115.0,), (70.0,), Doubling())
    images = codec.decode(codec.encode(stored))
    assert images.shape == (3, 4, 8, 1)
    assert images.dtype == np.uint8
    assert (images[:, ::2, ::2, 0] == levels[:, 0, 0]).all()
    with pytest.raises(ValueError, match="1 of 3 images: values that are not finite"):
        codec.decode(torch.tensor([[0.0], [torch.nan], [0.0]]).view(3, 1, 1, 1))
    with pytest.raises(ValueError, match="no autoencoder is bound to these latents"):
        LatentCodec(1, 2, ("plain",), (0.0,), (1.0,)).decode(torch.zeros(1, 1, 2, 2))


def test_what_latents_do_not_have_is_refused() -> None:
    codec = LatentCodec(4, 8, ("plain",), (0.0,) * 4, (1.0,) * 4)
    assert codec.shape(ImageShape(64, 96, 3)) == (4, 8, 12)
    with pytest.raises(ValueError, match=r"64 x 100 pixels; .* multiples of the .* factor 8"):
        codec.shape(ImageShape(64, 100, 3))
    codec.clip()
    with pytest.raises(ValueError, match=r"sampling.dynamic_quantile is 0.995, but latents have"):
        codec.clip(0.995)
    with pytest.raises(ValueError, match=r"data.flip is true, but the latents hold only .* plain"):
        codec.encode(torch.zeros(1, 2, 1, 4, 2, 2), torch.tensor([True]))


def test_pixels_have_no_codec_of_latents(tmp_path: Path) -> None:
    plan = packer.make_plan("digits", str(tmp_path), PackConfig())
    dataset = packer.finish_dataset(plan, [packer.pack_shard(plan, 0)])
    with pytest.raises(ValueError, match="the data set holds pixels, not latents"):
        LatentCodec.of(dataset.manifest)
