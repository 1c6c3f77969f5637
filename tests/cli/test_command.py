"""The command `ddpm-ray`, and the package as a wheel installs it: without the repository."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddpm_ray.cli.job import CONFIG, DONE, WRONG_CONFIG
from ddpm_ray.config.reading.errors import ConfigError
from ddpm_ray.config.reading.shipped import config_file, shipped_names
from ddpm_ray.config.run import RunConfig
from ddpm_ray.jobs.command import JOBS, MODULES, main
from ddpm_ray.jobs.model_argument import MODEL_URI
from tests.limits import ENDS_S

ROOT = Path(__file__).parents[2]
SCRIPTS = {path.stem: path for path in (ROOT / "jobs").glob("*.py")}


def command(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["ddpm-ray", *words])
    return main()


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_the_command_lists_each_job_on_one_line(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *words) == DONE
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in lines] == list(JOBS)
    assert max(map(len, lines)) <= 100


def test_each_script_is_a_job_and_each_job_has_a_script() -> None:
    found = {name.partition("_")[0]: path.read_text() for name, path in SCRIPTS.items()}
    assert found.keys() == JOBS.keys()
    for module in MODULES:
        assert f"from {module.__name__} import JOB\n" in found[module.JOB.name]


INTERRUPTED = """
import os, runpy, signal, sys
class Interrupt:
    def find_spec(self, name, path, target=None):
        if name == "ddpm_ray.config.loading":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv = sys.argv[1:]
if sys.argv[0] == "command":
    from ddpm_ray.jobs.entry import start
    start()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", ["command", *map(str, SCRIPTS.values())])
def test_ctrl_c_while_modules_are_imported_is_one_line(script: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, script, "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=ENDS_S,
    )
    assert ended.stderr == "interrupted\n"
    assert ended.returncode == 130


@pytest.mark.parametrize("name", JOBS)
def test_the_help_says_where_options_are_set(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a file only where the job takes one; names of shipped configs are not broken."""
    with pytest.raises(SystemExit, match=r"0|None"):
        command(monkeypatch, name, "--help")
    text = capsys.readouterr().out
    takes_file = CONFIG in JOBS[name].arguments
    assert ("as key=value or in CONFIG;" in text) is takes_file
    assert "YAML file" in text or not takes_file
    if name == "train":
        assert "mnist-classifier," in text
    if MODEL_URI in JOBS[name].arguments:
        assert "folder that diffusers saved" in " ".join(text.split())


@pytest.mark.parametrize("name", JOBS)
def test_the_description_of_a_job_shows_both_of_its_commands(name: str) -> None:
    lines = JOBS[name].description.splitlines()
    script = next(path for stem, path in SCRIPTS.items() if stem.partition("_")[0] == name)
    assert any(line.startswith(f"    ddpm-ray {name} ") for line in lines)
    assert any(line.startswith(f"    python jobs/{script.name} ") for line in lines)


@pytest.mark.parametrize(
    "words, says",
    [
        (("trian", "digits"), "no job is called 'trian'; did you mean train?"),
        (("xyzzy",), "no job is called 'xyzzy'; there are pack, tokenize, encode, "),
        (("train",), "the following arguments are required: CONFIG"),
        (("train", "digit"), "digit: no such file, and no such config is shipped; there are: "),
        (("train", "digit"), "; did you mean digits?"),
        (("train", "quick"), "`ddpm-ray sweep` ships it"),
        (("sweep", "conf/train/digits.yaml"), "run `ddpm-ray train conf/train/digits.yaml`"),
    ],
)
def test_a_wrong_command_is_one_line_with_the_remedy(
    words: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    assert command(monkeypatch, *words) == WRONG_CONFIG
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_each_config_is_found_by_its_name() -> None:
    for name, job in JOBS.items():
        if CONFIG in job.arguments:
            files = sorted((ROOT / "conf" / name).glob("*.yaml"))
            assert shipped_names(job.config) == sorted(file.stem for file in files)
            for file in files:
                assert config_file(job.config, file.stem).samefile(file)


def test_a_file_wins_over_a_shipped_name_and_a_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert config_file(RunConfig, "digits").samefile(ROOT / "conf/train/digits.yaml")
    (tmp_path / "mnist").write_text("name: mine\n")
    assert config_file(RunConfig, "mnist") == Path("mnist")
    with pytest.raises(ConfigError, match=r"^\.\./digits: no such file; here are: "):
        config_file(RunConfig, "../digits")  # a path, whatever its last part is


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel, and with the libraries of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "ddpm_ray", source / "ddpm_ray", symlinks=True)
    shutil.copytree(ROOT / "conf", source / "conf")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    outside: dict[str, Any] = {
        "cwd": folder,
        "env": environment(),
    }  # else pip takes ROOT for an installation
    subprocess.run([*build, str(source)], check=True, capture_output=True, **outside)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    python = folder / "env/bin/python"
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-compile", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, **outside)
    here = sysconfig.get_path("purelib")
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(f"{here}\n")  # nothing of its .pth files: not ddpm_ray
    return python.parent


def environment() -> dict[str, str]:
    """The variables of this process without those that name its packages."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}


def run(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    command = list(map(str, words))
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=ENDS_S
    )


def test_the_wheel_holds_the_package_alone(installed: Path, tmp_path: Path) -> None:
    (site,) = (installed.parent / "lib").glob("python*/site-packages")
    assert {path.name for path in site.iterdir() if path.suffix != ".pth"} == {
        "ddpm_ray",
        f"ddpm_ray-{version()}.dist-info",
    }
    found = run(tmp_path, installed / "python", "-c", "import ddpm_ray; print(ddpm_ray.__file__)")
    assert found.stdout.strip() == str(site / "ddpm_ray/__init__.py")
    copies = sorted(str(path.relative_to(site)) for path in site.rglob("*.yaml"))
    assert copies == sorted(f"ddpm_ray/{p.relative_to(ROOT)}" for p in ROOT.glob("conf/*/*.yaml"))


def version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def test_the_installed_command_works_in_any_folder(installed: Path, tmp_path: Path) -> None:
    listed = run(tmp_path, installed / "ddpm-ray", "--help")
    assert (listed.returncode, listed.stderr) == (DONE, "")
    assert "\n  train     Train a diffusion model" in listed.stdout
    assert run(tmp_path, installed / "ddpm-ray", "--version").stdout == f"ddpm-ray {version()}\n"
    shown = run(tmp_path, installed / "ddpm-ray", "train", "digits", "--print-config", "seed=7")
    assert (shown.returncode, shown.stderr) == (DONE, "")
    assert "name: digits\n" in shown.stdout
    assert "seed: 7\n" in shown.stdout
    swept = run(tmp_path, installed / "ddpm-ray", "sweep", "quick", "--print-config")
    assert (swept.returncode, swept.stderr) == (DONE, "")
    assert "url: data/digits\n" in swept.stdout  # of run_from: digits
    wrong = run(tmp_path, installed / "ddpm-ray", "train", "digits", "sed=7")
    assert (wrong.returncode, wrong.stdout) == (WRONG_CONFIG, "")
    assert wrong.stderr == "error: command line: sed=7: no such key; did you mean seed?\n"


def test_the_installed_command_and_the_script_say_the_same(installed: Path, tmp_path: Path) -> None:
    by_command = run(tmp_path, installed / "ddpm-ray", "train", "--help")
    by_script = run(tmp_path, installed / "python", ROOT / "jobs/train.py", "--help")
    assert (by_command.returncode, by_script.returncode) == (DONE, DONE)
    usage, _, rest = by_command.stdout.partition("\n\n")
    assert usage.startswith("usage: ddpm-ray train ")
    assert by_script.stdout.partition("\n\n")[2] == rest


def test_the_installed_command_packs(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8)).save(tmp_path / "pictures" / name)
    packed = run(tmp_path, installed / "ddpm-ray", "pack", "pictures", "packed")
    assert packed.returncode == DONE, packed.stderr
    assert json.loads(packed.stdout)["samples"] == 2
