"""Contrastive losses and gradients, against loops over pairs, for any division of the batch."""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from ddpm_ray import fault_injection
from ddpm_ray.collectives import Workers
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.fault_injection import InjectedFaultError
from ddpm_ray.models.contrastive import Embedded
from ddpm_ray.training.contrastive_loss import (
    batch_recall,
    contrastive_losses,
    equal_rows,
    infonce_losses,
)
from ddpm_ray.training.contrastive_objective import ContrastiveObjective
from tests.fixtures.threaded_workers import OnWorkers
from tests.training.contrastive_batches import COUNT, captioned_batch, tiny_encoders, tokens_of

captions = st.lists(st.integers(0, 3), min_size=1, max_size=6)


def leaves(count: int, seed: int) -> Embedded:
    """Embeddings, scale and bias in float64 that remember their gradient."""
    draw = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(2, count, 5, generator=draw, dtype=torch.float64).unbind()
    scalars = torch.tensor([0.7, -1.3], dtype=torch.float64)
    found = F.normalize(images, dim=1), F.normalize(texts, dim=1), *scalars
    return Embedded(*(one.clone().requires_grad_() for one in found))


def loop_over_pairs(of: Embedded, texts: list[int]) -> Tensor:
    """(Zhai et al. 2023, arXiv:2303.15343, eq. 1), with z = 1 for pairs of equal captions."""
    total = torch.zeros((), dtype=torch.float64)
    for i, image in enumerate(of.images):
        for j, text in enumerate(of.texts):
            z = 1 if texts[i] == texts[j] else -1
            logit = of.log_scale.exp() * (image @ text) + of.bias
            total = total + torch.log(1 + torch.exp(-z * logit))
    return total / len(of.images)


@settings(max_examples=20)
@given(captions, st.integers(0, 99))
def test_the_sigmoid_loss_has_the_gradient_of_its_pairs(texts: list[int], seed: int) -> None:
    found, wanted = leaves(len(texts), seed), leaves(len(texts), seed)
    loss = contrastive_losses(found, equal_rows(tokens_of(texts)), "sigmoid").mean()
    pairs = loop_over_pairs(wanted, texts)
    assert loss.item() == pytest.approx(pairs.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(one, of) for one, of in ((loss, found), (pairs, wanted)))
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-10, atol=1e-12)


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(0, 99))
def test_infonce_of_distinct_captions_is_the_cross_entropy_both_ways(count: int, seed: int) -> None:
    logits = torch.randn(
        count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    own = torch.arange(count)
    both = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    found = infonce_losses(logits, torch.eye(count, dtype=torch.bool)).mean()
    assert found.item() == pytest.approx(both.item(), rel=1e-12)


def test_infonce_spreads_its_target_evenly_over_equal_captions() -> None:
    """The minimum is the entropy of the targets, where all right captions are equally likely."""
    positive = equal_rows(tokens_of([0, 0, 1, 0]))
    best = torch.where(positive, 0.0, -100.0).double()
    assert infonce_losses(best, positive).tolist() == pytest.approx(
        [math.log(3), math.log(3), 0, math.log(3)]
    )


def test_a_wrong_caption_that_is_nearest_is_no_recall() -> None:
    images = torch.eye(3)
    texts = torch.stack([images[1], images[0], images[2]])
    for texts_of, wanted in (([0, 1, 2], [0, 0, 1]), ([0, 0, 2], [1, 1, 1])):
        positive = equal_rows(tokens_of(texts_of))
        assert batch_recall(images, texts, positive).tolist() == wanted


def objective(loss: Any = "sigmoid", slots: int = 0) -> ContrastiveObjective:
    return ContrastiveObjective(0, loss, slots=slots)


def gradients(
    workers: Workers, of: ContrastiveObjective, micro_batch: int = COUNT
) -> dict[str, Tensor]:
    """Loss of the global batch and the mean gradient over all workers, by parameter."""
    network, batch = deepcopy(BEGUN[of.loss]), captioned_batch()
    mine = list(workers.share(COUNT))
    part = batch.map(lambda tensor: tensor[mine])
    losses = of.backward(network, part, 0, workers, micro_batch)
    found = {"loss": workers.gather_rows(losses.loss)}
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        if not of.slots:
            workers.sum_(parameter.grad.div_(workers.count))
        found[name] = parameter.grad
    return found


# Made once: weights are drawn from torch's one generator, which threads share.
BEGUN: dict[str, Any] = {
    "sigmoid": tiny_encoders(),
    "infonce": tiny_encoders(learns_bias=False),
}


def of_the_whole_batch(loss: Any) -> dict[str, Tensor]:
    """Loss and gradient by autograd through both encoders at once."""
    network, batch = deepcopy(BEGUN[loss]), captioned_batch()
    assert batch.tokens is not None
    found = network(PIXELS.encode(batch.images), batch.tokens)
    losses = contrastive_losses(found, equal_rows(batch.tokens), loss)
    losses.mean().backward()
    named = network.named_parameters()
    return {"loss": losses.detach()} | {name: one.grad for name, one in named}


@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
@pytest.mark.parametrize("micro_batch", [COUNT, 3])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_gradient_does_not_depend_on_the_division_of_the_batch(
    count: int, micro_batch: int, loss: Any, on_workers: OnWorkers
) -> None:
    wanted = of_the_whole_batch(loss)
    for found in on_workers(count, lambda one: gradients(one, objective(loss), micro_batch)):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
@pytest.mark.parametrize("micro_batch", [COUNT, 1])
def test_slots_give_any_number_of_workers_equal_bits(
    micro_batch: int, loss: Any, on_workers: OnWorkers
) -> None:
    work = objective(loss, slots=4)
    (alone,) = on_workers(1, lambda one: gradients(one, work, micro_batch))
    for name, value in of_the_whole_batch(loss).items():
        torch.testing.assert_close(alone[name], value, rtol=1e-4, atol=2e-5)
    for count in (2, 4):
        for found in on_workers(count, lambda one: gradients(one, work, micro_batch)):
            assert all(torch.equal(found[name], value) for name, value in alone.items())


def test_a_loss_that_is_not_finite_makes_the_gradient_of_all_workers_nan(
    on_workers: OnWorkers,
) -> None:
    def spoilt(workers: Workers) -> bool:
        network, batch = deepcopy(BEGUN["sigmoid"]), captioned_batch()
        if workers.rank == 1:
            with torch.no_grad():
                network.image.conv_in.weight.fill_(math.nan)
        part = batch.map(lambda tensor: tensor[list(workers.share(COUNT))])
        objective().backward(network, part, 0, workers, COUNT)
        return bool(network.text_projection.weight.grad.isnan().any())

    assert on_workers(2, spoilt) == [True, True]


@pytest.mark.parametrize("slots, micro_batch", [(0, COUNT), (0, 3), (4, 1)])
def test_a_point_lies_between_a_workers_embeddings_and_those_of_all(
    slots: int, micro_batch: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A worker that waits there has its batch, and one that is still reading it is behind."""
    monkeypatch.setenv(fault_injection.VARIABLE, f"{tmp_path / 'fired'} fail@embeddings")
    with pytest.raises(InjectedFaultError, match="fault at embeddings"):
        gradients(Workers(), objective(slots=slots), micro_batch)


def test_flips_are_those_of_a_step_and_a_position_in_both_passes(on_workers: OnWorkers) -> None:
    """Else the gradient of a micro-batch would be that of other images than were compared."""
    flipping = ContrastiveObjective(0, "sigmoid", flip=True)
    whole = gradients(Workers(), flipping)
    plain = gradients(Workers(), objective())
    for parts in on_workers(2, lambda one: gradients(one, flipping, 3)):
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(whole["loss"], plain["loss"])


def test_losses_report_recall_scale_and_bias() -> None:
    network, batch = deepcopy(BEGUN["sigmoid"]), captioned_batch()
    with torch.no_grad():
        network.logits.log_scale.fill_(math.log(7))
        network.logits.bias.fill_(-2)
    terms = objective().backward(network, batch, 0, Workers(), COUNT).terms
    assert terms[:, 1].tolist() == pytest.approx([7] * COUNT)
    assert terms[:, 2].tolist() == [-2] * COUNT
    assert batch.tokens is not None
    found = network(PIXELS.encode(batch.images), batch.tokens)
    nearest = (found.images @ found.texts.T).argmax(1)
    right = (batch.tokens[nearest] == batch.tokens).all(1)
    assert terms[:, 0].tolist() == right.float().tolist()
