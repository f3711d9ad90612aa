"""Losses of training: L = c_edit · NLL(edit) + c_loc · KL(before ‖ after)  (MEND, equation 4).

Each is a mean over the scored positions of a text, so an edit's loss does not depend on the batch.
Axes: n scored positions of all texts (packed), v vocabulary; `rows[k]` is the text of position k.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy


def wide(x: Tensor) -> Tensor:
    """x in float32 at least, for losses, factors and transforms."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_by_row(
    values: Float[Tensor, " n"], rows: Int[Tensor, " n"], n_rows: int
) -> Float[Tensor, " {n_rows}"]:
    """Mean of `values` over the positions of each text; 0 for a text without any."""
    total = torch.zeros(n_rows, dtype=values.dtype, device=values.device)
    count = torch.bincount(rows, minlength=n_rows).clamp(min=1)
    return total.index_add(0, rows, values) / count


def edit_nll(
    logits: Float[Tensor, "n v"], targets: Int[Tensor, " n"], rows: Int[Tensor, " n"], n_rows: int
) -> Float[Tensor, " {n_rows}"]:
    """Negative log-likelihood of each text's target, nats per token."""
    return mean_by_row(cross_entropy(wide(logits), targets, reduction="none"), rows, n_rows)


def locality_kl(
    before: Float[Tensor, "n v"], after: Float[Tensor, "n v"], rows: Int[Tensor, " n"], n_rows: int
) -> Float[Tensor, " {n_rows}"]:
    """KL(before ‖ after) of each text, nats per position."""
    log_p, log_q = wide(before).log_softmax(-1), wide(after).log_softmax(-1)
    return mean_by_row((log_p.exp() * (log_p - log_q)).sum(-1), rows, n_rows)


def margin_shortfall(
    nll: Float[Tensor, " n"], rival_nll: Float[Tensor, " n"], *, margin: float
) -> Float[Tensor, " n"]:
    """What a rival answer lacks of being `margin` nats a token less likely."""
    return (margin + nll - rival_nll).clamp(min=0)
