"""What Triton's launcher calls in the end, without the fifteen or so Python calls before it.

`compiled[grid](*args)` makes a closure, asks twice for the driver, for the device and for its stream, collects metadata
for hooks that nobody has set, and looks for scratch buffers that no kernel here needs, at every launch. All this comes
down to one call of a C function. Its form differs between Triton's versions and backends, so it is not written here:
it is found out.
"""

import copy

from triton import knobs
from triton.runtime import driver


def shortcut(compiled, arity):
    """(function (grid, stream, args), function device -> its current stream) of a kernel that has run; or None.

    `args` is a tuple of `arity` arguments, which may be addresses in place of tensors: Triton passes those on as they
    are, and asks a tensor for its own and the driver about it.

    Triton's launcher is called with a function of ours in place of the C one. If what that is given is the grid, the
    stream and the arguments, one after another, and else only what the launcher holds, then it can be called so again.
    None where anything else is found, such as a scratch buffer: then Triton may launch as it wants to.
    """
    try:
        launcher = copy.copy(compiled.run)
        launch, passed = launcher.launch, []
        launcher.launch = lambda *args: passed.append(args)
        # Objects that nothing can be done with but to pass them on.
        where, args = tuple(object() for _ in range(4)), tuple(object() for _ in range(arity))
        launcher(*where, compiled.function, compiled.packed_metadata, None, None, None, *args)
        ((*start, last),) = passed
        found = [*start, *last] if (are_one := last == args) else [*start, last]
        i = found.index(where[0])
        before, between = found[:i], found[i + 4 : len(found) - arity]
        known = {id(x) for x in (None, compiled.function, compiled.packed_metadata, *vars(launcher).values())}
        if found != [*before, *where, *between, *args] or not known.issuperset(map(id, (*before, *between))):
            return None
        stream_of = driver.active.get_current_stream
    except Exception:  # another Triton
        return None

    def run(grid, stream, args):
        launch(*before, *grid, stream, *between, *args)

    def run_with_one(grid, stream, args):
        launch(*before, *grid, stream, *between, args)

    return (run_with_one if are_one else run), stream_of


def is_hooked():
    """Whether anyone, a profiler say, may want to know of launches. Whoever replaced Triton's chains of hooks may."""
    hooks = knobs.runtime
    try:
        return bool(hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls)
    except AttributeError:
        return True
