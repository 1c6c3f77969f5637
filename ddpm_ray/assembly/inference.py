"""The network of samples, grids and validation losses, in the arithmetic of their options."""

import torch
from torch import Tensor, nn

from ddpm_ray.assembly.compilation import compiled, require_bf16, uses_cuda_graphs
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.diffusion.conditioning import UNCONDITIONAL, Conditioning, Network
from ddpm_ray.training.bf16_weights import Bf16Weights


def inference_network(model: nn.Module, config: EvaluationConfig, device: torch.device) -> Network:
    """`model`, or what computes it with bfloat16 weights or compiled.

    Its outputs are the caller's to keep. Raises NoCompilerError, and ValueError for a device
    without bfloat16.
    """
    network: Network
    if config.precision == "fp32":
        network = compiled(model, config.compile, device, "evaluation", config.compile_fallback)
    else:
        require_bf16(device, "evaluation.precision")
        network = _Bf16Network(model, config, device)
    return _OwnOutputs(network) if uses_cuda_graphs(config.compile) else network


class _OwnOutputs:
    """Copies each output of a network that replays CUDA graphs, before the next overwrites it."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __call__(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning = UNCONDITIONAL
    ) -> Tensor:
        """The network's output."""
        return self._network(x_t, t, conditioning).clone()


class _Bf16Network:
    """A network with bfloat16 copies of the weights of `model`, which may change between calls."""

    def __init__(self, model: nn.Module, config: EvaluationConfig, device: torch.device) -> None:
        self._weights = Bf16Weights(model)
        self._network = compiled(
            self._weights.network, config.compile, device, "evaluation", config.compile_fallback
        )
        self._version = self._newest_version()

    def __call__(
        self, x_t: Tensor, t: Tensor, conditioning: Conditioning = UNCONDITIONAL
    ) -> Tensor:
        """The network's output, as of `model`."""
        if (version := self._newest_version()) != self._version:
            self._weights.refresh()
            self._version = version
        output: Tensor = self._network(x_t, t, conditioning)
        return output

    def _newest_version(self) -> int:
        """A number that each in-place change of a weight increases, except through `.data`."""
        return sum(one._version for one in self._weights.model.parameters())
