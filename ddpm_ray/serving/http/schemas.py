"""JSON schemas of requests: for OpenAPI, and as tools of chat models."""

from __future__ import annotations

from dataclasses import fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ddpm_ray.config.sampling import SamplingSettings
from ddpm_ray.serving.image_requests import (
    EXTENSIONS,
    UPLOADS,
    EditRequest,
    ImageRequest,
    VariationRequest,
)
from ddpm_ray.serving.orders import Kind

REQUESTS: dict[Kind, type[ImageRequest]] = {
    "generation": ImageRequest,
    "edit": EditRequest,
    "variation": VariationRequest,
}
BOUNDS = {"at least": "minimum", "above": "exclusiveMinimum", "at most": "maximum"}
BASE64 = {"type": "string", "description": "file, in base64; in a form, a file"}
USES = {
    "generate_image": ("generation", "Draw images of a text or of a class."),
    "edit_image": (
        "edit",
        "Repaint the transparent part of an image, extend it to a larger size, or vary it.",
    ),
}


def request_schema(kind: Kind) -> dict[str, Any]:
    """The JSON schema of the fields of a request."""
    own, settings = REQUESTS[kind], SamplingSettings
    found = {item.name: _field(item, get_type_hints(own)[item.name]) for item in fields(own)}
    for item in fields(settings):
        if item.name in EXTENSIONS:
            found[item.name] = _field(item, get_type_hints(settings)[item.name], has_default=False)
    needed, possible = UPLOADS[kind]
    found |= dict.fromkeys(possible, BASE64)
    return {
        "type": "object",
        "properties": found,
        "required": list(needed),
        "additionalProperties": False,
    }


def chat_tools() -> list[dict[str, Any]]:
    """The tools of a chat model that draws and edits images, as JSON."""
    tools = []
    for name, (kind, description) in USES.items():
        schema = request_schema(kind)  # type: ignore[arg-type]
        schema["properties"] = {
            name: field
            for name, field in schema["properties"].items()
            if len(field.get("enum", "ab")) > 1 and name not in ("user", "stream", "partial_images")
        }
        function = {"name": name, "description": description, "parameters": schema}
        tools.append({"type": "function", "function": function})
    return tools


def _field(item: Any, hint: Any, *, has_default: bool = True) -> dict[str, Any]:
    schema = _type(hint) | {"description": item.metadata["doc"]}
    if has_default and item.default is not None:
        schema["default"] = item.default
    for rule, (limit, _) in (item.metadata.get("limits") or {}).items():
        schema[BOUNDS.get(rule, rule)] = limit
    return schema


def _type(hint: Any) -> dict[str, Any]:
    if get_origin(hint) is Literal:
        return {"type": "string", "enum": list(get_args(hint))}
    if get_origin(hint) is tuple:
        return {"type": "array", "items": _type(get_args(hint)[0])}
    if (parts := [one for one in get_args(hint) if one is not NoneType]) and len(parts) > 1:
        return {"anyOf": [_type(one) for one in parts]}
    kind = parts[0] if parts else hint
    return {"type": {bool: "boolean", int: "integer", float: "number"}.get(kind, "string")}
