"""Pictures drawn where none fits (Appendix A.2): GILL's [IMG] tokens and mapper before a frozen diffusion model."""

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm.auto import tqdm
from transformers import initialization as init
from transformers.utils import logging

from .configuration_unimur import UniMuRConfig
from .inputs_unimur import as_dialogues, batches
from .losses_unimur import global_mean
from .replies_unimur import Retrieval

if TYPE_CHECKING:
    from .processing_unimur import UniMuRProcessor

logger = logging.get_logger(__name__)

MAX_BATCH = 256  # pictures drawn at once
WHEN = ("never", "always", "auto")
INSTALL = "drawing pictures needs diffusers: pip install 'modeling-unimur[generate]'"


class Drawing(nn.Module):
    """
    What is trained to draw: the input embeddings of the [IMG] tokens behind [RET], which is the first of them, and GILL's
    mapper from the LLM's last outputs at all of them to a diffusion model's text conditioning.

    Args:
        config: `n_drawing_tokens`, `drawing_length`, `drawing_width`, `mapper_width`, `mapper_layers` and `mapper_heads` are
            read.
    """

    def __init__(self, config: UniMuRConfig):
        super().__init__()
        width = config.mapper_width
        self.tokens = nn.Parameter(torch.empty(config.n_drawing_tokens - 1, config.text_width))
        self.fc = nn.Linear(config.text_width, width)
        layer = nn.TransformerEncoderLayer(
            width, config.mapper_heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.tfm = nn.Transformer(
            width, config.mapper_heads, num_decoder_layers=config.mapper_layers, dim_feedforward=4 * width, dropout=0.0,
            batch_first=True, norm_first=True,
            custom_encoder=nn.TransformerEncoder(layer, config.mapper_layers, nn.LayerNorm(width), enable_nested_tensor=False),
        )  # fmt: skip
        self.model = nn.Linear(width, config.drawing_width)
        self.query_embs = nn.Parameter(torch.empty(1, config.drawing_length, width))

    def init_weights(self) -> None:
        """As PyTorch starts its transformer; tokens stay random until [RET]'s embedding is known."""
        for name, parameter in self.named_parameters():
            if name in ("tokens", "query_embs"):
                init.normal_(parameter, std=0.02 if name == "tokens" else 1.0)
            elif parameter.ndim > 1:
                init.xavier_uniform_(parameter)
            else:
                init.constant_(parameter, 1.0 if ".norm" in name and name.endswith("weight") else 0.0)

    def forward(self, states: torch.Tensor, ret_embedding: torch.Tensor) -> torch.Tensor:
        """
        Args:
            states: `(n, n_drawing_tokens, d)` float32, the LLM's last outputs at the tokens.
            ret_embedding: `(d,)`, the first token's input embedding; GILL adds the tokens' inputs to their outputs.

        Returns:
            `(n, drawing_length, drawing_width)` float32, in the place of the diffusion model's text encoder's output.
        """
        states = states + torch.cat([ret_embedding[None], self.tokens])
        return self.model(self.tfm(self.fc(states), self.query_embs.expand(len(states), -1, -1)))


def drawing_loss(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Squared distance between the mapper's output and the diffusion model's text encoder's: `(n, length, width)` each ->
    scalar, the mean over the elements and over the global batch. (GILL's is the distance itself, not squared.)

    Raises:
        ValueError: the shapes differ.
    """
    if predicted.shape != target.shape:
        raise ValueError(
            f"the mapper gives (captions, length, width) {tuple(predicted.shape)} and the text encoder {tuple(target.shape)}: "
            "the model was made for another diffusion model"
        )
    distance = (predicted.float() - target.float()).square().mean((1, 2))
    return global_mean(distance.sum(), len(distance))


class DrawingMixin:
    """
    What a [`UniMuRModel`] with `n_drawing_tokens` adds: `drawing` and the diffusion model `pipeline`, which is no part of its
    checkpoint and not loaded until the first picture is asked for.
    """

    drawing: Drawing
    _pipeline: Any = None

    if TYPE_CHECKING:  # what the model brings
        config: UniMuRConfig
        language_model: Any
        ret_embedding: nn.Parameter
        training: bool
        processor: UniMuRProcessor

        @property
        def device(self) -> torch.device: ...
        def encode_images(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
        def input_embeddings(
            self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None, fixed_images: bool = False
        ) -> torch.Tensor: ...
        def last_outputs(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor: ...

    def add_drawing(self, pipeline: Any = None, n_drawing_tokens: int = 8, **fields: Any) -> None:
        """
        Gives a model that cannot draw an untrained mapper; its other tensors stay, and with them its pools.

        Args:
            pipeline: a diffusers pipeline, whose conditioning's length and width are taken.
            n_drawing_tokens: [IMG] tokens, [RET] among them.
            fields: others of [`UniMuRConfig`] for drawing, such as `mapper_width`.

        Raises:
            ValueError: it can draw already, or what [`UniMuRConfig`] refuses.
        """
        if self.config.n_drawing_tokens:
            raise ValueError("this model has [IMG] tokens already")
        if pipeline is not None:
            length, width = conditioning(pipeline)
            fields = {"drawing_length": length, "drawing_width": width, **fields}
        before = {name: getattr(self.config, name) for name in (*fields, "n_drawing_tokens")}
        for name, value in {**fields, "n_drawing_tokens": n_drawing_tokens}.items():
            setattr(self.config, name, value)
        try:
            self.config.validate_unimur()
            self.drawing = Drawing(self.config).to(self.device)
        except ValueError:
            for name, value in before.items():
                setattr(self.config, name, value)
            raise
        self.drawing.init_weights()
        self.start_drawing_tokens()
        self.drawing.train(self.training)
        if pipeline is not None:
            self.pipeline = pipeline

    def start_drawing_tokens(self) -> None:
        """Puts every [IMG] token where [RET] is; their positions tell them apart."""
        self.drawing.tokens.data.copy_(self.ret_embedding.data.expand_as(self.drawing.tokens))

    @property
    def pipeline(self) -> Any:
        """
        The diffusion model: the one that was set, or the one that the config names, at its revision.

        Raises:
            ImportError: diffusers is not installed.
            OSError: it could not be loaded.
            ValueError: the model cannot draw, the config names none, or its conditioning is not what the mapper gives.
        """
        self._check_can_draw()
        if self._pipeline is None:
            name = self.config.drawing_model_name_or_path
            if name is None:
                raise ValueError(
                    "the config names no diffusion model: set model.pipeline to a diffusers pipeline, or "
                    "config.drawing_model_name_or_path to its folder or its name on the Hub"
                )
            dtype = None if self.language_model is None else self.language_model.dtype
            self.pipeline = load_pipeline(name, self.config.drawing_model_revision, dtype)
        return self._pipeline

    @pipeline.setter
    def pipeline(self, pipeline: Any) -> None:
        self._check_can_draw()
        check_conditioning(self.config, pipeline)
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline

    def _check_can_draw(self) -> None:
        if not self.config.n_drawing_tokens:
            raise ValueError(
                "this model cannot draw: it was trained without [IMG] tokens (config.n_drawing_tokens is 0)"
            )

    def drawing_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_features: torch.Tensor | None = None,
        fixed_images: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """
        The LLM's last outputs at [RET] and at the [IMG] tokens behind it: contexts `(n, length)` ending in [RET], padded on
        either side -> `(n, n_drawing_tokens, d)` float32. What follows [RET] does not change its own output. Raises
        `ValueError` where the LLM has no positions left for the tokens.
        """
        room = getattr(self.config.text_config, "max_position_embeddings", None)
        if room is not None and input_ids.shape[1] + len(self.drawing.tokens) > room:
            raise ValueError(
                f"a context of {input_ids.shape[1]} tokens leaves no room for {len(self.drawing.tokens)} [IMG] tokens among "
                f"the LLM's {room} positions: shorten it (UniMuRProcessor.contexts(..., reserve={len(self.drawing.tokens)}))"
            )
        embeds = self.input_embeddings(input_ids, image_features, fixed_images)
        tokens = self.drawing.tokens.to(embeds.dtype)
        positions = torch.arange(input_ids.shape[1], device=embeds.device)
        last = (attention_mask * positions).argmax(1, keepdim=True)  # [RET]
        at = last + torch.arange(len(tokens) + 1, device=embeds.device)  # and behind it
        wide = at[..., None].expand(-1, -1, embeds.shape[-1])
        embeds = F.pad(embeds, (0, 0, 0, len(tokens))).scatter(1, wide[:, 1:], tokens.expand(len(embeds), -1, -1))
        mask = F.pad(attention_mask, (0, len(tokens))).scatter(1, at, 1)
        return self.last_outputs(embeds, mask).gather(1, wide).float()

    @torch.no_grad()
    def prompt_embeds(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """
        What the diffusion model reads in its text encoder's place, for n dialogues as [`UniMuRProcessor.contexts`] writes
        them: `(n, drawing_length, drawing_width)` float32. Raises `ValueError` where it holds NaN or infinity.
        """
        pixels = inputs.get("pixel_values")
        features = None if pixels is None else self.encode_images(pixels)[0]
        states = self.drawing_states(inputs["input_ids"], inputs["attention_mask"], features)
        embeds = self.drawing(states, self.ret_embedding)
        if not bool(torch.isfinite(embeds).all()):
            raise ValueError("the mapper's output holds NaN or infinity: its weights do, or the LLM's dtype overflows")
        return embeds

    def generate(
        self, dialogue: Any, *, seed: int = 0, steps: int | None = None, guidance: float | None = None,
        size: tuple[int, int] | None = None, batch_size: int = 8, show_progress_bar: bool = False,
    ) -> Image.Image | list[Image.Image]:  # fmt: skip
        """
        Draws the image that a dialogue asks for.

        Args:
            dialogue: one dialogue or a list of them, as [`UniMuRModel.retrieve`] takes it.
            seed: of the noise. Each dialogue has a generator of its own, seeded by this and its text, so that it gets the
                same picture alone and in a list.
            steps: of the diffusion model's scheduler, by default `config.drawing_steps`.
            guidance: classifier-free guidance, 1 for none, by default `config.drawing_guidance`.
            size: height and width in pixels, by default the diffusion model's own.
            batch_size: pictures drawn at once.
            show_progress_bar: over the batches.

        Returns:
            An RGB `PIL.Image`, or a list where a list of dialogues was given. What a pipeline's own safety checker refuses
            is black, and a warning counts it; a pipeline without one is the user's choice.

        Raises:
            ValueError: an argument out of its range, latents that hold NaN, too little memory for `batch_size` pictures;
                the model stays usable.
            ImportError, OSError: see `pipeline`.
        """
        dialogues, single = as_dialogues(dialogue)
        drawn = self.draw_each(
            dialogues, seed=seed, steps=steps, guidance=guidance, size=size, batch_size=batch_size,
            show_progress_bar=show_progress_bar,
        )  # fmt: skip
        return drawn[0] if single else drawn

    def draw_each(
        self, dialogues: Sequence[Any], *, seed: int = 0, steps: int | None = None, guidance: float | None = None,
        size: tuple[int, int] | None = None, batch_size: int = 8, show_progress_bar: bool = False,
    ) -> list[Image.Image]:  # fmt: skip
        """As `generate`, of a list of dialogues each in any form."""
        steps = self.config.drawing_steps if steps is None else steps
        guidance = self.config.drawing_guidance if guidance is None else guidance
        check_drawing(steps, guidance, size, batch_size, seed)
        pipeline = self.pipeline.to(self.device)
        drawn: list[Image.Image] = []
        count = -(-len(dialogues) // batch_size)
        for _, chosen in tqdm(batches(dialogues, batch_size), "drawing", count, disable=not show_progress_bar):
            inputs = self.processor.contexts(chosen, reserve=self.config.n_drawing_tokens - 1)
            seeds = [
                dialogue_seed(seed, ids[mask.bool()].tolist())
                for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
            ]
            drawn += draw(pipeline, self.prompt_embeds(inputs.to(self.device)), seeds, steps, guidance, size)
        return drawn


def draw(
    pipeline: Any, prompt_embeds: torch.Tensor, seeds: Sequence[int], steps: int, guidance: float,
    size: tuple[int, int] | None = None,
) -> list[Image.Image]:  # fmt: skip
    """
    One batch of pictures from a conditioning `(n, length, width)`, a seed for each.

    Raises:
        ValueError: the pictures hold NaN or infinity, or there is too little memory for so many at once.
    """
    dtype = getattr(getattr(pipeline, "unet", None), "dtype", prompt_embeds.dtype)
    height, width = size or (None, None)
    try:
        output = pipeline(
            prompt_embeds=prompt_embeds.to(dtype), num_inference_steps=steps, guidance_scale=guidance, height=height,
            width=width, generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="pt",
        )  # fmt: skip
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
            raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise ValueError(
            f"too little memory to draw {len(seeds)} pictures at once: lower batch_size, size or the pipeline's dtype"
        ) from error
    images = output.images
    if not bool(torch.isfinite(images).all()):
        raise ValueError(
            "the drawn latents hold NaN or infinity: the diffusion model overflows its dtype, or its weights are broken"
        )
    refused = sum(map(bool, getattr(output, "nsfw_content_detected", None) or []))
    if refused:
        logger.warning(f"the pipeline's safety checker refused {refused} of {len(seeds)} pictures, which are black")
    pixels = images.float().clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def load_pipeline(
    name: str, revision: str | None = None, dtype: torch.dtype | None = None, **components: Any
) -> Any:  # fmt: skip
    """
    A diffusers pipeline from a folder or the Hub, without running any code that it brings along. `components` are taken
    instead of its own; `None` leaves one out.

    Raises:
        ImportError: diffusers is not installed.
        OSError: it could not be loaded; the message names it.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError(INSTALL) from error
    try:
        return DiffusionPipeline.from_pretrained(name, revision=revision, dtype=dtype, **components)
    except (OSError, ValueError) as error:
        raise OSError(
            f"the diffusion model {name!r} at revision {revision or 'main'!r} could not be loaded. Set "
            f"config.drawing_model_name_or_path, or model.pipeline, if it lies elsewhere. The cause: {error}"
        ) from error


def conditioning(pipeline: Any) -> tuple[int, int]:
    """
    Positions and width of the text conditioning of a diffusers pipeline of Stable Diffusion's kind.

    Raises:
        ValueError: it has no `unet` with a cross-attention, or no `tokenizer`.
    """
    unet, tokenizer = getattr(pipeline, "unet", None), getattr(pipeline, "tokenizer", None)
    width = getattr(getattr(unet, "config", None), "cross_attention_dim", None)
    if not isinstance(width, int) or tokenizer is None:
        raise ValueError(
            f"{type(pipeline).__name__} is not of Stable Diffusion's kind: one UNet that attends to one text encoder's output"
        )
    return tokenizer.model_max_length, width


def check_conditioning(config: UniMuRConfig, pipeline: Any) -> None:
    """Refuses with a `ValueError` a pipeline whose conditioning is not the mapper's output; it names both numbers."""
    for what, given, own in zip(
        ("positions", "width"), conditioning(pipeline), (config.drawing_length, config.drawing_width), strict=True
    ):
        if given != own:
            raise ValueError(
                f"the diffusion model's conditioning has {what} {given}, and the mapper gives {own}: it was trained for "
                f"{config.drawing_model_name_or_path!r}"
            )


def check_drawing(steps: Any, guidance: Any, size: Any, batch_size: Any, seed: Any) -> None:
    """Refuses with a `ValueError` what no picture can be drawn with; the message names the argument."""
    for name, value in (("steps", steps), ("batch_size", batch_size), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name}={value!r} must be a whole number")
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if not 1 <= batch_size <= MAX_BATCH:
        raise ValueError(f"batch_size={batch_size} must be from 1 to {MAX_BATCH} pictures at once")
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)) or not 1 <= guidance < float("inf"):
        raise ValueError(f"guidance={guidance!r} must be a number from 1 on; 1 is none")
    if size is not None and not (
        isinstance(size, (tuple, list))
        and len(size) == 2
        and all(isinstance(s, int) and s > 0 and s % 8 == 0 for s in size)
    ):
        raise ValueError(f"size={size!r} must be height and width in pixels, multiples of 8")


def check_when(generate: str, drawing: Mapping[str, Any], config: UniMuRConfig) -> None:
    """Refuses with a `ValueError` an unknown `generate` or `drawing` of `retrieve`, and what this model does not have."""
    if generate not in WHEN:
        raise ValueError(f"generate={generate!r} is not one of {', '.join(map(repr, WHEN))}")
    unknown = sorted(set(drawing) - {"seed", "steps", "guidance", "size"})
    if unknown:
        raise ValueError(f"retrieve has no argument {', '.join(unknown)}")
    if drawing and generate == "never":
        raise ValueError(f"{', '.join(drawing)}: nothing is drawn, since generate is 'never'")
    if generate != "never" and not config.n_drawing_tokens:
        raise ValueError(f"generate={generate!r}: this model cannot draw, it has no [IMG] tokens")
    if generate == "auto" and config.draw_below is None:
        raise ValueError(
            "generate='auto' needs the rule that is learned on held-out dialogues: set config.draw_below, the score of the "
            "pool's best image below which a picture is drawn"
        )


def with_drawn(
    model: Any, dialogues: Sequence[Any], replies: Sequence[Retrieval], places: list[int], drawing: Mapping[str, Any]
) -> list[Retrieval]:
    """The replies, those at `places` with a picture drawn by `model.draw_each(..., **drawing)` as their image."""
    if not places:
        return list(replies)
    drawn = dict(zip(places, model.draw_each([dialogues[i] for i in places], **drawing), strict=True))
    return [reply.with_drawn(drawn[i]) if i in drawn else reply for i, reply in enumerate(replies)]


def dialogue_seed(seed: int, ids: Sequence[int]) -> int:
    """The seed of a dialogue of these token ids, the same wherever it is in a batch."""
    return zlib.crc32(repr((seed, list(ids))).encode())
