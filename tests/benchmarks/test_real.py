"""The bench over a real language model, on tiny towers: what it measures is what the saved model does."""

import functools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from benchmarks import real_page
from benchmarks.data import miniature as data
from benchmarks.measure import Measure
from benchmarks.real import bench as bench_module
from benchmarks.real import likelihood, prompts, study, visual
from benchmarks.real.bench import DIALOGUE, RESPONSE, Bench
from benchmarks.real.replies import canonical_model, draw
from benchmarks.real.spaces import OBJECTIVES, Fit, Pairs, canonical, learn
from benchmarks.tasks.contexts import context_of
from modeling_unimur import UniMuRModel
from tests.tiny import make_towers
from train.canonical import Setting
from train.miniature import Miniature
from train.miniature.prepare import training_pairs
from train.miniature.world import splits

SETTING = Setting("pooled", 8, 0.1, 2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def bench(folder):
    """A tiny Llama as the real one, 48 train pictures, 40 dialogues of each kind."""
    text, clip = make_towers(folder, "llama")
    world = Miniature("", str(clip), training_pairs(splits()["train"][:48], 0), None, {}, 0.0)
    patch = pytest.MonkeyPatch()
    patch.setattr(data, "mmdialog", functools.partial(data.mmdialog, n=40))
    patch.setattr(data, "visdial", functools.partial(data.visdial, n=40))
    patch.setattr(bench_module, "PART_ROWS", 16)
    yield Bench(folder / "states", text, world, "\nGist", ":")
    patch.undo()


@pytest.fixture(scope="module")
def pairs(bench):
    return bench.pairs(48)


def test_states_are_the_models_and_are_kept(bench, pairs, monkeypatch):
    captions = [texts[0] for texts in bench.world.pairs["captions"]]
    inputs = bench.model.processor.contexts(captions[5:7])
    assert torch.allclose(pairs.states[5:7], bench.model.ret_states(**inputs), atol=1e-5)
    monkeypatch.setattr(bench, "_ret_states", lambda _: pytest.fail("computed again"))
    assert torch.equal(bench.pairs(48).states, pairs.states)


def test_two_share_the_states_and_each_computes_its_part(bench, folder):
    texts = [f"number {i}" for i in range(40)]  # three parts
    text = bench.model.config.text_model_name_or_path
    ranks = [Bench(folder / "shared", text, bench.world, "\nGist", ":", rank, 2) for rank in range(2)]
    calls = [0, 0]

    def counted(rank, whole):
        def states(contexts):
            calls[rank] += len(contexts)
            return whole(contexts)

        return states

    for rank, one in enumerate(ranks):
        one._ret_states = counted(rank, one._ret_states)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(lambda one: one.states("shared", texts), ranks)
    assert calls == [24, 16]  # parts 1 and 3, part 2
    assert torch.equal(first, second) and torch.equal(first, bench.states("alone", texts))


def test_an_interrupted_extraction_resumes(bench, monkeypatch):
    whole, calls = bench._ret_states, []

    def breaking(contexts):
        calls.append(len(contexts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(contexts)

    monkeypatch.setattr(bench, "_ret_states", breaking)
    texts = [f"number {i}" for i in range(20)]
    with pytest.raises(KeyboardInterrupt):
        bench.states("broken", texts)
    assert len(bench.states("broken", texts)) == 20 and calls == [16, 4, 4]


def test_states_of_another_w_i2t_are_refused_where_images_are_read(bench, pairs):
    visual.closed_form(bench, pairs.features)
    bench.evaluation_states("validation")
    kept = bench.model.W_i2t.weight.detach().clone()
    with torch.no_grad():
        bench.model.W_i2t.weight.add_(1)
    with pytest.raises(ValueError, match="W_i2t"):
        bench.evaluation_states("validation")
    with torch.no_grad():
        bench.model.W_i2t.weight.copy_(kept)


def test_what_is_measured_is_what_the_saved_model_does(bench, pairs, folder):
    visual.closed_form(bench, pairs.features)
    states = bench.evaluation_states("test")
    embedded = bench.embedded(canonical(pairs, SETTING), "test", states)
    canonical_model(bench, pairs, SETTING).save_pretrained(folder / "checkpoint")
    model = UniMuRModel.from_pretrained(folder / "checkpoint")
    for kind in (DIALOGUE, RESPONSE):
        given = bench.evaluation("test")["data"][kind]
        contexts = [context_of(d, given.images) for d in given.dialogues]
        assert torch.allclose(embedded[kind].queries, model.embed_dialogues(contexts), atol=1e-4)
        pictures = model.embed_images([given.images[i] for i in embedded[kind].image_rows])
        assert torch.allclose(embedded[kind].images, pictures, atol=1e-4)
    words = model.embed_texts([given.texts[i] for i in embedded[RESPONSE].text_rows])
    assert torch.allclose(embedded[RESPONSE].texts, words, atol=1e-4)
    measures = bench.measure(embedded, "test")
    informed = sum(d["image_informs"] and d["wants_image"] for d in given.dialogues)
    assert measures["dialogue to image R@1"].n == 40 and measures["text R@1"].n == 40
    assert measures["contextual image, image informs but is removed R@1"].n == informed > 0
    draw(bench, model, "test", folder / "gallery.png")
    assert (folder / "gallery.png").stat().st_size > 10_000


def test_few_validation_dialogues_have_no_image_and_keep_the_pool(bench):
    fresh = Bench(bench.folder, bench.model.config.text_model_name_or_path, bench.world, "\nGist", ":")
    known = fresh.evaluation("validation", 12)
    assert len(known["data"][DIALOGUE].dialogues) == len(known["data"][RESPONSE].dialogues) == 12
    assert not any(d["image_informs"] for d in known["data"][RESPONSE].dialogues)
    assert len(known["candidates"][RESPONSE][0]) == 40


def related(n: int = 256) -> Pairs:
    """States, features, images and texts that are linear in six common numbers, and noise."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(n, 6, generator=generator)

    def view(mix):
        return common @ mix + 0.1 * torch.randn(n, mix.shape[1], generator=generator) + 1

    of_states, of_features, of_clip = (torch.randn(6, width, generator=generator) for width in (20, 12, 10))
    return Pairs(view(of_states) * 30, view(of_features), view(of_clip), view(of_clip))  # CLIP's views share a space


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_learns(name):
    pairs = related()
    space = learn(pairs, OBJECTIVES[name], Fit(1e-2, 0.0, steps=300, batch=64), seed=0)
    a, b = (F.normalize(x, dim=-1) for x in (space.states(pairs.states), space.images(pairs.features, pairs.images)))
    if name == "TM":  # it has seen texts alone
        b = F.normalize(pairs.texts, dim=-1)
    assert ((a @ b.T).argmax(1) == torch.arange(256)).float().mean() > (0.3 if name == "TM" else 0.6)
    assert a.shape[1] == (OBJECTIVES[name].width or 10)
    again = learn(pairs, OBJECTIVES[name], Fit(1e-2, 0.0, steps=300, batch=64), seed=0)
    assert torch.equal(space.states(pairs.states), again.states(pairs.states))
    other = learn(pairs, OBJECTIVES[name], Fit(1e-2, 0.0, steps=300, batch=64), seed=1)
    assert not torch.equal(space.states(pairs.states), other.states(pairs.states))


def test_closed_form_and_training_of_w_i2t(bench, pairs, folder, monkeypatch):
    monkeypatch.setattr(visual, "STEPS", 30)
    visual.closed_form(bench, pairs.features)
    monkeypatch.setattr(visual, "start_visual_tokens", lambda *_: pytest.fail("it is kept beside the states"))
    start = bench.model.W_i2t.weight.detach().clone()
    tokens = bench.model.W_i2t(pairs.features).reshape(len(pairs.features), bench.model.config.n_visual_tokens, -1)
    table = bench.model.language_model.get_input_embeddings().weight
    captions = [texts[0] for texts in bench.world.pairs[:48]["captions"]]
    for at, ids in enumerate(bench.model.processor.tokenizer(captions, add_special_tokens=False)["input_ids"]):
        # As near the words of its own caption as their mean word is, or nearer.
        own, mean = table[ids], table[ids].mean(0)
        assert torch.cdist(tokens[at], own).min(1).values.mean() < torch.cdist(mean[None], own).mean()
    losses = []
    forward = bench.model.forward
    monkeypatch.setattr(bench.model, "forward", lambda **k: losses.append(forward(**k)) or losses[-1])
    last = visual.train(bench, pairs.features, folder / "W.safetensors")
    assert last < losses[0].loss_cap.item() and not torch.equal(start, bench.model.W_i2t.weight)
    trained = bench.model.W_i2t.weight.detach().clone()
    visual.closed_form(bench, pairs.features)
    assert visual.train(bench, pairs.features, folder / "W.safetensors") is None
    assert torch.equal(bench.model.W_i2t.weight, trained)


def test_the_search_reads_everywhere(bench, folder, monkeypatch):
    monkeypatch.setattr(prompts, "WORDS", ("\nGist:", "#"))
    monkeypatch.setattr(prompts, "BEHIND", "\nGist:")
    monkeypatch.setattr(prompts, "LAYERS", (-2,))
    monkeypatch.setattr(prompts, "N_CAPTIONS", 40)
    monkeypatch.setattr(prompts, "N_DIALOGUES", 10)
    monkeypatch.setattr(prompts, "WIDTHS", (8,))
    rows = prompts.search(bench, folder / "search", "plain")
    read = {(row["words"], row["read"]) for row in rows}
    assert {("\nGist:", kind) for kind in ("last", "before", "mean", "layer -2")} <= read
    assert ("#", "last") in read and ("#", "mean") not in read and ("\nGist: + mean row", "last") in read
    assert all(0 <= row["R@1"] <= 100 for row in rows)
    monkeypatch.setattr(prompts, "ROW_STEPS", 2)
    trained = prompts.search(bench, folder / "search", "trained")
    assert {row["words"] for row in trained} == {"trained row", "\nKeywords: a with its last token trained"}
    monkeypatch.setattr(prompts, "CHAT", ("</s>\nA:",))
    assert {row["words"] for row in prompts.search(bench, folder / "search", "chat")} == {"</s>\nA:"}


def test_rows_of_a_former_search_stay(tmp_path):
    old = {"words": "#", "chat": False, "R@1": 1.0}
    path, about = tmp_path / "prompts.json", {"captions": 40, "dtype": "torch.float32"}
    measured = [{"words": "#", "chat": True, "R@1": 2.0}, {"words": "again", "chat": False, "R@1": 3.0}]
    assert prompts.others(path, about, measured) == []
    path.write_text(json.dumps(about | {"rows": [old, old | {"words": "again"}]}))
    assert prompts.others(path, about, measured) == [old]
    with pytest.raises(ValueError, match=r"another search \(captions differ\)"):
        prompts.others(path, about | {"captions": 41}, measured)


def test_the_page_has_the_best_prompts_and_those_of_every_kind():
    row = {"chat": False, "read": "last"}
    rows = [row | {"words": f"w{i}", "R@1": 90.0 - i} for i in range(14)]
    rows += [row | {"words": "<|end|>", "chat": True, "R@1": 5.0}, row | {"words": "trained row", "R@1": 4.0}]
    text = real_page.prompts({"rows": rows, "dialogues": 1, "pool": 2, "captions": 3, "about": ""})
    assert "`'w11'`" in text and "w12" not in text
    assert r"| `'<\|end\|>'` (chat template) | the last token | 5.0 |" in text and "| `'trained row'` |" in text


def some(value: float, n: int = 200) -> Measure:
    import numpy as np

    return Measure((np.arange(n) < value * n).astype(float))


@pytest.fixture
def result():
    better, worse = ({m: some(v) for m in real_page.MEASURES} for v in (0.6, 0.2))
    systems = {study.OURS: better, **dict.fromkeys(OBJECTIVES, worse), "DAT": better, "CLIP": worse}
    measures = {0: systems, 1: {k: v for k, v in systems.items() if k != "CLIP"}}
    return {
        "about": "About the weights.", "ret_prompt": "\nGist", "ret_init": ":", "pairs": 48, "validation_dialogues": 12,
        "chosen_by": study.CRITERION, "orderings": study.judge(measures),
        "rows": [row for seed, s in measures.items() for row in study.rows_of(s, seed)],
    }  # fmt: skip


def test_orderings_are_judged_by_their_intervals(result):
    verdicts = {(row["says"], row["better"]): real_page.verdict(row["seeds"]) for row in result["orderings"]}
    assert verdicts["DAT's overall R@1 is above VM's (Table 4)", "DAT"] == "holds"
    assert verdicts["VM shows images more often than DAT (Table 4)", "VM"] == "does not hold"
    assert verdicts["InfoNCE's overall R@1 is above max-margin's (Table 5)", "DAT, InfoNCE"].startswith(
        "open: above zero on 0"
    )
    clip = next(row for row in result["orderings"] if row["worse"] == "CLIP")
    assert [s["seed"] for s in clip["seeds"]] == [0, 1]  # CLIP has no seed


def test_the_page_says_what_was_measured(result, tmp_path):
    (tmp_path / "real.json").write_text(json.dumps(result))
    text = real_page.page(tmp_path)
    assert "About the weights." in text and "| UniMuR (canonical) | 60.0 |" in text
    assert "+40.0 [+33.0, +46.5]" in text or "+40.0 [" in text
    rows = [
        {"words": "\nGist:", "chat": c, "read": r, "R@1": v}
        for c, r, v in ((False, "last", 40.0), (True, "mean", 30.0))
    ]
    (tmp_path / "real-prompts.json").write_text(json.dumps(
        {"about": "About.", "dialogues": 10, "pool": 40, "captions": 40, "rows": rows}))  # fmt: skip
    metric = {"value": 0.5, "low": 0.4, "high": 0.6}
    both = {"R@1": metric, "R@5": metric}
    (tmp_path / "real-likelihood.json").write_text(json.dumps({
        "about": "About.", "miniature": {"dialogues": 4, "texts": 20, "scores": {"mean": both}},
        "visdial_answers": {"rounds": 3, "variants": {"corrected": both | {"MRR": metric, "NDCG": metric}}}}))  # fmt: skip
    text = real_page.page(tmp_path)
    assert r"| `'\nGist:'` (chat template) | the mean over the words | 30.0 |" in text
    assert "| corrected | 50.0 [40.0, 60.0] |" in text and "pictures are not at hand" in text


def test_replies_by_likelihood(bench):
    from benchmarks.load import UniMuR

    result = likelihood.replies(UniMuR(bench.model), "test", dialogues=3, texts=7)
    assert (result["dialogues"], result["texts"]) == (3, 7) and set(result["scores"]) == set(likelihood.SCORES)


def test_visdials_answers_without_pictures(samples):
    given = likelihood.without_pictures(samples / "visdial")
    assert len(given) == 120 and len(given.dialogues[0]["pool"]["text_ids"]) == 100
    assert not any(e["type"] == "image" for d in given.dialogues for t in d["turns"] for e in t["elements"])
