"""Training: frozen stays frozen, each map learns on its own, resume is exact, the schedule and the counts hold."""

import math

import pytest
import torch

from modeling_unimur import UniMuRModel
from tests.conftest import picture
from tests.tiny import make_model
from train.collate import PairCollator, TooManyBadPairsError
from train.miniature import encode
from train.sampler import GroupedSampler
from train.trainer import UniMuRTrainer
from train.training_arguments import UniMuRTrainingArguments

WORDS = ["a red fox", "two dogs", "the green sea", "my old hat", "one panda", "blue sky", "tiny cup", "fast car"]


def pairs(n=8, broken=0):
    rows = [
        {
            "id": str(i),
            "image": {"bytes": encode(picture(i)), "path": None},
            "captions": [WORDS[i % 8] + "!" * (i // 8)],
        }
        for i in range(n)
    ]
    for row in rows[:broken]:
        row["image"] = {"bytes": b"", "path": None}
    return rows


def trainer_of(model, folder, rows=None, **arguments):
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2,
        "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, **arguments,
    }  # fmt: skip
    return UniMuRTrainer(
        model=model, args=UniMuRTrainingArguments(**arguments), train_dataset=pairs() if rows is None else rows,
        data_collator=PairCollator(model.processor),
    )  # fmt: skip


def trained_tensors(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("ret", [False, True])
def test_only_what_is_trained_changes(tmp_path, ret):
    model = make_model(tmp_path / "t", train_ret_embedding=ret)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = trainer_of(model, tmp_path)
    trainer.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    expected = {"W_i2t.weight", "W_i2t.bias", "W_t2m.weight", "W_t2m.bias", "logit_scale"}
    assert changed == expected | ({"ret_embedding"} if ret else set())
    held = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert held == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_one_batch_is_overfitted_through_w_t2m_alone(tmp_path):
    model = make_model(tmp_path / "t", lambda2=0.0)
    model.W_i2t.requires_grad_(False)
    before = model.W_i2t.weight.clone()
    trainer = trainer_of(model, tmp_path, per_device_train_batch_size=8, max_steps=200, logging_steps=200)
    with torch.no_grad():
        start = model(**_inputs(model))
    trainer.train()
    with torch.no_grad():
        end = model(**_inputs(model))
    assert end.loss_vm < 0.05 * start.loss_vm and torch.equal(model.W_i2t.weight, before)
    assert end.loss_cap == start.loss_cap
    rows = pairs()
    scores = model.embed_dialogues([r["captions"][0] for r in rows]) @ model.embed_images([r["image"] for r in rows]).T
    assert scores.argmax(1).tolist() == list(range(8))


def test_one_batch_is_overfitted_through_w_i2t_alone(tmp_path):
    model = make_model(tmp_path / "t", n_visual_tokens=4)
    model.W_t2m.requires_grad_(False), model.logit_scale.requires_grad_(False)
    before = model.W_t2m.weight.clone()
    rows = pairs(2)
    for row, caption in zip(rows, ("x", "o"), strict=True):  # within reach of an LLM of random weights
        row["captions"] = [caption]
    with torch.no_grad():
        start = model(**_inputs(model, rows)).loss_cap
    trainer_of(
        model, tmp_path, rows, per_device_train_batch_size=2, max_steps=200, learning_rate=0.1, logging_steps=200
    ).train()
    with torch.no_grad():
        end = model(**_inputs(model, rows))
        swapped = _inputs(model, rows)
        swapped["captions"]["image_indices"] = swapped["captions"]["image_indices"].flip(0)
        wrong = model(**swapped).loss_cap
    assert end.loss_cap < 0.4 * start and torch.equal(model.W_t2m.weight, before)
    assert wrong > 2 * end.loss_cap  # it reads the image, not only a learnt constant


def _inputs(model, rows=None):
    batch = PairCollator(model.processor)(rows or pairs())
    return {k: v for k, v in batch.items() if k not in ("skipped", "n_seen")}


def test_each_loss_is_logged_beside_the_sum(tmp_path):
    model = make_model(tmp_path / "t")
    trainer = trainer_of(model, tmp_path, max_steps=3)
    trainer.train()
    for log in trainer.state.log_history[:3]:
        total = log["loss_cap"] + log["loss_vm"] + 10 * log["loss_tm"]
        assert math.isclose(log["loss"], total, rel_tol=1e-3) and log["images_per_second"] > 0


def test_alternating_steps_train_one_part_each(tmp_path):
    model = make_model(tmp_path / "t")
    trainer = trainer_of(model, tmp_path, max_steps=4, schedule="alternating")
    trainer.train()
    kinds = [("loss_cap" in log, "loss_vm" in log and "loss_tm" in log) for log in trainer.state.log_history[:4]]
    assert kinds == [(True, False), (False, True)] * 2


def test_accumulated_steps_see_every_row(tmp_path):
    model = make_model(tmp_path / "t")
    trainer = trainer_of(model, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    assert trainer.skips.seen == 8 and trainer.state.global_step == 2


@pytest.mark.parametrize("bank", [0, 24])
def test_resume_gives_the_weights_of_no_interruption(tmp_path, bank):
    rows = pairs(16)
    for row in rows:
        row["captions"] = [row["captions"][0], "the other one " + row["captions"][0]]
    whole = make_model(tmp_path / "t")
    arguments = {"max_steps": 10, "lr_scheduler_type": "cosine", "save_strategy": "steps", "save_steps": 5, "seed": 3}
    arguments["negatives_bank"] = bank
    trainer_of(whole, tmp_path / "whole", rows, **arguments).train()
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    from safetensors.torch import load_file

    saved = load_file(checkpoint / "model.safetensors")
    assert set(saved) == {"W_i2t.weight", "W_i2t.bias", "W_t2m.weight", "W_t2m.bias", "ret_embedding", "logit_scale"}
    assert not torch.equal(saved["W_t2m.weight"], whole.W_t2m.weight)
    resumed = make_model(tmp_path / "t")
    trainer_of(resumed, tmp_path / "whole", rows, **arguments).train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in trained_tensors(whole).items():
        assert torch.equal(resumed.get_parameter(name), tensor), name
    again = UniMuRModel.from_pretrained(checkpoint)  # a Trainer's checkpoint is one of ours
    assert torch.equal(again.W_t2m.weight, saved["W_t2m.weight"])


def test_a_bank_of_another_size_is_not_resumed_from(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    trainer_of(make_model(tmp_path / "t"), tmp_path / "out", negatives_bank=8, **arguments).train()
    other = trainer_of(make_model(tmp_path / "t"), tmp_path / "out", negatives_bank=9, **arguments)
    with pytest.raises(ValueError, match="bank is one of 8 images, not 9"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_workers_that_outlive_an_epoch_draw_its_captions(tmp_path):
    rows = [row | {"captions": [f"{row['captions'][0]} {i}" for i in range(5)]} for row in pairs(8)]
    weights = []
    for workers in ({}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}):
        model = make_model(tmp_path / "t")
        trainer_of(model, tmp_path, rows, **workers).train()  # three epochs
        weights.append(trained_tensors(model))
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor), name


def test_the_same_seed_gives_the_same_weights(tmp_path):
    weights = []
    for run in range(2):
        model = make_model(tmp_path / "t")
        trainer_of(model, tmp_path / str(run), pairs(16)).train()
        weights.append(model.W_t2m.weight.detach())
    assert torch.equal(*weights)


def test_bad_pairs_are_counted_and_stop_the_run_above_the_share(tmp_path):
    model = make_model(tmp_path / "t")
    trainer = trainer_of(
        model, tmp_path, pairs(16, broken=1), num_train_epochs=1, max_steps=-1, max_bad_share=0.1, logging_steps=4
    )
    trainer.train()
    assert trainer.skips.seen == 16 and dict(trainer.skips.counts) == {"empty": 1}
    stopped = trainer_of(
        model, tmp_path, pairs(16, broken=3), num_train_epochs=1, max_steps=-1, max_bad_share=0.1, logging_steps=4
    )
    with pytest.raises(TooManyBadPairsError, match=r"empty \d.*more than the 10\.0%"):
        stopped.train()


def test_grouped_batches_are_of_one_kind():
    groups = [0] * 10 + [1] * 7 + [2] * 3
    sampler = GroupedSampler(groups, 4, seed=0)
    order = list(sampler)
    assert len(order) == len(sampler) == 12 and sampler.left_out == 8 and len(set(order)) == 12
    for start in range(0, 12, 4):
        assert len({groups[i] for i in order[start : start + 4]}) == 1
    assert order == list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) != order
    with pytest.raises(ValueError, match="fills a batch"):
        GroupedSampler([0, 1], 4, 0)
