"""DDP's all-reduce of gradients for bfloat16 weights, and with compressed gradients."""

import torch
import torch.distributed as dist
from torch import Tensor

from ddpm_ray.training.bf16_weights import Bf16Weights


class GradientAllReduce:
    """Averages gradients over all workers: summed in `dtype`, scaled and kept in float32.

    With `weights` the mean goes to the master weights. Gradients of earlier micro-batches, which
    these hold already, are part of it.
    """

    def __init__(self, weights: Bf16Weights | None, dtype: torch.dtype) -> None:
        self._weights, self._dtype = weights, dtype
        self._masters = {} if weights is None else weights.master_of()

    def reduce(
        self,
        bucket: dist.GradBucket,  # type: ignore[name-defined]  # not in the stubs
    ) -> torch.futures.Future[Tensor]:
        """Begin the all-reduce of a bucket, whose gradients are of one dtype."""
        buffer: Tensor = bucket.buffer()
        parameters: list[Tensor] = bucket.parameters()
        masters = [self._masters[id(one)] for one in parameters if id(one) in self._masters]
        total = buffer.float()  # the buffer itself if it is float32
        views = parts(total, parameters) if masters else []
        for master, view in zip(masters, views, strict=True):
            if master.grad is not None:
                view.add_(master.grad)
        sent = total.div_(dist.get_world_size()).to(self._dtype)
        work = dist.all_reduce(sent, async_op=True)
        assert work is not None  # all_reduce is asynchronous

        def keep(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            """The bucket's buffer for DDP; the mean gradients are kept in the master weights."""
            total.copy_(future.value()[0])
            for master, view in zip(masters, views, strict=True):
                master.grad = view
            if self._weights is not None and masters:
                self._weights.mark_reduced()
            return buffer  # the gradients of copies are not used any more

        result: torch.futures.Future[Tensor] = work.get_future().then(keep)
        return result


def parts(flat: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """Views of a flat tensor, one after the other, in the shapes and layouts of `parameters`."""
    pieces = torch.split(flat, [one.numel() for one in parameters])
    return [
        piece.as_strided(one.size(), one.stride())
        for piece, one in zip(pieces, parameters, strict=True)
    ]


def reduce_bucket(
    state: GradientAllReduce,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # as above
) -> torch.futures.Future[Tensor]:
    """`GradientAllReduce.reduce` as a communication hook of DDP."""
    return state.reduce(bucket)
