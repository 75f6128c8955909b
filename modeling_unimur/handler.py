"""
A Hugging Face Inference Endpoint: JSON in and out, images as base64, a pool packed beside the model.

    {"inputs": "show me a panda, please."}
    {"inputs": [{"role": "user", "content": [{"type": "image", "image": "<base64>"}, {"type": "text", "text": "…"}]}],
     "parameters": {"top_k": 5, "modality": "image", "exclude": ["photo-7"], "image_bias": 0.1}}

answers

    {"text": "…", "image": "<base64>" or null,
     "candidates": [{"id": "…", "modality": "image", "score": 0.41, "rank": 1, "image": "<base64>"}, …]}

A picture whose longest side is at most 512 pixels is sent as it is, as PNG; a larger one is reduced to that, as JPEG.
A list under `inputs` is one dialogue: strings and messages are its turns. Nothing is fetched and no file is read for a
request. What is wrong with a request is said in a `ValueError`, which the endpoint's server answers with status 400 and
`{"error": "…"}`.
"""

import base64
import binascii
import io
from typing import Any

import torch
from transformers import AutoModel

MAX_BODY_BYTES = 16 * 2**20  # of all strings of a request together
MAX_IMAGES = 16
MAX_IMAGE_PIXELS = 16_000_000
MAX_TURNS = 64
MAX_TEXT = 20_000  # characters, of a dialogue
MAX_TOP_K = 100
MAX_SIDE = 512  # pixels, of a picture in an answer
MAX_BIAS = 1_000  # scores are cosines, or deviations where they are calibrated
# parameter -> what it may be
PARAMETERS = {
    "top_k": (int,),
    "modality": (str, type(None)),
    "exclude": (list,),
    "calibrate": (bool,),
    "image_bias": (int, float),
}


class EndpointHandler:
    """
    Args:
        path: the repository's folder, holding the checkpoint and its `pool/`.

    Raises:
        ValueError: the repository has no pool.
    """

    def __init__(self, path: str = ""):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True).to(device)
        self.model.processor.max_image_pixels = min(self.model.processor.max_image_pixels, MAX_IMAGE_PIXELS)
        self.pool = self.model.packed_pool

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            data: a request as above.

        Raises:
            ValueError: what is wrong with the request.
        """
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError('a request is a JSON object with "inputs": a text, or a list of turns')
        reply = self.model.retrieve(dialogue_of(data["inputs"]), self.pool, **parameters_of(data.get("parameters")))
        candidates = [
            {"id": c.id, "modality": c.modality, "score": c.score, "rank": c.rank,
             c.modality: encoded(c.item) if c.modality == "image" else c.item}
            for c in reply.candidates
        ]  # fmt: skip
        image = None
        if reply.image is not None:  # the best picture, so the first that is listed, if any is
            listed = next((c["image"] for c in candidates if c["modality"] == "image"), None)
            image = listed or encoded(reply.image)
        return {"text": reply.text, "image": image, "candidates": candidates}


def parameters_of(given: Any) -> dict[str, Any]:
    """The parameters of a search, checked; 10 candidates by default."""
    given = {} if given is None else given
    if not isinstance(given, dict):
        raise ValueError(f'"parameters" must be an object, got {type(given).__name__}')
    for name, value in given.items():
        if name not in PARAMETERS:
            raise ValueError(f"unknown parameter {name!r}; known are {', '.join(PARAMETERS)}")
        if not isinstance(value, PARAMETERS[name]) or (isinstance(value, bool) and bool not in PARAMETERS[name]):
            raise ValueError(f"parameter {name!r} cannot be {type(value).__name__}")
    if not 1 <= given.get("top_k", 1) <= MAX_TOP_K:
        raise ValueError(f"top_k must be between 1 and {MAX_TOP_K}, got {given['top_k']}")
    if not -MAX_BIAS <= given.get("image_bias", 0) <= MAX_BIAS:  # NaN is not, and 10**400 is no float
        raise ValueError(f"image_bias must be between {-MAX_BIAS} and {MAX_BIAS}")
    if not all(isinstance(i, str) for i in given.get("exclude", ())):
        raise ValueError("exclude must be a list of ids, which are strings")
    return {"top_k": 10} | given


def dialogue_of(inputs: Any) -> list[Any]:
    """A request's dialogue with its images as bytes, bounded in turns, characters, images and bytes."""
    turns = inputs if isinstance(inputs, list) else [inputs]
    if not 1 <= len(turns) <= MAX_TURNS:
        raise ValueError(f"a dialogue has 1 to {MAX_TURNS} turns, got {len(turns)}")
    size = images = characters = 0
    dialogue: list[Any] = []
    for at, turn in enumerate(turns):
        parts = turn.get("content") if isinstance(turn, dict) else turn
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
            raise ValueError(f'turn {at}: expected a text or {{"role": …, "content": text or list of parts}}')
        content = []
        for part in parts:
            kind = part.get("type")
            value = part.get(kind) if kind in ("text", "image") else None
            if not isinstance(value, str):
                raise ValueError(
                    f'turn {at}: a part is {{"type": "text", "text": …}} or {{"type": "image", "image": base64}}'
                )
            size += len(value)
            if size > MAX_BODY_BYTES:
                raise ValueError(f"the request holds more than {MAX_BODY_BYTES} bytes: send fewer or smaller images")
            characters += len(value) if kind == "text" else 0
            if characters > MAX_TEXT:
                raise ValueError(
                    f"the texts up to turn {at} are {characters} characters; a dialogue has at most {MAX_TEXT}: leave out "
                    "its oldest turns"
                )
            images += kind == "image"
            if images > MAX_IMAGES:
                raise ValueError(f"more than {MAX_IMAGES} images")
            content.append({"type": kind, kind: _decoded(value, at) if kind == "image" else value})
        dialogue.append({"role": "user", "content": content})
    return dialogue


def encoded(image: Any) -> str:
    """An RGB picture in base64: as PNG, or where a side is longer than `MAX_SIDE` reduced to it and as JPEG."""
    buffer = io.BytesIO()
    if max(image.size) <= MAX_SIDE:
        image.save(buffer, "PNG")
    else:
        image = image.copy()
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        image.save(buffer, "JPEG", quality=90)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _decoded(value: str, at: int) -> bytes:
    value = "".join(value.split())  # encoders break lines
    if value.startswith("data:"):
        value = value.partition(",")[2]
    try:
        image = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        message = f"turn {at}: an image must be base64, not a URL or a path; this is not ({error})"
        raise ValueError(message) from error
    if not image:
        raise ValueError(f"turn {at}: an image is empty")
    return image
