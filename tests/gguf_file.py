"""A small random Llama as a GGUF file, and the Llama itself."""

from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import LlamaForCausalLM

from tests.tiny import LETTERS, text_model

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *LETTERS, "Ġa"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, family: str = "llama", seed: int = 0) -> LlamaForCausalLM:
    """Writes the file, matrices quantised to four bits (Q4_1); returns the Llama with the weights before that."""
    torch.manual_seed(seed)
    model = text_model("llama", len(TOKENS))
    config = model.config
    writer = GGUFWriter(path, family)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3, *[1] * (len(TOKENS) - 3)])
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    for name, tensor in model.state_dict().items():
        values = tensor.float()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # llama.cpp rotates neighbouring rows where transformers rotates halves
                values = values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            number, rest = stem.removeprefix("model.layers.").split(".", 1)
            stem = f"blk.{number}.{NAMES[rest]}"
        else:
            stem = NAMES[stem]
        if values.ndim == 2 and family == "llama":
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{stem}.weight", quants.quantize(values.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{stem}.weight", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
