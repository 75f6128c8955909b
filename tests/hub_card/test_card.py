"""The card: well-formed for the Hub, honest about licences and figures; what is no figure is refused."""

import json
import math

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from hub_card.check import NotFitError, check_card, pipeline_tags
from hub_card.results import eval_results_yaml, read_results
from modeling_unimur import UniMuRConfig
from modeling_unimur.card_unimur import PIPELINE_TAG, Result, model_card

RESULT = Result("visdial", "VisDial v1.0, val split", "corrected, version 1", "R@1", 0.25, 0.2, 0.3, 100)


def config(**fields):
    return UniMuRConfig(**fields)


def record(**changes):
    made = {
        "task": "visdial", "system": "UniMuR", "applies": True, "revision": {"towers": "t", "maps": "m"},
        "protocol": {"variant": "corrected", "version": 1, "settings": {"split": "test"}}, "data": {"source": "miniature"},
        "metrics": {"R@1": {"value": 0.25, "low": 0.2, "high": 0.3, "n": 100}},
    }  # fmt: skip
    return made | changes


def test_metadata_is_the_hubs(tmp_path):
    card = model_card(config(), "org/x", license="apache-2.0", results=[RESULT])
    card.save(tmp_path / "README.md")
    again = ModelCard.load(tmp_path / "README.md")
    check_card(again)
    assert PIPELINE_TAG in pipeline_tags() and {"feature-extraction", "text-classification"} <= pipeline_tags()
    assert again.data.library_name == "transformers" and "multimodal-retrieval" in again.data.tags
    assert again.data.license == "apache-2.0"
    (result,) = again.data.eval_results
    assert result.metric_value == 0.25 and "0.200 to 0.300" in result.metric_name
    assert result.dataset_config == "corrected, version 1"
    assert "| visdial | VisDial v1.0, val split | corrected, version 1 | R@1 0.250 (0.200-0.300; 100) |" in again.text


def test_a_non_commercial_tower_is_said_and_overrules_the_licence():
    opt = config(text_model_name_or_path="facebook/opt-6.7b", clip_model_name_or_path="openai/clip-vit-large-patch14")
    for given in (
        opt,
        config(text_model_source="facebook/opt-6.7b", clip_model_source="openai/clip-vit-large-patch14"),
    ):
        card = model_card(given, "org/x", license="apache-2.0")
        assert card.data.license == "other" and "opt-175b" in card.data.license_name
        assert card.data.license_link.endswith("MODEL_LICENSE.md")
        assert card.data.base_model == ["facebook/opt-6.7b", "openai/clip-vit-large-patch14"]
        assert "**Non-commercial" in card.text and "[MIT]" in card.text
    assert "Non-commercial" not in model_card(config(), "org/x", license="apache-2.0").text


def test_what_was_not_said_is_said_to_be_unsaid():
    text = model_card(config(), "org/x").text
    assert "No evaluation was given" in text and "not stated" in text and "emissions" not in text.lower()


@pytest.mark.parametrize(
    "figures", [(math.nan, 0.0, 1.0), (0.5, math.nan, 1.0), (math.inf, 0.0, math.inf), (0.5, 0.6, 0.7)]
)
def test_figures_that_are_none_are_refused(figures):
    value, low, high = figures
    with pytest.raises(ValueError, match=r"visdial, R@1: .* is no figure"):
        model_card(config(), "org/x", results=[Result("visdial", "d", "p", "R@1", value, low, high, 10)])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("pipeline_tag", "multimodal-telepathy", "none of the Hub's tasks"), ("tags", ["two words"], "not one word")],
)
def test_the_check_of_a_card_finds_what_the_hubs_own_lets_pass(field, value, message):
    card = model_card(config(), "org/x")
    setattr(card.data, field, value)
    with pytest.raises(NotFitError, match=message):
        check_card(card)


def test_the_check_of_a_card_finds_nan():
    card = model_card(config(), "org/x")
    card.data.eval_results = [EvalResult("t", "d", "D", "m", math.nan, metric_name="R@1")]
    with pytest.raises(NotFitError, match="R@1 is nan"):
        check_card(card)


def test_results_are_read_from_both_kinds_of_json(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps([record(), record(system="CLIP")]))
    (tmp_path / "report.json").write_text(json.dumps({"seed": 0, "results": [record(task="vist")]}))
    results = read_results([tmp_path / "run.json", tmp_path / "report.json"], {"towers": "t", "maps": "m"})
    assert [(r.task, r.value, r.low, r.high, r.n) for r in results] == [
        ("visdial", 0.25, 0.2, 0.3, 100), ("vist", 0.25, 0.2, 0.3, 100)]  # fmt: skip
    assert results[0].protocol == "corrected, version 1" and results[0].dataset == "miniature, test split"


def test_results_of_other_weights_or_of_nobody_are_refused(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps([record()]))
    with pytest.raises(ValueError, match=r"run\.json, visdial: measured on other weights \(maps differ\)"):
        read_results([tmp_path / "run.json"], {"towers": "t", "maps": "other"})
    with pytest.raises(ValueError, match=r"no figures of 'GILL': it has \['UniMuR'\]"):
        read_results([tmp_path / "run.json"], {"towers": "t", "maps": "m"}, system="GILL")


def test_evaluation_results_files_are_the_hubs_format():
    files = eval_results_yaml([RESULT], {"visdial": "org/visdial"})
    (entry,) = yaml.safe_load(files[".eval_results/visdial.yaml"])
    assert entry["dataset"] == {"id": "org/visdial", "task_id": "corrected-version-1-r@1"} and entry["value"] == 0.25
    assert "0.2000 to 0.3000 over 100 items" in entry["notes"]
    with pytest.raises(ValueError, match="no figures of the task 'vist'"):
        eval_results_yaml([RESULT], {"vist": "org/vist"})


def test_a_card_says_with_what_its_checkpoint_draws(tmp_path):
    plain = model_card(config(drawing_model_name_or_path="org/diffusion"), "org/x").text
    assert "diffusion" not in plain and "was asked to draw" not in plain
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    draws = config(n_drawing_tokens=8, drawing_model_name_or_path=name, drawing_model_revision="abc1234")
    text = model_card(draws, "org/x").text
    assert f"frozen diffusion model, [{name}](https://huggingface.co/{name}) at revision `abc1234`" in text
    assert f"- {name}: CreativeML Open RAIL-M" in text and "but for pictures that it was asked to draw" in text
    own = model_card(config(n_drawing_tokens=8, drawing_model_name_or_path=str(tmp_path)), "org/x").text
    assert "one that is not on the Hub" in own and str(tmp_path) not in own
