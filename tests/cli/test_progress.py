"""The lines of a job's progress: how far it is, and how long it will take from here."""

import re

import pytest

from ddpm_ray.cli.progress import ProgressLine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic clock of the lines, in seconds: one number that tests set."""
    now = [0.0]
    monkeypatch.setattr("ddpm_ray.cli.progress.time.monotonic", lambda: now[0])
    return now


def left_s(capsys: pytest.CaptureFixture[str]) -> int:
    """Seconds left, as the last line says."""
    found = re.search(r"(\d+):(\d\d) left$", capsys.readouterr().err.strip())
    assert found is not None
    return 60 * int(found[1]) + int(found[2])


def test_the_time_left_is_what_a_steady_rate_leaves(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    line = ProgressLine("step")
    for done in range(0, 101, 10):
        clock[0] = 2.0 * done
        line(done, 400)
    assert left_s(capsys) == 600


def test_a_restart_that_goes_back_is_no_part_of_the_rate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that lost 60 steps to a restart said that 62 hours were left, at ten minutes."""
    line = ProgressLine("step")
    for done in range(61):
        clock[0] = float(done)
        line(done, 400)
    for done in range(11):
        clock[0] = 180 + 2.0 * done
        line(done, 400)
    assert left_s(capsys) == 780
