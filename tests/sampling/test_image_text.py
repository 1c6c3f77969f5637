"""Embeddings of a notebook's images and prompts."""

import unicodedata

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers", reason="needs the extra [text]")

import ddpm_ray
from ddpm_ray.config.caption_rule import CaptionError
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.models.contrastive import ContrastiveEncoders, ContrastiveSpec
from ddpm_ray.models.text_encoder import TextEncoderSpec
from ddpm_ray.sampling.image_text import TrainedEncoders

TEXTS = ["a red apple", "two pears", "a plum", "", "a red"]


@pytest.fixture(scope="module")
def encoders() -> TrainedEncoders:
    torch.manual_seed(0)
    of = Tokenizer.trained(TEXTS, 280, 8)
    text = TextEncoderSpec(of.vocabulary, of.end_token, of.null_tokens, width=8, depth=1, heads=2)
    model = ContrastiveEncoders(ContrastiveSpec(1, 4, (1, 2), 1, 2, 6, text))
    return TrainedEncoders(model.eval(), of, ImageShape(4, 4, 1), "here", "0")


def test_similarities_are_the_cosines_of_the_encoders_whatever_the_batch(
    encoders: TrainedEncoders,
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), np.uint8)
    x, tokens = PIXELS.encode(torch.from_numpy(images)), encoders.tokenizer.encode(TEXTS)
    with torch.no_grad():
        wanted = encoders.model(x, tokens)
    found = encoders.image_embeddings(images, batch_size=2)
    torch.testing.assert_close(found, wanted.images)
    torch.testing.assert_close(encoders.text_embeddings(TEXTS, batch_size=3), wanted.texts)
    cosines = encoders.similarity(images, TEXTS)
    torch.testing.assert_close(cosines, wanted.images @ wanted.texts.T)
    assert cosines.abs().max() <= 1 + 1e-6
    assert not cosines.requires_grad


def test_one_prompt_may_be_a_text_and_longer_ones_are_cut(encoders: TrainedEncoders) -> None:
    (one,) = encoders.text_embeddings("two pears")
    torch.testing.assert_close(one, encoders.text_embeddings(TEXTS)[1])
    assert encoders.text_embeddings(["pear " * 99]).isfinite().all()


def test_prompts_follow_the_rule_of_captions(
    encoders: TrainedEncoders, caplog: pytest.LogCaptureFixture
) -> None:
    """White space around them is nothing, and NFD is NFC; a longer one is cut with a warning."""
    decomposed, composed = (unicodedata.normalize(form, "é") for form in ("NFD", "NFC"))
    found = encoders.text_embeddings([f"  {decomposed}\t"])
    assert torch.equal(found, encoders.text_embeddings([composed]))
    assert not caplog.text
    encoders.text_embeddings(["pears " * 98])
    assert "1 of 1 prompt have more than text.length=8 tokens and are cut" in caplog.text
    with pytest.raises(CaptionError, match=r"prompt 2 holds the control character U\+000A"):
        encoders.text_embeddings(["a", "b\nc"])


def test_other_images_and_no_prompts_are_refused(encoders: TrainedEncoders) -> None:
    with pytest.raises(ValueError, match="prompts is empty; give at least one text"):
        encoders.text_embeddings([])
    with pytest.raises(ValueError, match=r"give uint8 \[N, H, W, 1\]"):
        encoders.image_embeddings(np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="images are 5 x 4, which 2 levels do not halve evenly"):
        encoders.image_embeddings(np.zeros((2, 5, 4, 1), np.uint8))


def test_a_place_that_is_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match="uri is ' '; name a run's folder or one checkpoint's"):
        ddpm_ray.load_encoders(" ")
