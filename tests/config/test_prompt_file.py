"""A file of prompts is checked line by line, and most of a long one is not kept."""

import hashlib
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.config.caption_rule import cleaned
from ddpm_ray.config.loading import ConfigError
from ddpm_ray.config.reading.prompt_file import PromptFile, read_prompt_file

TEXTS = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=20)
LINES = st.lists(TEXTS.map(cleaned).filter(lambda text: text.strip("\ufeff")), min_size=1)


def read(folder: Path, data: bytes, most: int = 10) -> PromptFile:
    (folder / "p.txt").write_bytes(data)
    return read_prompt_file("prompts_file", str(folder / "p.txt"), most)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prompts")


@given(LINES, st.integers(1, 5), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_each_line_is_a_prompt(
    folder: Path, lines: list[str], most: int, end: str, marked: bool, closed: bool
) -> None:
    """With the ends of either system, a byte order mark or none, a last line end or none."""
    data = (end.join(lines) + end * closed).encode("utf-8-sig" if marked else "utf-8")
    found = read(folder, data, most)
    assert found.prompts == tuple(line.removeprefix("\ufeff") for line in lines[:most])
    assert found.lines == len(lines)
    assert found.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "p.txt, which is empty; write one prompt a line"),
        (b"a\n\nb\n \n", "line 2: it is blank; write a prompt, or remove the line; line 4: it is"),
        (b"a\nb\x07\n", r"line 2: the prompt holds the control character U\+0007"),
        (b"a\n\xff\n", "line 2: it is not UTF-8; save the file as UTF-8"),
        (b"a\n" + b"b" * 5000, "line 2: the prompt has 5000 bytes of UTF-8; shorten it"),
        (b"a\n" + b"b" * 10**6 + b"\nc\n\n", "line 2: it has 12294 bytes or more; shorten it.*s$"),
        (b"\n" * 9, r"line 5: .* \(the first of them; there may be more\)"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=reason):
        read(tmp_path, data, 1)


def test_a_folder_is_no_file_of_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"which cannot be read \(Is a directory\)"):
        read_prompt_file("prompts_file", str(tmp_path), 3)


def test_of_a_long_file_only_the_prompts_of_images_are_held(tmp_path: Path) -> None:
    """20,000 lines of 100 bytes are read in less than 200 kB."""
    line = "x" * 99 + "\n"
    (tmp_path / "p.txt").write_text(line * 20_000)
    tracemalloc.start()
    try:
        found = read_prompt_file("prompts_file", str(tmp_path / "p.txt"), 64)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.lines == 20_000
    assert len(found.prompts) == 64
    assert peak < 200_000
