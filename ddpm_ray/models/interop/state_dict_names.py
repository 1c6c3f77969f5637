"""Module names of our networks in diffusers, guided-diffusion and Ho et al.'s weights in PyTorch.

A table maps the name of a module of ours to the names of the modules whose tensors, concatenated,
are its tensors: three names where query, key and value are separate. All call the tensors weight
and bias.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple, TypeAlias

from torch import nn

from ddpm_ray.models.autoencoder import Autoencoder
from ddpm_ray.models.dit import DiT
from ddpm_ray.models.layers import ResBlock
from ddpm_ray.models.stage import Stage
from ddpm_ray.models.unet import UNet

Table: TypeAlias = dict[str, tuple[str, ...]]
Parts: TypeAlias = Mapping[str, tuple[str, ...]]

DIFFUSERS_BLOCK: Parts = {
    "norm_1": ("norm1",),
    "conv_1": ("conv1",),
    "time": ("time_emb_proj",),
    "norm_2": ("norm2",),
    "conv_2": ("conv2",),
    "skip": ("conv_shortcut",),
}
DIFFUSERS_ATTENTION: Parts = {
    "norm": ("group_norm",),
    "query_key_value": ("to_q", "to_k", "to_v"),
    "out": ("to_out.0",),
}

DIFFUSERS_TRANSFORMER: Parts = {  # a block of a spatial transformer
    "norm_1": ("norm1",),
    "query_key_value": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attention_out": ("attn1.to_out.0",),
    "norm_2": ("norm2",),
    "text_attention.query": ("attn2.to_q",),
    "text_attention.key_value": ("attn2.to_k", "attn2.to_v"),
    "text_attention.out": ("attn2.to_out.0",),
    "norm_3": ("norm3",),
    "mlp_in": ("ff.net.0.proj",),
    "mlp_out": ("ff.net.2",),
}


class ModuleLocation(NamedTuple):
    """The position of a stage, or of the layer that resamples after it, in the U-Net."""

    ours: str  # its name in UNet
    module: nn.Module
    level: int  # 0 has the largest sides
    number: int  # index within its level; a resampling layer takes the next index
    order: int  # index within its path; in the up path a resampling layer shares its stage's


def diffusers(network: UNet) -> Table:
    """Names in `UNet2DModel`, or in `UNet2DConditionModel` of a network that attends to a text."""
    block, attention = DIFFUSERS_BLOCK, DIFFUSERS_ATTENTION
    table = _single(
        conv_in="conv_in", norm_out="conv_norm_out", conv_out="conv_out", label="class_embedding"
    )
    table |= {f"time.dense_{i}": (f"time_embedding.linear_{i}",) for i in (1, 2)}
    for number in (0, 1):
        _add(table, f"middle_{number + 1}.block", f"mid_block.resnets.{number}", block)
    _add(table, "middle_1.attention", "mid_block.attentions.0", attention)
    transformer = _transformer(network.spec.transformer_depth)
    _add(table, "middle_1.transformer", "mid_block.attentions.0", transformer)
    top = max(entry.level for entry in down(network))
    for side, entries in (("down", down(network)), ("up", up(network))):
        for entry in entries:
            level = entry.level if side == "down" else top - entry.level
            home = f"{side}_blocks.{level}"
            if isinstance(entry.module, Stage):
                _add(table, f"{entry.ours}.block", f"{home}.resnets.{entry.number}", block)
                theirs = f"{home}.attentions.{entry.number}"
                _add(table, f"{entry.ours}.attention", theirs, attention)
                _add(table, f"{entry.ours}.transformer", theirs, transformer)
            else:
                _resampler(table, entry, f"{home}.{side}samplers.0", block, "conv")
    return _present(table, network)


def guided(network: UNet) -> Table:
    """Names in guided-diffusion, and in improved-diffusion before it."""
    block = _single(
        norm_1="in_layers.0",
        conv_1="in_layers.2",
        norm_2="out_layers.0",
        conv_2="out_layers.3",
        time="emb_layers.1",
        skip="skip_connection",
    )
    attention = _single(norm="norm", query_key_value="qkv", out="proj_out")
    table = _single(
        conv_in="input_blocks.0.0", norm_out="out.0", conv_out="out.2", label="label_emb"
    )
    table |= {"time.dense_1": ("time_embed.0",), "time.dense_2": ("time_embed.2",)}
    _add(table, "middle_1.block", "middle_block.0", block)
    _add(table, "middle_1.attention", "middle_block.1", attention)
    _add(table, "middle_2.block", "middle_block.2", block)
    for side, entries in (("input", down(network)), ("output", up(network))):
        behind = 0  # number of modules in the stage before
        for entry in entries:
            home = f"{side}_blocks.{entry.order + (side == 'input')}"
            if isinstance(entry.module, Stage):
                behind = 1 if entry.module.attention is None else 2
                _add(table, f"{entry.ours}.block", f"{home}.0", block)
                _add(table, f"{entry.ours}.attention", f"{home}.1", attention)
            elif side == "input":
                _resampler(table, entry, f"{home}.0", block, "op")
            else:
                _resampler(table, entry, f"{home}.{behind}", block, "conv")
    return _present(table, network)


def ho(network: UNet) -> Table:
    """Names in PyTorch conversions of Ho et al.'s TensorFlow weights."""
    block = _single(
        norm_1="norm1",
        conv_1="conv1",
        time="temb_proj",
        norm_2="norm2",
        conv_2="conv2",
        skip="nin_shortcut",
    )
    attention = {"norm": ("norm",), "query_key_value": ("q", "k", "v"), "out": ("proj_out",)}
    table = _single(conv_in="conv_in", norm_out="norm_out", conv_out="conv_out")
    table |= {"time.dense_1": ("temb.dense.0",), "time.dense_2": ("temb.dense.1",)}
    _add(table, "middle_1.block", "mid.block_1", block)
    _add(table, "middle_1.attention", "mid.attn_1", attention)
    _add(table, "middle_2.block", "mid.block_2", block)
    for side, entries in (("down", down(network)), ("up", up(network))):
        for entry in entries:
            home = f"{side}.{entry.level}"
            if isinstance(entry.module, Stage):
                _add(table, f"{entry.ours}.block", f"{home}.block.{entry.number}", block)
                _add(table, f"{entry.ours}.attention", f"{home}.attn.{entry.number}", attention)
            else:
                _resampler(table, entry, f"{home}.{side}sample", block, "conv")
    return _present(table, network)


def diffusers_dit(network: DiT) -> Table:
    """Names in `DiTTransformer2DModel`, with the embedders of its block 0."""
    embedders = "transformer_blocks.0.norm1.emb"
    table = _single(
        patch="pos_embed.proj",
        label=f"{embedders}.class_embedder.embedding_table",
        modulation_out="proj_out_1",
        out="proj_out_2",
    )
    for i in (1, 2):
        table[f"time.dense_{i}"] = (f"{embedders}.timestep_embedder.linear_{i}",)
    block = {
        "modulation": ("norm1.linear",),
        "query_key_value": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
        "attention_out": ("attn1.to_out.0",),
        "mlp_in": ("ff.net.0.proj",),
        "mlp_out": ("ff.net.2",),
    }
    for number in range(network.spec.depth):
        _add(table, f"blocks.{number}", f"transformer_blocks.{number}", block)
    return _present(table, network)


def diffusers_autoencoder(network: Autoencoder) -> Table:
    """Names in `AutoencoderKL`."""
    table = _single(moments_conv="quant_conv", latents_conv="post_quant_conv")
    ends = _single(conv_in="conv_in", norm_out="conv_norm_out", conv_out="conv_out")
    paths = ("encoder", "down", network.encoder.down), ("decoder", "up", network.decoder.up)
    for side, path, modules in paths:
        _add(table, side, side, ends)
        for number in (0, 1):
            theirs = f"{side}.mid_block.resnets.{number}"
            _add(table, f"{side}.middle.block_{number + 1}", theirs, DIFFUSERS_BLOCK)
        attention = f"{side}.mid_block.attentions.0"
        _add(table, f"{side}.middle.attention", attention, DIFFUSERS_ATTENTION)
        level = number = 0  # levels count along the path, so in the decoder from the smallest
        for order, module in enumerate(modules):
            ours, home = f"{side}.{path}.{order}", f"{side}.{path}_blocks.{level}"
            if isinstance(module, ResBlock):
                _add(table, ours, f"{home}.resnets.{number}", DIFFUSERS_BLOCK)
                number += 1
            else:
                table[f"{ours}.conv"] = (f"{home}.{path}samplers.0.conv",)
                level, number = level + 1, 0
    return _present(table, network)


def down(network: UNet) -> Iterator[ModuleLocation]:
    """The modules of the down path, in order."""
    level = number = 0
    for order, module in enumerate(network.down):
        yield ModuleLocation(f"down.{order}", module, level, number, order)
        number += 1
        if not isinstance(module, Stage):
            level, number = level + 1, 0


def up(network: UNet) -> Iterator[ModuleLocation]:
    """The modules of the up path, in order, from the smallest level."""
    level = sum(not isinstance(module, Stage) for module in network.up)
    number, order = 0, -1
    for i, module in enumerate(network.up):
        order += isinstance(module, Stage)
        yield ModuleLocation(f"up.{i}", module, level, number, order)
        number += 1
        if not isinstance(module, Stage):
            level, number = level - 1, 0


def _transformer(depth: int) -> Parts:
    """The parts of a spatial transformer with `depth` blocks, in diffusers' Transformer2DModel."""
    parts: Table = {name: (name,) for name in ("norm", "proj_in", "proj_out")}
    for number in range(depth):
        for ours, theirs in DIFFUSERS_TRANSFORMER.items():
            home = f"transformer_blocks.{number}"
            parts[f"blocks.{number}.{ours}"] = tuple(f"{home}.{name}" for name in theirs)
    return parts


def _single(**names: str) -> Table:
    return {ours: (theirs,) for ours, theirs in names.items()}


def _add(table: Table, ours: str, theirs: str, parts: Parts) -> None:
    """Add the parts of a module to the table."""
    for part, names in parts.items():
        table[f"{ours}.{part}"] = tuple(f"{theirs}.{name}" for name in names)


def _resampler(
    table: Table, entry: ModuleLocation, theirs: str, block: Parts, convolution: str
) -> None:
    """Add a resampling layer: a residual block or a convolution."""
    if isinstance(entry.module, ResBlock):
        _add(table, entry.ours, theirs, block)
    else:
        table[f"{entry.ours}.conv"] = (f"{theirs}.{convolution}",)


def _present(table: Table, network: nn.Module) -> Table:
    """The entries whose modules exist in `network`, in the order of its parameters."""
    modules = dict.fromkeys(name.rpartition(".")[0] for name in network.state_dict())
    return {ours: table[ours] for ours in modules if ours in table}
