"""The pages tell the truth: their paths, targets, links, keys and commands exist today."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpm_ray.cli.job import CONFIG
from ddpm_ray.config import loading
from ddpm_ray.config.reading.former_keys import former_keys
from ddpm_ray.jobs.command import JOBS

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "docs/cluster.md",
    "docs/gpu.md",
    "docs/latents.md",
    "docs/text.md",
    "docs/packing.md",
    "docs/toolbox.md",
    "docs/results.md",
    "docs/speed.md",
]
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml"))
HOSTS = {"127.0.0.1", "arxiv.org", "github.com", "mlflow.example.com"}

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
PATH = re.compile(r"(?<![\w:/.~<>-])(?:\.?[\w-]+/)+[\w.-]*|\b\w+\.(?:py|md|toml|txt|yaml)\b")
OUTPUTS = re.compile(r"(data|runs)/\w*|\.venv")  # what commands leave behind
METRICS = re.compile(r"(train|val|eval)/\w*")
SIZES = re.compile(r"(S|B|L|XL)/\d")  # of a DiT


def text_of(page: str) -> str:
    """A Markdown page, or the opening comment of a config file as one block of code."""
    text = (ROOT / page).read_text()
    if page.endswith(".md"):
        return text
    opening = re.match(r"(?:#.*\n)*", text)
    assert opening
    return f"```sh\n{re.sub('^# ?', '', opening[0], flags=re.MULTILINE)}```\n"


def blocks(text: str) -> Iterator[tuple[str, str]]:
    yield from ((match[1], match[2]) for match in BLOCK.finditer(text))


def spans(text: str) -> Iterator[str]:
    yield from SPAN.findall(BLOCK.sub("", text))


def exists(path: str) -> bool:
    """True for a path from the root or package, a module's name, an output, a metric or a size."""
    if any(pattern.fullmatch(path) for pattern in (OUTPUTS, METRICS, SIZES)):
        return True
    if (ROOT / path).exists() or (ROOT / "ddpm_ray" / path).exists():
        return True
    return "/" not in path and any((ROOT / "ddpm_ray").rglob(path))


def tree_paths(block: str) -> Iterator[str]:
    """Full paths of a tree block: two spaces a level, the name first, folders end with a slash."""
    above: list[str] = []
    for line in filter(None, block.splitlines()):
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth:] = [name]
        yield "".join(above)


def paths(text: str) -> set[str]:
    """Every path that the page names: in code spans, commands and trees."""
    found = {path for span in spans(text) for path in PATH.findall(span)}
    for kind, block in blocks(text):
        if kind == "text":
            found.update(tree_paths(block))
        elif kind == "sh":
            found.update(
                word for word in PATH.findall(block) if word.startswith(("jobs/", "conf/"))
            )
    return found


def commands(text: str) -> Iterator[list[str]]:
    """Job and arguments of each `python jobs/...` or `ddpm-ray ...`; continued lines are joined."""
    for _, block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.search(r"python jobs/(\w+)\.py([^)]*)", line) or re.search(
                r"(?:^|-- |\()ddpm-ray ([a-z_]+)([^)]*)", line
            ):
                yield [found[1].partition("_")[0], *shlex.split(found[2], comments=True)]


def targets(text: str) -> set[str]:
    return {
        target
        for code in (*spans(text), *(block for _, block in blocks(text)))
        for target in re.findall(r"\bmake ([a-z-]+)\b", code)
    }


@pytest.mark.parametrize("page", PAGES + CONFIGS)
def test_every_path_exists(page: str) -> None:
    missing = sorted(path for path in paths(text_of(page)) if not exists(path))
    assert not missing, f"{page} names {missing}"


def test_the_tree_shows_every_module() -> None:
    shown = {path for _, block in blocks(text_of("ARCHITECTURE.md")) for path in tree_paths(block)}
    modules = {
        str(path.relative_to(ROOT))
        for folder in ("ddpm_ray", "jobs")
        for path in (ROOT / folder).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert not modules - shown


def rows_of(section: str) -> list[list[str]]:
    """The cells of each table row, headings left out, of a section of ARCHITECTURE.md."""
    text = text_of("ARCHITECTURE.md").split(f"{section}\n", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[0].strip() not in ("---", "to find", "to add")]


def test_where_is_names_files_that_exist() -> None:
    """Each row names paths from the root; a function or class after a path is in that file."""
    rows = rows_of("## 5 Where is ...?")
    assert len(rows) > 20
    for what, place in rows:
        found = [path for path in SPAN.findall(place) if re.search(r"/|\.md$", path)]
        assert found or place.startswith("nothing"), f"{what}: no path"
        assert not [path for path in found if not (ROOT / path).exists()], what
        named = re.findall(r"`(ddpm_ray/\S+\.py)`, (?:and )?`(\w+)`", place)
        assert not [name for path, name in named if name not in (ROOT / path).read_text()], what


@pytest.mark.parametrize("page", PAGES + CONFIGS)
def test_every_make_target_exists(page: str) -> None:
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets(text_of(page)) <= set(known)


@pytest.mark.parametrize("page", PAGES)
def test_no_link_is_dead(page: str) -> None:
    links = [link for link in LINK.findall(text_of(page)) if not link.startswith("http")]
    assert not [link for link in links if not ((ROOT / page).parent / link).exists()]


@pytest.mark.parametrize("page", PAGES + CONFIGS)
def test_every_command_has_a_valid_config(page: str) -> None:
    for job, *words in commands(text_of(page)):
        overrides = [word for word in words if re.match(r"[\w.]+=", word)]
        file = words[0] if CONFIG in JOBS[job].arguments else None
        there = str(ROOT / file) if file and "/" in file else file
        loading.load_config(JOBS[job].config, there, overrides)


@pytest.mark.parametrize("page", PAGES)
def test_every_key_in_the_text_exists(page: str) -> None:
    known = {key for job in JOBS.values() for key in loading.flat(job.config())}
    groups = {key.partition(".")[0] for key in known if "." in key}
    keys = [span for span in spans(text_of(page)) if re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)+", span)]
    keys = [key for key in keys if not key.endswith(".json")]  # a file
    if page == "CHANGELOG.md":  # names former keys too
        known |= {key for job in JOBS.values() for key in former_keys(job.config)}
    assert not {key for key in keys if key.partition(".")[0] in groups and not exists(key)} - known


@pytest.mark.parametrize("config", CONFIGS)
def test_every_config_opens_with_its_own_command(config: str) -> None:
    assert config in {word for words in commands(text_of(config)) for word in words}


@pytest.mark.parametrize(
    "page", [*PAGES, *CONFIGS, "Makefile", "pyproject.toml", "constraints.txt"]
)
def test_pages_name_no_machine_of_ours(page: str) -> None:
    text = (ROOT / page).read_text()
    assert set(re.findall(r"https?://([^/:\s`]+)", text)) <= HOSTS
    assert not re.findall(r"(?<![\w.:/~<>$)-])/(?!tmp\b|dev/|var/run/|N\b|T\b)\w+/[\w./-]*", text)


def test_the_changelog_begins_with_what_is_unreleased_and_dates_each_release() -> None:
    unreleased, *releases = text_of("CHANGELOG.md").split("\n## ")[1:]
    assert unreleased.startswith("Unreleased\n")
    assert releases
    for release in releases:
        heading = r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d\n.*?### (Added|Changed|Fixed|Removed)\n"
        assert re.match(heading, release, re.DOTALL)
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert releases[0].startswith(f"{version[1]} - ")


def test_the_checks_see_what_is_false() -> None:
    page = (
        "See `data/gone.py`, `schedule.num_stops`, `gone.py` and `make coffee`.\n"
        "```text\nddpm_ray/\n  models/\n    gone.py   lost\n```\n"
        "```sh\n(python jobs/train.py conf/gone.yaml \\\n    schedule.num_steps=9)\n"
        "ray job submit -- ddpm-ray train digits seed=1  # by name\n```\n"
    )
    wrong = {"data/gone.py", "gone.py", "ddpm_ray/models/gone.py", "conf/gone.yaml"}
    assert paths(page) == wrong | {"ddpm_ray/", "ddpm_ray/models/", "jobs/train.py"}
    assert not any(exists(path) for path in wrong)
    assert targets(page) == {"coffee"}
    assert list(commands(page)) == [
        ["train", "conf/gone.yaml", "schedule.num_steps=9"],
        ["train", "digits", "seed=1"],
    ]
