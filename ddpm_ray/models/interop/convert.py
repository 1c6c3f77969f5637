"""Import and export of U-Nets: diffusers, guided-diffusion, Ho et al.'s weights.

A `UNetSpec` holds the arguments of UNet; `tensors` is a state_dict. A model that cannot be
converted exactly is refused. The other libraries count steps from 0: their t is ours minus 1.
"""

from typing import Any

import torch
from torch import Tensor

from ddpm_ray.models.interop import state_dict_names
from ddpm_ray.models.interop.diffusers_config import Config, config_from_spec, spec_from_config
from ddpm_ray.models.interop.diffusers_files import with_new_attention_names
from ddpm_ray.models.interop.layouts import Layout, Tensors, gathered, on_meta_device, scattered
from ddpm_ray.models.layers import heads
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec

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
    return spec, gathered(DIFFUSERS, _network(spec), with_new_attention_names(tensors))


def to_diffusers(
    spec: UNetSpec, tensors: Tensors, image_size: tuple[int, int]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and tensors that `UNet2DModel.from_pretrained` reads as this network.

    Raises UnsupportedModelError for a spec without an equivalent, as num_heads above 1.
    """
    return config_from_spec(spec, image_size), scattered(DIFFUSERS, _network(spec), tensors)


def from_ho(tensors: Tensors, spec: UNetSpec) -> dict[str, Tensor]:
    """UNet's state_dict from Ho et al.'s weights under their PyTorch names (`down.0.block.0...`).

    The published networks use the default spec. Raises UnsupportedModelError for missing or extra
    names and for shapes that differ from the spec's.
    """
    return gathered(HO_IN_PYTORCH, _network(spec), tensors)


def to_ho(spec: UNetSpec, tensors: Tensors) -> dict[str, Tensor]:
    """The inverse of `from_ho`, with the attention's layers as 1x1 convolutions [C, C, 1, 1]."""
    return scattered(HO_IN_PYTORCH, _network(spec), tensors)


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
    ours = gathered(GUIDED_DIFFUSION, _network(spec), tensors)
    return ours if new_attention_order else _reordered(ours, spec, by_head=False)


def to_guided_diffusion(
    spec: UNetSpec, tensors: Tensors, *, new_attention_order: bool = False
) -> dict[str, Tensor]:
    """The inverse of `from_guided_diffusion`; a null label of zeros is omitted."""
    ours = tensors if new_attention_order else _reordered(tensors, spec, by_head=True)
    theirs = scattered(GUIDED_DIFFUSION, _network(spec), ours)
    label = theirs.get("label_emb.weight")
    if label is not None and not label[-1].any():
        theirs["label_emb.weight"] = label[:-1].clone()
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
    """The network on the meta device; raises UnsupportedModelError for an inconsistent spec."""
    return on_meta_device(lambda: UNet(spec))
