"""The parts of a model with texts in other libraries: equal tokens, vectors and schedules."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("tokenizers", reason="needs the extra [text]")
pytest.importorskip("transformers", reason="needs the extra [text]")

import ddpm_ray
from ddpm_ray.assembly import run_config
from ddpm_ray.cli.main import main
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.jobs import export
from ddpm_ray.models.interop.clip_text import clip_text_config, clip_text_limits
from ddpm_ray.models.text_encoder import TextEncoder, TextEncoderSpec
from tests.data.latent_sets import TINY_UNET, encode_noise
from tests.test_export_job import latent_run
from tests.test_sampled_as_configured import TEXT, saved_run

TEXTS = ["a cat", "", "A Cat, a dog; a bird and a fish", "caf\u00e9"]
DIT = ("model.network=dit", "model.depth=1", "model.hidden_size=8", "model.heads=2")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tokens_and_vectors_are_those_of_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With random weights, as AutoTokenizer and CLIPTextModel read the folder."""
    saved_run(tmp_path / "run", *TEXT)
    out = tmp_path / "out"
    assert main(export.JOB, [str(tmp_path / "run"), "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["parts"] == ["text_encoder", "tokenizer"]
    assert result["pipeline"] == ""
    assert result["no_equivalent"][0].startswith("unet (a stage of ours attends to the pixels")
    model = ddpm_ray.load(tmp_path / "run")
    own: Any = model.denoiser.network
    tokenizer = model.denoiser.takes.tokenizer
    assert tokenizer is not None
    transformers: Any = importlib.import_module("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(out / "tokenizer")
    rows = theirs(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    assert torch.equal(rows, tokenizer.encode(TEXTS))
    encoder, loading = transformers.CLIPTextModel.from_pretrained(
        out / "text_encoder", output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    with torch.inference_mode():
        states, pooled = own.text.encoder(rows)
        found = encoder.eval()(rows)
    torch.testing.assert_close(found.last_hidden_state, states, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.pooler_output, pooled, rtol=1e-5, atol=1e-5)
    diffusers: Any = pytest.importorskip("diffusers", reason="needs the extra [dev]")
    scheduler = getattr(diffusers, result["scheduler"]).from_pretrained(out / "scheduler")
    torch.testing.assert_close(
        scheduler.alphas_cumprod, model.denoiser.schedule.alpha_bar[1:].float()
    )


def test_an_end_token_of_which_transformers_thinks_otherwise_is_named() -> None:
    """Its code takes the largest token of a row as the end if eos_token_id is 2."""
    spec = TextEncoderSpec(9, 2, (1, 2, 2), width=4, depth=1, heads=1)
    assert clip_text_limits(spec)[0].startswith(
        "pooled text (CLIPTextModel takes it at the largest"
    )
    assert clip_text_limits(TextEncoderSpec(9, 3, (1, 3, 3), width=4, depth=1, heads=1)) == []
    torch.manual_seed(0)
    ours = TextEncoder(spec).eval()
    rows = torch.tensor([[1, 7, 2]])
    with torch.inference_mode():
        states, pooled = ours(rows)
    assert torch.equal(states[:, 2], pooled)
    transformers: Any = importlib.import_module("transformers")
    config = transformers.CLIPTextConfig(**clip_text_config(spec, 1))
    with torch.inference_mode():
        found = transformers.CLIPTextModel(config).eval()(rows)
    assert torch.equal(found.last_hidden_state[:, 1], found.pooler_output)


def test_a_model_of_latents_and_texts_is_written_with_its_autoencoder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which decodes to the images of the model: x_0 is its latents, not scaled."""
    tokenizer = run_config.tokenizer_facts(Tokenizer.trained(["a cat", "a dog"], 300, 6))
    run = latent_run(tmp_path / "run", encode_noise(tmp_path, 12), *TINY_UNET, *TEXT, **tokenizer)
    out = tmp_path / "out"
    assert main(export.JOB, [run, "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["parts"] == ["text_encoder", "tokenizer", "vae"]
    assert not (out / "model_index.json").exists()
    model = ddpm_ray.load(run)
    codec = model.denoiser.codec
    x_0 = torch.randn(2, *codec.shape(model.image_shape), generator=torch.manual_seed(3))
    diffusers: Any = pytest.importorskip("diffusers", reason="needs the extra [dev]")
    vae = diffusers.AutoencoderKL.from_pretrained(out / "vae").eval()
    pixels = torch.from_numpy(codec.decode(x_0)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        found = vae.decode(x_0).sample.clamp(-1, 1)
    torch.testing.assert_close(found, pixels, rtol=0, atol=1.1 / 127.5)
