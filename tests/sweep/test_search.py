"""What a trial tries depends on the seed and on the trials before it, and lies in the space."""

import copy
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_ray.config.jobs.search_space import Branch, is_range
from ddpm_ray.config.jobs.sweep import SearchConfig
from ddpm_ray.sweep.search import Proposal, propose, total_trials
from ddpm_ray.sweep.trial_store import Trial, TrialStore

FID = "eval/fid"
GRID: list[Branch] = [
    {"schedule.kind": ["linear", "cosine"], "schedule.num_steps": [100, 200, 300]},
    {"schedule.kind": ["sigmoid"], "model.channel_mults": [[1, 2], [1, 2, 2]]},
]
MIXED: list[Branch] = [
    {
        "schedule.num_steps": {"low": 10, "high": 1000, "log": True},
        "model.dropout": {"low": 0.0, "high": 0.3, "step": 0.1},
    },
    {
        "model.channel_mults": [[1], [1, 2]],
        "seed": {"low": 3, "high": 11, "step": 4},
        "training.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    },
]
LEARNING: tuple[Literal["random", "tpe"], ...] = "random", "tpe"


def quadratic(values: dict[str, Any]) -> float:
    return float((values["model.dropout"] - 0.2) ** 2)


def all_of(space: Sequence[Branch], search: SearchConfig) -> list[Proposal]:
    """What is proposed where each trial finishes before the next begins, whatever it scores."""
    trials: list[Trial] = []
    while (proposal := propose(space, search, trials, FID)) is not None:
        branch, values = proposal
        outcome = {"metrics": {FID: float(len(trials) % 5)}}
        trials.append(Trial(len(trials), values, branch, status="finished", outcome=outcome))
    return [(trial.branch, trial.values) for trial in trials]


def within(value: Any, candidates: Any) -> bool:
    if not is_range(candidates):
        return value in candidates
    low, high, step = candidates["low"], candidates["high"], candidates.get("step")
    steps = (value - low) / step if step else 0.0
    return bool(low <= value <= high) and math.isclose(steps, round(steps), abs_tol=1e-9)


def require_in(space: Sequence[Branch], proposal: Proposal | None) -> None:
    assert proposal is not None
    branch, values = proposal
    assert list(values) == list(space[branch])
    for key, candidates in space[branch].items():
        assert within(values[key], candidates), (key, values[key])
        assert not is_range(candidates) or type(values[key]) is type(candidates["low"])


@st.composite
def whole_ranges(draw: st.DrawFn) -> dict[str, Any]:
    low, step, log = draw(st.integers(1, 50)), draw(st.integers(1, 9)), draw(st.booleans())
    bounds = {"low": low, "high": low + step + draw(st.integers(0, 99))}
    return bounds | ({"log": True} if log else {"step": step})


@st.composite
def real_ranges(draw: st.DrawFn) -> dict[str, Any]:
    low, width = draw(st.floats(1e-6, 1.0)), draw(st.floats(1e-9, 10.0))
    kind = draw(st.sampled_from(["even", "log", "step"]))
    if kind == "step":
        step = draw(st.sampled_from([0.1, 0.25, 0.3]))
        low, high = draw(st.floats(0, 0.5)), draw(st.floats(1, 9))
        return {"low": round(low, 2), "high": round(high, 3), "step": step}
    return {"low": low, "high": low + width} | ({"log": True} if kind == "log" else {})


@st.composite
def spaces(draw: st.DrawFn) -> list[Branch]:
    branch = st.fixed_dictionaries(
        {},
        optional={
            "schedule.kind": st.lists(st.sampled_from(["linear", "cosine"]), min_size=1),
            "model.channel_mults": st.just([[1], [1, 2], [1, 2, 2]]),
            "schedule.num_steps": whole_ranges(),
            "training.learning_rate": real_ranges(),
        },
    ).filter(bool)
    return list(draw(st.lists(branch, min_size=1, max_size=3)))


def test_a_grid_is_every_combination_once_the_last_key_fastest() -> None:
    kinds = ["linear", "cosine"]
    wanted = [
        (0, {"schedule.kind": kind, "schedule.num_steps": steps})
        for kind in kinds
        for steps in (100, 200, 300)
    ]
    assert all_of(GRID, SearchConfig())[:6] == wanted
    assert all_of(GRID, SearchConfig())[6:] == [
        (1, {"schedule.kind": "sigmoid", "model.channel_mults": [1, 2]}),
        (1, {"schedule.kind": "sigmoid", "model.channel_mults": [1, 2, 2]}),
    ]


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=3))
def test_a_grid_is_complete_without_duplicates(lengths: list[list[int]]) -> None:
    """Branches whose keys are their own, so that equal values are no duplicates by design."""
    space = [
        {f"{number}.{k}": list(range(length)) for k, length in enumerate(branch)}
        for number, branch in enumerate(lengths)
    ]
    found = all_of(space, SearchConfig())
    assert len(found) == total_trials(space, SearchConfig()) == sum(map(math.prod, lengths))
    assert all(a != b for a, b in itertools.combinations(found, 2))


@pytest.mark.parametrize(
    "kind, trials, total",
    [("grid", 0, 8), ("grid", 5, 5), ("grid", 99, 8), ("random", 99, 99), ("tpe", 12, 12)],
)
def test_a_sweep_has_as_many_trials_as_it_says(
    kind: Literal["grid", "random", "tpe"], trials: int, total: int
) -> None:
    search = SearchConfig(kind=kind, trials=trials)
    assert total_trials(GRID, search) == total == len(all_of(GRID, search))


@given(space=spaces(), seed=st.integers(0, 2**32), number=st.integers(0, 30))
def test_random_values_lie_in_the_space(space: list[Branch], seed: int, number: int) -> None:
    trials = [Trial(i, {}) for i in range(number)]
    search = SearchConfig(kind="random", trials=99, seed=seed)
    require_in(space, propose(space, search, trials, FID))


@given(st.integers(0, 2**32), st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_a_random_trial_is_the_same_whatever_the_others_are(seed: int, seeds: list[int]) -> None:
    """Its number and the seed are all that counts; another number or seed is another trial."""
    search = SearchConfig(kind="random", trials=99, seed=seed)
    others = [Trial(i, {"seed": s}, i % 2, status="failed") for i, s in enumerate(seeds)]
    blank = [Trial(i, {}) for i in range(4)]
    space: list[Branch] = [{"model.dropout": {"low": 0.0, "high": 1.0}}]
    reported = propose(space, search, others, FID)
    assert reported == propose(space, search, blank, FID)
    assert reported != propose(space, search, blank[:3], FID)
    assert reported != propose(
        space, SearchConfig(kind="random", trials=99, seed=seed + 1), blank, FID
    )


@pytest.mark.parametrize(
    "key, bounds, middle",
    [
        ("model.dropout", {"low": 0.0, "high": 0.5}, 0.25),
        ("training.learning_rate", {"low": 1e-6, "high": 1e-2, "log": True}, 1e-4),
        ("schedule.num_steps", {"low": 10, "high": 4000, "log": True}, 200),
        ("seed", {"low": 1, "high": 1000}, 500),
        ("model.dropout", {"low": 0, "high": 0.9, "step": 0.1}, 0.45),
    ],
)
def test_half_of_random_values_lie_below_the_middle_of_their_scale(
    key: str, bounds: dict[str, Any], middle: float
) -> None:
    """Which on a logarithmic scale is the geometric mean; a tail of four standard errors."""
    search = SearchConfig(kind="random", trials=10_000, seed=1)
    trials: list[Trial] = []
    below = 0
    for number in range(1000):
        found = propose([{key: bounds}], search, trials, FID)
        assert found is not None
        below += found[1][key] <= middle
        trials.append(Trial(number, {}))
    assert abs(below - 500) < 4 * math.sqrt(1000 / 4)


@pytest.mark.parametrize("kind", LEARNING)
def test_all_branches_and_choices_are_drawn(kind: Literal["random", "tpe"]) -> None:
    found = all_of(MIXED, SearchConfig(kind=kind, trials=30))
    assert {branch for branch, _ in found} == {0, 1}
    choices: dict[str, list[Any]] = {"seed": [3, 7, 11], "model.channel_mults": [[1], [1, 2]]}
    for key, among in choices.items():
        drawn = [values[key] for _, values in found if key in values]
        assert all(one in drawn for one in among)


@given(
    spaces(),
    st.integers(0, 2**32),
    st.lists(st.sampled_from(["running", "finished", "stopped", "pruned", "failed"]), max_size=14),
)
@settings(max_examples=15)
def test_what_tpe_proposes_lies_in_the_space_whatever_became_of_the_trials(
    space: list[Branch], seed: int, statuses: list[Any]
) -> None:
    search, trials = SearchConfig(kind="tpe", trials=99, seed=seed), list[Trial]()
    for number, status in enumerate([*statuses, "running"]):
        proposal = propose(space, search, trials, FID)
        require_in(space, proposal)
        assert proposal is not None
        validation_losses = [{"order": number, "step": 10, "loss": 1 / (1 + number)}] * (number % 2)
        outcome = {"metrics": {FID: float(number)}}
        trials.append(
            Trial(
                number,
                proposal[1],
                proposal[0],
                status,
                validation_losses=validation_losses,
                outcome=outcome,
            )
        )


def test_tpe_goes_on_after_a_crash_as_if_there_had_been_none(tmp_path: Path) -> None:
    """It depends on the stored trials alone and does not change them."""
    search, store = SearchConfig(kind="tpe", trials=16, seed=4), TrialStore(str(tmp_path))
    while proposal := propose(MIXED, search, store.trials, FID):
        before = copy.deepcopy(store.trials)
        assert propose(MIXED, search, TrialStore(str(tmp_path)).trials, FID) == proposal
        assert store.trials == before
        number = len(store.trials)
        trial = store.add(proposal[1], proposal[0])
        store.add_validation_loss(trial, {"step": 10, "loss": 0.1 * (number % 7)})
        if number % 3:
            store.record_end(trial, "finished", metrics={FID: float(number % 5)})
        elif number % 2:
            store.record_end(trial, "stopped", "asha")
    assert len(store.trials) == 16


def test_tpe_finds_the_better_half_more_often_than_random() -> None:
    """A parabola's minimum at 0.2 of 0..0.8: random lands within 0.2 of it half of the time."""
    space: list[Branch] = [{"model.dropout": {"low": 0.0, "high": 0.8}}]
    near = dict.fromkeys(LEARNING, 0)
    for kind, seed in itertools.product(LEARNING, range(3)):
        trials: list[Trial] = []
        for number in range(30):
            proposal = propose(space, SearchConfig(kind=kind, trials=30, seed=seed), trials, FID)
            assert proposal is not None
            outcome = {"metrics": {FID: quadratic(proposal[1])}}
            trials.append(Trial(number, proposal[1], status="finished", outcome=outcome))
        near[kind] += sum(quadratic(trial.values) < 0.2**2 for trial in trials[15:])
    assert near["random"] < 0.75 * 45 < near["tpe"]


def test_tpe_seeks_a_high_psnr_as_it_seeks_a_low_distance() -> None:
    search, space = SearchConfig(kind="tpe", trials=14, seed=3), [MIXED[0]]
    proposals = []
    for score, sign in ((FID, 1.0), ("eval/psnr", -1.0)):
        trials: list[Trial] = []
        while (proposal := propose(space, search, trials, score)) is not None:
            branch, values = proposal
            outcome = {"metrics": {score: sign * quadratic(values)}}
            trials.append(Trial(len(trials), values, branch, status="finished", outcome=outcome))
        proposals.append([trial.values for trial in trials])
    assert proposals[0] == proposals[1]
