"""Samples, variations, copies and cascades of decoders with stored embeddings."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("tokenizers", reason="needs the extra [text]")

import ddpm_ray
from ddpm_ray.assembly import training_run
from ddpm_ray.assembly.cascades import joined, write_cascade
from ddpm_ray.assembly.encoder_loading import trained_encoders
from ddpm_ray.assembly.inputs_of_data import with_inputs_of_data
from ddpm_ray.assembly.newest_checkpoint import newest_checkpoint
from ddpm_ray.assembly.portable_models import copy_model
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.latent_codec import LatentCodec
from ddpm_ray.sampling.image_text import TrainedEncoders
from tests.assembly.stored_embeddings.stored_sets import (
    CPU,
    KINDS,
    SIDE,
    keys_of,
)
from tests.data.embedding_sets import random_embeddings, write_embeddings
from tests.data.latent_sets import TINY_UNET, encode_pixels
from tests.fixtures.job_script import run_job
from tests.noise import pack_noise
from tests.test_cascade_job import DIFFUSION, PRIOR, TEXTS, trained


def test_variations_of_latents_are_of_the_pixels(
    decoder: str, sets: dict[str, str], tmp_path: Path
) -> None:
    """Their embeddings are those that the encoder gives the images; a copy draws the same."""
    model = ddpm_ray.load(decoder, "cpu")
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 1), np.uint8)
    drawn = model.variations(images, per_image=2, seed=3)
    vectors = trained_encoders(sets["encoder"]).embed(PIXELS.encode(torch.from_numpy(images)))
    given = replace(model.denoiser, embeddings=vectors.repeat_interleave(2, 0))
    wanted = replace(model, denoiser=given).sample(4, seed=3)
    np.testing.assert_array_equal(drawn, wanted)
    assert (drawn != model.sample(4, seed=3)).any()
    np.testing.assert_array_equal(
        model.variations(images[1:], per_image=2, seed=3, first=2), drawn[2:]
    )
    with pytest.raises(ValueError, match="images are 8 x 6; variations are drawn of images of"):
        model.variations(images[:, :, :6])


def test_the_job_edit_draws_variations_of_latents(
    decoder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture, out = tmp_path / "image.png", tmp_path / "like-it.png"
    Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)).save(picture)
    words = [decoder, str(picture), "--out", str(out), "kind=variations", "num_images=3"]
    code, _, err = run_job("edit.py", words, monkeypatch, capsys)
    assert code == 0, err
    with Image.open(out) as found:
        assert found.size[0] > 2 * SIDE


def test_samples_of_a_run_have_embeddings_of_decoded_latents(
    decoder: str, sets: dict[str, str]
) -> None:
    """For grids and scores, as the encoder embeds pixels; of pixels, if those are the data."""
    model, encoders = ddpm_ray.load(decoder, "cpu"), trained_encoders(sets["encoder"])
    config = load_config(RunConfig, None, keys_of(sets, "latents"))
    for dataset in KINDS:
        held = open_dataset(sets[dataset])
        shown = with_inputs_of_data(model.denoiser, config.data, held, 5, CPU)
        stored = training_run.fixed_images(config.data, held, range(5), 5).images
        images = stored
        if dataset == "latents":
            codec = model.denoiser.codec
            images = torch.from_numpy(codec.decode(codec.encode(stored)))
        assert shown.embeddings is not None
        assert torch.equal(shown.embeddings, encoders.embed(PIXELS.encode(images)))


def test_decoded_images_are_embedded_and_dropped_in_parts(
    decoder: str, sets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation embeds tens of thousands: all of them do not fit on a device."""
    held, waiting, most = open_dataset(sets["latents"]), 0, 0
    model, encoders = ddpm_ray.load(decoder, "cpu"), trained_encoders(sets["encoder"])
    config = load_config(RunConfig, None, keys_of(sets, "latents"))
    stored = training_run.fixed_images(config.data, held, range(70), 70).images
    codec = model.denoiser.codec
    wanted = encoders.embed(PIXELS.encode(torch.from_numpy(codec.decode(codec.encode(stored)))))
    decode, embed = LatentCodec.decode, TrainedEncoders.embed

    def decoded(self: LatentCodec, x_0: Tensor) -> np.ndarray:
        nonlocal waiting, most
        waiting += len(x_0)
        most = max(most, waiting)
        return decode(self, x_0)

    def embedded(self: TrainedEncoders, x_0: Tensor) -> Tensor:
        nonlocal waiting
        waiting -= len(x_0)
        return embed(self, x_0)

    monkeypatch.setattr(LatentCodec, "decode", decoded)
    monkeypatch.setattr(TrainedEncoders, "embed", embedded)
    shown = with_inputs_of_data(model.denoiser, config.data, held, 70, CPU)
    assert (most, waiting) == (32, 0)
    assert shown.embeddings is not None
    torch.testing.assert_close(shown.embeddings, wanted, rtol=1e-5, atol=1e-6)


def test_a_copy_of_a_decoder_of_latents_needs_neither_network_elsewhere(
    sets: dict[str, str], tmp_path: Path
) -> None:
    """As in MLflow: it draws, decodes and embeds when both have gone."""
    root = tmp_path / "gone soon"
    moved = {name: str(root / Path(url).name) for name, url in sets.items()}
    shutil.copytree(Path(sets["pixels"]).parent, root)
    shutil.rmtree(root / "latents")
    assert encode_pixels(root, SIDE) == moved["latents"]
    _, *keys = keys_of(moved, "latents")
    run = trained(tmp_path / "decoder", moved["latents"], *keys)
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 1), np.uint8)
    wanted = ddpm_ray.load(run, "cpu").variations(images)
    assert copy_model(newest_checkpoint(run)[0], tmp_path / "copy") == []
    shutil.rmtree(root)
    model = ddpm_ray.load(tmp_path / "copy", "cpu")
    np.testing.assert_array_equal(model.variations(images), wanted)


def test_a_cascade_with_a_decoder_of_latents_draws_texts_and_variations(
    decoder: str, sets: dict[str, str], tmp_path: Path
) -> None:
    """Prior, decoder of latents, autoencoder, upsampler."""
    embedded = tmp_path / "captioned"
    write_embeddings(embedded, random_embeddings(8, 6), 8, captioned=True)
    found = trained_encoders(sets["encoder"])
    held = {"image_encoder": {"url": found.url, "sha256": found.sha256}}
    prior = trained(tmp_path / "prior", str(embedded), *PRIOR, *DIFFUSION, held=held)
    pack_noise(str(tmp_path / "large"), 3, 2 * SIDE)
    of = f"objective.low_resolution_pixels={SIDE}"
    large = trained(tmp_path / "up", str(tmp_path / "large"), *TINY_UNET, *DIFFUSION, of)
    out = str(tmp_path / "cascade")
    write_cascade(out, joined(prior, decoder, [large], candidates=2)[1])
    cascade = ddpm_ray.load_cascade(out, "cpu")
    drawn = cascade.sample(2, prompts=TEXTS, seed=1)
    assert drawn.shape == (2, 2 * SIDE, 2 * SIDE, 1)
    np.testing.assert_array_equal(cascade.sample(1, prompts=TEXTS, seed=1, first=1), drawn[1:])
    images = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 1), np.uint8)
    assert cascade.variations(images, per_image=2).shape == (2, 2 * SIDE, 2 * SIDE, 1)
