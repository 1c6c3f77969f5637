"""Tiny text encoders with random weights in folders that transformers saves."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddpm_ray.data.tokenizer import Tokenizer

L = 8  # tokens of a text
TEXTS = ["a cat", "a dog", "a bird and a fish"]
KINDS = (
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPModel",
    "T5EncoderModel",
    "T5ForConditionalGeneration",
)


def write_folder(folder: Path, kind: str) -> Path:
    """Write a model of that class, and its tokenizer, into `folder`."""
    import transformers  # here: it takes seconds

    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer.trained(TEXTS, 300, L)
    if kind.startswith("T5"):
        tokenizer = with_padding(tokenizer)
    for name, content in tokenizer.for_transformers().items():
        (folder / name).write_text(content)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = getattr(transformers, kind)(_config(transformers, kind, tokenizer))
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    return folder


def read_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.read(str(folder), L)


def with_padding(tokenizer: Tokenizer) -> Tokenizer:
    """T5's form: padding of its own, and no start; ends with </s>."""
    held = json.loads(tokenizer.json)
    for one, name in zip(held["added_tokens"], ("<pad>", "</s>"), strict=True):
        held["model"]["vocab"][name] = held["model"]["vocab"].pop(one["content"])
        one["content"] = name
    return Tokenizer(json.dumps(held), tokenizer.length)


def _config(library: Any, kind: str, tokenizer: Tokenizer) -> Any:
    if kind.startswith("T5"):
        return library.T5Config(
            vocab_size=tokenizer.vocabulary + 3,
            d_model=12,
            d_kv=4,
            d_ff=16,
            num_layers=2,
            num_heads=2,
            pad_token_id=0,
            eos_token_id=tokenizer.end_token,
            decoder_start_token_id=0,
        )
    text = {
        "vocab_size": tokenizer.vocabulary,
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": L,
        "projection_dim": 6,
        "bos_token_id": tokenizer.start_token,
        "eos_token_id": tokenizer.end_token,
        "pad_token_id": tokenizer.end_token,
    }
    if kind != "CLIPModel":
        return library.CLIPTextConfig(**text)
    image = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 4,
        "patch_size": 2,
    }
    return library.CLIPConfig(text_config=text, vision_config=image, projection_dim=6)
