"""What the loss hands to the denoiser and how it averages; its optimum is in test_against_truth."""

import torch
from torch import Tensor

from ddpm_ray.diffusion import NoiseSchedule, add_noise, schedules, simple_loss

SCHEDULE = NoiseSchedule(schedules.linear(10))
T = torch.tensor([1, 4, 10])


def test_each_image_has_its_own_step_and_its_own_loss() -> None:
    """Without noise, an answer of t at step t is off by t everywhere."""
    x_0, zero = torch.randn(3, 2, 4, 4), torch.zeros(3, 2, 4, 4)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        assert torch.equal(x_t, add_noise(SCHEDULE, x_0, T, zero))
        return t.view(-1, 1, 1, 1).expand_as(x_t)

    assert simple_loss(denoise, SCHEDULE, x_0, T, zero).tolist() == [1, 16, 100]


def test_an_answer_in_bfloat16_still_gives_a_loss_in_float32() -> None:
    """0.01^2 added to 1 would be lost in bfloat16; here each image's error is 1.01."""
    zero = torch.zeros(3, 2, 4, 4)
    loss = simple_loss(
        lambda x_t, t: torch.full_like(x_t, -1, dtype=torch.bfloat16),
        SCHEDULE,
        zero,
        T,
        zero + 0.01,
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, torch.full((3,), 1.0201))
