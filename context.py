"""Where and how graphs are computed: the device, the form of graph functions, the threads of the CPU."""

from __future__ import annotations  # unions, on Python 3.9

import contextlib
import threading

import nnabla as nn
from nnabla.ext_utils import get_extension_context

import args
import kernels.threads
from utils import UsageError

_plain = False


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
    missing, or `device_id` is not a number of a device.
    """
    if name not in (None, *args.CONTEXTS):
        raise UsageError(f"unknown context {name!r}: choose {' or '.join(args.CONTEXTS)}")
    if not str(device_id).isdecimal():
        raise UsageError(f"--device-id {device_id}: GPUs have numbers, from 0 on")
    if name != "cpu":
        # NNabla reports a missing extension on the log as well; our line is enough.
        nn.logger.disabled, disabled = True, nn.logger.disabled
        try:
            import nnabla_ext.cuda

            devices = nnabla_ext.cuda.get_device_count()
            if int(device_id) >= devices:
                raise UsageError(f"--device-id {device_id}: this machine has {devices} CUDA device(s)")
            return get_extension_context("cudnn", device_id=str(device_id))
        except UsageError:
            raise
        except Exception as error:  # whatever a missing driver or library makes the extension raise
            if name == "cudnn":
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UsageError(
                    f"--context cudnn does not work here ({reason}): it needs nnabla-ext-cuda120 "
                    "and an NVIDIA GPU, see README.md; or use --context cpu"
                ) from None
        finally:
            nn.logger.disabled = disabled
    return get_extension_context("cpu")


def set_plain(plain: bool) -> None:
    """Use NNabla's native functions everywhere, also where there are faster ones of our own."""
    global _plain
    _plain = plain


def fast() -> bool:
    """The one place that chooses the form of graph functions and solver: fast on the CPU, plain elsewhere."""
    return not _plain and nn.get_current_context().backend[0].startswith("cpu")
