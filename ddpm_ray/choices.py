"""Choices that options and mathematics share; imports nothing, as config/ must not load torch."""

from typing import Literal, TypeAlias

Prediction: TypeAlias = Literal["epsilon", "x_0", "v", "mean", "score", "edm"]
"""Prediction target of a network."""
FixedVariance: TypeAlias = Literal["fixed_small", "fixed_large"]
"""Reverse-process variances that are not learned: the posterior's, beta."""
LearnedVariance: TypeAlias = Literal["learned", "learned_range"]
"""How a network parameterizes a learned variance; see samplers.learned_log_variance."""
ModelVariance: TypeAlias = Literal["fixed", LearnedVariance]
"""The variance in a network's output; fixed: none."""
ReverseVariance: TypeAlias = Literal[FixedVariance, LearnedVariance]
SamplingVariance: TypeAlias = Literal[FixedVariance, "learned"]
"""The option; learned: in the network's own parameterization."""
