"""FROMAGe's heads on cached states: what is read, what moves, and what the noise is."""

from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F

from benchmarks.baselines.fromage import FromageModel
from benchmarks.baselines.fromage_heads import (
    CaptionStates,
    caption_states,
    conversation_states,
    start_canonical,
    train_heads,
)
from benchmarks.baselines.fromage_train import train_fromage
from tests.benchmarks.tiny_fromage import WORDS, make, rows_of
from tests.conftest import picture
from tests.tiny import make_towers
from train.canonical import STATE, TEXT, Correlations, Setting
from train.collate import SkipCounter
from train.features import cache_image_features
from train.moments import Moments
from train.rows import FEATURES
from train.visual_words import visual_words

HEADS = {"W_t2m.weight", "W_t2m.bias", "W_v2m.weight", "W_v2m.bias", "logit_scale"}
SETTINGS = {"noise": 0.3, "learning_rate": 1e-2, "steps": 60, "batch_size": 16}
FEW = {"max_steps": 2, "per_device_train_batch_size": 8, "warmup_steps": 0}


@pytest.fixture
def model(tmp_path):
    return make(tmp_path)


def pairs(n=32, seed=0):
    """States from which the images follow by a linear map."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(2 * n, 32, generator=generator)
    features = (states[::2] + states[1::2]) @ torch.randn(32, 32, generator=generator)
    return CaptionStates(states, features, torch.full((n,), 2))


@torch.no_grad()
def test_states_are_those_of_the_captions_alone(model):
    captions = [WORDS[:2], WORDS[2:3], WORDS[3:7]]
    data = caption_states(model, captions, torch.zeros(3, 32), batch_size=3)
    assert data.counts.tolist() == [2, 1, 4] and data.states.shape == (7, 32)
    expected = F.normalize(model.W_t2m(data.states), dim=-1)
    assert torch.allclose(model.embed_texts(WORDS[:7]), expected, atol=1e-5)


@torch.no_grad()
def test_states_of_conversations_stand_beside_those_of_the_captions(model, pair_rows):
    rows = cache_image_features(pair_rows, model, SkipCounter())
    data = conversation_states(model, rows, seed=0, batch_size=3)
    assert torch.equal(data.features, torch.tensor(rows["image_features"][:]))
    assert data.counts.tolist() == [2, 4] * 4
    embeds, at = F.normalize(model.W_t2m(data.states), dim=-1), 0
    read = set()
    for i, row in enumerate(pair_rows):
        captions = row["captions"]
        alone = model.embed_dialogues(captions)
        assert torch.allclose(embeds[at : at + len(captions)], alone, atol=1e-5)
        for embed, caption in zip(embeds[at + len(captions) : at + 2 * len(captions)], captions, strict=True):
            before = {"image": picture(i), **{other: other for other in captions if other != caption}}
            near = {
                kind: torch.allclose(model.embed_dialogues([[turn, caption]])[0], embed, atol=1e-5)
                for kind, turn in before.items()
            }
            assert sum(near.values()) == 1
            read.add("image" if near["image"] else "caption")
        at += 2 * len(captions)
    assert read == {"image", "caption"} and at == len(data.states)


def test_a_batch_holds_an_image_once_with_one_of_its_captions():
    counts = torch.tensor([1, 3, 2])
    owner = torch.arange(3).repeat_interleave(counts)
    data = CaptionStates(torch.arange(6.0)[:, None], torch.arange(3.0)[:, None], counts)
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(40):
        states, features = data.draw(2, generator)
        assert len(set(features.flatten().tolist())) == 2
        assert torch.equal(owner[states.flatten().long()].float()[:, None], features)
        seen |= set(states.flatten().tolist())
    assert seen == {0, 1, 2, 3, 4, 5} and len(data.draw(9, generator)[0]) == 3


def test_only_the_heads_move_and_the_loss_falls(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train_heads(model, pairs(), seed=0, **SETTINGS)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == HEADS
    assert len(losses) == 60 and sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_the_noise_is_in_units_of_the_states_deviation(model, monkeypatch):
    """Both states and noise scaled alike, the maps read states scaled alike."""
    read = []
    hook = model.W_t2m.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach().clone()))
    data, still = pairs(), SETTINGS | {"learning_rate": 0.0, "steps": 1, "batch_size": 32}
    for scale, noise in ((1, 0.0), (1, 0.5), (10, 0.5)):
        scaled = CaptionStates(data.states * scale, data.features, data.counts)
        train_heads(model, scaled, seed=3, **still | {"noise": noise})
    hook.remove()
    plain, noisy, scaled = read
    assert torch.allclose(scaled, 10 * noisy, atol=1e-4)
    assert 0.45 < ((noisy - plain).std() / data.states.std(0).mean()).item() < 0.55


@torch.no_grad()
def test_a_canonical_start_gives_the_cosines_of_the_canonical_maps(tmp_path):
    model, data = make(tmp_path, shared_dim=40), pairs()
    before = {name: p.clone() for name, p in model.named_parameters()}
    start_canonical(model, data, width=5, ridge=0.1, power=2)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == HEADS - {"logit_scale"}
    moments = Moments({STATE: 32, TEXT: 32, "pooled": 32})
    features = data.features.repeat_interleave(2, dim=0)
    moments.add({STATE: data.states, TEXT: features, "pooled": features})
    maps = Correlations(moments).maps(Setting("pooled", width=5, ridge=0.1, power=2))
    expected = (
        F.normalize(maps.of(STATE)(data.states), dim=-1) @ F.normalize(maps.of("pooled")(data.features), dim=-1).T
    )
    cosines = F.normalize(model.W_t2m(data.states), dim=-1) @ F.normalize(model.W_v2m(data.features), dim=-1).T
    assert torch.allclose(cosines, expected, atol=1e-4)
    assert (model.W_t2m.weight.norm(dim=1) > 0).all()  # a row at zero would stay there
    for width in (0, 33):
        with pytest.raises(ValueError, match=f"width={width}: there are 32 canonical directions, and shared_dim=40"):
            start_canonical(model, data, width=width, ridge=0.1, power=2)


@pytest.fixture
def pair_rows():
    """Pairs of one and of two captions."""
    rows = [{**row, "source": None, "license": None, "url": None, "problem": None} for row in rows_of()]
    for i, row in enumerate(rows):
        row["captions"] = row["captions"] + [WORDS[(i + 3) % 8]] * (i % 2)
    return datasets.Dataset.from_list(rows, features=FEATURES)


@pytest.fixture
def miniature(tmp_path):
    """A few pairs over small towers."""
    text, clip = make_towers(tmp_path / "towers")
    rows = [{**row, "source": None, "license": None, "url": None, "problem": None} for row in rows_of()]
    pairs = datasets.Dataset.from_list(rows, features=FEATURES)
    return SimpleNamespace(text_model=str(text), clip_model=str(clip), pairs=pairs)


def test_the_miniatures_fromage_trains_its_heads_further(tmp_path, miniature):
    few = FEW | {"learning_rate": 1e-2}
    heads, start = SETTINGS | {"steps": 1, "learning_rate": 1e-4}, {"width": 4, "ridge": 0.1, "power": 1}
    given = {"heads": heads, "start": start}
    joint, further, canonical, spoken = (
        dict(FromageModel.from_pretrained(train_fromage(tmp_path / name, miniature, 3, **few | more)).named_parameters())
        for name, more in (("joint", {}), ("further", {"heads": heads}), ("canonical", given),
                           ("spoken", given | {"pair_contexts": "conversations"}))
    )  # fmt: skip
    for trained, near in ((further, True), (canonical, False), (spoken, False)):
        assert {name for name, p in joint.items() if not torch.equal(p, trained[name])} == HEADS
        assert torch.allclose(joint["W_t2m.weight"], trained["W_t2m.weight"], atol=1e-3) is near
    assert not torch.allclose(canonical["W_t2m.weight"], spoken["W_t2m.weight"], atol=1e-3)


def test_the_miniatures_visual_tokens_start_as_unimurs(tmp_path, miniature):
    given = FEW | {"learning_rate": 1e-2, "visual_learning_rate": 0.0}
    still = FromageModel.from_pretrained(train_fromage(tmp_path / "still", miniature, 3, **given))
    features = cache_image_features(miniature.pairs, still, SkipCounter())["image_features"]
    ids = still.processor.tokenizer([c[0] for c in miniature.pairs["captions"]], add_special_tokens=False)["input_ids"]
    table = still.language_model.get_input_embeddings().weight.detach()
    weight, bias = visual_words(torch.tensor(features[:]), ids, table, 6)
    assert torch.allclose(still.W_i2t.weight, weight, atol=1e-6) and torch.allclose(still.W_i2t.bias, bias, atol=1e-6)
    start = still.language_model.get_input_embeddings().weight[still.processor.tokenizer.convert_tokens_to_ids("#")]
    assert not torch.allclose(
        still.ret_embedding, start * still.ret_embedding.norm() / start.norm(), atol=1e-3
    )  # it moved
