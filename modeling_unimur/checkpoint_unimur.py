"""Checkpoints of a UniMuR, adapter or full: towers loaded and attached, tensors checked, what is saved beside the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from huggingface_hub import HfApi, ModelCard
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .card_unimur import model_card
from .configuration_unimur import TOKENS, UniMuRConfig
from .hub_unimur import (
    CUSTOM_PIPELINES,
    FORMER_POOL,
    HUB_ARGUMENTS,
    beside_weights,
    damaged_file,
    follow_umask,
    packed_pool,
    refuse_local_towers,
    save_companions,
)
from .identity_unimur import GOLDEN, compare_golden, fingerprint, save_golden
from .pool_unimur import CandidatePool
from .processing_unimur import UniMuRProcessor
from .towers_unimur import (
    LOADING_ARGUMENTS,
    LORA,
    LORA_FOLDER,
    PARTS,
    check_causal,
    check_loaded,
    check_same_widths,
    clip_text_length,
    input_device,
    load_lora,
    load_towers,
    plain_name,
    positions,
    refuse_no_folder,
    split_arguments,
)

# What a full checkpoint remembers of where its towers came from, for their licences.
SOURCE_FIELDS = {"text_model_source": "text_model_name_or_path", "clip_model_source": "clip_model_name_or_path"}
TOWER_FIELDS = ("text_model_name_or_path", "text_model_revision", "clip_model_name_or_path", "clip_model_revision")


class CheckpointModel(PreTrainedModel):
    """
    Loading and saving. A subclass makes its own tensors in `__init__` and, where the config is a full checkpoint's, its
    towers; `freeze` says what is trained.

    Attributes:
        own_tensors: names that start a tensor of the model's own rather than of a tower.
        language_model, clip: the towers; `None` in an adapter until they are attached.
        digests: see [`identity_unimur.Identified`].
    """

    config: UniMuRConfig
    config_class: type[UniMuRConfig]
    own_tensors: tuple[str, ...]
    language_model: Any
    clip: Any
    ret_embedding: nn.Parameter

    if TYPE_CHECKING:  # what a subclass brings
        # transformers wraps it as a function of any model.
        def to(self, *args: Any, **kwargs: Any) -> Self: ...  # type: ignore[override]
        def embed_dialogues(self, dialogues: list[Any]) -> torch.Tensor: ...
        def embed_images(self, images: list[Any]) -> torch.Tensor: ...
        def embed_texts(self, texts: list[str]) -> torch.Tensor: ...
        def freeze(self) -> None: ...
        def start_drawing_tokens(self) -> None: ...

    def __init__(self, config: UniMuRConfig):
        super().__init__(config)
        self.digests: dict[str, tuple[Any, str]] = {}
        self._processor: UniMuRProcessor | None = None
        self._source: dict[str, Any] = {}  # the arguments it was loaded by
        self._packed_pool: CandidatePool | None = None

    # Loading

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, output_loading_info: bool = False, self_check: bool = False,
        **kwargs,
    ):  # fmt: skip
        """
        Loads an adapter checkpoint (and its towers, from where its config says) or a full one.

        Args:
            self_check: compare embeddings of fixed inputs with those saved beside the checkpoint.
            kwargs: transformers' own; [`towers_unimur.LOADING_ARGUMENTS`] says which of them concern the towers.

        Raises:
            ValueError: a tensor is missing, unknown or of another shape, a tower has another width, or the self-check
                fails; the message names it.
            OSError: there are no safetensors (pickled weights are not read), a file is damaged, or a base tower could not
                be loaded.
            ImportError: the checkpoint has a LoRA and peft is not installed.
        """
        name = str(pretrained_model_name_or_path)
        if "torch_dtype" in kwargs:  # the older spelling, which most code still uses
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        source = {"pretrained_model_name_or_path": pretrained_model_name_or_path, **hub}
        with _reading(source, cls.config_class):
            config, kwargs = cls._config_of(name, kwargs)
            # As the caller gave it: transformers overwrites it by its default.
            attention = {key: getattr(config, key)._attn_implementation for _, key in PARTS.values()}
            own, towers = split_arguments(kwargs) if config.is_adapter else (kwargs, {})
            try:
                loaded = super().from_pretrained(
                    pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True,
                    **{"use_safetensors": True} | own | {"ignore_mismatched_sizes": True},
                )  # fmt: skip
            except OSError as error:
                if "safetensors" not in str(error):
                    raise
                raise OSError(
                    f"{name!r} holds no model.safetensors. UniMuR reads its weights from safetensors only, never from a "
                    f"pickled file such as pytorch_model.bin, which could run code: convert it first. The cause: {error}"
                ) from error
            model, info = cast("tuple[Self, dict[str, Any]]", loaded)
            check_loaded(info, f"the checkpoint {name!r}")
            if model.config.is_adapter:
                model.attach_towers(*load_towers(model.config, **towers | {"attn_implementation": attention}))
            if model.config.text_adapter:
                load_lora(model.language_model, name, **hub)
        # from_pretrained replaces the parameters, and with them what __init__ froze.
        model.freeze()
        model._source = source
        model.eval()
        if self_check:
            model.self_check()
        return (model, info) if output_loading_info else model

    @classmethod
    def _config_of(cls, name: str, kwargs: dict[str, Any]) -> tuple[UniMuRConfig, dict[str, Any]]:
        """The config and the arguments that are not its fields. AutoModel gives it; else it is read here."""
        kwargs = dict(kwargs)
        config = kwargs.pop("config", None)
        if isinstance(config, PreTrainedConfig):
            attention = kwargs.pop("attn_implementation", None)
            config = cast(UniMuRConfig, copy(config))  # by its fields, whichever copy of this file its class is of
            if attention is not None:
                config._attn_implementation = attention
            return config, kwargs
        # Kept from the config, which would take `dtype` and its like for fields.
        loading = {key: kwargs.pop(key) for key in LOADING_ARGUMENTS if key in kwargs and key != "attn_implementation"}
        hub = {key: loading[key] for key in (*HUB_ARGUMENTS, "force_download", "proxies") if key in loading}
        named = str(config or name)
        try:
            config, rest = cls.config_class.from_pretrained(named, return_unused_kwargs=True, **hub, **kwargs)
        except OSError as error:
            refuse_no_folder(named, error)
            raise
        return config, rest | loading

    @classmethod
    def from_pretrained_towers(
        cls, text_model: str, clip_model: str, processor: UniMuRProcessor, *, ret_init: str | None = None,
        dtype: torch.dtype | str = "auto", **config_fields,
    ) -> Self:  # fmt: skip
        """
        A new, untrained UniMuR over two pre-trained towers (folders or Hub names).

        Args:
            processor: its `n_visual_tokens` and `ret_prompt` become the model's, as do the ids of [RET] and `<image>`.
            ret_init: a token of the LLM whose input embedding [RET] starts from; the mean of all by default.
            dtype: of the towers.
            config_fields: fields of [`UniMuRConfig`].

        Raises:
            ValueError: `ret_init` is not exactly one token, the processor is not these towers', or a tower is of a kind
                that cannot be UniMuR's.
        """
        # A folder is named in full, so that the checkpoint finds it from wherever it is loaded.
        text_model, clip_model = (
            str(Path(n).resolve()) if Path(n).is_dir() else str(n) for n in (text_model, clip_model)
        )
        base = cls.config_class(
            text_model_name_or_path=text_model, clip_model_name_or_path=clip_model, **config_fields
        )
        text, clip = load_towers(base, dtype=dtype)
        check_causal(text)
        # Copies: a composite model resets the attention of its sub-configs, which the loaded towers still read.
        config = cls.config_class(
            text_config=deepcopy(text.config), clip_config=deepcopy(clip.config), ret_token_id=processor.ret_token_id,
            image_token_id=processor.image_token_id, n_visual_tokens=processor.n_visual_tokens, ret_prompt=processor.ret_prompt,
            text_model_name_or_path=text_model, clip_model_name_or_path=clip_model, **config_fields,
        )  # fmt: skip
        model = cls(config)
        model.attach_towers(text, clip)
        model.processor = processor
        model.start_ret(ret_init)
        if config.n_drawing_tokens:
            model.start_drawing_tokens()
        return model

    @torch.no_grad()
    def start_ret(self, token: str | None) -> None:
        """
        Starts [RET]'s input embedding from a token's, or from the mean of all: as the LLM's embedding module gives them,
        which Gemma's scales.

        Raises:
            ValueError: `token` is not exactly one token.
        """
        embed = self.language_model.get_input_embeddings()
        ids = torch.arange(embed.weight.shape[0])
        if token is not None:
            ids = torch.tensor(self.processor.tokenizer(token, add_special_tokens=False)["input_ids"])
            if len(ids) != 1:
                raise ValueError(f"ret_init={token!r} is {len(ids)} tokens of this LLM's tokenizer, not one")
        rows = embed(ids.to(input_device(self.language_model))).float()
        self.ret_embedding.copy_(rows.mean(0) if token is None else rows[0])

    def attach_towers(self, language_model: PreTrainedModel, clip: PreTrainedModel) -> None:
        """
        Puts frozen towers into an adapter-style model, and the maps where the LLM reads its input. Raises `ValueError`
        where their widths do not fit the maps.
        """
        made_for = copy(self.config)
        self.config.text_config, self.config.clip_config = language_model.config, clip.config
        names = (str(made_for.text_model_name_or_path), str(made_for.clip_model_name_or_path))
        try:
            check_same_widths(made_for, self.config, names)
        except ValueError:
            self.config.text_config, self.config.clip_config = made_for.text_config, made_for.clip_config
            raise
        device = input_device(language_model)
        if self.language_model is None and device.type not in ("meta", self.device.type):
            self.to(device)
        self.language_model, self.clip = language_model, clip
        self.digests.clear()
        self.freeze()

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
        self.freeze()

    # Saving

    def save_pretrained(
        self, save_directory: str | PathLike, is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None, *args: Any, with_towers: bool = False,
        pool: CandidatePool | None = None, golden: bool = False, **kwargs: Any,
    ):  # fmt: skip
        """
        Saves the model as it was loaded, adapter or full, with its processor, its code and what is called beside it.

        Args:
            with_towers: make it a full, self-contained checkpoint although the towers were loaded from elsewhere.
            pool: a pool to pack beside the model.
            golden: also save the embeddings that `self_check` compares.
            save_directory, is_main_process, state_dict, args, kwargs: as transformers' models take them.

        Raises:
            ValueError: the model has no processor, or another model made the pool; nothing is written then.
        """
        processor = self.processor if is_main_process else None
        if pool is not None and is_main_process:
            pool.check_made_by(self.fingerprint)
        adapter = self.config.is_adapter and not with_towers
        kept = {name: getattr(self.config, name) for name in (*TOWER_FIELDS, *SOURCE_FIELDS)}
        if not adapter:
            for source, name in SOURCE_FIELDS.items():
                if kept[name] is not None and not Path(kept[name]).is_dir():
                    setattr(self.config, source, kept[name])
            for name in TOWER_FIELDS:
                setattr(self.config, name, None)
        self.config.custom_pipelines = CUSTOM_PIPELINES
        try:
            tensors = self._saved_tensors(adapter, state_dict)
            super().save_pretrained(save_directory, is_main_process, tensors, *args, **kwargs)
        finally:
            for name, value in kept.items():
                setattr(self.config, name, value)
        if processor is None:
            return
        folder = Path(save_directory)
        if self.config.text_adapter:
            self.language_model.save_pretrained(folder / LORA_FOLDER)
        processor.save_pretrained(folder)
        draws = bool(self.config.n_drawing_tokens)
        save_companions(folder, self._source, lora=self.config.text_adapter, draws=draws, pool=pool)
        if golden:
            save_golden(self, folder)
        follow_umask(folder)

    def _saved_tensors(self, adapter: bool, given: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
        """What `model.safetensors` is to hold. A LoRA is saved beside it, and the LLM's tensors keep their own names."""
        tensors = self.state_dict() if given is None else given
        if adapter:
            tensors = {n: tensor for n, tensor in tensors.items() if n.split(".")[0] in self.own_tensors}
        if any(tensor.is_meta for tensor in tensors.values()):  # offloaded
            try:  # as in identity_unimur; accelerate it was that offloaded them
                from accelerate.utils.modeling import get_state_dict_offloaded_model
            except ImportError as error:
                raise ImportError(
                    "weights that are offloaded need accelerate to be saved: pip install accelerate"
                ) from error
            tensors = {n: t for n, t in tensors.items() if not t.is_meta} | get_state_dict_offloaded_model(self)
        return {plain_name(n): tensor for n, tensor in tensors.items() if LORA not in n}

    def push_to_hub(  # type: ignore[override]  # a card and a pool in the place of tags and a description
        self, repo_id: str, *, card: ModelCard | None = None, pool: CandidatePool | None = None,
        commit_message: str | None = "Upload UniMuR", private: bool | None = None, token: bool | str | None = None,
        revision: str | None = None, create_pr: bool = False, max_shard_size: int | str = "50GB",
    ) -> str:  # fmt: skip
        """
        Uploads model, processor, code, card, pipeline, endpoint handler, sentence-transformers module and golden vectors.

        Args:
            repo_id: `org/name`; created where it does not exist.
            card: by default [`model_card`] of what the config knows, unless the repository has a card already.
            pool: a pool to pack beside the model, which endpoints and pipelines then search; replaces one that is there.
            commit_message, private, token, revision, create_pr, max_shard_size: as transformers' models take them.

        Returns:
            URL of the commit.

        Raises:
            ValueError: the pool was made by another model, or the model is an adapter on towers in local folders.
        """
        refuse_local_towers(self.config.to_dict())
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, max_shard_size=max_shard_size, pool=pool, golden=True)
            if card is None and not api.file_exists(repo_id, "README.md", revision=revision):
                card = model_card(self.config, repo_id, has_pool=pool is not None)
            if card is not None:
                card.save(Path(folder) / "README.md")
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=commit_message, revision=revision,
                create_pr=create_pr, delete_patterns=FORMER_POOL if pool is not None else None,
            )  # fmt: skip

    # What is saved beside the weights

    @property
    def processor(self) -> UniMuRProcessor:
        """
        The checkpoint's processor, loaded from beside its weights when first needed. Raises `ValueError` where it is not
        this model's, `OSError` where a file of it is missing or damaged.
        """
        if self._processor is None:
            if not self._source:
                raise ValueError("this model was not loaded from a checkpoint: set model.processor first")
            with _reading(self._source, self.config_class):
                self.processor = UniMuRProcessor.from_pretrained(**self._source)
        assert self._processor is not None
        check_positions(self.config, self._processor)  # it may have been changed since
        return self._processor

    @processor.setter
    def processor(self, processor: UniMuRProcessor) -> None:
        check_processor(self.config, processor)
        self._processor = processor

    @property
    def packed_pool(self) -> CandidatePool:
        """
        The pool packed beside the checkpoint, in its folder or its Hub repository.

        Raises:
            ValueError: the model was not loaded from a checkpoint, or no pool is packed with it.
        """
        if self._packed_pool is None:
            self._packed_pool = packed_pool(self._source)
        return self._packed_pool

    def open_pool(self, path: str | Path) -> CandidatePool:
        """A saved pool. Raises `FileNotFoundError` where there is none, `ValueError` where another model made it."""
        pool = CandidatePool.load_from_disk(path)
        pool.check_made_by(self.fingerprint)
        return pool

    def pool_from_hub(self, repo_id: str, **arguments: Any) -> CandidatePool:
        """
        A pool that `CandidatePool.push_to_hub` uploaded; `arguments` (revision, token, cache_dir, ...) as its `from_hub`.

        Raises:
            ValueError: another model made it; the message says what differs.
        """
        pool = CandidatePool.from_hub(repo_id, **arguments)
        pool.check_made_by(self.fingerprint)
        return pool

    # Identity

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What makes two models' embeddings comparable; see [`identity_unimur.fingerprint`]."""
        return fingerprint(self)

    def self_check(self) -> dict[str, float]:
        """
        Compares embeddings of fixed inputs with those saved beside the checkpoint.

        Returns:
            The largest difference of a coordinate, for a dialogue, an image and a text.

        Raises:
            ValueError: the checkpoint holds no golden vectors, or one differs; the message says which and by how much.
            OSError: the file of golden vectors is damaged.
        """
        path = beside_weights(self._source, GOLDEN)
        if path is None:
            raise ValueError(f"the checkpoint holds no {GOLDEN}: save it with save_pretrained(..., golden=True)")
        return compare_golden(self, path)


def check_processor(config: UniMuRConfig, processor: UniMuRProcessor) -> None:
    """
    Refuses a processor whose tensors the model would read differently.

    Raises:
        ValueError: token ids, `ret_prompt` or `n_visual_tokens` differ, or texts may be longer than a tower's positions.
    """
    if processor.ret_prompt != config.ret_prompt:
        raise ValueError(
            f"the processor puts {processor.ret_prompt!r} before [RET] and the model's config says "
            f"{config.ret_prompt!r}: the embeddings would be another model's. Make ret_prompt the same in "
            "config.json and processor_config.json, as it was in training"
        )
    for name in (*TOKENS, "n_visual_tokens"):
        stated, given = getattr(config, name), getattr(processor, name)
        if stated is not None and stated != given:
            raise ValueError(
                f"{name} is {stated} in the model's config and {given} in the processor: one of config.json and the "
                "processor's files is damaged or of another checkpoint"
            )
    check_positions(config, processor)
    clip = config.towers[1]
    length = clip_text_length(clip)
    if processor.clip_text_length != length:
        raise ValueError(
            f"the processor's clip_text_length={processor.clip_text_length}, and a {clip.model_type} needs "
            f"{length}: make the processor with clip_text_length={length}"
        )
    vocabulary = clip.text_config.vocab_size
    if len(processor.clip_tokenizer) > vocabulary:
        raise ValueError(
            f"clip_tokenizer has {len(processor.clip_tokenizer)} tokens and {clip.model_type}'s text tower "
            f"{vocabulary}: it is another model's tokenizer"
        )


def check_positions(config: UniMuRConfig, processor: UniMuRProcessor) -> None:
    """Raises `ValueError` where the processor's dialogues may be longer than the LLM's positions."""
    limit = positions(config.towers[0])
    if limit is not None and processor.max_length > limit:
        raise ValueError(
            f"the processor's max_length={processor.max_length} is more than the {limit} positions of the language model: "
            f"make the processor with max_length={limit}"
        )


@contextmanager
def _reading(source: dict[str, Any], config_class: type[PreTrainedConfig]) -> Iterator[None]:
    """Turns what damaged files raise, which may be anything, into an `OSError` that names the file."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the tokenizers' Rust panics are no Exception
        file = None if isinstance(error, (OSError, ImportError)) else damaged_file(source, config_class)
        if file is None:
            raise
        name = str(source["pretrained_model_name_or_path"])
        raise OSError(f"{file!r} of the checkpoint {name!r} is damaged: restore it. The cause: {error}") from error
