"""Frozen (Tsimpoukelli et al., NeurIPS 2021): an image encoder trained through the frozen LLM by captioning."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel, PreTrainedConfig, set_seed
from transformers.configuration_utils import SubConfigSpec
from transformers.trainer_utils import IntervalStrategy

from benchmarks.language import LanguageSystem
from modeling_unimur import UniMuRConfig, UniMuRModel
from modeling_unimur.checkpoint_unimur import CheckpointModel
from train.arguments import CONFIGS, parse
from train.collate import PairCollator
from train.miniature.prepare import Miniature
from train.miniature.world import SIZE
from train.run import make_processor
from train.trainer import UniMuRTrainer


@strict
class FrozenConfig(UniMuRConfig):
    """
    Configuration of a [`FrozenModel`].

    Args:
        vision_config: of the image encoder, a ViT (the paper's is an NF-ResNet-50, which transformers does not have);
            by default that of CLIP's ViT-B/32, from scratch.
    """

    model_type = "frozen"
    _auto_class = None  # a baseline: its code does not travel with its checkpoints
    sub_configs_defaults = UniMuRConfig.sub_configs_defaults | {"vision_config": SubConfigSpec(CLIPVisionConfig)}

    vision_config: dict | PreTrainedConfig | None = None
    n_visual_tokens: int = 2  # the paper's

    @property
    def image_feature_width(self) -> int:
        """c: width of the encoder's pooled output."""
        return self.vision_config.hidden_size


# transformers looks a checkpoint's config up even to load its tokenizer; unregistered, it would warn.
AutoConfig.register(FrozenConfig.model_type, FrozenConfig, exist_ok=True)


class FrozenModel(UniMuRModel):
    """
    `vision_encoder` and `W_i2t` are trained by eq. 1-2, everything else is frozen. Only CLIP's preprocessing
    is used, and there is no embedding: `W_t2m` and the matching losses do not exist.
    """

    config_class = FrozenConfig
    own_tensors = ("W_i2t", "vision_encoder", "ret_embedding", "logit_scale")
    _keep_in_fp32_modules_strict = list(own_tensors)

    def __init__(self, config: FrozenConfig):
        CheckpointModel.__init__(self, config)  # UniMuR's tensors without W_t2m
        self.W_i2t = nn.Linear(config.image_feature_width, config.n_visual_tokens * config.text_width)
        self.ret_embedding = nn.Parameter(torch.empty(config.text_width))
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.make_towers()
        self.post_init()
        self.vision_encoder = CLIPVisionModel._from_config(config.vision_config)
        self.post_init()
        self.freeze()

    def trained_maps(self) -> set[str]:
        return {"W_i2t"}

    def freeze(self) -> None:
        """Lets gradients into the map and the image encoder."""
        super().freeze()
        self.logit_scale.requires_grad_(False)
        self.ret_embedding.requires_grad_(False)
        self.vision_encoder.requires_grad_(True)

    def encode_images(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoder's pooled output `(i, c)`, with gradient, in place of both outputs of CLIP."""
        pooled = self.vision_encoder(pixel_values=pixel_values.float()).pooler_output
        return pooled, pooled


class Frozen(LanguageSystem):
    """Frozen's answers about images; it has no embeddings."""

    def __init__(self, model: FrozenModel, name: str = "Frozen"):
        self.model, self.name = model, name

    @property
    def revision(self) -> dict[str, Any]:
        return {name: self.model.fingerprint[name] for name in ("towers", "maps", "preprocessing")}


def train_frozen(
    output_dir: str | Path, miniature: Miniature, seed: int, *, learning_rate: float = 1e-3, max_steps: int = 320,
    batch_size: int = 64, ret_init: str | None = "#", n_visual_tokens: int = 6, width: int = 96, layers: int = 2,
    disable_tqdm: bool = False,
) -> str:  # fmt: skip
    """
    Trains the encoder and the map on the miniature's pairs, by the same trainer as UniMuR and with as many visual tokens.

    Args:
        width, layers: of the image encoder; by default those of the miniature's CLIP.

    Returns:
        The checkpoint's folder.
    """
    model_args, _, args = parse([
        "--config", str(CONFIGS / "miniature.yaml"), "--config", str(CONFIGS / "paper.yaml"),
        f"--learning_rate={learning_rate}", f"--max_steps={max_steps}",
        "--schedule=captioning", f"--seed={seed}", f"--output_dir={output_dir}", f"--disable_tqdm={disable_tqdm}",
        f"--per_device_train_batch_size={batch_size}", "--gradient_accumulation_steps=1",
        f"--n_visual_tokens={n_visual_tokens}",
    ])  # fmt: skip
    args.eval_strategy = IntervalStrategy.NO
    model_args.text_model, model_args.clip_model = miniature.text_model, miniature.clip_model
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=max(1, width // 32),
        image_size=SIZE, patch_size=16,
    )  # fmt: skip
    set_seed(seed)
    model = FrozenModel.from_pretrained_towers(
        miniature.text_model, miniature.clip_model, make_processor(model_args), ret_init=ret_init, vision_config=vision
    )
    collator = PairCollator(model.processor, seed=seed)
    trainer = UniMuRTrainer(model=model, args=args, train_dataset=miniature.pairs, data_collator=collator)
    trainer.train()
    checkpoint = Path(output_dir) / "checkpoint"
    model.save_pretrained(checkpoint, with_towers=True)
    trainer.state.save_to_json(str(Path(output_dir) / "trainer_state.json"))
    return str(checkpoint)
