"""The house: imports go down only, each outside package has its door, files stay small.

Sources are parsed, never imported, so an import inside a function or under TYPE_CHECKING counts.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = {
    "ddpm_ray.fault_injection": 0,
    "ddpm_ray.redaction": 0,
    "ddpm_ray.storage.file_formats": 0,
    "ddpm_ray.config.former_keys": 0,
    "ddpm_ray.config.option_fields": 0,
    "ddpm_ray.counter_rng": 0,
    "ddpm_ray.diffusion": 0,
    "ddpm_ray.measures": 0,
    "ddpm_ray.models": 1,
    "ddpm_ray.data": 1,
    "ddpm_ray.generation": 2,
    "ddpm_ray.training": 3,
    "ddpm_ray.config.loading": 4,
    "ddpm_ray.config.yaml_text": 4,
    "ddpm_ray.config.run": 4,
    "ddpm_ray.config.diffusion": 4,
    "ddpm_ray.config.evaluation": 4,
    "ddpm_ray.config.jobs": 4,
    "ddpm_ray.config.sweep": 4,
    "ddpm_ray.config.fault_drill": 4,
    "ddpm_ray.config.edit": 4,
    "ddpm_ray.config.ema_search": 4,
    "ddpm_ray.config.ema_search_rules": 4,
    "ddpm_ray.assembly.training_run": 4,
    "ddpm_ray.assembly.diffusion": 4,
    "ddpm_ray.assembly.checkpoint_loading": 4,
    "ddpm_ray.assembly.edit": 4,
    "ddpm_ray.cluster": 4,
    "ddpm_ray.cli": 5,
    "ddpm_ray.config.job_files": 5,
    "ddpm_ray.output_files": 5,
    "ddpm_ray": 5,  # the notebook face: ddpm_ray/__init__.py
    "jobs": 5,
}
SIDEWAYS = {  # on one floor, and yet strangers
    ("ddpm_ray.models", "ddpm_ray.data"),
    ("ddpm_ray.data", "ddpm_ray.models"),
}
DOORS = {  # outside package: where alone it may be imported
    "aiobotocore": (),
    "boto3": (),
    "botocore": (),
    "fsspec": ("ddpm_ray.storage.object_store",),
    "s3fs": ("ddpm_ray.storage.object_store",),
    "matplotlib": ("ddpm_ray.sweep.charts",),
    "mlflow": tuple(
        f"ddpm_ray.cluster.{name}" for name in ("tracking", "mlflow_client", "registry")
    ),
    "ray": ("ddpm_ray.cluster",),
    "sklearn": ("ddpm_ray.data.packing.builtin_datasets",),
    "omegaconf": ("ddpm_ray.config.loading",),
    "yaml": ("ddpm_ray.config.yaml_text",),
    "optuna": ("ddpm_ray.sweep.search",),
    "torchmetrics": (),  # their compiled halves tie us to one torch build
    "torchvision": (),
}
DIETS = {  # module or folder: all that it may import from outside, beside the standard library
    "ddpm_ray.counter_rng": {"torch"},
    "ddpm_ray.diffusion": {"torch"},
    "ddpm_ray.measures": {"torch"},
    "ddpm_ray.fault_injection": set[str](),
    "ddpm_ray.redaction": set[str](),
    "ddpm_ray.storage.file_formats": set[str](),
    "ddpm_ray.config.former_keys": set[str](),
    "ddpm_ray.config.option_fields": set[str](),
    "ddpm_ray.config.sampling": set[str](),
    "ddpm_ray.data.shuffle_order": {"numpy"},
    "ddpm_ray.config.run": set[str](),
    "ddpm_ray.config.diffusion": set[str](),
    "ddpm_ray.config.evaluation": set[str](),
    "ddpm_ray.config.jobs": set[str](),
    "ddpm_ray.config.sweep": set[str](),
    "ddpm_ray.config.fault_drill": set[str](),
    "ddpm_ray.config.edit": set[str](),
    "ddpm_ray.config.ema_search": set[str](),
    "ddpm_ray.config.ema_search_rules": set[str](),
    "jobs": set[str](),
}
EMPTY_NAMES = {"utils", "common", "helpers", "misc", "base"}
MOST_LINES = {"jobs": 60, "ddpm_ray": 400}  # the first that fits counts; near 300: two ideas?
MOST_LINES_OF_A_FUNCTION = 60


def sources() -> list[Path]:
    return sorted(path for folder in ("ddpm_ray", "jobs") for path in (ROOT / folder).rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def lies_in(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}.")


def room(name: str) -> str:
    """The entry of FLOORS that holds `name`: the longest that fits, or "" outside the house."""
    return max((r for r in FLOORS if lies_in(name, r)), key=len, default="")


def imported(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and full dotted target of every import; names taken `from` a module are appended."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                yield from ((node.lineno, f"{'.' * level}{module}.{a.name}") for a in names)
            case ast.Name(id="__import__") | ast.Attribute(attr="import_module"):
                yield node.lineno, "import by string"


def import_faults(module: str, source: str) -> Iterator[str]:
    """One line for each import of `module` that breaks a rule above."""
    for line, target in imported(ast.parse(source)):
        if reason := why_not(module, target):
            yield f"{module}:{line} imports {target}: {reason}"


def why_not(module: str, target: str) -> str:
    """The rule that forbids `module` to import `target`, or an empty string."""
    here, there, package = room(module), room(target), target.partition(".")[0]
    if target == "import by string" or target.startswith("."):
        return "imports are absolute names that a reader can follow"
    if there:
        if FLOORS[there] > FLOORS[here]:
            return f"uphill, from floor {FLOORS[here]} to floor {FLOORS[there]}"
        return "sideways" if (here, there) in SIDEWAYS else ""
    if package in DOORS and not any(lies_in(module, door) for door in DOORS[package]):
        return f"{package} is imported in {' and '.join(DOORS[package]) or 'no module'} only"
    for eater, diet in DIETS.items():
        if lies_in(module, eater) and package not in diet | set(sys.stdlib_module_names):
            return f"{eater} needs {' and '.join(sorted(diet)) or 'nothing'} beside the stdlib"
    return ""


def size_faults(file: str, source: str) -> Iterator[str]:
    """One line for each bound on names and lengths that `file` breaks."""
    if Path(file).stem in EMPTY_NAMES:
        yield f"{file}: the name says nothing of what is inside"
    most = next(lines for prefix, lines in MOST_LINES.items() if file.startswith(prefix))
    if (lines := len(source.splitlines())) > most:
        yield f"{file}: {lines} lines, at most {most}; which two ideas are in it?"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            if lines > MOST_LINES_OF_A_FUNCTION:
                yield f"{file}:{node.lineno} {node.name}: {lines} lines, at most 60"


def test_imports_go_down_and_outside_packages_through_their_doors() -> None:
    faults = [
        fault for path in sources() for fault in import_faults(dotted(path), path.read_text())
    ]
    assert not faults, "\n".join(faults)


def test_every_module_stands_on_a_floor() -> None:
    face = ROOT / "ddpm_ray/__init__.py"
    homeless = [str(p) for p in sources() if p != face and room(dotted(p)) == "ddpm_ray"]
    assert not homeless, f"add to FLOORS: {homeless}"


def test_files_and_functions_are_short_and_named_by_their_idea() -> None:
    faults = [
        fault
        for path in sources()
        for fault in size_faults(str(path.relative_to(ROOT)), path.read_text())
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "module, source, reason",
    [
        ("ddpm_ray.diffusion.losses", "import ddpm_ray.models.unet", "floor 0 to floor 1"),
        ("ddpm_ray.diffusion.losses", "def f():\n    import numpy", "needs torch"),
        ("ddpm_ray.models.unet", "from ddpm_ray.data import shuffle_order as order", "sideways"),
        ("ddpm_ray.data.loader", "from ddpm_ray import models", "sideways"),
        ("ddpm_ray.data.shuffle_order", "import torch", "needs numpy"),
        ("ddpm_ray.data.loader", "import fsspec", "ddpm_ray.storage.object_store only"),
        ("ddpm_ray.storage.object_store", "import boto3", "no module only"),
        ("ddpm_ray.sampling.sampling", "from ddpm_ray.training.state import A", "floor 2 to floor"),
        ("ddpm_ray.sampling.sampling", "import ddpm_ray", "floor 2 to floor 5"),
        ("ddpm_ray.training.loop", "if TYPE_CHECKING:\n    import ray.train", "ddpm_ray.cluster"),
        ("ddpm_ray.training.loop", "from ray import train", "ddpm_ray.cluster"),
        ("ddpm_ray.runs.train_worker", "import mlflow.pyfunc as p", "cluster.registry only"),
        (
            "ddpm_ray.runs.train_worker",
            "from ddpm_ray.cli import run",
            "floor 4 to floor 5",
        ),
        (
            "ddpm_ray.assembly.training_run",
            "from omegaconf import OmegaConf",
            "ddpm_ray.config.loading only",
        ),
        ("ddpm_ray.models.unet", "from .layers import Block", "a reader can follow"),
        (
            "ddpm_ray.assembly.training_run",
            "importlib.import_module(config.kind)",
            "a reader can follow",
        ),
        ("jobs.train", "def main():\n    import torch", "needs nothing"),
    ],
)
def test_a_forbidden_import_is_caught(module: str, source: str, reason: str) -> None:
    (fault,) = import_faults(module, source)
    assert reason in fault


@pytest.mark.parametrize(
    "module, source",
    [
        ("ddpm_ray.diffusion.losses", "import math, torch\nfrom ddpm_ray.diffusion import process"),
        ("ddpm_ray.models.unet", "from ddpm_ray.diffusion.process import Denoise"),
        ("ddpm_ray.storage.object_store", "import fsspec"),
        ("ddpm_ray.tracking.model_registry", "import mlflow, ray"),
        ("ddpm_ray", "from ddpm_ray.sampling.sampling import load"),
        (
            "jobs.train",
            "from ddpm_ray import cli as command_line; from ddpm_ray.config import run as config",
        ),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert not list(import_faults(module, source))


@pytest.mark.parametrize(
    "file, source, reason",
    [
        ("ddpm_ray/data/utils.py", "", "says nothing"),
        ("ddpm_ray/data/shard_cache.py", "\n" * 401, "401 lines, at most 400"),
        ("jobs/train.py", "\n" * 61, "61 lines, at most 60"),
        (
            "ddpm_ray/assembly/training_run.py",
            "def f():\n" + "    0\n" * 60,
            "f: 61 lines, at most 60",
        ),
    ],
)
def test_a_long_or_nameless_file_is_caught(file: str, source: str, reason: str) -> None:
    (fault,) = size_faults(file, source)
    assert reason in fault


@pytest.mark.parametrize(
    "module", ["ddpm_ray", "ddpm_ray.config.run", "ddpm_ray.config.sweep", "ddpm_ray.cli"]
)
def test_a_wrong_config_can_end_before_anything_heavy_loads(module: str) -> None:
    """Torch alone takes longer to import than the two seconds in which a wrong config must end."""
    heavy = {"torch", "ray", "mlflow", "pandas", "pyarrow", "scipy", "fsspec"}
    script = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not heavy & set(done.stdout.split())
