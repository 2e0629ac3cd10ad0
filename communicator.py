"""Several processes that train one network: what they tell each other, and who speaks for them.

Started as ``mpirun -n N python train.py …``, each process computes its part of every batch. Small things go through
mpi4py; gradients too on a CPU, on GPUs through NNabla's communicator (NCCL). One process alone has the same interface,
`Alone`, in which nothing costs anything.
"""

from __future__ import annotations  # unions, on Python 3.9

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import nnabla as nn
import numpy as np

import kernels.threads
import ranks
import utils
from utils import UsageError

PATIENCE = 5.0  # seconds in which all processes that fail alike have failed


class Alone:
    """One process, and what several have in common.

    Attributes:
        rank, size: number of this process, 0 … size − 1; how many there are
        local_rank: its number among those of its machine; None: it is alone
        cores: those that it may use for itself; None: all
    """

    rank, size, local_rank, cores = 0, 1, None, None

    def use(self, device: nn.Context) -> None:
        """The device on which gradients lie. UsageError if they cannot be averaged from there."""

    # who does what

    def part(self, batch: Sequence) -> Sequence:
        """Of the items of a batch, those of this process; the first one, where there are less items than processes."""
        return batch[slice(*self._bounds(len(batch)))] if self.share(len(batch)) else batch[:1]

    def share(self, nb_items: int) -> float:
        """What the part of this process weighs in a mean over all items of a batch; 0 if none was left for it."""
        start, stop = self._bounds(nb_items)
        return (stop - start) / nb_items

    def _bounds(self, nb_items):
        least, more = divmod(nb_items, self.size)
        return tuple(least * rank + min(rank, more) for rank in (self.rank, self.rank + 1))

    def turns(self, nb_items: int) -> list[int]:
        """Of 0 … nb_items − 1, those of this process; as many for each, some again where others have one more."""
        return [(first + self.rank) % nb_items for first in range(0, nb_items, self.size)]

    # what they tell each other: all of them call the same methods in the same order

    def first(self, function: Callable, *arguments: Any) -> Any:
        """What a function returns, or raises, which the first process alone calls: it writes, it decides."""
        return function(*arguments)

    def on_each_machine(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        """What a function returns that prepares files: on each machine one process calls it, then the others."""
        return function(*arguments, **options)

    def check(self, error: Exception | None) -> None:
        """Raise, in all of them, the first error that one of them brings."""
        if error is not None:
            raise error

    def any(self, flag: bool) -> bool:
        """Whether one of them says so."""
        return bool(flag)

    def merge(self, values: list, nb_items: int) -> list:
        """Values of all items, in the items' order, from those of each process's `turns`."""
        return values

    def equalize(self, variables: dict[str, nn.Variable]) -> None:
        """Variables become those of the first process."""

    def averaging(self, parameters: dict[str, nn.Variable], all_variables: dict[str, nn.Variable]) -> Callable:
        """A function (share, loss), called between backward pass and update, where `share` is that of this process.

        The gradients of the parameters become the weighted mean over processes, and so do the loss, an array of NNabla,
        and what the forward pass has changed of other variables: running statistics.
        """
        return lambda share, loss: None


ALONE = Alone()


class _Several(Alone):
    """See `Alone`. Gradients are averaged by `_mean`, through MPI."""

    def __init__(self, world: Any):
        from mpi4py import MPI
        from mpi4py.util import pkl5

        self._mpi, self._world = MPI, world
        self._large = pkl5.Intracomm(world)  # for objects of more than 2 GB, too
        self._end = world.Dup()  # no message of the work can be taken for one of the end
        self.rank, self.size = world.Get_rank(), world.Get_size()
        machine = world.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank = machine.Get_rank()
        own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count()))
        sharing = sum(1 for other in machine.allgather(own) if own & other)
        self.cores = min(kernels.threads.MOST, max(1, len(own) // sharing))
        self._nccl = None
        self._buffer = np.empty(0, np.float32)

    def use(self, device: nn.Context) -> None:
        if len({backend for backend in self._world.allgather(device.backend[0].split(":")[0])}) > 1:
            raise UsageError("some processes have a GPU and others none: choose --context cpu or --context cudnn")
        if device.backend[0].startswith("cpu"):
            return
        error = None
        try:
            import nnabla.communicators

            self._nccl = nnabla.communicators.MultiProcessDataParallelCommunicator(device)
            self._nccl.init()
        except Exception as reason:  # whatever a missing library makes NNabla raise
            line = (str(reason).splitlines() or [type(reason).__name__])[0]
            error = UsageError(
                f"{self.size} processes on --context cudnn do not work here ({line}): they need NCCL 2.10.3 or later "
                "and libmpi.so, see docs/training.md"
            )
        self.check(error)
        if (self._nccl.rank, self._nccl.size, self._nccl.local_rank) != (self.rank, self.size, int(device.device_id)):
            raise UsageError("NNabla's communicator counts processes otherwise than mpi4py: are both of the same MPI?")

    def first(self, function: Callable, *arguments: Any) -> Any:
        result = error = None
        if self.rank == 0:
            try:
                result = function(*arguments)
            except Exception as raised:
                error = raised
        self.check(error)
        return self._large.bcast(result)

    def on_each_machine(self, function: Callable, *arguments: Any, **options: Any) -> Any:
        result = None
        for is_first in (True, False):
            error = None
            if (self.local_rank == 0) is is_first:
                try:
                    result = function(*arguments, **options)
                except Exception as raised:
                    error = raised
            self.check(error)
        return result

    def check(self, error: Exception | None) -> None:
        if self.any(error is not None):
            errors = [each for each in self._world.allgather(_portable(error)) if each is not None]
            raise errors[0] from error

    def any(self, flag: bool) -> bool:
        return any(self._world.allgather(bool(flag)))

    def merge(self, values: list, nb_items: int) -> list:
        return list(chain.from_iterable(zip(*self._world.allgather(values))))[:nb_items]

    def equalize(self, variables: dict[str, nn.Variable]) -> None:
        for variable in variables.values():
            self._world.Bcast(variable.d)  # NNabla's own memory

    def averaging(self, parameters: dict[str, nn.Variable], all_variables: dict[str, nn.Variable]) -> Callable:
        gradients = [variable.grad for variable in parameters.values()]
        states = [variable.data for name, variable in all_variables.items() if name not in parameters]
        former = [_copied(state) for state in states]

        def average(share, loss):
            # what is not learnt comes in as its change: so what does not change keeps its last bit
            for state, before in zip(states, former):
                state -= before
            arrays, weight = [*gradients, *states, loss], share * self.size
            if weight != 1:
                for array in arrays:
                    array *= weight
            self._mean(arrays)
            for state, before in zip(states, former):
                state += before
                before.copy_from(state)

        return average

    def _mean(self, arrays):
        """Replace each array by its mean over processes, the same to the last bit in all of them."""
        if self._nccl:
            self._nccl.all_reduce(arrays, division=True, inplace=False)
            return
        views = [array.get_data("rw", np.float32).reshape(-1) for array in arrays]
        ends = np.cumsum([view.size for view in views])
        if self._buffer.size != ends[-1]:
            self._buffer = np.empty(ends[-1], np.float32)
        parts = np.split(self._buffer, ends[:-1])
        for part, view in zip(parts, views):
            part[:] = view
        self._world.Allreduce(self._mpi.IN_PLACE, self._buffer, self._mpi.SUM)
        for part, view in zip(parts, views):
            np.divide(part, self.size, out=view)

    def fail(self, line: str, status: int) -> None:
        """Before this process ends with an error: if it alone does, its line is said, and it ends all others, too."""
        request, end = self._end.Ibarrier(), time.monotonic() + PATIENCE
        while not request.Test():
            if time.monotonic() > end:
                if self.rank and line:
                    os.write(2, f"{line} (process {self.rank} of {self.size})\n".encode(errors="backslashreplace"))
                self._world.Abort(status)
            time.sleep(0.01)

    def fail_with_traceback(self, kind: type, error: BaseException, trace: Any) -> None:
        """The same of an error that nobody expected; see `sys.excepthook`."""
        lines = "".join(traceback.format_exception(kind, error, trace))
        print(lines, file=sys.stderr)
        self.fail(lines, 1)


def _copied(array):
    copy = nn.NdArray(array.shape)
    copy.copy_from(array)
    return copy


def _portable(error):
    """An error as any process can make it again."""
    for kind in (UsageError, OSError, MemoryError):
        if isinstance(error, kind):
            return kind(utils.describe(error))
    return error and RuntimeError(str(error) or repr(error))


_several = None  # once started


def start() -> Alone:
    """This process and those that were started with it: what a command does first.

    All but the first one are silent from here on, and a failure of one ends all.

    Raises:
        UsageError: several were started, but cannot speak with each other.
    """
    global _several
    rank, size = ranks.started()
    if size == 1:
        return ALONE
    if _several is None:
        if rank > 0:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (until this process ends)
        _several = _Several(ranks.world())
        utils.before_failing(_several.fail)
        sys.excepthook = _several.fail_with_traceback
    return _several
