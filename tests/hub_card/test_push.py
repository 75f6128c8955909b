"""What is pushed has been called as its users would; what is not fit is not uploaded."""

import importlib.metadata
import json
import shutil

import pytest

from hub_card.check import NotFitError, check_folder
from hub_card.push import main
from modeling_unimur import UniMuRModel
from tests.conftest import picture


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
    told = capsys.readouterr().out
    for part in ("card: metadata", "AutoModel with its self-check", "endpoint handler", "every snippet of the card"):
        assert part in told
    assert (tmp_path / "made" / ".eval_results" / "visdial.yaml").is_file()
    assert "made-up captions" in (tmp_path / "made" / "README.md").read_text()


def test_a_dry_run_needs_a_folder(checkpoint):
    with pytest.raises(ValueError, match="--dry_run needs --folder"):
        main([str(checkpoint / "full"), "org/x", "--dry_run"])


def test_a_former_pool_in_the_folder_is_refused(checkpoint, tmp_path):
    shutil.copytree(checkpoint / "pool", tmp_path / "made" / "pool")
    with pytest.raises(ValueError, match=r"made/pool' is a former pool.*delete it, or give --pool"):
        main([str(checkpoint / "full"), "org/x", "--folder", str(tmp_path / "made"), "--dry_run"])


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
    ("line", "told"),
    [
        ("import modeling_unimur", "No module named 'modeling_unimur'"),
        ("from huggingface_hub import HfApi; HfApi().model_info('someone/other')", "OfflineModeIsEnabled"),
    ],
)
def test_what_its_users_do_not_have_the_check_has_not_either(made, monkeypatch, line, told):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    readme = made / "README.md"
    readme.write_text(readme.read_text().replace("## Use", f"```python\n{line}\n```\n\n## Use", 1))
    with pytest.raises(NotFitError, match=told):
        check_folder(made, "org/x", say=lambda part: None)


def test_a_snippet_that_fails_is_shown(made):
    readme = made / "README.md"
    failing = "```python\nraise SystemExit('no such thing')\n```\n\n## Use"
    readme.write_text(readme.read_text().replace("## Use", failing, 1))
    with pytest.raises(NotFitError, match="no such thing"):
        check_folder(made, "org/x", say=lambda part: None)
