"""
Which words before [RET] make an untrained LLM summarise the text, searched on validation alone.

    python -m benchmarks.real.prompts --output benchmarks/results/real-prompts.json

Each row reads the LLM's states of the same captions and dialogues at a different token, solves the same canonical
correlation with the pictures, and gives the best dialogue to image R@1 over its settings.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from benchmarks.data import miniature
from benchmarks.metrics import hit_rate_per_item
from benchmarks.output import write_json
from modeling_unimur.losses_unimur import visual_matching_loss
from train.canonical import Setting
from train.command import run_command
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
# A second round, after the first one's best ended in an article.
ARTICLES = (
    "\nKeywords: the", "\nA photo of a", "\nThe image shows a", "\nKeywords: a photo of a", "\nTags: a", "\nImage: a",
)  # fmt: skip
MEAN_ROW = "mean row"  # [RET] as the mean of the LLM's input embeddings
BEHIND = "\nKeywords:"  # the mean row is also tried after these words
TRAINED_BEHIND = "\nKeywords: a"
LAYERS = (-4, -8)
END = "<|im_end|>\n<|im_start|>assistant\n"
START = "<|im_start|>user\n"
CHAT = (END, END + "Keywords:", END + "This in one word:", "\nKeywords:" + END, "\nGive keywords." + END)
KINDS = ("plain", "article", "chat", "trained")
N_CAPTIONS, N_DIALOGUES = 1200, 200
ROW_STEPS, ROW_BATCH, ROW_RATE = 40, 64, 0.1  # of a trained [RET]; the rate in units of the row's deviation
WIDTHS, RIDGES, POWERS = (32, 48, 64), (0.03, 0.1, 0.3, 1.0), (1.0, 2.0, 3.0, 4.0)


def captions() -> list[str]:
    """A natural caption of each of the first train scenes, whose pictures are the first of the miniature's pairs."""
    rng = random.Random("real-0")
    return [rng.choice(CAPTIONS).format(**phrases(s, rng)) for s in splits()["train"][:N_CAPTIONS]]


def vocabulary(bench: Bench) -> tuple[torch.Tensor, Any]:
    """The LLM's input embeddings `(vocabulary, d)` and its tokenizer."""
    return bench.model.language_model.get_input_embeddings().weight.detach(), bench.model.processor.tokenizer


def words_of(bench: Bench, words: Sequence[str]) -> dict[str, torch.Tensor]:
    """Words to append to a text, as input embeddings `(m, d)`."""
    table, tokenizer = vocabulary(bench)
    return {w: table[tokenizer(w, split_special_tokens=True, add_special_tokens=False)["input_ids"]] for w in words}


def plain_prompts(bench: Bench) -> dict[str, torch.Tensor]:
    """Those of the first round, and the mean row alone and after `BEHIND`."""
    mean = vocabulary(bench)[0].mean(0, keepdim=True)
    words = words_of(bench, WORDS)
    return words | {MEAN_ROW: mean, f"{BEHIND} + {MEAN_ROW}": torch.cat([words[BEHIND], mean])}


def chat_prompts(bench: Bench) -> dict[str, torch.Tensor]:
    """What follows a text in the chat template of the instruction tuning; its markers are special tokens here."""
    table, tokenizer = vocabulary(bench)
    return {p: table[tokenizer(p, add_special_tokens=False)["input_ids"]] for p in CHAT}


def trained_prompts(bench: Bench, path: Path) -> dict[str, torch.Tensor]:
    """A trained [RET], alone and in place of the last token of `TRAINED_BEHIND`."""
    table, tokenizer = vocabulary(bench)
    words = table[tokenizer(TRAINED_BEHIND, add_special_tokens=False)["input_ids"]]
    if not path.is_file():
        rows = {
            "alone": train_row(bench, table[:0], table.mean(0)),
            "behind": train_row(bench, words[:-1], words[-1]),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(rows, path)
    rows = load_file(path)
    return {
        "trained row": rows["alone"][None],
        f"{TRAINED_BEHIND} with its last token trained": torch.cat([words[:-1], rows["behind"][None].to(words.dtype)]),
    }


def train_row(bench: Bench, words: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """
    [RET]'s input embedding `(d,)` trained by L_vm (eq. 3-5) after words `(m, d)`, with its own two heads of width 256.

    Args:
        start: `(d,)`, its initial value.
    """
    llm, tokenizer = bench.model.language_model, bench.model.processor.tokenizer
    generator = torch.Generator().manual_seed(0)
    ids = tokenizer(captions(), split_special_tokens=True, add_special_tokens=False)["input_ids"]
    features, _ = bench.clip_images(bench.world.pairs[:N_CAPTIONS]["image"])
    row = nn.Parameter(start.float().clone())
    torch.manual_seed(0)
    heads = nn.Linear(len(start), 256), nn.Linear(features.shape[1], 256)
    norm = nn.LayerNorm(len(start), elementwise_affine=False)  # the scale of states differs between LLMs
    scale = nn.Parameter(torch.tensor(1 / 0.07).log())
    optimizer = torch.optim.Adam([
        {"params": [row], "lr": ROW_RATE * float(start.float().std())},
        {"params": [scale, *heads[0].parameters(), *heads[1].parameters()], "lr": 2e-3},
    ])  # fmt: skip
    table, _ = vocabulary(bench)
    for _ in tqdm(range(ROW_STEPS), "training [RET]", unit="step"):
        chosen = torch.randperm(len(ids), generator=generator)[:ROW_BATCH].tolist()
        rows = [torch.cat([table[ids[i]], words, row[None].to(table.dtype)]) for i in chosen]
        length = max(map(len, rows))
        padded = torch.stack([F.pad(r, (0, 0, 0, length - len(r))) for r in rows])
        sizes = torch.tensor([len(r) for r in rows])
        mask = (torch.arange(length) < sizes[:, None]).long()
        hidden = llm.base_model(inputs_embeds=padded, attention_mask=mask, use_cache=False).last_hidden_state
        states = norm(hidden[torch.arange(len(rows)), sizes - 1].float())
        loss = visual_matching_loss(heads[0](states), heads[1](features[chosen]), scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return row.detach()


def search(bench: Bench, folder: Path, kind: str) -> list[dict[str, Any]]:
    """
    Every prompt and reading with its best R@1.

    Args:
        kind: `"plain"` and `"article"`, words after the text; `"chat"`, in the instruction tuning's template; `"trained"`,
            with a [RET] that was trained.
    """
    tokenizer, data = bench.model.processor.tokenizer, miniature.visdial("validation")
    dialogues = [
        "\n".join("".join(e["text"] for e in turn["elements"]) for turn in d["turns"][: d["target_turn"]])
        for d in data.dialogues[:N_DIALOGUES]
    ]
    texts = {"visdial": dialogues, "captions": captions()}
    rows = {
        n: tokenizer(t, split_special_tokens=True, add_special_tokens=False)["input_ids"] for n, t in texts.items()
    }
    if kind == "chat":
        before = tokenizer(START, add_special_tokens=False)["input_ids"]
        rows = {name: [before + row for row in part] for name, part in rows.items()}
        prompts = chat_prompts(bench)
    else:
        prompts = trained_prompts(bench, folder / "ret.safetensors") if kind == "trained" else plain_prompts(bench)
        prompts = words_of(bench, ARTICLES) if kind == "article" else prompts
    llm, prefix = bench.model.language_model, "" if kind == "plain" else f"{kind}-"
    states = {
        name: cached_states(llm, part, prompts, folder / f"{prefix}{name}", LAYERS) for name, part in rows.items()
    }
    features, embeds = bench.clip_images(bench.world.pairs[:N_CAPTIONS]["image"])
    caption_embeds = bench.clip_texts(texts["captions"])
    pool = bench.clip_images(list(data.images.values()))
    place = {name: i for i, name in enumerate(data.images)}
    gold = [[place[d["gold"]["image_ids"][0]]] for d in data.dialogues[:N_DIALOGUES]]
    results = []
    for name in prompts:
        for read, known in states["captions"][name].items():
            if len(prompts[name]) == 1 and read in ("before", "mean"):
                continue  # with one token they equal "last"
            pairs = Pairs(known, features, embeds, caption_embeds)
            recall, setting = max(recalls(pairs, states["visdial"][name][read], pool, gold), key=lambda x: x[0])
            row = {"words": name, "chat": kind == "chat", "read": read, "R@1": recall}
            results.append(row | {"setting": asdict(setting)})
    return results


def recalls(
    pairs: Pairs, queries: torch.Tensor, pool: tuple[torch.Tensor, torch.Tensor], gold: list[list[int]]
) -> Iterator[tuple[float, Setting]]:
    """R@1 (percent) of queries `(n, d)` in a pool of pictures by every setting of canonical correlation."""
    settings = [Setting("pooled", k, rho, w) for rho in RIDGES for k in WIDTHS for w in POWERS]
    for setting, space in canonical_spaces(pairs, settings):
        a, b = F.normalize(space.states(queries), dim=-1), F.normalize(space.images(*pool), dim=-1)
        yield 100 * float(hit_rate_per_item((a @ b.T).numpy(), gold, (1,)).mean()), setting


def others(path: Path, about: dict[str, Any], measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    The rows of a former search's file whose words are not among those `measured`.

    Raises:
        ValueError: the file is of another LLM, or of other captions or dialogues.
    """
    if not path.is_file():
        return []
    former = json.loads(path.read_text())
    if differ := [name for name, value in about.items() if former.get(name) != value]:
        raise ValueError(f"{path} is of another search ({', '.join(differ)} differ): give another --output")
    words = {(row["words"], row["chat"]) for row in measured}
    return [row for row in former["rows"] if (row["words"], row["chat"]) not in words]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/real"), help="of the LLM and the states")
    parser.add_argument("--miniature", type=Path, help="of the miniature's towers; by default in the folder")
    parser.add_argument(
        "--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="rows of others stay in the output as they are"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/real/real-prompts.json"))
    arguments = parser.parse_args(argv)
    start = time.perf_counter()
    bench = make_bench(arguments.folder, arguments.miniature, seed=0)
    about = {
        "about": ABOUT, "split": "validation", "captions": N_CAPTIONS, "dialogues": N_DIALOGUES, "pool": 1000,
        "dtype": str(bench.model.language_model.dtype),
    }  # fmt: skip
    results = [row for kind in arguments.kinds for row in search(bench, arguments.folder / "search", kind)]
    results += others(arguments.output, about, results)
    results.sort(key=lambda row: -row["R@1"])
    for row in results[:20]:
        print(f"{row['R@1']:5.1f}  {'chat ' if row['chat'] else ''}{row['words']!r}, {row['read']}")
    write_json(arguments.output, about | {"rows": results, "seconds": round(time.perf_counter() - start)})
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    run_command(main)
