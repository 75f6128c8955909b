"""`train/run.py` as a user calls it: a yaml, flags, both, and what it says when something is missing."""

import io
import json
import tarfile

import pytest
import torch
import yaml

from modeling_unimur import UniMuRConfig
from tests.conftest import picture
from tests.tiny import make_towers
from train.arguments import CONFIGS, parse
from train.run import main
from train.training_data import spare_cores

REQUIRED = {
    "dtype": "bfloat16",
    "learning_rate": 2e-4,
    "warmup_steps": 100,
    "num_train_epochs": 5,
    "lambda1": 1,
    "lambda2": 10,
}


@pytest.fixture
def folder(tmp_path):
    make_towers(tmp_path / "towers")
    (tmp_path / "photos").mkdir()
    rows = []
    for i in range(12):
        picture(i).save(tmp_path / "photos" / f"{i}.png")
        rows.append(
            json.dumps({"file_name": f"{i}.png", "captions": [f"number {i} is {'abcdefghijkl'[i] * 4}", "other"]})
        )
    (tmp_path / "photos" / "metadata.jsonl").write_text("\n".join(rows))
    return tmp_path


def base(folder):
    return {
        "text_model": str(folder / "towers" / "text"), "clip_model": str(folder / "towers" / "clip"),
        "train_data": str(folder / "photos"), "output_dir": str(folder / "out"), "caption": "first", "max_steps": 250,
        "learning_rate": 1e-2, "warmup_steps": 5, "per_device_train_batch_size": 12, "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "lambda2": 0.0, "alignment": "paper",
    }  # fmt: skip


@pytest.mark.parametrize("size", ["1.3b", "6.7b", "13b"])
def test_the_papers_configs_parse_to_the_papers_settings(size):
    model, _, args = parse([str(CONFIGS / f"opt-{size}.yaml"), "--config", str(CONFIGS / "paper.yaml")])
    assert model.text_model == f"facebook/opt-{size}" and model.clip_model == "openai/clip-vit-large-patch14"
    for name, value in REQUIRED.items():
        assert getattr(model, name, None) == value or getattr(args, name, None) == value, name
    assert args.optim.startswith("adamw") and args.weight_decay == 0 and args.schedule == "joint"


def test_without_arguments_it_is_the_miniature_and_flags_win():
    assert parse([])[1].source == "miniature"
    model, _, args = parse(["--config", str(CONFIGS / "miniature.yaml"), "--lambda2", "3", "--seed=5"])
    assert (model.lambda2, args.seed) == (3.0, 5)


def test_model_defaults_are_the_configs():
    model = parse(["--train_data", "x", "--alignment", "paper"])[0]
    config = UniMuRConfig()
    for name, value in model.config_fields().items():
        assert getattr(config, name) == value, name


def test_a_yaml_trains_on_ones_own_images(folder, capsys):
    (folder / "mine.yaml").write_text(yaml.safe_dump(base(folder)))
    summary = main([str(folder / "mine.yaml"), "--seed=1"])
    assert summary["caption_to_image"]["R@1"] >= 90 and summary["caption_to_image"]["pool"] == 12
    assert "caption to image, on training pairs:\n  R@1: " in capsys.readouterr().out
    assert json.loads((folder / "out" / "train_results.json").read_text())["steps"] == 250


def test_cached_features_train_to_the_same_weights(folder):
    from safetensors.torch import load_file

    settings = {**base(folder), "max_steps": 5, "evaluate_pairs": 0}
    weights = []
    for cached in (True, False):
        (folder / "c.yaml").write_text(yaml.safe_dump({**settings, "cache_features": cached}))
        weights.append(load_file(f"{main([str(folder / 'c.yaml')])['checkpoint']}/model.safetensors"))
    assert all((weights[0][n] - weights[1][n]).abs().max() < 1e-5 for n in weights[0])


def write_shard(path, captions):
    with tarfile.open(path, "w") as tar:
        for i, caption in enumerate(captions):
            buffer = io.BytesIO()
            picture(i).save(buffer, "PNG")
            for name, data in ((f"{i}.png", buffer.getvalue()), (f"{i}.txt", caption.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_streamed_shards_train(folder):
    write_shard(folder / "0.tar", ["" if i == 3 else "words" for i in range(8)])
    settings = {**base(folder), "train_data": str(folder / "0.tar"), "max_steps": -1, "per_device_train_batch_size": 4}
    settings |= {"max_bad_share": 0.2, "num_train_epochs": 2}
    (folder / "s.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match="give --max_steps"):
        main([str(folder / "s.yaml")])
    (folder / "0_stats.json").write_text('{"successes": 8}')
    summary = main([str(folder / "s.yaml")])
    assert summary["steps"] == 4 and summary["pairs_seen"] == 16 and summary["skipped"] == {"empty_caption": 2}


def test_streamed_shards_are_mixed_anew_in_every_epoch(folder, monkeypatch):
    from train.collate import PairCollator

    for shard in range(2):
        write_shard(folder / f"mixed-{shard}.tar", ["words"] * 8)
    seen, collate = [], PairCollator.__call__
    monkeypatch.setattr(
        PairCollator, "__call__", lambda s, rows: seen.extend(r["id"] for r in rows) or collate(s, rows)
    )
    settings = {**base(folder), "train_data": str(folder / "mixed-*.tar"), "evaluate_pairs": 0, "max_steps": 8}
    orders = []
    for seed in (0, 0, 1):
        (folder / "m.yaml").write_text(yaml.safe_dump(settings | {"per_device_train_batch_size": 4, "seed": seed}))
        main([str(folder / "m.yaml")])
        orders.append([tuple(seen[1:17]), tuple(seen[17:33])])  # the first was read beforehand
        seen.clear()
    assert orders[0] == orders[1] and len(set(orders[0] + orders[2])) == 4
    assert all(sorted(order) == sorted(orders[0][0]) for order in orders[0] + orders[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_data": None}, "--train_data is missing"),
        ({"text_model": None}, "--text_model is missing"),
        ({"interleaved": True}, "--interleaved is of the miniature"),
        ({"train_data": "nowhere"}, "does not exist"),
    ],
)
def test_what_is_missing_is_said(folder, change, message):
    settings = {k: v for k, v in (base(folder) | change).items() if v is not None}
    (folder / "b.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=message):
        main([str(folder / "b.yaml")])


@pytest.mark.parametrize(
    ("device", "cores", "processes", "workers"), [("cpu", 8, 1, 0), ("cuda", 16, 4, 3), ("cuda", 2, 4, 1)]
)
def test_cores_that_the_towers_leave_decode(monkeypatch, device, cores, processes, workers):
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    assert spare_cores(torch.device(device), processes) == workers


def test_a_gguf_trains_and_is_dequantised_once(folder, monkeypatch):
    from modeling_unimur import UniMuRModel
    from tests.gguf_file import write_gguf
    from train import dequantise

    write_gguf(folder / "tiny.gguf")
    settings = {**base(folder), "text_model": str(folder / "tiny.gguf"), "max_steps": 2, "evaluate_pairs": 0}
    settings |= {"ret_prompt": "\nGist", "ret_init": ":"}
    (folder / "g.yaml").write_text(yaml.safe_dump(settings))
    model = UniMuRModel.from_pretrained(main([str(folder / "g.yaml")])["checkpoint"])
    assert model.language_model.dtype == torch.bfloat16
    assert model.config.text_model_name_or_path == str(folder / "out" / "text_model")
    # No BOS is put by this tokenizer, and it names no length of its own.
    assert model.processor.contexts(["b"])["input_ids"].shape[1] == 1 + len("\nGist") + 1
    assert model.processor.max_length == 128 and model.config.ret_prompt == "\nGist"
    monkeypatch.setattr(dequantise, "check", lambda _: pytest.fail("dequantised again"))
    main([str(folder / "g.yaml"), "--max_steps=1"])
    # A cache by name serves several runs.
    main([str(folder / "g.yaml"), "--max_steps=1", f"--output_dir={folder / 'other'}",
          f"--text_model_dir={folder / 'out' / 'text_model'}"])  # fmt: skip
    assert not (folder / "other" / "text_model").exists()


@pytest.mark.parametrize("given", [(), ("text_model",), ("clip_model",), ("text_model", "clip_model")])
def test_the_miniature_honours_the_towers_that_are_named(folder, monkeypatch, given):
    import train.miniature
    from modeling_unimur import UniMuRModel
    from train.data import load_pairs

    own = dict(zip(("text_model", "clip_model"), map(str, make_towers(folder / "miniature", seed=1)), strict=True))
    pairs = load_pairs(folder / "photos")
    made = train.miniature.Miniature(own["text_model"], own["clip_model"], pairs, None, {}, 0.0)
    monkeypatch.setattr(train.miniature, "prepare", lambda *_: made)
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    settings = {**base(folder), "train_data": "miniature", "max_steps": 1, "evaluate_pairs": 0}
    named = {name: settings.pop(name) for name in own}
    (folder / "n.yaml").write_text(yaml.safe_dump(settings))
    config = UniMuRModel.from_pretrained(
        main([str(folder / "n.yaml"), *(f"--{name}={named[name]}" for name in given)])["checkpoint"]
    ).config
    expected = own | {name: named[name] for name in given}
    assert (config.text_model_name_or_path, config.clip_model_name_or_path) == tuple(expected.values())
    assert threads == ([] if given else [1])  # larger models gain by every core


def test_a_config_without_positions_is_named(tmp_path):
    from transformers import BloomConfig

    from modeling_unimur import UniMuRProcessor

    text, clip = make_towers(tmp_path)
    BloomConfig(hidden_size=32, n_layer=1, n_head=2).save_pretrained(text)
    with pytest.raises(ValueError, match=r"names no positions.*give max_length"):
        UniMuRProcessor.from_pretrained_towers(text, clip)
    assert UniMuRProcessor.from_pretrained_towers(text, clip, max_length=64).max_length == 64
