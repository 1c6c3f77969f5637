"""No version with a known hole of the kind that matters here can be installed, or is pinned.

Each entry was looked up in its CVE record or in the release notes of the package.
"""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
# (package, advisory, first version without it)
DIRECT = [
    ("mlflow", "CVE-2025-14279", "3.5.0"),  # a web page calls a server at loopback
    ("mlflow", "CVE-2026-64849", "3.15.0"),  # a server's webhooks ask other servers
    ("pillow", "CVE-2026-40192", "12.2.0"),  # FITS, of which nothing is opened here either
    ("pillow", "CVE-2026-112403", "13.0.0"),  # JPEG
    ("pyarrow", "CVE-2023-47248", "14.0.1"),  # IPC files that run code
    ("ray", "CVE-2025-62593", "2.52.0"),  # a web page submits jobs
    ("ray", "CVE-2026-27482", "2.54.0"),  # the dashboard deletes for strangers
    ("ray", "CVE-2026-41486", "2.55.0"),  # its Arrow types unpickle what a file says
    ("ray", "CVE-2026-57516", "2.56.0"),  # its WebDataset reader unpickles
    ("torch", "CVE-2025-32434", "2.6.0"),  # torch.load with weights_only runs code
    ("torch", "CVE-2026-24747", "2.10.0"),  # it overwrites memory
]
INDIRECT = [
    ("aiohttp", "CVE-2026-128131", "3.14.4"),
    ("fonttools", "CVE-2025-66034", "4.60.2"),
    ("gunicorn", "CVE-2024-1135", "22.0.0"),
    ("requests", "CVE-2026-25645", "2.33.0"),
    ("starlette", "CVE-2025-62727", "0.49.1"),
    ("urllib3", "CVE-2026-97687", "2.8.0"),
]


def project() -> dict[str, list[Requirement]]:
    """What the package, and each of its extras, asks for."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {"": found["dependencies"]} | found["optional-dependencies"]
    return {extra: [Requirement(line) for line in lines] for extra, lines in asked.items()}


def pinned() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(number) for name, number in pairs}


def floor(requirement: Requirement) -> Version | None:
    """The lowest version that it allows, or None where there is no such bound."""
    low = [
        Version(one.version.removesuffix(".*"))
        for one in requirement.specifier
        if one.operator in (">=", "==", "~=")
    ]
    return max(low, default=None)


def below(requirement: Requirement, fixed: str) -> bool:
    lowest = floor(requirement)
    return lowest is None or lowest < Version(fixed)


@pytest.mark.parametrize("package, advisory, fixed", DIRECT)
def test_what_we_ask_for_lies_above_it(package: str, advisory: str, fixed: str) -> None:
    asked = [one for lines in project().values() for one in lines if one.name == package]
    assert asked
    assert not [str(one) for one in asked if below(one, fixed)], advisory


@pytest.mark.parametrize("package, advisory, fixed", DIRECT + INDIRECT)
def test_what_is_pinned_lies_above_it(package: str, advisory: str, fixed: str) -> None:
    assert pinned()[package] >= Version(fixed), advisory


def test_every_dependency_has_a_floor_and_its_pin_is_allowed() -> None:
    for requirement in (one for lines in project().values() for one in lines):
        if requirement.name == "ddpm-ray":
            continue
        assert floor(requirement) is not None, requirement
        assert requirement.specifier.contains(pinned()[canonicalize_name(requirement.name)])


def test_advisories_are_spelt_as_such() -> None:
    assert all(
        re.fullmatch(r"CVE-20\d\d-\d{4,6}", advisory) for _, advisory, _ in DIRECT + INDIRECT
    )


@pytest.mark.parametrize("line", ["torch", "torch<3", "torch>=2.9", "torch==2.9.*", "torch!=2.1"])
def test_a_floor_that_is_too_low_would_be_seen(line: str) -> None:
    assert below(Requirement(line), "2.10.0")
    assert not below(Requirement("torch==2.13.*"), "2.10.0")
    assert not below(Requirement("torch~=2.10.0"), "2.10.0")
