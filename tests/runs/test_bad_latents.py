"""What latents, embeddings and autoencoders cannot do is refused by the jobs, in one line each."""

import dataclasses
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from ddpm_ray.assembly import training_run
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.cli.job import DONE, FAILED, WRONG_CONFIG, Job
from ddpm_ray.cli.main import main
from ddpm_ray.collectives import Workers
from ddpm_ray.config.jobs.evaluate import EvaluateConfig
from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.task import TaskTraits
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.jobs import average, edit, encode, evaluate, import_model, sample, train
from ddpm_ray.jobs import pack as pack_job
from ddpm_ray.models.autoencoder import Autoencoder
from ddpm_ray.runs.evaluation.evaluate_autoencoder import autoencoder_scores
from ddpm_ray.runs.evaluation.image_progress import ImageProgress
from ddpm_ray.runs.training_data import require_codec
from ddpm_ray.sampling.image_grid import GUTTER_PIXELS
from ddpm_ray.training.state import TrainingState
from tests.assembly.test_latent_runs import TINY, other_autoencoder
from tests.data.embedding_sets import random_embeddings, write_embeddings
from tests.data.latent_sets import commit, encode_noise, initial_run
from tests.noise import pack, pack_noise

AUTOENCODER = (
    "name=tiny",
    "task=autoencoder",
    "autoencoder.base_channels=4",
    "autoencoder.groups=2",
    "autoencoder.channel_mults=[1,2]",
    "autoencoder.blocks_per_level=1",
)
DIT = ("model.network=dit", "model.depth=1", "model.hidden_size=8", "model.heads=2")
QUICK = ("sampling.steps=2", "resamples=1", "jump_length=1")
NO_GRID = "training.grid_every_steps=0"
Said = Callable[..., tuple[int, list[str]]]


class Places(NamedTuple):
    """Folders of data sets and of runs with their weights as they begin."""

    pixels: str
    one_shard: str  # of pixels: encoded without Ray
    odd: str  # 7 x 7 pixels
    latents: str  # of `pixels`, by the autoencoder in `encoder`
    encoder: str
    other: str  # the same autoencoder but for a bit
    autoencoder: str  # a run
    of_latents: str  # a run on `latents`
    of_pixels: str
    embeddings: str  # a data set


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    root = tmp_path_factory.mktemp("places")
    url, pixels = encode_noise(root, 12), str(root / "pixels")
    pack_noise(str(root / "odd"), 12, 7)
    noise = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1)).astype(np.uint8)
    return Places(
        pixels,
        pack(root / "one-shard", noise, [3]).url,
        str(root / "odd"),
        url,
        str(root / "autoencoder"),
        other_autoencoder(root / "other"),
        begun(root / "ae", *AUTOENCODER, f"data.url={pixels}"),
        begun(root / "of-latents", *TINY, f"data.url={url}"),
        begun(root / "of-pixels", *TINY, f"data.url={pixels}"),
        write_embeddings(root / "embeddings", random_embeddings(12), 12).url,
    )


def begun(
    folder: Path, *overrides: str, change: Callable[[TrainingState], None] = lambda state: None
) -> str:
    """Write a checkpoint of a run that has not trained, changed by `change`; its folder."""
    config = load_config(RunConfig, None, list(overrides))
    state = initial_run(config)
    change(state)
    return commit(state, folder)


@pytest.fixture
def said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Said:
    """A job's exit code and the lines that it writes to stderr."""
    monkeypatch.chdir(tmp_path)

    def run(job: Job[Any], *words: str) -> tuple[int, list[str]]:
        if job is train.JOB:
            Path("run.yaml").write_text("name: new")
            words = ("run.yaml", *words)
        code = main(job, words)
        return code, capsys.readouterr().err.splitlines()

    return run


def require_line(found: tuple[int, list[str]], code: int, pattern: str) -> None:
    """The job ended with `code` and one line of an error, which matches."""
    *progress, line = found[1]
    assert not [said for said in progress if said.startswith("error")]
    assert line.startswith("error: ")
    assert re.search(pattern, line), line
    assert found[0] == code


def test_latents_are_not_trained_on_with_another_autoencoder(places: Places, said: Said) -> None:
    words = (*TINY, f"data.url={places.latents}")
    require_line(
        said(train.JOB, *words, f"data.autoencoder={places.other}"),
        FAILED,
        r"latents: these latents were encoded by the autoencoder of sha256 \w{12}, and that of "
        r".*other is \w{12}; name the one that encoded them, as in data.autoencoder=runs/ae",
    )
    require_line(
        said(train.JOB, *words, f"data.autoencoder={places.of_pixels}"),
        FAILED,
        "does not load: .*of-pixels holds a denoiser, which has no latents: name a run with",
    )


def test_latents_without_an_autoencoder_name_the_remedy(said: Said, tmp_path: Path) -> None:
    url = encode_noise(tmp_path, 12)
    run = begun(tmp_path / "run", *TINY, f"data.url={url}")
    (tmp_path / "autoencoder").rename(tmp_path / "moved")
    require_line(
        said(sample.JOB, run, "--out", "a.png"),
        FAILED,
        "the autoencoder of these latents does not load.*; name the one that encoded them, as in "
        r"autoencoder=runs/ae",
    )
    words = (*TINY, f"data.url={url}")
    says = "; name the one that encoded them, as in data.autoencoder=runs/ae"
    require_line(said(train.JOB, *words), FAILED, says)
    Path(url, "encoding.json").unlink()
    says = "is unknown, as there is no encoding.json; name its URL, as in data.autoencoder=runs/ae"
    require_line(said(train.JOB, *words), FAILED, says)


@pytest.mark.parametrize(
    "job, words",
    [
        (sample.JOB, ("--out", "a.png")),
        (edit.JOB, ("image.png", "--mask", "mask.png", "--out", "a.png")),
        (average.JOB, ()),
    ],
    ids=["sample", "edit", "average"],
)
def test_an_autoencoder_is_no_denoiser(
    job: Job[Any], words: tuple[str, ...], places: Places, said: Said
) -> None:
    save_pictures(8)
    require_line(
        said(job, places.autoencoder, *words),
        WRONG_CONFIG,
        "ae holds an autoencoder, which draws no images: train a denoiser on the latents that it",
    )


def test_a_diffusers_folder_of_an_autoencoder_is_no_denoiser(places: Places, said: Said) -> None:
    found = said(sample.JOB, places.encoder, "--out", "a.png")
    require_line(
        found, WRONG_CONFIG, "autoencoder holds an autoencoder, .*`ddpm-ray encode`.*`ddpm-ray eva"
    )


def test_a_diffusers_folder_of_an_autoencoder_is_scored(places: Places, said: Said) -> None:
    """By one worker as by the job, whose checks come first."""
    found = said(evaluate.JOB, places.encoder)
    require_line(found, WRONG_CONFIG, "data_url is empty, and the model does not name its training")
    found = said(evaluate.JOB, places.encoder, f"data_url={places.odd}")
    require_line(
        found, FAILED, r"odd: images are 7 x 7, .* multiples of 2.*; pack the images again"
    )
    found = said(evaluate.JOB, places.encoder, f"data_url={places.latents}")
    require_line(found, FAILED, "latents: the data set holds latents, not images; name the images")
    keys = [f"data_url={places.pixels}", "evaluation.num_images=6", "evaluation.features=none"]
    config = load_config(EvaluateConfig, None, keys)
    progress = ImageProgress(6, Workers(), lambda progress: None)
    scores = autoencoder_scores(places.encoder, config, Workers(), progress)
    model, dataset = trained_autoencoder(places.encoder), open_dataset(places.pixels)
    images = training_run.fixed_images(RunConfig().data, dataset, range(6), 6).images
    back = model.decode_uint8(model.encode_uint8(images.numpy()).mean)
    mse = ((images.numpy().astype(float) - back) ** 2).reshape(6, -1).mean(1)
    assert scores["metrics"]["eval/psnr"] == pytest.approx((10 * np.log10(255**2 / mse)).mean())
    weights = scores["certificate"]["model"]
    assert weights["model_sha256"] == model.sha256
    assert weights["weights"] == "diffusers"


def test_an_autoencoder_has_no_scores_of_samples(places: Places, said: Said) -> None:
    words = "evaluation.kernel_distance=false", "evaluation.reference_url=a"
    code, lines = said(evaluate.JOB, places.autoencoder, *words)
    assert code == WRONG_CONFIG
    assert "evaluation.kernel_distance is False; it belongs to scores of denoisers" in lines[-2]
    assert "evaluation.reference_url is 'a'; it belongs to scores of denoisers" in lines[-1]


@pytest.mark.parametrize(
    "job, key",
    [
        (evaluate.JOB, "evaluation.num_images"),
        (evaluate.JOB, "evaluation.memorisation_images"),
        (average.JOB, "evaluation.num_images"),
        (sample.JOB, "num_images"),
        (edit.JOB, "num_images"),
    ],
)
def test_more_images_than_there_are_random_numbers_for_are_refused(
    job: Job[Any], key: str, places: Places, said: Said
) -> None:
    words = ["a.png"] * (job is edit.JOB) + ["--out", "b.png"] * (job in (edit.JOB, sample.JOB))
    found = said(job, places.of_pixels, *words, f"{key}={10**12}")
    require_line(found, WRONG_CONFIG, f"{key} is {10**12}; it must be at most {2**32}")


@pytest.mark.parametrize("job", [encode, pack_job, import_model], ids=["encode", "pack", "import"])
def test_a_destination_that_cannot_be_written_is_refused_before_any_work(
    job: Any, places: Places, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    def works(*_: object) -> dict[str, Any]:
        raise AssertionError("the job began")

    monkeypatch.chdir(Path.cwd())
    Path("file").touch()
    sources = (places.encoder, places.pixels) if job is encode else (places.encoder,)
    quick = dataclasses.replace(job.JOB, run=works)
    for place, says in (
        ("file", "destination is file, but .*file is a file; name another folder"),
        ("file/a/b", "destination is file/a/b, but .*file is a file; name another folder"),
        ("/proc/a", r"destination is /proc/a, but nothing can be written in /proc \(.*\); name an"),
    ):
        require_line(said(quick, *sources, place), WRONG_CONFIG, says)


def test_what_needs_no_import_is_named(places: Places, said: Said) -> None:
    says = "is a run of ddpm_ray and needs no import: give it to the other jobs as it is"
    for weights in (places.of_pixels, places.autoencoder):
        require_line(said(import_model.JOB, weights, "out"), WRONG_CONFIG, says)
    found = said(import_model.JOB, "models:/a@b", "out")
    require_line(found, WRONG_CONFIG, "models:/a@b, which is a model of ddpm_ray and needs no impo")
    found = said(import_model.JOB, places.encoder, "out")
    require_line(found, FAILED, "it holds an autoencoder, .*: give it to `ddpm-ray encode`")


def test_options_that_a_job_does_not_use_are_told(
    places: Places, said: Said, caplog: pytest.LogCaptureFixture
) -> None:
    """In a line, as configs of earlier versions name them; the job goes on."""
    gone = "data.url=nothere"
    keys = "evaluation.bits_per_dim_images=8", "evaluation.likelihood_steps=9"
    said(train.JOB, *TINY, gone, *keys)
    line = (
        "not used here: evaluation.bits_per_dim_images, evaluation.likelihood_steps; give them to"
    )
    assert caplog.text.count(line) == 1
    caplog.clear()
    said(train.JOB, *AUTOENCODER, gone, "evaluation.extrapolate=true", "evaluation.num_images=600")
    assert "not used here: evaluation.extrapolate; they belong to scores of denoi" in caplog.text
    caplog.clear()
    said(evaluate.JOB, places.of_pixels, "evaluation.every_steps=7", "evaluation.features=none")
    assert "not used here: evaluation.every_steps; they are options of runs" in caplog.text
    caplog.clear()
    said(train.JOB, *TINY, gone)
    assert "not used here" not in caplog.text


@pytest.mark.parametrize("key", ["clip=true", "dynamic_quantile=0.9"])
def test_latents_are_not_clipped(key: str, places: Places, said: Said) -> None:
    says = f"sampling.{key.partition('=')[0]} is .*, but latents have no range to clip to: leave it"
    setting = f"sampling.{key}"
    found = said(train.JOB, *TINY, f"data.url={places.latents}", setting)
    require_line(found, WRONG_CONFIG, says)
    found = said(sample.JOB, places.of_latents, "--out", "a.png", setting)
    require_line(found, WRONG_CONFIG, says)


@pytest.mark.parametrize("key", ["held_out_url", "reference_url"])
def test_a_data_set_of_the_scores_that_is_not_there_is_named_before_the_run_begins(
    key: str, places: Places, said: Said
) -> None:
    found = said(train.JOB, *TINY, f"data.url={places.latents}", f"evaluation.{key}=nothere")
    require_line(found, WRONG_CONFIG, rf"evaluation\.{key} is .*nothere: ")
    assert not Path("runs").exists()
    assert not Path("mlflow.db").exists()


@pytest.mark.parametrize(
    "words, name",
    [
        (TINY, "a denoiser"),
        (("task=classifier", "model.num_classes=7", NO_GRID), "a classifier"),
        (AUTOENCODER, "an autoencoder"),
        (("task=contrastive", "text.encoder=transformer", NO_GRID), "a contrastive model"),
    ],
    ids=["denoiser", "classifier", "autoencoder", "contrastive"],
)
def test_embeddings_are_no_images_to_train_on(
    words: tuple[str, ...], name: str, places: Places, said: Said
) -> None:
    says = f"data.url is '.*embeddings', which holds embeddings, and {name} takes images: name thos"
    found = said(train.JOB, *words, f"data.url={places.embeddings}")
    require_line(found, WRONG_CONFIG, says)


def test_a_task_that_draws_embeddings_takes_nothing_else(places: Places) -> None:
    traits = TaskTraits(draws_embeddings=True, name="a prior")
    require_codec(traits, open_dataset(places.embeddings), "data.url")
    for url, held in ((places.pixels, "pixels"), (places.latents, "latents")):
        says = f"data.url is '{url}', which holds {held}, and a prior takes embeddings: encode the"
        with pytest.raises(ConfigError, match=says):
            require_codec(traits, open_dataset(url), "data.url")


def test_embeddings_are_no_reference(places: Places, said: Said) -> None:
    for key in ("held_out_url", "reference_url"):
        option = f"evaluation.{key}={places.embeddings}"
        says = f"evaluation.{key} is '.*', which holds embeddings, and .* takes images"
        found = said(train.JOB, *TINY, f"data.url={places.pixels}", option)
        require_line(found, WRONG_CONFIG, says)
        found = said(evaluate.JOB, places.of_pixels, option, "evaluation.features=digits")
        require_line(found, WRONG_CONFIG, says)
    for model in (places.of_pixels, places.autoencoder):
        words = f"data_url={places.embeddings}", "evaluation.features=digits"
        says = "data_url is '.*', which holds embeddings, and a.* takes images"
        require_line(said(evaluate.JOB, model, *words), WRONG_CONFIG, says)


def test_a_data_set_is_no_model(places: Places, said: Said) -> None:
    for url in (places.pixels, places.latents, places.embeddings):
        found = said(sample.JOB, url, "--out", "a.png")
        require_line(found, FAILED, "this is a data set and not a model; name a run's folder")


def test_a_margin_that_no_picture_has_is_refused(places: Places, said: Said) -> None:
    save_pictures(8)
    words = ("image.png", "--out", "a.png", "kind=outpaint", "right=65536")
    found = said(edit.JOB, places.of_latents, *words)
    require_line(found, WRONG_CONFIG, "right is 65536; it must be at most 65535")


def save_pictures(height: int) -> None:
    """image.png and mask.png, of `height` x 8, in the working directory."""
    Image.fromarray(np.zeros((height, 8), np.uint8)).save("image.png")
    Image.fromarray(np.tile(np.array([0, 0, 255, 255], np.uint8), (height, 2))).save("mask.png")


@pytest.mark.parametrize("words", [("--mask", "mask.png"), ("kind=outpaint", "right=3")])
def test_a_canvas_that_the_factor_does_not_divide_is_padded_and_says_so(
    words: tuple[str, ...], places: Places, said: Said, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    save_pictures(9)
    code, lines = said(
        edit.JOB, places.of_latents, "image.png", *words, "--out", "edited.png", *QUICK
    )
    assert code == DONE, lines
    width = 11 if "right=3" in words else 8
    whole = (
        f"images of 9 x {width} (height x width) are padded to 10 x {width + width % 2}, as the "
        "autoencoder's factor is 2"
    )
    assert caplog.text.count(whole) == 1
    with Image.open("edited.png") as edited:
        assert edited.size == (width, 9)


def test_an_image_that_float16_cannot_hold_is_named(
    places: Places, said: Said, tmp_path: Path
) -> None:
    def enlarge(state: TrainingState) -> None:
        assert isinstance(state.ema.model, Autoencoder)
        state.ema.model.moments_conv.get_parameter("bias").data[0] = 1e6

    run = begun(tmp_path / "large", *AUTOENCODER, f"data.url={places.pixels}", change=enlarge)
    require_line(
        said(encode.JOB, run, places.one_shard, "out"),
        FAILED,
        r"one-shard: sample 0-0: its latents exceed the range of float16 \(largest mean 1e\+06, "
        r"limit 65504\); train the autoencoder with a larger autoencoder.kl_weight, or pack the im",
    )


def test_a_strip_of_a_loaded_model_shows_its_noise_by_the_preview(
    places: Places, said: Said
) -> None:
    """The first cell is x_T: squares of one colour, 2 pixels a side, enlarged by 8."""
    words = (places.of_latents, "--out", "a.png", "num_images=2", "strip=strip.png")
    code, lines = said(sample.JOB, *words, "sampling.steps=2")
    assert code == DONE, lines
    with Image.open("strip.png") as strip:
        cell = 64 + GUTTER_PIXELS
        pixels = np.asarray(strip)[strip.height - 4 * cell :, strip.width - 3 * cell :]
    first = pixels[:64, :64]
    assert len(np.unique(first)) > 4
    assert (first == first[::16, ::16].repeat(16, axis=0).repeat(16, axis=1)).all()
    found = said(sample.JOB, *words[:3], "strip=strip.txt")
    require_line(found, WRONG_CONFIG, "strip is strip.txt; end it in one of .png, ")


def test_what_cannot_be_encoded_is_named(places: Places, said: Said) -> None:
    for words, code, says in (
        ((places.autoencoder, places.odd, "out"), FAILED, "images are 7 x 7, .* multiples of 2"),
        ((places.autoencoder, places.latents, "out"), FAILED, "holds latents, not images; name"),
        ((places.autoencoder, places.embeddings, "out"), FAILED, "holds embeddings, not images; n"),
        (
            (places.of_latents, places.one_shard, "out"),
            WRONG_CONFIG,
            "holds a denoiser, which encodes no images: name a run with task=autoenc",
        ),
    ):
        require_line(said(encode.JOB, *words), code, says)


@pytest.mark.parametrize(
    "source, words, says",
    [
        ("autoencoder", TINY, "an autoencoder, .* a U-Net"),
        ("of_latents", (*TINY[:2], *DIT, QUICK[0]), "a U-Net, and this run trains a DiT"),
        ("of_pixels", AUTOENCODER, "a U-Net, and this run trains an autoencoder"),
    ],
)
def test_weights_of_another_architecture_are_refused(
    source: str, words: tuple[str, ...], says: str, places: Places, said: Said
) -> None:
    url = f"data.url={places.pixels}"
    init_from = f"training.init_from={getattr(places, source)}"
    line = f"training.init_from: .* holds {says}: name a model with the same network"
    require_line(said(train.JOB, *words, url, init_from), WRONG_CONFIG, line)
