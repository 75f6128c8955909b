"""A FROMAGe over tiny towers, its training rows, and sequences of ids written by hand."""

from benchmarks.baselines.fromage import FromageModel
from benchmarks.baselines.fromage_train import FromageCollator
from tests.conftest import picture
from tests.tiny import make_processor, make_towers
from train.miniature import encode

WORDS = ["a red fox", "two dogs", "the green sea", "my old hat", "one panda", "blue sky", "tiny cup", "fast car"]


def make(folder, seed=0, **fields):
    text, clip = make_towers(folder, "opt", seed)
    model = FromageModel.from_pretrained_towers(text, clip, make_processor(2), **{"shared_dim": 12, **fields})
    return model.eval()


def rows_of(n=8):
    return [
        {"id": str(i), "image": {"bytes": encode(picture(i)), "path": None}, "captions": [WORDS[i % 8]]}
        for i in range(n)
    ]


def inputs_of(model, n=3, concatenate=0.0):
    batch = FromageCollator(model.processor, concatenate=concatenate)(rows_of(n))
    return {name: value for name, value in batch.items() if name not in ("skipped", "n_seen")}


def ids_of(model, *parts):
    """Ids by hand: "BOS", "RET", "image" (two visual tokens), "pad", and words letter by letter."""
    tokenizer, processor = model.processor.tokenizer, model.processor
    known = {"BOS": [2], "RET": [processor.ret_token_id], "image": [processor.image_token_id] * 2, "pad": [1]}
    letters = {" ": "Ġ", "\n": "Ċ"}
    return [
        i
        for part in parts
        for i in known.get(part) or tokenizer.convert_tokens_to_ids([letters.get(c, c) for c in part])
    ]
