"""A configuration is read as its yaml means it, and what cannot be is refused in a sentence that names it."""

import os
from dataclasses import fields

import pytest

from modeling_unimur import UniMuRConfig
from tests.processes import ROOT, run_script
from train.arguments import CONFIGS, DERIVED, ConfigArguments, parse
from train.collate import TooManyBadPairsError
from train.command import run_command, sentence


def read(tmp_path, text, *flags):
    (tmp_path / "my.yaml").write_text(text)
    return parse([f"--config={tmp_path / 'my.yaml'}", *flags])


def test_null_is_the_default_and_never_a_text(tmp_path):
    model, data, args = read(tmp_path, "ret_init: null\ncache_dir:\nmatching_learning_rate: ~\nlambda2: null\n")
    assert model.ret_init is None and data.cache_dir is None and args.matching_learning_rate is None
    assert model.lambda2 == UniMuRConfig.lambda2
    (tmp_path / "first.yaml").write_text("ret_init: '#'\n")
    (tmp_path / "second.yaml").write_text("ret_init: null\n")
    model = parse(["--config", str(tmp_path / "first.yaml"), "--config", str(tmp_path / "second.yaml")])[0]
    assert model.ret_init is None  # a later file wins


def test_no_is_a_word_and_true_a_truth(tmp_path):
    model, _, args = read(
        tmp_path, "save_strategy: no\neval_strategy: no\nuse_cpu: yes\nlearn_temperature: false\nret_init: on\n"
    )
    assert args.save_strategy == args.eval_strategy == "no" and args.use_cpu is True
    assert model.learn_temperature is False and model.ret_init == "on"


def test_lists_numbers_and_mappings_keep_their_kind(tmp_path):
    text = (
        "train_data: [a.tar, 'b c.tar']\nlora_targets: [q_proj]\ncca_widths: [8, 16]\nlearning_rate: 1e-4\n"
        "ret_prompt: '- so: '\nlr_scheduler_kwargs: {num_cycles: 2}\n"
    )
    model, data, args = read(tmp_path, text, "--seed=3")
    assert data.source == ["a.tar", "b c.tar"] and model.lora_targets == ["q_proj"] and model.cca_widths == [8, 16]
    assert args.learning_rate == 1e-4 and args.lr_scheduler_kwargs == {"num_cycles": 2} and args.seed == 3
    assert model.ret_prompt == "- so: "
    assert parse(["--train_data", "one"])[1].source == "one"


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("lamda2: 1\n", (), r"the setting 'lamda2' of .*my.yaml is not known: did you mean lambda2\?"),
        ("- a\n- b\n", (), "expected settings as 'name: value' lines, got a list"),
        ("a: [1,\n", (), "is no yaml"),
        ("lora_targets: [q_proj, null]\n", (), "expected a list of plain values"),
        ("seed: many\n", (), r"argument --seed: invalid int value: 'many'"),
        ("text_matching: cosine\n", (), r"--text_matching.*invalid choice: 'cosine'"),
        ("", ("--lerning_rate=1",), r"--lerning_rate=1 is not known: did you mean learning_rate\?"),
        ("", ("--config",), "--config needs the path"),
        ("", ("--eval_share=1",), r"--eval_share 1.0: expected a share"),
        ("", ("--eval_share=0.1", "--eval_data=x"), "give one of them"),
        ("", ("--early_stopping_patience=2",), "give --load_best_model_at_end true too"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, text, flags, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text, *flags)


def test_a_file_that_is_absent_is_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match=r"absent.yaml"):
        parse(["--config", str(tmp_path / "absent.yaml")])


def test_every_field_of_the_configuration_is_an_argument():
    own = {f.name for f in fields(UniMuRConfig) if f.name in UniMuRConfig.__annotations__}
    assert {f.name for f in fields(ConfigArguments)} == own - DERIVED and own > DERIVED
    for f in fields(ConfigArguments):
        assert f.metadata["help"], f"{f.name} has no words in UniMuRConfig's docstring"


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_every_configuration_of_the_repository_is_read(name):
    parse(["--config", str(CONFIGS / name), "--train_data", "x", "--drawing_model_name_or_path", "x"])


@pytest.mark.parametrize(
    "error",
    [ValueError("--x 3: give 4"), OSError("the Hub is down"), TooManyBadPairsError("all broken")],
)
def test_a_mistake_ends_in_its_sentence(error):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert str(end.value) == f"error: {error}"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            FileNotFoundError(2, "No such file or directory", "x"),
            "x does not exist: give the path of a file that does",
        ),
        (FileExistsError(17, "File exists", "x"), "x: a file lies where a folder is needed; give another folder"),
        (NotADirectoryError(20, "Not a directory", "x/y"), "x/y: a file lies where a folder is needed"),
        (PermissionError(13, "Permission denied", "x"), "x: Permission denied"),
        (ValueError(), "ValueError"),
    ],
)
def test_an_error_of_the_system_names_the_file_first(error, message):
    assert sentence(error).startswith(message)


def test_what_is_no_mistake_of_the_user_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_the_command_ends_in_one_sentence(tmp_path):
    command = "import runpy; runpy.run_path('train/run.py', run_name='__main__')"
    done = run_script(command, "--train_data", tmp_path / "absent", cwd=ROOT, environment=dict(os.environ))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"error: {tmp_path / 'absent'} does not exist" in done.stderr
