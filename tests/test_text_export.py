"""The parts of a model with texts in other libraries: equal tokens, vectors and schedules."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers", reason="needs the extra [text]")
pytest.importorskip("transformers", reason="needs the extra [text]")

import ddpm_ray
from ddpm_ray.assembly import run_config, training_run
from ddpm_ray.assembly.checkpoint_loading import trained_weights, with_sampling
from ddpm_ray.assembly.frozen_text import text_model
from ddpm_ray.assembly.text_export import write_text_encoder
from ddpm_ray.cli.main import main
from ddpm_ray.config.loading import load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.counter_rng import Purpose, normal
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.jobs import export
from ddpm_ray.models.contrastive import ContrastiveEncoders, ContrastiveSpec
from ddpm_ray.models.frozen_text import ContrastiveText, FrozenText
from ddpm_ray.models.interop.clip_text import clip_text_config, clip_text_limits
from ddpm_ray.models.text_encoder import FrozenTextSpec, TextEncoder, TextEncoderSpec
from tests.data.latent_sets import TINY_UNET, encode_noise
from tests.models.transformers_folders import L, write_folder
from tests.test_export_job import committed, latent_run
from tests.test_sampled_as_configured import TEXT, saved_run

TEXTS = ["a cat", "", "A Cat, a dog; a bird and a fish", "caf\u00e9"]
DIT = ("model.network=dit", "model.depth=1", "model.hidden_size=8", "model.heads=2")
TRANSFORMER = ("model.transformer_depth=1", "text.pooled=false")  # as in Stable Diffusion


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
    assert "train with model.transformer_depth=1)" in result["no_equivalent"][0]
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


@pytest.mark.parametrize(
    "settings, call",
    [
        (
            ["sampling.guidance_scale=3", "sampling.negative_prompt=a dog"],
            {"eta": 0.0, "guidance_scale": 3.0, "negative_prompt": ["a dog"] * 2},
        ),
        (
            ["sampling.sampler=dpm_solver_pp", "sampling.guidance_scale=2"],
            {"guidance_scale": 2.0},
        ),
        (
            ["sampling.guidance_scale=4", "sampling.guidance_rescale=0.7", "sampling.steps=10"],
            {"eta": 0.0, "guidance_scale": 4.0, "guidance_rescale": 0.7, "num_inference_steps": 10},
        ),
    ],
    ids=["negative prompt", "dpm_solver_pp", "rescale"],
)
@pytest.mark.filterwarnings("ignore")  # of diffusers: numpy 2
def test_the_pipeline_of_stable_diffusion_draws_the_images_of_the_model(
    settings: list[str], call: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the same noise, with guidance: to a level of 255, after its decoder and rounding."""
    diffusers: Any = pytest.importorskip("diffusers", reason="needs the extra [dev]")
    tokenizer = run_config.tokenizer_facts(Tokenizer.trained(["a cat", "a dog"], 300, 6))
    keys = (*TINY_UNET, *TEXT, *TRANSFORMER, "model.head_channels=4")
    run = latent_run(tmp_path / "run", encode_noise(tmp_path, 12), *keys, **tokenizer)
    out, prompts = tmp_path / "out", ["a cat", "a dog and a cat"]
    words = [run, "--out", str(out), "sampling.prompts=[a cat,a dog and a cat]", *settings]
    assert main(export.JOB, words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["pipeline"] == "StableDiffusionPipeline"
    assert result["no_equivalent"] == []
    assert result["call"] == {"prompt": prompts, "num_inference_steps": 5, **call}
    model = ddpm_ray.load(run, "cpu")
    model = with_sampling(model, config_of(settings))
    expected = model.sample(2, prompts=prompts).astype(int)
    shape = model.denoiser.codec.shape(model.image_shape)
    noise = normal(model.settings.seed, Purpose.SAMPLE_START, 0, torch.arange(2), shape)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(**result["call"], latents=noise, output_type="np").images
    assert expected.std() > 10
    assert np.abs(expected[0] - expected[1]).max() > 10
    assert np.abs((found * 255).round() - expected).max() <= 1
    back = ddpm_ray.load(out, "cpu")  # with the settings that the job was given
    assert back.settings.guidance_scale == call["guidance_scale"]
    assert np.abs(back.sample(2, prompts=prompts) - expected).max() <= 1
    ours, theirs = (trained_weights(str(url)) for url in (run, out))
    assert theirs.spec == ours.spec
    assert theirs.tensors.keys() == ours.tensors.keys()
    assert all(torch.equal(one, theirs.tensors[name]) for name, one in ours.tensors.items())


def config_of(settings: list[str]) -> SamplingSettings:
    keys = ["name=a", "data.url=b", "schedule.num_steps=10", "sampling.steps=5", *TEXT, *settings]
    return load_config(RunConfig, None, keys).sampling


def test_a_frozen_text_encoder_is_written_with_equal_vectors(tmp_path: Path) -> None:
    """CLIP's text model of transformers, and that of a contrastive run; T5 is no CLIPTextModel."""
    transformers: Any = importlib.import_module("transformers")
    found = text_model("transformers", str(write_folder(tmp_path / "clip", "CLIPTextModel")), L)
    torch.manual_seed(0)
    null = found.tokenizer.null_tokens
    spec = TextEncoderSpec(found.tokenizer.vocabulary, found.tokenizer.end_token, null, 8, 1, 2)
    encoders = ContrastiveEncoders(ContrastiveSpec(3, 4, (1,), 1, 2, 6, spec)).eval()
    of_run = FrozenText(ContrastiveText(encoders), FrozenTextSpec(8, 6, null))
    rows = found.tokenizer.encode(["a cat", ""])
    for name, encoder in (("a", found.load()), ("b", of_run)):
        assert write_text_encoder(encoder, found.tokenizer, tmp_path / name)
        theirs = transformers.CLIPTextModel.from_pretrained(tmp_path / name).eval()
        with torch.inference_mode():
            expected = theirs(rows).last_hidden_state
            states = encoder(rows).states
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    t5 = text_model("transformers", str(write_folder(tmp_path / "t5", "T5EncoderModel")), L)
    assert not write_text_encoder(t5.load(), t5.tokenizer, tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "keys, parts, line",
    [
        (
            TRANSFORMER[:1],
            ["text_encoder", "tokenizer"],
            "unet (UNet2DConditionModel adds no vector of the whole text to the embedding of t: "
            "train with text.pooled=false)",
        ),
        (DIT, ["text_encoder", "tokenizer"], "transformer (DiTTransformer2DModel takes no text)"),
        (
            (*TRANSFORMER, "model.num_classes=0"),
            ["unet", "text_encoder", "tokenizer"],
            "pipeline (StableDiffusionPipeline draws latents alone: sample it step by step, as "
            "docs/toolbox.md shows)",
        ),
    ],
    ids=["pooled", "dit", "pixels"],
)
def test_what_has_no_pipeline_says_why(
    keys: tuple[str, ...],
    parts: list[str],
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = "model.network=dit" not in keys
    tiny = ["model.base_channels=4", "model.groups=2", "model.channel_mults=[1]"]
    sizes = [*tiny, "model.blocks_per_level=1", "model.attention_factors=[1]"] if own else []
    config = load_config(RunConfig, None, ["name=a", "data.url=b", *sizes, *TEXT, *keys])
    tokenizer = Tokenizer.trained(["a cat"], 300, 6)
    facts = {"config": to_dict(config), "image_shape": [8, 8, 1], "data_fingerprint": ""}
    facts |= run_config.tokenizer_facts(tokenizer)
    image_shape = ImageShape(8, 8, 1)
    state = training_run.training_state(config, image_shape, torch.device("cpu"), facts)
    run, out = committed(tmp_path / "run", state), tmp_path / "out"
    assert main(export.JOB, [run, "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["pipeline"], result["parts"]) == ("", parts)
    assert line in result["no_equivalent"]
    assert not (out / "model_index.json").exists()
