"""`--help` shows each option once, in titled groups, with its choices; `--help KEY` tells all."""

import pydoc
import re
import sys
from typing import Any

import pytest

from ddpm_ray.cli.help_text import explained, option_overview, required_keys
from ddpm_ray.cli.job import WRONG_CONFIG
from ddpm_ray.config.loading import complaint, flat
from ddpm_ray.config.option_fields import walk
from ddpm_ray.config.reading.option_text import choices
from ddpm_ray.config.reading.sources import layers_of
from ddpm_ray.config.reading.structure import defaults, to_object, with_value
from ddpm_ray.config.reading.yaml_text import type_at
from ddpm_ray.jobs.command import JOBS, main
from ddpm_ray.sampling.pipeline import TrainedModel

KINDS: dict[str, type[Any]] = {name: job.config for name, job in JOBS.items()}
REQUIRED = {
    "train": {"name", "data.url"},
    "sweep": {"name", "space", "run.data.url"},
    "drill": {"faults", "run.name", "run.data.url"},
    "cascade": {"prior", "decoder"},
}
TITLE = re.compile(r"^(\S+): [A-Z].*\.$")


def entries(text: str) -> dict[str, str]:
    """Each option in a help text with its lines, joined."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        if re.match(r"  \S", line):
            key, _, rest = line.strip().partition(" ")
            name, _, default = key.partition("=")
            found[name] = f"{default} {rest}"
        elif line.startswith("   "):
            found[name] += f" {line.strip()}"
    return {name: " ".join(lines.split()) for name, lines in found.items()}


@pytest.mark.parametrize("name", KINDS)
def test_each_option_is_listed_once_under_its_titled_group(name: str) -> None:
    kind = KINDS[name]
    shown = option_overview(kind)
    if hasattr(kind(), "run"):  # the options of another job are listed by `--help run`
        assert re.search(
            r"\n  run\.\* +the options of the job train; --help run lists them; req", shown
        )
        shown = f"{shown[: shown.index('run: One training run')]}{explained(kind, 'run')}"
    listed = []
    for section in shown.split("\n\n"):
        title, *lines = section.strip().splitlines()
        match = TITLE.match(title)
        assert match, title
        keys = [line.split()[0].partition("=")[0] for line in lines if re.match(r"  \S", line)]
        assert {key.rpartition(".")[0] or "general" for key in keys} == {match[1]}
        listed += keys
    assert listed == list(flat(kind()))


@pytest.mark.parametrize("name", KINDS)
def test_a_line_fits_and_has_a_meaning(name: str) -> None:
    shown = option_overview(KINDS[name])
    assert max(map(len, shown.splitlines())) <= 100
    assert all(len(text.split()) > 2 for text in entries(shown).values())


@pytest.mark.parametrize("name", KINDS)
def test_what_has_to_be_given_is_marked(name: str) -> None:
    kind = KINDS[name]
    required = REQUIRED.get(name, set())
    assert set(required_keys(kind)) == required
    shown = entries(option_overview(kind)) | (
        entries(explained(kind, "run")) if name == "sweep" else {}
    )
    assert {key for key in shown if shown[key].startswith("required: ")} <= required
    for key in required & shown.keys():
        assert shown[key].startswith("required: ")


@pytest.mark.parametrize("name", KINDS)
def test_all_about_an_option_can_be_asked(name: str) -> None:
    """Its meaning, choices, range and default, which the command line reads as that default."""
    kind = KINDS[name]
    for key, value, meta in walk(kind()):
        first, *rest = explained(kind, key).splitlines()
        rows = entries("\n".join(rest))
        assert first == key
        assert rows["meaning"] == meta["doc"]
        allowed = choices(type_at(kind, key))
        assert rows.get("choices", "") == ", ".join(one or "empty" for one in allowed)
        limits = [limit for limit, _ in meta["limits"].values()]
        assert all(str(limit) in rows["range"] for limit in limits)
        assert ("fixed" in rows) == meta["defines_run"]
        if key not in REQUIRED.get(name, set()) and rows["default"] != "as the model was trained":
            default = "" if rows["default"] == "empty" else rows["default"]
            ((_, (given,)),) = layers_of(kind, None, [f"{key}={default}"])
            read = to_object(with_value(defaults(kind), given.key, given.value))
            assert flat(read)[key] == value


@pytest.mark.parametrize("name", KINDS)
def test_a_wrong_choice_names_the_choices_and_the_nearest(name: str) -> None:
    kind = KINDS[name]
    for key in flat(kind()):
        allowed = choices(type_at(kind, key))
        for choice in filter(None, allowed):
            line = complaint(kind, key, f"{choice}x")
            names = ", ".join(one or "''" for one in allowed)
            assert line.startswith(f"{key}='{choice}x': choose from {names}; it means: ")
            assert line.endswith(f"; did you mean {choice}?")


@pytest.mark.parametrize(
    "words, says",
    [
        (("train", "--help", "schedule.kind"), "cosine, sigmoid"),
        (("train", "--help=schedule.kind"), "cosine, sigmoid"),
        (("train", "digits", "--help", "schedule.kind=cosine"), "cosine, sigmoid"),
        (("train", "--help", "schedule"), "schedule: Noise schedule: "),
        (("sweep", "--help", "run.schedule"), "run.schedule: Noise schedule: "),
        (("sample", "runs/a", "--help", "film"), "gif\n  meaning  GIF file"),  # its former name
        (("sample", "--help", "lead"), "guidance: "),
        (("sample", "--help", "sampling.steps"), "default  as the model was trained"),
        (("train", "--help", "name"), "default  none; the option is required"),
    ],
)
def test_help_of_a_key_or_a_group(
    words: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["ddpm-ray", *words])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    shown = capsys.readouterr()
    assert says in shown.out
    assert shown.err == ""
    assert "general:" not in shown.out


@pytest.mark.parametrize(
    "key, says",
    [
        ("schedul", "did you mean schedule?"),
        ("num_steps", "did you mean schedule.num_steps?"),
        ("xyzzy", "no such key; --help lists the keys"),
        ("digits", "digits is a config; --help lists the keys"),
    ],
)
def test_help_of_an_unknown_key_names_the_nearest(
    key: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["ddpm-ray", "train", "--help", key])
    assert main() == WRONG_CONFIG
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: command line: --help {key}: no such key")
    assert shown.err.endswith(f"{says}\n")


def test_help_in_a_notebook_shows_types_without_their_limits() -> None:
    text = pydoc.plain(pydoc.render_doc(TrainedModel))
    assert "sample(self, num_images: int, *, first: int = 0, on_step: " in text
    assert "Annotated" not in text
