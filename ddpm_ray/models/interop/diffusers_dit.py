"""Convert a diffusers DiTTransformer2DModel to a DiT, and back.

In diffusers, each block has its own embedders of t and the label, but those of a trained model are
equal in all blocks, as in the paper's code. A model that cannot be converted exactly is refused.
Their t is ours minus 1.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ddpm_ray.models.dit import DiT, DiTSpec
from ddpm_ray.models.interop import state_dict_names
from ddpm_ray.models.interop.diffusers_config import (
    Config,
    UnsupportedModelError,
    full_config,
    refused_if_invalid,
    require_equal,
)
from ddpm_ray.models.interop.layouts import Layout, Tensors, gathered, on_meta_device, scattered

NAME = "DiTTransformer2DModel"
FORMER_NAME = "Transformer2DModel"  # in the config of facebook/DiT-XL-2-256
DIT: Config = {  # defaults of DiTTransformer2DModel, for keys that a file omits
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
OTHER_TRANSFORMERS: Config = {  # further options of FORMER_NAME, with their values in a DiT
    "cross_attention_dim": None,
    "num_vector_embeds": None,
    "use_linear_projection": False,
    "only_cross_attention": False,
    "double_self_attention": False,
}
DIT_LAYOUT = Layout(NAME, state_dict_names.diffusers_dit)
EMBEDDERS = "norm1.emb."  # the embedders of t and the label in a block
NULL_LABEL = 1000  # in DiTPipeline, for any number of classes
NUM_CLASSES_KEY = "_ddpm_ray_num_classes"  # extra key of a config: classes without the padding
LABELS = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"


def dit_from_diffusers(config: Config, tensors: Tensors) -> tuple[DiTSpec, dict[str, Tensor]]:
    """DiT's spec and state_dict from those of a `DiTTransformer2DModel`.

    Its last label is the null label; num_embeds_ada_norm, which does not count it, is our
    num_classes. If that is 0, the embedding of the null label must be 0. Input channels beyond the
    output channels are read as conditioning, twice as many output as input channels as a learned
    variance. Raises UnsupportedModelError.
    """
    spec = _checked_spec(config)
    first = _first_embedders(tensors)
    if not spec.num_classes:
        null = first.pop(LABELS, torch.zeros(1))
        if null.any():
            raise UnsupportedModelError(NAME, "it has no classes, but embeds the null label")
    ours = gathered(DIT_LAYOUT, on_meta_device(lambda: DiT(spec)), first)
    return _without_padding(spec, ours, config.get(NUM_CLASSES_KEY, spec.num_classes))


def dit_to_diffusers(spec: DiTSpec, tensors: Tensors) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and tensors that `DiTTransformer2DModel.from_pretrained` reads as this DiT.

    A DiT without classes has num_embeds_ada_norm=0, and takes class_labels of 0. Raises
    UnsupportedModelError for a spec without an equivalent, as images that are not square.
    """
    config = _config(spec)
    require_equal(vars(spec), vars(_spec(config)), NAME)
    theirs = scattered(DIT_LAYOUT, on_meta_device(lambda: DiT(spec)), tensors)
    if not spec.num_classes:
        theirs[LABELS] = tensors["time.dense_2.bias"].new_zeros(1, spec.hidden_size)
    shared = {name: tensor for name, tensor in theirs.items() if EMBEDDERS in name}
    for number in range(1, spec.depth):
        for name, tensor in shared.items():
            theirs[name.replace("blocks.0.", f"blocks.{number}.", 1)] = tensor.clone()
    return {"_class_name": NAME, **config}, theirs


def dit_to_pipeline(spec: DiTSpec, tensors: Tensors) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and tensors for DiTPipeline: fewer than 1000 classes are padded to 1000.

    Its null label, which guidance needs, is 1000. The padding classes have the null label's
    embedding; `dit_from_diffusers` removes them.
    """
    classes = spec.num_classes
    if not 0 < classes < NULL_LABEL:
        return dit_to_diffusers(spec, tensors)
    label = tensors["label.weight"]
    padding = label[-1:].expand(NULL_LABEL - classes, -1)
    padded = {**tensors, "label.weight": torch.cat([label, padding])}
    config, theirs = dit_to_diffusers(replace(spec, num_classes=NULL_LABEL), padded)
    return {**config, NUM_CLASSES_KEY: classes}, theirs


def _without_padding(
    spec: DiTSpec, tensors: dict[str, Tensor], classes: Any
) -> tuple[DiTSpec, dict[str, Tensor]]:
    """Remove the labels from number `classes` on except the last, which they must equal."""
    if classes == spec.num_classes:
        return spec, tensors
    label = tensors.get("label.weight", torch.empty(0))
    if (
        type(classes) is not int
        or not 0 < classes < len(label)
        or (label[classes:] != label[-1]).any()
    ):
        raise UnsupportedModelError(
            NAME,
            f"{NUM_CLASSES_KEY} is {classes!r}, but labels beyond it have their own embeddings",
        )
    kept = {**tensors, "label.weight": label[: classes + 1].clone()}
    return replace(spec, num_classes=classes), kept


def _first_embedders(tensors: Tensors) -> dict[str, Tensor]:
    """`tensors` without the embedders of later blocks, which must be those of block 0."""
    kept = {}
    for name, tensor in tensors.items():
        _, _, below = name.partition("transformer_blocks.")
        number, _, part = below.partition(".")
        first = tensors.get(f"transformer_blocks.0.{part}")
        if not part.startswith(EMBEDDERS) or number == "0" or first is None:
            kept[name] = tensor
        elif not torch.equal(tensor, first):
            raise UnsupportedModelError(
                NAME,
                f"{name} differs from that of block 0; all blocks must embed t and labels alike",
            )
    return kept


def _checked_spec(config: Config) -> DiTSpec:
    """The spec of a config.json; raises UnsupportedModelError."""
    full = full_config(config, {**DIT, **OTHER_TRANSFORMERS}, NAME, FORMER_NAME)
    full["out_channels"] = full["out_channels"] or full["in_channels"]
    with refused_if_invalid(NAME):
        spec = _spec(full)
        back = _config(spec)
    require_equal(full, {**OTHER_TRANSFORMERS, **back}, NAME)
    return spec


def _spec(config: Config) -> DiTSpec:
    """The spec that matches the full config most closely; the caller checks the round trip."""
    side, inputs = config["sample_size"], config["in_channels"]
    outputs = config["out_channels"]
    learns_variance = outputs == 2 * inputs
    channels = inputs if learns_variance else min(inputs, outputs)
    return DiTSpec(
        image_size=(side, side),
        image_channels=channels,
        patch_size=config["patch_size"],
        depth=config["num_layers"],
        hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
        heads=config["num_attention_heads"],
        dropout=config["dropout"],
        num_classes=config["num_embeds_ada_norm"] or 0,
        condition_channels=inputs - channels,
        learns_variance=learns_variance,
        mlp_norm_eps=config["norm_eps"],
    )


def _config(spec: DiTSpec) -> dict[str, Any]:
    """The full config of a spec."""
    return {
        **DIT,
        "num_attention_heads": spec.heads,
        "attention_head_dim": spec.hidden_size // spec.heads,
        "in_channels": spec.image_channels + spec.condition_channels,
        "out_channels": spec.channels_out,
        "num_layers": spec.depth,
        "dropout": spec.dropout,
        "sample_size": spec.image_size[0],
        "patch_size": spec.patch_size,
        "num_embeds_ada_norm": spec.num_classes,
        "norm_eps": spec.mlp_norm_eps,
    }
