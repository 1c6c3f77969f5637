"""The U-Net of Ho et al. 2020: its size, its start, its laws, and an independent reference."""

import copy
import itertools
from dataclasses import replace
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from ddpm_ray.diffusion.conditioning import Conditioning
from ddpm_ray.models.layers import (
    GUIDED,
    HO,
    Attention,
    Downsample,
    Upsample,
    Variant,
    sinusoidal_embedding,
)
from ddpm_ray.models.unet import UNet
from ddpm_ray.models.unet_spec import UNetSpec


def small(**changes: Any) -> UNet:
    """A two-level form for 8x8 grey images, with random numbers where training starts from 0."""
    torch.manual_seed(0)
    form: dict[str, Any] = {
        "image_channels": 1,
        "base_channels": 8,
        "channel_mults": (1, 2),
        "blocks_per_level": 1,
        "attention_factors": (2,),
        "groups": 4,
    }
    checkpoints = changes.pop("gradient_checkpointing", False)
    return disturbed(UNet(UNetSpec(**(form | changes)), gradient_checkpointing=checkpoints))


def disturbed(network: UNet) -> UNet:
    """Every parameter moved off its start, so that no 0 hides a path through the network."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return network


def labelled(labels: list[int]) -> Conditioning:
    return Conditioning(torch.tensor(labels))


def shown(image: Tensor) -> Conditioning:
    return Conditioning(low_resolution=image)


def batch(side: int = 8, channels: int = 1, count: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x_t = torch.randn(count, channels, side, side, generator=generator)
    return x_t, torch.randint(1, 1001, (count,), generator=generator)


def test_the_papers_cifar10_form_has_its_35_746_307_parameters() -> None:
    with torch.device("meta"):
        network = UNet(UNetSpec(image_channels=3, dropout=0.1))
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307


def test_prediction_is_exactly_zero_before_training() -> None:
    network = UNet(
        UNetSpec(image_channels=1, base_channels=32, channel_mults=(1, 2), attention_factors=(2,))
    )
    assert network(*batch()).abs().max() == 0


def test_blocks_start_as_identities() -> None:
    x, embedding = torch.randn(2, 32, 8, 8), torch.randn(2, 128)
    network = UNet(
        UNetSpec(image_channels=1, base_channels=32, channel_mults=(1,), attention_factors=(1,))
    )
    assert torch.equal(network.down[0](x, embedding), x)
    assert torch.equal(network.middle_1(x, embedding), x)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 4000), st.integers(2, 70).map(lambda half: 2 * half))
def test_embedding_is_what_thirty_digits_say(count: int, width: int) -> None:
    half = width // 2
    with mpmath.workdps(30):
        angles = [count * mpmath.power(10_000, mpmath.mpf(-k) / (half - 1)) for k in range(half)]
        reference = [*map(mpmath.sin, angles), *map(mpmath.cos, angles)]
    embedding = sinusoidal_embedding(torch.tensor([count]), width)[0]
    # An angle of 4,000 rad has a float32 spacing of 2.4e-4.
    torch.testing.assert_close(
        embedding.double(),
        torch.tensor([float(value) for value in reference], dtype=torch.float64),
        atol=2.5e-7 * max(count, 4),
        rtol=0,
    )


def test_first_step_is_embedded_as_zero() -> None:
    """t = 1 is the code's 0: sines 0, cosines 1, whatever the frequencies."""
    network = small()
    seen: list[Tensor] = []
    network.time.dense_1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(batch()[0][:1], torch.tensor([1]))
    assert seen[0].tolist() == [[0.0] * 4 + [1.0] * 4]


def test_an_image_is_denoised_alone_as_in_its_batch() -> None:
    network, (x_t, t) = small(), batch()
    alone = [network(x_t[i : i + 1], t[i : i + 1]) for i in range(len(t))]
    torch.testing.assert_close(torch.cat(alone), network(x_t, t))


def test_prediction_depends_on_the_step() -> None:
    network, (x_t, _) = small(), batch()
    early, late = (network(x_t, torch.full((3,), t)) for t in (1, 1000))
    assert (early - late).abs().max() > 1e-3


def test_attention_without_position_commutes_with_any_order_of_the_pixels() -> None:
    torch.manual_seed(0)
    attention = Attention(8, groups=4)
    nn.init.normal_(attention.out.weight)
    x, order = torch.randn(2, 8, 4, 4), torch.randperm(16)
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    expected = attention(x).flatten(2)[:, :, order].view_as(x)
    assert not torch.allclose(expected, shuffled, atol=0.1)
    torch.testing.assert_close(attention(shuffled), expected)


def test_attention_averages_values_where_all_keys_are_alike() -> None:
    """With query and key 0 the softmax is flat: every pixel receives the mean value."""
    attention = Attention(8, groups=8)
    with torch.no_grad():
        attention.query_key_value.weight[:16] = 0
        attention.query_key_value.weight[16:] = torch.eye(8)
        attention.out.weight.copy_(torch.eye(8))
        attention.norm.bias.copy_(torch.arange(8.0))
    x = torch.randn(2, 8, 4, 4)
    expected = x + torch.arange(8.0).view(1, 8, 1, 1)  # a normalised channel's mean is its bias
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=0)


def test_downsampling_pads_the_end_and_not_the_start() -> None:
    """With a kernel that picks its middle, output (i, j) is input (2i + 1, 2j + 1)."""
    down = Downsample(1)
    with torch.no_grad():
        down.conv.weight.zero_()[0, 0, 1, 1] = 1
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert down(x).tolist() == [[[[5, 7], [13, 15]]]]
    with torch.no_grad():
        down.conv.weight.zero_()[0, 0, 2, 2] = 1
    assert down(x).tolist() == [[[[10, 0], [0, 0]]]]


def test_upsampling_repeats_each_pixel_four_times() -> None:
    up = Upsample(1)
    with torch.no_grad():
        up.conv.weight.zero_()[0, 0, 1, 1] = 1
    rows = up(torch.arange(4.0).view(1, 1, 2, 2))[0, 0].tolist()
    assert rows == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


def test_every_parameter_learns() -> None:
    network, (x_t, t) = small(), batch()
    network(x_t, t).square().mean().backward()
    idle = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().max() > 0
    ]
    assert not idle


def gradients(network: UNet, seed: int) -> list[Tensor]:
    network.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    x_t, t = batch()
    network(x_t, t).square().mean().backward()
    return [parameter.grad for parameter in network.parameters() if parameter.grad is not None]


def test_gradient_checkpointing_changes_no_bit_of_the_gradients() -> None:
    plain, checkpointed = (small(dropout=0.3, gradient_checkpointing=on) for on in (False, True))
    for a, b in zip(gradients(plain, 5), gradients(checkpointed, 5), strict=True):
        assert torch.equal(a, b)


def test_gradient_checkpointing_keeps_fewer_numbers() -> None:
    def kept(network: UNet) -> int:
        sizes: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(*batch())
        return sum(sizes)

    assert kept(small(gradient_checkpointing=True)) < 0.5 * kept(small())


def test_dropout_is_drawn_from_the_default_generator_and_only_in_training() -> None:
    network = small(dropout=0.3)
    first, again, other = gradients(network, 5), gradients(network, 5), gradients(network, 6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    network.eval()
    assert torch.equal(network(*batch()), network(*batch()))


def test_channels_last_and_bfloat16_give_the_same_prediction() -> None:
    network, (x_t, t) = small(), batch()
    exact = network(x_t, t)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(x_t, t).float()
    assert 0 < (rough - exact).norm() / exact.norm() < 0.05
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(network(x_t, t), exact)


def test_one_graph_compiles_without_a_break() -> None:
    network, (x_t, t) = small(gradient_checkpointing=True), batch()
    compiled: Any = torch.compile(network, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x_t, t), network(x_t, t))


def test_conditioning_is_part_of_the_one_graph() -> None:
    """Other values of the same shapes do not compile it again."""
    network, (x_t, t) = small(num_classes=3, condition_channels=2), batch()
    counter = CompileCounter()
    compiled: Any = torch.compile(network, backend=counter, fullgraph=True)
    for label in (0, 1, -1):
        conditioning = Conditioning(torch.full((3,), label), torch.randn_like(x_t), x_t)
        torch.testing.assert_close(compiled(x_t, t, conditioning), network(x_t, t, conditioning))
    assert counter.frame_count == 1


@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40), st.booleans())
@settings(max_examples=40)
def test_every_size_works_that_the_levels_halve_evenly(
    levels: int, height: int, width: int, guided: bool
) -> None:
    """Finite outputs of the input's shape, or one line that names a valid size."""
    network = small(
        channel_mults=(1,) * levels,
        attention_factors=(2 ** (levels - 1),),
        variant=GUIDED if guided else HO,
    )
    x_t, t, factor = torch.randn(1, 1, height, width), torch.tensor([3]), 2 ** (levels - 1)
    if height % factor == 0 and width % factor == 0:
        found = network(x_t, t)
        assert found.shape == x_t.shape
        assert found.isfinite().all()
        return
    with pytest.raises(ValueError, match=f"{height} x {width}, which {levels} levels") as error:
        network(x_t, t)
    (line,) = str(error.value).splitlines()
    nearest = [int(side) for side in line.rpartition(": ")[2].split(" x ")]
    assert network(torch.randn(1, 1, *nearest), t).shape[2:] == torch.Size(nearest)


def test_a_wide_image_is_the_tall_one_turned() -> None:
    """With its kernels turned too, the network has no preferred side."""
    network = small(attention_factors=(1, 2), variant=replace(HO, pads_both_sides=True))
    turned = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in turned.parameters():
            if parameter.ndim == 4:
                parameter.copy_(parameter.transpose(2, 3).clone())
    x_t, t = torch.randn(2, 1, 4, 12), torch.tensor([3, 900])
    torch.testing.assert_close(
        turned(x_t.transpose(2, 3), t), network(x_t, t).transpose(2, 3), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"groups": 3}, "groups is 3, which does not divide a level's 8 channels"),
        ({"groups": 16}, "groups is 16, which does not divide a level's 8 channels"),
        (
            {"attention_factors": (2, 3)},
            "attention_factors names 3, but the downsampling factors of the levels are 1, 2$",
        ),
        ({"channel_mults": ()}, "there must be a level"),
        ({"base_channels": 7, "groups": 1}, "base_channels is 7.* base_channels even"),
        ({"blocks_per_level": 0}, "blocks_per_level is 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_without_options_nothing_is_drawn_or_named_otherwise() -> None:
    """Classes draw last, so that the rest of the network starts as without them."""
    plain = small().state_dict()
    torch.manual_seed(0)
    known = UNet(
        UNetSpec(
            image_channels=1,
            base_channels=8,
            channel_mults=(1, 2),
            blocks_per_level=1,
            attention_factors=(2,),
            groups=4,
            num_classes=3,
        )
    )
    state = disturbed(known).state_dict()
    assert [*state] == [*plain, "label.weight"]
    assert all(torch.equal(state[name], value) for name, value in plain.items())


def test_no_label_is_the_null_label_and_another_label_is_another_image() -> None:
    network, (x_t, t) = small(num_classes=3), batch()
    null = network(x_t, t)
    assert torch.equal(network(x_t, t, labelled([-1] * 3)), null)
    answers = [network(x_t, t, labelled([label] * 3)) for label in range(3)]
    for a, b in itertools.combinations([null, *answers], 2):
        assert (a - b).abs().max() > 1e-3
    mixed = network(x_t, t, labelled([2, -1, 0]))
    expected = torch.stack([answers[2][0], null[1], answers[0][2]])
    torch.testing.assert_close(mixed, expected)


def test_a_condition_is_seen_beside_the_image_and_is_zero_where_it_is_missing() -> None:
    network, (x_t, t) = small(condition_channels=2), batch()
    condition = torch.randn(3, 2, 8, 8)
    missing = network(x_t, t)
    assert missing.shape == x_t.shape
    assert torch.equal(network(x_t, t, shown(torch.zeros(3, 2, 8, 8))), missing)
    assert (network(x_t, t, shown(condition)) - missing).abs().max() > 1e-3
    # The kernel that reads a channel is all that tells it from x_t's.
    swapped = small(condition_channels=2)
    with torch.no_grad():
        swapped.conv_in.weight.copy_(network.conv_in.weight[:, [1, 0, 2]])
    torch.testing.assert_close(
        swapped(condition[:, :1], t, shown(torch.cat([x_t, condition[:, 1:]], dim=1))),
        network(x_t, t, shown(condition)),
    )


def test_a_learned_variance_has_the_channels_behind_the_prediction() -> None:
    network, (x_t, t) = small(image_channels=3, learns_variance=True), batch(channels=3)
    assert network(x_t, t).shape == (3, 6, 8, 8)
    plain = small(image_channels=3)
    state = network.state_dict()
    state |= {name: state[name][:3] for name in ("conv_out.weight", "conv_out.bias")}
    plain.load_state_dict(state)
    torch.testing.assert_close(plain(x_t, t), network(x_t, t)[:, :3])


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 0, 1])])
def test_each_parameter_has_a_gradient_whatever_is_given(labels: Tensor | None) -> None:
    """DistributedDataParallel waits for each of them in each step."""
    network, (x_t, t) = small(num_classes=3, condition_channels=1, learns_variance=True), batch()
    network(x_t, t, Conditioning(labels)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_what_a_network_was_not_built_for_is_refused() -> None:
    x_t, t = batch()
    with pytest.raises(ValueError, match=r"num_classes is 0: .* build it with num_classes"):
        small()(x_t, t, labelled([0, 1, 2]))
    with pytest.raises(ValueError, match=r"images are \[3, 1, 8, 8\] .* condition_channels 0"):
        small()(x_t, t, shown(x_t))
    with pytest.raises(ValueError, match=r"images are \[3, 2, 4, 4\] .* condition_channels 2"):
        small(condition_channels=2)(x_t, t, shown(torch.zeros(3, 2, 4, 4)))
    with pytest.raises(ValueError, match=r"num_heads is 3 and head_channels 0; .* 16 channels"):
        small(variant=Variant(num_heads=3))
    with pytest.raises(ValueError, match=r"head_channels 5; .* 16 channels"):
        small(variant=Variant(head_channels=5))


def test_two_heads_are_two_attentions_over_half_the_channels() -> None:
    """Each head alone, as one-headed attention of its rows, from norm and output that are unit."""
    two, x = Attention(8, 8, Variant(num_heads=2)), torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        two.out.weight.copy_(torch.eye(8))
    rows = two.query_key_value.weight.detach()
    for half in (slice(0, 4), slice(4, 8)):
        one = Attention(8, 8)
        with torch.no_grad():
            one.out.weight.copy_(torch.eye(8))
            one.query_key_value.weight.zero_()
            for start in (0, 8, 16):
                part = slice(start + half.start, start + half.stop)
                one.query_key_value.weight[part] = rows[part]
            # The softmax divides by the root of all channels, of which half are 0 here.
            one.query_key_value.weight[:8] *= 2**0.5
        torch.testing.assert_close(two(x)[:, half], one(x)[:, half])


def test_the_guided_variant_starts_at_zero_learns_everywhere_and_compiles() -> None:
    network, (x_t, t) = small(variant=GUIDED, num_classes=2), batch()
    plain = UNet(
        UNetSpec(
            image_channels=1,
            base_channels=8,
            channel_mults=(1, 2),
            attention_factors=(2,),
            groups=4,
            variant=GUIDED,
        )
    )
    assert plain(x_t, t).abs().max() == 0
    compiled: Any = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x_t, t), network(x_t, t))
    network(x_t, t, labelled([0, 1, 2])).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_agrees_with_an_independent_implementation() -> None:
    """diffusers' UNet2DModel in the form of google/ddpm-cifar10-32, narrowed, random weights."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers: no dependency of ours")
    torch.manual_seed(3)
    reference = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        freq_shift=1,
        flip_sin_to_cos=False,
        downsample_padding=0,
        attention_head_dim=None,
        norm_num_groups=8,
        norm_eps=1e-6,
    ).eval()
    network = UNet(
        UNetSpec(
            image_channels=3,
            base_channels=16,
            channel_mults=(1, 2, 2),
            attention_factors=(2,),
            groups=8,
        )
    )
    theirs = reference.state_dict()
    ours = {name: torch.cat([theirs[old] for old in olds]) for name, olds in names(network).items()}
    assert sum(map(len, names(network).values())) == len(theirs)
    network.load_state_dict(ours)
    x_t, t = batch(side=16, channels=3)
    with torch.no_grad():
        torch.testing.assert_close(
            network(x_t, t), reference(x_t, t - 1).sample, atol=2e-5, rtol=1e-4
        )


BLOCK = {
    "norm_1": ["norm1"],
    "conv_1": ["conv1"],
    "time": ["time_emb_proj"],
    "norm_2": ["norm2"],
    "conv_2": ["conv2"],
    "skip": ["conv_shortcut"],
}
ATTENTION = {
    "norm": ["group_norm"],
    "query_key_value": ["to_q", "to_k", "to_v"],
    "out": ["to_out.0"],
}


def names(network: UNet) -> dict[str, list[str]]:
    """Our parameter names -> the names in diffusers' UNet2DModel that they are made of."""
    modules = {f"time.dense_{i}": f"time_embedding.linear_{i}" for i in (1, 2)}
    modules |= {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
    blocks = {"middle_1.block": "mid_block.resnets.0", "middle_2.block": "mid_block.resnets.1"}
    attentions = {"middle_1.attention": "mid_block.attentions.0"}
    for side, last in (("down", Downsample), ("up", Upsample)):
        level, count = 0, itertools.count()
        for i, module in enumerate(getattr(network, side)):
            if isinstance(module, last):
                modules[f"{side}.{i}.conv"] = f"{side}_blocks.{level}.{side}samplers.0.conv"
                level, count = level + 1, itertools.count()
                continue
            number = next(count)
            blocks[f"{side}.{i}.block"] = f"{side}_blocks.{level}.resnets.{number}"
            if module.attention is not None:
                attentions[f"{side}.{i}.attention"] = f"{side}_blocks.{level}.attentions.{number}"
    parts = {new: [old] for new, old in modules.items()}
    for group, layout in ((blocks, BLOCK), (attentions, ATTENTION)):
        for (new, old), (part, olds) in itertools.product(group.items(), layout.items()):
            parts[f"{new}.{part}"] = [f"{old}.{name}" for name in olds]
    return {
        name: [f"{old}.{name.rpartition('.')[2]}" for old in parts[name.rpartition(".")[0]]]
        for name in network.state_dict()
    }
