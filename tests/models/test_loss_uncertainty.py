"""What u(t) learns, against losses whose means are known."""

import math

import pytest
import torch
from torch import Tensor

from ddpm_ray.diffusion.loss_weighting import uncertain
from ddpm_ray.models.loss_uncertainty import LogVariance


def test_it_learns_the_log_of_the_mean_loss_at_each_step() -> None:
    """Losses of four orders of magnitude, two to a step, so that none is the mean itself."""
    u = LogVariance(width=32).double()
    t = torch.arange(1, 17)
    mean = torch.exp(torch.linspace(1, -8, 16, dtype=torch.float64))
    losses = torch.stack([0.5 * mean, 1.5 * mean])
    optimizer = torch.optim.LBFGS(u.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def cost() -> Tensor:
        optimizer.zero_grad()
        value = uncertain(losses, u(t)).mean()
        value.backward()
        return value

    optimizer.step(cost)
    torch.testing.assert_close(u(t).exp(), mean, rtol=0.01, atol=0)


def test_it_starts_by_leaving_the_loss_as_it_is() -> None:
    u, t = LogVariance(), torch.tensor([1, 500, 4000])
    assert u(t).tolist() == [0, 0, 0]
    loss = torch.tensor([0.3, 2.0, 0.01])
    assert torch.equal(uncertain(loss, u(t)), loss)


def test_autocast_does_not_round_it() -> None:
    """A bias of 1 / 3, which bfloat16 would move by 0.0005."""
    u = LogVariance()
    torch.nn.init.constant_(u.dense.bias, 1 / 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = u(torch.tensor([7]))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(1 / 3, abs=1e-7)
    assert not math.isclose(torch.tensor(1 / 3).bfloat16().item(), 1 / 3, abs_tol=1e-4)
