"""
UniMuR as the first module of a sentence-transformers model: `SentenceTransformer("org/unimur-…", trust_remote_code=True)`.

In its own file, which nothing else of the package imports, so that plain users never need sentence-transformers.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.base.modules import InputModule
from transformers import AutoModel


class UniMuREncoder(InputModule):
    """
    Embeddings of texts, images and conversations, `(n, q)` float32, L2-normalised.

    | input | embedded as |
    |---|---|
    | a string | a candidate text (`embed_texts`); by `encode_query` a dialogue of one turn |
    | an image (PIL, path, bytes) | a candidate image (`embed_images`); by `encode_query` a dialogue of one turn |
    | `{"image": …, "text": …}` | a dialogue of one turn that shows the image, then says the text (`embed_dialogues`) |
    | chat messages | a dialogue (`embed_dialogues`) |

    Args:
        model: a loaded [`UniMuRModel`].
    """

    save_in_root = True
    modalities = ["text", "image", ("image", "text"), ("text", "image"), "message"]

    def __init__(self, model):
        super().__init__()
        self.model = model

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, task: str | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """
        Tensors of a batch, those of each kind of input under the kind's name.

        Args:
            inputs: n inputs, of one kind or mixed.
            prompt: put before a text, and before a dialogue as a turn of its own.
            task: `"query"` makes a dialogue of every input.

        Raises:
            ValueError: an input of no known form, or a prompt for an image, which has no words to put it before.
        """
        groups: dict[str, tuple[list[int], list[Any]]] = {}
        for row, item in enumerate(inputs):
            kind, item = _kind(item, task, row)
            if prompt and kind == "images":
                raise ValueError(f"input {row} is an image, which takes no prompt; got {prompt!r}")
            if prompt:
                item = prompt + item if kind == "texts" else [prompt, *item]
            rows, items = groups.setdefault(kind, ([], []))
            rows.append(row)
            items.append(item)
        features: dict[str, Any] = {"n": len(inputs)}
        for kind, (rows, items) in groups.items():
            features[f"{kind}.rows"] = torch.tensor(rows)
            features |= {f"{kind}.{name}": value for name, value in self.model.prepare(kind, items).items()}
        return features

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` `(n, q)`."""
        embeddings = torch.empty(features["n"], self.get_embedding_dimension(), device=self.model.device)
        for kind in ("dialogues", "images", "texts"):
            inputs = {name.split(".", 1)[1]: v for name, v in features.items() if name.startswith(f"{kind}.")}
            if inputs:
                rows = inputs.pop("rows").to(embeddings.device)
                embeddings = embeddings.index_copy(0, rows, F.normalize(self.model.encode(kind, inputs), dim=-1))
        return features | {"sentence_embedding": embeddings}

    def get_embedding_dimension(self) -> int:
        """q."""
        return self.model.config.embedding_width

    @property
    def tokenizer(self):
        return self.model.processor.tokenizer

    @property
    def max_seq_length(self) -> int:
        """Positions of the LLM; longer dialogues lose their oldest turns, with a warning."""
        return self.model.processor.max_length

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Saves the whole UniMuR, as safetensors whatever `safe_serialization` says."""
        self.model.save_pretrained(output_path)

    @classmethod
    def load(
        cls, model_name_or_path: str, subfolder: str = "", token: bool | str | None = None, cache_folder: str | None = None,
        revision: str | None = None, local_files_only: bool = False, trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> "UniMuREncoder":  # fmt: skip
        """Loads the UniMuR of a folder or a Hub repository; `model_kwargs` are those of `from_pretrained`."""
        model = AutoModel.from_pretrained(
            model_name_or_path, token=token, cache_dir=cache_folder, revision=revision, subfolder=subfolder,
            local_files_only=local_files_only, trust_remote_code=trust_remote_code, **(model_kwargs or {}),
        )  # fmt: skip
        return cls(model)


def _kind(item: Any, task: str | None, row: int) -> tuple[str, Any]:
    """What an input is embedded as: `"dialogues"`, `"images"` or `"texts"`, and the input in that form."""
    if isinstance(item, dict) and "content" in item:
        return "dialogues", [item]
    if isinstance(item, dict):
        unknown = sorted(set(item) - {"image", "text"})
        given = [_listed(item[name]) for name in ("image", "text") if item.get(name) is not None]
        if unknown or not given:
            raise ValueError(f"input {row} is a dict of {sorted(item)}; expected 'image', 'text' or both")
        if len(given) == 1 and len(given[0]) == 1:
            return _kind(given[0][0], task, row)
        return "dialogues", [{"role": "user", "content": [_part(value) for values in given for value in values]}]
    if isinstance(item, list | tuple):
        return "dialogues", item
    if task == "query":
        return "dialogues", [item]
    return ("texts" if isinstance(item, str) else "images"), item


def _part(element: Any) -> dict[str, Any]:
    kind = "text" if isinstance(element, str) else "image"
    return {"type": kind, kind: element}


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
