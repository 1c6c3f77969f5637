"""The folder of a StableDiffusionPipeline is a model of ours, which draws its images.

The truth is diffusers itself, with random weights; the tokenizer is CLIP's with few words.
"""

import importlib
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("tokenizers", reason="needs the extra [text]")
pytest.importorskip("transformers", reason="needs the extra [text]")
pytest.importorskip("diffusers", reason="needs diffusers: no dependency of ours")

import ddpm_ray
from ddpm_ray.assembly.checkpoint_loading import trained_weights
from ddpm_ray.cli.main import main
from ddpm_ray.counter_rng import Purpose, normal
from ddpm_ray.jobs import import_model
from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.models.interop.stable_diffusion_folder import read_tokenizer_files

diffusers: Any = importlib.import_module("diffusers")
transformers: Any = importlib.import_module("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs: numpy 2
LENGTH, WIDTH = 9, 8
FORMS: dict[str, dict[str, Any]] = {
    "1": {"heads": 2, "act": "quick_gelu", "pad": "<|endoftext|>", "linear": False},
    "2": {"heads": [2, 4], "act": "gelu", "pad": "!", "linear": True},
}
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def tokens() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of CLIP's form: bytes, bytes at the end of a word, a few words."""
    library = pytest.importorskip("tokenizers")
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("do", "g</w>")]
    words = ["!", *(one for one in alphabet if one != "!"), *(f"{one}</w>" for one in alphabet)]
    words += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}, merges


def written(folder: Path, form: str) -> Any:
    """The pipeline, saved to `folder`."""
    of, (vocabulary, merges) = FORMS[form], tokens()
    tokenizer = transformers.CLIPTokenizer(
        vocab=vocabulary, merges=merges, pad_token=of["pad"], model_max_length=LENGTH
    )
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=4,
        block_out_channels=[8, 16],
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=of["heads"],
        cross_attention_dim=WIDTH,
        use_linear_projection=of["linear"],
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=[4, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            hidden_act=of["act"],
            eos_token_id=2,  # as published: the pooled text is no part of the pipeline
        )
    )
    for module, scale in ((unet, 0.2), (text, 0.5), (vae, 0.2)):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=scale)
    scheduler = diffusers.DDIMScheduler(
        **SCHEDULE, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    if form == "1":  # as published: without tokenizer.json
        (folder / "tokenizer/tokenizer.json").unlink()
        (folder / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / "tokenizer/merges.txt").write_text("\n".join(lines) + "\n")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("form", FORMS)
def test_a_model_of_ours_draws_the_images_of_the_pipeline(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From equal noise, with guidance and a prompt that is cut; and so does the imported run."""
    folder, prompts = tmp_path / "theirs", ["a cat", f"Dogs, {string.ascii_letters}"]
    pipeline = written(folder, form)
    model = ddpm_ray.load(folder, "cpu")
    tokenizer = model.denoiser.takes.tokenizer
    assert tokenizer is not None
    rows = pipeline.tokenizer(
        [*prompts, ""], padding="max_length", truncation=True, return_tensors="pt"
    ).input_ids
    assert torch.equal(tokenizer.encode([*prompts, ""]), rows)
    expected = model.sample(2, prompts=prompts, guidance_scale=4, steps=5)
    shape = model.denoiser.codec.shape(model.image_shape)
    noise = normal(0, Purpose.SAMPLE_START, 0, torch.arange(2), shape)
    found = pipeline(
        prompts, latents=noise, num_inference_steps=5, guidance_scale=4, output_type="np"
    ).images
    assert expected.std() > 10
    assert np.abs((found * 255).round() - expected.astype(int)).max() <= 1
    words = [str(folder), str(tmp_path / "run"), "layout=diffusers"]
    assert main(import_model.JOB, words) == 0
    capsys.readouterr()
    again = ddpm_ray.load(tmp_path / "run", "cpu")
    assert (again.sample(2, prompts=prompts, guidance_scale=4, steps=5) == expected).all()
    held = trained_weights(str(folder))
    assert held.tokenizer_sha256 == tokenizer.sha256
    assert held.codec == "latents"


def test_of_another_scheduler_the_schedule_and_the_sampler_are_read(tmp_path: Path) -> None:
    pipeline = written(tmp_path, "1")
    scheduler = diffusers.PNDMScheduler(**SCHEDULE, skip_prk_steps=True, steps_offset=1)
    scheduler.save_pretrained(tmp_path / "scheduler")
    model = ddpm_ray.load(tmp_path, "cpu")
    assert model.settings.sampler == "plms"
    torch.testing.assert_close(
        pipeline.scheduler.alphas_cumprod, model.denoiser.schedule.alpha_bar[1:].float()
    )


def test_a_scheduler_that_was_converted_from_pndm_is_read(tmp_path: Path) -> None:
    """As in the published folders of version 2: DDIM with a key of PNDM."""
    written(tmp_path, "2")
    file = tmp_path / "scheduler/scheduler_config.json"
    published = {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | published))
    assert ddpm_ray.load(tmp_path, "cpu").settings.sampler == "ddim"


def test_a_scheduler_without_a_noise_schedule_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "1")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UnsupportedModelError, match="_class_name is 'FlowMatchEulerDiscreteSch"):
        ddpm_ray.load(tmp_path, "cpu")


@pytest.mark.parametrize("later", [False, True])
def test_the_padding_is_the_one_that_transformers_takes(later: bool, tmp_path: Path) -> None:
    """Of two files that differ; the later form of tokenizer_config.json goes first."""
    written(tmp_path, "2")
    home = tmp_path / "tokenizer"
    config = json.loads((home / "tokenizer_config.json").read_text())
    config = {key: value for key, value in config.items() if key != "added_tokens_decoder"}
    config |= {"pad_token": "<|endoftext|>"} | ({"added_tokens_decoder": {}} if later else {})
    (home / "tokenizer_config.json").write_text(json.dumps(config))
    (home / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    wanted = "<|endoftext|>" if later else "!"
    assert read_tokenizer_files(tmp_path).pad == wanted


def test_another_pipeline_with_this_network_is_refused(tmp_path: Path) -> None:
    """Its other parts, as a ControlNet, would be left out."""
    written(tmp_path, "1")
    file = tmp_path / "model_index.json"
    name = {"_class_name": "StableDiffusionControlNetPipeline"}
    file.write_text(json.dumps(json.loads(file.read_text()) | name))
    with pytest.raises(UnsupportedModelError, match="_class_name is 'StableDiffusionControlNetPi"):
        ddpm_ray.load(tmp_path, "cpu")


def test_the_network_of_inpainting_is_refused(tmp_path: Path) -> None:
    """Its images are in another order than ours, and no tensor says so."""
    written(tmp_path, "1")
    config = json.loads((tmp_path / "unet/config.json").read_text()) | {"in_channels": 9}
    diffusers.UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "unet")
    with pytest.raises(UnsupportedModelError, match="in_channels is 9; supported is 4, as of"):
        ddpm_ray.load(tmp_path, "cpu")


@pytest.mark.parametrize(
    "file, change, problem",
    [
        ("text_encoder", {"hidden_act": "relu"}, "hidden_act is 'relu'; supported is 'gelu'"),
        ("text_encoder", {"architectures": ["BertModel"]}, "supported is CLIPTextModel"),
        ("text_encoder", {"max_position_embeddings": 7}, "max_position_embeddings is 7; suppo"),
        ("unet", {"cross_attention_dim": 9}, "cross_attention_dim is 9, and the text encoder's"),
        ("unet", {"time_cond_proj_dim": 4}, "time_cond_proj_dim is 4"),
        ("unet", {"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),
    ],
)
def test_parts_with_another_function_are_refused_by_their_key(
    file: str, change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    written(tmp_path, "1")
    path = tmp_path / file / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UnsupportedModelError, match=problem) as refused:
        ddpm_ray.load(tmp_path, "cpu")
    assert "UnsupportedModelError(" not in str(refused.value)
