"""Jobs killed at random go on to the bytes of an undisturbed run (short form of `tests.stress.kills`)."""

import pytest

from tests.stress import kills


@pytest.mark.parametrize(("name", "times"), [("training", 2), ("pool saved over another", 8)])
def test_a_killed_job_goes_on_to_the_same_bytes(name, times):
    outcomes, bad = kills.run(name, times, seed=1)
    assert not bad and outcomes == {"recovered": times}


def test_a_job_that_loses_what_it_wrote_is_noticed(monkeypatch):
    def half(inputs, folder):
        (folder / "a.arrow").write_bytes(b"x" if (folder / "a.arrow").exists() else b"y")
        (folder / "b.arrow").write_bytes(b"x")

    monkeypatch.setitem(kills.JOBS, "half", kills.Job(lambda inputs: None, half))
    monkeypatch.setattr(kills.random.Random, "uniform", lambda self, low, high: 0.001)
    outcomes, bad = kills.run("half", 12)
    assert outcomes["lost"] and outcomes["recovered"] and "other bytes in a.arrow" in bad[0]
