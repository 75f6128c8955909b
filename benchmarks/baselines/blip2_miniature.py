"""A small BLIP-2 pre-trained on the miniature's pictures and captions, since an untrained one would only give chance."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional as F
from tqdm.auto import trange
from transformers import Blip2Config, Blip2ForImageTextRetrieval, CLIPImageProcessor, PreTrainedTokenizerFast

from train.miniature.towers import adamw, batches_of, check_reload, draw_all, pixel_values_of, take_step
from train.miniature.world import SIZE, Scene, captions, facts

from .blip2 import image_queries, text_outputs


def pretrain_blip2(
    folder: str | Path, scenes: Sequence[Scene], *, seed: int = 0, steps: int = 520, batch_size: int = 128,
    lr: float = 1e-3, width: int = 96, layers: int = 2, queries: int = 4, dim: int = 64, progress: bool = True,
) -> Path:  # fmt: skip
    """
    Trains a BLIP-2 from scratch by its image-text contrast: InfoNCE over each image's best query.

    Args:
        folder: where to save; made if absent.
        scenes: training scenes only.
        seed: of everything random. The same seed gives the same weights on the same machine.
        steps, batch_size, lr: those of the miniature's CLIP.
        width, layers, queries, dim: of both encoders, of the Q-Former, and q.

    Returns:
        The folder.
    """
    folder = Path(folder)
    rng = random.Random(f"blip2-{seed}")
    texts = [captions(scene, rng, 6, 1) for scene in scenes]
    corpus = [text for options in texts for text in options] + [line for fact in facts() for line in fact]
    tokenizer = bert_tokenizer(corpus)
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Blip2ForImageTextRetrieval(blip2_config(len(tokenizer), width, layers, queries, dim))
        nn.init.normal_(model.query_tokens, std=0.02)  # zeros would keep all queries equal
        scale = nn.Parameter(torch.tensor(2.659))  # log(1 / 0.07), for the training only
        model.register_parameter("training_scale", scale)
        pixels = draw_all(scenes, rng, progress)
        flat = tokenizer([t for row in texts for t in row], padding=True, return_tensors="pt")
        ids, mask = (flat[k].view(len(texts), len(texts[0]), -1) for k in ("input_ids", "attention_mask"))
        optimizer, schedule = adamw(model, lr, steps)
        order, labels = batches_of(len(texts), batch_size, steps), torch.arange(batch_size)
        for step in (bar := trange(steps, desc="BLIP-2", disable=not progress)):
            rows, which = order[step], torch.randint(len(texts[0]), (batch_size,))
            length = int(mask[rows, which].sum(1).max())
            images = F.normalize(image_queries(model, pixel_values_of(pixels[rows], processor)), dim=-1)
            words = F.normalize(text_outputs(model, ids[rows, which, :length], mask[rows, which, :length]), dim=-1)
            logits = scale.exp() * torch.einsum("tq,ivq->tiv", words, images).amax(-1)
            loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
            take_step(loss, model, optimizer, schedule)
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
        del model.training_scale
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    check_reload(tokenizer, folder, corpus[0])
    return folder


def blip2_config(vocabulary: int, width: int, layers: int, queries: int, dim: int) -> Blip2Config:
    """A small BLIP-2 for pictures of the miniature's size."""
    shared = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
              "num_attention_heads": max(1, width // 32), "initializer_range": 0.02}  # fmt: skip
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text = {"vocab_size": vocabulary, "max_position_embeddings": 160, "encoder_hidden_size": width,
            "cross_attention_frequency": 1, "use_qformer_text_input": True, "pad_token_id": 0}  # fmt: skip
    return Blip2Config(
        vision_config=shared | {"image_size": SIZE, "patch_size": 16}, qformer_config=shared | quiet | text,
        text_config={"model_type": "opt", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 8, "ffn_dim": 8,
                     "num_attention_heads": 1, "word_embed_proj_dim": 8},  # the retrieval model has no language model
        num_query_tokens=queries, image_text_hidden_size=dim,
    )  # fmt: skip


def bert_tokenizer(corpus: Sequence[str], vocab_size: int = 1200) -> PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer laid out as BERT's: `[PAD]` is 0, `[CLS]` comes first and `[SEP]` last."""
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = sorted({c for text in corpus for c in text.lower() if not c.isspace()})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # Listed here, so that their ids are the same in every run.
        special_tokens=[*special, *(f"##{c}" for c in letters)],
        initial_alphabet=letters,
        show_progress=False,
    )
    learner.train_from_iterator(corpus, trainer)
    learner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=learner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=160,
    )  # fmt: skip
