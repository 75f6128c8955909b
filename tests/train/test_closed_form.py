"""The closed forms: one pass over the data, and a training of its own."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from modeling_unimur import UniMuRModel
from tests.conftest import picture
from tests.train.test_run import base, folder  # noqa: F401  a fixture
from train import closed_form
from train.canonical import STATE
from train.closed_form import DOCUMENT_VIEWS, PAIR_VIEWS, ClosedForm, Grid, solve_canonical, solve_paper, sum_pairs
from train.collate import PairCollator, SkipCounter, TooManyBadPairsError
from train.held_out import HeldOut, few_or_part
from train.miniature import encode
from train.moments import Moments
from train.ridge import matching_map, ridge_map
from train.run import main
from train.sums import Sums

SMALL = Grid(widths=(3, 6), ridges=(1e-3, 1e-1), powers=(1.0, 2.0))


def rows(n=600, seed=0, captions=2):
    """Pairs whose states and images share six causes; a caption more repeats the image."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng)  # noqa: E731
    mix = torch.Generator().manual_seed(7)
    of_state, of_image, of_text = (torch.randn(8, width, generator=mix) for width in (16, 12, 10))
    cause = draw(n, 6).repeat_interleave(captions, 0)
    image = torch.cat([cause, draw(n, 2).repeat_interleave(captions, 0)], 1) @ of_image
    return {
        STATE: torch.cat([cause + 0.2 * draw(n * captions, 6), draw(n * captions, 2)], 1) @ of_state + 3,
        "pooled": image - 9, "projected": F.normalize(image[:, :10] + 4, dim=1),
        "text": F.normalize(torch.cat([cause, draw(n * captions, 2)], 1) @ of_text, dim=1), "words": cause @ of_state[:6],
    }, [f"pair {i}" for i in range(n) for _ in range(captions)]  # fmt: skip


def summed(given, order=None, step=64):
    values, names = given
    order = torch.arange(len(names)) if order is None else order
    sums = Sums(PAIR_VIEWS)
    for at in order.split(step):
        sums.add({view: value[at] for view, value in values.items()}, [names[i] for i in at])
    return sums.finish()


def test_every_row_counts_and_the_choice_is_made_on_others():
    sums = summed(rows())
    held = sum(len(r[STATE]) for r in sums.held.rows())
    assert sums.moments.count + held == 1200 and 60 < held < 200
    solved = solve_canonical(sums, grid=SMALL)
    assert solved.pairs == 1200 and solved.score == max(solved.recall.values()) > 0.5
    assert len(solved.recall) == 2 * 2 * 2 * 2
    chosen = next(s for s, recall in solved.recall.items() if recall == solved.score)
    assert asdict(chosen) == solved.setting
    weight, bias = solved.maps["W_t2m"]
    assert weight.dtype == torch.float32 and weight.shape == (chosen.width, 16)
    # Centred on all rows, those held out too.
    assert (rows()[0][STATE] @ weight.T + bias).mean(0).abs().max() < 1e-5


def test_the_order_and_the_size_of_batches_do_not_matter():
    given = rows()
    # All captions of a pair come in one batch, as they do from the collator.
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1))
    order = torch.stack([2 * order, 2 * order + 1], 1).flatten()
    a, b = solve_canonical(summed(given), grid=SMALL), solve_canonical(summed(given, order, step=14), grid=SMALL)
    assert a.setting == b.setting and a.recall == pytest.approx(b.recall, abs=0.01)
    x, y = (F.normalize(given[0][STATE] @ s.maps["W_t2m"][0].T + s.maps["W_t2m"][1], dim=1) for s in (a, b))
    torch.testing.assert_close(x @ x.T, y @ y.T, atol=1e-4, rtol=0)
    again = solve_canonical(summed(given), grid=SMALL)
    assert all(torch.equal(p, q) for n in a.maps for p, q in zip(a.maps[n], again.maps[n], strict=True))


def test_documents_change_the_solution_towards_their_own_replies():
    pairs = summed(rows(400))
    values, names = rows(400, seed=3, captions=1)
    turned = values[STATE].roll(5, dims=1)  # contexts that speak another way than captions
    documents = Sums(DOCUMENT_VIEWS)
    for at in torch.arange(400).split(50):
        views = {view: value[at] for view, value in (values | {STATE: turned}).items() if view in DOCUMENT_VIEWS}
        documents.add(views, [names[i] for i in at])
    documents.finish()
    for row in documents.held.rows():  # one of each, as documents are held
        for view in DOCUMENT_VIEWS:
            row[view] = row[view][0]
    alone, both = solve_canonical(pairs, None, SMALL), solve_canonical(pairs, documents, SMALL)
    assert both.documents == 400 and both.setting["document_share"] in SMALL.document_shares

    def recall(solved):
        queries, images = (values | {STATE: turned})[STATE], values[solved.setting["feature"]]
        q = F.normalize(queries @ solved.maps["W_t2m"][0].T + solved.maps["W_t2m"][1], dim=1)
        v = F.normalize(images @ solved.maps["W_v2m"][0].T + solved.maps["W_v2m"][1], dim=1)
        return ((q @ v.T).argmax(1) == torch.arange(400)).float().mean()

    assert recall(both) > recall(alone) + 0.1


def test_few_pairs_shrink_the_width_and_too_few_are_refused(caplog):
    with caplog.at_level("WARNING"):
        solved = solve_canonical(summed(rows(n=8, captions=1)), grid=Grid(widths=(32,)))
    assert solved.setting["width"] < 8 and "canonical directions, fewer than 32" in caplog.text
    assert all(torch.isfinite(t).all() for pair in solved.maps.values() for t in pair)
    for count in (0, 1):
        sums = Sums(PAIR_VIEWS)
        if count:
            sums.fit({view: value[:1] for view, value in rows()[0].items()})
        with pytest.raises(ValueError, match="at least two pairs"):
            solve_canonical(sums)
    still = rows()
    still[0]["pooled"] = torch.ones_like(still[0]["pooled"])
    with pytest.raises(ValueError, match="the pooled of a pair does not vary"):
        solve_canonical(summed(still), grid=SMALL)


@pytest.mark.parametrize("solve", [solve_canonical, solve_paper])
def test_of_few_items_each_judges_once_and_counts_in_the_maps(solve):
    values, names = rows(60)
    sums = Sums(PAIR_VIEWS, HeldOut(60, every=True))
    sums.add(values, names)
    splits = sums.finish().folds()
    assert [len(held) for _, held in splits] == [20, 20, 20] and [int(m.count) for m, _ in splits] == [80, 80, 80]
    asked = torch.cat([row[STATE] for _, held in splits for row in held])
    assert sorted(asked[:, 0].tolist()) == sorted(values[STATE][:, 0].tolist())
    solved, whole = solve(sums), sums.whole()
    assert solved.pairs == 120 and 0 < solved.score < 1
    torch.testing.assert_close(whole.products, sum(m.products for m, _ in splits) / 2)


def test_few_documents_without_enough_images_are_no_judges():
    sums = Sums(DOCUMENT_VIEWS, HeldOut(40, every=True))
    values, _ = rows(40, captions=1)
    for i in range(40):
        views = {view: values[view][i] for view in (DOCUMENT_VIEWS if i < 2 else (STATE,))}
        sums.held.add(i, views | {"reply": values[STATE][i]})
    ((fitted, held),) = sums.finish().folds()
    assert held == [] and fitted.count == 2 and not sums.empty
    solved = solve_canonical(summed(rows(400)), sums, SMALL)
    assert solved.documents == 2 and solved.score is not None  # by the pairs


def test_few_is_told_by_the_length():
    assert few_or_part(range(2000)).every and not few_or_part(range(2001)).every
    assert not few_or_part(iter(range(5))).every  # a stream does not say


# The paper's alignment


def moments(x, y):
    sums = Moments({"x": x.shape[1], "y": y.shape[1]})
    sums.add({"x": x, "y": y})
    return sums


def plain(n=400, d=7, q=5):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=rng, dtype=torch.float64) * torch.arange(1, d + 1) + 3
    y = 4 + x @ torch.randn(d, q, generator=rng, dtype=torch.float64) / 8
    return x, y + 0.1 * torch.randn(n, q, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("ridge", [1e-9, 1e-2, 1.0])
def test_the_ridge_is_numpys_least_squares(ridge):
    x, y = plain()
    weight, bias = ridge_map(moments(x, y), ridge, "x", "y")
    centred = x - x.mean(0)
    scale = (centred.square().sum() / len(x) / x.shape[1]).item()  # tr(S_xx) / d
    # A ridge is rows of its own below the data.
    above = np.concatenate([centred, np.sqrt(ridge * scale * len(x)) * np.eye(x.shape[1])])
    expected = np.linalg.lstsq(above, np.concatenate([y - y.mean(0), np.zeros((x.shape[1], y.shape[1]))]), rcond=None)
    assert np.allclose(weight, expected[0].T, atol=1e-8)
    assert np.allclose(bias, y.mean(0) - weight @ x.mean(0), atol=1e-8)


def test_the_papers_map_is_centred_and_of_unit_length():
    x, y = plain()
    weight, bias = matching_map(moments(x, y), 1e-3, 0.5, "x", "y")
    embedded = x @ weight.T + bias
    assert embedded.mean(0).abs().max() < 1e-12 and embedded.square().sum(1).mean() == pytest.approx(1)


def test_the_papers_choice_is_made_on_pairs_that_were_not_fitted():
    rng = torch.Generator().manual_seed(0)
    values, names = rows(400, captions=1)
    # Nothing to learn, and nearly as many states as pairs.
    values |= {STATE: torch.randn(400, 300, generator=rng), "projected": torch.randn(400, 30, generator=rng)}
    solved = solve_paper(summed((values, names)))
    weight, bias = solved.maps["W_t2m"]
    scores = (values[STATE] @ weight.T + bias) @ F.normalize(values["projected"], dim=1).T
    assert (scores.argmax(1) == torch.arange(400)).float().mean() > 0.3  # the whole is remembered
    assert max(solved.recall.values()) < 0.2


# As a training


def test_every_visual_token_starts_at_the_captions_mean(fresh):
    model = fresh(n_visual_tokens=3)
    rng = torch.Generator().manual_seed(2)
    features = torch.randn(300, model.config.image_feature_width, generator=rng)
    means = features @ torch.randn(features.shape[1], model.config.text_width, generator=rng)
    sums = Sums(PAIR_VIEWS)
    sums.fit({STATE: means, "pooled": features, "projected": torch.randn(300, model.config.clip_width, generator=rng),
              "text": torch.randn(300, model.config.clip_width, generator=rng), "words": means})  # fmt: skip
    solve_paper(sums).apply(model)
    tokens = model.W_i2t(features).view(300, 3, -1)
    for i in range(3):
        assert F.cosine_similarity(tokens[:, i], means).min() > 0.99
    before = model.W_i2t.weight.clone()
    ClosedForm({"W_t2m": (model.W_t2m.weight + 1, model.W_t2m.bias)}, {}, {}, None).apply(model)
    assert torch.equal(model.W_i2t.weight, before)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr("train.held_out.ONE_IN", 4)


@pytest.mark.parametrize("alignment", ["canonical", "paper"])
@pytest.mark.parametrize("cached", [True, False])
def test_it_trains_without_a_step(folder, few, cached, alignment):  # noqa: F811
    init = {"canonical": "cca", "paper": "closed-form"}[alignment]
    settings = base(folder) | {"max_steps": 0, "alignment": alignment, "init": init, "cache_features": cached,
                               "evaluate_pairs": 12}  # fmt: skip
    (folder / "c.yaml").write_text(yaml.safe_dump(settings))
    summary = main([str(folder / "c.yaml")])
    assert summary["steps"] == 0 and summary["loss"] is None and summary["caption_to_image"]["R@1"] >= 75
    assert summary["pairs_seen"] == 12
    saved = json.loads((folder / "out" / "train_results.json").read_text())["closed_form"]
    model = UniMuRModel.from_pretrained(summary["checkpoint"])
    if alignment == "canonical":
        assert model.config.shared_width == saved["width"] == model.embed_texts(["a"]).shape[1]
        assert not model.W_v2m.weight.requires_grad and model.W_t2m.weight.requires_grad
    else:
        assert saved["ridge"] in closed_form.RIDGES and saved["power"] in closed_form.POWERS
    assert torch.isfinite(model.W_i2t.weight).all()


@pytest.mark.parametrize(("start", "tokens", "alike"), [("words", 2, False), ("mean", 2, True), ("words", 1, True)])
def test_several_visual_tokens_hold_words_of_their_own_and_one_the_mean(folder, start, tokens, alike):  # noqa: F811
    settings = base(folder) | {"max_steps": 0, "alignment": "canonical", "evaluate_pairs": 0, "n_visual_tokens": tokens,
                               "visual_start": start}  # fmt: skip
    (folder / "c.yaml").write_text(yaml.safe_dump(settings))
    model = UniMuRModel.from_pretrained(main([str(folder / "c.yaml")])["checkpoint"])
    of_tokens = model.W_i2t.weight.chunk(tokens)
    assert torch.allclose(of_tokens[0], of_tokens[-1]) == alike
    means = UniMuRModel.from_pretrained(
        main([str(folder / "c.yaml"), "--visual_start=mean", f"--output_dir={folder / 'means'}"])["checkpoint"]
    )
    assert torch.equal(model.W_i2t.weight, means.W_i2t.weight) == alike
    assert torch.equal(model.W_t2m.weight, means.W_t2m.weight)  # captions alone: nothing else depends on it


def test_pairs_read_as_conversations_count_as_captions_and_as_conversations(fresh):
    model, generator = fresh("opt"), torch.Generator().manual_seed(0)
    pictures = [picture(i) for i in range(30)]
    rows = [
        {"id": str(i), "image": {"bytes": encode(p), "path": None}, "captions": [f"{i} a", f"{i} b"]}
        for i, p in enumerate(pictures)
    ]  # fmt: skip
    collator = PairCollator(model.processor, seed=3)
    collator.pair_contexts = "conversations"
    with torch.no_grad():
        model.W_i2t.weight.copy_(torch.randn(model.W_i2t.weight.shape, generator=generator))
    sums = sum_pairs(model, rows, collator, SkipCounter(), batch_size=7)
    assert sums.whole().count == 30 * 4  # each caption alone, and again with something before it
    seen = set()
    for row, held in zip(sorted(rows, key=lambda row: HeldOut.hash(row["id"])), sums.held.rows(), strict=True):
        shown, (first, second) = pictures[int(row["id"])], row["captions"]
        embeds = F.normalize(model.W_t2m(held[STATE]), dim=-1).detach()
        for at, dialogues in enumerate((
            [[first]], [[second]], [[shown, first], [second, first]], [[shown, second], [first, second]]
        )):  # fmt: skip
            near = (embeds[at] - model.embed_dialogues(dialogues)).abs().amax(1)
            assert near.min() < 1e-5
            seen.add((at, int(near.argmin())))
    assert seen == {(0, 0), (1, 0), (2, 0), (2, 1), (3, 0), (3, 1)}


def test_what_conversations_show_is_read_through_the_visual_tokens_that_are_solved(folder):  # noqa: F811
    settings = base(folder) | {"max_steps": 0, "alignment": "canonical", "evaluate_pairs": 0, "n_visual_tokens": 2}
    (folder / "c.yaml").write_text(yaml.safe_dump(settings))
    alone, read = (
        main([str(folder / "c.yaml"), f"--pair_contexts={name}", f"--output_dir={folder / name}"])
        for name in ("caption", "conversations")
    )
    alone, read = (UniMuRModel.from_pretrained(summary["checkpoint"]) for summary in (alone, read))
    assert torch.equal(alone.W_i2t.weight, read.W_i2t.weight)
    assert alone.W_t2m.weight.shape != read.W_t2m.weight.shape or not torch.allclose(
        alone.W_t2m.weight, read.W_t2m.weight
    )


def test_cached_and_plain_pairs_give_the_same_start_and_steps_go_on_from_it(folder):  # noqa: F811
    weights = {}
    for cached, steps in ((True, 0), (False, 0), (True, 2)):
        settings = base(folder) | {
            "max_steps": steps, "alignment": "canonical", "cache_features": cached, "evaluate_pairs": 0,
            "matching_learning_rate": 1e-4, "warmup_steps": 0, "state_noise": 0.3, "cca_powers": [1.0],
        }  # fmt: skip
        (folder / "c.yaml").write_text(yaml.safe_dump(settings))
        weights[cached, steps] = load_file(f"{main([str(folder / 'c.yaml')])['checkpoint']}/model.safetensors")
    a, b, moved = weights[True, 0], weights[False, 0], weights[True, 2]
    assert a["W_t2m.weight"].shape == b["W_t2m.weight"].shape
    images = torch.randn(50, a["W_v2m.weight"].shape[1], generator=torch.Generator().manual_seed(0))
    x, y = (F.normalize(images @ w["W_v2m.weight"].T + w["W_v2m.bias"], dim=1) for w in (a, b))
    torch.testing.assert_close(x @ x.T, y @ y.T, atol=1e-2, rtol=0)
    assert 0 < (moved["W_t2m.weight"] - a["W_t2m.weight"]).abs().max() <= 2.1e-4
    assert torch.equal(moved["W_v2m.weight"], a["W_v2m.weight"]) and torch.equal(moved["W_x2m.bias"], a["W_x2m.bias"])


def test_a_resumed_run_takes_the_space_of_its_checkpoint(folder):  # noqa: F811
    settings = base(folder) | {"max_steps": 4, "alignment": "canonical", "save_strategy": "steps", "save_steps": 2,
                               "evaluate_pairs": 0, "matching_learning_rate": 1e-3}  # fmt: skip
    (folder / "c.yaml").write_text(yaml.safe_dump(settings))
    whole = load_file(f"{main([str(folder / 'c.yaml')])['checkpoint']}/model.safetensors")
    half = f"--resume_from_checkpoint={folder / 'out' / 'checkpoint-2'}"
    again = load_file(f"{main([str(folder / 'c.yaml'), half])['checkpoint']}/model.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, again[name], rtol=1e-5, atol=1e-6)


def test_an_alignment_and_a_start_that_do_not_fit_are_refused(folder):  # noqa: F811
    (folder / "c.yaml").write_text(yaml.safe_dump(base(folder)))
    for alignment, init in (("canonical", "random"), ("canonical", "closed-form"), ("paper", "cca")):
        with pytest.raises(ValueError, match=f"--alignment {alignment} with --init {init}"):
            main([str(folder / "c.yaml"), f"--alignment={alignment}", f"--init={init}"])


def test_pairs_that_cannot_be_used_are_counted_without_a_step_too(folder):  # noqa: F811
    (folder / "photos" / "3.png").write_bytes(b"no picture")
    settings = base(folder) | {"max_steps": 0, "init": "closed-form", "evaluate_pairs": 0}
    (folder / "c.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(TooManyBadPairsError):
        main([str(folder / "c.yaml")])
    summary = main([str(folder / "c.yaml"), "--max_bad_share=0.2"])
    assert sum(summary["skipped"].values()) == 1 and summary["pairs_seen"] == 12
