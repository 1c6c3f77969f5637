"""The DiT of Peebles and Xie 2023: its published sizes, its start, its laws."""

import math
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddpm_ray.assembly import networks
from ddpm_ray.config.loading import load_config
from ddpm_ray.config.run import RunConfig
from ddpm_ray.data.image_shape import ImageShape
from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.models.dit import DiT, DiTSpec, position_embedding
from ddpm_ray.models.layers import zero_init


def small(**changes: Any) -> DiT:
    """Two blocks for images of 8 x 12, with random numbers where training starts from 0."""
    torch.manual_seed(0)
    form: dict[str, Any] = {
        "image_size": (8, 12),
        "image_channels": 1,
        "depth": 2,
        "hidden_size": 16,
        "heads": 2,
    }
    checkpoints = changes.pop("gradient_checkpointing", False)
    network = DiT(DiTSpec(**(form | changes)), gradient_checkpointing=checkpoints)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return network


def batch(channels: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(3, channels, 8, 12, generator=generator), torch.tensor([1, 500, 1000])


TABLE = {  # Peebles and Xie 2023, table 4: millions of parameters, and Gflops at 32 x 32 x 4
    "S/8": (33, 0.36),
    "S/4": (33, 1.41),
    "S/2": (33, 6.06),
    "B/8": (131, 1.42),
    "B/4": (130, 5.56),
    "B/2": (130, 23.01),
    "L/8": (459, 5.01),
    "L/4": (458, 19.70),
    "L/2": (458, 80.71),
    "XL/8": (676, 7.39),
    "XL/4": (675, 29.05),
    "XL/2": (675, 118.64),
}


@pytest.mark.parametrize("size", TABLE)
def test_the_papers_sizes_have_its_parameters_and_operations(
    size: str,
) -> None:
    """Their flops are multiply-adds."""
    config = load_config(
        RunConfig,
        None,
        [
            "name=a",
            "data.url=b",
            "model.network=dit",
            f"model.size={size}",
            "model.num_classes=1000",
            "objective.variance=learned_range",
            "objective.loss=hybrid",
        ],
    )
    with torch.device("meta"):
        network = networks.network(config, ImageShape(32, 32, 4))
        x_t, t = torch.empty(1, 4, 32, 32), torch.ones(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            assert network(x_t, t).shape == (1, 8, 32, 32)
    assert isinstance(network, DiT)
    # The paper's counter adds one operation for each number that a layer norm returns.
    norms = (2 * network.spec.depth + 1) * math.prod(network.positions.shape)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    operations = counter.get_total_flops() / 2 + norms
    million, gflops = TABLE[size]
    assert round(parameters / 1e6) == million
    assert operations / 1e9 == pytest.approx(gflops, abs=0.01)


def test_the_prediction_is_zero_and_the_blocks_are_the_identity_before_training() -> None:
    network = DiT(DiTSpec((8, 8), 1, depth=1, hidden_size=16, heads=2))
    x, embedding = torch.randn(2, 16, 16), torch.randn(2, 16)
    assert torch.equal(network.blocks[0](x, embedding), x)
    assert network(torch.randn(2, 1, 8, 8), torch.tensor([1, 9])).abs().max() == 0


def test_a_position_is_embedded_as_thirty_digits_say() -> None:
    """The column in the first half, the row in the second; sines, then cosines."""
    width, (rows, columns) = 24, (3, 5)
    found = position_embedding((rows, columns), width).double()
    with mpmath.workdps(30):
        angular = [mpmath.power(10_000, -mpmath.mpf(k) / 6) for k in range(6)]
        for row in range(rows):
            for column in range(columns):
                wanted = [
                    float(wave(place * frequency))
                    for place in (column, row)
                    for wave in (mpmath.sin, mpmath.cos)
                    for frequency in angular
                ]
                expected = torch.tensor(wanted, dtype=torch.float64)
                place = found[row * columns + column]
                torch.testing.assert_close(place, expected, atol=1e-7, rtol=0)


def test_a_pixel_is_seen_and_painted_where_it_lies() -> None:
    """Without attention and MLP a patch of the prediction depends on that of x_t."""
    network, (x_t, t) = small(depth=1), batch()
    modulation = network.blocks[0].get_submodule("modulation")
    assert isinstance(modulation, nn.Linear)
    with torch.no_grad():
        zero_init(modulation)  # the gates
    changed = x_t.clone()
    changed[:, :, 2:4, 6:8] += 1  # the patch in row 1, column 3
    moved = (network(changed, t) - network(x_t, t)).abs().sum(dim=(0, 1)) > 0
    assert moved[2:4, 6:8].all()
    assert moved.sum() == 4


def test_patches_are_told_apart_by_position_alone() -> None:
    """With all positions alike, a permutation of patches permutes the prediction."""
    network, (x_t, t) = small(), batch()

    def rolled(x: Tensor) -> Tensor:
        return x.roll((2, 4), dims=(2, 3))  # whole patches

    assert (network(rolled(x_t), t) - rolled(network(x_t, t))).abs().max() > 1e-3
    network.positions.zero_()
    torch.testing.assert_close(network(rolled(x_t), t), rolled(network(x_t, t)))


def test_an_image_is_denoised_alone_as_in_its_batch() -> None:
    network, (x_t, t) = small(), batch()
    alone = [network(x_t[i : i + 1], t[i : i + 1]) for i in range(len(t))]
    torch.testing.assert_close(torch.cat(alone), network(x_t, t))


def test_no_label_is_the_null_label_and_another_label_is_another_image() -> None:
    network, (x_t, t) = small(num_classes=3), batch()
    none = network(x_t, t)
    assert torch.equal(network(x_t, t, Conditioning(torch.tensor([-1, -1, -1]))), none)
    assert torch.equal(network(x_t, t, Conditioning(torch.tensor([0, 1, 2])).null()), none)
    each = [network(x_t, t, Conditioning(torch.full((3,), label))) for label in range(3)]
    assert all((one - none).abs().max() > 1e-3 for one in each)


def test_a_condition_is_seen_beside_the_image_and_is_zero_where_it_is_missing() -> None:
    network, (x_t, t) = small(condition_channels=2), batch()
    missing = network(x_t, t)
    assert missing.shape == x_t.shape
    zeros = Conditioning(estimate=torch.zeros_like(x_t), low_resolution=torch.zeros_like(x_t))
    assert torch.equal(network(x_t, t, zeros), missing)
    shown = Conditioning(estimate=x_t, low_resolution=torch.zeros_like(x_t))
    assert (network(x_t, t, shown) - missing).abs().max() > 1e-3


def test_a_learned_variance_has_the_channels_behind_the_prediction() -> None:
    network, (x_t, t) = small(image_channels=3, learns_variance=True), batch(channels=3)
    plain, state = small(image_channels=3), network.state_dict()
    for name in ("out.weight", "out.bias"):  # rows: pixels of the patch, then channels
        pixels = state[name].unflatten(0, (4, 6))
        state[name] = pixels[:, :3].flatten(0, 1)
    plain.load_state_dict(state)
    assert network(x_t, t).shape == (3, 6, 8, 12)
    torch.testing.assert_close(plain(x_t, t), network(x_t, t)[:, :3])


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 0, 1])])
def test_each_parameter_has_a_gradient_whatever_is_given(labels: Tensor | None) -> None:
    """DistributedDataParallel waits for each of them in each step."""
    network, (x_t, t) = small(num_classes=3, condition_channels=1, learns_variance=True), batch()
    network(x_t, t, Conditioning(labels)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_changes_no_bit_of_the_gradients(dropout: float) -> None:
    x_t, t = batch()
    gradients = []
    for checkpointing in (False, True):
        network = small(dropout=dropout, gradient_checkpointing=checkpointing).train()
        torch.manual_seed(5)
        network(x_t, t).square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_dropout_is_drawn_from_the_default_generator_and_only_in_training() -> None:
    network, (x_t, t) = small(dropout=0.5), batch()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(network.train()(x_t, t))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    torch.testing.assert_close(network.eval()(x_t, t), small()(x_t, t))


def test_one_graph_compiles_without_a_break_and_bfloat16_predicts_the_same() -> None:
    network, (x_t, t) = small(num_classes=2), batch()
    compiled: Any = torch.compile(network, backend="eager", fullgraph=True)
    expected = network(x_t, t)
    torch.testing.assert_close(compiled(x_t, t), expected)
    with torch.autocast("cpu", torch.bfloat16):
        found = network(x_t, t)
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch_size": 3}, "images are 8 x 12; both sides must be multiples of patch_size 3"),
        ({"heads": 3}, "hidden_size is 16; it must be a multiple of heads 3"),
        ({"hidden_size": 18}, "and of 4 for the position embedding"),
        ({"depth": 0}, "depth 0, .* each must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_what_a_network_was_not_built_for_is_refused() -> None:
    x_t, t = batch()
    with pytest.raises(ValueError, match="images are 12 x 8; this DiT takes 8 x 12 only"):
        small()(x_t.mT, t)
    with pytest.raises(ValueError, match=r"num_classes is 0: .* build it with num_classes"):
        small()(x_t, t, Conditioning(torch.tensor([0, 1, 2])))
    with pytest.raises(ValueError, match=r"images are \[3, 1, 8, 12\] .* condition_channels 0"):
        small()(x_t, t, Conditioning(low_resolution=x_t))
