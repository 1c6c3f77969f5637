"""DDPM_RAY_FAULTS: what can be asked for, and that it strikes where and when it says, once."""

from pathlib import Path

import pytest

from ddpm_ray import fault_injection
from ddpm_ray.fault_injection import FaultSyntaxError, InjectedFaultError


def plan(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> None:
    monkeypatch.setenv(fault_injection.VARIABLE, " ".join([str(folder), *words]))


def test_without_the_variable_a_point_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(fault_injection.VARIABLE, raising=False)
    for point in fault_injection.POINTS:
        fault_injection.at(point)


def test_it_strikes_once_at_its_point_step_and_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan(monkeypatch, tmp_path, "fail@commit:5/1")
    for rank, step, point in [(1, 4, "commit"), (0, 5, "commit"), (1, 5, "update")]:
        fault_injection.set_position(rank, step)
        fault_injection.at(point)
    fault_injection.set_position(1, 6)  # step 5 did not pass there
    with pytest.raises(InjectedFaultError, match="fault at commit, step 6"):
        fault_injection.at("commit")
    fault_injection.at("commit")


def test_each_of_several_strikes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plan(monkeypatch, tmp_path / "new", "fail@batch", "fail@batch")
    fault_injection.set_position(3, 1)
    for _ in range(2):
        with pytest.raises(InjectedFaultError, match="fault at batch"):
            fault_injection.at("batch")
    fault_injection.at("batch")


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "start it with an absolute folder"),
        ("kill@batch", "starts with 'kill@batch'"),
        ("/tmp/x maim@batch", r"'maim@batch' is not ACTION@POINT.*actions: kill, term"),
        ("/tmp/x kill@lunch", r"points: join, open, restore, begin, batch"),
        ("/tmp/x kill@batch:soon", r"is not ACTION@POINT\[:STEP\]\[/RANK\]"),
    ],
)
def test_what_cannot_be_understood_is_reported(text: str, says: str) -> None:
    with pytest.raises(FaultSyntaxError, match=says):
        fault_injection.parse_faults(text)
