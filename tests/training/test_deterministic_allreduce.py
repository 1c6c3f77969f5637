"""Gradients of slots, added in pairs."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddpm_ray.collectives import Workers
from ddpm_ray.training.deterministic_allreduce import DeterministicAllReduce


def summed(gradients: list[list[float]]) -> list[float]:
    """What DeterministicAllReduce leaves in the parameters after these slots' gradients."""
    network = nn.Linear(len(gradients[0]), 1, bias=False)
    total = DeterministicAllReduce([*network.parameters()], len(gradients))
    for gradient in gradients:
        network.weight.grad = torch.tensor([gradient])
        total.accumulate()
        assert network.weight.grad is None
    total.all_reduce(Workers())
    assert network.weight.grad is not None
    (row,) = network.weight.grad.tolist()
    return [float(value) for value in row]


@given(st.integers(0, 4), st.randoms(use_true_random=False))
def test_the_sum_of_two_halves_is_the_sum_of_all_to_the_bit(level: int, draw: object) -> None:
    """Which is what lets two workers do what one does."""
    generator = torch.Generator().manual_seed(draw.randrange(2**32))  # type: ignore[attr-defined]
    gradients = torch.randn(2 ** (level + 1), 5, generator=generator).tolist()
    half = len(gradients) // 2
    first, second = summed(gradients[:half]), summed(gradients[half:])
    of_two = (torch.tensor(first) + torch.tensor(second)) / 2
    assert summed(gradients) == of_two.tolist()


def test_it_is_a_mean() -> None:
    assert summed([[1.0, -8.0], [3.0, 0.0], [5.0, 2.0], [7.0, 2.0]]) == [4.0, -1.0]


def test_a_parameter_without_a_gradient_counts_as_zero() -> None:
    network = nn.Linear(2, 1)
    total = DeterministicAllReduce([*network.parameters()], 1)
    network.weight.grad = torch.ones(1, 2)
    total.accumulate()
    total.all_reduce(Workers())
    assert network.bias.grad is not None
    assert network.bias.grad.tolist() == [0.0]


def test_one_nan_reaches_all() -> None:
    assert all(value != value for value in summed([[float("nan")], [1.0]]))
