"""Where and how graphs are computed: the device, the form of graph functions, the threads of the CPU."""

from __future__ import annotations  # unions, on Python 3.9

import nnabla as nn
from nnabla.ext_utils import get_extension_context

import args
import kernels.threads
from utils import UsageError

_plain = False


def use(name: str | None = None, device_id: str = "0", plain: bool = False, threads: int | None = None) -> nn.Context:
    """Choose, for this process, the form of graph functions and the threads; returns the context of a device.

    It is not made NNabla's default context.

    Args:
        name, device_id: see `extension_context`
        plain: NNabla's native functions everywhere, also where there are faster ones of our own
        threads: number of threads of the fast forms; None: one per core that this process may use
    Raises:
        UsageError: there is no such device; nothing is changed then.
    """
    chosen = extension_context(name, device_id)
    set_plain(plain)
    kernels.threads.set_threads(threads)
    return chosen


def extension_context(name: str | None = None, device_id: str = "0") -> nn.Context:
    """The NNabla context `name`: "cpu", "cudnn", or None for cudnn where it works and else cpu.

    Raises `UsageError` if there is no context of this name, or cudnn is asked for and its extension or a GPU is
    missing.
    """
    if name not in (None, *args.CONTEXTS):
        raise UsageError(f"unknown context {name!r}: choose {' or '.join(args.CONTEXTS)}")
    if name != "cpu":
        # NNabla reports a missing extension on the log as well; our line is enough.
        nn.logger.disabled, disabled = True, nn.logger.disabled
        try:
            import nnabla_ext.cuda

            devices = nnabla_ext.cuda.get_device_count()
            if not 0 <= int(device_id) < devices:
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
