"""A training step as FROMAGe computes it: the reference against which each saving is measured."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from modeling_unimur import UniMuRModel
from modeling_unimur.losses_unimur import text_matching_loss, total_loss, visual_matching_loss

LENGTH = 24  # FROMAGe pads or cuts every caption to so many tokens, not counting visual tokens


@dataclass(frozen=True)
class Savings:
    """
    Which of FROMAGe's costs the reference step leaves out.

    Args:
        table_frozen: the vocabulary's embeddings are not trained (FROMAGe trains the whole matrix, and then keeps only
            [RET]'s row).
        once: CLIP's visual tower runs once a batch rather than once a pass; hidden states of all layers are not kept;
            images are placed by one assignment rather than by a loop.
        no_ret_logits: the retrieval pass computes no logits and no next-token loss (FROMAGe's model computes both; eq. 7
            has no use for the loss, which gets no gradient here).
        caption_logits: logits at caption positions only.
    """

    table_frozen: bool = False
    once: bool = False
    no_ret_logits: bool = False
    caption_logits: bool = False


class ReferenceStep(nn.Module):
    """
    The losses of eq. 7 on a padded batch of [`UniMuRProcessor.documents`], computed as FROMAGe computes its own.

    Args:
        model: whose towers, maps and temperature are used, and trained.
        savings: which of FROMAGe's costs are left out.
    """

    def __init__(self, model: UniMuRModel, savings: Savings | None = None):
        super().__init__()
        self.model, self.savings = model, savings or Savings()
        table = model.language_model.get_input_embeddings().weight.detach()
        # [RET] is the last row, of a matrix that is trained whole and shared by input and output.
        self.table = nn.Parameter(torch.cat([table, model.ret_embedding.detach()[None].to(table)]))
        self.table.requires_grad_(not self.savings.table_frozen)

    def trained(self) -> list[nn.Parameter]:
        """What an optimiser steps."""
        maps = [p for n, p in self.model.named_parameters() if p.requires_grad and n.split(".")[0] != "ret_embedding"]
        return [*maps, self.table] if self.table.requires_grad else maps

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss; see [`UniMuRModel.forward`]."""
        model, config, once = self.model, self.model.config, self.savings.once
        captions, contexts, targets = batch["captions"], batch["contexts"], batch["targets"]
        pixel_values = batch["images"]["pixel_values"]
        features, embeds = model.encode_images(pixel_values)
        hidden, logits = self._pass(
            captions["input_ids"], captions["attention_mask"], features[captions["image_indices"]]
        )
        labels = captions["labels"][:, 1:]
        if self.savings.caption_logits:
            kept = labels != -100
            loss_cap = F.cross_entropy(F.linear(hidden[:, :-1][kept], self.table[:-1]).float(), labels[kept])
        else:
            loss_cap = next_token_loss(logits, captions["labels"])
        if not once:
            features, embeds = model.encode_images(pixel_values)
        ids, mask = contexts["input_ids"], contexts["attention_mask"]
        hidden, logits = self._pass(ids, mask, None, logits=not self.savings.no_ret_logits)
        if logits is not None:
            ignored = (mask == 0) | (ids == config.ret_token_id)
            next_token_loss(logits, ids.masked_fill(ignored, -100))
        if once:
            at_ret = (ids == config.ret_token_id).int().argmax(-1)
            states = hidden[torch.arange(len(hidden)), at_ret]
        else:
            rows = zip(hidden, ids, strict=True)
            states = torch.stack([row[(ids == config.ret_token_id).nonzero()[0, 0]] for row, ids in rows])
        ret_embeds = model.W_t2m(states.float())
        scale = model.logit_scale.exp().clamp(max=100)
        loss_vm = visual_matching_loss(ret_embeds, embeds[targets["image_indices"]], scale)
        texts = model.encode_clip_texts(targets["input_ids"], targets["attention_mask"])
        loss_tm = text_matching_loss(
            ret_embeds, texts, target=config.text_target, reduction=config.text_target_reduction
        )
        return total_loss(loss_cap, loss_vm, loss_tm, config.lambda1, config.lambda2)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """
        After `backward`: of the matrix's gradient FROMAGe keeps [RET]'s row; gradients are clipped to 1, and after the
        optimiser's step [RET] is given the mean norm of the other rows.
        """
        if self.table.grad is not None:
            others = torch.arange(len(self.table), device=self.table.device) != len(self.table) - 1
            self.table.grad[others] = 0
        torch.nn.utils.clip_grad_norm_(self.trained(), 1.0)
        optimizer.step()
        if self.table.requires_grad:
            rows = self.table.data
            rows[-1] *= rows[:-1].norm(dim=1).mean() / rows[-1].norm()
        optimizer.zero_grad(set_to_none=True)

    def _pass(self, ids, mask, features, logits: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
        model, config = self.model, self.model.config
        is_ret, is_image = ids == config.ret_token_id, ids == config.image_token_id
        rows = ids.masked_fill(is_image, 0).masked_fill(is_ret, len(self.table) - 1)
        embeds = F.embedding(rows, self.table)
        if features is not None:
            visual = model.W_i2t(features).to(embeds.dtype).reshape(len(features), -1, embeds.shape[-1])
            if self.savings.once:
                embeds = embeds.masked_scatter(is_image[..., None], visual)
            else:
                parts = []
                for row in range(len(ids)):
                    at = int(is_image[row].nonzero()[0, 0])
                    parts.append(torch.cat([embeds[row, :at], visual[row], embeds[row, at + visual.shape[1] :]]))
                embeds = torch.stack(parts)
        outputs = model.language_model.base_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False, output_hidden_states=not self.savings.once,
        )  # fmt: skip
        hidden = outputs.last_hidden_state
        wanted = logits and not (self.savings.caption_logits and features is not None)
        return hidden, F.linear(hidden, self.table[:-1]) if wanted else None


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """transformers' causal loss: float32 logits `(n, length, vocabulary)` of all positions, where the label -100 is ignored."""
    labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def padded(batch: dict[str, Any], n_visual_tokens: int) -> dict[str, Any]:
    """A batch with its two passes padded to a fixed length, as FROMAGe pads."""
    made = dict(batch)
    for part, length in (("captions", LENGTH + n_visual_tokens), ("contexts", LENGTH)):
        made[part] = dict(made[part])
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            if name in made[part]:
                rows = made[part][name]
                made[part][name] = F.pad(rows, (0, max(0, length - rows.shape[1])), value=fill)
    return made
