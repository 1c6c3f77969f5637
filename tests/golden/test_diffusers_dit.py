"""A DiT of diffusers is ours to the last digits of float32, in outputs and gradients, both ways."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.models.dit import DiT, DiTSpec
from ddpm_ray.models.interop.diffusers_config import UnsupportedModelError
from ddpm_ray.models.interop.diffusers_dit import (
    DIT,
    EMBEDDERS,
    dit_from_diffusers,
    dit_to_diffusers,
)

diffusers = pytest.importorskip("diffusers", reason="needs diffusers: no dependency of ours")

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 3,
    "sample_size": 8,
    "num_embeds_ada_norm": 4,
}
CONFIGS = {
    "labels": TINY,
    "no labels": {**TINY, "num_embeds_ada_norm": 0},
    "learned variance": {**TINY, "out_channels": 6, "norm_eps": 1e-6},
    "a condition": {**TINY, "in_channels": 6},
    "patches of 4, dropout": {**TINY, "patch_size": 4, "sample_size": 16, "dropout": 0.1},
}


def theirs(config: dict[str, Any]) -> Any:
    """A DiT of diffusers, no parameter 0 or 1, with one embedding of t and labels as trained."""
    model = diffusers.DiTTransformer2DModel(**config).eval()
    generator = torch.Generator().manual_seed(1)
    first: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            if EMBEDDERS in name:
                parameter.copy_(first.setdefault(name.partition(EMBEDDERS)[2], parameter))
                if not config["num_embeds_ada_norm"] and "class_embedder" in name:
                    parameter.zero_()
    return model


def batch(config: dict[str, Any], spec: DiTSpec) -> tuple[Tensor, Tensor, Tensor, Conditioning]:
    """Their input, t from 1 and labels, and what is beside x_t for ours."""
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(3, config["in_channels"], *spec.image_size, generator=generator)
    classes = config["num_embeds_ada_norm"]
    labels = torch.tensor([0, 1, 4]) if classes else torch.tensor([0, 0, 0])  # 4: the null label
    ours = torch.tensor([0, 1, -1]) if classes else None
    condition = image[:, spec.image_channels :] if spec.condition_channels else None
    t = torch.tensor([1, 20, 100])  # the two round the angles of t to t * 6e-8, each in its way
    return image, t, labels, Conditioning(ours, low_resolution=condition)


def backward(output: Tensor) -> None:
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    (output * probe).sum().backward()


def require_close(found: Tensor, expected: Tensor, also: float = 0.0) -> None:
    atol = 3e-5 * expected.abs().max().item() + also
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_theirs_answers_and_learns_as_ours_and_comes_back_as_it_was(name: str) -> None:
    config = CONFIGS[name]
    model = theirs(config)
    spec, tensors = dit_from_diffusers(dict(model.config), model.state_dict())
    ours = DiT(spec).eval()
    ours.load_state_dict(tensors)
    image, t, labels, conditioning = batch(config, spec)
    expected = model(image, t - 1, class_labels=labels).sample
    found = ours(image[:, : spec.image_channels], t, conditioning)
    require_close(found, expected)

    backward(found)
    backward(expected)
    gradients = {
        key: value.grad for key, value in ours.named_parameters() if value.grad is not None
    }
    _, by_their_names = dit_to_diffusers(spec, gradients)
    expected_gradients: dict[str, Tensor] = {}
    for key, parameter in model.named_parameters():
        first = key if EMBEDDERS not in key else f"transformer_blocks.0.{key.split('.', 2)[2]}"
        expected_gradients[first] = expected_gradients.get(first, 0) + parameter.grad
    # A key's bias has a gradient of 0, of which rounding leaves 1e-7 of the largest.
    largest = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    for key, gradient in expected_gradients.items():
        if config["num_embeds_ada_norm"] or "class_embedder" not in key:
            require_close(by_their_names[key], gradient, also=1e-6 * largest)

    back, weights = dit_to_diffusers(spec, tensors)
    assert back == {**DIT, **config, "_class_name": "DiTTransformer2DModel"}
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("classes", [0, 3])
def test_ours_answers_as_theirs(classes: int) -> None:
    spec = DiTSpec((8, 8), 3, depth=2, hidden_size=24, heads=3, num_classes=classes)
    ours = DiT(spec)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    config, weights = dit_to_diffusers(spec, ours.state_dict())
    model = diffusers.DiTTransformer2DModel.from_config(config).eval()
    model.load_state_dict(weights)
    x_t, t = torch.randn(2, 3, 8, 8, generator=generator), torch.tensor([7, 900])
    with torch.no_grad():
        expected = model(x_t, t - 1, class_labels=torch.tensor([classes, classes])).sample
        require_close(ours(x_t, t), expected)
    again, tensors = dit_from_diffusers(config, weights)
    assert again == spec
    assert all(torch.equal(tensors[key], value) for key, value in ours.state_dict().items())


def test_what_cannot_be_converted_exactly_is_refused() -> None:
    model = theirs(TINY)
    config, weights = dict(model.config), model.state_dict()
    other = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    with pytest.raises(UnsupportedModelError, match=f"{other} differs from that of block 0"):
        dit_from_diffusers(config, {**weights, other: weights[other] + 1})
    with pytest.raises(UnsupportedModelError, match="norm_elementwise_affine is True"):
        dit_from_diffusers({**config, "norm_elementwise_affine": True}, weights)
    with pytest.raises(UnsupportedModelError, match=r"lacks proj_out_2\.bias"):
        dit_from_diffusers(config, {k: v for k, v in weights.items() if k != "proj_out_2.bias"})
    unconditional = theirs({**TINY, "num_embeds_ada_norm": 0})
    state = unconditional.state_dict()
    for key in state:
        if "class_embedder" in key:
            state[key] += 1
    with pytest.raises(UnsupportedModelError, match="no classes, but embeds the null label"):
        dit_from_diffusers(dict(unconditional.config), state)
    spec = DiTSpec((8, 12), 3, depth=1, hidden_size=24, heads=3)
    with pytest.raises(UnsupportedModelError, match=r"image_size is \(8, 12\)"):
        dit_to_diffusers(spec, DiT(spec).state_dict())


def test_the_config_of_published_weights_is_read() -> None:
    """Those of DiT-XL/2 were saved under the former name of the class."""
    published = {
        "_class_name": "Transformer2DModel",
        "cross_attention_dim": None,
        "num_vector_embeds": None,
        "only_cross_attention": False,
        "use_linear_projection": False,
        **TINY,
    }
    model = theirs(TINY)
    assert dit_from_diffusers(published, model.state_dict())[0].mlp_norm_eps == 1e-5
