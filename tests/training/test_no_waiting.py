"""A run whose device decides ends in the bits of a loop that reads each norm before its update."""

import contextlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_ray import fault_injection
from ddpm_ray.data.loader import Batch, ShardStream
from ddpm_ray.fault_injection import InjectedFaultError
from ddpm_ray.training.divergence_guard import FEWEST_STEPS, WINDOW_STEPS, DivergedError
from ddpm_ray.training.loop import train_loop
from ddpm_ray.training.run import Run
from ddpm_ray.training.state import Snapshot
from tests.fixtures.same_bits import assert_same_bits
from tests.noise import pack_noise
from tests.training.test_loop import (
    BY_LOSSES,
    IMAGES,
    SIDE,
    RecordingSink,
    begin,
    bits,
    configured,
)

STEPS, EVERY, FACTOR = 50, 7, 4
NAN, SPIKE = 20, 33  # steps; reports come with the checkpoints at 21 and 35


@dataclass
class BadStream:
    """A stream of which one batch holds a NaN."""

    stream: ShardStream
    waited_s: float = 0.0

    def batch(self, step: int, out: Batch | None = None) -> Batch:
        images, labels = self.stream.batch(step).tensors
        if step + 1 == NAN:
            images = images.float()
            images[2] = math.nan
        return Batch(images, labels)

    def keys(self, step: int) -> list[str]:
        return self.stream.keys(step)

    def close(self) -> None:
        self.stream.close()


@dataclass
class DocumentSink(RecordingSink):
    documents: dict[str, Any] = field(default_factory=dict)

    def document(self, path: str, content: dict[str, Any]) -> None:
        assert self.documents.setdefault(path, content) == content


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data"))
    pack_noise(folder, IMAGES, SIDE)
    return folder


def begun(
    data: str, folder: Path, policy: str, *overrides: str, sink: RecordingSink | None = None
) -> Run:
    config = configured(
        data,
        f"training.on_divergence={policy}",
        f"training.steps={STEPS}",
        f"training.checkpoint_every_steps={EVERY}",
        f"training.spike_factor={FACTOR}",
        "training.ema_more_decays=[0.3]",
        "evaluation.validation_every_steps=0",
        *overrides,
    )
    run = begin(config, folder, sink)
    assert isinstance(run.stream, ShardStream)
    run.stream = BadStream(run.stream)
    for parameter in run.state.model.parameters():
        parameter.register_hook(
            lambda gradient: gradient * (100.0 if run.state.step + 1 == SPIKE else 1.0)
        )
    return run


def synchronous(run: Run, policy: str) -> dict[tuple[str, int], float]:
    """Train `run` by a loop that waits for each norm; its rows, without bands.

    It ends before the first bad step where the policy is to stop.
    """
    state, plan, rows = run.state, run.plan, dict[tuple[str, int], float]()
    norms, saved = list[float](), dict[int, tuple[Snapshot, list[float]]]()
    while state.step < plan.steps:
        batch = run.stream.batch(state.step)
        found = run.objective.backward(
            run.network, batch, state.step, run.workers, plan.micro_batch_size
        )
        norm, number = float(state.clip_gradients(plan.max_grad_norm)), state.step + 1
        limit = FACTOR * median(norms) if len(norms) >= FEWEST_STEPS else math.inf
        if math.isfinite(norm) and norm <= limit:
            norms = [*norms, norm][-WINDOW_STEPS:]
            rate = plan.learning_rate(state.step)
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            state.optimizer.step()
            decays = {name: decay(state.step) for name, decay in state.averages.decays.items()}
            for mean, decay in (
                (state.ema, plan.ema_decay(state.step)),
                *((state.averages.means[name], decay) for name, decay in decays.items()),
            ):
                means: list[Tensor] = list(mean.model.parameters())
                with torch.no_grad():
                    torch._foreach_lerp_(means, list[Tensor](state.model.parameters()), 1.0 - decay)
            if state.moments is not None:
                state.moments.update(found.t, found.loss, torch.tensor(True))
            loss = (found.loss.double() * 2.0**40).round().mean().item() * 2.0**-40
            rows |= {("train/loss", number): loss, ("train/grad_norm", number): norm}
            rows["train/lr", number] = rate
        elif policy == "stop":
            return rows
        else:
            rows["train/skipped", number] = 1.0
            if policy == "rewind":
                snapshot, norms = saved[(number - 1) // EVERY * EVERY]
                before = state.step
                state.restore(snapshot)
                state.step = before
        state.zero_grad()
        state.step += 1
        if state.step % EVERY == 0:
            saved[state.step] = state.snapshot([]), norms
    return rows


def train(run: Run) -> None:
    try:
        train_loop(run)
    finally:
        with contextlib.suppress(InjectedFaultError):  # of the thread that was saving
            run.checkpoints.wait()


KILLS = {"unbroken": "", "killed": "fail@batch:22 fail@snapshot:28 fail@update:34 fail@batch:40"}


@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize(
    "policy, overrides", [("skip", ()), ("skip", BY_LOSSES), ("rewind", BY_LOSSES)]
)
def test_fifty_steps_with_a_nan_and_a_spike_have_the_bits_of_a_synchronous_loop(
    policy: str,
    overrides: tuple[str, ...],
    kills: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = begun(data, tmp_path / "reference", policy, *overrides)
    rows = synchronous(reference, policy)
    assert {step for key, step in rows if key == "train/skipped"} == {NAN, SPIKE}

    sink = DocumentSink()
    monkeypatch.setenv(fault_injection.VARIABLE, f"{tmp_path / 'fired'} {KILLS[kills]}")
    for left in reversed(range(1 + len(KILLS[kills].split()))):
        run = begun(data, tmp_path / "run", policy, *overrides, sink=sink)
        dies: Any = pytest.raises(InjectedFaultError, match="injected fault at")
        with dies if left else contextlib.nullcontext():
            train(run)
    assert_same_bits(bits(run), bits(reference))
    found = {place: value for place, value in sink.timeless().items() if "logsnr" not in place[0]}
    assert found == rows
    assert {
        content["step"]: content["grad_norm"] for content in sink.documents.values()
    }.keys() == {
        NAN,
        SPIKE,
    }
    assert sink.documents[f"skipped/step-{NAN:08d}.json"]["grad_norm"] == "nan"


def test_a_run_that_stops_has_the_bits_of_the_step_before(data: str, tmp_path: Path) -> None:
    """The device has seen the batch of step 21 as well before the host knew of step 20."""
    reference = begun(data, tmp_path / "reference", "stop")
    synchronous(reference, "stop")
    run = begun(data, tmp_path / "run", "stop")
    taken: list[int] = []
    batch = run.stream.batch

    def noted(step: int, out: Batch | None = None) -> Batch:
        taken.append(step + 1)
        return batch(step, out)

    run.stream.batch = noted  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match=f"step {NAN}: .* nan, from 1 sample"):
        train(run)
    assert taken[-1] == 21
    assert_same_bits(bits(run), bits(reference))
