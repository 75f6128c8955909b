"""Readers of people's conversations: chat messages, MMDialog, VisDial, VIST, and archives of texts and pictures in order."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from train.conversations import (
    MESSAGE_COLUMNS,
    ImageId,
    Images,
    Turn,
    bad_conversation,
    make_conversation,
    parse_chat,
    temporary_folder,
    without_duplicates,
    write_conversations,
)
from train.data import load_pairs
from train.documents import InterleavedDocuments
from train.json_files import BadDataError, read_items, read_json, require
from train.published import VIST_LENGTH, mmdialog_turn, visdial_dialogues, visdial_round, vist_stories
from train.rows import BadRowError, check_text
from train.tars import (
    BROKEN,
    IMAGES,
    broken_archive,
    find_tars,
    read_member,
    split_ending,
    tar_members,
    tar_stem,
)
from train.text_files import Record, read_json_lines, read_table

logger = logging.get_logger("train")

Conversations = Iterator[dict[str, Any]]
LAYOUTS = """expected one of
  - chat messages: a .jsonl, .json or .parquet with a 'messages' column (role, content) and maybe 'images' and 'id', a folder of
    such files, a saved dataset, or the name of a dataset on the Hub;
  - MMDialog's conversations.json, VisDial's visdial_1.0_train.json or VIST's train.story-in-sequence.json, or the folder
    that holds it;
  - .tar archives of documents, whose .txt and pictures follow each other in order (a file, a folder, a pattern or braces)"""
CHATS = (".parquet", ".jsonl", ".json")  # of a folder, the first kind that it holds
PUBLISHED = ("conversations.json", "train/conversations.json", "visdial_1.0_train.json", "train.story-in-sequence.json",
             "sis/train.story-in-sequence.json")  # fmt: skip
VISDIAL_NAMES = ("VisualDialog_{split}2018_{id:012d}", "COCO_train2014_{id:012d}", "COCO_val2014_{id:012d}")


def load_dialogues(path: str | Path, image_folder: str | Path | None = None) -> InterleavedDocuments:
    """
    The documents of whatever layout `path` has. Texts and the pictures of archives and tables are kept in memory-mapped
    temporary files, pictures in files stay there.

    Args:
        path: see `LAYOUTS`.
        image_folder: that images are named in; by default the folder of the file.

    Returns:
        A document for each reply; what cannot be read is among them, to be counted in training with its file and line.

    Raises:
        ValueError: the path does not exist, is of no known layout or holds no conversation; a published file is not as it
            is published; an image folder is none.
    """
    path = Path(path)
    if image_folder is not None and not Path(image_folder).is_dir():
        raise ValueError(f"--image_folder {image_folder} is not a folder: give the one that holds {path}'s images")
    source, read = _reader(path)
    keep = temporary_folder()
    images = Images(image_folder or (path if path.is_dir() else source.parent), Path(keep.name) / "images.arrow")
    conversations = write_conversations(
        without_duplicates(read(source, images)), Path(keep.name) / "conversations.arrow"
    )
    if not len(conversations):
        raise ValueError(f"no conversation in {path}: it is empty")
    return InterleavedDocuments(conversations, images.table(), keep)


def load_rows(
    train_data: str | list[str] | None, dialogues: str | None, image_folder: str | None = None
) -> tuple[datasets.Dataset | datasets.IterableDataset, InterleavedDocuments | None]:
    """
    Pairs of [`train.data.load_pairs`] and documents of [`load_dialogues`]. Without pairs they are the documents' own, see
    [`InterleavedDocuments.pairs`].

    Raises:
        ValueError: neither is named, or as those say.
    """
    documents = None if dialogues is None else load_dialogues(dialogues, image_folder)
    if train_data is None:
        if documents is None:
            raise ValueError(
                "--train_data is missing: a folder or file of image-caption pairs, or 'miniature'; or give --dialogues"
            )
        return documents.pairs(), documents
    return load_pairs(train_data, image_folder=image_folder), documents


Reader = Callable[[Path, Images], Conversations]


def _reader(path: Path) -> tuple[Path, Reader]:
    """What a path is read from, and how."""
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return path, _saved
        for name in PUBLISHED:
            if (path / name).is_file():
                return path / name, _published
        if _chat_files(path):
            return path, _folder
    if path.is_file() and path.suffix.lower() in CHATS:
        return path, _published if path.suffix.lower() == ".json" else _table
    tars = find_tars(path)
    if tars:
        return path if path.is_dir() else tars[0].parent, lambda _, images: _archives(tars, images)
    if not path.exists() and len(path.parts) == 2 and not path.is_absolute():
        return Path(), lambda _, images: _hub(str(path), images)
    raise ValueError(f"{path} {'has no known layout' if path.exists() else 'does not exist'}: {LAYOUTS}")


# Chat messages


def _chat_files(folder: Path) -> list[Path]:
    files = [Path(where) / name for where, _, names in os.walk(folder) for name in names if not name.startswith(".")]
    kinds = [sorted(file for file in files if file.suffix.lower() == ending) for ending in CHATS]
    return next((files for files in kinds if files), [])


def _folder(folder: Path, images: Images) -> Conversations:
    """Every chat file of a folder; a Hub repository's other splits than train are passed over."""
    files = _chat_files(folder)
    trains = [file for file in files if "train" in file.name]
    if trains and len(trains) < len(files):
        others = sorted(file.name for file in set(files) - set(trains))
        logger.warning(f"{folder}: of {len(files)} files those of the train split are read, not {others[0]}")
    for file in trains or files:
        yield from (_published if file.suffix.lower() == ".json" else _table)(file, images)


def _table(file: Path, images: Images) -> Conversations:
    yield from (_chat(record, images) for record in read_table(file))


def _chat(record: Record, images: Images) -> dict[str, Any]:
    if isinstance(record.values, BadRowError):
        return bad_conversation(record.where, record.values)
    return parse_chat(record.values, record.where, images)


def _saved(folder: Path, images: Images) -> Conversations:
    data = datasets.load_from_disk(str(folder))
    yield from _dataset(data["train"] if isinstance(data, datasets.DatasetDict) else data, str(folder), images)


def _hub(name: str, images: Images) -> Conversations:
    try:
        data = datasets.load_dataset(name, split="train")
    except Exception as error:  # of the Hub, the network or the data set's own form, each in its own kind
        raise ValueError(
            f"{name} is no path here, and not a data set that the Hub gives ({error}): {LAYOUTS}"
        ) from error
    yield from _dataset(data, name, images)


def _dataset(data: datasets.Dataset, name: str, images: Images) -> Conversations:
    if not set(MESSAGE_COLUMNS) & set(data.column_names):
        raise ValueError(f"{name} has no column 'messages'; it has {', '.join(data.column_names)}")
    data = data.with_format(None)
    for column in ("image", "images"):
        if column in data.column_names:
            data = data.cast_column(column, _undecoded(data.features[column]))
    for row, values in enumerate(data):
        yield _chat(Record(f"{name}, row {row + 1}", values), images)


def _undecoded(kind: Any) -> Any:
    """A column's type, its images left as they are stored."""
    still = datasets.Image(decode=False)
    if isinstance(kind, datasets.Image):
        return still
    return type(kind)(still) if isinstance(getattr(kind, "feature", None), datasets.Image) else kind


# Published data sets


def _published(file: Path, images: Images) -> Conversations:
    """A .json by what it holds: VisDial's or VIST's object, MMDialog's conversations, or chat messages."""
    with file.open("rb") as start:
        first = start.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if first == b"{" and (whole := _whole_object(file)) is not None:
        if "annotations" in whole:
            return _vist(file, images)
        if "data" in whole:
            return _visdial(file, whole, images)
        return iter([_chat_or_mmdialog(whole, f"{file}, item 1", images)])
    return _items(file, images)


def _whole_object(file: Path) -> dict[str, Any] | None:
    """A file that is one json object; `None` for json lines."""
    try:
        value = read_json(file)
    except BadDataError:
        return None
    return value if isinstance(value, dict) else None


def _items(file: Path, images: Images) -> Conversations:
    """The items of a json array, or of json lines, in which a broken line is counted."""
    with file.open("rb") as start:
        array = start.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    records = read_json_lines(file)
    if array:
        records = (Record(f"{file}, item {n}", item) for n, item in enumerate(read_items(file), 1))
    for record in records:
        values = record.values
        if not isinstance(values, dict) and not isinstance(values, BadRowError):
            values = BadRowError("not_json", f"expected an object, got a {type(values).__name__}")
        if isinstance(values, BadRowError):
            yield bad_conversation(record.where, values)
        else:
            yield _chat_or_mmdialog(values, record.where, images)


def _chat_or_mmdialog(values: dict[str, Any], where: str, images: Images) -> dict[str, Any]:
    turns = values.get("conversation")
    if not isinstance(turns, list) or not turns or not isinstance(turns[0], dict) or "turn" not in turns[0]:
        return parse_chat(values, where, images)

    return _mmdialog(values, turns, where, images)


def _mmdialog(values: dict[str, Any], turns: list[Any], where: str, images: Images) -> dict[str, Any]:
    """Each turn the reply to those before it; from one that cannot be read on, all are counted."""
    name = str(values.get("conversation_id", where))
    kept: list[Turn] = []
    try:
        for t, turn in enumerate(turns):
            elements: Turn = []
            for element in mmdialog_turn(turn, f"turn {t}"):
                if element["type"] == "image":
                    elements.append(images.named(str(element["image_id"])))
                elif (text := str(element["text"])).strip():
                    elements.append(check_text(text, f"turn {t}"))
            if not elements:
                raise BadRowError("empty_message", f"turn {t} has neither text nor image")
            kept.append(elements)
    except (BadRowError, BadDataError) as error:
        problem = error if isinstance(error, BadRowError) else BadRowError("bad_message", str(error))
        lost = range(max(1, len(kept)), max(2, len(turns)))
        return make_conversation(name, kept, range(1, len(kept)), dict.fromkeys(lost, problem))
    if len(kept) < 2:
        return bad_conversation(name, BadRowError("no_reply", f"{where} has no turn after its first"))
    return make_conversation(name, kept, range(1, len(kept)))


def _visdial(file: Path, whole: dict[str, Any], images: Images) -> Conversations:
    """
    Two conversations a dialogue, as VisDial is evaluated: the image and then its rounds, each answer a reply; and the rounds,
    to which the image is the reply.
    """
    data = require(whole, "data", dict, str(file))
    split = str(whole.get("split", "train")).removesuffix("2018")
    questions, answers = (require(data, name, list, f"{file}: data") for name in ("questions", "answers"))
    for n, dialogue, image_id in visdial_dialogues(file, data):
        where = f"{file}: dialogue {n}"
        rounds = [
            visdial_round(r, questions, answers, f"{where}, round {k}")
            for k, r in enumerate(require(dialogue, "dialog", list, where), 1)
        ]
        names = [pattern.format(split=split, id=int(image_id)) for pattern in VISDIAL_NAMES]
        try:
            if not rounds:
                raise BadRowError("no_reply", f"{where} has no round")
            image = images.named(*names)
        except BadRowError as error:
            yield bad_conversation(image_id, error)
            continue
        yield from _visdial_pair(image_id, image, rounds)


def _visdial_pair(image_id: str, image: ImageId, rounds: list[list[str]]) -> Conversations:
    texts: list[Turn] = [[text] for a_round in rounds for text in a_round]
    answers, at = [], 0
    for a_round in rounds:
        answers += [at + 2] if len(a_round) == 2 else []
        at += len(a_round)
    yield make_conversation(f"{image_id}-answers", [[image], *texts], answers)
    yield make_conversation(f"{image_id}-image", [*texts, [image]], [len(texts)])


def _vist(file: Path, images: Images) -> Conversations:
    """
    Four conversations a story, as VIST is evaluated: the captions and photos so far and the next caption, to which its photo
    is the reply. A story that lacks a sentence is counted once.
    """
    for story, sentences in vist_stories(file).items():
        sentences = sorted(sentences)
        try:
            orders, texts = [order for order, *_ in sentences], [text for *_, text in sentences]
            if orders != list(range(VIST_LENGTH)) or not all(map(str.strip, texts)):
                raise BadRowError("bad_story", f"{file}: story {story} is incomplete")
            steps = [(text, images.named(photo)) for _, photo, text in sentences]
        except BadRowError as error:
            yield bad_conversation(story, error)
            continue
        for k in range(1, VIST_LENGTH):
            turns: list[Turn] = [[text, photo] for text, photo in steps[:k]]
            text, photo = steps[k]
            yield make_conversation(f"{story}-{k}", [*turns, [text], [photo]], [k + 1])


# Archives


def _archives(tars: list[Path], images: Images) -> Conversations:
    for tar in tars:
        yield from _archive(tar, images)


def _archive(tar: Path, images: Images) -> Conversations:
    """
    Members in order, each a turn and each after the first a reply. Those of a document follow each other: they share what
    comes before the first dot (`doc.0.txt`, `doc.1.jpg`), or else the folder (`doc/0.txt`, `doc/1.jpg`).
    """
    name, turns, problem = "", [], None  # type: tuple[str, list[Turn], BadRowError | None]
    documents = 0
    try:
        for archive, member in tar_members(tar):
            stem, ending = split_ending(member.name)
            base = os.path.basename(stem)
            if ending not in (*IMAGES, "txt") or not base or base.startswith(".") or member.isdir():
                continue
            key = _document_key(stem)
            if key != name:
                yield from _finished(f"{tar_stem(tar)}/{name}", turns, problem)
                name, turns, problem = key, [], None
                documents += 1
            try:
                turns.append([] if problem else _member_turn(read_member(archive, member), ending, images))
            except BadRowError as error:
                problem = error
    except BROKEN as error:
        problem = problem or broken_archive(tar, documents, name or None, error)
        logger.warning(str(problem))
        documents = max(documents, 1)
    yield from _finished(f"{tar_stem(tar)}/{name}", turns, problem)
    if not documents:
        yield bad_conversation(str(tar), BadRowError("no_sample", f"{tar} holds no picture and no .txt"))


def _document_key(stem: str) -> str:
    folder, base = os.path.split(stem)
    first, dot, _ = base.partition(".")
    return os.path.join(folder, first) if dot or not folder else folder


def _member_turn(data: bytes, ending: str, images: Images) -> Turn:
    if ending != "txt":
        return [images.add(data)]
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadRowError("not_utf8", f"a .txt is not UTF-8 ({error.reason} at byte {error.start})") from error
    if not text:
        raise BadRowError("empty_message", "a .txt is empty")
    return [text]


def _finished(name: str, turns: list[Turn], problem: BadRowError | None) -> Conversations:
    """A document of an archive; with a problem, what comes before it is kept and the rest counted once."""
    if not turns and problem is None:
        return
    if problem is not None:
        kept = [turn for turn in turns if turn]
        yield make_conversation(name, kept, range(1, len(kept)), {max(1, len(kept)): problem})
    elif len(turns) < 2:
        yield bad_conversation(name, BadRowError("no_reply", "a document of one member has no reply"))
    else:
        yield make_conversation(name, turns, range(1, len(turns)))
