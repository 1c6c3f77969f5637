"""Optimiser state in checkpoints: by the parameters' names, whatever the groups are."""

import threading
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddpm_ray.training import background_copy
from ddpm_ray.training import state as state_module
from ddpm_ray.training.ema import EMA
from ddpm_ray.training.state import TrainingState
from ddpm_ray.training.tensor_file import copy_all


def model() -> nn.Sequential:
    """Four parameters of one shape: a moment in the wrong one raises no error of shapes."""
    return nn.Sequential(nn.Linear(3, 3, bias=False), *(nn.Linear(3, 3, bias=False) for _ in "abc"))


def state_with(groups: list[list[int]]) -> TrainingState:
    """A state whose Adam has the parameters of these indices, group after group."""
    net = model()
    parameters = list(net.parameters())
    optimizer = torch.optim.Adam([{"params": [parameters[i] for i in group]} for group in groups])
    return TrainingState(net, EMA(net), optimizer, {})


def step(state: TrainingState, seed: int) -> None:
    """One step on gradients that depend on the parameter and the seed."""
    generator = torch.Generator().manual_seed(seed)
    for value in state.model.parameters():
        value.grad = torch.randn(value.shape, generator=generator)
    state.optimizer.step()


groupings = st.permutations(range(4)).flatmap(
    lambda order: st.sets(st.integers(1, 3)).map(
        lambda cuts: [
            list(order[a:b]) for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 4], strict=True)
        ]
    )
)


@given(groupings, groupings)
def test_a_run_continues_equal_though_its_parameters_are_grouped_anew(
    before: list[list[int]], after: list[list[int]]
) -> None:
    torch.manual_seed(0)
    unbroken = state_with(before)
    for seed in range(3):
        step(unbroken, seed)
    restored = state_with(after)
    restored.restore(unbroken.snapshot([]))
    step(unbroken, 9)
    step(restored, 9)
    for mine, theirs in zip(restored.model.parameters(), unbroken.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@given(groupings)
def test_a_moment_is_saved_under_the_name_of_its_parameter(groups: list[list[int]]) -> None:
    state = state_with(groups)
    step(state, 0)
    saved = state.snapshot([]).tensors["optimizer"]
    for name, value in state.model.named_parameters():
        assert value.grad is not None
        torch.testing.assert_close(saved[f"{name}.exp_avg"], 0.1 * value.grad)


def test_parameters_that_are_not_trained_have_no_moments() -> None:
    state = state_with([[2], [0]])
    step(state, 0)
    restored = state_with([[2], [0]])
    restored.restore(state.snapshot([]))
    assert {key.rpartition(".")[0] for key in restored.snapshot([]).tensors["optimizer"]} == {
        "0.weight",
        "2.weight",
    }


def test_a_moment_of_an_unknown_parameter_is_refused() -> None:
    state = state_with([[0, 1, 2, 3]])
    step(state, 0)
    other = state_with([[0, 1, 2]])
    with pytest.raises(RuntimeError, match=r"the checkpoint has moments of 3\.weight"):
        other.restore(state.snapshot([]))


@pytest.mark.parametrize("change", ["update", "restore"])
def test_a_snapshot_is_of_its_step_though_training_goes_on(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy takes its time; what changes the state waits for it."""
    changed = threading.Event()

    def slow(*arguments: Any) -> None:
        changed.wait(0.05)  # in which a change that does not wait has long happened
        copy_all(*arguments)

    monkeypatch.setattr(background_copy, "copy_all", slow)
    state, other = state_with([[0, 1, 2, 3]]), state_with([[0, 1, 2, 3]])
    wanted, found = state.snapshot([]).tensors, state.start_snapshot([]).tensors
    if change == "update":
        for value in state.model.parameters():
            value.grad = torch.ones_like(value)
        monkeypatch.setattr(state_module, "step_optimizer", lambda optimizer, *_: optimizer.step())
        state.step_optimizers(1.0, torch.tensor(True))
    else:
        state.restore(other.snapshot([]))
    changed.set()
    state.background_copy.finish()
    assert not torch.equal(state.model[0].weight, wanted["model"]["0.weight"])  # type: ignore[index]
    for group, tensors in wanted.items():
        assert all(torch.equal(found[group][name], value) for name, value in tensors.items())
