"""The network of samples in bfloat16: close to float32, and always that of the newest weights."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.gpu.tiny import SHAPE, config_of, denoiser_of
from ddpm_ray.assembly import compilation, diffusion
from ddpm_ray.assembly.inference import inference_network
from ddpm_ray.assembly.scoring import arithmetic_of_samples
from ddpm_ray.config.evaluation import EvaluationConfig
from ddpm_ray.config.loading import ConfigError, load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.codec import PIXELS
from ddpm_ray.diffusion.conditioning import UNCONDITIONAL
from ddpm_ray.sampling.sampling import draw
from ddpm_ray.training.ema import EMA

CPU = torch.device("cpu")
BF16 = EvaluationConfig(precision="bf16_weights")


def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(3, 3, 8, 8), torch.tensor([1, 5, 10])


def test_by_default_it_is_the_network_itself() -> None:
    network = nn.Linear(1, 1)
    assert inference_network(network, EvaluationConfig(), CPU) is network


def test_samples_in_bfloat16_are_float32_and_close() -> None:
    config = config_of([])
    state, exact = denoiser_of(config, CPU)
    network = inference_network(state.ema.model, BF16, CPU)
    rounded = diffusion.denoiser(config, network, CPU, PIXELS)
    plan = diffusion.sampling_plan(config.sampling, exact.schedule)
    one, other = (draw(of, plan, torch.arange(3), SHAPE, CPU) for of in (exact, rounded))
    assert other.dtype == torch.float32
    assert not other.requires_grad
    assert 0 < (one - other).norm() < 0.02 * one.norm()


def test_it_follows_the_average() -> None:
    """As training changes it, and as the search for a width loads another."""
    state, _ = denoiser_of(config_of([]), CPU)
    mean: EMA = state.ema
    network = inference_network(mean.model, BF16, CPU)
    arguments, seen = inputs(), []
    other = {name: value + 0.1 for name, value in mean.model.state_dict().items()}
    for change in (
        lambda: None,
        lambda: mean.update(state.model, 0.5, torch.tensor(True)),
        lambda: mean.load_state_dict(other),
    ):
        change()
        fresh = inference_network(mean.model, BF16, CPU)
        seen.append(network(*arguments, UNCONDITIONAL))
        assert torch.equal(seen[-1], fresh(*arguments, UNCONDITIONAL))
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_a_mode_reaches_torch_with_the_weights_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[nn.Module, str]] = []
    monkeypatch.setattr(compilation, "missing_compiler", lambda device: "")

    def compile_(network: nn.Module, mode: str) -> nn.Module:
        seen.append((network, mode))
        return network

    monkeypatch.setattr(torch, "compile", compile_)
    for precision, dtype in (("fp32", torch.float32), ("bf16_weights", torch.bfloat16)):
        wanted = EvaluationConfig(precision=precision, compile="max-autotune")  # type: ignore[arg-type]
        inference_network(nn.Linear(1, 1), wanted, CPU)
        network, mode = seen.pop()
        assert mode == "max-autotune"
        assert next(network.parameters()).dtype == dtype
        found = arithmetic_of_samples(wanted)
        assert found == {"samples_precision": precision, "samples_compile": "max-autotune"}


@pytest.mark.parametrize("key", ["precision=bf16_weights", "compile=default"])
def test_an_autoencoder_draws_no_samples(key: str) -> None:
    keys = ["name=a", "data.url=d", "task=autoencoder", "training.grid_every_steps=0"]
    name, _, value = key.partition("=")
    line = f"evaluation.{name} is {value}; an autoencoder draws no samples: leave it out"
    with pytest.raises(ConfigError, match=line):
        load_config(RunConfig, None, [*keys, f"evaluation.{key}"])


@pytest.mark.parametrize("precision", ["fp32", "bf16_weights"])
def test_outputs_outlive_the_next_replay(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance and multistep samplers use two outputs together; CUDA graphs have one memory."""
    memory = torch.zeros(3, 3, 8, 8)
    monkeypatch.setattr(compilation, "missing_compiler", lambda device: "")
    monkeypatch.setattr(torch, "compile", lambda of, mode: lambda x_t, *_: memory.copy_(x_t))
    wanted = EvaluationConfig(precision=precision, compile="reduce-overhead")  # type: ignore[arg-type]
    network = inference_network(nn.Linear(1, 1), wanted, CPU)
    x_t, t = inputs()
    first, second = (network(x, t, UNCONDITIONAL) for x in (x_t, 2 * x_t))
    assert torch.equal(first, x_t)
    assert torch.equal(second, 2 * x_t)
