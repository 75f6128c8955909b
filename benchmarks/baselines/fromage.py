"""FROMAGe (Koh et al., ICML 2023): the same frozen towers, aligned in a space of their own rather than in CLIP's."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig

from benchmarks.baselines.fromage_processor import FIRST_TEXT, FromageProcessor
from benchmarks.language import LanguageSystem
from benchmarks.systems import Embedder, ImageReplies
from modeling_unimur import UniMuRConfig, UniMuRModel, UniMuROutput
from modeling_unimur.batch_unimur import Captions, Contexts, Images, Targets
from modeling_unimur.checkpoint_unimur import CheckpointModel
from modeling_unimur.generation_unimur import Drawing
from modeling_unimur.losses_unimur import caption_loss, info_nce
from modeling_unimur.processing_unimur import IGNORE

MAX_NEW_TOKENS = 32  # FROMAGe's own
FROMAGES_OWN = {
    "image_feature": "pooled",
    "text_candidates": "ret",
    "lambda2": 0.0,
    "ret_prompt": "",
    "alignment": "paper",
}


@strict
class FromageConfig(UniMuRConfig):
    """
    Configuration of a [`FromageModel`]: [`UniMuRConfig`]'s fields, of which `train_ret_embedding` defaults to true and
    those of eq. 6 have no meaning.

    Args:
        shared_dim (`int`, defaults to 256): q, the width of the space of images and [RET].

    Raises:
        ValueError: a field of `FROMAGES_OWN` has another value.
    """

    model_type = "fromage"
    _auto_class = None  # a baseline: its code does not travel with its checkpoints

    shared_dim: int = 256
    lambda2: float = 0.0
    train_ret_embedding: bool = True

    def validate_fromage(self):
        """Refuses UniMuR's choices that FROMAGe does not have."""
        for name, own in FROMAGES_OWN.items():
            if getattr(self, name) != own:
                raise ValueError(f"{name}={getattr(self, name)!r}: FROMAGe supports only {own!r}")
        if self.shared_dim < 1:
            raise ValueError(f"shared_dim={self.shared_dim} must be at least 1")

    @property
    def embedding_width(self) -> int:
        """q: width of the space in which images and [RET] meet."""
        return self.shared_dim


@dataclass
class FromageOutput(UniMuROutput):
    """
    Args:
        loss: scalar, the sum of the three below.
        loss_cap: next-token loss of captions after their images.
        loss_ret: next-token loss of the captions alone and of the [RET] after them.
        loss_vm: InfoNCE between [RET] and image, the mean of both directions.
    """

    loss_ret: torch.Tensor | None = None


class FromageModel(UniMuRModel):
    """
    The model. What is trained: `W_i2t` (FROMAGe's `visual_embeddings`), `W_t2m` (`text_hidden_fcs`: h([RET]) to q), `W_v2m`
    (`visual_fc`: CLIP's pooled output to q), [RET]'s input embedding and the temperature. [RET] is also an output of
    the LLM, scored by its input embedding as OPT's other tokens are.
    """

    config_class = FromageConfig
    _auto_class = None
    own_tensors = UniMuRModel.own_tensors
    _keep_in_fp32_modules_strict = list(own_tensors)

    def __init__(self, config: FromageConfig):
        CheckpointModel.__init__(self, config)  # UniMuR's tensors, with one more map
        self.W_i2t = nn.Linear(config.image_feature_width, config.n_visual_tokens * config.text_width)
        self.W_t2m = nn.Linear(config.text_width, config.embedding_width)
        self.W_v2m = nn.Linear(config.image_feature_width, config.embedding_width)
        self.ret_embedding = nn.Parameter(torch.empty(config.text_width))
        self.logit_scale = nn.Parameter(torch.empty(1))
        if config.n_drawing_tokens:  # GILL, which is FROMAGe and draws
            self.drawing = Drawing(config)
        self.make_towers()
        self.post_init()
        self.freeze()

    def trained_maps(self) -> set[str]:
        """All of them."""
        return {"W_i2t", "W_t2m", "W_v2m"}

    def unify_images(self, features: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """CLIP's pooled output `(i, c)` -> the image embedding `(i, q)`, float32, not normalised."""
        return self.W_v2m(features)

    @UniMuRModel.processor.getter
    def processor(self) -> FromageProcessor:
        """The checkpoint's processor, or the one that was set, with BOS where FROMAGe has it."""
        given = super().processor
        if not isinstance(given, FromageProcessor):
            self.processor = given = FromageProcessor.like(given)
        return given

    def vocabulary_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Last outputs `(..., d)` -> float32 logits `(..., vocabulary + 1)`, the last of them [RET]'s."""
        words = self.language_model.get_output_embeddings()(hidden)
        return torch.cat([words.float(), (hidden.float() @ self.ret_embedding.float())[..., None]], dim=-1)

    def next_token_logits(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Last outputs `(n, length, d)` and labels `(n, length)` -> logits `(m, vocabulary + 1)` at the m labelled
        positions only, and the shifted labels `(m,)`, where [RET] is the last output, not its tokenizer id.
        """
        labelled = labels[:, 1:] != IGNORE
        logits, targets = self.vocabulary_logits(hidden[:, :-1][labelled]), labels[:, 1:][labelled]
        return logits, targets.masked_fill(targets == self.config.ret_token_id, logits.shape[-1] - 1)

    def caption_logits(self, input_ids, attention_mask, labels, image_features):
        """Logits and labels of the captions, over one output more than the vocabulary."""
        return self.next_token_logits(
            self.last_outputs(self.input_embeddings(input_ids, image_features), attention_mask), labels
        )

    def forward(
        self,
        captions: Captions | None = None,
        contexts: Contexts | None = None,
        targets: Targets | None = None,
        images: Images | None = None,
    ) -> FromageOutput:
        """
        The losses on a batch of [`benchmarks.baselines.fromage_train.FromageCollator`]: captioning where there are
        `captions`, the retrieval pass where there are `contexts`. Images may come with their `features` `(i, c)`.

        Raises:
            ValueError: neither captions nor contexts with their targets are given.
        """
        if captions is None and (contexts is None or targets is None):
            raise ValueError("give captions, contexts (retrieval) with their targets, or both")
        features = self._encoded(images)[0]
        losses: dict[str, torch.Tensor] = {}
        ret_embeds = image_embeds = None
        if captions is not None:
            losses["loss_cap"] = caption_loss(
                *self.caption_logits(
                    captions["input_ids"], captions["attention_mask"], captions["labels"],
                    features[captions["image_indices"]],
                )
            )  # fmt: skip
        if contexts is not None and targets is not None:
            ids, mask = contexts["input_ids"], contexts["attention_mask"]
            in_context = features[contexts["image_indices"]] if "image_indices" in contexts else None
            hidden = self.last_outputs(self.input_embeddings(ids, in_context), mask)
            words = mask.bool() & (ids != self.config.image_token_id)
            losses["loss_ret"] = caption_loss(*self.next_token_logits(hidden, ids.masked_fill(~words, IGNORE)))
            at_ret = (ids == self.config.ret_token_id).int().argmax(-1)
            ret_embeds = self.W_t2m(hidden[torch.arange(len(hidden), device=hidden.device), at_ret].float())
            image_embeds = self.W_v2m(features[targets["image_indices"]])
            scale = self.logit_scale.exp().clamp(max=100)
            rows = ret_embeds[targets["image_rows"]]
            losses["loss_vm"] = self.config.lambda1 * info_nce(rows, image_embeds, scale) / 2
        return FromageOutput(
            loss=sum(losses.values()), ret_embeds=ret_embeds, image_embeds=image_embeds, **losses
        )  # fmt: skip

    @torch.no_grad()
    def rescale_ret(self) -> None:
        """Gives [RET]'s input embedding the mean norm of the LLM's own rows, as FROMAGe does after each step."""
        self.ret_embedding.mul_(self._mean_norm / self.ret_embedding.norm())

    @cached_property
    def _mean_norm(self) -> float:
        table = self.language_model.get_input_embeddings().weight
        return table.detach().float().norm(dim=1).mean().item()

    @torch.no_grad()
    def image_replies(
        self, dialogues: Sequence[Any], max_new_tokens: int = MAX_NEW_TOKENS, batch_size: int = 32,
        show_progress_bar: bool = False,
    ) -> ImageReplies:  # fmt: skip
        """
        Whether the LLM itself generates [RET], and the embedding at the first [RET] it generates, after its own words. This
        is the query of FROMAGe's `generate_for_images_and_texts`.

        Generation is greedy, at most `max_new_tokens` with the end-of-text token. What follows a newline is not part of
        the reply, unless the newline comes first, as in FROMAGe's own code. (That code fails where [RET] is the very last
        token, since its output is not computed; here it is.)
        """
        with_image, queries = [], []
        for start in tqdm(range(0, len(dialogues), batch_size), "replies", disable=not show_progress_bar):
            inputs = self.processor.contexts(
                dialogues[start : start + batch_size], end_with_ret=False, reserve=max_new_tokens
            ).to(self.device)
            features = self.encode_images(inputs["pixel_values"])[0] if "pixel_values" in inputs else None
            embeds, mask = self.input_embeddings(inputs["input_ids"], features), inputs["attention_mask"]
            # The reply starts at a row's right end, so the padding moves to the left.
            order = mask.argsort(dim=1, stable=True)
            embeds = embeds.gather(1, order[..., None].expand_as(embeds))
            has_ret, states = self._generate_to_ret(embeds, mask.gather(1, order), max_new_tokens)
            with_image.append(has_ret.cpu())
            queries.append(self.finished(self.W_t2m(states.float())))
        if not with_image:
            return ImageReplies(torch.empty(0, dtype=torch.bool), torch.empty(0, self.config.embedding_width))
        return ImageReplies(torch.cat(with_image), torch.cat(queries))

    def _generate_to_ret(
        self, embeds: torch.Tensor, mask: torch.Tensor, max_new_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded `(n, length, d)` -> which rows generate [RET] `(n,)`, and h([RET]) `(n, d)`, else zero."""
        newline = self.processor.tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        table = self.language_model.get_input_embeddings()
        has_ret, done, at_ret = (torch.zeros(len(embeds), dtype=torch.bool, device=embeds.device) for _ in range(3))
        states = embeds.new_zeros(len(embeds), self.config.text_width)
        positions, past = (mask.cumsum(-1) - 1).clamp(min=0), None
        for step in range(
            max_new_tokens + 1
        ):  # the last step generates nothing: it computes the output at a [RET] before it
            outputs = self.language_model.base_model(
                inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True
            )
            past, hidden = outputs.past_key_values, outputs.last_hidden_state[:, -1]
            states = torch.where(at_ret[:, None], hidden, states)
            if step == max_new_tokens:
                break
            logits = self.vocabulary_logits(hidden)
            token = logits.argmax(-1)
            is_ret = token == logits.shape[-1] - 1
            at_ret = is_ret & ~done
            has_ret, done = has_ret | at_ret, done | is_ret
            if step:
                done |= token == newline
            if bool((done & ~at_ret).all()):
                break
            # A row that is done stays in the batch; its further tokens are not used.
            embeds = torch.where(
                is_ret[:, None], self.ret_embedding.to(embeds.dtype), table(token.masked_fill(is_ret, 0))
            )[:, None]
            mask = F.pad(mask, (0, 1), value=1)
            positions = mask.sum(-1, keepdim=True) - 1
        return has_ret, states


class Fromage(Embedder, LanguageSystem):
    """
    A [`FromageModel`] as the tasks see it.

    Which [RET] retrieves follows FROMAGe's own code, task by task. In a conversation (Table 1) the LLM generates the
    reply: a [RET] in it means that the reply has an image, and retrieves it; without one no image is returned. Where a
    task ranks images for every item (Tables 2 and 3, VIST), [RET] comes directly after the context, as in the VisDial
    and VIST scripts. The same holds where texts are ranked by embedding, which FROMAGe's code does not do.
    """

    def __init__(self, model: FromageModel, name: str = "FROMAGe", max_new_tokens: int = MAX_NEW_TOKENS):
        super().__init__(model, name)
        self.max_new_tokens = max_new_tokens

    def embed_dialogues(self, dialogues: Sequence[Any], *, bos: str = FIRST_TEXT, **kwargs) -> torch.Tensor:
        """As [`System.embed_dialogues`], with BOS where the protocol puts it (see [`FromageProcessor`])."""
        processor = self.model.processor
        processor.bos = bos
        try:
            return super().embed_dialogues(dialogues, **kwargs)
        finally:
            processor.bos = FIRST_TEXT

    def image_replies(self, dialogues: Sequence[Any]) -> ImageReplies:
        """From the greedy reply's own [RET], if it has one."""
        return self.model.image_replies(dialogues, self.max_new_tokens)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.vocabulary_logits(hidden)  # [RET] takes its share of the probability


# transformers looks a checkpoint's config up even to load its tokenizer.
AutoConfig.register(FromageConfig.model_type, FromageConfig, exist_ok=True)
