"""What an earlier version of a config was given or saved means the same under the names of today.

`Before` is a tree of options as an earlier version had it, `Now` the same one renamed in all ways:
keys, a group, keys that moved into, out of and between groups, choices, one key that became two.
"""

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ddpm_ray.cli.help_text import explained, option_overview
from ddpm_ray.config import loading
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.config.option_fields import arguments, group, option
from ddpm_ray.config.reading.former_keys import Former, require_new_names
from tests.config.test_options import KINDS


class Whole:
    def problems(self) -> Iterator[str]:
        yield from ()


@dataclass(frozen=True)
class ModelBefore:
    kind: Literal["unet", "classifier"] = option("unet", "a")
    width: int = option(8, "b", at_least=1)
    note: str = option("", "c")


@dataclass(frozen=True)
class LeadBefore:
    weak: str = option("", "d")
    form: Literal["score", "mean"] = option("score", "e")
    forms: tuple[str, ...] = option((), "f")


@dataclass(frozen=True)
class Before(Whole):
    film: str = option("", "g")
    rate: float = option(0.5, "h", at_least=0)
    seed: int = option(0, "i", defines_run=True)
    model: ModelBefore = group(ModelBefore)
    lead: LeadBefore = group(LeadBefore)


@dataclass(frozen=True)
class Network:
    architecture: Literal["unet", "half_unet"] = option(
        "unet", "a", formerly=Former("model.kind", {"classifier": "half_unet"})
    )
    base_width: int = option(8, "b", at_least=1, formerly=("wide", "model.width"))
    remark: str = option("", "c", formerly="model.note")


@dataclass(frozen=True)
class Guidance:
    weak_model: str = option("", "d", formerly="weak")
    form: Literal["gradient", "mean"] = option(
        "gradient", "e", formerly=Former(choices={"score": "gradient"})
    )
    forms: tuple[str, ...] = option((), "f", formerly=Former(choices={"score": "gradient"}))
    learning_rate: float = option(0.5, "h", at_least=0, formerly=".rate")


@dataclass(frozen=True)
class Now(Whole):
    task: Literal["denoiser", "classifier"] = option(
        "denoiser", "a", formerly=Former("model.kind", {"unet": "denoiser"})
    )
    gif: str = option("", "g", formerly="film")
    seed: int = option(0, "i", defines_run=True)
    network: Network = group(Network)
    guidance: Guidance = group(Guidance, formerly="lead")


@dataclass(frozen=True)
class ManyBefore(Whole):
    space: tuple[dict[str, Any], ...] = option((), "s", keys_of="run")
    run_from: str = option("", "r", loads_group="run")
    run: Before = group(Before, whole_config=True)


@dataclass(frozen=True)
class Many(Whole):
    space: tuple[dict[str, Any], ...] = option((), "s", keys_of="run")
    base: str = option("", "r", loads_group="run", formerly="run_from")
    run: Now = group(Now, whole_config=True)


NEW_NAMES = {
    "film": "gif",
    "rate": "guidance.learning_rate",
    "seed": "seed",
    "model.width": "network.base_width",
    "model.note": "network.remark",
    "lead.weak": "guidance.weak_model",
    "lead.form": "guidance.form",
    "lead.forms": "guidance.forms",
}
TEXTS = st.sampled_from(["", "2026_11_28", "007", "1e3", "on", "a b", "${model.note}x", "${seed}"])
NAMES = st.sampled_from(["score", "gradient", "mean", "1e3"])
VALUES = st.fixed_dictionaries(
    {},
    optional={
        "film": TEXTS,
        "rate": st.floats(0, 9),
        "seed": st.integers(0, 9),
        "model.width": st.integers(1, 9),
        "model.note": st.sampled_from(["", "007", "1_0", "on"]),
        "model.kind": st.sampled_from(["unet", "classifier"]),
        "lead.weak": TEXTS,
        "lead.form": st.sampled_from(["score", "mean"]),
        "lead.forms": st.lists(NAMES, max_size=3),
    },
)


def expected(before: Any) -> Now:
    """What a config of the earlier version means, written down independently."""
    lead, model = before.lead, before.model
    return Now(
        task="denoiser" if model.kind == "unet" else "classifier",
        gif=before.film,
        seed=before.seed,
        network=Network("unet" if model.kind == "unet" else "half_unet", model.width, model.note),
        guidance=Guidance(
            lead.weak,
            "gradient" if lead.form == "score" else "mean",
            tuple("gradient" if form == "score" else form for form in lead.forms),
            before.rate,
        ),
    )


def nested(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        head, _, rest = key.rpartition(".")
        (tree.setdefault(head, {}) if head else tree)[rest] = value
    return tree


def plain(text: Any) -> str:
    """A value as a person types it in YAML: texts without quotes."""
    if isinstance(text, list):
        return f"[{', '.join(map(plain, text))}]"
    return text if isinstance(text, str) and text else json.dumps(text)


def file_text(values: dict[str, Any], dotted: bool) -> str:
    lines = []
    for head, value in (values if dotted else nested(values)).items():
        if isinstance(value, dict):
            lines += [f"{head}:", *(f"  {key}: {plain(inner)}" for key, inner in value.items())]
        else:
            lines.append(f"{head}: {plain(value)}")
    return "\n".join(lines) or "{}"


@contextlib.contextmanager
def written(text: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.yaml")
        path.write_text(text)
        yield str(path)


def references(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """`values` with every ${key} by these names."""
    return {
        key: value.replace("${model.note}", f"${{{names.get('model.note', 'model.note')}}}")
        if isinstance(value, str)
        else value
        for key, value in values.items()
    }


@settings(max_examples=40)
@given(VALUES, st.sets(st.sampled_from(sorted(NEW_NAMES))), st.booleans())
def test_any_mixture_of_old_and_new_names_is_read_alike_on_every_road(
    values: dict[str, Any], renamed: set[str], dotted: bool
) -> None:
    with written(file_text(values, dotted)) as path:
        meant = expected(loading.load_config(Before, path, []))
    names = {key: NEW_NAMES[key] for key in renamed}
    mixed = {names.get(key, key): value for key, value in references(values, names).items()}
    with written(file_text(mixed, dotted)) as path:
        assert loading.load_config(Now, path, []) == meant
        with written(f"run_from: {path}") as sweep:
            if "${" not in str(mixed):  # a reference counts from the whole config, the sweep's
                assert loading.load_config(Many, sweep, []).run == meant
    typed = [f"{key}={plain(value)}" for key, value in mixed.items()]
    assert loading.load_config(Now, None, typed) == meant
    assert loading.with_values(Now(), mixed, "trial 1") == meant
    current = {NEW_NAMES.get(key, key) for key in values} - {"model.kind"}
    split = {"task", "network.architecture"} if "model.kind" in values else set()
    assert loading.given_keys(Now, typed) == current | split


@settings(max_examples=30)
@given(VALUES, st.booleans())
def test_what_an_earlier_version_saved_is_read_and_saved_by_the_new_names_alone(
    values: dict[str, Any], many: bool
) -> None:
    saved: Any = loading.with_values(Before(), values, "a")
    meant: Any = expected(saved)
    saved, meant = (ManyBefore(run=saved), Many(run=meant)) if many else (saved, meant)
    kind: Any = type(meant)
    read = loading.from_dict(kind, json.loads(json.dumps(loading.to_dict(saved))))
    assert read == meant
    assert loading.from_dict(kind, json.loads(json.dumps(loading.to_dict(read)))) == read
    assert set(loading.flat(read)) == set(loading.flat(kind()))
    with written(loading.to_yaml(saved)) as path:  # the YAML that MLflow keeps of a run
        assert loading.load_config(kind, path, []) == meant
    with written(loading.to_yaml(read)) as path:
        assert loading.load_config(kind, path, []) == meant


SPACE = [
    {"lead.form": ["score", "mean"], "model.width": {"low": 1, "high": 4}},
    {"film": ["a", "score"], "seed": [0, 1]},
]
SPACE_NOW = (
    {"guidance.form": ["gradient", "mean"], "network.base_width": {"low": 1, "high": 4}},
    {"gif": ["a", "score"], "seed": [0, 1]},
)


def test_the_keys_and_choices_of_a_space_are_those_of_the_run() -> None:
    """In the same order: a grid tries them in it."""
    for many in (
        loading.from_dict(Many, {"space": SPACE}),
        loading.load_config(Many, None, [f"space={json.dumps(SPACE)}"]),
    ):
        assert many.space == SPACE_NOW
        assert [list(branch) for branch in many.space] == [list(branch) for branch in SPACE_NOW]
    values = {"lead.form": "score", "model.kind": "classifier"}  # of a trial
    assert loading.current_values(Now, values) == {
        "guidance.form": "gradient",
        "task": "classifier",
        "network.architecture": "half_unet",
    }


@pytest.mark.parametrize(
    "file, typed, says",
    [
        ("film: a\ngif: b", [], r"a\.yaml: film and gif are names of one option; give gif alone"),
        (
            "lead: {weak: a}\nguidance: {weak_model: a}",
            [],
            r"a\.yaml: lead\.weak and guidance\.weak_model are names of one option; "
            r"give guidance\.weak_model alone",
        ),
        ("lead.weak: a\nlead: {weak_model: b}", [], r"lead\.weak and lead\.weak_model are names"),
        ("{}", ["gif=a", "film=b"], "command line: gif and film are names of one option; give gif"),
        ("{}", ["model.kind=unet", "task=denoiser"], "model.kind and task are names of one option"),
        ("film: a\nfilm: b", [], "a.yaml: .*film"),
        ("rate: -1", [], r"a\.yaml: guidance\.learning_rate is -1\.0; it must be at least 0"),
        ("{}", ["model.kind=vae"], r"command line: task='vae': .*\n.*network\.architecture='vae'"),
        ("{}", ["lead=3"], "guidance=3: a group of keys, not a value; set guidance.<key>"),
        ("{}", ["lead.waek=a"], r"lead\.waek='a': no such key; did you mean guidance\.weak_model"),
        ("{}", ["modle.note=a"], r"modle\.note='a': no such key; did you mean network\.remark"),
    ],
)
def test_what_is_wrong_is_reported_by_the_new_name(file: str, typed: list[str], says: str) -> None:
    with written(file) as path, pytest.raises(ConfigError, match=says) as refused:
        loading.load_config(Now, path, typed)
    assert len(str(refused.value).splitlines()) == 1 + ("vae" in says)


@pytest.mark.parametrize(
    "space, says",
    [
        ("[{film: [a], gif: [b]}]", "space: film and gif are names of one option; give gif alone"),
        ("[{model.kind: [unet]}]", "space: model.kind is now task and network.architecture; give"),
    ],
)
def test_a_space_that_cannot_be_translated_is_refused(space: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"^command line: {says}"):
        loading.load_config(Many, None, [f"space={space}"])
    with pytest.raises(ConfigError, match=rf"^a saved config is not understood \({says}"):
        loading.from_dict(Many, {"space": OmegaConf.to_object(OmegaConf.create(space))})


@pytest.mark.parametrize("inner", ["film", "gif"])
@pytest.mark.parametrize("outer", ["film", "gif"])
def test_the_command_line_wins_over_the_file_by_either_name(inner: str, outer: str) -> None:
    with written(f"{inner}: inner") as path:
        assert loading.load_config(Now, path, [f"{outer}=outer"]).gif == "outer"
        assert loading.load_config(Now, path, [f"{outer}=first", f"{outer}=last"]).gif == "last"
        with written(f"run_from: {path}\nrun: {{{outer}: own}}") as sweep:
            assert loading.load_config(Many, sweep, []).run.gif == "own"


def test_a_group_on_the_command_line_is_read_by_either_name() -> None:
    for name in ("lead", "guidance"):
        found = loading.load_config(Now, None, [f"{name}={{weak: 007, form: score}}"]).guidance
        assert (found.weak_model, found.form) == ("007", "gradient")
    assert loading.load_config(Now, None, ["model={note: 1e3, kind: unet}"]).network.remark == "1e3"
    assert loading.load_config(Now, None, ["network.wide=3"]).network.base_width == 3


def test_a_reference_within_a_group_that_is_no_more_leads_to_the_same_option() -> None:
    with written(
        "model: {note: x, width: 3}\nlead: {weak: '${..model.note}', forms: ['${..weak}']}"
        "\nfilm: '${.model.note}'"
    ) as path:
        found = loading.load_config(Now, path, [])
    assert (found.guidance.weak_model, found.guidance.forms, found.gif) == ("x", ("x",), "x")


def test_help_and_the_whole_config_show_the_new_names_alone() -> None:
    shown = "\n".join([option_overview(Many), explained(Many, "run"), loading.to_yaml(Many())])
    assert not [
        name
        for name in ("film", "lead", "weak:", "wide", "kind", "run_from", "score")
        if name in shown
    ]


def test_a_saved_config_with_both_names_was_edited() -> None:
    with pytest.raises(ConfigError, match=r"film and gif are names of one .*: it was edited"):
        loading.from_dict(Now, {"film": "a", "gif": "b"})


def test_a_keyword_argument_is_taken_by_its_former_name() -> None:
    assert arguments(Network, {"wide": 3, "base_width": None}) == {"base_width": 3}
    assert arguments(Guidance, {"form": "score"}) == {"form": "gradient"}
    with pytest.raises(TypeError, match="wide and base_width are names of one option; give base_"):
        arguments(Network, {"wide": 3, "base_width": 4})


def test_runs_are_compared_by_the_names_of_today() -> None:
    saved = loading.to_dict(Before(seed=3))
    assert loading.defining(loading.from_dict(Now, saved)) == {"seed": 3}


@pytest.mark.parametrize("kind", [*KINDS.values(), Now, Many])
def test_no_former_key_is_the_name_of_another_option(kind: type[Any]) -> None:
    """Else a config of an earlier version would be read as something else, in silence."""
    require_new_names(kind)


def test_a_former_key_that_is_used_again_is_caught() -> None:
    reused = dataclasses.make_dataclass(
        "Reused", [("a", int, option(0, "a")), ("b", int, option(0, "b", formerly="a"))]
    )
    with pytest.raises(ValueError, match="Reused: a cannot be a former key too"):
        require_new_names(reused)
