"""A thousand steps and a hundred deaths, and nothing has grown that should not."""

import random
from pathlib import Path
from statistics import median

import pytest

from tests.faults.lives import TINY, Life
from tests.faults.schedules import kill

STEPS, KILLS, WORKERS = 1000, 100, 2
LONG = (
    *TINY,
    f"training.steps={STEPS}",
    "training.checkpoint_every_steps=20",
    "evaluation.validation_every_steps=250",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # MLflow's, as it imports
]


def test_a_hundred_deaths_leave_the_run_and_the_machine_as_they_were(
    noise_shards: str, tmp_path: Path
) -> None:
    unbroken = Life(tmp_path / "unbroken", noise_shards, LONG, meter=True)
    unbroken.drive()
    assert unbroken.live(WORKERS)

    faulted = Life(tmp_path / "fired", noise_shards, LONG, meter=True)
    faulted.drive()
    draw = random.Random(0)
    for number in range(KILLS):  # one in each hundredth of the run
        at = number * STEPS // KILLS + draw.randint(1, STEPS // KILLS)
        planned = kill(draw, at, WORKERS)
        assert not faulted.live(WORKERS, f"{tmp_path / f'mark-{number}'} {planned}"), planned
    assert faulted.live(WORKERS)

    one, other = unbroken.end(), faulted.end()
    assert other.hashes == one.hashes
    assert other.same_rows() == one.same_rows()
    assert (other.runs, other.status, other.orphans) == (1, "FINISHED", 0)
    for life in (unbroken, faulted):
        reported = life.metered()
        early = [line for line in reported if 50 < line[0] <= STEPS // 4]
        late = [line for line in reported if line[0] > STEPS * 3 // 4]
        size, files = ((median(x[i] for x in early), median(x[i] for x in late)) for i in (1, 2))
        print(f"resident {size[0] / 2**20:.0f} -> {size[1] / 2**20:.0f} MiB, files {files}")
        assert size[1] <= size[0] + 16 * 2**20
        assert files[1] <= files[0] + 1
