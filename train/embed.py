"""
Embeds many candidates on several devices into a pool; an interrupted run continues where it stopped.

    accelerate launch train/embed.py --model org/unimur --images photos/ --texts replies.txt --output pool

Every process takes its turn at the shards. A shard is written whole or not at all, then its manifest (rows, SHA-256, what
made it); what has a manifest is verified and not embedded again. At the end the shards, as they are, become the pool.
"""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `train` is a folder of the repository, not a package

if __name__ == "__main__":
    from train.command import require

    require("train", "accelerate", "matplotlib", "yaml")

import datasets
import pyarrow.compute as pc
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from tqdm.auto import tqdm
from transformers.utils import logging

from modeling_unimur import CandidatePool, UniMuRModel
from modeling_unimur.images_unimur import BadImageError, decode_image
from modeling_unimur.inputs_unimur import check_count
from modeling_unimur.pool_arrow import write_arrow
from modeling_unimur.pool_files import EXTRAS, adopt
from train.cache import sha256, write_json
from train.collate import SkipCounter
from train.command import DTYPES, Parser, run_command, unknown
from train.extract import content_hash, image_hints, values_hash
from train.rows import BadRowError, Folder, check_text, is_image, printable
from train.text_files import read_lines

logger = logging.get_logger("train")

MANIFESTS = "manifests"
STRING = datasets.Value("string")
SOURCES = {
    "image": datasets.Features({"id": STRING, "image": datasets.Image(decode=False), "problem": STRING}),
    "text": datasets.Features({"id": STRING, "text": STRING, "problem": STRING}),
}
Item = tuple[str, Any, str | None]  # id, candidate, why it cannot be read


@dataclass
class EmbedArguments:
    """What is embedded, by what, and where the pool goes."""

    model: str = field(metadata={"help": "A UniMuR checkpoint: a folder or a Hub name."})
    output: str = field(metadata={"help": "The pool's folder; an interrupted run continues in it."})
    images: str | None = field(
        default=None,
        metadata={
            "help": "A folder of images (ids: their paths in it) or a saved dataset with 'image' and maybe 'id'. What has "
            "no image's ending is named in a warning; a link that leads out of the folder is left out."
        },
    )
    texts: str | None = field(
        default=None,
        metadata={"help": "A text a line, or a .jsonl with 'text' and maybe 'id' (text-<row> if not); UTF-8."},
    )
    shard_size: int = field(default=10_000, metadata={"help": "Candidates a file."})
    batch_size: int = field(default=32, metadata={"help": "Candidates a forward pass."})
    dtype: str = field(default="auto", metadata={"help": "dtype of the towers.", "choices": list(DTYPES)})
    keep_images: str = field(
        default="bytes",
        metadata={"help": "Copy the images into the pool, or keep their paths only.", "choices": ["bytes", "path"]},
    )
    max_bad_share: float = field(
        default=0.01,
        metadata={"help": "Stop where more of the candidates cannot be read; they are left out and listed."},
    )

    def __post_init__(self):
        for name in ("shard_size", "batch_size"):
            check_count(f"--{name}", getattr(self, name))
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"--max_bad_share {self.max_bad_share}: expected a share from 0, none, to 1, all")


class Shard(NamedTuple):
    """Rows `start` to `stop` (exclusive) of one modality."""

    kind: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.number:05d}"

    @property
    def file(self) -> str:
        return f"data-{self.name}.arrow"


def main(argv: list[str] | None = None) -> CandidatePool | None:
    """
    Embeds what is not embedded yet and assembles the pool.

    Returns:
        The pool, memory-mapped; `None` in processes other than the main one.

    Raises:
        ValueError: nothing to embed, a duplicate id, a corrupt shard, or one of another model or of other candidates.
        OSError: the disk is full; the message says where the run stopped.
        TooManyBadPairsError: more than `--max_bad_share` of a process's candidates were left out.
    """
    args = parse(sys.argv[1:] if argv is None else argv)
    # Devices of different speed wait for each other at the end, beyond the half hour that is usual.
    # By itself accelerate runs each of several CPU processes as if it were alone.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))],
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched, but each sees {accelerator.num_processes}: they would write the same "
            "shards. On CPUs use train/configs/accelerate/two_cpu.yaml"
        )
    sources = read_sources(args)
    shards = [
        Shard(kind, number, start, min(start + args.shard_size, len(rows)))
        for kind, rows in sources.items()
        for number, start in enumerate(range(0, len(rows), args.shard_size))
    ]
    model = UniMuRModel.from_pretrained(args.model, dtype=args.dtype).to(accelerator.device)
    made_by, folder = model.fingerprint, Path(args.output)
    prepare(folder, shards)
    skips = SkipCounter()
    mine = shards[accelerator.process_index :: accelerator.num_processes]
    allowed = args.max_bad_share * sum(shard.stop - shard.start for shard in mine)
    for shard in tqdm(mine, f"shards of process {accelerator.process_index}", position=accelerator.process_index):
        rows = sources[shard.kind].select(range(shard.start, shard.stop))
        manifest = verified(folder, shard, rows, made_by, args)
        if manifest is None:
            manifest = embed(model, shard, rows, made_by, args, len(sources[shard.kind]))
        count(skips, manifest, shard)
        if sum(skips.counts.values()) > allowed:
            skips.check(args.max_bad_share)
    accelerator.wait_for_everyone()
    # Paths of images may be anywhere: they are those that this run was given.
    images = Path(folder.resolve().anchor) if args.keep_images == "path" else None
    pool = assemble(folder, shards, made_by, images) if accelerator.is_main_process else None
    accelerator.end_training()
    return pool


def parse(argv: list[str]) -> EmbedArguments:
    """Raises `ValueError`: an argument is unknown or missing, or a value cannot be used."""
    parser = Parser(EmbedArguments)  # type: ignore[arg-type]  # whose hints know no dataclass
    args, rest = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if rest:
        raise unknown(rest[0], parser.known())
    return args


def prepare(folder: Path, shards: Sequence[Shard]) -> None:
    """
    Makes the output's folder ready: what an unfinished pool holds beside its shards is deleted, a finished one stays as it is.

    Raises:
        ValueError: another pool is there.
    """
    foreign = {f.name for f in folder.glob("data-*.arrow")} - {shard.file for shard in shards}
    if foreign:
        raise ValueError(
            f"{folder / min(foreign)} belongs to no shard of this run: give another --output or remove it"
        )
    (folder / MANIFESTS).mkdir(parents=True, exist_ok=True)
    files = ("pool.json", *(f"{MANIFESTS}/{shard.name}.json" for shard in shards))
    if not all((folder / file).is_file() for file in files):
        for file in (file for pattern in EXTRAS for file in folder.glob(pattern)):
            file.unlink(missing_ok=True)


def read_sources(args: EmbedArguments) -> dict[str, datasets.Dataset]:
    """The candidates by modality, images undecoded; refuses with a `ValueError` what cannot be embedded."""
    sources = {}
    if args.images is not None:
        sources["image"] = read_images(Path(args.images))
    if args.texts is not None:
        sources["text"] = _table("text", _texts(Path(args.texts)))
    if not any(map(len, sources.values())):
        raise ValueError("no candidates: give --images, --texts or both, and something in them")
    ids = datasets.concatenate_datasets([s.select_columns("id") for s in sources.values()]).data.column("id")
    if pc.count_distinct(ids).as_py() < len(ids):
        counts = pc.value_counts(ids)
        duplicate = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise ValueError(f"duplicate id {duplicate!r}: ids must be unique over images and texts")
    return sources


def read_images(path: Path) -> datasets.Dataset:
    """A saved dataset's images, or a folder's in the order of their names."""
    if (path / "state.json").is_file():
        rows = datasets.load_from_disk(str(path))
        if "image" not in rows.column_names:
            raise ValueError(
                f"--images {path}: the dataset has no column 'image'; it has {', '.join(rows.column_names)}"
            )
        if "id" not in rows.column_names:
            rows = rows.add_column("id", [f"image-{i}" for i in range(len(rows))])
        rows = rows.select_columns(["id", "image"]).cast_column("image", datasets.Image(decode=False))
        return rows.cast_column("id", STRING)
    if not path.is_dir():
        raise ValueError(f"--images {path} is neither a folder of images nor a saved dataset")
    names = sorted(f.relative_to(path).as_posix() for f in path.rglob("*") if f.is_file() or f.is_symlink())
    others = Counter(Path(name).suffix for name in names if not is_image(name))
    if others:
        kinds = ", ".join(f"{count} {ending or 'without one'}" for ending, count in others.most_common(5))
        logger.warning(f"{path}: {others.total()} files have no image's ending and are passed over: {kinds}")
    return _table("image", _images(Folder(path.resolve()), [name for name in names if is_image(name)]))


def _images(folder: Folder, names: Sequence[str]) -> Iterator[Item]:
    for name in names:
        try:
            yield printable(name), {"bytes": None, "path": str(folder.file(name))}, None
        except BadRowError as error:
            yield printable(name), None, error.reason


def _texts(path: Path) -> Iterator[Item]:
    for line in read_lines(path):
        name, text, problem = f"text-{line.number - 1}", line.text.rstrip("\r\n"), line.problem
        if path.suffix == ".jsonl" and problem is None:
            try:
                data = json.loads(text)
                name, text = printable(str(data.get("id", name))), data["text"]
            except (ValueError, KeyError, AttributeError, RecursionError):
                problem = BadRowError("not_json", f"expected an object with 'text', got {text[:60]!r}")
        try:
            if problem is not None:
                raise problem
            if not isinstance(text, str):
                raise BadRowError("no_text", f"'text' must be a text, got {type(text).__name__}")
            yield name, check_text(text, "the text"), None
        except BadRowError as error:
            logger.warning(f"{path}, line {line.number} is left out ({error.reason}): {error}")
            yield name, None, error.reason


def _table(kind: str, items: Iterator[Item]) -> datasets.Dataset:
    chunks = []  # millions of Python objects weigh several times their Arrow table
    while chunk := list(islice(items, 10_000)):
        ids, candidates, problems = zip(*chunk, strict=True)
        rows = {"id": ids, kind: candidates, "problem": problems}
        chunks.append(datasets.Dataset.from_dict(rows, features=SOURCES[kind]))
    empty = datasets.Dataset.from_dict({"id": [], kind: [], "problem": []}, features=SOURCES[kind])
    return datasets.concatenate_datasets(chunks) if chunks else empty


def embed(
    model: UniMuRModel, shard: Shard, rows: datasets.Dataset, made_by: dict[str, Any], args: EmbedArguments, total: int
) -> dict[str, Any]:
    """Embeds one shard and writes it with its manifest, which is returned. Raises `OSError` saying where it stopped."""
    folder, embed_items = Path(args.output), model.embed_images if shard.kind == "image" else model.embed_texts
    ids: list[str] = []
    items: list[Any] = []
    parts: list[torch.Tensor] = []
    left_out: list[list[str]] = []
    for start in range(0, len(rows), args.batch_size):
        batch = rows[start : start + args.batch_size]
        good: list[Any] = []
        problems = batch.get("problem", [None] * len(batch["id"]))
        for name, item, problem in zip(batch["id"], batch[shard.kind], problems, strict=True):
            reason, read = (problem, None) if problem else readable(shard.kind, item)
            if reason is not None:
                left_out.append([name, reason])
                continue
            good.append(read)
            ids.append(name)
            items.append(item)
        if good:
            parts.append(embed_items(good, batch_size=args.batch_size))
    path = folder / shard.file
    manifest: dict[str, Any] = {"file": path.name, "rows": len(ids), "sha256": None, "bytes": 0, "made_by": made_by}
    manifest |= {"inputs": inputs(rows, args), "left_out": left_out}
    if shard.kind == "image":
        manifest |= {"hints": hints(rows), "content": content(rows)}
    try:
        path.unlink(missing_ok=True)
        if ids:
            pool = CandidatePool.empty(made_by).append(shard.kind, items, torch.cat(parts), ids)
            write_arrow(pool.dataset, path, copy_images=args.keep_images == "bytes")
            manifest |= {"sha256": sha256(path), "bytes": path.stat().st_size}
        write_json(folder / MANIFESTS / f"{shard.name}.json", manifest)
    except OSError as error:
        done = len(list((folder / MANIFESTS).glob("*.json")))
        raise OSError(
            error.errno,
            f"stopped at shard {shard.name} ({shard.kind}s {shard.start:,} to {shard.stop - 1:,} of {total:,}), which could "
            f"not be written: {error.strerror or error}. {done} shards are complete; make room and run the same command "
            "again",
        ) from error
    return manifest


def readable(kind: str, item: Any) -> tuple[str | None, Any]:
    """Why a candidate is left out, if it is, and else what is embedded: a decoded image or the text."""
    if kind == "text":
        return ("empty" if not isinstance(item, str) or not item.strip() else None), item
    try:
        return None, decode_image(item)
    except BadImageError as error:
        return error.reason, None


def verified(
    folder: Path, shard: Shard, rows: datasets.Dataset, made_by: dict[str, Any], args: EmbedArguments
) -> dict[str, Any] | None:
    """The manifest of a shard that is written already, `None` where there is none; refuses one whose files differ."""
    path = folder / MANIFESTS / f"{shard.name}.json"
    if not path.is_file():
        return None
    manifest = json.loads(path.read_text())
    again = f"remove {path} and run again to embed it again"
    same = manifest["inputs"] == inputs(rows, args)
    if shard.kind == "image" and same:  # the files are read again only where they look changed
        same = manifest["hints"] == hints(rows) or manifest["content"] == content(rows)
    for holds, what in (
        (manifest["made_by"] == made_by, "made by another model"),
        (same, "made from other candidates or with other settings"),
    ):
        if not holds:
            raise ValueError(f"shard {shard.name} in {folder} was {what}: give another --output, or {again}")
    data = folder / manifest["file"]
    if manifest["rows"] and (not data.is_file() or sha256(data) != manifest["sha256"]):
        raise ValueError(f"shard {shard.name} is corrupt: {data} is not the file of its manifest; {again}")
    return manifest


def inputs(rows: datasets.Dataset, args: EmbedArguments) -> str:
    """A hash of a shard's ids, texts and kept paths, and of the settings that its bytes depend on."""
    state = hashlib.sha256(json.dumps([args.batch_size, args.dtype, args.keep_images]).encode())
    for name in (n for n in ("id", "text") if n in rows.column_names):
        state.update(json.dumps(rows[name][:]).encode())
    if "image" in rows.column_names and args.keep_images == "path":
        state.update(json.dumps([image and image["path"] for image in rows["image"]]).encode())
    return state.hexdigest()


def hints(rows: datasets.Dataset) -> str:
    """A hash of what changes with a shard's images and is cheap to see."""
    return values_hash(image_hints(rows, range(len(rows))))


def content(rows: datasets.Dataset) -> str:
    """A hash of the bytes of a shard's images."""
    return values_hash(map(content_hash, rows["image"]))


def count(skips: SkipCounter, manifest: dict[str, Any], shard: Shard) -> None:
    """Adds what a shard left out."""
    reasons = [reason for _, reason in manifest["left_out"]]
    examples = {r: [name for name, why in manifest["left_out"] if why == r] for r in set(reasons)}
    skips.update({r: reasons.count(r) for r in set(reasons)}, shard.stop - shard.start, examples)


def assemble(
    folder: Path, shards: Sequence[Shard], made_by: dict[str, Any], image_folder: Path | None = None
) -> CandidatePool:
    """Makes the shards the pool, as they are. `image_folder`: as of [`CandidatePool.load_from_disk`]."""
    manifests = [json.loads((folder / MANIFESTS / f"{shard.name}.json").read_text()) for shard in shards]
    names = [m["file"] for m in manifests if m["rows"]]
    adopt(folder, names, made_by)
    pool, skips = CandidatePool.load_from_disk(folder, image_folder=image_folder), SkipCounter()
    for manifest, shard in zip(manifests, shards, strict=True):
        count(skips, manifest, shard)
    print(f"{folder}: {pool!r}; {skips}{skips.details()}".replace("pairs", "candidates"))
    return pool


if __name__ == "__main__":
    run_command(main)
