"""The model card that a push writes, from what the config knows and what the pusher says."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .configuration_unimur import UniMuRConfig

PIPELINE_TAG = "feature-extraction"
TAGS = ["multimodal-retrieval", "image-text-retrieval", "unimur", "sentence-transformers", "custom_code"]


@dataclass(frozen=True)
class Licence:
    """A tower's: the Hub's `identifier`, a `name` for readers, where it is written, and whether it forbids commercial use."""

    identifier: str
    name: str
    link: str | None = None
    non_commercial: bool = False


# By the beginning of the name of a tower, or of a diffusion model.
LICENCES = {
    "facebook/opt-": Licence(
        "other", "OPT-175B License Agreement",
        "https://github.com/facebookresearch/metaseq/blob/main/projects/OPT/MODEL_LICENSE.md", True,
    ),
    "openai/clip-": Licence("mit", "MIT", "https://github.com/openai/CLIP/blob/main/LICENSE"),
    "openai-community/gpt2": Licence("mit", "MIT", "https://github.com/openai/gpt-2/blob/master/LICENSE"),
    "meta-llama/": Licence("other", "Llama Community License Agreement"),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Licence("creativeml-openrail-m", "CreativeML Open RAIL-M"),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One measured figure: `value` with its 95 % interval `low` to `high` over `n` items, in the unit of `metric`."""

    task: str
    dataset: str
    protocol: str
    metric: str
    value: float
    low: float
    high: float
    n: int

    def check(self) -> None:
        """Raises `ValueError` where a figure is not finite or outside its interval."""
        figures = (self.low, self.value, self.high)
        if not all(map(math.isfinite, figures)) or not self.low <= self.value <= self.high:
            raise ValueError(f"{self.task}, {self.metric}: {self.value} in [{self.low}, {self.high}] is no figure")


TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A frozen language model reads a conversation of text and images that ends in a `[RET]` token; one linear map takes its last
output to a unified embedding; cosine similarity against one pool of images and texts returns the words of a reply and its
picture. An implementation of
[Unified Embeddings for Multimodal Retrieval via Frozen LLMs](https://aclanthology.org/2024.findings-eacl.105) (UniMuR).

- Language model: {{ text_model }}
- CLIP: {{ clip_model }}
- This repository holds {{ holds }}; embeddings have {{ dimension }} dimensions.
{% if draws %}- It draws: {{ draws }}
{% endif %}
## Use

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{{ repo_id }}", trust_remote_code=True)
pool = model.build_pool(images=["photo-1.jpg", "photo-2.jpg"], texts=["you are welcome.", "what a lovely day!"])
reply = model.retrieve(["look who i met!", "show me, please."], pool)
print(reply.text, reply.image, [(c.id, c.modality, c.score) for c in reply.candidates])
```

A dialogue is a string, a list mixing strings and images (`PIL.Image`, `pathlib.Path` or bytes), or chat messages with image
parts. `top_k`, `modality`, `exclude`, `image_bias` and `calibrate` narrow and shift a search.

As a pipeline:

```python
from transformers import pipeline

retrieve = pipeline("multimodal-retrieval", model="{{ repo_id }}", trust_remote_code=True)
reply = retrieve(["look who i met!"], pool={"images": ["photo-1.jpg"], "texts": ["you are welcome."]})
print(reply["text"], reply["image"])
```

With sentence-transformers:

```python
from PIL import Image
from sentence_transformers import SentenceTransformer

encoder = SentenceTransformer("{{ repo_id }}", trust_remote_code=True)
queries = encoder.encode_query(["show me a photo, please."])
candidates = encoder.encode_document([Image.open("photo-1.jpg"), "you are welcome."])
print(encoder.similarity(queries, candidates))
```
{% if has_pool %}
The pool under `pool/` is what an Inference Endpoint of this repository searches (`handler.py`), and what
`model.packed_pool` opens:

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{{ repo_id }}", trust_remote_code=True)
print(model.retrieve("hello!", model.packed_pool).text)
```
{% endif %}
## Evaluation
{% if results %}
In brackets: the 95 % bootstrap interval over the items, and how many they are.

| task | data | protocol | measured |
|---|---|---|---|
{% for (task, dataset, protocol), rows in results -%}
| {{ task }} | {{ dataset }} | {{ protocol }} | {% for r in rows %}{{ r.metric }} {{ "%.3f"|format(r.value) }} ({{ "%.3f"|format(r.low) }}-{{ "%.3f"|format(r.high) }}; {{ r.n }}){% if not loop.last %}, {% endif %}{% endfor %} |
{% endfor %}
{% else %}
No evaluation was given when this card was written.
{% endif %}
{{ evaluation_note }}

## Training

{{ training_data }}

The two linear maps{{ also_trained }} were trained by captioning and by {{ aligned }}; language
model and CLIP stayed frozen.

## Intended use and limits

Research on retrieval of text and images for conversations. All that it returns is from the pool it searches{{ ", but for pictures that it was asked to draw" if draws }}: the pool's
content, and who may see it, are its owner's responsibility. The biases of the frozen language model, of CLIP and of the
training captions carry over. Scores are cosines, not probabilities, and are not comparable between models. A picture is shown
when it is the best of what remains beside the best text, whether or not the conversation asks for one.

## Licences

{% for name, licence in licences -%}
- {{ name }}: {% if licence.link %}[{{ licence.name }}]({{ licence.link }}){% else %}{{ licence.name }}{% endif %}{% if licence.non_commercial %}. **Non-commercial: what is built on this tower, this model included, may not be used commercially.**{% endif %}
{% endfor %}
## Citation

```bibtex
@inproceedings{wang-etal-2024-unified,
    title = "Unified Embeddings for Multimodal Retrieval via Frozen {LLM}s",
    author = "Wang, Ziyang and Elfardy, Heba and Dreyer, Markus and Small, Kevin and Bansal, Mohit",
    booktitle = "Findings of the Association for Computational Linguistics: EACL 2024",
    year = "2024",
    url = "https://aclanthology.org/2024.findings-eacl.105",
}
```
"""  # noqa: E501


def slug(name: str) -> str:
    """A name as identifiers are written: `"image R@1"` -> `"image-r@1"`."""
    return re.sub(r"[^\w@.]+", "-", name.lower()).strip("-")


def licence_of(tower: str) -> Licence:
    """What is known of a tower's licence by its name; otherwise that its own card says it."""
    return next(
        (known for start, known in LICENCES.items() if tower.startswith(start)), Licence("other", "as its card says")
    )


def drawing_sentence(config: UniMuRConfig) -> str:
    """With what a checkpoint draws, as a sentence; empty for one that cannot draw."""
    if not config.n_drawing_tokens:
        return ""
    name = _drawing_model(config)
    revision = f" at revision `{config.drawing_model_revision or 'main'}`"
    model = f"[{name}](https://huggingface.co/{name}){revision}" if name else "one that is not on the Hub"
    return (
        f'`retrieve(..., generate="always")` and `generate` draw a picture by a frozen diffusion model, {model}, which this '
        "repository does not hold (`pip install diffusers`)."
    )


def _drawing_model(config: UniMuRConfig) -> str | None:
    """The diffusion model of a checkpoint that draws, by its name on the Hub."""
    return _public(config.drawing_model_name_or_path) if config.n_drawing_tokens else None


def _public(name: str | None) -> str | None:
    """A model's name on the Hub; a folder's says nothing to others."""
    return None if name is None or Path(name).is_absolute() or Path(name).is_dir() else name


def model_card(
    config: UniMuRConfig, repo_id: str, *, license: str | None = None, training_data: str | None = None,
    datasets: Sequence[str] = (), results: Sequence[Result] = (), evaluation_note: str = "", has_pool: bool = False,
) -> ModelCard:  # fmt: skip
    """
    The card of a checkpoint.

    Args:
        config: of the model.
        repo_id: where it will live.
        license: the Hub's identifier for the trained maps (and a full checkpoint's towers); a non-commercial tower
            overrules it.
        training_data: what it was trained on and under which licence, as markdown.
        datasets: the training sets' names on the Hub.
        results: measured figures, those of a task and protocol beside each other.
        evaluation_note: what a reader must know of them.
        has_pool: whether a pool is packed beside the model.

    Raises:
        ValueError: a figure or its interval is not finite, or the interval does not hold the value.
    """
    for result in results:
        result.check()
    named = _named_towers(config)
    licences = [(tower, licence_of(tower)) for tower in named if tower]
    strict = next((licence for _, licence in licences if licence.non_commercial), None)
    own = Licence(license or "not stated", license or "not stated by who pushed this")
    drawing = _drawing_model(config)
    described = [
        f"[{name}](https://huggingface.co/{name})" if name else f"its own, {tower.model_type} of width {width}"
        for name, tower, width in zip(named, config.towers, (config.text_width, config.clip_width), strict=True)
    ]
    data = _metadata(repo_id, named, strict, license, datasets, results)
    return ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=repo_id.split("/")[-1],
        repo_id=repo_id,
        text_model=described[0],
        clip_model=described[1],
        holds="the trained maps only: the towers are loaded from where they are" if config.is_adapter
        else "everything: the maps and both towers",
        dimension=config.embedding_width,
        draws=drawing_sentence(config),
        results=[(key, list(rows)) for key, rows in groupby(results, lambda r: (r.task, r.dataset, r.protocol))],
        evaluation_note=evaluation_note,
        has_pool=has_pool,
        training_data=training_data or "What it was trained on was not stated by who pushed this.",
        aligned="alignment to CLIP's image and text embeddings" if config.alignment == "paper" else
        f"alignment to images in a space of {config.shared_width} canonical correlations, into which a fixed map brings CLIP's "
        "image features",
        also_trained=" and the input embedding of `[RET]`" if config.train_ret_embedding else "",
        licences=[
            ("the trained maps" if config.is_adapter else "the checkpoint", own), *licences,
            *([(drawing, licence_of(drawing))] if drawing else []),
        ],
    )  # fmt: skip


def _named_towers(config: UniMuRConfig) -> list[str | None]:
    """Both towers by their names on the Hub."""
    sources = (
        config.text_model_name_or_path or config.text_model_source,
        config.clip_model_name_or_path or config.clip_model_source,
    )
    return [_public(source) for source in sources]


def _metadata(
    repo_id: str, towers: Sequence[str | None], strict: Licence | None, license: str | None, datasets: Sequence[str],
    results: Sequence[Result],
) -> ModelCardData:  # fmt: skip
    """What the Hub reads of a card; `strict`: a tower's licence that overrules `license`."""
    return ModelCardData(
        language="en",
        license=strict.identifier if strict else license,
        license_name=strict.name.lower().replace(" ", "-") if strict else None,
        license_link=strict.link if strict else None,
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        tags=TAGS,
        base_model=[name for name in towers if name] or None,
        datasets=list(datasets) or None,
        model_name=repo_id.split("/")[-1] if results else None,
        eval_results=[
            EvalResult(
                task_type=PIPELINE_TAG, task_name=r.task, dataset_type=slug(r.dataset),
                dataset_name=r.dataset, dataset_config=r.protocol, metric_type=slug(r.metric),
                metric_name=f"{r.metric}, 95 % interval {r.low:.3f} to {r.high:.3f}", metric_value=round(r.value, 6),
            )
            for r in results
        ] or None,
    )  # fmt: skip
