"""Batches of a dataset, prepared ahead."""

from __future__ import annotations  # unions, on Python 3.9

import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from datasets.sources import Dataset
from randomness import random_stream
from utils import whole


def default_workers(is_gpu: bool) -> int:
    """Threads that keep a device busy.

    An excerpt takes some 2 ms of a core, so a batch of 16 some 35. On a CPU, where a step takes a second, one thread
    is more than enough. For a GPU, which takes a batch in 25 to 100 ms, two are; four, for files that are not in
    memory yet, or in formats that are slower to read; but one core is left to the training itself.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, max(1, cores - 1)) if is_gpu else 1


class DataIterator:
    """Batches of a dataset, prepared ahead by `nb_workers` threads; 0 prepares each when it is asked for.

    The last batch of an epoch is smaller if the items do not come out even. Excerpts are mixed into their places in
    arrays that are used again once nobody else has them: memory is that of AHEAD + 2 batches.
    """

    AHEAD = 3  # batches in preparation: enough to bridge one slow read, little memory

    def __init__(self, source: Dataset, batch_size: int, nb_workers: int = 0):
        self.source = source
        self.batch_size, self.nb_workers = whole("batch_size", batch_size), whole("nb_workers", nb_workers, 0, 1024)
        self._arrays = []

    def __len__(self) -> int:
        return -(-len(self.source) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield mixtures and targets, (nb_samples, nb_channels, nb_timesteps) each, in the epoch's own order.

        Args:
            start: number of batches that are left out at its beginning
        """
        order = random_stream("order", seed=self.source.seed, epoch=epoch).permutation(len(self.source))
        batches = (order[k : k + self.batch_size] for k in range(start * self.batch_size, len(order), self.batch_size))
        if self.nb_workers == 0:
            for batch in batches:
                yield self._finished(self._begun(epoch, batch, _at_once))
            return
        pool = ThreadPoolExecutor(self.nb_workers)
        try:
            pending = deque()
            for batch in batches:
                pending.append(self._begun(epoch, batch, pool.submit))
                if len(pending) > self.AHEAD:
                    yield self._finished(pending.popleft())
            while pending:
                yield self._finished(pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _begun(self, epoch, batch, submit):
        """Arrays of a batch, and what is at work on them."""
        if self.source.nb_timesteps is None:  # items differ in length: only they know it
            return None, [submit(self.source.item, epoch, int(index)) for index in batch]
        x, y = (self._array((len(batch), *shape)) for shape in self.source.shapes(self.source.nb_timesteps))
        return (x, y), [submit(self.source.fill, epoch, int(index), x[k], y[k]) for k, index in enumerate(batch)]

    @staticmethod
    def _finished(begun):
        arrays, work = begun
        items = [one.result() for one in work]
        return arrays or tuple(np.stack(of_items) for of_items in zip(*items))

    def _array(self, shape):
        """An array that nobody else has: fresh memory would cost as much time as what is written to it."""
        for k in range(len(self._arrays)):
            if self._arrays[k].shape == shape and sys.getrefcount(self._arrays[k]) == 2:  # the list's, and the call's
                return self._arrays[k]
        self._arrays.append(np.empty(shape, np.float32))
        del self._arrays[: -2 * (self.AHEAD + 2)]  # those that their readers keep are theirs
        return self._arrays[-1]


class _at_once:
    """What is done when its result is asked for."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def result(self):
        return self.function(*self.arguments)
