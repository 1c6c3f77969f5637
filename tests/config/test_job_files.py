"""A config file that is given to the wrong job, or is none, is reported in one line."""

import sys
from pathlib import Path
from typing import Any

import pytest

from ddpm_ray.cli.job import CONFIG, WRONG_CONFIG, Job
from ddpm_ray.cli.main import main
from ddpm_ray.config.reading.job_files import KINDS, job_of_file
from ddpm_ray.config.reading.shipped import folder_of

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("conf/*/*.yaml"))
JOBS = {folder_of(kind): kind for kind in KINDS}


def refused(kind: type[Any], path: Path, *overrides: str, patch: pytest.MonkeyPatch) -> None:
    """Run a job whose config may not be accepted."""

    def job(*_: Any) -> dict[str, Any]:
        raise AssertionError("the config was accepted")

    name = folder_of(kind)
    patch.setattr(sys, "argv", [f"jobs/{name}.py", str(path), *overrides])
    assert main(Job(name, "a job", kind, job, (CONFIG,))) == WRONG_CONFIG


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_each_file_of_conf_is_known_as_that_of_its_job(file: Path) -> None:
    own = file.parent.name
    for job, kind in JOBS.items():
        assert job_of_file(kind, str(file)) == ("" if job == own else own)


@pytest.mark.parametrize("given", JOBS)
@pytest.mark.parametrize("taken", JOBS)
def test_a_file_of_another_job_is_one_line(
    given: str, taken: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On commit d926ba0 up to twenty lines, with hints as "space: did you mean storage?"."""
    if given == taken:
        pytest.skip("its own")
    file = next(file for file in FILES if file.parent.name == given)
    refused(JOBS[taken], file, patch=monkeypatch)
    said = capsys.readouterr().err
    assert said == (
        f"error: {file}: this is a config of {given}; run `python jobs/{given}.py {file}`\n"
    )


def test_mistakes_in_a_file_of_this_job_are_reported_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mistaken.yaml"
    file.write_text("name: a\ndata:\n  url: b\ntrainin:\n  steps: 3\nsed: 1\n")
    refused(JOBS["train"], file, patch=monkeypatch)
    assert [line.partition(";")[2] for line in capsys.readouterr().err.splitlines()] == [
        " did you mean training.steps?",
        " did you mean seed?",
    ]


@pytest.mark.parametrize(
    "data, says",
    [
        (b"\x7fELF\x02\x01\x01\xf0\x9f", "is not a text file in UTF-8"),
        (b"name: \x00\x01", "is not a text file: it holds the character '\\x00'"),
        (b"\x1b[2J", "is not a text file: it holds the character '\\x1b'"),
        (b"#" * (16 * 2**20 + 1), "is larger than 16 MiB"),
    ],
)
def test_a_binary_file_is_one_line(
    data: bytes,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On commit d926ba0: "'utf-8' codec can't decode byte 0xf0 in position 7", and no remedy."""
    (file := tmp_path / "model.safetensors").write_bytes(data)
    for kind in JOBS.values():
        refused(kind, file, patch=monkeypatch)
        said = capsys.readouterr().err
        assert said == f"error: {file}: {says}; a config is a YAML file of keys and values\n"
