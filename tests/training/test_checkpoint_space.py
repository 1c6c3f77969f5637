"""A run whose milestones do not fit on the disk says so at its start, with the arithmetic."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ddpm_ray.config.training import TrainingConfig
from ddpm_ray.training.checkpoint_space import warn_of_shortage
from ddpm_ray.training.ema import EMA
from ddpm_ray.training.state import TrainingState

SIZE = 4 * 4 * 500_000  # bytes of weights, their average and two moments


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the free bytes of every disk."""

    def has(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))

    return has


def state(step: int) -> TrainingState:
    model = nn.Linear(1000, 500, bias=False)
    optimizer = torch.optim.Adam(model.parameters())
    return TrainingState(model, EMA(model), optimizer, {}, step=step)


CONFIG = TrainingConfig(
    steps=100, checkpoint_every_steps=10, keep_every_steps=20, keep_checkpoints=3
)


@pytest.mark.parametrize("step, kept", [(0, 8), (40, 3), (59, 3), (60, 2), (100, 0)])
def test_only_what_is_still_to_come_must_fit(
    step: int,
    kept: int,
    disk: Callable[[int], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for free, warned in ((kept * SIZE, False), (max(0, kept * SIZE - 1), kept > 0)):
        disk(free)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_of_shortage(CONFIG, state(step), str(tmp_path / "run/not/yet"))
        assert bool(caplog.messages) == warned


def test_the_arithmetic_is_told(
    disk: Callable[[int], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    disk(40_000_000)
    with caplog.at_level(logging.WARNING):
        warn_of_shortage(CONFIG, state(0), str(tmp_path))
    assert caplog.messages == [
        f"{tmp_path}: training.keep_every_steps=20 keeps 5 more checkpoints of 0.008 GB for ever, "
        "and the newest 3: 0.064 GB, and the disk has 0.04 GB left; free space, or set a larger "
        "multiple of training.checkpoint_every_steps"
    ]


def test_a_size_before_the_first_step_is_that_after_it() -> None:
    one = state(0)
    before = one.checkpoint_bytes()
    one.model(torch.ones(1, 1000)).sum().backward()
    one.optimizer.step()
    assert one.checkpoint_bytes() - before == one.optimizer.state_dict()["state"][0]["step"].nbytes
    assert before == SIZE
