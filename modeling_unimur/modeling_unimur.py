"""UniMuR (Sections 3.1-3.3): a frozen LLM and a frozen CLIP joined by two linear maps. Section 3.4: retrieval_unimur."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, CLIPModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .checkpoint_unimur import CheckpointMixin
from .configuration_unimur import UniMuRConfig
from .hub_unimur import HubMixin
from .losses_unimur import linear_caption_loss, text_matching_loss, total_loss, visual_matching_loss
from .packing_unimur import block_mask, positions
from .processing_unimur import IGNORE, UniMuRProcessor
from .retrieval_unimur import RetrievalMixin
from .towers_unimur import LORA, OWN_TENSORS


@dataclass
class UniMuROutput(ModelOutput):
    """
    Args:
        loss: scalar, eq. 7 over the losses whose inputs were given.
        loss_cap, loss_vm, loss_tm: scalars, eq. 1-6, `None` where not computed.
        ret_embeds: `(n, q)` float32, e_t at [RET], not normalised.
        image_embeds: `(images, q)` float32, the unified embeddings of the batch's images.
        text_embeds: `(texts, q)` float32, the targets of eq. 6.
    """

    loss: torch.Tensor | None = None
    loss_cap: torch.Tensor | None = None
    loss_vm: torch.Tensor | None = None
    loss_tm: torch.Tensor | None = None
    ret_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None


class UniMuRModel(RetrievalMixin, HubMixin, CheckpointMixin, PreTrainedModel):
    """
    The model: `language_model` and `clip` frozen; `W_i2t` (image feature to `n_visual_tokens` input embeddings),
    `W_t2m` (last output at [RET] to the unified embedding e), the temperature, and by choice [RET]'s input embedding
    trained. In the canonical alignment also `W_v2m` (image feature to the unified embedding) and `W_x2m` (CLIP's text
    embedding to the same space), found in closed form and frozen. These tensors are float32 whatever the towers' dtype.
    Its verbs are those of [`RetrievalMixin`]; loading and saving are [`CheckpointMixin`]'s.
    """

    config_class = UniMuRConfig
    base_model_prefix = ""
    main_input_name = "ret_input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = list(OWN_TENSORS)
    own_tensors = OWN_TENSORS  # names that start a tensor of the model's own rather than of a tower

    def __init__(self, config: UniMuRConfig):
        super().__init__(config)
        for name, (width_in, width_out) in self.map_widths(config).items():
            setattr(self, name, nn.Linear(width_in, width_out))
        self.ret_embedding = nn.Parameter(torch.empty(config.text_width))
        # One element rather than a scalar: sharding libraries refuse scalars.
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.language_model: PreTrainedModel | None = None
        self.clip: CLIPModel | None = None
        if not config.is_adapter:
            self.language_model = AutoModelForCausalLM.from_config(config.text_config)
            self.clip = CLIPModel._from_config(config.clip_config)
        self._processor: UniMuRProcessor | None = None
        self._digested: tuple | None = None  # the maps' state and its hash
        self._source: dict[str, Any] = {}  # the arguments it was loaded by
        self.post_init()
        self._freeze()

    @staticmethod
    def map_widths(config: UniMuRConfig) -> dict[str, tuple[int, int]]:
        """The linear maps: name -> widths in and out."""
        widths = {
            "W_i2t": (config.image_feature_width, config.n_visual_tokens * config.text_width),
            "W_t2m": (config.text_width, config.embedding_width),
        }
        if config.alignment == "canonical":
            widths["W_v2m"] = (config.matching_feature_width, config.shared_width)
            widths["W_x2m"] = (config.clip_width, config.shared_width)
        return widths

    @staticmethod
    def trained_maps(config: UniMuRConfig) -> set[str]:
        """Names of the maps that are trained; W_v2m and W_x2m are found in closed form."""
        return {"W_i2t", "W_t2m"} | ({"W_v2m"} if config.train_image_map else set())

    @property
    def maps(self) -> list[nn.Linear]:
        return [getattr(self, name) for name in self.map_widths(self.config)]

    def set_shared_space(self, width: int, feature: str) -> None:
        """
        Gives the canonical alignment another width k and image feature: `W_t2m`, `W_v2m` and `W_x2m` are new, to be filled.

        Raises:
            ValueError: the alignment is the paper's, or what [`UniMuRConfig`] refuses.
        """
        config = self.config
        config.shared_width, config.matching_feature = width, feature
        config.validate_unimur()
        for name in ("W_t2m", "W_v2m", "W_x2m"):
            setattr(self, name, nn.Linear(*self.map_widths(config)[name], device=self.device))
        self._freeze()

    def _init_weights(self, module: nn.Module) -> None:
        if module in self.maps:
            # nn.Linear's own scale: the usual 0.02 leaves visual tokens an order below word embeddings.
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
            return
        super()._init_weights(module)
        if module is self:
            init.normal_(self.ret_embedding, std=0.02)
            init.constant_(self.logit_scale, math.log(1 / self.config.temperature))

    def _freeze(self) -> None:
        self.requires_grad_(False)
        for name in self.trained_maps(self.config):
            getattr(self, name).requires_grad_(True)
        self.logit_scale.requires_grad_(self.config.learn_temperature)
        self.ret_embedding.requires_grad_(self.config.train_ret_embedding)
        for name, parameter in self.named_parameters():
            if LORA in name:
                parameter.requires_grad_(True)

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
        with torch.no_grad():
            pooled = self.clip.vision_model(pixel_values.to(self.clip.dtype)).pooler_output
            embeds = self.clip.visual_projection(pooled).float()
        return (pooled.float() if self.config.image_feature == "pooled" else embeds), embeds

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
        with torch.no_grad():
            pooled = self.clip.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
            return self.clip.text_projection(pooled).float()

    def input_embeddings(self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None) -> torch.Tensor:
        """
        The LLM's input `(n, length, d)`: its own rows for text, `ret_embedding` at [RET] and, at `<image>`,
        `W_i2t` of `image_features` `(slots / n_visual_tokens, c)` in the order of the slots.
        """
        is_ret, is_image = input_ids == self.config.ret_token_id, input_ids == self.config.image_token_id
        embeds = self.language_model.get_input_embeddings()(input_ids.masked_fill(is_ret | is_image, 0))
        embeds = torch.where(is_ret[..., None], self.ret_embedding.to(embeds.dtype), embeds)
        if image_features is not None and len(image_features):
            visual = self.W_i2t(image_features).to(embeds.dtype).reshape(-1, embeds.shape[-1])
            # Gathered by number: masked_scatter's backward would make the host wait for the device.
            numbers = is_image.flatten().cumsum(0).sub(1).clamp(min=0).reshape(is_image.shape)
            embeds = torch.where(is_image[..., None], visual[numbers], embeds)
        return embeds

    def last_outputs(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, packing: dict[str, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """
        The LLM's trunk, without its vocabulary head: `(n, length, d)` -> `(n, length, d)`. Padding on either side gives
        the same; with a `packing` of [`plan_packing`] (right-padded sequences only) it is not computed at all.
        """
        trunk = self.language_model.base_model
        if packing is None:
            position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            return trunk(
                inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            ).last_hidden_state
        packed = inputs_embeds.flatten(0, 1)[packing["index"]]
        outputs = trunk(
            inputs_embeds=packed, attention_mask=block_mask(packing["segments"], packed.dtype),
            position_ids=positions(packing["segments"]), use_cache=False,
        ).last_hidden_state  # fmt: skip
        return outputs.flatten(0, 1)[packing["unpack"]]

    def ret_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_features: torch.Tensor | None = None,
        packing: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """h([RET]), the LLM's last output at [RET]: contexts `(n, length)` ending in [RET] -> `(n, d)` float32."""
        hidden = self.last_outputs(self.input_embeddings(input_ids, image_features), attention_mask, packing)
        at_ret = (input_ids == self.config.ret_token_id).int().argmax(-1)
        return hidden[torch.arange(len(hidden), device=hidden.device), at_ret].float()

    def encode_contexts(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """e_t = W_t2m h([RET]): contexts `(n, length)` ending in [RET] -> `(n, q)` float32, not normalised."""
        return self.W_t2m(self.ret_states(input_ids, attention_mask, image_features))

    def caption_states(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_features: torch.Tensor,
        label_positions: torch.Tensor, packing: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Last outputs `(m, d)` from which the m labelled tokens are predicted, the positions before theirs."""
        hidden = self.last_outputs(self.input_embeddings(input_ids, image_features), attention_mask, packing)
        return hidden.flatten(0, 1)[label_positions - 1]

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        label_positions: torch.Tensor | None = None,
        image_indices: torch.Tensor | None = None,
        packing: dict[str, torch.Tensor] | None = None,
        ret_input_ids: torch.Tensor | None = None,
        ret_attention_mask: torch.Tensor | None = None,
        ret_image_indices: torch.Tensor | None = None,
        ret_packing: dict[str, torch.Tensor] | None = None,
        image_rows: torch.Tensor | None = None,
        target_indices: torch.Tensor | None = None,
        text_rows: torch.Tensor | None = None,
        clip_input_ids: torch.Tensor | None = None,
        clip_attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        ret_states: torch.Tensor | None = None,
        negatives: torch.Tensor | None = None,
    ) -> UniMuROutput:
        """
        The losses of eq. 7 on a batch of [`UniMuRProcessor.documents`] or `pairs`.

        L_cap is computed where `labels` are given, L_vm and L_tm where `ret_input_ids` are; the weights lambda1 and
        lambda2 of zero skip their loss. CLIP runs once per image, for prefix and target both, and not at all where
        `image_features` `(i, c)` and `image_embeds` `(i, clip_width)` are given, CLIP's as `encode_images` has them, or
        `text_embeds` `(texts, clip_width)`, CLIP's too. With [RET] frozen
        the LLM's output there may be given too: `ret_states` `(n, d)` instead of `ret_input_ids`. `packing` and
        `ret_packing` are [`plan_packing`]'s of the two passes, `negatives` `(m, q)` further images of eq. 4.

        Raises:
            ValueError: neither kind of input is given.
        """
        config = self.config
        if labels is None and ret_input_ids is None and ret_states is None:
            raise ValueError("give labels (captioning), ret_input_ids or ret_states (matching), or both")
        if pixel_values is not None and len(pixel_values):
            image_features, image_embeds = self.encode_images(pixel_values)

        loss_cap = loss_vm = loss_tm = ret_embeds = None
        if labels is not None:
            if label_positions is None:  # the processor's batches have them, so that no device waits here
                label_positions = (labels.flatten() != IGNORE).nonzero()[:, 0]
            hidden = self.caption_states(
                input_ids, attention_mask, image_features[image_indices], label_positions, packing
            )
            loss_cap = linear_caption_loss(  # eq. 1-2
                hidden, self.language_model.get_output_embeddings(), labels.flatten()[label_positions]
            )
        if ret_states is None and ret_input_ids is not None:
            shown = None
            if ret_image_indices is not None and image_features is not None:
                shown = image_features[ret_image_indices]
            ret_states = self.ret_states(ret_input_ids, ret_attention_mask, shown, ret_packing)
        if ret_states is not None:
            ret_embeds = self.W_t2m(ret_states)
            scale = self.logit_scale.exp().clamp(max=100)
            if image_embeds is not None:
                image_embeds = self.unify_images(image_features, image_embeds)
            else:  # documents of words alone; another process's may have images
                image_embeds = ret_embeds.new_zeros(0, ret_embeds.shape[1])
            if config.lambda1:
                loss_vm = visual_matching_loss(  # eq. 3-5
                    ret_embeds[image_rows], image_embeds[target_indices], scale, negatives
                )
            if config.lambda2:
                if text_embeds is None and clip_input_ids is None:  # documents whose replies are images alone
                    text_embeds = ret_embeds.new_zeros(0, config.clip_width)
                elif text_embeds is None:
                    text_embeds = self.encode_clip_texts(clip_input_ids, clip_attention_mask)
                text_embeds = self.unify_clip_texts(text_embeds)
                loss_tm = text_matching_loss(  # eq. 6
                    ret_embeds[text_rows], text_embeds, kind=config.text_matching, target=config.text_target,
                    reduction=config.text_target_reduction, logit_scale=scale, margin=config.margin,
                )  # fmt: skip
        parts = [0.0 if part is None else part for part in (loss_cap, loss_vm, loss_tm)]
        return UniMuROutput(
            loss=total_loss(*parts, config.lambda1, config.lambda2),  # eq. 7
            loss_cap=loss_cap, loss_vm=loss_vm, loss_tm=loss_tm,
            ret_embeds=ret_embeds, image_embeds=image_embeds, text_embeds=text_embeds,
        )  # fmt: skip


# What save_pretrained writes then loads elsewhere with trust_remote_code, without this package.
UniMuRModel.register_for_auto_class("AutoModel")
