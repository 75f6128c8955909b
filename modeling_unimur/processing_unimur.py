"""From dialogues, captions and candidates to tensors."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, TypedDict

import torch
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from .batch_unimur import Batch, Captions, Contexts, Targets
from .dialogues_unimur import Turn, check_characters, parse_dialogue
from .images_unimur import decode_image, located
from .inputs_unimur import as_items, check_count
from .packing_unimur import plan_packing
from .towers_unimur import load_processors

logger = logging.get_logger(__name__)

IGNORE = -100  # torch's ignore_index


class UniMuRProcessor(ProcessorMixin):
    r"""
    Serialises text and images for a [`UniMuRModel`].

    A context becomes `BOS turn \n turn … [RET]`, without a space before `[RET]`, as trained; the parts of a turn follow
    each other directly, and an image becomes `n_visual_tokens` copies of `<image>`. `BOS` is there where the LLM's own
    tokenizer puts one. Text is never read as a special token, whatever it contains. A `ret_prompt` comes before `[RET]`,
    tokenised on its own, so that it is the same ids after every text.

    Args:
        image_processor: CLIP's.
        tokenizer: the LLM's; `[RET]` and `<image>` are added to it where absent. The LLM's table is not resized.
        clip_tokenizer: CLIP's, kept in the subfolder `clip_tokenizer`.
        n_visual_tokens (`int`): as in the model's config.
        max_length (`int`): positions of the LLM, in tokens.
        max_image_pixels (`int`): an image of more is refused before it is decoded.
        ret_prompt (`str`): words before every `[RET]`, as in the model's config; they count among the positions.
        clip_text_length (`int`, *optional*): the length that every text is padded to for CLIP's text encoder, as
            SigLIP's needs it ([`towers_unimur.load_processors`] knows); by default the longest of a batch.

    Raises:
        ValueError: `clip_tokenizer` is not CLIP's, which is what a checkpoint without that subfolder gives, or
            `ret_prompt` leaves no position for a text.
    """

    clip_tokenizer: PreTrainedTokenizerBase  # which the base class sets

    def __init__(
        self,
        image_processor,
        tokenizer,
        clip_tokenizer,
        n_visual_tokens: int = 1,
        max_length: int = 2048,
        max_image_pixels: int = 50_000_000,
        ret_token: str = "[RET]",
        image_token: str = "<image>",
        ret_prompt: str = "",
        clip_text_length: int | None = None,
        **kwargs,
    ):
        if clip_tokenizer is tokenizer or ret_token in clip_tokenizer.get_vocab():
            raise ValueError(
                f"clip_tokenizer is a {type(clip_tokenizer).__name__}, the LLM's and not CLIP's: the checkpoint probably "
                "lacks its 'clip_tokenizer/' folder"
            )
        self.n_visual_tokens = n_visual_tokens
        self.max_length = max_length
        self.max_image_pixels = max_image_pixels
        self.clip_text_length = clip_text_length
        self.ret_token, self.image_token, self.ret_prompt = ret_token, image_token, ret_prompt
        tokenizer.add_tokens([ret_token, image_token], special_tokens=True)
        super().__init__(image_processor, tokenizer, clip_tokenizer, **kwargs)
        self.ret_token_id, self.image_token_id = tokenizer.convert_tokens_to_ids([ret_token, image_token])
        bos = tokenizer.bos_token_id
        self._prefix = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
        self._separator = "\n"
        check_characters(ret_prompt, "ret_prompt")
        self._ending = [*(self._tokenize(ret_prompt) if ret_prompt else []), self.ret_token_id]
        self.set_max_length(max_length)

    @classmethod
    def from_pretrained_towers(
        cls, text_model: str, clip_model: str, *, text_revision: str | None = None, clip_revision: str | None = None,
        **fields: Any,
    ) -> "UniMuRProcessor":  # fmt: skip
        """
        The processor of two pre-trained towers (folders or Hub names).

        Args:
            fields: of the processor, such as `n_visual_tokens`. `max_length` must be one where the LLM's config names no
                positions.

        Raises:
            ValueError: `clip_model` is of no supported family, or nothing says how long a dialogue may be.
        """
        parts = load_processors(text_model, clip_model, text_revision, clip_revision) | fields
        if "max_length" not in parts:
            raise ValueError(
                f"the config of {str(text_model)!r} names no positions, which bound a dialogue: give max_length, the tokens "
                "that it was trained with"
            )
        return cls(**parts)

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As transformers', which would take defaults where a checkpoint has no `processor_config.json`."""
        values, rest = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if "n_visual_tokens" not in values:
            raise OSError(
                f"{str(pretrained_model_name_or_path)!r} holds no processor_config.json of a UniMuR, which says how many "
                "visual tokens an image becomes: restore that file from the checkpoint"
            )
        return values, rest

    def set_max_length(self, max_length: int) -> None:
        """
        Gives a dialogue another number of positions. A pool made under another is refused, for its texts may have been cut
        elsewhere.

        Raises:
            ValueError: no whole number, or `ret_prompt` and `[RET]` leave no position for a text.
        """
        max_length = check_count("max_length", max_length)
        if len(self._prefix) + len(self._ending) >= max_length:
            raise ValueError(
                f"ret_prompt {self.ret_prompt!r} and [RET] are {len(self._ending)} tokens, which leave no room for a text "
                f"among the LLM's {max_length} positions: shorten it"
            )
        self.max_length = max_length
        vars(self).pop("fingerprint", None)  # which names it

    # What a model reads

    @property
    def ending(self) -> list[int]:
        """The ids that end every context and text to be embedded: those of `ret_prompt`, then `[RET]`."""
        return list(self._ending)

    def contexts(
        self, dialogues: Sequence[Any], *, end_with_ret: bool = True, reserve: int = 0, first: int = 0
    ) -> BatchFeature:
        """
        Dialogues ending in `ret_prompt` and `[RET]`.

        Args:
            dialogues: each as [`parse_dialogue`] takes it.
            end_with_ret: `False` leaves both out, for the LLM to continue from there.
            reserve: positions to keep free for what is to follow.
            first: the number by which messages call the first dialogue.

        Returns:
            `input_ids`, `attention_mask` `(n, length)` int64, right-padded; where there are images also
            `pixel_values` `(i, 3, h, w)` float32 and `image_indices` `(i,)`, the images in the order of their slots.

        Raises:
            ValueError: the item and what is wrong with it.

        A dialogue beyond `max_length` loses its oldest turns, then the oldest parts of what remains; a warning says how
        many. `ret_prompt` and `[RET]` always stay.
        """
        if not len(dialogues):
            raise ValueError("no dialogues given: give at least one")
        images: list[Image.Image] = []
        rows = []
        end = self.ending if end_with_ret else []
        for item, dialogue in enumerate(dialogues, first):
            try:
                turns = parse_dialogue(dialogue)
                row, kept = self._serialise(turns, end=end, item=item, reserve=reserve)
                images += [self.decode(image) for image in kept]
            except ValueError as error:
                raise located(error, f"dialogue {item}") from error
            rows.append(row)
        batch: dict[str, Any] = {**self._pad(rows)}
        if images:
            batch["pixel_values"] = self.preprocess(images)
            batch["image_indices"] = torch.arange(len(images))
        return BatchFeature(batch)

    def turn_ids(self, turns: list[Turn]) -> list[int]:
        """The ids of parsed turns, with BOS and without what ends them, however many they are."""
        ids = list(self._prefix)
        for unit in self._units(turns):
            ids += [self.image_token_id] * self.n_visual_tokens if isinstance(unit, list) else [unit]
        return ids

    def texts(self, texts: Sequence[str], *, end_with_ret: bool = True, first: int = 0) -> BatchFeature:
        """
        Candidate texts for the LLM: `input_ids`, `attention_mask` `(n, length)`; with `[RET]` at the end or without.
        Messages count the texts from `first` on. Raises `ValueError` naming a bad text.
        """
        self._check_texts(texts, first)
        end = self.ending if end_with_ret else []
        room = self.max_length - len(self._prefix) - len(end)
        # Tokenised in one call, which a pool's many texts feel; one that is too long goes the way of dialogues.
        rows = self._tokenize(list(texts))
        ids = [
            [*self._prefix, *row, *end] if len(row) <= room else self._serialise([[text]], end=end, item=i)[0]
            for i, (row, text) in enumerate(zip(rows, texts, strict=True), first)
        ]
        return BatchFeature({**self._pad(ids)})

    def clip_texts(self, texts: Sequence[str], *, first: int = 0) -> BatchFeature:
        """
        Texts for CLIP's text encoder: `clip_input_ids`, `clip_attention_mask` `(n, length)`.

        Texts beyond CLIP's positions keep their beginning; a warning counts them. Messages count from `first` on. Raises
        `ValueError` naming a bad text.
        """
        self._check_texts(texts, first)
        limit = self.clip_text_length or min(self.clip_tokenizer.model_max_length, 77)
        words = self.clip_tokenizer(list(texts), truncation=False, split_special_tokens=True, verbose=False)
        rows = words["input_ids"]
        long = sum(len(row) > limit for row in rows)
        if long:
            logger.warning(f"{long} of {len(rows)} texts exceed CLIP's {limit} positions; their beginning is kept")
            rows = [row if len(row) <= limit else row[: limit - 1] + row[-1:] for row in rows]
        # Where the length is fixed the text tower pools at the last position, so the side is the tokenizer's own.
        left = self.clip_text_length is not None and self.clip_tokenizer.padding_side == "left"
        batch = _pad(rows, self.clip_tokenizer.pad_token_id, self.clip_text_length, left)
        return BatchFeature({"clip_input_ids": batch["input_ids"], "clip_attention_mask": batch["attention_mask"]})

    def pixels(self, images: Sequence[Any], *, first: int = 0) -> torch.Tensor:
        """
        CLIP's preprocessing of images, each as [`decode_image`] takes it: `(n, 3, h, w)` float32. Messages count from
        `first` on. Raises `ValueError` naming a bad image.
        """
        if not len(images):
            raise ValueError("no images given: give at least one")
        decoded = []
        for item, image in enumerate(images, first):
            try:
                decoded.append(self.decode(image))
            except ValueError as error:
                raise located(error, f"image {item}") from error
        return self.preprocess(decoded)

    def preprocess(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """CLIP's preprocessing of n images that `decode` gave: `(n, 3, h, w)` float32."""
        return self.image_processor(images, return_tensors="pt")["pixel_values"]

    def decode(self, image: Any) -> Image.Image:
        """One untrusted image as an RGB `PIL.Image`, within `max_image_pixels`."""
        return decode_image(image, max_pixels=self.max_image_pixels)

    def pairs(self, images: Sequence[Any] | None, captions: Sequence[str]) -> Batch:
        """A training batch of caption pairs (see `documents`); `images=None` where their features are cached."""
        items = [
            {"caption": (i, caption), "context": [[caption]], "image": i, "text": caption}
            for i, caption in enumerate(captions)
        ]
        return self.documents(items, images)

    def documents(self, items: Sequence[dict], images: Sequence[Any] | None, *, pack: bool = False) -> Batch:
        """
        A training batch, of caption pairs or of interleaved documents.

        Args:
            items: `caption`: an image's index into `images` and its caption, for eq. 1-2, or `None`; with `None` in the
                index's place the text is a reply, to be predicted after the context. `context`: turns whose elements
                are texts and, for images, indices; e_t is read at the `[RET]` that ends it. `image` (index or `None`)
                and `text` (or `None`): what eq. 3-6 align e_t with.
            images: decodable images, each once; `None` where features are cached (the caller adds them).
            pack: plan the packing of both passes.

        Returns:
            A [`batch_unimur.Batch`]: `contexts`, `targets`, and where there are any `captions` and `images`.
        """
        batch: Batch = {"contexts": self._contexts_part(items, pack), "targets": self._targets_part(items)}
        if any(item["caption"] is not None for item in items):
            batch["captions"] = self._captions_part(items, pack)
        if images:
            batch["images"] = {"pixel_values": self.pixels(images)}
        return batch

    def _contexts_part(self, items: Sequence[dict], pack: bool) -> Contexts:
        rows, slots = [], []
        for i, item in enumerate(items):
            row, kept = self._serialise(item["context"], end=self.ending, item=i)
            rows.append(row)
            slots += kept
        part: Contexts = {**self._pad(rows), "image_indices": torch.tensor(slots, dtype=torch.long)}
        if pack:
            part["packing"] = plan_packing([len(row) for row in rows])
        return part

    def _captions_part(self, items: Sequence[dict], pack: bool) -> Captions:
        rows, labels, slots = [], [], []
        for i, item in enumerate(items):
            if item["caption"] is not None:
                image, text = item["caption"]
                *earlier, last = item["context"]
                before = [*earlier, [*last, self._separator]] if image is None else [[image]]
                predicted = self._predicted(text, i)
                row, kept = self._serialise(before, end=predicted, item=i)
                rows.append(row)
                labels.append([IGNORE] * (len(row) - len(predicted)) + predicted)  # eq. 2: the text's tokens alone
                slots += kept
        padded = _pad(labels, IGNORE)["input_ids"]
        part: Captions = {
            **self._pad(rows), "labels": padded, "label_positions": (padded.flatten() != IGNORE).nonzero()[:, 0],
            "image_indices": torch.tensor(slots, dtype=torch.long),
        }  # fmt: skip
        if pack:
            lengths = [len(row) - 1 for row in rows]  # a caption's last token is predicted, never read
            part["packing"] = plan_packing(lengths, width=max(lengths) + 1)
        return part

    def _predicted(self, text: str, item: int) -> list[int]:
        """A text's tokens and EOS; of one that leaves no room for an image before it, its beginning."""
        eos = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
        ids, room = [*self._tokenize(text), *eos], self.max_length - len(self._prefix) - self.n_visual_tokens
        if len(ids) > room:
            logger.warning(f"item {item}: a text to be predicted exceeds the LLM's {self.max_length} positions; its beginning "
                           "is kept")  # fmt: skip
        return ids[:room]

    def _targets_part(self, items: Sequence[dict]) -> Targets:
        with_image = [i for i, item in enumerate(items) if item["image"] is not None]
        with_text = [i for i, item in enumerate(items) if item["text"] is not None]
        part: Targets = {
            "image_rows": torch.tensor(with_image, dtype=torch.long),
            "image_indices": torch.tensor([items[i]["image"] for i in with_image], dtype=torch.long),
            "text_rows": torch.tensor(with_text, dtype=torch.long),
        }
        if with_text:
            texts = self.clip_texts([items[i]["text"] for i in with_text])
            part["input_ids"], part["attention_mask"] = texts["clip_input_ids"], texts["clip_attention_mask"]
        return part

    def __call__(self, dialogues: Any = None, images: Any = None, texts: Any = None, **kwargs: Any) -> BatchFeature:
        """
        Tensors of exactly one of `dialogues`, candidate `images` or candidate `texts`, one or many: see [`as_items`].

        Raises:
            ValueError: none or several of them, nothing in them, an unknown argument, or a bad item.
        """
        values = {"dialogues": dialogues, "images": images, "texts": texts}
        given = [name for name, value in values.items() if value is not None]
        if len(given) != 1 or kwargs:
            raise ValueError(f"give exactly one of dialogues, images or texts, got {given + list(kwargs)}")
        (kind,) = given
        items, _ = as_items(kind, values[kind])
        if kind == "dialogues":
            return self.contexts(items)
        return self.texts(items) if kind == "texts" else BatchFeature({"pixel_values": self.pixels(items)})

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what turns candidates into tensors: a pool made by another preprocessing is refused by it."""
        parts = {
            # Without what saving adds.
            "image_processor": {
                k: v for k, v in self.image_processor.to_dict().items() if not k.startswith("_") and k != "auto_map"
            },
            "tokenizers": [sorted(t.get_vocab().items()) for t in (self.tokenizer, self.clip_tokenizer)],
            # Without a prompt as before there was one, so that older pools still open.
            "own": [self.max_length, self.ret_token, self.image_token, self._prefix]
            + ([self.ret_prompt] if self.ret_prompt else [])
            + ([{"clip_text_length": self.clip_text_length}] if self.clip_text_length else []),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    # Serialisation

    def _serialise(self, turns: list[Turn], *, end: list[int], item: int, reserve: int = 0) -> tuple[list[int], list]:
        """Turns as ids with their images in order, within `max_length` less `reserve`."""
        room = self.max_length - len(self._prefix) - len(end) - reserve
        if room < 1:
            raise ValueError(f"{reserve} reserved positions leave no room among the LLM's {self.max_length}")
        units = self._units(turns)
        if _length(units) > room:
            # The fewest oldest turns whose loss makes the rest fit, by bisection: tokens only grow with turns.
            low, high = 1, len(turns) - 1
            while low < high:
                middle = (low + high) // 2
                if _length(self._units(turns[middle:])) <= room:
                    high = middle
                else:
                    low = middle + 1
            dropped = min(low, len(turns) - 1)
            units = self._units(turns[dropped:])
            excess, cut = _length(units) - room, 0
            while excess > 0:
                excess -= _length(units[cut : cut + 1])
                cut += 1
            units = units[cut:]
            logger.warning(
                f"item {item} exceeds the LLM's {self.max_length} positions: its {dropped} oldest turns and {cut} "
                "tokens or images of the next were left out"
            )
        ids, images = list(self._prefix), []
        for unit in units:
            if isinstance(unit, list):
                ids += [self.image_token_id] * self.n_visual_tokens
                images += unit
            else:
                ids.append(unit)
        return ids + end, images

    def _units(self, turns: list[Turn]) -> list:
        """Token ids and, for each image, a one-element list and its slots' length."""
        flat: list = []
        for position, turn in enumerate(turns):
            for element in ([self._separator] if position else []) + list(turn):
                if isinstance(element, str) and flat and isinstance(flat[-1], str):
                    flat[-1] += element
                else:
                    flat.append(element)
        units: list = []
        for element in flat:
            if isinstance(element, str):
                units += self._tokenize(element)
            else:
                units.append(_Image([element], self.n_visual_tokens))
        return units

    def _tokenize(self, text: str | list[str]) -> list:
        # Not verbose: what exceeds the LLM's positions is left out here, with a warning.
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def _pad(self, rows: list[list[int]]) -> "_Padded":
        # The mask hides padding, so any id does where the tokenizer has none.
        return _pad(rows, self.tokenizer.pad_token_id or 0)

    @staticmethod
    def _check_texts(texts: Sequence[str], first: int) -> None:
        if isinstance(texts, str):
            raise ValueError("expected a list of texts, got one string")
        if not len(texts):
            raise ValueError("no texts given: give at least one")
        for item, text in enumerate(texts, first):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"text {item} is {'empty' if isinstance(text, str) else type(text).__name__}")
            check_characters(text, f"text {item}")


# What save_pretrained writes then loads elsewhere with trust_remote_code, without this package.
UniMuRProcessor.register_for_auto_class()


class _Image(list):
    """An image among token ids: a one-element list that knows how many positions it takes."""

    def __init__(self, image: list, positions: int):
        super().__init__(image)
        self.positions = positions


class _Padded(TypedDict):
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


def _length(units: list) -> int:
    return sum(unit.positions if isinstance(unit, _Image) else 1 for unit in units)


def _pad(rows: list[list[int]], value: int, length: int | None = None, left: bool = False) -> "_Padded":
    """Rows `(n, length)`, by default as long as the longest, padded on the right or the left."""
    length = length or max(map(len, rows))
    fill = [[value] * (length - len(row)) for row in rows]
    ids = [pad + row if left else row + pad for row, pad in zip(rows, fill, strict=True)]
    mask = [[0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad)
            for row, pad in zip(rows, fill, strict=True)]  # fmt: skip
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
