"""One frozen LLM over the miniature's CLIP: its states, computed once and kept on disk, and how any space embeds them."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from benchmarks.baselines.clip import ClipBaseline
from benchmarks.data import miniature
from benchmarks.measure import Measure
from benchmarks.protocols import protocols
from benchmarks.schema import Dialogues
from benchmarks.systems import System, cosine
from benchmarks.tasks import image, response
from benchmarks.tasks.candidates import Embedded, candidate_rows, embed
from benchmarks.tasks.contexts import context_of
from modeling_unimur import UniMuRModel
from modeling_unimur.dialogues_unimur import parse_dialogue
from modeling_unimur.identity_unimur import digest, named_weights
from train.arguments import ModelArguments
from train.cache import CachedTable, Part, build_cache
from train.extract import values_hash
from train.miniature import Miniature, prepare
from train.miniature.dialogues import without_context_images
from train.miniature.prepare import prepare_towers
from train.run import make_processor

from .fetch import fetch, is_made, smollm2
from .settings import RET_INIT, RET_PROMPT
from .spaces import Pairs, Space

PART_ROWS = 256
BATCH = 32
DIALOGUE, RESPONSE = "visdial", "mmdialog"


def make_towers(folder: Path, miniature_folder: Path | None, seed: int) -> Path:
    """Fetches the LLM and makes the miniature's towers where they are absent; the LLM's folder."""
    if not is_made(folder):
        fetch(folder)  # what may fail comes before what takes long
    with ThreadPoolExecutor(1) as beside:  # the towers are made by processes of their own
        llm = beside.submit(smollm2, folder)
        prepare_towers(miniature_folder or folder / "miniature", seed)
    return llm.result()


def make_bench(folder: Path, miniature_folder: Path | None, seed: int, rank: int = 0, world_size: int = 1) -> "Bench":
    """The bench of a folder, with what [`make_towers`] makes; see [`Bench`]."""
    llm = make_towers(folder, miniature_folder, seed)
    world = prepare(miniature_folder or folder / "miniature", seed)
    return Bench(folder / f"states-{seed}", llm, world, RET_PROMPT, RET_INIT, rank, world_size)


def computes_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; otherwise it is many times slower than float32."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # absent where torch lacks oneDNN
    return supported is not None and bool(supported())


class Bench:
    """
    Args:
        folder: of the cached states.
        llm: folder of the LLM; computed in its own dtype, or in float32 where the CPU has no bfloat16.
        world: the miniature, whose CLIP and pictures are used as they are.
        ret_prompt, ret_init: as [`UniMuRConfig`]'s and `from_pretrained_towers`'s.
        rank, world_size: of this process among those that compute the states together.
    """

    def __init__(
        self, folder: Path, llm: str | Path, world: Miniature, ret_prompt: str, ret_init: str | None, rank: int = 0,
        world_size: int = 1,
    ):  # fmt: skip
        self.folder, self.world, self.rank, self.world_size = folder, world, rank, world_size
        towers = ModelArguments(
            text_model=str(llm), clip_model=world.clip_model, n_visual_tokens=6, ret_prompt=ret_prompt
        )
        self.model = UniMuRModel.from_pretrained_towers(
            towers.text_model, towers.clip_model, make_processor(towers), ret_init=ret_init
        ).eval()
        if not computes_bfloat16():
            self.model.language_model.float()
        self._evaluation: dict[str, dict] = {}

    # What is computed once

    def states(self, name: str, contexts: Sequence[Any]) -> torch.Tensor:
        """
        The LLM's states at [RET] `(n, d)` of contexts, kept in `folder/name`; an interrupted call resumes.

        Raises:
            StaleCacheError, CorruptCacheError, OSError: see [`train.cache.build_cache`].
        """
        model, processor = self.model, self.model.processor
        turns = [parse_dialogue(context) for context in contexts]
        ids = [processor.turn_ids(t) for t in turns]
        parts = [range(s, min(s + PART_ROWS, len(ids))) for s in range(0, len(ids), PART_ROWS)]

        def make(numbers: list[int]) -> Iterator[Part]:
            mine = sum(len(parts[n]) for n in numbers)
            bar = tqdm(total=mine, desc=f"states of {name}", unit="text")
            for number in numbers:
                rows = np.empty((len(parts[number]), model.config.text_width), np.float32)
                # Texts of similar length share a batch, so that little is padded.
                order = sorted(parts[number], key=lambda i: len(ids[i]))
                for batch in (order[s : s + BATCH] for s in range(0, len(order), BATCH)):
                    rows[[i - parts[number].start for i in batch]] = self._ret_states([contexts[i] for i in batch])
                    bar.update(len(batch))
                yield number, {"states": rows}, {}
            bar.close()

        with_images = any(model.config.image_token_id in row for row in ids)
        identity = {
            "weights of the LLM": digest(named_weights(model.language_model), head=64),
            "dtype": str(model.language_model.dtype),
            "[RET]": digest([("ret_embedding", model.ret_embedding)]),
            "preprocessing": processor.fingerprint,
            "W_i2t": digest(named_weights(model.W_i2t)) if with_images else "no images",
        }
        sources = [
            {"rows": f"{p.start}-{p.stop - 1}", "texts": values_hash([_words(turns[i]) for i in p])} for p in parts
        ]
        build_cache(self.folder / name, identity, sources, make, rank=self.rank, world=self.world_size)
        return torch.from_numpy(CachedTable(self.folder / name, len(parts)).columns["states"][:])

    @torch.no_grad()
    def _ret_states(self, contexts: Sequence[Any]) -> np.ndarray:
        inputs = self.model.processor.contexts(contexts)
        features = self.model.encode_images(inputs["pixel_values"])[0] if "pixel_values" in inputs else None
        return self.model.ret_states(inputs["input_ids"], inputs["attention_mask"], features).numpy()

    @torch.no_grad()
    def clip_images(self, images: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """CLIP's pooled features `(n, c)` and embeddings `(n, q)` of pictures."""
        parts = [
            self.model.encode_images(self.model.processor.pixels(images[s : s + 64]))
            for s in range(0, len(images), 64)
        ]
        features, embeds = zip(*parts, strict=True)
        return torch.cat(features), torch.cat(embeds)

    @torch.no_grad()
    def pairs(self, n: int) -> Pairs:
        """The first `n` train pictures, each with its first natural caption."""
        rows = self.world.pairs[:n]
        captions = [texts[0] for texts in rows["captions"]]
        features, embeds = self.clip_images(rows["image"])
        return Pairs(self.states(f"captions-{n}", captions), features, embeds, self.clip_texts(captions))

    @torch.no_grad()
    def clip_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """CLIP's embeddings `(n, q)` of texts."""
        parts = []
        for start in range(0, len(texts), 128):
            words = self.model.processor.clip_texts(texts[start : start + 128])
            parts.append(self.model.encode_clip_texts(words["clip_input_ids"], words["clip_attention_mask"]))
        return torch.cat(parts)

    # What is measured

    def evaluation(self, split: str, size: int = 1000) -> dict[str, Any]:
        """
        The dialogues of a split by kind (`"visdial"`, `"mmdialog"`), with the pools of a thousand dialogues also where
        `size` is smaller; then they are the first whose context has no informative image.
        """
        if split not in self._evaluation:
            data = {RESPONSE: miniature.mmdialog(split), DIALOGUE: miniature.visdial(split)}
            candidates = {kind: candidate_rows(d) for kind, d in data.items()}
            images = {kind: self.clip_images([d.images[i] for i in candidates[kind][1]]) for kind, d in data.items()}
            if size < 1000:
                for kind, d in data.items():
                    few = [x for x in d.dialogues if not x.get("image_informs")][:size]
                    data[kind] = Dialogues(few, d.texts, d.images)
            self._evaluation[split] = {"data": data, "candidates": candidates, "images": images}
        return self._evaluation[split]

    def evaluation_states(self, split: str, which: str = "closed") -> dict[str, torch.Tensor]:
        """
        States of the split's contexts, of those with an informative image without it (`"removed"`), and of the pool's texts.

        Args:
            which: names the W_i2t that the contexts' images were read by.
        """
        data = self.evaluation(split)["data"]
        contexts = {kind: [context_of(d, data[kind].images) for d in data[kind].dialogues] for kind in data}
        informed = without_context_images([d for d in data[RESPONSE].dialogues if d["image_informs"]])
        responses = data[RESPONSE]
        states = {DIALOGUE: self.states(f"{split}-dialogues", contexts[DIALOGUE])}
        with_image = torch.tensor([d["image_informs"] for d in responses.dialogues])
        states[RESPONSE] = torch.empty(len(with_image), self.model.config.text_width)
        plain = [c for c, informs in zip(contexts[RESPONSE], with_image, strict=True) if not informs]
        states[RESPONSE][~with_image] = self.states(f"{split}-responses", plain)
        if len(informed):
            informative = [c for c, informs in zip(contexts[RESPONSE], with_image, strict=True) if informs]
            states[RESPONSE][with_image] = self.states(f"{split}-responses-with-image-{which}", informative)
            removed = [context_of(d, responses.images) for d in informed]
            states["removed"] = self.states(f"{split}-responses-without-image", removed)
        texts = [responses.texts[i] for i in self.evaluation(split)["candidates"][RESPONSE][0]]
        states["texts"] = self.states(f"{split}-texts", texts)
        return states

    def embedded(self, space: Space, split: str, states: dict[str, torch.Tensor]) -> dict[str, Embedded]:
        """Queries and candidates of both kinds of dialogue in a space, and of contexts without their image."""
        embedded = {}
        for kind in (DIALOGUE, RESPONSE):
            texts, images = self.evaluation(split)["candidates"][kind]
            words = _unit(space.states(states["texts"])) if kind == RESPONSE else None
            pictures = _unit(space.images(*self.evaluation(split)["images"][kind]))
            embedded[kind] = Embedded(_unit(space.states(states[kind])), words, pictures, texts, images)
        if "removed" in states:
            embedded["removed"] = replace(embedded[RESPONSE], queries=_unit(space.states(states["removed"])))
        return embedded

    def embedded_by(self, system: System, split: str) -> dict[str, Embedded]:
        """The same for a system with its own embeddings, such as CLIP alone."""
        data = self.evaluation(split)["data"]
        embedded = {
            kind: embed(system, d, [context_of(x, d.images) for x in d.dialogues], texts=kind == RESPONSE)
            for kind, d in data.items()
        }
        informed = without_context_images([d for d in data[RESPONSE].dialogues if d["image_informs"]])
        queries = system.embed_dialogues([context_of(d, data[RESPONSE].images) for d in informed])
        return embedded | {"removed": replace(embedded[RESPONSE], queries=queries)}

    def measure(self, embedded: dict[str, Embedded], split: str) -> dict[str, Measure]:
        """The demo's measures, item by item."""
        data = self.evaluation(split)["data"]
        responses = data[RESPONSE]
        to_image = next(p for p in protocols("visdial", miniature=True) if p.variant == "corrected")
        (joint,), (context,) = protocols("mmdialog", miniature=True), protocols("mmdialog_image", miniature=True)
        by_image = image.score(embedded[DIALOGUE], data[DIALOGUE], to_image, cosine)
        result = {f"dialogue to image {name}": m for name, m in by_image.items()}
        result |= response.score(embedded[RESPONSE], responses, joint, self._clip(split), cosine)
        wanting = [i for i, d in enumerate(responses.dialogues) if d["wants_image"]]
        informed = [i for i, d in enumerate(responses.dialogues) if d["image_informs"]]
        parts = {"contextual image": (embedded[RESPONSE], wanting)}
        if "removed" in embedded:
            both = [i for i in wanting if i in set(informed)]
            parts["contextual image, image informs"] = (embedded[RESPONSE], both)
            removed = embedded["removed"].queries[[informed.index(i) for i in both]]
            everything = replace(embedded["removed"], queries=_spread(removed, both, len(responses.dialogues)))
            parts["contextual image, image informs but is removed"] = (everything, both)
        for name, (rows, chosen) in parts.items():
            part = Dialogues([responses.dialogues[i] for i in chosen], responses.texts, responses.images)
            few = replace(rows, queries=rows.queries[chosen])
            result[f"{name} R@1"] = image.score(few, part, context, cosine)["R@1"]
        return result

    @cached_property
    def clip(self) -> ClipBaseline:
        return ClipBaseline(self.model)

    def _clip(self, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        known = self.evaluation(split)
        if "clip" not in known:
            texts, images = known["candidates"][RESPONSE]
            like = Embedded(torch.empty(0), None, None, texts, images)
            known["clip"] = response.clip_embeddings(self.clip, known["data"][RESPONSE], like)
        return known["clip"]


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return F.normalize(rows.float(), dim=-1)


def _spread(rows: torch.Tensor, places: list[int], n: int) -> torch.Tensor:
    """Rows at their places among `n`, zero elsewhere."""
    return torch.zeros(n, rows.shape[1]).index_copy(0, torch.tensor(places), rows)


def _words(turns: Sequence[Sequence[Any]]) -> list[list[str]]:
    """What identifies a context: its texts, and its images by a hash of their pixels."""
    return [[e if isinstance(e, str) else f"image {values_hash([e.tobytes().hex()])}" for e in turn] for turn in turns]
