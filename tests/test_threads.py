"""Threads: whose they are, and how many work."""

import multiprocessing
import os
import threading
import time
from pathlib import Path

import nnabla as nn
import numpy as np
import pytest

import functions
import kernels.threads


def product(size=300):
    """The graph of a product of random matrices, which the threads share."""
    x = np.random.default_rng(0).standard_normal((size, 1, size)).astype(np.float32)
    return functions.affine([nn.Variable.from_numpy_array(x)], size, "fc")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_forked_child_has_threads_of_its_own():
    """It inherits the pool of its parent, but not the threads in it: waiting for them would never end."""
    kernels.threads.set_threads(3)
    y = product()
    y.forward()
    expected = y.d.copy()
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work():
        y.data.zero()
        y.forward()
        sender.send(y.d.copy())

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    try:
        assert receiver.poll(20), "the child hangs, or failed"
        np.testing.assert_array_equal(receiver.recv(), expected)
    finally:
        child.kill()
        child.join()


def cpu_seconds():
    """Of the threads of this process, those of BLAS too: by their number."""
    ticks = os.sysconf("SC_CLK_TCK")
    seconds = {}
    for task in Path("/proc/self/task").iterdir():
        user, system = (task / "stat").read_text().rpartition(")")[2].split()[11:13]
        seconds[int(task.name)] = (int(user) + int(system)) / ticks
    return seconds


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not tell of threads")
def test_products_use_no_threads_but_ours():
    """BLAS, on threads of its own besides, would compute on more cores than --threads allows."""
    kernels.threads.set_threads(1)
    y = product(1200)
    y.forward()
    before = cpu_seconds()
    start = time.thread_time()
    while time.thread_time() - start < 0.5:
        y.forward()
    used = {task: seconds - before.get(task, 0) for task, seconds in cpu_seconds().items()}
    ours = used.pop(threading.get_native_id())
    assert sum(used.values()) < 0.2 * ours, f"{used} s on other threads, {ours} s on ours"


def test_an_error_in_any_thread_is_raised():
    kernels.threads.set_threads(2)
    together = threading.Barrier(2, timeout=20)

    def work():
        together.wait()  # so each of both threads has one
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("in a thread")

    with pytest.raises(RuntimeError, match="in a thread"):
        kernels.threads.run([(work,), (work,)])


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ((10, 3), [(0, 3), (3, 6), (6, 10)]),
        ((10, 3, 4), [(0, 4), (4, 8), (8, 10)]),
        ((40, 2, 16), [(0, 16), (16, 40)]),
        ((2, 5), [(0, 1), (1, 2)]),
        ((0, 5), [(0, 0)]),
    ],
)
def test_how_work_is_cut(arguments, parts):
    assert kernels.threads.split(*arguments) == parts


@pytest.mark.parametrize("nb_threads", [0, -1])
def test_at_least_one_thread(nb_threads):
    with pytest.raises(ValueError, match="at least one"):
        kernels.threads.set_threads(nb_threads)
