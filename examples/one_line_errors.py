"""Imported for its effect: what people meet ends a script with one line and exit code 1, not with a traceback.

No network, a wrong path or id, a full disk, too little memory, a package that is not installed, Ctrl-C. Whatever else
goes wrong is a bug, and keeps its traceback.
"""

from __future__ import annotations

import errno
import sys


def need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        raise SystemExit(f"no GPU found, and this needs one: see nvidia-smi; this PyTorch was built for {build}")


def explanation(error: BaseException) -> str | None:
    """What happened and the remedy; None of a bug."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped by Ctrl-C"
    cause = error
    while cause is not None:
        remedy = _remedy(cause)
        if remedy is not None:
            words = str(cause).split("'")[-2] if "Repo id must" in str(cause) else _first_line(error)
            return f"{words}: {remedy}"
        cause = cause.__cause__
    # Transformers' own words about a checkpoint; an error of the system has a number.
    return _first_line(error) if type(error) is OSError and error.errno is None else None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".:")


def _remedy(error: BaseException) -> str | None:
    """By the names of its classes: those of huggingface_hub and torch need not be imported."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, ModuleNotFoundError) and error.name == "triton":
        return "it comes with PyTorch for GPUs, and this needs a GPU"
    if isinstance(error, ModuleNotFoundError) and "." not in (error.name or "."):
        return f"`make` installs what its commands need; for {sys.prefix}, pip install -r requirements.txt"
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
        return "make room, or choose another place"
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return "choose a place that you may write to"
    if "SafetensorError" in names:
        return "a file of weights is damaged or cut short, download it again"
    if "OutOfMemoryError" in names:
        return "take a smaller model, or a GPU that nothing else uses"
    if "GatedRepoError" in names:
        return "accept the terms on the model's page, then `hf auth login`"
    if names & {"RepositoryNotFoundError", "HFValidationError"}:
        return "there is no such folder here and no such model on the Hub; a private one needs `hf auth login`"
    if names & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectError", "TimeoutException"}:
        return "check the network, or name a folder that holds the model"
    if str(error).startswith("Cannot find a build variant"):
        return "run `make build`"
    if str(error).startswith("Unrecognized model in"):
        return "name a folder that save_pretrained or `hf download` has written"
    return None


def _print(kind: type[BaseException], error: BaseException, traceback) -> None:
    line = explanation(error)
    if line is None:
        sys.__excepthook__(kind, error, traceback)
    else:
        raise SystemExit(line)


sys.excepthook = _print
