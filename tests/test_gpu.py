"""What a GPU computes is what the CPU computes; skipped on a machine without one."""

from copy import deepcopy

import pytest
import torch
import yaml
from safetensors.torch import load_file

from modeling_unimur import UniMuRModel
from tests.conftest import picture
from tests.train.test_closed_form import SMALL, rows
from tests.train.test_run import base, folder  # noqa: F401  a fixture
from train.closed_form import PAIR_VIEWS, solve_canonical, solve_paper
from train.run import main
from train.sums import Sums

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

DIALOGUES = [["look who i met!", picture(1), "wow", "show me."], "a dog on the beach", [picture(2)]]
TEXTS, IMAGES = ["a panda", "thanks!"], [picture(1), picture(2, size=(64, 20))]


@pytest.fixture
def both(tiny):
    model = tiny()
    return model, deepcopy(model).to("cuda")


def test_embeddings_are_the_cpus_in_batches_of_any_size(both):
    cpu, gpu = both
    for verb, items in (("embed_dialogues", DIALOGUES), ("embed_texts", TEXTS), ("embed_images", IMAGES)):
        expected, made = getattr(cpu, verb)(items), getattr(gpu, verb)(items)
        torch.testing.assert_close(made.cpu(), expected, atol=1e-4, rtol=0)
        single = torch.cat([getattr(gpu, verb)([item]) for item in items])
        torch.testing.assert_close(single, made, atol=1e-4, rtol=0)


def test_replies_and_conversations_are_the_cpus(both):
    replies = []
    for model in both:
        pool = model.build_pool(texts=TEXTS, images=IMAGES)
        (reply,) = model.retrieve([DIALOGUES[0]], pool=pool)
        replies.append([(c.modality, pytest.approx(c.score, abs=1e-4)) for c in reply.candidates])
        talk = model.conversation()
        for at, turn in enumerate(DIALOGUES[0]):
            whole = model.embed_dialogues([DIALOGUES[0][: at + 1]])[0]
            torch.testing.assert_close(talk.say(turn).embed(), whole, atol=1e-4, rtol=0)
    assert replies[0] == replies[1]


@pytest.mark.parametrize("solve", [lambda sums: solve_canonical(sums, grid=SMALL), solve_paper])
@pytest.mark.parametrize("n", [600, 3000])  # every pair held out once, and a tenth
def test_the_closed_form_is_the_cpus(solve, n):
    solved = []
    for device in ("cpu", "cuda"):
        values, names = rows(n)
        sums = Sums(PAIR_VIEWS, device=device)
        sums.add({view: value.to(device) for view, value in values.items()}, names)
        solved.append(solve(sums.finish()))
    assert solved[0].setting == solved[1].setting and solved[0].score == pytest.approx(solved[1].score, abs=0.01)
    for name, (weight, bias) in solved[0].maps.items():
        signs = torch.ones(len(weight))
        other, other_bias = (value.cpu() for value in solved[1].maps[name])
        if name in ("W_t2m", "W_v2m", "W_x2m"):  # a direction and its opposite are the same
            signs = (weight * other).sum(1).sign()
        torch.testing.assert_close(signs[:, None] * other, weight, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(signs * other_bias, bias, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("changes", [
    {"dtype": "bfloat16"}, {"dtype": "bfloat16", "packing": False, "cache_features": True}, {"dtype": "float32"},
    {"alignment": "canonical", "state_noise": 0.3, "dtype": "bfloat16"}, {"train_ret_embedding": True},
])  # fmt: skip
def test_training_on_it_ends_in_a_checkpoint_that_the_cpu_loads(folder, changes):  # noqa: F811
    settings = base(folder) | {"use_cpu": False, "max_steps": 60, "cache_captions": False} | changes
    (folder / "gpu.yaml").write_text(yaml.safe_dump(settings))
    summary = main([str(folder / "gpu.yaml")])
    assert summary["steps"] == 60 and summary["loss"] < 20
    weights = load_file(f"{summary['checkpoint']}/model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    model = UniMuRModel.from_pretrained(summary["checkpoint"])
    torch.testing.assert_close(
        deepcopy(model).float().to("cuda").embed_texts(TEXTS).cpu(),
        model.float().embed_texts(TEXTS),
        atol=1e-3,
        rtol=0,
    )
