"""SciPy's BLAS and LAPACK: their routines, called without the GIL and without threads of their own."""

import ctypes
import functools
import threading
from typing import Callable

from numba.extending import get_cython_function_address


class _OneThread:
    """A context in which SciPy's BLAS has no threads of its own: work is spread over our pool instead.

    How many threads it has is a number of the whole process, and others use it too: the first one to enter notes the
    number, the last one to leave restores it.
    """

    NAMES = {  # what sets it: what tells it
        "scipy_openblas_set_num_threads": "scipy_openblas_get_num_threads",
        "openblas_set_num_threads": "openblas_get_num_threads",
        "MKL_Set_Num_Threads": "MKL_Get_Max_Threads",
    }

    def __init__(self):
        self.lock, self.inside, self.before, self.set = threading.Lock(), 0, 1, None

    def __enter__(self):
        with self.lock:
            if self.set is None:
                self._find()
            if self.inside == 0:
                self.before = self.get()
                self.set(1)
            self.inside += 1

    def __exit__(self, *error):
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.set(self.before)

    def _find(self):
        import scipy.linalg.cython_blas  # only where it is used: it takes a while

        library = ctypes.CDLL(scipy.linalg.cython_blas.__file__)  # its symbols and those of the BLAS it links to
        known = [pair for pair in self.NAMES.items() if all(hasattr(library, name) for name in pair)]
        self.get, self.set = (getattr(library, name) for name in known[0][::-1]) if known else (lambda: 1, lambda n: 0)


one_thread = _OneThread()


@functools.lru_cache(None)
def routine(room: str, symbol: str, nb_arguments: int) -> Callable:
    """A routine of scipy.linalg.`room`, cython_blas or cython_lapack, which takes addresses of its arguments."""
    address = get_cython_function_address(f"scipy.linalg.{room}", symbol)
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * nb_arguments)(address)
