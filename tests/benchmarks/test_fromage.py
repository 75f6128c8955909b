"""FROMAGe: its losses by hand, its norm rule, its checkpoints, and its replies one by one."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from benchmarks.baselines.fromage import Fromage, FromageConfig, FromageModel
from benchmarks.baselines.fromage_train import FromageCollator, RescaleRet, train_fromage
from tests.benchmarks.tiny_fromage import WORDS, ids_of, inputs_of, make, rows_of
from tests.conftest import picture
from tests.tiny import make_towers
from train.rows import FEATURES
from train.trainer import UniMuRTrainer
from train.training_arguments import UniMuRTrainingArguments

DIALOGUES = ["hello", ["look", picture(1), "how nice it is"], [picture(2)], "what does it look like?\nshow me"]
TRAINED = {"W_i2t.weight", "W_i2t.bias", "W_t2m.weight", "W_t2m.bias", "W_v2m.weight", "W_v2m.bias",
           "ret_embedding", "logit_scale"}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Not to be changed by a test."""
    return make(tmp_path_factory.mktemp("fromage"))


def trainer_of(model, folder, callbacks=(), **arguments):
    arguments = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 5, "learning_rate": 1e-2,
        "warmup_steps": 0, "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, **arguments,
    }  # fmt: skip
    return UniMuRTrainer(
        model=model, args=UniMuRTrainingArguments(**arguments), train_dataset=rows_of(),
        data_collator=FromageCollator(model.processor), callbacks=[RescaleRet(), *callbacks],
    )  # fmt: skip


def test_configuration_refuses_what_fromage_does_not_have():
    assert FromageConfig().train_ret_embedding and FromageConfig(shared_dim=7).embedding_width == 7
    for wrong in (
        {"image_feature": "projected"},
        {"text_candidates": "clip_text"},
        {"lambda2": 1.0},
        {"ret_prompt": "Keywords:"},
        {"alignment": "canonical", "shared_width": 8},
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
    assert torch.allclose(again.embed_dialogues(DIALOGUES), model.embed_dialogues(DIALOGUES), atol=1e-6)
    assert torch.allclose(again.embed_images([picture(2)]), model.embed_images([picture(2)]), atol=1e-6)
    assert again.fingerprint == model.fingerprint
    assert {n for n, p in again.named_parameters() if p.requires_grad} == TRAINED


def test_towers_of_another_width_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "c")
    narrow, _ = make_towers(tmp_path / "t", "opt-350m")
    with pytest.raises(ValueError, match="were made for towers of text_width"):
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


@torch.no_grad()
def test_losses_equal_a_computation_row_by_row(model):
    outputs = model(**inputs_of(model, 4, concatenate=1.0))
    lm, ret, table = model.language_model, model.ret_embedding, model.language_model.get_input_embeddings().weight
    vocabulary = torch.cat([table, ret[None]])
    pooled = model.clip.vision_model(model.processor.pixels([picture(i) for i in range(4)])).pooler_output
    visual = model.W_i2t(pooled).reshape(4, 2, 32)

    captions, losses = [ids_of(model, word) for word in WORDS[:4]], []
    for a, b in ((0, 1), (2, 3)):
        inputs = torch.cat([visual[a], table[[2, *captions[a]]], visual[b], table[[2, *captions[b]]]])
        h = lm.base_model(inputs_embeds=inputs[None]).last_hidden_state[0]
        log = F.log_softmax(h @ vocabulary.T, dim=-1)
        at = 2
        for words in (captions[a], captions[b]):
            losses += [-log[at + i - 1, word] for i, word in enumerate([2, *words])]  # BOS is predicted from the image
            at += len(words) + 3
    assert torch.allclose(outputs.loss_cap, torch.stack(losses).mean(), atol=1e-5)

    losses, ends = [], []
    for words in captions:
        h = lm.base_model(inputs_embeds=torch.cat([table[[2]], table[words], ret[None]])[None]).last_hidden_state[0]
        log = F.log_softmax(h @ vocabulary.T, dim=-1)
        losses += [-log[i, word] for i, word in enumerate([*words, len(vocabulary) - 1])]  # [RET] itself included
        ends.append(h[-1])
    assert torch.allclose(outputs.loss_ret, torch.stack(losses).mean(), atol=1e-5)

    scores = F.normalize(model.W_t2m(torch.stack(ends)), dim=-1) @ F.normalize(model.W_v2m(pooled), dim=-1).T / 0.07
    both = [F.cross_entropy(s, torch.arange(4)) for s in (scores, scores.T)]
    assert torch.allclose(outputs.loss_vm, (both[0] + both[1]) / 2, atol=1e-4)
    assert torch.allclose(outputs.loss, outputs.loss_cap + outputs.loss_ret + outputs.loss_vm)
    with pytest.raises(ValueError, match="give captions, contexts"):
        model()


def test_cached_features_give_the_same_loss(model):
    batch = inputs_of(model)
    expected = model(**batch).loss
    batch["images"] = {"features": model.encode_images(batch["images"]["pixel_values"])[0]}
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
    rows = [{**row, "source": None, "license": None, "url": None, "problem": None} for row in rows_of()]
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
    """The tokens of a reply and the outputs at them, without a cache, a batch or padding; [RET] is the last token."""
    inputs = model.processor.contexts([dialogue], end_with_ret=False)
    features = model.encode_images(inputs["pixel_values"])[0] if "pixel_values" in inputs else None
    embeds = model.input_embeddings(inputs["input_ids"], features)
    table = torch.cat([model.language_model.get_input_embeddings().weight, model.ret_embedding[None]])
    tokens, start = [], embeds.shape[1]
    for _ in range(limit):
        h = model.language_model.base_model(inputs_embeds=embeds).last_hidden_state[0, -1]
        tokens.append(int((table @ h).argmax()))
        embeds = torch.cat([embeds, table[tokens[-1]][None, None]], dim=1)
    return tokens, model.language_model.base_model(inputs_embeds=embeds).last_hidden_state[0, start:]


@torch.no_grad()
def test_the_query_for_an_image_is_the_ret_in_the_reply(model):
    """Over several [RET]s, so that replies with and without it occur, and early and late ones."""
    ret = model.language_model.get_input_embeddings().weight.shape[0]
    newline = model.processor.tokenizer.convert_tokens_to_ids("Ċ")
    many = [*DIALOGUES, *WORDS]
    kept = model.ret_embedding.detach().clone()
    answers, late = set(), 0
    try:
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            model.ret_embedding.data.copy_(torch.randn(32, generator=generator) * 0.4)
            replies = Fromage(model, max_new_tokens=8).image_replies(many)
            for dialogue, has_ret, query in zip(many, replies.with_image, replies.queries, strict=True):
                tokens, states = one_by_one(model, dialogue, 8)
                end = tokens.index(newline, 1) if newline in tokens[1:] else len(tokens)
                assert bool(has_ret) == (ret in tokens[:end])
                if not has_ret:
                    continue
                at = tokens.index(ret)
                expected = F.normalize(model.W_t2m(states[at]), dim=-1)
                assert torch.allclose(query, expected, atol=1e-4)
                forced = model.embed_dialogues([dialogue])[0]
                late += at > 1 and not torch.allclose(forced, query, atol=1e-2)
            answers |= set(replies.with_image.tolist())
            few = model.image_replies(many, 8, batch_size=5)
            assert torch.equal(few.with_image, replies.with_image)
            assert torch.allclose(few.queries, replies.queries, atol=1e-4)
    finally:
        model.ret_embedding.data.copy_(kept)
    assert answers == {True, False} and late


def test_no_dialogue_has_no_reply(model):
    replies = model.image_replies([])
    assert replies.with_image.shape == (0,) and replies.queries.shape == (0, 12)


@pytest.mark.parametrize(
    ("reply", "has_ret"),
    [("aR", True), ("a\nR", False), ("\nR", True), ("abc", False), ("abcR", False), ("abR", True)],
)
def test_a_reply_ends_at_its_newline_and_at_its_length(model, monkeypatch, reply, has_ret):
    ids = {"R": -1, "\n": model.processor.tokenizer.convert_tokens_to_ids("Ċ"), "a": 10, "b": 11, "c": 12}
    script = iter(reply.ljust(3, "c"))

    def scripted(hidden):
        logits = torch.zeros(len(hidden), 100)
        logits[0, ids[next(script)]] = 1
        logits[1, ids["b"]] = 1  # and next to it a reply that never ends
        return logits

    monkeypatch.setattr(model, "vocabulary_logits", scripted)
    replies = model.image_replies(["hello", "look"], max_new_tokens=3)
    assert replies.with_image.tolist() == [has_ret, False]
    table = model.language_model.get_input_embeddings().weight
    bias = F.normalize(model.W_t2m.bias, dim=-1)
    assert torch.allclose(replies.queries[1], bias, atol=1e-6)  # no [RET], so the state is zero
    if has_ret:
        words = [ids[c] for c in reply[: reply.index("R")]]
        inputs = torch.cat([table[ids_of(model, "BOS", "hello")], table[words], model.ret_embedding[None]])
        h = model.language_model.base_model(inputs_embeds=inputs[None]).last_hidden_state[0, -1]
        assert torch.allclose(replies.queries[0], F.normalize(model.W_t2m(h), dim=-1), atol=1e-5)


def test_embeddings_do_not_depend_on_the_batch(model):
    together = model.embed_dialogues(DIALOGUES)
    assert torch.allclose(together, torch.cat([model.embed_dialogues([d]) for d in DIALOGUES]), atol=1e-5)
    assert together.shape == (4, 12) and torch.allclose(together.norm(dim=1), torch.ones(4))
    assert model.embed_images([picture(1)]).shape == (1, 12)
