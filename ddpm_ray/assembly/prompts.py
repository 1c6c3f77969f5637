"""Prompts of samples, from the captions of a data set where a plan names none."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ddpm_ray.counter_rng import Purpose, uniform_int
from ddpm_ray.data.dataset import Dataset
from ddpm_ray.data.loader import read_captions
from ddpm_ray.sampling.denoiser import Denoiser
from ddpm_ray.sampling.sampling import SamplingPlan

MOST_SAMPLES = 1_000_000  # whose captions prompts are drawn from


def with_prompts(
    plan: SamplingPlan, denoiser: Denoiser, dataset: Dataset, count: int
) -> SamplingPlan:
    """`plan` with the prompts of its first `count` samples, for a model that takes text.

    A plan with prompts keeps them. Else the prompt of sample i is a caption of `dataset` that is
    drawn by (seed, i); a data set without captions gives none. A model that is given the embeddings
    of images has no text then: the captions are those of other images.
    """
    takes = denoiser.takes
    if takes.tokenizer is None or takes.image_encoder or plan.settings.prompts:
        return plan
    if not dataset.manifest.captioned:
        return plan
    prompts = prompts_of_data(dataset, count, plan.settings.seed)
    return replace(plan, settings=replace(plan.settings, prompts=tuple(prompts)))


def held_out_prompts(prompts: Sequence[str], dataset: Dataset) -> frozenset[str]:
    """The prompts that no sample of `dataset` has as a caption, in any case of letters.

    Reads the captions of all shards until each prompt is found. A set without captions, or of more
    than MOST_SAMPLES samples, which would take long, gives none. Raises StorageError.
    """
    if not dataset.manifest.captioned or int(dataset.counts.sum()) > MOST_SAMPLES:
        return frozenset()
    missing = {prompt.casefold() for prompt in prompts if prompt}
    for number in range(len(dataset.counts)):
        if not missing:
            break
        for texts in read_captions(dataset, [number]):
            missing.difference_update(map(str.casefold, texts))
    return frozenset(prompt for prompt in prompts if prompt.casefold() in missing)


def prompts_of_data(dataset: Dataset, count: int, seed: int) -> Sequence[str]:
    """Draw `count` captions of different samples, if there are as many, by (seed, i).

    Reads the captions of all shards, or of the first MOST_SAMPLES samples of a larger set. A sample
    with several captions gives one of them; one without gives "". Raises StorageError.
    """
    shards, samples = 0, 0
    for size in dataset.counts.tolist():
        if samples >= MOST_SAMPLES:
            break
        shards, samples = shards + 1, samples + size
    captions = list(read_captions(dataset, range(shards)))
    index = torch.arange(len(captions))
    keys = uniform_int(seed, Purpose.PROMPT, 0, index, 2**31)
    order = torch.argsort(keys, stable=True).tolist()
    place = torch.arange(count)
    which = uniform_int(seed, Purpose.PROMPT, 1, place, 2**31).tolist()
    chosen = (captions[order[i % len(order)]] for i in range(count))
    return [
        texts[at % len(texts)] if texts else "" for texts, at in zip(chosen, which, strict=True)
    ]
