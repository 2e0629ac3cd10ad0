"""Files that are not ours: what a user names in one, FILE.py:NAME, and a line for each thing that goes wrong in it."""

from __future__ import annotations  # unions, on Python 3.9

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import context
from utils import UsageError, lacks_memory


def read(what: str, name: str, kind: str = "NAME") -> tuple[Path, str, Any]:
    """Run the Python file of "FILE.py:NAME", anywhere.

    Args:
        what: whose name it is, the option
        kind: what NAME is to be, in the error
    Returns:
        the file, NAME, and what has this name in it: None for nothing
    Raises:
        UsageError: no such file, no name, or an error while it runs.
    """
    file, colon, attribute = name.rpartition(":")
    path = Path(file).expanduser()
    if not colon or not file or not attribute.isidentifier():
        raise UsageError(f"{what} {name}: expected FILE.py:{kind}")
    if not path.is_file():
        raise UsageError(f"{what} {name}: there is no file {path}")
    module_name = f"{what.strip('-')}_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None:
        raise UsageError(f"{what} {name}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    with context.exclusive():  # two threads must not change the path at once
        sys.modules[module_name] = module  # where dataclasses and the like look their module up
        if is_new := folder not in sys.path:
            sys.path.append(folder)  # behind our own: the file may import its neighbours
        try:
            call(path, f"{what} {name}", spec.loader.exec_module, module)
        finally:
            if is_new and folder in sys.path:  # which the file may have changed
                sys.path.remove(folder)
    return path, attribute, getattr(module, attribute, None)


def call(path: Path, what: str, function: Callable, *args: Any, **options: Any) -> Any:
    """Call what comes from such a file: its errors say where they are, in one line.

    Raises:
        UsageError: whatever it raises; but lack of memory as it is.
    """
    try:
        return function(*args, **options)
    except UsageError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        if isinstance(error, SyntaxError) and error.filename == str(path):
            lines = [error.lineno]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise UsageError(" ".join(f"{what}: {where}: {type(error).__name__}: {error}".split())) from error
