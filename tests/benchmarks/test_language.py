"""Likelihoods over a packed, shared context against the plain way, and greedy answers."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks import language
from benchmarks.language import LanguageSystem
from tests.conftest import KINDS, picture

OPTIONS = ["yes", "it is a panda in a red hat", "no.", "bamboo, of course", "a", "the forest and the moon"]


def system(model):
    made = LanguageSystem()
    made.model = model
    return made


def plain(model, context, option, own_bos):
    """One option, one full pass, the losses of its tokens and of the context's: what is to be reproduced."""
    inputs = model.processor.contexts([context], end_with_ret=False)
    tokenizer = model.processor.tokenizer
    row = ([tokenizer.bos_token_id] if own_bos else []) + tokenizer(option, add_special_tokens=False)["input_ids"]
    ids = torch.cat([inputs["input_ids"], torch.tensor([row])], 1)
    features = model.encode_images(inputs["pixel_values"])[0] if "pixel_values" in inputs else None
    logits = model.language_model(inputs_embeds=model.input_embeddings(ids, features)).logits[0]
    is_word, n = ids[0] != model.config.image_token_id, len(row)
    safe = ids[0].masked_fill(~is_word, 0)
    unshifted = F.cross_entropy(logits, safe, reduction="none") * is_word
    shifted = torch.cat([torch.zeros(1), F.cross_entropy(logits[:-1], safe[1:], reduction="none")]) * is_word
    counted = {True: is_word[1:].sum(), False: is_word.sum()}  # as a causal LM's own loss counts
    return {True: (shifted[-n:].sum(), shifted.sum()), False: (unshifted[-n:].sum(), unshifted.sum())}, n, counted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("own_bos", [False, True])
@torch.no_grad()
def test_likelihoods_equal_a_full_pass_per_option(tiny, kind, own_bos, monkeypatch):
    monkeypatch.setattr(language, "CHUNK", 40)  # several packed passes
    model = tiny(kind)
    contexts = [["what does it eat?"], [picture(1), "what does it wear?\nA:"]]
    likelihoods = system(model).likelihoods(contexts, [OPTIONS, OPTIONS], own_bos=own_bos)
    for context, got in zip(contexts, likelihoods, strict=True):
        for i, option in enumerate(OPTIONS):
            losses, n, total = plain(model, context, option, own_bos)
            for shift in (True, False):
                own, everything = losses[shift]
                for reduction, scope, wanted in (
                    ("sum", "candidate", own),
                    ("mean", "candidate", own / n),
                    ("mean", "all", everything / total[shift]),
                    ("sum", "all", everything),
                ):
                    score = got.scores(shift=shift, reduction=reduction, scope=scope)[i]
                    torch.testing.assert_close(-score, wanted, rtol=1e-4, atol=1e-3)


def test_shifted_and_unshifted_scores_differ(tiny):
    got = system(tiny()).likelihoods([["what does it eat?"]], [OPTIONS])[0]
    assert not torch.allclose(got.scores(shift=True), got.scores(shift=False), atol=0.1)


def test_a_candidate_without_a_token_is_named(tiny):
    with pytest.raises(ValueError, match="'' has no token"):
        system(tiny()).likelihoods([["hello"]], [["yes", ""]])


def test_a_long_context_leaves_room_for_the_candidates(tiny):
    got = system(tiny()).likelihoods([["x" * 300]], [OPTIONS])[0]
    assert torch.isfinite(got.scores()).all()


@torch.no_grad()
def test_answers_are_the_greedy_continuation_in_any_batch(tiny):
    model = tiny()
    contexts = [["what?"], [picture(1), "a much longer question about this picture?"], ["and now?"]]
    together = system(model).answers(contexts, max_new_tokens=6)
    alone = [system(model).answers([c], max_new_tokens=6)[0] for c in contexts]
    assert together == alone

    inputs = model.processor.contexts([contexts[0]], end_with_ret=False)
    embeds, tokens = model.input_embeddings(inputs["input_ids"]), []
    for _ in range(6):
        tokens.append(int(model.language_model(inputs_embeds=embeds).logits[0, -1].argmax()))
        embeds = torch.cat([embeds, model.language_model.get_input_embeddings()(torch.tensor([tokens[-1:]]))], 1)
    eos = model.processor.tokenizer.eos_token_id
    tokens = tokens[: tokens.index(eos)] if eos in tokens else tokens
    wanted = model.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip().split("\n")[0].strip()
    assert together[0] == wanted
