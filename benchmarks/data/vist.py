"""VIST, stories in sequence: the fifth photo of a story, given four photos and five captions."""

from pathlib import Path

from benchmarks.schema import ABSENT, Dialogues, Missing
from train.json_files import BadDataError, find_file, list_files, read_json
from train.published import VIST_LENGTH, image_element, text_element, vist_stories

NOT_KEPT = "not in the manifest"


def read_vist(
    folder: str | Path, split: str = "val", manifest: str | Path | None = None, progress: bool = True
) -> Dialogues:
    """
    One item per complete story: captions and photos 1 to 4 and caption 5, then photo 5 out of the split's photos.

    Args:
        folder: holds `{split}.story-in-sequence.json` (or `sis/...`), and the photos as `{id}.jpg` or `.png` in
            `images/{split}/` or `images/`.
        manifest: a json list of photo ids, or a text file with one id per line, to which the pool is restricted. Many photos
            are no longer online, so that copies differ; [`write_manifest`] records the photos of one copy.

    Returns:
        Five turns of speaker `"A"`, `[text, image]` and last `[text]`, of the captions as tokenised by VIST (`text`,
        which FROMAGe takes), sorted by `worker_arranged_photo_order`. One pool for all, sorted: the photos present of
        all the split's stories, complete or not. Stories that are incomplete, need an absent photo or one outside the
        manifest, or have a blank caption are left out and counted; so are, in `missing.candidates`, photos of the
        manifest that are absent.

    Raises:
        BadDataError: a file is absent or of the wrong shape.
    """
    folder = Path(folder)
    name = f"{split}.story-in-sequence.json"
    path = find_file(folder, name, f"sis/{name}")
    stories = vist_stories(path, progress)
    photos = {photo for sentences in stories.values() for _, photo, _ in sentences}
    files = list_files(folder / "images" / split, folder / "images")
    present = {i: files[f] for i in sorted(photos) for f in (f"{i}.png", f"{i}.jpg") if f in files}
    missing = Missing(seen=len(stories))
    kept = photos if manifest is None else _kept(Path(manifest), photos, present, missing)
    images = {i: file for i, file in present.items() if i in kept}
    pool = {"text_ids": [], "image_ids": list(images)}
    dialogues = []
    for story_id, sentences in stories.items():
        ids = [photo for _, photo, _ in sorted(sentences)]
        captions = [text for _, _, text in sorted(sentences)]
        if [order for order, _, _ in sorted(sentences)] != list(range(VIST_LENGTH)):
            missing.add("story incomplete", story_id)
        elif not all(i in kept for i in ids):
            missing.add(NOT_KEPT, story_id)
        elif not all(i in images for i in ids):
            missing.add(ABSENT, f"{story_id} ({next(i for i in ids if i not in images)}.jpg)")
        elif not all(text.strip() for text in captions):
            missing.add("blank caption", story_id)
        else:
            turns = [
                {"speaker": "A", "elements": [text_element(c), image_element(i)]}
                for c, i in zip(captions, ids, strict=True)
            ]
            turns[-1]["elements"].pop()
            gold = {"text_ids": [], "image_ids": ids[-1:]}
            dialogues.append(
                {"dialogue_id": story_id, "turns": turns, "target_turn": VIST_LENGTH, "pool": pool, "gold": gold}
            )
    return Dialogues(dialogues, {}, images, missing)


def write_manifest(dialogues: Dialogues, path: str | Path) -> None:
    """Writes the ids of the photos in `dialogues`' pools, one per line, for [`read_vist`]'s `manifest`."""
    pools = {id(d["pool"]): d["pool"] for d in dialogues.dialogues}.values()
    ids = sorted({i for pool in pools for i in pool["image_ids"]})
    Path(path).write_text("".join(f"{i}\n" for i in ids), encoding="utf-8")


def _kept(path: Path, photos: set[str], present: dict[str, Path], missing: Missing) -> set[str]:
    """The manifest's ids; counts those without a photo."""
    if not path.is_file():
        raise BadDataError(f"{path}: no such manifest")
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip()[:1] in ("[", "{"):
        given = read_json(path)
        if not isinstance(given, list) or not all(type(i) in (str, int) for i in given):
            raise BadDataError(f"{path}: expected a json list of photo ids, or one id per line")
        ids = {str(i) for i in given}
    else:
        ids = {line.strip() for line in text.splitlines() if line.strip()}
    if not ids:
        raise BadDataError(f"{path}: the manifest names no photo")
    missing.candidates = Missing(seen=len(ids))
    for i in sorted(ids):
        if i not in photos:
            missing.candidates.add("no photo of this split's stories", i)
        elif i not in present:
            missing.candidates.add(ABSENT, f"{i}.jpg")
    return ids
