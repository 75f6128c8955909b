"""Moments of several views: exact, whatever the batches and their dtype."""

import pytest
import torch

from train.moments import Moments, Spectrum


def views(n=400, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 7, generator=rng, dtype=torch.float64) * torch.arange(1, 8) + 3
    return {"x": x, "y": 4 + x[:, :5] / 8 + 0.1 * torch.randn(n, 5, generator=rng, dtype=torch.float64)}


def moments(rows, step=64):
    sums = Moments({name: value.shape[1] for name, value in rows.items()})
    for start in range(0, len(rows["x"]), step):
        sums.add({name: value[start : start + step] for name, value in rows.items()})
    return sums


def test_covariances_are_torchs():
    rows = views()
    sums = moments(rows)
    both = torch.cat([rows["x"], rows["y"]], dim=1)
    expected = torch.cov(both.T, correction=0)
    torch.testing.assert_close(sums.covariance("x", "y"), expected[:7, 7:])
    torch.testing.assert_close(sums.covariance("y", "y"), expected[7:, 7:])
    torch.testing.assert_close(sums.mean("y"), rows["y"].mean(0))
    part = sums.of("y")
    torch.testing.assert_close(part.covariance("y", "y"), expected[7:, 7:])
    assert part.widths == {"y": 5} and part.count == 400


def test_a_weight_is_rows_that_come_again():
    a, b = views(seed=1), views(n=100, seed=2)
    weighted = moments(a) + 3.0 * moments(b)
    repeated = moments({name: torch.cat([a[name], *[b[name]] * 3]) for name in a})
    torch.testing.assert_close(weighted.covariance("x", "y"), repeated.covariance("x", "y"))
    assert weighted.count == 700


def test_bf16_rows_are_summed_in_float64():
    rows = views(n=4000)
    low = moments({name: value.bfloat16() for name, value in rows.items()})
    exact = moments({name: value.bfloat16().double() for name, value in rows.items()})
    # Sums kept in bfloat16 would stand still at a few hundred.
    assert low.products.dtype == torch.float64 and torch.equal(low.products, exact.products)
    torch.testing.assert_close(low.mean("x"), rows["x"].mean(0), rtol=0.01, atol=0.01)


def test_bad_rows_are_refused_and_spoil_nothing():
    rows = views()
    sums = moments(rows)
    with pytest.raises(ValueError, match="NaN or infinite"):
        sums.add({name: value.log() for name, value in rows.items()})
    with pytest.raises(ValueError, match=r"expected n rows of the widths \{'x': 7, 'y': 5\}"):
        sums.add({"x": rows["x"], "y": rows["y"][:3]})
    with pytest.raises(ValueError, match="expected n rows"):
        sums.add({"x": rows["x"]})
    assert torch.isfinite(sums.covariance("x", "x")).all() and sums.count == 400
    with pytest.raises(ValueError, match="1 pairs have no covariance"):
        moments({name: value[:1] for name, value in rows.items()}).covariance("x", "x")


def test_powers_of_a_covariance():
    covariance = moments(views()).covariance("y", "y")
    spectrum = Spectrum(covariance, "y")
    half = spectrum.inverse(0.5, 0.0)
    torch.testing.assert_close(half @ covariance @ half, torch.eye(5).double())
    torch.testing.assert_close(half @ half, spectrum.inverse(1.0, 0.0))
    torch.testing.assert_close(spectrum.inverse(0.0, 0.0), torch.eye(5).double())
    ridge = covariance + 0.1 * covariance.diagonal().mean() * torch.eye(5)
    torch.testing.assert_close(spectrum.inverse(1.0, 0.1), torch.linalg.inv(ridge))


def test_what_cannot_be_inverted_is_said():
    with pytest.raises(ValueError, match="the state does not vary"):
        Spectrum(torch.zeros(3, 3).double(), "the state")
    singular = Spectrum(torch.diag(torch.tensor([1.0, 0.0]).double()), "x")
    with pytest.raises(ValueError, match="singular and a ridge of 0 is too small"):
        singular.inverse(0.5, 0.0)
    assert torch.isfinite(singular.inverse(0.5, 1e-3)).all()
