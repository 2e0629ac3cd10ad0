"""A small pool of threads, and how work is cut into tasks for it."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Optional

_nb_threads = None  # not chosen yet: all cores
_pool, _pool_key = None, None


def set_threads(nb_threads: Optional[int] = None) -> None:
    """Number of threads of everything in this folder; None: one per core that this process may use."""
    global _nb_threads
    if nb_threads is not None and nb_threads < 1:
        raise ValueError(f"{nb_threads} threads: at least one is needed")
    _nb_threads = nb_threads


def get_threads() -> int:
    if _nb_threads is not None:
        return _nb_threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def run(tasks: list[tuple]) -> None:
    """Call every (function, *arguments) of the list, spread over the threads; the functions release the GIL.

    Whoever is free takes the next task: who computes what does not change the result.
    """
    global _pool, _pool_key
    helpers = min(get_threads(), len(tasks)) - 1
    queue = iter(tasks)  # next() on it is atomic

    def drain():
        for function, *arguments in queue:
            function(*arguments)

    if helpers > 0:
        key = (os.getpid(), get_threads())  # a forked child has lost its parent's threads
        if key != _pool_key:
            _pool, _pool_key = ThreadPoolExecutor(get_threads() - 1, "kernels"), key
        futures = [_pool.submit(drain) for _ in range(helpers)]
        drain()
        for future in futures:
            future.result()
    else:
        drain()


def split(length: int, parts: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Cut range(length) into at most `parts` ranges (start, stop), the bounds multiples of `multiple`."""
    units = -(-length // multiple)
    parts = max(1, min(parts, units))
    bounds = [min(length, multiple * (units * i // parts)) for i in range(parts + 1)]
    return list(zip(bounds, bounds[1:]))
