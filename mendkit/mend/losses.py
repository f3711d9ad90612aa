"""Losses: pure functions of logits.

Axes: n scored positions (all texts of a batch, packed), v vocabulary, r texts. `rows[k]` is the text to which scored
position k belongs; every loss is a mean over the positions of a text, so that no text weighs more for being longer
and an edit's loss does not depend on the batch around it. MEND, section 3.2: L = c_e · NLL(edit) + KL(pre ‖ post).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: losses, factors and transforms never run in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_by_row(
    values: Float[Tensor, " n"], rows: Int[Tensor, " n"], n_rows: int, /
) -> Float[Tensor, " {n_rows}"]:
    """Mean of `values` over the positions of each text; 0 for a text without scored positions."""
    total = torch.zeros(n_rows, dtype=values.dtype, device=values.device).index_add(0, rows, values)
    count = torch.bincount(rows, minlength=n_rows).clamp(min=1)
    return total / count


def edit_nll(
    logits: Float[Tensor, "n v"],
    targets: Int[Tensor, " n"],
    rows: Int[Tensor, " n"],
    n_rows: int,
    /,
) -> Float[Tensor, " {n_rows}"]:
    """Negative log-likelihood (nats per token) of each text's target, in float32 at least."""
    nll = torch.nn.functional.cross_entropy(wide(logits), targets, reduction="none")
    return mean_by_row(nll, rows, n_rows)


def locality_kl(
    before: Float[Tensor, "n v"],
    after: Float[Tensor, "n v"],
    rows: Int[Tensor, " n"],
    n_rows: int,
    /,
) -> Float[Tensor, " {n_rows}"]:
    """KL(before ‖ after) in nats, mean over each text's scored positions, in float32 at least (MEND, equation 4)."""
    log_p, log_q = wide(before).log_softmax(-1), wide(after).log_softmax(-1)
    return mean_by_row((log_p.exp() * (log_p - log_q)).sum(-1), rows, n_rows)


def margin_shortfall(
    nll: Float[Tensor, " n"], rival_nll: Float[Tensor, " n"], /, *, margin: float
) -> Float[Tensor, " n"]:
    """What a rival answer lacks of being `margin` nats a token less likely than the right one; 0 where it is."""
    return (margin + nll - rival_nll).clamp(min=0)
