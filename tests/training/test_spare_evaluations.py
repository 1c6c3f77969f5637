"""Evaluations by a spare process: each exactly once, of the weights of its step, in order, bounded.

The spare process is a thread here, or nothing; tests/runs/test_spare_evaluation_on_ray.py has Ray.
"""

import contextlib
import hashlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddpm_ray.collectives import Workers
from ddpm_ray.reporting import Command, Progress, Row
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.training import evaluation_queue, loop, spare_evaluations
from ddpm_ray.training.evaluation_queue import EvaluationQueue, Request
from ddpm_ray.training.evaluation_store import (
    EvaluationResult,
    EvaluationStore,
)
from ddpm_ray.training.loop import train_loop
from ddpm_ray.training.run import Run
from ddpm_ray.training.spare_evaluations import (
    MAX_OUTSTANDING,
    EvaluationFailedError,
    SpareEvaluations,
)
from tests.fixtures.threaded_workers import OnWorkers
from tests.limits import ENDS_S
from tests.noise import pack_noise
from tests.training.test_loop import (
    IMAGES,
    SIDE,
    STEPS,
    Killed,
    RecordingSink,
    _closed_streams,  # noqa: F401 - a fixture
    begin,
    configured,
    dies_after_commit,
    dies_before_save,
    dies_before_update,
    dies_in_save,
    spoil,
)

SETTINGS = {"of": "this test"}
ALONE = Workers()
OFTEN = (
    "training.reduction=elastic",
    "training.reduction_slots=2",
    "evaluation.validation_every_steps=0",
    "evaluation.num_images=4",
    "evaluation.every_steps=2",
    "training.grid_every_steps=3",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data"))
    pack_noise(folder, IMAGES, SIDE)
    return folder


def score(weights: dict[str, torch.Tensor]) -> float:
    """A number that any changed bit of the weights changes."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(weights[name].numpy().tobytes())
    return float(int(digest.hexdigest()[:12], 16))


@dataclass
class Process:
    """The spare process: scores stored weights; each `fails` entry is raised once instead."""

    store: EvaluationStore
    fails: list[Exception] = field(default_factory=list)
    allowed: threading.Event = field(default_factory=threading.Event)
    seen: list[int] = field(default_factory=list)
    closed: bool = False

    def call(self, request: Request) -> str:
        assert self.allowed.wait(ENDS_S)
        if self.closed:
            raise RuntimeError("closed")
        if self.fails:
            raise self.fails.pop(0)
        step = request["step"]
        self.seen.append(step)
        digest, result = self.store.digest(step, SETTINGS), EvaluationResult()
        if "scores" in request["outputs"]:
            result.rows([Row(step, {"eval/sum": score(self.store.weights(step))})])
            result.scores = {"step": step, "metrics": {"eval/sum": score(self.store.weights(step))}}
        if "grid" in request["outputs"]:
            draw(result, step)
        self.store.save_result(step, digest, result)
        return digest

    def activity(self) -> str:
        return "computes scores (for 7 s)"

    def release(self) -> None: ...

    def close(self) -> None:
        self.closed = True
        self.allowed.set()


@dataclass
class Pictures(RecordingSink):
    """A recording sink that keeps which pictures it was given."""

    pictures: set[tuple[str, int, int]] = field(default_factory=set)

    def image(self, key: str, step: int, image: Image.Image) -> None:
        self.pictures.add((key, step, image.getpixel((0, 0))))  # type: ignore[arg-type]

    def of(self, key: str) -> dict[int, float]:
        return {step: value for (name, step), value in self.values.items() if name == key}


def draw(sink: Pictures | EvaluationResult, step: int) -> None:
    sink.image("samples", step, Image.new("L", (1, 1), step))


def start(
    data: str,
    folder: Path,
    sink: Pictures,
    *fails: Exception,
    runs: bool = True,
    workers: Workers = ALONE,
    overrides: tuple[str, ...] = OFTEN,
) -> tuple[Run, Process]:
    """A run whose evaluations go to a process, which works at once if `runs`."""
    run = begin(configured(data, *overrides), folder / "checkpoints", sink, workers)
    store = EvaluationStore(str(folder / "evaluations"))
    process = Process(store, list(fails))
    if runs:
        process.allowed.set()
    queue = EvaluationQueue(process, store, lambda error: isinstance(error, StorageError), 2)
    of_main = queue if workers.is_main else None
    spare = SpareEvaluations(
        run.state, workers, store, run.checkpoints, {}, True, of_main, run.sink
    )
    return replace(run, spare=spare), process


def in_step(
    data: str, folder: Path, overrides: tuple[str, ...] = OFTEN, spoilt: int = 0
) -> Pictures:
    """What the same run finds where it evaluates between its steps; step `spoilt` diverges."""
    sink = Pictures()
    run = begin(configured(data, *overrides), folder, sink)
    if spoilt:
        spoil(run, spoilt, position=2)

    def evaluate(step: int) -> None:
        sink.rows([Row(step, {"eval/sum": score(dict(run.state.ema.state_dict()))})])
        run.state.scores = {"step": step}

    assert train_loop(replace(run, evaluate=evaluate, draw_grid=partial(draw, sink)))
    return sink


@pytest.fixture(scope="module")
def wanted(data: str, tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    return in_step(data, tmp_path_factory.mktemp("whole"))


def complete(run: Run) -> bool:
    assert run.spare is not None
    try:
        return train_loop(run)
    finally:
        run.checkpoints.wait()
        run.spare.close()


def grids(sink: Pictures) -> set[tuple[str, int, int]]:
    return {one for one in sink.pictures if one[1] > 0}  # step 0 is drawn before training


def test_the_rows_are_those_of_evaluations_in_the_step(
    data: str, wanted: Pictures, tmp_path: Path
) -> None:
    """Each of the weights of its own step, while training has gone on; nothing is left over."""
    sink = Pictures()
    run, process = start(data, tmp_path, sink)
    assert complete(run)
    assert sink.timeless() == wanted.timeless()
    assert list(sink.of("eval/sum")) == [2, 4, 6, 8]
    assert process.seen == [2, 3, 4, 6, 8]
    assert grids(sink) == grids(wanted)
    assert run.state.scores["step"] == STEPS
    assert not list((tmp_path / "evaluations").glob("step-*"))
    found = run.checkpoints.store.load()
    assert found is not None
    assert "outstanding" not in found[1].facts
    assert found[1].facts["scores"]["step"] == STEPS


@pytest.mark.parametrize(
    "dies, step, runs",
    [
        (dies_before_update, 5, True),
        (dies_before_update, 5, False),
        (dies_before_save, 6, True),
        (dies_in_save, 6, False),
        (dies_in_save, 8, True),
        (dies_after_commit, 8, False),
    ],
)
def test_a_killed_run_has_each_row_once_of_the_same_weights(
    dies: Callable[..., None],
    step: int,
    runs: bool,
    data: str,
    wanted: Pictures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`runs` false: the process had not begun anything when the run was killed."""
    monkeypatch.setattr(loop, "REPORT_EVERY_S", 0)
    monkeypatch.setattr(loop, "WAIT_S", 0.01)
    sink = Pictures()
    with monkeypatch.context() as patch:
        run, process = start(data, tmp_path, sink, runs=runs)
        run = replace(
            run, draw_grid=lambda at: sink.image("samples", at, Image.new("L", (1, 1), at))
        )
        if not runs:  # until training waits for it, then it begins
            patch.setattr(SpareEvaluations, "warn_queue_full", lambda *_: process.allowed.set())
            patch.setattr(SpareEvaluations, "log_wait_at_end", lambda _: process.allowed.set())
        dies(run, step, patch)
        with pytest.raises(Killed, match=f"step {step}"):
            train_loop(run)
        with contextlib.suppress(Killed):
            run.checkpoints.wait()
        assert run.spare is not None
        run.spare.close()
    run, _ = start(data, tmp_path, sink)
    assert complete(run)
    assert sink.timeless() == wanted.timeless()
    assert grids(sink) == grids(wanted)
    assert not list((tmp_path / "evaluations").glob("step-*"))


def test_no_more_than_the_bound_are_outstanding_and_none_is_left_out(
    data: str,
    wanted: Pictures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The process begins when training waits: with 2, 3 and 4 outstanding at step 6, both due."""
    monkeypatch.setattr(loop, "WAIT_S", 0.01)
    sink, most = Pictures(), list[int]()
    run, process = start(data, tmp_path, sink, runs=False)

    def show(progress: Progress) -> Command:
        most.append(len(run.state.outstanding))
        if "training waits at step 6" in caplog.text:
            process.allowed.set()
        return Command.NONE

    run.show_progress = show
    assert complete(run)
    assert max(most) == MAX_OUTSTANDING
    assert sink.timeless() == wanted.timeless()
    assert caplog.text.count("training waits at step") == 1
    assert (
        "3 evaluations (steps 2, 3, 4) outstanding, the most there may be (step 2 computes s"
        in (caplog.text)
    )


def test_the_workers_draw_the_grids_that_cannot_be_queued(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With 1, 2 and 3 outstanding, 4 to 7 are drawn in their steps; 8 has scores and waits."""
    sink, drawn = Pictures(), list[int]()
    run, process = start(data, tmp_path, sink, runs=False)
    plan = replace(run.plan, grid_every_steps=1, evaluate_every_steps=STEPS)
    run = replace(run, plan=plan, draw_grid=drawn.append)

    def show(progress: Progress) -> Command:
        if "training waits at step 8" in caplog.text:
            process.allowed.set()
        return Command.NONE

    run.show_progress = show
    assert complete(run)
    assert drawn == [0, 4, 5, 6, 7]
    assert process.seen == [1, 2, 3, 8]
    assert caplog.text.count("the workers draw the grid of step 4 themselves") == 1


def test_two_workers_wait_for_a_free_slot_together(
    data: str,
    wanted: Pictures,
    on_workers: OnWorkers,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the main one has the queue; at step 6 both wait for it, and at the end."""
    monkeypatch.setattr(loop, "WAIT_S", 0.01)
    sink, lock = Pictures(), threading.Lock()

    def train(workers: Workers) -> bool:
        with lock:  # weights begin from torch's one generator
            run, process = start(data, tmp_path, sink, runs=False, workers=workers)
        if run.spare is not None and run.spare.queue is not None:
            monkeypatch.setattr(run.spare, "warn_queue_full", lambda *_: process.allowed.set())
        return complete(run)

    assert on_workers(2, train) == [True, True]
    assert sink.timeless() == wanted.timeless()


def test_a_stop_leaves_them_to_the_next_start(
    data: str,
    wanted: Pictures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(loop, "REPORT_EVERY_S", 0)
    sink = Pictures()
    run, process = start(data, tmp_path, sink, runs=False)
    run.show_progress = lambda progress: Command.STOP if progress.step >= 5 else Command.NONE
    assert not complete(run)
    assert process.closed
    assert "3 evaluations (steps 2, 3, 4) outstanding: the same command finishes them" in (
        caplog.text
    )
    run, process = start(data, tmp_path, sink)
    assert complete(run)
    assert process.seen == [2, 3, 4, 6, 8]
    assert sink.timeless() == wanted.timeless()


def test_transient_errors_are_tried_again_and_others_are_given_up_in_a_line(
    data: str, wanted: Pictures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = StorageError("s3://b", "no answer", "wait")
    sink = Pictures()
    run, process = start(data, tmp_path, sink, away, away, away, ValueError("no such\nfeature"))
    assert complete(run)
    assert process.seen == [4, 6, 8]  # the tries of step 2 were used up; step 3 is not tried again
    assert "evaluation of step 2: s3://b: no answer; wait; trying again (2 of 2" in caplog.text
    assert "evaluation of step 2 is given up: s3://b: no answer" in caplog.text
    assert (
        "evaluation of step 3 is given up: no such feature; the run goes on without its grid"
        in caplog.text
    )
    every = wanted.of("eval/sum")
    assert sink.of("eval/sum") == {step: every[step] for step in (4, 6, 8)}


def test_without_the_last_scores_the_run_fails_and_the_next_start_has_them(
    data: str, wanted: Pictures, tmp_path: Path
) -> None:
    sink = Pictures()
    run, process = start(data, tmp_path, sink)
    call = process.call

    def fail_at_the_last(request: Request) -> str:
        if request["step"] == STEPS:
            raise ValueError("no weights of Inception")
        return call(request)

    process.call = fail_at_the_last  # type: ignore[method-assign]
    with pytest.raises(EvaluationFailedError, match="last step, 8, failed: no weights of Incept"):
        complete(run)
    run, process = start(data, tmp_path, sink)
    assert run.state.step == STEPS  # no training is lost
    assert complete(run)
    assert process.seen[-1] == STEPS
    assert sink.timeless() == wanted.timeless()


def test_damaged_weights_of_the_last_step_are_stored_again(
    data: str, wanted: Pictures, tmp_path: Path
) -> None:
    """The checkpoint has them too; without its last scores a run can never be complete."""
    sink = Pictures()
    run, process = start(data, tmp_path, sink)
    process.fails = [ValueError("a bug")] * 5
    with pytest.raises(EvaluationFailedError, match="last step, 8, failed: a bug"):
        complete(run)
    damaged = tmp_path / f"evaluations/step-{STEPS:08d}/ema.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    run, process = start(data, tmp_path, sink)
    assert complete(run)
    assert sink.of("eval/sum") == {STEPS: wanted.of("eval/sum")[STEPS]}


def test_two_requests_of_a_step_are_both_delivered(data: str, tmp_path: Path) -> None:
    """Its folder stays until the second, and checkpoints list the second until then."""
    run, process = start(data, tmp_path, Pictures(), runs=False)
    spare, each, call = run.spare, threading.Semaphore(0), process.call
    assert spare is not None

    def call_when_allowed(request: Request) -> str:
        assert each.acquire(timeout=ENDS_S)
        return call(request)

    process.call = call_when_allowed  # type: ignore[method-assign]
    process.allowed.set()
    try:
        for output in ("grid", "scores"):
            spare.request(3, [output])
        run.checkpoints.wait()
        each.release()
        spare.deliver(last_step=False, wait_s=ENDS_S)
        assert [one["outputs"] for one in run.state.outstanding] == [["scores"]]
        spare.forget_delivered()()
        assert spare.store.weights(3)
        each.release()
        spare.deliver(last_step=False, wait_s=ENDS_S)
        assert run.state.scores["step"] == 3
        assert run.state.outstanding == []
        spare.forget_delivered()()
        assert not list((tmp_path / "evaluations").iterdir())
    finally:
        process.close()
        each.release()
        spare.close()


def test_a_changed_run_that_asks_for_more_of_its_step_has_all(
    data: str, wanted: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 6 a grid is outstanding; the next start wants the scores of step 6 too."""
    monkeypatch.setattr(loop, "REPORT_EVERY_S", 0)
    sink = Pictures()
    run, _ = start(data, tmp_path, sink, runs=False)
    run = replace(run, plan=replace(run.plan, evaluate_every_steps=0))
    run.show_progress = lambda progress: Command.STOP if progress.step >= 6 else Command.NONE
    assert not complete(run)
    assert [one["step"] for one in run.state.outstanding] == [3, 6]
    run, process = start(data, tmp_path, sink)
    assert complete(run)
    assert process.seen == [3, 6, 6, 8]
    every = wanted.of("eval/sum")
    assert sink.of("eval/sum") == {step: every[step] for step in (6, 8)}
    assert grids(sink) == grids(wanted)


def test_a_failed_picture_of_the_last_step_does_not_fail_the_run(
    data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is scored; a picture is no result of the run."""
    run, process = start(data, tmp_path, Pictures())
    assert run.spare is not None
    run.spare.has_scores = False
    process.fails = [ValueError("no font")] * 3
    assert complete(run)
    assert "evaluation of step 8 is given up: no font; the run goes on without its grid" in (
        caplog.text
    )


def stopped_with_three_outstanding(
    data: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped at step 5 with the evaluations of steps 2, 3 and 4."""
    monkeypatch.setattr(loop, "REPORT_EVERY_S", 0)
    monkeypatch.setattr(loop, "WAIT_S", 0.01)
    run, _ = start(data, folder, Pictures(), runs=False)
    run.show_progress = lambda progress: Command.STOP if progress.step >= 5 else Command.NONE
    assert not complete(run)
    assert [one["step"] for one in run.state.outstanding] == [2, 3, 4]


@pytest.mark.parametrize("stops", [False, True])
def test_evaluations_of_steps_that_are_rewound_over_are_delivered(
    stops: bool,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Step 5 diverges and goes back to step 3; step 4 is scored after that, with its weights.

    `stops`: the run ends at step 5, and the next start has the evaluations done.
    """
    rewinds = (*OFTEN, "training.on_divergence=rewind")
    monkeypatch.setattr(loop, "REPORT_EVERY_S", 0)
    monkeypatch.setattr(loop, "WAIT_S", 0.01)
    wanted = in_step(data, tmp_path / "in_step", rewinds, spoilt=5)
    sink = Pictures()
    run, process = start(data, tmp_path, sink, runs=False, overrides=rewinds)
    spoil(run, 5, position=2)

    def show(progress: Progress) -> Command:
        if progress.step >= 5 and not stops:
            process.allowed.set()
        return Command.STOP if progress.step >= 5 and stops else Command.NONE

    run.show_progress = show
    assert complete(run) != stops
    assert "rewound: step 6 continues from the weights of" in caplog.text
    if stops:
        run, process = start(data, tmp_path, sink, overrides=rewinds)
        assert complete(run)
    assert process.seen == [2, 3, 4, 6, 8]
    assert sink.timeless() == wanted.timeless()
    assert list(sink.of("eval/sum")) == [2, 4, 6, 8]
    assert grids(sink) == grids(wanted)


def test_a_checkpoint_that_is_asked_for_before_the_first_step_is_saved(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start wants scores of step 5, and waits; a node is about to be removed."""
    stopped_with_three_outstanding(data, tmp_path, monkeypatch)
    run, process = start(data, tmp_path, Pictures(), runs=False)
    run = replace(run, plan=replace(run.plan, evaluate_every_steps=5))
    saved, save, commands = list[tuple[int, list[int]]](), loop.save, [Command.CHECKPOINT]

    def show(progress: Progress) -> Command:
        process.allowed.set()
        return commands.pop() if commands else Command.NONE

    def saves(run: Run) -> None:
        saved.append((run.state.step, [one["step"] for one in run.state.outstanding]))
        save(run)

    monkeypatch.setattr(loop, "save", saves)
    run.show_progress = show
    assert complete(run)
    assert any(step == 5 and 5 in listed for step, listed in saved)


def test_a_stop_while_the_last_step_waits_leaves_its_evaluations(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The command comes once, as scores of step 8 wait for those of 2, 4 and 6."""
    monkeypatch.setattr(loop, "WAIT_S", 0.01)
    run, process = start(data, tmp_path, Pictures(), runs=False)
    run = replace(run, plan=replace(run.plan, grid_every_steps=0))
    waited = list[Command]()

    def show(progress: Progress) -> Command:
        if "training waits at step 8" in caplog.text:
            waited.append(Command.NONE if waited else Command.STOP)
        if len(waited) > 3:
            process.allowed.set()
        return waited[-1] if waited else Command.NONE

    run.show_progress = show
    assert not complete(run)
    assert len(waited) == 1
    assert [one["step"] for one in run.state.outstanding] == [2, 4, 6, 8]


def test_a_long_wait_is_reported_again_and_again_with_what_is_computed(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As of an evaluation that hangs while its process answers pings; here 3 lines for 4 steps."""
    caplog.set_level("INFO")
    monkeypatch.setattr(loop, "WAIT_S", 0.01)
    monkeypatch.setattr(spare_evaluations, "STILL_WAITING_S", 0.03)
    run, process = start(data, tmp_path, Pictures(), runs=False)
    plan = replace(run.plan, grid_every_steps=0, evaluate_every_steps=4)
    run = replace(run, plan=plan)
    waits = re.compile(
        r"still waiting, for \d+ s, for 2 evaluations \(steps 4, 8\): step 4 computes scores"
    )

    def show(progress: Progress) -> Command:
        if len(waits.findall(caplog.text)) == 3:
            process.allowed.set()
        return Command.NONE

    run.show_progress = show
    assert complete(run)
    assert len(waits.findall(caplog.text)) >= 3


def test_lines_of_a_wait_come_once_in_each_period(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run, _ = start(data, tmp_path, Pictures(), runs=False)
    assert run.spare is not None
    lines = list[int]()
    for waited_s in (0, 299, 300, 301, 599, 650, 900, 5, 299, 301):  # the second wait begins at 5
        caplog.clear()
        run.spare.log_long_wait(waited_s)
        if f"still waiting, for {waited_s} s, for 0 evaluations" in caplog.text:
            lines.append(waited_s)
    assert lines == [300, 650, 900, 301]
    run.spare.close()


def test_weights_that_cannot_be_stored_end_the_wait_for_them(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of grids of steps 1, 2 and 3; the scores of step 8 wait for the third for ever."""
    monkeypatch.setattr(loop, "WAIT_S", 0.01)
    run, _ = start(data, tmp_path, Pictures(), runs=False)
    plan = replace(run.plan, grid_every_steps=1, evaluate_every_steps=0, checkpoint_every_steps=0)
    run, save, reports = replace(run, plan=plan), EvaluationStore.save_weights, list[int]()

    def fail(store: EvaluationStore, step: int, weights: Any) -> None:
        if step == 3:
            raise StorageError("s3://b", "no answer", "wait")
        save(store, step, weights)

    def show(progress: Progress) -> Command:
        reports.append(progress.step)
        assert reports.count(STEPS) < 50, "it waits for ever"
        return Command.NONE

    monkeypatch.setattr(EvaluationStore, "save_weights", fail)
    run.show_progress = show
    with pytest.raises(StorageError, match="s3://b: no answer"):
        complete(run)


def test_a_result_that_is_damaged_before_it_is_read_is_made_again(
    data: str, wanted: Pictures, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = Pictures()
    run, process = start(data, tmp_path, sink)
    call = process.call

    def damage_once(request: Request) -> str:
        digest = call(request)
        if process.seen == [2, 3]:
            (tmp_path / "evaluations/step-00000003" / "samples.png").write_bytes(b"")
        return digest

    process.call = damage_once  # type: ignore[method-assign]
    assert complete(run)
    assert process.seen == [2, 3, 3, 4, 6, 8]
    assert "samples.png: is damaged; evaluate a checkpoint of the step, if one" in caplog.text
    assert (sink.timeless(), grids(sink)) == (wanted.timeless(), grids(wanted))


def test_a_thread_that_waits_for_ever_does_not_hold_up_the_end_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that reads from a store without an answer, which the evaluator cannot end."""
    entered, never = threading.Event(), threading.Event()

    class Stuck(Process):
        def call(self, request: Request) -> str:
            entered.set()
            assert never.wait(ENDS_S)
            return ""

    store = EvaluationStore(str(tmp_path))
    queue = EvaluationQueue(Stuck(store), store, lambda error: False, 0)
    monkeypatch.setattr(evaluation_queue, "CLOSE_S", 0.05)
    queue.add({"step": 1, "outputs": ["grid"], "history": {}})
    try:
        assert entered.wait(ENDS_S)
        queue.close()
        assert "their thread has not ended within 0.05 s; the process ends without" in caplog.text
    finally:
        never.set()
