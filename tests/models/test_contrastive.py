"""Embeddings of images and texts."""

import math
from dataclasses import replace

import pytest
import torch

from ddpm_ray.diffusion.conditioning import NO_TEXT
from ddpm_ray.models.contrastive import ContrastiveEncoders, LogitScale
from tests.training.contrastive_batches import COUNT, LENGTH, SIDE, tiny_encoders, tokens_of

MODEL = tiny_encoders()


def test_embeddings_have_length_1_and_do_not_depend_on_the_batch() -> None:
    images, tokens = torch.randn(COUNT, 3, SIDE, SIDE), tokens_of(list(range(COUNT)))
    found = MODEL(images, tokens)
    for embeddings in (found.images, found.texts):
        assert embeddings.shape == (COUNT, 6)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(COUNT))
    torch.testing.assert_close(MODEL.embed_images(images[3:4]), found.images[3:4])
    torch.testing.assert_close(MODEL.embed_texts(tokens[3:4]), found.texts[3:4])


def test_logits_begin_as_in_the_papers() -> None:
    """(Zhai et al. 2023: t' = log 10, b = -10. Radford et al. 2021: temperature 0.07.)"""
    sigmoid, infonce = (
        ContrastiveEncoders(replace(MODEL.spec, learns_bias=learns)) for learns in (True, False)
    )
    scale, bias = sigmoid.logits()
    assert (scale.exp().item(), bias.item()) == pytest.approx((10, -10))
    scale, bias = infonce.logits()
    assert (1 / scale.exp().item(), bias.item()) == pytest.approx((0.07, 0))
    assert "logits.bias" not in dict(infonce.named_parameters())


def test_the_scale_of_infonce_is_at_most_100_and_can_fall_again() -> None:
    """(Radford et al. 2021, section 2.5.) That of the sigmoid loss has no limit."""
    infonce, sigmoid = (LogitScale(learns_bias=learns) for learns in (False, True))
    for logits, most in ((infonce, 100), (sigmoid, 300)):
        with torch.no_grad():
            logits.log_scale.fill_(math.log(300))
        assert logits()[0].exp().item() == pytest.approx(most)
    for value, sign, wanted in ((300, 1, 1), (300, -1, 0), (99, 1, 1), (99, -1, -1)):
        with torch.no_grad():
            infonce.log_scale.fill_(math.log(value))
        (found,) = torch.autograd.grad(sign * infonce()[0], [infonce.log_scale])
        assert found.item() == wanted


def test_no_text_is_the_empty_text() -> None:
    none = torch.full((1, LENGTH), NO_TEXT)
    empty = torch.tensor([[0, 1, 1, 1]])
    assert torch.equal(MODEL.embed_texts(none), MODEL.embed_texts(empty))


def test_images_that_the_levels_do_not_halve_are_refused() -> None:
    with pytest.raises(ValueError, match="images are 5 x 4, which 2 levels do not halve evenly"):
        MODEL.embed_images(torch.zeros(1, 3, 5, 4))


def test_channels_that_the_groups_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="groups is 3, which does not divide a level's 4 channels"):
        ContrastiveEncoders(replace(MODEL.spec, groups=3))
