"""The losses of Section 3 (eq. 1-7) and Table 5's alternatives, as pure functions.

Over several processes every contrastive loss sees the global batch, and every mean is taken over the global count, so
that the average of the processes' losses and gradients is what one process would compute on the whole batch.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

SAME_IMAGE = 1 - 1e-5  # a cosine above it is that of an image with itself, to rounding


def caption_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    L_cap, eq. 1-2: mean negative log-likelihood of the caption's tokens given the visual prefix.

    Args:
        logits: `(m, vocabulary)`, the LLM's prediction for each caption token, at caption positions only.
        labels: `(m,)` int64, the tokens themselves, already shifted.

    Returns:
        Scalar float32; zero where there is no caption token.
    """
    return global_mean(F.cross_entropy(logits.float(), labels, reduction="sum"), labels.numel())


def linear_caption_loss(
    hidden: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor, chunk_elements: int = 2**22
) -> torch.Tensor:
    """
    `caption_loss(head(hidden), labels)` without ever holding all logits, for a frozen head.

    Args:
        hidden: `(m, d)`, the LLM's last outputs at the positions before caption tokens.
        head: the LLM's vocabulary head, `(vocabulary, d)`; it gets no gradient.
        labels: `(m,)` int64.
        chunk_elements: logits held at a time; where all fit, they are computed at once.

    Returns:
        Scalar float32.
    """
    rows = max(1, chunk_elements // head.weight.shape[0])
    if len(hidden) <= rows:
        return caption_loss(head(hidden), labels)
    total = _LinearCrossEntropy.apply(hidden, head.weight, head.bias, labels, rows)
    return global_mean(total, labels.numel())


class _LinearCrossEntropy(torch.autograd.Function):
    """The summed loss and, in the same pass, its gradient by `hidden`: (softmax - one-hot) W, a chunk at a time."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, rows):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), rows):
            here = slice(start, start + rows)
            log_probs = F.log_softmax(F.linear(hidden[here], weight, bias).float(), dim=-1)
            label = labels[here, None]
            of_labels = log_probs.gather(1, label)
            total -= of_labels.sum()
            if grad is not None:
                probabilities = log_probs.exp_()
                probabilities.scatter_add_(1, label, torch.full_like(of_labels, -1))
                grad[here] = probabilities.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        (grad,) = ctx.saved_tensors
        return grad * grad_total.to(grad.dtype), None, None, None, None


def visual_matching_loss(
    ret_embeds: torch.Tensor, image_embeds: torch.Tensor, logit_scale: torch.Tensor | float,
    negatives: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """
    L_vm = L_v2m + L_m2v, eq. 3-5: symmetric InfoNCE over cosines with in-batch negatives. Rows of the same image, known by
    its embedding, are not each other's negatives.

    Args:
        ret_embeds: `(n, q)`, e_t of the captions; need not be normalised.
        image_embeds: `(n, q)`, CLIP embeddings of the captions' images, row for row.
        logit_scale: 1 / tau.
        negatives: `(m, q)` L2-normalised, further images that e_t is contrasted with, beyond the paper. One that is the
            caption's own image counts as none.

    Returns:
        Scalar float32: the two directions summed, each a mean over the global batch.

    Raises:
        ValueError: the shapes differ.
    """
    _check_rows(ret_embeds, image_embeds)
    texts, images = (gather_rows(F.normalize(x.float(), dim=-1)) for x in (ret_embeds, image_embeds))
    logits = logit_scale * texts @ images.T
    if not len(logits):
        return logits.sum()
    # Frozen CLIP gives the same image the same embedding, so that equality tells it: rows of one image are no negatives.
    same = images @ images.T > SAME_IMAGE
    logits = logits.masked_fill(same.fill_diagonal_(False), -torch.inf)
    labels = torch.arange(len(logits), device=logits.device)
    by_text = logits
    if negatives is not None and len(negatives):
        further = logit_scale * texts @ negatives.T
        by_text = torch.cat([logits, further.masked_fill(images @ negatives.T > SAME_IMAGE, -torch.inf)], dim=1)
    return F.cross_entropy(by_text, labels) + F.cross_entropy(logits.T, labels)


def sigmoid_matching_loss(
    ret_embeds: torch.Tensor, image_embeds: torch.Tensor, logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float, negatives: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """
    SigLIP's loss (Zhai et al., ICCV 2023) in the place of L_vm, beyond the paper: each caption with each image of the
    global batch is a yes-or-no question, `-log sigmoid(z (t x.y + b))` with z = 1 for its own image and -1 for others.

    Args:
        ret_embeds, image_embeds, negatives: as `visual_matching_loss`'s.
        logit_scale, logit_bias: t and b.

    Returns:
        Scalar float32: the sum over images, a mean over the captions of the global batch.

    Raises:
        ValueError: the shapes differ.
    """
    _check_rows(ret_embeds, image_embeds)
    texts, images = (gather_rows(F.normalize(x.float(), dim=-1)) for x in (ret_embeds, image_embeds))
    logits = logit_scale * texts @ images.T + logit_bias
    own = torch.eye(len(logits), device=logits.device)
    terms = -F.logsigmoid((2 * own - 1) * logits)
    total = terms.masked_fill((images @ images.T > SAME_IMAGE) & (own == 0), 0).sum()
    if negatives is not None and len(negatives) and len(texts):
        further = -F.logsigmoid(-(logit_scale * texts @ negatives.T + logit_bias))
        total = total + further.masked_fill(images @ negatives.T > SAME_IMAGE, 0).sum()
    return total / max(len(logits), 1)


def text_matching_loss(
    ret_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    *,
    kind: str = "mse",
    target: str = "normalized",
    reduction: str = "mean",
    logit_scale: torch.Tensor | float = 1.0,
    margin: float = 0.2,
) -> torch.Tensor:
    """
    L_tm, eq. 6: squared L2 distance between e_t and the CLIP text embedding of the same caption; or, for Table 5,
    InfoNCE or max-margin between the two.

    Args:
        ret_embeds, text_embeds: `(n, q)`, row for row.
        kind: `"mse"`, `"infonce"` or `"max_margin"`.
        target: `"normalized"` or `"raw"`, the form of `text_embeds` that `"mse"` aims at.
        reduction: `"mean"` or `"sum"` of the squared distance over the q dimensions.
        logit_scale: 1 / tau, for `"infonce"`.
        margin: for `"max_margin"`.

    Returns:
        Scalar float32, a mean over the global batch.

    Raises:
        ValueError: the shapes differ, or `kind` is unknown.
    """
    _check_rows(ret_embeds, text_embeds)
    if kind == "infonce":
        return info_nce(ret_embeds, text_embeds, logit_scale)
    if kind == "max_margin":
        return max_margin(ret_embeds, text_embeds, margin)
    if kind != "mse":
        raise ValueError(f"kind={kind!r} is not one of 'mse', 'infonce', 'max_margin'")
    text_embeds = text_embeds.float()
    if target == "normalized":
        text_embeds = F.normalize(text_embeds, dim=-1)
    distance = (ret_embeds.float() - text_embeds).square()
    distance = distance.mean(-1) if reduction == "mean" else distance.sum(-1)
    return global_mean(distance.sum(), len(distance))


def total_loss(
    loss_cap: torch.Tensor | float, loss_vm: torch.Tensor | float, loss_tm: torch.Tensor | float,
    lambda1: float, lambda2: float,
) -> torch.Tensor:  # fmt: skip
    """L = L_cap + lambda1 L_vm + lambda2 L_tm, eq. 7."""
    return torch.as_tensor(loss_cap + lambda1 * loss_vm + lambda2 * loss_tm)


def info_nce(a: torch.Tensor, b: torch.Tensor, logit_scale: torch.Tensor | float) -> torch.Tensor:
    """Symmetric InfoNCE, both directions summed: `(n, q)`, `(n, q)` -> scalar; row i of `a` belongs to row i of `b`."""
    logits = logit_scale * _global_cosines(a, b)
    if not len(logits):
        return logits.sum()
    labels = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)


def max_margin(a: torch.Tensor, b: torch.Tensor, margin: float) -> torch.Tensor:
    """
    Bidirectional hinge over cosines with every in-batch negative: the mean over rows of
    `sum_{j != i} max(0, margin - s_ii + s_ij)`, both directions summed.
    """
    cosines = _global_cosines(a, b)
    if not len(cosines):
        return cosines.sum()
    own = cosines.diagonal()
    others = ~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)
    forth = (margin - own[:, None] + cosines).clamp(min=0) * others
    back = (margin - own[None, :] + cosines).clamp(min=0) * others
    return (forth.sum() + back.sum()) / len(cosines)


def global_mean(total: torch.Tensor, count: int) -> torch.Tensor:
    """`total / count` over all processes, scaled so that the processes' average is the global mean."""
    if not _is_distributed():
        return total / max(count, 1)
    counts = torch.tensor(float(count), device=total.device)
    dist.all_reduce(counts)
    return total * dist.get_world_size() / counts.clamp(min=1)


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """
    Rows of all processes, in rank order, with gradient: `(n_local, q)` -> `(n_global, q)`.

    Processes may hold different numbers of rows, since each drops its own broken pairs.
    """
    if not _is_distributed():
        return rows
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = [int(count) for count in counts]
    padded = F.pad(rows, (0, 0, 0, max(sizes) - len(rows)))
    gathered = _AllGather.apply(padded)
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])


class _AllGather(torch.autograd.Function):
    """All-gather whose gradient is the sum over processes: each computes the loss of the whole batch."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[dist.get_rank()]


def _global_cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    _check_rows(a, b)
    a, b = (gather_rows(F.normalize(x.float(), dim=-1)) for x in (a, b))
    return a @ b.T


def _check_rows(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"expected two tensors of one shape (n, q), got {tuple(a.shape)} and {tuple(b.shape)}")


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
