"""
Random input to every verb: it is answered, or refused by a `ValueError` in words; nothing else.

    python -m tests.stress.fuzz --cases 2000 [--verb retrieve] [--seed 1]

prints, for each verb, that it held; what breaks it is printed reduced to its smallest form. The tests run a short form.
"""

import argparse
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_unimur import BadImageError, CandidatePool, Conversation, Retrieval, UniMuRModel
from modeling_unimur.pipeline_unimur import MultimodalRetrievalPipeline
from tests.conftest import picture
from tests.tiny import make_model

SHORT = 40  # cases of a verb in the tests


def _encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    picture(3, (16, 12)).save(buffer, kind)
    return buffer.getvalue()


FILES = [_encoded(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP")]
WORDS = [
    "hi",
    "[RET]",
    "<image>",
    "</s>",
    "",
    " ",
    "\n",
    "a\ud800",
    "x" * 300,
    "a\0b",
    "no.png",
    "日本",
    "<|endoftext|>",
]


@st.composite
def _broken_files(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(FILES)))
    for at in draw(st.lists(st.integers(0, len(data) - 1), max_size=4)):
        data[at] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


def _pil(mode: str, width: int, height: int) -> Image.Image:
    return Image.new(mode, (width, height))


def _mostly(good: st.SearchStrategy, bad: st.SearchStrategy) -> st.SearchStrategy:
    """Bad once in eight, so that a case with several arguments also comes to an answer."""
    return st.integers(0, 7).flatmap(lambda n: good if n else bad)


junk = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.binary(max_size=8), st.just(object()),
    st.dictionaries(st.sampled_from(["content", "role", "type", "text", "image", "path", "bytes"]), st.text(), max_size=3),
    st.sets(st.integers(0, 3), max_size=2), st.just(np.zeros((2, 2))), st.just(np.array("a")), st.just(torch.zeros(2, 3)),
    st.just(np.zeros((0, 3, 3), np.uint8)), st.just(np.arange(3)),
)  # fmt: skip
texts = _mostly(st.sampled_from(["hi", "a panda", "[RET]", "日本"]), st.sampled_from(WORDS) | st.text(max_size=20))
modes = st.sampled_from(["RGB", "RGBA", "L", "LA", "1", "P", "CMYK", "I", "F", "I;16", "HSV"])
whole_images = st.one_of(
    st.builds(_pil, modes, st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(FILES),
    st.builds(lambda data: {"bytes": data, "path": None}, st.sampled_from(FILES)),
    st.builds(lambda h, w, c: np.zeros((h, w, c), np.uint8), st.integers(1, 5), st.integers(1, 5), st.just(3)),
)
broken_images = st.one_of(
    st.builds(_pil, modes, st.integers(0, 300), st.integers(0, 2)),
    _broken_files(),
    st.sampled_from(
        [Path("no.png"), Path(__file__), Path(__file__).parent, "https://a/b.png", "data:image/png;base64,x", "a\0b"]
    ),
    st.builds(lambda data: {"bytes": data, "path": None}, _broken_files()),
    st.builds(lambda h, w, c: np.zeros((h, w, c), np.uint8), *[st.integers(0, 5)] * 3),
)
images = _mostly(whole_images, broken_images)
parts = _mostly(
    st.one_of(
        st.builds(lambda text: {"type": "text", "text": text}, texts),
        st.builds(lambda image: {"type": "image", "image": image}, images),
        texts,
    ),
    st.one_of(
        st.builds(lambda text: {"type": "text", "text": text}, junk),
        st.builds(lambda image: {"type": "image", "image": image}, junk),
        junk,
    ),
)
messages = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["user", "assistant", None]),
    _mostly(texts | st.lists(parts, max_size=3), junk),
)
dialogues = _mostly(
    st.one_of(texts, images, messages, st.lists(_mostly(st.one_of(texts, images, messages), junk), max_size=4)), junk
)


def _collections(items: st.SearchStrategy, one: bool = True) -> st.SearchStrategy:
    """A list of items in one of the forms that a verb may be given, one item, or junk."""
    lists = st.lists(_mostly(items, junk), min_size=1, max_size=4)
    forms = st.sampled_from([list, list, tuple, iter, _Numbered, _objects])
    good = st.builds(lambda form, rows: form(rows), forms, lists)
    return _mostly(good | items if one else good, st.one_of(items, junk, st.just([]), st.builds(_enumerated, lists)))


def _enumerated(rows: list[Any]) -> dict[int, Any]:
    return dict(enumerate(rows))


class _Numbered:
    """A data set that knows a length and numbers alone."""

    def __init__(self, rows: list[Any]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def _objects(rows: list[Any]) -> np.ndarray:
    array = np.empty(len(rows), object)
    array[:] = rows
    return array


counts = _mostly(
    st.sampled_from([1, 2, 32, np.int64(3)]), st.sampled_from([0, -1, 2.5, "5", None, True, float("nan"), 10**30])
)
excluded = _mostly(
    st.lists(st.sampled_from(["text-5", 105, np.int64(7), "absent", ""]), max_size=3),
    st.lists(st.sampled_from([None, 1.5, b"a", (1,), True]), min_size=1, max_size=2) | junk,
)
searches = st.fixed_dictionaries(
    {},
    optional={
        "top_k": counts,
        "modality": _mostly(st.sampled_from(["image", "text", None]), st.sampled_from(["video", 3, [], {}])),
        "exclude": excluded,
        "calibrate": st.booleans(),
        "image_bias": _mostly(
            st.floats(-2, 2) | st.integers(-2, 2), st.floats() | st.sampled_from(["x", None, 10**400, [1], 1j])
        ),
    },
)
candidates = {
    "images": _collections(images, one=False),
    "texts": _collections(texts, one=False),
    "image_ids": _mostly(st.none(), st.lists(st.sampled_from(["a", 105, None, 1.5, "b"]), max_size=3) | junk),
    "text_ids": _mostly(st.none(), st.lists(st.sampled_from(["a", 105, None, 1.5, "c"]), max_size=3) | junk),
}


def _options(**more: st.SearchStrategy) -> st.SearchStrategy:
    return st.fixed_dictionaries({}, optional={"batch_size": counts, **more})


def _spoken(model: UniMuRModel, turns: list[Any]) -> Conversation:
    talk = model.conversation()
    for turn in turns:
        talk.say(turn)
    return talk


def _vectors(answer: Any) -> None:
    rows = torch.as_tensor(answer)
    assert rows.dtype == torch.float32 and rows.shape[-1] == 24
    assert torch.allclose(rows.norm(dim=-1), torch.ones(rows.shape[:-1]), atol=1e-4)


def _replies(answer: Any) -> None:
    for reply in answer if isinstance(answer, list) else [answer]:
        assert isinstance(reply, Retrieval) and reply.candidates and "\n" not in repr(reply)
        assert reply._repr_html_() and hash(reply) is not None


def _tensors(answer: Any) -> None:
    assert all(len(value) for value in answer.values())


def _pools(answer: Any) -> None:
    assert isinstance(answer, CandidatePool) and len(answer)


def _dicts(answer: Any) -> None:
    for reply in answer if isinstance(answer, list) else [answer]:
        assert set(reply) == {"text", "image", "image_source", "candidates"}


Verb = tuple[st.SearchStrategy, Callable[[UniMuRModel, CandidatePool, Any], Any], Callable[[Any], None]]


def _embedding(verb: str, items: st.SearchStrategy) -> Verb:
    given = st.tuples(_collections(items), _options(convert_to_numpy=st.booleans()))
    return given, lambda model, pool, case: getattr(model, verb)(case[0], **case[1]), _vectors


VERBS: dict[str, Verb] = {
    "embed_dialogues": _embedding("embed_dialogues", dialogues),
    "embed_images": _embedding("embed_images", images),
    "embed_texts": _embedding("embed_texts", texts),
    "encode": _embedding("encode", dialogues),
    "encode_query": _embedding("encode_query", dialogues),
    "processor": (
        st.fixed_dictionaries({}, optional={
            "dialogues": _collections(dialogues), "images": _collections(images),
            "texts": _collections(texts), "padding": st.booleans(),
        }),
        lambda model, pool, case: model.processor(**case),
        _tensors,
    ),
    "retrieve": (
        st.tuples(_collections(dialogues), searches, _options(), st.integers(0, 9)),
        lambda model, pool, case: model.retrieve(case[0], ["a"] if case[3] == 0 else pool, **case[1], **case[2]),
        _replies,
    ),
    "build_pool": (
        _options(**candidates),
        lambda model, pool, case: model.build_pool(**case),
        _pools,
    ),
    "extend_pool": (
        _options(**candidates),
        lambda model, pool, case: model.extend_pool(pool, **case),
        _pools,
    ),
    "conversation": (
        st.tuples(st.lists(_mostly(st.one_of(texts, images, messages), junk), max_size=3), searches),
        lambda model, pool, case: _spoken(model, case[0]).retrieve(pool, **case[1]),
        _replies,
    ),
    "pipeline": (
        st.tuples(_collections(dialogues), searches, _options()),
        lambda model, pool, case: MultimodalRetrievalPipeline(model, model.processor)(
            case[0], pool=pool, **case[1], **case[2]
        ),
        _dicts,
    ),
}  # fmt: skip


def run(verb: str, model: UniMuRModel, pool: CandidatePool, cases: int, at: int | None = None) -> dict[str, int]:
    """
    Gives a verb so many random cases, the same each time unless a seed is given.

    Returns:
        How many were answered, and how many refused.

    Raises:
        Exception: what the verb raised, if it was no plain `ValueError` with a message.
        AssertionError: an answer that is none.
    """
    arguments, call, check = VERBS[verb]
    outcomes = {"answered": 0, "refused": 0}

    @settings(
        max_examples=cases,
        derandomize=at is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(arguments)
    def answers_or_refuses(case: Any) -> None:
        try:
            answer = call(model, pool, case)
        except ValueError as error:
            assert type(error) in (ValueError, BadImageError) and str(error).strip(), repr(error)
            outcomes["refused"] += 1
            return
        check(answer)
        outcomes["answered"] += 1

    (answers_or_refuses if at is None else seed(at)(answers_or_refuses))()
    return outcomes


def made_pool(model: UniMuRModel) -> CandidatePool:
    return model.build_pool(
        images=[picture(i) for i in range(4)], texts=["a", "b", "a panda"], image_ids=[105, 1, 2, 3]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000, help="of each verb")
    parser.add_argument("--verb", choices=sorted(VERBS), action="append", help="this verb alone; may be repeated")
    parser.add_argument("--seed", type=int, help="other cases than those of the tests")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder))
        pool = made_pool(model)
        for verb in arguments.verb or VERBS:
            print(verb, run(verb, model, pool, arguments.cases, arguments.seed), flush=True)


if __name__ == "__main__":
    main()
