"""Laws of a batch's conditioning: rows stay together, null removes labels and texts alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddpm_ray.diffusion.conditioning import NO_LABEL, NO_TEXT, UNCONDITIONAL, Conditioning


@st.composite
def conditionings(draw: st.DrawFn) -> Conditioning:
    """Row b of every tensor is a number of its own, so that a row in a wrong place is seen."""
    rows, start = draw(st.integers(1, 5)), draw(st.integers(0, 1000))
    numbers = torch.arange(start, start + rows)
    image = numbers.float().view(-1, 1, 1, 1).expand(rows, 2, 3, 4)
    labels, tokens, estimate, low_resolution, known = (draw(st.booleans()) for _ in range(5))
    return Conditioning(
        labels=numbers if labels else None,
        tokens=numbers[:, None] + torch.arange(3) if tokens else None,
        estimate=image if estimate else None,
        low_resolution=image + 0.5 if low_resolution else None,
        known=image[:, :1] + 0.25 if known else None,
    )


def rows(conditioning: Conditioning) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in vars(conditioning).items() if tensor is not None}


@given(conditionings())
def test_null_removes_labels_and_texts_and_no_image(conditioning: Conditioning) -> None:
    null = rows(conditioning.null())
    assert null.keys() == rows(conditioning).keys()
    for name, tensor in rows(conditioning).items():
        if name in ("labels", "tokens"):
            assert (null[name] == (NO_LABEL if name == "labels" else NO_TEXT)).all()
        else:
            assert torch.equal(null[name], tensor)


@given(conditionings(), st.data())
def test_drop_is_null_for_the_chosen_and_nothing_for_the_others(
    conditioning: Conditioning, data: st.DataObject
) -> None:
    count = conditioning.batch_size or 1
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    dropped, null = rows(conditioning.drop(chosen)), rows(conditioning.null())
    for name, tensor in rows(conditioning).items():
        assert torch.equal(dropped[name][chosen], null[name][chosen])
        assert torch.equal(dropped[name][~chosen], tensor[~chosen])


@given(conditionings(), st.integers(1, 4))
def test_repeat_is_concatenation_with_itself(conditioning: Conditioning, count: int) -> None:
    joined = conditioning
    for _ in range(count - 1):
        joined = joined.concat(conditioning)
    repeated = conditioning.repeat(count)
    assert repeated.batch_size == (conditioning.batch_size and count * conditioning.batch_size)
    for name, tensor in rows(joined).items():
        assert torch.equal(rows(repeated)[name], tensor)


@given(conditionings())
def test_the_halves_of_a_guided_batch_are_the_conditional_and_the_null(
    conditioning: Conditioning,
) -> None:
    both = rows(conditioning.concat(conditioning.null()))
    for name, tensor in rows(conditioning).items():
        first, second = both[name].chunk(2)
        assert torch.equal(first, tensor)
        assert torch.equal(second, rows(conditioning.null())[name])


def test_every_tensor_moves_to_the_device() -> None:
    image = torch.zeros(2, 1, 2, 2)
    labels, tokens = torch.tensor([0, 1]), torch.zeros(2, 3, dtype=torch.int64)
    moved = Conditioning(labels, image, image, image, tokens).to("meta")
    assert {tensor.device.type for tensor in rows(moved).values()} == {"meta"}
    assert rows(moved).keys() == {"labels", "tokens", "estimate", "low_resolution", "known"}
    assert rows(UNCONDITIONAL.to("meta")) == {}


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels: 3, estimate: 2\); give B of each"):
        Conditioning(torch.tensor([0, 1, 2]), estimate=torch.zeros(2, 1, 2, 2))
    labelled = Conditioning(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="labels is given for one of two batches"):
        labelled.concat(UNCONDITIONAL)
