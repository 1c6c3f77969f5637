"""Trials are stopped by what they reported, in order, and by the optimiser step it was at."""

import math
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.config.jobs.sweep import StoppingConfig
from ddpm_ray.sweep.early_stopping import EarlyStopping

Kind = Literal["asha", "median", "none", "pbt"]
Report = tuple[int, int, float]  # trial, step, common loss
TOTAL = 40
COMPARING: tuple[Kind, ...] = "asha", "median"


def rule(kind: Kind = "asha", first_step: int = 0) -> EarlyStopping:
    """ASHA's rungs are at 10, 20 and 40; the median rule wants two other trials."""
    config = StoppingConfig(
        kind=kind, every_steps=10, first_step=first_step, reduction_factor=2, min_trials=2
    )
    return EarlyStopping(config, TOTAL)


def decisions(stopping: EarlyStopping, reports: list[Report]) -> list[str]:
    return [stopping.decide(*report) for report in reports]


def stops(stopping: EarlyStopping, reports: list[Report]) -> list[bool]:
    return [bool(reason) for reason in decisions(stopping, reports)]


@st.composite
def report_lists(draw: st.DrawFn, losses: st.SearchStrategy[float]) -> list[Report]:
    """Up to six trials, each at steps of its own that only rise, in any order between trials."""
    reports, at = [], [0] * 6
    for number in draw(st.lists(st.integers(0, 5), max_size=40)):
        at[number] += draw(st.sampled_from([1, 5, 10]))
        if at[number] <= TOTAL:
            reports.append((number, at[number], draw(losses)))
    return reports


FINITE = st.integers(0, 5).map(float) | st.floats(-10, 10)
ANY = FINITE | st.sampled_from([math.nan, math.inf, -math.inf])


def test_asha_stops_what_is_worse_than_the_median_of_its_rung_so_far() -> None:
    """By hand: factor 2 means a cutoff at the median of those that were at the rung before."""
    reports = [
        (0, 10, 4.0),  # the first of the rung
        (1, 10, 2.0),  # the cutoff is 4
        (2, 10, 3.5),  # median of 4, 2: 3, so it stops
        (3, 10, 3.5),  # median of 4, 2, 3.5: 3.5, and equal is no worse
        (4, 10, 3.6),  # still 3.5, so it stops
        (1, 20, 1.0),  # the first of the next rung
        (0, 20, 0.5),
        (3, 20, 0.8),  # median of 1, 0.5: 0.75, so it stops
        (1, 30, 9.0),  # between rungs nobody is compared
    ]
    assert decisions(rule(), reports) == [
        "",
        "",
        "asha: common loss 3.5 at step 10, 2 of 3",
        "",
        "asha: common loss 3.6 at step 10, 4 of 5",
        "",
        "",
        "asha: common loss 0.8 at step 20, 2 of 3",
        "",
    ]


def test_median_stops_what_was_never_as_good_as_the_others_are_on_average() -> None:
    """By hand: a trial's best loss against the median of the others' means up to that step."""
    reports = [
        (0, 10, 1.0),
        (1, 10, 3.0),  # one other, and two are wanted
        (2, 10, 2.0),  # median of 1, 3: 2, and equal is no worse
        (3, 10, 2.5),  # median of 1, 3, 2: 2, so it stops
        (0, 20, 5.0),  # nobody else is as far
        (1, 20, 2.8),
        (2, 20, 4.0),  # means 3 and 2.9, and its best is 2
        (4, 10, 3.5),  # means up to 10 are 1, 3, 2, 2.5: 2.25, so it stops
    ]
    assert decisions(rule("median"), reports) == [
        "",
        "",
        "",
        "median: common loss 2.5 at step 10, 3 of 4",
        "",
        "",
        "",
        "median: common loss 3.5 at step 10, 5 of 5",
    ]


@pytest.mark.parametrize("kind", COMPARING)
def test_steps_decide_and_not_how_often_a_trial_reported(kind: Kind) -> None:
    """Trial 3 reports nine times before the step at which the others reported once."""
    good = [(number, 10, 1.0) for number in range(3)]
    often = [(3, step, 9.0) for step in range(1, 11)]
    assert stops(rule(kind), good + often) == [False] * 12 + [True]
    assert stops(rule(kind), [*good, (3, 10, 9.0)]) == [False] * 3 + [True]


@pytest.mark.parametrize("kind", COMPARING)
def test_no_trial_is_compared_before_the_first_step(kind: Kind) -> None:
    good = [(number, step, 1.0) for step in (10, 20, 30) for number in range(3)]
    late = [(3, 10, 9.0), (3, 20, 9.0), (3, 29, 9.0), (3, 30, 9.0)]
    assert stops(rule(kind, first_step=30), good + late)[-4:] == [False, False, False, True]


@pytest.mark.parametrize("kind", COMPARING)
@given(reports=report_lists(ANY))
def test_the_same_reports_in_order_give_the_same_decisions(
    kind: Kind, reports: list[Report]
) -> None:
    """As after a crash, at whatever report it came."""
    whole = decisions(rule(kind), reports)
    for crash in range(len(reports) + 1):
        again = rule(kind)
        assert decisions(again, reports[:crash]) == whole[:crash]
        assert decisions(again, reports[crash:]) == whole[crash:]


@pytest.mark.parametrize("kind", COMPARING)
@given(reports=report_lists(ANY))
def test_a_trial_is_stopped_once(kind: Kind, reports: list[Report]) -> None:
    """And what it reports later counts for nobody: the others fare as if it had been silent."""
    stopping, stopped, reported, expected = rule(kind), set[int](), list[Report](), list[str]()
    for report in reports:
        reason = stopping.decide(*report)
        if report[0] in stopped:
            assert reason == ""
            continue
        reported.append(report)
        expected.append(reason)
        if reason:
            stopped.add(report[0])
    assert decisions(rule(kind), reported) == expected


@pytest.mark.parametrize("kind", COMPARING)
@given(losses=st.lists(ANY, min_size=1, max_size=8))
def test_nothing_stops_at_the_last_step(kind: Kind, losses: list[float]) -> None:
    reports = [(number, TOTAL, loss) for number, loss in enumerate(losses)]
    assert not any(stops(rule(kind), reports))


@given(report_lists(ANY))
def test_kind_none_never_stops(reports: list[Report]) -> None:
    assert not any(stops(rule("none"), reports))


@pytest.mark.parametrize("kind", COMPARING)
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_stops_its_trial_at_once_and_spoils_no_other(
    kind: Kind, loss: float
) -> None:
    stopping = rule(kind, first_step=30)
    assert stopping.decide(0, 1, loss) == f"its common loss is {loss} at step 1"
    reports = [(number, 30, 1.0) for number in (1, 2, 3)]
    assert stops(stopping, [*reports, (0, 30, 1.0), (4, 30, 9.0)]) == [False] * 4 + [True]
