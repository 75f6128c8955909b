"""
The cost of text retrieval by perplexity against text retrieval by embedding, as ratios measured in one interleaved run.

    python -m benchmarks.speed.texts --output benchmarks/results

For one context and 1,000 candidate texts:
- *embedding*: the context through the LLM's trunk, W_t2m, and the cosines with the candidates' stored embeddings;
- *naive*: context and candidate through the whole LLM, one candidate at a time;
- *packed*: the context once, then all candidates after it (`benchmarks/language.py`).

The models have random weights, which does not change the time. Candidates are embedded in advance, as a pool is built once.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.output import write_json
from modeling_unimur import UniMuRModel
from train.command import run_command

from ..language import LanguageSystem
from .models import SHAPES, random_model, sentence
from .timing import interleaved, ratio

CONTEXT, CANDIDATE = 60, 12  # tokens


@torch.no_grad()
def naive(model: UniMuRModel, context: str, candidates: list[str]) -> torch.Tensor:
    """Log-likelihood of each candidate after the context, one full pass each, `(m,)`."""
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
        "embedding": lambda i: model.retrieve([contexts[i]], pool, top_k=1),
        "naive": lambda i: naive(model, contexts[i], texts),
        "packed": lambda i: system.log_likelihoods([[contexts[i]]], [texts])[0],
    }
    contexts = [sentence(model, CONTEXT, rng) for _ in range(rounds)]
    torch.testing.assert_close(naive(model, contexts[0], texts), ways["packed"](0), rtol=1e-3, atol=1e-2)
    measured = interleaved(ways, rounds, repeats={"embedding": 20})
    pairs = (("naive", "embedding"), ("packed", "embedding"), ("naive", "packed"))
    return {"name": name, "seconds": measured, "ratios": {f"{a} / {b}": ratio(measured, a, b) for a, b in pairs}}


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
    write_json(arguments.output / "text-retrieval-speed.json", result)
    for shape in result["shapes"]:
        ratios = ", ".join(
            f"{k} {v['median']:.0f}x ({v['low']:.0f}-{v['high']:.0f})" for k, v in shape["ratios"].items()
        )
        print(f"{shape['name']}: {ratios}")
    return result


if __name__ == "__main__":
    run_command(main)
