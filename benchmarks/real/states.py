"""A frozen LLM's states after many prompts at little more than the cost of one, kept on disk."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from modeling_unimur.identity_unimur import digest, named_weights
from train.cache import CachedTable, Part, build_cache
from train.extract import values_hash

BATCH = 32
PART_ROWS = 256


def cached_states(
    llm: PreTrainedModel, rows: Sequence[list[int]], prompts: Mapping[str, torch.Tensor], folder: Path,
    layers: Sequence[int] = (),
) -> dict[str, dict[str, torch.Tensor]]:  # fmt: skip
    """
    As [`states_behind`], written once as verified parts in `folder`; an interrupted call resumes.

    Raises:
        StaleCacheError, CorruptCacheError, OSError: see [`train.cache.build_cache`].
    """
    parts = [range(s, min(s + PART_ROWS, len(rows))) for s in range(0, len(rows), PART_ROWS)]
    bar = tqdm(total=len(rows), desc=folder.name, unit="text")

    def make(numbers: list[int]) -> Iterator[Part]:
        bar.update(len(rows) - sum(len(parts[n]) for n in numbers))
        for number in numbers:
            states = states_behind(llm, [rows[i] for i in parts[number]], prompts, layers, bar.update)
            columns = {
                f"{p} {kind}": v.numpy() for p, kinds in enumerate(states.values()) for kind, v in kinds.items()
            }
            yield number, columns, {}

    identity = {
        "weights of the LLM": digest(named_weights(llm), head=64), "dtype": str(llm.dtype), "layers": list(layers),
        "prompts": digest(sorted(prompts.items())),
    }  # fmt: skip
    sources = [{"rows": f"{p.start}-{p.stop - 1}", "ids": values_hash([str(rows[i]) for i in p])} for p in parts]
    build_cache(folder, identity, sources, make, rank=0, world=1)
    bar.close()
    columns = CachedTable(folder, len(parts)).columns
    return {
        name: {kind: torch.from_numpy(np.array(columns[f"{p} {kind}"][:])) for kind in kinds_of(layers)}
        for p, name in enumerate(prompts)
    }


def kinds_of(layers: Sequence[int]) -> list[str]:
    """What is read after each prompt."""
    return ["last", "before", "mean", *(f"layer {layer}" for layer in layers)]


@torch.no_grad()
def states_behind(
    llm: PreTrainedModel, rows: Sequence[list[int]], prompts: Mapping[str, torch.Tensor], layers: Sequence[int] = (),
    progress: Callable[[int], Any] = lambda count: None,
) -> dict[str, dict[str, torch.Tensor]]:  # fmt: skip
    """
    States of every row after every prompt; what comes before the prompts is computed once.

    Args:
        llm: its trunk is run, in its own dtype, on its own device.
        rows: ids of n texts, none empty.
        prompts: name -> input embeddings `(m, d)` that are appended to each of them, none empty.
        layers: hidden layers to read besides the last output, counted as transformers does, such as -3.
        progress: called with the number of rows that were done.

    Returns:
        prompt -> what is read -> `(n, d)` float32 on CPU: `"last"`, the last output at the prompt's last token; `"before"`,
        at the one before it (where there is one); `"mean"`, the mean of the last outputs at its tokens; `"layer -3"`, that
        layer at its last token.
    """
    trunk, width = llm.base_model, llm.config.hidden_size
    states = {name: {kind: torch.empty(len(rows), width) for kind in kinds_of(layers)} for name in prompts}
    sizes = torch.tensor([len(prompt) for prompt in prompts.values()])
    ends = sizes.cumsum(0)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    offsets = torch.cat([torch.arange(size) for size in sizes.tolist()])
    # Every prompt attends to the text and itself; one pass computes all of them.
    visible = (owner[:, None] == owner) & (offsets[:, None] >= offsets)
    endings = torch.cat(list(prompts.values())).to(llm.device, llm.dtype)
    # Rows of equal length share a batch, so that nothing is padded.
    by_length = defaultdict(list)
    for i, row in enumerate(rows):
        by_length[len(row)].append(i)
    for batch in [same[s : s + BATCH] for same in by_length.values() for s in range(0, len(same), BATCH)]:
        cache = DynamicCache()
        ids = torch.tensor([rows[i] for i in batch], device=llm.device)
        trunk(input_ids=ids, past_key_values=cache, use_cache=True)
        mask = torch.cat([visible.new_ones(len(owner), ids.shape[1]), visible], dim=1)
        output = trunk(
            inputs_embeds=endings.expand(len(batch), -1, -1), past_key_values=cache, use_cache=True,
            attention_mask=torch.where(mask, 0.0, torch.finfo(llm.dtype).min).to(endings)[None, None],
            position_ids=(ids.shape[1] + offsets).to(ids.device)[None], output_hidden_states=bool(layers),
        )  # fmt: skip
        for name, end, size in zip(prompts, ends.tolist(), sizes.tolist(), strict=True):
            hidden = output.last_hidden_state[:, end - size : end].float().cpu()
            states[name]["last"][batch] = hidden[:, -1]
            states[name]["before"][batch] = hidden[:, max(size - 2, 0)]
            states[name]["mean"][batch] = hidden.mean(1)
            for layer in layers:
                states[name][f"layer {layer}"][batch] = output.hidden_states[layer][:, end - 1].float().cpu()
        progress(len(batch))
    return states
