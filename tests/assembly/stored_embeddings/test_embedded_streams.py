"""Streams with stored embeddings: each image has its own, and no encoder is called."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("tokenizers", reason="needs the extra [text]")

from ddpm_ray.assembly import latents, training_run
from ddpm_ray.assembly.image_embeddings import stored_embeddings
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.embedded_stream import EmbeddedStream
from ddpm_ray.data.shards import ShardCorruptError
from ddpm_ray.storage.errors import StorageError
from tests.assembly.stored_embeddings.stored_sets import (
    CPU,
    IMAGES,
    KINDS,
    ROUNDING,
    keys_of,
    opened,
    settled,
)


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
