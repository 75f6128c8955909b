"""
Which of transformers' causal language models work as UniMuR's, each at a tiny random size.

    python -m tests.stress.families                 all of them, into benchmarks/results/families.json
    python -m tests.stress.families gemma2 bloom    these, printed

`works`: an embedding is the same alone and in a batch, losses and gradients are finite, a saved model loads to the same
fingerprint and embeddings. `packs`: training packs its sequences; else it pads them, and says so. `converses`: a
conversation's embedding is the dialogue's. Otherwise the error is there.
"""

import argparse
import json
import multiprocessing
import re
import resource
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.markdown import table
from benchmarks.speed.memory import status
from modeling_unimur import UniMuRModel
from tests.conftest import picture
from tests.tiny import init_weights, make_image_text_tower, make_processor, text_tokenizer

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "families.json"
KINDS = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
MEMORY, SECONDS = 12 * 2**30, 300  # that a family may take
TOO_LARGE = f"it needs more than {MEMORY >> 30} GiB or {SECONDS} s at this size"
DIALOGUES = ["hi", ["look at it", picture(1), "what is this?"]]
# Of a config those fields that it has.
TINY = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 1,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4, "attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4, "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64,
    "decoder_ffn_dim": 64, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128, "max_sequence_length": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "state_size": 8, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "is_decoder": True,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
MORE: dict[str, dict[str, Any]] = {
    "bamba": MAMBA, "granitemoehybrid": MAMBA, "mamba2": {"num_heads": 8, "head_dim": 8},
    "dots1": {"n_shared_experts": 1}, "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 128},
}  # fmt: skip


def tiny_config(kind: str) -> PreTrainedConfig:
    """A config of this type with the sizes of `TINY`; of one that sees pictures itself, its language model has them."""
    cls = CONFIG_MAPPING[kind]
    parts = getattr(cls, "sub_configs", {})
    if "text_config" not in parts:
        return _tiny(kind, cls)
    given = {"text_config": _tiny(kind, type(cls().text_config))}
    return cls(**given | ({"vision_config": VISION} if "vision_config" in parts else {}))


def _tiny(kind: str, cls: type[PreTrainedConfig]) -> PreTrainedConfig:
    known = {field.name for field in fields(cls)} if is_dataclass(cls) else set()
    known |= set(getattr(cls, "attribute_map", {}))
    given = {name: value for name, value in TINY.items() if name in known}
    if "kv_lora_rank" in known:
        given["num_key_value_heads"] = TINY["num_attention_heads"]  # latent attention has a key for every head
    return cls(**given | MORE.get(kind, {}), vocab_size=len(text_tokenizer()))


def make(kind: str, folder: Path) -> UniMuRModel:
    """An untrained UniMuR over a tiny LLM of this type, with its towers in `folder`."""
    torch.manual_seed(0)
    init_weights(AutoModelForCausalLM.from_config(tiny_config(kind))).save_pretrained(folder / "text")
    text_tokenizer().save_pretrained(folder / "text")
    make_image_text_tower(folder / "clip", "clip")
    towers = str(folder / "text"), str(folder / "clip")
    return UniMuRModel.from_pretrained_towers(*towers, make_processor(max_length=96)).eval()


def check(kind: str) -> dict[str, Any]:
    """What of a UniMuR works over this type of LLM; raises what does not."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make(kind, folder)
        together = model.embed_dialogues(DIALOGUES)
        alone = torch.cat([model.embed_dialogues([dialogue]) for dialogue in DIALOGUES])
        _same(together, alone, "an embedding changes with its batch")
        items = [
            {"caption": (0, "a dog"), "context": [["a dog"]], "image": 0, "text": "a dog"},
            {"caption": None, "context": [["look", 0], ["and then? what is it?"]], "image": 0, "text": "so"},
        ]
        padded, packed = (model.processor.documents(items, [picture(0)], pack=pack) for pack in (False, True))
        losses = [model(**batch) for batch in (padded, packed)]
        _same(losses[0].ret_embeds, losses[1].ret_embeds, "packing changes an output")
        losses[1].loss.backward()
        if not torch.isfinite(model.W_i2t.weight.grad).all():
            raise AssertionError("a gradient is not finite")
        model.save_pretrained(folder / "saved")
        again = UniMuRModel.from_pretrained(folder / "saved")
        if again.fingerprint != model.fingerprint:
            raise AssertionError("a saved model has another fingerprint")
        _same(again.embed_dialogues(DIALOGUES), together, "a saved model embeds otherwise")
        return {"works": True, "packs": bool(model._packing), "converses": converses(model)}


def converses(model: UniMuRModel) -> bool | str:
    """Whether a conversation's embeddings are the dialogue's; else the refusal."""
    try:
        talk = model.conversation()
        for upto in range(1, 4):
            talk.say(["hi there", "what?", "show me"][upto - 1])
            _same(talk.embed(), model.embed_dialogues([["hi there", "what?", "show me"][:upto]])[0], "differs")
    except ValueError as error:
        return str(error).splitlines()[0]
    return True


def _same(a: torch.Tensor, b: torch.Tensor, otherwise: str) -> None:
    difference = float((a - b).abs().max() / b.abs().max())
    if not difference < 1e-4:
        raise AssertionError(f"{otherwise}: by {difference:.1g}")


def checked(kind: str) -> dict[str, Any]:
    """`check` in a process of its own, which one that cannot be made small may end; or the reason why it does not work."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work() -> None:
        most = status("VmSize") + MEMORY  # beside what the parent has
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        try:
            sender.send(check(kind))
        except Exception as error:  # whatever a family raises is what the table says of it
            why = re.sub(rf"{tempfile.gettempdir()}/\w+/", "", " ".join(str(error).split()))
            why = TOO_LARGE if "allocate memory" in why else f"{type(error).__name__}: {why}"
            sender.send({"works": False, "why": why})

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    if receiver.poll():
        return receiver.recv()
    return {"works": False, "why": TOO_LARGE}


def run(kinds: Sequence[str], file: Path | None = None) -> dict[str, Any]:
    """What works of each type, as `check` gives it or with the reason; printed, and written to a file and its page."""
    rows: dict[str, Any] = {}
    for kind in kinds:
        rows[kind] = checked(kind)
        print(kind, rows[kind], flush=True)
        if file:
            file.write_text(json.dumps(rows, indent=1) + "\n")
            file.with_suffix(".md").write_text(page(rows))
    return rows


def page(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table as Markdown: the types that work, by what of them works, and why each other does not."""
    works = {kind: row for kind, row in rows.items() if row["works"]}
    whole = [kind for kind, row in works.items() if row["packs"] and row["converses"] is True]
    padded = [kind for kind, row in works.items() if not row["packs"]]
    no_talk = [kind for kind, row in works.items() if row["converses"] is not True]
    parts = [
        "# Language models",
        f"Each of the {len(rows)} types of causal language models in transformers {transformers.__version__} at a tiny random "
        f"size, by `python -m tests.stress.families`; {len(works)} work: an embedding is the same alone and in a batch, "
        "losses and gradients are finite, a saved model loads to the same embeddings.",
        f"**Everything works ({len(whole)}):** {', '.join(whole)}.",
        f"**Training pads instead of packing ({len(padded)}):** {', '.join(padded) or 'none'}.",
        f"**No `conversation()`, whole dialogues instead ({len(no_talk)}):** {', '.join(no_talk) or 'none'}.",
        f"**Does not work ({len(rows) - len(works)}):**",
        table(["type", "why"], [[k, row["why"]] for k, row in rows.items() if not row["works"]], 2),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="types of transformers; by default all, into the table")
    chosen = parser.parse_args().kinds
    torch.set_num_threads(1)
    run(chosen or sorted(KINDS), None if chosen else TABLE)


if __name__ == "__main__":
    main()
