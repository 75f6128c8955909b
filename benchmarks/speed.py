"""
What text retrieval by perplexity costs against text retrieval by embedding, as ratios measured in one interleaved run.

    python -m benchmarks.speed --output benchmarks/results

For one context and 1,000 candidate texts:
- *embedding*: the context through the LLM's trunk, W_t2m, and the cosines with the candidates' stored embeddings;
- *naive*: context and candidate through the whole LLM, a candidate at a time;
- *packed*: the context once, then all candidates behind it (`benchmarks/language.py`).

The models have random weights, which changes no time. Candidates are embedded beforehand, as a pool is built once.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import CLIPConfig, CLIPImageProcessor, OPTConfig, OPTForCausalLM

from modeling_unimur import UniMuRConfig, UniMuRModel, UniMuRProcessor
from train.miniature.towers import clip_tokenizer, opt_tokenizer

from .language import LanguageSystem

# name -> layers, width, vocabulary
SHAPES = {
    "OPT 2 x 128, vocabulary 1,600": (2, 128, 1_600),
    "OPT 6 x 512, vocabulary 1,600": (6, 512, 1_600),
    "OPT 6 x 512, vocabulary 50,272": (6, 512, 50_272),
}
CONTEXT, CANDIDATE = 60, 12  # tokens


def random_model(layers: int, width: int, vocabulary: int, seed: int = 0) -> UniMuRModel:
    """A full UniMuR of random weights around an OPT of this shape and a small CLIP."""
    torch.manual_seed(seed)
    words = [f"{a}{b}" for a in "bcdfgklmnprst" for b in "aeiou"]
    tokenizer = opt_tokenizer(words, max_length=512, vocab_size=400)
    clip_words = clip_tokenizer(words, vocab_size=600)
    processor = UniMuRProcessor(CLIPImageProcessor(), tokenizer, clip_words, max_length=512)
    text = OPTConfig(
        vocab_size=vocabulary, hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64 if width > 64 else 1, max_position_embeddings=512, dropout=0.0,
    )  # fmt: skip
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}
    clip = CLIPConfig(
        text_config=tower | {"vocab_size": len(clip_words), "eos_token_id": clip_words.eos_token_id},
        vision_config=tower | {"image_size": 32, "patch_size": 16}, projection_dim=768,
    )  # fmt: skip
    config = UniMuRConfig(
        text_config=text,
        clip_config=clip,
        ret_token_id=processor.ret_token_id,
        image_token_id=processor.image_token_id,
    )
    model = UniMuRModel(config).eval()
    model.processor = processor
    assert isinstance(model.language_model, OPTForCausalLM)
    return model


def sentence(model: UniMuRModel, tokens: int, rng: random.Random) -> str:
    """A text of exactly `tokens` tokens."""
    tokenizer, text = model.processor.tokenizer, ""
    while len(tokenizer(text, add_special_tokens=False)["input_ids"]) < tokens:
        text += rng.choice("bcdfgklmnprst") + rng.choice("aeiou") + rng.choice(("", " "))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]
    text = tokenizer.decode(ids)
    return (
        text if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == tokens else sentence(model, tokens, rng)
    )


@torch.no_grad()
def naive(model: UniMuRModel, context: str, candidates: list[str]) -> torch.Tensor:
    """Log-likelihood of each candidate after the context, a full pass each, `(m,)`."""
    tokenizer, scores = model.processor.tokenizer, []
    prefix = model.processor.contexts([[context]], end_with_ret=False)["input_ids"][0].tolist()
    for candidate in candidates:
        row = tokenizer(candidate, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prefix + row], device=model.device)
        logits = model.language_model(input_ids=ids, use_cache=False).logits[0, len(prefix) - 1 : -1]
        scores.append(-F.cross_entropy(logits.float(), ids[0, len(prefix) :], reduction="sum"))
    return torch.stack(scores).cpu()


def measure(name: str, candidates: int, rounds: int, seed: int = 0) -> dict[str, Any]:
    """Seconds of each way in every round, the ways in random order, and the ratios' medians and ranges."""
    model, rng = random_model(*SHAPES[name]), random.Random(seed)
    system = LanguageSystem()
    system.model = model
    texts = [sentence(model, CANDIDATE, rng) for _ in range(candidates)]
    pool = model.build_pool(texts=texts, show_progress_bar=False)
    ways = {
        "embedding": lambda context: model.retrieve([context], pool, top_k=1),
        "naive": lambda context: naive(model, context, texts),
        "packed": lambda context: system.log_likelihoods([[context]], [texts])[0],
    }
    context = sentence(model, CONTEXT, rng)
    torch.testing.assert_close(ways["naive"](context), ways["packed"](context), rtol=1e-3, atol=1e-2)  # and warms up
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in tqdm(range(rounds), name):
        context = sentence(model, CONTEXT, rng)
        for way in rng.sample(list(ways), len(ways)):
            repeats = 20 if way == "embedding" else 1
            start = time.perf_counter()
            for _ in range(repeats):
                ways[way](context)
            seconds[way].append((time.perf_counter() - start) / repeats)
    ratios = {}
    for a, b in (("naive", "embedding"), ("packed", "embedding"), ("naive", "packed")):
        values = sorted(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
        ratios[f"{a} / {b}"] = {"median": values[len(values) // 2], "low": values[0], "high": values[-1]}
    return {"name": name, "seconds": seconds, "ratios": ratios}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="by default all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("runs/report"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    result = {
        "about": f"One context of {CONTEXT} tokens and {arguments.candidates:,} candidates of {CANDIDATE} in float32 on "
        f"{arguments.threads} thread(s); medians over {arguments.rounds} interleaved rounds, with the smallest and the "
        "largest ratio. Random weights; the candidates' embeddings are made beforehand.",
        "candidates": arguments.candidates, "rounds": arguments.rounds, "threads": arguments.threads,
        "torch": torch.__version__,
        "shapes": [measure(name, arguments.candidates, arguments.rounds) for name in arguments.shape or SHAPES],
    }  # fmt: skip
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "text-retrieval-speed.json").write_text(json.dumps(result, indent=1) + "\n")
    for shape in result["shapes"]:
        found = ", ".join(
            f"{k} {v['median']:.0f}x ({v['low']:.0f}-{v['high']:.0f})" for k, v in shape["ratios"].items()
        )
        print(f"{shape['name']}: {found}")
    return result


if __name__ == "__main__":
    main()
