"""VisDial's answer ranking: 100 options after an image, the rounds before and a question."""

import numpy as np

from benchmarks.measure import Measure
from benchmarks.metrics import visdial_per_item
from benchmarks.schema import Dialogues, Protocol
from benchmarks.systems import System

from .candidates import by_pool, embed
from .contexts import Contexts

SETTINGS = {"split", "serialisation", "pool", "ties", "by", "option", "squash", "relevance"}
BY_LANGUAGE: set[str] = {"own_bos", "shift", "reduction", "scope"}
OPTIONAL: set[str] = set()


def run(system: System, data: Dialogues, protocol: Protocol, clip: System | None = None) -> dict[str, Measure]:
    """
    Ranks each round's options, by likelihood or by embedding.

    Returns:
        `R@1`, `R@5`, `R@10`, `MRR`, `mean rank` (a number) over all rounds, `NDCG` over those with dense relevances; with
        `relevance: previous` a round's relevances are compared with the scores of the next round in the data, which may
        be of another dialogue, and the last round's with none.

    Raises:
        DoesNotApplyError: by likelihood, for a system without a language model.
    """
    contexts = Contexts(data, protocol["serialisation"], squash=protocol["squash"])
    if protocol["by"] == "likelihood":
        options = [
            [protocol["option"].format(text=data.texts[i]) for i in d["pool"]["text_ids"]] for d in data.dialogues
        ]
        how = {name: protocol[name] for name in ("own_bos", "shift", "reduction", "scope")}
        scores = [s.numpy() for s in system.log_likelihoods(contexts, options, show_progress_bar=True, **how)]
    else:
        embedded = embed(system, data, contexts, template=protocol["option"])
        scores = [None] * len(contexts)
        for pool, rows in by_pool(data.dialogues):
            ranked = system.similarity(embedded.queries[rows], embedded.texts[embedded.rows(pool)[0]])
            for row, values in zip(rows, ranked.numpy(), strict=True):
                scores[row] = values
    relevances = [d.get("relevance") for d in data.dialogues]
    if protocol["relevance"] == "previous":
        relevances = [None, *relevances[:-1]]
    items = [
        visdial_per_item(s, d["pool"]["text_ids"].index(d["gold"]["text_ids"][0]), relevance)
        for s, d, relevance in zip(scores, data.dialogues, relevances, strict=True)
    ]
    columns = {name: np.array([item[name] for item in items], dtype=float) for name in items[0]}
    return {name: Measure(values, percent=name != "mean rank") for name, values in columns.items()}
