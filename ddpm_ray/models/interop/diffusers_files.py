"""Files of a model that diffusers saved: config.json, and weights as safetensors or .bin."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.models.interop.layouts import Tensors

Write: TypeAlias = Callable[[str, bytes], object]
"""write(path, data): store bytes at a path atomically."""
SAFETENSORS = "diffusion_pytorch_model.safetensors"
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
UNREADABLE = (
    EOFError,
    RuntimeError,
    ValueError,
    pickle.UnpicklingError,
    SafetensorError,
)


def autoencoder_folder(folder: str | Path) -> Path | None:
    """Folder of a pipeline's autoencoder: vae/, or LDMPipeline's vqvae/; None if it has none."""
    parts = (Path(folder, part) for part in ("vae", "vqvae"))
    return next((part for part in parts if part.is_dir()), None)


def part_folder(folder: str | Path, part: str) -> Path:
    """`folder`/`part` if a pipeline has this part there, else `folder` itself."""
    return Path(folder, part) if Path(folder, part).is_dir() else Path(folder)


def weights_file(folder: Path) -> Path:
    """The safetensors file in `folder`, or the path of the .bin file if there is none."""
    path = folder / SAFETENSORS
    return path if path.exists() else path.with_suffix(".bin")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a local file by name; see `read_tensors`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnsupportedModelError(str(path), f"cannot be read: {error}") from error
    return read_tensors(str(path), data)


def read_tensors(where: str, data: bytes) -> dict[str, Tensor]:
    """Read the tensors of a file by name: of safetensors, or of torch.save with weights_only.

    `where` is its path or URL. No code in the file is run: a pickle that would run some is refused.
    Raises UnsupportedModelError.
    """
    try:
        if where.endswith(".safetensors"):
            stored: object = load(data)
        else:
            stored = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        problem = (
            "torch.save did not write it, or it holds other objects than tensors, which are not "
            "loaded because they can run code"
        )
        remedy = "save the state_dict alone, best as .safetensors"
        raise UnsupportedModelError(where, f"cannot be read: {problem}; {remedy}") from error
    except UNREADABLE as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnsupportedModelError(where, f"cannot be read: {reason}") from error
    if not isinstance(stored, dict) or not all(
        isinstance(name, str) and isinstance(one, Tensor) for name, one in stored.items()
    ):
        raise UnsupportedModelError(where, "holds something other than tensors by name")
    return {name: one.detach() for name, one in stored.items()}


def with_new_attention_names(tensors: Tensors) -> dict[str, Tensor]:
    """Tensors under the names that attention layers have since diffusers 0.15."""
    renamed = {}
    for name, tensor in tensors.items():
        *path, layer, part = name.split(".")
        if "attentions" in path:
            layer = OLD_ATTENTION.get(layer, layer)
        renamed[".".join([*path, layer, part])] = tensor
    return renamed


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises UnsupportedModelError."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModelError(str(path), f"cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModelError(str(path), "is not a JSON object")
    return value


def write_weights(folder: str | Path, tensors: Tensors, write: Write) -> None:
    """Store the tensors of one part of a model in its folder, as safetensors."""
    write(f"{folder}/{SAFETENSORS}", save(dict(tensors), {"format": "pt"}))


def write_json(path: str, value: Any, write: Write) -> None:
    """Store JSON text as these files hold it: indented, keys sorted."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write(path, text.encode())
