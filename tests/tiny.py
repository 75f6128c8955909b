"""
Small random towers in folders laid out like Hub repositories.

    python -m tests.tiny --out runs/tiny --text-vocab DIR --clip-vocab DIR

makes `runs/tiny/text` (a GPT-2) and `runs/tiny/clip` around real vocabularies (vocab.json and merges.txt).
"""

import argparse
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MetaClip2Config,
    MetaClip2Model,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Siglip2Tokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from modeling_unimur import UniMuRModel, UniMuRProcessor
from train.command import run_command

SENTENCES = ["a panda in a red hat eats bamboo", "show me a dog on the beach", "what does it look like?", "thanks!"]
LETTERS = sorted(set(map(chr, range(33, 127))) | {"Ġ", "Ċ"})
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def text_tokenizer(bos: bool = True) -> GPT2Tokenizer:
    """A letter-level tokenizer laid out as OPT's: `<s>` 0, `<pad>` 1, `</s>` 2, with BOS `</s>` first."""
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *LETTERS])}
    return GPT2Tokenizer(
        vocab=vocab,
        merges=[],
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        add_bos_token=bos,
    )


def clip_tokenizer() -> CLIPTokenizer:
    letters = [letter for letter in LETTERS if letter not in "ĠĊ"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def text_model(kind: str, vocab_size: int):
    """`opt`, `opt-350m` (projected embeddings, post-norm), `gpt2`, `llama` or `qwen2`; d = 32 (16 for `opt-350m`)."""
    ids = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "vocab_size": vocab_size}
    gqa = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 128}
    opt = {k: v for k, v in SMALL.items() if k != "intermediate_size"} | {
        "ffn_dim": 64,
        "max_position_embeddings": 128,
    }
    makers = {
        "opt": lambda: OPTForCausalLM(OPTConfig(**opt, **ids, word_embed_proj_dim=32)),
        "opt-350m": lambda: OPTForCausalLM(
            OPTConfig(**opt, **ids, word_embed_proj_dim=16, do_layer_norm_before=False)
        ),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128, **ids)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**gqa, **ids)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**gqa, **ids)),
    }
    return init_weights(makers[kind]())


def init_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights large enough that outputs depend on the input: with the usual 0.02 a small model's hardly do."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def clip_model(vocab_size: int, eos: int, image_size: int = 32, width: int = 32) -> CLIPModel:
    tower = {**SMALL, "hidden_size": width, "intermediate_size": 2 * width}
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": vocab_size,
            "eos_token_id": eos,
            "bos_token_id": eos - 1,
            "pad_token_id": eos,
        },
        vision_config={**tower, "image_size": image_size, "patch_size": image_size // 4},
        projection_dim=24,
    )
    return CLIPModel(config).eval()


def siglip_tokenizer() -> Siglip2Tokenizer:
    """A letter-level tokenizer laid out as SigLIP 2's: lower case, an end of text behind it, no beginning."""
    ids = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS])}
    tokenizer = Siglip2Tokenizer(vocab=ids, merges=[], model_max_length=16, padding_side="right")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", ids["<eos>"])]
    )
    return tokenizer


def siglip_model(vocab_size: int, image_size: int = 32) -> SiglipModel:
    """A SigLIP, as which SigLIP 2 of a fixed resolution is published; its embeddings have 32 dimensions."""
    return SiglipModel(
        SiglipConfig(
            text_config={**SMALL, "vocab_size": vocab_size, "max_position_embeddings": 16, "projection_size": 32},
            vision_config={**SMALL, "image_size": image_size, "patch_size": image_size // 4},
        )
    ).eval()


def metaclip_2_model(vocab_size: int, eos: int, image_size: int = 32) -> MetaClip2Model:
    ids = {"vocab_size": vocab_size, "eos_token_id": eos, "bos_token_id": eos - 1, "pad_token_id": eos}
    return MetaClip2Model(
        MetaClip2Config(
            text_config={**SMALL, **ids},
            vision_config={**SMALL, "image_size": image_size, "patch_size": image_size // 4},
            projection_dim=24,
        )
    ).eval()


def image_processor(size: int = 32) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def make_pipeline(width: int = 32, length: int = 12):
    """A tiny Stable Diffusion of random weights that draws 16 x 16 pixels."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    words = clip_tokenizer()
    words.model_max_length = length
    with torch.random.fork_rng():
        torch.manual_seed(0)
        text = CLIPTextModel(CLIPTextConfig(
            **{**SMALL, "hidden_size": width}, vocab_size=len(words), max_position_embeddings=length,
            bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.eos_token_id,
        ))  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=8, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            block_out_channels=(16,), layers_per_block=1, cross_attention_dim=width, attention_head_dim=2, norm_num_groups=8,
        )  # fmt: skip
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), norm_num_groups=4,
        )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae.eval(), text.eval(), words, unet.eval(), scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def make_towers(folder: Path, kind: str = "opt", seed: int = 0, clip_kind: str = "clip") -> tuple[Path, Path]:
    """
    Both towers with their tokenizers, in `folder/text` and `folder/clip`; `clip_kind` is `clip`, `metaclip_2` or `siglip`.
    """
    torch.manual_seed(seed)
    text, clip = folder / "text", folder / "clip"
    tokenizer = text_tokenizer()
    text_model(kind, len(tokenizer)).save_pretrained(text)
    tokenizer.save_pretrained(text)
    make_image_text_tower(clip, clip_kind)
    return text, clip


def make_image_text_tower(folder: Path, kind: str) -> None:
    """A `clip`, `metaclip_2` or `siglip` with what reads its input."""
    words = siglip_tokenizer() if kind == "siglip" else clip_tokenizer()
    pictures = SiglipImageProcessor(size={"height": 32, "width": 32}) if kind == "siglip" else image_processor()
    if kind == "siglip":
        model = siglip_model(len(words))
    else:
        model = (clip_model if kind == "clip" else metaclip_2_model)(len(words), words.eos_token_id)
    for part in (model, words, pictures):
        part.save_pretrained(folder)


def make_processor(n_visual_tokens: int = 2, **kwargs) -> UniMuRProcessor:
    kwargs = {"max_length": 128, **kwargs}
    return UniMuRProcessor(image_processor(), text_tokenizer(), clip_tokenizer(), n_visual_tokens, **kwargs)


def make_model(folder: Path, kind: str = "opt", seed: int = 0, **fields) -> UniMuRModel:
    """An untrained adapter-style UniMuR over tiny towers in `folder`."""
    text, clip = make_towers(folder, kind, seed)
    model = UniMuRModel.from_pretrained_towers(text, clip, make_processor(fields.pop("n_visual_tokens", 2)), **fields)
    return model.eval()


def main(argv: list[str] | None = None) -> None:
    """Raises `ValueError`: a folder holds no vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--out", "--text-vocab", "--clip-vocab"):
        parser.add_argument(name, type=Path, required=True)
    arguments = parser.parse_args(argv)
    for option, folder in (("--text-vocab", arguments.text_vocab), ("--clip-vocab", arguments.clip_vocab)):
        if not any((folder / name).is_file() for name in ("vocab.json", "tokenizer.json")):
            raise ValueError(f"{option} {folder} holds no vocab.json: give the folder of a tokenizer's vocabulary")
    torch.manual_seed(0)
    tokenizer = GPT2Tokenizer.from_pretrained(arguments.text_vocab)
    config = GPT2Config(n_embd=128, n_layer=2, n_head=4, n_positions=256, vocab_size=len(tokenizer))
    init_weights(GPT2LMHeadModel(config)).save_pretrained(arguments.out / "text")
    tokenizer.save_pretrained(arguments.out / "text")
    words = CLIPTokenizer.from_pretrained(arguments.clip_vocab)
    clip_model(len(words), words.eos_token_id, image_size=64, width=64).save_pretrained(arguments.out / "clip")
    words.save_pretrained(arguments.out / "clip")
    image_processor(64).save_pretrained(arguments.out / "clip")
    print(f"random towers in {arguments.out / 'text'} and {arguments.out / 'clip'}")


if __name__ == "__main__":
    run_command(main)
