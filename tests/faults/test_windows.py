"""Rows that are means over windows of steps are the same where the run was killed."""

from pathlib import Path

import pytest

from tests.faults.lives import STEPS, TINY, Life
from tests.noise import pack_noise

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports

EVERY = 7  # no multiple of it is a checkpoint but for the last step, nor the last step itself


@pytest.mark.timeout(300)
def test_a_killed_run_averages_over_the_same_steps(tmp_path: Path) -> None:
    """Killed twice: while rows are on their way, and in the middle of a window."""
    data = str(tmp_path / "data")
    pack_noise(data, images=45, side=4)
    overrides = (*TINY, f"tracking.every_steps={EVERY}")
    clean = Life(tmp_path / "clean", data, overrides)
    clean.drive()
    assert clean.live(1)
    whole = clean.end()
    assert [step for step, _ in whole.rows["train/loss"]] == [7, 14, 21, STEPS]
    assert [step for step, _ in whole.rows["train/images_per_s"]] == list(range(4, STEPS + 1, 4))

    faulted = Life(tmp_path / "fired", data, overrides)
    for planned in (
        f"{tmp_path / 'first'} kill@sent:9/0",
        f"{tmp_path / 'second'} kill@between:18/0",
        "",
    ):
        faulted.drive()
        assert faulted.live(1, planned) is (not planned)
    ended = faulted.end()
    assert ended.same_rows() == whole.same_rows()
    assert ended.hashes == whole.hashes
