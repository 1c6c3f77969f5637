"""U-Nets and schedules of others, and ours as others read them: diffusers, guided-diffusion, Ho.

A `Form` holds the arguments of UNet, tensors are its state_dict, facts are values under the names
of a run's config: {"schedule": ..., "objective": ..., "sampling": ...}. What this U-Net or these
samplers cannot be is refused, never bent. Their steps count from 0: their t is ours minus 1.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ddpm_ray.models.interop import state_dict_names
from ddpm_ray.models.interop.diffusers_config import (
    Config,
    Facts,
    ForeignModelError,
    Form,
    config_of,
    form_of,
    from_scheduler,
)
from ddpm_ray.models.interop.diffusers_schedulers import Export, to_pipeline
from ddpm_ray.models.layers import heads
from ddpm_ray.models.unet import UNet

Tensors: TypeAlias = Mapping[str, Tensor]

WEIGHTS = "diffusion_pytorch_model"
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Layout(NamedTuple):
    """How a code base keeps a U-Net."""

    name: str
    table: Callable[[UNet], state_dict_names.Table]
    attention_axes: int  # of length 1, behind the two of a dense layer: their 1x1 convolutions


DIFFUSERS = Layout("UNet2DModel", state_dict_names.diffusers, 0)
GUIDED_DIFFUSION = Layout("guided-diffusion", state_dict_names.guided, 1)
HO_IN_PYTORCH = Layout("Ho et al.'s weights", state_dict_names.ho, 2)


def from_diffusers(config: Config, tensors: Tensors) -> tuple[Form, dict[str, Tensor]]:
    """A `UNet2DModel` as UNet's arguments and state_dict; raises ForeignModelError, one line.

    `num_class_embeds` counts the null label: the last row is taken for it. More input than output
    channels are a condition; twice as many outputs as inputs, a learned variance.
    """
    form = form_of(config)
    renamed = {}
    for name, tensor in tensors.items():
        *path, layer, part = name.split(".")
        if "attentions" in path:  # files from before diffusers 0.15
            layer = OLD_ATTENTION.get(layer, layer)
        renamed[".".join([*path, layer, part])] = tensor
    return form, _gathered(DIFFUSERS, form, renamed)


def to_diffusers(form: Form, tensors: Tensors) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and tensors that `UNet2DModel.from_pretrained` reads as this network.

    Raises ForeignModelError for a form that it cannot be: heads by number, not by channels.
    """
    return config_of(form), _scattered(DIFFUSERS, form, tensors)


def from_ho(tensors: Tensors, form: Form) -> dict[str, Tensor]:
    """UNet's state_dict from Ho et al.'s weights under their PyTorch names (`down.0.block.0...`).

    The published networks' form has the defaults. Raises ForeignModelError for names that are
    missing or left over, and for shapes that are not the form's.
    """
    return _gathered(HO_IN_PYTORCH, form, tensors)


def to_ho(form: Form, tensors: Tensors) -> dict[str, Tensor]:
    """The inverse of `from_ho`, with the attention's layers as 1x1 convolutions [C, C, 1, 1]."""
    return _scattered(HO_IN_PYTORCH, form, tensors)


def from_guided_diffusion(
    tensors: Tensors, form: Form, *, new_attention_order: bool = False
) -> dict[str, Tensor]:
    """UNet's state_dict from guided-diffusion's or improved-diffusion's (`input_blocks.0.0...`).

    Their U-Nets have GUIDED as `variant`, with the published heads and switches. Where they know
    K classes and no null label, that becomes a row of zeros: no class is added to the embedding.
    `new_attention_order` is their flag; without it rows lie head by head. Raises ForeignModelError.
    """
    tensors, label = dict(tensors), tensors.get("label_emb.weight")
    if label is not None and len(label) == form["num_classes"]:
        tensors["label_emb.weight"] = torch.cat([label, label.new_zeros(1, label.shape[1])])
    ours = _gathered(GUIDED_DIFFUSION, form, tensors)
    return ours if new_attention_order else _reordered(ours, form, by_head=False)


def to_guided_diffusion(
    form: Form, tensors: Tensors, *, new_attention_order: bool = False
) -> dict[str, Tensor]:
    """The inverse of `from_guided_diffusion`; a null label of zeros is left out again."""
    ours = tensors if new_attention_order else _reordered(tensors, form, by_head=True)
    theirs = _scattered(GUIDED_DIFFUSION, form, ours)
    label = theirs.get("label_emb.weight")
    if label is not None and not label[-1].any():
        theirs["label_emb.weight"] = label[:-1].clone()
    return theirs


def read_folder(folder: str | Path) -> tuple[Form, dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Form, state_dict and facts of a model that diffusers saved; raises ForeignModelError.

    The U-Net lies in unet/ or in the folder itself, so does the scheduler; weights are safetensors
    or, where there are none, a .bin that is read with weights_only: no code in it is run.
    """
    unet = _home(Path(folder), "unet")
    path = unet / f"{WEIGHTS}.safetensors"
    config = _json(unet / "config.json")
    facts = from_scheduler(_json(_home(Path(folder), "scheduler") / "scheduler_config.json"))
    try:
        if path.exists():
            stored: object = load_file(path)
        else:
            path = path.with_suffix(".bin")
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError,
            SafetensorError) as error:  # fmt: skip
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ForeignModelError(str(path), f"cannot be read: {reason}") from error
    if not isinstance(stored, dict) or not all(isinstance(t, Tensor) for t in stored.values()):
        raise ForeignModelError(str(path), "holds something else than tensors by name")
    return *from_diffusers(config, stored), facts


def write_folder(
    folder: str | Path,
    form: Form,
    tensors: Tensors,
    facts: Facts,
    write: Callable[[str, bytes], object],
) -> Export:
    """Save for `DiffusionPipeline.from_pretrained(folder)`, and return how that samples.

    `write` puts bytes at a path, whole or not at all. The largest file comes first, which is the
    one that a full disk refuses, and the index last: without it the folder is no model. Raises
    ForeignModelError for what it cannot be, with nothing written.
    """
    config, theirs = to_diffusers(form, tensors)
    export = to_pipeline(facts)
    write(f"{folder}/unet/{WEIGHTS}.safetensors", save(theirs, {"format": "pt"}))
    files = {"unet/config.json": config, "scheduler/scheduler_config.json": export.scheduler,
             "model_index.json": export.model_index}  # fmt: skip
    for name, value in files.items():
        text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
        write(f"{folder}/{name}", text.encode())
    return export


def _gathered(layout: Layout, form: Form, tensors: Tensors) -> dict[str, Tensor]:
    """Ours of theirs, every one of which must have its place."""
    network, left = _network(form), dict(tensors)
    table, ours, missing = layout.table(network), {}, []
    for name, expected in network.state_dict().items():
        module, _, part = name.rpartition(".")
        names = [f"{theirs}.{part}" for theirs in table.get(module, (f"(no place for {module})",))]
        missing += [name for name in names if name not in left]
        if missing:
            continue
        joined = torch.cat([left.pop(name) for name in names])
        if _without_ones(joined.shape) != _without_ones(expected.shape):
            raise ForeignModelError(
                layout.name,
                f"{names[0]} makes {list(joined.shape)} where this form has {list(expected.shape)}",
            )
        ours[name] = joined.reshape(expected.shape)
    for problem, names in (("the file lacks", missing), ("there is no place for", [*left])):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ForeignModelError(layout.name, f"{problem} {', '.join(names[:3])}{more}")
    return ours


def _scattered(layout: Layout, form: Form, tensors: Tensors) -> dict[str, Tensor]:
    """Theirs of ours."""
    table, theirs = layout.table(_network(form)), {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if module not in table:
            raise ForeignModelError(layout.name, f"there is no place for {name}")
        if tensor.ndim == 2 and ".attention." in name:
            tensor = tensor.reshape(*tensor.shape, *[1] * layout.attention_axes)
        for other, piece in zip(table[module], tensor.chunk(len(table[module])), strict=True):
            theirs[f"{other}.{part}"] = piece.clone(memory_format=torch.contiguous_format)
    return theirs


def _reordered(tensors: Tensors, form: Form, *, by_head: bool) -> dict[str, Tensor]:
    """Query, key and value rows head by head, or all heads' queries, then keys, then values."""
    moved = dict(tensors)
    for name, tensor in tensors.items():
        if name.rpartition(".")[0].endswith("query_key_value"):
            count = heads(len(tensor) // 3, form["variant"])
            lengths = (3, count) if by_head else (count, 3)
            rows = tensor.reshape(*lengths, -1, *tensor.shape[1:])
            moved[name] = rows.transpose(0, 1).reshape(tensor.shape)
    return moved


def _network(form: Form) -> UNet:
    """The network without its numbers."""
    try:
        with torch.device("meta"):
            return UNet(**form)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ForeignModelError("this form", f"makes no network: {error}") from error


def _without_ones(shape: torch.Size) -> list[int]:
    """The shape up to the 1s at its end."""
    return [*shape[: max((i for i, n in enumerate(shape, 1) if n != 1), default=0)]]


def _home(folder: Path, part: str) -> Path:
    return folder / part if (folder / part).is_dir() else folder


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ForeignModelError(str(path), f"cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ForeignModelError(str(path), "is no JSON object")
    return value
