"""
Training at the paper's size on a GPU: OPT-6.7B and CLIP ViT-L/14 shapes, random weights, bf16.

    python -m benchmarks.speed.gpu --output benchmarks/results
    python -m benchmarks.speed.gpu --small --device cpu          the same at small shapes, anywhere

Checks first that all ways give the same losses. Then, in interleaved rounds: the step as FROMAGe computes it, ours
uncached and cached (CLIP's features; CLIP's and [RET]'s states), the cache's building, and the one pass of the closed form
(`--init cca`), each with its pairs a second, the share of the measured matrix rate and its peak memory. At the end the
closed form itself is solved. Hours follow for 5 epochs over 3.3 million pairs. The paper's 16 hours on four V100 cannot be
compared: it does not give the size of an epoch, probably FROMAGe's 360,000 samples.
"""

import argparse
import itertools
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, OPTConfig, OPTForCausalLM

from benchmarks.arguments import usable_device
from benchmarks.output import write_json
from modeling_unimur import UniMuRConfig, UniMuRModel, UniMuRProcessor
from train.closed_form import PAIR_VIEWS, pair_rows, solve_canonical
from train.command import run_command
from train.miniature.towers import clip_tokenizer, opt_tokenizer
from train.sums import Sums

from .models import sentence
from .reference import ReferenceStep
from .step import (
    CACHED,
    CLIP_CACHED,
    EPOCHS,
    OURS,
    PADDED,
    REFERENCE,
    UNCACHED,
    building,
    inputs_of,
    stepper,
    with_cached,
    without,
)
from .timing import interleaved, ratio

PAIRS = 3_300_000
STEPS = (REFERENCE, OURS, CLIP_CACHED, CACHED)
BUILDING, SUMMING = "the cache's building", "the closed form's pass"


def make_model(small: bool, device: torch.device, dtype: torch.dtype) -> UniMuRModel:
    """An adapter-style model over random towers of the published shapes, or of small ones."""
    syllables = [f"{a}{b}" for a in "bcdfgklmnprst" for b in "aeiou"]
    clip_words = clip_tokenizer(syllables, vocab_size=600)
    processor = UniMuRProcessor(CLIPImageProcessor(), opt_tokenizer(syllables, 512, 400), clip_words, max_length=512)
    width, layers = (64, 2) if small else (4096, 32)
    text = OPTConfig(
        vocab_size=600 if small else 50_272, hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width,
        num_hidden_layers=layers, num_attention_heads=width // 32 if small else 32, max_position_embeddings=2048, dropout=0.0,
    )  # fmt: skip
    vision, words, patch = ((32, 2), (32, 2), 8) if small else ((1024, 24), (768, 12), 14)
    clip = CLIPConfig(
        text_config={
            "hidden_size": words[0], "intermediate_size": 4 * words[0], "num_hidden_layers": words[1],
            "num_attention_heads": max(1, words[0] // 64), "vocab_size": len(clip_words),
            "eos_token_id": clip_words.eos_token_id,
        },
        vision_config={
            "hidden_size": vision[0], "intermediate_size": 4 * vision[0], "num_hidden_layers": vision[1],
            "num_attention_heads": max(1, vision[0] // 64), "image_size": 32 if small else 224, "patch_size": patch,
        },
        projection_dim=24 if small else 768,
    )  # fmt: skip
    config = UniMuRConfig(
        text_config=text, clip_config=clip, ret_token_id=processor.ret_token_id,
        image_token_id=processor.image_token_id, text_model_name_or_path="random/opt", clip_model_name_or_path="random/clip",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = UniMuRModel(config)
        model.attach_towers(OPTForCausalLM._from_config(text, dtype=dtype), CLIPModel._from_config(clip, dtype=dtype))
    model.processor = processor
    return model.to(device).eval()


def make_batch(model: UniMuRModel, size: int, seed: int) -> dict[str, Any]:
    """A packed batch with everything in it, on the model's device."""
    rng = random.Random(seed)
    captions = [sentence(model, rng.randint(6, 16), rng) for _ in range(size)]
    items = [{"caption": (i, c), "context": [[c]], "image": i, "text": c} for i, c in enumerate(captions)]
    batch = _moved(model.processor.documents(items, None, pack=True), model.device)
    side = model.config.clip_config.vision_config.image_size
    batch["images"] = {"pixel_values": torch.randn(size, 3, side, side, device=model.device)}
    return with_cached(model, batch, packed=True)


def check(model: UniMuRModel, batch: dict[str, Any], tolerance: float) -> dict[str, float]:
    """Losses of every way on one batch; raises `AssertionError` where they differ by more than the share `tolerance`."""
    losses = {}
    with torch.no_grad():
        for way in (*STEPS, PADDED):
            inputs = inputs_of(way, model, batch)
            losses[way] = float(ReferenceStep(model)(inputs) if way == REFERENCE else model(**inputs).loss)
    for way, loss in losses.items():
        if not abs(loss - losses[REFERENCE]) <= tolerance * abs(losses[REFERENCE]):
            raise AssertionError(f"{way} gives the loss {loss}, {REFERENCE} {losses[REFERENCE]}")
    return losses


def flop_per_pair(model: UniMuRModel, batch: dict[str, Any]) -> dict[str, float]:
    """
    Floating-point operations per pair: two per weight and position forward, and in captioning the same again for the
    gradient with respect to the inputs; the towers' weights have no gradients.
    """

    def weights(module) -> int:
        return sum(p.numel() for p in module.parameters() if p.ndim > 1)

    llm, clip = model.language_model, model.clip
    table = llm.get_input_embeddings().weight.numel()
    trunk = weights(llm.base_model) - table
    captions, pairs = batch["captions"], len(batch["contexts"]["states"])
    caption, labelled = float(captions["attention_mask"].sum()) / pairs, len(captions["label_positions"]) / pairs
    retrieval, words = (float(batch[part]["attention_mask"].sum()) / pairs for part in ("contexts", "targets"))
    vision = model.config.clip_config.vision_config
    positions = (vision.image_size // vision.patch_size) ** 2 + 1
    images = 2 * weights(clip.vision_model) * positions
    texts = 2 * (weights(clip.text_model) - clip.text_model.get_input_embeddings().weight.numel()) * words
    return {
        "captioning": 4 * (trunk * caption + table * labelled),
        "retrieval": 2 * trunk * retrieval,
        "CLIP": images + texts,
    }


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations per second of a square matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: a @ b, device, 20)


def summing(model: UniMuRModel, made: list[dict[str, Any]], sums: Sums) -> Callable[[int], None]:
    """A function that adds one batch, uncached, to the closed form's sums; each call's pairs are new ones."""
    ready = [without(batch, **UNCACHED) for batch in made]
    calls = itertools.count()

    def add(number: int) -> None:
        rows, call = pair_rows(model, ready[number % len(ready)]), next(calls)
        sums.add(rows, [f"pair {call} {i}" for i in range(len(rows["state"]))])

    return add


def measure(
    model: UniMuRModel, made: list[dict[str, Any]], rounds: int
) -> tuple[dict[str, Any], dict[str, int], Sums]:
    """Every way's seconds a batch in interleaved rounds, and its peak memory in bytes (on a GPU); and the sums."""
    sums = Sums(PAIR_VIEWS, device=model.device)
    ways: dict[str, Callable[[int], Any]] = {way: stepper(way, model, made) for way in STEPS}
    ways |= {BUILDING: building(model, made), SUMMING: summing(model, made, sums)}
    on_gpu, peaks = model.device.type == "cuda", {}
    for way, call in ways.items() if on_gpu else ():
        torch.cuda.reset_peak_memory_stats()
        call(0)
        peaks[way] = torch.cuda.max_memory_allocated()

    def waited(call: Callable[[int], Any]) -> Callable[[int], None]:
        def run(number: int) -> None:
            call(number)
            if on_gpu:
                torch.cuda.synchronize()

        return run

    return interleaved({way: waited(call) for way, call in ways.items()}, rounds), peaks, sums


def rates(measured: dict[str, Any], operations: dict[str, float], rate: float, batch: int) -> dict[str, Any]:
    """By way: pairs a second, the ratio to the reference, the share of the matrix rate `rate`, and the hours that follow."""
    per_second = {way: batch / about["median"] for way, about in measured.items()}
    step, towers = sum(operations.values()), operations["CLIP"] + operations["retrieval"]
    needed = {
        REFERENCE: step, OURS: step, CLIP_CACHED: step - operations["CLIP"], CACHED: operations["captioning"],
        BUILDING: towers, SUMMING: towers,
    }  # fmt: skip
    return {
        "pairs_per_second": per_second,
        "ratios": {way: ratio(measured, REFERENCE, way) for way in STEPS},
        "share_of_matrix_rate": {way: per_second[way] * flop / rate for way, flop in needed.items()},
        "hours": {w: (EPOCHS if w in STEPS else 1) * PAIRS / each / 3600 for w, each in per_second.items()},
    }


def closed_form(sums: Sums) -> dict[str, Any]:
    """Seconds in which the canonical alignment's settings are all tried and the maps solved; how many and of what."""
    start = time.perf_counter()
    solved = solve_canonical(sums.finish())
    return {
        "seconds": time.perf_counter() - start, "settings": len(solved.recall), "pairs": solved.pairs,
        "held_out": len(sums.held.items),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small shapes, for a trial")
    parser.add_argument("--device", type=usable_device, default="cuda")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("runs/report"))
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here: give --small --device cpu for a trial")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = make_model(arguments.small, device, dtype)
    made = [make_batch(model, arguments.batch, seed) for seed in range(4)]
    losses = check(model, made[0], 1e-4 if dtype == torch.float32 else 2e-2)
    operations = flop_per_pair(model, made[0])
    rate = matrix_rate(device, dtype, 8192 if device.type == "cuda" else 512)
    measured, peaks, sums = measure(model, made, arguments.rounds)
    config = model.config
    floats = config.image_feature_width + 2 * config.clip_width + config.text_width
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "dtype": str(dtype),
        "torch": torch.__version__, "small": arguments.small, "batch": arguments.batch, "rounds": arguments.rounds,
        "losses": losses, "gflop_per_pair": {name: value / 1e9 for name, value in operations.items()},
        "matrix_tflops": rate / 1e12, "seconds": measured, "peak_bytes": peaks,
        "closed_form": closed_form(sums), "cache_bytes": 4 * PAIRS * floats,
        "derived_from": f"{EPOCHS} epochs of {PAIRS:,} pairs, one visual token; one pass for the closed form and the cache",
    } | rates(measured, operations, rate, arguments.batch)  # fmt: skip
    write_json(arguments.output / "gpu-speed.json", result)
    print(json.dumps(result, indent=1))
    return result


def _seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    for _ in range(3):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    return value.to(device)


if __name__ == "__main__":
    run_command(main)
