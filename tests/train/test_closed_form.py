"""The closed form: it solves what it says, in any order and precision, and it is a trainer of its own."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from modeling_unimur import UniMuRModel
from tests.train.test_run import base, folder  # noqa: F401  a fixture
from train.closed_form import ClosedForm, Moments, inverse_power, matching_map, recall_at_1, ridge_map, solve
from train.collate import TooManyBadPairsError
from train.run import main


def data(n=400, d=7, q=5, seed=0):
    """States, and embeddings that a linear map of them gives but for some noise, around a common mean."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=rng, dtype=torch.float64) * torch.arange(1, d + 1) + 3
    y = 4 + x @ torch.randn(d, q, generator=rng, dtype=torch.float64) / 8
    return x, y + 0.1 * torch.randn(n, q, generator=rng, dtype=torch.float64)


def moments(x, y, step=64):
    found = Moments((x.shape[1], y.shape[1]))
    for start in range(0, len(x), step):
        found.add(x[start : start + step], y[start : start + step])
    return found


def batches_of(x, y, order=None, step=64, dtype=None):
    order = torch.arange(len(x)) if order is None else order
    for rows in order.split(step):
        yield {
            "ids": [f"pair {i}" for i in rows.tolist()], "ret_states": x[rows].to(dtype or x.dtype),
            "image_embeds": y[rows].to(dtype or y.dtype), "image_features": y[rows] * 2, "caption_means": x[rows] / 3,
        }  # fmt: skip


@pytest.mark.parametrize("ridge", [1e-9, 1e-2, 1.0])
def test_the_ridge_is_numpys_least_squares(ridge):
    x, y = data()
    weight, bias = ridge_map(moments(x, y), ridge)
    centred = x - x.mean(0)
    scale = (centred.square().sum() / len(x) / x.shape[1]).item()  # tr(S_xx) / d
    # A ridge is rows of its own below the data.
    above = np.concatenate([centred, np.sqrt(ridge * scale * len(x)) * np.eye(x.shape[1])])
    expected = np.linalg.lstsq(above, np.concatenate([y - y.mean(0), np.zeros((x.shape[1], y.shape[1]))]), rcond=None)
    assert np.allclose(weight, expected[0].T, atol=1e-8)
    assert np.allclose(bias, y.mean(0) - weight @ x.mean(0), atol=1e-8)


def test_the_whitening_is_the_power_it_says():
    _, y = data()
    _, _, covariance = moments(y, y).covariances()
    half = inverse_power(covariance, 0.5, floor=0.0)
    torch.testing.assert_close(half @ covariance @ half, torch.eye(5).double())
    torch.testing.assert_close(half @ half, inverse_power(covariance, 1.0, floor=0.0))
    torch.testing.assert_close(inverse_power(covariance, 0.0), torch.eye(5).double())


def test_the_map_is_centred_and_of_unit_length():
    x, y = data()
    weight, bias = matching_map(moments(x, y), 1e-3, 0.5)
    embedded = x @ weight.T + bias
    assert embedded.mean(0).abs().max() < 1e-12 and embedded.square().sum(1).mean() == pytest.approx(1)
    expected = ridge_map(moments(x, y), 1e-3)[0] @ (x - x.mean(0)).T
    expected = inverse_power(moments(x, y).covariances()[2], 0.5) @ expected
    torch.testing.assert_close(F.cosine_similarity(expected.T, embedded), torch.ones(len(x)).double())


def test_the_order_and_the_size_of_batches_do_not_matter():
    x, y = data()
    found = solve(batches_of(x, y))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    other = solve(batches_of(x, y, order, step=7))
    assert (found.ridge, found.power, found.pairs) == (other.ridge, other.power, other.pairs) and found.pairs == len(x)
    for a, b in zip((*found.matching, *found.captioning), (*other.matching, *other.captioning), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_it_is_deterministic():
    x, y = data()
    a, b = solve(batches_of(x, y)), solve(batches_of(x, y))
    assert a.recall == b.recall and all(map(torch.equal, a.matching + a.captioning, b.matching + b.captioning))


def test_bf16_inputs_are_summed_in_float64():
    x, y = data(n=4000)
    low = moments(x.bfloat16(), y.bfloat16())
    exact = moments(x.bfloat16().double(), y.bfloat16().double())
    assert low.xx.dtype == torch.float64 and torch.equal(low.yx, exact.yx)
    # Sums kept in bfloat16 would stand still at a few hundred.
    torch.testing.assert_close(ridge_map(low, 1e-3)[0], ridge_map(moments(x, y), 1e-3)[0], rtol=0.02, atol=0.01)
    found = solve(batches_of(x, y, dtype=torch.bfloat16))
    assert found.matching[0].dtype == torch.float32 and found.recall[found.ridge, found.power] > 0


def test_singular_covariances_are_solved_and_what_cannot_be_is_said():
    x, y = data(n=6)  # fewer rows than widths, a state that stands still and one that repeats another
    x[:, 0], x[:, 1] = 1.0, x[:, 2]
    y[:, 0] = y[:, 1]
    weight, bias = matching_map(moments(x, y), 1e-4, 1.0)
    assert torch.isfinite(weight).all() and torch.isfinite(bias).all() and weight[:, 0].abs().max() < 1e-6
    with pytest.raises(ValueError, match="singular and a ridge of 0 does not mend it"):
        ridge_map(moments(x, y), 0.0)
    with pytest.raises(ValueError, match="do not vary"):
        ridge_map(moments(torch.ones(4, 3).double(), y[:4]), 1e-3)
    with pytest.raises(ValueError, match="NaN or infinite"):
        moments(x.log(), y)
    with pytest.raises(ValueError, match="expected rows of widths 7 and 5"):
        Moments((7, 5)).add(x, y[:3])
    with pytest.raises(ValueError, match="at least two pairs"):
        solve([])


def test_the_choice_is_made_on_pairs_that_were_not_fitted():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(400, 300, generator=rng).double()  # nothing to learn, and nearly as many states as pairs
    y = torch.randn(400, 30, generator=rng).double()
    found = solve(batches_of(x, y))
    weight, bias = found.matching
    assert recall_at_1(x @ weight.double().T + bias, y) > 0.3  # the whole is remembered
    assert max(found.recall.values()) < 0.2 and set(found.recall) > {(found.ridge, found.power)}


def test_recall_counts_ties_as_misses():
    eye = torch.eye(4)
    assert recall_at_1(eye, eye) == 1 and recall_at_1(torch.ones(4, 4), eye) == 0
    assert recall_at_1(eye[[0, 2, 1, 3]], eye) == 0.5


def test_every_visual_token_starts_at_the_captions_mean(fresh):
    model = fresh(n_visual_tokens=3)
    x, y = data(d=model.config.text_width, q=model.config.embedding_width, n=300)
    features = torch.randn(300, model.config.image_feature_width, generator=torch.Generator().manual_seed(2)).double()
    means = features @ torch.randn(features.shape[1], model.config.text_width).double()
    batch = {
        "ids": list(map(str, range(300))), "ret_states": x, "image_embeds": y, "image_features": features,
        "caption_means": means,
    }  # fmt: skip
    found = solve([batch], ridges=(1e-8,))
    found.apply(model)
    tokens = model.W_i2t(features.float()).view(300, 3, -1)
    for i in range(3):
        torch.testing.assert_close(tokens[:, i], means.float(), rtol=1e-2, atol=1e-2)
    before = model.W_i2t.weight.clone()
    ClosedForm(found.matching, None, 1, 1, {}, 300).apply(model)
    assert torch.equal(model.W_i2t.weight, before)


@pytest.mark.parametrize("cached", [True, False])
def test_it_trains_without_a_step(folder, cached, monkeypatch):  # noqa: F811
    from train import closed_form

    monkeypatch.setattr(closed_form, "ONE_IN", 4)
    settings = base(folder) | {"max_steps": 0, "init": "closed-form", "cache_features": cached, "evaluate_pairs": 12}
    (folder / "c.yaml").write_text(yaml.safe_dump(settings))
    summary = main([str(folder / "c.yaml")])
    assert summary["steps"] == 0 and summary["loss"] is None and summary["caption_to_image"]["R@1"] >= 75
    saved = json.loads((folder / "out" / "train_results.json").read_text())["closed_form"]
    assert saved["ridge"] in closed_form.RIDGES and saved["power"] in closed_form.POWERS
    assert torch.isfinite(UniMuRModel.from_pretrained(summary["checkpoint"]).W_i2t.weight).all()


def test_cached_and_plain_pairs_give_the_same_start_and_steps_go_on_from_it(folder):  # noqa: F811
    weights = {}
    for cached, steps in ((True, 0), (False, 0), (True, 2)):
        settings = base(folder) | {
            "max_steps": steps, "init": "closed-form", "cache_features": cached, "evaluate_pairs": 0,
            "learning_rate": 1e-4, "warmup_steps": 0,
        }  # fmt: skip
        (folder / "c.yaml").write_text(yaml.safe_dump(settings))
        weights[cached, steps] = load_file(f"{main([str(folder / 'c.yaml')])['checkpoint']}/model.safetensors")
    for name, tensor in weights[True, 0].items():
        torch.testing.assert_close(tensor, weights[False, 0][name], rtol=1e-2, atol=1e-3)
    moved = (weights[True, 2]["W_t2m.weight"] - weights[True, 0]["W_t2m.weight"]).abs().max()
    assert 0 < moved <= 2.1e-4


def test_pairs_that_cannot_be_used_are_counted_without_a_step_too(folder):  # noqa: F811
    (folder / "photos" / "3.png").write_bytes(b"no picture")
    settings = base(folder) | {"max_steps": 0, "init": "closed-form", "evaluate_pairs": 0}
    (folder / "c.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(TooManyBadPairsError):
        main([str(folder / "c.yaml")])
    summary = main([str(folder / "c.yaml"), "--max_bad_share=0.2"])
    assert sum(summary["skipped"].values()) == 1 and summary["pairs_seen"] == 12
