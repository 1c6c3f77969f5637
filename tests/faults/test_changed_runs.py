"""Runs that begin from other weights, or change options on the way, are killed as others are."""

from dataclasses import replace
from pathlib import Path

import pytest

from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.runs import run_start
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore
from ddpm_ray.training.state import Snapshot
from tests.faults.lives import EVERY, TINY, Life

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's, as it imports
]
SHORT = (*TINY, "training.steps=8")


def begin(life: Life) -> None:
    """Drive as the driver does, with the initial weights that it finds."""
    life.drive()
    dataset = open_dataset(life.data)
    start = run_start.begin_run(life.config, dataset, str(life.folder / "tiny"))
    life.init_from = vars(start.initial_weights) if start.initial_weights else None


def train_on(base: Path) -> None:
    """Commit a later checkpoint of the run in `base`, with other weights."""
    store = CheckpointStore(str(base / "tiny" / CHECKPOINTS))
    found = store.load()
    assert found is not None
    tensors = {
        group: {k: v + 1 for k, v in all_.items()} for group, all_ in found[1].tensors.items()
    }
    store.save(Snapshot(tensors, found[1].facts | {"step": found[1].step + 1}))


def test_a_run_killed_before_its_first_checkpoint_begins_from_the_same_weights(
    noise_shards: str, tmp_path: Path
) -> None:
    base = Life(tmp_path / "base", noise_shards, SHORT)
    base.drive()
    assert base.live(1)
    fine = (*SHORT, "seed=7", f"training.init_from={base.folder / 'tiny'}")
    unbroken = Life(tmp_path / "unbroken", noise_shards, fine)
    killed = Life(tmp_path / "killed", noise_shards, fine)
    plain = Life(tmp_path / "plain", noise_shards, (*SHORT, "seed=7"))
    begin(unbroken)
    begin(killed)
    assert not killed.live(2, f"{tmp_path / 'fired'} kill@batch:{EVERY - 2}")
    train_on(base.folder)
    begin(killed)  # the same command
    for life in (unbroken, killed):
        assert life.live(2)
    begin(plain)
    assert plain.live(2)
    assert killed.facts()["init_from"] == unbroken.facts()["init_from"]
    ended = unbroken.end()
    assert killed.end().hashes == ended.hashes != plain.end().hashes
    assert killed.end().same_rows() == ended.same_rows()


def test_a_changed_run_is_killed_and_ends_equal(noise_shards: str, tmp_path: Path) -> None:
    """The change is committed before a step is taken under it."""
    ends = []
    for name, fault in (("unbroken", ""), ("killed", f"kill@update:{EVERY + 1}")):
        constant = (*SHORT, "training.learning_rate_decay=none")
        life = Life(tmp_path / name, noise_shards, (*constant, f"training.steps={EVERY}"))
        life.drive()
        assert life.live(1)
        before = life.facts()
        new = "training.learning_rate=1e-5", "training.precision=bf16"
        change = "change=[training.learning_rate,training.precision]"
        changed = load_config(RunConfig, None, ["data.url=x", *constant, *new, change])
        life.config = replace(life.config, training=changed.training, change=changed.change)
        life.drive()
        if fault:
            assert not life.live(1, f"{life.folder / 'second'} {fault}")
            assert life.facts()["changes"]
        assert life.live(1)
        assert "changes" not in before
        facts = life.facts()
        assert [(one["step"], one["key"], one["to"]) for one in facts["changes"]] == [
            (EVERY, "training.learning_rate", 1e-5),
            (EVERY, "training.precision", "bf16"),
        ]
        ends.append(life.end())
        rates = dict(ends[-1].rows["train/lr"])
        assert min(rates[step] for step in range(1, EVERY + 1)) > 1e-4
        assert max(rates[step] for step in range(EVERY + 1, 9)) <= 1e-5
    assert ends[0].hashes == ends[1].hashes
    assert ends[0].same_rows() == ends[1].same_rows()
