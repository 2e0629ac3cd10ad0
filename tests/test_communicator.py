"""Several processes that train one network: started by mpirun, on this machine, as a user starts them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nnabla as nn
import numpy as np
import pytest
from mpirun import mpirun, needs_mpirun
from processes import FROZEN, OURS, STILL
from trainings import TINY, assert_same

import checkpoint
import communicator
import ranks
import synthesize
import train

ROOT = Path(__file__).parents[1]

pytestmark = needs_mpirun


def run(nb_processes, *command):
    """What is written to stdout and stderr, and the status of the one that ended first with an error."""
    command, environment = mpirun(nb_processes, sys.executable, *command), {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """Three songs to train on, three that validate: more than there are processes."""
    root = tmp_path_factory.mktemp("songs")
    synthesize.synthesize(root, nb_train=3, nb_valid=3, nb_test=0, duration=2.0, seed=7, quiet=True)
    return root


@pytest.fixture(scope="module")
def alone(songs, tmp_path_factory):
    """Trainings by one process."""
    output = tmp_path_factory.mktemp("alone")
    for name, options in (("frozen", FROZEN), ("still", STILL)):
        own = [option for option in TINY if option not in ("--hidden-size", "8")]
        train.main([*own, "--root", str(songs), "--output", str(output / name), "--threads", "1", *options])
    return output


def trained(nb_processes, what, songs, output):
    result = run(nb_processes, "tests/processes.py", what, output, songs)
    assert result.returncode == 0, result.stderr
    assert "train.py:" not in result.stderr  # what the first one says is in its file, and the others say nothing
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(nb_processes)]


@pytest.fixture(scope="module")
def two(songs, tmp_path_factory):
    output = tmp_path_factory.mktemp("two")
    return output, trained(2, "all", songs, output)


def of_each(two, name):
    return [seen["trainings"][name] for seen in two[1]]


# ----------------------------------------------------------------------------------- the same training


def assert_equal_but_for_rounding(one, several):
    """Where what is computed of an item depends on no other: of nine items in batches of four, the last has one."""
    logs = [json.loads((output / "bass.json").read_text()) for output in (one, several)]
    for key in ("train_loss_history", "valid_loss_history"):
        np.testing.assert_allclose(*(log[key] for log in logs), rtol=2e-6)
    files = [checkpoint.load(output, "bass") for output in (one, several)]
    for kind, atol in (("parameters", 2e-6), ("solver", 1e-5)):
        a, b = (getattr(file, kind) for file in files)
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-4, atol=atol * np.abs(a[name]).max(), err_msg=name)
    assert logs[1]["processes"] > logs[0]["processes"] == 1


def test_two_processes_of_half_a_batch_are_one_of_the_whole(alone, two):
    assert_equal_but_for_rounding(alone / "frozen", two[0] / "frozen")


def test_so_are_three(alone, songs, tmp_path):
    seen = trained(3, "equal", songs, tmp_path)
    assert_equal_but_for_rounding(alone / "frozen", tmp_path / "frozen")
    assert len({one["trainings"]["frozen"]["crc"] for one in seen}) == 1 and seen[0]["size"] == 3


def test_all_processes_have_the_same_weights_averages_and_running_statistics(two):
    for name in ("frozen", "ours", "interrupted", "resumed", "unreadable", "whole tracks"):
        one, other = of_each(two, name)
        assert one["crc"] == other["crc"] != 0, name


def test_running_means_are_those_of_the_whole_batch(alone, two):
    """Each step leaves the weights as they are, so that a batch's means are those of the same numbers."""
    files = [checkpoint.load(output / "still", "bass") for output in (alone, two[0])]
    a, b = (file.parameters["fc1/bn/mean"] for file in files)
    assert np.abs(a).max() > 1e-3
    np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * np.abs(a).max())


def test_each_process_draws_its_own_dropout():
    """The first one as one alone does."""
    draws = []
    for rank in range(3):
        train.seed_dropout(rank, seed=1, epoch=2, step=3)
        draws.append(nn.random.prng.rand())
    train.seed_nnabla("dropout", seed=1, epoch=2, step=3)
    assert nn.random.prng.rand() == draws[0] and len(set(draws)) == 3


# ------------------------------------------------------------------------------------- ends, and goes on


def test_a_signal_to_one_of_them_ends_all_at_the_same_step_and_they_go_on(two):
    first, second = of_each(two, "interrupted")
    assert "interrupted in epoch 1, step 2; --checkpoint" in first["said"] and first["said"].count("\n") == 1
    assert first["status"] > 128 and second["status"] == 143
    assert_same(two[0] / "resumed", two[0] / "ours")


def test_what_two_began_one_finishes(songs, two, tmp_path):
    """And the other way round, the data are those that they would have been."""
    shutil.copytree(two[0] / "interrupted", tmp_path / "o")
    own = [option for option in TINY if option not in ("--hidden-size", "8")]
    options = ["--root", songs, "--output", tmp_path / "o", "--checkpoint", tmp_path / "o", *OURS]
    train.main([*own, *map(str, options)])
    log, expected = (json.loads((path / "bass.json").read_text()) for path in (tmp_path / "o", two[0] / "ours"))
    np.testing.assert_allclose(log["train_loss_history"], expected["train_loss_history"], rtol=0.1)  # other dropout
    assert log["processes"] == 1 and log["epochs_trained"] == 2


@pytest.mark.parametrize(
    "name, status, line",
    [
        ("unreadable", 1, "song.wav: Input/output error"),
        ("not a number", 1, "the loss of epoch 1, step 1 is nan: try a smaller --lr"),
        ("nowhere", 2, "/nowhere has no folder train/"),
        ("small", 2, "--batch-size 1 is that of all 2 processes together"),
        ("device", 2, "--device-id is for one process alone"),
    ],
)
def test_an_error_ends_all_with_one_line(two, name, status, line):
    for one in of_each(two, name):
        assert one["status"] == status
    assert line in of_each(two, name)[0]["said"] and of_each(two, name)[0]["said"].count("\n") == 1


def test_what_was_done_before_an_error_of_another_process_is_saved(two):
    assert checkpoint.load(two[0] / "unreadable", "bass").state["progress"]["steps"] == 1


def test_a_crash_of_one_ends_all(songs, tmp_path):
    result = run(2, "tests/processes.py", "crash", tmp_path, songs)
    assert result.returncode == 1
    assert result.stderr.count("KeyError: 'nothing'") == 1 and "(process 1 of 2)" in result.stderr


def test_without_mpi4py_one_line_tells(tmp_path):
    script = "import sys; sys.modules['mpi4py'] = None; sys.argv[0] = 'train.py'; import train; train.main()"
    result = run(2, "-c", script, *TINY, "--output", tmp_path / "o")
    lines = [line for line in result.stderr.splitlines() if "[INFO]" not in line]
    assert len(lines) == 1 and "started as 2 processes, which need mpi4py and MPI (" in lines[0]
    assert "pip install -r requirements-mpi.txt" in lines[0] and result.returncode == 2
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("rank, size", ranks.STARTERS[1:])
def test_processes_that_do_not_find_each_other_are_not_as_many_trainings(tmp_path, rank, size):
    script = "import sys, communicator; print(communicator.start().size)"
    environment = {**os.environ, rank: "0", size: "2"}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert "UsageError: started as 2 processes, of which mpi4py sees 1" in result.stderr
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**environment, size: "1"})
    assert result.stdout == "1\n"


# ------------------------------------------------------------------------------------ what they tell each other


def test_parts_of_a_batch():
    """They are all of it, in its order, as even as can be; who has none has an item that does not count."""
    for size in range(1, 6):
        each = [communicator.Alone() for _ in range(size)]
        for rank, one in enumerate(each):
            one.rank, one.size = rank, size
        for nb_items in range(1, 12):
            batch = np.arange(nb_items) + 100
            parts, shares = ([one.part(batch) for one in each], [one.share(nb_items) for one in each])
            counted = [part for part, share in zip(parts, shares) if share]
            np.testing.assert_array_equal(np.concatenate(counted), batch)
            assert [len(part) / nb_items for part in counted] == [share for share in shares if share]
            assert all(len(part) == 1 for part, share in zip(parts, shares) if not share)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
            turns = [one.turns(nb_items) for one in each]
            assert {len(turn) for turn in turns} == {-(-nb_items // size)}
            assert [index for row in zip(*turns) for index in row][:nb_items] == list(range(nb_items))


def test_one_alone_does_nothing():
    one = communicator.start()
    assert (one, one.size, one.cores) == (communicator.ALONE, 1, None)
    assert one.first(max, 1, 2) == one.on_each_machine(max, 1, 2) == 2
    assert one.part([1, 2]) == [1, 2] and one.share(2) == 1 and one.merge([3, 4], 2) == [3, 4]


def test_what_they_tell_each_other(two):
    for rank, seen in enumerate(two[1]):
        assert seen["first"] == 0 and seen["on each machine"] == rank and seen["any"] == [False, True, True]
        assert seen["merged"] == [[0], [0, 1], [0, 1, 2, 3, 4]]
        assert seen["equal"] == [[5.0] * 3] * 2
        errors = [["UsageError", "one"], ["OSError", "file: two"], ["MemoryError", "MemoryError"]]
        assert seen["raised"] == [*errors, ["RuntimeError", "'other'"]]
        assert seen["cores"] == max(1, len(os.sched_getaffinity(0)) // 2)


WEIGHTED = [[4 / 3, 8 / 3, 4.0], [1.5, 0.25, 1 / 3], 2.0, True]
EVEN = [[1.5, 3.0, 4.5], [1.5, 0.25, 0.5], 3.0, True]


def test_gradients_losses_and_changes_are_averaged(two):
    """Each item of the batch weighs the same; what does not change keeps its bits."""
    for found, expected in ((seen["averaged"], WEIGHTED) for seen in two[1]):
        for a, b in zip(found, expected):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    assert two[1][0]["averaged"] == two[1][1]["averaged"]


def test_on_gpus_it_is_nnabla_s_communicator(two):
    """A fake of it records the calls: made for the GPU of this process, all arrays in one call, a mean."""
    for rank, seen in enumerate(two[1]):
        reduced = ["all_reduce", [[3], [3], [3], []], {"division": True, "inplace": False}]
        assert seen["nccl"]["calls"] == [["made for", "cudnn:float", str(rank)], ["init"], reduced, reduced]
        for found, expected in zip(seen["nccl"]["averaged"], (WEIGHTED, EVEN)):
            for a, b in zip(found, expected):
                np.testing.assert_allclose(a, b, rtol=1e-6)
        miscounting, missing, mixed = seen["nccl"]["wrong"]
        assert "are both of the same MPI?" in miscounting and "some processes have a GPU" in mixed
        assert missing.startswith("2 processes on --context cudnn do not work here ([Errno 5]") and "NCCL" in missing
