"""For tests that start several processes by mpirun: Open MPI's, if it and mpi4py are there."""

import importlib.util
import shutil
import subprocess

import pytest


def _works():
    if not shutil.which("mpirun") or importlib.util.find_spec("mpi4py") is None:
        return False
    return "Open MPI" in subprocess.run(["mpirun", "--version"], capture_output=True, text=True).stdout


needs_mpirun = pytest.mark.skipif(not _works(), reason="mpirun of Open MPI, or mpi4py, is missing")


def mpirun(number, *command):
    """The command line that starts `command` so many times, whoever one is and however few cores there are, quietly."""
    return ["mpirun", "--allow-run-as-root", "--oversubscribe", "-q", "-n", str(number), *map(str, command)]
