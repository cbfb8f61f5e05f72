"""Classes that are not listed but found in a modeling file, and found out about by trial: routers, and blocks."""

from __future__ import annotations

from typing import Callable

from torch import nn

from . import switching


class Kind:
    """Of classes that `kernelize` may switch on.

    Args:
        name: of what they are, for errors.
        layers: names of layers, ours, or of Transformers' for whatever kernel there is.
        layer_of: the one of them for a class that has no name of its own.
        may_be: whether to try modules of a class.
        serve, learn: as `switching.make_switchable` takes them.
        is_known: whether a module is something that we serve.
    """

    def __init__(
        self,
        name: str,
        layers: tuple[str, ...],
        layer_of: Callable[[type], str],
        may_be: Callable[[type], bool],
        serve: Callable,
        learn: Callable,
        is_known: Callable[[nn.Module], bool],
    ):
        self._name, self._layers, self._layer_of, self._may_be = name, layers, layer_of, may_be
        self._serve, self._learn, self._is_known = serve, learn, is_known
        self._stock: set[type] = set()  # that a stand-in stands for

    def meet(self, modeling: str) -> None:
        """Let `kernelize` switch on those of a modeling file that has been imported."""
        for cls in self._classes(modeling):
            self.make_switchable(cls)

    def _classes(self, modeling: str) -> list[type]:
        """Not by name: a stand-in may have it."""
        own = [cls for cls in nn.Module.__subclasses__() if cls.__module__ == modeling and "forward" in vars(cls)]
        return list(filter(self._may_be, own))

    def make_switchable(self, cls: type, layer_name: str | None = None) -> type:
        """Let `kernelize` take modules of `cls` for such layers; by default for those of the name that it has."""
        if not self._is_ours(cls):
            return cls
        switching.make_switchable(cls, self._serve, self._learn)
        if layer_name is None and getattr(cls, "kernel_layer_name", None) is None:
            layer_name = self._layer_of(cls)
        if layer_name is not None:  # under Transformers' name, whatever kernel takes it is asked as before
            switching.name_for_kernelize(cls, layer_name, self._may_switch_on)
        return cls

    def _is_ours(self, cls: type) -> bool:
        """Whether its name, if it has one, is not another kernel's."""
        return getattr(cls, "kernel_layer_name", None) in (None, *self._layers)

    def _may_switch_on(self, module: nn.Module) -> bool:
        return switching.is_switchable(module) and self._is_known(module)

    def let_switch(self, modeling: str) -> None:
        """Those of a modeling file, by whoever knows them, but not by `kernelize`."""
        for cls in self._classes(modeling):
            switching.make_switchable(cls, self._serve, self._learn)

    def is_one(self, module: nn.Module) -> bool:
        cls = type(module)
        return self._is_ours(cls) and switching.is_switchable(module) and self._may_be(cls)

    def stock_class(self, layer_name: str, config) -> type:
        """That of the model to which `config` belongs, ready for `kernelize` as a layer of this name."""
        for config_class in type(config).__mro__:
            classes = self._classes(config_class.__module__.replace("configuration_", "modeling_"))
            if len(classes) == 1:
                self._stock.update(classes)
                return self.make_switchable(classes[0], layer_name)
        raise TypeError(
            f"{type(config).__name__} is not the config of a Transformers model with one class of {self._name}"
        )

    def is_stock(self, module: object) -> bool:
        """Whether the module is what some `stock_class` makes."""
        return isinstance(module, tuple(self._stock))
