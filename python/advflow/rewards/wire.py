"""What a reward server and its clients say to each other. Nothing here reads or writes a pickle.

A request is images and prompts: an npz file, which loses nothing, or JSON with PNGs. An answer is JSON.
"""

from __future__ import annotations

import base64
import io
import json
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from advflow.data.prompt import NO_CATEGORY, Prompt

NPZ = "application/x-npz"
JSON = "application/json"
MOST_IMAGES = 1024  # in a request
_ARRAYS = {"images.npy", "prompts.npy"}
_PIXELS = (np.dtype("float32"), np.dtype("uint8"))


class BadRequest(ValueError):
    """What is wrong with a request, in a sentence."""


@dataclass(frozen=True)
class Scored:
    """What one reward says of some images: numbers, NaN where there is none, and of images that failed the reason."""

    reward: list[float]
    score: list[float]
    errors: dict[int, str] = field(default_factory=dict)


def encode_request(images: torch.Tensor, prompts: list[Prompt]) -> bytes:
    """A request as npz, of fp32 images on the CPU. Raises ValueError for metadata that JSON does not hold."""
    buffer = io.BytesIO()
    arrays = {"images.npy": images.contiguous().numpy(), "prompts.npy": np.array(encode_prompts(prompts))}
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in arrays.items():
            # As np.savez, which takes twice as long: it copies what it writes piece by piece.
            with archive.open(name, "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, np.lib.format.header_data_from_array_1_0(array))
                member.write(array.tobytes() if array.ndim == 0 else array.data)
    return buffer.getvalue()


def encode_prompts(prompts: list[Prompt]) -> str:
    try:
        return json.dumps(
            [{"text": each.text, "category": each.category, "metadata": dict(each.metadata)} for each in prompts]
        )
    except TypeError as error:
        raise ValueError(f"the metadata of a prompt is no JSON, which a reward server is sent: {error}") from error


def decode_request(body: bytes, kind: str, most: int) -> tuple[torch.Tensor, list[Prompt]]:
    """Images, fp32 [B, 3, H, W], and prompts of a request, which may take `most` bytes. Raises BadRequest."""
    if kind == NPZ:
        arrays = _arrays(body, most)
        images, prompts = _image_array(arrays["images.npy"]), decode_prompts(_text(arrays["prompts.npy"]))
    else:
        content = _object(body, ("images", "prompts"))
        images, prompts = _pictures(content["images"], most), _prompts(content["prompts"])
    if len(images) != len(prompts):
        raise BadRequest(f"there are {len(images)} images and {len(prompts)} prompts; accepted is a prompt an image")
    if not 1 <= len(images) <= MOST_IMAGES:
        raise BadRequest(f"there are {len(images)} images; accepted are 1 to {MOST_IMAGES}")
    return images, prompts


def _arrays(body: bytes, most: int) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            members = archive.infolist()
            if {each.filename for each in members} != _ARRAYS or len(members) != len(_ARRAYS):
                raise BadRequest("accepted is an npz file of two arrays, images and prompts")
            if sum(each.file_size for each in members) > most:
                raise BadRequest(f"the arrays take more than the {most} bytes that this server accepts")
            return {each.filename: _array(archive.read(each)) for each in members}
    except BadRequest:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen kinds for a file that is damaged
        raise BadRequest(f"the body is no npz file that can be read: {_line(error)}") from error


def _array(content: bytes) -> np.ndarray[Any, Any]:
    """An .npy file, whose header must be of what it holds: NumPy makes room for whatever that names."""
    stream = io.BytesIO(content)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version not in read:
        raise BadRequest(f"an array is in version {version} of its format; accepted are 1.0 and 2.0")
    shape, by_columns, dtype = read[version](stream)
    if dtype.hasobject or dtype.itemsize * math.prod(shape) != len(content) - stream.tell():
        raise BadRequest(f"an array of {dtype} and shape {list(shape)} is not what the file holds")
    # Read here, where no pickle can be: an array of objects is one.
    numbers = np.frombuffer(bytearray(content), dtype, offset=stream.tell())
    return numbers.reshape(shape, order="F" if by_columns else "C")


def _image_array(images: np.ndarray[Any, Any]) -> torch.Tensor:
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape or images.dtype not in _PIXELS:
        raise BadRequest(
            f"images is an array of {images.dtype} and shape {list(images.shape)}; accepted is float32 in [0, 1] or "
            "uint8, of shape [images, 3, height, width]"
        )
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    return pixels.float() / 255 if images.dtype == np.uint8 else pixels


def _text(prompts: np.ndarray[Any, Any]) -> bytes:
    if prompts.ndim or prompts.dtype.kind != "U":
        raise BadRequest(f"prompts is an array of {prompts.dtype}; accepted is one string, which is JSON")
    try:
        return str(prompts).encode()
    except UnicodeEncodeError as error:
        raise BadRequest("prompts is no text") from error


def _pictures(pictures: object, most: int) -> torch.Tensor:
    """PNGs, base64 in JSON. Their pixels may take `most` bytes, which their headers tell before any is unpacked."""
    if not isinstance(pictures, list) or not pictures:
        raise BadRequest("images is no list of PNGs in base64")
    opened = [_opened(each, place) for place, each in enumerate(pictures)]
    if len({each.size for each in opened}) > 1:
        raise BadRequest("the images are of different sizes; accepted is one size in a request")
    width, height = opened[0].size
    if len(opened) * width * height * 12 > most:
        raise BadRequest(f"the images take more than the {most} bytes that this server accepts")
    try:
        pixels = np.stack([np.asarray(each) for each in opened])
    except Exception as error:  # as above
        raise BadRequest(f"an image is no PNG that can be read: {_line(error)}") from error
    return _image_array(pixels.transpose(0, 3, 1, 2))


def _opened(picture: object, place: int) -> Image.Image:
    try:
        content = base64.b64decode(picture, validate=True) if isinstance(picture, str) else b""
        opened = Image.open(io.BytesIO(content), formats=["PNG"])
    except Exception as error:  # Pillow raises a dozen kinds for a file that is damaged
        raise BadRequest(f"images[{place}] is no PNG in base64: {_line(error)}") from error
    if opened.mode != "RGB":
        raise BadRequest(f"images[{place}] is a PNG of mode {opened.mode}; accepted is RGB of 8 bits, without alpha")
    return opened


def decode_prompts(body: bytes) -> list[Prompt]:
    """Raises BadRequest."""
    return _prompts(_json(body))


def decode_check(body: bytes) -> list[Prompt]:
    """The prompts of `{"prompts": [...]}`. Raises BadRequest."""
    return _prompts(_object(body, ("prompts",))["prompts"])


def _prompts(content: object) -> list[Prompt]:
    if not isinstance(content, list):
        raise BadRequest("prompts is no list")
    return [_prompt(each, place) for place, each in enumerate(content)]


def _prompt(content: object, place: int) -> Prompt:
    """A text alone, or with a category and metadata."""
    whole = {"category": NO_CATEGORY, "metadata": {}} | (content if isinstance(content, dict) else {"text": content})
    kinds = {"text": str, "category": str, "metadata": dict}
    if whole.keys() != kinds.keys() or not all(isinstance(whole[name], kind) for name, kind in kinds.items()):
        raise BadRequest(
            f"prompts[{place}] is no prompt; accepted is a text, or an object of text, category (a text) and metadata "
            "(an object), of which the last two may be left out"
        )
    return Prompt(**whole)


def _object(body: bytes, names: tuple[str, ...]) -> dict[str, Any]:
    content = _json(body)
    if not isinstance(content, dict) or content.keys() != set(names):
        raise BadRequest(f"accepted is a JSON object of {' and '.join(names)}")
    return content


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is no JSON: {_line(error)}") from error


def encode_answer(service: str, scored: Mapping[str, Scored]) -> str:
    """JSON has no NaN: what is not a finite number becomes null."""
    rewards = {
        name: {"reward": _or_null(each.reward), "score": _or_null(each.score), "errors": each.errors}
        for name, each in scored.items()
    }
    return json.dumps({"service": service, "rewards": rewards}, allow_nan=False)


def _or_null(values: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def decode_answer(answer: bytes, service: str, reward: str, count: int) -> Scored:
    """What a server says of `count` images. Raises ValueError, with what is wrong, for anything else than that."""
    content = described(answer, service)
    entry = content["rewards"].get(reward)
    if not isinstance(entry, dict):
        raise ValueError(f"the answer has no scores of the reward {reward!r}")
    reward_numbers, score_numbers = (_numbers(entry.get(name), name, count) for name in ("reward", "score"))
    errors = entry.get("errors", {})
    if not isinstance(errors, dict) or not all(place.isdecimal() and int(place) < count for place in errors):
        raise ValueError("the answer's errors are not those of its images")
    return Scored(reward_numbers, score_numbers, {int(place): str(error) for place, error in errors.items()})


def described(answer: bytes, service: str | None) -> dict[str, Any]:
    """An answer's content, which must be that of `service`, where that is known. Raises ValueError."""
    try:
        content = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the answer is no JSON: {_line(error)}") from error
    if not isinstance(content, dict) or not isinstance(content.get("rewards"), dict) or "service" not in content:
        raise ValueError("the answer is not a reward server's")
    if service not in (None, content["service"]):
        raise ValueError("other rewards are served there than this run began with")
    return content


def _numbers(values: object, name: str, count: int) -> list[float]:
    if not isinstance(values, list) or len(values) != count:
        given = f"{len(values)} numbers" if isinstance(values, list) else "no list"
        raise ValueError(f"the answer's {name} is {given}; asked was about {count} images")
    if not all(each is None or (isinstance(each, int | float) and not isinstance(each, bool)) for each in values):
        raise ValueError(f"the answer's {name} holds something else than numbers")
    try:
        return [math.nan if each is None else float(each) for each in values]
    except OverflowError as error:
        raise ValueError(f"the answer's {name} holds a number that is too large") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
