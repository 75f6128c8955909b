"""The page: what it does, apart from a browser and in one."""

import os
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from modeling_unimur import UniMuRModel
from tests.conftest import picture

gr = pytest.importorskip("gradio", reason="gradio is optional: pip install 'modeling-unimur[space]'")
from hub_card.space.app import LAUNCH, MAX_SIDE, Session, build, chat, load, pool_line, ranking  # noqa: E402

MINIATURE = Path(__file__).parents[2] / "runs" / "miniature" / "checkpoint"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    tiny().save_pretrained(folder / "checkpoint", with_towers=True)
    model = UniMuRModel.from_pretrained(folder / "checkpoint")
    texts = ["you are welcome.", "<b>bold</b> & <script>alert(1)</script>"]
    pool = model.build_pool(images=[picture(i) for i in range(3)], texts=texts, show_progress_bar=False)
    model.save_pretrained(folder / "checkpoint", pool=pool)
    for i in range(9):
        picture(i).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def app(checkpoint):
    return load(str(checkpoint / "checkpoint"), None)


def test_a_turn_is_answered_and_the_reply_is_part_of_the_dialogue(app, checkpoint):
    first = app.say(Session(), " hello ", [], 0.0)
    assert [turn["role"] for turn in first.turns] == ["user", "assistant"] and first.asked == 1
    assert first.turns[0]["content"] == [{"type": "text", "text": "hello"}]
    second = app.say(first, "", [str(checkpoint / "7.png")], 0.0)
    assert [turn["role"] for turn in second.turns] == ["user", "assistant", "user", "assistant"]
    reply = app.model.retrieve(list(second.turns[:3]), app.pool, top_k=8)
    assert [c.id for c in second.found[0].candidates] == [c.id for c in reply.candidates]
    assert first.asked == 1 and len(first.turns) == 2  # a session is never changed, only followed


def test_the_bias_ranks_the_last_turn_again(app):
    said = app.say(Session(), "hello", [], 0.0)
    pictures = app.rank_again(said, 3.0)
    texts = app.rank_again(pictures, -3.0)
    assert [c.modality for c in pictures.found[0].candidates] == ["image"] * 3 + ["text"] * 2
    assert [c.modality for c in texts.found[0].candidates] == ["text"] * 2 + ["image"] * 3
    assert pictures.found[0].image is not None and texts.found[0].image is None
    assert len(texts.turns) == 2  # the reply was replaced, not added
    assert app.rank_again(Session(), 1.0) == Session()


def test_own_pictures_are_in_the_visitors_pool_alone(app, checkpoint):
    mine = app.add_pictures(app.say(Session(), "hello", [], 2.0), [str(checkpoint / "8.png")], 2.0)
    assert "yours-1" in [c.id for c in mine.found[0].candidates] and mine.uploads == 1
    assert "yours-1" not in [c.id for c in app.say(Session(), "hello", [], 2.0).found[0].candidates]
    assert "4 pictures, 1 of them yours" in pool_line(mine, app) and "3 pictures and 2 texts" in pool_line(
        Session(), app
    )
    with pytest.raises(ValueError, match="At most 24 pictures of your own; 23 are there"):
        app.add_pictures(replace(mine, uploads=23), [str(checkpoint / "1.png")] * 2, 0.0)


@pytest.mark.parametrize(
    ("text", "files", "told"),
    [
        ("  ", [], "Write something"),
        ("x" * 2001, [], "2001 characters"),
        ("hi", ["broken.png"], "'broken.png' is not"),
    ],
)
def test_what_does_not_work_is_said_without_the_servers_paths(app, checkpoint, text, files, told):
    with pytest.raises(ValueError, match=told) as caught:
        app.say(Session(), text, [str(checkpoint / file) for file in files], 0.0)
    assert str(checkpoint) not in str(caught.value)


def test_too_many_pixels_are_refused(app, tmp_path):
    Image.new("1", (5000, 5000)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="16000000 pixels"):
        app.say(Session(), "", [str(tmp_path / "large.png")], 0.0)


def test_a_conversation_is_bounded_in_pictures_and_turns(app, checkpoint):
    photo = str(checkpoint / "1.png")
    said = app.say(Session(), "", [photo] * 15, 0.0)
    with pytest.raises(
        ValueError, match=r"At most 16 pictures go into a conversation; 15 are there already: .*start anew"
    ):
        app.say(said, "", [photo] * 2, 0.0)
    assert app.say(said, "", [photo], 0.0).asked == 3
    with pytest.raises(ValueError, match="at most 64 turns, replies included: start anew"):
        app.say(replace(said, turns=said.turns[:1] * 63), "hi", [], 0.0)


def test_a_kept_picture_is_reduced(app, tmp_path):
    Image.new("RGB", (4000, 3000)).save(tmp_path / "large.png")
    image = app.say(Session(), "", [str(tmp_path / "large.png")], 0.0).turns[0]["content"][0]["image"]
    assert image.size == (MAX_SIDE, MAX_SIDE * 3 // 4)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors as Linux lists them")
def test_a_redraw_writes_no_picture_again_and_leaves_none_open(app, checkpoint, tmp_path):
    said = app.say(Session(), "", [str(checkpoint / "1.png"), str(checkpoint / "2.png")], -3.0)
    shown, opened = chat(said, tmp_path), len(os.listdir("/proc/self/fd"))
    written = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert len(written) == 2
    for _ in range(5):
        assert chat(said, tmp_path) == shown
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == written
    assert len(os.listdir("/proc/self/fd")) == opened
    with Image.open(shown[0]["content"]["path"]) as drawn, Image.open(checkpoint / "1.png") as given:
        assert drawn.getpixel((0, 0)) == given.getpixel((0, 0))


def test_nothing_from_outside_becomes_markup(app, tmp_path):
    said = app.say(Session(), "<img src=x onerror=alert(1)>", [], -3.0)
    page = ranking(said)
    assert "<script>" not in page and "&lt;script&gt;" in page
    shown = chat(said, tmp_path)
    assert shown[0]["content"] == "&lt;img src=x onerror=alert(1)&gt;"


def test_the_ranking_marks_what_the_reply_uses(app):
    said = app.say(Session(), "hello", [], 3.0)
    used = re.findall(r'class="u-row u-used" data-id="([^"]+)"', ranking(said))
    reply = said.found[0]
    assert len(used) == 2 and reply.candidates[0].id in used
    assert next(c.id for c in reply.candidates if c.item == reply.text) in used


def test_the_model_goes_to_the_gpu_where_there_is_one(checkpoint, monkeypatch):
    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, *where: moved.append(*where) or self)
    load(str(checkpoint / "checkpoint"), None)
    assert moved == ["cuda"]


def test_the_space_installs_what_the_package_states_and_an_indexed_pools_faiss():
    root = Path(__file__).parents[2]
    stated = (root / "pyproject.toml").read_text()
    lines = (root / "hub_card" / "space" / "requirements.txt").read_text().split()
    assert [line for line in lines if f'"{line}"' not in stated] == []
    assert any(line.startswith("faiss-cpu") for line in lines)


def test_without_a_checkpoint_it_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="make demo"):
        load(None, None)


# In a browser

try:
    from playwright import sync_api
except ImportError:
    sync_api = None
in_browser = pytest.mark.skipif(
    CHROMIUM is None or sync_api is None,
    reason="needs playwright (pip install) and a system Chromium (such as Debian's package chromium)",
)


@pytest.fixture
def browse():
    """A function that opens a checkpoint's page and returns it; at the end no request may have left this machine."""
    started, outside = [], []

    def open_page(checkpoint: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        app = load(str(checkpoint), None)
        page = build(app)
        page.launch(server_port=port, prevent_thread_lock=True, quiet=True, **LAUNCH)
        playwright = sync_api.sync_playwright().start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        started.append((page, playwright, browser))
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        inside = (f"http://127.0.0.1:{port}/", f"ws://127.0.0.1:{port}/", "data:", "blob:")
        tab.on("request", lambda request: request.url.startswith(inside) or outside.append(request.url))
        tab.goto(f"http://127.0.0.1:{port}/", wait_until="domcontentloaded")
        tab.wait_for_selector("#box textarea", timeout=30_000)
        return app, tab

    yield open_page
    for page, playwright, browser in started:
        browser.close()
        playwright.stop()
        page.close(verbose=False)
    assert outside == []


def scored(tab):
    read = "rows => rows.map(r => [r.dataset.id, r.querySelector('.u-score').innerText])"
    return [tuple(row) for row in tab.locator("#found .u-row").evaluate_all(read)]


def send(tab, text, files=()):
    before = tab.locator("#found .u-row").count() and tab.inner_html("#found")
    if files:
        tab.set_input_files("#box input[type=file]", [str(file) for file in files])
        tab.wait_for_selector("#box .thumbnail-item")
    tab.fill("#box textarea", text)
    tab.press("#box textarea", "Enter")
    tab.wait_for_function("before => document.querySelector('#found .u-row') && "
                          "document.querySelector('#found').innerHTML != before", arg=before, timeout=20_000)  # fmt: skip


def said(tab, text):
    """The conversation has a text; its parts arrive one after another."""
    tab.wait_for_function("text => document.querySelector('#talk').innerText.includes(text)", arg=text, timeout=20_000)


def shows(tab, count):
    """The conversation has so many pictures."""
    tab.wait_for_function("count => document.querySelectorAll('#talk img').length == count", arg=count, timeout=20_000)


@in_browser
def test_in_a_browser_type_send_upload_and_see_the_right_picture(browse, checkpoint):
    app, tab = browse(checkpoint / "checkpoint")
    send(tab, "hello <b>there</b>")
    said(tab, "hello <b>there</b>")
    expected = app.model.retrieve([{"role": "user", "content": "hello <b>there</b>"}], app.pool, top_k=8)
    assert [name for name, _ in scored(tab)] == [c.id for c in expected.candidates]
    said(tab, expected.text)
    # One's own picture comes into the pool, and the slider ranks the last turn again.
    tab.click("#own button")
    tab.set_input_files("#upload input[type=file]", str(checkpoint / "8.png"))
    tab.wait_for_function("document.querySelector('#size').innerText.includes('1 of them yours')", timeout=20_000)
    mine = app.add_pictures(app.say(Session(), "hello <b>there</b>", [], 0.5), [str(checkpoint / "8.png")], 0.5)
    ranked = [(c.id, f"{c.score:.3f}") for c in mine.found[0].candidates]
    assert "yours-1" in dict(ranked) and ranked != scored(tab)
    tab.locator("#bias input[type=range]").fill("0.5")
    tab.wait_for_function("score => document.querySelector('#found [data-id=yours-1] .u-score').innerText == score",
                          arg=dict(ranked)["yours-1"], timeout=20_000)  # fmt: skip
    assert scored(tab) == ranked
    # A picture in a turn: it is shown, and found again among the candidates by the same words and bias.
    send(tab, "and this?", [checkpoint / "7.png"])
    after = app.say(mine, "and this?", [str(checkpoint / "7.png")], 0.5)
    tab.wait_for_function("ids => [...document.querySelectorAll('#found .u-row')].map(r => r.dataset.id).join() == ids",
                          arg=",".join(c.id for c in after.found[0].candidates), timeout=20_000)  # fmt: skip
    shown = 1 + (mine.found[0].image is not None) + (after.found[0].image is not None)
    shows(tab, shown)


@in_browser
def test_in_a_browser_a_broken_picture_is_a_message(browse, checkpoint):
    _, tab = browse(checkpoint / "checkpoint")
    tab.set_input_files("#box input[type=file]", str(checkpoint / "broken.png"))
    tab.wait_for_selector("#box .thumbnail-item")
    tab.press("#box textarea", "Enter")
    tab.wait_for_selector(".toast-body", timeout=20_000)
    assert "broken.png" in tab.inner_text(".toast-body") and "Traceback" not in tab.content()


@in_browser
@pytest.mark.skipif(not (MINIATURE / "pool").is_dir(), reason="the miniature is made by `make demo`")
def test_in_a_browser_the_miniature_shows_the_panda(browse):
    _, tab = browse(MINIATURE)
    send(tab, "what do pandas look like?")
    used = tab.locator("#found .u-used").evaluate_all("rows => rows.map(r => r.dataset.id)")
    assert "fact-text-panda" in used or "fact-image-panda" in used
    assert tab.locator('#found .u-row[data-id="fact-image-panda"]').count() == 1
    shows(tab, 1)
