"""Models of random weights in the shapes that are timed; weights do not change the time."""

import random

import torch
from transformers import CLIPConfig, CLIPImageProcessor, OPTConfig, OPTForCausalLM

from modeling_unimur import UniMuRConfig, UniMuRModel, UniMuRProcessor
from train.miniature.towers import clip_tokenizer, opt_tokenizer

# name -> layers, width, vocabulary
SHAPES = {
    "OPT 2 x 128, vocabulary 1,600": (2, 128, 1_600),
    "OPT 6 x 512, vocabulary 1,600": (6, 512, 1_600),
    "OPT 6 x 512, vocabulary 50,272": (6, 512, 50_272),
}


def random_model(
    layers: int, width: int, vocabulary: int, seed: int = 0, *, image: int = 32, vision: dict | None = None,
    words: dict | None = None,
) -> UniMuRModel:  # fmt: skip
    """
    A full UniMuR of random weights around an OPT of this shape and a small CLIP.

    Args:
        image: pixels of an image's side.
        vision, words: fields of CLIP's two towers.
    """
    torch.manual_seed(seed)
    syllables = [f"{a}{b}" for a in "bcdfgklmnprst" for b in "aeiou"]
    tokenizer = opt_tokenizer(syllables, max_length=512, vocab_size=400)
    clip_words = clip_tokenizer(syllables, vocab_size=600)
    processor = UniMuRProcessor(CLIPImageProcessor(), tokenizer, clip_words, max_length=512)
    text = OPTConfig(
        vocab_size=vocabulary, hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64 if width > 64 else 1, max_position_embeddings=512, dropout=0.0,
    )  # fmt: skip
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}
    clip = CLIPConfig(
        text_config=(words or tower) | {"vocab_size": len(clip_words), "eos_token_id": clip_words.eos_token_id},
        vision_config=(vision or tower | {"patch_size": 16}) | {"image_size": image}, projection_dim=768,
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
