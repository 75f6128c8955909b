"""The page itself: where everything is, and what happens on which click."""

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
    start = Session()
    with gr.Blocks(title="UniMuR", analytics_enabled=False, delete_cache=(3600, 7200), fill_width=True) as page:
        session = gr.State(start)
        gr.HTML(views.header(miniature, {"Paper": views.PAPER, **(links or {})}), elem_id="head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=320):
                examples = gr.HTML(views.examples(app.examples), elem_id="examples", js_on_load=CLICKS)
                talk = gr.HTML(visible=False, elem_id="talk", js_on_load=FOLLOW)
                box = gr.MultimodalTextbox(
                    elem_id="box", label="Your turn: words, pictures, or both", show_label=False,
                    placeholder="Say something, or show a picture", file_types=["image"], file_count="multiple",
                    sources=["upload"], autofocus=False, max_plain_text_length=MAX_TEXT * 10,
                )  # fmt: skip
                count = gr.HTML(elem_id="count")
                draw = gr.Button("Draw a picture", size="sm", visible=False, elem_id="draw") if app.draws else None
                again = gr.Button("Start again", size="sm", visible=False, elem_id="again")
                strip = gr.HTML(views.strip(app.strip), elem_id="strip", js_on_load=CLICKS)
            with gr.Column(scale=4, min_width=320, visible=False) as side:
                bias = gr.Slider(
                    -0.5, 0.5, value=0.0, step=0.01, label="Answer by words or by pictures", elem_id="bias",
                    buttons=[],
                )  # fmt: skip
                hits = gr.HTML(elem_id="found", js_on_load=UNFOLD)
        with gr.Accordion("Add your own pictures to the pool", open=False, elem_id="own"):
            upload = gr.File(
                file_count="multiple",
                file_types=["image"],
                label="They stay in this session",
                height=120,
                elem_id="upload",
            )
        size = gr.HTML(views.pool_line(app.pool.counts, 0), elem_id="size")

        def drawn(session: Session) -> list[Any]:
            talking = bool(session.turns)
            shown = session.turns[-1].pictures if talking else ()
            # A second click would draw the same picture again.
            undrawn = talking and not any(picture.drawn for picture in shown)
            return [
                session,
                gr.HTML(views.conversation(session) if talking else "", visible=talking),
                gr.HTML(visible=not talking),
                gr.Button(visible=talking),
                gr.Column(visible=talking),
                views.ranking(session.reply),
                views.pool_line((session.pool or app.pool).counts, session.uploads),
                *([gr.Button(visible=undrawn)] if draw else []),
            ]

        def attempt(step: Any, session: Session, *arguments: Any) -> tuple[bool, list[Any]]:
            try:
                return True, drawn(step(session, *arguments))
            except ValueError as error:
                gr.Warning(str(error), title="That did not work")
                return False, [gr.skip()] * len(outputs)

        def on_say(message: dict[str, Any], session: Session, image_bias: float) -> list[Any]:
            done, update = attempt(app.say, session, message.get("text"), message.get("files") or [], image_bias)
            # A refused turn keeps what was typed.
            return [*update, *(({"text": "", "files": []}, "") if done else (gr.skip(), gr.skip()))]

        def on_example(session: Session, image_bias: float, event: gr.EventData) -> list[Any]:
            return attempt(app.try_example, session, event._data["at"], image_bias)[1]

        def on_show(session: Session, image_bias: float, event: gr.EventData) -> list[Any]:
            return attempt(app.show, session, event._data["at"], image_bias)[1]

        outputs = [session, talk, examples, again, side, hits, size, *([draw] if draw else [])]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        box.submit(on_say, [box, session, bias], [*outputs, box, count], **private)
        box.change(None, box, count, js=COUNT, **private)
        examples.click(on_example, [session, bias], outputs, **private)
        strip.click(on_show, [session, bias], outputs, **private)
        bias.input(
            lambda s, b: attempt(app.rank_again, s, b)[1],
            [session, bias],
            outputs,
            trigger_mode="always_last",
            **private,
        )
        upload.upload(
            lambda files, s, b: [*attempt(app.add_pictures, s, files or [], b)[1], None],
            [upload, session, bias], [*outputs, upload], **private,
        )  # fmt: skip
        if draw:  # it takes seconds, so that it shows that it goes on
            draw.click(lambda s: attempt(app.draw, s)[1], session, outputs, **private | {"show_progress": "minimal"})
        page.load(None, js=NAMED)
        again.click(lambda s: drawn(Session(pool=s.pool, uploads=s.uploads)), session, outputs, **private)
    return page
