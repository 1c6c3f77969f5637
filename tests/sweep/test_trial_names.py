"""A trial's name is short and tells it from every other trial."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.sweep.trial_names import short_name
from ddpm_ray.sweep.trial_store import Trial

KINDS = ["linear", "scaled_linear", "cosine", "sigmoid"]


@pytest.mark.parametrize(
    "values, name",
    [
        (
            {"schedule.kind": "linear", "schedule.rescale": True, "schedule.num_steps": 1000},
            "T=1000 linear rescaled",
        ),
        ({"training.learning_rate": 2e-4, "schedule.num_steps": 50}, "T=50 learning_rate=0.0002"),
        ({"schedule.rescale": False}, "not rescaled"),
        ({"sampling.kind": "a", "schedule.kind": "cosine"}, "cosine sampling.kind=a"),
        ({"data.flip": True, "model.channel_mults": [1, 2]}, "flip=True channel_mults=[1, 2]"),
        ({}, ""),
    ],
)
def test_a_name_has_the_words_of_the_field(values: dict[str, Any], name: str) -> None:
    assert short_name(values) == name


@st.composite
def grid_points(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "schedule.kind": draw(st.sampled_from(KINDS)),
        "schedule.rescale": draw(st.booleans()),
        "schedule.num_steps": draw(st.integers(1, 4000)),
        "schedule.beta_end": draw(st.sampled_from([0.01, 0.02, 0.05])),
        "objective.kind": draw(st.sampled_from(KINDS)),
    }


@given(grid_points(), grid_points())
def test_trials_with_different_values_have_different_names(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert (short_name(one) == short_name(other)) == (one == other)


def test_an_option_can_be_left_out() -> None:
    values = {"schedule.num_steps": 100, "schedule.kind": "cosine"}
    assert short_name(values, without="schedule.num_steps") == "cosine"


def test_a_trials_run_is_named_by_number_and_values() -> None:
    """MLflow's table of runs shows the first 20 letters or so."""
    assert Trial(7, {"schedule.num_steps": 250}).title == "7: T=250"
