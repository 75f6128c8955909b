"""
Which of transformers' causal language models work as UniMuR's, each at a tiny random size.

    python -m tests.stress.families                 all of them, into benchmarks/results/families.json
    python -m tests.stress.families gemma2 bloom    these, printed

`works`: an embedding is the same alone and in a batch, losses and gradients are finite, a saved model loads to the same
fingerprint and embeddings. `packs`: training packs its sequences; else it pads them, and says so. `converses`: a
conversation's embedding is the dialogue's. Otherwise the first line of the error is there.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from modeling_unimur import UniMuRModel
from tests.conftest import picture
from tests.tiny import init_weights, make_image_text_tower, make_processor, text_tokenizer

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "families.json"
KINDS = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
MEMORY, SECONDS = 12 * 2**30, 120  # that a family may take
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
MORE: dict[str, dict[str, Any]] = {"gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 128}}


def tiny_config(kind: str) -> PreTrainedConfig:
    """A config of this type with the sizes of `TINY`."""
    cls = CONFIG_MAPPING[kind]
    known = {field.name for field in fields(cls)} if is_dataclass(cls) else set()
    known |= set(getattr(cls, "attribute_map", {}))
    given = {name: value for name, value in TINY.items() if name in known} | MORE.get(kind, {})
    return cls(**given, vocab_size=len(text_tokenizer()))


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
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        try:
            sender.send(check(kind))
        except Exception as error:  # whatever a family raises is what the table says of it
            first = (str(error).splitlines() or [""])[0][:160]
            sender.send({"works": False, "why": f"{type(error).__name__}: {first}"})

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    if receiver.poll():
        return receiver.recv()
    return {"works": False, "why": f"it needs more than {MEMORY >> 30} GiB or {SECONDS} s at this size"}


def run(kinds: Sequence[str], table_file: Path | None = None) -> dict[str, Any]:
    """What works of each type, as `check` gives it or with the reason; printed, and written to a file on the way."""
    table: dict[str, Any] = {}
    for kind in kinds:
        table[kind] = checked(kind)
        print(kind, table[kind], flush=True)
        if table_file:
            table_file.write_text(json.dumps(table, indent=1) + "\n")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", help="types of transformers; by default all, into the table")
    chosen = parser.parse_args().kinds
    torch.set_num_threads(1)
    run(chosen or sorted(KINDS), None if chosen else TABLE)


if __name__ == "__main__":
    main()
