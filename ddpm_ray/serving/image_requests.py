"""Requests for images: the fields of OpenAI's image API, and those of this server by name.

A field that is not known, or that other fields make void, is refused, never ignored: an image that
is drawn without a setting that the client believes in is a wrong answer. Settings of the samplers
(EXTENSIONS) are checked by the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from ddpm_ray.config.jobs.edit import EditConfig, InpaintingMethod
from ddpm_ray.config.option_fields import arguments, option, out_of_range, shown
from ddpm_ray.config.reading.nearest import did_you_mean
from ddpm_ray.serving.request_errors import RequestError

MOST_PROMPT = 4000  # characters
MOST_SIDE = 4096  # pixels
MOST_NAME = 256  # characters of other texts
MOST_LABELS = 10  # as many as images
MOST_GUIDANCE = 1000.0
STRENGTH, RESAMPLES = 0.75, EditConfig.resamples  # of an edit that gives none
EXTENSIONS = (  # of SamplingSettings
    "seed",
    "steps",
    "sampler",
    "spacing",
    "eta",
    "guidance_scale",
    "guidance_rescale",
    "negative_prompt",
    "labels",
)
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_TEXTS = ("sampler", "spacing", "negative_prompt")  # of EXTENSIONS; the others are numbers
UPLOADS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # of a kind: needed, possible
    "generation": ((), ()),
    "edit": (("image",), ("image", "mask")),
    "variation": (("image",), ("image",)),
}
Request = TypeVar("Request", bound="ImageRequest")


@dataclass(frozen=True)
class ImageRequest:
    """Fields of every request."""

    model: str = option("", "name of a served model; empty: the first one")
    prompt: str = option("", "text that the images show")
    n: int = option(1, "images", at_least=1, at_most=10)
    size: str = option("auto", "width and height in pixels, as 64x64; auto: those of the model")
    response_format: Literal["b64_json", "url"] = option(
        "b64_json", "images in the answer, or URLs"
    )
    output_format: Literal["png", "jpeg", "webp"] = option("png", "format of the image files")
    stream: bool = option(False, "send events, with previews")
    partial_images: int = option(0, "previews of a stream", at_least=0, at_most=3)
    user: str = option("", "accepted, and not used")
    quality: Literal["auto"] = option("auto", "there is one quality: see steps")
    background: Literal["auto"] = option("auto", "images are opaque")
    moderation: Literal["auto"] = option("auto", "there is none")

    @property
    def wanted_size(self) -> tuple[int, int] | None:
        """(height, width); None: that of the model or of the image."""
        found = _SIZE.fullmatch(self.size)
        return (int(found[2]), int(found[1])) if found else None


@dataclass(frozen=True)
class EditRequest(ImageRequest):
    """An image is repainted where it is marked, or varied as a whole."""

    strength: float | None = option(
        None,
        "share of the noise that is added to an image without a mask, which is then drawn anew; "
        f"{STRENGTH} if it is left out",
        above=0,
        at_most=1,
    )
    method: InpaintingMethod = option(
        "auto", "how marked pixels are repainted; auto: as the model was trained"
    )
    resamples: int | None = option(
        None,
        f"repaint: how often a section is repeated; {RESAMPLES} if it is left out",
        at_least=1,
        at_most=20,
    )


@dataclass(frozen=True)
class VariationRequest(ImageRequest):
    """Images like the given one."""


def parsed_request(
    kind: type[Request], values: Mapping[str, Any], *, is_job: bool = False
) -> tuple[Request, dict[str, Any]]:
    """A request of JSON values, and the settings of the sampler that it gives.

    `is_job`: previews need no stream, since those of a job can be read later. Raises RequestError,
    which names the first wrong field.
    """
    known = {item.name for item in fields(kind)}
    for name in values:
        if name not in known and name not in EXTENSIONS:
            allowed = [*sorted(known), *EXTENSIONS]
            hint = did_you_mean(str(name), allowed) or f"; there are {', '.join(allowed)}"
            raise RequestError(f"there is no field {shown(name)}{hint}", str(name))
    own = {name: value for name, value in values.items() if name in known}
    try:
        request = kind(**arguments(kind, own))
    except ValueError as error:
        raise RequestError(str(error), named_field(str(error))) from error
    for problem in (*out_of_range(request), *_problems(request, is_job)):
        raise RequestError(problem, named_field(problem))
    settings = {k: v for k, v in values.items() if k in EXTENSIONS and v is not None}
    for problem in _large_settings(settings):
        raise RequestError(problem, named_field(problem))
    return request, settings


def of_form(kind: type[ImageRequest], form: Mapping[str, str]) -> dict[str, Any]:
    """The values of a form, whose fields are texts, as JSON has them; for `parsed_request`.

    A text that is no number, truth value or list stays a text, which `parsed_request` refuses.
    """
    types = get_type_hints(kind)
    return {
        name: text if _is_text(name, types) else _json_value(text) for name, text in form.items()
    }


def named_field(problem: str) -> str | None:
    """The field that a line of an error begins with; None if it begins with another word."""
    word = problem.split(" ", 1)[0].removeprefix("sampling.")
    word = "prompt" if word == "prompts" else word  # the samplers take several
    kinds = (ImageRequest, EditRequest, VariationRequest)
    known = {item.name for kind in kinds for item in fields(kind)}
    return word if word in known or word in EXTENSIONS else None


def _problems(request: ImageRequest, is_job: bool) -> list[str]:
    """Lines for values that are of the right type, and wrong."""
    found = []
    if len(request.prompt) > MOST_PROMPT:
        found.append(
            f"prompt has {len(request.prompt)} characters; it must have at most {MOST_PROMPT}"
        )
    found += [
        f"{name} is longer than {MOST_NAME} characters"
        for name in ("model", "user")
        if len(getattr(request, name)) > MOST_NAME
    ]
    size = request.wanted_size
    if request.size != "auto" and size is None:
        found.append(f"size is {shown(request.size)}; give WIDTHxHEIGHT, as 64x64, or auto")
    elif size is not None and max(size) > MOST_SIDE:
        found.append(f"size is {request.size}; each side must have at most {MOST_SIDE} pixels")
    if request.partial_images and not (request.stream or is_job):
        found.append(f"partial_images is {request.partial_images}; previews need stream=true")
    return found


def _large_settings(settings: Mapping[str, Any]) -> list[str]:
    """Lines for settings that are larger than any use; the model checks all else."""
    found = []
    labels, negative = settings.get("labels"), settings.get("negative_prompt")
    if isinstance(labels, list) and len(labels) > MOST_LABELS:
        found.append(f"labels has {len(labels)} entries; give at most {MOST_LABELS}")
    if isinstance(negative, str) and len(negative) > MOST_PROMPT:
        found.append(f"negative_prompt is longer than {MOST_PROMPT} characters")
    for name, most in (("seed", 2**64 - 1), ("guidance_scale", MOST_GUIDANCE)):
        value = settings.get(name)
        if isinstance(value, int | float) and value > most:
            found.append(f"{name} is too large; it must be at most {most:g}")
    return found


def _is_text(name: str, types: Mapping[str, Any]) -> bool:
    if name in types:
        kinds = get_args(types[name]) or (types[name],)
        return not any(kind in (int, float, bool) for kind in kinds)
    return name not in EXTENSIONS or name in _TEXTS


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
