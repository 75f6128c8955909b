"""
A Hugging Face Inference Endpoint: JSON in and out, images as base64, a pool packed beside the model.

    {"inputs": "show me a panda, please."}
    {"inputs": [{"role": "user", "content": [{"type": "image", "image": "<base64>"}, {"type": "text", "text": "…"}]}],
     "parameters": {"top_k": 5, "modality": "image", "exclude": ["photo-7"], "image_bias": 0.1}}

answers

    {"text": "…", "image": "<base64>" or null, "image_source": "retrieved" or "drawn" or null,
     "candidates": [{"id": "…", "modality": "image", "score": 0.41, "rank": 1, "image": "<base64>"}, …]}

`image_source` says whether the picture is the pool's or drawn. A checkpoint that can draw takes `"generate": "always"` or
`"auto"` among the parameters, as `retrieve` does (`"never"` by default), and with it `seed`, `steps` (at most 50) and
`guidance` (1 to 20); another one refuses them.

A picture whose longest side is at most 512 pixels is sent as it is, as PNG; a larger one is reduced to that, as JPEG.
A list under `inputs` is one dialogue: strings and messages are its turns. Nothing is fetched and no file is read for a
request. A request that cannot be answered raises a `ValueError` that says why, which the endpoint's server answers with
status 400 and `{"error": "…"}`.
"""

import base64
import binascii
import io
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from PIL import Image
from transformers import AutoModel

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 * 2**20  # of all strings of a request together
MAX_IMAGES = 16
MAX_IMAGE_PIXELS = 16_000_000  # of one image
MAX_PIXELS = 64_000_000  # of all images of a request, and of those that are decoded together: 192 MB as RGB
MAX_TURNS = 64
MAX_TEXT = 20_000  # characters, of a dialogue
MAX_TOP_K = 100
MAX_SIDE = 512  # pixels, of a picture in an answer
MAX_BIAS = 1_000  # scores are cosines, or deviations where they are calibrated
MAX_STEPS = 50  # of a picture that is drawn: what a request may cost
MAX_GUIDANCE = 20
MAX_SEED = 2**32 - 1
DRAWING = ("seed", "steps", "guidance")
# parameter -> what it may be
PARAMETERS = {
    "top_k": (int,),
    "modality": (str, type(None)),
    "exclude": (list,),
    "calibrate": (bool,),
    "image_bias": (int, float),
    "generate": (str,),
    "seed": (int,),
    "steps": (int,),
    "guidance": (int, float),
}
# parameter -> its least and its greatest
BOUNDS = {
    "top_k": (1, MAX_TOP_K),
    "image_bias": (-MAX_BIAS, MAX_BIAS),
    "seed": (0, MAX_SEED),
    "steps": (1, MAX_STEPS),
    "guidance": (1, MAX_GUIDANCE),
}


T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Query:
    """
    A checked request.

    Attributes:
        dialogue: as `embed_dialogues` takes it, its images encoded.
        parameters: of the search, and of what is drawn.
        pixels: of all its images together.
    """

    dialogue: list[Any]
    parameters: dict[str, Any]
    pixels: int


class EndpointHandler:
    """
    Args:
        path: the repository's folder, holding the checkpoint and its `pool/`.

    Raises:
        ValueError: the repository has no pool, or another model made it.

    Where the checkpoint can draw, its diffusion model is loaded here, since nothing is fetched for a request. Where that
    fails, the log says why; it answers all the same, and refuses what is to be drawn.
    """

    def __init__(self, path: str = ""):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModel.from_pretrained(path, trust_remote_code=True).to(device)
        self.model.processor.max_image_pixels = min(self.model.processor.max_image_pixels, MAX_IMAGE_PIXELS)
        self.pool = self.model.packed_pool
        self.pool.check_made_by(self.model.fingerprint)
        self.draws = self._load_diffusion()

    def _load_diffusion(self) -> bool:
        """Whether there is a diffusion model to draw with."""
        if not self.model.config.n_drawing_tokens:
            return False
        try:
            self.model.pipeline.to(self.model.device)
        except (ImportError, OSError, ValueError) as error:
            logger.warning(f"this endpoint cannot draw: {error}")
            return False
        return True

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """
        Args:
            data: a request as above.

        Raises:
            ValueError: what is wrong with the request.
        """
        (answer,) = self.batch([data])
        if isinstance(answer, Exception):
            raise answer
        return answer

    def batch(self, requests: Sequence[Any]) -> list[dict[str, Any] | Exception]:
        """
        Several requests at once: their dialogues are embedded together, and those of equal parameters searched together.

        Args:
            requests: n requests as above.

        Returns:
            n answers; the exception of a request in its place, a `ValueError` where the request is wrong.
        """
        queries = each(lambda given: [query_of(request) for request in given], requests)
        embedded = of_the_good(queries, self._embedded)
        return of_the_good(embedded, self._searched)

    def _embedded(self, queries: list[Query]) -> list[tuple[Query, torch.Tensor] | Exception]:
        """Each query with its dialogue's embedding `(q,)` float32."""

        def embed(some: Sequence[Query]) -> list[tuple[Query, torch.Tensor]]:
            return list(zip(some, self.model.embed_dialogues([q.dialogue for q in some]), strict=True))

        return [pair for part in within_pixels(queries) for pair in each(embed, part)]

    def _searched(self, embedded: list[tuple[Query, torch.Tensor]]) -> list[dict[str, Any] | Exception]:
        """The answer to each query and its embedding."""
        groups = defaultdict(list)
        for at, (query, _) in enumerate(embedded):
            groups[json.dumps(query.parameters, sort_keys=True)].append(at)
        answers: dict[int, dict[str, Any] | Exception] = {}
        for places in groups.values():
            answers |= zip(places, each(self._answers, [embedded[at] for at in places]), strict=True)
        return [answers[at] for at in range(len(embedded))]

    def _answers(self, embedded: Sequence[tuple[Query, torch.Tensor]]) -> list[dict[str, Any]]:
        """The answers to queries of the same parameters."""
        given = embedded[0][0].parameters
        drawing = {name: given[name] for name in DRAWING if name in given}
        search = {name: value for name, value in given.items() if name not in DRAWING}
        if not self.draws and self.model.config.n_drawing_tokens and search.get("generate", "never") != "never":
            raise ValueError(
                "generate: this endpoint cannot draw, since its diffusion model was not loaded as it started"
            )
        queries = torch.stack([row for _, row in embedded])
        dialogues = [query.dialogue for query, _ in embedded]
        replies = self.model.replies_to(dialogues, queries, self.pool, drawing=drawing, **search)
        return [answer_of(reply) for reply in replies]


def each(step: Callable[[Sequence[T]], Sequence[R]], items: Sequence[T]) -> list[R | Exception]:
    """`step` of all items together; where that fails, of each alone, with its exception in the place of one that fails."""
    try:
        return list(step(items))
    except Exception as error:
        if len(items) == 1:
            return [error]
        return [result for item in items for result in each(step, [item])]


def of_the_good(items: Sequence[Any], step: Callable[[list[Any]], list[Any]]) -> list[Any]:
    """`step` of the items that are no exceptions; those that are keep their places."""
    results = iter(step([item for item in items if not isinstance(item, Exception)]))
    return [item if isinstance(item, Exception) else next(results) for item in items]


def within_pixels(queries: Sequence[Query]) -> Iterator[list[Query]]:
    """The queries in order, in parts whose images have at most `MAX_PIXELS` together."""
    part: list[Query] = []
    for query in queries:
        if part and sum(q.pixels for q in part) + query.pixels > MAX_PIXELS:
            yield part
            part = []
        part.append(query)
    if part:
        yield part


def query_of(request: Any) -> Query:
    """A request, checked. Raises `ValueError` as [`EndpointHandler`] does."""
    if not isinstance(request, dict) or "inputs" not in request:
        raise ValueError('a request is a JSON object with "inputs": a text, or a list of turns')
    dialogue, pixels = dialogue_of(request["inputs"])
    return Query(dialogue, parameters_of(request.get("parameters")), pixels)


def answer_of(reply: Any) -> dict[str, Any]:
    """A reply as JSON."""
    candidates = [
        {"id": c.id, "modality": c.modality, "score": c.score, "rank": c.rank,
         c.modality: encoded(c.item) if c.modality == "image" else c.item}
        for c in reply.candidates
    ]  # fmt: skip
    image = None
    if reply.image is not None:
        # The pool's is the best picture, so the first that is listed, if any is.
        listed = (c["image"] for c in candidates if c["modality"] == "image" and reply.image_source != "drawn")
        image = next(listed, None) or encoded(reply.image)
    return {"text": reply.text, "image": image, "image_source": reply.image_source, "candidates": candidates}


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
    for name, (least, greatest) in BOUNDS.items():
        if name in given and not least <= given[name] <= greatest:  # NaN is not, and 10**400 is no float
            raise ValueError(f"{name} must be between {least} and {greatest}")
    if not all(isinstance(i, str) for i in given.get("exclude", ())):
        raise ValueError("exclude must be a list of ids, which are strings")
    return {"top_k": 10} | given


def dialogue_of(inputs: Any) -> tuple[list[Any], int]:
    """
    A request's dialogue with its images as bytes, bounded in turns, characters, images, bytes and pixels, and how many
    pixels its images have together.
    """
    turns = inputs if isinstance(inputs, list) else [inputs]
    if not 1 <= len(turns) <= MAX_TURNS:
        raise ValueError(f"a dialogue has 1 to {MAX_TURNS} turns, got {len(turns)}")
    size = images = characters = pixels = 0
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
            if kind == "image":
                value = _decoded(value, at)
                pixels += _pixels(value)
                if pixels > MAX_PIXELS:
                    raise ValueError(
                        f"the images up to turn {at} have {pixels} pixels; those of a dialogue have at most {MAX_PIXELS} "
                        "together: reduce them"
                    )
            content.append({"type": kind, kind: value})
        dialogue.append({"role": "user", "content": content})
    return dialogue, pixels


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


def _pixels(image: bytes) -> int:
    """How many pixels an encoded image says it has; 0 where it says nothing, which is refused when it is decoded."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return opened.width * opened.height
    except Exception:  # each of Pillow's decoders raises its own kinds on broken data
        return 0
