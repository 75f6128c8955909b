"""Frozen: only its image encoder and its map are trained, through the same trainer, by captioning."""

import pytest
import torch
from transformers import CLIPVisionConfig

from benchmarks.baselines.frozen import Frozen, FrozenModel
from benchmarks.systems import DoesNotApplyError
from tests.conftest import picture
from tests.tiny import make_processor, make_towers
from train.collate import PairCollator
from train.miniature import encode
from train.trainer import UniMuRTrainer
from train.training_arguments import UniMuRTrainingArguments


@pytest.fixture
def frozen(tmp_path):
    text, clip = make_towers(tmp_path / "towers")
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                              image_size=32, patch_size=16)  # fmt: skip
    torch.manual_seed(0)
    return FrozenModel.from_pretrained_towers(text, clip, make_processor(2), vision_config=vision)


def pairs(n=12):
    return [{"id": str(i), "image": {"bytes": encode(picture(i)), "path": None}, "captions": [f"it is {'ab'[i % 2]}"]}
            for i in range(n)]  # fmt: skip


def trained(model, folder, steps):
    args = UniMuRTrainingArguments(
        output_dir=str(folder), schedule="captioning", max_steps=steps, learning_rate=1e-2, warmup_steps=1, use_cpu=True,
        per_device_train_batch_size=12, disable_tqdm=True, logging_steps=1, save_strategy="no",
    )  # fmt: skip
    trainer = UniMuRTrainer(model=model, args=args, train_dataset=pairs(), data_collator=PairCollator(model.processor))
    trainer.train()
    return [log["loss_cap"] for log in trainer.state.log_history if "loss_cap" in log]


def test_captioning_trains_the_encoder_and_the_map_alone(frozen, tmp_path):
    before = {n: p.detach().clone() for n, p in frozen.named_parameters()}
    losses = trained(frozen, tmp_path, 60)
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in frozen.named_parameters():
        moved = not torch.equal(parameter, before[name])
        wanted = name.startswith(("W_i2t", "vision_encoder"))
        # The key's bias shifts all of a row's attention alike, so no gradient reaches it.
        assert moved == wanted or (wanted and "k_proj.bias" in name), name
    assert not any(name.startswith("W_t2m") for name in before)


def test_a_checkpoint_of_either_kind_loads_again(frozen, tmp_path):
    pixels = frozen.processor.pixels([picture(3)])
    for towers in (False, True):
        frozen.save_pretrained(tmp_path / str(towers), with_towers=towers)
        again = FrozenModel.from_pretrained(tmp_path / str(towers))
        assert torch.equal(again.encode_images(pixels)[0], frozen.eval().encode_images(pixels)[0])
        assert {n for n, p in again.named_parameters() if p.requires_grad} == {
            n for n, p in frozen.named_parameters() if p.requires_grad
        }
    assert next((tmp_path / "False").glob("*.safetensors")).stat().st_size < 100_000


def test_it_answers_and_scores_but_has_no_embeddings(frozen):
    system = Frozen(frozen.eval())
    contexts = [[picture(1), "what is it?"], [picture(2), "what is it?"]]
    assert len(system.answers(contexts, max_new_tokens=3)) == 2
    scores = system.log_likelihoods(contexts, [["a", "b"], ["a", "b"]])
    assert not torch.allclose(scores[0], scores[1])  # the image is heard
    with pytest.raises(DoesNotApplyError):
        system.embed_dialogues(contexts)
    assert system.revision["maps"]
