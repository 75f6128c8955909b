"""Validation while training: what it measures, that training continues as without it, the best model, and the curves."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from modeling_unimur import UniMuRModel
from tests.conftest import picture
from tests.tiny import make_model
from tests.train.test_run import base, folder, write_shard  # noqa: F401 (a fixture)
from tests.train.test_trainer import pairs, trained_tensors, trainer_of
from train.collate import PairCollator
from train.conversations import ImageId, make_conversation
from train.curves import draw_curves
from train.data import FEATURES
from train.documents import InterleavedDocuments
from train.miniature import encode
from train.run import main
from train.trainer import UniMuRTrainer
from train.training_arguments import UniMuRTrainingArguments
from train.validation import Validation


def table(n, start=20, broken=()):
    import datasets

    rows = [
        {"id": f"held {i}", "image": {"bytes": b"" if i in broken else encode(picture(start + i)), "path": None},
         "captions": [f"caption {i}", "another"], "source": None, "license": None, "url": None, "problem": None}
        for i in range(n)
    ]  # fmt: skip
    return datasets.Dataset.from_list(rows, features=FEATURES)


def dialogues(images):
    """Four conversations: two whose reply has an image, one of which shows one in its context."""

    def made(name, context, image):
        reply = [f"reply {name}", *([ImageId(image)] if image else [])]
        return make_conversation(name, [context, reply], [1])

    conversations = [
        made("a", ["show me"], "held 0"), made("b", ["like this", ImageId("held 2")], "held 1"),
        made("c", ["thanks"], None), made("d", ["how old is it?"], None),
    ]  # fmt: skip
    return InterleavedDocuments.of(conversations, images)


def test_it_measures_what_the_model_does_for_a_user(tmp_path):
    model = make_model(tmp_path / "t", alignment="paper")
    held, spoken = table(5, broken=(3,)), table(4, start=40)
    validation = Validation(model, PairCollator(model.processor), held, dialogues(spoken), batch_size=4)
    measured = validation.measure(model, lambda batch: batch)
    kept = [row for i, row in enumerate(held) if i != 3]
    queries = model.embed_dialogues([row["captions"][0] for row in kept])
    images = model.embed_images([model.processor.decode(row["image"]) for row in kept])
    ranks = (queries @ images.T).argsort(dim=1, descending=True)
    assert measured["image_R@1"] == pytest.approx(100 * (ranks[:, 0] == torch.arange(4)).float().mean().item())
    assert measured["image_R@5"] == 100 and dict(validation.skips.counts) == {"empty": 1}
    texts = [f"reply {name}" for name in "abcd"]
    image = model.processor.decode(spoken[2]["image"])
    content = [{"type": "text", "text": "like this"}, {"type": "image", "image": image}]
    contexts = [["show me"], [{"role": "user", "content": content}], ["thanks"], ["how old is it?"]]
    pool = model.build_pool(images=[model.processor.decode(spoken[i]["image"]) for i in (0, 1)], texts=texts)
    replies = model.retrieve(contexts, pool)
    assert measured["image_rate"] == 50 * sum(r.image is not None for r in replies[:2])
    assert measured["image_rate_text_only"] == 50 * sum(r.image is not None for r in replies[2:])
    assert {"reply_R@1", "reply_R@5", "reply_R@10", "reply_image_R@1"} <= measured.keys()
    # A batch of all the pairs has the losses of the model's own forward pass.
    batch = PairCollator(model.processor, caption="first")(kept)
    batch.pop("skipped"), batch.pop("n_seen")
    alone = Validation(model, PairCollator(model.processor), held, batch_size=8).measure(model, lambda batch: batch)
    with torch.no_grad():
        outputs = model(**batch)
    for name in ("loss", "loss_cap", "loss_vm", "loss_tm"):
        assert alone[name] == pytest.approx(outputs[name].item(), rel=1e-5), name


def test_the_pool_has_its_size_and_nothing_usable_is_refused(tmp_path):
    model = make_model(tmp_path / "t")
    validation = Validation(model, PairCollator(model.processor), table(5), pool=3)
    assert len(validation.pairs) == 3
    with pytest.raises(ValueError, match="nothing to validate on: no usable pair or conversation in x"):
        Validation(model, PairCollator(model.processor), table(2).select([]), about="x")


def test_training_goes_on_as_without_it(tmp_path):
    weights = []
    for held in (None, table(4)):
        model = make_model(tmp_path / "t")
        collator = PairCollator(model.processor)
        validation = None if held is None else Validation(model, collator, held)
        args = UniMuRTrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, save_strategy="no", use_cpu=True,
            disable_tqdm=True, logging_steps=1, state_noise=0.2, eval_steps=None if held is None else 2,
        )  # fmt: skip
        trainer = UniMuRTrainer(
            model=model, args=args, train_dataset=pairs(), data_collator=collator, validation=validation
        )
        trainer.train()
        weights.append(trained_tensors(model))
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    measured = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["step"] for log in measured] == [2, 4] and all("eval_image_R@1" in log for log in measured)
    assert trainer.skips.seen == 16 and not any("loss_cap" in log for log in measured)
    with pytest.raises(ValueError, match="evaluate measures the trainer's validation"):
        trainer_of(model, tmp_path).evaluate()


def test_the_best_model_is_kept_and_the_run_stops_early(folder):  # noqa: F811
    settings = base(folder) | {
        "eval_share": 0.3, "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True,
        "early_stopping_patience": 2, "max_steps": 20, "metric_for_best_model": "image_R@1", "per_device_train_batch_size": 4,
        "save_total_limit": 2, "warmup_steps": 0,
    }  # fmt: skip
    (folder / "v.yaml").write_text(yaml.safe_dump(settings))
    summary = main([str(folder / "v.yaml")])
    entries = [log for log in summary["log"] if "eval_loss" in log]
    final, measured = entries[-1], {log["step"]: log for log in entries[:-1]}
    best = max(measured, key=lambda step: measured[step]["eval_image_R@1"])
    assert summary["steps"] == max(measured) == best + 2 < 20
    assert final["eval_loss"] == pytest.approx(measured[best]["eval_loss"], rel=1e-5)
    assert final["eval_loss"] != measured[best + 2]["eval_loss"]
    state = json.loads((folder / "out" / f"checkpoint-{best}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / "out" / f"checkpoint-{best}")
    kept = UniMuRModel.from_pretrained(folder / "out" / f"checkpoint-{best}")
    final = UniMuRModel.from_pretrained(summary["checkpoint"])
    assert torch.equal(kept.W_t2m.weight, final.W_t2m.weight)


def test_a_run_says_what_it_was_measured_on_and_draws_its_curves(folder, capsys):  # noqa: F811
    write_shard(folder / "held.tar", [f"number {i}" for i in range(5)])
    settings = base(folder) | {"eval_data": str(folder / "held.tar"), "max_steps": 6, "logging_steps": 2}
    (folder / "e.yaml").write_text(yaml.safe_dump(settings))
    summary = main([str(folder / "e.yaml")])
    printed = capsys.readouterr().out
    assert f"at the end of training, on pairs of {folder / 'held.tar'}:\n  loss:" in printed
    assert f"caption to image, on pairs of {folder / 'held.tar'}:\n  R@1:" in printed
    assert [log["step"] for log in summary["log"] if "eval_loss" in log] == [2, 4, 6, 6]
    assert summary["caption_to_image"]["pool"] == 5
    # The checkpoint that a user loads gives what the validation gave.
    assert summary["caption_to_image"]["R@1"] == pytest.approx(summary["validation"]["eval_image_R@1"])
    drawn = np.asarray(Image.open(folder / "out" / "curves.png").convert("L"))
    assert drawn.shape[1] > 900 and len(np.unique(drawn)) > 20


def test_validation_without_anything_held_out_is_refused(folder):  # noqa: F811
    (folder / "n.yaml").write_text(yaml.safe_dump(base(folder) | {"eval_steps": 2}))
    with pytest.raises(ValueError, match=r"nothing to validate on. Give --eval_data"):
        main([str(folder / "n.yaml")])


def test_nothing_logged_draws_nothing(tmp_path):
    assert not draw_curves([{"train_runtime": 1.0, "step": 3}], tmp_path / "c.png")
    assert draw_curves([{"loss": 1.0, "step": 1}, {"loss": math.nan, "step": 2}], tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 1000
