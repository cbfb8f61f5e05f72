"""Which Transformers and which `kernels` we find, asked before anything builds on them."""

from __future__ import annotations

import functools
import warnings


def check_versions() -> None:
    """One clear error now instead of a missing name later, and a warning if Transformers will refuse `kernels`.

    Raises:
        ImportError: Transformers is older than 5.17 or lacks what we build on.
    """
    requirement = "moe-grouped-gemm.register() needs transformers >= 5.17 with a version of kernels that it supports"
    try:
        import transformers
        from kernels import replace_kernel_forward_from_hub  # noqa: F401
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS  # noqa: F401
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate  # noqa: F401
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter  # noqa: F401
        from transformers.utils import is_kernels_available
    except ImportError as error:
        raise ImportError(f"{requirement}: {error}") from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 17):
        raise ImportError(f"{requirement}: found transformers {transformers.__version__}")
    if not is_kernels_available():
        _warn_of_kernels()


@functools.cache
def _warn_of_kernels() -> None:
    """Transformers accepts one minor version of `kernels`; any other is to it as if none were installed."""
    from importlib.metadata import version

    import transformers
    from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION

    warnings.warn(
        f"transformers {transformers.__version__} wants kernels >= {KERNELS_MIN_VERSION}, < {KERNELS_MAX_VERSION} and "
        f"does not use kernels {version('kernels')}, which is installed: use_kernels=True and kernel_config=... raise "
        '"Kernels are not available". experts_implementation="moe_grouped_gemm" works, and so does '
        'kernels.kernelize(model, mode=...). `pip install "transformers[kernels]"` installs a pair that fits.',
        stacklevel=4,  # who called register()
    )
