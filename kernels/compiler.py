"""How Numba compiles and caches our loops, the types of their arguments, and a tanh for them."""

import functools
import hashlib
import logging
import threading
from pathlib import Path
from typing import Callable

import numba
import numpy as np
from numba import types
from numba.core.errors import NumbaError
from numba.core.event import Listener, install_listener

log = logging.getLogger(__name__)

INT = types.intp
FLOAT = types.float32
SUMS = types.float64[:, ::1]
INTS = types.intp[:, ::1]
COMPLEX3 = types.complex64[:, :, ::1]


def IN(ndim: int) -> types.Array:
    return types.Array(types.float32, ndim, "C", readonly=True)


def OUT(ndim: int) -> types.Array:
    return types.Array(types.float32, ndim, "C")


# Loops run over whole slices, j = 0, 1, …: where the compiler cannot see that an index is not negative, it
# provides for Python's counting from the end, and that costs a factor of nine.
# No "nnan", "ninf": a diverging training must show its NaNs rather than hide them.
FASTMATH = {"contract", "reassoc", "nsz"}


# Nothing calls these from C; a wrapper for that would be compiled with each.
OPTIONS = {"fastmath": FASTMATH, "error_model": "numpy", "no_cfunc_wrapper": True}

_compiler = threading.Lock()


class _SayOnce(Listener):
    said = False

    def on_start(self, event):
        if not _SayOnce.said:
            _SayOnce.said = True
            log.warning("compiling the fast functions for this machine: once, several seconds")

    def on_end(self, event):
        pass


def kernel(function: Callable) -> Callable:
    """A Numba kernel without the GIL. Annotations are its argument types; it is compiled when first called.

    Arguments of other types are a ValueError; of shapes it knows nothing.
    """
    compiled = None

    @functools.wraps(function)
    def call(*arguments):
        nonlocal compiled
        if compiled is None:
            with _compiler:  # one thread compiles, the others wait
                if compiled is None:
                    compiled = _compile(function)
        try:
            return compiled(*arguments)
        except (
            TypeError,
            OverflowError,
            NumbaError,
        ) as error:  # another type than the annotated one, or order in memory
            raise ValueError(f"{function.__name__.strip('_')}: {' '.join(str(error).split())}") from None

    return call


@functools.lru_cache(None)
def _sources() -> str:
    """A hash of all files of this folder."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _compile(function):
    options = {"nogil": True, **OPTIONS}
    try:
        dispatcher = numba.njit(cache=True, **options)(function)
        # Numba looks for changes only in the file where the function stands, but what is inlined comes from others:
        # their text becomes part of what it compares. Read before written, so that another Numba fails here.
        cache_file = dispatcher._cache._cache_file
        cache_file._source_stamp = (cache_file._source_stamp, _sources())
    except RuntimeError:  # no folder for the cache can be written to: compile in every process
        dispatcher = numba.njit(**options)(function)
    with install_listener("numba:compile", _SayOnce()):
        dispatcher.compile(tuple(function.__annotations__.values()))
    dispatcher.disable_compile()
    return dispatcher


inline = numba.njit(no_cpython_wrapper=True, **OPTIONS)  # for kernels alone, not to be called from Python


@inline
def tanh(x):
    """Rational approximation by Eigen (Eigen/src/Core/MathFunctionsImpl.h, ptanh_float): 3e-7 at most.

    Without branches or calls, so that the compiler makes vectors of it.
    """
    limit = np.float32(7.90531110763549805)  # where float32 tanh reaches 1
    x = -limit if x < -limit else (limit if x > limit else x)
    s = x * x
    p = np.float32(-2.76076847742355e-16)
    p = p * s + np.float32(2.00018790482477e-13)
    p = p * s + np.float32(-8.60467152213735e-11)
    p = p * s + np.float32(5.12229709037114e-08)
    p = p * s + np.float32(1.48572235717979e-05)
    p = p * s + np.float32(6.37261928875436e-04)
    p = p * s + np.float32(4.89352455891786e-03)
    q = np.float32(1.19825839466702e-06)
    q = q * s + np.float32(1.18534705686654e-04)
    q = q * s + np.float32(2.26843463243900e-03)
    q = q * s + np.float32(4.89352518554385e-03)
    return x * p / q
