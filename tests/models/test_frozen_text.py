"""A text encoder that is trained elsewhere: no part of the network that its vectors go to."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_ray.diffusion.conditioning import NO_TEXT, Conditioning
from ddpm_ray.models.contrastive import ContrastiveEncoders, ContrastiveSpec
from ddpm_ray.models.dit import DiT
from ddpm_ray.models.frozen_text import ContrastiveText, FrozenText
from ddpm_ray.models.text_encoder import EncodedText, FrozenTextSpec
from ddpm_ray.models.unet import UNet
from ddpm_ray.training.bf16_weights import Bf16Weights
from ddpm_ray.training.ema import EMA
from tests.models.test_text_encoder import DIT, NULL, TEXT, TOKENS, UNET, X_T, T

WIDTH, EMBEDDING = TEXT.width, 6
SPEC = FrozenTextSpec(WIDTH, EMBEDDING, NULL)


@pytest.fixture(scope="module")
def encoders() -> ContrastiveEncoders:
    torch.manual_seed(2)
    return ContrastiveEncoders(ContrastiveSpec(1, 4, (1, 2), 1, 2, EMBEDDING, TEXT)).eval()


@pytest.fixture
def frozen(encoders: ContrastiveEncoders) -> FrozenText:
    return FrozenText(ContrastiveText(encoders), SPEC)


@pytest.fixture(params=["unet", "dit"])
def network(request: pytest.FixtureRequest, frozen: FrozenText) -> Any:
    """A network with a frozen text encoder, all of whose own weights are random: none is 0."""
    torch.manual_seed(0)
    unet, dit = replace(UNET, text=SPEC), replace(DIT, text=SPEC)
    built: Any = UNet(unet) if request.param == "unet" else DiT(dit)
    for weight in built.parameters():
        nn.init.normal_(weight, std=0.1)
    built.text.bind(frozen)
    return built


def test_vectors_and_embedding_are_those_of_the_contrastive_encoders(
    encoders: ContrastiveEncoders, frozen: FrozenText
) -> None:
    states, pooled = frozen(TOKENS)
    assert torch.equal(states, encoders.text(TOKENS).states)
    assert torch.equal(pooled, encoders.embed_texts(TOKENS))
    torch.testing.assert_close(pooled.norm(dim=1), torch.ones(3))
    assert not states.requires_grad
    assert not pooled.requires_grad
    no_text = frozen(torch.full((1, 6), NO_TEXT))
    assert torch.equal(no_text.pooled, frozen(TOKENS[2:]).pooled)  # the row of ""
    with pytest.raises(ValueError, match=r"tokens are \[3, 5\]; this text encoder takes \[B, 6\]"):
        frozen(TOKENS[:, :5])


def test_the_network_has_none_of_its_weights(network: Any, frozen: FrozenText) -> None:
    """Nor have its EMA and its bfloat16 copy: all call the same encoder, which stays as it is."""
    held = {id(weight) for weight in frozen.module.parameters()}
    before = {name: one.clone() for name, one in frozen.module.state_dict().items()}
    ema, copied, low = EMA(network), copy.deepcopy(network), Bf16Weights(network)
    holders: list[Any] = [network, ema.model, copied, low.network]
    for one in holders:
        assert not held & {id(weight) for weight in one.parameters()}
        assert not [name for name in one.state_dict() if name.startswith("text.encoder")]
        assert one.text.encoder is frozen
    network.train()
    network.double()
    assert not frozen.module.training
    assert all(not weight.requires_grad for weight in frozen.module.parameters())
    for name, one in frozen.module.state_dict().items():
        assert one.dtype == before[name].dtype
        assert torch.equal(one, before[name])


def test_it_goes_to_the_network_s_device(network: Any, encoders: ContrastiveEncoders) -> None:
    """When the network goes there, and when it is bound to a network that is there."""
    mine = FrozenText(ContrastiveText(copy.deepcopy(encoders)), SPEC)
    network.text.encoder = mine
    network.to("meta")
    assert mine.null_tokens.is_meta
    assert all(weight.is_meta for weight in mine.module.parameters())
    other = FrozenText(ContrastiveText(copy.deepcopy(encoders)), SPEC)
    network.text.bind(other)
    assert other.null_tokens.is_meta


def test_texts_reach_the_output_and_all_weights_get_a_gradient(network: Any) -> None:
    """With and without a text, as DDP needs it; no text is the empty text."""
    empty = network(X_T, T, Conditioning(tokens=torch.tensor([NULL] * 3)))
    assert torch.equal(network(X_T, T, Conditioning(tokens=torch.full((3, 6), NO_TEXT))), empty)
    torch.testing.assert_close(network(X_T, T), empty)
    texted = network(X_T, T, Conditioning(tokens=TOKENS))
    assert not torch.isclose(texted[0], empty[0]).all()
    encoded = network.text.encoded(Conditioning(tokens=TOKENS))
    assert encoded.tokens is None
    assert torch.equal(network(X_T, T, encoded), texted)
    for conditioning in (Conditioning(tokens=TOKENS), Conditioning()):
        network.zero_grad()
        network(X_T, T, conditioning).square().sum().backward()
        assert not [name for name, one in network.named_parameters() if one.grad is None]


def test_it_computes_in_its_own_dtype(network: Any, frozen: FrozenText) -> None:
    """Also under autocast; a network with bfloat16 weights gets its vectors rounded once."""
    wanted = frozen(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(TOKENS).states, wanted.states)
    low: Any = Bf16Weights(network).network
    states = low.text.encoded(Conditioning(tokens=TOKENS)).text_states
    assert torch.equal(states, wanted.states.bfloat16())
    assert torch.isfinite(low(X_T, T, Conditioning(tokens=TOKENS))).all()

    class Low(nn.Module):
        def forward(self, tokens: Tensor) -> EncodedText:
            return EncodedText(*(one.bfloat16() for one in wanted))

    assert FrozenText(Low(), SPEC)(TOKENS).states.dtype == torch.float32


def test_a_network_without_its_encoder_says_so() -> None:
    network = UNet(replace(UNET, text=SPEC))
    with pytest.raises(ValueError, match="this network has no text encoder yet: bind the one of"):
        network(X_T, T)
