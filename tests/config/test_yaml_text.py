"""Text values of a config keep the characters that were typed, in files and on command lines."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddpm_ray.config.loading import ConfigError, from_dict, load_config, to_dict, to_yaml
from ddpm_ray.config.option_fields import option
from ddpm_ray.config.run import RunConfig

WORDS = [
    "2026_11_28",
    "2026-11-28",
    "2026-11-28 10:00:00",
    "007",
    "0x1F",
    "0b11",
    "1e3",
    "1.10",
    "1.",
    "12_000",
    "1:30",
    "190:20:30",
    "on",
    "off",
    "yes",
    "No",
    "true",
    "TRUE",
    "y",
    ".inf",
    ".nan",
    "+1",
    "-0",
    "1_0.5",
    "6.8523015e+5",
]
# Numbers, times and dates in YAML's many forms, and what only resembles them.
NUMERIC = st.from_regex(r"[0-9+.][0-9a-f_.+:eExT-]{0,9}[0-9a-f]", fullmatch=True)


@dataclass(frozen=True)
class Inner:
    choice: Literal["on", "off", "1.10"] = option("off", "a choice")
    texts: tuple[str, ...] = option((), "texts in a list")


@dataclass(frozen=True)
class Outer:
    name: str = option("", "a text")
    number: float = option(0.0, "a number")
    mixed: tuple[int | str, ...] = option((), "numbers or names")
    by_name: tuple[dict[str, str], ...] = option((), "texts by name")
    inner: Inner = field(default_factory=Inner)

    def problems(self) -> Iterator[str]:
        """None."""
        yield from ()


def read(folder: Path, text: str) -> Outer:
    file = folder / "a.yaml"
    file.write_text(text)
    return load_config(Outer, str(file), [])


def require_kept(word: str, folder: Path) -> None:
    """`word` under every kind of text key, from a file and a command line, there and back."""
    wanted = Outer(word, by_name=({"a": word},), inner=Inner(texts=("a", word)))
    overrides = [f"name={word}", f"inner.texts=[a, {word}]", f"by_name=[{{a: {word}}}]"]
    text = f"name: {word}\ninner: {{texts: [a, {word}]}}\nby_name: [{{a: {word}}}]\n"
    for config in (read(folder, text), load_config(Outer, None, overrides)):
        assert config == wanted
        assert read(folder, to_yaml(config)) == config
        assert from_dict(Outer, to_dict(config)) == config


@pytest.mark.parametrize("word", WORDS)
def test_each_form_of_yaml_stays_as_it_was_typed(word: str, tmp_path: Path) -> None:
    require_kept(word, tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(NUMERIC.filter(lambda word: ": " not in word and word[-1] != ":"))
def test_whatever_resembles_a_number_stays_as_it_was_typed(tmp_path: Path, word: str) -> None:
    require_kept(word, tmp_path)


@given(
    st.text(
        st.characters(codec="utf-8", exclude_categories=["C", "Z"], exclude_characters="$"),
        min_size=1,
        max_size=12,
    )
)
def test_a_text_on_a_command_line_is_all_that_is_typed_after_the_equals_sign(text: str) -> None:
    """Where it begins as no list, quoted text or the like does in YAML."""
    if text[0] not in "'\"[{&*!|>%@`" and text not in ("~", "null", "Null", "NULL"):
        assert load_config(Outer, None, [f"name={text}"]).name == text


def test_choices_are_texts_and_numbers_stay_numbers(tmp_path: Path) -> None:
    config = read(tmp_path, "inner: {choice: on}\nnumber: 1e3\n")
    assert (config.inner.choice, config.number) == ("on", 1000.0)
    assert load_config(Outer, None, ["inner.choice=1.10"]).inner.choice == "1.10"
    assert load_config(Outer, None, ["number=1_0.5"]).number == 10.5


def test_quotes_aliases_merges_and_dotted_keys_are_yamls(tmp_path: Path) -> None:
    text = (
        "base: &b {texts: ['007', \"on\"], choice: on}\n"
        "inner: {<<: *b, choice: off}\ninner.texts: [1e3]\nname: !!str 1e3\n"
    )
    with pytest.raises(ConfigError, match=r"base.texts=\['007', 'on'\]: no such key"):
        read(tmp_path, text)
    config = read(tmp_path, "by_name: [&b {a: 007}, {<<: *b, b: on}, *b]\nname: '1e3'\n")
    assert config.by_name == ({"a": "007"}, {"a": "007", "b": "on"}, {"a": "007"})
    assert config.name == "1e3"
    assert read(tmp_path, "inner.texts: [1e3]\n").inner.texts == ("1e3",)
    assert load_config(Outer, None, ["name='1e3'"]).name == "1e3"
    assert load_config(Outer, None, ["name="]).name == ""
    assert load_config(Outer, None, ["name=x: y #z"]).name == "x: y #z"


def test_of_numbers_or_names_only_a_plain_number_is_one(tmp_path: Path) -> None:
    wanted = (7, "007", "7", "1e3", "on", "cat", -2)
    for config in (
        read(tmp_path, "mixed: [7, 007, '7', 1e3, on, cat, -2]\n"),
        load_config(Outer, None, ["mixed=[7,007,'7',1e3,on,cat,-2]"]),
    ):
        assert config.mixed == wanted
        assert read(tmp_path, to_yaml(config)) == config
        assert from_dict(Outer, to_dict(config)) == config


@pytest.mark.parametrize("name", ["2026_11_28", "007", "1e3", "on", "1.10"])
def test_a_run_is_called_what_its_file_says(name: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"name: {name}\ndata: {{url: nowhere}}\n")
    assert load_config(RunConfig, str(file), []).name == name
    assert load_config(RunConfig, str(file), [f"name={name}"]).name == name


@pytest.mark.parametrize(
    "text, says",
    [
        ("mixed: " + "[" * 60 + "]" * 60, "nested deeper than 50 levels"),
        ("mixed: " + "[" * 200_000, "nested deeper than 50 levels"),  # a crash of libyaml
        ("name: a\nmixed:\n\t- 1\n", "cannot start any token"),
        ("number: " + "1" * 5000, r"Exceeds the limit \(4300 digits\)|too large"),
        ("number: 0x" + "f" * 5000, "number holds a whole number that does not fit 64 bits"),
        ("mixed: [1, {a: " + "9" * 40 + "}]", "mixed holds a whole number that does not fit"),
        ("inner: {texts: [a]}\ninner.texts: [b]\n", "inner.texts is set twice"),
    ],
)
def test_what_cannot_be_read_is_one_line(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        read(tmp_path, text)
    assert str(refused.value).startswith(f"{tmp_path / 'a.yaml'}: ")
    assert len(str(refused.value).splitlines()) == 1
    assert len(str(refused.value)) < 6000
