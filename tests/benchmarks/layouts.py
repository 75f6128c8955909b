"""Small files laid out as the data sets are published, and the sample photographs under their names."""

import hashlib
import json
import shutil


def dump(path, value, lines=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (
        "\n".join(json.dumps(v, ensure_ascii=False) for v in value) if lines else json.dumps(value, ensure_ascii=False)
    )
    path.write_text(text, encoding="utf-8")
    return path


def touch(folder, *names):
    """Files that are not images: a reader that opened one would fail."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def stand_ins(samples, folder, names):
    """The sample photographs under other names."""
    folder.mkdir(parents=True, exist_ok=True)
    photos = sorted((samples / "photos" / "images").glob("*.jpg"))
    for i, name in enumerate(names):
        shutil.copy(photos[i % len(photos)], folder / name)


def turn_texts(dialogue):
    return [(t["speaker"], *(e["text"] or "/" + e["image_id"] for e in t["elements"])) for t in dialogue["turns"]]


def visdial_name(image_id, split="val"):
    return f"VisualDialog_{split}2018_{image_id:012d}.jpg"


def visdial(folder, split="val", images=(7, 8), change=None, dense=True):
    rounds = [
        {"question": 1, "answer": 0, "gt_index": 1, "answer_options": [2, 0, 3]},
        {"question": 0, "answer": 3, "gt_index": 2, "answer_options": [1, 0, 3]},
    ]
    content = {"version": "1.0", "split": f"{split}2018", "data": {
        "questions": ["is it old", "what is it"], "answers": ["a cat", "no", "a dog", "yes, very"],
        "dialogs": [{"image_id": i, "caption": f"caption {i}", "dialog": json.loads(json.dumps(rounds))} for i in images],
    }}  # fmt: skip
    if change:
        change(content)
    dump(folder / f"visdial_1.0_{split}.json", content)
    touch(folder / f"VisualDialog_{split}2018", *(visdial_name(i, split) for i in images))
    if dense:
        rows = [{"image_id": 8, "round_id": 2, "gt_relevance": [0.5, 0, 1.0]}]
        dump(folder / f"visdial_1.0_{split}_dense_annotations.json", rows)
    return folder


def text(value):
    return {"__TEXT__": value}


def media(value):
    return {"__MEDIA__": value}


def text_id(value):
    return "t" + hashlib.sha1(value.encode()).hexdigest()[:16]


CONVERSATION = {
    "conversation_id": 5,
    "conversation": [
        {"turn": [media("-12"), text("look")]},
        {"turn": [text("nice"), media("3"), media("-4"), text("more")]},
        {"turn": [text("thanks")]},
    ],
    "negative_candidate_media_keys": ["9", "-8"],
    "negative_candidate_texts": ["thanks", "no", "no"],
}


KEYS = ("-12", "3", "-4", "9", "-8")


def mmdialog(folder, conversations=(CONVERSATION,), split="test", lines=False, keys=KEYS):
    dump(folder / split / "conversations.json", list(conversations), lines)
    touch(folder / split, *(f"{key}.jpg" for key in keys))
    return folder


def sentence(story, order, photo, words="text"):
    return [{"story_id": story, "worker_arranged_photo_order": order, "photo_flickr_id": photo,
             "text": f"{words} {order} .", "original_text": "Not this one."}]  # fmt: skip


def vist(folder, annotations=None, where="", images="images/val", suffix=".jpg"):
    whole = [sentence("s1", i, f"{10 + i}") for i in (3, 0, 4, 2, 1)]  # not in order in the file
    second = [sentence("s2", i, f"{p}") for i, p in enumerate((20, 11, 22, 23, 24))]
    broken = [sentence("s3", i, f"{30 + i}") for i in range(4)]
    content = {"images": [], "albums": [], "annotations": annotations or [*whole, *second, *broken]}
    dump(folder / where / "val.story-in-sequence.json", content)
    touch(folder / images, *(f"{i}{suffix}" for i in (*range(10, 15), 20, *range(22, 25), *range(30, 34))))
    return folder


NAMES = {"questions": "v2_OpenEnded_mscoco_{}_questions.json", "annotations": "v2_mscoco_{}_annotations.json"}


def vqav2(folder, split="val2014", official=True, questions=None, annotations=None, images=None):
    asked = [{"question_id": 100 + i, "image_id": 5 + i, "question": f"what is {i}?"} for i in range(3)]
    annotated = [{"question_id": 100 + i, "image_id": 5 + i, "question_type": "what is", "answer_type": "other",
             "multiple_choice_answer": "cat",
             "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(["cat", "dog"])]}
            for i in (2, 0)]  # fmt: skip
    for field, items in (("questions", questions or asked), ("annotations", annotations or annotated)):
        if field == "questions" or not split.startswith("test"):
            name = NAMES[field].format(split) if official else f"{field}.json"
            dump(folder / name, {"data_subtype": split, field: items})
    coco = split.replace("-dev", "")
    touch(folder / (images if images is not None else coco), *(f"COCO_{coco}_{i:012d}.jpg" for i in (5, 6, 7)))
    return folder
