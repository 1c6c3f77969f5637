"""Text encoders of open_clip in a local folder, as transformers' CLIPTextModelWithProjection.

A folder as open_clip saves it for the Hugging Face hub: open_clip_config.json, weights in
safetensors and tokenizer.json. The package open_clip is not needed. Texts are filled with token 0,
and the vector of a text is that of its largest token, the last of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.models.interop.diffusers_files import read_json
from ddpm_ray.models.interop.transformers_text import LEGACY_END, TOKENIZER, TextFolder
from ddpm_ray.redaction import sanitize

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
PAD = 0  # open_clip's tokenizers fill rows with zeros
MLP_RATIO = 4.0  # open_clip's default
SIZES = {  # of its text_cfg: open_clip's defaults
    "width": 512,
    "heads": 8,
    "layers": 12,
    "context_length": 77,
    "vocab_size": 49408,
}
FORM = {  # of its text_cfg: the only values whose network transformers' CLIP has
    "ls_init_value": None,
    "embed_cls": False,
    "pad_id": PAD,
    "no_causal_mask": False,
    "final_ln_after_pool": False,
    "pool_type": "argmax",
    "proj_bias": False,
    "proj_type": "linear",
    "act_kwargs": None,
    "norm_kwargs": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
    "hf_model_name": None,
    "tokenizer_mode": None,  # others cut or fold texts in another way
}
UNUSED = {  # of its text_cfg: keys that change nothing in such a network
    "output_tokens",
    "hf_tokenizer_name",
    "eos_id",  # of pool_type "eos"
    "hf_model_pretrained",  # these of hf_model_name
    "hf_proj_type",
    "hf_pooler_type",
}
KNOWN = {*SIZES, *FORM, *UNUSED, "mlp_ratio", "tokenizer_kwargs"}
BLOCK = {  # parts of one of its blocks: transformers' names
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
OF_TEXT = (
    "positional_embedding",
    "text_projection",
    "token_embedding.",
    "transformer.",
    "ln_final.",
)


@dataclass(frozen=True)
class OpenClipFolder(TextFolder):
    """A text encoder of open_clip in a folder, before its weights are read."""

    pad_token: int | None = PAD
    config: str = CONFIG
    takes_last: str = "its pool_type argmax takes"

    def _read(self, library: Any) -> tuple[Any, list[str]]:
        options = _options(self.path)
        hidden = int(options["width"] * options["mlp_ratio"])
        config = library.CLIPTextConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=hidden,
            projection_dim=self.pooled_width,
            num_hidden_layers=options["layers"],
            num_attention_heads=options["heads"],
            max_position_embeddings=self.positions,
            hidden_act="quick_gelu" if options["quick_gelu"] else "gelu",
            bos_token_id=self.vocabulary - 2,
            eos_token_id=self.end_token,
            pad_token_id=PAD,
            attn_implementation="sdpa",
        )
        model = library.CLIPTextModelWithProjection(config)
        tensors = _renamed(load_file(self.path / WEIGHTS))
        found = model.load_state_dict(tensors, strict=False)
        if found.unexpected_keys:
            raise ValueError(
                f"{WEIGHTS} has tensors of another network: {found.unexpected_keys[0]}"
            )
        lacking = [name for name in found.missing_keys if not name.endswith("position_ids")]
        return model.float(), lacking


def open_clip_folder(path: str) -> OpenClipFolder:
    """Look at the text encoder of open_clip in a local folder. Raises UnsupportedModelError."""
    folder = Path(path)
    files = (CONFIG, WEIGHTS, TOKENIZER)
    for name in files:
        if not (folder / name).is_file():
            remedy = (
                "save the model in safetensors, with its tokenizer, as open_clip's push_to_hf_hub "
                "does, or name the folder that has them"
            )
            raise UnsupportedModelError(path, f"there is no {name} in this folder: {remedy}")
    options = _options(folder)
    return OpenClipFolder(
        folder,
        "CLIPTextModelWithProjection",
        width=options["width"],
        pooled_width=options["embed_dim"],
        vocabulary=options["vocab_size"],
        positions=options["context_length"],
        end_token=LEGACY_END,
        files=files,
    )


def _options(folder: Path) -> dict[str, Any]:
    """The text_cfg with its defaults, quick_gelu and embed_dim. Raises UnsupportedModelError."""
    held = read_json(folder / CONFIG).get("model_cfg")
    text = held.get("text_cfg") if isinstance(held, dict) else None
    if not isinstance(held, dict) or not isinstance(text, dict):
        problem = "has no model_cfg with a text_cfg: it is not of a model of images and texts"
        raise UnsupportedModelError(str(folder / CONFIG), problem)
    if problem := _unlike_clip(text) or _bad_size(options := _with_defaults(held, text)):
        raise UnsupportedModelError(str(folder / CONFIG), problem)
    return options


def _unlike_clip(text: dict[str, Any]) -> str:
    """The reason why a text_cfg is not of a network in the form of CLIP's; empty: it is."""
    for name, value in FORM.items():
        if text.get(name, value) != value:
            return (
                f"text_cfg.{name} is {sanitize(repr(text[name]))}; only text encoders in the form "
                f"of CLIP's, where it is {value!r}, are read"
            )
    if kwargs := text.get("tokenizer_kwargs"):
        return (
            f"text_cfg.tokenizer_kwargs is {sanitize(repr(kwargs))}; only tokenizers that "
            f"{TOKENIZER} describes whole, without it, are read"
        )
    if unknown := sorted(set(text) - KNOWN):
        return (
            f"text_cfg has the unknown key {sanitize(repr(unknown[0]))}; it may change the "
            f"network: known are {', '.join(sorted(KNOWN))}"
        )
    return ""


def _with_defaults(held: dict[str, Any], text: dict[str, Any]) -> dict[str, Any]:
    own = {"embed_dim": held.get("embed_dim"), "quick_gelu": held.get("quick_gelu", False)}
    return SIZES | {"mlp_ratio": MLP_RATIO} | text | own


def _bad_size(options: dict[str, Any]) -> str:
    """The reason why these options build no network; empty: they do."""
    for name in (*SIZES, "embed_dim"):
        value = options[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            return f"{name} is {sanitize(repr(value))}, and must be a whole number above 0"
    ratio = options["mlp_ratio"]
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < math.inf:
        return f"mlp_ratio is {sanitize(repr(ratio))}, and must be a number above 0"
    if not isinstance(options["quick_gelu"], bool):
        return f"quick_gelu is {sanitize(repr(options['quick_gelu']))}, and must be true or false"
    return ""


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the text encoder under transformers' names, in float32."""
    names = {name.removeprefix("text."): name for name in tensors}
    made: dict[str, Tensor] = {}
    for name, stored in names.items():
        if not name.startswith(OF_TEXT):
            continue  # of the images, and the scale of the contrastive loss
        value = tensors[stored].float()
        if name == "text_projection":
            made["text_projection.weight"] = value.T.contiguous()
            continue
        made |= _of_block(name, value) if name.startswith("transformer.") else _of_ends(name, value)
    return made


def _of_ends(name: str, value: Tensor) -> dict[str, Tensor]:
    """An embedding or the last norm."""
    name = name.replace("ln_final", "final_layer_norm")
    name = name.replace("positional_embedding", "embeddings.position_embedding.weight")
    return {f"text_model.{name.replace('token_embedding', 'embeddings.token_embedding')}": value}


def _of_block(name: str, value: Tensor) -> dict[str, Tensor]:
    """A tensor of a block; query, key and value are one matrix in open_clip."""
    _, _, number, part = name.split(".", 3)
    home = f"text_model.encoder.layers.{number}"
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        heads = zip("qkv", value.chunk(3), strict=True)
        return {f"{home}.self_attn.{one}_proj.{kind}": each.clone() for one, each in heads}
    stem, _, kind = part.rpartition(".")
    return {f"{home}.{BLOCK.get(stem, stem)}.{kind}": value}
