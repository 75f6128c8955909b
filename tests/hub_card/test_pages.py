"""The pages that a newcomer reads: every Python block runs, and every command is one that its parser takes."""

import argparse
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import HfArgumentParser

from hub_card.check import blocks, photos, run_python
from hub_card.quickstart import FOLDER, load

ROOT = Path(__file__).parents[2]
PAGES = [page.relative_to(ROOT).as_posix() for page in (ROOT / "README.md", *sorted(ROOT.glob("*/README.md")))]
OURS = ("benchmarks", "hub_card", "modeling_unimur", "tests", "train")
SEPARATORS = {"&&", "||", "|", ";", "&"}


class Parsed(BaseException):
    """Raised behind a command's parser, so that nothing runs."""


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(script: str) -> Iterator[list[str]]:
    """The single commands of a shell script, without comments, variables before them and redirections."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for token in [*lexer, ";"]:
            if token not in SEPARATORS:
                command.append(token)
                continue
            while command and re.fullmatch(r"\w+=.*", command[0]):
                command.pop(0)
            if command:
                yield command
            command = []


def written_commands() -> list[tuple[str, bool, list[str]]]:
    """Page, whether it is a whole command of a block, and the command; those in running text may leave arguments out."""
    every = []
    for page in PAGES:
        text = read(page)
        every += [(page, True, command) for block in blocks(text, "bash") for command in commands(block)]
        prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
        for span in re.findall(r"`((?:python|make) [^`]*)`", prose):
            every += [(page, False, command) for command in commands(" ".join(span.split()))]
    return every


@pytest.mark.parametrize("page", PAGES)
def test_a_block_is_named_by_a_language_that_is_checked(page):
    named = set(re.findall(r"^ *```(\w+)", read(page), re.MULTILINE))
    assert not named & {"py", "python3", "sh", "shell", "console", "zsh"}, "call them python and bash"


@pytest.fixture(scope="module")
def after_the_demo(tmp_path_factory) -> Path:
    """A folder with what a newcomer has after `make demo`: the checkpoint with its code and pool, and photos."""
    folder = tmp_path_factory.mktemp("newcomer")
    model = load()
    pool = model.packed_pool
    model.save_pretrained(folder / "runs" / "miniature" / "checkpoint", pool=pool, golden=True)
    (folder / "runs" / "miniature" / "photos").mkdir()
    pictures = [candidate for candidate in pool if candidate.modality == "image"]
    for at, candidate in enumerate(pictures[-12:]):
        candidate.item.save(folder / "runs" / "miniature" / "photos" / f"{at}.png")
    (folder / "hub_card").mkdir()
    (folder / "hub_card" / "quickstart").symlink_to(FOLDER, target_is_directory=True)
    photos(folder)
    return folder


def test_every_python_block_runs(after_the_demo, tmp_path):
    """Those of the first page each alone, as it is pasted; those of another after each other, as it is read."""
    sources = blocks(read("README.md"), "python")
    others = [blocks(read(page), "python") for page in PAGES if page != "README.md"]
    sources += ["\n".join(page) for page in others if page]
    run_python(sources, after_the_demo, os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)})


@pytest.fixture
def parse_only(monkeypatch):
    """Commands end behind their parser, by [`Parsed`]."""
    parse_args, to_dataclasses = argparse.ArgumentParser.parse_args, HfArgumentParser.parse_args_into_dataclasses

    def plain(self, *arguments, **options):
        parse_args(self, *arguments, **options)
        raise Parsed

    def dataclasses(self, *arguments, **options):
        *_, rest = to_dataclasses(self, *arguments, **options | {"return_remaining_strings": True})
        if rest:
            raise ValueError(f"unknown: {rest}")
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", plain)
    monkeypatch.setattr(HfArgumentParser, "parse_args_into_dataclasses", dataclasses)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "warning")  # the quickstart lowers it where it is not set
    monkeypatch.chdir(ROOT)


def check_python(arguments: list[str], whole: bool, monkeypatch, capsys) -> None:
    """Runs a command up to its parser."""
    module = arguments[0] == "-m"
    name, options = (arguments[1], arguments[2:]) if module else (arguments[0], arguments[1:])
    if module and name.split(".")[0] not in OURS:
        return
    monkeypatch.setattr(sys, "argv", [name, *options])
    monkeypatch.delitem(sys.modules, name, raising=False)  # it is run, not imported
    with pytest.raises((Parsed, SystemExit)) as ended:
        runpy.run_module(name, run_name="__main__") if module else runpy.run_path(name, run_name="__main__")
    said = f"{getattr(ended.value, 'code', '')}\n{capsys.readouterr().err}"
    incomplete = not whole and "the following arguments are required" in said
    assert ended.type is Parsed or ended.value.code == 0 or incomplete, said


@pytest.mark.parametrize(
    ("page", "whole", "command"),
    [pytest.param(*given, id=f"{given[0]}: {' '.join(given[2])}") for given in written_commands()],
)
def test_every_command_is_one_that_is_taken(page, whole, command, parse_only, monkeypatch, capsys):
    program, arguments = command[0], command[1:]
    if program == "accelerate":
        config = re.search(r"--config_file[= ](\S+)", " ".join(arguments))
        assert config is None or (ROOT / config[1]).is_file()
        arguments = arguments[next(at for at, word in enumerate(arguments) if word.endswith(".py")) :]
        check_python(arguments, whole, monkeypatch, capsys)
    elif re.fullmatch(r"python[\d.]*", program) and arguments[0] != "-c":
        check_python(arguments, whole, monkeypatch, capsys)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets)
    elif program == "pip":
        extras = re.findall(r"\[([\w,-]+)\]", " ".join(arguments))
        known = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        assert {extra for given in extras for extra in given.split(",")} <= set(known)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python -m hub_card.quickstart --voice loud", "unrecognized arguments: --voice"),
        ("python train/run.py --lerning_rate 1", "lerning_rate"),
        ("python train/embed.py --model x --output y --voice loud", "voice"),
        ("python -m benchmarks.run --task telepathy --model x", "invalid choice"),
        ("python -m benchmarks.run --task visdial", "required: --model"),
    ],
)
def test_a_command_that_is_not_taken_is_seen(command, message, parse_only, monkeypatch, capsys):
    with pytest.raises(AssertionError, match=message):
        check_python(command.split()[1:], True, monkeypatch, capsys)
