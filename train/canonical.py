r"""
The unified space in closed form: regularised canonical correlation between the LLM's state at [RET] and CLIP's image.

What Section 3.2 trains by gradient, W_t2m against CLIP's fixed embeddings, is fitted to captions and queried by
conversations, in a space where all images are in one narrow cone. Canonical correlation (Hotelling, Biometrika 1936;
regularised by Vinod, J. Econometrics 1976) asks instead which directions of a state h `(d,)` and of an image's feature
v `(c,)` predict each other. With S_ab the covariance of a and b over the pairs:

    h is whitened by       R_h = (S_hh + rho tr(S_hh)/d I)^-1/2
    v is whitened by       R_v = (S_vv + eps tr(S_vv)/c I)^-1/2
    R_h S_hv R_v = U diag(s) V^T        s_1 >= s_2 >= ...: the canonical correlations
    W_t2m = diag(s^w) U_k^T R_h,  b = -W_t2m E[h]
    W_v2m = diag(s^w) V_k^T R_v,  b = -W_v2m E[v]

Both means are subtracted, so that images spread around the origin instead of along a cone; the first k directions are
kept; each counts on both sides by its correlation to the power w, so that a cosine trusts what both views agree on. Texts
come through W_t2m and images through W_v2m to places of the same spread: one pool ranks both.

Dual alignment (eq. 7) has a third view, CLIP's text embedding x `(q,)` of the same caption. Canonical correlation of
several sets (Kettenring, Biometrika 1971, MAXVAR) takes it in with weight lambda2: the leading eigenvectors of the matrix
of blocks sqrt(l_a l_b) R_a S_ab R_b, where l = 1 for h and v. Its part for x is W_x2m, the target of eq. 6 in this space.
With lambda2 = 0 the solution is the one above, and W_x2m the regression of the states' places on x.

Interleaved documents add a context's state and its reply's image to S_hh, S_hv and S_vv: a share of the moments.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from train.moments import Moments, Spectrum

STATE, TEXT = "state", "text"
FLOOR = 1e-4  # eps: of the mean eigenvalue


@dataclass(frozen=True)
class Setting:
    """
    What the solution leaves open.

    Args:
        feature: the view that W_v2m reads, `"pooled"` or `"projected"`.
        width: k, the directions kept.
        ridge: rho, in units of the state's mean variance.
        power: w, of the correlations.
        text_weight: lambda2 of CLIP's text embedding as a third view; 0: two views.
        document_share: of interleaved documents in the moments, from 0 to below 1.
    """

    feature: str
    width: int
    ridge: float
    power: float
    text_weight: float = 0.0
    document_share: float = 0.0


@dataclass
class CanonicalMaps:
    """
    The maps into the shared space, float64: view -> weight `(k, width)` and bias `(k,)`.

    Attributes:
        correlations: `(k,)`, of states and images in each direction.
    """

    maps: dict[str, tuple[torch.Tensor, torch.Tensor]]
    correlations: torch.Tensor

    def of(self, view: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """The map of a view: rows `(n, width)` -> `(n, k)` float32, not normalised."""
        weight, bias = (value.float() for value in self.maps[view])
        return lambda rows: rows.to(weight) @ weight.T + bias


class Correlations:
    """
    Everything that follows from the moments of pairs and of documents, each spectrum computed once.

    Args:
        pairs: of the views `"state"`, `"text"` and the image features.
        documents: of the views `"state"` and the image features, or `None`.

    Raises:
        ValueError: a view does not vary, or there are fewer than two pairs.
    """

    def __init__(self, pairs: Moments, documents: Moments | None = None):
        self.pairs, self.documents = pairs, documents
        self._spectra: dict[tuple[str, float], Spectrum] = {}

    def directions(
        self, feature: str, ridge: float, text_weight: float = 0.0, share: float = 0.0
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Per view the canonical directions `(width, k)`, and their correlations `(k,)`; k is all there are."""
        weights = {STATE: 1.0, feature: 1.0} | ({TEXT: text_weight} if text_weight else {})
        roots = {view: self._spectrum(view, share).inverse(0.5, ridge if view == STATE else FLOOR) for view in weights}
        whitened = roots[STATE] @ self.covariance(STATE, feature, share) @ roots[feature]
        if text_weight:
            parts = self._several_sets(roots, weights, share)
            s = (parts[STATE] * (whitened @ parts[feature])).sum(0)
        else:
            u, s, v = torch.linalg.svd(whitened, full_matrices=False)
            parts = {STATE: u, feature: v.T}
        return {view: roots[view] @ part for view, part in parts.items()}, s.clamp(0, 1)

    def maps(self, setting: Setting) -> CanonicalMaps:
        """The maps of one setting. Raises `ValueError` where there are fewer directions than its width."""
        directions = self.directions(setting.feature, setting.ridge, setting.text_weight, setting.document_share)
        return self.cut(directions, setting)

    def cut(self, directions: tuple[dict[str, torch.Tensor], torch.Tensor], setting: Setting) -> CanonicalMaps:
        """The maps of the setting's first directions, weighted by its power."""
        parts, s = directions
        if not 1 <= setting.width <= len(s):
            raise ValueError(f"width={setting.width}: there are {len(s)} canonical directions")
        s = s[: setting.width]
        weights = {v: s[:, None] ** setting.power * part[:, : setting.width].T for v, part in parts.items()}
        if TEXT not in weights:
            to_states = weights[STATE] @ self.pairs.covariance(STATE, TEXT)
            weights[TEXT] = to_states @ self._spectrum(TEXT, 0.0).inverse(1.0, FLOOR)
        share = setting.document_share
        return CanonicalMaps({v: (w, -w @ self.mean(v, share)) for v, w in weights.items()}, s)

    def covariance(self, a: str, b: str, share: float) -> torch.Tensor:
        """Of two views, documents taking `share` of the moments where they have both."""
        return self._both(share, a, b).covariance(a, b)

    def mean(self, view: str, share: float) -> torch.Tensor:
        return self._both(share, view).mean(view)

    def _both(self, share: float, *views: str) -> Moments:
        if not share or TEXT in views:
            return self.pairs
        if self.documents is None:
            raise ValueError(f"document_share={share}: there are no documents to take a share of")
        names = list(dict.fromkeys(views))
        pairs, documents = (moments.of(*names) for moments in (self.pairs, self.documents))
        # Counted as if there were so many of them; the pairs' count stays the pairs'.
        return pairs + share / (1 - share) * (pairs.count / documents.count).item() * documents

    def _spectrum(self, view: str, share: float) -> Spectrum:
        key = (view, share)
        if key not in self._spectra:
            self._spectra[key] = Spectrum(self.covariance(view, view, share), f"the {view} of a pair")
        return self._spectra[key]

    def _several_sets(
        self, roots: Mapping[str, torch.Tensor], weights: Mapping[str, float], share: float
    ) -> dict[str, torch.Tensor]:
        """MAXVAR: each view's unit directions `(width, k)`."""
        blocks = [
            [(weights[a] * weights[b]) ** 0.5 * roots[a] @ self.covariance(a, b, share) @ roots[b] for b in weights]
            for a in weights
        ]
        matrix = torch.cat([torch.cat(row, dim=1) for row in blocks])
        k = min(len(root) for root in roots.values())
        vectors = torch.linalg.eigh((matrix + matrix.T) / 2).eigenvectors.flip(1)[:, :k]
        split = vectors.split([len(roots[view]) for view in weights])
        return {view: part / part.norm(dim=0).clamp(min=1e-12) for view, part in zip(weights, split, strict=True)}
