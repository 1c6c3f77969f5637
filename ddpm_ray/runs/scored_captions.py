"""Whether retrieval can be scored on a data set: checked before a run trains, and by evaluate."""

from ddpm_ray.assembly import training_run
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.dataset import Dataset, DatasetError
from ddpm_ray.data.tokenizer import Tokenizer
from ddpm_ray.models.unet_spec import require_divisible
from ddpm_ray.redaction import counted
from ddpm_ray.runs.autoencoder_outputs import scored_data

READ_AT_ONCE = 256  # images; the first ones are enough for most data sets
REMEDY = "name images with captions (docs/packing.md), or set evaluation.num_images=0 in a run"


def require_scored_captions(config: RunConfig, dataset: Dataset, tokenizer: Tokenizer) -> None:
    """Raise DatasetError if a run on `dataset` is to score retrieval, and cannot.

    `tokenizer` is that of the run. StorageError and DatasetError as of `open_dataset`.
    """
    wanted, channels = config.evaluation, dataset.manifest.image_shape.channels
    if config.traits.embeds and wanted.num_images:
        scored = scored_data(config, dataset)
        require_retrieval(config, scored, wanted.num_images, channels, tokenizer)


def require_retrieval(
    config: RunConfig, dataset: Dataset, num_images: int, channels: int, tokenizer: Tokenizer
) -> None:
    """Raise DatasetError unless retrieval among `num_images` of `dataset` can be scored.

    `config` and `tokenizer` are those of the encoders' run, `channels` is that of its images.
    Reads the images that would be scored until 2 of them have captions, and 2 captions differ.
    """
    manifest, problem = dataset.manifest, ""
    if not manifest.captions:
        problem = "the data set has no captions, and retrieval is scored by them"
    elif manifest.codec != "pixels" or manifest.image_shape.channels != channels:
        held = f"{manifest.codec} of {manifest.image_shape}"
        problem = f"it holds {held}, not images with channels: {channels}"
    if problem:
        raise DatasetError(dataset.url, problem, REMEDY)
    try:
        require_divisible(manifest.image_shape[:2], len(config.contrastive.channel_mults))
    except ValueError as error:
        raise DatasetError(dataset.url, str(error), REMEDY) from error
    total = min(num_images, manifest.samples)
    images, distinct = 0, set[tuple[int, ...]]()
    for start in range(0, total, READ_AT_ONCE):
        some = range(start, min(start + READ_AT_ONCE, total))
        given = training_run.fixed_images(config.data, dataset, some, total).captions or ()
        images += sum(len(texts) > 0 for texts in given)
        tokens = tokenizer.encode([str(text) for texts in given for text in texts])
        distinct.update(map(tuple, tokens.tolist()))
        if images >= 2 and len(distinct) >= 2:
            return
    raise DatasetError(
        dataset.url,
        f"evaluation.num_images is {num_images}, which gives {counted(images, 'image')} with "
        f"captions and {counted(len(distinct), 'distinct caption')}, and retrieval is scored with "
        f"at least 2 of both",
        f"score more images, or {REMEDY}",
    )
