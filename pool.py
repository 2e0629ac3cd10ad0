"""One engine for many songs, in several processes at a time, on this machine or, under mpirun, on several.

Each process is spawned, and works at one group of songs after the other. If it dies, each of its songs is done again,
once and alone, and by fewer processes: memory is what they most often die of. Under ``mpirun -n N``, each of the N
ranks has such a process, and does nothing but to pass songs on to it, so that ranks survive whatever a song brings.

Only of Python's own library, and what needs little else: a script imports this first, see `start`.
"""

from __future__ import annotations  # unions, on Python 3.9

import collections
import contextlib
import functools
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from tqdm import tqdm

import kernels.threads
import ranks
import utils
from utils import UsageError

DIED = "its process died, of too little memory?"

# ------------------------------------------------------------------------------------------- mpirun

_ranks = []  # of the first rank: executors, each of which hands one group of songs at a time to one of the others
_node = None  # of each rank: how many of them share this machine, and how many cores they have


def start(name: str) -> None:
    """What a script does before its other imports; of all ranks of mpirun, only the first comes back.

    Args:
        name: the script's __name__
    """
    if name == "__mp_main__":  # a process of `results`, which imports the script by this name
        logging.getLogger("nnabla").setLevel(logging.WARNING)  # else its import is announced, in each of them
    elif name == "__main__":
        utils.start()
        if ranks.started()[1] > 1:
            _join()


@utils.command
def _join(_):
    """Let the first rank have all others as places of its songs."""
    global _node
    if ranks.started()[0] > 0:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # of which the first one tells
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
    world = ranks.world()
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor

    rank, size = world.Get_rank(), world.Get_size()
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    _node = node.size, len(set().union(*node.allgather(os.sched_getaffinity(0))))
    for other in range(1, size):
        if rank in (0, other):
            pair = world.Create_group(world.group.Incl([0, other]))
            executor = MPICommExecutor(pair, backoff=0.02).__enter__()  # looks for news every 20 ms
            if rank > 0:  # it has served, until Python ended in the first one
                sys.exit()
            _ranks.append(executor)


def run(main: Callable[[], None]) -> None:
    """Run a script's main(). If that is interrupted under mpirun, so are the other ranks, else at work for minutes."""
    try:
        main()
    except SystemExit as error:
        if _ranks and isinstance(error.code, int) and error.code > 128:
            from mpi4py import MPI

            MPI.COMM_WORLD.Abort(error.code)
        raise


# ----------------------------------------------------------------------------------------- processes


class _Process:
    """A place for one group of songs at a time: a process, spawned when it is needed, and again after it has died.

    Spawned, not forked: a fork would copy NNabla's state and our pool, but not their threads.

    Args:
        among: how many there are on this machine, which share its cores
    """

    def __init__(self, among: int, cores: int):
        self.among, self.cores, self.executor = among, cores, None

    def submit(self, begin: bytes, songs: bytes, threads: int | None) -> Future:
        """The future results, as bytes too. Its exception is BrokenProcessPool if the process has died.

        Args:
            threads: of all processes of this machine; None: one per core
        """
        threads = max(1, (threads or self.cores) // self.among)
        with _inherited(threads):
            with contextlib.suppress(BrokenProcessPool):
                if self.executor:
                    return self.executor.submit(_work, begin, songs, threads)
            self.executor = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _live_with_parent)
            return self.executor.submit(_work, begin, songs, threads)

    def close(self) -> None:
        if self.executor:
            self.executor.shutdown()


class _Rank:
    """Likewise, the process of another rank."""

    def __init__(self, executor):
        self.executor = executor

    def submit(self, begin: bytes, songs: bytes, threads: int | None) -> Future:
        return self.executor.submit(_in_rank, begin, songs, threads)

    def close(self) -> None:
        """It stays, until the rank ends."""


@functools.lru_cache
def _own():
    return _Process(*_node)


def _in_rank(*arguments):
    return _own().submit(*arguments).result()


@contextlib.contextmanager
def _inherited(threads):
    """What a process is born with: limits, which BLAS reads when it is imported; deaf to Ctrl-C, which is for us."""
    resource_tracker.ensure_running()  # which unblocks signals
    limits = {f"{name}_NUM_THREADS": str(threads) for name in ("OPENBLAS", "MKL", "OMP")}
    before = {name: os.environ.get(name) for name in limits}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    os.environ.update(limits)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _live_with_parent():
    def end():  # else a process would work on after kill -9, and then wait for ever
        multiprocessing.parent_process().join()
        if not utils.is_ending():
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is one between processes, which those that are killed leave behind


@functools.lru_cache(1)
def _begun(begin, threads):
    with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):  # the parent said it
        return pickle.loads(begin)(threads=threads)


def _work(begin, songs, threads):
    try:
        with utils.interruptible():  # files are to be whole, and nothing left
            return pickle.dumps(list(_begun(begin, threads)(pickle.loads(songs))))
    except BaseException as error:
        if utils.is_ending():
            os._exit(128 + signal.SIGTERM)
        line = f"{type(error).__name__}: {utils.describe(error)}"
        raise OSError(" ".join(line.split())) from None  # in words: not all errors can be sent


# -------------------------------------------------------------------------------------------- songs


def places(cores: int) -> int:
    """How many processes work at songs: `cores`, or mpirun's number of ranks."""
    if _ranks and cores > 1:
        raise UsageError("under mpirun, its -n tells how many processes work at songs: leave --cores out")
    return 1 + len(_ranks) if _ranks else cores


def results(
    songs: Iterable[Any],
    begin: Callable[..., Callable[[list], Iterable[Any]]],
    failed: Callable[[Any, str], Any],
    cores: int,
    threads: int | None,
    together: int = 1,
) -> Iterator[Any]:
    """Results of songs, as they come. Songs, results and `begin` are pickled.

    Args:
        begin: called once in each process, as begin(threads=…); what it returns gives results of a list of songs
        failed: function of a song and a line; gives the result of one whose processes died, or could not begin
        cores: number of processes; under mpirun, there is one per rank
        threads: of all processes of a machine, which share them; None: one per core
        together: songs of a list at most; they become fewer, so that all processes end at about the same time
    """
    node = _node or (cores, kernels.threads.get_threads())
    idle = [_Rank(executor) for executor in _ranks] + [_Process(*node) for _ in range(1 if _ranks else cores)]
    all_places, at_work, begin = list(idle), {}, pickle.dumps(begin)
    todo, again = collections.deque(songs), collections.deque()  # and those whose process has died
    try:
        while todo or again or at_work:
            while (todo or again) and idle:
                place, is_first = idle.pop(), bool(todo)
                size = max(1, min(together, -(-len(todo) // len(all_places))))  # alone, if again
                group = [(todo or again).popleft() for _ in range(size)]
                at_work[place.submit(begin, pickle.dumps(group), threads)] = place, group, is_first
            for future in wait(at_work, return_when=FIRST_COMPLETED).done:
                place, group, is_first = at_work.pop(future)
                error = future.exception()
                if error is None or not (idle or at_work):
                    idle.append(place)
                if error is None:
                    yield from pickle.loads(future.result())
                    continue
                line = DIED if isinstance(error, BrokenProcessPool) else str(error)
                if is_first:
                    again.extend(group)
                    what = "a song is" if len(group) == 1 else f"{len(group)} songs are"
                    line = f"{what} tried again, and fewer at a time: {line}"
                    tqdm.write(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
                else:
                    yield failed(*group, f"tried twice: {line}")
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        for place in all_places:
            place.close()
