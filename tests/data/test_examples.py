"""An example's roles, and the mean of the headline shares."""

import math
from types import SimpleNamespace

import pytest

from mendkit.data.examples import HEADLINE_ROLES, EditExample, Probe, headline_mean
from mendkit.errors import DataError


def test_roles_hold_every_prompt_and_the_answer_that_it_should_have():
    example = EditExample(
        *("X is in", "Rome"),
        paraphrases=("X lies in",),
        neighbours=(Probe("Y is in", "Oslo"),),
        generation_prompts=("X is known for",),
    )
    roles = example.roles()
    assert tuple(roles)[:4] == HEADLINE_ROLES
    assert roles["edit"] == (Probe("X is in", "Rome"),)
    assert roles["paraphrases"] == (Probe("X lies in", "Rome"),)
    assert roles["neighbours"] == example.neighbours and roles["unrelated"] == ()
    assert roles["generation_prompts"] == (Probe("X is known for"),)


def test_a_text_in_place_of_several_is_refused_and_not_read_by_letters():
    with pytest.raises(DataError, match="paraphrases must be a tuple, got the text 'X lies in'"):
        EditExample.__post_init__(SimpleNamespace(paraphrases="X lies in"))


def test_one_share_of_zero_makes_the_headline_zero_and_none_makes_it_unknown():
    assert headline_mean([1, 0.5, 0.25]) == 3 / (1 + 2 + 4)
    assert headline_mean([1, 1, 1, 0]) == 0
    assert math.isnan(headline_mean([]))
