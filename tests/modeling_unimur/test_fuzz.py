"""Whatever a verb is given, it answers or refuses in words: a short form of `python -m tests.stress.fuzz`."""

import os

import pytest

from tests.stress.fuzz import SHORT, VERBS, made_pool, run

CASES = int(os.environ.get("UNIMUR_FUZZ_CASES", SHORT))


@pytest.fixture(scope="module")
def pool(tiny):
    return made_pool(tiny())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("verb", VERBS)
def test_every_case_is_answered_or_refused_in_words(tiny, pool, verb):
    outcomes = run(verb, tiny(), pool, CASES)
    assert outcomes["answered"] and outcomes["refused"]
