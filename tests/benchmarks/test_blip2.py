"""BLIP-2 on a small random configuration, and its pre-training on the miniature."""

import pytest
import torch
import torch.nn.functional as F
from transformers import Blip2ForImageTextRetrieval, CLIPImageProcessor

from benchmarks.baselines.blip2 import Blip2Baseline
from benchmarks.baselines.blip2_miniature import bert_tokenizer, blip2_config, pretrain_blip2
from tests.conftest import picture
from train.miniature.world import SIZE, splits

TEXTS = ["a panda in a red hat", "bamboo", "what does it look like on the moon?"]


@pytest.fixture(scope="module")
def blip2():
    tokenizer = bert_tokenizer(TEXTS * 5)
    torch.manual_seed(0)
    model = Blip2ForImageTextRetrieval(blip2_config(len(tokenizer), 32, 2, 3, 16))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    size = {"height": SIZE, "width": SIZE}
    return Blip2Baseline(model, CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size), tokenizer)


@torch.no_grad()
def test_similarity_is_the_models_own(blip2):
    images = [picture(i) for i in range(4)]
    words = blip2.tokenizer(TEXTS, padding=True, return_tensors="pt")
    pixels = blip2.image_processor(images, return_tensors="pt")["pixel_values"]
    wanted = blip2.model(pixel_values=pixels, input_ids=words["input_ids"], attention_mask=words["attention_mask"])
    actual = blip2.similarity(blip2.embed_texts(TEXTS), blip2.embed_images(images))
    torch.testing.assert_close(actual, wanted.logits_per_text, rtol=1e-4, atol=1e-5)


def test_a_batch_changes_nothing(blip2):
    images, dialogues = [picture(i) for i in range(5)], [["a panda", picture(1)], [picture(2)], ["bamboo"] * 9]
    for embed, items in ((blip2.embed_images, images), (blip2.embed_texts, TEXTS), (blip2.embed_dialogues, dialogues)):
        torch.testing.assert_close(
            embed(items, batch_size=2), torch.cat([embed([i]) for i in items]), atol=1e-5, rtol=0
        )


def test_a_dialogue_is_the_mean_of_its_words_and_its_images(blip2):
    words = blip2.embed_texts(["a panda bamboo"])
    images = [F.normalize(blip2.embed_images([picture(i)]).mean(1), dim=-1) for i in (1, 2)]
    both = blip2.embed_dialogues([["a panda", picture(1), "bamboo", picture(2)]])
    wanted = F.normalize(words + F.normalize(images[0] + images[1], dim=-1), dim=-1)
    torch.testing.assert_close(both, wanted, atol=1e-5, rtol=0)


def test_long_texts_lose_their_beginning_and_are_counted(blip2):
    before = blip2.truncated
    cut, whole = blip2.embed_texts(["panda " * 200 + "bamboo " * 159]), blip2.embed_texts(["bamboo " * 158])
    assert blip2.truncated == before + 1 and "1 texts exceeded" in blip2.notes[0]
    assert F.cosine_similarity(cut, whole).item() > 0.99


def test_a_bad_image_is_named(blip2):
    with pytest.raises(ValueError, match="image 1: "):
        blip2.embed_images([picture(0), b"no image"])


def test_pretraining_is_deterministic(tmp_path):
    scenes = splits()["train"][:200]
    small = {"steps": 25, "batch_size": 32, "width": 32, "layers": 1, "queries": 2, "dim": 16, "progress": False}
    for name in "ab":
        pretrain_blip2(tmp_path / name, scenes, **small)
    first, second = (Blip2Baseline.from_pretrained(tmp_path / n) for n in "ab")
    assert all(torch.equal(p, q) for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True))
    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert first.model.query_tokens.std() > 0.01 and first.revision["dimension"] == 16
    assert not any("scale" in name for name, _ in first.model.named_parameters())
