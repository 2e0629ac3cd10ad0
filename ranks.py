"""Processes that were started together, as by ``mpirun -n N python …``: each has a rank, 0 to N − 1.

Of Python's own library, and mpi4py where there are several: so it costs a process that is alone nothing.
"""

from __future__ import annotations  # unions, on Python 3.9

import os
import sys
from typing import Any

from utils import UsageError

# How those who start processes tell each its rank, and how many there are: Open MPI, MPICH and Intel's, Slurm's srun.
STARTERS = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


def started() -> tuple[int, int]:
    """Rank of this process, and how many were started together, by what the environment says; (0, 1) if alone."""
    for rank, size in STARTERS:
        values = os.environ.get(rank, ""), os.environ.get(size, "")
        if all(value.isdecimal() for value in values) and int(values[1]) > 1:
            return int(values[0]), int(values[1])
    return 0, 1


def world() -> Any:
    """mpi4py's communicator of all processes that were started with this one, of which there are several.

    Raises:
        UsageError: they cannot speak with each other. It is raised in the first one; the others end, and say nothing.
    """
    rank, size = started()
    try:
        from mpi4py import MPI

        if (seen := MPI.COMM_WORLD.Get_size()) == size:
            return MPI.COMM_WORLD
        fault = (
            f"of which mpi4py sees {seen}: start them with mpirun of the MPI that mpi4py finds (under Slurm: "
            "srun --mpi=pmix), or one alone"
        )
    except Exception as error:  # it is missing, or finds no MPI
        line = (str(error).splitlines() or [type(error).__name__])[0]
        fault = f"which need mpi4py and MPI ({line}): pip install -r requirements-mpi.txt, or start one process alone"
    if rank > 0:
        sys.exit()
    raise UsageError(f"started as {size} processes, {fault}")
