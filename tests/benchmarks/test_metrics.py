"""The metrics against cases worked by hand and against every order of their ties."""

import doctest
import itertools
import math

import evaluate
import numpy as np
import pyarrow as pa
import pytest

from benchmarks import metrics
from benchmarks.metrics import (
    cosine_per_item,
    hit_rate_per_item,
    image_rate_per_item,
    load,
    normalise_answer,
    visdial_per_item,
    vqa_accuracy_per_item,
)
from benchmarks.metrics.recall_at_k import recall_at_k
from tests.processes import run_script

NAN = math.nan
NAMES = ["clip_sim", "image_retrieval_rate", "recall_at_k", "visdial", "vqa_accuracy"]


def orders(scores):
    """Every order of the candidates that their scores allow, each as often as any other."""
    for shuffled in itertools.permutations(range(len(scores))):
        yield sorted(shuffled, key=lambda i: -scores[i])


@pytest.mark.parametrize("name", NAMES)
def test_a_module_is_complete_and_its_example_holds(name):
    metric = load(name)
    assert isinstance(metric, evaluate.Metric) and metric.name == name
    assert metric.description.strip() and "@inproceedings" in metric.citation
    example = doctest.DocTestParser().get_doctest(metric.inputs_description, {"load": load}, name, None, 0)
    ran = doctest.DocTestRunner(verbose=False).run(example)
    assert ran.attempted == 2 and ran.failed == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_the_readme_holds(name):
    text = (metrics.FOLDER / name / "README.md").read_text(encoding="utf-8")
    code, example = text.split("```python\n")[1].split("```")[0].split("metric.compute")
    expected = " ".join(line.lstrip("# ") for line in example.splitlines() if line.startswith("#"))
    call = "".join(line for line in example.splitlines() if not line.startswith("#"))
    assert f'load("benchmarks/metrics/{name}")' in code
    assert eval(f"metric.compute{call}", {"metric": load(name)}) == eval(expected)


def test_names():
    assert list(metrics.NAMES) == NAMES
    with pytest.raises(ValueError, match="no metric 'recall'; there are clip_sim"):
        load("recall")


def test_loads_by_path_outside_this_repository(tmp_path):
    # Self-contained: in another folder, with no `benchmarks` to import.
    folder = str(metrics.FOLDER / "recall_at_k")
    code = (
        f"import evaluate; print(evaluate.load({folder!r}).compute(predictions=[[1.0, 0.0]], references=[[0]])['R@1'])"
    )
    env = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")}
    done = run_script(code, cwd=tmp_path, environment=env)
    assert done.stdout.strip() == "1.0", done.stderr


def test_two_metrics_of_one_name_do_not_mix():
    one, two = load("recall_at_k"), load("recall_at_k")
    assert one.data_dir != two.data_dir
    one.add_batch(predictions=[[1.0, 0.0]], references=[[0]])
    two.add_batch(predictions=[[0.0, 1.0]] * 3, references=[[0]] * 3)
    assert one.compute()["R@1"] == 1
    assert two.compute() == {"R@1": 0, "R@5": 1, "R@10": 1, "n": 3, "without_answer": 0}


def test_an_error_does_not_affect_the_next_call():
    metric = load("recall_at_k")
    with pytest.raises(ValueError, match="query 1: a score is NaN"):
        metric.compute(predictions=[[1.0], [NAN, 0.0]], references=[[0], [1]])
    assert metric.compute(predictions=[[1.0]], references=[[0]])["n"] == 1


def test_recall_by_hand():
    scores = [[0.9, 0.5, 0.1], [0.2, 0.2, 0.2], [0.1, 0.5, 0.5], [3, 2, 1]]
    # First: rank 2. Second: a tie of three: 1/3, 2/3. Third: the better of its two gold ones ties with another: 1/2 of
    # being first. Fourth: no gold candidate.
    hits = hit_rate_per_item(scores, [[1], [0], [0, 2], []], (1, 2, 3, 9))
    expected = [[0, 1, 1, 1], [1 / 3, 2 / 3, 1, 1], [1 / 2, 1, 1, 1], [NAN] * 4]
    np.testing.assert_allclose(hits, expected, rtol=1e-15)
    # Two of four tied are gold: both of two places go to the others with (2/4)(1/3) = 1/6.
    np.testing.assert_allclose(hit_rate_per_item([[7, 7, 7, 7]], [[0, 3]], (1, 2, 3)), [[1 / 2, 5 / 6, 1]])


def test_recall_is_the_share_of_orders_with_a_hit():
    rng = np.random.default_rng(0)
    ks = (1, 2, 3, 5, 10)
    for _ in range(40):
        scores = rng.integers(0, 3, rng.integers(1, 7))
        gold = rng.choice(len(scores), rng.integers(1, len(scores) + 1), replace=False).tolist()
        hits = [[bool(set(order[:k]) & set(gold)) for k in ks] for order in orders(scores)]
        np.testing.assert_allclose(hit_rate_per_item([scores], [gold], ks)[0], np.mean(hits, axis=0), atol=1e-12)


def test_rows_and_matrix_and_blocks_agree(monkeypatch):
    rng = np.random.default_rng(1)
    scores = rng.integers(0, 20, (50, 30)).astype(np.float32)
    gold = [rng.integers(0, 30, rng.integers(0, 4)).tolist() for _ in range(50)]
    whole = hit_rate_per_item(scores, gold)
    one_by_one = np.concatenate([hit_rate_per_item([s], [r]) for s, r in zip(scores, gold, strict=True)])
    np.testing.assert_array_equal(whole, one_by_one)
    monkeypatch.setattr(recall_at_k, "BLOCK", 100)
    np.testing.assert_array_equal(whole, hit_rate_per_item(scores, gold))
    # Lengths that differ, in mixed order: a candidate below all others changes nothing.
    ragged = [[*s, -1] if i % 3 == 0 else s for i, s in enumerate(scores)]
    np.testing.assert_array_equal(whole, hit_rate_per_item(ragged, gold))


def test_a_constant_model_has_chance():
    hits = hit_rate_per_item(np.zeros((40, 40)), [[i] for i in range(40)], (1, 10, 40))
    np.testing.assert_allclose(hits.mean(0), [1 / 40, 1 / 4, 1])


def test_infinite_scores_have_ranks():
    hits = hit_rate_per_item([[-np.inf, -np.inf, 0.0], [np.inf, 1.0, 2.0]], [[0], [0]], (1, 2))
    np.testing.assert_allclose(hits, [[0, 1 / 2], [1, 1]])


def test_recall_by_batches_and_counts():
    metric = load("recall_at_k")
    for predictions, references in [
        ([[1.0, 2.0], [2.0]], [[0], [0]]),
        ([[0.0, 0.0, 0.0]], [[]]),
        ([[5.0, 5.0]], [[1]]),
    ]:
        metric.add_batch(predictions=predictions, references=references)
    # Ranks 2, 1, undefined, and a tie of two.
    assert metric.compute(ks=[1, 2]) == {"R@1": 0.5, "R@2": 1, "n": 3, "without_answer": 1}
    nothing = metric.compute(predictions=[[1.0], []], references=[[], []])
    assert math.isnan(nothing["R@10"]) and (nothing["n"], nothing["without_answer"]) == (0, 2)


def test_rows_of_a_column_that_is_a_slice():
    column = pa.chunked_array([pa.array([[1.0], [2.0, 3.0], [], [4.0]]).slice(1), pa.array([[5.0]])])
    assert [row.tolist() for row in recall_at_k._rows(column)] == [[2, 3], [], [4], [5]]


def test_recall_keeps_float64():
    # The scores differ by less than float32 resolves.
    assert load("recall_at_k").compute(predictions=[[1.0, 1.0 + 1e-12]], references=[[0]])["R@1"] == 0


@pytest.mark.parametrize(
    ("scores", "gold", "ks", "message"),
    [
        ([[0.0], [1.0, 2.0]], [[0], [2]], [1], "query 1: gold candidate 2, but it has candidates 0 to 1"),
        ([[0.0, 1.0]], [[-1]], [1], "query 0: gold candidate -1"),
        ([[0.0], [1.0, NAN]], [[0], [0]], [1], "query 1: a score is NaN"),
        ([[0.0]], [[0], [0]], [1], "1 rows of scores for 2"),
        ([[0.0]], [[0]], [0], "at least 1"),
    ],
)
def test_recall_refuses(scores, gold, ks, message):
    with pytest.raises(ValueError, match=message):
        hit_rate_per_item(scores, gold, ks)


def test_image_retrieval_rate():
    # Image turns: retrieved, not, tied (1/2): 1/2. Text-only turns: retrieved, not, not, not: 1/4.
    retrieved, has = [True, False, 0.5, True, False, False, False], [True] * 3 + [False] * 4
    assert load("image_retrieval_rate").compute(predictions=retrieved, references=has) == {
        "image_retrieval_rate": 0.5, "on_text_only_turns": 0.25, "image_turns": 3, "text_only_turns": 4,
    }  # fmt: skip
    image_turns, text_only = image_rate_per_item(retrieved, has)
    np.testing.assert_array_equal(image_turns, [1, 0, 0.5, NAN, NAN, NAN, NAN])
    np.testing.assert_array_equal(text_only, [NAN, NAN, NAN, 1, 0, 0, 0])


def test_image_retrieval_rate_without_a_kind_of_turn():
    result = load("image_retrieval_rate").compute(predictions=[True], references=[False])
    assert math.isnan(result.pop("image_retrieval_rate"))
    assert result == {"on_text_only_turns": 1, "image_turns": 0, "text_only_turns": 1}
    with pytest.raises(ValueError, match=r"turn 1: with_image is 1\.5"):
        image_rate_per_item([1, 1.5], [True, True])
    with pytest.raises(ValueError, match="one value per turn"):
        image_rate_per_item([1, 1], [True])


def test_clip_sim_is_the_mean_cosine_for_any_lengths():
    # (3, 4)·(4, 3) / 25 = 0.96; (1, 0)·(0, 2) = 0; opposite: -1.
    texts, images = [[3, 4], [1, 0], [1, 1]], [[4, 3], [0, 2], [-5, -5]]
    np.testing.assert_allclose(cosine_per_item(texts, images), [0.96, 0, -1], atol=1e-15)
    scaled = cosine_per_item(np.array(texts) * 1e-200, np.array(images) * 1e200)
    np.testing.assert_allclose(scaled, [0.96, 0, -1], atol=1e-15)
    result = load("clip_sim").compute(predictions=texts, references=images)
    assert result["clip_sim"] == pytest.approx(-0.04 / 3) and result["n"] == 3


def test_clip_sim_edges():
    result = load("clip_sim").compute(predictions=[], references=[])
    assert math.isnan(result["clip_sim"]) and result["n"] == 0
    with pytest.raises(ValueError, match="image 1: its embedding is zero"):
        cosine_per_item([[1, 0], [1, 0]], [[1, 0], [0, 0]])
    with pytest.raises(ValueError, match="text 0: its embedding is zero or not finite"):
        cosine_per_item([[NAN, 1]], [[1, 0]])
    with pytest.raises(ValueError, match="same shape"):
        cosine_per_item([[1, 0]], [[1, 0, 0]])
    with pytest.raises(ValueError, match="different lengths"):
        cosine_per_item([[1, 0], [1]], [[1, 0], [1, 1]])


def test_visdial_by_hand():
    # Scores rank the options 2, 0, 3, 1; the answer, 0, is second. Three relevances are not zero, so three ranks count:
    # DCG = 0.2/log2(2) + 1/log2(3) + 0/log2(4); the best order has 1, 0.4, 0.2.
    values = visdial_per_item([0.5, 0.1, 0.9, 0.3], 0, [1.0, 0.4, 0.2, 0.0])
    dcg, best = 0.2 + 1 / math.log2(3), 1 + 0.4 / math.log2(3) + 0.2 / 2
    assert values == pytest.approx({"R@1": 0, "R@5": 1, "R@10": 1, "MRR": 0.5, "mean rank": 2, "NDCG": dcg / best})


def test_visdial_ties_by_hand():
    # The answer ties with two below the best: ranks 2, 3, 4. 1/2 + 1/3 + 1/4 = 13/12, over 3. One relevance: rank 1 counts.
    values = visdial_per_item([9, 1, 1, 1], 2, [0, 0, 1, 0])
    assert values == pytest.approx({"R@1": 0, "R@5": 1, "R@10": 1, "MRR": 13 / 36, "mean rank": 3, "NDCG": 0})
    # All alike: 100 options, five of them among the first five.
    values = visdial_per_item([0] * 100, 17, [0] * 17 + [0.5] + [0] * 82)
    harmonic = sum(1 / i for i in range(1, 101)) / 100
    expected = {"R@1": 0.01, "R@5": 0.05, "R@10": 0.1, "MRR": harmonic, "mean rank": 50.5, "NDCG": 0.01}
    assert values == pytest.approx(expected)


def test_visdial_is_the_mean_over_the_orders():
    rng = np.random.default_rng(2)
    for _ in range(30):
        m = rng.integers(2, 7)
        scores, answer = rng.integers(0, 3, m), int(rng.integers(m))
        relevance = rng.choice([0, 0, 0.2, 0.6, 1], m)
        relevance[rng.integers(m)] = 0.4
        k, best, rows = int((relevance != 0).sum()), sorted(relevance, reverse=True), []
        for order in orders(scores):
            rank = order.index(answer) + 1
            dcg = sum(relevance[o] / math.log2(i + 2) for i, o in enumerate(order[:k]))
            ideal = sum(r / math.log2(i + 2) for i, r in enumerate(best[:k]))
            rows.append([rank <= 1, rank <= 5, rank <= 10, 1 / rank, rank, dcg / ideal])
        values = visdial_per_item(scores, answer, relevance)
        assert list(values) == ["R@1", "R@5", "R@10", "MRR", "mean rank", "NDCG"]
        np.testing.assert_allclose(list(values.values()), np.mean(rows, axis=0), rtol=1e-12)


def test_visdial_module_counts_what_ndcg_leaves_out():
    scores = [[3.0, 2.0, 1.0]] * 4
    relevance = [[0.0, 0.0, 1.0], [], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    result = load("visdial").compute(predictions=scores, references=[0, 1, 2, 0], relevance=relevance)
    # Ranks 1, 2, 3, 1. NDCG: one relevance, so one rank: 0 and 1.
    assert result == pytest.approx({
        "R@1": 0.5, "R@5": 1, "R@10": 1, "MRR": (1 + 1 / 2 + 1 / 3 + 1) / 4, "mean rank": 7 / 4, "NDCG": 0.5,
        "n": 4, "with_relevance": 2, "relevance_all_zero": 1,
    })  # fmt: skip
    result = load("visdial").compute(predictions=scores[:1], references=[0], relevance=[[]])
    assert math.isnan(result["NDCG"]) and result["R@1"] == 1 and result["with_relevance"] == 0


def test_visdial_refuses():
    with pytest.raises(ValueError, match="answer 3, but there are options 0 to 2"):
        visdial_per_item([1, 2, 3], 3)
    with pytest.raises(ValueError, match="NaN"):
        visdial_per_item([1, NAN], 0)
    for bad in ([1, 0], [1, 0, -1], [1, 0, NAN]):
        with pytest.raises(ValueError, match="relevances of shape"):
            visdial_per_item([1, 2, 3], 0, bad)
    with pytest.raises(ValueError, match="question 1: answer 2"):
        load("visdial").compute(predictions=[[1.0], [1.0, 2.0]], references=[0, 2], relevance=[[], []])


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The Red Hat", "red hat"),
        ("two pandas", "2 pandas"),
        ("None", "0"),
        ("ten an eleven", "10 eleven"),
        ("yes.", "yes"),
        ("left/right", "left right"),  # a mark between letters becomes a space
        ("left/ right", "left right"),  # beside a space it goes
        ("a/b c/ d", "ab c d"),  # and then everywhere; "a/b" is not an article
        ("x;?y?z", "x y z"),  # the space that another mark became is none
        ("t-shirt", "t shirt"),
        ("1,000", "1000"),  # a comma between digits goes,
        ("1,000 t-shirt", "1000 tshirt"),  # and takes the other marks with it
        ("red,blue", "red blue"),
        ("5.30", "5.30"),  # a digit follows
        ("5. 30.", "5 30"),  # the digit before was meant to count, and does not
        ("3:30", "3:30"),  # neither the colon nor the apostrophe is a mark
        ("dont", "don't"),
        ("don't", "don't"),
        ("couldntve", "couldntve"),  # the table knows one missing apostrophe,
        ("couldnt've couldn'tve", "couldn't've couldn't've"),  # either one
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),  # the wrong way round
        ("Im Ive lets shes", "im ive lets shes"),  # not restored
        ("twas oclock", "'twas o'clock"),
        ("." * 40, "." * 8),  # at most 32 full stops go
        ("?", ""),
    ],
)
def test_normalisation(answer, normalised):
    assert normalise_answer(answer) == normalised


@pytest.mark.parametrize(("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (9, 1)])
def test_vqa_accuracy_of_ten_by_hand(matches, accuracy):
    # m of ten match: leaving out one of them leaves m - 1, leaving out another leaves m.
    # m = 3: (3 min(1, 2/3) + 7 min(1, 1)) / 10 = 0.9; m = 2: (2/3 + 8 2/3) / 10 = 0.6; m = 1: (0 + 9/3) / 10 = 0.3.
    humans = ["a cat"] * matches + [f"dog {i}" for i in range(10 - matches)]
    assert vqa_accuracy_per_item("Cat!", humans) == pytest.approx(accuracy)


def test_vqa_accuracy_is_the_mean_over_leaving_one_out():
    rng = np.random.default_rng(3)
    for count in range(1, 14):
        humans = rng.choice(["yes", "no", "maybe"], count).tolist()
        left = [humans[:i] + humans[i + 1 :] for i in range(count)]
        expected = np.mean([min(1, others.count("yes") / 3) for others in left])
        assert vqa_accuracy_per_item("yes", humans) == pytest.approx(expected)


def test_where_all_humans_agree_nothing_but_space_is_normalised():
    assert vqa_accuracy_per_item("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy_per_item("Yes", ["yes"] * 9 + ["no"]) == 1
    assert vqa_accuracy_per_item(" red\that\n", ["red hat"] * 9 + ["red\nhat "]) == 1
    assert vqa_accuracy_per_item("two", ["2"] * 10) == 0


def test_vqa_with_other_numbers_of_humans():
    # One: no one is left to match. Two: one is, 1/3. Three: 2/3. Four: 1.
    assert [vqa_accuracy_per_item("x", ["x"] * h) for h in (1, 2, 3, 4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert math.isnan(vqa_accuracy_per_item("x", []))


def test_vqa_module_counts_and_types():
    answers, types = ["yes", "2", "x", "no"], ["yes/no", "number", "other", "yes/no"]
    humans = [["yes"] * 10, ["2"] * 2 + ["3"] * 8, [], ["yes"] * 10]
    result = load("vqa_accuracy").compute(predictions=answers, references=humans, answer_types=types)
    assert math.isnan(result.pop("accuracy (other)"))
    assert result == pytest.approx({
        "accuracy": (1 + 0.6) / 3, "n": 3, "without_answers": 1, "accuracy (yes/no)": 0.5, "n (yes/no)": 2,
        "accuracy (number)": 0.6, "n (number)": 1, "n (other)": 0,
    })  # fmt: skip
    assert "n (number)" not in load("vqa_accuracy").compute(predictions=answers, references=humans)
    nothing = load("vqa_accuracy").compute(predictions=["x"], references=[[]])
    assert math.isnan(nothing["accuracy"]) and nothing["without_answers"] == 1


def test_vqa_refuses():
    with pytest.raises(ValueError, match="list of strings"):
        vqa_accuracy_per_item("yes", "yes")
    with pytest.raises(ValueError, match="list of strings"):
        vqa_accuracy_per_item("2", [2, 2])
    with pytest.raises(ValueError, match="1 answer_types for 2 questions"):
        load("vqa_accuracy").compute(predictions=["x", "x"], references=[["x"], ["x"]], answer_types=["other"])
