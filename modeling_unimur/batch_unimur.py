"""
The parts of a training batch, as [`UniMuRProcessor.documents`] makes them and [`UniMuRModel.forward`] takes them.

Plain dicts, which every loader, launcher and sharding library moves between devices and processes by itself. `n` counts the
rows of a part, `i` the images of the batch, each of which is in it once.
"""

from typing import NotRequired, TypedDict

import torch


class Packing(TypedDict):
    """Where each position of right-padded sequences goes; see [`plan_packing`]."""

    index: torch.Tensor
    segments: torch.Tensor
    unpack: torch.Tensor


class Captions(TypedDict):
    """
    Images and their captions, or contexts and the replies to them, for eq. 1-2: `input_ids`, `attention_mask`, `labels`
    `(n, length)` int64, -100 where nothing is predicted; `label_positions` `(m,)` int64, where the flattened labels are
    tokens; `image_indices` int64, which image each slot shows; `packing` of the rows.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    image_indices: torch.Tensor
    label_positions: NotRequired[torch.Tensor]
    packing: NotRequired[Packing]


class Contexts(TypedDict, total=False):
    """
    What e_t is read of, each ending in [RET]: `input_ids`, `attention_mask` `(n, length)` int64; `image_indices` int64,
    which image each slot shows; `fixed_images`, whether those send no gradient to W_i2t; `packing` of the rows. Or, where
    [RET] is frozen, the LLM's outputs there from before: `states` `(n, d)` float32.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    image_indices: torch.Tensor
    fixed_images: bool
    packing: Packing
    states: torch.Tensor


class Targets(TypedDict, total=False):
    """
    What eq. 3-6 align e_t with. `image_rows`, `image_indices` int64: which contexts have a target image, and which image.
    `text_rows` `(t,)` int64: which have a target text; the texts as CLIP's `input_ids`, `attention_mask` `(t, length)` int64
    or as its embeddings from before, `text_embeds` `(t, clip_width)` float32.
    """

    image_rows: torch.Tensor
    image_indices: torch.Tensor
    text_rows: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    text_embeds: torch.Tensor


class Images(TypedDict, total=False):
    """
    The batch's images: `pixel_values` `(i, 3, h, w)` float32, or CLIP's outputs from before, as `encode_images` has them:
    `features` `(i, c)` and `embeds` `(i, clip_width)` float32.
    """

    pixel_values: torch.Tensor
    features: torch.Tensor
    embeds: torch.Tensor


class Batch(TypedDict, total=False):
    """
    What [`UniMuRModel.forward`] takes; `negatives` `(m, q)` float32 are further images of eq. 4, `drawing_targets`
    `(n, drawing_length, drawing_width)` float32 a diffusion model's text encoder's output for the text of each context.
    """

    captions: Captions
    contexts: Contexts
    targets: Targets
    images: Images
    negatives: torch.Tensor
    drawing_targets: torch.Tensor
