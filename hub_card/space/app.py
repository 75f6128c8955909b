"""
A conversation with UniMuR: the reply's words and picture, what else was found, and one's own pictures in the pool.

    python hub_card/space/app.py                                   the miniature of `make demo`, its pool packed beside it
    python hub_card/space/app.py --model org/unimur-… --pool DIR    another checkpoint, another pool

As a Space it takes `checkpoint/` beside this file, or the repository that the variable UNIMUR_MODEL names. A visitor's
words and pictures stay in the visitor's session.
"""

import argparse
import base64
import hashlib
import html
import io
import os
import tempfile
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from transformers import AutoModel

HERE = Path(__file__).parent
MINIATURE = Path("runs/miniature/checkpoint")
SHOWN = 8  # candidates beside the conversation
MAX_UPLOADS = 24  # of a visitor, in the pool
MAX_FILE = "8mb"
MAX_PIXELS = 16_000_000
MAX_SIDE = 1024  # of a picture that is kept: embedding it again and drawing it again stay cheap
MAX_IMAGES = 16  # of a visitor, in a conversation
MAX_TURNS = 64  # of a conversation, replies included
MAX_TEXT = 2_000  # characters
EXAMPLES = [
    "what do pandas look like?",
    "i met a penguin today. it had a blue beanie on. it spends the day playing the harp on the lawn. can i see it?",
    "there was a monkey in a pink beanie, rolling a barrel. do you have a picture?",
    "i saw a duck practising the trumpet in the desert. it had a green cap. thanks!",
]
CSS = """
.gradio-container {width: 100% !important; max-width: 1180px !important; margin: 0 auto !important}
.gradio-container > .main {padding: 20px 16px !important}
#head h1 {font-size: 1.6rem; font-weight: 650; margin: 0 0 .2rem} #head p {opacity: .75; margin: 0; max-width: 62ch}
#talk .image-container, #talk .image-frame {padding: 0; margin: 0; min-height: 0; height: auto; width: auto; border: 0}
#talk .image-container, #talk .message-content {justify-content: flex-start; align-items: flex-start}
#talk img {height: 168px; margin: 0; width: auto; max-width: 100%; object-fit: contain; border-radius: 10px}
#talk .icon-button-wrapper, #talk .message-buttons-left, #talk .message-buttons-right, #talk .top-panel {display: none}
.example button, button.example {justify-content: flex-start; text-align: left; font-weight: 400; min-height: 44px}
#bias [data-testid=block-info] {background: none; padding: 0; color: inherit; font-weight: 600}
#found {min-height: 420px}
.u-found {display: grid; gap: 6px} .u-found h2 {font-size: .95rem; font-weight: 600; margin: 0 0 4px}
.u-row {display: grid; grid-template-columns: 1.2rem 1fr 3rem; gap: 10px; align-items: center; padding: 8px 10px;
  border-radius: 10px; border: 1px solid var(--border-color-primary); background: var(--background-fill-primary)}
.u-row.u-used {border-color: var(--color-accent); box-shadow: inset 3px 0 0 var(--color-accent)}
.u-rank {opacity: .55; font-variant-numeric: tabular-nums; text-align: right; font-size: .85rem}
.u-item {font-size: .88rem; line-height: 1.35; overflow-wrap: anywhere; min-width: 0}
.u-picture {display: flex; gap: 10px; align-items: center}
.u-row img {width: 60px; height: 60px; object-fit: cover; border-radius: 8px; flex: none}
.u-kind {font-size: .68rem; letter-spacing: .05em; text-transform: uppercase; opacity: .6; display: block}
.u-bar {height: 4px; border-radius: 2px; background: var(--border-color-primary); margin-top: 6px; overflow: hidden}
.u-bar i {display: block; height: 100%; background: var(--color-accent)}
.u-score {font-variant-numeric: tabular-nums; font-size: .82rem; text-align: right; opacity: .8}
.u-none {opacity: .6; font-size: .9rem; padding: 24px 4px}
.u-small img, img.u-small {image-rendering: pixelated}
footer {display: none !important}
@media (max-width: 640px) {.gradio-container > .main {padding: 14px 8px !important} #found {min-height: 0}}
"""


@dataclass(frozen=True)
class Session:
    """
    A visitor's conversation.

    Attributes:
        turns: chat messages as `retrieve` takes them, the replies among them.
        asked: how many of them were there when the last reply was retrieved.
        pool: the pool with the visitor's pictures; `None` is everybody's.
        uploads: how many pictures the visitor has added.
    """

    turns: tuple[dict[str, Any], ...] = ()
    asked: int = 0
    pool: Any = None
    uploads: int = 0
    found: tuple[Any, ...] = field(default=())


class App:
    """
    What the page does, apart from how it looks.

    Args:
        model: a loaded UniMuR.
        pool: what it searches.
    """

    def __init__(self, model: Any, pool: Any):
        self.model, self.pool = model, pool
        # A picture is drawn where the pool has no good one, by a model that learned when and on a machine that can.
        learned = getattr(model.config, "draw_below", None) is not None
        self.generate = "auto" if learned and find_spec("diffusers") else "never"
        processor = model.processor
        processor.max_image_pixels = min(processor.max_image_pixels, MAX_PIXELS)

    def say(self, session: Session, text: str, files: list[str], image_bias: float) -> Session:
        """
        Adds a turn of words and pictures and the reply to it.

        Raises:
            ValueError: an empty turn, too long a text, too many turns or pictures, a file that is no picture; the session
                stays as it was.
        """
        text = (text or "").strip()
        if not text and not files:
            raise ValueError("Write something, or add a picture.")
        if len(text) > MAX_TEXT:
            raise ValueError(f"That is {len(text)} characters; at most {MAX_TEXT} go into a turn.")
        if len(session.turns) + 2 > MAX_TURNS:
            raise ValueError(f"A conversation has at most {MAX_TURNS} turns, replies included: start anew.")
        shown = sum(p["type"] == "image" for t in session.turns if t["role"] == "user" for p in t["content"])
        if shown + len(files) > MAX_IMAGES:
            raise ValueError(
                f"At most {MAX_IMAGES} pictures go into a conversation; {shown} are there already: show fewer, or start anew."
            )
        parts = [{"type": "image", "image": self._picture(file)} for file in files]
        if text:
            parts.append({"type": "text", "text": text})
        turns = (*session.turns, {"role": "user", "content": parts})
        return self._answered(replace(session, turns=turns, asked=len(turns)), image_bias)

    def rank_again(self, session: Session, image_bias: float) -> Session:
        """The last turn answered anew, by another bias or out of a larger pool."""
        return self._answered(session, image_bias) if session.asked else session

    def add_pictures(self, session: Session, files: list[str], image_bias: float) -> Session:
        """Adds a visitor's own pictures to the visitor's pool. Raises `ValueError` as `say` does."""
        if session.uploads + len(files) > MAX_UPLOADS:
            raise ValueError(f"At most {MAX_UPLOADS} pictures of your own; {session.uploads} are there already.")
        images = [self._picture(file) for file in files]
        ids = [f"yours-{session.uploads + at + 1}" for at in range(len(images))]
        pool = self.model.extend_pool(session.pool or self.pool, images, image_ids=ids, show_progress_bar=False)
        return self.rank_again(replace(session, pool=pool, uploads=session.uploads + len(images)), image_bias)

    def _answered(self, session: Session, image_bias: float) -> Session:
        asked = session.turns[: session.asked]
        reply = self.model.retrieve(
            list(asked), session.pool or self.pool, top_k=SHOWN, image_bias=float(image_bias), generate=self.generate
        )
        content = [{"type": "text", "text": reply.text}] if reply.text is not None else []
        if reply.image is not None:
            content.append({"type": "image", "image": _reduced(reply.image), "source": reply.image_source})
        turns = (*asked, {"role": "assistant", "content": content})
        return replace(session, turns=turns, found=(reply,))

    def _picture(self, file: str) -> Image.Image:
        try:
            return _reduced(self.model.processor.decode(Path(file)))
        except ValueError as error:
            # The file's own path on the server is nobody's business.
            raise ValueError(str(error).replace(str(file), Path(file).name)) from error


def chat(session: Session, folder: Path) -> list[dict[str, Any]]:
    """The conversation as gradio's chat shows it; each picture is written to `folder` once, by its content's name."""
    shown = []
    for at, turn in enumerate(session.turns):
        for part in turn["content"]:
            if part["type"] == "text":
                shown.append({"role": turn["role"], "content": html.escape(part["text"])})
            else:
                drawn = part.get("source") == "drawn"
                alt = (
                    "a picture drawn for the reply"
                    if drawn
                    else "a picture of the reply"
                    if turn["role"] == "assistant"
                    else f"a picture of turn {at + 1}"
                )
                shown.append(
                    {"role": turn["role"], "content": {"path": str(_written(part["image"], folder)), "alt_text": alt}}
                )
                if drawn:  # on the page alone: the model does not read it
                    shown.append({"role": turn["role"], "content": "<em>This picture was drawn, not retrieved.</em>"})
    return shown


def ranking(session: Session) -> str:
    """The candidates of the last reply as HTML; everything that came from outside is escaped."""
    if not session.found:
        return '<p class="u-none">What is found will be listed here, best first: words and pictures in one order.</p>'
    (reply,) = session.found
    scores = [c.score for c in reply.candidates]
    low, high = min(scores), max(scores)
    used = {
        next((c.id for c in reply.candidates if c.modality == "text"), None) if reply.text is not None else None,
        next((c.id for c in reply.candidates if c.modality == "image"), None) if reply.image is not None else None,
    }
    rows = []
    for c in reply.candidates:
        width = 100 if high == low else 12 + 88 * (c.score - low) / (high - low)
        if c.modality == "image":
            item = (
                f'<div class="u-picture"><img class="{"u-small" if max(c.item.size) < 128 else ""}" src="{_data(c.item)}" '
                f'alt="{html.escape(c.id)}"><div><span class="u-kind">picture</span>{html.escape(c.id)}</div></div>'
            )
        else:
            item = f'<span class="u-kind">text</span>{html.escape(c.item)}'
        rows.append(
            f'<div class="u-row{" u-used" if c.id in used else ""}" data-id="{html.escape(c.id)}" '
            f'data-modality="{c.modality}"><span class="u-rank">{c.rank}</span><div class="u-item">{item}'
            f'<div class="u-bar"><i style="width:{width:.0f}%"></i></div></div><span class="u-score">{c.score:.3f}</span></div>'
        )
    return '<div class="u-found"><h2>What was found, words and pictures in one order</h2>' + "".join(rows) + "</div>"


def _written(image: Image.Image, folder: Path) -> Path:
    """The file of an RGB picture in `folder`."""
    name = hashlib.sha256(repr(image.size).encode() + image.tobytes()).hexdigest()
    file = folder / f"{name}.png"
    if not file.exists():
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as part:  # another visitor never sees half of it
            _enlarged(image).save(part, "PNG")
        os.replace(part.name, file)
    return file


def _reduced(image: Image.Image) -> Image.Image:
    """A picture of at most `MAX_SIDE` pixels a side."""
    if max(image.size) <= MAX_SIDE:
        return image
    image = image.copy()  # it may be the pool's
    image.thumbnail((MAX_SIDE, MAX_SIDE), Image.BICUBIC)
    return image


def _enlarged(image: Image.Image) -> Image.Image:
    """Small pictures by a whole factor, so that their pixels stay crisp."""
    factor = max(1, 192 // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.NEAREST)


def _data(image: Image.Image) -> str:
    small = image.copy()
    small.thumbnail((128, 128))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def pool_line(session: Session, app: App) -> str:
    """How large the visitor's pool is."""
    counts = (session.pool or app.pool).counts
    yours = f", {session.uploads} of them yours" if session.uploads else ""
    return f"{counts['image']:,} pictures{yours} and {counts['text']:,} texts are searched."


def build(app: App) -> gr.Blocks:
    """The page."""
    # The pictures of all conversations stay until the process ends; gradio's copies, which browsers fetch, go when they
    # are two hours old, and a redraw makes them again.
    folder = tempfile.TemporaryDirectory(prefix="unimur-")
    with gr.Blocks(title="UniMuR", analytics_enabled=False, delete_cache=(3600, 7200), fill_width=True) as page:
        session = gr.State(Session())
        gr.HTML(
            "<h1>UniMuR</h1><p>A frozen language model reads the conversation; one embedding finds the words of the reply "
            "and its picture, in one pool of both.</p>", elem_id="head", padding=False,
        )  # fmt: skip
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                talk = gr.Chatbot(
                    elem_id="talk", height=480, show_label=False, buttons=[], render_markdown=False, layout="bubble",
                    placeholder="Say something, or show a picture.", feedback_options=None,
                )  # fmt: skip
                box = gr.MultimodalTextbox(
                    elem_id="box", show_label=False, placeholder="Say something, or show a picture",
                    file_types=["image"], file_count="multiple", sources=["upload"], autofocus=False,
                )  # fmt: skip
                for at in range(0, len(EXAMPLES), 2):
                    with gr.Row():
                        for number, text in list(enumerate(EXAMPLES))[at : at + 2]:
                            button = gr.Button(
                                text, size="sm", elem_id=f"example-{number}", elem_classes="example", min_width=280
                            )
                            button.click(
                                lambda text=text: {"text": text, "files": []}, None, box, api_visibility="private"
                            )
            with gr.Column(scale=4, min_width=320):
                bias = gr.Slider(
                    -0.5, 0.5, value=0.0, step=0.01, label="Words or pictures", elem_id="bias",
                    info="Added to each picture's score: to the right more pictures are shown, to the left fewer.",
                )  # fmt: skip
                found = gr.HTML(ranking(Session()), elem_id="found", padding=False)
                with gr.Accordion("Your pictures in the pool", open=False, elem_id="own"):
                    upload = gr.File(
                        file_count="multiple", file_types=["image"], label="They stay in this session", height=120,
                        elem_id="upload",
                    )  # fmt: skip
                size = gr.Markdown(pool_line(Session(), app), elem_id="size")
                anew = gr.Button("Start anew", size="sm", elem_id="anew")

        def shown(session: Session):
            return session, chat(session, Path(folder.name)), ranking(session), pool_line(session, app)

        def attempt(step, session: Session, *arguments: Any):
            try:
                return shown(step(session, *arguments))
            except ValueError as error:
                gr.Warning(str(error), title="That did not work")
                return shown(session)

        def on_say(message, session, image_bias):
            outcome = attempt(app.say, session, message.get("text"), message.get("files") or [], image_bias)
            return (*outcome, {"text": "", "files": []})

        outputs = [session, talk, found, size]
        private = {"api_visibility": "private", "show_progress": "hidden"}
        box.submit(on_say, [box, session, bias], [*outputs, box], **private)
        bias.input(
            lambda s, b: attempt(app.rank_again, s, b), [session, bias], outputs, trigger_mode="always_last", **private
        )
        upload.upload(
            lambda files, s, b: (*attempt(app.add_pictures, s, files or [], b), None),
            [upload, session, bias], [*outputs, upload], **private,
        )  # fmt: skip
        anew.click(lambda s: shown(Session(pool=s.pool, uploads=s.uploads)), session, outputs, **private)
    return page


def load(model: str | None, pool: str | None) -> App:
    """
    The app over a checkpoint and a pool: the given ones, UNIMUR_MODEL's, the Space's own, or the miniature's.

    Raises:
        SystemExit: there is no checkpoint; the message says how to get one.
    """
    beside = HERE / "checkpoint"
    name = model or os.environ.get("UNIMUR_MODEL") or (beside if beside.is_dir() else MINIATURE)
    if name == MINIATURE and not MINIATURE.is_dir():
        raise SystemExit("no checkpoint: run `make demo` first, or give --model a folder or a name on the Hub")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModel.from_pretrained(str(name), trust_remote_code=True).to(device)
    return App(loaded, loaded.packed_pool if pool is None else loaded.open_pool(pool))


THEME = gr.themes.Soft(
    primary_hue="teal", neutral_hue="slate", font=["system-ui", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "monospace"], radius_size="lg",
)  # fmt: skip


LAUNCH = {"theme": THEME, "css": CSS, "max_file_size": MAX_FILE, "ssr_mode": False, "footer_links": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint's folder, or its name on the Hub")
    parser.add_argument("--pool", help="a saved pool; by default the one packed beside the checkpoint")
    parser.add_argument("--port", type=int, default=None)
    arguments = parser.parse_args()
    build(load(arguments.model, arguments.pool)).launch(server_port=arguments.port, **LAUNCH)


if __name__ == "__main__":
    main()
