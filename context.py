"""Where and how graphs are computed: the device, the form of graph functions, the threads of the CPU."""

from __future__ import annotations  # unions, on Python 3.9

import contextlib
import ctypes
import importlib.util
import io
import os
import re
import sys
import threading
from pathlib import Path

import nnabla as nn
from nnabla.ext_utils import get_extension_context

import args
import kernels.threads
from utils import UsageError

_plain = False

# What the CUDA extension is linked with, by their places in NVIDIA's wheels; those first that others of them need.
_LIBRARIES = (
    "nvjitlink/lib/libnvJitLink.so.12",
    "cuda_runtime/lib/libcudart.so.12",
    "cuda_nvrtc/lib/libnvrtc.so.12",
    "cublas/lib/libcublasLt.so.12",
    "cublas/lib/libcublas.so.12",
    "cufft/lib/libcufft.so.11",
    "curand/lib/libcurand.so.10",
    "cusolver/lib/libcusolver.so.11",
    "cudnn/lib/libcudnn.so.8",
)
# What makes the CUDA extension fail: a part of its error, and what to say of it.
_REASONS = {
    r"No module named 'nnabla_ext": "the extension is missing: pip install nnabla-ext-cuda120==1.39.0",
    r"libcuda\.so|NVML": "the NVIDIA driver, or a part of it, is missing",
    r"libcudnn|CUDNN_": "cuDNN 8 is missing, or another version of it comes first",
    r"(lib\w+\.so[.\d]*)": r"the library \1 is missing, or another version of it comes first",
    "cudaErrorInsufficientDriver": "the NVIDIA driver is too old: CUDA 12.0 needs 525.60.13 or later",
    "cudaErrorNoDevice": "there is no NVIDIA GPU, or CUDA_VISIBLE_DEVICES hides it",
}


class _Exclusive(type(threading.RLock()), contextlib.ContextDecorator):
    """A lock that a function can be decorated with."""


_nnabla = _Exclusive()


def exclusive() -> _Exclusive:
    """A block, or of a decorated function the body, that no other thread enters meanwhile; its own may do so again.

    NNabla's scopes, of contexts, parameters and automatic execution, its random numbers and its caches of memory belong
    to the whole process. What enters a scope, builds a graph or runs one does so within this block: graphs take turns,
    as each uses all threads anyway, and what is not NNabla's, filtering and files, goes on beside them. Where numbers
    are to depend on a seed, setting it and drawing them belong into one block.
    """
    return _nnabla


def use(
    name: str | None = None, device_id: int | str = 0, plain: bool = False, threads: int | None = None
) -> nn.Context:
    """Choose, for this process, the form of graph functions and the threads; returns the context of a device.

    It is not made NNabla's default context.

    Args:
        name, device_id: see `extension_context`
        plain: NNabla's native functions everywhere, also where there are faster ones of our own
        threads: number of threads of the fast forms; None: one per core that this process may use
    Raises:
        UsageError: there is no such device, or number of threads; nothing is changed then.
    """
    chosen = extension_context(name, device_id)
    try:
        kernels.threads.set_threads(threads)
    except ValueError as error:
        raise UsageError(f"--threads: {error}") from None
    set_plain(plain)
    return chosen


@exclusive()
def extension_context(name: str | None = None, device_id: int | str = 0) -> nn.Context:
    """The NNabla context `name`: "cpu", "cudnn", or None for cudnn where it works and else cpu.

    Raises `UsageError` if there is no context of this name, or cudnn is asked for and its extension or a GPU is
    missing, or `device_id` is not a number of a device, or TF32 is allowed there.
    """
    if name not in (None, *args.CONTEXTS):
        raise UsageError(f"unknown context {name!r}: choose {' or '.join(args.CONTEXTS)}")
    if not str(device_id).isdecimal():
        raise UsageError(f"--device-id {device_id}: GPUs have numbers, from 0 on")
    if name != "cpu":
        # Of what is missing, NNabla writes to the log, and its extension to stdout; our line is enough.
        nn.logger.disabled, disabled = True, nn.logger.disabled
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                _load_libraries()
                import nnabla_ext.cuda

                devices = nnabla_ext.cuda.get_device_count()
                is_there = int(device_id) < devices
                found = get_extension_context("cudnn", device_id=str(device_id)) if is_there else None
        except Exception as error:  # whatever a missing driver or library makes the extension raise
            if name == "cudnn":
                raise UsageError(
                    f"--context cudnn does not work here: {_reason(error)} (README.md, Installation); "
                    "or use --context cpu"
                ) from None
        else:
            if not is_there:
                raise UsageError(f"--device-id {device_id}: this machine has {devices} CUDA device(s), from 0 on")
            if os.environ.get("NNABLA_CUDA_ALLOW_TF32", "0") != "0":
                raise UsageError(
                    "NNABLA_CUDA_ALLOW_TF32 is set: in TF32's precision, the spectrum above 10 kHz is off by percents; "
                    "unset it, or use --context cpu"
                )
            return found
        finally:
            nn.logger.disabled = disabled
    return get_extension_context("cpu")


def _load_libraries():
    """Load NVIDIA's libraries from their wheels, before the extension does.

    By itself, it finds others first: it was built with an RPATH, /usr/local/cuda/lib64, which comes before
    LD_LIBRARY_PATH, and does not know the wheels. What is loaded already is not searched for.
    """
    nvidia = importlib.util.find_spec("nvidia")
    if "nnabla_ext.cuda" in sys.modules or not nvidia or not importlib.util.find_spec("nnabla_ext.cuda"):
        return
    for folder in nvidia.submodule_search_locations:
        for path in (Path(folder, name) for name in _LIBRARIES):
            if path.is_file():
                ctypes.CDLL(str(path))


def _reason(error):
    """Why the extension fails, in a line. Those of its errors that come from C++ have it in their last one."""
    text = str(error).strip() or type(error).__name__
    for pattern, reason in _REASONS.items():
        if match := re.search(pattern, text):
            return match.expand(reason)
    return text.splitlines()[-1]


def pin(device: nn.Context) -> None:
    """From now on, NNabla's arrays on the host are where a GPU can read them, if the device is one.

    A copy of them takes half the time, and the thread that asks for it holds nobody up meanwhile.
    """
    if not device.backend[0].startswith("cpu"):
        import nnabla_ext.cuda.init

        nnabla_ext.cuda.init.prefer_cpu_pinned_array()


def set_plain(plain: bool) -> None:
    """Use NNabla's native functions everywhere, also where there are faster ones of our own."""
    global _plain
    _plain = plain


def fast() -> bool:
    """The one place that chooses the form of graph functions and solver: fast on the CPU, plain elsewhere."""
    return not _plain and nn.get_current_context().backend[0].startswith("cpu")
