"""`kernels` loads the build that it is given."""

import kernels
import pytest


@pytest.mark.kernels_ci
def test_kernels_loads_the_build(kernel):
    loaded = [entry for entry in kernels.get_loaded_kernels() if entry.module is kernel]
    assert [str(entry.metadata.name) for entry in loaded] == ["moe-grouped-gemm"]
    assert kernel.__name__ == loaded[0].metadata.id
    assert all(hasattr(kernel, name) for name in kernel.__all__)
