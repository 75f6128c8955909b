r"""
The paper's alignment in closed form: W_t2m by ridge regression, towards CLIP's own embeddings.

With h a caption's output at [RET] `(d,)`, v its image's CLIP embedding, L2-normalised `(q,)`, and S_ab the covariance of
a and b over the pairs:

    ridge      B = S_vh (S_hh + rho tr(S_hh)/d I)^-1          v's best linear prediction from h
    whitening  P = (S_vv + eps tr(S_vv)/q I)^-p                p = 0: none; p = 1/2: whitened once; p = 1: fully
    W_t2m      W = a P B,   b = -W E[h]

L_tm (eq. 6) alone is the ridge with CLIP's text embedding as its target and p = 0. The image target with p > 0 replaces
L_vm (eq. 3-5): without the mean, and with the common directions of CLIP's embeddings turned down, a cosine with an
image tells it apart from the others, which is what InfoNCE asks for. The mean of v does not enter b, since it adds the
same to every image's score. The factor a gives e_t the mean square length one, that of eq. 6's target.

It ranks images among images and texts among texts. In a pool of both, two texts seen through one map are closer together
than a text and an image, so that texts come first: search with `calibrate=True` or an `image_bias`, train on from here, or
take the canonical alignment ([`train.canonical`]), which has no such fault.

W_i2t is a ridge regression too, of z, the mean of a caption's input embeddings `(d,)`, on the image feature f `(c,)`. One
visual token starts there; several each have a word of their own ([`train.visual_words`]).
"""

import torch

from train.moments import Moments, Spectrum

FLOOR = 1e-4  # eps: of the mean eigenvalue, beside each eigenvalue that is raised to a negative power


def ridge_map(
    moments: Moments, ridge: float, x: str, y: str, spectrum: Spectrum | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The ridge regression of view y on view x with an intercept: `B` `(width of y, width of x)` and `b`, float64, minimising
    `mean |y - B x - b|^2 + rho tr(S_xx)/n |B|^2`.

    Args:
        ridge: rho, in units of the mean variance of x.
        spectrum: of x, where the caller has it.

    Raises:
        ValueError: x does not vary, or rho is too small for its covariance.
    """
    spectrum = spectrum or Spectrum(moments.covariance(x, x), f"the {x}")
    weight = moments.covariance(y, x) @ spectrum.inverse(1.0, ridge)
    return weight, moments.mean(y) - weight @ moments.mean(x)


def matching_map(
    moments: Moments, ridge: float, power: float, x: str, y: str, spectra: tuple[Spectrum, Spectrum] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_t2m's weight `(q, d)` and bias `(q,)`, float64, of states x and image embeddings y; see above."""
    of_x, of_y = spectra or (Spectrum(moments.covariance(v, v), f"the {v}") for v in (x, y))
    weight, _ = ridge_map(moments, ridge, x, y, of_x)
    weight = of_y.inverse(power, FLOOR) @ weight
    weight = weight / ((weight @ moments.covariance(x, x)) * weight).sum().sqrt()  # a: E|W (h - E[h])|^2 = 1
    return weight, -weight @ moments.mean(x)
