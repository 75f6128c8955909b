"""The page itself: where everything is, and what happens on which click."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

import views
from talk import MAX_TEXT, App, Session

HERE = Path(__file__).parent
MAX_FILE = "8mb"
THEME = gr.themes.Soft(
    primary_hue="teal", neutral_hue="slate", font=["system-ui", "Segoe UI", "Roboto", "sans-serif"],
    font_mono=["ui-monospace", "monospace"], radius_size="lg",
)  # fmt: skip
LAUNCH: dict[str, Any] = {
    "theme": THEME, "css_paths": [HERE / "page.css"], "max_file_size": MAX_FILE, "ssr_mode": False, "footer_links": [],
}  # fmt: skip
# A click on a button of the strip or of the examples is an event with its number.
CLICKS = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-at]');
  if (button) trigger('click', {at: Number(button.dataset.at)});
});
"""
# The newest turn is in view.
FOLLOW = """
const follow = () => {
  const log = element.querySelector('.u-log');
  if (log) log.scrollTop = log.scrollHeight;
};
watch('value', follow);
follow();
"""
# The ranking is open where there is room beside the conversation, until the visitor opens or closes it.
UNFOLD = """
let open = matchMedia('(min-width: 800px)').matches;
const unfold = () => {
  const details = element.querySelector('details');
  if (!details) return;
  details.open = open;
  details.addEventListener('toggle', () => { open = details.open; });
};
watch('value', unfold);
unfold();
"""
COUNT = """
message => {
  const limit = LIMIT, length = [...(message?.text ?? '').trim()].length;
  const over = length > limit ? ' u-over' : '';
  const text = `${length.toLocaleString('en')} of ${limit.toLocaleString('en')} characters`;
  return length ? `<span class="u-count${over}">${text}</span>` : '';
}
""".replace("LIMIT", str(MAX_TEXT))

# A placeholder is no name for a screen reader.
NAMED = "() => { document.querySelector('#box textarea').setAttribute('aria-label', 'Your turn'); }"


def build(app: App, *, miniature: bool = False, links: dict[str, str] | None = None) -> gr.Blocks:
    """
    The page.

    Args:
        app: what it does.
        miniature: whether the model is the embedded default, which the first line says.
        links: name -> URL, beside the paper's.
    """
    with gr.Blocks(title="UniMuR", analytics_enabled=False, delete_cache=(3600, 7200), fill_width=True) as page:
        gr.HTML(views.header(miniature, {"Paper": views.PAPER, **(links or {})}), elem_id="head")
        Page(app).connect()
        page.load(None, js=NAMED)
    return page


class Page:
    """The components of the page below its head, and what they do; made inside a `gr.Blocks`."""

    def __init__(self, app: App):
        self.app = app
        self.session = gr.State(Session())
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                self._conversation()
            with gr.Column(scale=4, min_width=320, visible=False) as self.side:
                self.bias = gr.Slider(
                    -0.5, 0.5, value=0.0, step=0.01, label="Answer by words or by pictures", elem_id="bias",
                    buttons=[],
                )  # fmt: skip
                self.hits = gr.HTML(elem_id="hits", js_on_load=UNFOLD)
        with gr.Accordion("Add your own pictures to the pool", open=False, elem_id="own"):
            self.upload = gr.File(
                file_count="multiple", file_types=["image"], label="They stay in this session", height=120,
                elem_id="upload",
            )  # fmt: skip
        self.size = gr.HTML(views.pool_line(app.pool.counts, 0), elem_id="size")
        drawing = [self.draw] if self.draw else []
        self.outputs = [self.session, self.talk, self.examples, self.again, self.side, self.hits, self.size, *drawing]

    def _conversation(self) -> None:
        self.examples = gr.HTML(views.examples(self.app.examples), elem_id="examples", js_on_load=CLICKS)
        self.talk = gr.HTML(visible=False, elem_id="talk", js_on_load=FOLLOW)
        self.box = gr.MultimodalTextbox(
            elem_id="box", label="Your turn: words, pictures, or both", show_label=False,
            placeholder="Say something, or show a picture", file_types=["image"], file_count="multiple",
            sources=["upload"], autofocus=False, max_plain_text_length=MAX_TEXT * 10,
        )  # fmt: skip
        self.count = gr.HTML(elem_id="count")
        draws = self.app.draws
        self.draw = gr.Button("Draw a picture", size="sm", visible=False, elem_id="draw") if draws else None
        self.again = gr.Button("Start again", size="sm", visible=False, elem_id="again")
        self.strip = gr.HTML(views.strip(self.app.strip), elem_id="strip", js_on_load=CLICKS)

    def connect(self) -> None:
        """What happens on which event."""
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        asked, outputs = [self.session, self.bias], self.outputs
        self.box.submit(self.on_say, [self.box, *asked], [*outputs, self.box, self.count], **private)
        self.box.change(None, self.box, self.count, js=COUNT, **private)
        self.examples.click(self.on_example, asked, outputs, **private)
        self.strip.click(self.on_show, asked, outputs, **private)
        self.bias.input(self.on_bias, asked, outputs, trigger_mode="always_last", **private)
        self.upload.upload(self.on_upload, [self.upload, *asked], [*outputs, self.upload], **private)
        if self.draw:  # it takes seconds, so that it shows that it goes on
            self.draw.click(self.on_draw, self.session, outputs, **private | {"show_progress": "minimal"})
        self.again.click(self.on_again, self.session, outputs, **private)

    def updates(self, session: Session) -> list[Any]:
        """A value of each output."""
        talking = bool(session.turns)
        pictures = session.turns[-1].pictures if talking else ()
        # A second click would draw the same picture again.
        undrawn = talking and not any(picture.drawn for picture in pictures)
        return [
            session,
            gr.HTML(views.conversation(session) if talking else "", visible=talking),
            gr.HTML(visible=not talking),
            gr.Button(visible=talking),
            gr.Column(visible=talking),
            views.ranking(session.reply),
            views.pool_line((session.pool or self.app.pool).counts, session.uploads),
            *([gr.Button(visible=undrawn)] if self.draw else []),
        ]

    def attempt(self, step: Callable[..., Session], session: Session, *arguments: Any) -> tuple[bool, list[Any]]:
        """Whether a step was taken, and the updates; where it was not, a warning says why and nothing changes."""
        try:
            return True, self.updates(step(session, *arguments))
        except ValueError as error:
            gr.Warning(str(error), title="That did not work")
            return False, [gr.skip()] * len(self.outputs)

    def on_say(self, message: dict[str, Any], session: Session, bias: float) -> list[Any]:
        done, updates = self.attempt(self.app.say, session, message.get("text"), message.get("files") or [], bias)
        # A refused turn keeps what was typed.
        return [*updates, *(({"text": "", "files": []}, "") if done else (gr.skip(), gr.skip()))]

    def on_example(self, session: Session, bias: float, event: gr.EventData) -> list[Any]:
        return self.attempt(self.app.try_example, session, event._data["at"], bias)[1]

    def on_show(self, session: Session, bias: float, event: gr.EventData) -> list[Any]:
        return self.attempt(self.app.show, session, event._data["at"], bias)[1]

    def on_bias(self, session: Session, bias: float) -> list[Any]:
        return self.attempt(self.app.rank_again, session, bias)[1]

    def on_upload(self, files: list[str] | None, session: Session, bias: float) -> list[Any]:
        return [*self.attempt(self.app.add_pictures, session, files or [], bias)[1], None]

    def on_draw(self, session: Session) -> list[Any]:
        return self.attempt(self.app.draw, session)[1]

    def on_again(self, session: Session) -> list[Any]:
        return self.updates(Session(pool=session.pool, uploads=session.uploads))
