"""Kinds of command-line arguments, as argparse's `type`: what cannot be used ends the command and is named."""

import argparse

import torch


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return number


def usable_device(text: str) -> str:
    """The name of a device on which a tensor can be made."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # as torch tells of a name or a build without it
        cause = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be used here: give cpu, or another device ({cause})"
        ) from error
    return text
