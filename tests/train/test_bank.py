"""Past images as negatives: what the bank keeps, what they change in eq. 4, and that one's own image is never one."""

import pytest
import torch
import torch.nn.functional as F

from modeling_unimur.losses_unimur import visual_matching_loss
from train.bank import NegativesBank


def unit(n, q=8, seed=0):
    return F.normalize(torch.randn(n, q, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_bank_keeps_the_last_images():
    bank, seen = NegativesBank(5), []
    assert bank.embeds is None
    for step, count in enumerate((2, 2, 3, 1, 7)):
        rows = unit(count, seed=step)
        bank.add(3 * rows)
        seen = [*seen, *rows][-5:]
        held = sorted(map(tuple, bank.embeds.tolist()))
        assert torch.allclose(
            torch.tensor(held), torch.tensor(sorted(map(tuple, torch.stack(seen).tolist()))), atol=1e-6
        )
    with pytest.raises(ValueError, match="holds nothing"):
        NegativesBank(0)


def test_the_loss_is_that_of_a_batch_with_more_images():
    texts, images, more = unit(4, seed=1), unit(4, seed=2), unit(6, seed=3)
    loss = visual_matching_loss(texts, images, 10.0, more)
    labels = torch.arange(4)
    logits = 10 * texts @ torch.cat([images, more]).T
    expected = F.cross_entropy(logits, labels) + F.cross_entropy(10 * images @ texts.T, labels)
    assert torch.allclose(loss, expected)
    assert torch.equal(visual_matching_loss(texts, images, 10.0, more[:0]), visual_matching_loss(texts, images, 10.0))


def test_ones_own_image_is_no_negative():
    texts, images = unit(4, seed=1), unit(4, seed=2)
    own = torch.cat([images, unit(2, seed=5)])
    alone = visual_matching_loss(texts[:1], images[:1], 10.0, own)
    others = visual_matching_loss(texts[:1], images[:1], 10.0, own[1:])
    assert torch.allclose(alone, others)


def test_the_trainer_fills_and_uses_it(fresh, tmp_path):
    from tests.conftest import picture
    from train.collate import PairCollator
    from train.trainer import UniMuRTrainer
    from train.training_arguments import UniMuRTrainingArguments

    rows = [{"id": str(i), "image": picture(i), "captions": [f"caption {i}"]} for i in range(8)]
    model = fresh()
    seen = []
    forward = model.forward
    model.forward = lambda **inputs: (seen.append(inputs.get("negatives")), forward(**inputs))[1]
    arguments = UniMuRTrainingArguments(
        str(tmp_path), negatives_bank=6, max_steps=3, per_device_train_batch_size=4, use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_steps=1,
    )  # fmt: skip
    trainer = UniMuRTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=PairCollator(model.processor)
    )
    trainer.train()
    assert [None if n is None else len(n) for n in seen] == [None, 4, 6]
