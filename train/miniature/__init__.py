"""The embedded default: a rendered world and two small towers pre-trained on it, made without any download."""

from .prepare import Miniature, encode, pictures, prepare, validation_data

__all__ = ["Miniature", "encode", "pictures", "prepare", "validation_data"]
