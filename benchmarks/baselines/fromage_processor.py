"""Where FROMAGe's code puts BOS: before text, never before an image."""

from itertools import pairwise
from typing import Self

from modeling_unimur import UniMuRProcessor

FIRST_TEXT, EVERY_TEXT = "first text", "every text"


class FromageProcessor(UniMuRProcessor):
    """
    As [`UniMuRProcessor`], but with BOS where FROMAGe tokenises a text: `image BOS text image text [RET]`. Its prompts
    have one BOS, before their first text (`generate_for_images_and_texts` in its `models.py`); its VIST script tokenises
    each caption on its own, so that every one has a BOS. [RET] counts as text: a lone image is `image BOS [RET]`.

    Attributes:
        bos (`str`): `"first text"` or `"every text"`.
    """

    _auto_class = None  # a baseline: its code does not travel with its checkpoints
    bos = FIRST_TEXT

    @classmethod
    def like(cls, processor: UniMuRProcessor) -> Self:
        """The same tokenizers, preprocessing and limits."""
        return cls(
            processor.image_processor, processor.tokenizer, processor.clip_tokenizer,
            n_visual_tokens=processor.n_visual_tokens, max_length=processor.max_length,
            max_image_pixels=processor.max_image_pixels, ret_token=processor.ret_token,
            image_token=processor.image_token,
        )  # fmt: skip

    def turn_ids(self, turns):
        return self._with_bos(super().turn_ids(turns))

    def _serialise(self, turns, *, reserve=0, **kwargs):
        images = sum(not isinstance(element, str) for turn in turns for element in turn)
        # At most one further BOS after each image.
        ids, kept = super()._serialise(
            turns, reserve=reserve + images * len(self._prefix) * (self.bos == EVERY_TEXT), **kwargs
        )
        return self._with_bos(ids), kept

    def _with_bos(self, ids: list[int]) -> list[int]:
        """The ids with the BOS they start with moved, or repeated, to where texts begin."""
        bos, ids = ids[: len(self._prefix)], ids[len(self._prefix) :]
        if not bos:
            return ids
        is_image = [i == self.image_token_id for i in ids]
        starts = [at for at, (before, here) in enumerate(pairwise([True, *is_image])) if before and not here]
        starts = starts or [len(ids)]  # images alone: the text is still to come
        for at in reversed(starts if self.bos == EVERY_TEXT else starts[:1]):
            ids[at:at] = bos
        return ids
