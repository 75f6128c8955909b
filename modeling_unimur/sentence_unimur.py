"""
UniMuR as the first module of a sentence-transformers model: `SentenceTransformer("org/unimur-…", trust_remote_code=True)`.

In its own file, which nothing else of the package imports, so that plain users never need sentence-transformers.
"""

from collections.abc import Sequence
from typing import Any

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
        return dict(self.model.prepare_mixed(inputs, query=task == "query", prompt=prompt))

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding` `(n, q)`."""
        return features | {"sentence_embedding": F.normalize(self.model.unify_mixed(features), dim=-1)}

    def get_embedding_dimension(self) -> int:
        """q."""
        return self.model.config.embedding_width

    @property
    def tokenizer(self):
        return self.model.processor.tokenizer

    @property
    def max_seq_length(self) -> int:
        """
        Positions of the LLM that a dialogue may take; longer ones lose their oldest turns, with a warning. A pool made
        under another is refused.
        """
        return self.model.processor.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.model.processor.set_max_length(value)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        """Saves the whole UniMuR, as safetensors whatever `safe_serialization` says."""
        self.model.save_pretrained(output_path)

    @classmethod
    def load(
        cls, model_name_or_path: str, subfolder: str = "", token: bool | str | None = None, cache_folder: str | None = None,
        revision: str | None = None, local_files_only: bool = False, init_defaults: dict[str, Any] | None = None,
        trust_remote_code: bool = False, model_kwargs: dict[str, Any] | None = None, **kwargs: Any,
    ) -> "UniMuREncoder":  # fmt: skip
        """
        Loads the UniMuR of a folder or a Hub repository; `model_kwargs` are those of `from_pretrained`, and take fields of
        the config too. `init_defaults` are for modules that sentence-transformers builds itself.

        Raises:
            ValueError: another backend than torch, or arguments for a processor or a config of their own.
        """
        if kwargs.get("backend", "torch") != "torch":
            raise ValueError(f"backend={kwargs['backend']!r}: UniMuR runs on torch alone; leave backend out")
        for name in ("processor_kwargs", "config_kwargs"):
            if kwargs.get(name):
                raise ValueError(f"{name}={kwargs[name]!r} is not read: give fields of the config as model_kwargs")
        model = AutoModel.from_pretrained(
            model_name_or_path, token=token, cache_dir=cache_folder, revision=revision, subfolder=subfolder,
            local_files_only=local_files_only, trust_remote_code=trust_remote_code, **(model_kwargs or {}),
        )  # fmt: skip
        return cls(model)
