"""Each loading argument reaches the part it concerns, in both kinds of checkpoint; dtypes, offload, compile, damage."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import modeling_unimur.towers_unimur as towers
from modeling_unimur import UniMuRConfig, UniMuRModel
from tests.conftest import picture
from tests.tiny import make_model, make_processor

DIALOGUES = ["hello", ["look", picture(1)]]
OWN = ("W_i2t", "W_t2m", "ret_embedding", "logit_scale")


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """An adapter and a full checkpoint of the same model."""
    folder = tmp_path_factory.mktemp("kinds")
    tiny().save_pretrained(folder / "adapter")
    tiny().save_pretrained(folder / "full", with_towers=True)
    return folder


# A quantiser that marks the layers it would convert: the real ones need other hardware or packages.


@register_quantization_config("marking")
class MarkingConfig(QuantizationConfigMixin):
    def __init__(self, **kwargs):
        self.quant_method, self.modules_to_not_convert = "marking", None


@register_quantizer("marking")
class Marking(HfQuantizer):
    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **kwargs):
        left = self.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not any(name == n or name.endswith(f".{n}") for n in left):
                module.marked = True

    def _process_model_after_weight_loading(self, model, **kwargs):
        return model

    def is_serializable(self, *args, **kwargs):
        return True

    @property
    def is_trainable(self):
        return True


def marked(model):
    return {name.split(".")[0] for name, module in model.named_modules() if getattr(module, "marked", False)}


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_quantisation_is_for_the_towers(folders, kind):
    model = UniMuRModel.from_pretrained(folders / kind, quantization_config=MarkingConfig())
    assert marked(model) == {"language_model", "clip"}
    assert not getattr(model.language_model.get_output_embeddings(), "marked", False)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if n.startswith(OWN))
    assert model.W_t2m.weight.requires_grad


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_torchaos_int8_weights_embed_as_before(folders, tiny, kind):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from transformers import TorchAoConfig

    config = TorchAoConfig(torchao.Int8WeightOnlyConfig())
    model = UniMuRModel.from_pretrained(folders / kind, quantization_config=config, device_map="cpu")
    assert type(model.W_t2m.weight.data) is torch.Tensor
    layer = model.language_model.base_model.decoder.layers[0].fc1
    assert type(layer.weight.data) is not torch.Tensor
    same = (model.embed_dialogues(DIALOGUES) * tiny().embed_dialogues(DIALOGUES)).sum(1)
    assert same.min() > 0.98


def asked(monkeypatch, load):
    """The arguments that reach each part while `load` loads a checkpoint."""
    calls = {}
    for part, cls in (("text_model", AutoModelForCausalLM), ("clip_model", AutoModel)):
        plain = cls.from_pretrained
        monkeypatch.setattr(
            cls, "from_pretrained", lambda *a, part=part, plain=plain, **k: calls.update({part: k}) or plain(*a, **k)
        )
    plain = towers.split_arguments
    import modeling_unimur.checkpoint_unimur as checkpoint

    monkeypatch.setattr(checkpoint, "split_arguments", lambda g: calls.update(own=plain(g)[0]) or plain(g))
    load()
    return calls


@pytest.mark.parametrize(("argument", "goes"), towers.LOADING_ARGUMENTS.items())
def test_each_argument_goes_where_the_table_says(folders, tmp_path, monkeypatch, argument, goes):
    value = {
        "dtype": torch.bfloat16, "token": "hf_x", "cache_dir": str(tmp_path), "local_files_only": True,
        "force_download": False, "proxies": {}, "attn_implementation": "eager", "device_map": "cpu",
        "max_memory": {"cpu": "1GB"}, "offload_folder": str(tmp_path), "offload_buffers": True,
        "quantization_config": MarkingConfig(), "revision": "main", "subfolder": "", "variant": None,
    }[argument]  # fmt: skip
    calls = asked(monkeypatch, lambda: UniMuRModel.from_pretrained(folders / "adapter", **{argument: value}))
    in_towers = [argument in calls[part] for part in towers.PARTS]
    if argument == "revision":
        assert all(calls[part]["revision"] == "main" for part in towers.PARTS)  # each tower's own
    else:
        assert in_towers == [goes != towers.CHECKPOINT] * 2
    if argument != "attn_implementation":  # which the config takes up
        assert (argument in calls["own"]) == (goes != towers.TOWERS)
    if argument != "variant":
        UniMuRModel.from_pretrained(folders / "full", **{argument: value})


@pytest.mark.parametrize("kind", ["adapter", "full"])
@pytest.mark.parametrize("loader", [UniMuRModel, AutoModel])
def test_attention_is_chosen_for_each_tower(folders, kind, loader):
    def of(given):
        model = loader.from_pretrained(folders / kind, attn_implementation=given)
        return model.language_model.config._attn_implementation, model.clip.config._attn_implementation

    assert of({"text_config": "eager", "clip_config": "sdpa"}) == ("eager", "sdpa")
    assert of("eager") == ("eager", "eager")
    assert of({"text_config": "eager"})[0] == "eager"


def test_a_device_map_of_names_reaches_each_tower():
    given = {"language_model.model": 0, "language_model.lm_head": "cpu", "clip": 1, "W_t2m": 0}
    parts = {part: towers.arguments_of_part(part, {"device_map": given})["device_map"] for part in towers.PARTS}
    assert parts == {"text_model": {"model": 0, "lm_head": "cpu"}, "clip_model": {"": 1}}
    assert towers.arguments_of_part("clip_model", {"device_map": {"": 1}})["device_map"] == {"": 1}
    with pytest.raises(ValueError, match="names no device for 'clip'"):
        towers.arguments_of_part("clip_model", {"device_map": {"language_model": 0}})


def test_an_llm_without_sdpa_loads_again(tmp_path):
    """GPT-J has eager attention alone; the wrapper's default must not be asked of it."""
    text, clip = _towers_with(tmp_path, "gptj", n_embd=32, n_layer=1, n_head=2, n_positions=128, rotary_dim=4)
    model = UniMuRModel.from_pretrained_towers(text, clip, make_processor())
    model.save_pretrained(tmp_path / "saved")
    again = UniMuRModel.from_pretrained(tmp_path / "saved")
    assert again.language_model.config._attn_implementation == "eager"
    assert torch.equal(again.embed_dialogues(["hi"]), model.eval().embed_dialogues(["hi"]))


def _towers_with(folder: Path, kind: str, **fields) -> tuple[str, str]:
    """Tiny towers whose LLM is of this type."""
    from tests.tiny import init_weights, make_towers, text_tokenizer

    text, clip = make_towers(folder)
    config = AutoConfig.for_model(kind, vocab_size=len(text_tokenizer()), bos_token_id=2, eos_token_id=2,
                                  pad_token_id=1, **fields)  # fmt: skip
    torch.manual_seed(0)
    for old in text.glob("*.safetensors"):
        old.unlink()
    init_weights(AutoModelForCausalLM.from_config(config)).save_pretrained(text)
    return str(text), str(clip)


def test_ret_starts_from_what_the_llm_sees_of_a_token(tmp_path):
    """Gemma multiplies its table's rows by sqrt(d); [RET] must be as large as a word."""
    text, clip = _towers_with(
        tmp_path, "gemma", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128,
    )  # fmt: skip
    model = UniMuRModel.from_pretrained_towers(text, clip, make_processor(), ret_init="#")
    number = model.processor.tokenizer.convert_tokens_to_ids("#")
    embed = model.language_model.get_input_embeddings()
    assert torch.allclose(model.ret_embedding, embed(torch.tensor([number]))[0])
    assert torch.allclose(model.ret_embedding, embed.weight[number] * 32**0.5, rtol=1e-3)
    mean = UniMuRModel.from_pretrained_towers(text, clip, make_processor())
    assert torch.allclose(mean.ret_embedding, embed.weight.mean(0) * 32**0.5, rtol=1e-3, atol=1e-4)


# Dtypes


@pytest.mark.parametrize(
    "convert",
    [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.to(torch.float16),
     lambda m: m.to("cpu", torch.bfloat16)],
    ids=["half", "bfloat16", "double", "to float16", "to device and bfloat16"],
)  # fmt: skip
def test_a_conversion_is_for_the_towers(fresh, convert):
    model = fresh(train_ret_embedding=True)
    expected, pool = model.embed_dialogues(DIALOGUES), model.build_pool(texts=["a dog"], show_progress_bar=False)
    maps = {name: p.detach().clone() for name, p in model.named_parameters() if name.startswith(OWN)}
    convert(model)
    assert model.language_model.dtype != torch.float32 and model.clip.dtype != torch.float32
    assert all(torch.equal(p, maps[n]) for n, p in model.named_parameters() if n in maps)  # not even rounded
    assert (model.embed_dialogues(DIALOGUES) * expected).sum(1).min() > 0.98
    assert model.retrieve("a dog", pool).text == "a dog" or model.language_model.dtype == torch.float16
    model.train()
    model(**model.processor.pairs([picture(0), picture(1)], ["a", "b"])).loss.backward()
    assert model.W_t2m.weight.grad.dtype == model.ret_embedding.grad.dtype == torch.float32


def test_sentence_transformers_half_too(fresh, tmp_path):
    sentence = pytest.importorskip("sentence_transformers", reason="sentence-transformers is optional")
    fresh().save_pretrained(tmp_path / "c", with_towers=True)
    encoder = sentence.SentenceTransformer(str(tmp_path / "c"), trust_remote_code=True, device="cpu")
    expected = torch.tensor(encoder.encode(["a dog"]))
    halved = torch.tensor(encoder.half().encode(["a dog"])).float()
    assert (halved * expected).sum() > 0.98


def test_nothing_is_float64_on_the_device(fresh, monkeypatch):
    model = fresh()
    monkeypatch.setattr(torch.Tensor, "double", lambda self: pytest.fail("Apple's devices have no float64"))
    pool = model.build_pool(images=[picture(1)], texts=["a dog"], show_progress_bar=False)
    assert model.retrieve("a dog", pool).candidates


# Offload and compilation


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_offloaded_towers_build_and_search_pools(folders, tiny, tmp_path, kind):
    lm = "language_model.model.decoder"
    placed = {f"{lm}.embed_tokens": "cpu", f"{lm}.embed_positions": "cpu", f"{lm}.final_layer_norm": "cpu",
              f"{lm}.layers.0": "cpu", f"{lm}.layers.1": "disk", "language_model.lm_head": "cpu", "clip": "cpu",
              **dict.fromkeys(OWN, "cpu")}  # fmt: skip
    model = UniMuRModel.from_pretrained(folders / kind, device_map=placed, offload_folder=str(tmp_path / "offload"))
    assert any(p.is_meta for p in model.parameters())
    expected = tiny()
    assert model.fingerprint == UniMuRModel.from_pretrained(folders / kind).fingerprint
    pool = expected.build_pool(texts=["a dog", "a cat"], show_progress_bar=False)
    assert model.retrieve("a dog", pool).text == expected.retrieve("a dog", pool).text
    assert len(model.build_pool(texts=["a cow"], show_progress_bar=False)) == 1
    model.save_pretrained(tmp_path / "again")
    again = UniMuRModel.from_pretrained(tmp_path / "again")
    assert torch.equal(again.embed_dialogues(DIALOGUES), expected.embed_dialogues(DIALOGUES))


@pytest.mark.parametrize("full", [False, True])
def test_a_compiled_llm_is_the_same_model(fresh, tmp_path, full):
    model = fresh()
    expected, pool = model.fingerprint, model.build_pool(texts=["a dog"], show_progress_bar=False)
    model.language_model = torch.compile(model.language_model, backend="eager")
    model.digests.clear()
    assert model.fingerprint == expected and model.retrieve("a dog", pool).text == "a dog"
    model.save_pretrained(tmp_path / "saved", with_towers=full)
    assert UniMuRModel.from_pretrained(tmp_path / "saved").fingerprint == expected


# What a folder holds


@pytest.mark.parametrize("order", ["enable first", "train first"])
def test_activation_checkpointing_engages_in_either_order(fresh, order):
    model = fresh()
    steps = [model.activation_checkpointing_enable, model.train]
    for step in steps if order == "enable first" else steps[::-1]:
        step()
    runs = []
    model.language_model.base_model.decoder.layers[0].fc1.register_forward_hook(lambda *_: runs.append(1))
    batch = model.processor.pairs([picture(0), picture(1)], ["a", "b"])
    model(captions=batch["captions"], images=batch["images"]).loss.backward()
    assert len(runs) == 2


def test_without_a_processor_nothing_is_saved(folders, tmp_path, fresh):
    shutil.copytree(folders / "adapter", tmp_path / "bare")
    (tmp_path / "bare" / "processor_config.json").unlink()
    model = UniMuRModel.from_pretrained(tmp_path / "bare")
    for _ in range(2):
        with pytest.raises(OSError, match="processor_config"):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    other = fresh()
    other._processor = None
    with pytest.raises(ValueError, match=r"set model\.processor"):
        other.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_follow_the_umask(tiny, tmp_path):
    before = os.umask(0o022)
    try:
        tiny().save_pretrained(tmp_path / "saved", golden=True)
    finally:
        os.umask(before)
    modes = {file.name: oct(file.stat().st_mode)[-3:] for file in (tmp_path / "saved").glob("*") if file.is_file()}
    assert set(modes.values()) == {"644"}, modes


@pytest.mark.parametrize(
    "file", ["model.safetensors", "golden.safetensors", "config.json", "tokenizer.json", "processor_config.json"]
)
def test_damage_names_the_file(tiny, tmp_path, file):
    tiny().save_pretrained(tmp_path / "whole", with_towers=True, golden=True)
    content = (tmp_path / "whole" / file).read_bytes()
    damaged = [content[: len(content) // 2], content[:9], b"", b"[1, 2]", content.replace(b"a", b"\xff"),
               bytes([content[0] ^ 64]) + content[1:]]  # fmt: skip
    for number, bad in enumerate(damaged):
        shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        (tmp_path / str(number) / file).write_bytes(bad)
        with pytest.raises((OSError, ValueError), match=file.split(".")[0]):
            UniMuRModel.from_pretrained(tmp_path / str(number), self_check=True).embed_dialogues(["hi"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ret_token_id": 7}, "ret_token_id is 7 in the model's config"),
        ({"n_visual_tokens": 3}, "n_visual_tokens is 3"),
        ({"ret_prompt": "\nKeywords:"}, "before"),
    ],
)
def test_config_and_processor_agree(fresh, change, message):
    model = fresh()
    for name, value in change.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=message):
        model.processor = make_processor()


def test_a_processor_longer_than_the_llm_is_refused(tmp_path):
    model = make_model(tmp_path)
    with pytest.raises(ValueError, match=r"max_length=2048 is more than the 128 positions.*max_length=128"):
        model.processor = make_processor(max_length=2048)
    model.processor.max_length = 2048
    with pytest.raises(ValueError, match="128 positions"):
        model.embed_dialogues(["hi"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lambda1": float("nan")}, "lambda1=nan must be a finite number"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"ret_token_id": -1}, "ret_token_id=-1"),
        ({"ret_token_id": 5, "image_token_id": 5}, "ret_token_id=5, image_token_id=5"),
        ({"lambda1": "1"}, "lambda1"),
        ({"visual_matching": "siglip"}, "visual_matching='siglip' is not one of 'infonce', 'sigmoid'"),
    ],
)
def test_the_config_refuses_with_a_value_error(fields, message):
    with pytest.raises(ValueError, match=message):
        UniMuRConfig(**fields)


def test_the_config_takes_ints_for_floats(tmp_path):
    config = UniMuRConfig(lambda1=0, lambda2=10, margin=1)
    assert (config.lambda1, config.lambda2) == (0.0, 10.0) and type(config.lambda1) is float
    config.lambda2 = 3
    assert type(config.lambda2) is float
    config.save_pretrained(tmp_path)
    assert UniMuRConfig.from_pretrained(tmp_path).lambda1 == 0.0
