"""What cases.py leaves out is no pair of values, and no case."""

from itertools import combinations, product

import pytest
import torch

from cases import covering, in_turn


def pairs(values):
    return set(combinations(enumerate(values), 2))


@pytest.mark.parametrize("sizes", [(3, 6, 3), (6, 2, 2, 2), (1, 4), (4, 3, 2)], ids=str)
def test_each_pair_that_may_meet_does(sizes):
    axes = [range(size) for size in sizes]

    def allowed(*values):
        return sum(values) != 2

    chosen = [param.values for param in covering(*axes, allowed=allowed)]
    assert all(allowed(*values) for values in chosen)
    wanted = set().union(*(pairs(values) for values in product(*axes) if allowed(*values)))
    assert set().union(*map(pairs, chosen)) == wanted
    assert chosen == [param.values for param in covering(*axes, allowed=allowed)]


def test_no_more_than_needed():
    assert len(covering(range(3), range(6), range(3))) == 18


def test_each_case_in_fp32_and_in_a_16_bit_type():
    cases = [pytest.param(size, id=f"{size}") for size in range(4)]
    dtypes = {}
    for param in in_turn(cases):
        dtypes.setdefault(param.values[0], []).append(param.values[1])
    halves = torch.bfloat16, torch.float16
    assert dtypes == {size: [halves[size % 2], torch.float32] for size in range(4)}
