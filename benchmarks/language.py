"""The frozen LLM scores and generates: likelihoods of candidate texts after a context, and greedy answers."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .systems import System

CHUNK = 512  # tokens of candidates in one packed pass: more would cost more in attention than it saves in calls


@dataclass
class Likelihoods:
    """
    Summed negative log-likelihoods of candidates after one context, from which every published score follows.

    `candidate` and `context` hold `(shifted, unshifted)`: where the logits of a position are compared with the next
    token, as a language model is trained, and where they are compared with the token just read, as FROMAGe's evaluation
    does.
    """

    candidate: tuple[torch.Tensor, torch.Tensor]  # each (m,)
    context: tuple[torch.Tensor, torch.Tensor]  # each a scalar
    candidate_tokens: torch.Tensor  # (m,)
    context_tokens: tuple[int, int]  # shifted, no position predicts a first token

    def scores(self, *, shift: bool = True, reduction: str = "sum", scope: str = "candidate") -> torch.Tensor:
        """
        `(m,)`, higher is more likely.

        Args:
            shift: compare a position's logits with the next token.
            reduction: `"sum"` or `"mean"` over the tokens that count. A mean over the candidate alone makes up for its
                length; with the context's tokens in it (FROMAGe's own), a longer candidate gains or loses by its
                length.
            scope: `"candidate"`, or `"all"` for the context's text tokens too.
        """
        which = 0 if shift else 1
        total, count = self.candidate[which], self.candidate_tokens
        if scope == "all":
            total, count = total + self.context[which], count + self.context_tokens[which]
        return -(total / count if reduction == "mean" else total)


class LanguageSystem(System):
    """What a [`System`] over a [`UniMuRModel`] (or a subclass of it) scores and generates with its frozen LLM."""

    model: Any

    @torch.no_grad()
    def likelihoods(
        self, contexts: Sequence[Any], options: Sequence[Sequence[str]], *, own_bos: bool = False,
        show_progress_bar: bool = False,
    ) -> list[Likelihoods]:  # fmt: skip
        """
        Likelihoods of each context's candidate texts.

        The context runs once. Its candidates follow in one packed sequence, each attending to the context and itself, so
        that nothing is padded or computed twice.

        Args:
            contexts: as [`parse_dialogue`] takes them.
            options: candidate texts for each context; contexts may share one list, which is then tokenised once.
            own_bos: put the tokenizer's BOS before each candidate, as FROMAGe's evaluation does.

        Raises:
            ValueError: a candidate without a token, or too long for the LLM's positions.
        """
        tokenizer, known = self.model.processor.tokenizer, {}
        results = []
        bar = tqdm(contexts, "likelihoods", disable=not show_progress_bar)
        for context, texts in zip(bar, options, strict=True):
            if id(texts) not in known:
                rows = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
                for text, row in zip(texts, rows, strict=True):
                    if not row:
                        raise ValueError(f"the candidate {text!r} has no token")
                known[id(texts)] = [[tokenizer.bos_token_id, *row] if own_bos else row for row in rows]
            results.append(self._after(context, known[id(texts)]))
        return results

    def log_likelihoods(self, contexts, options, *, own_bos=False, show_progress_bar=False, **score):
        likelihoods = self.likelihoods(contexts, options, own_bos=own_bos, show_progress_bar=show_progress_bar)
        return [each.scores(**score) for each in likelihoods]

    def _after(self, context: Any, rows: list[list[int]]) -> Likelihoods:
        model = self.model
        inputs = model.processor.contexts([context], end_with_ret=False, reserve=max(map(len, rows))).to(model.device)
        features = model.encode_images(inputs["pixel_values"])[0] if "pixel_values" in inputs else None
        ids = inputs["input_ids"]
        past = model.language_model.base_model(
            inputs_embeds=model.input_embeddings(ids, features),
            attention_mask=inputs["attention_mask"],
            use_cache=True,
        )
        hidden, length = past.last_hidden_state[0], ids.shape[1]
        logits = self._logits(hidden)
        is_text = ids[0] != model.config.image_token_id
        labels = ids[0].masked_fill(~is_text, -100)
        sums = [
            F.cross_entropy(logits[:-1], labels[1:], reduction="sum")
            if length > 1 and is_text[1:].any()
            else logits.new_zeros(()),
            F.cross_entropy(logits, labels, reduction="sum") if is_text.any() else logits.new_zeros(()),
        ]
        parts = [
            self._packed(rows[a:b], copy.deepcopy(past.past_key_values), length, logits[-1]) for a, b in _chunks(rows)
        ]
        shifted, unshifted = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
        return Likelihoods(
            (shifted, unshifted), tuple(s.cpu() for s in sums), torch.tensor([len(r) for r in rows]),
            (int(is_text[1:].sum()), int(is_text.sum())),
        )  # fmt: skip

    def _packed(self, rows, past, length: int, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Summed losses `(rows,)`, shifted and unshifted, of candidates that share a context of `length` positions."""
        model = self.model
        device = model.device
        ids = torch.tensor([token for row in rows for token in row], device=device)
        owner = torch.repeat_interleave(
            torch.arange(len(rows), device=device), torch.tensor([len(r) for r in rows], device=device)
        )
        offsets = torch.cat([torch.arange(len(row), device=device) for row in rows])
        embeds = model.language_model.get_input_embeddings()(ids)[None]
        # A float mask with restarted positions is exact under eager and sdpa alike; a bool mask is not.
        visible = (owner[:, None] == owner[None, :]) & (offsets[:, None] >= offsets[None, :])
        visible = torch.cat([visible.new_ones(len(ids), length), visible], dim=1)
        mask = torch.zeros(visible.shape, dtype=embeds.dtype, device=device)
        mask = mask.masked_fill(~visible, torch.finfo(embeds.dtype).min)[None, None]
        hidden = model.language_model.base_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=(length + offsets)[None], past_key_values=past,
            use_cache=True,
        ).last_hidden_state[0]  # fmt: skip
        # One normaliser per position serves both losses; the logits themselves are not copied.
        logits, at = self._logits(hidden), torch.arange(len(ids), device=device)
        normaliser, first = logits.logsumexp(-1), offsets == 0
        unshifted = normaliser - logits[at, ids]
        shifted = (normaliser - logits[at, ids.roll(-1)]).roll(1)
        shifted = torch.where(first, last.logsumexp(-1) - last[ids], shifted)
        sums = torch.zeros(len(rows), device=device)
        return sums.index_add(0, owner, shifted), sums.index_add(0, owner, unshifted)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.language_model.get_output_embeddings()(hidden).float()

    @torch.no_grad()
    def answers(self, contexts: Sequence[Any], max_new_tokens: int = 10, batch_size: int = 32) -> list[str]:
        """The LLM's greedy answer to each context: at most `max_new_tokens` tokens, up to the end of the line."""
        model, answers = self.model, []
        tokenizer = model.processor.tokenizer
        for start in tqdm(range(0, len(contexts), batch_size), "answers"):
            batch = contexts[start : start + batch_size]
            inputs = model.processor.contexts(batch, end_with_ret=False, reserve=max_new_tokens).to(model.device)
            features = model.encode_images(inputs["pixel_values"])[0] if "pixel_values" in inputs else None
            embeds = model.input_embeddings(inputs["input_ids"], features)
            # Generation continues from a row's right end, so the padding moves to the left.
            mask = inputs["attention_mask"]
            order = mask.argsort(dim=1, stable=True)
            embeds = embeds.gather(1, order[..., None].expand_as(embeds))
            tokens = model.language_model.generate(
                inputs_embeds=embeds, attention_mask=mask.gather(1, order), max_new_tokens=max_new_tokens,
                do_sample=False, num_beams=1, pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )  # fmt: skip
            answers += [
                text.strip().split("\n")[0].strip()
                for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)
            ]
        return answers


def _chunks(rows: list[list[int]]) -> list[tuple[int, int]]:
    """Consecutive rows of at most `CHUNK` tokens in total, one row at least: `(start, end)`."""
    chunks, start, total = [], 0, 0
    for i, row in enumerate(rows):
        if i > start and total + len(row) > CHUNK:
            chunks.append((start, i))
            start, total = i, 0
        total += len(row)
    return [*chunks, (start, len(rows))] if rows else []
