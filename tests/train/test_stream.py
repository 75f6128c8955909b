"""Streamed pairs and documents between them: batches of one kind, in the share asked for, the same after an interruption."""

from collections import Counter

import datasets
import pytest
import torch
from safetensors.torch import load_file

from tests.train.test_dialogues import chatting
from tests.train.test_run import write_shard
from train.dialogue_files import load_dialogues
from train.documents import OF_WORDS, PAIRS, WITH_IMAGES
from train.run import main
from train.stream import MixedStream

BATCH = 4


@pytest.fixture
def flags(tmp_path):
    return chatting(tmp_path)


@pytest.fixture
def documents(flags, tmp_path):
    return load_dialogues(tmp_path / "chats.jsonl")


def stream(documents, share=0.5, pairs=26, seed=0):
    rows = datasets.IterableDataset.from_generator(lambda: ({"id": f"pair {i}"} for i in range(pairs)))
    return MixedStream(rows, documents, share, BATCH, seed)


def kind(row):
    if "context" not in row:
        return PAIRS
    return WITH_IMAGES if any(not isinstance(e, str) for turn in row["context"] for e in turn) else OF_WORDS


def test_every_batch_is_of_one_kind_and_the_pairs_come_once(documents):
    mixed = stream(documents)
    passes = []
    for epoch in range(12):
        mixed.set_epoch(epoch)
        passes.append(list(mixed))
        assert [row["id"] for row in passes[-1] if kind(row) == PAIRS] == [f"pair {i}" for i in range(26)]
        *whole, last = [passes[-1][at : at + BATCH] for at in range(0, len(passes[-1]), BATCH)]
        assert all(len(set(map(kind, batch))) == 1 for batch in whole)
        assert [row["id"] for row in last] == ["pair 24", "pair 25"]
    counts = Counter(kind(row) for rows in passes for row in rows)
    asked = 12 * 26  # as many documents as pairs
    assert abs(counts[OF_WORDS] + counts[WITH_IMAGES] - asked) <= 6 * BATCH
    assert abs(counts[OF_WORDS] - counts[WITH_IMAGES]) <= 6 * BATCH  # the chats have as many of each
    seen = {row["id"] for rows in passes for row in rows}
    assert len(seen) == 26 + len(documents)  # over the passes every document comes


def test_the_order_is_the_seeds_and_the_passes(documents):
    def order(epoch, seed=0):
        mixed = stream(documents, seed=seed)
        mixed.set_epoch(epoch)
        return [row["id"] for row in mixed]

    assert order(1) == order(1)
    assert len({tuple(order(0)), tuple(order(1)), tuple(order(0, seed=1))}) == 3
    for share in (0, 1):
        with pytest.raises(ValueError, match="expected a number between 0 and 1"):
            stream(documents, share)


def test_a_run_is_resumed_as_if_never_interrupted(flags, tmp_path):
    for shard in range(2):
        write_shard(tmp_path / f"s-{shard}.tar", [f"words {i}" for i in range(8)])
    given = [*flags, f"--train_data={tmp_path}/s-*.tar", "--dialogue_share=0.6", "--dataloader_num_workers=1"]
    whole = main([*given, f"--output_dir={tmp_path}/whole"])
    at = f"--resume_from_checkpoint={tmp_path}/whole/checkpoint-5"
    resumed = main([*given, at, f"--output_dir={tmp_path}/resumed"])
    first, second = (load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole["pairs_seen"] == resumed["pairs_seen"] == 40
    kinds = {tuple(sorted(name for name in log if name.startswith("loss_"))) for log in whole["log"][:10]}
    assert len(kinds) > 1, kinds  # batches of several kinds were seen
    with pytest.raises(ValueError, match=r"another order, since these differ: dialogue share \(0.6 then, 0.5 now\)"):
        main([*given, at, "--dialogue_share=0.5", f"--output_dir={tmp_path}/other"])
    with pytest.raises(ValueError, match="no length: give their share of the rows"):
        main([*flags, f"--train_data={tmp_path}/s-*.tar", f"--output_dir={tmp_path}/none"])
    with pytest.raises(ValueError, match="expected a number between 0 and 1"):  # before the steps are counted by it
        main([*flags, f"--train_data={tmp_path}/s-*.tar", "--dialogue_share=1", "--max_steps=-1"])
    alone = [flag for flag in flags if not flag.startswith("--dialogues")]
    with pytest.raises(ValueError, match="--dialogue_share is of --dialogues, and there are none"):
        main([*alone, f"--train_data={tmp_path}/s-*.tar", "--dialogue_share=0.5", f"--output_dir={tmp_path}/none"])
