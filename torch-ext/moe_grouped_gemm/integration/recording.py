"""Transformers' recording of outputs (`output_router_logits=True` and others).

It hooks all modules that have something to record as soon as anything is recorded, and leaves the hooks there, which
do nothing in calls that record nothing.
"""

from __future__ import annotations

import sys

_MODULE = "transformers.utils.output_capturing"


def is_recorder(hook: object) -> bool:
    """Whether a hook is one of these, and we can tell whether it does anything."""
    return getattr(hook, "__module__", None) == _MODULE and _collector() is not None


def is_recording() -> bool:
    """Whether they do something in this call: a collector of nothing is there in each."""
    collector = _collector()
    return collector is not None and bool(collector.get())


def _collector():
    return getattr(sys.modules.get(_MODULE), "_active_collector", None)
