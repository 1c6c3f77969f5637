"""Prompts of the jobs `sample` and `edit`, from the command line to a picture."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("tokenizers", reason="needs the extra [text]")

import ddpm_ray
from ddpm_ray.sampling.image_grid import grid_of_samples
from tests.fixtures.job_script import run_job
from tests.test_sampled_as_configured import TEXT, saved_run

Job = Callable[..., tuple[int, str, str]]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    """A job in a folder with a run, an image and files of prompts: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    saved_run(tmp_path / "run", *TEXT)
    Image.new("L", (4, 4), 90).save("image.png")
    Path("prompts.txt").write_text("a dog\na cat\na bird\na fish\n")
    Path("blank.txt").write_text("a dog\n\na bird\n")
    return lambda name, *words: run_job(f"{name}.py", ["run", *words], monkeypatch, capsys)


def test_a_file_of_prompts_is_drawn_and_named_in_the_result(job: Job) -> None:
    """Image i has the prompt of line i + 1; lines beyond the images are checked only."""
    code, out, err = job("sample", "--out", "a.png", "prompts_file=prompts.txt", "num_images=3")
    assert code == 0, err
    sha256 = hashlib.sha256(Path("prompts.txt").read_bytes()).hexdigest()
    assert json.loads(out)["prompts_file"] == {"lines": 4, "sha256": sha256}
    prompts = ["a dog", "a cat", "a bird"]
    drawn = grid_of_samples(ddpm_ray.load("run").sample(3, prompts=prompts), prompts)
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(drawn))


def test_the_job_edits_from_a_text_to_a_text(job: Job) -> None:
    """As the method of the model does."""
    words = ("kind=text_diff", "from_text=a cat", "to_text=a dog", "iterations=2")
    code, out, err = job("edit", "image.png", "--out", "b.png", *words)
    assert code == 0, err
    assert "prompts_file" not in json.loads(out)
    image = np.full((1, 4, 4, 1), 90, np.uint8)
    changed = ddpm_ray.load("run").text_diff(image, "a cat", "a dog", iterations=2)
    assert np.array_equal(np.asarray(Image.open("b.png")), changed[0, ..., 0])


@pytest.mark.parametrize(
    "words, says",
    [
        (("sampling.prompts=[]",), "sampling.prompts is empty; give one or more texts, or leave"),
        (('sampling.prompts=[a,"b\\a"]',), "sampling.prompts cannot be used: prompt 2 holds"),
        (("prompts_file=none.txt",), "prompts_file is none.txt: there is no such file"),
        (("prompts_file=blank.txt",), "prompts_file is blank.txt: line 2: it is blank; write a"),
        (
            ("prompts_file=prompts.txt", "sampling.prompts=[a]"),
            "prompts_file is prompts.txt and sampling.prompts is given: give one",
        ),
    ],
)
@pytest.mark.parametrize("name", ["sample", "edit"])
def test_wrong_prompts_end_a_job_with_2(
    name: str, words: tuple[str, ...], says: str, job: Job
) -> None:
    kind = ["image.png", "kind=image_to_image"] if name == "edit" else []
    code, _, err = job(name, *kind, "--out", "a.png", *words)
    assert code == 2
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words, says",
    [
        (("from_text=a cat",), "to_text is empty, and kind is 'text_diff': describe the image aft"),
        (("to_text=a\x00",), "to_text cannot be used: the text holds the control character U+0000"),
        (("to_text=a", "num_images=2"), "num_images is 2; text_diff adds no noise, so that all"),
        (
            ("to_text=a", "sampling.prompts=[b]"),
            "sampling.prompts is given and kind is 'text_diff'; leave it out and give from_text",
        ),
        (("to_text=a", "prompts_file=prompts.txt"), "prompts_file is prompts.txt and kind is 't"),
        (("to_text=a", "kind=enlarge"), "to_text is 'a' and kind is 'enlarge', whose texts are "),
    ],
)
def test_a_wrong_text_diff_ends_with_2(words: tuple[str, ...], says: str, job: Job) -> None:
    code, _, err = job("edit", "image.png", "--out", "b.png", "kind=text_diff", *words)
    assert code == 2
    assert says in err
