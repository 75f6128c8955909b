"""A conversation that keeps what the LLM has computed, so that a new turn costs its own tokens."""

from typing import Any

import torch
from transformers import DynamicCache
from transformers.utils import logging

from .dialogues_unimur import Turn, parse_dialogue
from .inputs_unimur import check_pool
from .pool_unimur import CandidatePool, Retrieval
from .towers_unimur import takes_conversations

logger = logging.get_logger(__name__)


class Conversation:
    """
    Made by `model.conversation()`. Its embedding is that of the whole dialogue (`embed_dialogues([turns])`), to rounding.

    Where the LLM's positions run out the oldest turns are left out, as many as halve the dialogue, so that the rest is
    computed again only now and then; a warning says how many. Keys and values are kept for at most that many positions.

    Attributes:
        turns: the turns still remembered, oldest first.
        evicted (`int`): how many have been left out.
    """

    def __init__(self, model: Any):
        if not takes_conversations(model.language_model):
            raise ValueError(
                "a conversation continues from cached keys and values, which a "
                f"{model.language_model.config.model_type} does not have: embed whole dialogues by embed_dialogues"
            )
        self.model = model
        self.turns: list[Turn] = []
        self.evicted = 0
        self._features: list[torch.Tensor] = []  # per turn, what W_i2t reads of its images
        self._computed: list[int] = []  # the ids whose keys and values the cache holds
        self._cache = DynamicCache()

    @torch.no_grad()
    def say(self, turn: Any) -> "Conversation":
        """
        Adds a turn.

        Args:
            turn: a string, an image, or a chat message.

        Returns:
            Itself.

        Raises:
            ValueError: the turn is empty, an image cannot be used, or the turn alone exceeds the LLM's positions.
        """
        processor = self.model.processor
        (parsed,) = parse_dialogue([turn])
        images = [element for element in parsed if not isinstance(element, str)]
        needed = len(processor.turn_ids([parsed])) + len(processor.ending)
        if needed > processor.max_length:
            raise ValueError(f"a turn of {needed} positions exceeds the LLM's {processor.max_length}: shorten it")
        features = torch.empty(0, self.model.config.image_feature_width, device=self.model.device)
        if images:
            features = self.model.encode_images(processor.pixels(images).to(self.model.device))[0]
        self.turns.append(parsed)
        self._features.append(features)
        return self

    @torch.no_grad()
    def embed(self) -> torch.Tensor:
        """
        The unified embedding `(q,)` float32 on CPU, L2-normalised, of the turns so far.

        Raises:
            ValueError: there is no turn yet, or the embedding holds NaN or infinity.
        """
        if not self.turns:
            raise ValueError("the conversation has no turn yet: call say() first")
        model, config, ending = self.model, self.model.config, self.model.processor.ending
        ids = self._fit()
        # Tokens may merge across the end of a turn, so what is kept is what the ids have in common.
        known = next(
            (at for at, (a, b) in enumerate(zip(self._computed, ids, strict=False)) if a != b),
            min(len(self._computed), len(ids)),
        )
        # Until all is done nothing counts as computed: what breaks off would leave keys and values of other ids.
        cache, self._cache, self._computed = self._cache, DynamicCache(), []
        if known < cache.get_seq_length():
            cache.crop(known - cache.get_seq_length())
        rest = torch.tensor([[*ids[known:], *ending]], device=model.device)
        images = ids[:known].count(config.image_token_id) // config.n_visual_tokens
        embeds = model.input_embeddings(rest, torch.cat(self._features)[images:])
        hidden = model.language_model.base_model(
            inputs_embeds=embeds, past_key_values=cache, use_cache=True,
            attention_mask=torch.ones(1, known + rest.shape[1], dtype=torch.long, device=model.device),
            position_ids=torch.arange(known, known + rest.shape[1], device=model.device)[None],
        ).last_hidden_state  # fmt: skip
        embedding = model.finished(model.W_t2m(hidden[0, -1].float()))
        cache.crop(-len(ending))  # they end every dialogue, and are no part of the next
        self._cache, self._computed = cache, ids
        return embedding

    def retrieve(self, pool: CandidatePool, **search: Any) -> Retrieval:
        """The reply out of a pool; `search` as [`RetrievalMixin.retrieve`] takes it. The reply is not added: say it."""
        check_pool(pool)
        pool.check_made_by(self.model.fingerprint)
        return pool.search(self.embed()[None], **search)[0]

    def _fit(self) -> list[int]:
        """The ids of the turns, after the oldest were left out where they and what ends them exceed the LLM's positions."""
        processor = self.model.processor
        ids, ending = processor.turn_ids(self.turns), len(processor.ending)
        if len(ids) + ending <= processor.max_length:
            return ids
        dropped = 0
        while dropped < len(self.turns) - 1 and len(ids) + ending > processor.max_length // 2:
            dropped += 1
            ids = processor.turn_ids(self.turns[dropped:])
        # Every position moves, and equal ids may be of other images.
        self._cache, self._computed = DynamicCache(), []
        self.turns, self._features = self.turns[dropped:], self._features[dropped:]
        self.evicted += dropped
        logger.warning(f"the LLM's {processor.max_length} positions ran out: the {dropped} oldest turns were left out")
        return ids
