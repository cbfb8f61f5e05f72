"""Names of layers that Transformers and users map to kernels: which are free for ours."""

from __future__ import annotations

import importlib


def is_free(layer_name: str, if_unknown: bool) -> bool:
    """Whether no user has mapped a layer of this name: nobody has, or we have, or Transformers with its own mapping."""
    try:
        mapped = importlib.import_module("kernels.layer.kernelize")._KERNEL_MAPPING.get().get(layer_name, {})
        devices = [of_device for device, of_device in mapped.items() if device in ("cuda", "cpu")]
        repositories = [repo for of_device in devices for repo in _repositories(of_device)]
    except (ImportError, AttributeError):  # a `kernels` to come: what is mapped there nobody can tell
        return if_unknown
    own = {id(repo) for modes in _of_transformers().get(layer_name, {}).values() for repo in modes.values()}
    return all(id(repo) in own or hasattr(repo, "is_of_moe_grouped_gemm") for repo in repositories)


def _repositories(of_device: object) -> list:
    """All that `kernels` keeps for a device: by mode, and on a GPU by ranges of its capability, in a tree."""
    kept = vars(of_device).values()
    nodes = [x.root for x in kept if hasattr(x, "root")]
    by_mode = [x for x in kept if isinstance(x, dict)]
    while nodes:
        node = nodes.pop()
        if node is not None:
            by_mode.append(node.data)
            nodes += [node.left, node.right]
    return [repo for modes in by_mode for repo in modes.values()]


def take_over(layer_name: str, mapping: dict) -> None:
    """Where Transformers' own mapping has a kernel for such layers, that is ours from now on.

    It is registered again whenever kernels are switched on; what a user maps, by a KernelConfig or around `kernelize`,
    comes before it.
    """
    own = _of_transformers()
    if layer_name in own:
        own[layer_name] = {**own[layer_name], **mapping}


def _of_transformers() -> dict:
    """Transformers' mapping, name -> device -> mode -> where a kernel is; empty where it has none to change."""
    hub_kernels = importlib.import_module("transformers.integrations.hub_kernels")
    return getattr(hub_kernels, "get_kernel_mapping_transformers", dict)()
