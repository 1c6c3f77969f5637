"""A model is sampled as its run was configured, in notebooks and by jobs without settings."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import nn

import ddpm_ray
from ddpm_ray.assembly import diffusion, run_config, training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.jobs.pack import PackConfig
from ddpm_ray.config.loading import load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.packing import packer
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.sampling.gif import Film
from ddpm_ray.sampling.image_grid import grid_of_samples, legible_font_pixels
from ddpm_ray.storage import object_store
from ddpm_ray.tracking.pyfunc_model import _load_pyfunc
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.sample_grids import GRID_IMAGES, SampleGridLogger
from tests.fixtures.job_script import run_job
from tests.limits import ENDS_S
from tests.training.test_sample_grids import Wall

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # MLflow's, as it imports

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
NAMES = ("cat", "dog", "7")
TINY = (
    "name=a",
    "data.url=nowhere",
    "schedule.num_steps=12",
    "schedule.kind=cosine",
    "sampling.steps=6",
    "model.base_channels=4",
    "model.groups=2",
    "model.channel_mults=[1]",
    "model.blocks_per_level=1",
    "model.attention_resolutions=[]",
    "model.num_classes=3",
    "objective.variance=learned_range",
    "objective.loss=hybrid",
)
GUIDED = ("sampling.guidance_scale=3",)
TEXT = (
    "text.encoder=transformer",
    "text.length=6",
    "text.width=8",
    "text.depth=1",
    "text.heads=2",
)
PROMPTED = (*TEXT, "sampling.prompts=[a cat,a dog]")
OPTIONS: list[tuple[str, tuple[str, ...]]] = [  # what is set, beside what
    *(
        (f"sampling.sampler={name}", ())
        for name in ("ancestral", "dpm_solver_pp", "dpm_solver_pp_sde", "unipc", "heun", "plms")
    ),
    ("sampling.steps=12", ()),
    ("sampling.spacing=quadratic", ()),
    ("sampling.spacing=log_snr", ()),
    ("sampling.eta=1", ()),
    ("sampling.variance=fixed_large", ("sampling.steps=12", "sampling.sampler=ancestral")),
    ("sampling.variance=learned", ("sampling.sampler=ancestral",)),
    ("sampling.clip=false", ()),
    ("sampling.dynamic_quantile=0.5", ()),
    ("sampling.seed=5", ()),
    ("sampling.labels=[2,1]", ()),
    ("sampling.labels=[dog,'7']", ()),
    ("sampling.guidance_scale=3", ()),
    ("sampling.guidance_rescale=0.9", GUIDED),
    ("sampling.guidance_above_sigma=1", GUIDED),
    ("sampling.guidance_below_sigma=1", GUIDED),
    ("sampling.prompts=[a cat,a dog,a bird]", TEXT),
    ("sampling.negative_prompt=a bird", (*PROMPTED, *GUIDED)),
]
Pixels = npt.NDArray[np.uint8]


def saved_run(folder: Path, *overrides: str, **facts: Any) -> tuple[str, Pixels]:
    """The folder of a run, and the pixels of the grid that its own worker draws."""
    config = load_config(RunConfig, None, [*TINY, *overrides])
    shape = ImageShape(4, 4, 1)
    known = {"config": to_dict(config), "image_shape": list(shape), "data_fingerprint": "f"}
    known |= {"label_names": list(NAMES)} | facts
    tokenizer = Tokenizer.trained(["a cat", "a dog", "a bird"], 300, 6)
    if config.takes_text:
        known |= run_config.tokenizer_facts(tokenizer)
    state = training_run.training_state(config, shape, CPU, known)
    generator = torch.Generator().manual_seed(3)
    for parameter in state.ema.model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    CheckpointStore(str(folder / "checkpoints")).save(state.snapshot([]))
    text = tokenizer if config.takes_text else None
    denoiser = diffusion.denoiser(config, state.ema.model, CPU, PIXELS, text)
    plan = diffusion.sampling_plan(config.sampling, denoiser.schedule, NAMES)
    wall, workers = Wall(), Workers(0, 1, CPU)
    place, size = str(folder / "pictures"), config.sampling.batch_size
    with torch.inference_mode():
        SampleGridLogger(denoiser, plan, ImageShape(4, 4, 1), workers, place, wall, size).log_grid(
            0
        )
    picture = np.asarray(wall.pictures["samples", 0])
    title = round(1.4 * legible_font_pixels(picture.shape[1]))
    return str(folder), picture[title:]


@pytest.mark.parametrize("option, next_to", OPTIONS, ids=str)
def test_a_notebook_draws_what_the_runs_own_grid_shows(
    option: str, next_to: tuple[str, ...], tmp_path: Path
) -> None:
    """For each option of the group; without it the images are others."""
    run, own = saved_run(tmp_path / "run", *next_to, option)
    _, without = saved_run(tmp_path / "without", *next_to)
    assert not np.array_equal(own, without)
    model = ddpm_ray.load(Path(run))
    prompts = model.settings.prompts
    assert np.array_equal(shown(model.sample(GRID_IMAGES), prompts), own)
    served = _load_pyfunc(object_store.join(run, "checkpoints"))
    assert np.array_equal(shown(served.predict({"num_images": GRID_IMAGES}), prompts), own)
    name, _, value = option.removeprefix("sampling.").partition("=")
    other = ddpm_ray.load(tmp_path / "without")
    given: Any = load_config(RunConfig, None, [*TINY, *next_to, option]).sampling
    drawn = other.sample(GRID_IMAGES, **{name: getattr(given, name)})
    assert np.array_equal(shown(drawn, prompts), own), value


def shown(images: Any, prompts: tuple[str, ...]) -> Pixels:
    """The pixels of the grid of these samples."""
    return np.asarray(grid_of_samples(images, prompts))


def test_every_option_of_the_group_is_an_argument_and_has_been_tried() -> None:
    names = set(SamplingSettings.__dataclass_fields__)
    tried = {option.partition("=")[0].removeprefix("sampling.") for option, _ in OPTIONS}
    assert names - tried == {"batch_size"}


@pytest.fixture
def job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """A job in the folder `tmp_path`: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *words: str) -> tuple[int, str, str]:
        return run_job(f"{name}.py", words, monkeypatch, capsys)

    return run


Job = Callable[..., tuple[int, str, str]]
OTHER = ("sampling.sampler=ancestral", "sampling.variance=learned", "sampling.guidance_scale=3")


def test_the_job_draws_so_too_but_for_what_it_is_given(tmp_path: Path, job: Job) -> None:
    _, own = saved_run(tmp_path / "runs/a", *OTHER)
    code, out, err = job("sample", "runs/a", "--out", "deep/er/grid.png", "gif=films/a.gif")
    assert code == 0, err
    assert "step of ancestral 6/6" in err
    assert json.loads(out.splitlines()[-1])["picture"] == str(tmp_path / "deep/er/grid.png")
    assert np.array_equal(np.asarray(Image.open("deep/er/grid.png")), own)
    assert Path("films/a.gif").exists()
    assert job("sample", "runs/a", "--out", "b.png", "sampling.steps=12")[0] == 0
    _, longer = saved_run(tmp_path / "runs/b", *OTHER, "sampling.steps=12")
    assert np.array_equal(np.asarray(Image.open("b.png")), longer)


@pytest.mark.parametrize("name", ["sample", "evaluate", "export", "edit"])
def test_the_printed_config_is_the_runs_with_what_was_given(
    name: str, tmp_path: Path, job: Job
) -> None:
    saved_run(tmp_path / "runs/a", *OTHER, "sampling.labels=[dog]")
    for given in ("im.png", "m.png"):
        Image.new("L", (4, 4)).save(tmp_path / "runs" / given)
    words = {
        "sample": ["--out", "x.png"],
        "evaluate": [],
        "export": ["--out", "x"],
        "edit": [
            "runs/im.png",
            "--mask",
            "runs/m.png",
            "--out",
            "x.png",
            "method=replacement",
        ],
    }[name]
    code, out, err = job(name, "runs/a", *words, "sampling.seed=9", "--print-config")
    assert code == 0, err
    for line in ("sampler: ancestral", "variance: learned", "steps: 6", "seed: 9", "  - 1"):
        assert line in out, out
    assert not [path for path in tmp_path.iterdir() if path.name != "runs"]


def test_what_belongs_to_another_sampler_gives_way_unless_it_is_given(tmp_path: Path) -> None:
    model = ddpm_ray.load(saved_run(tmp_path, *OTHER)[0])
    assert model.settings.variance == "learned"
    assert model.with_settings(sampler="unipc").settings.variance == "fixed_small"
    with pytest.raises(ValueError, match=r"variance is 'learned' and sampler 'unipc'"):
        model.with_settings(sampler="unipc", variance="learned")
    whole = model.with_settings(variance="fixed_large", steps=12)
    assert whole.settings.variance == "fixed_large"
    assert whole.with_settings(steps=3).settings.variance == "fixed_small"
    by_quantile = model.with_settings(dynamic_quantile=0.9)
    assert by_quantile.with_settings(clip=False).settings.dynamic_quantile == 0
    with pytest.raises(TypeError, match=r"unexpected argument 'step'; did you mean steps\?"):
        model.sample(1, step=3)
    repainted: Pixels = np.zeros((1, 4, 4, 1), np.uint8)
    mask = np.eye(4, dtype=bool)
    one = model.inpaint(repainted, mask, resamples=1)
    assert np.array_equal(
        one, model.inpaint(repainted, mask, resamples=1, sampler="ancestral", guidance_scale=3)
    )
    assert (one != model.inpaint(repainted, mask, resamples=1, guidance_scale=1)).any()


def test_classes_go_by_name_or_number(tmp_path: Path) -> None:
    model = ddpm_ray.load(saved_run(tmp_path)[0])
    assert model.label_names == NAMES
    by_name = model.sample(3, labels=["dog", "7", "cat"])
    assert np.array_equal(by_name, model.sample(3, labels=[1, 2, 0]))
    assert np.array_equal(model.sample(2, labels="dog"), model.sample(2, labels=[int(np.int64(1))]))
    with pytest.raises(ValueError, match=r"labels has 'dgo', which is no class .* 'dog'\?"):
        model.sample(1, labels=["dgo"])
    with pytest.raises(ValueError, match="labels has 7; the model knows 0 to 2"):
        model.sample(1, labels=[7])


def test_an_older_run_asks_its_data_set_for_the_names(tmp_path: Path) -> None:
    """If it is the same still; without it, numbers alone are taken."""
    for name in NAMES:
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "images" / name / "a.png")
    url = str(tmp_path / "set")
    plan = packer.make_plan(str(tmp_path / "images"), url, PackConfig())
    dataset = packer.finish_dataset(plan, [packer.pack_shard(plan, i) for i in range(plan.shards)])
    run, _ = saved_run(tmp_path / "run", f"data.url={url}", data_fingerprint=dataset.fingerprint)
    for file in Path(run).rglob("state.json"):
        assert "label_names" in json.loads(file.read_text())
    shutil.rmtree(run)
    run, _ = older(tmp_path / "run", f"data.url={url}", data_fingerprint=dataset.fingerprint)
    names = sorted(NAMES)
    model = ddpm_ray.load(run)
    assert np.array_equal(model.sample(1, labels=names[2]), model.sample(1, labels=2))
    shutil.rmtree(url)
    with pytest.raises(ValueError, match=r"labels has 'dog', and the names .* are not known"):
        ddpm_ray.load(run).sample(1, labels="dog")


WITHOUT = """
import logging, os, sys
class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("mlflow", "ray", "matplotlib", "optuna"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from PIL import Image
before = dict(os.environ), Image.MAX_IMAGE_PIXELS
OURS = "ddpm_ray", "aiobotocore", "botocore", "fsspec", "s3fs", "PIL", "urllib3", "safetensors"
levels = lambda: {k: v.level for k, v in logging.root.manager.loggerDict.items()
                  if getattr(v, "level", 0) and k.startswith(OURS)}
import ddpm_ray
print(ddpm_ray.load(sys.argv[1]).sample(2).shape)
assert (dict(os.environ), Image.MAX_IMAGE_PIXELS) == before, dict(os.environ)
print(levels())
"""


def test_a_folder_is_loaded_without_mlflow_and_ray_and_leaves_the_process_alone(
    tmp_path: Path,
) -> None:
    run, _ = saved_run(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, run],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["(2, 4, 4, 1)", "{}"]


@pytest.mark.parametrize(
    "name, words, says",
    [
        ("sample", ["--out", "grid"], "--out is grid; end it in one of .png, .jpg"),
        ("sample", ["--out", "grid.xyz"], "--out is grid.xyz; end it in one of"),
        ("sample", ["--out", "file/grid.png"], "--out is file/grid.png, but"),
        ("sample", ["--out", "folder.png"], "--out is folder.png, which is a folder"),
        ("sample", ["--out", "s3://b/x.png"], "it is written to this machine"),
        ("sample", ["--out", "a.png", "gif=file/a.gif"], "gif is file/a.gif, but"),
        ("sample", ["--out", "a.png", "gif=a.mp4"], "gif is 'a.mp4'; end it in .gif"),
        ("edit", ["i.png", "--mask", "m.png", "--out", "file/o.png"], "--out is file/o.png, but"),
        ("export", ["--out", "file"], "is a file; name another folder"),
    ],
)
def test_what_cannot_be_written_is_reported_before_a_model_is_looked_for(
    name: str, words: list[str], says: str, tmp_path: Path, job: Job
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    code, out, err = job(name, "no/run", *words)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1


def test_a_film_that_cannot_be_written_costs_no_grid(
    tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _, own = saved_run(tmp_path / "a")
    monkeypatch.setattr(Film, "save", full)
    code, out, err = job("sample", "a", "--out", "grid.png", "gif=film.gif")
    assert (code, out) == (1, "")
    assert "No space left" in err
    assert np.array_equal(np.asarray(Image.open("grid.png")), own)


@pytest.mark.parametrize("name", ["sample", "edit", "export"])
def test_a_submitted_job_looks_and_writes_below_its_home(
    name: str, tmp_path: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `ray job submit` runs it: in a copy of the working directory that is deleted later."""
    home, copy = tmp_path / "home", tmp_path / "runtime_resources/working_dir_files/_ray_pkg_x"
    saved_run(home / "runs/a", "objective.variance=fixed", "objective.loss=simple")
    copy.mkdir(parents=True)
    monkeypatch.setenv("DDPM_RAY_HOME", str(home))
    monkeypatch.chdir(copy)
    Image.new("L", (4, 4)).save("brought.png")
    Image.fromarray(np.eye(4, dtype=np.uint8) * 255).save(home / "mask.png")
    words = {
        "sample": ["--out", "o.png", "gif=film.gif", "num_images=2"],
        "edit": ["brought.png", "--mask", "mask.png", "--out", "o.png", "resamples=1"],
        "export": ["--out", "o.png"],
    }[name]
    code, out, err = job(name, "runs/a", *words)
    assert code == 0, err
    reported = json.loads(out.splitlines()[-1])
    assert reported["folder" if name == "export" else "picture"] == str(home / "o.png")
    assert (home / "o.png").exists()
    assert [path.name for path in copy.iterdir()] == ["brought.png"]
    assert (home / "film.gif").exists() == (name == "sample")


@pytest.mark.parametrize("folder", ["empty", "other", "begun"])
def test_a_folder_without_a_checkpoint_is_reported_in_one_line(
    folder: str, tmp_path: Path, job: Job
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("no run")
    (tmp_path / "begun/checkpoints").mkdir(parents=True)
    code, out, err = job("sample", folder, "--out", "a.png")
    assert (code, out) == (1, "")
    assert f"{folder}: there is no committed checkpoint here; " in err
    assert err.count("\n") == 1


def test_arrays_tensors_and_pictures_are_taken_as_images(tmp_path: Path) -> None:
    model = ddpm_ray.load(saved_run(tmp_path)[0])
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 1), dtype=np.uint8)
    mask = np.eye(4, dtype=bool)
    expected = model.inpaint(images, mask, resamples=1)
    pictures = [Image.fromarray(image[..., 0]) for image in images]
    for given in ([*images], torch.from_numpy(images), pictures, images[:, ::-1][:, ::-1]):
        for shown in (mask, mask.tolist(), torch.from_numpy(mask)):
            assert np.array_equal(model.inpaint(given, shown, resamples=1), expected)  # type: ignore[arg-type]
    assert model.image_to_image(pictures[0], 0.5).shape == (1, 4, 4, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "images, says",
    [
        ([], r"images are uint8 \[0\]; give uint8 \[N, H, W, 1\]"),
        ("im.png", r"images is 'im\.png'; give pixels: open the file with PIL\.Image\.open"),
        ([np.zeros((4, 4, 1), np.uint8), np.zeros((5, 4, 1), np.uint8)], "are of several sizes"),
        ([[1, [2]], [3]], r"images holds \[1, \[2\]\]; give an array of numbers"),
        (torch.zeros(1, 4, 4, 1), r"images are float32 \[1, 4, 4, 1\]"),
        (torch.zeros(1, 1, 4, 4, dtype=torch.uint8), r"images are uint8 \[1, 1, 4, 4\]"),
        ([Image.new("RGBA", (4, 4))], r"a picture of mode RGBA; convert it first: image\.convert"),
        ([Image.new("RGB", (4, 4))], r"images are uint8 \[1, 4, 4, 3\]; give uint8 \[N, H, W, 1\]"),
        (None, "images holds None; give an array of numbers"),
    ],
)
def test_what_is_no_image_is_a_value_error(images: Any, says: str, tmp_path: Path) -> None:
    model = ddpm_ray.load(saved_run(tmp_path)[0])
    mask = np.eye(4, dtype=bool)
    for edit in (
        lambda: model.inpaint(images, mask),
        lambda: model.outpaint(images, top=2),
        lambda: model.image_to_image(images, 0.5),
        lambda: model.reconstruct(images),
        lambda: model.enlarge(images),
    ):
        with pytest.raises(ValueError, match=says):
            edit()
    with pytest.raises(ValueError, match=r"mask holds array.*; give an array of numbers"):
        model.inpaint(np.zeros((1, 4, 4, 1), np.uint8), np.full((4, 4), "a"))


def older(folder: Path, *overrides: str, **facts: Any) -> tuple[str, Pixels]:
    """A run of a version whose checkpoints do not name the classes."""
    made = saved_run(folder, *overrides, **facts)
    for store in [CheckpointStore(str(folder / "checkpoints"))]:
        found = store.load()
        assert found is not None
        del found[1].facts["label_names"]
        store.save(found[1])
    return made
