"""What /openapi.json says of bodies, which are read here and not by FastAPI."""

from __future__ import annotations

from typing import Any

from advflow.rewards.wire import JSON, MOST_IMAGES, NPZ

_PROMPT = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "object",
            "properties": {
                "text": {"type": "string"},
                "category": {"type": "string"},
                "metadata": {"type": "object"},
            },
            "required": ["text"],
            "additionalProperties": False,
        },
    ]
}
_PNG = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR4nGP8z8DAwMDAxMDAwMDAAAANHQEDasKb6QAAAABJRU5ErkJggg=="
_IMAGES = {
    "type": "array",
    "items": {"type": "string", "format": "byte", "description": "A PNG, RGB of 8 bits, in base64."},
    "minItems": 1,
    "maxItems": MOST_IMAGES,
}
_FILE = {
    "type": "string",
    "format": "binary",
    "description": "numpy.savez of images, float32 in [0, 1] or uint8 [B, 3, H, W], and of prompts, a string of JSON.",
}
_PROMPTS = {"type": "array", "items": _PROMPT}
_EXAMPLE = {"images": [_PNG], "prompts": [{"text": "a red square", "category": "colors", "metadata": {"count": 1}}]}


def _object(example: dict[str, Any], **properties: Any) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"schema": schema, "example": example}


def score_schema(rewards: list[str]) -> dict[str, Any]:
    """Of /score, for the `rewards` that are served."""
    json = _object(_EXAMPLE, images=_IMAGES, prompts=_PROMPTS)
    return _schema(rewards, {JSON: json, NPZ: {"schema": _FILE}})


def check_schema(rewards: list[str]) -> dict[str, Any]:
    """Of /check."""
    return _schema(rewards, {JSON: _object({"prompts": _EXAMPLE["prompts"]}, prompts=_PROMPTS)})


def _schema(rewards: list[str], content: dict[str, Any]) -> dict[str, Any]:
    reward = {
        "name": "reward",
        "in": "query",
        "required": False,
        "description": "Which of the rewards; all of them without.",
        "schema": {"type": "array", "items": {"type": "string", "enum": rewards}},
    }
    return {"parameters": [reward], "requestBody": {"required": True, "content": content}}


ANSWERS: dict[int | str, dict[str, Any]] = {
    400: {"description": "It broke off."},
    401: {"description": "The token is missing or wrong."},
    404: {"description": "There is no such reward."},
    408: {"description": "It took too long to arrive."},
    413: {"description": "It is too large."},
    415: {"description": "It is of another type."},
    422: {"description": "It is not images and prompts."},
    503: {"description": "Nothing can be scored now."},
}
