"""Losses against closed forms on hand-made logits (CORRECTNESS rows 18, 20)."""

import math

import torch

from mendkit.mend.losses import edit_nll, locality_kl, mean_by_row

P = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
Q = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1], [0.6, 0.2, 0.2]])
ROWS = torch.tensor([0, 0, 1])


def test_nll_is_the_mean_over_a_texts_own_tokens():
    nll = edit_nll(P.log(), torch.tensor([0, 1, 0]), ROWS, 2)
    assert torch.allclose(nll, torch.tensor([-(math.log(0.5) + math.log(0.8)) / 2, -math.log(0.2)]))


def test_kl_is_before_against_after():
    kl = locality_kl(P.log(), Q.log(), ROWS, 2)
    first = 0.5 * math.log(2) - 0.25 * math.log(2)
    last = 0.2 * math.log(0.2 / 0.6) + 0.6 * math.log(0.6 / 0.2)
    assert torch.allclose(kl, torch.tensor([first / 2, last]), atol=1e-6)
    assert torch.allclose(locality_kl(P.log(), P.log() + 3.0, ROWS, 2), torch.zeros(2), atol=1e-6)


def test_half_precision_logits_are_widened():
    logits = torch.tensor([[0.0, 12.0]], dtype=torch.bfloat16)
    nll = edit_nll(logits, torch.tensor([1]), torch.zeros(1, dtype=torch.long), 1)
    assert nll.dtype == torch.float32 and 0 < float(nll) < 1e-4


def test_a_text_without_positions_does_not_divide_by_zero():
    assert mean_by_row(torch.ones(1), torch.tensor([1]), 3).tolist() == [0.0, 1.0, 0.0]
