"""Runs that read the embeddings of their images from a set: begun, continued, refused."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("tokenizers", reason="needs the extra [text]")

import ddpm_ray
from ddpm_ray.assembly import latents
from ddpm_ray.assembly.image_embeddings import EMBEDDINGS_FINGERPRINT, stored_embeddings
from ddpm_ray.assembly.newest_checkpoint import newest_checkpoint
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import DatasetError, open_dataset
from ddpm_ray.reporting import Command
from ddpm_ray.runs import train_worker
from ddpm_ray.runs.run_identity import stored_identity
from ddpm_ray.runs.run_start import begin_run, settled_run
from ddpm_ray.runs.train import run_training
from ddpm_ray.runs.training_data import checked_data
from ddpm_ray.runs.worker_process import facts_of_run, require_same_sets
from ddpm_ray.storage import object_store
from ddpm_ray.training.checkpoint_folder import read_checkpoint
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore
from ddpm_ray.training.loop import train_loop
from ddpm_ray.training.run import Run
from ddpm_ray.training.writer_lease import Lease
from tests.assembly.stored_embeddings.stored_sets import (
    IMAGES,
    KINDS,
    SIDE,
    again_embedded,
    keys_of,
    settled,
    started,
)
from tests.data.embedding_sets import random_embeddings, write_embeddings
from tests.data.latent_sets import encode_noise
from tests.noise import pack_noise
from tests.test_cascade_job import CONTRASTIVE, trained
from tests.training.test_loop import RecordingSink


def unlike(folder: Path, sets: dict[str, str], kind: str) -> str:
    """A set of embeddings that is like the right one in all but one respect; its URL."""
    right = open_dataset(sets["embeddings"]).manifest
    width, per_shard = (5 if kind == "width" else 6), (5 if kind == "shards" else 8)
    source = "0" * 64 if kind == "images" else right.source_sha256
    return write_embeddings(
        folder,
        random_embeddings(IMAGES, width),
        per_shard,
        encoder_sha256=right.encoder_sha256,
        source_sha256=source,
    ).url


@pytest.mark.parametrize("data", KINDS)
@pytest.mark.parametrize(
    "kind, says",
    [
        ("pixels", "which holds pixels, not embeddings: encode the images with `ddpm-ray encode "),
        ("latents", "which holds latents, not embeddings: encode the images with"),
        ("of other encoder", "which has embeddings of the encoder of sha256 .* embedding.encoder"),
        ("width", "which has embeddings of width 5, not 6: encode"),
        ("images", "which has embeddings of the images 000000000000, and data.url those of"),
        ("shards", "which has 23 samples in 5 shards, and data.url 23 in 3, of the same sizes"),
    ],
)
def test_a_set_that_does_not_fit_is_refused(
    kind: str, says: str, data: str, sets: dict[str, str], tmp_path: Path
) -> None:
    """By the driver before Ray starts, in one line."""
    url = sets[kind] if kind in sets else unlike(tmp_path / "set", sets, kind)
    config = load_config(RunConfig, None, keys_of(sets, data, f"embedding.url={url}"))
    with pytest.raises(ConfigError, match=rf"^embedding.url is {url}, {says}.*$") as raised:
        run_training(config, tmp_path, lambda progress: None)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "runs").exists()


def test_sets_that_are_missing_are_refused(sets: dict[str, str], tmp_path: Path) -> None:
    gone = keys_of(sets, "pixels", "embedding.url=gone")
    with pytest.raises(ConfigError, match=r"^embedding.url: .*/gone: no manifest.json, so this"):
        run_training(load_config(RunConfig, None, gone), tmp_path, lambda progress: None)
    with pytest.raises(
        ConfigError, match=r"data.url holds latents: encode the images .* set embedding.url=SET"
    ):
        settled(keys_of(sets, "latents", "embedding.url="))
    with pytest.raises(ConfigError, match=r"data.flip is true, and embedding.url is .*: set data"):
        settled(keys_of(sets, "pixels", "data.flip=true"))
    with pytest.raises(ConfigError, match=r"embedding.url is 'x', which nothing uses without embe"):
        load_config(RunConfig, None, ["name=x", "data.url=x", "embedding.url=x"])


def test_an_encoder_that_does_not_take_the_decoded_images_is_refused(tmp_path: Path) -> None:
    """Of latents with images of 6 x 6, for an encoder of three levels."""
    url = encode_noise(tmp_path, 6, 6)
    pack_noise(str(tmp_path / "even"), 3, 8)
    levels = "contrastive.channel_mults=[1,1,1]"
    encoder = trained(tmp_path / "encoder", str(tmp_path / "even"), *CONTRASTIVE, levels)
    keys = ["name=x", f"data.url={url}", f"embedding.encoder={encoder}", "embedding.url=x"]
    with pytest.raises(ConfigError, match=r"embedding.encoder is .*: images are 6 x 6, which 3"):
        settled(keys)


def test_a_continued_run_keeps_its_set_which_may_have_moved(
    sets: dict[str, str], tmp_path: Path
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    first = started(keys_of(sets, "latents"), run)
    assert first[EMBEDDINGS_FINGERPRINT] == open_dataset(sets["embeddings"]).fingerprint
    shutil.copytree(sets["embeddings"], moved)
    assert started(keys_of(sets, "latents", f"embedding.url={moved}"), run) == first
    other = again_embedded(sets, tmp_path / "other")
    with pytest.raises(
        ConfigError,
        match=r"embedding.url holds the set of embeddings .{12}, but the run began with the set of",
    ):
        started(keys_of(sets, "latents", f"embedding.url={other}"), run)


def test_a_run_that_embeds_in_each_step_goes_on_so(sets: dict[str, str], tmp_path: Path) -> None:
    """And the other way round: their numbers differ by float16's rounding."""
    keys = keys_of(sets, "pixels")
    for name, begun, now, says in (
        ("a", [*keys, "embedding.url="], keys, "holds the set of .*began with no set of embedd"),
        ("b", keys, [*keys, "embedding.url="], "holds no set of embeddings, but .*with the set of"),
    ):
        started(begun, tmp_path / name)
        with pytest.raises(ConfigError, match=f"embedding.url {says}"):
            started(now, tmp_path / name)


def test_workers_notice_a_set_that_was_replaced(sets: dict[str, str], tmp_path: Path) -> None:
    """Since the driver looked, or since the checkpoint that they find."""
    config, dataset, facts = settled(keys_of(sets, "latents"))
    other = again_embedded(sets, tmp_path / "other")
    swapped = replace(config, embedding=replace(config.embedding, url=other))
    with pytest.raises(DatasetError, match=r"other: this is the set of embeddings .*; put that"):
        stored_embeddings(swapped, facts)
    codec = latents.codec_of_data(config.data, dataset)
    mine = facts_of_run({"config": {}, "identity": "", **facts}, dataset, codec)
    assert mine[EMBEDDINGS_FINGERPRINT] == facts[EMBEDDINGS_FINGERPRINT]
    require_same_sets(config, dataset, mine, mine)
    with pytest.raises(DatasetError, match="and the checkpoint was trained on no set of embedd"):
        require_same_sets(config, dataset, mine, {**mine, EMBEDDINGS_FINGERPRINT: ""})


def test_a_lost_identity_is_restored_with_the_image_encoder(
    sets: dict[str, str], tmp_path: Path
) -> None:
    """From the checkpoint; so the next start refuses another encoder, too."""
    _, *keys = keys_of(sets, "pixels", "embedding.url=")
    trained(tmp_path, sets["pixels"], *keys)
    keys = keys_of(sets, "pixels", "embedding.url=")
    first = started(keys, tmp_path)
    assert stored_identity(str(tmp_path))["image_encoder"] == first["image_encoder"]
    other = [*keys, f"embedding.encoder={sets['other encoder']}"]
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"image encoder has sha256 .{12}, but the run began with .{12}:"
        ):
            started(other, tmp_path)
        (tmp_path / "run.json").unlink(missing_ok=True)


def as_worker(keys: list[str], folder: Path, patch: pytest.MonkeyPatch) -> Run:
    """A worker's part of the run in `folder`, with the settings of its driver."""
    config = load_config(RunConfig, None, keys)
    dataset, checked = checked_data(config)
    config, facts = settled_run(config, dataset, str(folder))
    identity = begin_run(config, dataset, str(folder), encoder=facts).identity
    checkpoints = object_store.join(str(folder), CHECKPOINTS)
    lease = Lease.first(checkpoints, CheckpointStore(checkpoints).pointer().epoch)
    own = {"config": to_dict(config), "folder": str(folder), "identity": identity}
    patch.setattr(train_worker, "_tracker", lambda *_: RecordingSink())
    settings = {**own, **facts, **checked, "lease": vars(lease)}
    return train_worker.assemble(config, settings, lambda progress: Command.NONE, Workers())


def test_a_run_trains_draws_and_scores_and_goes_on_from_its_checkpoint(
    sets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its driver and worker do all of it, without Ray."""
    keys = [
        *keys_of(sets, "latents", "training.global_batch_size=4", "training.grid_every_steps=2"),
        "training.checkpoint_every_steps=2",
        "evaluation.validation_every_steps=2",
        "evaluation.validation_images=16",
        "evaluation.num_images=4",
        "evaluation.features=digits",
        "evaluation.kernel_distance=false",
    ]
    for steps in (2, 3):
        run = as_worker([*keys, f"training.steps={steps}"], tmp_path, monkeypatch)
        assert run.state.step == (0 if steps == 2 else 2)
        assert train_loop(run)
        run.stream.close()
    facts = read_checkpoint(newest_checkpoint(str(tmp_path))[0], groups=()).facts
    assert facts[EMBEDDINGS_FINGERPRINT] == open_dataset(sets["embeddings"]).fingerprint
    assert "eval/fd_digits" in facts["scores"]["metrics"]
    assert (tmp_path / "pictures").is_dir()
    assert ddpm_ray.load(tmp_path, "cpu").sample(1).shape == (1, SIDE, SIDE, 1)
    (tmp_path / "run.json").unlink()  # its identity is that of the checkpoint then
    other = again_embedded(sets, tmp_path / "other")
    with pytest.raises(ConfigError, match="but the run began with the set of embeddings"):
        started([*keys, "training.steps=3", f"embedding.url={other}"], tmp_path)
