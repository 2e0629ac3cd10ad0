"""Steps whose parts several threads share: each has a part of its own, so that what it reads stays in its core's cache.

A step begins when all parts of the one before are done. Nobody depends on anybody's being there: a part whose thread
does not come (it has not begun, waits for a core, was given something else to do) is taken by one that waits. So any
number of threads, one too, comes to the end, and who computes what does not change the result.
"""

import sys
import time
from typing import Callable

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.compiler import inline

LINE = 16  # numbers of the system's width: two cache lines, which some processors fetch in pairs
SPINS = 1000  # looks at what the others have done, some 20 µs, before one's part is taken, or one gives up its core
ALONE = 1  # the place in a part's line that says whether its thread waits for others before it takes their parts
VISIT = 64  # parts of another job, about as long as a core is taken away
NAP = 2e-5  # s


def _at(builder, address):
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@intrinsic
def _load(typing, address):
    """What the others have written before they added to the number there is seen from now on."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(_at(builder, arguments[0]), "acquire", 8)

    return types.intp(types.intp), generate


@intrinsic
def _increase(typing, address):
    def generate(context, builder, signature, arguments):
        builder.atomic_rmw("add", _at(builder, arguments[0]), ir.IntType(64)(1), "acq_rel")
        return context.get_dummy_value()

    return types.void(types.intp), generate


@intrinsic
def _replace(typing, address, old, new):
    """Whether the number there was the old one: it is the new one then."""

    def generate(context, builder, signature, arguments):
        address, old, new = arguments
        result = builder.cmpxchg(_at(builder, address), old, new, "acq_rel", "acquire")
        return builder.extract_value(result, 1)

    return types.boolean(*[types.intp] * 3), generate


@intrinsic
def _relax(typing):
    """Leave the core to its other thread for some cycles, where the processor has a word for it."""

    def generate(context, builder, signature, arguments):
        if binding.get_process_triple().startswith("x86_64"):
            pause = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, pause, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), generate


def progress(nb_parts: int) -> np.ndarray:
    """How far each part has been taken, and how many have been done in all, each in a line of its own."""
    return np.zeros((nb_parts + 1, LINE), np.intp)


@inline
def _place(progress, row):
    return progress.ctypes.data + 8 * LINE * row


@inline
def take(progress, own, nb_steps):
    """(step, part) to be done now; the part is −1 where the steps are at an end or the others keep one waiting."""
    nb_parts, step = len(progress) - 1, 0
    for _ in range(2):
        for _ in range(1 if progress[own, ALONE] else SPINS):
            step = _load(_place(progress, nb_parts)) // nb_parts
            if step == nb_steps:
                return step, -1
            if _replace(_place(progress, own), step, step + 1):
                return step, own
            _relax()
        for part in range(nb_parts):
            if _replace(_place(progress, part), step, step + 1):
                progress[own, ALONE] = 1  # who did not come in time may not come the next time either
                return step, part
        progress[own, ALONE] = 0
    return step, -1


@inline
def give(progress):
    """The part that was taken is done."""
    _increase(_place(progress, len(progress) - 1))


def shared(kernel: Callable, jobs: list[tuple], nb_parts: int) -> list[tuple]:
    """The tasks, for `run`, of jobs, one for each thread that has a part.

    A kernel takes and gives parts. Its arguments are those of a job, then whose part is its own and the most it may
    do; it says whether all steps of the job are done.
    """
    return [(_work, kernel, jobs, number, own) for number in range(len(jobs)) for own in range(nb_parts)]


def _work(kernel, jobs, number, own):
    """Who waits in vain, as another's core was taken away in the midst of a part, helps with other jobs meanwhile."""
    while not kernel(*jobs[number], own, sys.maxsize):
        for job in jobs[:number] + jobs[number + 1 :]:
            kernel(*job, own, VISIT)
        time.sleep(NAP)
