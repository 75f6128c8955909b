"""Checkpoints of a UniMuR, adapter or full: towers found and attached, tensors checked, LoRA beside them."""

from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPModel, PreTrainedModel
from typing_extensions import Self

from .hub_unimur import CUSTOM_PIPELINES
from .pool_unimur import CandidatePool
from .processing_unimur import UniMuRProcessor
from .towers_unimur import (
    LORA,
    LORA_FOLDER,
    SHARED_ARGUMENTS,
    check_widths,
    digest,
    load_lora,
    load_towers,
    plain_name,
)

# What a full checkpoint remembers of where its towers came from, for their licences.
SOURCE_FIELDS = {"text_model_source": "text_model_name_or_path", "clip_model_source": "clip_model_name_or_path"}
TOWER_FIELDS = ("text_model_name_or_path", "text_model_revision", "clip_model_name_or_path", "clip_model_revision")


class CheckpointMixin:
    """Over a `PreTrainedModel` with `own_tensors`, `map_widths` and `_freeze`."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, self_check: bool = False,
        **kwargs,
    ):  # fmt: skip
        """
        Loads an adapter checkpoint (and its towers, from where its config says) or a full one.

        Args:
            self_check: compare embeddings of fixed inputs with those saved beside the checkpoint.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape, a tower has another width, or the self-check
                fails; the message names it.
            OSError: there are no safetensors (pickled weights are not read), or a base tower could not be loaded.
            ImportError: the checkpoint has a LoRA and peft is not installed.
        """
        name = str(pretrained_model_name_or_path)
        if "torch_dtype" in kwargs:  # the older spelling, which most code still uses, holds for the towers too
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        shared = {key: kwargs[key] for key in SHARED_ARGUMENTS if key in kwargs}
        hub = {
            key: kwargs[key]
            for key in ("revision", "subfolder", "token", "cache_dir", "local_files_only")
            if kwargs.get(key) is not None
        }
        kwargs = {"use_safetensors": True, **kwargs, "ignore_mismatched_sizes": True}
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except OSError as error:
            if "safetensors" not in str(error):
                raise
            raise OSError(
                f"{name!r} holds no model.safetensors. UniMuR reads its weights from safetensors only, never from a "
                f"pickled file such as pytorch_model.bin, which could run code: convert it first. The cause: {error}"
            ) from error
        for problem, meaning in (("missing_keys", "lacks"), ("unexpected_keys", "holds the unknown")):
            if info[problem]:
                found = ", ".join(sorted(map(str, info[problem])))
                raise ValueError(f"the checkpoint {name!r} {meaning} tensors: {found}")
        if info["mismatched_keys"]:
            shapes = "; ".join(
                f"{k} is {tuple(a)}, expected {tuple(b)}" for k, a, b in sorted(info["mismatched_keys"])
            )
            raise ValueError(f"the checkpoint {name!r} holds tensors of another shape than its config says: {shapes}")
        if model.config.is_adapter:
            model.attach_towers(*load_towers(model.config, **shared))
        if model.config.text_adapter:
            load_lora(model.language_model, name, **hub)
        # from_pretrained replaces the parameters, and with them what __init__ froze.
        model._freeze()
        model._source = {"pretrained_model_name_or_path": pretrained_model_name_or_path, **hub}
        model.eval()
        if self_check:
            model.self_check()
        return (model, info) if output_loading_info else model

    @classmethod
    def from_pretrained_towers(
        cls, text_model: str, clip_model: str, processor: UniMuRProcessor, *, ret_init: str | None = None,
        dtype: torch.dtype | str = "auto", **config_fields,
    ) -> Self:  # fmt: skip
        """
        A new, untrained UniMuR over two pre-trained towers (folders or Hub names).

        Args:
            processor: its `n_visual_tokens` and `ret_prompt` become the model's, as do the ids of [RET] and `<image>`.
            ret_init: a token of the LLM whose input embedding [RET] starts from; the mean row by default.
            dtype: of the towers.
            config_fields: fields of [`UniMuRConfig`].

        Raises:
            ValueError: `ret_init` is not exactly one token.
        """
        # A folder is named in full, so that the checkpoint finds it from wherever it is loaded.
        text_model, clip_model = (
            str(Path(n).resolve()) if Path(n).is_dir() else str(n) for n in (text_model, clip_model)
        )
        base = cls.config_class(
            text_model_name_or_path=text_model, clip_model_name_or_path=clip_model, **config_fields
        )
        text, clip = load_towers(base, dtype=dtype)
        # Copies: a composite model resets the attention of its sub-configs, which the loaded towers still read.
        config = cls.config_class(
            text_config=deepcopy(text.config), clip_config=deepcopy(clip.config), ret_token_id=processor.ret_token_id,
            image_token_id=processor.image_token_id, n_visual_tokens=processor.n_visual_tokens, ret_prompt=processor.ret_prompt,
            text_model_name_or_path=text_model, clip_model_name_or_path=clip_model, **config_fields,
        )  # fmt: skip
        model = cls(config)
        model.attach_towers(text, clip)
        model.processor = processor
        table = text.get_input_embeddings().weight.detach().float()
        row = table.mean(0)
        if ret_init is not None:
            ids = processor.tokenizer(ret_init, add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise ValueError(f"ret_init={ret_init!r} is {len(ids)} tokens of this LLM's tokenizer, not one")
            row = table[ids[0]]
        model.ret_embedding.data.copy_(row)
        if config.n_drawing_tokens:
            model.start_drawing_tokens()
        return model

    def attach_towers(self, language_model: PreTrainedModel, clip: CLIPModel) -> None:
        """Puts frozen towers into an adapter-style model. Raises `ValueError` where their widths do not fit the maps."""
        self.language_model, self.clip = language_model, clip
        self.config.text_config, self.config.clip_config = language_model.config, clip.config
        check_widths(self)
        self._freeze()

    def add_lora(self, lora_config) -> None:
        """
        Adds a trainable LoRA to the LLM, beyond the paper. It is saved in `lora/` as a PEFT adapter of the LLM.

        Args:
            lora_config: a `peft.LoraConfig`.
        """
        self.language_model.add_adapter(lora_config)
        for name, parameter in self.language_model.named_parameters():
            if LORA in name:  # trained, so float32 as the maps
                parameter.data = parameter.data.float()
        self.config.text_adapter = True
        self._freeze()

    def save_pretrained(
        self, save_directory, *args, with_towers: bool = False, pool: CandidatePool | None = None, golden: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None, **kwargs,
    ):  # fmt: skip
        """
        Saves the model as it was loaded, adapter or full, with its processor, its code and what is called beside it.

        Args:
            with_towers: make it a full, self-contained checkpoint although the towers were loaded from elsewhere.
            pool: a pool to pack beside the model.
            golden: also save the embeddings that `self_check` compares.
        """
        adapter = self.config.is_adapter and not with_towers
        state_dict = self.state_dict() if state_dict is None else state_dict
        kept = {name: getattr(self.config, name) for name in (*TOWER_FIELDS, *SOURCE_FIELDS)}
        if not adapter:
            # A LoRA is saved beside the towers, which keep their own tensors' names.
            state_dict = {plain_name(n): tensor for n, tensor in state_dict.items() if LORA not in n}
            for source, name in SOURCE_FIELDS.items():
                if kept[name] is not None and not Path(kept[name]).is_dir():
                    setattr(self.config, source, kept[name])
            for name in TOWER_FIELDS:
                setattr(self.config, name, None)
        else:
            state_dict = {n: tensor for n, tensor in state_dict.items() if n.split(".")[0] in self.own_tensors}
        self.config.custom_pipelines = CUSTOM_PIPELINES
        try:
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)
        finally:
            for name, value in kept.items():
                setattr(self.config, name, value)
        if not kwargs.get("is_main_process", True):
            return
        if self.config.text_adapter:
            self.language_model.save_pretrained(Path(save_directory) / LORA_FOLDER)
        if self._processor or self._source:
            self.processor.save_pretrained(save_directory)
            self.save_companions(save_directory, pool=pool, golden=golden)

    @property
    def processor(self) -> UniMuRProcessor:
        """
        The checkpoint's processor, loaded from beside its weights when first needed. Raises `ValueError` where its
        `ret_prompt` is not the config's.
        """
        if self._processor is None:
            if not self._source:
                raise ValueError("this model was not loaded from a checkpoint: set model.processor first")
            self.processor = UniMuRProcessor.from_pretrained(**self._source)
        return self._processor

    @processor.setter
    def processor(self, processor: UniMuRProcessor) -> None:
        if processor.ret_prompt != self.config.ret_prompt:
            raise ValueError(
                f"the processor puts {processor.ret_prompt!r} before [RET] and the model's config says "
                f"{self.config.ret_prompt!r}: the embeddings would be another model's. Make ret_prompt the same in "
                "config.json and processor_config.json, as it was in training"
            )
        self._processor = processor

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What makes two models' embeddings comparable: weights, candidate space, preprocessing, dimension q."""
        return {
            "towers": self._towers_digest,
            "maps": self._maps_digest(),
            "text_candidates": self.config.text_candidates,
            "preprocessing": self.processor.fingerprint,
            "dimension": self.config.embedding_width,
        }

    def _maps_digest(self) -> str:
        # Without what draws, which no embedding depends on: a model that learns to draw keeps its pools.
        own = [(n, p) for n, p in self.named_parameters() if self._is_own(n) and not n.startswith("drawing.")]
        # Hashing megabytes would cost a query as much as its search; the probe sees what is written past autograd.
        probes = [p.detach().flatten()[:: max(1, p.numel() // 64)].double().sum() for _, p in own]
        state = [(n, p.data_ptr(), p._version) for n, p in own], torch.stack(probes).tolist()
        if self._digested is None or self._digested[0] != state:
            self._digested = state, digest(own)
        return self._digested[1]

    @cached_property
    def _towers_digest(self) -> str:
        return digest(((plain_name(n), p) for n, p in self.named_parameters() if not self._is_own(n)), head=64)

    def _is_own(self, name: str) -> bool:
        return name.split(".")[0] in self.own_tensors or LORA in name
