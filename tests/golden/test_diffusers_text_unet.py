"""UNet2DConditionModel, the network of Stable Diffusion, is our U-Net, and ours is theirs.

The truth is diffusers itself, with random weights, in float64.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError, image_size_of
from ddpm_ray.models.interop.diffusers_text_unet import (
    DEFAULTS,
    text_unet_config,
    text_unet_from_diffusers,
    text_unet_spec,
    text_unet_to_diffusers,
)
from ddpm_ray.models.layers import GUIDED, HO, Variant
from ddpm_ray.models.text_encoder import FrozenTextSpec, TextEncoderSpec
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: no dependency of ours")

WIDTH, LENGTH = 6, 5  # of the texts
TEXT = FrozenTextSpec(WIDTH, WIDTH, (0,) * LENGTH)
SD_1: dict[str, Any] = {  # stable-diffusion-v1-5, channels a fortieth
    "sample_size": 8,
    "block_out_channels": [8, 16, 32, 32],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": WIDTH,
}
SD_2: dict[str, Any] = {  # stable-diffusion-2-1-base, likewise
    **SD_1,
    "attention_head_dim": [2, 4, 8, 8],
    "use_linear_projection": True,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
}
SMALL: dict[str, Any] = {
    "sample_size": [4, 6],
    "block_out_channels": [8, 24],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": WIDTH,
}
CONFIGS = {
    "Stable Diffusion 1": SD_1,
    "Stable Diffusion 2": SD_2,
    "deep": {**SMALL, "transformer_layers_per_block": 3},
    "attention in the middle alone": {
        **SMALL,
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
    },
    "classes, a condition, scale and shift": {
        **SMALL,
        "in_channels": 9,  # as in stable-diffusion-inpainting
        "num_class_embeds": 4,
        "resnet_time_scale_shift": "scale_shift",
    },
    "of Ho et al.'s details, with a learned variance": {
        **SMALL,
        "out_channels": 8,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "downsample_padding": 0,
        "norm_eps": 1e-6,
    },
}


def disturbed(model: Any) -> Any:
    """The model in float64, no parameter of it 0 or 1."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.double().eval()


def require_alike(ours: UNet, theirs: Any, image_size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(2)
    spec, draw = ours.spec, lambda *shape: torch.randn(*shape, generator=generator).double()
    x_t: Tensor = draw(3, spec.image_channels, *image_size)
    images: Tensor = draw(3, spec.condition_channels, *image_size)
    states, t = draw(3, LENGTH, WIDTH), torch.tensor([1, 500, 1000])
    labels = torch.tensor([0, 1, spec.num_classes]) if spec.num_classes else None
    given = Conditioning(
        labels,
        low_resolution=images if spec.condition_channels else None,
        text_states=states,
        text_pooled=states[:, 0],
    )
    with torch.no_grad():
        expected = theirs(torch.cat([x_t, images], 1), t - 1, states, class_labels=labels).sample
        found = ours(x_t, t, given)
    torch.testing.assert_close(found, expected, atol=1e-10 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_theirs_answers_as_ours_and_comes_back_as_it_was(name: str) -> None:
    config = CONFIGS[name]
    theirs = disturbed(diffusers.UNet2DConditionModel(**config))
    spec, tensors = text_unet_from_diffusers(dict(theirs.config), theirs.state_dict(), TEXT)
    ours = UNet(spec).double().eval()
    ours.load_state_dict(tensors)
    require_alike(ours, theirs, image_size_of(config))
    back, weights = text_unet_to_diffusers(spec, tensors, image_size_of(config))
    assert back == {**DEFAULTS, **config, "_class_name": "UNet2DConditionModel"}
    assert weights.keys() == theirs.state_dict().keys()
    assert all(torch.equal(weights[key], one) for key, one in theirs.state_dict().items())


@pytest.mark.parametrize("variant", [HO, Variant(head_channels=8), Variant(num_heads=2)])
def test_a_network_of_ours_is_theirs(variant: Variant, tmp_path: Path) -> None:
    """Written with its own text encoder, which is no part of theirs."""
    text = TextEncoderSpec(9, 1, (0, *[1] * (LENGTH - 1)), width=WIDTH, depth=1, heads=2)
    spec = UNetSpec(3, 8, (1, 2), 1, (2,), groups=4, variant=variant, text=text)
    spec = UNetSpec(**{**vars(spec), "transformer_depth": 2, "pools_text": False})
    ours = disturbed(UNet(spec))
    config, tensors = text_unet_to_diffusers(spec, ours.state_dict(), (6, 4))
    theirs = diffusers.UNet2DConditionModel.from_config(config).double().eval()
    theirs.load_state_dict(tensors)
    require_alike(ours, theirs, (6, 4))


@pytest.mark.parametrize(
    "config, width, parameters",
    [
        ({}, 768, 859_520_964),  # stable-diffusion-v1-5
        (
            {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
            1024,
            865_910_724,  # stable-diffusion-2-1
        ),
    ],
    ids=["1.5", "2.1"],
)
def test_the_published_sizes_have_their_parameters(
    config: dict[str, Any], width: int, parameters: int
) -> None:
    """Of their config.json, whose other keys are the defaults."""
    config = {"sample_size": 64, "cross_attention_dim": width, **config}
    spec = text_unet_spec(config, FrozenTextSpec(width, width, (0,) * 77))
    with torch.device("meta"):
        network = UNet(spec)
    assert sum(one.numel() for one in network.parameters()) == parameters


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"cross_attention_dim": 7}, "cross_attention_dim is 7, and the text encoder's width 6"),
        ({"dual_cross_attention": True}, "dual_cross_attention is True"),
        ({"only_cross_attention": [True, False]}, "only_cross_attention is \\[True, False\\]"),
        ({"layers_per_block": [1, 2]}, "layers_per_block is \\[1, 2\\]"),
        ({"addition_embed_type": "text_time"}, "addition_embed_type is 'text_time'"),
        ({"encoder_hid_dim": 4}, "encoder_hid_dim is 4"),
        ({"time_cond_proj_dim": 256}, "time_cond_proj_dim is 256"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"attention_head_dim": [8, None]}, "its config is invalid"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type is 'UNetMidBlock2D'"),
        ({"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]}, "down_block_types is"),
        ({"block_out_channels": [8, 12]}, "block_out_channels is \\[8, 12\\]"),
        ({"a_new_key": 1}, "a_new_key is 1, a key that is not supported"),
        ({"_class_name": "UNet2DModel"}, "it is 'UNet2DModel'; supported is UNet2DCond"),
    ],
)
def test_a_config_with_another_function_is_refused_by_its_key(
    change: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        text_unet_spec({**SMALL, **change}, TEXT)


def test_lists_by_level_and_precisions_are_read_where_they_change_nothing() -> None:
    plain = text_unet_spec(SD_2, TEXT)
    by_level = {
        "transformer_layers_per_block": [1, 1, 1, 7],  # but the middle has 7
        "layers_per_block": [2, 2, 2, 2],
        "cross_attention_dim": [WIDTH] * 4,
        "upcast_attention": True,
    }
    with pytest.raises(UnsupportedModelError, match="transformer_layers_per_block is"):
        text_unet_spec({**SD_2, **by_level}, TEXT)
    by_level["transformer_layers_per_block"] = [1] * 4
    assert text_unet_spec({**SD_2, **by_level}, TEXT) == plain
    assert plain.variant.head_channels == 4


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"transformer_depth": 0}, "without spatial transformers"),
        ({"pools_text": True}, "pools_text is True"),
        ({"embedding_width": 4}, "embedding_width is 4"),
        ({"variant": GUIDED}, "variant is"),
    ],
)
def test_a_network_without_an_equivalent_is_refused(change: dict[str, Any], problem: str) -> None:
    spec = UNetSpec(3, 8, (1, 2), 1, (2,), groups=4, text=TEXT)
    spec = UNetSpec(**{**vars(spec), "transformer_depth": 1, "pools_text": False, **change})
    with pytest.raises(UnsupportedModelError, match=problem):
        text_unet_config(spec, (8, 8))
