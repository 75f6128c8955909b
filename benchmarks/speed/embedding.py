"""
The cost of embedding against the bare towers, of one turn of a cached conversation against a full pass, and of decoding
photos against encoding them.

    python -m benchmarks.speed.embedding --output benchmarks/results
"""

import argparse
import io
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessor

from benchmarks.output import write_json
from modeling_unimur import UniMuRModel
from train.command import run_command
from train.extract import Decode

from .models import random_model, sentence
from .step import make_model
from .timing import interleaved, ratio

BATCH, TOKENS, TURNS, TURN_TOKENS = 32, 60, 10, (20, 45)
SHAPE = "V1.6k"
PHOTOS, ENCODED = 16, 4
VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
         "patch_size": 14}  # fmt: skip


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

    expected = F.normalize(clip_alone(0), dim=-1)
    torch.testing.assert_close(model.embed_inputs("images", images), expected, rtol=1e-4, atol=1e-5)
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


def turns(model: UniMuRModel, rounds: int, tokens: int) -> dict[str, Any]:
    """The tenth turn of a cached conversation against the whole dialogue; turns of `tokens` tokens."""
    rng = random.Random(0)
    dialogue = [sentence(model, tokens, rng) for _ in range(TURNS)]
    whole = model.embed_dialogues([dialogue])[0]

    def prepared() -> Any:
        talk = model.conversation()
        for turn in dialogue[:-1]:
            talk.say(turn)
        talk.embed()
        return talk

    talks = iter([prepared() for _ in range(rounds + 2)])
    torch.testing.assert_close(next(talks).say(dialogue[-1]).embed(), whole, rtol=1e-4, atol=1e-5)
    measured = interleaved(
        {
            "tenth turn": lambda i: next(talks).say(dialogue[-1]).embed(),
            "full pass": lambda i: model.embed_dialogues([dialogue]),
        },
        rounds,
    )
    return {
        "seconds": measured,
        "ratios": {f"full pass / tenth turn of {tokens} tokens": ratio(measured, "full pass", "tenth turn")},
    }


def photo(seed: int) -> bytes:
    """A JPEG of 640 x 480 with the detail of a photograph, about 150 kB."""
    generator = torch.Generator().manual_seed(seed)
    weights = {1: 40, 2: 2, 8: 8, 32: 32, 96: 96}  # of noise, by its grain in pixels
    layers = [torch.rand(1, 3, 480 // k, 640 // k, generator=generator) * w for k, w in weights.items()]
    mixed = sum(F.interpolate(layer, (480, 640), mode="bilinear") for layer in layers)
    array = (255 * (mixed - mixed.min()) / (mixed.max() - mixed.min())).byte()[0].permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG", quality=90)
    return file.getvalue()


@torch.no_grad()
def decoding(rounds: int, side: int = 224) -> dict[str, Any]:
    """Seconds per photo: one worker process's decoding of a batch against CLIP's ViT-L/14 on it, one thread each."""
    model = random_model(1, 64, 600, image=side, vision=VIT_L)
    processor = model.processor
    processor.image_processor = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    rows = [{"id": str(i), "image": {"bytes": photo(i), "path": None}} for i in range(PHOTOS)]
    work = Decode(processor)
    pixels = work(rows)["pixels"][:ENCODED]
    measured = interleaved(
        {"decoding": lambda i: work(rows), "ViT-L/14": lambda i: model.encode_images(pixels)}, rounds
    )
    for way, count in (("decoding", PHOTOS), ("ViT-L/14", ENCODED)):
        measured[way] = {k: [s / count for s in v] if k == "seconds" else v / count for k, v in measured[way].items()}
    return {
        "bytes": sum(len(row["image"]["bytes"]) for row in rows) // PHOTOS, "seconds": measured,
        "ratios": {"ViT-L/14 / decoding": ratio(measured, "ViT-L/14", "decoding")},
    }  # fmt: skip


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
        "towers": towers(model, arguments.rounds), "turns": [turns(model, arguments.rounds, tokens) for tokens in TURN_TOKENS],
        "decoding": decoding(max(1, arguments.rounds // 4)),
    }  # fmt: skip
    write_json(arguments.output / "embedding-speed.json", result)
    for part in (result["towers"], *result["turns"], result["decoding"]):
        for name, value in part["ratios"].items():
            print(f"{name}: {value['median']:.2f}x ({value['low']:.2f}-{value['high']:.2f})")
    return result


if __name__ == "__main__":
    run_command(main)
