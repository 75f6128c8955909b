"""What is pushed has been called as its users would; what is not fit is not uploaded."""

import importlib.metadata
import json
import os

import pytest

from hub_card import arguments, check, push
from hub_card.check import NotFitError, check_folder
from hub_card.push import main
from modeling_unimur import UniMuRModel
from tests.conftest import picture
from tests.processes import ROOT, run_script
from train.command import run_command


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    tiny().save_pretrained(folder / "full", with_towers=True)
    model = UniMuRModel.from_pretrained(folder / "full")
    model.build_pool(images=[picture(1)], texts=["hi"], show_progress_bar=False).save_to_disk(folder / "pool")
    fingerprint = {k: model.fingerprint[k] for k in ("towers", "maps")}
    record = {
        "task": "visdial", "system": "UniMuR", "applies": True, "revision": fingerprint, "data": {"source": "miniature"},
        "protocol": {"variant": "corrected", "version": 1, "settings": {"split": "test"}},
        "metrics": {"R@1": {"value": 0.25, "low": 0.2, "high": 0.3, "n": 100}},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps([record]))
    return folder


def test_a_dry_run_makes_a_repository_whose_every_part_was_called(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    arguments = [
        str(checkpoint / "full"), "org/unimur-tiny", "--license", "apache-2.0", "--training_data", "made-up captions",
        "--results", str(checkpoint / "results.json"), "--eval_dataset", "visdial=org/visdial",
        "--pool", str(checkpoint / "pool"), "--folder", str(tmp_path / "made"), "--dry_run",
    ]  # fmt: skip
    assert main(arguments) is None
    printed = capsys.readouterr().out
    for part in ("card: metadata", "AutoModel with its self-check", "endpoint handler", "every snippet of the card"):
        assert part in printed
    assert (tmp_path / "made" / ".eval_results" / "visdial.yaml").is_file()
    assert "made-up captions" in (tmp_path / "made" / "README.md").read_text()


DRY = ["--folder", "made", "--dry_run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["full", "org/x", "--dry_run"], "--dry_run needs --folder"),
        (["full", "org/x", "--space", "org/page", *DRY], "--space needs --pool"),
        (["full", "org/x y", *DRY], "repo_id 'org/x y' is no name on the Hub"),
        (["full", "x", *DRY], "repo_id 'x' names no owner"),
        (["full", "org/x", "--pool", "pool", "--space", "a/b/c", *DRY], "--space 'a/b/c' is no name on the Hub"),
        (["no/such/folder", "org/x", *DRY], "checkpoint 'no/such/folder' is neither a folder nor a name"),
        (["pool", "org/x", *DRY], "checkpoint 'pool' holds no config.json"),
        (["full", "org/x", "--pool", "full", *DRY], "--pool 'full' holds no pool.json"),
        (["full", "org/x", "--folder", "results.json", "--dry_run"], "--folder 'results.json' is a file"),
        (["full", "org/x", "--folder", ".", "--dry_run"], "'pool' is a former pool.*delete it, or give --pool"),
        (["full", "org/x", "--training_data", "notes/data.md", *DRY], "looks like a path and is no file"),
        (["full", "org/x", "--results", "absent.json", *DRY], "absent.json"),
        (["full", "org/x", "--results", "full/config.json", *DRY], "config.json is no json of benchmarks.run"),
        (["full", "org/x", "--results", "full/model.safetensors", *DRY], "model.safetensors is no json"),
        (["full", "org/x", "--eval_dataset", "visdial", *DRY], "'visdial' is not TASK=NAME"),
        (["full", "org/x", "--eval_dataset", "vist=org/vist", *DRY], "no such task, but none"),
        (["full", "org/x"], "HF_HUB_OFFLINE is set"),
    ],
)  # fmt: skip
def test_an_argument_is_refused_in_one_sentence_before_the_model_is_loaded(
    checkpoint, arguments, message, monkeypatch
):
    monkeypatch.chdir(checkpoint)
    monkeypatch.setattr(push.UniMuRModel, "from_pretrained", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(SystemExit, match=message) as ended:
        run_command(lambda: main(arguments))
    assert str(ended.value).startswith("error: ") and "Traceback" not in str(ended.value)


def test_who_is_not_logged_in_learns_it_first(checkpoint, monkeypatch):
    monkeypatch.setattr(arguments.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(arguments, "get_token", lambda: None)
    with pytest.raises(ValueError, match="not logged in: run `hf auth login`"):
        main([str(checkpoint / "full"), "org/x"])


def test_no_usage_data_is_sent_unless_somebody_wants_it(tmp_path):
    read = (
        "import sys; sys.path[:0] = ['hub_card/space', '.']; {}; "
        "import gradio.analytics, huggingface_hub.constants as c; "
        "print(gradio.analytics.analytics_enabled(), c.HF_HUB_DISABLE_TELEMETRY)"
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_DISABLE_TELEMETRY", "GRADIO_ANALYTICS_ENABLED")}
    wanted = {"HF_HUB_DISABLE_TELEMETRY": "0", "GRADIO_ANALYTICS_ENABLED": "True"}

    def sends(module, more):
        done = run_script(read.format(f"import {module}"), cwd=ROOT, environment=kept | more)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert sends("hub_card", {}) == sends("app", {}) == ["False", "True"]
    assert sends("hub_card", wanted) == ["True", "False"]


def test_an_endpoint_installs_what_the_package_requires_and_its_pool(checkpoint, tmp_path):
    pytest.importorskip("faiss")
    required = [line for line in importlib.metadata.requires("modeling-unimur") if "extra" not in line]
    model = UniMuRModel.from_pretrained(checkpoint / "full")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "requirements.txt").read_text().splitlines() == required
    pool = model.build_pool(texts=["a", "b"], show_progress_bar=False).build_index()
    model.save_pretrained(tmp_path, pool=pool)
    *plain, faiss = (tmp_path / "requirements.txt").read_text().splitlines()
    assert plain == required and faiss.startswith("faiss-cpu>=")


def test_requirements_come_from_the_checkpoint_where_the_package_is_not_installed(checkpoint, tmp_path, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    UniMuRModel.from_pretrained(checkpoint / "full").save_pretrained(tmp_path)
    written = (checkpoint / "full" / "requirements.txt").read_text()
    assert "datasets" in written and (tmp_path / "requirements.txt").read_text() == written


@pytest.fixture
def made(checkpoint, tmp_path):
    model = UniMuRModel.from_pretrained(checkpoint / "full")
    model.save_pretrained(tmp_path / "made", golden=True)
    from modeling_unimur.card_unimur import model_card

    model_card(model.config, "org/x").save(tmp_path / "made" / "README.md")
    return tmp_path / "made"


def test_a_folder_that_lacks_a_part_is_refused(made):
    (made / "handler.py").unlink()
    with pytest.raises(NotFitError, match=r"lacks handler\.py"):
        check_folder(made, "org/x")


def test_a_folder_with_a_pickle_is_refused(made):
    (made / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(NotFitError, match=r"pickled files: pytorch_model\.bin"):
        check_folder(made, "org/x")


def test_an_adapter_on_towers_of_this_machine_is_refused(tiny, tmp_path):
    tiny().save_pretrained(tmp_path, golden=True)
    from modeling_unimur.card_unimur import model_card

    model_card(tiny().config, "org/x").save(tmp_path / "README.md")
    with pytest.raises(NotFitError, match=r"text_model_name_or_path .*is a folder of this machine.*with_towers=True"):
        check_folder(tmp_path, "org/x")
    with pytest.raises(ValueError, match="is a folder of this machine"):
        tiny().push_to_hub("org/x")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import modeling_unimur", "No module named 'modeling_unimur'"),
        ("from huggingface_hub import HfApi; HfApi().model_info('someone/other')", "OfflineModeIsEnabled"),
    ],
)
def test_what_its_users_do_not_have_the_check_has_not_either(made, monkeypatch, line, message):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(check, "LOADS", "")  # the snippets alone
    readme = made / "README.md"
    readme.write_text(readme.read_text().replace("## Use", f"```python\n{line}\n```\n\n## Use", 1))
    with pytest.raises(NotFitError, match=message):
        check_folder(made, "org/x", say=lambda part: None)


def test_a_snippet_that_fails_is_named(made, monkeypatch):
    monkeypatch.setattr(check, "LOADS", "")  # the snippets alone
    readme = made / "README.md"
    failing = "```python\nraise SystemExit('no such thing')\n```\n\n## Use"
    readme.write_text(readme.read_text().replace("## Use", failing, 1))
    with pytest.raises(NotFitError, match="no such thing"):
        check_folder(made, "org/x", say=lambda part: None)
