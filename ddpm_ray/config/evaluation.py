"""Options of evaluation: number of samples, feature network, and metrics."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from ddpm_ray.config.option_fields import option
from ddpm_ray.config.sampling import MOST_IMAGES
from ddpm_ray.config.training import FORMER_COMPILE, CompileMode
from ddpm_ray.redaction import counted

InceptionResize: TypeAlias = Literal["original", "pytorch-fid"]
INCEPTION_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


_NOT_ONE = {  # options whose value is 0, or 2 and more; and why
    "num_images": "scores need at least 2 images",
    "bits_per_dim_images": "an interval needs at least 2 images",
    "bits_per_dim_terms": "take 2, which is L_0 and one other, to T",
    "likelihood_images": "an interval needs at least 2 images",
    "likelihood_steps": "the flow from t = 1 to T takes 2 steps or more",
}


OF_EVALUATE = (  # options that only the job evaluate uses
    "memorisation_images",
    "memorisation_picture",
    "bits_per_dim_images",
    "bits_per_dim_terms",
    "likelihood_images",
    "likelihood_steps",
)
OF_RUNS = (  # that only runs use
    "every_steps",
    "where",
    "validation_every_steps",
    "validation_images",
)
OF_DENOISERS = (  # also those of OF_EVALUATE: options of scores that other models do not have
    "kernel_distance",
    "kernel_distance_images",
    "precision_recall",
    "extrapolate",
    "reference_url",
    "alignment_encoder",
)


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores of the model: FID, KID, likelihoods and others."""

    num_images: int = option(
        0,
        "images to score, sampled (autoencoder: reconstructed; contrastive: retrieved) with the "
        "EMA weights; 0: none",
        at_least=0,
        at_most=MOST_IMAGES,
    )
    every_steps: int = option(
        0, "train only: steps between evaluations; 0: only at the end", at_least=0
    )
    where: Literal["workers", "spare"] = option(
        "workers",
        "train only: who draws pictures and scores; workers: between two steps; spare: a Ray actor "
        "with the resources of one more worker, while training goes on",
    )
    features: Literal["inception", "digits", "none"] = option(
        "inception",
        "feature network; inception: eval/fid; digits: eval/fd_digits, bundled classifier; none: "
        "an autoencoder's PSNR and SSIM alone",
    )
    precision: Literal["fp32", "bf16_weights"] = option(
        "fp32",
        "arithmetic of the network that draws samples and grids and computes validation losses, as "
        "of training.precision; features and likelihoods stay fp32",
    )
    compile: CompileMode = option(
        "off", "mode of torch.compile for the same, as of training.compile", formerly=FORMER_COMPILE
    )
    compile_fallback: bool = option(
        False, "compile: run without it, with a warning, on workers without a compiler"
    )
    widths: tuple[int, ...] = option(
        (2048,),
        "Inception layers by number of features; 2048: eval/fid, 768: eval/fid768, "
        "192: eval/fid192, 2023: eval/sfid",
    )
    resize: InceptionResize = option(
        "original",
        "how images are resized to 299 pixels; original: TensorFlow 1 bilinear; pytorch-fid: torch "
        "bilinear",
    )
    weights: str = option(
        INCEPTION_URL, "path or URL of the Inception weights (.pth of pytorch-fid, or folded .npz)"
    )
    weights_sha256: str = option(INCEPTION_SHA256, "sha256 of the file in evaluation.weights")
    kernel_distance: bool = option(True, "also compute the kernel inception distance (KID)")
    kernel_distance_images: int = option(
        5000,
        "number of generated images, and of real ones, for KID",
        at_least=2,
        at_most=MOST_IMAGES,
    )
    precision_recall: bool = option(False, "also compute precision and recall (Kynkaanniemi 2019)")
    extrapolate: bool = option(
        False,
        "also extrapolate the Frechet distance to infinitely many samples; needs 4 per feature",
    )
    held_out_url: str = option(
        "", "shards of held-out data, to report the distance to them too; empty: none"
    )
    reference_url: str = option(
        "",
        "shards of images to score a model of latents against; empty: its decoded training latents",
    )
    alignment_encoder: str = option(
        "",
        "folder or URL of a run with task=contrastive, for models of texts: eval/alignment is the "
        "mean cosine of samples and their prompts in its space; empty: not computed",
    )
    memorisation_images: int = option(
        0,
        "evaluate only: samples to compare with their nearest training images; 0: none",
        at_least=0,
        at_most=MOST_IMAGES,
    )
    memorisation_picture: str = option(
        "",
        "evaluate only: PNG file of the samples most like a training image, each next to it; "
        "empty: none",
    )
    validation_every_steps: int = option(
        0,
        "train only: steps between validation losses by log-SNR, comparable across schedules; "
        "0: none",
        at_least=0,
        formerly="spectrum_every_steps",
    )
    validation_images: int = option(
        512,
        "train only: fixed images of the validation losses",
        at_least=16,
        at_most=MOST_IMAGES,
        formerly="spectrum_images",
    )

    bits_per_dim_images: int = option(
        0,
        "evaluate only: images for the variational bound in bits/dim, without guidance; 0: none",
        at_least=0,
        at_most=MOST_IMAGES,
    )
    bits_per_dim_terms: int = option(
        0, "evaluate only: terms of the bound to evaluate per image; 0: all T", at_least=0
    )
    likelihood_images: int = option(
        0,
        "evaluate only: images for the probability-flow likelihood, without guidance; 0: none",
        at_least=0,
        at_most=MOST_IMAGES,
    )
    likelihood_steps: int = option(
        100, "evaluate only: Heun steps of the probability-flow ODE, 2 to T", at_least=1
    )

    def set_of(self, keys: Sequence[str]) -> list[str]:
        """Those of the options `keys` that are not at their defaults."""
        default = EvaluationConfig()
        return [key for key in keys if getattr(self, key) != getattr(default, key)]

    def unused(self, keys: Sequence[str], remedy: str) -> str:
        """One line on those of the options `keys` that are set, but not used; empty if none is."""
        found = [f"evaluation.{key}" for key in self.set_of(keys)]
        return f"not used here: {', '.join(found)}; {remedy}" if found else ""

    def problems_of_arithmetic(self, reason: str) -> Iterator[str]:
        """Yield a line with the reason for each option of the arithmetic of samples that is set."""
        for key, value, plain in (
            ("precision", self.precision, "fp32"),
            ("compile", self.compile, "off"),
        ):
            if value != plain:
                yield f"evaluation.{key} is {value}; {reason}: leave it out"

    def problems(self) -> Iterator[str]:
        """Yield a line for each setting that makes a score meaningless."""
        known = (192, 768, 2023, 2048)
        if not self.widths or any(width not in known for width in self.widths):
            yield f"evaluation.widths is {list(self.widths)}; choose from {list(known)}"
        for key, rule in _NOT_ONE.items():
            if getattr(self, key) == 1:
                yield f"evaluation.{key} is 1; {rule}"
        if self.precision_recall and not self.kernel_distance:
            yield (
                "evaluation.precision_recall is true and evaluation.kernel_distance false; it "
                "needs the features of evaluation.kernel_distance: set both to true"
            )
        seen = min(self.kernel_distance_images, self.num_images)
        if self.precision_recall and self.num_images and seen < 4:
            yield (
                f"evaluation.precision_recall is true, of {counted(seen, 'image')} "
                f"(evaluation.kernel_distance_images of evaluation.num_images); it needs at least "
                f"4, each with its 3 nearest: take more of both"
            )
        if self.extrapolate and 0 < self.num_images < 500:
            yield (
                f"evaluation.num_images is {self.num_images}; evaluation.extrapolate needs at "
                f"least 500, and 4 times the largest of evaluation.widths"
            )
        if not re.fullmatch("[0-9a-f]{64}", self.weights_sha256):  # it names a file in the cache
            yield (
                f"evaluation.weights_sha256 is {self.weights_sha256!r}; give the 64 hex digits "
                f"that `sha256sum` prints for the file in evaluation.weights"
            )
