"""Options of guidance by a second network: autoguidance, classifier guidance."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ddpm_ray.config.option_fields import option
from ddpm_ray.config.sampling import SamplingSettings


@dataclass(frozen=True)
class GuidanceConfig:
    """Guidance of the samples by a second network."""

    autoguidance_model: str = option(
        "",
        "URI of a weaker model of the same data, for autoguidance; empty: none",
        formerly="weak_model",
    )
    autoguidance_scale: float = option(
        2.0, "autoguidance scale; 1: no effect", at_least=0, formerly="weak_scale"
    )
    classifier: str = option(
        "",
        "folder of a run with task=classifier, for guidance towards sampling.labels; empty: none",
    )
    classifier_scale: float = option(1.0, "classifier guidance scale; 0: no effect", at_least=0)
    classifier_form: Literal["score", "mean"] = option(
        "score", "apply its gradient to the score (any sampler) or to the mean (ancestral)"
    )

    def problems(self, sampling: SamplingSettings) -> Iterator[str]:
        """Yield a line if two networks are given, or if the sampler lacks the form."""
        if self.autoguidance_model and self.classifier:
            yield (
                f"guidance.classifier is {self.classifier!r} and guidance.autoguidance_model "
                f"{self.autoguidance_model!r}; only one can guide: leave one of them empty"
            )
        has_mean = sampling.sampler == "ancestral" and sampling.variance != "learned"
        if self.classifier and self.classifier_form == "mean" and not has_mean:
            yield (
                f"guidance.classifier_form is 'mean', that of ancestral's fixed variances, and "
                f"sampling.sampler {sampling.sampler!r} with variance {sampling.variance!r}: use "
                f"guidance.classifier_form=score"
            )
