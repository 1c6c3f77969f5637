"""`jobs/edit.py` from files to a file: what is black in the mask stays, and errors are one line."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from ddpm_ray.assembly import training_run
from ddpm_ray.config.jobs.edit import EditConfig
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.sampling import image_grid
from ddpm_ray.training.checkpoints import CheckpointStore
from tests.fixtures.job_script import run_job
from tests.training.test_hostile_checkpoints import TINY

PIXELS = np.random.default_rng(3).integers(0, 256, (8, 8), dtype=np.uint8)
WHITE = np.arange(64).reshape(8, 8) % 8 > 4  # what is to be painted
Edit = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run's folder with an untrained network for 8 x 8 grey images, T = 9."""
    config = load_config(RunConfig, None, [*TINY])
    facts = {"config": to_dict(config), "image_shape": [8, 8, 1], "data_fingerprint": "f"}
    state = training_run.training_state(config, ImageShape(8, 8, 1), torch.device("cpu"), facts)
    folder = tmp_path_factory.mktemp("run")
    CheckpointStore(str(folder / "checkpoints")).save(state.snapshot([]))
    return str(folder)


@pytest.fixture
def edit(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Edit:
    """The job on image.png, in a folder with pictures: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    saved("image.png", PIXELS)
    saved("mask.png", WHITE * np.uint8(255))
    saved("wide.png", np.tile(PIXELS, (1, 2)))
    saved("small.png", PIXELS[:4, :4])

    def run(*arguments: str, image: str = "image.png") -> tuple[int, str, str]:
        words = [model, image, "--out", "out.png", "sampling.steps=3", *arguments]
        return run_job("edit.py", words, monkeypatch, capsys)

    return run


def saved(file: str, pixels: npt.NDArray[np.uint8]) -> None:
    Image.fromarray(pixels).save(file)


def shown(file: str = "out.png") -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("method", ["repaint", "replacement"])
def test_what_is_white_in_the_mask_is_painted_and_what_is_black_stays(
    method: str, edit: Edit, model: str
) -> None:
    code, out, _ = edit("--mask", "mask.png", f"method={method}", "resamples=2", "jump_length=1")
    assert code == 0
    assert shown().shape == (8, 8)
    assert np.array_equal(shown()[~WHITE], PIXELS[~WHITE])
    assert (shown()[WHITE] != PIXELS[WHITE]).mean() > 0.8
    reported = json.loads(out.splitlines()[-1])
    assert reported["picture"] == str(Path("out.png").absolute())
    assert reported["known_error"] == 0
    assert reported["seam"] > 0
    assert reported["seconds"] > 0
    assert reported["checkpoint"].startswith(model)
    assert (reported["step"], len(reported["weights_sha256"])) == (0, 64)


def test_the_folder_of_the_result_is_made(edit: Edit) -> None:
    code, _, err = edit("--mask", "mask.png", "resamples=1", "--out", "no/such/out.png")
    assert code == 0, err
    assert np.array_equal(shown("no/such/out.png")[~WHITE], PIXELS[~WHITE])


def test_variants_are_a_grid_of_the_images_of_one_seed(edit: Edit) -> None:
    """The first is the one that is drawn alone, and each keeps what is known."""
    assert edit("--mask", "mask.png")[0] == 0
    alone = shown()
    assert edit("--mask", "mask.png", "num_images=3", "sampling.batch_size=2")[0] == 0
    picture, gap = shown(), image_grid.GUTTER_PIXELS
    cell = 64 + gap
    assert picture.shape == (2 * cell + gap, 2 * cell + gap)
    tiles = [
        picture[gap + i * cell :, gap + j * cell :][:64:8, :64:8]
        for i, j in ((0, 0), (0, 1), (1, 0))
    ]
    assert np.abs(tiles[0].astype(int) - alone).max() <= 1  # to rounding, in another batch
    assert all(np.array_equal(tile[~WHITE], PIXELS[~WHITE]) for tile in tiles)
    assert (tiles[1][WHITE] != tiles[2][WHITE]).mean() > 0.5


def test_outpainting_adds_what_is_asked_for(edit: Edit) -> None:
    code, out, _ = edit("kind=outpaint", "top=2", "right=5", "resamples=1")
    assert code == 0
    assert shown().shape == (10, 13)
    assert np.array_equal(shown()[2:, :8], PIXELS)
    assert json.loads(out.splitlines()[-1])["known_error"] == 0


def test_an_image_larger_than_the_models_and_in_colour_becomes_what_it_knows(edit: Edit) -> None:
    colours = np.stack([PIXELS] * 3, -1)
    Image.fromarray(np.tile(colours, (2, 2, 1))).save("colour.png")
    code, out, _ = edit(
        "kind=image_to_image", "strength=0.5", "sampling.sampler=unipc", image="colour.png"
    )
    assert code == 0
    assert shown().shape == (16, 16)
    assert "known_error" not in json.loads(out.splitlines()[-1])


def test_a_transparent_mask_and_a_grey_one_are_read_as_white_from_the_middle(edit: Edit) -> None:
    """As in image editors: what is rubbed out of black is painted, or white on a layer.

    Of a grey mask 127 stays and 128 is painted.
    """
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 3] = np.where(WHITE, 0, 255)
    Image.fromarray(rgba).save("rubbed.png")
    Image.fromarray(np.where(WHITE[..., None], 255, 0).repeat(4, -1).astype(np.uint8)).save(
        "layer.png"
    )
    saved("grey.png", np.where(WHITE, 128, 127).astype(np.uint8))
    pictures = []
    for mask in ("mask.png", "rubbed.png", "grey.png", "layer.png"):
        assert edit("--mask", mask)[0] == 0
        pictures.append(shown())
    assert np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])
    assert np.array_equal(pictures[0], pictures[3])


@pytest.mark.parametrize(
    "arguments, image, says",
    [
        ([], "image.png", "--mask is missing and kind is 'inpaint'"),
        (["--mask", "mask.png", "kind=outpaint", "top=1"], "image.png", "which uses no mask"),
        (["--mask", "wide.png"], "image.png", "wide.png is 8 x 16 (height x width) and "),
        (["--mask", "none.png"], "image.png", "--mask is none.png: there is no such file"),
        (["--mask", "mask.png"], "small.png", "mask.png is 8 x 8 (height x width) and "),
        (
            ["--mask", "small.png"],
            "small.png",
            "4 x 4 (height x width); the model edits images of at least 8 x 8",
        ),
        (["--mask", "mask.png"], "words.png", "words.png: not a readable image (it is none of PNG"),
        (["--mask", "black.png"], "image.png", "black.png: dark everywhere (its largest value"),
        (["--mask", "ones.png"], "image.png", "largest value is 1 of 255), so nothing is painted"),
        (["--mask", "ones.png"], "image.png", "multiply a mask of 0 and 1 by 255"),
        (["--mask", "white.png"], "image.png", "white.png: white everywhere, so nothing of the"),
        (["--mask", "mixed.png"], "image.png", "other pixels are partly white, partly dark; save"),
        (["kind=outpaint", "top=1", "sampling.sampler=unipc"], "image.png", "repaint needs anc"),
        (
            ["kind=outpaint", "top=1", "sampling.variance=learned"],
            "image.png",
            "sampling.variance is 'learned'; repaint needs fixed_small",
        ),
        (["kind=outpaint"], "image.png", "top is 0, and so are bottom, left and right"),
        (["--mask", "mask.png", "left=2"], "image.png", "left is 2 and kind is 'inpaint'"),
        (["kind=image_to_image", "strength=0"], "image.png", "strength is 0.0; it must be above"),
        (
            ["kind=image_to_image", "strength=0.1"],
            "image.png",
            "strength is 0.1; it lies in (0, 1]",
        ),
        (["kind=outpaint", "top=1", "sampling.labels=[1]"], "image.png", "trained without labels"),
        (["kind=outpaint", "top=1", "sampling.steps=10"], "image.png", "cannot exceed"),
        (["kind=outpaint", "top=1", "--out", "out.jpg"], "image.png", "end it in .png"),
        (["kind=enlarge"], "small.png", "this model does not enlarge images; train one"),
    ],
)
def test_what_cannot_be_edited_ends_with_2_and_one_line(
    arguments: list[str], image: str, says: str, edit: Edit
) -> None:
    Path("words.png").write_text("not a picture")
    saved("black.png", np.zeros((8, 8), np.uint8))
    saved("white.png", np.full((8, 8), 255, np.uint8))
    saved("ones.png", WHITE.astype(np.uint8))
    saved("mixed.png", np.dstack([PIXELS, PIXELS, PIXELS, 255 - WHITE * np.uint8(255)]))
    code, out, err = edit(*arguments, image=image)
    assert (code, out) == (2, "")
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not Path("out.png").exists()


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["kind=outpaint", "left=-3"], "left is -3; it must be at least 0"),
        (["num_images=0"], "num_images is 0; it must be at least 1"),
        (["kind=paint"], "kind='paint'"),
    ],
)
def test_a_config_that_cannot_be_run_is_reported_by_its_key(
    overrides: list[str], says: str
) -> None:
    with pytest.raises(ConfigError, match=r"^command line: ") as refused:
        load_config(EditConfig, None, overrides)
    (line,) = str(refused.value).splitlines()
    assert says in line


def test_replacement_takes_any_sampler_and_a_variation_too() -> None:
    for given in ("method=replacement", "kind=image_to_image"):
        assert load_config(EditConfig, None, [given, "sampling.sampler=heun"]).num_images == 1
