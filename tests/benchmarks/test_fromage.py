"""FROMAGe: its losses by hand, its norm rule, its checkpoints, and its replies one by one."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from benchmarks.baselines.fromage import Fromage, FromageConfig, FromageModel
from benchmarks.baselines.fromage_train import FromageCollator, RescaleRet, concatenated, train_fromage
from tests.conftest import picture
from tests.tiny import make_processor, make_towers
from train.collate import PairCollator
from train.data import FEATURES
from train.miniature import encode
from train.trainer import UniMuRTrainer, UniMuRTrainingArguments

WORDS = ["a red fox", "two dogs", "the green sea", "my old hat", "one panda", "blue sky", "tiny cup", "fast car"]
DIALOGUES = ["hello", ["look", picture(1), "how nice it is"], [picture(2)], "what does it look like?\nshow me"]
TRAINED = {"W_i2t.weight", "W_i2t.bias", "W_t2m.weight", "W_t2m.bias", "W_v2m.weight", "W_v2m.bias",
           "ret_embedding", "logit_scale"}  # fmt: skip


def make(folder, seed=0, **fields):
    text, clip = make_towers(folder, "opt", seed)
    model = FromageModel.from_pretrained_towers(text, clip, make_processor(2), **{"shared_dim": 12, **fields})
    return model.eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Not to be changed by a test."""
    return make(tmp_path_factory.mktemp("fromage"))


def rows_of(n=8):
    return [
        {"id": str(i), "image": {"bytes": encode(picture(i)), "path": None}, "captions": [WORDS[i % 8]]}
        for i in range(n)
    ]


def trainer_of(model, folder, callbacks=(), **arguments):
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 5, "learning_rate": 1e-2,
        "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, **arguments,
    }  # fmt: skip
    return UniMuRTrainer(
        model=model, args=UniMuRTrainingArguments(**arguments), train_dataset=rows_of(),
        data_collator=FromageCollator(model.processor), callbacks=[RescaleRet(), *callbacks],
    )  # fmt: skip


def inputs_of(model, n=3, concatenate=0.0):
    batch = FromageCollator(model.processor, concatenate=concatenate)(rows_of(n))
    return {name: value for name, value in batch.items() if name not in ("skipped", "n_seen")}


def row_of(model, image_first):
    """Ids and labels of one caption by hand, letter by letter."""
    tokenizer, processor = model.processor.tokenizer, model.processor
    ids = [tokenizer.convert_tokens_to_ids("Ġ" if letter == " " else letter) for letter in image_first]
    return [processor.image_token_id] * 2 + ids + [2], [-100] * 2 + ids + [2]


def test_configuration_refuses_what_fromage_does_not_have():
    assert FromageConfig().train_ret_embedding and FromageConfig(shared_dim=7).embedding_width == 7
    for wrong in (
        {"image_feature": "projected"},
        {"text_candidates": "clip_text"},
        {"lambda2": 1.0},
        {"shared_dim": 0},
    ):
        # Strict dataclasses wrap a ValueError.
        with pytest.raises(Exception, match=next(iter(wrong))):
            FromageConfig(**wrong)


def test_a_linear_map_starts_at_its_own_scale(model):
    bound = 32**-0.5
    for module in (model.W_i2t, model.W_t2m, model.W_v2m):
        assert 0.8 * bound < module.weight.abs().max() <= bound


@pytest.mark.parametrize("full", [False, True])
def test_saved_equals_loaded(model, tmp_path, full):
    model.save_pretrained(tmp_path, with_towers=full)
    keys = set(load_file(tmp_path / "model.safetensors"))
    assert keys > TRAINED if full else keys == TRAINED
    assert not list(tmp_path.glob("fromage*.py"))
    again = FromageModel.from_pretrained(tmp_path)
    assert again.config.is_adapter is not full and again.config.shared_dim == 12
    assert torch.equal(again.embed_dialogues(DIALOGUES), model.embed_dialogues(DIALOGUES))
    assert torch.equal(again.embed_images([picture(2)]), model.embed_images([picture(2)]))
    assert again.fingerprint == model.fingerprint
    assert {n for n, p in again.named_parameters() if p.requires_grad} == TRAINED


def test_towers_of_another_width_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "c")
    narrow, _ = make_towers(tmp_path / "t", "opt-350m")
    with pytest.raises(ValueError, match="has shape"):
        FromageModel.from_pretrained(tmp_path / "c", text_model_name_or_path=str(narrow))


@torch.no_grad()
def test_embeddings_are_the_linear_maps_of_the_towers(model):
    pixels = model.processor.pixels([picture(3)])
    pooled = model.clip.vision_model(pixels).pooler_output
    image = F.normalize(pooled @ model.W_v2m.weight.T + model.W_v2m.bias, dim=-1)
    assert torch.allclose(model.embed_images([picture(3)]), image, atol=1e-6)
    ids = torch.tensor([[2, *(model.processor.tokenizer.convert_tokens_to_ids(list("hi")))]])
    table = model.language_model.get_input_embeddings()
    inputs = torch.cat([table(ids), model.ret_embedding[None, None]], dim=1)
    h = model.language_model.base_model(inputs_embeds=inputs).last_hidden_state[:, -1]
    text = F.normalize(h @ model.W_t2m.weight.T + model.W_t2m.bias, dim=-1)
    assert torch.allclose(model.embed_texts(["hi"]), text, atol=1e-6)
    assert torch.allclose(model.embed_dialogues(["hi"]), text, atol=1e-6)


def test_concatenated_captions_equal_sequences_made_by_hand(model):
    batch = inputs_of(model, 5, concatenate=1.0)
    parts = [row_of(model, word) for word in WORDS[:5]]
    expected = [
        ([2] + parts[a][0] + (parts[b][0] if b else []), [-100] + parts[a][1] + (parts[b][1] if b else []))
        for a, b in ((0, 1), (2, 3), (4, None))
    ]
    for row, (ids, labels) in enumerate(expected):
        size = int(batch["attention_mask"][row].sum())
        assert batch["input_ids"][row, :size].tolist() == ids
        assert batch["labels"][row, :size].tolist() == labels
        assert (batch["labels"][row, size:] == -100).all() and not batch["attention_mask"][row, size:].any()
    assert batch["image_indices"].tolist() == [0, 1, 2, 3, 4] and len(batch["ret_input_ids"]) == 5
    apart = inputs_of(model, 5)
    assert len(apart["input_ids"]) == 5 and len(batch["input_ids"]) == 3


def test_concatenation_is_drawn_with_its_probability_and_only_where_it_fits(model):
    rows = rows_of(2)
    collator = FromageCollator(model.processor, concatenate=0.5)
    drawn = []
    for collator.epoch in range(200):
        drawn.append(len(collator(rows)["input_ids"]) == 1)
    assert 0.38 < sum(drawn) / 200 < 0.62
    short = make_processor(2, max_length=22)  # 1 + 2 x (2 slots + caption + EOS): 25 positions together
    batch = PairCollator(short)(rows)
    assert torch.equal(concatenated(batch, short)["input_ids"], batch["input_ids"])
    with pytest.raises(ValueError, match="probability"):
        FromageCollator(model.processor, concatenate=1.5)


@torch.no_grad()
def test_losses_equal_a_computation_row_by_row(model):
    outputs = model(**inputs_of(model, 4, concatenate=1.0))
    lm, ret, table = model.language_model, model.ret_embedding, model.language_model.get_input_embeddings().weight
    vocabulary = torch.cat([table, ret[None]])
    pooled = model.clip.vision_model(model.processor.pixels([picture(i) for i in range(4)])).pooler_output
    visual = model.W_i2t(pooled).reshape(4, 2, 32)

    captions, losses = [row_of(model, word)[0][2:] for word in WORDS[:4]], []
    for a, b in ((0, 1), (2, 3)):
        inputs = torch.cat([table[[2]], visual[a], table[captions[a]], visual[b], table[captions[b]]])
        h = lm.base_model(inputs_embeds=inputs[None]).last_hidden_state[0]
        log = F.log_softmax(h @ vocabulary.T, dim=-1)
        at = 3
        for words in (captions[a], captions[b]):
            losses += [-log[at + i - 1, word] for i, word in enumerate(words)]
            at += len(words) + 2
    assert torch.allclose(outputs.loss_cap, torch.stack(losses).mean(), atol=1e-5)

    losses, ends = [], []
    for words in captions:
        words = words[:-1]
        h = lm.base_model(inputs_embeds=torch.cat([table[[2]], table[words], ret[None]])[None]).last_hidden_state[0]
        log = F.log_softmax(h @ vocabulary.T, dim=-1)
        losses += [-log[i, word] for i, word in enumerate([*words, len(vocabulary) - 1])]  # [RET] itself included
        ends.append(h[-1])
    assert torch.allclose(outputs.loss_ret, torch.stack(losses).mean(), atol=1e-5)

    scores = F.normalize(model.W_t2m(torch.stack(ends)), dim=-1) @ F.normalize(model.W_v2m(pooled), dim=-1).T / 0.07
    both = [F.cross_entropy(s, torch.arange(4)) for s in (scores, scores.T)]
    assert torch.allclose(outputs.loss_vm, (both[0] + both[1]) / 2, atol=1e-4)
    assert torch.allclose(outputs.loss, outputs.loss_cap + outputs.loss_ret + outputs.loss_vm)
    with pytest.raises(ValueError, match="labels"):
        model()


def test_cached_features_give_the_same_loss(model):
    batch = inputs_of(model)
    expected = model(**batch).loss
    batch["image_features"] = model.encode_images(batch.pop("pixel_values"))[0]
    assert torch.equal(model(**batch).loss, expected)


def test_training_follows_the_norm_rule_and_leaves_the_towers(tmp_path):
    model = make(tmp_path / "t")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mean = model.language_model.get_input_embeddings().weight.norm(dim=1).mean()
    norms = []

    class Norms(RescaleRet):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            norms.append(model.ret_embedding.norm().item())

    assert not math.isclose(model.ret_embedding.norm().item(), mean.item(), rel_tol=1e-2)
    trainer = trainer_of(model, tmp_path, [Norms()], gradient_accumulation_steps=2)
    trainer.train()
    assert len(norms) == 5 and all(math.isclose(norm, mean.item(), rel_tol=1e-5) for norm in norms)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == TRAINED
    held = sum(p.numel() for group in trainer.optimizer.param_groups for p in group["params"])
    assert held == sum(before[name].numel() for name in TRAINED)
    start, end = before["ret_embedding"], model.ret_embedding.detach()
    assert F.cosine_similarity(start, end, dim=0) < 0.999  # turned, not only rescaled


def test_a_short_run_lowers_every_loss(tmp_path):
    trainer = trainer_of(
        make(tmp_path / "t"), tmp_path, max_steps=40, per_device_train_batch_size=8, learning_rate=3e-2
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss_vm" in entry]
    # A random LLM can be steered only so far by what it reads.
    for name, share in (("loss_cap", 0.95), ("loss_ret", 0.97), ("loss_vm", 0.5)):
        assert float(log[-1][name]) < share * float(log[0][name]), name


def test_training_on_the_miniature_makes_a_checkpoint_that_loads(tmp_path):
    import datasets

    text, clip = make_towers(tmp_path / "towers")
    rows = [{**row, "source": None, "license": None, "url": None} for row in rows_of()]
    miniature = SimpleNamespace(
        text_model=str(text), clip_model=str(clip), pairs=datasets.Dataset.from_list(rows, features=FEATURES)
    )
    checkpoint = train_fromage(
        tmp_path / "out", miniature, 3, learning_rate=1e-2, max_steps=12, per_device_train_batch_size=8,
        gradient_accumulation_steps=1, warmup_steps=0, logging_steps=1,
    )  # fmt: skip
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert float(log[10]["loss_vm"]) < float(log[0]["loss_vm"])
    model = FromageModel.from_pretrained(checkpoint)
    assert model.processor.n_visual_tokens == model.config.n_visual_tokens == 6
    table = model.language_model.get_input_embeddings().weight
    assert math.isclose(model.ret_embedding.norm().item(), table.norm(dim=1).mean().item(), rel_tol=1e-5)


@torch.no_grad()
def one_by_one(model, dialogue, limit):
    """The tokens of a reply without a cache, a batch or padding, [RET] being the last of the vocabulary."""
    inputs = model.processor.contexts([dialogue], end_with_ret=False)
    features = model.encode_images(inputs["pixel_values"])[0] if "pixel_values" in inputs else None
    embeds = model.input_embeddings(inputs["input_ids"], features)
    table = torch.cat([model.language_model.get_input_embeddings().weight, model.ret_embedding[None]])
    said = []
    for _ in range(limit):
        h = model.language_model.base_model(inputs_embeds=embeds).last_hidden_state[0, -1]
        said.append(int((table @ h).argmax()))
        embeds = torch.cat([embeds, table[said[-1]][None, None]], dim=1)
    return said


def test_an_image_is_shown_where_the_reply_holds_ret(model):
    """Over several [RET]s, so that both answers occur, early and late."""
    ret = model.language_model.get_input_embeddings().weight.shape[0]
    newline = model.processor.tokenizer.convert_tokens_to_ids("Ċ")
    many = [*DIALOGUES, *WORDS]
    kept = model.ret_embedding.detach().clone()
    seen, late = set(), 0
    try:
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            model.ret_embedding.data.copy_(torch.randn(32, generator=generator) * 0.4)
            expected = []
            for dialogue in many:
                reply = one_by_one(model, dialogue, 8)
                end = reply.index(newline, 1) if newline in reply[1:] else len(reply)
                expected.append(ret in reply[:end])
                late += ret in reply[2:end] and ret not in reply[:2]
            found = Fromage(model, max_new_tokens=8).shows_image(many)
            assert found.tolist() == expected
            assert torch.equal(torch.cat([model.says_ret([d], 8) for d in many]), found)
            assert torch.equal(model.says_ret(many, 8, batch_size=5), found)
            seen |= set(expected)
    finally:
        model.ret_embedding.data.copy_(kept)
    assert seen == {True, False} and late


@pytest.mark.parametrize(
    ("reply", "shown"), [("aR", True), ("a\nR", False), ("\nR", True), ("abc", False), ("abcR", False)]
)
def test_a_reply_ends_at_its_newline_and_at_its_length(model, monkeypatch, reply, shown):
    ids = {"R": -1, "\n": model.processor.tokenizer.convert_tokens_to_ids("Ċ"), "a": 10, "b": 11, "c": 12}
    script = iter(reply.ljust(3, "c"))

    def scripted(hidden):
        logits = torch.zeros(len(hidden), 100)
        logits[0, ids[next(script)]] = 1
        logits[1, ids["b"]] = 1  # beside it one that never ends
        return logits

    monkeypatch.setattr(model, "vocabulary_logits", scripted)
    assert model.says_ret(["hello", "look"], max_new_tokens=3).tolist() == [shown, False]


def test_embeddings_do_not_depend_on_the_batch(model):
    together = model.embed_dialogues(DIALOGUES)
    assert torch.allclose(together, torch.cat([model.embed_dialogues([d]) for d in DIALOGUES]), atol=1e-5)
    assert together.shape == (4, 12) and torch.allclose(together.norm(dim=1), torch.ones(4))
    assert model.embed_images([picture(1)]).shape == (1, 12)
