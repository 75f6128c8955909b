"""UniMuR (Sections 3.1-3.3): a frozen LLM and a frozen CLIP joined by two linear maps. Section 3.4: retrieval_unimur."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from .batch_unimur import Captions, Contexts, Images, Packing, Targets
from .checkpoint_unimur import CheckpointModel
from .configuration_unimur import TOKENS, UniMuRConfig
from .generation_unimur import Drawing, DrawingMixin, drawing_loss
from .losses_unimur import (
    linear_caption_loss,
    sigmoid_matching_loss,
    text_matching_loss,
    total_loss,
    visual_matching_loss,
)
from .packing_unimur import block_mask, positions
from .processing_unimur import IGNORE
from .retrieval_unimur import RetrievalMixin
from .towers_unimur import (
    LORA,
    OWN_TENSORS,
    attention_window,
    encode_images,
    encode_texts,
    packs_exactly,
    trunk_outputs,
)

logger = logging.get_logger(__name__)


@dataclass
class UniMuROutput(ModelOutput):
    """
    Args:
        loss: scalar, eq. 7 over the losses whose inputs were given.
        loss_cap, loss_vm, loss_tm: scalars, eq. 1-6, `None` where not computed.
        loss_draw: scalar, that of the mapper (Appendix A.2), `None` where not computed.
        ret_embeds: `(n, q)` float32, e_t at [RET], not normalised.
        image_embeds: `(images, q)` float32, the unified embeddings of the batch's images.
        text_embeds: `(texts, q)` float32, the targets of eq. 6.
    """

    loss: torch.Tensor | None = None
    loss_cap: torch.Tensor | None = None
    loss_vm: torch.Tensor | None = None
    loss_tm: torch.Tensor | None = None
    loss_draw: torch.Tensor | None = None
    ret_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None


PADS = "a packed row of this LLM ({}) is not its sequences one by one, as with ALiBi or a state-space layer"


class UniMuRModel(DrawingMixin, RetrievalMixin, CheckpointModel):
    """
    The model: `language_model` and `clip` frozen; `W_i2t` (image feature to `n_visual_tokens` input embeddings),
    `W_t2m` (last output at [RET] to the unified embedding e), the temperature, and by choice [RET]'s input embedding
    trained. In the canonical alignment also `W_v2m` (image feature to the unified embedding) and `W_x2m` (CLIP's text
    embedding to the same space), solved in closed form and frozen. These tensors are float32 whatever the towers' dtype.
    With `n_drawing_tokens` also `drawing`, trained: [IMG] tokens and the mapper to a diffusion model.
    Its verbs are those of [`RetrievalMixin`] and [`DrawingMixin`]; loading and saving are [`CheckpointModel`]'s.
    """

    config: UniMuRConfig
    config_class = UniMuRConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    _supports_sdpa = True
    _supports_flash_attn = True
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = list(OWN_TENSORS)
    _keep_in_fp32_modules = list(OWN_TENSORS)  # what quantisers leave alone
    own_tensors = OWN_TENSORS

    def __init__(self, config: UniMuRConfig):
        super().__init__(config)
        self.W_i2t = nn.Linear(config.image_feature_width, config.n_visual_tokens * config.text_width)
        self.W_t2m = nn.Linear(config.text_width, config.embedding_width)
        if config.alignment == "canonical":
            self.W_v2m = nn.Linear(config.matching_feature_width, config.embedding_width)
            self.W_x2m = nn.Linear(config.clip_width, config.embedding_width)
        self.ret_embedding = nn.Parameter(torch.empty(config.text_width))
        # One element rather than a scalar: sharding libraries refuse scalars.
        self.logit_scale = nn.Parameter(torch.empty(1))
        if config.visual_matching == "sigmoid":
            self.logit_bias = nn.Parameter(torch.empty(1))
        if config.n_drawing_tokens:
            self.drawing = Drawing(config)
        self.make_towers()
        self.post_init()
        self.freeze()

    def make_towers(self) -> None:
        """The towers of a full checkpoint, to be filled; an adapter's are attached when it has been loaded."""
        self.language_model = self.clip = None
        self._packing: bool | None = None  # whether the LLM packs, known from the first packed batch on
        if not self.config.is_adapter:
            self.language_model = AutoModelForCausalLM.from_config(self.config.text_config)
            self.clip = AutoModel.from_config(self.config.clip_config)

    def set_shared_space(self, width: int, feature: str) -> None:
        """
        Gives the canonical alignment another width k and image feature: `W_t2m`, `W_v2m` and `W_x2m` are new, to be filled.

        Raises:
            ValueError: the alignment is the paper's, or what [`UniMuRConfig`] refuses.
        """
        config = self.config
        before = config.shared_width, config.matching_feature
        config.shared_width, config.matching_feature = width, feature
        try:
            config.validate_unimur()
        except ValueError:
            config.shared_width, config.matching_feature = before
            raise
        self.W_t2m = nn.Linear(config.text_width, width, device=self.device)
        self.W_v2m = nn.Linear(config.matching_feature_width, width, device=self.device)
        self.W_x2m = nn.Linear(config.clip_width, width, device=self.device)
        self.freeze()

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.language_model is None else self.language_model.get_output_embeddings()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and module in self.children():
            # nn.Linear's own scale: the usual 0.02 leaves visual tokens an order below word embeddings.
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
            return
        super()._init_weights(module)
        if isinstance(module, Drawing):
            module.init_weights()
        if module is self:
            init.normal_(self.ret_embedding, std=0.02)
            init.constant_(self.logit_scale, math.log(1 / self.config.temperature))
            if "logit_bias" in self._parameters:
                init.constant_(self.logit_bias, self.config.logit_bias)

    def freeze(self) -> None:
        """Lets gradients into the maps that are trained, the temperature and [RET] by choice, and a LoRA."""
        self.requires_grad_(False)
        for name in self.trained_maps():
            getattr(self, name).requires_grad_(True)
        self.logit_scale.requires_grad_(self.config.learn_temperature)
        self.ret_embedding.requires_grad_(self.config.train_ret_embedding)
        if self.config.n_drawing_tokens:
            self.drawing.requires_grad_(True)
        for name, parameter in self.named_parameters():
            if LORA in name or name == "logit_bias":
                parameter.requires_grad_(True)

    def trained_maps(self) -> set[str]:
        """Names of the maps that are trained; W_v2m (unless asked for) and W_x2m are solved for in closed form."""
        return {"W_i2t", "W_t2m"} | ({"W_v2m"} if self.config.train_image_map else set())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "UniMuRModel":
        # `.half()`, `.to(dtype)` and their like are for the towers: the model's own tensors stay float32.
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        if recurse:
            for name, child in self.named_children():
                child._apply(moved if name in self.own_tensors else fn)
        return super()._apply(moved, recurse=False)

    def _set_gradient_checkpointing(self, *args, **kwargs) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        self.train(self.training)  # what `train` does for it depends on neither order

    def train(self, mode: bool = True) -> "UniMuRModel":
        super().train(mode)
        for tower in (self.language_model, self.clip):
            if tower is not None:  # frozen: no dropout either
                tower.eval()
        if mode and self.language_model is not None:
            # A layer recomputes its activations only where it believes to be training; nothing below it may drop out.
            for module in self.language_model.modules():
                if getattr(module, "gradient_checkpointing", False):
                    module.training = True
                    for name, value in vars(module).items():
                        if "drop" in name and isinstance(value, float):
                            setattr(module, name, 0.0)
        return self

    # Section 3.1-3.3: the pieces

    def encode_images(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        One pass of CLIP's visual tower: `(i, 3, h, w)` -> what `W_i2t` reads `(i, c)` and CLIP's image embedding
        `(i, clip_width)`, float32, neither normalised. Nothing in them is trained.
        """
        pooled, embeds = encode_images(self.clip, pixel_values)
        return (pooled if self.config.image_feature == "pooled" else embeds), embeds

    def unify_images(self, features: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """
        The unified embedding `(i, q)` float32, not normalised, of images as `encode_images` gives them: CLIP's own in the
        paper's alignment, W_v2m's in the canonical one.
        """
        if self.config.alignment == "paper":
            return embeds
        return self.W_v2m(features if self.config.matching_feature == "pooled" else F.normalize(embeds, dim=-1))

    def unify_clip_texts(self, embeds: torch.Tensor) -> torch.Tensor:
        """
        CLIP's text embeddings `(n, clip_width)`, not normalised, in the unified space: `(n, q)`. Canonical correlation
        saw them normalised, and so W_x2m reads them.
        """
        return embeds if self.config.alignment == "paper" else self.W_x2m(F.normalize(embeds, dim=-1))

    def encode_clip_texts(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """CLIP's text embedding `(n, clip_width)`, float32, not normalised."""
        return encode_texts(self.clip, input_ids, attention_mask)

    def input_embeddings(
        self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None, fixed_images: bool = False
    ) -> torch.Tensor:
        """
        The LLM's input `(n, length, d)`: its own rows for text, `ret_embedding` at [RET] and, at `<image>`,
        `W_i2t` of `image_features` `(slots / n_visual_tokens, c)` in the order of the slots; `fixed_images` sends no gradient
        to `W_i2t`.
        """
        is_ret, is_image = (self._at(input_ids, name) for name in TOKENS)
        embeds = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_ret | is_image, 0))
        embeds = torch.where(is_ret[..., None], self.ret_embedding.to(embeds.dtype), embeds)
        if image_features is not None and len(image_features):
            visual = self.W_i2t(image_features).to(embeds.dtype).reshape(-1, embeds.shape[-1])
            visual = visual.detach() if fixed_images else visual
            # Gathered by number: masked_scatter's backward would make the host wait for the device.
            numbers = is_image.flatten().cumsum(0).sub(1).clamp(min=0).reshape(is_image.shape)
            embeds = torch.where(is_image[..., None], visual[numbers], embeds)
        return embeds

    def _at(self, input_ids: torch.Tensor, name: str) -> torch.Tensor:
        """Where ids are the token of one of `TOKENS`: bool. Raises `ValueError` where the config has no id for it."""
        token = getattr(self.config, name)
        if token is None:
            raise ValueError(f"the model's config has no {name}: set it to the processor's")
        return input_ids.eq(token)

    def last_outputs(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, packing: Packing | None = None
    ) -> torch.Tensor:
        """
        The LLM's trunk, without its vocabulary head: `(n, length, d)` -> `(n, length, d)`. Padding on either side gives
        the same; with a `packing` of [`plan_packing`] (right-padded sequences only) it is not computed at all, where the
        LLM gives the same packed.
        """
        if packing is None or not self._packs(inputs_embeds.shape[1]):
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            return trunk_outputs(self.language_model, inputs_embeds, attention_mask, position_ids)
        packed = inputs_embeds.flatten(0, 1)[packing["index"]]
        outputs = trunk_outputs(
            self.language_model, packed, block_mask(packing["segments"], packed.dtype), positions(packing["segments"])
        )
        return outputs.flatten(0, 1)[packing["unpack"]]

    def _packs(self, length: int) -> bool:
        """Whether sequences of up to `length` positions may share a row of this LLM."""
        if self._packing is None:
            self._packing = packs_exactly(self.language_model)
            if not self._packing:
                logger.warning(
                    f"{PADS.format(self.language_model.config.model_type)}: positions are padded, not packed"
                )
        window = attention_window(self.language_model.config)
        if window is not None and length > window:
            logger.warning_once(
                f"sequences of {length} exceed the LLM's window of {window}: they are padded, not packed"
            )
            return False
        return self._packing

    def ret_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_features: torch.Tensor | None = None,
        packing: Packing | None = None, fixed_images: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """h([RET]), the LLM's last output at [RET]: contexts `(n, length)` ending in [RET] -> `(n, d)` float32."""
        embeds = self.input_embeddings(input_ids, image_features, fixed_images)
        hidden = self.last_outputs(embeds, attention_mask, packing)
        at_ret = self._at(input_ids, "ret_token_id").int().argmax(-1)
        return hidden[torch.arange(len(hidden), device=hidden.device), at_ret].float()

    def encode_contexts(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """e_t = W_t2m h([RET]): contexts `(n, length)` ending in [RET] -> `(n, q)` float32, not normalised."""
        return self.W_t2m(self.ret_states(input_ids, attention_mask, image_features))

    def caption_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_features: torch.Tensor,
        label_positions: torch.Tensor, packing: Packing | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Last outputs `(m, d)` from which the m labelled tokens are predicted, the positions before theirs."""
        hidden = self.last_outputs(self.input_embeddings(input_ids, image_features), attention_mask, packing)
        return hidden.flatten(0, 1)[label_positions - 1]

    def forward(
        self,
        captions: Captions | None = None,
        contexts: Contexts | None = None,
        targets: Targets | None = None,
        images: Images | None = None,
        negatives: torch.Tensor | None = None,
        drawing_targets: torch.Tensor | None = None,
    ) -> UniMuROutput:
        """
        The losses of eq. 7 on a batch of [`UniMuRProcessor.documents`] or `pairs`; its parts are those of
        [`batch_unimur.Batch`].

        L_cap is computed where there are `captions`, L_vm and L_tm where there are `contexts` with their `targets`; the
        weights lambda1 and lambda2 of zero skip their loss. CLIP runs once per image, for prefix and target both, and
        not at all on what a part brings along from before. `negatives` `(m, q)` are further images of eq. 4. The mapper's
        loss is computed where there are `drawing_targets`, in the contexts' pass, which is then not packed.

        Raises:
            ValueError: neither captions nor contexts are given, contexts without targets of any kind, or `drawing_targets`
                beside states from before.
        """
        if captions is None and contexts is None:
            raise ValueError("give captions, contexts with their targets, or both")
        if contexts is not None and targets is None and drawing_targets is None:
            raise ValueError("contexts need their targets")
        features, embeds = self._encoded(images)
        losses: dict[str, torch.Tensor] = {}
        given: dict[str, torch.Tensor | None] = {}
        if captions is not None:
            losses["loss_cap"] = self.caption_loss(captions, features)
        states = None
        if contexts is not None and drawing_targets is not None:
            states, losses["loss_draw"] = self.drawing_pass(contexts, features, drawing_targets)
        if contexts is not None and targets is not None:
            ret_embeds = self.W_t2m(self._states(contexts, features) if states is None else states)
            # Also of no image: with a gradient that other processes' images lack, the processes would wait for each other.
            image_embeds = self.unify_images(features, embeds)
            given = {"ret_embeds": ret_embeds, "image_embeds": image_embeds}
            scale = self.logit_scale.exp().clamp(max=100)  # 1 / tau of eq. 4-5
            if self.config.lambda1:
                losses["loss_vm"] = self.image_loss(ret_embeds, image_embeds, targets, scale, negatives)
            if self.config.lambda2:
                text_embeds = self._text_embeds(targets)
                given["text_embeds"] = text_embeds
                losses["loss_tm"] = self.text_loss(ret_embeds, text_embeds, targets, scale)
        loss = total_loss(
            losses.get("loss_cap", 0.0), losses.get("loss_vm", 0.0), losses.get("loss_tm", 0.0),
            self.config.lambda1, self.config.lambda2,
        )  # eq. 7  # fmt: skip
        if "loss_draw" in losses:
            loss = loss + self.config.lambda3 * losses["loss_draw"]
        return UniMuROutput(loss=loss, **losses, **given)

    def caption_loss(self, captions: Captions, features: torch.Tensor) -> torch.Tensor:
        """
        L_cap, eq. 1-2: scalar, over the captions behind their images' `features` `(i, c)`, and beyond the paper over the
        replies behind their contexts. Without a row it takes part in the mean over all processes.
        """
        labels, at = captions["labels"].flatten(), captions.get("label_positions")
        if at is None:  # the processor's batches have them, so that no device waits here
            at = (labels != IGNORE).nonzero()[:, 0]
        head = self.language_model.get_output_embeddings()
        if not len(captions["labels"]):
            hidden = self.W_i2t(features[:0]).reshape(0, self.config.text_width).to(head.weight.dtype)
            return linear_caption_loss(hidden, head, labels)
        hidden = self.caption_states(
            captions["input_ids"], captions["attention_mask"], features[captions["image_indices"]], at,
            captions.get("packing"),
        )  # fmt: skip
        return linear_caption_loss(hidden, head, labels[at])

    def image_loss(
        self, ret_embeds: torch.Tensor, image_embeds: torch.Tensor, targets: Targets, scale: torch.Tensor,
        negatives: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """L_vm, eq. 3-5 or SigLIP's: scalar, between e_t `(n, q)` and its target among `image_embeds` `(i, q)`."""
        texts, images = ret_embeds[targets["image_rows"]], image_embeds[targets["image_indices"]]
        if self.config.visual_matching == "sigmoid":
            return sigmoid_matching_loss(texts, images, scale, self.logit_bias, negatives)
        return visual_matching_loss(texts, images, scale, negatives)

    def text_loss(
        self, ret_embeds: torch.Tensor, text_embeds: torch.Tensor, targets: Targets, scale: torch.Tensor
    ) -> torch.Tensor:
        """L_tm, eq. 6 or Table 5's: scalar, between e_t `(n, q)` and the target texts' embeddings `(t, q)`."""
        config = self.config
        return text_matching_loss(
            ret_embeds[targets["text_rows"]], text_embeds, kind=config.text_matching, target=config.text_target,
            reduction=config.text_target_reduction, logit_scale=scale, margin=config.margin,
        )  # fmt: skip

    def drawing_pass(
        self, contexts: Contexts, features: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The contexts with [IMG] tokens behind [RET]: h([RET]) `(n, d)` and the mapper's loss, a scalar. Raises `ValueError`
        where the contexts are states from before.
        """
        if "states" in contexts:
            raise ValueError("[IMG] tokens behind [RET] need the LLM: give the contexts' input_ids, not their states")
        at = contexts.get("image_indices")
        states = self.drawing_states(
            contexts["input_ids"], contexts["attention_mask"], None if at is None else features[at],
            contexts.get("fixed_images", False),
        )  # fmt: skip
        return states[:, 0], drawing_loss(self.drawing(states, self.ret_embedding), targets)

    def _encoded(self, images: Images | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `(i, c)` and CLIP's embeddings `(i, clip_width)` of a batch's images, from before or computed."""
        images = images or {}
        if "pixel_values" in images:
            return self.encode_images(images["pixel_values"])
        widths = self.config.image_feature_width, self.config.clip_width
        none = [self.logit_scale.new_zeros(0, width) for width in widths]
        return images.get("features", none[0]), images.get("embeds", none[1])

    def _states(self, contexts: Contexts, features: torch.Tensor) -> torch.Tensor:
        if "states" in contexts:
            return contexts["states"]
        at = contexts.get("image_indices")
        return self.ret_states(
            contexts["input_ids"], contexts["attention_mask"], None if at is None else features[at],
            contexts.get("packing"), contexts.get("fixed_images", False),
        )  # fmt: skip

    def _text_embeds(self, targets: Targets) -> torch.Tensor:
        embeds = targets.get("text_embeds")
        if embeds is None and "input_ids" not in targets:  # documents whose replies are images alone
            embeds = self.logit_scale.new_zeros(0, self.config.clip_width)
        elif embeds is None:
            embeds = self.encode_clip_texts(targets["input_ids"], targets["attention_mask"])
        return self.unify_clip_texts(embeds)


# What save_pretrained writes then loads elsewhere with trust_remote_code, without this package.
UniMuRModel.register_for_auto_class("AutoModel")
