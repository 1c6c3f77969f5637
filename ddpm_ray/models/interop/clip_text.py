"""Our text encoder as transformers' CLIPTextModel, which computes the same function, and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ddpm_ray.models.interop.diffusers_config import (
    Config,
    UnsupportedModelError,
    refused_if_invalid,
)
from ddpm_ray.models.interop.diffusers_files import Write, read_json, read_weights, write_json
from ddpm_ray.models.interop.layouts import Layout, Tensors, gathered, on_meta_device, scattered
from ddpm_ray.models.interop.state_dict_names import Table
from ddpm_ray.models.text_encoder import TextEncoder, TextEncoderSpec

CLASS = "CLIPTextModel"
WEIGHTS = "model.safetensors"
OLD_WEIGHTS = "pytorch_model.bin"
PREFIX = "text_model."
DEFAULTS: Config = {"hidden_act": "quick_gelu", "max_position_embeddings": 77}
LEGACY_END = 2  # for this eos_token_id transformers takes the largest token as the end of a text


def write_clip_text(
    folder: str, spec: TextEncoderSpec, tensors: Tensors, start_token: int | None, write: Write
) -> None:
    """Save the encoder with the state_dict `tensors` for `CLIPTextModel.from_pretrained`."""
    theirs = scattered(Layout(CLASS, _names), on_meta_device(lambda: TextEncoder(spec)), tensors)
    write(f"{folder}/{WEIGHTS}", save(theirs, {"format": "pt"}))
    write_json(f"{folder}/config.json", clip_text_config(spec, start_token), write)


def clip_text_config(spec: TextEncoderSpec, start_token: int | None) -> dict[str, Any]:
    """config.json of the CLIPTextModel with the sizes of `spec`."""
    return {
        "architectures": [CLASS],
        "model_type": "clip_text_model",
        "vocab_size": spec.vocabulary,
        "hidden_size": spec.width,
        "intermediate_size": spec.mlp_width or 4 * spec.width,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "max_position_embeddings": spec.length,
        "hidden_act": "quick_gelu" if spec.quick_gelu else "gelu",
        "layer_norm_eps": spec.norm_eps,
        "attention_dropout": 0.0,
        "bos_token_id": start_token,
        "eos_token_id": spec.end_token,
        "pad_token_id": spec.null_tokens[-1],
        "dtype": "float32",
    }


def read_clip_text(
    folder: Path, end_token: int, null_tokens: tuple[int, ...]
) -> tuple[TextEncoderSpec, dict[str, Tensor]]:
    """Read the CLIPTextModel in a local folder; the tokens are those of its tokenizer.

    The vector of the whole text is that of the first `end_token`, which may differ from theirs.
    Raises UnsupportedModelError.
    """
    spec = _spec(read_json(folder / "config.json"), str(folder), end_token, null_tokens)
    path = folder / WEIGHTS
    tensors = read_weights(path if path.is_file() else folder / OLD_WEIGHTS)
    held = {name if name.startswith(PREFIX) else PREFIX + name: tensors[name] for name in tensors}
    held.pop(f"{PREFIX}embeddings.position_ids", None)  # 0, 1, ..., in files of earlier versions
    return spec, gathered(Layout(CLASS, _names), on_meta_device(lambda: TextEncoder(spec)), held)


def _spec(
    config: Config, where: str, end_token: int, null_tokens: tuple[int, ...]
) -> TextEncoderSpec:
    """The spec from config.json; raises UnsupportedModelError."""
    if CLASS not in (config.get("architectures") or ()):
        found = config.get("architectures")
        raise UnsupportedModelError(where, f"architectures is {found!r}; supported is {CLASS}")
    with refused_if_invalid(where):
        spec = TextEncoderSpec(
            config["vocab_size"],
            end_token,
            null_tokens,
            config["hidden_size"],
            config["num_hidden_layers"],
            config["num_attention_heads"],
            config["intermediate_size"],
            config.get("hidden_act", "quick_gelu") == "quick_gelu",
            config.get("layer_norm_eps", 1e-5),
        )
        spec.require_consistent()
    if spec.mlp_width == 4 * spec.width:
        spec = replace(spec, mlp_width=0)
    back = clip_text_config(spec, None)
    for key in ("hidden_act", "max_position_embeddings"):
        if (value := config.get(key, DEFAULTS[key])) != back[key]:
            raise UnsupportedModelError(where, f"{key} is {value!r}; supported is {back[key]!r}")
    return spec


def clip_text_limits(spec: TextEncoderSpec) -> list[str]:
    """Return what a CLIPTextModel with the sizes of `spec` computes in another way."""
    if spec.end_token != LEGACY_END:
        return []
    return [f"pooled text ({CLASS} takes it at the largest token if eos_token_id is {LEGACY_END})"]


def _names(network: TextEncoder) -> Table:
    """Names in CLIPTextModel, as its files had them from the first."""
    table: Table = {
        "token": ("text_model.embeddings.token_embedding",),
        "position": ("text_model.embeddings.position_embedding",),
        "norm_out": ("text_model.final_layer_norm",),
    }
    for number in range(network.spec.depth):
        layer = f"text_model.encoder.layers.{number}"
        for ours, theirs in (
            ("norm_1", ("layer_norm1",)),
            ("query_key_value", tuple(f"self_attn.{part}_proj" for part in "qkv")),
            ("attention_out", ("self_attn.out_proj",)),
            ("norm_2", ("layer_norm2",)),
            ("mlp_in", ("mlp.fc1",)),
            ("mlp_out", ("mlp.fc2",)),
        ):
            table[f"blocks.{number}.{ours}"] = tuple(f"{layer}.{name}" for name in theirs)
    return table
