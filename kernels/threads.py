"""A small pool of threads, and how work is cut into tasks for it."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from typing import Optional

MOST = 1024  # threads: work is cut into parts by their number, and nobody has so many cores
_nb_threads = None  # not chosen yet: all cores
_pool, _pool_key = None, None
_pool_lock = threading.Lock()


def set_threads(nb_threads: Optional[int] = None) -> None:
    """Number of threads of everything in this folder; None: one per core that this process may use.

    Raises:
        ValueError: not a whole number within 1 … `MOST`. Nothing is changed then.
    """
    global _nb_threads
    if nb_threads is not None and not (isinstance(nb_threads, Integral) and 1 <= nb_threads <= MOST):
        raise ValueError(f"{nb_threads!r} threads: at least one is needed, and at most {MOST}")
    _nb_threads = nb_threads


def get_threads() -> int:
    if _nb_threads is not None:
        return _nb_threads
    return min(MOST, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def _helpers(nb_threads):
    """The pool of all threads but the caller's."""
    global _pool, _pool_key
    key = (os.getpid(), nb_threads)  # a forked child has lost its parent's threads
    with _pool_lock:
        if key != _pool_key:  # whoever still uses the one before keeps it alive
            _pool, _pool_key = ThreadPoolExecutor(nb_threads - 1, "kernels"), key
        return _pool


def run(tasks: list[tuple]) -> None:
    """Call every (function, *arguments) of the list, spread over the threads; the functions release the GIL.

    Whoever is free takes the next task: who computes what does not change the result. Several threads may call this
    at once. When a task raises, no other one is begun, and those that are under way have ended before the error goes
    on to the caller, whose arrays they write to.
    """
    nb_threads = get_threads()
    queue, errors = iter(tasks), []  # next() on the queue is atomic

    def drain(turn):
        with turn:
            try:
                for function, *arguments in queue:
                    function(*arguments)
            except BaseException as error:
                errors.append(error)
            finally:
                _exhaust(queue)

    turns = [threading.Lock() for _ in range(min(nb_threads, len(tasks)))]
    try:
        if len(turns) > 1:
            pool = _helpers(nb_threads)
            for turn in turns[1:]:
                pool.submit(drain, turn)
        for turn in turns[:1]:
            drain(turn)
    finally:
        _exhaust(queue)
        try:
            _wait(turns)
        except BaseException:  # an interruption: the helpers are still at it
            _wait(turns)
            raise
    if errors:
        raise errors.pop(0)  # not kept here: it refers to this frame


def _exhaust(queue):
    for _ in queue:
        pass


def _wait(turns):
    """Until nobody has a turn; a helper that comes later finds the queue empty."""
    for turn in turns:
        with turn:
            pass


def split(length: int, parts: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Cut range(length) into at most `parts` ranges (start, stop), the bounds multiples of `multiple`."""
    units = -(-length // multiple)
    parts = max(1, min(parts, units))
    bounds = [min(length, multiple * (units * i // parts)) for i in range(parts + 1)]
    return list(zip(bounds, bounds[1:]))
