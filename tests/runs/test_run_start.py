"""What a driver finds of its run: changed options that are named, and initial weights."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpm_ray.assembly import checkpoint_loading, scoring, training_run
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset, open_dataset
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.runs import run_identity
from ddpm_ray.runs.evaluation import scored_samples
from ddpm_ray.runs.run_start import RunStart, begin_run
from ddpm_ray.runs.run_tags import history_tags
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore
from tests.noise import pack_noise

RATE = "training.learning_rate"
TINY = (
    "model.base_channels=4",
    "model.groups=2",
    "model.channel_mults=[1,2]",
    "model.blocks_per_level=1",
    "model.attention_factors=[2]",
    "training.steps=100",
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = str(tmp_path_factory.mktemp("data"))
    pack_noise(folder, images=9, side=4)
    return open_dataset(folder)


def configured(dataset: Dataset, *overrides: str) -> RunConfig:
    return load_config(RunConfig, None, ["name=a", f"data.url={dataset.url}", *TINY, *overrides])


def commit(config: RunConfig, folder: Path, step: int, start: RunStart, seed: int = 0) -> None:
    """A checkpoint as a worker saves it that was started by `start`."""
    facts: dict[str, Any] = {
        "config": to_dict(config),
        "image_shape": [4, 4, 1],
        "data_fingerprint": open_dataset(config.data.url).fingerprint,
        "identity": start.identity,
    }
    shape = ImageShape(4, 4, 1)
    state = training_run.training_state(config, shape, torch.device("cpu"), facts | start.history)
    generator = torch.Generator().manual_seed(seed)
    for value in state.ema.model.parameters():
        value.copy_(torch.randn(value.shape, generator=generator))
    state.step = step
    CheckpointStore(str(folder / CHECKPOINTS)).save(state.snapshot([]))


def test_a_value_changes_if_it_is_named_and_stays_changed(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first, lower = configured(dataset), configured(dataset, f"{RATE}=1e-5")
    named = configured(dataset, f"{RATE}=1e-5", f"change=[{RATE}]")
    start = begin_run(first, dataset, str(tmp_path))
    commit(first, tmp_path, 40, start)
    with pytest.raises(
        ConfigError, match=r"rate is 1e-05, but the run began with 0\.0002"
    ) as error:
        begin_run(lower, dataset, str(tmp_path))
    assert f"change=[{RATE}] continues under new values from step 40" in str(error.value)
    again = begin_run(named, dataset, str(tmp_path))
    assert again.identity == start.identity
    change = {"step": 40, "key": RATE, "from": 2e-4, "to": 1e-5}
    assert again.history == {"changes": [change]}
    assert history_tags(again.history) == {"changes": f"{RATE} 0.0002 -> 1e-05 at step 40"}
    assert f"change: {RATE} 0.0002 -> 1e-05 at step 40" in caplog.text
    begin_run(first, dataset, str(tmp_path))  # no step was taken under the new value
    commit(named, tmp_path, 60, again)
    for same in (named, lower):  # the same command, and one that names nothing
        assert begin_run(same, dataset, str(tmp_path)).history == again.history
    with pytest.raises(ConfigError, match=r"is 0\.0002, but the run has 1e-05 since step 40"):
        begin_run(first, dataset, str(tmp_path))
    back = begin_run(configured(dataset, f"change=[{RATE}]"), dataset, str(tmp_path))
    later = {"step": 60, "key": RATE, "from": 1e-5, "to": 2e-4}
    assert back.history == {"changes": [change, later]}


def test_a_run_without_a_checkpoint_changes_nothing(dataset: Dataset, tmp_path: Path) -> None:
    begin_run(configured(dataset), dataset, str(tmp_path))
    with pytest.raises(ConfigError, match=r"began with 0\.0002") as error:
        begin_run(configured(dataset, f"{RATE}=1e-5", f"change=[{RATE}]"), dataset, str(tmp_path))
    assert "choose another name=" in str(error.value)


def test_values_that_are_not_named_stay(dataset: Dataset, tmp_path: Path) -> None:
    start = begin_run(configured(dataset), dataset, str(tmp_path))
    commit(configured(dataset), tmp_path, 40, start)
    other = configured(dataset, f"{RATE}=1e-5", "seed=7", f"change=[{RATE}]")
    with pytest.raises(ConfigError, match="seed is 7, but the run began with 0") as error:
        begin_run(other, dataset, str(tmp_path))
    assert RATE not in str(error.value)
    assert "change=" not in str(error.value)  # a seed cannot change


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_length_of_a_run_whose_rate_falls_to_zero_defines_it(
    kind: str, dataset: Dataset, tmp_path: Path
) -> None:
    decay, longer = f"training.learning_rate_decay={kind}", "training.steps=200"
    start = begin_run(configured(dataset, decay), dataset, str(tmp_path))
    commit(configured(dataset, decay), tmp_path, 100, start)
    with pytest.raises(ConfigError, match=r"steps is 200, but the run began with 100") as error:
        begin_run(configured(dataset, decay, longer), dataset, str(tmp_path))
    assert "change=[training.steps] continues under new values from step 100" in str(error.value)
    named = configured(dataset, decay, longer, "change=[training.steps]")
    changes = begin_run(named, dataset, str(tmp_path)).history["changes"]
    assert changes == [{"step": 100, "key": "training.steps", "from": 100, "to": 200}]


def test_a_constant_rate_goes_on_for_as_long_as_one_likes(dataset: Dataset, tmp_path: Path) -> None:
    start = begin_run(configured(dataset), dataset, str(tmp_path))
    commit(configured(dataset), tmp_path, 100, start)
    assert not begin_run(configured(dataset, "training.steps=200"), dataset, str(tmp_path)).history


@pytest.mark.parametrize(
    "key, says",
    [
        ("model.base_channels", "the tensors of the checkpoints have the shapes"),
        ("task", "the tensors of the checkpoints have the shapes"),
        ("seed", "all random numbers of the run are drawn from it"),
        ("data.lanes", "the images of each step depend on it"),
        ("schedule.kind", "the noise levels of this schedule"),
        ("objective.prediction", "the network has learned this objective"),
        ("autoencoder.kl_weight", "an autoencoder is one network, trained on one loss"),
        ("training.global_batch_size", "in batches of this size"),
        ("training.reduction_slots", "are summed in one way"),
        ("training.ema_more_decays", "the checkpoints hold these EMAs"),
        ("training.init_from", "the run began from these weights"),
    ],
)
def test_what_cannot_change_says_why(key: str, says: str, dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match=f"change names {key}, which cannot .*: .*{says}"):
        configured(dataset, f"change=[{key}]")


def test_a_change_of_no_key_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match=r"change names 'learning_rat': no such key; did you"):
        configured(dataset, "change=[learning_rat]")


def test_a_run_begins_from_the_weights_that_its_first_driver_found(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    base, fine = tmp_path / "base", tmp_path / "fine"
    commit(configured(dataset), base, 40, RunStart("base"), seed=1)
    config = configured(dataset, f"training.init_from={base}")
    first = begin_run(config, dataset, str(fine))
    commit(configured(dataset), base, 60, RunStart("base"), seed=2)  # the other run goes on
    assert begin_run(config, dataset, str(fine)) == first
    assert caplog.text.count("(ema of step 40, sha256") == 2  # these were checked, not the newest
    assert first.initial_weights is not None
    assert first.initial_weights.step == 40
    assert run_identity.stored_identity(str(fine))["init_from"] == vars(first.initial_weights)
    tags = history_tags(first.history)
    assert tags["init_from"] == f"{first.initial_weights.checkpoint} ema"
    assert tags["init_from_sha256"] == first.initial_weights.sha256
    commit(config, fine, 5, first)
    (base / CHECKPOINTS).rename(base / "gone")  # from here on it needs its own checkpoints alone
    later = begin_run(config, dataset, str(fine))
    assert later.initial_weights is None
    assert later.history == first.history
    with pytest.raises(ConfigError, match=r"init_from is , but the run began with .*base"):
        begin_run(configured(dataset), dataset, str(fine))


def test_drivers_that_start_at_once_begin_from_the_same_weights(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, fine = tmp_path / "base", tmp_path / "fine"
    commit(configured(dataset), base, 40, RunStart("base"), seed=1)
    config = configured(dataset, f"training.init_from={base}")
    first = begin_run(config, dataset, str(fine))
    commit(configured(dataset), base, 60, RunStart("base"), seed=2)
    read, seen = run_identity.stored_identity, list[str]()

    def not_there_at_first(folder: str) -> dict[str, Any]:
        seen.append(folder)
        return read(folder) if len(seen) > 1 else {}

    monkeypatch.setattr(run_identity, "stored_identity", not_there_at_first)
    assert begin_run(config, dataset, str(fine)) == first


def test_scores_name_initial_weights_and_changes(dataset: Dataset, tmp_path: Path) -> None:
    """The provenance of a model on its way to `jobs/evaluate.py`, and of a run's own scores."""
    history = {
        "init_from": {"url": "base", "sha256": "0" * 64},
        "changes": [{"step": 40, "key": RATE, "from": 2e-4, "to": 1e-5}],
    }
    config = configured(dataset)
    commit(config, tmp_path, 60, RunStart("id", history=history))
    model = checkpoint_loading.trained_model(str(tmp_path))
    assert scored_samples.weights_of(model.provenance).items() >= history.items()
    assert scoring.ema_provenance(config, 60).keys().isdisjoint(history)


def test_weights_that_do_not_fit_are_reported_before_the_run_is_there(
    dataset: Dataset, tmp_path: Path
) -> None:
    base, fine = tmp_path / "base", tmp_path / "fine"
    commit(configured(dataset), base, 40, RunStart("base"))
    wider = configured(dataset, f"training.init_from={base}", "model.base_channels=8")
    with pytest.raises(ConfigError, match="in this network; to leave it as it is"):
        begin_run(wider, dataset, str(fine))
    assert not fine.exists()
