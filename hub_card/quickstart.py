"""
A reply at once, by a small trained model that lies in `hub_card/quickstart/`: nothing is trained or fetched.

    python -m hub_card.quickstart
    python -m hub_card.quickstart "there was a frog in a pink cap, riding a skateboard." "show me!"
    python -m hub_card.quickstart --image photo.jpg "now imagine it on the lawn, playing the drum. show me!"

It knows animals in hats; `hub_card/quickstart/ABOUT.md` says how it was made.
"""

import argparse
import os
from pathlib import Path

from transformers.utils import logging

from modeling_unimur import Retrieval, UniMuRModel
from train.command import run_command

FOLDER = Path(__file__).parent / "quickstart"
DIALOGUE = (
    "guess what: a monkey in a yellow cap!",
    "really?",
    "it is up in space, practising the drum.",
    "show me!",
)


def load() -> UniMuRModel:
    """
    The quickstart's model, its pool packed beside it.

    Raises:
        ValueError: the folder is not there, or holds no weights.
    """
    if not (FOLDER / "model.safetensors").is_file():
        raise ValueError(f"{FOLDER} holds no model.safetensors: clone the whole repository, or run make demo")
    return UniMuRModel.from_pretrained(FOLDER)


def describe(reply: Retrieval, folder: Path) -> str:
    """A reply that was saved in `folder`, in lines: its words, the name of its picture, and the picture's file."""
    picture = reply.best_image
    if picture is None:
        return f"words:   {reply.text}\npicture: none, for words came nearer\nsaved:   {folder / 'reply.json'}"
    file = folder / f"candidate-{picture.rank}.png"
    return f"words:   {reply.text}\npicture: {picture.id}\nsaved:   {file}"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("words", nargs="*", help="the turns of a conversation; by default one about a monkey")
    made.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        help="a picture that is shown before the words; may come again",
    )
    made.add_argument(
        "--save",
        type=Path,
        default=Path("runs/quickstart"),
        metavar="FOLDER",
        help="where the reply goes: %(default)s",
    )
    return made


def main(argv: list[str] | None = None) -> Retrieval:
    """
    Prints the reply to a conversation, and saves it.

    Raises:
        ValueError: a turn is empty, or a picture cannot be read.
        OSError: the folder cannot be written.
    """
    arguments = parser().parse_args(argv)
    turns = [*arguments.image, *arguments.words] or [*DIALOGUE]
    for turn in turns:
        print(f"         {turn}")
    model = load()
    reply = model.retrieve(turns, model.packed_pool)
    assert isinstance(reply, Retrieval)  # of one dialogue
    reply.save(arguments.save)
    print(describe(reply, arguments.save))
    return reply


if __name__ == "__main__":
    if "TRANSFORMERS_VERBOSITY" not in os.environ:  # what is loaded, and by which backend, is not the question here
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    run_command(main)
