"""The store's trials equal its files, at whatever operation its driver dies."""

import json
import tempfile
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_ray.storage.checksummed_json import encode, read
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.sweep.trial_store import Status, Trial, TrialStore
from tests.limits import ENDS_S

Operation = tuple[str, int, Any]  # what is done, to which trial (modulo their number), with what
ENDED: tuple[Status, ...] = "finished", "stopped", "pruned", "failed"
VALUES: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    st.text(max_size=8),
    st.integers() | st.floats() | st.booleans() | st.text() | st.lists(st.integers()),
    max_size=3,
)
OPERATIONS: st.SearchStrategy[Operation] = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 2), VALUES),
    st.tuples(st.just("add ended"), st.integers(0, 2), st.sampled_from(ENDED)),
    st.tuples(
        st.just("validation_loss"), st.integers(0, 9), st.tuples(st.integers(1, 5), st.floats())
    ),
    st.tuples(st.just("end"), st.integers(0, 9), st.sampled_from(ENDED)),
    st.tuples(st.just("die"), st.integers(0, 9), st.none()),
)


def do(store: TrialStore, operation: Operation) -> None:
    kind, number, what = operation
    if kind == "add":
        store.add(what, branch=number)
    elif kind == "add ended":
        store.add({"seed": 1}, number, status=what, reason="so", diagnostics={"useless_share": 0.7})
    elif store.trials:
        trial = store.trials[number % len(store.trials)]
        if kind == "validation_loss":
            store.add_validation_loss(
                trial, {"step": what[0], "loss": what[1], "spectrum": [what[1], 0.5]}
            )
        elif kind == "end":
            store.record_end(trial, what, "because", metrics={"eval/fid": 3.5}, step=what)
        else:
            trial.driver_failures += 1
            store.write(trial)


def dumped(trials: list[Trial]) -> list[str]:
    """As text, in which a nan equals itself."""
    return [json.dumps(asdict(trial)) for trial in trials]


@given(st.lists(OPERATIONS, max_size=12))
@settings(max_examples=60)
def test_what_is_read_back_is_what_was_written_at_any_cut(operations: list[Operation]) -> None:
    """A driver that is another one before each operation comes as far as one that lives on."""
    with tempfile.TemporaryDirectory() as unbroken, tempfile.TemporaryDirectory() as broken:
        whole = TrialStore(unbroken)
        for operation in operations:
            do(whole, operation)
            do(TrialStore(broken), operation)
            assert dumped(TrialStore(unbroken).trials) == dumped(whole.trials)
            assert dumped(TrialStore(broken).trials) == dumped(whole.trials)


@given(st.lists(OPERATIONS, max_size=12))
@settings(max_examples=60)
def test_events_come_in_the_order_in_which_they_happened(operations: list[Operation]) -> None:
    """Counted from 0 without gaps; each operation adds one at the end, or none."""
    with tempfile.TemporaryDirectory() as folder:
        store = TrialStore(folder)
        before: list[tuple[int, int, bool]] = []
        for operation in operations:
            do(store, operation)
            events = [(order, trial.number, p is None) for order, trial, p in store.events()]
            assert events[: len(before)] == before
            assert len(events) - len(before) in (0, 1)
            before = events
        assert [order for order, _, _ in before] == list(range(len(before)))


def test_trials_are_numbered_in_files_as_documented(tmp_path: Path) -> None:
    store = TrialStore(str(tmp_path))
    for number in range(3):
        assert store.add({"seed": number}).number == number
    names = ["00000.json", "00001.json", "00002.json"]
    assert sorted(path.name for path in (tmp_path / "trials").iterdir()) == names
    assert read(str(tmp_path / "trials/00002.json"))["values"] == {"seed": 2}


def test_a_step_that_was_reported_is_not_noted_again(tmp_path: Path) -> None:
    """Also by a driver that has it from the file: a trial replays steps after a crash."""
    trial = TrialStore(str(tmp_path)).add({"seed": 1})
    for step, loss, new in [(10, 0.5, True), (10, 0.4, False), (5, 0.3, False), (20, 0.2, True)]:
        store = TrialStore(str(tmp_path))
        assert (
            store.add_validation_loss(store.trials[trial.number], {"step": step, "loss": loss})
            == new
        )
    assert [(p["step"], p["loss"]) for p in store.trials[0].validation_losses] == [
        (10, 0.5),
        (20, 0.2),
    ]


def test_what_its_lives_cost_is_added_up(tmp_path: Path) -> None:
    """Each interruption counts once, also if it is reported twice, to another driver."""
    trial = TrialStore(str(tmp_path)).add({"seed": 1})
    for ended, worker_s, busy_s in [(5.0, 10.0, 6.0), (5.0, 10.0, 6.0), (9.0, 4.0, 1.0)]:
        store = TrialStore(str(tmp_path))
        life = {"ended": ended, "worker_s": worker_s, "busy_s": busy_s, "metrics": {}}
        store.record_interruption(store.trials[trial.number], life)
    store = TrialStore(str(tmp_path))
    assert store.trials[0].status == "running"
    store.record_end(store.trials[0], "finished", worker_s=100.0, busy_s=50.0, step=40)
    assert store.trials[0].outcome == {"worker_s": 114.0, "busy_s": 57.0, "step": 40}


@pytest.mark.parametrize("first", ENDED)
def test_once_ended_it_stays_so(first: Status, tmp_path: Path) -> None:
    store = TrialStore(str(tmp_path))
    trial = store.add({"seed": 1})
    store.record_end(trial, first, "the first reason", step=5)
    once = dumped([trial])
    for status in ENDED:
        store.record_end(trial, status, "another", step=6)
    assert dumped([trial]) == dumped(TrialStore(str(tmp_path)).trials) == once


def test_only_a_finished_trial_has_scores() -> None:
    outcome = {"metrics": {"eval/fid": 3.5}}
    assert Trial(0, {}, status="finished", outcome=outcome).metrics == {"eval/fid": 3.5}
    for status in ("running", "stopped", "pruned", "failed"):
        assert Trial(0, {}, status=status, outcome=outcome).metrics == {}


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "not checksummed JSON"),
        (encode({"number": 1, "values": {}})[:-9], "not checksummed JSON"),
        (b"{\xc3", "not checksummed JSON"),
        (b'{"number": 1, "values": {}}', "not checksummed JSON"),
        (
            encode({"number": 1, "values": {}}).replace(b"1", b"7"),
            "its sha256 is not that",
        ),
        (encode([1, 2]), "must be a mapping"),
        (encode({}), r"missing 2 required positional arguments: 'number' and 'values'"),
        (encode({"number": 1}), r"missing 1 required positional argument: 'values'"),
        (encode({"number": 1, "values": {}, "valeus": {}}), "unexpected keyword .* 'valeus'"),
    ],
)
def test_a_file_that_holds_no_trial_is_reported_in_a_line(
    content: bytes, says: str, tmp_path: Path
) -> None:
    """Passed over, it would be a trial that is tried again while those after it are lost."""
    store = TrialStore(str(tmp_path))
    for number in range(3):
        store.add({"seed": number})
    file = tmp_path / "trials/00001.json"
    file.write_bytes(content)
    with pytest.raises(StorageError, match=rf"is not a trial of a sweep \(.*{says}") as error:
        TrialStore(str(tmp_path))
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"{file}: ")
    assert line.endswith("; restore a complete copy, or start the sweep under another name")


def test_who_sees_that_a_trial_ended_sees_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may look between any two statements: here, at each attribute that is set."""
    seen: list[tuple[str, str, dict[str, Any], int]] = []

    def set_and_read(trial: Trial, name: str, value: Any) -> None:
        object.__setattr__(trial, name, value)
        if trial.__dict__.get("status", "running") != "running":
            seen.append((trial.status, trial.reason, dict(trial.outcome), trial.ended_order))

    store = TrialStore(str(tmp_path))
    trial = store.add({"seed": 1})
    monkeypatch.setattr(Trial, "__setattr__", set_and_read)
    store.record_end(trial, "stopped", "because", worker_s=3.0)
    assert set(map(str, seen)) == {str(("stopped", "because", {"worker_s": 3.0}, 0))}


def test_a_trial_does_not_change_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe that comes while the main thread writes waits until that is done."""
    store = TrialStore(str(tmp_path))
    trial = store.add({"seed": 1})
    noted = threading.Thread(
        target=store.add_validation_loss, args=(trial, {"step": 1, "loss": 0.5})
    )

    def interrupted(of: Trial) -> dict[str, Any]:
        monkeypatch.setattr("ddpm_ray.sweep.trial_store.asdict", asdict)  # once
        noted.start()
        noted.join(0.2)  # ends within it, were it let
        assert not of.validation_losses
        return asdict(of)

    monkeypatch.setattr("ddpm_ray.sweep.trial_store.asdict", interrupted)
    store.write(trial)
    noted.join(ENDS_S)
    assert [validation_loss["step"] for validation_loss in trial.validation_losses] == [1]
