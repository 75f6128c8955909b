"""Systems that draw: a diffusion model on its own words, and a model that chooses between drawing and retrieving."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.load import UniMuR
from benchmarks.systems import DoesNotApplyError, System
from modeling_unimur import UniMuRModel
from modeling_unimur.dialogues_unimur import parse_dialogue
from modeling_unimur.generation_unimur import dialogue_seed, draw


class TextToImage(System):
    """
    The diffusion model of a [`UniMuRModel`] that can draw, without the LLM: from a dialogue's last words, as many as its
    text encoder has positions for (`truncated` counts the dialogues that lost their oldest), or from the true caption.
    """

    def __init__(self, model: UniMuRModel, of: str = "dialogue"):
        if of not in ("dialogue", "caption"):
            raise ValueError(f"of={of!r} is not 'dialogue' or 'caption'")
        self.model, self.of, self.truncated = model, of, 0
        self.name = "diffusion, the dialogue's text" if of == "dialogue" else "diffusion, the true caption"

    @property
    def revision(self) -> dict[str, Any]:
        config = self.model.config
        name = str(config.drawing_model_name_or_path)
        return {
            "pipeline": Path(name).name if Path(name).is_dir() else name,
            "pipeline_revision": config.drawing_model_revision,
        }

    def begin(self) -> None:
        self.truncated = 0

    @property
    def notes(self) -> list[str]:
        cut = f"{self.truncated} texts exceeded the text encoder's {self.model.config.drawing_length} positions"
        return [f"{cut} and lost their oldest tokens"] if self.truncated else []

    def draw(self, dialogues: Sequence[Any], captions: Sequence[str | None] = (), seed: int = 0) -> list[Image.Image]:
        """A picture a dialogue."""
        if self.of == "caption":
            if not captions or None in captions:
                raise DoesNotApplyError
            texts = [str(caption) for caption in captions]
        else:
            texts = [" ".join(e for turn in parse_dialogue(d) for e in turn if isinstance(e, str)) for d in dialogues]
        config, drawn = self.model.config, []
        for start in range(0, len(texts), 8):
            rows = [self._ids(text) for text in texts[start : start + 8]]
            pipeline = self.model.pipeline.to(self.model.device)
            batch = pipeline.tokenizer.pad(
                {"input_ids": rows}, padding="max_length", max_length=config.drawing_length, return_tensors="pt"
            )
            embeds = pipeline.text_encoder(batch["input_ids"].to(self.model.device))[0].detach()
            seeds = [dialogue_seed(seed, row) for row in rows]
            drawn += draw(pipeline, embeds, seeds, config.drawing_steps, config.drawing_guidance)
        return drawn

    def _ids(self, text: str) -> list[int]:
        """The last tokens of a text that fit, between the tokenizer's own first and last."""
        ids, limit = self.model.pipeline.tokenizer(text)["input_ids"], self.model.config.drawing_length
        self.truncated += len(ids) > limit
        return ids if len(ids) <= limit else ids[:1] + ids[1 - limit :]


class Chooses(UniMuR):
    """A [`UniMuRModel`] that draws only where the pool's best image scores below `config.draw_below` (`generate="auto"`)."""

    def __init__(self, model: UniMuRModel, name: str = "UniMuR, drawn or retrieved"):
        super().__init__(model, name)
        if model.config.draw_below is None:
            raise ValueError("config.draw_below is not set: the rule has not been learned")
        self.draw_below = model.config.draw_below


class Retrieves(UniMuR):
    """A [`UniMuRModel`] that never draws, although it may be able to."""

    def draw(self, dialogues: Sequence[Any], captions: Sequence[str | None] = ()) -> list[Image.Image]:
        raise DoesNotApplyError
