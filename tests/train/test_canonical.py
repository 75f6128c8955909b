"""Canonical correlation: what it solves, against the definition; and that it recovers what noise hides."""

import pytest
import torch
import torch.nn.functional as F

from train.canonical import STATE, TEXT, Correlations, Setting
from train.moments import Moments


def pairs(n=2000, seed=0, noise=0.5):
    """States and images that share four hidden causes, with directions of their own beside them, and a cone's mean."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)  # noqa: E731
    mix = torch.Generator().manual_seed(99)
    mixing = [torch.randn(10, width, generator=mix, dtype=torch.float64) for width in (12, 10, 10)]
    cause = draw(n, 4)
    views = [torch.cat([cause + noise * draw(n, 4), 2 * draw(n, 6)], dim=1) @ m for m in mixing]
    return {STATE: views[0] + 5, "pooled": views[1] - 20, TEXT: views[2] + 1}


def moments(rows):
    sums = Moments({name: value.shape[1] for name, value in rows.items()})
    sums.add(rows)
    return sums


def setting(**changes):
    return Setting(**{"feature": "pooled", "width": 4, "ridge": 1e-6, "power": 0.0} | changes)


def test_the_maps_whiten_and_correlate_as_the_definition_says():
    rows = pairs()
    maps = Correlations(moments(rows)).maps(setting(width=6))
    h, v = (maps.of(view)(rows[view]).double() for view in (STATE, "pooled"))
    assert h.mean(0).abs().max() < 1e-4 and v.mean(0).abs().max() < 1e-4
    n = len(h)
    torch.testing.assert_close(h.T @ h / n, torch.eye(6).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(v.T @ v / n, torch.eye(6).double(), atol=1e-2, rtol=0)
    torch.testing.assert_close(h.T @ v / n, torch.diag(maps.correlations), atol=1e-3, rtol=0)
    assert (maps.correlations.diff() <= 0).all() and maps.correlations[3] > 0.5 > 0.2 > maps.correlations[4]


def test_no_other_direction_correlates_more():
    rows = pairs()
    sums = moments(rows)
    best = Correlations(sums).maps(setting()).correlations[0]
    a, b = (rows[v] - rows[v].mean(0) for v in (STATE, "pooled"))
    rng = torch.Generator().manual_seed(1)
    for _ in range(50):
        x, y = a @ torch.randn(12, generator=rng).double(), b @ torch.randn(10, generator=rng).double()
        assert F.cosine_similarity(x, y, dim=0).abs() < best + 1e-6


def test_directions_weigh_by_their_correlation():
    correlations = Correlations(moments(pairs()))
    plain, weighted = (correlations.maps(setting(power=w)) for w in (0.0, 2.0))
    for view in (STATE, "pooled"):
        expected = plain.correlations[:, None] ** 2 * plain.maps[view][0]
        torch.testing.assert_close(weighted.maps[view][0], expected)


def test_it_finds_the_pairs_of_unseen_rows_where_plain_cosines_of_a_cone_do_not():
    maps = Correlations(moments(pairs(noise=0.1))).maps(setting(power=1.0))
    new = pairs(n=200, seed=5, noise=0.1)
    scores = F.normalize(maps.of(STATE)(new[STATE]), dim=1) @ F.normalize(maps.of("pooled")(new["pooled"]), dim=1).T
    hits = (scores.argmax(1) == torch.arange(200)).double().mean()
    assert hits > 0.6
    # The state's ridge prediction of the image, compared with images as they are, is in their cone.
    cone = F.normalize(new["pooled"], dim=1)
    assert (cone @ cone.T).mean() > 0.8


def test_a_third_view_without_weight_is_the_two_view_solution_and_with_weight_another():
    correlations = Correlations(moments(pairs()))
    two, tiny, three = (correlations.maps(setting(text_weight=w)) for w in (0.0, 1e-9, 1.0))
    torch.testing.assert_close(two.correlations, tiny.correlations, atol=1e-3, rtol=0)
    assert not torch.allclose(two.maps[STATE][0].abs(), three.maps[STATE][0].abs(), rtol=1e-2)
    # CLIP's texts come to the states' place in either.
    rows = pairs(noise=0.1)
    correlations = Correlations(moments(rows))
    for weight in (0.0, 1.0):
        maps = correlations.maps(setting(text_weight=weight))
        x, h = maps.of(TEXT)(rows[TEXT]), maps.of(STATE)(rows[STATE])
        assert F.cosine_similarity(x, h).mean() > 0.7


def test_documents_take_the_share_they_are_given():
    a, b = pairs(seed=1), {k: v for k, v in pairs(n=500, seed=2, noise=2.0).items() if k != TEXT}
    both = Correlations(moments(a), moments(b))
    joined = Moments({STATE: 12, "pooled": 10})
    for rows in (a, *[b] * 4):  # as many as the pairs
        joined.add({view: rows[view] for view in (STATE, "pooled")})
    torch.testing.assert_close(both.covariance(STATE, "pooled", 0.5), joined.covariance(STATE, "pooled"))
    torch.testing.assert_close(both.mean(STATE, 0.5), joined.mean(STATE))
    torch.testing.assert_close(both.covariance(STATE, "pooled", 0.0), moments(a).covariance(STATE, "pooled"))


def test_what_cannot_be_correlated_is_said():
    rows = pairs(n=50)
    with pytest.raises(ValueError, match="width=11: there are 10 canonical directions"):
        Correlations(moments(rows)).maps(setting(width=11))
    with pytest.raises(ValueError, match="the pooled of a pair does not vary"):
        Correlations(moments(rows | {"pooled": torch.ones(50, 10).double()})).maps(setting())
    collinear = rows | {STATE: rows[STATE][:, :1].repeat(1, 12)}
    maps = Correlations(moments(collinear)).maps(setting(ridge=1e-3))
    assert torch.isfinite(maps.maps[STATE][0]).all() and maps.correlations[1] < 1e-3
