"""More workers, fewer workers, in mid-epoch and after kills: the same road."""

from pathlib import Path

import pytest

from tests.faults.lives import AUTOENCODER, STEPS, TINY, Ended, Life
from tests.noise import pack_noise

pytestmark = [
    pytest.mark.timeout(600),  # several lives of up to LIFE_S; 30 s on a quiet machine
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's, as it imports
]
ELASTIC = (*TINY, "training.reduction=elastic", "training.reduction_slots=4")
VALIDATION = "eval/loss"  # its networks see batches of other sizes where the workers are others


def lived(folder: Path, data: str, overrides: tuple[str, ...], counts: list[int]) -> Ended:
    """A run by so many workers, life after life; all but the last are killed on the way."""
    life = Life(folder, data, overrides)
    life.drive()
    for number, count in enumerate(counts[:-1]):
        at = (number + 1) * STEPS // len(counts)
        assert not life.live(count, f"{folder / f'fired-{number}'} kill@between:{at}")
    assert life.live(counts[-1])
    return life.end()


@pytest.mark.parametrize("counts", [[4, 2], pytest.param([2, 4, 1, 2], marks=pytest.mark.slow)])
def test_with_elastic_reduction_any_workers_end_with_the_same_bits(
    counts: list[int], noise_shards: str, tmp_path: Path
) -> None:
    """Weights, EMA, moments, and the rows of training; dropout too is keyed by the slot."""
    alone = lived(tmp_path / "alone", noise_shards, ELASTIC, [1])
    ended = lived(tmp_path / "resized", noise_shards, ELASTIC, counts)
    assert ended.hashes == alone.hashes
    of_training = [key for key in alone.rows if not key.startswith(VALIDATION)]
    assert "train/loss_logsnr/0_to_2" in of_training
    for key in of_training:
        assert ended.same_rows()[key] == alone.same_rows()[key], key


@pytest.mark.slow
def test_an_autoencoder_and_its_adversary_keep_their_bits_on_any_workers(
    larger_noise_shards: str, tmp_path: Path
) -> None:
    elastic = (*AUTOENCODER, *ELASTIC[len(TINY) :])
    alone = lived(tmp_path / "alone", larger_noise_shards, elastic, [1])
    ended = lived(tmp_path / "resized", larger_noise_shards, elastic, [4, 2])
    assert ended.hashes == alone.hashes
    assert "discriminator-optimizer.safetensors" in alone.hashes
    of_training = [key for key in alone.rows if not key.startswith("eval/")]
    assert {"train/adversarial_weight", "train/kl_bits"} < {*of_training}
    for key in of_training:
        assert ended.same_rows()[key] == alone.same_rows()[key], key


@pytest.mark.slow
def test_by_default_the_losses_agree_though_workers_come_and_go(
    noise_shards: str, tmp_path: Path
) -> None:
    """Sums over workers are rounded otherwise, and nothing else differs. No dropout: its masks
    are drawn for a worker's whole share."""
    plain = (*TINY, "model.dropout=0")
    one = lived(tmp_path / "one", noise_shards, plain, [1]).rows["train/loss"]
    other = lived(tmp_path / "other", noise_shards, plain, [2, 4, 1]).rows["train/loss"]
    assert [step for step, _ in other] == [step for step, _ in one]
    assert [loss for _, loss in other] == pytest.approx([loss for _, loss in one], rel=1e-5)


@pytest.mark.slow
def test_each_sample_comes_once_an_epoch_whatever_happened(tmp_path: Path) -> None:
    """3 epochs of 5 steps, 20 kills, 5 changes of the number of workers."""
    data, epochs, steps = str(tmp_path / "data"), 3, 5
    pack_noise(data, images=8 * steps, side=4)  # 8 lanes give 1 sample to each batch
    short = (f"training.steps={epochs * steps}", "training.checkpoint_every_steps=2")
    life = Life(tmp_path / "run", data, (*TINY, *short), record_draws=True)
    life.drive()
    counts, kills = [2, 4, 1, 2, 4, 2], 20
    for kill in range(kills):
        at = 1 + kill * epochs * steps // kills
        planned = f"{tmp_path / f'fired-{kill}'} kill@gradient:{at}"
        assert not life.live(counts[kill * len(counts) // kills], planned)
    assert life.live(counts[-1])

    samples, noises = life.drawn("sample"), life.drawn("noise")
    places = {(step, position) for step in range(epochs * steps) for position in range(8)}
    assert samples.keys() == noises.keys() == places
    assert all(len(drawn) == 1 for drawn in (*samples.values(), *noises.values()))
    keys = {key for (key,) in samples.values()}
    assert len(keys) == 8 * steps
    for epoch in range(epochs):
        of_epoch = range(epoch * steps, (epoch + 1) * steps)
        assert {key for (step, _), (key,) in samples.items() if step in of_epoch} == keys
    assert len({noise for (noise,) in noises.values()}) == len(places)
