import pytest
import torch

from public_functions import FUNCTIONS


@pytest.fixture(params=FUNCTIONS)
def case(request, kernel):
    """(function, (seed, device) -> its arguments)."""
    return request.param(kernel)


@pytest.fixture(params=[False, True], ids=["inference", "training"])
def training(request):
    with torch.set_grad_enabled(request.param):
        yield request.param
