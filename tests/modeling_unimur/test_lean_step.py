"""The lean step is the plain step: packing, chunked cross-entropy, no logits where none are needed, no gradient for towers."""

import pytest
import torch
import torch.nn.functional as F

from modeling_unimur.losses_unimur import caption_loss, linear_caption_loss
from modeling_unimur.packing_unimur import block_mask, plan_packing, positions
from tests.conftest import KINDS, picture

CAPTIONS = ["a", "a panda in a red hat eats bamboo", "two dogs", "what does it look like?", "thanks!", "x" * 60]


def batch_of(model, pack):
    items = [
        {"caption": (i, caption), "context": [[caption]], "image": i, "text": caption}
        for i, caption in enumerate(CAPTIONS)
    ]
    items.append({"caption": None, "context": [["look", 0], ["and", 1, "then?"]], "image": 2, "text": "so"})
    return model.processor.documents(items, [picture(i) for i in range(len(CAPTIONS))], pack=pack)


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    outputs = model(**batch)
    outputs.loss.backward()
    return outputs, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("width", [None, 9])
def test_a_plan_puts_every_position_somewhere_once(width):
    lengths = [3, 1, 7, 2, 5, 5]
    plan = plan_packing(lengths, row_length=8, width=width)
    rows = torch.arange(6 * 9)[: 6 * (width or 7)].reshape(6, -1)  # right-padded, each position its own number
    packed = rows.flatten()[plan["index"]]
    back = packed.flatten()[plan["unpack"]]
    for row, length in enumerate(lengths):
        assert torch.equal(back[row, :length], rows[row, :length])
    assert int((plan["segments"] > 0).sum()) == sum(lengths)
    assert plan["index"].numel() < 6 * 7  # fewer positions than padded
    assert plan_packing([9], row_length=4)["index"].shape == (1, 9)


def test_positions_start_again_and_the_mask_keeps_sequences_apart():
    segments = torch.tensor([[1, 1, 2, 2, 2, 0]])
    assert positions(segments).tolist() == [[0, 1, 0, 1, 2, 0]]
    seen = (block_mask(segments, torch.float32) == 0)[0, 0]
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_losses_and_gradients_are_the_padded_ones(fresh, kind, attention):
    model = fresh(kind, train_ret_embedding=True)
    model.language_model.set_attn_implementation(attention)
    padded, expected = gradients(model, batch_of(model, pack=False))
    packed, actual = gradients(model, batch_of(model, pack=True))
    for name in ("loss_cap", "loss_vm", "loss_tm"):
        assert torch.allclose(packed[name], padded[name], atol=1e-5), name
    assert set(actual) == set(expected) == {
        "W_i2t.weight", "W_i2t.bias", "W_t2m.weight", "W_t2m.bias", "ret_embedding", "logit_scale"}  # fmt: skip
    for name, gradient in expected.items():
        assert torch.allclose(actual[name], gradient, atol=1e-5 * float(gradient.abs().max() + 1)), name


@pytest.mark.parametrize("bias", [False, True])
def test_chunked_cross_entropy_is_the_plain_one(bias):
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=bias).requires_grad_(False)
    hidden, labels = torch.randn(23, 8), torch.randint(50, (23,))
    results = []
    for chunk_elements in (10**6, 200):  # at once; 4 rows at a time
        given = hidden.clone().requires_grad_(True)
        loss = linear_caption_loss(given, head, labels, chunk_elements)
        (3 * loss).backward()
        results.append((loss.detach(), given.grad))
    assert torch.allclose(results[0][0], caption_loss(head(hidden), labels))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)
    assert linear_caption_loss(hidden[:0], head, labels[:0]).item() == 0


def test_a_captions_last_token_is_not_read(fresh):
    model = fresh()
    batch = batch_of(model, pack=True)
    captions = batch["captions"]
    assert int((captions["packing"]["segments"] > 0).sum()) == int(captions["attention_mask"].sum()) - len(CAPTIONS)
    last = captions["attention_mask"].sum(1) - 1
    changed = captions["input_ids"].clone()
    changed[torch.arange(len(CAPTIONS)), last] = 7
    other = batch | {"captions": captions | {"input_ids": changed}}
    assert torch.equal(model(**other).loss_cap, model(**batch).loss_cap)


def test_the_logits_of_a_batch_never_exist_at_once(fresh, monkeypatch):
    model = fresh()
    largest = 0
    plain = F.linear

    def watched(given, weight, bias=None):
        nonlocal largest
        result = plain(given, weight, bias)
        if weight.shape[0] == model.language_model.config.vocab_size:
            largest = max(largest, result.numel())
        return result

    import modeling_unimur.losses_unimur as losses

    monkeypatch.setattr(losses.F, "linear", watched)
    hidden, labels = torch.randn(64, 32), torch.randint(90, (64,))
    head = model.language_model.get_output_embeddings()
    linear_caption_loss(hidden.requires_grad_(True), head, labels, chunk_elements=8 * head.weight.shape[0])
    assert largest == 8 * head.weight.shape[0]


def test_with_ret_frozen_the_retrieval_pass_of_pairs_has_no_backward(fresh):
    model = fresh()
    batch = model.processor.pairs([picture(0)], ["a"])
    states = model.ret_states(batch["contexts"]["input_ids"], batch["contexts"]["attention_mask"])
    assert not states.requires_grad


def test_activation_checkpointing_engages_and_changes_nothing(fresh):
    model = fresh()
    _, expected = gradients(model, batch_of(model, pack=True))
    model.gradient_checkpointing_enable()
    model.train()
    runs = []
    layer = model.language_model.base_model.get_decoder().layers[0] if hasattr(
        model.language_model.base_model, "get_decoder") else model.language_model.base_model.decoder.layers[0]  # fmt: skip
    layer.fc1.register_forward_hook(lambda *_: runs.append(1))
    _, actual = gradients(model, batch_of(model, pack=True))
    assert len(runs) == 4  # two passes, each again in the backward pass (a context shows images)
    for name, gradient in expected.items():
        assert torch.allclose(actual[name], gradient, atol=1e-6), name
    assert not layer.fc1.training
