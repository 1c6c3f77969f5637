"""Fields of requests: OpenAI's are taken, unknown ones refused by name, wrong ones named."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.serving.image_requests import (
    EXTENSIONS,
    EditRequest,
    ImageRequest,
    VariationRequest,
    of_form,
    parsed_request,
)
from ddpm_ray.serving.request_errors import RequestError

KINDS = (ImageRequest, EditRequest, VariationRequest)


def test_what_openai_s_client_sends_is_taken() -> None:
    """The fields of its `images.generate`, with the values that have a meaning here."""
    request, settings = parsed_request(
        ImageRequest,
        {
            "prompt": "a red apple",
            "model": "fruit",
            "n": 2,
            "size": "96x64",
            "response_format": "b64_json",
            "output_format": "png",
            "quality": "auto",
            "background": "auto",
            "moderation": "auto",
            "stream": True,
            "partial_images": 2,
            "user": "u1",
        },
    )
    assert (request.n, request.wanted_size, settings) == (2, (64, 96), {})


def test_settings_of_the_sampler_are_kept_apart() -> None:
    values = {"seed": 3, "steps": 20, "sampler": "unipc", "labels": ["cat", 1], "eta": None}
    _, settings = parsed_request(EditRequest, {"prompt": "x", "strength": 0.5, **values})
    assert settings == {"seed": 3, "steps": 20, "sampler": "unipc", "labels": ["cat", 1]}
    assert set(EXTENSIONS) <= set(SamplingSettings.__dataclass_fields__)


@pytest.mark.parametrize(
    "values, param, says",
    [
        ({"promt": "a"}, "promt", "there is no field 'promt'; did you mean prompt"),
        ({"style": "vivid"}, "style", "there is no field 'style'"),
        ({"n": 0}, "n", "n is 0; it must be at least 1"),
        ({"n": 11}, "n", "n is 11; it must be at most 10"),
        ({"n": "2"}, "n", "n is '2'; give a whole number"),
        ({"n": True}, "n", "n is True; give a whole number"),
        ({"prompt": 3}, "prompt", "prompt is 3; give a text"),
        ({"prompt": "x" * 4001}, "prompt", "prompt has 4001 characters; it must have at most 4000"),
        ({"size": "64"}, "size", "size is '64'; give WIDTHxHEIGHT, as 64x64, or auto"),
        ({"size": "64x0"}, "size", "size is '64x0'; give WIDTHxHEIGHT"),
        ({"size": "9999x64"}, "size", "size is 9999x64; each side must have at most 4096 pixels"),
        ({"quality": "high"}, "quality", "quality is 'high'; choose from auto"),
        ({"output_format": "gif"}, "output_format", "output_format is 'gif'; choose from png, "),
        ({"partial_images": 1}, "partial_images", "partial_images is 1; previews need stream=true"),
        ({"stream": "yes"}, "stream", "stream is 'yes'; give True or False"),
        ({"strength": 0}, "strength", "strength is 0.0; it must be above 0"),
        ({"strength": float("nan")}, "strength", "strength is nan; it must be finite"),
    ],
)
def test_a_wrong_field_is_named(values: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as refused:
        parsed_request(EditRequest, values)
    assert refused.value.param == param
    assert refused.value.body()["error"]["param"] == param


@given(
    st.dictionaries(
        st.one_of(st.sampled_from(["n", "size", "prompt", "stream", "seed"]), st.text(max_size=9)),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=2),
            max_leaves=3,
        ),
        max_size=4,
    )
)
def test_any_json_is_a_request_or_an_error_of_one_line(values: dict[str, Any]) -> None:
    for kind in KINDS:
        try:
            parsed_request(kind, values)
        except RequestError as error:
            refused = error
        else:
            continue
        assert "\n" not in str(refused)
        assert refused.status == 400


def test_a_form_gives_the_values_of_json() -> None:
    """All fields of a form are texts; a prompt that looks like a number stays a text."""
    form = {
        "prompt": "12",
        "n": "3",
        "stream": "true",
        "strength": "0.5",
        "seed": "7",
        "labels": '["cat", 2]',
        "sampler": "ddim",
        "negative_prompt": "true",
    }
    request, settings = parsed_request(EditRequest, of_form(EditRequest, form))
    assert (request.prompt, request.n, request.stream) == ("12", 3, True)
    assert request.strength == 0.5
    assert settings == {
        "seed": 7,
        "labels": ["cat", 2],
        "sampler": "ddim",
        "negative_prompt": "true",
    }
    with pytest.raises(RequestError, match="n is 'many'; give a whole number"):
        parsed_request(EditRequest, of_form(EditRequest, {"n": "many"}))
    with pytest.raises(RequestError, match=r"n is '\[\[\["):
        parsed_request(EditRequest, of_form(EditRequest, {"n": "[" * 100_000}))
