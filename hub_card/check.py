"""Whether a folder is fit to be a Hub repository: everything its users would call is called, in other processes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent

from huggingface_hub import ModelCard
from huggingface_hub.inference._providers import PROVIDERS
from PIL import Image

from modeling_unimur.hub_unimur import refuse_local_towers

REQUIRED = (
    "README.md", "config.json", "model.safetensors", "processor_config.json", "clip_tokenizer/tokenizer.json",
    "modeling_unimur.py", "pipeline_unimur.py", "sentence_unimur.py", "handler.py", "requirements.txt", "modules.json",
    "golden.safetensors",
)  # fmt: skip
LOADS = """
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline
name = {name!r}
model = AutoModel.from_pretrained(name, trust_remote_code=True, self_check=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
assert type(AutoProcessor.from_pretrained(name, trust_remote_code=True)).__name__ == "UniMuRProcessor"
assert AutoConfig.from_pretrained(name, trust_remote_code=True).model_type == "unimur"
retrieve = pipeline("multimodal-retrieval", model=name, trust_remote_code=True)
print(retrieve("hello!", pool={{"texts": ["hello there.", "good night."]}})["text"])
"""
HANDLER = """
import sys
sys.path.insert(0, {name!r})
from handler import EndpointHandler
print(EndpointHandler({name!r})({{"inputs": "hello!"}})["text"])
"""
# A finder that does not find them is as if they were not installed.
HIDDEN = """
import importlib.machinery, sys
class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {names!r} else super().find_spec(name, path, target)
sys.meta_path[:] = [Without if f is importlib.machinery.PathFinder else f for f in sys.meta_path if "editable" not in str(f)]
"""


class NotFitError(ValueError):
    """A folder lacks something its users would call, or a call fails; the message says which."""


def blocks(markdown: str, language: str) -> list[str]:
    """The fenced blocks of a language in a markdown text, in order; those of a list without their indentation."""
    fenced = re.findall(rf"^( *)```{language}\n(.*?)^\1```", markdown, re.MULTILINE | re.DOTALL)
    return [dedent(block) for _, block in fenced]


def pipeline_tags() -> set[str]:
    """The Hub's tasks, as huggingface_hub ships them."""
    return set(PROVIDERS["hf-inference"])


def check_card(card: ModelCard) -> None:
    """Refuses a pipeline tag that the Hub does not know, missing tags, and figures that are not finite."""
    if card.data.pipeline_tag not in pipeline_tags():
        raise NotFitError(f"README.md: pipeline_tag {card.data.pipeline_tag!r} is none of the Hub's tasks")
    for tag in card.data.tags or ():
        if not re.fullmatch(r"[A-Za-z0-9][\w.:-]*", tag):
            raise NotFitError(f"README.md: the tag {tag!r} is not one word")
    for result in card.data.eval_results or ():
        if not isinstance(result.metric_value, int | float) or not isfinite(result.metric_value):
            raise NotFitError(f"README.md: {result.metric_name} is {result.metric_value!r}, not a finite number")


def hidden(*names: str) -> str:
    """Python source; what runs after it in a process cannot import these top-level packages."""
    return HIDDEN.format(names=names)


def run_python(
    sources: Sequence[str], folder: Path, environment: dict[str, str] | None = None, *, without: Sequence[str] = ()
) -> str:
    """
    Runs Python sources after each other, each with names of its own, in one process in `folder`, which cannot import the
    packages `without`; returns what they print, raises [`NotFitError`] with the one that fails.
    """
    runs = [f"exec(compile({source!r}, 'source {at}', 'exec'), {{'__name__': '__main__'}})\n"
            for at, source in enumerate(sources)]  # fmt: skip
    script = hidden(*without) + "".join(runs)
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], cwd=folder, env=environment or os.environ.copy(), capture_output=True,
        text=True, stdin=subprocess.DEVNULL, timeout=1800,
    )  # fmt: skip
    if done.returncode:
        reached = re.findall(r'File "source (\d+)"', done.stderr)
        failing = sources[int(reached[-1])] if reached else "\n".join(sources)
        raise NotFitError(f"this fails:\n{failing}\n{done.stderr[-2000:]}")
    return done.stdout


def photos(folder: Path) -> None:
    """The pictures that a card's snippets name."""
    for at, colour in ((1, "tomato"), (2, "steelblue")):
        Image.new("RGB", (64, 48), colour).save(folder / f"photo-{at}.jpg")


def check_folder(folder: Path, repo_id: str, say: Callable[[str], None] = print) -> None:
    """
    Everything below is called as a user would, offline and without this repository's package: what an adapter's towers
    need must be in the cache, where loading the model has put it.

    Args:
        folder: the repository to be.
        repo_id: its name on the Hub, which the card's snippets use.
        say: takes the name of each part that passed.

    Raises:
        NotFitError: what fails; nothing should be uploaded then.
    """
    folder = folder.resolve()
    absent = [name for name in REQUIRED if not (folder / name).is_file()]
    if absent:
        raise NotFitError(f"the folder lacks {', '.join(absent)}")
    pickled = [p.name for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    if pickled:
        raise NotFitError(f"the folder holds pickled files: {', '.join(pickled)}")
    card = ModelCard.load(folder / "README.md")
    check_card(card)
    say("card: metadata is well-formed")
    config = json.loads((folder / "config.json").read_text())
    try:
        refuse_local_towers(config)
    except ValueError as error:
        raise NotFitError(str(error)) from error
    if "AutoModel" not in config.get("auto_map", {}) or "multimodal-retrieval" not in config["custom_pipelines"]:
        raise NotFitError("config.json names no remote code or no pipeline: save the checkpoint again")
    with TemporaryDirectory() as empty:
        elsewhere = Path(empty)
        photos(elsewhere)

        def run(sources: list[str]) -> None:
            run_python(sources, elsewhere, os.environ | {"HF_HUB_OFFLINE": "1"}, without=["modeling_unimur"])

        packed = (folder / "pool").is_dir()
        run([LOADS.format(name=str(folder)), *([HANDLER.format(name=str(folder))] if packed else [])])
        say("AutoModel with its self-check, AutoProcessor, AutoConfig and pipeline")
        if packed:
            say("endpoint handler")
        snippets = blocks(card.text, "python")
        if find_spec("sentence_transformers") is None:
            others = [block for block in snippets if "sentence_transformers" not in block]
            if len(others) < len(snippets):
                say("NOT checked, sentence-transformers is not installed: the card's snippet for it")
            snippets = others
        run([block.replace(repo_id, str(folder)) for block in snippets])
        say("every snippet of the card")
