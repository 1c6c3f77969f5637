"""AdamW and the learning rate, against a reference in NumPy and the schedules of others."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import optimization as of_diffusers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddpm_ray.assembly import optimization, training_run
from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.training import TrainingConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.training.state import TrainingState

CPU = torch.device("cpu")
BOTH = "name=tiny", "data.url=none", "model.num_classes=3"
NET = (
    *BOTH,
    "model.base_channels=4",
    "model.groups=2",
    "model.channel_mults=[1,2]",
    "model.blocks_per_level=1",
    "model.attention_factors=[2]",
)
DIT = (
    *BOTH,
    "model.network=dit",
    "model.depth=1",
    "model.hidden_size=16",
    "model.heads=2",
    "model.patch_size=2",
)
RATE, DECAY = 1e-2, 0.3


def state_of(*overrides: str, net: tuple[str, ...] = NET) -> TrainingState:
    config = load_config(RunConfig, None, [*net, f"training.learning_rate={RATE}", *overrides])
    return training_run.training_state(config, ImageShape(4, 4, 1), CPU, {})


def gradients(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator)
        for name, value in model.named_parameters()
    }


def step(state: TrainingState, seed: int) -> None:
    given = gradients(state.model, seed)
    for name, value in state.model.named_parameters():
        value.grad = given[name]
    state.optimizer.step()


# The optimiser.


def adamw(value: Any, steps: list[Any], decay: float) -> Any:
    """Loshchilov and Hutter 2019 (arXiv:1711.05101), algorithm 2, in float64."""
    mean = square = np.zeros_like(value)
    for t, gradient in enumerate(steps, 1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        estimate = mean / (1 - 0.9**t) / (np.sqrt(square / (1 - 0.999**t)) + 1e-8)
        value = value - RATE * (estimate + decay * value)
    return value


CLASSIFIER = *NET, "task=classifier", "training.grid_every_steps=0", "evaluation.num_images=0"


@pytest.mark.parametrize("net", [NET, CLASSIFIER, DIT], ids=["unet", "classifier", "dit"])
def test_matrices_and_kernels_decay_and_nothing_else_does(net: tuple[str, ...]) -> None:
    state = state_of(f"training.weight_decay={DECAY}", net=net)
    before = {n: p.detach().double().numpy().copy() for n, p in state.model.named_parameters()}
    for seed in range(4):
        step(state, seed)
    given = [gradients(state.model, seed) for seed in range(4)]
    for name, value in state.model.named_parameters():
        layer = state.model.get_submodule(name.rpartition(".")[0])
        kept = isinstance(layer, nn.Embedding | nn.GroupNorm) or name.endswith(("bias", "position"))
        steps = [one[name].double().numpy() for one in given]
        wanted = adamw(before[name], steps, 0.0 if kept else DECAY)
        np.testing.assert_allclose(value.detach().numpy(), wanted, rtol=2e-5, atol=1e-6)


def test_a_run_with_weight_decay_continues_with_equal_bits() -> None:
    unbroken, restored = (state_of(f"training.weight_decay={DECAY}") for _ in range(2))
    for seed in range(3):
        step(unbroken, seed)
    restored.restore(unbroken.snapshot([]))
    step(unbroken, 9)
    step(restored, 9)
    wanted = unbroken.model.state_dict()
    for name, value in restored.model.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_adam_continues_as_adamw() -> None:
    """The moments of a run without weight decay fit one with it: they have names."""
    adam, adamw_ = state_of(), state_of(f"training.weight_decay={DECAY}")
    step(adam, 0)
    adamw_.restore(adam.snapshot([]))
    before = {name: value.detach().clone() for name, value in adam.model.named_parameters()}
    step(adam, 1)
    step(adamw_, 1)
    decayed = optimization.decayed_names(adam.model)
    plain = dict(adam.model.named_parameters())
    for name, value in adamw_.model.named_parameters():
        lost = plain[name] - value  # AdamW's step is Adam's, and the weight times rate and decay
        wanted = RATE * DECAY * before[name] if name in decayed else torch.zeros_like(value)
        torch.testing.assert_close(lost, wanted, rtol=1e-3, atol=2e-7)


def test_without_weight_decay_the_optimiser_is_adam_in_one_group() -> None:
    optimizer = state_of().optimizer
    assert type(optimizer) is torch.optim.Adam
    assert len(optimizer.param_groups) == 1


# The learning rate.

STEPS, WARMUP = 40, 8


def rates(steps: int = STEPS, **options: Any) -> list[float]:
    config = TrainingConfig(steps=steps, global_batch_size=4, learning_rate=RATE, **options)
    rate = optimization.learning_rate(config)
    return [rate(step) for step in range(steps)]


def scheduled(make: Any, **arguments: Any) -> list[float]:
    """The rates of a schedule of torch or diffusers."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    schedule, found = make(optimizer, **arguments), []
    for _ in range(STEPS):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_cosine_is_that_of_torch() -> None:
    wanted = scheduled(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=STEPS)
    assert rates(learning_rate_decay="cosine") == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_decay_after_a_warm_up_is_that_of_diffusers(kind: str) -> None:
    """Their first update has the rate 0, ours 1 / WARMUP: the warm-up is one update ahead."""
    make = getattr(of_diffusers, f"get_{kind}_schedule_with_warmup")
    wanted = scheduled(make, num_warmup_steps=WARMUP, num_training_steps=STEPS)
    found = rates(learning_rate_decay=kind, warmup_steps=WARMUP)
    assert found[WARMUP:] == pytest.approx(wanted[WARMUP:], rel=1e-9)
    assert found[:WARMUP] == pytest.approx(wanted[1 : WARMUP + 1], rel=1e-9)


def test_the_inverse_square_root_halves_the_rate_at_four_times_the_images() -> None:
    options: dict[str, Any] = {
        "learning_rate_decay": "inverse_sqrt",
        "learning_rate_reference_images": 16,
    }
    found = rates(steps=401, **options)
    assert found[:5] == [RATE] * 5  # 16 images are 4 updates
    assert found[16] == pytest.approx(RATE / 2)
    assert found[36] == pytest.approx(RATE / 3)
    assert found[400] == pytest.approx(RATE / 10)
    assert rates(warmup_images=16, **options)[:4] == pytest.approx(
        [RATE / 4, RATE / 2, RATE * 3 / 4, RATE]
    )


kinds = st.sampled_from(["cosine", "linear", "inverse_sqrt"])


@given(kinds, st.integers(2, 60), st.data())
def test_the_rate_rises_to_its_peak_then_falls_and_stays_above_zero(
    kind: str, steps: int, data: st.DataObject
) -> None:
    warmup = data.draw(st.integers(0, steps - 1))
    reference = data.draw(st.integers(1, 300)) if kind == "inverse_sqrt" else 0
    found = rates(
        steps,
        learning_rate_decay=kind,
        learning_rate_reference_images=reference,
        warmup_steps=warmup,
    )
    if kind != "inverse_sqrt":  # which may fall while it warms up
        assert max(found) == pytest.approx(RATE)
        assert all(a < b for a, b in pairwise(found[:warmup]))
    peak = max(warmup - 1, 0)
    assert all(a >= b for a, b in pairwise(found[peak:]))
    assert 0 < min(found) <= max(found) <= RATE


@given(st.sampled_from(["cosine", "linear"]), st.integers(1, 10**6))
def test_the_last_update_is_near_zero_and_the_next_would_be_there(kind: Any, steps: int) -> None:
    config = TrainingConfig(steps=steps, learning_rate=RATE, learning_rate_decay=kind)
    rate = optimization.learning_rate(config)
    assert rate(steps) == pytest.approx(0, abs=1e-12)
    assert 0 < rate(steps - 1) <= RATE * min(1, math.pi / steps)


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["learning_rate_decay=inverse_sqrt"], "reference_images is 0 and .* say after how many"),
        (
            ["learning_rate_reference_images=9"],
            "is 9 and .*learning_rate_decay none; set it to 0",
        ),
        (
            ["learning_rate_decay=cosine", "steps=10", "warmup_steps=10"],
            r"warmup_steps is 10; with training.learning_rate_decay=cosine .* before .*steps 10",
        ),
        (
            ["learning_rate_decay=linear", "steps=10", "warmup_images=1280"],
            r"warmup_images is 1280; with training.learning_rate_decay=linear the warm-up must end",
        ),
        (["learning_rate_decay=cosin"], "did you mean cosine"),
        (["weight_decay=-1"], "weight_decay is -1.0; it must be at least 0"),
    ],
)
def test_a_learning_rate_that_cannot_be_is_refused(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(RunConfig, None, [*NET, *(f"training.{one}" for one in overrides)])
