"""A reply at once from the model that lies in the repository, and that this model is what `ABOUT.md` says."""

import json
import re

import pytest
from PIL import Image

from hub_card import make_quickstart
from hub_card.quickstart import FOLDER, load, main
from modeling_unimur import UniMuRModel
from modeling_unimur.identity_unimur import GOLDEN
from train.cache import sha256

MEGABYTES = 6
ABOUT = (FOLDER / make_quickstart.ABOUT).read_text()


def test_a_newcomer_gets_words_and_picture_without_an_argument(tmp_path, capsys):
    reply = main(["--save", str(tmp_path)])
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path / "reply.json").read_text())
    assert "monkey" in reply.text and "yellow" in reply.text and "drum" in reply.text
    assert f"words:   {saved['text']}\npicture: {reply.best_image.id}" in printed
    assert printed.endswith(f"saved:   {tmp_path / saved['image']}\n")
    assert reply.best_image.id.startswith("monkey in a yellow hat")
    with Image.open(tmp_path / saved["image"]) as picture:
        assert picture.size == (64, 64)


def test_a_picture_shown_by_the_newcomer_decides_the_reply(tmp_path):
    monkey = load().packed_pool["monkey in a yellow hat, playing drum, moon"].item
    monkey.save(tmp_path / "shown.png")
    shown = main(["--image", str(tmp_path / "shown.png"), "show me!", "--save", str(tmp_path)])
    assert shown.text != main(["show me!", "--save", str(tmp_path)]).text
    assert "monkey" in shown.candidates[0].id


def test_a_reply_without_a_picture_is_saved_too(tmp_path, capsys, monkeypatch):
    model = load()
    words = model.build_pool(texts=["hello there."], show_progress_bar=False)
    monkeypatch.setattr(UniMuRModel, "packed_pool", words)
    assert main(["hello!", "--save", str(tmp_path)]).best_image is None
    assert f"picture: none, for words came nearer\nsaved:   {tmp_path / 'reply.json'}" in capsys.readouterr().out


def test_the_folder_is_the_one_that_about_describes():
    listed = dict(re.findall(r"^\| `([^`]+)` \| `([0-9a-f]{64})`", ABOUT, re.MULTILINE))
    assert listed == {name: sha256(FOLDER / name) for name in make_quickstart.files(FOLDER)}
    identity = load().fingerprint
    assert f"towers `{identity['towers']}`, maps `{identity['maps']}`" in ABOUT


def test_the_folder_is_small_and_holds_no_code_and_no_trace_of_a_machine():
    names = make_quickstart.files(FOLDER)
    assert set(make_quickstart.FILES) <= set(names)
    assert sum((FOLDER / name).stat().st_size for name in names) < MEGABYTES * 1e6
    texts = [(FOLDER / name).read_text() for name in names if name.endswith(".json")]
    assert not [name for name in names if name.endswith(".py")]
    assert not [word for word in make_quickstart.LEFT_OUT for text in texts if f'"{word}"' in text]


def test_the_model_is_the_one_that_was_saved():
    assert max(load().self_check().values()) < 1e-4


def test_the_folder_is_made_of_a_full_checkpoint(fresh, tmp_path, monkeypatch):
    fresh().save_pretrained(tmp_path / "full", with_towers=True)
    monkeypatch.setattr(make_quickstart, "load_split", lambda name: name)
    monkeypatch.setattr(
        make_quickstart, "packed", lambda model, *_: model.build_pool(texts=["hi"], show_progress_bar=False)
    )
    folder = tmp_path / "made"
    (folder / "pool").mkdir(parents=True)
    (folder / "pool" / "former.arrow").touch()
    make_quickstart.main([str(tmp_path / "full"), "--trained_by", "nobody", "--folder", str(folder)])
    assert "Trained by: nobody." in (folder / make_quickstart.ABOUT).read_text()
    assert not (folder / "pool" / "former.arrow").exists() and (folder / GOLDEN).is_file()
    made = UniMuRModel.from_pretrained(folder)
    assert made.retrieve("hello!", made.packed_pool).text == "hi"


def test_an_adapter_has_no_towers_to_give(fresh, tmp_path):
    fresh().save_pretrained(tmp_path / "adapter")
    with pytest.raises(
        ValueError, match="is an adapter, whose towers lie elsewhere: give a checkpoint of --save_towers"
    ):
        make_quickstart.main([str(tmp_path / "adapter"), "--trained_by", "nobody", "--folder", str(tmp_path / "made")])
    assert not (tmp_path / "made").exists()
