"""What training is judged by while it runs: losses and recalls over held-out pairs and conversations."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from itertools import islice
from typing import Any, cast

import datasets
import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import Subset
from tqdm.auto import tqdm

from modeling_unimur import UniMuRModel
from train.collate import PairCollator, SkipCounter, known_problem, usable_captions
from train.data import FEATURES
from train.documents import InterleavedDocuments
from train.features import CachedPairs, cache_image_features
from train.grouping import one_row_an_image
from train.recall import hits_at, image_key, percent, reply_recall

Prepare = Callable[[dict[str, Any]], dict[str, Any]]  # moves a batch to the device


class Validation:
    """
    Held-out pairs and conversations, their images run through CLIP once, and the model's losses and recalls over them.

    Args:
        model: whose CLIP is run, on the device on which it is trained.
        collator: the training's; a copy takes each pair's first caption.
        pairs: rows with an undecoded `image` and `captions`, or `None`.
        documents: conversations with undecoded images, or `None`.
        pool: how many pairs and how many conversations are taken, from the first.
        batch_size: of the losses, over all processes: the training's, so that eq. 4 has as many negatives.
        workers: processes that decode.
        about: what was held out, as text.

    Broken pairs and conversations are left out, and counted in `skips`.

    Raises:
        ValueError: nothing usable is held out.
    """

    def __init__(
        self, model: UniMuRModel, collator: PairCollator, pairs: datasets.Dataset | datasets.IterableDataset | None,
        documents: InterleavedDocuments | None = None, *, pool: int = 1000, batch_size: int = 64, workers: int = 0,
        about: str = "held-out data",
    ):  # fmt: skip
        self.collator, self.batch_size, self.about, self.skips = copy(collator), batch_size, about, SkipCounter()
        self.collator.caption, self.collator.named, self.collator.every_caption = "first", True, False
        self.collator.pair_contexts = "caption"
        self.collator.predicted = "none"  # L_cap is measured over pairs, as without documents
        self.collator.worded = False  # the mapper's loss is no part of what retrieval is judged by
        self.pairs = self._cached_pairs(model, pairs, pool, workers) if pairs is not None else None
        self.documents = self._cached_documents(model, documents, pool, workers) if documents is not None else None
        if not self.pairs and not self.documents:
            raise ValueError(
                f"there is nothing to validate on: no usable pair or conversation in {about}. {self.skips}"
            )

    def _cached_pairs(self, model: UniMuRModel, pairs: Any, pool: int, workers: int) -> CachedPairs | None:
        chosen = []
        for row in islice(pairs, pool):
            problem = known_problem(row)[0] or (None if usable_captions(row["captions"]) else "empty_caption")
            if problem:
                self.skips.update({problem: 1}, 1)
            else:
                chosen.append({name: row[name] for name in FEATURES})
        if not chosen:
            return None
        rows = one_row_an_image(datasets.Dataset.from_list(chosen, features=FEATURES))
        # Names of their own, since those of the data need not differ; and with them which rows show one image.
        keys = [image_key(row["image"]) for row in rows]
        rows = rows.remove_columns("id").add_column("id", [str(i) for i in range(len(rows))])
        cached = cache_image_features(rows, model, self.skips, workers=workers)
        places: dict[str, int] = {}
        self.pair_images = [places.setdefault(keys[int(i)], len(places)) for i in cached["id"]]
        return cached

    def _cached_documents(
        self, model: UniMuRModel, documents: InterleavedDocuments, pool: int, workers: int
    ) -> Subset | None:
        chosen = documents.select(range(min(pool, len(documents.conversations))))
        wanted = {name for i in range(len(chosen)) for name in chosen[i]["images"]}
        table = chosen.images
        rows = table.select([row for row, name in enumerate(table["id"]) if name in wanted])
        chosen.use_images(cache_image_features(rows, model, self.skips, workers=workers))
        problems = [known_problem(chosen[i])[0] for i in range(len(chosen))]
        self.skips.update(Counter(problem for problem in problems if problem), len(problems))
        usable = [i for i, problem in enumerate(problems) if not problem]
        return Subset(chosen, usable) if usable else None

    @torch.no_grad()
    def measure(self, model: UniMuRModel, prepare: Prepare) -> dict[str, float]:
        """
        Every process takes part and gets the same result. Nothing random is drawn, so that training continues as without it.

        Args:
            model: not wrapped for several processes.
            prepare: moves a collated batch to the device.

        Returns:
            `loss` and its parts, means over the held-out pairs and conversations; of pairs `image_R@k`, each first caption
            against the images of all; of conversations what [`train.recall.reply_recall`] gives. Recalls in percent.
        """
        training = model.training
        model.eval()
        try:
            losses = _Means()
            result: dict[str, float] = {}
            if self.pairs:
                queries = self._queries(model, prepare, self.pairs, losses)
                result |= self._pair_recall(model, queries)
            if self.documents:
                queries = self._queries(model, prepare, self.documents, losses)
                result |= self._reply_recall(model, queries)
            return losses.result() | result
        finally:
            model.train(training)

    def _queries(self, model: UniMuRModel, prepare: Prepare, rows: Any, losses: "_Means") -> dict[str, torch.Tensor]:
        """Name -> normalised e_t of every row, from the same forward pass that gives the losses."""
        queries: dict[str, torch.Tensor] = {}
        for batch in self._batches(rows):
            names = batch.pop("names")
            for name in ("replies", "skipped", "n_seen"):
                batch.pop(name)
            outputs = model(**prepare(batch))
            losses.add({n: v for n, v in outputs.items() if n == "loss" or n.startswith("loss_")}, len(names))
            embeds = F.normalize(outputs.ret_embeds.float(), dim=-1).cpu()
            queries |= dict(zip(names, embeds, strict=True))
        merged: dict[str, torch.Tensor] = {}
        for part in gather_object([queries]):
            merged |= part
        return merged

    def _batches(self, rows: Any) -> Iterator[dict[str, Any]]:
        """This process's part of every batch; each has one, since the losses gather them."""
        state = PartialState()
        starts = range(0, len(rows), self.batch_size)
        for start in tqdm(starts, "validation", leave=False, disable=not state.is_main_process):
            count = min(self.batch_size, len(rows) - start)
            first, last = (start + count * (state.process_index + i) // state.num_processes for i in (0, 1))
            if count >= state.num_processes:
                yield self.collator([rows[i] for i in range(first, last)])

    def _pair_recall(self, model: UniMuRModel, queries: dict[str, torch.Tensor]) -> dict[str, float]:
        assert self.pairs is not None
        images = _unified(model, self.pairs, self.pair_images)
        places = dict(zip(self.pairs["id"], self.pair_images, strict=True))
        labels = [places[name] for name in queries]
        recalls = percent(hits_at(torch.stack(list(queries.values())) @ images.T, labels))
        return {f"image_{name}": value for name, value in recalls.items()}

    def _reply_recall(self, model: UniMuRModel, queries: dict[str, torch.Tensor]) -> dict[str, float]:
        assert self.documents is not None
        texts: dict[str, int] = {}
        images: dict[str, int] = {}
        labels: list[tuple[int | None, int | None]] = []
        rows = {row["id"]: row for row in map(self.documents.__getitem__, range(len(self.documents)))}
        for name in queries:
            text, image = rows[name]["text"], rows[name]["image"]
            labels.append((
                None if text is None else texts.setdefault(text, len(texts)),
                None if image is None else images.setdefault(image, len(images)),
            ))  # fmt: skip
        table = cast(InterleavedDocuments, self.documents.dataset).images
        places = {name: place for place, name in enumerate(table["id"])}
        width = next(iter(queries.values())).shape[0]
        text_embeds = model.embed_texts(list(texts)).cpu() if texts else torch.zeros(0, width)
        image_embeds = _unified(model, table, range(len(places)))[[places[name] for name in images]]
        query_embeds = torch.stack(list(queries.values()))
        return reply_recall(query_embeds, text_embeds, image_embeds, [t for t, _ in labels], [i for _, i in labels])


class _Means:
    """Means of the losses, each batch counting by its rows."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.rows: dict[str, int] = {}

    def add(self, losses: dict[str, torch.Tensor], rows: int) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + rows * float(value)
            self.rows[name] = self.rows.get(name, 0) + rows

    def result(self) -> dict[str, float]:
        parts = gather_object([{name: (self.sums[name], self.rows[name]) for name in self.sums}])
        return {name: sum(part[name][0] for part in parts) / sum(part[name][1] for part in parts) for name in parts[0]}


def _unified(model: UniMuRModel, table: CachedPairs, places: Sequence[int]) -> torch.Tensor:
    """Normalised embeddings `(images, q)` of a cached table's rows, one for each place, the first row that has it."""
    first: dict[int, int] = {}
    for row, place in enumerate(places):
        first.setdefault(place, row)
    rows = [first[place] for place in range(len(first))]
    features, embeds = (
        torch.from_numpy(table.images[name][rows]).to(model.device) for name in ("image_features", "image_embeds")
    )
    return F.normalize(model.unify_images(features, embeds).float(), dim=-1).cpu()
