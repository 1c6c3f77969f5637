"""Prompts of samples that are drawn from the captions of a data set."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs the extra [text]")

from ddpm_ray.assembly import prompts
from ddpm_ray.assembly.prompts import held_out_prompts, prompts_of_data
from ddpm_ray.sampling.image_grid import grid, grid_of_samples
from tests.data.captioned_sets import write_captioned

CAPTIONS = [[f"{n} a", f"{n} b"] for n in range(40)]


def test_prompts_are_captions_of_different_samples(tmp_path: Path) -> None:
    """As long as there are samples; then each is used again."""
    dataset = write_captioned(tmp_path / "set", CAPTIONS, 7)
    drawn = prompts_of_data(dataset, 40, 5)
    assert sorted(int(text.split()[0]) for text in drawn) == list(range(40))
    assert 8 <= sum(text.endswith("a") for text in drawn) <= 32  # of 40 fair draws, in 10^5 of 10^5
    twice = prompts_of_data(dataset, 80, 5)
    assert Counter(text.split()[0] for text in twice) == {str(n): 2 for n in range(40)}


def test_a_prompt_depends_on_seed_and_index(tmp_path: Path) -> None:
    """More samples begin with the same prompts; another seed has another order."""
    dataset = write_captioned(tmp_path / "set", CAPTIONS, 7)
    assert prompts_of_data(dataset, 5, 1) == prompts_of_data(dataset, 30, 1)[:5]
    assert prompts_of_data(dataset, 40, 1) != prompts_of_data(dataset, 40, 2)


def test_samples_without_a_caption_have_the_empty_prompt(tmp_path: Path) -> None:
    """They are part of the data."""
    dataset = write_captioned(tmp_path / "set", [["x"], [], ["x"]], 3)
    assert sorted(prompts_of_data(dataset, 3, 0)) == ["", "x", "x"]


def test_a_grid_has_one_row_for_each_prompt() -> None:
    """Sample i has prompt i % 2: the first row holds samples 0, 2, 4; its prompt is left of it."""
    images = np.stack([np.full((64, 64, 1), 40 * n, np.uint8) for n in range(6)])
    picture = np.asarray(grid_of_samples(images, ["dark", "a bright and very long text of words"]))
    plain = np.asarray(grid(images[[0, 2, 4, 1, 3, 5]], 3))
    height, width = plain.shape
    assert np.array_equal(picture[-height:, -width:], plain)
    assert picture[:, :-width].min() < 100  # letters on white
    assert picture.shape[1] > width + 50


def test_more_prompts_than_samples_leave_out_the_last() -> None:
    """One row for each sample."""
    images = np.zeros((2, 64, 64, 1), np.uint8)
    one, three = (grid_of_samples(images, ["a", "b", "c"][:n]) for n in (1, 3))
    assert one.height < three.height


def test_prompts_that_no_sample_has_are_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any case of letters, among all captions of all shards; the empty text is none."""
    dataset = write_captioned(tmp_path / "set", [["A cat", "a Dog"], [], ["a bird"]], 1)
    asked = ["a cat", "a DOG", "A Fish", "", "a bird"]
    assert held_out_prompts(asked, dataset) == {"A Fish"}
    assert held_out_prompts([], dataset) == frozenset()
    monkeypatch.setattr(prompts, "MOST_SAMPLES", 2)  # a larger set is not read
    assert held_out_prompts(asked, dataset) == frozenset()


def test_a_grid_marks_the_rows_of_held_out_prompts() -> None:
    """And no others; the mark comes first, so that a text that is cut keeps it."""
    images = np.zeros((2, 64, 64, 1), np.uint8)
    texts = ["a cat", "a dog " * 60]
    plain, marked = (np.asarray(grid_of_samples(images, texts, held)) for held in ((), {texts[1]}))
    spelled = np.asarray(grid_of_samples(images, [texts[0], f"[held out] {texts[1]}"]))
    assert np.array_equal(marked, spelled)
    assert not np.array_equal(marked, plain)
