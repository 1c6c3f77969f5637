"""`make gpu-check` where no GPU is: the script runs, with torch and little else installed.

What it measures is of no meaning here; that each section runs, is bounded and fails alone, is.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check
from benchmarks.gpu.measured import gaps
from tests.limits import ENDS_S

ROOT = Path(__file__).parents[1]
BARE = """\"\"\"A machine without what setup would install: only these can be imported.\"\"\"

import importlib.metadata
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

ALLOWED = {
    "torch", "numpy", "pyarrow", "safetensors", "omegaconf", "fsspec",  # what is asked for
    "torchgen", "functorch", "sympy", "mpmath", "networkx", "jinja2", "markupsafe", "filelock",
    "typing_extensions", "yaml", "antlr4",  # and what these bring along
    "ddpm_ray", "benchmarks", *sys.stdlib_module_names,
}


class OfAllowed:
    find_distributions = staticmethod(PathFinder.find_distributions)

    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        if package in ALLOWED or package.startswith("_sysconfigdata"):
            return PathFinder.find_spec(name, path, target)
        return None


def not_installed(name, version=importlib.metadata.version):
    if name == "ddpm-ray":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)


importlib.metadata.version = not_installed
sys.meta_path = [BuiltinImporter, FrozenImporter, OfAllowed()]
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a process, and of those that it starts, on such a machine."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}


def test_it_needs_torch_and_five_small_packages(bare: dict[str, str]) -> None:
    script = "import benchmarks.gpu_check, benchmarks.gpu.sections, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=bare,
        cwd=ROOT,
        text=True,
        check=True,
        timeout=ENDS_S,
        stdout=subprocess.PIPE,
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"ray", "mlflow", "PIL", "scipy", "s3fs", "rich"}
    assert {"torch", "numpy", "pyarrow", "safetensors", "omegaconf", "fsspec"} <= loaded


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_section_runs_on_a_bare_machine_without_a_gpu(bare: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check"],
        env=bare,
        cwd=ROOT,
        text=True,
        timeout=1100,
        stdout=subprocess.PIPE,
    )
    first, *_, heading, last = done.stdout.splitlines()
    assert first == heading == gpu_check.NO_GPU
    report = json.loads(last)
    problems = {name: found.get("error") for name, found in report["sections"].items()}
    assert problems == dict.fromkeys(gpu_check.LIMITS_S), done.stdout
    assert done.returncode == 0
    assert report["passed"]
    assert not report["gpu"]
    restarts = report["sections"]["restart"]["rows"]
    assert all(value is True for row in restarts for value in row["found"].values())


def test_a_section_that_takes_too_long_is_cut_off() -> None:
    section = gpu_check.ran("parts", 0.5, toy=True)  # torch alone takes longer to import
    assert section["status"] == "cut off"
    assert section["error"] == "its 0.5 s were over"


def test_a_section_that_fails_is_reported_with_its_exit_code() -> None:
    section = gpu_check.ran("nonsense", 60, toy=True)
    assert section["status"] == "failed"
    assert section["error"] == "it ended with 2"


def test_rows_before_an_error_are_kept() -> None:
    lines = [
        json.dumps({"name": "clip", "found": {"ms": 0.5}, "note": ""}),
        "[W1 a warning]",
        json.dumps({"error": "RuntimeError: no"}),
        '{"name": "half a li',
    ]
    assert [next(iter(line)) for line in gpu_check.parsed("\n".join(lines))] == ["name", "error"]


def test_the_table_shows_units_notes_and_errors() -> None:
    rows = [
        {"name": "fp32, batch 16", "found": {"images/s": 1234.5678, "equal": False}, "note": ""},
        {"name": "batch 512", "found": {}, "note": "not run: the GPU's memory is too small"},
    ]
    section = {"status": "failed", "seconds": 3.0, "rows": rows, "error": "RuntimeError: no"}
    assert list(gpu_check.table("steps", section)) == [
        "\nsteps: failed, 3 s",
        "  fp32, batch 16  images/s 1,234.57   equal NO",
        "  batch 512       not run: the GPU's memory is too small",
        "  ERROR: RuntimeError: no",
    ]


def test_all_sections_together_end_within_eight_minutes() -> None:
    assert sum(gpu_check.LIMITS_S.values()) <= 8 * 60 - 5  # the rest: torch and the table


@pytest.mark.parametrize(
    "spans, share",
    [
        ([(0.0, 10.0)], 0.0),
        ([(0, 2), (8, 10)], 0.6),
        ([(8, 10), (0, 4), (2, 3)], 0.4),  # in any order; one within another
        ([(0, 6), (4, 10)], 0.0),  # two streams
    ],
)
def test_idle_is_what_no_kernel_covers(spans: list[tuple[float, float]], share: float) -> None:
    assert gaps(spans) == pytest.approx(share)


def test_a_device_that_did_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="saw nothing on the device"):
        gaps([])
