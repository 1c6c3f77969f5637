"""The prior's network."""

import pytest
import torch

from ddpm_ray.diffusion.conditioning import NO_TEXT, Conditioning
from ddpm_ray.models.prior import Prior, PriorSpec
from ddpm_ray.models.text_encoder import TextEncoderSpec

TEXT = TextEncoderSpec(300, 1, (0, 1, 1, 1), width=8, depth=1, heads=2)
SPEC = PriorSpec(5, TEXT, width=12, depth=2, heads=3)
TOKENS = torch.tensor([[0, 7, 1, 1], [0, 9, 9, 1]])


def scrambled() -> Prior:
    """A prior whose parameters are all drawn, so that no output is 0."""
    generator, prior = torch.Generator().manual_seed(0), Prior(SPEC)
    for one in prior.parameters():
        torch.nn.init.normal_(one, std=0.3, generator=generator)
    return prior.double()


def test_it_depends_on_text_t_and_x_and_every_weight_learns() -> None:
    prior, generator = scrambled(), torch.Generator().manual_seed(1)
    x = torch.randn(2, 5, 1, 1, generator=generator, dtype=torch.float64)
    t, texts = torch.tensor([3, 40]), Conditioning(tokens=TOKENS)
    found = prior(x, t, texts)
    assert found.shape == x.shape
    found.square().sum().backward()
    unused = [
        name for name, one in prior.named_parameters() if one.grad is None or not one.grad.any()
    ]
    assert not unused
    for other in (
        prior(x + 0.1, t, texts),
        prior(x, t + 1, texts),
        prior(x, t, Conditioning(tokens=TOKENS.flip(0))),
    ):
        assert (other - found).abs().amax((1, 2, 3)).min() > 1e-6
    torch.testing.assert_close(prior(x[1:], t[1:], Conditioning(tokens=TOKENS[1:])), found[1:])


def test_without_a_text_it_takes_the_text_of_no_words() -> None:
    prior = scrambled()
    x, t = torch.ones(2, 5, 1, 1, dtype=torch.float64), torch.tensor([3, 40])
    null = torch.tensor([TEXT.null_tokens] * 2)
    wanted = prior(x, t, Conditioning(tokens=null))
    torch.testing.assert_close(prior(x, t), wanted)
    torch.testing.assert_close(prior(x, t, Conditioning(tokens=TOKENS).null()), wanted)
    none = torch.full_like(TOKENS, NO_TEXT)
    torch.testing.assert_close(prior(x, t, Conditioning(tokens=none)), wanted)


def test_it_is_0_before_training() -> None:
    assert not Prior(SPEC)(torch.ones(1, 5, 1, 1), torch.tensor([1])).any()


def test_other_inputs_and_sizes_are_refused() -> None:
    prior, t = Prior(SPEC), torch.tensor([1])
    with pytest.raises(ValueError, match=r"x_t is \[1, 4, 1, 1\]; this prior takes \[B, 5, 1, 1\]"):
        prior(torch.ones(1, 4, 1, 1), t)
    with pytest.raises(ValueError, match="a prior takes a text alone: leave labels and images out"):
        prior(torch.ones(1, 5, 1, 1), t, Conditioning(labels=torch.tensor([0])))
    with pytest.raises(ValueError, match="width a multiple of heads"):
        Prior(PriorSpec(5, TEXT, width=10, heads=4))
