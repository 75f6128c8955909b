"""
Which words before [RET] ask an untaught LLM for the gist, searched on validation alone.

    python -m benchmarks.real.prompts --output benchmarks/results/real-prompts.json

Each row reads the LLM's states of the same captions and dialogues at another place, solves the same canonical correlation
of them with the pictures, and gives the best dialogue to image R@1 over its settings.
"""

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.data import miniature
from benchmarks.metrics import hit_rate_per_item
from benchmarks.report import write
from train.canonical import Setting
from train.miniature.world import CAPTIONS, phrases, splits

from .bench import Bench, make_bench
from .fetch import ABOUT
from .spaces import Pairs, canonical_spaces
from .states import cached_states

WORDS = (
    "\nKeywords:", "\nThis in one word:", " #", " Keywords:", "\n\nKeywords:", "\nTags:", "\nSummary:", "\nCaption:",
    "\nImage:", "\nImage search:", "\nObjects:", "\nKeywords: a", "\nKey words:", "\nKeywords for the image:",
    "\nThe picture shows a",
)  # fmt: skip
MEAN_ROW = "mean row"  # [RET] as the mean of the LLM's input embeddings
BEHIND = "\nKeywords:"  # the words that the mean row is also tried behind
LAYERS = (-4, -8)
END = "<|im_end|>\n<|im_start|>assistant\n"
START = "<|im_start|>user\n"
CHAT = (END, END + "Keywords:", END + "This in one word:", "\nKeywords:" + END, "\nGive keywords." + END)
N_CAPTIONS, N_DIALOGUES = 1200, 200
WIDTHS, RIDGES, POWERS = (32, 48, 64), (0.03, 0.1, 0.3, 1.0), (1.0, 2.0, 3.0, 4.0)


def captions() -> list[str]:
    """A natural caption of each of the first train scenes, whose pictures are the first of the miniature's pairs."""
    rng = random.Random("real-0")
    return [rng.choice(CAPTIONS).format(**phrases(s, rng)) for s in splits()["train"][:N_CAPTIONS]]


def plain_prompts(bench: Bench) -> dict[str, torch.Tensor]:
    """Words and rows to be put behind a text, as input embeddings."""
    table, tokenizer = (
        bench.model.language_model.get_input_embeddings().weight.detach(),
        bench.model.processor.tokenizer,
    )
    ids = {w: tokenizer(w, split_special_tokens=True, add_special_tokens=False)["input_ids"] for w in WORDS}
    mean = table.mean(0, keepdim=True)
    return {w: table[i] for w, i in ids.items()} | {
        MEAN_ROW: mean, f"{BEHIND} + {MEAN_ROW}": torch.cat([table[ids[BEHIND]], mean])
    }  # fmt: skip


def search(bench: Bench, folder: Path, chat: bool) -> list[dict[str, Any]]:
    """Every place with its best R@1; the words alone, or in the chat template of the instruction tuning."""
    tokenizer, data = bench.model.processor.tokenizer, miniature.visdial("validation")
    dialogues = [
        "\n".join("".join(e["text"] for e in turn["elements"]) for turn in d["turns"][: d["target_turn"]])
        for d in data.dialogues[:N_DIALOGUES]
    ]
    texts = {"visdial": dialogues, "captions": captions()}
    rows = {
        n: tokenizer(t, split_special_tokens=True, add_special_tokens=False)["input_ids"] for n, t in texts.items()
    }
    prompts = plain_prompts(bench)
    if chat:  # the template's marks are special tokens, which a text itself never gives
        table = bench.model.language_model.get_input_embeddings().weight.detach()
        before = tokenizer(START, add_special_tokens=False)["input_ids"]
        rows = {name: [before + row for row in part] for name, part in rows.items()}
        prompts = {p: table[tokenizer(p, add_special_tokens=False)["input_ids"]] for p in CHAT}
    llm, prefix = bench.model.language_model, "chat-" if chat else ""
    states = {
        name: cached_states(llm, part, prompts, folder / f"{prefix}{name}", LAYERS) for name, part in rows.items()
    }
    seen, embeds = bench.clip_images(bench.world.pairs[:N_CAPTIONS]["image"])
    told = bench.clip_texts(texts["captions"])
    pool = bench.clip_images(list(data.images.values()))
    place = {name: i for i, name in enumerate(data.images)}
    right = [[place[d["gold"]["image_ids"][0]]] for d in data.dialogues[:N_DIALOGUES]]
    found = []
    for name in prompts:
        for kind, known in states["captions"][name].items():
            if len(prompts[name]) == 1 and kind in ("before", "mean"):
                continue  # of one token, they are the last
            pairs = Pairs(known, seen, embeds, told)
            recall, setting = max(recalls(pairs, states["visdial"][name][kind], pool, right), key=lambda x: x[0])
            found.append({"words": name, "chat": chat, "read": kind, "R@1": recall, "setting": asdict(setting)})
    return found


def recalls(
    pairs: Pairs, queries: torch.Tensor, pool: tuple[torch.Tensor, torch.Tensor], right: list[list[int]]
) -> Iterator[tuple[float, Setting]]:
    """R@1 (percent) of queries `(n, d)` in a pool of pictures by every setting of canonical correlation."""
    settings = [Setting("pooled", k, rho, w) for rho in RIDGES for k in WIDTHS for w in POWERS]
    for setting, space in canonical_spaces(pairs, settings):
        a, b = F.normalize(space.states(queries), dim=-1), F.normalize(space.images(*pool), dim=-1)
        yield 100 * float(hit_rate_per_item((a @ b.T).numpy(), right, (1,)).mean()), setting


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/real"), help="of the LLM and the states")
    parser.add_argument("--miniature", type=Path, help="of the miniature's towers; by default in the folder")
    parser.add_argument(
        "--no_chat", action="store_true", help="leave the chat template out, which costs as much again"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/real/real-prompts.json"))
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    bench = make_bench(arguments.folder, arguments.miniature, seed=0)
    found = search(bench, arguments.folder / "search", chat=False)
    if not arguments.no_chat:
        found += search(bench, arguments.folder / "search", chat=True)
    found.sort(key=lambda row: -row["R@1"])
    for row in found[:20]:
        print(f"{row['R@1']:5.1f}  {'chat ' if row['chat'] else ''}{row['words']!r}, {row['read']}")
    write(arguments.output, {
        "about": ABOUT, "split": "validation", "captions": N_CAPTIONS, "dialogues": N_DIALOGUES, "pool": 1000,
        "dtype": str(bench.model.language_model.dtype), "rows": found, "seconds": round(time.perf_counter() - start),
    })  # fmt: skip
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
