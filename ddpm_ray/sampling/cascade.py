"""A cascade: a prior, a decoder and upsamplers, which draw images of prompts together."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_ray.config.jobs.cascade import MOST_CANDIDATES
from ddpm_ray.config.option_fields import checks_arguments, shown
from ddpm_ray.config.sampling import SampledModel, SamplingSettings
from ddpm_ray.counter_rng import Purpose, derived_seed
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion import inversion
from ddpm_ray.diffusion.samplers import OnStep
from ddpm_ray.sampling.array_arguments import require_text
from ddpm_ray.sampling.drawing_model import (
    Count,
    DrawingModel,
    Index,
    NumImages,
    embedded,
    fields_of,
    in_turn,
)
from ddpm_ray.sampling.pipeline import TrainedModel
from ddpm_ray.sampling.prior import CANDIDATES, TrainedPrior
from ddpm_ray.sampling.sampling import Images

PRIOR_STAGE = 0  # of the seeds that are derived; upsamplers have 1, 2, ...


@dataclass(frozen=True, eq=False)
class Cascade(DrawingModel):
    """A prior, a decoder and upsamplers; returned by `ddpm_ray.load_cascade`.

    The prior draws the embedding of an image from a prompt, the decoder an image from the embedding
    (and the prompt, if it takes text), each upsampler a larger one. (Ramesh et al. 2022, "DALL-E
    2", arXiv:2204.06125.) The fields and settings of DrawingModel are those of the decoder; prior
    and upsamplers draw as their own runs are configured. Image i is determined by `seed` and i, in
    batches of any size.
    """

    prior: TrainedPrior = field(kw_only=True)
    upsamplers: tuple[TrainedModel, ...] = field(default=(), kw_only=True)
    candidates: int = field(default=CANDIDATES, kw_only=True)  # of the prior, for each image

    @checks_arguments
    def sample(
        self,
        num_images: NumImages,
        *,
        first: Index = 0,
        candidates: int | None = None,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Images:
        """Draw uint8 images [num_images, H, W, C] of `prompts`, of the size of the last stage.

        Their numbers are `first` and those after it; image i has prompt i % n.

        The prior draws `candidates` embeddings for each image and takes the nearest to the prompt;
        None: as many as the cascade was made with.
        `on_step` is called at each step of the decoder.
        """
        chosen = self._chosen(settings)
        each = self.candidates if candidates is None else candidates
        if type(each) is not int or not 1 <= each <= MOST_CANDIDATES:
            rule = f"give a whole number of 1 to {MOST_CANDIDATES}"
            raise ValueError(f"candidates is {shown(each)}; {rule}")
        if not chosen.prompts:
            raise ValueError("prompts is empty; a cascade draws images of texts: give one or more")
        self._plan(chosen)  # raises for settings that are not supported, before the prior draws
        seed = stage_seed(chosen.seed, PRIOR_STAGE)
        embeddings = self.prior.embeddings(
            chosen.prompts, range(first, first + num_images), seed, each
        )
        return self._decoded(embeddings, chosen, first, on_step)

    @checks_arguments
    def variations(
        self,
        images: Images,
        *,
        per_image: Count = 1,
        on_step: OnStep | None = None,
        **settings: Any,
    ) -> Images:
        """Draw `per_image` images like each of `images`: uint8 [N * per_image, H, W, C].

        There is no text unless the call has `prompts`. `on_step` is that of `sample`. (Ramesh et
        al. 2022, section 3.1.)
        """
        chosen = self._chosen(settings)
        if settings.get("prompts") is None:
            chosen = replace(chosen, prompts=())
        return self._decoded(embedded(self, images, per_image), chosen, on_step=on_step)

    @checks_arguments
    def interpolate(
        self,
        first: str,
        second: str,
        num_images: Count = 8,
        **settings: Any,
    ) -> Images:
        """Draw `num_images` images between two prompts: uint8 [num_images, H, W, C].

        The embeddings that the prior draws for them are interpolated spherically, in equal steps,
        ends included; all images begin with the same noise, without a text. (Ramesh et al. 2022,
        section 3.2.)
        """
        require_text("first", first)
        require_text("second", second)
        if settings.get("prompts") is not None:
            raise ValueError("prompts are given; the texts of interpolate are first and second")
        chosen = replace(self._chosen(settings), prompts=())
        seed = stage_seed(chosen.seed, PRIOR_STAGE)
        start, end = (
            self.prior.embeddings([text], range(1), seed, self.candidates)
            for text in (first, second)
        )
        shares = torch.linspace(0, 1, num_images, dtype=torch.float64).tolist()
        between = (F.normalize(inversion.interpolate(start, end, share), dim=1) for share in shares)
        return np.concatenate([self._decoded(one, chosen) for one in between])

    @property
    def drawn_shape(self) -> ImageShape:
        """The shape of the images of the last stage."""
        return self.upsamplers[-1].image_shape if self.upsamplers else self.image_shape

    def _sampled_model(self, guided_by_model: bool | None = None) -> SampledModel:
        """Facts of the decoder; a cascade takes prompts in any case, for its prior."""
        return replace(super()._sampled_model(guided_by_model), takes_text=True)

    def _decoded(
        self,
        embeddings: Tensor,
        chosen: SamplingSettings,
        first: int = 0,
        on_step: OnStep | None = None,
    ) -> Images:
        """Images `first`, first + 1, ... of the embeddings [N, D], by decoder and upsamplers."""
        decoder = replace(self.denoiser, embeddings=in_turn(embeddings, first))
        takes_text = decoder.takes.tokenizer is not None
        if chosen.negative_prompt and not takes_text:
            raise ValueError(
                "negative_prompt is given, but the decoder takes no text: leave it out"
            )
        drawn = chosen if takes_text else replace(chosen, prompts=(), negative_prompt="")
        model = DrawingModel(**fields_of(self))
        images = replace(model, denoiser=decoder, settings=drawn).sample(
            len(embeddings), first=first, on_step=on_step
        )
        for stage, upsampler in enumerate(self.upsamplers, start=1):
            text: dict[str, Any] = {}
            if upsampler.denoiser.takes.tokenizer is not None and chosen.prompts:
                text = {"prompts": chosen.prompts}
            images = upsampler.enlarge(
                images, first=first, seed=stage_seed(chosen.seed, stage), **text
            )
        return images


def stage_seed(seed: int, stage: int) -> int:
    """The seed of a stage of a cascade; the decoder has that of the cascade itself.

    With one seed, the noise of two stages would begin with the same numbers.
    """
    return derived_seed(seed, Purpose.CASCADE, stage, 0) >> 1  # seeds of settings are int64
