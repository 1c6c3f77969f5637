"""Imports go to lower layers only, outside packages have few importers, files stay small.

A public function or class has one name of its own, so that a search for it finds one thing.

Sources are parsed, never imported, so an import inside a function or under TYPE_CHECKING counts.
"""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = {
    "ddpm_ray.diffusion": 0,
    "ddpm_ray.choices": 0,
    "ddpm_ray.core_clock": 0,
    "ddpm_ray.counter_rng": 0,
    "ddpm_ray.philox_kernel": 0,
    "ddpm_ray.fault_injection": 0,
    "ddpm_ray.redaction": 0,
    "ddpm_ray.reporting": 0,
    "ddpm_ray.collectives": 0,
    "ddpm_ray.models": 1,
    "ddpm_ray.storage": 1,
    "ddpm_ray.config": 2,
    "ddpm_ray.data": 2,
    "ddpm_ray.sampling": 3,
    "ddpm_ray.evaluation": 4,
    "ddpm_ray.training": 5,
    "ddpm_ray.serving": 9,
    "ddpm_ray.assembly": 6,
    "ddpm_ray.tracking": 7,
    "ddpm_ray.distributed": 7,
    "ddpm_ray.runs": 8,
    "ddpm_ray.cluster": 8,  # a former name, kept for models in MLflow
    "ddpm_ray.sweep": 9,
    "ddpm_ray.cli": 10,
    "ddpm_ray.jobs": 10,
    "ddpm_ray": 10,  # ddpm_ray/__init__.py, what a notebook imports
    "jobs": 10,
}
IMPORTERS = {  # outside package: the only modules or folders that may import it
    "aiobotocore": (),
    "boto3": (),
    "botocore": (),
    "fsspec": ("ddpm_ray.storage.remote_filesystem",),
    "s3fs": ("ddpm_ray.storage.remote_filesystem",),
    "lpips": ("ddpm_ray.models.lpips_distance",),
    "matplotlib": ("ddpm_ray.sweep.charts", "ddpm_ray.sweep.chart_style"),
    "mlflow": ("ddpm_ray.tracking",),
    "ray": (
        "ddpm_ray.distributed",
        "ddpm_ray.runs",
        "ddpm_ray.sweep",
        "ddpm_ray.serving.ray_serve",
    ),
    "fastapi": ("ddpm_ray.serving.http", "ddpm_ray.serving.ray_serve"),
    "starlette": ("ddpm_ray.serving.http",),
    "prometheus_client": ("ddpm_ray.serving.served_metrics",),
    "sklearn": ("ddpm_ray.data.packing.builtin_datasets",),
    "omegaconf": ("ddpm_ray.config.reading.structure",),
    "yaml": ("ddpm_ray.config.reading.yaml_text",),
    "optuna": ("ddpm_ray.sweep.search",),
    "torchmetrics": (),  # their compiled halves tie us to one torch build
    "torchvision": (),
    "triton": ("ddpm_ray.philox_kernel",),
}
ONLY_IMPORTS = {  # module or folder: what it may import beside the standard library
    "ddpm_ray.choices": set[str](),
    "ddpm_ray.core_clock": set[str](),
    "ddpm_ray.counter_rng": {"torch"},
    "ddpm_ray.philox_kernel": {"torch", "triton"},
    "ddpm_ray.diffusion": {"torch"},
    "ddpm_ray.fault_injection": set[str](),
    "ddpm_ray.redaction": set[str](),
    "ddpm_ray.data.shuffle_order": {"numpy"},
    "ddpm_ray.config": {"omegaconf", "yaml"},
    "ddpm_ray.jobs": set[str](),
    "jobs": set[str](),
}
EMPTY_NAMES = {"utils", "common", "helpers", "misc", "base"}
MOST_LINES = {"jobs": 12, "ddpm_ray": 400}  # the first that fits counts; near 300: two ideas?
MOST_LINES_OF_A_FUNCTION = 60
SHARED_NAMES = {  # one meaning in several modules; at most 8 names
    "load",
    "main",
    "prepare",
    # one interface for each network of diffusers, see models/interop/
    "from_diffusers",
    "to_diffusers",
    "read_folder",
    "write_folder",
    "spec_from_config",
}


def sources() -> list[Path]:
    return sorted(path for folder in ("ddpm_ray", "jobs") for path in (ROOT / folder).rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def lies_in(name: str, folder: str) -> bool:
    return name == folder or name.startswith(f"{folder}.")


def entry_of(name: str) -> str:
    """The entry of LAYERS that holds `name`: the longest that fits, or "" outside ddpm_ray."""
    return max((entry for entry in LAYERS if lies_in(name, entry)), key=len, default="")


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
    here, there, package = entry_of(module), entry_of(target), target.partition(".")[0]
    if target == "import by string" or target.startswith("."):
        return "imports are absolute names that a reader can follow"
    if there:
        if LAYERS[there] > LAYERS[here]:
            return f"from layer {LAYERS[here]} up to layer {LAYERS[there]}"
        return ""
    if package in IMPORTERS and not any(lies_in(module, name) for name in IMPORTERS[package]):
        return f"{package} is imported in {' and '.join(IMPORTERS[package]) or 'no module'} only"
    for name, allowed in ONLY_IMPORTS.items():
        if lies_in(module, name) and package not in allowed | set(sys.stdlib_module_names):
            return f"{name} needs {' and '.join(sorted(allowed)) or 'nothing'} beside the stdlib"
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


def names_defined_twice(sources: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The modules that define a public function or class of the same name, by that name."""
    modules: dict[str, list[str]] = {}
    for module, source in sources:
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                modules.setdefault(node.name, []).append(module)
    return {name: m for name, m in modules.items() if len(m) > 1 and not name.startswith("_")}


def test_imports_go_down_and_outside_packages_have_few_importers() -> None:
    faults = [
        fault for path in sources() for fault in import_faults(dotted(path), path.read_text())
    ]
    assert not faults, "\n".join(faults)


def test_every_module_has_a_layer() -> None:
    top = ROOT / "ddpm_ray/__init__.py"
    missing = [str(p) for p in sources() if p != top and entry_of(dotted(p)) == "ddpm_ray"]
    assert not missing, f"add to LAYERS: {missing}"


def test_no_two_folders_import_each_other() -> None:
    pairs = {
        (entry_of(dotted(path)), entry_of(target))
        for path in sources()
        for _, target in imported(ast.parse(path.read_text()))
    }
    mutual = [(a, b) for a, b in pairs if a < b and b and (b, a) in pairs]
    assert not mutual


def test_files_and_functions_are_short_and_named_by_their_idea() -> None:
    faults = [
        fault
        for path in sources()
        for fault in size_faults(str(path.relative_to(ROOT)), path.read_text())
    ]
    assert not faults, "\n".join(faults)


def test_public_names_are_defined_once() -> None:
    found = names_defined_twice((dotted(path), path.read_text()) for path in sources())
    unlisted = {name: modules for name, modules in found.items() if name not in SHARED_NAMES}
    assert not unlisted, f"say more in one of the names: {unlisted}"
    assert found.keys() == SHARED_NAMES
    assert len(SHARED_NAMES) <= 8


def test_a_name_defined_twice_is_caught() -> None:
    files = [("a", "def row(): ...\ndef _own(): ..."), ("b", "class row: ...\ndef _own(): ...")]
    assert names_defined_twice(files) == {"row": ["a", "b"]}


@pytest.mark.parametrize(
    "module, source, reason",
    [
        ("ddpm_ray.diffusion.losses", "import ddpm_ray.models.unet", "layer 0 up to layer 1"),
        ("ddpm_ray.diffusion.losses", "def f():\n    import numpy", "needs torch"),
        ("ddpm_ray.models.unet", "from ddpm_ray.data import loader", "layer 1 up to layer 2"),
        ("ddpm_ray.data.shuffle_order", "import torch", "needs numpy"),
        ("ddpm_ray.data.loader", "import fsspec", "storage.remote_filesystem only"),
        ("ddpm_ray.storage.object_store", "import boto3", "no module only"),
        ("ddpm_ray.sampling.sampling", "from ddpm_ray.training.state import A", "3 up to layer 5"),
        ("ddpm_ray.sampling.sampling", "import ddpm_ray", "layer 3 up to layer 10"),
        ("ddpm_ray.training.loop", "if TYPE_CHECKING:\n    import ray.train", "ddpm_ray.runs"),
        ("ddpm_ray.training.loop", "from ray import train", "ddpm_ray.distributed"),
        ("ddpm_ray.runs.train_worker", "import mlflow.pyfunc as p", "ddpm_ray.tracking only"),
        (
            "ddpm_ray.runs.train_worker",
            "from ddpm_ray.cli.main import main",
            "layer 8 up to layer 10",
        ),
        (
            "ddpm_ray.assembly.training_run",
            "from omegaconf import OmegaConf",
            "ddpm_ray.config.reading.structure only",
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
        ("ddpm_ray.storage.remote_filesystem", "import fsspec"),
        ("ddpm_ray.tracking.model_registry", "import mlflow"),
        ("ddpm_ray", "from ddpm_ray.sampling.sampling import load"),
        ("jobs.train", "from ddpm_ray.cli.main import main"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert not list(import_faults(module, source))


@pytest.mark.parametrize(
    "file, source, reason",
    [
        ("ddpm_ray/data/utils.py", "", "says nothing"),
        ("ddpm_ray/data/shard_cache.py", "\n" * 401, "401 lines, at most 400"),
        ("jobs/train.py", "\n" * 13, "13 lines, at most 12"),
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
    "module",
    [
        "ddpm_ray",
        "ddpm_ray.config.run",
        "ddpm_ray.config.jobs.sweep",
        "ddpm_ray.cli.main",
        "ddpm_ray.jobs.command",
    ],
)
def test_a_wrong_config_can_end_before_anything_heavy_loads(module: str) -> None:
    """Torch alone takes longer to import than the two seconds in which a wrong config must end."""
    heavy = {"torch", "ray", "mlflow", "pandas", "pyarrow", "scipy", "fsspec"}
    script = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not heavy & set(done.stdout.split())
