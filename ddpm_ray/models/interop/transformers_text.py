"""Text encoders of transformers in a local folder: CLIP and T5; the only importer of transformers.

A folder is data: config.json, weights in safetensors and tokenizer.json. No other file is read, no
config names a class that is looked up, and nothing is fetched. B: batch; L: tokens; W: width of
their vectors; E: width of the vector of the whole text.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.models.interop.diffusers_files import read_json
from ddpm_ray.models.text_encoder import EncodedText
from ddpm_ray.redaction import counted

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"  # of one file, of several
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
ARCHITECTURES = {  # of config.json: the class that is loaded
    "CLIPTextModel": "CLIPTextModel",
    "CLIPTextModelWithProjection": "CLIPTextModelWithProjection",
    "CLIPModel": "CLIPModel",
    "T5EncoderModel": "T5EncoderModel",
    "T5Model": "T5EncoderModel",
    "T5ForConditionalGeneration": "T5EncoderModel",
}
LEGACY_END = 2  # with this eos_token_id CLIP takes the largest token of a row as its end
REMEDY = "name a local folder of transformers; names of a hub are not looked up"


@dataclass(frozen=True)
class TextFolder:
    """A text encoder in a folder, before its weights are read."""

    path: Path
    kind: str  # the class that is loaded
    width: int  # W
    pooled_width: int  # E
    vocabulary: int  # rows of its table of tokens
    positions: int  # most tokens of a text; 0: any number
    end_token: int | None  # that CLIP looks for; None: it needs none
    files: tuple[str, ...]  # all that is read
    pad_token: int | None = None  # that fills rows; None: the tokenizer's own
    config: str = CONFIG  # file of its sizes, for errors
    takes_last: str = f"with eos_token_id {LEGACY_END} it takes"  # a text's end, for errors

    @property
    def is_clip(self) -> bool:
        """Whether it is CLIP's; else T5's."""
        return self.kind.startswith("CLIP")

    def sha256(self) -> str:
        """One hash of all files, by name: config, weights, tokenizer."""
        total = hashlib.sha256()
        for name in self.files:
            with (self.path / name).open("rb") as file:
                total.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return total.hexdigest()

    def require_tokens(self, end_token: int, vocabulary: int, length: int) -> None:
        """Raise UnsupportedModelError unless it takes rows of `length` tokens of this tokenizer."""
        problem = ""
        if vocabulary > self.vocabulary:
            problem = (
                f"{TOKENIZER} has {vocabulary} tokens, and {self.config} {self.vocabulary}: they "
                "are not of one model"
            )
        elif self.positions and length > self.positions:
            problem = f"text.length is {length}, and its texts have at most {self.positions} tokens"
        elif self.end_token == LEGACY_END:
            if end_token != vocabulary - 1:
                problem = (
                    f"{self.takes_last} the last token of its vocabulary as the end of a text, and "
                    f"{TOKENIZER} ends texts with token {end_token}"
                )
        elif self.end_token is not None and end_token != self.end_token:
            problem = (
                f"its eos_token_id is {self.end_token}, and {TOKENIZER} ends texts with token "
                f"{end_token}"
            )
        if problem:
            raise UnsupportedModelError(str(self.path), problem)

    def load(self, end_token: int) -> nn.Module:
        """Read the weights, in float32: tokens int64 [B, L] -> EncodedText.

        Raises UnsupportedModelError.
        """
        library = _library(str(self.path))
        try:
            model, missing = self._read(library)
        except Exception as error:  # of many types, by what is wrong with the files
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UnsupportedModelError(str(self.path), f"cannot be read: {reason}") from error
        if missing:
            lacking = counted(len(missing), "tensor")
            problem = f"its weights lack {lacking}, the first is {missing[0]}"
            raise UnsupportedModelError(str(self.path), problem)
        return ClipText(model) if self.is_clip else T5Text(model, end_token)

    def _read(self, library: Any) -> tuple[Any, list[str]]:
        """The model in float32, and the names of tensors that its weights lack."""
        # A file may name another attention, which transformers would fetch: so it is set here.
        model, found = getattr(library, self.kind).from_pretrained(
            self.path,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="sdpa",
            dtype=torch.float32,
            output_loading_info=True,
        )
        return model, sorted(found["missing_keys"])


def text_folder(path: str) -> TextFolder:
    """Look at the text encoder in a local folder. Raises UnsupportedModelError."""
    folder = Path(path)
    if not folder.is_dir():
        raise UnsupportedModelError(path, f"there is no such folder on this machine; {REMEDY}")
    if (folder / "adapter_config.json").exists():
        raise UnsupportedModelError(path, "holds an adapter of another model; merge the two")
    weights: tuple[str, ...] = (WEIGHTS,)
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        weights = (INDEX, *_shards(folder))
    files = (CONFIG, *weights, TOKENIZER)
    for name in files:
        if not (folder / name).is_file():
            has_more = name in weights and any(folder.glob("*.bin"))
            convert = "; save the model with safe_serialization=True" if has_more else ""
            raise UnsupportedModelError(path, f"there is no {name} in this folder{convert}")
    config = read_json(folder / CONFIG)
    return _described(folder, config, files)


def _shards(folder: Path) -> list[str]:
    """The files of the weights that the index names; UnsupportedModelError for another place."""
    named = read_json(folder / INDEX).get("weight_map")
    names = sorted({str(one) for one in named.values()}) if isinstance(named, dict) else []
    if not names or any(Path(one).name != one or not one.endswith(".safetensors") for one in names):
        raise UnsupportedModelError(str(folder / INDEX), "names no files of this folder")
    return names


def _described(folder: Path, config: dict[str, Any], files: tuple[str, ...]) -> TextFolder:
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    kind = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UnsupportedModelError(
            str(folder), f"holds {name!r}; text encoders are {', '.join(ARCHITECTURES)}"
        )
    if "quantization_config" in config:
        raise UnsupportedModelError(str(folder), "is quantized; save it in float32 or bfloat16")
    library = _library(str(folder))
    try:
        full = getattr(library, kind).config_class.from_dict(config)
        return TextFolder(folder, kind, *_sizes(kind, full), files)
    except Exception as error:  # of many types, by what is wrong with the values
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnsupportedModelError(str(folder / CONFIG), f"cannot be read: {reason}") from error


def _sizes(kind: str, full: Any) -> tuple[int, int, int, int, int | None]:
    """Width, width of the vector, vocabulary, positions and end token. Raises ValueError."""
    if kind == "T5EncoderModel":
        width = _whole(full, "d_model")
        return width, width, _whole(full, "vocab_size"), 0, None
    text = full.text_config if kind == "CLIPModel" else full
    width = _whole(text, "hidden_size")
    return (
        width,
        width if kind == "CLIPTextModel" else _whole(full, "projection_dim"),
        _whole(text, "vocab_size"),
        _whole(text, "max_position_embeddings"),
        _whole(text, "eos_token_id"),
    )


def _whole(config: Any, key: str) -> int:
    value = getattr(config, key)
    if not isinstance(value, int):  # lists of several end tokens, and null, pass transformers
        raise ValueError(f"{key} is {value!r}, and must be a whole number")
    return value


class ClipText(nn.Module):
    """CLIP's: the last hidden states, and the vector of the end token, projected if it is there."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.projection: nn.Module | None = getattr(model, "text_projection", None)
        self.text = model if self.projection is None else model.text_model

    def forward(self, tokens: Tensor) -> EncodedText:
        """Encode tokens [B, L], without a mask: each vector depends on the tokens before it."""
        found = self.text(tokens)
        pooled = found.pooler_output
        if self.projection is not None:
            pooled = self.projection(pooled)
        return EncodedText(found.last_hidden_state, pooled)

    def files(self) -> dict[str, bytes]:
        """The files of a CLIPTextModel without projection, by name."""
        tensors = {name: one.contiguous() for name, one in self.text.state_dict().items()}
        config = self.text.config.to_json_string().encode()
        return {WEIGHTS: save(tensors, {"format": "pt"}), CONFIG: config}


class T5Text(nn.Module):
    """T5's: the last hidden states, and their mean over the tokens of the text, its end included.

    Attention is masked: no vector depends on the padding. Those of the padding are what T5 makes of
    it from the text.
    """

    def __init__(self, model: Any, end_token: int) -> None:
        super().__init__()
        self.model, self.end_token = model, end_token

    def forward(self, tokens: Tensor) -> EncodedText:
        """Encode tokens [B, L]; those after the first end token are padding."""
        ends = tokens == self.end_token
        mask = ends.cumsum(dim=1) - ends.long() == 0  # bool [B, L], true up to the first end
        # Of [B, L] transformers asks in Python whether all are true, and each step waits for that.
        dtype = self.model.dtype
        bias = torch.zeros(mask.shape, dtype=dtype, device=tokens.device)
        bias = bias.masked_fill(~mask, torch.finfo(dtype).min)[:, None, None]  # [B, 1, 1, L]
        states = self.model(tokens, attention_mask=bias).last_hidden_state
        kept = mask[:, :, None]
        pooled = torch.where(kept, states.float(), 0).sum(dim=1) / kept.sum(dim=1)
        return EncodedText(states, pooled)


def clip_tokenizer_json(where: str, vocabulary: dict[str, int], merges: str) -> str:
    """The tokenizer.json of CLIP's tokenizer, of its vocab.json and merges.txt.

    Raises UnsupportedModelError, which names `where`.
    """
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    try:
        made = _library(where).CLIPTokenizer(
            vocab=vocabulary, merges=[tuple(line.split()) for line in lines]
        )
    except Exception as error:  # of many types, by what is wrong with the files
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnsupportedModelError(where, f"cannot be read: {reason}") from error
    return str(made.backend_tokenizer.to_str())


def _library(where: str) -> Any:
    """The library `transformers`; UnsupportedModelError with the command that installs it."""
    try:
        import transformers
    except ImportError:
        problem = "the package transformers is not installed: pip install 'ddpm-ray[text]'"
        raise UnsupportedModelError(where, problem) from None
    return transformers
