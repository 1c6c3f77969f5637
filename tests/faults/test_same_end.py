"""Killed any number of times, at any marked point, a run ends with the bits of an unbroken one."""

import hashlib
import random
from pathlib import Path

import pytest

from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore
from ddpm_ray.training.tensor_file import file_bytes
from tests.faults.lives import AUTOENCODER, EVERY, STEPS, TINY, Ended, Life
from tests.faults.schedules import OF_DENOISERS, kills

WORKERS = 2
pytestmark = [
    pytest.mark.timeout(600),  # several lives of up to LIFE_S; 30 s on a quiet machine
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's, as it imports
]


@pytest.fixture(scope="module")
def unbroken(noise_shards: str, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    life = Life(tmp_path_factory.mktemp("unbroken"), noise_shards)
    life.drive()
    assert life.live(WORKERS)
    return life.end()


def test_a_kill_at_each_point_is_survived(
    unbroken: Ended, noise_shards: str, tmp_path: Path
) -> None:
    each = [f"kill@{point}:{step}/0" for step, point in enumerate(OF_DENOISERS, 4)]
    planned, life = " ".join([str(tmp_path / "fired"), *each]), Life(tmp_path, noise_shards)
    life.drive()
    while not life.live(WORKERS, planned):
        assert life.lives <= len(each)
    assert len(list((tmp_path / "fired").iterdir())) == len(each)  # each was met
    ended = life.end()
    assert ended.hashes == unbroken.hashes
    assert ended.same_rows() == unbroken.same_rows()
    assert ended.orphans == 0


def test_a_kill_of_any_worker_in_a_shared_save_is_survived(
    unbroken: Ended, noise_shards: str, tmp_path: Path
) -> None:
    """Both write each checkpoint. The state is that of a run whose files are whole."""
    each = ["kill@object:4/1", "kill@manifest:9/1", "kill@manifest:14/0", "kill@commit:19/0"]
    planned = " ".join([str(tmp_path / "fired"), *each])
    life = Life(tmp_path, noise_shards, part_bytes=4096)
    life.drive()
    while not life.live(WORKERS, planned):
        assert life.lives <= len(each)
    assert len(list((tmp_path / "fired").iterdir())) == len(each)
    ended = life.end()
    assert ended.same_rows() == unbroken.same_rows()
    assert ended.orphans == 0
    found = CheckpointStore(str(tmp_path / "tiny" / CHECKPOINTS)).load()
    assert found is not None
    assert Path(found[0], "written-00001.json").exists()
    assert len([name for name in ended.hashes if name.startswith("optimizer-")]) > 1
    assert unbroken.hashes == {
        f"{group}.safetensors": hashlib.sha256(file_bytes(tensors)).hexdigest()
        for group, tensors in found[1].tensors.items()
    }


def test_an_autoencoder_with_its_adversary_survives_kills(
    larger_noise_shards: str, tmp_path: Path
) -> None:
    """Killed before, in and after the first step with a discriminator, and in a save."""
    whole, life = (
        Life(tmp_path / name, larger_noise_shards, AUTOENCODER) for name in ("whole", "killed")
    )
    whole.drive()
    assert whole.live(WORKERS)
    each = ["kill@update:7/0", "kill@gradient:8/1", "kill@between:11/0", "kill@commit:15/0"]
    planned = " ".join([str(tmp_path / "fired"), *each])
    life.drive()
    while not life.live(WORKERS, planned):
        assert life.lives <= len(each)
    wanted, ended = whole.end(), life.end()
    assert "discriminator.safetensors" in wanted.hashes
    assert "eval/psnr" in wanted.rows
    assert (tmp_path / "killed/tiny/pictures/reconstructions-step-00000012.png").exists()
    assert ended.hashes == wanted.hashes
    assert ended.same_rows() == wanted.same_rows()


def test_rows_that_mlflow_has_not_yet_come_out_of_the_checkpoint(
    unbroken: Ended, noise_shards: str, tmp_path: Path
) -> None:
    """Nothing is sent before a life's end, and the first has none."""
    life = Life(tmp_path, noise_shards, (*TINY, "tracking.flush_every_s=3600"))
    life.drive()
    assert not life.live(WORKERS, f"{tmp_path / 'fired'} kill@between:{EVERY + 2}")
    assert life.live(WORKERS)
    assert life.end().same_rows() == unbroken.same_rows()


def test_a_run_on_latents_survives_kills_too(latent_shards: str, tmp_path: Path) -> None:
    """The posteriors are drawn by (seed, step, position), the views by the flip's coin."""
    overrides = (*TINY, "data.flip=true", "training.grid_every_steps=12", "sampling.batch_size=4")
    lives = [Life(tmp_path / name, latent_shards, overrides) for name in ("whole", "killed")]
    whole, killed = lives
    whole.drive()
    assert whole.live(WORKERS)
    killed.drive()
    planned = f"{tmp_path / 'fired'} kill@gradient:7/1 kill@commit:15/0"
    while not killed.live(WORKERS, planned):
        assert killed.lives <= 2
    assert killed.lives == 3
    unbroken, ended = whole.end(), killed.end()
    assert ended.hashes == unbroken.hashes
    assert ended.same_rows() == unbroken.same_rows()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100))
def test_any_kills_leave_the_same_run(
    seed: int, unbroken: Ended, noise_shards: str, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    planned = " ".join([str(tmp_path / "fired"), *kills(draw, 10, STEPS, WORKERS)])
    life = Life(tmp_path / "run", noise_shards)
    life.drive()
    while not life.live(WORKERS, planned):
        if draw.random() < 0.5:  # the driver died with them, and the same command came again
            life.drive()
        assert life.lives <= 11, planned
    ended = life.end()
    assert ended.hashes == unbroken.hashes, planned
    assert ended.same_rows() == unbroken.same_rows(), planned
    assert (ended.runs, ended.status, ended.orphans) == (1, "FINISHED", 0)
    life.forget()
