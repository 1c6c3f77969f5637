"""The job `cascade`, and images drawn from the folder that it writes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("tokenizers", reason="needs the extra [text]")

import ddpm_ray
from ddpm_ray.assembly.encoder_loading import encoders_of_sha256, trained_encoders
from ddpm_ray.assembly.image_encoders import (
    copy_image_encoder,
    named_encoder,
    settled_embedding,
)
from ddpm_ray.assembly.newest_checkpoint import newest_checkpoint
from ddpm_ray.assembly.run_config import saved_config, tokenizer_facts
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.runs.run_start import RunStart, begin_run, settled_run
from ddpm_ray.runs.run_text_model import run_texts
from ddpm_ray.sampling.image_grid import grid_of_samples
from ddpm_ray.storage import checksummed_json
from ddpm_ray.training.checkpoint_folder import CheckpointError, read_checkpoint
from tests.data.captioned_sets import write_captioned
from tests.data.embedding_sets import random_embeddings, write_embeddings
from tests.data.latent_sets import TINY_UNET, commit, initial_run
from tests.fixtures.job_script import run_job
from tests.noise import pack_noise

Job = Callable[..., tuple[int, str, str]]
WIDTH, TEXTS = 6, ["a pear", "a red plum"]
TOKENIZER = Tokenizer.trained(TEXTS, 300, 6)
TEXT = ("text.encoder=transformer", "text.length=6", "text.width=8", "text.depth=1", "text.heads=2")
CONTRASTIVE = (
    "task=contrastive",
    f"contrastive.width={WIDTH}",
    "contrastive.base_channels=4",
    "contrastive.groups=2",
    "contrastive.channel_mults=[1,2]",
    "contrastive.blocks_per_level=1",
    "training.grid_every_steps=0",
    *TEXT,
)
DIFFUSION = ("schedule.num_steps=20", "schedule.kind=cosine", "sampling.steps=4")
PRIOR = ("task=prior", "prior.width=8", "prior.depth=1", "training.grid_every_steps=0", *TEXT)


def trained(
    folder: Path,
    data: str,
    *keys: str,
    seed: int = 0,
    held: Any = None,
    step: int = 0,
    std: float = 0.1,
) -> str:
    """A run in `folder` on the set at `data`, saved with weights that give no zeros; its URL."""
    config = load_config(RunConfig, None, ["name=x", f"data.url={data}", f"seed={seed}", *keys])
    config, encoder = settled_embedding(config, open_dataset(data))
    texts = tokenizer_facts(TOKENIZER) if config.takes_text else {}
    state = initial_run(config, **{**texts, **encoder, **(held or {})})
    generator = torch.Generator().manual_seed(seed)
    for one in (*state.model.parameters(), *state.ema.model.parameters()):
        torch.nn.init.normal_(one, std=std, generator=generator)
    state.step = step
    return commit(state, folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder and another one; a prior, decoder and upsampler, and such that do not fit."""
    root = tmp_path_factory.mktemp("runs")
    write_captioned(root / "data", [TEXTS[:1], TEXTS[1:]] * 4, 8)
    pack_noise(str(root / "large"), 4, 8)
    write_embeddings(root / "embeddings", random_embeddings(8, WIDTH), 8, captioned=True)
    data, large, embedded = (str(root / name) for name in ("data", "large", "embeddings"))
    for number, name in enumerate(("encoder", "other-encoder")):
        url = trained(root / name, data, *CONTRASTIVE, seed=number)
        found = trained_encoders(url)
        held = {"image_encoder": {"url": found.url, "sha256": found.sha256}}
        prefix = name.removesuffix("encoder")
        trained(root / f"{prefix}prior", embedded, *PRIOR, *DIFFUSION, held=held)
        if not prefix:
            trained(root / "second-prior", embedded, *PRIOR, *DIFFUSION, seed=7, held=held)
        given = f"embedding.encoder={url}"
        trained(root / f"{prefix}decoder", data, *TINY_UNET, *DIFFUSION, *TEXT, given)
    trained(root / "plain", data, *TINY_UNET, *DIFFUSION)
    for pixels in (4, 2):
        of = f"objective.low_resolution_pixels={pixels}"
        trained(root / f"upsampler-{pixels}", large, *TINY_UNET, *DIFFUSION, of)
    return root


@pytest.fixture
def job(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Job:
    """A job in the folder of the runs: exit code, stdout, stderr."""
    monkeypatch.chdir(runs)
    return lambda name, *words: run_job(f"{name}.py", [*words], monkeypatch, capsys)


def test_a_cascade_draws_from_its_folder_as_in_python(job: Job, tmp_path: Path) -> None:
    out = str(tmp_path / "c")
    models = ("prior=prior", "decoder=decoder", "upsamplers=[upsampler-4]", "candidates=3")
    code, said, err = job("cascade", "--out", out, *models)
    assert code == 0, err
    parts = json.loads(said)
    assert parts["prior"]["url"].endswith("prior/checkpoints/" + Path(parts["prior"]["url"]).name)
    assert len({parts[name]["sha256"] for name in ("prior", "decoder")}) == 2
    cascade = ddpm_ray.load_cascade(out, "cpu")
    drawn = cascade.sample(2, prompts=TEXTS, seed=3)
    assert drawn.shape == (2, 8, 8, 1)
    assert cascade.candidates == 3
    assert cascade.drawn_shape == (8, 8, 1)
    assert (drawn[0] != drawn[1]).any()
    words = (f"sampling.prompts=[{','.join(TEXTS)}]", "sampling.seed=3", "num_images=2")
    code, drew, err = job("sample", out, "--out", str(tmp_path / "a.png"), *words)
    assert code == 0, err
    code, _, err = job("sample", out, "--out", str(tmp_path / "b.png"), "num_images=1")
    assert code == 2
    assert "which draws images of texts: give one or more" in err
    Path(out, "run.json").touch()
    code, _, err = job("cascade", "--out", out, *models)
    assert code == 2
    assert "which holds a run: name another folder" in err
    assert json.loads(drew)["prior_sha256"] == parts["prior"]["sha256"]
    wanted = grid_of_samples(drawn, TEXTS)
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(wanted))
    images = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 1), np.uint8)
    assert cascade.variations(images, per_image=2).shape == (2, 8, 8, 1)
    assert cascade.interpolate(TEXTS[0], TEXTS[1], 3).shape == (3, 8, 8, 1)
    Image.fromarray(images[0, ..., 0]).save(tmp_path / "image.png")
    edited = ("edit", out, str(tmp_path / "image.png"), "--out", str(tmp_path / "b.png"))
    assert job(*edited, "kind=variations", "num_images=4")[0] == 0
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.size[0] > 2 * 8
    code, _, err = job(*edited, "kind=image_to_image")
    assert code == 2
    assert "a cascade draws only variations of an image: name its decoder" in err


@pytest.mark.parametrize(
    "models, says",
    [
        (("decoder=decoder",), "prior is empty; name the run of the prior, as in prior=runs/prior"),
        (("prior=prior", "decoder=plain"), "decoder is .*plain, which is given no image embedding"),
        (("prior=decoder", "decoder=decoder"), "decoder holds a denoiser, which draws no embeddi"),
        (
            ("prior=other-prior", "decoder=decoder"),
            "prior and decoder are of different encoders: .* draws embeddings of the encoder of sh",
        ),
        (
            ("prior=prior", "decoder=decoder", "upsamplers=[upsampler-2]"),
            "upsampler-2, which enlarges images of 2 x 2 x 1, and the stage before it draws 4 x 4",
        ),
        (
            ("prior=prior", "decoder=decoder", "upsamplers=[plain]"),
            "upsamplers has .*plain, which enlarges no image",
        ),
        (("prior=nowhere", "decoder=decoder"), "nowhere: there is no such folder"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    models: tuple[str, ...], says: str, job: Job, tmp_path: Path
) -> None:
    code, _, err = job("cascade", "--out", str(tmp_path / "c"), *models)
    assert code != 0
    assert "Traceback" not in err
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(err.replace("\n", " "))
    assert not (tmp_path / "c").exists()


def test_a_cascade_whose_parts_changed_is_refused(job: Job, runs: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "c")
    assert job("cascade", "--out", out, "prior=prior", "decoder=decoder")[0] == 0
    where = f"{out}/cascade.json"
    parts = checksummed_json.read(where)
    checksummed_json.write(where, parts | {"decoder": {**parts["decoder"], "sha256": "0" * 64}})
    with pytest.raises(CheckpointError, match=r"and the cascade .* has 000000000000; put"):
        ddpm_ray.load_cascade(out)
    checksummed_json.write(where, parts | {"decoder": {**parts["decoder"], "url": f"{out}/gone"}})
    with pytest.raises(CheckpointError, match=r"a part of this cascade does not load: .*gone: "):
        ddpm_ray.load_cascade(out)
    with pytest.raises(ConfigError, match=r"holds a cascade, not one model: load it"):
        ddpm_ray.load(out)
    with pytest.raises(ConfigError, match=r"holds no cascade\.json: name the folder"):
        ddpm_ray.load_cascade(runs / "prior")


def test_a_continued_run_keeps_the_encoder_that_it_began_with(runs: Path, tmp_path: Path) -> None:
    """The encoder's run may train on; if its first checkpoint is deleted, the run says so."""
    data, folder = str(runs / "data"), tmp_path / "encoder"
    url = trained(folder, data, *CONTRASTIVE)
    config = load_config(
        RunConfig, None, ["name=x", f"data.url={data}", f"embedding.encoder={url}"]
    )
    dataset = open_dataset(data)
    settled, begun = settled_embedding(config, dataset)
    assert settled.embedding.width == WIDTH
    stored = {"config": to_dict(settled), **begun}
    (first,) = (folder / "checkpoints").glob("step-*")
    trained(folder, data, *CONTRASTIVE, seed=1, step=5)
    assert settled_embedding(config, dataset)[1] != begun
    assert settled_embedding(config, dataset, stored)[1] == begun
    shutil.rmtree(first)
    with pytest.raises(ConfigError, match=r"but the run began with .*: name the place of that one"):
        settled_embedding(config, dataset, stored)


def test_a_copied_decoder_brings_its_encoder(runs: Path, tmp_path: Path) -> None:
    """As MLflow stores it; an encoder that has moved or changed is not copied, and is named."""
    url, _ = newest_checkpoint(str(runs / "decoder"))
    facts = read_checkpoint(url, groups=()).facts
    copy = tmp_path / "copy"
    shutil.copytree(url, copy)
    copy_image_encoder(facts, copy)
    held = facts["image_encoder"]
    here = named_encoder(saved_config(facts), facts, "cpu", str(copy))
    assert here is not None
    assert here.url == str(copy / "image_encoder")
    other = trained_encoders(str(runs / "other-encoder"))
    x_0 = torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    assert torch.equal(here.embed(x_0), trained_encoders(held["url"]).embed(x_0))
    encoders_of_sha256(other.url, other.sha256, "cpu")  # the one that is shared now
    shutil.rmtree(copy)  # as MLflow's download, once the model is loaded
    assert torch.equal(here.embed(x_0), trained_encoders(held["url"]).embed(x_0))
    moved = facts | {"image_encoder": held | {"url": str(tmp_path / "gone")}}
    with pytest.raises(ValueError, match=r"gone cannot be copied: .*there is no such"):
        copy_image_encoder(moved, tmp_path / "a")
    another = facts | {"image_encoder": held | {"url": str(runs / "other-encoder")}}
    with pytest.raises(
        ValueError,
        match=rf"other-encoder cannot be copied: .*encoder of sha256 {held['sha256'][:12]}, and ",
    ):
        copy_image_encoder(another, tmp_path / "b")
    with pytest.raises(CheckpointError, match=f"the encoder of sha256 {held['sha256'][:9]}"):
        _ = replace(here, url=str(runs / "other-encoder")).encoders


def test_a_prior_with_texts_of_another_encoder_is_warned_of(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its embeddings are of `encoder`; a warning names the other one, and none the right one."""
    url = tmp_path / "embeddings"
    found = trained_encoders(str(runs / "encoder"))
    written = random_embeddings(8, WIDTH)
    write_embeddings(url, written, 8, captioned=True, encoder_sha256=found.sha256)
    dataset = open_dataset(str(url))
    for name, warned in (("encoder", False), ("other-encoder", True)):
        of = ("text.encoder=contrastive", f"text.model={runs / name}")
        keys = ("task=prior", "training.grid_every_steps=0", "prior.width=8", "prior.depth=1")
        config = load_config(RunConfig, None, ["name=x", f"data.url={url}", *keys, *of])
        run_texts(config, dataset, str(tmp_path / name))
        said = [one.getMessage() for one in caplog.records if "in its own space" in one.msg]
        assert bool(said) == warned
    assert f"embeddings of {url} are of the encoder of sha256 {found.sha256[:12]}" in said[0]


def test_a_prior_is_continued_as_its_data_name_the_encoder(runs: Path, tmp_path: Path) -> None:
    """It has no embedding.encoder, and its checkpoints name one all the same."""
    data = str(runs / "embeddings")
    config = load_config(RunConfig, None, ["name=x", f"data.url={data}", *PRIOR, *DIFFUSION])
    dataset, folder = open_dataset(data), str(tmp_path)

    def started() -> RunStart:
        settled, encoder = settled_run(config, dataset, folder)
        return begin_run(settled, dataset, folder, TOKENIZER, encoder)

    first = started()
    assert first.step == 0
    trained(tmp_path, data, *PRIOR, *DIFFUSION, step=3)
    assert "image_encoder" in read_checkpoint(newest_checkpoint(folder)[0], groups=()).facts
    again = started()
    assert (again.identity, again.step) == (first.identity, 3)
