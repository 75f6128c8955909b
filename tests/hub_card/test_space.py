"""The page: what it does, apart from a browser and in one."""

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
from tests.tiny import make_model, make_pipeline

gr = pytest.importorskip("gradio", reason="gradio is optional: pip install 'modeling-unimur[space]'")
import app as space  # noqa: E402
import views  # noqa: E402
from app import load  # noqa: E402
from page import LAUNCH, build  # noqa: E402
from talk import MAX_SIDE, NAMED, OFFERED, STRIP, App, Session, Turn, excluded, name_of, sentence, sureness  # noqa: E402

MINIATURE = Path(__file__).parents[2] / "runs" / "miniature" / "checkpoint"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def checkpoint(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    tiny().save_pretrained(folder / "checkpoint", with_towers=True)
    model = UniMuRModel.from_pretrained(folder / "checkpoint")
    texts = ["you are welcome.", "<b>bold</b> & <script>alert(1)</script>", "good night.", "see you."]
    pool = model.build_pool(images=[picture(i) for i in range(3)], texts=texts, show_progress_bar=False)
    model.save_pretrained(folder / "checkpoint", pool=pool)
    for i in range(9):
        picture(i).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def app(checkpoint):
    return load(str(checkpoint / "checkpoint"))


def listed(session):
    return [c.id for c in session.reply.candidates]


def test_a_turn_is_answered_and_the_reply_is_part_of_the_dialogue(app, checkpoint):
    first = app.say(Session(), " hello ", [], 0.0)
    assert [turn.role for turn in first.turns] == ["user", "assistant"] and first.queried == 1
    assert first.turns[0].message == {"role": "user", "content": [{"type": "text", "text": "hello"}]}
    second = app.say(first, "", [str(checkpoint / "7.png")], 0.0)
    assert [turn.role for turn in second.turns] == ["user", "assistant", "user", "assistant"]
    exclude = [id_ for id_ in (first.turns[1].text_id, *(p.id for p in first.turns[1].pictures)) if id_]
    reply = app.model.retrieve([turn.message for turn in second.turns[:3]], app.pool, top_k=8, exclude=exclude)
    assert listed(second) == [c.id for c in reply.candidates]
    assert first.queried == 1 and len(first.turns) == 2  # a session is never changed, only followed


def test_a_reply_holds_the_best_picture_those_that_came_next_and_their_names(app):
    turn = app.say(Session(), "hello", [], 3.0).turns[1]
    best = app.model.retrieve("hello", app.pool, modality="image").candidates
    assert [p.id for p in (*turn.pictures, *turn.also)] == [c.id for c in best]
    assert turn.pictures[0].name == f"picture {best[0].id.removeprefix('image-')}"
    assert turn.sure.endswith(".") and "sure" in turn.sure.lower()
    texts = app.model.retrieve("hello", app.pool, modality="text").candidates
    assert (turn.text, turn.text_id) == (texts[0].item, texts[0].id)


def test_what_was_said_or_shown_is_not_said_again_while_there_is_more(app):
    session, texts, pictures = Session(), [], []
    for _ in range(4):
        session = app.say(session, "hello", [], 3.0)
        texts.append(session.turns[-1].text_id)
        pictures += [p.id for p in session.turns[-1].pictures]
    assert len(set(texts)) == 4 and len(set(pictures[:3])) == 3
    assert app.say(session, "hello", [], 3.0).turns[-1].text_id is not None  # a pool that is used up begins again
    # The reply itself is not in its own way.
    assert app.rank_again(session, 3.0).turns[-1].text_id == texts[-1]
    assert excluded(
        [Turn("assistant", "a", text_id="x"), Turn("assistant", "b", text_id="y")], {"text": 2, "image": 0}
    ) == ["y"]


def test_a_picture_that_was_shown_to_the_model_is_not_its_reply(app):
    session = app.show(Session(), 0, 3.0)
    assert session.turns[0].pictures[0].id == app.strip[0].id
    assert app.strip[0].id not in listed(session)


@pytest.mark.parametrize(
    ("scores", "word"), [([4.0], "sure"), ([4.0, 3.0], "sure"), ([4.0, 3.7], "fairly sure"), ([4.0, 4.0], "unsure")]
)
def test_how_sure_a_reply_is_goes_by_the_gap_to_the_next(scores, word):
    assert sureness(scores) == word


def test_how_sure_a_reply_is_in_words():
    assert sentence({"text": "sure", "image": "sure"}) == "Sure of both."
    assert sentence({"text": "sure", "image": "unsure"}) == "Sure of the words, unsure of the picture."
    assert sentence({"text": "fairly sure"}) == "Fairly sure of the words." and sentence({}) == ""


@pytest.mark.parametrize(
    ("id_", "name"),
    [
        ("image-3", "picture 3"),
        ("response-image-497", "picture 497"),
        ("holiday/old_beach.JPG", "old beach"),
        ("yours-1", "yours 1"),
        ("penguin in a blue hat, playing harp", "penguin in a blue hat, playing harp"),
        ("-", "-"),
    ],
)
def test_a_picture_has_a_name(id_, name):
    assert name_of(id_) == name


def drawing_app(app, checkpoint):
    model = UniMuRModel.from_pretrained(checkpoint / "checkpoint")
    small = {"mapper_width": 16, "mapper_layers": 1, "mapper_heads": 2, "drawing_steps": 1, "drawing_guidance": 2.0}
    model.add_drawing(make_pipeline(), n_drawing_tokens=3, **small)
    return App(model, app.pool)


def test_a_drawn_picture_says_that_it_is_not_from_the_pool(app, checkpoint):
    drawing = drawing_app(app, checkpoint)
    found = drawing.say(Session(), "hello", [], 3.0)
    assert "not from the pool" not in views.conversation(found)
    session = drawing.draw(found)
    turn, before = session.turns[-1], found.turns[-1]
    assert turn.pictures[0].image.tobytes() == drawing.model.generate("hello").tobytes()
    assert turn.also == (before.pictures + before.also)[:3] and turn.text_id == before.text_id
    page = views.conversation(session)
    assert (
        "<figcaption>drawn, not from the pool</figcaption>" in page and page.count("not from the pool") == 2
    )  # and its alt
    assert re.findall(r'class="u-row u-used" data-id="([^"]+)"', views.ranking(session.reply)) == [turn.text_id]
    # The conversation goes on: the picture is part of it, and what is shown next is the pool's.
    assert drawing.say(session, "and now?", [], 3.0).turns[-1].pictures[0].id is not None
    assert not drawing.rank_again(session, 3.0).turns[-1].pictures[0].drawn


def test_what_cannot_be_drawn_is_said_without_the_servers_paths(app, checkpoint, tmp_path):
    drawing = drawing_app(app, checkpoint)
    with pytest.raises(ValueError, match="Say something first"):
        drawing.draw(Session())
    drawing.model._pipeline, drawing.model.config.drawing_model_name_or_path = None, str(tmp_path / "gone")
    with pytest.raises(ValueError, match="could not be loaded here") as caught:
        drawing.draw(drawing.say(Session(), "hello", [], 0.0))
    assert str(tmp_path) not in str(caught.value)


def test_only_a_page_whose_model_draws_has_a_button_for_it(app, checkpoint, monkeypatch):
    def ids(made):
        return {block.elem_id for block in build(made).blocks.values()}

    drawing = drawing_app(app, checkpoint)
    assert "draw" in ids(drawing) and not app.draws and "draw" not in ids(app)
    monkeypatch.setattr("talk.find_spec", lambda name: None)  # diffusers is not there
    assert "draw" not in ids(drawing)


def test_earlier_turns_that_no_longer_fit_are_told_of(app):
    session = app.say(Session(), "x" * 60, [], -3.0)
    assert session.turns[-1].forgotten == 0 and "u-note" not in views.conversation(session)
    session = app.say(session, "y" * 60, [], -3.0)  # a letter is a token here, and 128 of them are read
    assert session.turns[-1].forgotten == 1 and not session.turns[-1].cut
    page = views.conversation(session)
    assert page.index("u-forgotten") < page.index("the turns above no longer fit") < page.index("y" * 60)
    session = app.say(session, "z" * 200, [], -3.0)
    assert session.turns[-1].forgotten == 4 and session.turns[-1].cut
    assert "of this turn it has read only the end" in views.conversation(session)


def test_the_bias_ranks_the_last_turn_again(app):
    first = app.say(Session(), "hello", [], 0.0)
    pictures = app.rank_again(first, 3.0)
    texts = app.rank_again(pictures, -3.0)
    assert [c.modality for c in pictures.reply.candidates] == ["image"] * 3 + ["text"] * 4
    assert [c.modality for c in texts.reply.candidates] == ["text"] * 4 + ["image"] * 3
    assert pictures.turns[-1].pictures and not texts.turns[-1].pictures
    assert len(texts.turns) == 2  # the reply was replaced, not added
    assert app.rank_again(Session(), 1.0) == Session()


def test_own_pictures_are_in_the_visitors_pool_alone(app, checkpoint):
    mine = app.add_pictures(app.say(Session(), "hello", [], 2.0), [str(checkpoint / "8.png")], 2.0)
    assert "yours-1" in listed(mine) and mine.uploads == 1
    assert "yours-1" not in listed(app.say(Session(), "hello", [], 2.0))
    assert "4 pictures, 1 of them yours and 4 texts" in views.pool_line(mine.pool.counts, mine.uploads)
    assert "3 pictures and 4 texts" in views.pool_line(app.pool.counts, 0)
    with pytest.raises(ValueError, match="At most 24 pictures of your own; 23 are there"):
        app.add_pictures(replace(mine, uploads=23), [str(checkpoint / "1.png")] * 2, 0.0)


@pytest.mark.parametrize(
    ("text", "files", "message"),
    [
        ("  ", [], "Write something"),
        ("x" * 2001, [], "2,001 characters"),
        ("hi", ["broken.png"], "'broken.png' is not"),
    ],
)
def test_what_does_not_work_is_said_without_the_servers_paths(app, checkpoint, text, files, message):
    with pytest.raises(ValueError, match=message) as caught:
        app.say(Session(), text, [str(checkpoint / file) for file in files], 0.0)
    assert str(checkpoint) not in str(caught.value)


def test_too_many_pixels_are_refused(app, tmp_path):
    Image.new("1", (5000, 5000)).save(tmp_path / "large.png")
    with pytest.raises(ValueError, match="16000000 pixels"):
        app.say(Session(), "", [str(tmp_path / "large.png")], 0.0)


def test_a_conversation_is_bounded_in_pictures_and_turns(app, checkpoint):
    photo = str(checkpoint / "1.png")
    session = app.say(Session(), "", [photo] * 15, 0.0)
    with pytest.raises(
        ValueError, match=r"At most 16 pictures go into a conversation; 15 are there already: .*start again"
    ):
        app.say(session, "", [photo] * 2, 0.0)
    assert app.say(session, "", [photo], 0.0).queried == 3
    with pytest.raises(ValueError, match="at most 64 turns, replies included: start again"):
        app.say(replace(session, turns=session.turns[:1] * 63), "hi", [], 0.0)


def test_a_kept_picture_is_reduced(app, tmp_path):
    Image.new("RGB", (4000, 3000)).save(tmp_path / "large.png")
    session = app.say(Session(), "", [str(tmp_path / "large.png")], 0.0)
    assert session.turns[0].pictures[0].image.size == (MAX_SIDE, MAX_SIDE * 3 // 4)
    assert len(views.conversation(session)) < 60_000  # and sent smaller still


def test_nothing_from_outside_becomes_markup(app):
    session = app.say(Session(), "<img src=x onerror=alert(1)>", [], -3.0)
    assert "<script>" not in views.ranking(session.reply) and "&lt;script&gt;" in views.ranking(session.reply)
    page = views.conversation(session)
    assert "<img" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    named = replace(app.strip[0], name='"><script>', id="x")
    for html in (views.strip([named]), views.picture(named, 100, named.name)):
        assert "<script>" not in html


def test_the_ranking_marks_what_the_reply_uses_and_shows_no_bare_numbers(app):
    session = app.say(Session(), "hello", [], 3.0)
    page = views.ranking(session.reply)
    used = re.findall(r'class="u-row u-used" data-id="([^"]+)"', page)
    turn = session.turns[-1]
    assert set(used) == {turn.text_id, turn.pictures[0].id}
    assert not re.search(r"\d\.\d{3}", re.sub(r"<[^>]*>", "", page))


def test_the_examples_are_those_openings_that_are_answered_by_a_picture(app):
    openings = [(f"opening {letter}", None) for letter in "abcdefgh"] + [("look!", 1), ("never", 99)]
    offered = App(app.model, app.pool, openings).examples
    shows = {
        text: app.model.retrieve(text, app.pool).image is not None for text, picture in openings if picture is None
    }
    assert [e.text for e in offered if e.picture is None] == [text for text in shows if shows[text]][: len(offered)]
    assert all(e.thumbnail is not None for e in offered) and "never" not in {e.text for e in offered}
    assert App(app.model, app.pool, []).examples == [] and views.examples([]) == ""


def test_the_strip_is_spread_over_the_pool_and_passes_over_what_cannot_be_read(app, tmp_path):
    for at in range(60):
        picture(at).save(tmp_path / f"{at}.png")
    files = [tmp_path / f"{at}.png" for at in range(60)]
    pool = app.model.build_pool(images=files, show_progress_bar=False)
    assert len(App(app.model, pool).strip) == 24
    files[0].unlink()
    strip = App(app.model, pool).strip
    assert len(strip) == 23 and strip[-1].id == "59.png"
    assert App(app.model, app.model.build_pool(texts=["a"], show_progress_bar=False)).strip == []


def test_it_opens_on_ones_own_pictures_and_replies(checkpoint, tmp_path, capsys):
    (tmp_path / "photos" / "old").mkdir(parents=True)
    picture(1).save(tmp_path / "photos" / "old" / "red_house.PNG")
    picture(2).save(tmp_path / "photos" / "sea.jpg")
    (tmp_path / "photos" / "notes.txt").write_text("not a picture")
    (tmp_path / "lines.txt").write_text("hello there.\n\n  good night. \n", encoding="utf-8")
    own = load(str(checkpoint / "checkpoint"), images=tmp_path / "photos", texts=tmp_path / "lines.txt")
    assert "2 pictures; 1 other files are passed over" in capsys.readouterr().out
    assert sorted(p.name for p in own.strip) == ["red house", "sea"] and own.examples == []
    session = own.say(Session(), "hello", [], 3.0)
    assert session.turns[-1].text in ("hello there.", "good night.")
    assert {p.name for p in session.turns[-1].pictures} <= {"red house", "sea"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "nowhere"], "'nowhere' is no folder"),
        (["--images", "empty"], "holds no file that is named as a picture"),
        (["--images", "bad"], "broken.png"),
        (["--texts", "nowhere"], "nowhere"),
        (["--texts", "blank.txt"], "holds no text"),
        (["--texts", "latin.txt"], "no UTF-8"),
        (["--pool", "nowhere", "--texts", "blank.txt"], "two pools"),
    ],
)
def test_a_users_mistake_is_one_sentence(checkpoint, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(SystemExit, match=message) as ended:
        space.main(["--model", str(checkpoint / "checkpoint"), *arguments])
    assert str(ended.value).startswith("error: ")


def test_a_pool_of_another_model_is_refused_as_the_page_opens(app, tmp_path):
    other = make_model(tmp_path, seed=1)
    with pytest.raises(ValueError, match="made by another model"):
        App(other, app.pool)


def test_the_model_goes_to_the_gpu_where_there_is_one(checkpoint, monkeypatch):
    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, *where: moved.append(*where) or self)
    load(str(checkpoint / "checkpoint"))
    assert moved == ["cuda"]


def test_the_space_installs_what_the_package_states_and_an_indexed_pools_faiss():
    root = Path(__file__).parents[2]
    stated = (root / "pyproject.toml").read_text()
    lines = (root / "hub_card" / "space" / "requirements.txt").read_text().split()
    assert [line for line in lines if f'"{line}"' not in stated] == []
    assert any(line.startswith("faiss-cpu") for line in lines)


def test_without_a_checkpoint_it_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNIMUR_MODEL", raising=False)
    monkeypatch.setattr(space, "QUICKSTART", tmp_path / "quickstart")
    with pytest.raises(SystemExit, match="make demo"):
        space.main([])


def test_in_a_clone_the_page_opens_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNIMUR_MODEL", raising=False)
    app = load()
    assert len(app.strip) == STRIP and app.examples
    Path("runs/miniature/checkpoint").mkdir(parents=True)
    assert space.checkpoint_of(None) == "runs/miniature/checkpoint"  # once it is there


def test_the_links_are_the_hubs_where_the_checkpoint_is_there(checkpoint):
    assert space.links("org/unimur")["Checkpoint"] == "https://huggingface.co/org/unimur"
    assert "Checkpoint" not in space.links(str(checkpoint / "checkpoint"))


# In a browser

try:
    from playwright import sync_api
except ImportError:
    sync_api = None
in_browser = pytest.mark.skipif(
    CHROMIUM is None or sync_api is None,
    reason="needs playwright (pip install) and a system Chromium (such as Debian's package chromium)",
)


@pytest.fixture(scope="module")
def chromium():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium):
    """
    A function that opens an app's page and returns it. At the end no request may have left this machine, and the browser's
    console must hold no error.
    """
    started, outside, errors = [], [], []

    def open_page(app: App, width: int = 1280, dark: bool = False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        page = build(app)
        page.launch(server_port=port, prevent_thread_lock=True, quiet=True, **LAUNCH)
        tab = chromium.new_page(viewport={"width": width, "height": 900})
        started.append((page, tab))
        inside = (f"http://127.0.0.1:{port}/", f"ws://127.0.0.1:{port}/", "data:", "blob:")
        tab.on("request", lambda request: request.url.startswith(inside) or outside.append(request.url))
        tab.on("console", lambda message: message.type == "error" and errors.append(message.text))
        tab.on("pageerror", lambda error: errors.append(str(error)))
        theme = "dark" if dark else "light"
        tab.goto(f"http://127.0.0.1:{port}/?__theme={theme}", wait_until="domcontentloaded")
        tab.wait_for_selector("#box textarea", timeout=30_000)
        return tab

    yield open_page
    for page, tab in started:
        tab.close()
        page.close(verbose=False)
    assert outside == [] and errors == []


@pytest.fixture(scope="module")
def offering(app):
    """An app that always answers by a picture: there is one text, so that the best of the rest is one."""
    pool = app.model.build_pool(images=[picture(i) for i in range(3)], texts=["here it is."], show_progress_bar=False)
    return App(app.model, pool, [("show me", None), ("look!", 1)])


def replied(tab, count):
    """The conversation has so many replies."""
    tab.wait_for_function(
        "count => document.querySelectorAll('#talk .u-reply').length == count", arg=count, timeout=20_000
    )


def ranked(tab):
    return tab.locator("#hits .u-row").evaluate_all("rows => rows.map(r => r.dataset.id)")


def send(tab, text, files=()):
    count = tab.locator("#talk .u-reply").count()
    if files:
        tab.set_input_files("#box input[type=file]", [str(file) for file in files])
        tab.wait_for_selector("#box .thumbnail-item")
    tab.fill("#box textarea", text)
    tab.press("#box textarea", "Enter")
    replied(tab, count + 1)


@in_browser
def test_in_a_browser_type_send_upload_and_see_the_picture(browse, app, checkpoint):
    tab = browse(app)
    text = "hello <b>there</b> ${1 + 1} {{value}}"
    send(tab, text)
    mine = app.say(Session(), text, [], 0.0)
    assert tab.inner_text("#talk .u-user") == text and mine.turns[1].text in tab.inner_text("#talk .u-reply")
    assert ranked(tab) == listed(mine) and tab.input_value("#box textarea") == ""
    # One's own picture comes into the pool, and the slider ranks the last turn again.
    tab.click("#own button")
    tab.set_input_files("#upload input[type=file]", str(checkpoint / "8.png"))
    tab.wait_for_function("document.querySelector('#size').innerText.includes('1 of them yours')", timeout=20_000)
    mine = app.add_pictures(mine, [str(checkpoint / "8.png")], 0.5)
    tab.locator("#bias input[type=range]").fill("0.5")
    tab.wait_for_function("ids => [...document.querySelectorAll('#hits .u-row')].map(r => r.dataset.id).join() == ids",
                          arg=",".join(listed(mine)), timeout=20_000)  # fmt: skip
    assert "yours-1" in ranked(tab)
    # A picture in a turn is shown, and the reply is that of the same words and bias.
    send(tab, "and this?", [checkpoint / "7.png"])
    mine = app.say(mine, "and this?", [str(checkpoint / "7.png")], 0.5)
    assert ranked(tab) == listed(mine)
    assert tab.locator("#talk .u-user img").count() == 1
    assert tab.locator("#talk figure").count() == sum(len(t.pictures) for t in mine.turns if t.role == "assistant")
    tab.click("#again")
    tab.wait_for_selector("#talk", state="hidden")
    assert "1 of them yours" in tab.inner_text("#size") and not tab.is_visible("#hits")


@in_browser
def test_in_a_browser_one_click_or_key_sends_an_example_or_a_picture(browse, offering):
    tab = browse(offering)
    assert tab.locator("#examples button img").count() == len(offering.examples) == 2
    assert tab.locator("#strip button").count() == 3
    tab.click("#examples button >> nth=0")
    replied(tab, 1)
    assert tab.locator("#talk figure img").count() == 1 and not tab.is_visible("#examples")
    tab.focus("#strip button >> nth=1")
    tab.keyboard.press("Enter")
    replied(tab, 2)
    assert tab.locator("#talk .u-user img").count() >= 1


@in_browser
def test_in_a_browser_a_refused_turn_keeps_what_was_typed(browse, app, checkpoint):
    tab = browse(app)
    long = "x" * 2500
    tab.fill("#box textarea", long)
    tab.wait_for_selector("#count .u-over")
    assert tab.inner_text("#count") == "2,500 of 2,000 characters"
    tab.press("#box textarea", "Enter")
    tab.wait_for_selector(".toast-body", timeout=20_000)
    assert "2,500 characters" in tab.inner_text(".toast-body") and tab.input_value("#box textarea") == long
    tab.fill("#box textarea", "short")
    tab.set_input_files("#box input[type=file]", str(checkpoint / "broken.png"))
    tab.wait_for_selector("#box .thumbnail-item")
    tab.press("#box textarea", "Enter")
    tab.wait_for_function("document.body.innerText.includes('broken.png')", timeout=20_000)
    assert tab.input_value("#box textarea") == "short" and tab.locator("#box .thumbnail-item").count() == 1
    assert "Traceback" not in tab.content() and str(checkpoint) not in tab.inner_text("body")


@in_browser
@pytest.mark.parametrize(("width", "dark"), [(390, True), (1400, False)])
def test_in_a_browser_nothing_is_wider_than_the_window_and_a_phone_folds_the_ranking(browse, offering, width, dark):
    tab = browse(offering, width, dark)
    tab.click("#examples button >> nth=0")
    replied(tab, 1)
    for _ in range(2):
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.evaluate("document.querySelector('#hits details').open") is (width > 800)
        send(tab, "hello")
    tab.click("#hits summary")
    send(tab, "again")  # what the visitor opened or closed stays so
    assert tab.evaluate("document.querySelector('#hits details').open") is not (width > 800)
    picture_, words = (
        tab.locator(f"#talk .u-reply:has(figure) {part}").first.bounding_box() for part in ("figure", ".u-words")
    )
    assert picture_["x"] + picture_["width"] <= words["x"]
    colour = tab.evaluate("getComputedStyle(document.querySelector('#talk .u-words')).color")
    assert (sum(map(float, re.findall(r"[\d.]+", colour)[:3])) > 400) is dark


@in_browser
def test_in_a_browser_a_screen_reader_has_names_for_everything(browse, offering):
    tab = browse(offering)
    tab.wait_for_selector("#box textarea[aria-label]")
    send(tab, "hello")
    nameless = tab.evaluate("""
        [...document.querySelectorAll('main button, main input, main textarea, main [role=log], .u-log')]
          .filter(e => e.offsetParent && !(e.innerText || e.getAttribute('aria-label') || e.labels?.length))
          .map(e => e.outerHTML.slice(0, 200))
    """)
    assert nameless == [] and tab.locator("img:not([alt])").count() == 0
    assert tab.get_attribute("#talk [role=log]", "aria-live") == "polite"
    assert tab.locator("#bias .min_value").evaluate("e => getComputedStyle(e, '::after').content") == '"words"'
    assert tab.locator("#bias .max_value").evaluate("e => getComputedStyle(e, '::after').content") == '"pictures"'


@in_browser
@pytest.mark.skipif(not (MINIATURE / "pool").is_dir(), reason="the miniature is made by `make demo`")
def test_in_a_browser_every_example_of_the_miniature_shows_a_picture(browse):
    tab = browse(load(str(MINIATURE)))
    count = tab.locator("#examples button").count()
    assert count == 4
    for at in range(count):
        tab.click(f"#examples button >> nth={at}")
        replied(tab, 1)
        assert tab.locator("#talk .u-reply figure img").count() == 1
        tab.click("#again")
        tab.wait_for_selector("#examples button")


def test_examples_ask_for_pictures_that_the_pool_has_and_the_reply_shows(app, monkeypatch):
    things = ["frog in a red hat", "cat in a pink hat", "owl in a green hat"]
    ids = [f"{thing}, eating apple, forest" for thing in things]
    pool = app.model.build_pool(
        images=[picture(i) for i in range(3)], texts=["here."], image_ids=ids, show_progress_bar=False
    )
    asked = App(app.model, pool)
    # A model that mistakes the cat for the owl.
    monkeypatch.setattr(
        App, "_opened", lambda self, text, given=None: [self.strip[0 if "frog in a red" in text else 2]]
    )
    assert [(e.text, e.thumbnail.name) for e in asked._named()] == [
        (NAMED[0].format(things[0]), ids[0]), (NAMED[1].format(things[2]), ids[2]),
    ]  # fmt: skip
    assert [e.text for e in asked.examples][:2] == [e.text for e in asked._named()] and len(asked.examples) == OFFERED
