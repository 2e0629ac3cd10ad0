"""Batches of a dataset, prepared ahead."""

from __future__ import annotations  # unions, on Python 3.9

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import nnabla as nn
import numpy as np

from communicator import ALONE, Alone
from datasets.sources import Dataset
from randomness import random_stream
from utils import UsageError, whole


def default_workers(is_gpu: bool, cores: int | None = None) -> int:
    """Threads that keep a device busy, of so many cores; None: of those that this process may use.

    An excerpt takes some 2 ms of a core, so a batch of 16 some 35. On a CPU, where a step takes a second, one thread
    is more than enough. For a GPU, which takes a batch in 25 to 100 ms, two are; four, for files that are not in
    memory yet, or in formats that are slower to read; but one core is left to the training itself.
    """
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, max(1, cores - 1)) if is_gpu else 1


class DataIterator:
    """Batches of a dataset, prepared ahead by `nb_workers` threads; 0 prepares each when it is asked for.

    A batch is a pair: the mixtures, and a list of what each target is in them, all arrays of NNabla, float32
    (nb_samples, nb_channels, nb_timesteps). Workers mix excerpts into their places, and bring them to the device of
    NNabla's current context, so that who trains has only to put these arrays in the place of the last ones. When nobody
    has them any more, NNabla keeps their memory for others: it is that of AHEAD + 2 batches.

    Of several processes, each has its part of every batch; all together do not depend on their number. Raises
    `UsageError` for parts of several whole recordings, which differ in length.
    """

    AHEAD = 3  # batches in preparation: enough to bridge one slow read, little memory

    def __init__(self, source: Dataset, batch_size: int, nb_workers: int = 0, processes: Alone = ALONE):
        self.source, self.processes = source, processes
        self.batch_size, self.nb_workers = whole("batch_size", batch_size), whole("nb_workers", nb_workers, 0, 1024)
        if source.nb_timesteps is None and batch_size > processes.size:
            raise UsageError("whole recordings differ in length: their batches are of one")

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def nb_samples(self, step: int) -> int:
        """Items of batch `step`, 0 for the first, of all processes together."""
        return min(self.batch_size, len(self.source) - step * self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[nn.NdArray, list[nn.NdArray]]]:
        """Batches in the epoch's own order; the last one is smaller if the items do not come out even.

        Args:
            start: number of batches that are left out at its beginning
        """
        order = random_stream("order", seed=self.source.seed, epoch=epoch).permutation(len(self.source))
        starts = range(start * self.batch_size, len(order), self.batch_size)
        batches = (self.processes.part(order[k : k + self.batch_size]) for k in starts)
        return self._prepared(epoch, batches, self.AHEAD)

    def items(self) -> Iterator[tuple[nn.NdArray, list[nn.NdArray]]]:
        """What is validated: all items in their order, a batch each; one is prepared ahead, as it may be long.

        Of several processes, each has its turns.
        """
        return self._prepared(0, ([index] for index in self.processes.turns(len(self.source))), 1)

    def _prepared(self, epoch, batches, ahead):
        if self.nb_workers == 0:
            for batch in batches:
                yield self._begun(epoch, batch, _at_once).result()
            return
        pool = ThreadPoolExecutor(self.nb_workers)
        try:
            pending = deque()
            for batch in batches:
                pending.append(self._begun(epoch, batch, pool.submit))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _begun(self, epoch, batch, submit):
        """What is at work on a batch, whose result it is."""
        nb_timesteps = self.source.nb_timesteps or self.source.plan(epoch, int(batch[0])).nb_timesteps
        shape = (len(batch), self.source.nb_channels, nb_timesteps)
        arrays = [nn.NdArray(shape) for _ in range(1 + self.source.nb_targets)]
        x, *y = (array.get_data("w", np.float32) for array in arrays)
        work = [
            submit(self.source.fill, epoch, int(index), x[k], [target[k] for target in y])
            for k, index in enumerate(batch)
        ]
        return submit(_finished, arrays, nn.get_current_context(), work)


def _finished(arrays, device, work):
    """The batch, once all its items are there. They were begun before, so that they end, whoever waits for them."""
    for one in work:
        one.result()
    if device.array_class:  # it has none as long as nobody has chosen a device
        for array in arrays:
            array.cast(np.float32, device)
    return arrays[0], arrays[1:]


class _at_once:
    """What is done when its result is asked for."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def result(self):
        return self.function(*self.arguments)
