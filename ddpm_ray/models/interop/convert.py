"""Import and export of U-Nets and schedules: diffusers, guided-diffusion, Ho et al.'s weights.

A `UNetSpec` holds the arguments of UNet; `tensors` is a state_dict; `facts` are settings under the
keys of a run's config: {"schedule": ..., "objective": ..., "sampling": ...}. A model that cannot be
converted exactly is refused. The other libraries count steps from 0: their t is ours minus 1.
"""

import io
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ddpm_ray.models.interop import state_dict_names
from ddpm_ray.models.interop.diffusers_config import (
    Config,
    UnsupportedModelError,
    config_from_spec,
    image_size_of,
    spec_from_config,
)
from ddpm_ray.models.interop.diffusers_schedulers import Export, Facts, from_scheduler, to_pipeline
from ddpm_ray.models.layers import heads
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec

Tensors: TypeAlias = Mapping[str, Tensor]

WEIGHTS = "diffusion_pytorch_model"
UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    pickle.UnpicklingError,
    SafetensorError,
)
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Layout(NamedTuple):
    """Names and shapes that another code base gives to the tensors of a U-Net."""

    name: str
    table: Callable[[UNet], state_dict_names.Table]
    attention_axes: int  # trailing axes of length 1 where attention layers are 1x1 convolutions


DIFFUSERS = Layout("UNet2DModel", state_dict_names.diffusers, 0)
GUIDED_DIFFUSION = Layout("guided-diffusion", state_dict_names.guided, 1)
HO_IN_PYTORCH = Layout("Ho et al.'s weights", state_dict_names.ho, 2)


def from_diffusers(config: Config, tensors: Tensors) -> tuple[UNetSpec, dict[str, Tensor]]:
    """UNet's arguments and state_dict from those of a `UNet2DModel`; raises UnsupportedModelError.

    `num_class_embeds` includes the null label, whose embedding is the last row. Input channels
    beyond the output channels are read as conditioning, twice as many output as input channels as
    a learned variance.
    """
    spec = spec_from_config(config)
    renamed = {}
    for name, tensor in tensors.items():
        *path, layer, part = name.split(".")
        if "attentions" in path:  # files from before diffusers 0.15
            layer = OLD_ATTENTION.get(layer, layer)
        renamed[".".join([*path, layer, part])] = tensor
    return spec, _gathered(DIFFUSERS, spec, renamed)


def to_diffusers(
    spec: UNetSpec, tensors: Tensors, image_size: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and tensors that `UNet2DModel.from_pretrained` reads as this network.

    Raises UnsupportedModelError for a spec without an equivalent, as num_heads above 1.
    """
    return config_from_spec(spec, image_size), _scattered(DIFFUSERS, spec, tensors)


def from_ho(tensors: Tensors, spec: UNetSpec) -> dict[str, Tensor]:
    """UNet's state_dict from Ho et al.'s weights under their PyTorch names (`down.0.block.0...`).

    The published networks use the default spec. Raises UnsupportedModelError for missing or extra
    names and for shapes that differ from the spec's.
    """
    return _gathered(HO_IN_PYTORCH, spec, tensors)


def to_ho(spec: UNetSpec, tensors: Tensors) -> dict[str, Tensor]:
    """The inverse of `from_ho`, with the attention's layers as 1x1 convolutions [C, C, 1, 1]."""
    return _scattered(HO_IN_PYTORCH, spec, tensors)


def from_guided_diffusion(
    tensors: Tensors, spec: UNetSpec, *, new_attention_order: bool = False
) -> dict[str, Tensor]:
    """UNet's state_dict from guided-diffusion's or improved-diffusion's (`input_blocks.0.0...`).

    These U-Nets use the variant GUIDED with the published numbers of heads. A network of K classes
    without a null label gets a row of zeros for it, which leaves the time embedding as it is.
    `new_attention_order` is their flag; without it, query, key and value rows are stored head by
    head. Raises UnsupportedModelError.
    """
    tensors, label = dict(tensors), tensors.get("label_emb.weight")
    if label is not None and len(label) == spec.num_classes:
        tensors["label_emb.weight"] = torch.cat([label, label.new_zeros(1, label.shape[1])])
    ours = _gathered(GUIDED_DIFFUSION, spec, tensors)
    return ours if new_attention_order else _reordered(ours, spec, by_head=False)


def to_guided_diffusion(
    spec: UNetSpec, tensors: Tensors, *, new_attention_order: bool = False
) -> dict[str, Tensor]:
    """The inverse of `from_guided_diffusion`; a null label of zeros is omitted."""
    ours = tensors if new_attention_order else _reordered(tensors, spec, by_head=True)
    theirs = _scattered(GUIDED_DIFFUSION, spec, ours)
    label = theirs.get("label_emb.weight")
    if label is not None and not label[-1].any():
        theirs["label_emb.weight"] = label[:-1].clone()
    return theirs


class DiffusersModel(NamedTuple):
    """A U-Net that diffusers saved, by the names of UNet."""

    spec: UNetSpec
    tensors: dict[str, Tensor]
    facts: dict[str, dict[str, Any]]
    image_size: tuple[int, int]  # (H, W)


def read_folder(folder: str | Path) -> DiffusersModel:
    """Read the model in a folder that diffusers saved.

    The U-Net is in unet/ and the scheduler in scheduler/, or both in the folder itself. Weights are
    read from safetensors or else from a .bin file with weights_only, so that no code in it is run.
    Raises UnsupportedModelError.
    """
    unet = _home(Path(folder), "unet")
    path = unet / f"{WEIGHTS}.safetensors"
    config = _json(unet / "config.json")
    facts = from_scheduler(_json(_home(Path(folder), "scheduler") / "scheduler_config.json"))
    if not path.exists():
        path = path.with_suffix(".bin")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UnsupportedModelError(str(path), f"cannot be read: {error}") from error
    spec, tensors = from_diffusers(config, read_tensors(str(path), data))
    return DiffusersModel(spec, tensors, facts, image_size_of(config))


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
            "it is no file of torch.save, or holds more than tensors, as code, which is not run"
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


def write_folder(
    folder: str | Path,
    spec: UNetSpec,
    tensors: Tensors,
    facts: Facts,
    image_size: tuple[int, int],
    write: Callable[[str, bytes], object],
) -> Export:
    """Save for `DiffusionPipeline.from_pretrained(folder)`; return the exported sampling settings.

    `image_size` is (H, W). `write` stores bytes at a path atomically. The weights come first,
    since a full disk fails on the largest file, and model_index.json last: without it the folder
    is not a model. Raises UnsupportedModelError, before anything is written, for a model that
    cannot be exported.
    """
    config, theirs = to_diffusers(spec, tensors, image_size)
    export = to_pipeline(facts)
    write(f"{folder}/unet/{WEIGHTS}.safetensors", save(theirs, {"format": "pt"}))
    files = {
        "unet/config.json": config,
        "scheduler/scheduler_config.json": export.scheduler,
        "model_index.json": export.model_index,
    }
    for name, value in files.items():
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
        write(f"{folder}/{name}", text.encode())
    return export


def _gathered(layout: Layout, spec: UNetSpec, tensors: Tensors) -> dict[str, Tensor]:
    """UNet's state_dict from tensors in `layout`; every tensor must be used."""
    network, left = _network(spec), dict(tensors)
    table, ours, missing = layout.table(network), {}, []
    for name, expected in network.state_dict().items():
        module, _, part = name.rpartition(".")
        names = [f"{theirs}.{part}" for theirs in table.get(module, (f"(no place for {module})",))]
        missing += [name for name in names if name not in left]
        if missing:
            continue
        joined = torch.cat([left.pop(name) for name in names])
        if _without_ones(joined.shape) != _without_ones(expected.shape):
            raise UnsupportedModelError(
                layout.name,
                f"{names[0]} makes {list(joined.shape)} where this spec has {list(expected.shape)}",
            )
        ours[name] = joined.reshape(expected.shape)
    for problem, names in (("the file lacks", missing), ("there is no place for", [*left])):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UnsupportedModelError(layout.name, f"{problem} {', '.join(names[:3])}{more}")
    return ours


def _scattered(layout: Layout, spec: UNetSpec, tensors: Tensors) -> dict[str, Tensor]:
    """Tensors in `layout` from UNet's state_dict."""
    table, theirs = layout.table(_network(spec)), {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if module not in table:
            raise UnsupportedModelError(layout.name, f"there is no place for {name}")
        if tensor.ndim == 2 and ".attention." in name:
            tensor = tensor.reshape(*tensor.shape, *[1] * layout.attention_axes)
        for other, piece in zip(table[module], tensor.chunk(len(table[module])), strict=True):
            theirs[f"{other}.{part}"] = piece.clone(memory_format=torch.contiguous_format)
    return theirs


def _reordered(tensors: Tensors, spec: UNetSpec, *, by_head: bool) -> dict[str, Tensor]:
    """Order the query, key and value rows by head, or as all queries, all keys, all values."""
    moved = dict(tensors)
    for name, tensor in tensors.items():
        if name.rpartition(".")[0].endswith("query_key_value"):
            count = heads(len(tensor) // 3, spec.variant)
            lengths = (3, count) if by_head else (count, 3)
            rows = tensor.reshape(*lengths, -1, *tensor.shape[1:])
            moved[name] = rows.transpose(0, 1).reshape(tensor.shape)
    return moved


def _network(spec: UNetSpec) -> UNet:
    """The network on the meta device: shapes without values."""
    try:
        with torch.device("meta"):
            return UNet(spec)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedModelError("this spec", f"does not build a network: {error}") from error


def _without_ones(shape: torch.Size) -> list[int]:
    """The shape without its trailing 1s."""
    return [*shape[: max((i for i, n in enumerate(shape, 1) if n != 1), default=0)]]


def _home(folder: Path, part: str) -> Path:
    return folder / part if (folder / part).is_dir() else folder


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UnsupportedModelError(str(path), f"cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UnsupportedModelError(str(path), "is no JSON object")
    return value
