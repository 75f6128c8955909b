"""
What embedding costs beyond the bare towers, and a turn of a conversation that is kept against a full pass.

    python -m benchmarks.speed.embedding --output benchmarks/results
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from modeling_unimur import UniMuRModel

from .models import sentence
from .step import make_model
from .timing import interleaved, ratio

BATCH, TOKENS, TURNS = 32, 60, 10
SHAPE = "V1.6k"


@torch.no_grad()
def towers(model: UniMuRModel, rounds: int) -> dict[str, Any]:
    """Images and dialogues, from tensors to embeddings, against the towers alone on the same batch."""
    generator, rng = torch.Generator().manual_seed(0), random.Random(0)
    size = model.config.clip_config.vision_config.image_size
    images = {"pixel_values": torch.randn(BATCH, 3, size, size, generator=generator)}
    dialogues = model.prepare("dialogues", [[sentence(model, TOKENS, rng)] for _ in range(BATCH)])
    trunk = model.language_model.base_model
    bare = {"input_ids": dialogues["input_ids"].clamp(max=model.config.text_config.vocab_size - 1),
            "attention_mask": dialogues["attention_mask"]}  # fmt: skip

    def clip_alone(number: int) -> torch.Tensor:
        pooled = model.clip.vision_model(images["pixel_values"]).pooler_output
        return model.clip.visual_projection(pooled)

    theirs = F.normalize(clip_alone(0), dim=-1)
    torch.testing.assert_close(model.embed_inputs("images", images), theirs, rtol=1e-4, atol=1e-5)
    measured = interleaved(
        {
            "images": lambda i: model.embed_inputs("images", images), "CLIP alone": clip_alone,
            "dialogues": lambda i: model.embed_inputs("dialogues", dialogues),
            "LLM alone": lambda i: trunk(**bare, use_cache=False).last_hidden_state,
        },
        rounds,
    )  # fmt: skip
    pairs = (("images", "CLIP alone"), ("dialogues", "LLM alone"))
    return {"seconds": measured, "ratios": {f"{a} / {b}": ratio(measured, a, b) for a, b in pairs}}


def turns(model: UniMuRModel, rounds: int, tokens: int = 20) -> dict[str, Any]:
    """The tenth turn of a conversation that is kept, against the whole dialogue."""
    rng = random.Random(0)
    said = [sentence(model, tokens, rng) for _ in range(TURNS)]
    whole = model.embed_dialogues([said])[0]

    def prepared() -> Any:
        talk = model.conversation()
        for turn in said[:-1]:
            talk.say(turn)
        talk.embed()
        return talk

    talks = iter([prepared() for _ in range(rounds + 2)])
    torch.testing.assert_close(next(talks).say(said[-1]).embed(), whole, rtol=1e-4, atol=1e-5)
    measured = interleaved(
        {
            "tenth turn": lambda i: next(talks).say(said[-1]).embed(),
            "full pass": lambda i: model.embed_dialogues([said]),
        },
        rounds,
    )
    return {"seconds": measured, "ratios": {"full pass / tenth turn": ratio(measured, "full pass", "tenth turn")}}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/report"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    model = make_model(SHAPE)
    result = {
        "rounds": arguments.rounds, "threads": arguments.threads, "torch": torch.__version__,
        "towers": towers(model, arguments.rounds), "turns": turns(model, arguments.rounds),
    }  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "embedding-speed.json").write_text(json.dumps(result, indent=1) + "\n")
    for part in ("towers", "turns"):
        for name, value in result[part]["ratios"].items():
            print(f"{name}: {value['median']:.2f}x ({value['low']:.2f}-{value['high']:.2f})")
    return result


if __name__ == "__main__":
    main()
