"""Who is the champion of a name: only who beats the present one beyond doubt, by its protocol."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput

from ddpm_ray.tracking import model_registry, run_lookup
from ddpm_ray.tracking.mlflow_runs import TrackingError

METRIC = "eval/fid"
PROVENANCE: dict[str, Any] = {
    "samples": {"count": 2000, "seed": 7, "steps": 50, "num_steps": 1000},
    "reference": {"sha256": "ab" * 32},
    "model": {"run_id": "0" * 32},
    "versions": {"torch": "2.13.0"},
}
Promote = Callable[..., dict[str, Any]]


def scores(low: float, high: float) -> dict[str, float]:
    return {METRIC: (low + high) / 2, f"{METRIC}_low": low, f"{METRIC}_high": high}


@pytest.fixture(scope="module")
def client(mlflow_database: str) -> MlflowClient:
    return MlflowClient(tracking_uri=mlflow_database)


@pytest.fixture(scope="module")
def new_run(mlflow_database: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], str]:
    """A run that has a model of its own; its id."""
    folder = tmp_path_factory.mktemp("registry")
    made = 0

    def make() -> str:
        nonlocal made
        made += 1
        run = run_lookup.find_or_create_run(
            mlflow_database, "registry", "run", f"{folder.name}-{made}", str(folder)
        )
        client = MlflowClient(tracking_uri=mlflow_database)
        model = client.create_logged_model(run.experiment_id, "model", run.run_id)
        client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, 0)])
        return run.run_id

    return make


@pytest.fixture
def promote(
    mlflow_database: str, new_run: Callable[[], str], request: pytest.FixtureRequest
) -> Promote:
    """Promote a run, a new one by default, under this test's own name."""

    def make(
        metrics: dict[str, float],
        provenance: dict[str, Any] = PROVENANCE,
        metric: str = METRIC,
        run_id: str = "",
        name: str = request.node.name.partition("[")[0],
    ) -> dict[str, Any]:
        run_id = run_id or new_run()
        return model_registry.promote(mlflow_database, name, run_id, metric, metrics, provenance)

    return make


def champion(client: MlflowClient, name: str) -> tuple[str, str]:
    """The version that carries the alias, and whose run's model it is."""
    found = client.get_model_version_by_alias(name, model_registry.CHAMPION)
    return str(found.version), str(found.run_id)


def test_the_first_is_champion_of_a_new_name(
    promote: Promote, client: MlflowClient, new_run: Callable[[], str]
) -> None:
    run_id = new_run()
    result = promote(scores(3, 4), run_id=run_id)
    assert result["promoted"]
    assert result["reason"] == "there was none"
    assert champion(client, result["name"]) == (result["version"], run_id)
    source = client.get_model_version(result["name"], result["version"])
    (logged,) = client.get_run(run_id).outputs.model_outputs
    assert logged.model_id in source.source
    assert float(source.tags["score"]) == 3.5


@given(st.lists(st.floats(0, 100), min_size=4, max_size=4))
@settings(max_examples=12, deadline=None)
def test_it_is_beaten_by_a_wholly_lower_interval_alone(
    client: MlflowClient, mlflow_database: str, new_run: Callable[[], str], ends: list[float]
) -> None:
    (low, high), (own_low, own_high) = sorted(ends[:2]), sorted(ends[2:])
    name = f"duel {new_run()}"
    first, second = (
        model_registry.promote(mlflow_database, name, new_run(), METRIC, metrics, PROVENANCE)
        for metrics in (scores(low, high), scores(own_low, own_high))
    )
    assert first["promoted"]
    assert second["promoted"] == (own_high < low)
    assert champion(client, name)[0] == ("2" if own_high < low else "1")


def test_an_overlap_is_reported_with_both_ends(promote: Promote, client: MlflowClient) -> None:
    first = promote(scores(3, 4))
    result = promote(scores(2, 3.25))
    assert not result["promoted"]
    assert result["version"] == first["version"]
    assert result["reason"] == "its interval reaches 3.25, and the champion's begins at 3"
    assert len(client.search_model_versions(f"name='{result['name']}'")) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"reference": {"sha256": "cd" * 32}},
        {"samples": PROVENANCE["samples"] | {"count": 5000}},
        {"samples": PROVENANCE["samples"] | {"seed": 8}},
    ],
    ids=["reference", "count", "noise"],
)
def test_scores_of_two_protocols_are_not_compared(promote: Promote, change: dict[str, Any]) -> None:
    promote(scores(30, 40))
    result = promote(scores(1, 2), PROVENANCE | change)
    assert not result["promoted"]
    assert "under another protocol" in result["reason"]
    assert "`ddpm-ray evaluate`" in result["reason"]


def test_scores_by_two_metrics_are_not_compared(promote: Promote) -> None:
    promote(scores(30, 40))
    other = {"eval/kid": 1.0, "eval/kid_low": 0.5, "eval/kid_high": 1.5}
    result = promote(other, metric="eval/kid")
    assert not result["promoted"]
    assert "under another protocol" in result["reason"]


def test_the_model_its_t_and_the_software_are_no_part_of_the_protocol(promote: Promote) -> None:
    """They are what is compared, or what changes while a project lives."""
    promote(scores(30, 40))
    other = {
        "samples": PROVENANCE["samples"] | {"num_steps": 250},
        "model": {"run_id": "1" * 32},
        "versions": {"torch": "3.0.0"},
    }
    assert promote(scores(1, 2), PROVENANCE | other)["promoted"]


@pytest.mark.parametrize("first", [True, False])
def test_without_an_interval_nobody_is_beaten(promote: Promote, first: bool) -> None:
    bare, whole = {METRIC: 1.0 + 30 * first}, scores(1 + 30 * (not first), 2 + 30 * (not first))
    name = f"bare {first}"
    promote(bare if first else whole, name=name)
    result = promote(whole if first else bare, name=name)
    assert not result["promoted"]
    assert result["reason"] == "a score has no interval; draw at least 20 images"


def test_a_run_that_is_champion_stays_so(
    promote: Promote, client: MlflowClient, new_run: Callable[[], str]
) -> None:
    """As where a sweep that is over is run again."""
    run_id = new_run()
    first = promote(scores(3, 4), run_id=run_id)
    again = promote(scores(3, 4), run_id=run_id)
    assert again == first | {"promoted": False, "reason": "it is the champion already"}
    assert len(client.search_model_versions(f"name='{first['name']}'")) == 1


def test_a_name_without_a_champion_gets_one(promote: Promote, client: MlflowClient) -> None:
    """Somebody made the name by hand, or took the alias away."""
    client.create_registered_model("by hand")
    first = promote(scores(3, 4), name="by hand")
    assert first["promoted"]
    client.delete_registered_model_alias("by hand", model_registry.CHAMPION)
    assert promote(scores(5, 6), name="by hand")["reason"] == "there was none"


def test_no_answer_is_reported_in_a_line() -> None:
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9") as result:
        model_registry.promote(
            "http://127.0.0.1:9", "x", "0" * 32, METRIC, scores(1, 2), PROVENANCE
        )
    assert len(str(result.value).splitlines()) == 1
