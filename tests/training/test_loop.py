"""A run that was killed ends with the bits of one that was not; a bad step changes nothing.

Run as a module, this file is one of two gloo workers: the test at its end starts it twice.
"""

import contextlib
import copy
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import ddpm_ray
from ddpm_ray import fault_injection
from ddpm_ray.assembly import (
    diffusion,
    latents,
    optimization,
    run_config,
    training_run,
    wrapping,
)
from ddpm_ray.assembly.autoencoder_loading import trained_autoencoder
from ddpm_ray.assembly.frozen_text import text_facts, text_model
from ddpm_ray.assembly.image_encoders import named_encoder, settled_embedding
from ddpm_ray.assembly.prior_loading import trained_prior
from ddpm_ray.collectives import Workers
from ddpm_ray.config.loading import ConfigError, load_config, to_dict
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import open_dataset
from ddpm_ray.data.embedded_stream import EmbeddedStream
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.data.loader import Batch, ShardStream, read_captions
from ddpm_ray.data.tokenized_stream import TokenizedStream
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.diffusion import add_noise
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.fault_injection import InjectedFaultError
from ddpm_ray.reporting import RATES, Command, Progress, Row
from ddpm_ray.storage import object_store
from ddpm_ray.training import loop, rejected_steps
from ddpm_ray.training.checkpoint_writer import CheckpointWriter
from ddpm_ray.training.checkpoints import CheckpointStore
from ddpm_ray.training.divergence_guard import DivergedError, DivergenceGuard
from ddpm_ray.training.loop import train_loop
from ddpm_ray.training.noising import NoisyBatch
from ddpm_ray.training.objective import Objective
from ddpm_ray.training.run import Run
from ddpm_ray.training.sample_grids import SampleGridLogger
from ddpm_ray.training.state import Snapshot
from tests.data.captioned_sets import write_captioned
from tests.data.embedding_sets import embed_images, random_embeddings, write_embeddings
from tests.data.latent_sets import encode_noise
from tests.fixtures.same_bits import assert_same_bits
from tests.fixtures.threaded_workers import OnWorkers
from tests.noise import pack_noise

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
STEPS, EVERY = 8, 3  # checkpoints after 3, 6 and 8; windows of 4 straddle the first two
SIDE, IMAGES = 4, 29  # 7 whole batches of 4 an epoch: the run passes into its second
TINY_UNET = (
    "model.base_channels=4",
    "model.groups=2",
    "model.channel_mults=[1,2]",
    "model.blocks_per_level=1",
    "model.attention_resolutions=[2]",
)
DIT = "model.network=dit"
TINY_DIT = ("model.depth=2", "model.hidden_size=8", "model.heads=2")
OF_DENOISERS = (
    "schedule.num_steps=60",
    "evaluation.validation_every_steps=2",
    "evaluation.validation_images=16",
)
AUTOENCODER = "task=autoencoder"
TINY_AUTOENCODER = (
    "autoencoder.base_channels=4",
    "autoencoder.groups=2",
    "autoencoder.channel_mults=[1,2]",
    "autoencoder.blocks_per_level=1",
    "autoencoder.discriminator_channels=8",
)
CONTRASTIVE = "task=contrastive"
TEXT = (
    "text.encoder=transformer",
    "text.length=6",
    "text.width=8",
    "text.depth=1",
    "text.heads=2",
)
TINY_CONTRASTIVE = (
    "contrastive.width=6",
    "contrastive.base_channels=4",
    "contrastive.groups=2",
    "contrastive.channel_mults=[1,2]",
    "contrastive.blocks_per_level=1",
    *TEXT,
    "training.grid_every_steps=0",
)
PRIOR = "task=prior"
TINY_PRIOR = (
    *OF_DENOISERS,
    "prior.width=8",
    "prior.depth=1",
    "prior.heads=2",
    "training.grid_every_steps=0",
)
FIRST_STEP_WITH_ADVERSARY = 4
FLIPPED = ("data.flip=true", "embedding.dropout=0.3")
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {  # the data set, and overrides
    "pixels": ("pixels", ()),
    "autoencoder": ("larger pixels", (AUTOENCODER,)),
    "adversary": (
        "larger pixels",
        (AUTOENCODER, f"autoencoder.discriminator_from_step={FIRST_STEP_WITH_ADVERSARY}"),
    ),
    "latents": ("latents", ("data.flip=true",)),
    "latents, DiT": ("latents", (DIT,)),
    "decoder": (
        "captioned",
        (*TEXT, "objective.label_dropout=0.5", "embedding.encoder=ENCODERS", *FLIPPED),
    ),
    "decoder of latents": ("latents", ("embedding.encoder=ENCODERS", "embedding.url=OF_LATENTS")),
    "decoder, stored": ("captioned", ("embedding.encoder=ENCODERS", "embedding.url=OF_CAPTIONED")),
    "prior": (
        "embeddings",
        (PRIOR, *TEXT, "objective.label_dropout=0.4", "objective.prediction=x_0"),
    ),
    "prior, frozen text": (
        "embeddings",
        (PRIOR, "text.encoder=contrastive", "text.model=ENCODERS", "objective.prediction=x_0"),
    ),
    "text": ("captioned", (*TEXT, "objective.label_dropout=0.4")),
    "frozen text": (
        "captioned",
        ("text.encoder=contrastive", "text.model=ENCODERS", "objective.label_dropout=0.4"),
    ),
    "contrastive": ("captioned", (CONTRASTIVE,)),
    "infonce": ("captioned", (CONTRASTIVE, "contrastive.loss=infonce")),
}


class Killed(Exception):
    """The process is gone."""


@dataclass
class RecordingSink:
    """A sink like MLflow: the first value of a (key, step) stays, and all others must equal it."""

    values: dict[tuple[str, int], float] = field(default_factory=dict)

    def rows(self, rows: list[Row]) -> None:
        for row in rows:
            for key, value in row.metrics.items():
                first = self.values.setdefault((key, row.step), value)
                assert key in RATES or first == value, f"{key} of step {row.step} was {first}"

    def image(self, key: str, step: int, image: Image.Image) -> None: ...

    def document(self, path: str, content: dict[str, Any]) -> None: ...

    def unsent(self) -> list[Row]:
        return [Row(3, {"train/loss": 0.25})]

    def close(self, patience_s: float) -> int:
        return 0

    def timeless(self) -> dict[tuple[str, int], float]:
        return {place: value for place, value in self.values.items() if place[0] not in RATES}


@dataclass
class SpoiltStream:
    """A stream in which image `position` of the batches of `steps` is NaN."""

    stream: ShardStream
    steps: tuple[int, ...]
    position: int
    waited_s: float = 0.0

    def batch(self, step: int, out: Batch | None = None) -> Batch:
        images, labels = self.stream.batch(step).tensors
        if step in self.steps and self.position in self.stream.positions:
            images = images.float()
            images[self.position - self.stream.positions.start] = math.nan
        return Batch(images, labels)

    def keys(self, step: int) -> list[str]:
        return self.stream.keys(step)

    def close(self) -> None:
        self.stream.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("data"))
    pack_noise(folder, IMAGES, SIDE)
    return folder


@pytest.fixture(scope="module")
def sets(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Small pixels, also with captions, some for a discriminator, latents of the small sides."""
    larger = str(tmp_path_factory.mktemp("larger"))
    pack_noise(larger, IMAGES, 24)
    encoded = encode_noise(tmp_path_factory.mktemp("encoded"), IMAGES, 2 * SIDE)
    captioned = tmp_path_factory.mktemp("captioned")
    write_captioned(captioned, [[f"{n % 5} pears", "a pear"][: n % 3] for n in range(IMAGES)], 10)
    encoders = tmp_path_factory.mktemp("encoders")
    config = configured(str(captioned), CONTRASTIVE, "training.steps=1")
    finished(config, encoders / "checkpoints")
    embedded = tmp_path_factory.mktemp("embedded")
    write_embeddings(embedded, random_embeddings(IMAGES, 6), 10, captioned=True)
    of = {name: tmp_path_factory.mktemp(name) for name in ("OF_LATENTS", "OF_CAPTIONED")}
    embed_images(str(Path(encoded).parent / "pixels"), str(encoders), of["OF_LATENTS"])
    embed_images(str(captioned), str(encoders), of["OF_CAPTIONED"])
    return {
        "embeddings": str(embedded),
        "ENCODERS": str(encoders),
        **{name: str(folder) for name, folder in of.items()},
        "pixels": data,
        "larger pixels": larger,
        "latents": encoded,
        "captioned": str(captioned),
    }


def of_kind(sets: dict[str, str], kind: str, *overrides: str) -> list[str]:
    """The overrides of a run of that kind, its data set among them."""
    name, own = KINDS[kind]
    for place in ("ENCODERS", "OF_LATENTS", "OF_CAPTIONED"):
        own = tuple(one.replace(place, sets.get(place, "")) for one in own)
    return [f"data.url={sets[name]}", *own, *overrides]


def configured(data: str, *overrides: str) -> RunConfig:
    network: tuple[str, ...] = (*OF_DENOISERS, *(TINY_DIT if DIT in overrides else TINY_UNET))
    if AUTOENCODER in overrides:
        network = TINY_AUTOENCODER
    if CONTRASTIVE in overrides:
        network = TINY_CONTRASTIVE
    if PRIOR in overrides:
        network = TINY_PRIOR
    return load_config(
        RunConfig,
        None,
        [
            "name=tiny",
            f"data.url={data}",
            "data.lanes=2",
            *network,
            f"training.steps={STEPS}",
            f"training.checkpoint_every_steps={EVERY}",
            "training.global_batch_size=4",
            "training.log_every_steps=4",
            "training.learning_rate=3e-3",
            "training.warmup_steps=4",
            "training.ema_decay_per_step=0.8",
            *overrides,
        ],
    )


# t is drawn by the losses seen, from the fifth step on: ten of each of two steps, four a batch.
BY_LOSSES = (
    "objective.timesteps=second_moment",
    "objective.loss=hybrid",
    "objective.variance=learned",
    "schedule.num_steps=2",
    "sampling.steps=1",
)
OPEN: list[
    ShardStream | EmbeddedStream | TokenizedStream
] = []  # streams of processes that are gone


@pytest.fixture(autouse=True)
def _closed_streams() -> Iterator[None]:
    yield
    while OPEN:
        OPEN.pop().close()


def streamed(config: RunConfig, workers: Workers) -> ShardStream:
    opened = training_run.stream(config, open_dataset(config.data.url), workers)
    OPEN.append(opened)
    return opened


def with_inputs(
    config: RunConfig, workers: Workers, facts: dict[str, Any]
) -> ShardStream | EmbeddedStream | TokenizedStream:
    dataset = open_dataset(config.data.url)
    OPEN.append(training_run.stream_with_inputs(config, dataset, workers, facts))
    return OPEN[-1]


def captions_facts(config: RunConfig) -> dict[str, Any]:
    """The facts on tokenizer and frozen text encoder of a run with text."""
    if not config.takes_text:
        return {}
    pytest.importorskip("tokenizers", reason="needs the extra [text]")
    if config.text.frozen:
        model = text_model(config.text.frozen, config.text.model, config.text.length)
        return text_facts(model.tokenizer, model)
    captions = read_captions(open_dataset(config.data.url), range(3))
    texts = [text for several in captions for text in several]
    return run_config.tokenizer_facts(Tokenizer.trained(texts, 300, config.text.length))


def begin(
    config: RunConfig,
    folder: Path,
    recorder: RecordingSink | None = None,
    workers: Workers | None = None,
) -> Run:
    """All that a process makes of its config before it trains, and what it finds in `folder`."""
    workers, dataset = workers or Workers(), open_dataset(config.data.url)
    config, encoder = settled_embedding(config, dataset)
    codec = latents.codec_of_data(config.data, dataset)
    facts = {
        "config": to_dict(config),
        "image_shape": list(dataset.manifest.image_shape),
        "data_fingerprint": dataset.fingerprint,
        **latents.codec_facts(codec),
        **captions_facts(config),
        **encoder,
    }
    state = training_run.training_state(config, dataset.manifest.diffused_shape, CPU, facts)
    store = CheckpointStore(str(folder), config.training.keep_checkpoints, planned_every=EVERY)
    log = training_run.step_log(config, dataset.manifest.image_shape, workers)
    guard = DivergenceGuard.of(config.training.on_divergence, config.training.spike_factor)
    if found := store.load():
        state.restore(found[1])
        log.resume(found[1].facts["bands"], found[1].facts["core_seconds"])
        guard.resume(found[1].facts["guard"])
    network = wrapping.wrapped(state, config.training, workers)
    sink = (recorder or RecordingSink()) if workers.is_main else None
    validate: Callable[[int], None] = lambda step: None  # noqa: E731
    if config.traits.draws_images or config.traits.draws_embeddings:
        tokenizer = run_config.saved_tokenizer(facts)
        embedder = named_encoder(config, facts, CPU)
        denoiser = diffusion.denoiser(config, state.ema.model, CPU, codec, tokenizer, embedder)
        plan = diffusion.sampling_plan(config.sampling, denoiser.schedule)
        image_shape = dataset.manifest.image_shape
        grids = SampleGridLogger(denoiser, plan, image_shape, workers, str(folder), sink)
        validate = training_run.validator(config, dataset, state, grids).validate
    return Run(
        plan=training_run.plan(config, workers.count),
        state=state,
        network=network,
        objective=training_run.training_objective(config, state, CPU),
        guard=guard,
        stream=with_inputs(config, workers, facts),
        workers=workers,
        log=log,
        checkpoints=CheckpointWriter(store),
        sink=sink,
        show_progress=lambda progress: Command.NONE,
        draw_grid=lambda step: None,
        draw_strip=lambda step: None,
        evaluate=lambda step: None,
        validate=validate,
    )


def bits(run: Run) -> Snapshot:
    return run.state.snapshot([])


def finished(config: RunConfig, folder: Path) -> tuple[Snapshot, RecordingSink]:
    """The end of a run that nobody disturbs."""
    recorder = RecordingSink()
    run = begin(config, folder, recorder)
    assert train_loop(run)
    return bits(run), recorder


def dies_before_update(run: Run, step: int, patch: pytest.MonkeyPatch) -> None:
    def die(*arguments: Any, **options: Any) -> Tensor:
        if run.state.step + 1 == step:
            raise Killed(f"before the update of step {step}")
        return clip_grad_norm_(*arguments, **options)

    patch.setattr("ddpm_ray.training.state.clip_grad_norm_", die)


def dies_before_save(run: Run, step: int, patch: pytest.MonkeyPatch) -> None:
    save = loop.save

    def die(run: Run) -> None:
        if run.state.step == step:
            raise Killed(f"after the update of step {step}, before its save")
        save(run)

    patch.setattr(loop, "save", die)


def dies_in_save(
    run: Run, step: int, patch: pytest.MonkeyPatch, file: str = "optimizer.safetensors"
) -> None:
    write = object_store.write_bytes

    def die(url: str, data: bytes) -> None:
        if f"step-{step:08d}" in url and url.endswith(f"/{file}"):
            write(url, data[: len(data) // 2])
            raise Killed(f"in the save of step {step}")
        write(url, data)

    patch.setattr(object_store, "write_bytes", die)


def dies_after_commit(run: Run, step: int, patch: pytest.MonkeyPatch) -> None:
    save = loop.save

    def die(run: Run) -> None:
        save(run)
        if run.state.step == step:
            run.checkpoints.wait()
            raise Killed(f"just after the commit of step {step}")

    patch.setattr(loop, "save", die)


Marks: TypeAlias = list[tuple[Callable[..., None], int]]
MARKS: Marks = [
    (dies_before_update, 1),
    (dies_before_update, 3),
    (dies_before_update, 5),
    (dies_before_save, 3),
    (dies_before_save, 6),
    (dies_before_save, 8),
    (dies_in_save, 3),
    (dies_in_save, 6),
    (dies_in_save, 8),
    (dies_after_commit, 3),
    (dies_after_commit, 8),
]
OF_DISCRIMINATOR = partial(dies_in_save, file="discriminator-optimizer.safetensors")
MARKS_OF_KIND: dict[str, Marks] = {
    "pixels": MARKS,
    "autoencoder": [(dies_before_update, 5)],
    "adversary": [  # its discriminator begins between the first two checkpoints
        (dies_before_update, FIRST_STEP_WITH_ADVERSARY - 1),
        (dies_before_save, FIRST_STEP_WITH_ADVERSARY - 1),
        (dies_before_update, FIRST_STEP_WITH_ADVERSARY),
        (dies_before_update, FIRST_STEP_WITH_ADVERSARY + 1),
        (OF_DISCRIMINATOR, 3),
        (OF_DISCRIMINATOR, 6),
        (dies_before_update, 8),
    ],
    "latents": [(dies_before_update, 5), (dies_in_save, 6), (dies_before_save, 8)],
    "latents, DiT": [(dies_before_update, 5), (dies_in_save, 6), (dies_before_save, 8)],
    "decoder of latents": [(dies_before_update, 5), (dies_in_save, 6), (dies_before_save, 8)],
    "contrastive": [(dies_before_update, 5), (dies_in_save, 6)],
}


@pytest.fixture(scope="module")
def unbroken(
    data: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Snapshot, RecordingSink]]:
    """The undisturbed run under some overrides, trained once for all tests."""
    made: dict[tuple[str, ...], tuple[Snapshot, RecordingSink]] = {}

    def run(*overrides: str) -> tuple[Snapshot, RecordingSink]:
        if overrides not in made:
            made[overrides] = finished(
                configured(data, *overrides), tmp_path_factory.mktemp("whole")
            )
        return made[overrides]

    return run


@pytest.fixture
def _reports_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "REPORT_EVERY_S", 0)


@pytest.mark.usefixtures("_reports_at_each_step")
def test_a_run_ends_when_its_core_seconds_are_used_however_often_it_is_killed(
    data: str,
    unbroken: Callable[..., tuple[Snapshot, RecordingSink]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A step takes 1 s: each look at the clock is 1 s later. Then a larger budget goes on."""
    seconds = itertools.count()
    monkeypatch.setattr("time.process_time", lambda: float(next(seconds)))
    config, scored = configured(data, "training.core_seconds=5"), list[int]()
    run = begin(config, tmp_path)
    with monkeypatch.context() as patch:
        dies_before_update(run, 5, patch)
        with pytest.raises(Killed, match="step 5"):
            train_loop(run)
    for _ in range(2):  # the second finds it ended
        run = replace(begin(config, tmp_path), evaluate=scored.append)
        assert train_loop(run)
        assert (run.state.step, run.log.core_s) == (5, 5.0)
    assert scored[0] == 5
    run = begin(configured(data, "training.core_seconds=100"), tmp_path)
    assert train_loop(run)
    assert (run.state.step, run.log.core_s) == (STEPS, float(STEPS))
    assert_same_bits(bits(run), unbroken()[0])


@pytest.mark.usefixtures("_reports_at_each_step")
@pytest.mark.parametrize(
    "kind, dies, step", [(kind, *mark) for kind, marks in MARKS_OF_KIND.items() for mark in marks]
)
def test_a_killed_run_ends_like_an_unbroken_one(
    kind: str,
    dies: Callable[..., None],
    step: int,
    sets: dict[str, str],
    unbroken: Callable[..., tuple[Snapshot, RecordingSink]],
    tmp_path: Path,
) -> None:
    """Bit by bit, both optimisers of an adversarial run; each row is that of an unbroken run."""
    overrides = of_kind(sets, kind)
    config, recorder = configured("", *overrides), RecordingSink()
    wanted, rows = unbroken(*overrides)
    run = begin(config, tmp_path, recorder)
    with pytest.MonkeyPatch.context() as patch:
        dies(run, step, patch)
        with pytest.raises(Killed, match=f"step {step}"):
            train_loop(run)
        with contextlib.suppress(Killed):  # of the thread that was saving
            run.checkpoints.wait()
    again = begin(config, tmp_path, recorder)
    assert again.state.step % EVERY == 0 or again.state.step == STEPS
    assert train_loop(again)
    assert_same_bits(bits(again), wanted)
    assert recorder.timeless() == rows.timeless()


OF_PIXELS = [
    ["model.dropout=0.3"],  # its masks are repeated
    ["model.dropout=0.3", "training.gradient_checkpointing=true"],
    ["training.precision=bf16"],
    ["training.channels_last=true", "training.precision=bf16"],
    ["training.precision=bf16_weights", "training.micro_batch_size=1", "model.dropout=0.3"],
    [
        DIT,
        "training.precision=bf16_weights",
        "training.reduction=elastic",
        "training.reduction_slots=2",
    ],
    ["training.micro_batch_size=1", "data.flip=true"],
    ["training.ema_decay_per_step=0", "training.ema_half_life_images=9"],
    ["seed=18446744073709551557", "schedule.kind=cosine"],
    [*BY_LOSSES],
    ["objective.self_conditioning=true", "objective.weighting=uncertainty"],
    ["model.head_channels=4", "model.dropout=0.3"],
    [DIT],
    [DIT, "model.dropout=0.3", "training.gradient_checkpointing=true"],
    [DIT, "objective.self_conditioning=true", "objective.weighting=uncertainty"],
    ["objective.inpainting_masks=true", "training.micro_batch_size=1", "data.flip=true"],
    [DIT, "objective.inpainting_masks=true"],
    [DIT, *BY_LOSSES],
]


def test_the_discriminator_trains_from_its_first_step_on(
    sets: dict[str, str], unbroken: Callable[..., tuple[Snapshot, RecordingSink]]
) -> None:
    """The equalities above are not those of a discriminator that is never used."""
    wanted, recorder = unbroken(*of_kind(sets, "adversary"))
    alone, _ = unbroken(*of_kind(sets, "autoencoder"))
    used = [recorder.values["train/discriminator", step] > 0 for step in range(1, STEPS + 1)]
    assert used == [step >= FIRST_STEP_WITH_ADVERSARY for step in range(1, STEPS + 1)]
    assert wanted.tensors["discriminator"]["adversarial_weight"] > 0
    assert wanted.tensors["discriminator-optimizer"]  # its moments
    layer = "decoder.conv_out.weight"
    assert not torch.equal(wanted.tensors["model"][layer], alone.tensors["model"][layer])


@pytest.mark.usefixtures("_reports_at_each_step")
@pytest.mark.parametrize(
    "kind, overrides",
    [
        *(("pixels", overrides) for overrides in OF_PIXELS),
        ("adversary", ["training.micro_batch_size=1", "data.flip=true"]),
        ("adversary", ["training.precision=bf16", "training.channels_last=true"]),
        ("adversary", ["training.precision=bf16_weights"]),
        ("latents", ["training.precision=bf16", "training.micro_batch_size=1"]),
        ("latents", ["model.dropout=0.3", "objective.self_conditioning=true"]),
        ("latents, DiT", ["data.flip=true", "model.dropout=0.3"]),
        ("latents", ["objective.inpainting_masks=true", "training.micro_batch_size=1"]),
        ("decoder", ["training.micro_batch_size=1", "training.precision=bf16_weights"]),
        ("decoder of latents", ["training.precision=bf16_weights", "embedding.dropout=0.3"]),
        ("decoder, stored", ["training.micro_batch_size=1", "embedding.dropout=0.3"]),
        ("frozen text", ["training.precision=bf16_weights"]),
        ("prior", ["training.micro_batch_size=1", "training.precision=bf16"]),
        ("prior, frozen text", ["training.precision=bf16_weights"]),
        ("contrastive", ["training.micro_batch_size=1", "data.flip=true"]),
        ("contrastive", ["training.precision=bf16_weights", "training.micro_batch_size=1"]),
        ("infonce", ["training.precision=bf16", "training.channels_last=true"]),
    ],
    ids=str,
)
def test_any_kind_of_run_survives_its_death(
    kind: str,
    overrides: list[str],
    sets: dict[str, str],
    unbroken: Callable[..., tuple[Snapshot, RecordingSink]],
    tmp_path: Path,
) -> None:
    overrides = of_kind(sets, kind, *overrides)
    config, recorder = configured("", *overrides), RecordingSink()
    wanted, rows = unbroken(*overrides)
    run = begin(config, tmp_path, recorder)
    with pytest.MonkeyPatch.context() as patch:
        dies_before_update(run, 5, patch)
        with pytest.raises(Killed, match="step 5"):
            train_loop(run)
    run.checkpoints.wait()
    torch.manual_seed(99)  # another process: its generator stands elsewhere
    again = begin(config, tmp_path, recorder)
    assert again.state.step == 3
    assert train_loop(again)
    assert_same_bits(bits(again), wanted)
    assert recorder.timeless() == rows.timeless()
    assert all(math.isfinite(value) for value in recorder.values.values())


@pytest.mark.parametrize(
    "kind",
    [
        "adversary",
        "latents",
        "latents, DiT",
        "text",
        "decoder",
        "decoder of latents",
        "prior",
        "prior, frozen text",
        "contrastive",
    ],
)
def test_a_killed_run_leaves_the_model_of_an_unbroken_one(
    kind: str, sets: dict[str, str], tmp_path: Path
) -> None:
    """Loaded from its folder, it draws, edits or encodes to the same bytes."""
    config, folders = configured("", *of_kind(sets, kind)), [tmp_path / "whole", tmp_path / "died"]
    finished(config, folders[0] / "checkpoints")
    run = begin(config, folders[1] / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        dies_before_update(run, 5, patch)
        with pytest.raises(Killed, match="step 5"):
            train_loop(run)
    run.checkpoints.wait()
    finished(config, folders[1] / "checkpoints")
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1), np.uint8)
    if kind == "adversary":
        whole, died = (trained_autoencoder(str(folder)) for folder in folders)
        assert died.sha256 == whole.sha256  # by which its latents name it
        assert torch.equal(died.encode_uint8(images).mean, whole.encode_uint8(images).mean)
        return
    if kind == "contrastive":
        ours, theirs = (ddpm_ray.load_encoders(folder, "cpu") for folder in folders)
        assert ours.sha256 == theirs.sha256
        found = ours.similarity(images, ["2 pears", "", "a pear"])
        assert torch.equal(found, theirs.similarity(images, ["2 pears", "", "a pear"]))
        assert found.shape == (2, 3)
        with pytest.raises(ConfigError, match="a contrastive model, which draws no images: load"):
            ddpm_ray.load(folders[0])
        return
    if "prior" in kind:
        priors = [trained_prior(str(folder)) for folder in folders]
        embedded = [one.draw(["3", "a"], range(5), seed=1) for one in priors]
        assert embedded[0].shape == (5, 6)
        assert torch.equal(*embedded)
        with pytest.raises(ConfigError, match="holds a prior, which draws no images: draw its"):
            ddpm_ray.load(folders[0])
        return
    whole_model, died_model = (ddpm_ray.load(str(folder), "cpu") for folder in folders)
    of: dict[str, Any] = {}
    if kind in ("text", "decoder"):
        images, of = images[:, :SIDE, :SIDE], {"prompts": ["2 pears", "a"], "guidance_scale": 2.0}
    drawn = died_model.sample(2, steps=3, **of)
    assert drawn.shape == images.shape
    np.testing.assert_array_equal(drawn, whole_model.sample(2, steps=3, **of))
    edited = died_model.image_to_image(images, 0.5, steps=4)
    np.testing.assert_array_equal(edited, whole_model.image_to_image(images, 0.5, steps=4))
    if kind.startswith("decoder"):
        varied = died_model.variations(images, per_image=2, steps=3)
        assert varied.shape == (4, *images.shape[1:])
        np.testing.assert_array_equal(varied, whole_model.variations(images, per_image=2, steps=3))


@pytest.mark.usefixtures("_reports_at_each_step")
@pytest.mark.parametrize(
    "every, steps",
    [
        (1, [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, [3, 6, 8]),  # 8 is the last: also where it is no multiple
        (5, [5, 8]),
        (20, [8]),
        (0, []),
    ],
)
@pytest.mark.parametrize("dies, step", [(dies_before_update, 7), (dies_in_save, 8)])
def test_each_validation_loss_is_there_once_whatever_died(
    dies: Callable[..., None],
    step: int,
    every: int,
    steps: list[int],
    data: str,
    unbroken: Callable[..., tuple[Snapshot, RecordingSink]],
    tmp_path: Path,
) -> None:
    """Step 7 is taken up from 6, and the last save, of step 8, is made twice."""
    override = f"evaluation.validation_every_steps={every}"
    config, recorder = configured(data, override), RecordingSink()
    wanted, rows = unbroken(override)
    run = begin(config, tmp_path, recorder)
    with pytest.MonkeyPatch.context() as patch:
        dies(run, step, patch)
        with pytest.raises(Killed, match=f"step {step}"):
            train_loop(run)
    again = begin(config, tmp_path, recorder)
    reported: list[list[int]] = []

    def show(progress: Progress) -> Command:
        reported.append([one["step"] for one in progress.validation_losses])
        return Command.NONE

    again.show_progress = show
    assert train_loop(again)
    assert again.state.validation_losses == wanted.facts["probes"]
    assert [one["step"] for one in again.state.validation_losses] == steps
    assert [step for key, step in recorder.values if key == "eval/loss_common"] == steps
    assert recorder.timeless() == rows.timeless()
    assert reported[-1] == steps  # the last one too, before the run ends


def test_a_validation_loss_is_reported_at_once_however_rare_reports_are(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever compares runs stops this one by it."""
    monkeypatch.setattr(loop, "REPORT_EVERY_S", 1e9)
    run = begin(configured(data), tmp_path)
    newest: list[tuple[int, int]] = []

    def show(progress: Progress) -> Command:
        newest.append(
            (
                progress.step,
                progress.validation_losses[-1]["step"] if progress.validation_losses else 0,
            )
        )
        return Command.STOP if progress.step == 4 else Command.NONE

    run.show_progress = show
    assert not train_loop(run)
    assert newest == [(1, 0), (2, 2), (3, 2), (4, 4)]  # the first report, and at saves


def test_a_checkpoint_keeps_the_validation_losses_of_its_step(data: str, tmp_path: Path) -> None:
    """It is written in the background, while the run takes more of them."""
    run = begin(configured(data), tmp_path)
    for _ in range(2):
        run.validate(run.state.step)
        taken = bits(run)
        run.state.step += 2
    run.validate(run.state.step)
    assert [one["step"] for one in taken.facts["probes"]] == [0, 2]


def test_runs_of_another_seed_or_dropout_are_other_runs(
    unbroken: Callable[..., tuple[Snapshot, RecordingSink]],
) -> None:
    """The equalities above are not those of networks that never move."""
    ends = [unbroken(*o)[0] for o in ([], ["seed=1"], ["model.dropout=0.3"], ["data.flip=true"])]
    weights = [end.tensors["ema"]["conv_in.weight"] for end in ends]
    assert all(not torch.equal(weights[0], other) for other in weights[1:])


def test_gradient_checkpointing_changes_memory_alone(
    unbroken: Callable[..., tuple[Snapshot, RecordingSink]],
) -> None:
    dropout = "model.dropout=0.3"
    plain, recomputed = unbroken(dropout), unbroken(dropout, "training.gradient_checkpointing=true")
    assert_same_bits(plain[0], recomputed[0])


def test_a_checkpoint_holds_what_the_next_life_needs(
    data: str, unbroken: Callable[..., tuple[Snapshot, RecordingSink]], tmp_path: Path
) -> None:
    wanted, _ = finished(configured(data), tmp_path)
    found = CheckpointStore(str(tmp_path)).load()
    assert found is not None
    assert_same_bits(found[1], wanted)
    assert found[1].facts["unsent_rows"] == [{"step": 3, "metrics": {"train/loss": 0.25}}]
    assert found[1].facts["config"]["name"] == "tiny"


def test_a_finished_run_run_again_does_nothing(data: str, tmp_path: Path) -> None:
    wanted, _ = finished(configured(data), tmp_path)
    again = begin(configured(data), tmp_path)
    assert train_loop(again)
    assert_same_bits(bits(again), wanted)


@pytest.mark.usefixtures("_reports_at_each_step")
@pytest.mark.parametrize("at", [2, 6, 8])
def test_a_run_that_is_asked_to_stop_commits_and_can_go_on(
    at: int, data: str, unbroken: Callable[..., tuple[Snapshot, RecordingSink]], tmp_path: Path
) -> None:
    config, recorder = configured(data), RecordingSink()
    run = begin(config, tmp_path, recorder)
    run.show_progress = lambda progress: Command.STOP if progress.step >= at else Command.NONE
    assert train_loop(run) == (at == STEPS)
    found = CheckpointStore(str(tmp_path)).load()
    assert found is not None
    assert found[1].step == at
    assert_same_bits(found[1], bits(run))
    again = begin(config, tmp_path, recorder)
    assert train_loop(again)
    assert_same_bits(bits(again), unbroken()[0])
    assert recorder.timeless() == unbroken()[1].timeless()


@pytest.mark.usefixtures("_reports_at_each_step")
def test_a_run_that_is_asked_to_save_commits_and_goes_on(
    data: str, unbroken: Callable[..., tuple[Snapshot, RecordingSink]], tmp_path: Path
) -> None:
    run, reported = begin(configured(data), tmp_path), []

    def show(progress: Progress) -> Command:
        reported.append(progress.checkpoint)
        run.checkpoints.wait()  # what was committed is reported next time
        return Command.CHECKPOINT if progress.step == 3 else Command.NONE

    run.show_progress = show
    assert train_loop(run)
    assert not any("step-00000003" in checkpoint for checkpoint in reported[:3])
    assert "step-00000003" in reported[4]
    assert_same_bits(bits(run), unbroken()[0])


@pytest.mark.usefixtures("_reports_at_each_step")
def test_each_thing_is_done_at_its_steps(data: str, tmp_path: Path) -> None:
    reported: list[tuple[str, int]] = []
    run = begin(
        configured(
            data,
            "training.grid_every_steps=3",
            "evaluation.every_steps=4",
            "evaluation.num_images=2",
        ),
        tmp_path,
    )
    run.draw_grid = lambda step: reported.append(("grid", step))
    run.draw_strip = lambda step: reported.append(("strip", step))
    run.evaluate = lambda step: reported.append(("evaluate", step))

    def show(progress: Progress) -> Command:
        reported.append(("progress", progress.step))
        assert (progress.steps, progress.images_per_s > 0) == (STEPS, True)
        return Command.NONE

    run.show_progress = show
    assert train_loop(run)
    at = {what: [step for name, step in reported if name == what] for what, _ in reported}
    assert at == {
        "grid": [0, 3, 6, 8],
        "strip": [8],
        "evaluate": [4, 8],
        "progress": list(range(1, STEPS + 1)),
    }


def weights(run: Run) -> list[Tensor]:
    return [
        value.clone()
        for value in (*run.state.model.parameters(), *run.state.ema.model.parameters())
    ]


def spoil(run: Run, *steps: int, position: int) -> None:
    assert isinstance(run.stream, ShardStream)
    run.stream = SpoiltStream(run.stream, tuple(step - 1 for step in steps), position)


@pytest.mark.parametrize("micro_batch", [0, 1, 3])
def test_a_nan_stops_before_the_update_and_names_its_image(
    micro_batch: int, data: str, tmp_path: Path
) -> None:
    config = configured(data, f"training.micro_batch_size={micro_batch}")
    run = begin(replace(config, training=replace(config.training, steps=4)), tmp_path / "before")
    assert train_loop(run)
    wanted = bits(run)
    run = begin(config, tmp_path / "run")
    spoil(run, 5, position=2)
    (guilty,) = run.stream.keys(4)[2:3]
    with pytest.raises(DivergedError, match=rf"step 5: .* nan, from 1 sample: {guilty}; nothing"):
        train_loop(run)
    assert_same_bits(bits(run), wanted)


def test_an_infinite_gradient_of_finite_losses_names_the_whole_batch(
    data: str, tmp_path: Path
) -> None:
    run = begin(configured(data), tmp_path)
    for parameter in run.state.model.parameters():
        parameter.register_hook(lambda gradient: gradient / 0.0)
    before, keys = weights(run), run.stream.keys(0)
    with pytest.raises(DivergedError, match=r"step 1: .* from 4 samples") as stopped:
        train_loop(run)
    assert stopped.value.args[3] == keys
    assert all(map(torch.equal, weights(run), before))


def test_a_skipped_step_changes_nothing_and_is_the_same_on_replay(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 5 is NaN; the run dies in step 6 and goes on from the checkpoint after step 3."""
    config = configured(data, "training.on_divergence=skip")
    unbroken, died = RecordingSink(), RecordingSink()
    wanted = begin(config, tmp_path / "unbroken", unbroken)
    spoil(wanted, 5, position=2)
    assert train_loop(wanted)

    monkeypatch.setenv(fault_injection.VARIABLE, f"{tmp_path / 'fired'} fail@batch:6")
    for dies in (True, False):
        run = begin(config, tmp_path / "died", died)
        spoil(run, 5, position=2)
        death = pytest.raises(InjectedFaultError, match="at batch, step 6")
        with death if dies else contextlib.nullcontext():
            train_loop(run)
    assert_same_bits(bits(run), bits(wanted))
    assert died.timeless() == unbroken.timeless()
    assert run.guard == wanted.guard
    assert unbroken.values["train/skipped", 5] == 1
    losses = sorted(step for key, step in unbroken.values if key == "train/loss")
    assert losses == [1, 2, 3, 4, 6, 7, 8]


@pytest.mark.parametrize("kind", ["pixels", "adversary", "latents"])
def test_a_rewound_run_has_the_weights_of_its_checkpoint_and_is_the_same_on_replay(
    kind: str, sets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 5 is NaN, and the checkpoint before it that of step 3: steps 4 and 5 leave no trace in
    the weights, of a discriminator too. Killed before or after that is committed, the run ends
    alike."""
    config = configured("", *of_kind(sets, kind), "training.on_divergence=rewind")
    unbroken = RecordingSink()
    before = begin(replace(config, training=replace(config.training, steps=3)), tmp_path / "three")
    assert train_loop(before)
    wanted = begin(config, tmp_path / "unbroken", unbroken)
    spoil(wanted, 5, position=2)
    found: list[Snapshot] = []
    save = loop.save

    def noted(run: Run) -> None:
        found.append(run.state.snapshot([]))
        save(run)

    monkeypatch.setattr(loop, "save", noted)
    assert train_loop(wanted)
    (rewound,) = [snapshot for snapshot in found if snapshot.step == 5]
    three = bits(before)
    assert rewound.tensors.keys() == three.tensors.keys()
    for group, tensors in three.tensors.items():
        assert rewound.tensors[group].keys() == tensors.keys()
        for key, value in tensors.items():
            assert torch.equal(rewound.tensors[group][key], value), key
    assert unbroken.values["train/skipped", 5] == 1
    assert sorted(step for key, step in unbroken.values if key == "train/loss") == [
        1,
        2,
        3,
        4,
        6,
        7,
        8,
    ]

    for number, at in enumerate(("snapshot:5", "batch:6", "batch:7")):
        folder, died = tmp_path / f"died-{number}", RecordingSink()
        monkeypatch.setenv(fault_injection.VARIABLE, f"{folder}-fired fail@{at}")
        for dies in (True, False):
            run = begin(config, folder, died)
            spoil(run, 5, position=2)
            death = pytest.raises(InjectedFaultError, match="injected fault at")
            with death if dies else contextlib.nullcontext():
                train_loop(run)
            run.checkpoints.wait()
        assert_same_bits(bits(run), bits(wanted))
        assert died.timeless() == unbroken.timeless()
        assert run.guard == wanted.guard


def shows(run: Run) -> list[tuple[str, int]]:
    """Stand-ins for what is drawn and scored of a step's weights; which are done, in order."""
    done: list[tuple[str, int]] = []

    def evaluate(step: int) -> None:
        done.append(("scores", step))
        fd = float(sum(parameter.sum() for parameter in run.state.ema.model.parameters()))
        run.state.scores = {"step": step, "metrics": {"eval/fd": fd}}
        assert run.sink is not None
        run.sink.rows([Row(step, {"eval/fd": fd})])

    run.draw_grid = lambda step: done.append(("grid", step))
    run.draw_strip = lambda step: done.append(("strip", step))
    run.evaluate = evaluate
    return done


@pytest.mark.usefixtures("_reports_at_each_step")
@pytest.mark.parametrize(
    "step, checkpoints, every",
    [
        (5, 3, 0),  # a step of which nothing else is due
        (5, 3, 5),
        (6, 3, 0),
        (6, 3, 2),
        (8, 3, 0),  # the last
        (8, 3, 2),
        (8, 4, 0),
        (8, 4, 2),
    ],
)
def test_a_run_goes_back_at_any_step_and_is_the_same_on_replay(
    step: int,
    checkpoints: int,
    every: int,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever else is due at the step that diverged: a checkpoint, a validation, the last step."""
    config = configured(
        data,
        "training.on_divergence=rewind",
        f"training.checkpoint_every_steps={checkpoints}",
        f"evaluation.validation_every_steps={every}",
        "evaluation.num_images=2",
    )
    recorder, died = RecordingSink(), RecordingSink()
    wanted = begin(config, tmp_path / "unbroken", recorder)
    spoil(wanted, step, position=2)
    done = shows(wanted)
    assert train_loop(wanted)
    assert done == [("grid", 0), ("grid", STEPS), ("strip", STEPS), ("scores", STEPS)]
    assert wanted.state.scores["step"] == STEPS
    due = [at for at in range(1, STEPS + 1) if every and (at % every == 0 or at == STEPS)]
    assert [one["step"] for one in wanted.state.validation_losses] == due

    monkeypatch.setenv(fault_injection.VARIABLE, f"{tmp_path / 'fired'} fail@snapshot:{step}")
    for dies in (True, False):
        run = begin(config, tmp_path / "died", died)
        spoil(run, step, position=2)
        shows(run)
        death = pytest.raises(InjectedFaultError, match=f"at snapshot, step {step}")
        with death if dies else contextlib.nullcontext():
            train_loop(run)
        run.checkpoints.wait()
    assert_same_bits(bits(run), bits(wanted))
    assert run.state.scores == wanted.state.scores
    assert died.timeless() == recorder.timeless()


def test_a_run_that_diverges_again_and_again_goes_back_to_the_same_checkpoint(
    data: str, tmp_path: Path
) -> None:
    """Each time it commits; that of step 3 is kept though two newer ones are there."""
    config = configured(
        data, "training.on_divergence=rewind", "training.steps=9", "training.keep_checkpoints=2"
    )
    three = begin(replace(config, training=replace(config.training, steps=3)), tmp_path / "three")
    assert train_loop(three)
    run = begin(config, tmp_path / "run")
    spoil(run, 4, 5, 6, position=1)
    shows(run)
    weights_at: dict[int, list[Tensor]] = {}

    def show(progress: Progress) -> Command:
        weights_at[progress.step] = weights(run)
        return Command.NONE

    run.show_progress = show
    assert train_loop(run)
    for step in (4, 5, 6):
        assert all(map(torch.equal, weights_at[step], weights(three))), step


@pytest.mark.parametrize("policy", ["stop", "rewind"])
def test_a_diverged_run_that_waits_for_the_storage_does_not_look_stalled(
    policy: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver restarts workers that stand still within a step, but not those between steps."""
    run = begin(configured(data, f"training.on_divergence={policy}"), tmp_path)
    spoil(run, 5, position=2)
    shows(run)
    wait, points = run.checkpoints.wait, set[str]()

    def waiting() -> None:
        if run.guard.skipped:
            points.add(fault_injection.position().point)
        wait()

    monkeypatch.setattr(run.checkpoints, "wait", waiting)
    ends = pytest.raises(DivergedError, match="step 5") if policy == "stop" else None
    with ends or contextlib.nullcontext():
        train_loop(run)
    assert points <= {"between", "snapshot"}
    assert "between" in points


@pytest.mark.usefixtures("_reports_at_each_step")
@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("dies", ["before its scores", "after its rows", "in its second save"])
def test_scoring_comes_after_the_checkpoint_and_is_made_up_for(
    dies: str, step: int, data: str, tmp_path: Path
) -> None:
    """Step 4 is no step of a planned checkpoint, 8 is the last. No step is trained twice, and rows
    and scores are those of a run that nobody disturbed."""
    config = configured(data, "evaluation.every_steps=4", "evaluation.num_images=2")
    recorder, died = RecordingSink(), RecordingSink()
    wanted = begin(config, tmp_path / "unbroken", recorder)
    shows(wanted)
    assert train_loop(wanted)
    run = begin(config, tmp_path / "died", died)
    shows(run)
    evaluate, save = run.evaluate, loop.save

    def dying(at: int) -> None:
        committed = CheckpointStore(str(tmp_path / "died")).load()
        assert committed is not None
        assert committed[1].step == at
        if at == step and dies == "before its scores":
            raise Killed(f"in the scores of step {step}")
        evaluate(at)
        if at == step and dies == "after its rows":
            raise Killed(f"in the scores of step {step}")

    def dying_save(run: Run) -> None:
        if dies == "in its second save" and run.state.scores.get("step") == step:
            raise Killed(f"with the scores of step {step}")
        save(run)

    run.evaluate = dying
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save", dying_save)
        with pytest.raises(Killed, match=f"scores of step {step}"):
            train_loop(run)
    again = begin(config, tmp_path / "died", died)
    assert again.state.step == step
    done = shows(again)
    assert train_loop(again)
    assert [at for what, at in done if what == "scores"] == list(range(step, STEPS + 1, 4))
    assert_same_bits(bits(again), bits(wanted))
    assert died.timeless() == recorder.timeless()
    found = CheckpointStore(str(tmp_path / "died")).load()
    assert found is not None
    assert found[1].facts["scores"] == wanted.state.scores != {}
    once_more = begin(config, tmp_path / "died", died)
    done = shows(once_more)
    assert train_loop(once_more)
    assert done == []


def test_a_finished_run_without_scores_is_scored_when_it_is_continued(
    data: str, tmp_path: Path
) -> None:
    """As the checkpoints of earlier versions may be, which went back at their last step."""
    finished(configured(data), tmp_path)
    recorder = RecordingSink()
    run = begin(configured(data, "evaluation.num_images=2"), tmp_path, recorder)
    done = shows(run)
    assert train_loop(run)
    assert done == [("scores", STEPS)]
    assert ("eval/fd", STEPS) in recorder.values


def test_without_grids_nothing_is_drawn(data: str, tmp_path: Path) -> None:
    """training.grid_every_steps=0 says none, and that is none at the end either."""
    run = begin(configured(data, "training.grid_every_steps=0"), tmp_path)
    done = shows(run)
    assert train_loop(run)
    assert done == [("scores", STEPS)]


def test_a_run_that_cannot_go_back_stops(data: str, tmp_path: Path) -> None:
    run = begin(configured(data, "training.on_divergence=rewind"), tmp_path)
    spoil(run, 2, position=1)
    with pytest.raises(DivergedError, match=r"step 2: "):
        train_loop(run)


def test_a_run_that_skips_all_of_its_steps_ends(data: str, tmp_path: Path) -> None:
    run = begin(configured(data, "training.on_divergence=skip", "training.steps=50"), tmp_path)
    for parameter in run.state.model.parameters():
        parameter.register_hook(lambda gradient: gradient * math.nan)
    before = weights(run)
    with pytest.raises(DivergedError, match=r"step 11: the gradient's norm is nan"):
        train_loop(run)
    assert all(map(torch.equal, weights(run), before))


def test_the_error_stays_short_and_survives_a_pickle() -> None:
    error = DivergedError(3, math.inf, math.inf, [f"key-{i}" for i in range(100)])
    assert "from 100 samples" in str(error)
    assert "key-7 ...;" in str(error)
    assert str(copy.copy(error)) == str(error)


# What one worker computes of a batch, and what several compute of its parts.


@pytest.mark.usefixtures("_reports_at_each_step")
@pytest.mark.parametrize(
    "kind",
    [
        "adversary",
        "latents",
        "text",
        "frozen text",
        "decoder",
        "decoder of latents",
        "contrastive",
        "infonce",
    ],
)
def test_with_elastic_reduction_workers_come_and_go_and_leave_the_same_bits(
    kind: str,
    sets: dict[str, str],
    unbroken: Callable[..., tuple[Snapshot, RecordingSink]],
    on_workers: OnWorkers,
    tmp_path: Path,
) -> None:
    """2 workers, then 4, then 1. Validation sees batches of other sizes, so it is off here."""
    off = ["evaluation.validation_every_steps=0"] if "latents" in kind else []
    elastic = "training.reduction=elastic", "training.reduction_slots=4"
    overrides = of_kind(sets, kind, *elastic, *off)
    wanted, rows = unbroken(*overrides)
    config, recorder, lock = configured("", *overrides), RecordingSink(), Lock()

    def train(workers: Workers, until: int) -> Snapshot:
        with lock:  # weights begin from torch's one generator
            run = begin(config, tmp_path, recorder, workers)
        run.show_progress = lambda progress: (
            Command.STOP if progress.step >= until else Command.NONE
        )
        train_loop(run)
        return bits(run)

    for count, until in ((2, 5), (4, 7), (1, STEPS)):
        ends = on_workers(count, partial(train, until=until))
    assert_same_bits(ends[0], wanted)
    assert recorder.timeless() == rows.timeless()


def gradient_of(
    config: RunConfig, tmp_path: Path, workers: Workers, micro_batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, t and the gradient of a worker's share of global batch 0."""
    torch.manual_seed(5)
    state = training_run.training_state(config, ImageShape(SIDE, SIDE, 1), CPU, {})
    for parameter in state.model.parameters():
        nn.init.normal_(parameter, std=0.3)
    batch = streamed(config, workers).batch(0)
    objective = diffusion.objective(config, state, CPU)
    losses, t, _ = objective.backward(state.model, batch, 0, workers, micro_batch)
    gradients = [p.grad.flatten() for p in state.model.parameters() if p.grad is not None]
    return losses, t, torch.cat(gradients)


@pytest.mark.parametrize("micro_batch", [1, 3, 4])
def test_micro_batches_give_the_gradient_of_the_whole(
    micro_batch: int, data: str, tmp_path: Path
) -> None:
    config = configured(data, "data.flip=true", "training.global_batch_size=8")
    whole = gradient_of(config, tmp_path, Workers(), 8)
    parts = gradient_of(config, tmp_path, Workers(), micro_batch)
    assert torch.equal(parts[1], whole[1])  # the same t
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-5, atol=1e-6)  # so the same noise
    torch.testing.assert_close(parts[2], whole[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_workers_gradients_average_to_that_of_one(
    count: int, data: str, tmp_path: Path
) -> None:
    """DDP averages; so each worker's gradient is that of its own share's mean."""
    config = configured(data, "data.flip=true", "training.global_batch_size=8")
    whole = gradient_of(config, tmp_path, Workers(), 8)
    parts = [gradient_of(config, tmp_path, Workers(rank, count), 8) for rank in range(count)]
    losses, log_snr, gradients = (list(column) for column in zip(*parts, strict=True))
    assert torch.equal(torch.cat(log_snr), whole[1])
    torch.testing.assert_close(torch.cat(losses), whole[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.stack(gradients).mean(0), whole[2], rtol=1e-4, atol=1e-6)


def test_what_is_drawn_is_a_function_of_step_and_position(data: str) -> None:
    """Another step draws other t, noise and flips for the same images."""
    objective = objective_of(configured(data, "data.flip=true"))
    images = torch.arange(8 * 16, dtype=torch.uint8).view(8, SIDE, SIDE, 1)
    seen: list[Tensor] = []
    for step, positions in ((3, range(8)), (3, range(4, 8)), (4, range(8))):
        part = images[positions.start : positions.stop]
        shown = noisy_batch(objective, part, step, positions.start)
        x_t = add_noise(objective.schedule, shown.x_0, shown.t, shown.noise)
        seen.append(torch.cat([x_t.flatten(1), shown.t[:, None]], 1))
    assert torch.equal(seen[1], seen[0][4:])
    assert not (seen[2] == seen[0]).all(1).any()
    assert seen[0][:, -1].min() >= 1
    assert seen[0][:, -1].max() <= 60


NO_LABELS = torch.full((2,), -1)


def objective_of(config: RunConfig) -> Objective:
    return diffusion.objective(
        config, training_run.training_state(config, ImageShape(SIDE, SIDE, 1), CPU, {}), CPU
    )


def noisy_batch(objective: Objective, images: Tensor, step: int = 0, first: int = 0) -> NoisyBatch:
    """Of images without labels at positions `first` ... of batch `step`."""
    count = len(images)
    positions, labels = torch.arange(first, first + count), torch.full((count,), -1)
    return objective.noising.noisy_batch(Batch(images, labels), step, positions, CPU)


class OneNumber(nn.Module):
    """A network of one number, its prediction everywhere, that also draws as dropout does."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.tensor(number))
        self.drawn: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.drawn.append(torch.rand(4))
        return self.number.expand(x_t.shape)


def test_dropout_draws_anew_at_each_step_and_worker_and_repeats_each(data: str) -> None:
    objective, network = objective_of(configured(data, "model.dropout=0.1")), OneNumber(0.0)
    images = torch.zeros(2, SIDE, SIDE, 1, dtype=torch.uint8)
    for step, rank in ((5, 0), (6, 0), (5, 1), (5, 0)):
        objective.backward(network, Batch(images, NO_LABELS), step, Workers(rank, 2), 1)
    draws = [tuple(draw.tolist()) for draw in network.drawn]  # two micro-batches a call
    assert len(set(draws)) == 6
    assert draws[6:] == draws[:2]


def test_an_infinite_loss_makes_the_gradient_nan_on_all_workers(data: str) -> None:
    """1e25 squared is no float32, though its slope is: the sum over workers must tell them all."""
    objective, network = objective_of(configured(data)), OneNumber(1e25)
    images = torch.zeros(2, SIDE, SIDE, 1, dtype=torch.uint8)
    losses, *_ = objective.backward(network, Batch(images, NO_LABELS), 0, Workers(), 2)
    assert losses.isinf().all()
    assert network.number.grad is not None
    assert network.number.grad.isnan()


def test_the_loss_of_a_silent_network_is_the_noise_power(data: str) -> None:
    """Predicting 0 costs E[epsilon^2] = 1 per pixel: over 4096 images to 4 standard errors."""
    objective = objective_of(configured(data))
    images = torch.zeros(4096, SIDE, SIDE, 1, dtype=torch.uint8)
    losses = objective.losses(OneNumber(0.0), noisy_batch(objective, images), 0)
    assert losses.mean().item() == pytest.approx(1, abs=4 * math.sqrt(2 / (4096 * 16)))


def test_each_image_of_a_batch_has_its_own_step_of_noise(data: str) -> None:
    objective = objective_of(configured(data))
    images = torch.zeros(60, SIDE, SIDE, 1, dtype=torch.uint8)
    t = noisy_batch(objective, images).t
    assert 1 <= int(t.min()) <= int(t.max()) <= 60
    assert len(t.unique()) > 25  # of 60 draws from 60 steps 38 are expected to differ


def test_half_of_the_images_are_mirrored(data: str) -> None:
    objective = objective_of(configured(data, "data.flip=true"))
    image = torch.arange(16, dtype=torch.uint8).view(1, SIDE, SIDE, 1)
    shown = noisy_batch(objective, image.expand(1000, -1, -1, -1)).x_0
    mirrored = shown[:, 0, 0, 0] > shown[:, 0, 0, 1]  # the rows rise
    assert 437 <= int(mirrored.sum()) <= 563  # 4 standard deviations


# Schedules of the rate and of the average.


def rates(data: str, *overrides: str) -> list[float]:
    rate = optimization.learning_rate(configured(data, *overrides).training)
    return [rate(step) for step in range(20)]


def test_a_warm_up_in_steps_and_in_images_agree(data: str) -> None:
    images = rates(data, "training.warmup_steps=0", "training.warmup_images=32")
    assert images == rates(data, "training.warmup_steps=8")  # of 4 images each
    assert images[:8] == pytest.approx([3e-3 * k / 8 for k in range(1, 9)])
    assert images[7:] == [3e-3] * 13
    assert rates(data, "training.warmup_steps=0") == [3e-3] * 20


def test_an_average_in_steps_and_in_images_agree(data: str) -> None:
    """A half-life of 40 images is one of 10 steps of 4: decay^10 is 1/2."""
    by_images = ["training.ema_decay_per_step=0", "training.ema_half_life_images=40"]
    plain = training_run.ema_decay(configured(data, *by_images, "training.ema_ramp=false").training)
    assert plain(0) ** 10 == pytest.approx(0.5)
    assert plain(0) == plain(10**6)
    ramped = training_run.ema_decay(configured(data, *by_images).training)
    assert ramped(0) == pytest.approx(0.1)  # the second weights count for 9 parts in 10
    assert ramped(10**6) == plain(0)


def test_rows_hold_the_rate_that_was_used(
    data: str, unbroken: Callable[..., tuple[Snapshot, RecordingSink]]
) -> None:
    reported = [unbroken()[1].values["train/lr", step] for step in range(1, STEPS + 1)]
    assert reported == rates(data)[:STEPS]


def test_gradients_are_clipped_to_the_configured_norm(data: str, tmp_path: Path) -> None:
    """Adam hides the size of a gradient, so plain descent of rate 1 shows it: it moves by it."""
    run = begin(configured(data, "training.max_grad_norm=0.01"), tmp_path)
    run.state.optimizer = torch.optim.SGD(run.state.model.parameters(), fused=True)
    run.plan = replace(run.plan, learning_rate=lambda step: 1.0)
    before = weights(run)[: len(list(run.state.model.parameters()))]
    loop.take_step(run)
    moved = torch.cat([(a - b).flatten() for a, b in zip(weights(run), before, strict=False)])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


# Two processes.


def steps_alone(run: Run) -> None:
    """A step, and what the host makes of the device's decision on it."""
    loop.take_step(run)
    rejected_steps.handle_rejected(run, run.log.read())


def gloo_worker(rank: int, folder: Path, data: str, captioned: str) -> dict[str, Any]:
    """Train, then meet a NaN that is on worker 1."""
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2
    )
    workers, recorder, config = Workers(rank, 2), RecordingSink(), configured(data)
    run = begin(config, folder / "run", recorder, workers)
    train_loop(run)
    by_losses = RecordingSink()
    train_loop(begin(configured(data, *BY_LOSSES), folder / "by_losses", by_losses, workers))
    pairs = RecordingSink()
    texts = configured("", *of_kind({"captioned": captioned}, "contrastive"))
    train_loop(begin(texts, folder / "pairs", pairs, workers))
    run = begin(config, folder / "spoilt", None, workers)
    spoil(run, 2, position=3)
    guilty = run.stream.keys(1)
    before = weights(run)
    steps_alone(run)
    moved, after = not all(map(torch.equal, weights(run), before)), weights(run)
    try:
        steps_alone(run)
    except DivergedError as error:
        reported = list(error.args)
    same = all(map(torch.equal, weights(run), after))
    dist.destroy_process_group()
    losses, weighed, paired = (
        [value for (key, _), value in sorted(of.values.items()) if key == "train/loss"]
        for of in (recorder, by_losses, pairs)
    )
    return {
        "losses": losses,
        "weighed": weighed,
        "paired": paired,
        "step": reported[0],
        "named": reported[3],
        "same": same,
        "moved": moved,
        "last_key": guilty[-1],
    }


@pytest.mark.timeout(400)  # both import torch anew
def test_two_processes_train_as_one_and_stop_together(
    data: str,
    sets: dict[str, str],
    unbroken: Callable[..., tuple[Snapshot, RecordingSink]],
    tmp_path: Path,
) -> None:
    """A contrastive loss, too, which compares the images of one with the captions of the other."""
    program = [sys.executable, "-m", "tests.training.test_loop"]
    places = [str(tmp_path), data, sets["captioned"]]
    commands = [[*program, str(rank), *places] for rank in (0, 1)]
    workers = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    try:
        ended = [worker.communicate(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], ended[0][1] + ended[1][1]
    main_worker, other = (json.loads(out.splitlines()[-1]) for out, _ in ended)
    pairs = of_kind(sets, "contrastive")
    for name, overrides in (("losses", ()), ("weighed", BY_LOSSES), ("paired", tuple(pairs))):
        values = unbroken(*overrides)[1].values
        alone = [values["train/loss", step] for step in range(1, STEPS + 1)]
        assert main_worker[name] == pytest.approx(alone, rel=1e-5)
    assert other["losses"] == []  # the main worker alone reports
    for reported in (main_worker, other):
        assert (reported["step"], reported["moved"], reported["same"]) == (2, True, True)
        assert reported["named"] == [other["last_key"]]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(gloo_worker(int(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])))
