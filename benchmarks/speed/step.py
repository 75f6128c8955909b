"""
The cost of a training step with its optimiser against one as FROMAGe computes it, saving by saving.

    python -m benchmarks.speed.step --output benchmarks/results

Batches of 32 captions of 6 to 14 tokens, float32. V1.6k and V50k are an OPT of 6 layers of width 512 with a vocabulary of
1,600 (where its head is 3 % of the trunk, as in OPT-6.7B) and of 50,272 (where it is as large as the trunk); CLIP's visual
tower has 4 layers of width 256 over 65 positions. A cached epoch reads CLIP's features, and [RET]'s states, from a cache;
five epochs include the building of that cache.
"""

import argparse
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from benchmarks.output import write_json
from modeling_unimur import UniMuRModel
from train.bank import NegativesBank
from train.command import run_command

from .memory import status
from .models import SHAPES, random_model, sentence
from .reference import ReferenceStep, Savings, padded
from .timing import interleaved, ratio

BATCH, EPOCHS = 32, 5
STEP_SHAPES = {"V1.6k": "OPT 6 x 512, vocabulary 1,600", "V50k": "OPT 6 x 512, vocabulary 50,272"}
# About a quarter of a step's work, as at the paper's scale.
TOWER = {"intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 256}
REFERENCE = "reference"
SAVINGS = {
    REFERENCE: Savings(),
    "vocabulary frozen": Savings(table_frozen=True),
    "+ CLIP once, last outputs only, no loops": Savings(True, True),
    "+ no logits for retrieval": Savings(True, True, True),
    "+ logits at captions only": Savings(True, True, True, True),
}
PADDED, OURS = "+ padded to the longest, chunked cross-entropy", "+ packed (ours)"
CLIP_CACHED, CACHED = "CLIP cached", "CLIP and [RET] states cached"
VARIANTS = (*SAVINGS, PADDED, OURS, CLIP_CACHED, CACHED)
# Another loss, so not in VARIANTS: eq. 4 against past images too.
BANK = 8192
BANKED = f"packed (ours), {BANK:,} past images as negatives"
# Not equal up to rounding, so not in VARIANTS: the towers in bfloat16, the maps in float32, as --dtype bfloat16 trains.
HALF = {"packed (ours), towers in bfloat16": OURS, "CLIP and [RET] states cached, towers in bfloat16": CACHED}


def make_model(shape: str, seed: int = 0) -> UniMuRModel:
    """The model of a shape, with a CLIP of `TOWER` on both sides."""
    vision = TOWER | {"patch_size": 8}
    return random_model(*SHAPES[STEP_SHAPES[shape]], seed=seed, image=64, vision=vision, words=TOWER)


def batches(model: UniMuRModel, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Batches with everything in them: packed plans, CLIP's features, [RET]'s states."""
    rng, made = random.Random(seed), []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        captions = [sentence(model, rng.randint(6, 14), rng) for _ in range(BATCH)]
        items = [{"caption": (i, c), "context": [[c]], "image": i, "text": c} for i, c in enumerate(captions)]
        batch = model.processor.documents(items, None, pack=True)
        size = model.config.clip_config.vision_config.image_size
        batch["images"] = {"pixel_values": torch.randn(BATCH, 3, size, size, generator=generator)}
        made.append(with_cached(model, batch))
    return made


@torch.no_grad()
def with_cached(model: UniMuRModel, batch: dict[str, Any], *, packed: bool = False) -> dict[str, Any]:
    """The batch, each part with what the cache would hold of it beside what it is computed from."""
    contexts, targets, images = batch["contexts"], batch["targets"], batch["images"]
    features, embeds = model.encode_images(images["pixel_values"])
    texts = model.encode_clip_texts(targets["input_ids"], targets["attention_mask"])
    packing = contexts["packing"] if packed else None
    states = model.ret_states(contexts["input_ids"], contexts["attention_mask"], packing=packing)
    return batch | {
        "contexts": contexts | {"states": states},
        "targets": targets | {"text_embeds": texts},
        "images": images | {"features": features, "embeds": embeds},
    }


def without(batch: dict[str, Any], **left_out: Sequence[str]) -> dict[str, Any]:
    """The batch without some of the tensors of its parts: part -> names."""
    return batch | {
        part: {name: value for name, value in batch[part].items() if name not in names}
        for part, names in left_out.items()
    }


TOKENS = ("input_ids", "attention_mask")
CACHED_CLIP = {"images": ("pixel_values",), "targets": TOKENS, "contexts": ("states",)}
CACHED_ALL = CACHED_CLIP | {"contexts": (*TOKENS, "image_indices", "packing")}
UNCACHED = {"images": ("features", "embeds"), "targets": ("text_embeds",), "contexts": ("states",)}
UNPACKED = UNCACHED | {"contexts": ("states", "packing"), "captions": ("packing",)}


def inputs_of(variant: str, model: UniMuRModel, batch: dict[str, Any]) -> dict[str, Any]:
    """The inputs a variant reads of a batch."""
    if variant in SAVINGS:
        return padded(batch, model.config.n_visual_tokens)
    left_out = {PADDED: UNPACKED, CLIP_CACHED: CACHED_CLIP, CACHED: CACHED_ALL}.get(variant, UNCACHED)
    return without(batch, **left_out)


def stepper(
    variant: str, model: UniMuRModel, made: list[dict[str, Any]], bank: NegativesBank | None = None
) -> Callable[[int], torch.Tensor]:
    """A function that makes the n-th step of a variant, with Adam, and returns its loss; a bank takes in its images."""
    ready = [inputs_of(variant, model, batch) for batch in made]
    reference = ReferenceStep(model, SAVINGS[variant]) if variant in SAVINGS else None
    trained = reference.trained() if reference else [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=0.0, weight_decay=0.0
    )  # with a rate of 0 a step costs the same and the variants stay equal

    def step(number: int) -> torch.Tensor:
        batch = ready[number % len(ready)]
        outputs = None if reference else model(**batch, negatives=None if bank is None else bank.embeds)
        loss = reference(batch) if reference else outputs.loss
        loss.backward()
        if bank is not None:
            bank.add(outputs.image_embeds)
        if reference:
            reference.update(optimizer)
        else:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def gradients(variant: str, model: UniMuRModel, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and the maps' gradients of a variant on a batch."""
    model.zero_grad(set_to_none=True)
    inputs = inputs_of(variant, model, batch)
    loss = ReferenceStep(model, SAVINGS[variant])(inputs) if variant in SAVINGS else model(**inputs).loss
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and n.startswith("W_")}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), grads


def building(model: UniMuRModel, made: list[dict[str, Any]]) -> Callable[[int], None]:
    """A function that computes one batch's part of an epoch's cache."""

    def build(number: int) -> None:
        with_cached(model, made[number % len(made)], packed=True)

    return build


def measure(shape: str, rounds: int) -> dict[str, Any]:
    """Every variant's seconds and its ratio to the reference; losses and gradients are compared first."""
    model = make_model(shape)
    made = batches(model, 4)
    loss, expected = gradients(REFERENCE, model, made[0])
    worst = {"loss": 0.0, "gradients": 0.0}
    for variant in VARIANTS:
        other, grads = gradients(variant, model, made[0])
        worst["loss"] = max(worst["loss"], abs(other - loss))
        difference = max(float((grads[n] - g).abs().max() / g.abs().max()) for n, g in expected.items())
        worst["gradients"] = max(worst["gradients"], difference)
    if worst["loss"] > 1e-4 or worst["gradients"] > 1e-3:
        raise AssertionError(f"{shape}: the variants do not compute the same: {worst}")
    ways = {variant: stepper(variant, model, made) for variant in VARIANTS} | {"building": building(model, made)}
    half = deepcopy(model)
    for tower in (half.language_model, half.clip):
        tower.bfloat16()
    ways |= {name: stepper(variant, half, made) for name, variant in HALF.items()}
    worst["loss with towers in bfloat16"] = max(abs(float(ways[name](0)) - loss) for name in HALF)
    bank = NegativesBank(BANK)
    bank.add(torch.randn(BANK, model.config.embedding_width))
    ways[BANKED] = stepper(OURS, model, made, bank)
    measured = interleaved(ways, rounds)
    ratios = {variant: ratio(measured, REFERENCE, variant) for variant in (*VARIANTS, BANKED, *HALF)}
    five = sorted(
        EPOCHS * a / (EPOCHS * b + c)
        for a, b, c in zip(*(measured[w]["seconds"] for w in (REFERENCE, CACHED, "building")), strict=True)
    )
    ratios[f"{EPOCHS} epochs, cached, with the building"] = {
        "median": five[len(five) // 2], "low": five[0], "high": five[-1],
    }  # fmt: skip
    memory = {variant: peak_memory(variant, shape) for variant in (REFERENCE, OURS, CACHED)}
    return {"shape": shape, "largest_differences": worst, "seconds": measured, "ratios": ratios, "peak_bytes": memory}


def peak_memory(variant: str, shape: str) -> int:
    """Bytes that two steps of a variant take above the loaded model, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.speed.step", "--one", variant, "--shape", shape]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def one(variant: str, shape: str) -> int:
    """`peak_memory` of this process."""
    model = make_model(shape)
    made = batches(model, 1)
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's peak memory of this process
    before = status("VmRSS")
    step = stepper(variant, model, made)
    step(0), step(1)
    return status("VmHWM") - before


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shape", choices=STEP_SHAPES, action="append", help="by default all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", choices=VARIANTS, help="only print the bytes that this variant takes")
    parser.add_argument("--output", type=Path, default=Path("runs/report"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        print(one(arguments.one, arguments.shape[0]))
        return {}
    shapes = arguments.shape or list(STEP_SHAPES)
    result = {
        "rounds": arguments.rounds, "threads": arguments.threads, "torch": torch.__version__, "batch": BATCH,
        "shapes": [measure(shape, arguments.rounds) for shape in shapes],
    }  # fmt: skip
    write_json(arguments.output / "step-speed.json", result)
    for shape in result["shapes"]:
        print(f"{shape['shape']}; largest differences {shape['largest_differences']}")
        for name, value in shape["ratios"].items():
            print(f"  {name}: {value['median']:.2f}x ({value['low']:.2f}-{value['high']:.2f})")
        print("  peak MiB: " + ", ".join(f"{name} {size / 2**20:.0f}" for name, size in shape["peak_bytes"].items()))
    return result


if __name__ == "__main__":
    run_command(main)
