"""Jobs look at the paths that they are given before Ray, MLflow or torch is loaded: it takes long.

Each job runs in a process in which these cannot be imported at all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ddpm_ray.cli.job import DONE, WRONG_CONFIG
from tests.limits import ENDS_S

ROOT = Path(__file__).parents[1]
LONG = "n" * 300  # refused by the file system, as what a user may not read; root reads all
WITHOUT = """
import runpy, sys
sys.modules.update(dict.fromkeys(sys.argv[1].split(",")))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(folder: Path, without: str, job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "jobs" / job)
    command = [sys.executable, "-c", WITHOUT, without, script, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=ENDS_S
    )


@pytest.mark.parametrize(
    "job, arguments, code, says",
    [
        (
            "pack_shards.py",
            ("none", "out"),
            WRONG_CONFIG,
            "source is {}/none: there is no such fil",
        ),
        (
            "pack_shards.py",
            (LONG, "out"),
            WRONG_CONFIG,
            f"source is {{}}/{LONG}: it cannot be read (File name too long); give a folder of",
        ),
        ("sample.py", ("none", "--out", "a.png"), WRONG_CONFIG, "{}/none: there is no such folder"),
        ("sample.py", ("models:/", "--out", "a.png"), WRONG_CONFIG, "models:/ lacks a name; write"),
        ("export.py", ("none", "--out", "b"), WRONG_CONFIG, "{}/none: there is no such folder"),
        ("evaluate.py", ("none",), WRONG_CONFIG, "{}/none: there is no such folder"),
        ("average.py", ("none",), WRONG_CONFIG, "{}/none: there is no such folder"),
        ("average.py", (".", "--out", "file/b"), WRONG_CONFIG, "--out is file/b, but {}/file is a"),
        (
            "edit.py",
            (".", "a.png", "--mask", "file", "--out", "b.png"),
            WRONG_CONFIG,
            "image is a.png: there is no such file",
        ),
        (
            "edit.py",
            (".", "file", "--mask", "a.png", "--out", "b.png"),
            WRONG_CONFIG,
            "--mask is a.png: there is no such file",
        ),
        (
            "encode.py",
            ("none", ".", "out"),
            WRONG_CONFIG,
            "model is {}/none: there is no such folder",
        ),
        ("encode.py", (".", "none", "out"), WRONG_CONFIG, "data is {}/none: there is no such fold"),
        (
            "tokenize_captions.py",
            ("none", "--out", "t.json"),
            WRONG_CONFIG,
            "data is {}/none: there is no such folder; pack it with jobs/pack_shards.py",
        ),
        (
            "tokenize_captions.py",
            (".", "--out", "t.txt"),
            WRONG_CONFIG,
            "--out is t.txt; end it in one of .json",
        ),
        (
            "tokenize_captions.py",
            (LONG, "--out", "t.json"),
            WRONG_CONFIG,
            f"data is {{}}/{LONG}: it cannot be read (File name too long); pack it with jobs/pack_",
        ),
        ("train.py", ("none.yaml",), WRONG_CONFIG, "none.yaml: no such file"),
        ("train.py", ("cifar10",), WRONG_CONFIG, "data.url is {}/data/cifar10: there is no such"),
        (
            "train.py",
            ("digits", "evaluation.held_out_url=none"),
            WRONG_CONFIG,
            "evaluation.held_out_url is {}/none: there is no such folder; pack images there with",
        ),
        (
            "train.py",
            ("digits", "embedding.encoder=.", "embedding.url=none", "model.num_classes=0"),
            WRONG_CONFIG,
            "embedding.url is {}/none: there is no such folder; encode the images there with",
        ),
    ],
)
def test_a_wrong_path_is_reported_before_anything_heavy_is_loaded(
    job: str, arguments: tuple[str, ...], code: int, says: str, tmp_path: Path
) -> None:
    """On commit d926ba0 all of Ray, MLflow and torch came first: half a minute under load."""
    (tmp_path / "file").touch()
    ended = run(tmp_path, "ray,mlflow,torch", job, *arguments)
    assert ended.stderr.startswith(f"error: {says.format(tmp_path)}"), ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.returncode == code


def test_a_set_of_one_shard_is_packed_without_ray_and_torch(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8)).save(tmp_path / "pictures" / name)
    ended = run(tmp_path, "ray,mlflow,torch", "pack_shards.py", "pictures", "packed")
    assert ended.returncode == DONE, ended.stderr
    assert json.loads(ended.stdout)["samples"] == 2
