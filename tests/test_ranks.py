"""Who was started together with whom; what is said if they do not find each other: test_pool, test_communicator."""

import pytest

import ranks


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, (0, 1)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, (2, 4)),
        ({"PMI_RANK": "1", "PMI_SIZE": "3"}, (1, 3)),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, (3, 4)),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, (0, 1)),
    ],
)
def test_what_mpirun_tells(monkeypatch, environment, expected):
    for pair in ranks.STARTERS:
        for name in pair:
            monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks.started() == expected
