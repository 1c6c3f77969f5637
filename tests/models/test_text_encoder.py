"""The text encoder against transformers' CLIPTextModel, and text as an input of the networks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_ray.diffusion.conditioning import NO_TEXT, Conditioning
from ddpm_ray.models.dit import DiT, DiTSpec
from ddpm_ray.models.frozen_text import FrozenText
from ddpm_ray.models.spatial_transformer import SpatialTransformer
from ddpm_ray.models.text_encoder import FrozenTextSpec, TextEncoder, TextEncoderSpec, TextInput
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec
from ddpm_ray.training.bf16_weights import Bf16Weights

START, END = 40, 41
NULL = (START, END, END, END, END, END)
TEXT = TextEncoderSpec(42, END, NULL, width=16, depth=2, heads=2)
UNET = UNetSpec(3, 16, (1, 2), 1, (2,), groups=8, text=TEXT)
DIT = DiTSpec((8, 8), 3, 2, 2, 16, 2, text=TEXT)
STABLE_DIFFUSION = replace(UNET, transformer_depth=2, pools_text=False)
NETWORKS = {
    "unet": lambda: UNet(UNET),
    "dit": lambda: DiT(DIT),
    "transformer": lambda: UNet(STABLE_DIFFUSION),
}
TOKENS = torch.tensor(
    [[START, 3, 4, END, END, END], [START, 5, 6, 7, 8, END], [START, END, END, END, END, END]]
)
X_T, T = (
    torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([1, 5, 9]),
)


@pytest.fixture(params=[*NETWORKS])
def network(request: pytest.FixtureRequest) -> nn.Module:
    """A network with a text, all of whose weights are random: none is 0."""
    torch.manual_seed(0)
    built = NETWORKS[request.param]().double()
    for weight in built.parameters():
        nn.init.normal_(weight, std=0.1)
    return built


def test_the_function_is_that_of_transformers_clip() -> None:
    """With the weights of CLIPTextModel, vectors and pooled text are equal; both activations."""
    transformers = pytest.importorskip("transformers", reason="needs the extra [text]")
    for quick in (True, False):
        config = transformers.CLIPTextConfig(
            vocab_size=42,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=6,
            hidden_act="quick_gelu" if quick else "gelu",
            bos_token_id=START,
            eos_token_id=END,
        )
        torch.manual_seed(1)
        theirs = transformers.CLIPTextModel(config).double().eval()
        for weight in theirs.parameters():
            nn.init.normal_(weight, std=0.3)
        ours = TextEncoder(replace(TEXT, mlp_width=24, quick_gelu=quick)).double()
        ours.load_state_dict(clip_weights(theirs))
        states, pooled = ours(TOKENS)
        found = theirs(TOKENS)
        torch.testing.assert_close(states, found.last_hidden_state, rtol=0, atol=1e-12)
        torch.testing.assert_close(pooled, found.pooler_output, rtol=0, atol=1e-12)


def clip_weights(theirs: nn.Module) -> dict[str, Tensor]:
    """The weights of transformers' CLIPTextModel under our names, written out by hand."""
    held = {name.removeprefix("text_model."): one for name, one in theirs.state_dict().items()}
    found = {
        "token.weight": held["embeddings.token_embedding.weight"],
        "position.weight": held["embeddings.position_embedding.weight"],
        "norm_out.weight": held["final_layer_norm.weight"],
        "norm_out.bias": held["final_layer_norm.bias"],
    }
    for n in range(2):
        layer = f"encoder.layers.{n}."
        for kind in ("weight", "bias"):
            parts = [held[f"{layer}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"blocks.{n}.query_key_value.{kind}"] = torch.cat(parts)
            for mine, name in (
                ("attention_out", "self_attn.out_proj"),
                ("norm_1", "layer_norm1"),
                ("norm_2", "layer_norm2"),
                ("mlp_in", "mlp.fc1"),
                ("mlp_out", "mlp.fc2"),
            ):
                found[f"blocks.{n}.{mine}.{kind}"] = held[f"{layer}{name}.{kind}"]
    return found


def test_no_text_is_the_empty_text(network: nn.Module) -> None:
    """An image without text, or without tokens at all, sees the encoding of the empty text."""
    empty = Conditioning(tokens=torch.tensor([NULL] * 3))
    none = Conditioning(tokens=torch.full((3, 6), NO_TEXT))
    expected = network(X_T.double(), T, empty)
    assert torch.equal(network(X_T.double(), T, none), expected)
    assert torch.equal(network(X_T.double(), T, empty.null()), expected)
    torch.testing.assert_close(network(X_T.double(), T), expected, rtol=0, atol=1e-14)


def test_each_image_sees_its_own_text(network: nn.Module) -> None:
    """A change of one image's text changes its output, and no other's."""
    before = network(X_T.double(), T, Conditioning(tokens=TOKENS))
    other = TOKENS.clone()
    other[0, 2] = 9
    after = network(X_T.double(), T, Conditioning(tokens=other))
    assert not torch.isclose(before[0], after[0]).all()
    torch.testing.assert_close(before[1:], after[1:], rtol=0, atol=1e-14)


def test_every_weight_gets_a_gradient(network: nn.Module) -> None:
    """With and without a text all weights take part in a pass, as DDP needs it."""
    for conditioning in (Conditioning(tokens=TOKENS), Conditioning()):
        network.zero_grad()
        network(X_T.double(), T, conditioning).square().sum().backward()
        unused = [name for name, one in network.named_parameters() if one.grad is None]
        assert not unused


@pytest.mark.parametrize("kind, spec", [(UNet, UNET), (DiT, DIT)])
def test_a_network_without_text_continues_with_it(kind: type, spec: UNetSpec | DiTSpec) -> None:
    """With the weights of a network without text, the output is unchanged by any text at first."""
    torch.manual_seed(0)
    plain = kind(replace(spec, text=None)).double()
    for weight in plain.parameters():
        nn.init.normal_(weight, std=0.1)
    texted = kind(spec).double()
    missing, unexpected = texted.load_state_dict(plain.state_dict(), strict=False)
    assert missing
    assert not unexpected
    expected = plain(X_T.double(), T)
    found = texted(X_T.double(), T, Conditioning(tokens=TOKENS))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_encoded_texts_replace_their_tokens(network: nn.Module) -> None:
    """Texts that were encoded before give the same output, and cannot be removed any more."""
    text = network.text
    assert isinstance(text, TextInput)
    states, pooled = text.encode(TOKENS, 3)
    encoded = Conditioning(text_states=states, text_pooled=pooled)
    expected = network(X_T.double(), T, Conditioning(tokens=TOKENS))
    assert torch.equal(network(X_T.double(), T, encoded), expected)
    with pytest.raises(ValueError, match="the text is encoded, and cannot be removed"):
        encoded.null()


def test_a_spatial_transformer_is_the_identity_at_first() -> None:
    """So that the network begins as one without attention; its own output is 0 all the same."""
    torch.manual_seed(0)
    begun = UNet(STABLE_DIFFUSION)
    assert not begun(X_T, T, Conditioning(tokens=TOKENS)).any()
    transformer, h = begun.middle_1.transformer, torch.randn(2, 32, 4, 4)
    assert isinstance(transformer, SpatialTransformer)
    assert torch.equal(transformer(h, torch.randn(2, 6, 16)), h)


def test_without_the_pooled_text_the_order_of_vectors_is_all_that_a_network_loses() -> None:
    """Attention has no positions: texts with the same vectors in another order are one text."""
    torch.manual_seed(0)
    network = UNet(STABLE_DIFFUSION).double()
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.1)
    states, pooled = torch.randn(3, 6, 16).double(), torch.randn(3, 16).double()
    found = [
        network(X_T.double(), T, Conditioning(text_states=one, text_pooled=other))
        for one, other in ((states, pooled), (states.flip(1), -pooled))
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_a_frozen_text_without_pooling_leaves_no_tensor_and_is_cast_as_the_weights() -> None:
    """Nothing in the state dict says that there is a text, and bfloat16 weights see bfloat16."""
    spec = FrozenTextSpec(4, 4, NULL)
    text = TextInput(spec, 8, pools=False)
    assert not text.state_dict()
    text.bind(FrozenText(Encoded(), spec))
    for network, dtype in ((text, torch.float32), (Bf16Weights(text).network, torch.bfloat16)):
        assert isinstance(network, TextInput)
        states, pooled = network(Conditioning(tokens=TOKENS), 3)
        assert (states.dtype, pooled) == (dtype, None)


class Encoded(nn.Module):
    """A text encoder of ones."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones(*tokens.shape, 4), torch.ones(len(tokens), 4)


def test_a_text_for_a_network_without_is_refused() -> None:
    """The error names the input."""
    plain = UNet(replace(UNET, text=None))
    with pytest.raises(ValueError, match="a text is given, but the network takes none"):
        plain(X_T, T, Conditioning(tokens=TOKENS))
    with pytest.raises(ValueError, match="transformer_depth is 2; a spatial transformer attends"):
        UNet(replace(STABLE_DIFFUSION, text=None))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"heads": 3}, "width is 16, depth 2 and heads 3"),
        ({"end_token": 42}, r"end_token is 42; .* all lie in 0\.\.41"),
        ({"null_tokens": (40, 1)}, "null_tokens must hold end_token"),
    ],
)
def test_inconsistent_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    """The error names the sizes."""
    with pytest.raises(ValueError, match=message):
        TextEncoder(replace(TEXT, **changes))


def test_tokens_of_another_length_are_refused() -> None:
    """The error names both lengths."""
    with pytest.raises(ValueError, match=r"tokens are \[3, 5\]; this text encoder takes \[B, 6\]"):
        TextEncoder(TEXT)(TOKENS[:, :5])
