"""Fewer combinations of parameters than all: most of a GPU's time goes to compiling what each of them needs."""

from itertools import combinations, product

import pytest
import torch


def covering(*axes, allowed=lambda *values: True):
    """Combinations of the axes' values, few of them, in which each two values that may meet do; always the same ones.

    For parametrize. allowed: called with the values of a combination, those of a `pytest.param` one by one.
    """
    axes = [[v if hasattr(v, "marks") else pytest.param(v, id=str(v)) for v in axis] for axis in axes]
    found = [places for places in product(*(range(len(axis)) for axis in axes)) if allowed(*values_at(axes, places))]
    pairs = {places: set(combinations(enumerate(places), 2)) for places in found}
    missing, chosen = set().union(*pairs.values()), set()
    while missing:
        best = max(found, key=lambda places: len(missing & pairs[places]))
        missing -= pairs[best]
        chosen.add(best)
    return [
        pytest.param(*values_at(axes, places), id="-".join(axis[i].id for axis, i in zip(axes, places)))
        for places in found
        if places in chosen
    ]


def values_at(axes, places):
    return [value for axis, i in zip(axes, places) for value in axis[i].values]


def in_turn(cases):
    """Each case in fp32 and in one of the 16-bit types, which the same code serves: `pytest.param`s, dtype last."""
    return [
        pytest.param(*case.values, dtype, id=f"{case.id}-{dtype}", marks=case.marks)
        for i, case in enumerate(cases)
        for dtype in ((torch.bfloat16, torch.float16)[i % 2], torch.float32)
    ]
