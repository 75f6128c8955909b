"""One seed of the ablations on the miniature: rows trained at every learning rate, measured on validation and on test.

With [RET] frozen, L_cap trains only W_i2t and L_vm + L_tm only W_t2m, so rows that differ in W_t2m share
W_i2t, and train on the LLM's cached outputs at [RET].
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy

from modeling_unimur import UniMuRModel
from train.arguments import CONFIGS, parse
from train.closed_form import Grid, solve_canonical, sum_pairs
from train.collate import PairCollator, SkipCounter
from train.features import MatchingStates, cache_image_features
from train.miniature import prepare
from train.miniature.towers import pretrain_opt
from train.miniature.world import splits
from train.run import make_processor
from train.sums import Sums
from train.trainer import UniMuRTrainer

from .baselines.clip import ClipBaseline
from .data import miniature
from .measure import Measure
from .protocols import protocols
from .schema import Dialogues
from .systems import cosine
from .tasks import image, response
from .tasks.candidates import Embedded, candidate_rows
from .tasks.contexts import context_of

# The ablations are the paper's, so they are made in its form.
PAPER = ("--config", str(CONFIGS / "miniature.yaml"), "--config", str(CONFIGS / "paper.yaml"))
RATES = (3e-3, 1e-2)  # where the LLM runs in every step
CANONICAL_RATES = (1e-4, 3e-4, 1e-3)  # where canonical correlation has put W_t2m near its place
MATCHING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # on cached states a run takes seconds
BASE_RATE = 1e-2  # of the part that a row shares with the others
SIZES = {"opt": None, "opt-64x1": {"width": 64, "layers": 1, "heads": 4}, "opt-192x3": {"width": 192, "layers": 3}}


@dataclass(frozen=True)
class Row:
    """
    A row of an ablation.

    Args:
        name: as printed.
        fields: of `UniMuRConfig`, instead of the miniature's own.
        part: what is trained for it: `"matching"` (W_t2m alone, on cached states), `"captioning"` (W_i2t alone),
            `"joint"` or `"alternating"` (everything, the LLM in the loop).
        language_model: one of `SIZES`.
        steps: instead of the miniature's own; 0 is the closed form alone.
        training: of `train/run.py`'s flags, instead of the miniature's own.
        grid: of [`train.closed_form.Grid`]'s fields, for the canonical alignment.
    """

    name: str
    fields: dict = field(default_factory=dict)
    part: str = "matching"
    language_model: str = "opt"
    steps: int | None = None
    training: dict | None = None
    grid: dict | None = None

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to choose from, the same for every row of a table."""
        if self.steps == 0:
            return (0.0,)
        if self.fields.get("alignment") == "canonical":
            return CANONICAL_RATES
        return MATCHING_RATES if self.part == "matching" else RATES

    @property
    def key(self) -> str:
        """Names what is trained, so that a row in several tables is trained once."""
        given = {k: v for k, v in asdict(self).items() if k != "name" and v is not None}
        if "text_candidates" in self.fields:  # a choice of the pool, not of training
            given["fields"] = {k: v for k, v in self.fields.items() if k != "text_candidates"}
        return hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()[:12]


class Seed:
    """The towers, cached states and evaluation data of one seed."""

    def __init__(self, folder: Path, seed: int):
        torch.set_num_threads(1)
        self.folder, self.seed = folder, seed
        self.miniature = prepare(folder, seed)
        self.runs = folder / "ablation"
        self.runs.mkdir(parents=True, exist_ok=True)
        self._rows, self._states, self._hidden, self._evaluation = None, {}, {}, {}
        self._sums: Sums | None = None

    def tower(self, name: str) -> str:
        if SIZES[name] is None:
            return self.miniature.text_model
        path = self.folder / "towers" / name
        if not (path / "config.json").is_file():
            pretrain_opt(path, splits()["train"], seed=self.seed, **SIZES[name])
        return str(path)

    def model(self, row: Row) -> UniMuRModel:
        """The untrained model of a row; every row of a seed starts from the same draw."""
        model_args, _, _ = parse(PAPER)
        for name, value in row.fields.items():
            setattr(model_args, name, value)
        model_args.text_model, model_args.clip_model = self.tower(row.language_model), self.miniature.clip_model
        if model_args.alignment == "canonical":
            model_args.init = "cca"
        set_seed(self.seed)
        return UniMuRModel.from_pretrained_towers(
            model_args.text_model, model_args.clip_model, make_processor(model_args), ret_init=model_args.ret_init,
            **model_args.config_fields(),
        )  # fmt: skip

    def trained(self, row: Row, rate: float) -> UniMuRModel:
        """The row's model after training at `rate`; the map it does not train is that of the miniature's settings."""
        tensors = self._tensors(row, rate)
        other = {"matching": ("captioning", "W_i2t"), "captioning": ("matching", "W_t2m")}.get(row.part)
        if other and row.language_model == "opt":
            shared = self._tensors(Row("shared", {}, other[0]), BASE_RATE)
            tensors |= {n: t for n, t in shared.items() if n.startswith(other[1])}
        model = self.model(row)
        if model.config.alignment == "canonical":
            width, feature_width = len(tensors["W_t2m.bias"]), tensors["W_v2m.weight"].shape[1]
            model.set_shared_space(
                width, "pooled" if feature_width == model.config.image_feature_width else "projected"
            )
        model.load_state_dict(tensors, strict=False)
        return model.eval()

    def _tensors(self, row: Row, rate: float) -> dict[str, torch.Tensor]:
        """What training the row gives, read from disk where an earlier call saved it."""
        path = self.runs / f"{row.key}-{rate:g}.safetensors"
        if not path.is_file():
            model = self.model(row)
            self._fit(model, row, rate)
            towers = ("language_model", "clip")
            save_file({n: p.detach() for n, p in model.named_parameters() if n.split(".")[0] not in towers}, path)
        return load_file(path)

    def _fit(self, model: UniMuRModel, row: Row, rate: float) -> None:
        _, _, args = parse([
            *PAPER, f"--learning_rate={rate}", f"--schedule={row.part}",
            f"--seed={self.seed}", f"--output_dir={self.runs}", "--disable_tqdm=true", "--logging_steps=1000",
            *([] if row.steps is None else [f"--max_steps={row.steps}"]),
            *(f"--{name}={value}" for name, value in (row.training or {}).items()),
        ])  # fmt: skip
        args.eval_strategy = IntervalStrategy.NO  # the rates are chosen by the tasks themselves
        if row.part == "matching":
            rows = self.states(row.language_model, model)
            collator = rows.collate
            if model.config.alignment == "canonical":
                solve_canonical(self.sums(rows, model), grid=Grid(**(row.grid or {}))).apply(model)
            if row.steps == 0:
                return
        else:
            rows, collator = self.pairs(model), PairCollator(model.processor, seed=self.seed)
        UniMuRTrainer(model=model, args=args, train_dataset=rows, data_collator=collator).train()

    def pairs(self, model: UniMuRModel):
        """The training pairs with CLIP's features, of the kind the model reads."""
        if model.config.image_feature != "pooled":
            return cache_image_features(self.miniature.pairs, model, SkipCounter())
        if self._rows is None:
            self._rows = cache_image_features(self.miniature.pairs, model, SkipCounter())
        return self._rows

    def states(self, language_model: str, model: UniMuRModel) -> MatchingStates:
        if language_model not in self._states:
            self._states[language_model] = MatchingStates(self.pairs(model), model, self.seed)
        return self._states[language_model]

    def sums(self, rows: MatchingStates, model: UniMuRModel) -> Sums:
        """What the canonical alignment is solved from, of every caption."""
        if self._sums is None:
            collator = PairCollator(model.processor, seed=self.seed)
            self._sums = sum_pairs(model, rows.pairs, collator, SkipCounter(), batch_size=256)
        return self._sums

    # Evaluation

    def evaluation(self, split: str) -> dict:
        """The two dialogue sets of a split, `"mmdialog"` and `"visdial"`, and their contexts."""
        if split not in self._evaluation:
            mmdialog, visdial = miniature.mmdialog(split), miniature.visdial(split)
            self._evaluation[split] = {
                "mmdialog": mmdialog, "visdial": visdial,
                "mmdialog contexts": [context_of(d, mmdialog.images) for d in mmdialog.dialogues],
                "visdial contexts": [context_of(d, visdial.images) for d in visdial.dialogues],
            }  # fmt: skip
        return self._evaluation[split]

    def embedded(self, model: UniMuRModel, split: str, which: str) -> Embedded:
        """Queries and candidates of one of the two sets; the LLM runs once for all models that share its inputs."""
        data, contexts = self.evaluation(split)[which], self.evaluation(split)[f"{which} contexts"]
        text_rows, image_rows = candidate_rows(data)
        texts = [data.texts[i] for i in text_rows]
        images = [data.images[i] for i in image_rows]
        inputs = [model.ret_embedding, model.W_i2t.weight] if which == "mmdialog" else [model.ret_embedding]
        key = (split, which, model.config.text_model_name_or_path, *(t.detach().double().sum().item() for t in inputs))
        if key not in self._hidden:
            self._hidden[key] = _hidden(model, contexts), (_hidden(model, [[t] for t in texts]) if texts else None)
        if (split, which) not in self._hidden:
            with torch.no_grad():
                self._hidden[split, which] = model.encode_images(model.processor.pixels(images))
        queries, words = self._hidden[key]
        with torch.no_grad():
            if texts and model.config.text_candidates != "ret":
                words = model.embed_texts(texts)
            elif texts:
                words = F.normalize(model.W_t2m(words), dim=-1)
            queries = F.normalize(model.W_t2m(queries), dim=-1)
            pictures = F.normalize(model.unify_images(*self._hidden[split, which]), dim=-1)
        return Embedded(queries, words, pictures, text_rows, image_rows)

    def response(self, model: UniMuRModel, split: str, image_bias: float = 0.0) -> dict[str, Measure]:
        """Table 1's measures."""
        (protocol,) = protocols("mmdialog", miniature=True)
        embedded, data = self.embedded(model, split, "mmdialog"), self.evaluation(split)["mmdialog"]
        if ("clip", split) not in self._hidden:
            self._hidden["clip", split] = response.clip_embeddings(ClipBaseline(model), data, embedded)
        return response.score(embedded, data, protocol, self._hidden["clip", split], cosine, image_bias=image_bias)

    def measure(self, model: UniMuRModel, split: str, *, images: bool = True) -> dict[str, Measure]:
        """The measures of a model on a split, by name; `images=False` leaves out what needs W_i2t."""
        to_image = next(p for p in protocols("visdial", miniature=True) if p.variant == "corrected")
        by_image = image.score(
            self.embedded(model, split, "visdial"), self.evaluation(split)["visdial"], to_image, cosine
        )
        result = {f"dialogue to image {name}": m for name, m in by_image.items()}
        if not images:
            return result
        (context,) = protocols("mmdialog_image", miniature=True)
        embedded, data = self.embedded(model, split, "mmdialog"), self.evaluation(split)["mmdialog"]
        result |= self.response(model, split)
        for name, wanted in (
            ("contextual image", "wants_image"),
            ("contextual image, image informs", "image_informs"),
        ):
            rows = [i for i, d in enumerate(data.dialogues) if d["wants_image"] and d[wanted]]
            part = Dialogues([data.dialogues[i] for i in rows], data.texts, data.images)
            few = replace(embedded, queries=embedded.queries[rows])
            result[f"{name} R@1"] = image.score(few, part, context, cosine)["R@1"]
        return result


def run_validation(folder: str, seed: int, rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """Trains every row at every rate: `key -> rate -> measure -> value` on validation."""
    bench = Seed(Path(folder), seed)
    results: dict[str, dict] = {}
    for row in rows:
        name = row.key + json.dumps(row.fields.get("text_candidates"))
        if name in results:
            continue
        results[name] = {}
        for rate in row.rates:
            model = bench.trained(row, rate)
            values = bench.measure(model, "validation", images=row.language_model == "opt")
            results[name][f"{rate:g}"] = {k: m.value for k, m in values.items()}
        print(f"seed {seed}: {row.name} on validation done", flush=True)
    return results


def run_test(
    folder: str, seed: int, rows: Sequence[Row], rates: Sequence[float], biases: Sequence[Sequence[float]]
) -> list[dict]:
    """
    Measures each row on test, at the rate chosen for it.

    Args:
        biases: for each row the modality biases at which Table 1 is measured too; empty for most rows.
    """
    bench = Seed(Path(folder), seed)
    results = []
    for row, rate, curve in zip(rows, rates, biases, strict=True):
        model = bench.trained(row, rate)
        measures = bench.measure(model, "test", images=row.language_model == "opt")
        result = {
            "seed": seed,
            "row": row.name,
            "rate": rate,
            "metrics": {k: m.summary() for k, m in measures.items()},
        }
        if curve:
            points = {bias: bench.response(model, "test", bias) for bias in curve}
            result["bias"] = [
                {"image_bias": bias} | {k: m.value for k, m in point.items() if k != "CLIP-Sim"}
                for bias, point in points.items()
            ]
        results.append(result)
    return results


@torch.no_grad()
def _hidden(model: UniMuRModel, contexts: Sequence) -> torch.Tensor:
    parts = []
    for first in range(0, len(contexts), 64):
        inputs = model.processor.contexts(contexts[first : first + 64])
        features = model.encode_images(inputs["pixel_values"])[0] if "pixel_values" in inputs else None
        parts.append(model.ret_states(inputs["input_ids"], inputs["attention_mask"], features))
    return torch.cat(parts)
