"""From a name and a folder to a system."""

from modeling_unimur import UniMuRModel

from .baselines.clip import ClipBaseline
from .language import LanguageSystem
from .systems import Embedder, System

KINDS = ("unimur", "clip", "fromage", "fromage-ppl", "blip2", "frozen")


class UniMuR(Embedder, LanguageSystem):
    """A [`UniMuRModel`] as the tasks see it."""

    def __init__(self, model: UniMuRModel, name: str = "UniMuR"):
        super().__init__(model, name)


def load(kind: str, path: str, name: str | None = None) -> System:
    """
    Args:
        kind: one of `KINDS`; `"clip"` is the CLIP inside the UniMuR checkpoint at `path`.
        path: a folder or a name on the Hub.
        name: of the row; the kind's own by default.

    Raises:
        ValueError: an unknown kind.
    """
    if kind == "unimur":
        system = UniMuR(UniMuRModel.from_pretrained(path))
    elif kind == "clip":
        system = ClipBaseline(UniMuRModel.from_pretrained(path))
    elif kind in ("fromage", "fromage-ppl"):
        from .baselines.fromage import Fromage, FromageModel
        from .baselines.perplexity import FromagePerplexity

        system = (Fromage if kind == "fromage" else FromagePerplexity)(FromageModel.from_pretrained(path))
    elif kind == "blip2":
        from .baselines.blip2 import Blip2Baseline

        system = Blip2Baseline.from_pretrained(path)
    elif kind == "frozen":
        from .baselines.frozen import Frozen, FrozenModel

        system = Frozen(FrozenModel.from_pretrained(path))
    else:
        raise ValueError(f"no system {kind!r}; there are {', '.join(KINDS)}")
    system.name = name or system.name
    return system
