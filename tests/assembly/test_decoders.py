"""Denoisers that are given the embedding of an image, as DALL-E 2's decoder."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("tokenizers", reason="needs the extra [text]")

from ddpm_ray.assembly.image_encoders import NamedImageEncoder, settled_embedding
from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.loader import Batch
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.diffusion.parameterization import Parameterization
from ddpm_ray.diffusion.process import NoiseSchedule
from ddpm_ray.diffusion.schedules import linear
from ddpm_ray.models.contrastive import ContrastiveEncoders, ContrastiveSpec
from ddpm_ray.models.dit import DiT, DiTSpec
from ddpm_ray.models.text_encoder import TextEncoderSpec
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec
from ddpm_ray.sampling import image_text
from ddpm_ray.sampling.conditioning import ConditioningSpec
from ddpm_ray.sampling.denoiser import Denoiser, Guidance
from ddpm_ray.sampling.image_text import TrainedEncoders
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.training.checkpoint_folder import CheckpointError
from ddpm_ray.training.noising import NoisingRecipe
from tests.noise import pack_noise

CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule(linear(50))
DEVIATION = 0.05
WIDTH = 2


class MeanOfHalves:
    """Embeds an image [1, 2, 2] as the direction of its two rows' means."""

    width = WIDTH

    def embed(self, x_0: Tensor) -> Tensor:
        return torch.nn.functional.normalize(x_0.mean((1, 3)) + 1e-9, dim=1)


ENCODER = MeanOfHalves()
DIRECTIONS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])


def exact(x_t: Tensor, t: Tensor, directions: Tensor) -> Tensor:
    """E[noise | x_t] [1, 2, 1, 1] if x_0 ~ N(direction, DEVIATION^2), a mixture of `directions`."""
    a = SCHEDULE.alpha_bar.double()[t]
    away = x_t.double().reshape(1, 2) - a.sqrt() * directions.double()  # [directions, 2]
    variance = a * DEVIATION**2 + 1 - a
    weights = (-away.square().sum(1) / (2 * variance)).softmax(0)
    return ((1 - a).sqrt() / variance * (weights @ away)).reshape(x_t.shape)


def mixture(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
    """The exact denoiser: an embedding is the mean of x_0 [2, 1, 1]; zeros are all of them."""
    assert conditioning.embedding is not None
    rows = [
        exact(x_t[n : n + 1], t[n : n + 1], one[None] if one.any() else DIRECTIONS)
        for n, one in enumerate(conditioning.embedding)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_guidance_by_an_embedding_is_that_of_the_mixture(scale: float) -> None:
    """Without an embedding plus scale times the difference; image i has row i % M."""
    takes = ConditioningSpec(image_encoder=ENCODER)
    of = Denoiser(mixture, Parameterization.of("epsilon", SCHEDULE), takes=takes)
    of = replace(of, embeddings=DIRECTIONS)
    index = torch.tensor([4, 0, 2])
    x_t = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([30, 30, 30])
    found = of.bind_conditioning(of.conditioning(index), Guidance(scale))(x_t, t)
    for n, i in enumerate(index.tolist()):
        weak = exact(x_t[n : n + 1], t[:1], DIRECTIONS)
        strong = exact(x_t[n : n + 1], t[:1], DIRECTIONS[i % 3][None])
        torch.testing.assert_close(
            found[n : n + 1], weak + scale * (strong - weak), rtol=0, atol=1e-9
        )


def test_variations_are_drawn_from_the_embeddings_of_their_images() -> None:
    """With the exact denoiser they lie within the deviation of the direction of their image."""
    takes = ConditioningSpec(image_encoder=ENCODER)

    def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The mixture's in rows of two equal pixels: noise of the mean alone."""
        rows = mixture(x_t.mean((1, 3))[:, :, None, None], t, conditioning).to(x_t)
        return rows.reshape(-1, 1, 2, 1).expand(x_t.shape)

    of = Denoiser(network, Parameterization.of("epsilon", SCHEDULE), takes=takes)
    model = TrainedModel(of, ImageShape(2, 2, 1), provenance={})
    images = np.array([[[255, 255], [128, 128]], [[128, 128], [255, 255]]], np.uint8)[..., None]
    wanted = ENCODER.embed(PIXELS.encode(torch.from_numpy(images)))
    drawn = model.variations(images, per_image=3, steps=50, seed=5)
    assert drawn.shape == (6, 2, 2, 1)
    rows = PIXELS.encode(torch.from_numpy(drawn)).mean((1, 3))
    near = (rows - wanted.repeat_interleave(3, 0)).abs().max()
    assert near < 6 * DEVIATION
    assert not np.array_equal(drawn[0], drawn[1])
    with pytest.raises(ValueError, match="images are 4 x 2; variations are drawn of images of the"):
        model.variations(np.zeros((1, 4, 2, 1), np.uint8))
    with pytest.raises(ValueError, match="per_image is 0"):
        model.variations(images, per_image=0)
    without = replace(model, denoiser=replace(of, takes=ConditioningSpec()))
    with pytest.raises(ValueError, match="image embeddings are for models trained with them"):
        without.variations(images)


def test_variations_have_no_text_unless_the_call_has_one() -> None:
    """The model's own prompts describe other images."""
    tokenizer, seen = Tokenizer.trained(["a", "b"], 280, 4), []

    def network(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        assert conditioning.tokens is not None
        seen.append([tokenizer.decode(row.tolist()) for row in conditioning.tokens])
        return x_t

    takes = ConditioningSpec(tokenizer=tokenizer, image_encoder=ENCODER)
    of = Denoiser(network, Parameterization.of("epsilon", SCHEDULE), takes=takes)
    model = TrainedModel(of, ImageShape(2, 2, 1), provenance={}).with_settings(prompts=["a"])
    images = np.zeros((2, 2, 2, 1), np.uint8)
    model.variations(images, steps=2)
    assert set(map(tuple, seen)) == {("", "")}
    seen.clear()
    model.variations(images, steps=2, prompts=["b", "a"])
    assert set(map(tuple, seen)) == {("b", "a")}


def test_each_image_has_its_embedding_after_its_flip_and_dropouts_are_independent() -> None:
    tokenizer = Tokenizer.trained(["a", "b"], 280, 4)
    takes = ConditioningSpec(tokenizer=tokenizer, image_encoder=ENCODER)

    def steps(step: object, positions: Tensor) -> tuple[Tensor, None]:
        return torch.ones(len(positions), dtype=torch.int64), None

    def drawn(text: float, embedding: float, positions: Tensor) -> Conditioning:
        recipe = NoisingRecipe(
            3, steps, takes, flip=True, label_dropout=text, embedding_dropout=embedding
        )
        images = torch.arange(len(positions) * 4, dtype=torch.uint8).reshape(-1, 2, 2, 1) * 5
        tokens = tokenizer.encode(["a"] * len(positions))
        batch = Batch(images, torch.zeros(len(positions), dtype=torch.int64), tokens=tokens)
        made = recipe.noisy_batch(batch, 7, positions, CPU)
        kept = made.conditioning.embedding
        assert kept is not None
        present = kept.any(1)
        torch.testing.assert_close(kept[present], ENCODER.embed(made.x_0)[present])
        return made.conditioning

    count = 4000
    both = drawn(0.5, 0.1, torch.arange(count))
    assert both.tokens is not None
    assert both.embedding is not None
    no_text, no_embedding = both.tokens[:, 0] < 0, ~both.embedding.any(1)
    for found, share in (
        (no_text, 0.5),
        (no_embedding, 0.1),
        (no_text & no_embedding, 0.05),  # of independent choices
    ):
        deviation = (share * (1 - share) / count) ** 0.5
        assert abs(found.double().mean().item() - share) < 5 * deviation
    part = drawn(0.5, 0.1, torch.arange(100, 150)).embedding
    assert part is not None
    assert torch.equal(~part.any(1), no_embedding[100:150])  # of any worker
    none = drawn(0.0, 0.0, torch.arange(20)).embedding
    assert none is not None
    assert none.any(1).all()


WITH_TEXT = "text.encoder=transformer"
GUIDED = "sampling.guidance_scale=2"
TEXT = TextEncoderSpec(300, 1, (0, 1, 1), width=8, depth=1, heads=2)
UNET = UNetSpec(1, 4, (1, 2), 1, (2,), groups=2)
DIT = DiTSpec((4, 4), 1, 2, 1, 8, 2)


@pytest.mark.parametrize("text", [None, TEXT], ids=["embedding", "embedding and text"])
@pytest.mark.parametrize("spec", [UNET, DIT], ids=["unet", "dit"])
def test_no_embedding_is_zeros_and_every_weight_learns(
    spec: UNetSpec | DiTSpec, text: TextEncoderSpec | None
) -> None:
    """All parameters have a gradient, with an embedding; without one, none is a row of zeros."""
    torch.manual_seed(0)
    of = replace(spec, text=text, embedding_width=6)
    network = UNet(of) if isinstance(of, UNetSpec) else DiT(of)
    generator = torch.Generator().manual_seed(1)
    for one in network.parameters():
        torch.nn.init.normal_(one, std=0.3, generator=generator)
    x, t = torch.randn(3, 1, 4, 4, generator=generator), torch.tensor([1, 2, 3])
    embedding = torch.nn.functional.normalize(torch.randn(3, 6, generator=generator), dim=1)
    given = network(x, t, Conditioning(embedding=embedding))
    given.square().sum().backward()
    assert all(one.grad is not None and one.grad.any() for one in network.parameters())
    bare = network(x, t, Conditioning())
    torch.testing.assert_close(network(x, t, Conditioning(embedding=torch.zeros(3, 6))), bare)
    assert (given - bare).abs().amin((1, 2, 3)).min() > 1e-4
    with pytest.raises(
        ValueError, match=r"image embeddings are \[3, 5\]; this network takes \[B, 6\]"
    ):
        network(x, t, Conditioning(embedding=embedding[:, :5]))
    plain = UNet(replace(UNET)) if isinstance(of, UNetSpec) else DiT(DIT)
    with pytest.raises(ValueError, match="an image embedding is given, but the network takes none"):
        plain(x, t, Conditioning(embedding=embedding))


def test_a_network_continues_with_embeddings_where_it_was_without() -> None:
    """Before it is trained further, an embedding changes nothing: its projection is 0."""
    torch.manual_seed(0)
    before, after = UNet(UNET), UNet(replace(UNET, embedding_width=6))
    for one in before.parameters():  # an untrained network does not depend on t's embedding
        torch.nn.init.normal_(one, std=0.3)
    after.load_state_dict(after.state_dict() | before.state_dict())
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([3, 9])
    embedding = torch.nn.functional.normalize(torch.randn(2, 6), dim=1)
    assert torch.equal(after(x, t, Conditioning(embedding=embedding)), before(x, t))


@pytest.mark.parametrize(
    "keys, message",
    [
        (
            ("embedding.encoder=nowhere",),
            "embedding.encoder: nowhere: there is no such folder",
        ),
        (("embedding.width=8",), "embedding.width is 8, which nothing uses without"),
        (
            ("embedding.encoder=x", "model.num_classes=3"),
            "a network is given labels or embeddings: leave one out",
        ),
        (
            ("embedding.encoder=x", "embedding.dropout=0", GUIDED),
            r"without its embedding \(embedding.dropout\); neither may be 0",
        ),
        (
            (WITH_TEXT, "embedding.encoder=x", "embedding.dropout=0", GUIDED),
            r"without its text \(objective.label_dropout\) and its embedding",
        ),
        (
            (
                "text.encoder=transformer",
                "embedding.encoder=x",
                "objective.label_dropout=0",
                GUIDED,
            ),
            r"without its text \(objective.label_dropout\) and its embedding",
        ),
        (("embedding.dropout=0.5",), "embedding.dropout is 0.5, which nothing uses without"),
        (("embedding.encoder=x", "embedding.dropout=1.5"), "embedding.dropout is 1.5"),
        (
            ("task=classifier", "model.num_classes=2", "embedding.encoder=x"),
            "embedding.encoder is 'x'; only task=denoiser uses it",
        ),
    ],
)
def test_encoders_that_cannot_be_used_are_refused(
    keys: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    pack_noise(str(tmp_path), 4, 4)
    options = ["name=x", f"data.url={tmp_path}", *keys]
    with pytest.raises(ConfigError, match=message):
        settled_embedding(load_config(RunConfig, None, options), open_dataset(str(tmp_path)))


def test_many_images_are_embedded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of a run embed thousands at once; an encoder's activations take GB then."""
    torch.manual_seed(0)
    model = ContrastiveEncoders(ContrastiveSpec(1, 4, (1, 2), 1, 2, 6, TEXT)).eval()
    tokenizer = Tokenizer.trained(["a"], 280, 4)
    encoders = TrainedEncoders(model, tokenizer, ImageShape(4, 4, 1), "here", "0")
    whole, largest = encoders.embed(torch.arange(160.0).reshape(10, 1, 4, 4) / 160), []
    monkeypatch.setattr(image_text, "BATCH", 3)
    own = model.embed_images

    def counted(x: Tensor) -> Tensor:
        largest.append(len(x))
        return own(x)

    monkeypatch.setattr(model, "embed_images", counted)
    torch.testing.assert_close(
        encoders.embed(torch.arange(160.0).reshape(10, 1, 4, 4) / 160), whole
    )
    assert max(largest) == 3


def test_a_model_whose_encoder_has_gone_says_so_when_it_is_needed() -> None:
    """Drawing from given embeddings needs none."""
    gone = NamedImageEncoder(WIDTH, "gone", "0" * 64, "cpu", "runs/decoder")
    of = Denoiser(
        mixture,
        Parameterization.of("epsilon", SCHEDULE),
        takes=ConditioningSpec(image_encoder=gone),
        embeddings=DIRECTIONS,
    )
    assert of.conditioning(torch.arange(4)).embedding is not None
    with pytest.raises(CheckpointError, match="runs/decoder: the encoder of its image embeddings"):
        gone.embed(torch.zeros(1, 1, 2, 2))
