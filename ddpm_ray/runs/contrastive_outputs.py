"""Scores of an image and a text encoder while it trains."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_ray.assembly import run_config, scoring, training_run
from ddpm_ray.collectives import Workers
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.evaluation.retrieval import retrieval_metrics, zero_shot_metrics
from ddpm_ray.evaluation.sample_quality import Batches, Scores, arithmetic
from ddpm_ray.models.contrastive import ContrastiveEncoders
from ddpm_ray.reporting import Sink
from ddpm_ray.runs.autoencoder_outputs import scored_data
from ddpm_ray.runs.kept_scores import keep_scores
from ddpm_ray.sampling.image_text import TrainedEncoders
from ddpm_ray.training.state import TrainingState


def retrieval_scores(
    config: RunConfig,
    wanted: EvaluationConfig,
    dataset: Dataset,
    encoders: TrainedEncoders,
    weights: dict[str, object],
    workers: Workers,
    counted: Callable[[Batches], Batches] = iter,
) -> Scores:
    """Scores of `wanted.num_images` fixed images of `dataset`; all workers must call it.

    Candidates are all their distinct captions, and all of them that have captions. Captions are
    equal if their tokens are. `weights` is the provenance of the weights. `counted` passes each
    batch on and counts it, for a job's progress. Raises ValueError for fewer than 2 images or
    captions.
    """
    total = min(wanted.num_images, dataset.manifest.samples)
    mine, size = workers.share(total), config.sampling.batch_size
    batch = training_run.fixed_images(config.data, dataset, mine, total)
    index = torch.arange(mine.start, mine.stop)
    parts = zip(torch.split(index, size), torch.split(batch.images, size), strict=True)
    found = [
        encoders.image_embeddings(part, batch_size=size)
        for _, part in counted(iter(parts if mine else ()))
    ]
    none = torch.empty(0, encoders.width, device=workers.device)
    given = [[*map(str, texts)] for texts in batch.captions or ()]
    rows = workers.gather((torch.cat([none, *found]).cpu(), batch.labels, given))
    images, labels = (torch.cat([row[i] for row in rows]) for i in range(2))
    captions = [texts for row in rows for texts in row[2]]
    kept = [n for n, texts in enumerate(captions) if texts]
    tokens = encoders.tokenizer.encode([text for n in kept for text in captions[n]])
    distinct, number = torch.unique(tokens, dim=0, return_inverse=True)
    texts = _shared(encoders, distinct, workers)
    owner = [place for place, n in enumerate(kept) for _ in captions[n]]
    pairs = torch.stack([torch.tensor(owner, dtype=torch.int64), number], 1)
    metrics = retrieval_metrics(images[kept], texts, pairs)
    if (names := dataset.manifest.label_names) and len(names) > 1:
        # Not as prompts: a name that is no caption must not end a run after its training.
        of_names = encoders.token_embeddings(encoders.tokenizer.encode(names)).cpu()
        metrics |= zero_shot_metrics(images, of_names, labels)
    return Scores(
        metrics,
        {
            "model": weights | {"data": dataset.fingerprint},
            "retrieval": {
                "images": len(kept),
                "without_caption": len(captions) - len(kept),
                "captions": len(distinct),
                "equal_captions": f"by {encoders.tokenizer.length} tokens",
                "ties": "wrong",
                "labels": list(names),
            },
            "interval": "95 %: Student's t over the queries",
            "arithmetic": arithmetic(workers.device),
        },
    )


def _shared(encoders: TrainedEncoders, tokens: Tensor, workers: Workers) -> Tensor:
    """Embeddings [M, E] of tokens [M, L] on the CPU; each worker embeds its share of them."""
    mine = workers.share(len(tokens))
    some = encoders.token_embeddings(tokens[mine.start : mine.stop])
    return torch.cat(workers.gather(some.cpu()))


class ContrastiveOutputs:
    """Computes scores of the EMA weights of a run with task=contrastive."""

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        state: TrainingState,
        workers: Workers,
        sink: Sink | None,
    ) -> None:
        self._config, self._state, self._workers, self._sink = config, state, workers, sink
        self._dataset = scored_data(config, dataset)
        self._image_shape = dataset.manifest.image_shape

    def evaluate(self, step: int) -> None:
        """Evaluate, store the scores of `step` in the state and pass them to the sink."""
        wanted, state = self._config.evaluation, self._state
        if not wanted.num_images:
            return
        model, tokenizer = state.ema.model, run_config.saved_tokenizer(state.facts)
        assert isinstance(model, ContrastiveEncoders)
        assert tokenizer is not None  # a config with this task has text
        encoders = TrainedEncoders(model, tokenizer, self._image_shape, "", "")
        weights: dict[str, Any] = scoring.ema_provenance(self._config, step, facts=state.facts)
        scores = retrieval_scores(
            self._config, wanted, self._dataset, encoders, weights, self._workers
        )
        keep_scores(scores, step, wanted, state, self._sink)
