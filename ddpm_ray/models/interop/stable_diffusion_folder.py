"""Read the folder of a StableDiffusionPipeline that diffusers saved.

The text encoder is read as ours, which has CLIP's function, so that the model is whole in one
state dict. A model that cannot be converted exactly is refused.
"""

from pathlib import Path
from typing import Any, NamedTuple

from ddpm_ray.models.interop.clip_text import read_clip_text
from ddpm_ray.models.interop.diffusers_config import (
    Config,
    UnsupportedModelError,
    image_size_of,
)
from ddpm_ray.models.interop.diffusers_files import read_json, read_weights, weights_file
from ddpm_ray.models.interop.diffusers_folders import (
    MODEL_INDEX,
    DiffusersModel,
    autoencoder_of,
)
from ddpm_ray.models.interop.diffusers_schedulers import OF_TRAINING, SAMPLING, from_scheduler
from ddpm_ray.models.interop.diffusers_text_unet import CLASS, text_unet_from_diffusers
from ddpm_ray.models.interop.transformers_text import clip_tokenizer_json

READ = "DDPMScheduler", "DDIMScheduler"  # whose sampling settings are read
SAMPLERS = {"PNDMScheduler": "plms", "DPMSolverMultistepScheduler": "dpm_solver_pp"}
SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
PIPELINES = "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"  # of these parts alone


class TokenizerFiles(NamedTuple):
    """The tokenizer of a pipeline."""

    json: str  # content of its tokenizer.json
    length: int  # tokens of a row
    pad: str  # the token that fills rows; empty: unknown


def is_stable_diffusion(folder: str | Path) -> bool:
    """Whether a local folder holds a StableDiffusionPipeline, or another one with its network."""
    config = Path(folder, "unet/config.json")
    return config.is_file() and read_json(config).get("_class_name") == CLASS


def read_tokenizer_files(folder: str | Path) -> TokenizerFiles:
    """Read tokenizer/: tokenizer.json, or CLIP's vocab.json and merges.txt.

    Raises UnsupportedModelError.
    """
    home = Path(folder, "tokenizer")
    config = read_json(home / SPECIAL[0])
    length = config.get("model_max_length")
    if not isinstance(length, int):
        raise UnsupportedModelError(str(home), f"model_max_length is {length!r}, and no number")
    try:
        if (home / "tokenizer.json").is_file():
            content = (home / "tokenizer.json").read_text("utf-8")
        else:
            merges = (home / "merges.txt").read_text("utf-8")
            content = clip_tokenizer_json(str(home), read_json(home / "vocab.json"), merges)
    except (OSError, UnicodeDecodeError) as error:
        raise UnsupportedModelError(str(home), f"cannot be read: {error}") from error
    return TokenizerFiles(content, length, _pad_token(home))


def read_stable_diffusion(
    folder: str | Path, end_token: int, null_tokens: tuple[int, ...]
) -> DiffusersModel:
    """Read the model, whose tensors include those of the text encoder.

    The tokens are those of its tokenizer: the end of a text, and the row of "". The weights of the
    autoencoder are not read. Raises UnsupportedModelError.
    """
    home = Path(folder)
    if (index := home / MODEL_INDEX).is_file():
        name = read_json(index).get("_class_name")
        if name not in PIPELINES:
            raise UnsupportedModelError(
                str(index), f"_class_name is {name!r}; supported is {' or '.join(PIPELINES)}"
            )
    text, of_text = read_clip_text(home / "text_encoder", end_token, null_tokens)
    config = read_json(home / "unet/config.json")
    spec, tensors = text_unet_from_diffusers(
        config, read_weights(weights_file(home / "unet")), text
    )
    if spec.condition_channels:
        raise UnsupportedModelError(
            str(home / "unet"),
            f"in_channels is {config['in_channels']}; supported is {spec.image_channels}, as of a "
            "network without conditioning images",
        )
    tensors |= {f"text.encoder.{name}": one for name, one in of_text.items()}
    facts = _facts(read_json(home / "scheduler/scheduler_config.json"))
    autoencoder, factor = autoencoder_of(folder, spec.image_channels)
    if not autoencoder:
        raise UnsupportedModelError(str(folder), "there is no autoencoder in vae/")
    return DiffusersModel(
        spec, tensors, facts, image_size_of(config, CLASS), autoencoder, factor, None
    )


def _facts(scheduler: Config) -> dict[str, dict[str, Any]]:
    """The settings of scheduler_config.json; raises UnsupportedModelError.

    Of a scheduler that ours do not equal, what it was trained with is read, and the sampler.
    """
    name = scheduler.get("_class_name")
    # Files that were converted from PNDM's keep this key of it.
    scheduler = {key: value for key, value in scheduler.items() if key != "skip_prk_steps"}
    if SAMPLING in scheduler or name in READ:
        facts = from_scheduler(scheduler)
    elif not scheduler.keys() & {"beta_schedule", "trained_betas"}:
        raise UnsupportedModelError(
            "scheduler", f"_class_name is {name!r}, and it holds no noise schedule (beta_schedule)"
        )
    else:
        trained = {key: scheduler[key] for key in OF_TRAINING if key in scheduler}
        facts = from_scheduler(trained)
        if name in SAMPLERS:
            facts["sampling"]["sampler"] = SAMPLERS[name]
    facts["sampling"]["clip"] = False  # latents have no range; the pipeline does not clip, either
    return facts


def _pad_token(home: Path) -> str:
    """The token that fills rows, as the files name it; empty: they do not.

    As transformers reads them: special_tokens_map.json counts, unless tokenizer_config.json is of
    the later form, with `added_tokens_decoder`.
    """
    later = "added_tokens_decoder" in read_json(home / SPECIAL[0])
    for name in SPECIAL if later else reversed(SPECIAL):
        if (home / name).is_file():
            token = read_json(home / name).get("pad_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return ""
