"""The task `generation` on hand-made embeddings, the rule of generate="auto", the probe, and what draws."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.baselines.drawing import Chooses, Retrieves, TextToImage
from benchmarks.generate import choose_threshold
from benchmarks.load import UniMuR
from benchmarks.probe import PixelProbe
from benchmarks.protocols import protocols
from benchmarks.run import compare
from benchmarks.schema import Dialogues
from benchmarks.systems import DoesNotApplyError, System
from benchmarks.tasks import generation
from tests.benchmarks.test_tasks import Table, dialogue
from tests.conftest import picture
from tests.tiny import make_pipeline
from train.miniature.world import draw, splits

PROTOCOL = protocols("generation", miniature=True)[0]
POOL = {"text_ids": [], "image_ids": ["i1", "i2", "i3"]}
DATA = Dialogues(
    [dialogue("a", "q1", POOL, [], ["i1"]), dialogue("b", "q2", POOL, [], ["i2"])],
    {}, {"i1": "I1", "i2": "I2", "i3": "I3"}, captions={"i1": "first", "i2": "second"},
)  # fmt: skip
ROWS = {"I1": [1, 0, 0], "I2": [0, 1, 0], "I3": [0, 0, 1], "q1": [9, 1, 2], "q2": [1, 2, 9], "drawn": [3, 4, 0]}
CLIP = Table(ROWS)


class Draws(Table):
    def draw(self, dialogues, captions=()):
        self.captions = list(captions)
        return ["drawn"] * len(dialogues)


def run(system, data=DATA):
    return {name: measure.values.tolist() for name, measure in generation.run(system, data, PROTOCOL, CLIP).items()}


def test_what_cannot_draw_answers_with_the_image_it_retrieves():
    found = run(Table(ROWS))  # i1 for q1, i3 for q2
    assert found["CLIP-Sim"] == [1, 0] and found["R@1"] == found["picture R@1"] == [1, 0]
    assert found["CLIP-Sim, absent"] == [0, 0]  # i3 for both, when their own is gone
    assert found["CLIP-Sim, another's"] == [0, 0]


def test_what_draws_is_compared_with_the_true_image():
    system = Draws(ROWS)
    found = run(system)
    assert found["CLIP-Sim"] == found["CLIP-Sim, absent"] == pytest.approx([0.6, 0.8])
    assert found["CLIP-Sim, another's"] == pytest.approx([0.8, 0.6])
    assert found["picture R@1"] == [0, 1] and found["R@1"] == [1, 0]
    assert system.captions == ["first", "second"]


def test_a_system_that_chooses_keeps_the_pools_image_where_it_scores_enough():
    system = Draws(ROWS)
    system.draw_below = 0.96  # q1's best is 0.97, q2's 0.97; without i1, q1's best is far below
    found = run(system)
    assert found["CLIP-Sim"] == [1, 0] and found["CLIP-Sim, absent"] == pytest.approx([0.6, 0])


def test_what_only_draws_has_no_retrieval_and_what_does_neither_does_not_apply():
    class Only(System):
        def draw(self, dialogues, captions=()):
            return ["drawn"] * len(dialogues)

    found = run(Only())
    assert "R@1" not in found and found["CLIP-Sim"] == pytest.approx([0.6, 0.8])
    with pytest.raises(DoesNotApplyError):
        run(System())


def test_the_rule_is_the_threshold_of_the_best_mean():
    model = SimpleNamespace(config=SimpleNamespace(draw_below=None))
    scores, retrieved = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.0, 0.2, 1.0, 1.0])
    found = choose_threshold(model, scores, retrieved, np.full(4, 0.7))
    assert model.config.draw_below == found["draw_below"] == 0.3 and found["rule"] == pytest.approx((1.4 + 2) / 4)
    assert choose_threshold(model, scores, np.ones(4), np.zeros(4))["drawn share"] == 0
    assert choose_threshold(model, scores, np.zeros(4), np.ones(4))["drawn share"] == 1


def test_the_probe_reads_true_pictures_and_not_noise():
    scenes, rng = splits()["train"][:1500], np.random.default_rng(0)
    probe = PixelProbe(scenes, side=16)
    import random

    held, source = splits()["validation"][:100], random.Random(3)
    true = probe.accuracy([draw(scene, source) for scene in held], held)
    assert true["animal"] > 80 and true["place"] > 95 and true["hat"] > 60
    noise = probe.accuracy([picture(int(rng.integers(1 << 30)), (64, 64)) for _ in held], held)
    assert noise["animal"] < 40 and noise["hat"] < 50 and noise["place"] < 50
    assert probe.chance()["hat"] == 16.7


@pytest.fixture
def drawer(fresh):
    model = fresh()
    small = {"mapper_width": 16, "mapper_layers": 1, "mapper_heads": 2, "drawing_steps": 1, "drawing_guidance": 2.0}
    model.add_drawing(make_pipeline(), n_drawing_tokens=3, **small)
    return model


def test_every_system_that_draws(drawer):
    talk = [["hello", picture(1)], ["a very long exchange of many words"]]
    of_text = TextToImage(drawer)
    drawn = of_text.draw(talk)
    assert len(drawn) == 2 and of_text.notes[0].startswith("1 texts exceeded the text encoder's 12 positions")
    captioned = TextToImage(drawer, "caption")
    assert captioned.draw(talk, ["hello", "other"])[0].tobytes() == drawn[0].tobytes()
    with pytest.raises(DoesNotApplyError):
        captioned.draw(talk, [None, "other"])
    assert UniMuR(drawer).draw(talk)[0].tobytes() == drawer.generate(talk)[0].tobytes()
    with pytest.raises(DoesNotApplyError):
        Retrieves(drawer).draw(talk)
    with pytest.raises(ValueError, match="draw_below"):
        Chooses(drawer)
    drawer.config.draw_below = 0.5
    assert Chooses(drawer).draw_below == 0.5


def test_the_task_runs_on_a_model_that_draws(drawer):
    images = {f"i{i}": picture(i) for i in range(3)}
    pool = {"text_ids": [], "image_ids": list(images)}
    data = Dialogues([dialogue(str(i), f"number {i}", pool, [], [f"i{i}"]) for i in range(3)], {}, images)
    protocol = dataclasses.replace(PROTOCOL, settings=PROTOCOL.settings | {"limit": 2})
    (found,) = compare([UniMuR(drawer)], data, protocol, clip=UniMuR(drawer))
    assert found["data"]["items"] == found["metrics"]["CLIP-Sim"]["n"] == found["metrics"]["R@1"]["n"] == 2
    assert -1 <= found["metrics"]["CLIP-Sim"]["value"] <= 1
