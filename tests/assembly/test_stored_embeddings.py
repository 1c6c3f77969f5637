"""Decoders that read the embeddings of their images from a set: of pixels, and of latents."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("tokenizers", reason="needs the extra [text]")

import ddpm_ray
from ddpm_ray.assembly import latents, training_run
from ddpm_ray.assembly.cascades import joined, write_cascade
from ddpm_ray.assembly.encoder_loading import trained_encoders
from ddpm_ray.assembly.image_embeddings import FINGERPRINT, stored_embeddings
from ddpm_ray.assembly.image_encoders import settled_embedding
from ddpm_ray.assembly.newest_checkpoint import newest_checkpoint
from ddpm_ray.assembly.portable_models import copy_model
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.data.dataset import Dataset, DatasetError, open_dataset
from ddpm_ray.data.embedded_stream import EmbeddedStream
from ddpm_ray.data.loader import ShardStream, read_images
from ddpm_ray.data.shards import ShardCorruptError
from ddpm_ray.data.tokenized_stream import TokenizedStream
from ddpm_ray.reporting import Command
from ddpm_ray.runs import train_worker
from ddpm_ray.runs.run_start import begin_run, settled_run
from ddpm_ray.runs.train import run_training
from ddpm_ray.runs.training_data import checked_data
from ddpm_ray.runs.worker_process import facts_of_run, require_same_sets
from ddpm_ray.storage import object_store
from ddpm_ray.storage.errors import StorageError
from ddpm_ray.training.checkpoint_folder import read_checkpoint
from ddpm_ray.training.checkpoints import CHECKPOINTS, CheckpointStore
from ddpm_ray.training.loop import train_loop
from ddpm_ray.training.run import Run
from ddpm_ray.training.writer_lease import Lease
from tests.data.embedding_sets import embed_images, random_embeddings, write_embeddings
from tests.data.latent_sets import TINY_UNET, encode_noise, encode_pixels
from tests.fixtures.job_script import run_job
from tests.noise import pack, pack_noise
from tests.test_cascade_job import CONTRASTIVE, DIFFUSION, PRIOR, TEXTS, trained
from tests.training.test_loop import RecordingSink

CPU = torch.device("cpu")
IMAGES, SIDE = 23, 8
ROUNDING = 2.0**-12  # of float16, for values below 1
KINDS = ("pixels", "latents")


def write_pixels(folder: Path) -> None:
    """Images of large squares: an encoder with random weights gives them distinct embeddings."""
    drawn = np.random.default_rng(0).integers(0, 256, (IMAGES, 2, 2, 1)).astype(np.uint8)
    half = SIDE // 2
    pack(folder, drawn.repeat(half, 1).repeat(half, 2), [8, 8, 7])


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Pixels, latents, two contrastive runs, and the embeddings that they give."""
    root = tmp_path_factory.mktemp("sets")
    write_pixels(root / "pixels")
    found = {"latents": encode_pixels(root, SIDE), "pixels": str(root / "pixels")}
    for number, name in enumerate(("encoder", "other encoder")):
        found[name] = trained(root / name, found["pixels"], *CONTRASTIVE, seed=number, std=1)
    found["embeddings"] = embed_images(found["pixels"], found["encoder"], root / "of encoder").url
    of_other = embed_images(found["pixels"], found["other encoder"], root / "of other")
    return found | {"of other encoder": of_other.url}


def keys_of(sets: dict[str, str], kind: str, *overrides: str) -> list[str]:
    named = ("encoder", sets["encoder"]), ("url", sets["embeddings"])
    given = [f"embedding.{key}={value}" for key, value in named]
    return ["name=x", f"data.url={sets[kind]}", *TINY_UNET, *DIFFUSION, *given, *overrides]


def settled(keys: list[str]) -> tuple[RunConfig, Dataset, dict[str, Any]]:
    """Config, data and facts of a run, as its driver finds them."""
    config = load_config(RunConfig, None, keys)
    dataset = open_dataset(config.data.url)
    config, facts = settled_embedding(config, dataset)
    return config, dataset, facts


def opened(keys: list[str], workers: Workers) -> ShardStream | EmbeddedStream | TokenizedStream:
    config, dataset, facts = settled(keys)
    return training_run.stream_with_inputs(config, dataset, workers, facts)


@pytest.fixture(scope="module")
def by_key(sets: dict[str, str]) -> dict[str, Tensor]:
    """The embedding of each image, by its key, as the encoder gives it in one batch."""
    keys = [f"{shard}-{row}" for shard, count in enumerate((8, 8, 7)) for row in range(count)]
    images = torch.cat([one.images for one in read_images(open_dataset(sets["pixels"]), range(3))])
    vectors = trained_encoders(sets["encoder"]).embed(PIXELS.encode(images))
    return dict(zip(keys, vectors, strict=True))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_each_image_has_the_embedding_that_the_encoder_gives(
    kind: str, count: int, sets: dict[str, str], by_key: dict[str, Tensor]
) -> None:
    """On any number of workers, over an epoch's end, and after a restart in the middle."""
    keys = keys_of(sets, kind, "training.global_batch_size=4", "data.lanes=2")
    seen: dict[int, list[Tensor]] = {}
    for rank in range(count):
        worker = Workers(rank, count)
        stream = opened(keys, worker)
        for step in range(8):
            if step == 5:  # another process
                stream.close()
                stream = opened(keys, worker)
            batch = stream.batch(step)
            assert batch.embeddings is not None
            wanted = torch.stack([by_key[key] for key in stream.keys(step)])
            assert batch.embeddings.dtype == torch.float16
            assert (batch.embeddings.float() - wanted).abs().max() <= ROUNDING
            seen.setdefault(step, []).append(batch.embeddings)
        stream.close()
    parts = torch.cat([torch.cat(seen[step]) for step in sorted(seen)])
    assert len(parts.unique(dim=0)) == IMAGES  # 32 samples: all of them


def test_a_batch_is_read_into_the_memory_of_one_before_it(sets: dict[str, str]) -> None:
    stream = opened(keys_of(sets, "latents", "training.global_batch_size=4"), Workers())
    out = stream.batch(0)
    wanted = stream.batch(1)
    again = stream.batch(1, out)
    stream.close()
    assert again.embeddings is not None
    assert out.embeddings is not None
    assert wanted.embeddings is not None
    assert again.embeddings.data_ptr() == out.embeddings.data_ptr()
    assert again.images.data_ptr() == out.images.data_ptr()
    assert torch.equal(again.embeddings, wanted.embeddings)
    part = again.rows(slice(1, 3))
    assert part.embeddings is not None
    assert torch.equal(part.embeddings, wanted.embeddings[1:3])


def test_streams_in_different_orders_are_refused(sets: dict[str, str]) -> None:
    config = load_config(RunConfig, None, keys_of(sets, "pixels"))
    dataset, other = open_dataset(sets["pixels"]), replace(config, seed=1)
    streams = [training_run.stream(one, dataset, Workers()) for one in (config, other)]
    with pytest.raises(ValueError, match="images and embeddings are read in different orders"):
        EmbeddedStream(*streams)
    for one in streams:
        one.close()


def losses(keys: list[str]) -> tuple[Tensor, Tensor]:
    """The losses of the first batches of a run, and the last gradient."""
    config, dataset, facts = settled(keys)
    facts |= {"config": {}, **latents.codec_facts(latents.codec_of_data(config.data, dataset))}
    state = training_run.training_state(config, dataset.manifest.diffused_shape, CPU, facts)
    generator = torch.Generator().manual_seed(1)
    for one in state.model.parameters():
        torch.nn.init.normal_(one, std=0.3, generator=generator)
    objective = training_run.training_objective(config, state, CPU)
    stream, found = training_run.stream_with_inputs(config, dataset, Workers(), facts), []
    for step in range(3):
        state.model.zero_grad()
        found.append(objective.backward(state.network, stream.batch(step), step, Workers(), 2)[0])
    stream.close()
    gradients = [one.grad.flatten() for one in state.model.parameters() if one.grad is not None]
    return torch.cat(found), torch.cat(gradients)


def test_losses_are_those_of_a_run_that_embeds_in_each_step(sets: dict[str, str]) -> None:
    keys = keys_of(sets, "pixels", "training.global_batch_size=4", "embedding.dropout=0.3")
    in_steps = [one for one in keys if not one.startswith("embedding.url")]
    (stored, gradient), (wanted, other) = losses(keys), losses(in_steps)
    torch.testing.assert_close(stored, wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient, other, rtol=0, atol=1e-4)
    assert not torch.equal(stored, wanted)  # float16
    none, _ = losses([*in_steps[:-1], "embedding.dropout=1"])
    assert (none - wanted).abs().max() > 1e-2  # the embeddings matter


def test_a_run_on_stored_embeddings_calls_no_encoder_in_its_steps(
    sets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> Tensor:
        raise AssertionError("the encoder was called")

    monkeypatch.setattr("ddpm_ray.sampling.image_text.TrainedEncoders.embed", refuse)
    assert losses(keys_of(sets, "latents", "training.global_batch_size=4"))[0].isfinite().all()


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


def started(keys: list[str], folder: Path) -> dict[str, Any]:
    """Start the run in `folder` as a driver does; its facts."""
    config = load_config(RunConfig, None, keys)
    dataset = open_dataset(config.data.url)
    config, facts = settled_run(config, dataset, str(folder))
    begin_run(config, dataset, str(folder), encoder=facts)
    return facts


def again_embedded(sets: dict[str, str], folder: Path) -> str:
    """Another set of embeddings of the same images by the same encoder, to the last bit but one."""
    right = open_dataset(sets["embeddings"])
    (vectors,) = [torch.cat([one.images for one in read_images(right, range(3))]).numpy()]
    vectors[0, 0] += np.float16(2**-9)
    held = right.manifest.encoder_sha256, right.manifest.source_sha256
    return write_embeddings(folder, vectors, 8, encoder_sha256=held[0], source_sha256=held[1]).url


def test_a_continued_run_keeps_its_set_which_may_have_moved(
    sets: dict[str, str], tmp_path: Path
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    first = started(keys_of(sets, "latents"), run)
    assert first[FINGERPRINT] == open_dataset(sets["embeddings"]).fingerprint
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
    assert mine[FINGERPRINT] == facts[FINGERPRINT]
    require_same_sets(config, dataset, mine, mine)
    with pytest.raises(DatasetError, match="and the checkpoint was trained on no set of embedd"):
        require_same_sets(config, dataset, mine, {**mine, FINGERPRINT: ""})


def test_a_shard_of_embeddings_that_is_damaged_or_gone_is_named(
    sets: dict[str, str], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(sets["embeddings"], copy)
    stream = opened(keys_of(sets, "latents", f"embedding.url={copy}"), Workers())
    for shard in copy.glob("shard-*"):
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises(ShardCorruptError, match=f"{copy}/shard-0000"):
        stream.batch(0)
    for shard in copy.glob("shard-*"):
        shard.unlink()
    with pytest.raises(StorageError, match=f"{copy}/shard-0000"):
        stream.batch(0)
    stream.close()


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
    assert facts[FINGERPRINT] == open_dataset(sets["embeddings"]).fingerprint
    assert "eval/fd_digits" in facts["scores"]["metrics"]
    assert (tmp_path / "pictures").is_dir()
    assert ddpm_ray.load(tmp_path, "cpu").sample(1).shape == (1, SIDE, SIDE, 1)
    (tmp_path / "run.json").unlink()  # its identity is that of the checkpoint then
    other = again_embedded(sets, tmp_path / "other")
    with pytest.raises(ConfigError, match="but the run began with the set of embeddings"):
        started([*keys, "training.steps=3", f"embedding.url={other}"], tmp_path)


@pytest.fixture(scope="module")
def decoder(sets: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of a decoder of latents."""
    _, *keys = keys_of(sets, "latents")
    return trained(tmp_path_factory.mktemp("decoder"), sets["latents"], *keys)


def test_variations_of_latents_are_of_the_pixels(
    decoder: str, sets: dict[str, str], tmp_path: Path
) -> None:
    """Their embeddings are those that the encoder gives the images; a copy draws the same."""
    model = ddpm_ray.load(decoder, "cpu")
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 1), np.uint8)
    drawn = model.variations(images, per_image=2, seed=3)
    vectors = trained_encoders(sets["encoder"]).embed(PIXELS.encode(torch.from_numpy(images)))
    given = replace(model.denoiser, embeddings=vectors.repeat_interleave(2, 0))
    wanted = replace(model, denoiser=given).sample(4, seed=3)
    np.testing.assert_array_equal(drawn, wanted)
    assert (drawn != model.sample(4, seed=3)).any()
    np.testing.assert_array_equal(
        model.variations(images[1:], per_image=2, seed=3, first=2), drawn[2:]
    )
    with pytest.raises(ValueError, match="images are 8 x 6; variations are drawn of images of"):
        model.variations(images[:, :, :6])


def test_the_job_edit_draws_variations_of_latents(
    decoder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    picture, out = tmp_path / "image.png", tmp_path / "like-it.png"
    Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint8).reshape(SIDE, SIDE)).save(picture)
    words = [decoder, str(picture), "--out", str(out), "kind=variations", "num_images=3"]
    code, _, err = run_job("edit.py", words, monkeypatch, capsys)
    assert code == 0, err
    with Image.open(out) as found:
        assert found.size[0] > 2 * SIDE


def test_samples_of_a_run_have_embeddings_of_decoded_latents(
    decoder: str, sets: dict[str, str]
) -> None:
    """For grids and scores, as the encoder embeds pixels; of pixels, if those are the data."""
    model, encoders = ddpm_ray.load(decoder, "cpu"), trained_encoders(sets["encoder"])
    config = load_config(RunConfig, None, keys_of(sets, "latents"))
    for dataset in KINDS:
        held = open_dataset(sets[dataset])
        shown = training_run.with_inputs_of_data(model.denoiser, config.data, held, 5, CPU)
        stored = training_run.fixed_images(config.data, held, range(5), 5).images
        images = stored
        if dataset == "latents":
            codec = model.denoiser.codec
            images = torch.from_numpy(codec.decode(codec.encode(stored)))
        assert shown.embeddings is not None
        assert torch.equal(shown.embeddings, encoders.embed(PIXELS.encode(images)))


def test_validation_images_have_their_stored_embeddings(
    sets: dict[str, str], by_key: dict[str, Tensor]
) -> None:
    config, dataset, facts = settled(keys_of(sets, "latents"))
    embeddings = stored_embeddings(config, facts)
    whole = training_run.fixed_images(config.data, dataset, range(16), 16, None, embeddings)
    part = training_run.fixed_images(config.data, dataset, range(8, 16), 16, None, embeddings)
    none = training_run.fixed_images(config.data, dataset, range(0), 16, None, embeddings)
    assert whole.embeddings is not None
    assert part.embeddings is not None
    assert none.embeddings is not None
    assert torch.equal(whole.embeddings[8:], part.embeddings)
    assert none.embeddings.shape == (0, 6)
    distance = torch.cdist(whole.embeddings.float(), torch.stack([*by_key.values()]))
    assert distance.min(1).values.max() < 4 * ROUNDING


def test_a_copy_of_a_decoder_of_latents_needs_neither_network_elsewhere(
    sets: dict[str, str], tmp_path: Path
) -> None:
    """As in MLflow: it draws, decodes and embeds when both have gone."""
    root = tmp_path / "gone soon"
    moved = {name: str(root / Path(url).name) for name, url in sets.items()}
    shutil.copytree(Path(sets["pixels"]).parent, root)
    shutil.rmtree(root / "latents")
    assert encode_pixels(root, SIDE) == moved["latents"]
    _, *keys = keys_of(moved, "latents")
    run = trained(tmp_path / "decoder", moved["latents"], *keys)
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 1), np.uint8)
    wanted = ddpm_ray.load(run, "cpu").variations(images)
    assert copy_model(newest_checkpoint(run)[0], tmp_path / "copy") == []
    shutil.rmtree(root)
    model = ddpm_ray.load(tmp_path / "copy", "cpu")
    np.testing.assert_array_equal(model.variations(images), wanted)


def test_a_cascade_with_a_decoder_of_latents_draws_texts_and_variations(
    decoder: str, sets: dict[str, str], tmp_path: Path
) -> None:
    """Prior, decoder of latents, autoencoder, upsampler."""
    embedded = tmp_path / "captioned"
    write_embeddings(embedded, random_embeddings(8, 6), 8, captioned=True)
    found = trained_encoders(sets["encoder"])
    held = {"image_encoder": {"url": found.url, "sha256": found.sha256}}
    prior = trained(tmp_path / "prior", str(embedded), *PRIOR, *DIFFUSION, held=held)
    pack_noise(str(tmp_path / "large"), 3, 2 * SIDE)
    of = f"objective.low_resolution_pixels={SIDE}"
    large = trained(tmp_path / "up", str(tmp_path / "large"), *TINY_UNET, *DIFFUSION, of)
    out = str(tmp_path / "cascade")
    write_cascade(out, joined(prior, decoder, [large], candidates=2)[1])
    cascade = ddpm_ray.load_cascade(out, "cpu")
    drawn = cascade.sample(2, prompts=TEXTS, seed=1)
    assert drawn.shape == (2, 2 * SIDE, 2 * SIDE, 1)
    np.testing.assert_array_equal(cascade.sample(1, prompts=TEXTS, seed=1, first=1), drawn[1:])
    images = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 1), np.uint8)
    assert cascade.variations(images, per_image=2).shape == (2, 2 * SIDE, 2 * SIDE, 1)
