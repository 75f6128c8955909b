"""People's own conversations, as documents: every layout, on files that a test makes, and what is wrong with them counted."""

import json
import tarfile
from collections import Counter

import datasets
import pytest

from tests.benchmarks.layouts import media, mmdialog, sentence, text, visdial
from tests.conftest import picture
from tests.train.test_data import add, png
from train.dialogue_files import load_dialogues, load_rows
from train.documents import CONTEXT, mixed
from train.rows import FEATURES


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def message(role, *parts):
    content = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in parts]
    return {"role": role, "content": content}


def image_part(image=None, **keys):
    return {"type": "image", **({} if image is None else {"image": image}), **keys}


def plain(document):
    """A document as what a reader expects: turns as text, images in brackets."""
    turns = [" ".join(e if isinstance(e, str) else f"[{e.id}]" for e in turn) for turn in document["context"]]
    return document["id"], turns, document["text"], document["image"]


def reasons(documents):
    """Reason counts of the bad ones, and the good ones."""
    rows = [documents[i] for i in range(len(documents))]
    bad = Counter(row["problem"].partition(":")[0] for row in rows if "problem" in row)
    return dict(bad), [plain(row) for row in rows if "problem" not in row]


CHAT = {
    "id": "c", "images": ["1.png", "2.png"],
    "messages": [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "<image>\nwhat is it?"},
        {"role": "assistant", "content": "a cat"}, {"role": "user", "content": "show me another"},
        {"role": "assistant", "content": "here: <image>"},
    ],
}  # fmt: skip
EXPECTED = [
    ("c-2", ["be kind", "[{0}] what is it?"], "a cat", None),
    ("c-4", ["be kind", "[{0}] what is it?", "a cat", "show me another"], "here:", "{1}"),
]


def expected(first, second):
    name = {"{0}": first, "{1}": second, None: None}
    return [(i, [turn.format(first) for turn in turns], words, name[image]) for i, turns, words, image in EXPECTED]


def test_chat_messages_as_the_ecosystem_writes_them(tmp_path):
    for i in (1, 2):
        picture(i).save(tmp_path / f"{i}.png")
    parts = [
        message("system", "be kind"), message("user", image_part(), "what is it?"), message("assistant", "a cat"),
        message("user", "show me another"), message("assistant", "here:", image_part()),
    ]  # fmt: skip
    by_index = json.loads(json.dumps(parts))
    by_index[1]["content"][0] = {"type": "image", "index": 0, "text": None}
    by_index[4]["content"][1] = {"type": "image", "index": 1, "text": None}
    by_path = json.loads(json.dumps(parts))
    by_path[1]["content"][0], by_path[4]["content"][1] = image_part("1.png"), {"type": "image", "path": "2.png"}
    own = [
        {"from": {"assistant": "gpt", "user": "human"}.get(m["role"], m["role"]), "value": m["content"]}
        for m in CHAT["messages"]
    ]
    chats = [
        CHAT, CHAT | {"messages": parts}, CHAT | {"messages": by_index}, {"id": "c", "messages": by_path},
        {"id": "c", "images": CHAT["images"], "conversations": own},
    ]  # fmt: skip
    for n, chat in enumerate(chats):
        path = lines(tmp_path / f"{n}.jsonl", [chat])
        documents = load_dialogues(path)
        assert reasons(documents) == ({}, expected("1.png", "2.png")), n
        assert documents[0]["images"]["1.png"]["image"]["path"] == str(tmp_path / "1.png")
    (tmp_path / "all.json").write_text(json.dumps(chats[:1]))
    assert reasons(load_dialogues(tmp_path / "all.json")) == ({}, expected("1.png", "2.png"))
    (tmp_path / "one.json").write_text(json.dumps(CHAT, indent=1))
    assert reasons(load_dialogues(tmp_path / "one.json")) == ({}, expected("1.png", "2.png"))


def test_a_data_set_with_messages_and_images(tmp_path):
    picture(1).save(tmp_path / "1.png"), picture(2).save(tmp_path / "2.png")
    row = {**CHAT, "images": [str(tmp_path / "1.png"), str(tmp_path / "2.png")]}
    data = datasets.Dataset.from_list([row]).cast_column("images", datasets.List(datasets.Image()))
    data = data.map(lambda row: row)  # encodes the pictures' bytes
    embedded = data.with_format("arrow").map(datasets.table.embed_table_storage, batched=True).with_format(None)
    embedded.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    embedded.to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    embedded.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=embedded).save_to_disk(tmp_path / "splits")
    for path in ("hub", "saved", "splits", "hub/data/train-00000-of-00001.parquet"):
        documents = load_dialogues(tmp_path / path)
        names = documents.images["id"][:]
        assert reasons(documents) == ({}, expected(*names)), path
        assert documents.images[0]["image"]["bytes"] == (tmp_path / "1.png").read_bytes()
    with pytest.raises(ValueError, match=r"neither|no path here"):
        load_dialogues("nobody/nothing")


def test_every_kind_of_bad_chat_is_counted_by_its_line(tmp_path):
    picture(1).save(tmp_path / "1.png")
    user, assistant = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
    bad = {
        "not_json": '{"messages": [',
        "no_messages": {"text": "x"},
        "unknown_role": {"messages": [{"role": "tool", "content": "x"}, assistant]},
        "empty_message": {"messages": [{"role": "user", "content": " "}, assistant]},
        "bad_message": {"messages": [user, {"role": "assistant", "content": 5}]},
        "image_missing": {"messages": [{"role": "user", "content": "<image>"}, assistant]},
        "images_unused": {"messages": [user, assistant], "images": ["1.png"]},
        "no_context": {"messages": [assistant, user]},
        "no_reply": {"messages": [user, user]},
        "duplicate_id": {"id": "good", "messages": [user, assistant]},
        "outside_folder": {"messages": [message("user", image_part("../1.png")), assistant]},
        "url_image": {"messages": [message("user", {"type": "image_url", "image_url": {"url": "http://x/1.png"}}), assistant]},
        "bad_image": {"messages": [message("user", image_part([1])), assistant]},
        "half_character": '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "x"}]}',
        "not_utf8": "",
    }  # fmt: skip
    good = {"id": "good", "messages": [user, assistant]}
    path = lines(tmp_path / "chats.jsonl", [good, *bad.values()])
    path.write_bytes(path.read_bytes() + b'{"messages": "\xe9"}')
    documents = load_dialogues(path)
    counts, kept = reasons(documents)
    assert counts == dict.fromkeys(bad, 1) and kept == [("good", ["hi"], "ho", None)]
    rows = [documents[i] for i in range(len(documents))]
    named = {row["problem"].partition(":")[0]: row["id"] for row in rows if "problem" in row}
    for line, reason in enumerate(bad, 2):
        assert reason == "duplicate_id" or named[reason].endswith(f"chats.jsonl, line {line}"), reason


def test_what_stands_before_a_bad_message_is_kept_and_every_later_reply_counted(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": ""}]
    turns += [
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
    ]
    counts, kept = reasons(load_dialogues(lines(tmp_path / "c.jsonl", [{"id": 7, "messages": turns}])))
    assert counts == {"empty_message": 2} and kept == [("7-1", ["a"], "b", None)]


def test_ten_thousand_turns(tmp_path, caplog):
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"turn {i}"} for i in range(10_000)]
    documents = load_dialogues(lines(tmp_path / "c.jsonl", [{"id": "long", "messages": turns}]))
    assert len(documents) == 5_000 and documents[0]["context"] == [["turn 0"]]
    last = documents[4_999]
    assert last["text"] == "turn 9999" and last["context"] == [[f"turn {i}"] for i in range(9_999 - CONTEXT, 9_999)]
    assert f"replies have more than {CONTEXT} turns before them" in caplog.text


def test_mmdialogs_training_file(tmp_path):
    import shutil

    whole = {"conversation_id": 5, "conversation": [
        {"turn": [media("-12"), text("look")]}, {"turn": [text("nice"), media("3")]}, {"turn": [text("thanks")]}]}  # fmt: skip
    cut = {"conversation_id": 6, "conversation": [*whole["conversation"][:2], {"turn": []}, {"turn": [text("lost")]}]}
    folder = mmdialog(
        tmp_path / "m", [whole, cut, {"conversation_id": 7, "conversation": whole["conversation"][:1]}], "train"
    )
    for path in (folder, folder / "train" / "conversations.json"):
        images = None if path == folder else folder / "train"
        counts, kept = reasons(load_dialogues(path, images))
        name = (lambda key: f"train/{key}.jpg") if path == folder else "{}.jpg".format
        assert counts == {"empty_message": 2, "no_reply": 1}
        first = [f"[{name('-12')}] look"]
        assert kept == [
            ("5-1", first, "nice", name("3")), ("5-2", [*first, f"nice [{name('3')}]"], "thanks", None),
            ("6-1", first, "nice", name("3")),
        ]  # fmt: skip
    shutil.rmtree(folder / "train")
    by_line = mmdialog(tmp_path / "m", [whole], "train", lines=True)
    with (by_line / "train" / "conversations.json").open("a") as file:
        file.write('\n{"conversation_id": 8')
    counts, kept = reasons(load_dialogues(by_line))
    assert counts == {"not_json": 1} and len(kept) == 2


def test_visdials_training_file(tmp_path):
    def change(file):
        file["data"]["dialogs"][1]["dialog"] = []

    folder = visdial(tmp_path / "v", "train", images=(7, 8), change=change, dense=False)
    (folder / "VisualDialog_train2018").rename(folder / "train2014")
    image = folder / "train2014" / "COCO_train2014_000000000007.png"
    (folder / "train2014" / "VisualDialog_train2018_000000000007.jpg").rename(image)
    counts, kept = reasons(load_dialogues(folder))
    name = "train2014/COCO_train2014_000000000007.png"
    rounds = ["what is it", "a cat", "is it old", "yes, very"]
    assert counts == {"no_reply": 1}
    assert kept == [
        ("7-answers-2", [f"[{name}]", rounds[0]], "a cat", None),
        ("7-answers-4", [f"[{name}]", *rounds[:3]], "yes, very", None),
        ("7-image", rounds, None, name),
    ]


def test_vists_training_file(tmp_path):
    whole = [sentence("s1", i, f"{10 + i}") for i in (3, 0, 4, 2, 1)]
    lines(tmp_path / "sis" / "train.story-in-sequence.json", [{"annotations": [*whole, sentence("s2", 0, "20")]}])
    (tmp_path / "images" / "train").mkdir(parents=True)
    for i in range(10, 15):
        (tmp_path / "images" / "train" / f"{i}.jpeg").touch()
    counts, kept = reasons(load_dialogues(tmp_path))
    assert counts == {"bad_story": 1} and [row[0] for row in kept] == ["s1-1", "s1-2", "s1-3", "s1-4"]
    assert kept[1] == (
        "s1-2", ["text 0 . [images/train/10.jpeg]", "text 1 . [images/train/11.jpeg]", "text 2 ."], None,
        "images/train/12.jpeg",
    )  # fmt: skip


def test_archives_of_texts_and_pictures_in_order(tmp_path):
    with tarfile.open(tmp_path / "0.tgz", "w:gz") as tar:
        (
            add(tar, "a.0.txt", b"look"),
            add(tar, "a.1.png", png(1)),
            add(tar, "a.2.TXT", b"nice"),
            add(tar, "a.json", b"{}"),
        )
        add(tar, "b/0.png", png(2)), add(tar, "b/1.txt", b"a fox"), add(tar, "c.txt", b"alone")
        (
            add(tar, "d.0.txt", b"one"),
            add(tar, "d.1.txt", b"two"),
            add(tar, "d.2.txt", b"\xe9"),
            add(tar, "d.3.txt", b"x"),
        )
    (tmp_path / "1.tar").touch()
    documents = load_dialogues(tmp_path)
    counts, kept = reasons(documents)
    first, second = documents.images["id"][:]
    assert counts == {"no_reply": 1, "not_utf8": 1, "broken_archive": 1}
    assert kept == [
        ("0/a-1", ["look"], None, first), ("0/a-2", ["look", f"[{first}]"], "nice", None),
        ("0/b", [f"[{second}]"], "a fox", None), ("0/d-1", ["one"], "two", None),
    ]  # fmt: skip
    assert documents[0]["images"][first]["image"]["bytes"] == png(1)


def test_what_is_no_layout_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"(no known layout|does not exist): expected one of(.|\n)*messages"):
            load_dialogues(path)
    lines(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="no conversation in"):
        load_dialogues(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match="is not a folder"):
        load_dialogues(tmp_path / "empty.jsonl", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--train_data is missing"):
        load_rows(None, None)


def test_several_archives_of_pairs_are_read_one_after_another(tmp_path):
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            add(tar, f"{number}.png", png(number))
            add(tar, f"{number}.txt", f"caption {number}".encode())
    pairs, documents = load_rows([str(tmp_path / "0.tar"), str(tmp_path / "1.tar")], None)
    assert documents is None and [row["captions"] for row in pairs] == [["caption 0"], ["caption 1"]]


def test_the_miniature_written_out_reads_back_as_the_same_documents(tmp_path):
    from train.miniature.dialogues import chat_messages, interleaved
    from train.miniature.prepare import training_documents, training_pairs
    from train.miniature.world import splits

    scenes = splits()["train"][:400]
    pairs = training_pairs(scenes, 0)
    built_in = training_documents(scenes, pairs, 0, n=200)
    (tmp_path / "pictures").mkdir()
    for row in pairs:
        (tmp_path / "pictures" / f"{row['id']}.png").write_bytes(row["image"]["bytes"])
    made = interleaved(scenes, 200, 0)
    files = {image_id: f"pictures/{scene.key}.png" for image_id, scene in made.images.items()}
    chats = [chat_messages(dialogue, files) for dialogue in made.dialogues]
    documents = load_dialogues(lines(tmp_path / "chats.jsonl", chats))
    assert len(documents) == len(built_in) >= 200
    strip = {f"pictures/{name}.png": name for name in pairs["id"]} | {None: None}
    for i in range(len(documents)):
        own, other = documents[i], built_in[i]
        context = [[e if isinstance(e, str) else (strip[e.id],) for e in turn] for turn in own["context"]]
        assert (own["id"], context, own["text"], strip[own["image"]]) == (
            other["id"], other["context"], other["text"], other["image"]
        )  # fmt: skip
        for (path, row), (name, expected_row) in zip(own["images"].items(), other["images"].items(), strict=True):
            assert strip[path] == name
            assert (tmp_path / path).read_bytes() == expected_row["image"]["bytes"]
            assert row["image"]["path"] == str(tmp_path / path)
        assert documents.kind(i) == built_in.kind(i)


def test_documents_alone_give_their_pictures_with_words_as_pairs(tmp_path):
    picture(1).save(tmp_path / "1.png"), picture(2).save(tmp_path / "2.png")
    pairs, documents = load_rows(None, str(lines(tmp_path / "c.jsonl", [CHAT])))
    assert pairs.features == FEATURES and len(documents) == 2
    assert [(row["id"], row["captions"]) for row in pairs] == [("1.png", ["what is it?"]), ("2.png", ["here:"])]
    words = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(ValueError, match="no turn of these dialogues has an image beside words"):
        load_rows(None, str(lines(tmp_path / "words.jsonl", [words])))


def test_a_share_repeats_what_is_too_few(tmp_path):
    chats = [
        {"id": i, "messages": [{"role": r, "content": f"{r} {i}"} for r in ("user", "assistant")]} for i in range(6)
    ]
    documents = load_dialogues(lines(tmp_path / "c.jsonl", chats))
    pairs = list(range(10))
    for share, counts in ((None, (10, 6)), (0.5, (10, 10)), (0.2, (24, 6)), (0.9, (10, 90))):
        rows, groups = mixed(pairs, documents, share)
        assert len(rows) == len(groups) == sum(counts) and groups.count(0) == counts[0], share
        names = Counter(row["id"] for row in (rows[i] for i in range(counts[0], len(rows))))
        assert max(names.values()) - min(names.values()) <= 1 and len(names) == 6
        assert {rows[i] for i in range(counts[0])} == set(pairs)
    for share in (0, 1, -1):
        with pytest.raises(ValueError, match="expected a number between 0 and 1"):
            mixed(pairs, documents, share)


def test_a_reply_is_predicted_by_the_language_model_after_its_context(fresh, tmp_path):
    import torch
    import torch.nn.functional as F

    from train.collate import PairCollator, no_captions

    picture(1).save(tmp_path / "1.png"), picture(2).save(tmp_path / "2.png")
    words = [message("user", "hi"), message("assistant", "ho")]
    document = load_dialogues(lines(tmp_path / "c.jsonl", [CHAT, {"messages": words}]))
    model = fresh()
    collate = PairCollator(model.processor)
    collate.predicted = "after images"
    batch = collate([document[i] for i in range(3)])
    kept = {name: batch[name] for name in ("captions", "contexts", "targets", "images")}
    outputs = model(**kept)
    # By hand, row by row: log p(token | what stands before it), over the tokens of the two texts after a picture.
    features, total, count = model.encode_images(model.processor.pixels([picture(1)]))[0], 0.0, 0
    for later, reply in (([], "a cat"), (["a cat", "show me another"], "here:")):
        before = ["be kind", {"content": [image_part(picture(1)), {"type": "text", "text": "what is it?"}]}, *later]
        ids = model.processor.contexts([before], end_with_ret=False)["input_ids"][0].tolist()
        end = model.processor.tokenizer("\n" + reply, add_special_tokens=False)["input_ids"] + [2]
        row = torch.tensor([ids + end])
        logits = model.language_model(inputs_embeds=model.input_embeddings(row, features)).logits[0, len(ids) : -1]
        total, count = total + F.cross_entropy(logits, row[0, len(ids) + 1 :], reduction="sum"), count + len(end) - 1
    assert torch.allclose(outputs.loss_cap, total / count, atol=1e-5)
    (gradient,) = torch.autograd.grad(outputs.loss_cap, model.W_i2t.weight, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(total / count, model.W_i2t.weight)
    assert expected_gradient.abs().max() > 0 and torch.allclose(gradient, expected_gradient, atol=1e-5)
    empty = model(captions=no_captions(model.device), images=kept["images"])  # what a process without any has
    empty.loss.backward()
    assert empty.loss_cap == 0 and not model.W_i2t.weight.grad.any()


def chatting(folder):
    """Towers, photos with captions and chats of two replies, as flags; the second shows pictures, and is half of words."""
    from tests.tiny import make_towers

    towers, chats, rows = make_towers(folder / "towers"), [], []
    for i in range(12):
        picture(i).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "caption": f"photo {'abcdefghijkl'[i] * 3}"})
        photo = image_part(f"{i}.png")
        said = [message("user", f"say {i}"), message("assistant", f"word {i}" if i % 3 else photo)]
        shown = [message("user", f"and {i}", photo), message("assistant", "yes" if i % 2 else photo)]
        chats.append({"id": i, "messages": [*said, *shown]})
    lines(folder / "metadata.jsonl", rows)
    return [
        f"--text_model={towers[0]}", f"--clip_model={towers[1]}", f"--dialogues={lines(folder / 'chats.jsonl', chats)}",
        "--max_steps=10", "--per_device_train_batch_size=4", "--save_steps=5", "--lr_scheduler_type=cosine", "--use_cpu=true",
        "--disable_tqdm=true", "--logging_steps=1", "--evaluate_pairs=0", "--learning_rate=0.01", "--warmup_steps=0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        ("--cca_widths=3", "--cca_ridges=0.1", "--cca_powers=1", "--state_noise=0.3", "--negatives_bank=8"),
        ("--alignment=paper", "--train_data={}", "--dialogue_share=0.7", "--schedule=alternating"),
    ],
    ids=["alone", "mixed"],
)
def test_a_run_on_dialogues_resumes_as_if_never_interrupted(tmp_path, more):
    import torch
    from safetensors.torch import load_file

    from train.run import main

    flags = [*chatting(tmp_path), *(flag.format(tmp_path) for flag in more)]
    whole = main([*flags, f"--output_dir={tmp_path}/whole"])
    at = f"--resume_from_checkpoint={tmp_path}/whole/checkpoint-5"
    resumed = main([*flags, at, f"--output_dir={tmp_path}/resumed"])
    first, second = (load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("whole", "resumed"))
    begun = load_file(tmp_path / "whole" / "checkpoint-5" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(begun["W_t2m.weight"], first["W_t2m.weight"])
    assert whole["pairs_seen"] == resumed["pairs_seen"] == 40
    kinds = [tuple(sorted(name for name in log if name.startswith("loss_"))) for log in whole["log"][:10]]
    assert len(set(kinds)) > 1, kinds  # batches of several kinds were seen


def test_replies_are_targets_of_captioning_where_it_is_trained(tmp_path):
    from train.run import main

    flags = [*chatting(tmp_path), "--alignment=paper", f"--train_data={tmp_path}", "--save_strategy=no"]
    captioned = {}
    for name, more in {
        "on": (), "off": ("--dialogue_captioning=false",), "no images": ("--schedule=matching",), "lora": ("--lora_rank=1",),
    }.items():  # fmt: skip
        log = main([*flags, *more, f"--output_dir={tmp_path}/out"])["log"][:9]  # an epoch: three batches of each kind
        captioned[name] = sum("loss_cap" in each for each in log)
    assert captioned == {"on": 6, "off": 3, "no images": 0, "lora": 9}
    with pytest.raises(ValueError, match=r"--schedule captioning trains eq\. 1-2 alone"):
        main([*flags, "--schedule=captioning", f"--output_dir={tmp_path}/out"])


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_trains_on_ones_own_chats_and_counts_what_is_bad(tmp_path, cached):
    from tests.tiny import make_towers
    from train.run import main

    towers, chats = make_towers(tmp_path / "towers"), []
    for i in range(8):
        picture(i).save(tmp_path / f"{i}.png")
        words = [message("user", f"say {i}"), message("assistant", f"word {i}")]
        shows = [message("user", "and", image_part(f"{i}.png")), message("assistant", image_part(f"{i}.png"))]
        chats.append({"messages": [*words, *shows]})
    (tmp_path / "7.png").write_bytes(b"broken")
    path = lines(tmp_path / "chats.jsonl", [*chats, "{", {"messages": []}])
    summary = main([
        f"--text_model={towers[0]}", f"--clip_model={towers[1]}", f"--dialogues={path}", f"--output_dir={tmp_path}/out",
        "--num_train_epochs=1", "--per_device_train_batch_size=1", "--save_strategy=no", "--use_cpu=true",
        "--disable_tqdm=true", "--alignment=paper", "--evaluate_pairs=0", "--max_bad_share=0.5", f"--cache_features={cached}",
    ])  # fmt: skip
    # 8 pairs, 8 replies of words, 8 of a picture, and 2 lines that are none, a batch each.
    lost = {"undecodable": 2, "not_json": 1, "no_messages": 1}
    if cached:  # the broken picture is counted where it is read, and its document where it is needed
        lost = {"undecodable": 1, "missing": 1, "not_json": 1, "no_messages": 1}
    assert summary["skipped"] == lost and summary["steps"] == (25 if cached else 26)
    assert json.loads((tmp_path / "out" / "train_results.json").read_text())["skipped"] == lost


def test_chats_whose_pictures_are_all_missing_are_named(tmp_path):
    from tests.tiny import make_towers
    from train.run import main

    towers, shown = make_towers(tmp_path / "towers"), message("user", "look", image_part("absent.png"))
    path = lines(tmp_path / "chats.jsonl", [{"messages": [shown, message("assistant", "nice")]}] * 3)
    with pytest.raises(ValueError, match=r"chats\.jsonl holds no usable pair(.|\n)*missing: 'absent\.png'"):
        main([
            f"--text_model={towers[0]}", f"--clip_model={towers[1]}", f"--dialogues={path}", "--use_cpu=true",
            f"--output_dir={tmp_path}/out", "--disable_tqdm=true",
        ])  # fmt: skip
