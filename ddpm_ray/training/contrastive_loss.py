"""Contrastive losses of a global batch, in which equal captions count as matches of each other.

N: images of the global batch, each with one caption; logits[i, j] is that of image i and caption j.
"""

from typing import Literal, TypeAlias, assert_never

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_ray.models.contrastive import Embedded

ContrastiveLoss: TypeAlias = Literal["sigmoid", "infonce"]


def equal_rows(tokens: Tensor) -> Tensor:
    """Whether rows i and j of `tokens` [N, L] are equal, bool [N, N]; the diagonal is True."""
    equal = torch.ones(len(tokens), len(tokens), dtype=torch.bool, device=tokens.device)
    for column in tokens.T:  # not all at once: N * N * L values
        equal &= column[:, None] == column
    return equal


def sigmoid_losses(logits: Tensor, positive: Tensor) -> Tensor:
    """Losses [N] of the images: the sum over all captions of each pair's cross entropy.

    Their mean is the loss of Zhai et al. 2023 (arXiv:2303.15343, algorithm 1), with every pair of
    `positive`, bool [N, N], as a match and all others as none.
    """
    return -F.logsigmoid(torch.where(positive, logits, -logits)).sum(1)


def infonce_losses(logits: Tensor, positive: Tensor) -> Tensor:
    """Losses [N], whose mean is that of the cross entropies by row and by column.

    The target of a row is spread evenly over its captions of `positive`, bool [N, N] and symmetric.
    Without equal captions it is CLIP's loss (Radford et al. 2021, arXiv:2103.00020, figure 3).
    """
    target = positive / positive.sum(1, keepdim=True)
    by_image, by_text = (-(target * values.log_softmax(1)).sum(1) for values in (logits, logits.mT))
    return (by_image + by_text) / 2


def contrastive_losses(embedded: Embedded, positive: Tensor, loss: ContrastiveLoss) -> Tensor:
    """Losses [N] of a global batch. Without autocast: logits are float32."""
    scale = embedded.log_scale.exp()
    logits = scale * (embedded.images @ embedded.texts.T) + embedded.bias
    match loss:
        case "sigmoid":
            return sigmoid_losses(logits, positive)
        case "infonce":
            return infonce_losses(logits, positive)
        case never:
            assert_never(never)


def batch_recall(images: Tensor, texts: Tensor, positive: Tensor) -> Tensor:
    """Whether the nearest caption of the batch is right for each image, float32 [N]."""
    nearest = (images @ texts.T).argmax(1)
    return positive.gather(1, nearest[:, None])[:, 0].float()
