"""Threads: whose they are, and how many work."""

import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import networks
import nnabla as nn
import numpy as np
import pytest
import scipy.linalg.cython_blas

import context
import functions
import kernels.blas
import kernels.lstm
import kernels.threads
import model
import separate
import solvers
import train
import trained
import weights


def product(size=300):
    """The graph of a product of random matrices, which the threads share."""
    x = np.random.default_rng(0).standard_normal((size, 1, size)).astype(np.float32)
    return functions.affine([nn.Variable.from_numpy_array(x)], size, "fc")


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
def test_a_forked_child_has_threads_of_its_own():
    """It inherits the pool of its parent, but not the threads in it: they would never begin what it gives them."""
    kernels.threads.set_threads(3)
    y = product()
    y.forward()
    expected = y.d.copy()
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def work():
        y.data.zero()
        y.forward()
        together = threading.Barrier(3, timeout=5)
        kernels.threads.run([(together.wait,)] * 3)
        sender.send(y.d.copy())

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    sender.close()  # so that the end of the child is that of what it sends
    try:
        assert receiver.poll(20), "the child hangs"
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
    """Threads besides would compute on more cores than --threads allows."""
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


# ------------------------------------------------------------------------------------- the pool


@pytest.mark.parametrize("failing", ["ours", "another"])
def test_an_error_in_any_thread_is_raised(failing):
    """When it leaves, nobody is at work any more, nor will be."""
    kernels.threads.set_threads(3)
    together, begun, ended, failed = threading.Barrier(3, timeout=20), [], [], threading.Event()

    def work(number):
        begun.append(number)
        together.wait()  # so each of the threads has one
        if (failing == "ours") == (threading.current_thread() is threading.main_thread()) and not failed.is_set():
            failed.set()
            raise RuntimeError("in a thread")
        failed.wait(20)
        time.sleep(0.05)
        ended.append(number)

    with pytest.raises(RuntimeError, match="in a thread"):
        kernels.threads.run([(work, number) for number in range(9)])
    assert len(begun) == 3 and len(ended) == 2
    time.sleep(0.1)
    assert len(begun) == 3


def test_an_interruption_waits_for_the_threads():
    """Ctrl-C in the thread that waits for the others: they still write to its arrays."""
    kernels.threads.set_threads(2)
    together, ended = threading.Barrier(2, timeout=20), []

    def work():
        together.wait()  # so each of the threads has one
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.1)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # which waits by now
            time.sleep(0.2)
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        kernels.threads.run([(work,), (work,)])
    assert ended


def test_who_waits_for_a_pool_that_others_use():
    """Several threads at once, the number of threads changing meanwhile: every task is done, once."""

    def work(k):
        for _ in range(50):
            done = np.zeros(40, int)
            kernels.threads.run([(np.add, done[i : i + 1], 1, done[i : i + 1]) for i in range(40)])
            assert (done == 1).all()

    def change(k):
        for number in (1, 2, 5, None) * 25:
            kernels.threads.set_threads(number)

    in_threads(work, 4, change)


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


@pytest.mark.parametrize("nb_threads", [0, -1, 10**20, 2.5, "2", float("nan")])
def test_numbers_of_threads_that_cannot_be(nb_threads):
    kernels.threads.set_threads(3)
    with pytest.raises(ValueError, match="at least one is needed, and at most"):
        kernels.threads.set_threads(nb_threads)
    assert kernels.threads.get_threads() == 3


NUMBERS = (1, 2, 3, 5, 8, 16)


@pytest.fixture(params=[False, True], ids=["whole", "shared"])
def shared(request, monkeypatch):
    """Whether recurrent weights exceed what a core keeps of them, so that threads have a part of them each."""
    if request.param:
        monkeypatch.setattr(kernels.lstm, "CACHE", 2000)
    cut, seen = kernels.lstm._cut, set()

    def count(nb_directions, nb_samples, size, multiple):
        units, groups = cut(nb_directions, nb_samples, size, multiple)
        seen.add(units < size)
        return units, groups

    monkeypatch.setattr(kernels.lstm, "_cut", count)
    yield
    assert (True in seen) == request.param


def test_stems_for_any_number_of_threads(shared):
    models = [make_model(1, hidden_size=140, max_bin=100), make_model(2, hidden_size=20, target="bass")]
    separator, audio, stems = (
        separate.Separator(models, residual=True, wiener_win_len=8, context="cpu"),
        recording(3, 3),
        [],
    )
    for number in NUMBERS:
        kernels.threads.set_threads(number)
        stems.append(np.stack(list(separator(audio, 8000).values())))
    for other in stems[1:]:
        np.testing.assert_allclose(other, stems[0], rtol=0, atol=2e-6 * np.abs(stems[0]).max())


def test_training_for_any_number_of_threads(shared):
    """Losses of three steps, and after the first of them the gradients, of which Adam keeps a tenth."""
    x, y = (np.random.default_rng(k).standard_normal((2, 2, 3000)).astype(np.float32) for k in range(2))
    results = []
    for number in NUMBERS:
        kernels.threads.set_threads(number)
        made = make_model(3, hidden_size=140, max_bin=60)
        solver, graph = solvers.Adam(made.variables(), 1e-3), train.Graph(made, x.shape, test=False)
        losses = []
        for step in range(3):
            train.seed_nnabla("dropout", seed=0, epoch=1, step=step)
            losses.append(float(train.train_step(graph, x, y[:, None], solver).data))
            if step == 0:
                gradients = {k: 10 * v for k, v in solver.get_state().items() if k.endswith("/mean") and np.size(v)}
        results.append((losses, gradients))
    for losses, gradients in results[1:]:
        np.testing.assert_allclose(losses, results[0][0], rtol=1e-5)
        assert gradients.keys() == results[0][1].keys()
        for name, expected in results[0][1].items():
            scale = np.abs(expected).max() if name != "input_mean/mean" else np.inf  # it is 0, but for rounding
            np.testing.assert_allclose(gradients[name], expected, rtol=0, atol=2e-5 * scale, err_msg=name)


# ---------------------------------------------------------------------------------------- BLAS


def blas():
    """The functions that tell and set the number of threads of SciPy's BLAS, which is that of many others too."""
    library = ctypes.CDLL(scipy.linalg.cython_blas.__file__)
    for prefix in ("scipy_openblas", "openblas"):
        if hasattr(library, f"{prefix}_set_num_threads"):
            return getattr(library, f"{prefix}_get_num_threads"), getattr(library, f"{prefix}_set_num_threads")
    pytest.skip("not an OpenBLAS")


@pytest.fixture
def three():
    """BLAS with three threads."""
    get, put = blas()
    before = get()
    put(3)
    yield get
    put(before)


def test_blas_has_its_threads_again_after_an_error(three):
    with pytest.raises(KeyboardInterrupt), kernels.blas.one_thread:
        assert three() == 1
        raise KeyboardInterrupt
    assert three() == 3


def test_blas_has_one_thread_while_several_use_it(three):
    def work(k):
        for _ in range(2000):
            with kernels.blas.one_thread:
                assert three() == 1

    in_threads(work, 4)
    assert three() == 3


# -------------------------------------------------------------------------------- NNabla's own state


def in_threads(work, count, *others):
    """Call work(k) for each k, and what is beside, in a thread each, which take turns after every instruction."""
    functions = [functools.partial(work, k) for k in range(count)] + [
        functools.partial(other, None) for other in others
    ]
    together, interval = threading.Barrier(len(functions), timeout=20), sys.getswitchinterval()

    def begin(function):
        together.wait()
        return function()

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(len(functions)) as pool:
            return list(pool.map(begin, functions))
    finally:
        sys.setswitchinterval(interval)


def make_model(seed, cls=model.OpenUnmix, target="vocals", **options):
    description = {"class": cls.__name__, "targets": [target], "options": options, "nb_channels": 2}
    description.update(sample_rate=8000, n_fft=256, n_hop=64)
    with context.exclusive():
        nn.random.prng = np.random.RandomState(seed)
        made = trained.Model(description, cls)
    return made


def make_separator(seed):
    """With networks of both kinds: ours, whose memory is bounded, and one of NNabla's functions alone."""
    models = [make_model(seed, hidden_size=10, max_bin=100), make_model(seed, networks.Gru, "bass")]
    return separate.Separator(models, residual=True, wiener_win_len=8, context="cpu")


def recording(seed, nb_channels=2):
    return 0.3 * np.random.default_rng(seed).standard_normal((nb_channels, 1500 + 500 * seed)).astype(np.float32)


@pytest.mark.parametrize("plain", [False, True])
def test_stems_are_those_of_one_thread(plain):
    """One separator in several threads, several in one each; the recordings differ in length and channels."""
    context.set_plain(plain)
    try:
        separators = [make_separator(seed) for seed in range(2)]
        jobs = [(separators[k % 2], recording(seed, 1 + (k + seed) % 3)) for k in range(4) for seed in range(3)]
        expected = [separator(audio, 8000) for separator, audio in jobs]

        def work(k):
            return [separator(audio, 8000) for separator, audio in jobs[3 * k : 3 * k + 3]]

        with nn.context_scope(nn.Context(["cpu:float"], "CpuArray")):  # not the separators' own
            found = [stems for several in in_threads(work, 4) for stems in several]
            assert nn.get_current_context().array_class == "CpuArray"
    finally:
        context.set_plain(False)
    for theirs, ours in zip(expected, found):
        assert theirs.keys() == ours.keys()
        for name in theirs:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def test_trainings_are_those_of_one_thread():
    """Building, drawing, training, reading and describing networks, beside one that separates."""
    separator, x = make_separator(9), recording(1)
    stems = separator(x, 8000)

    def work(k):
        made = make_model(k, hidden_size=8 + 2 * k, max_bin=60)
        solver = solvers.Adam(made.variables(), 1e-2, 1e-5)
        graph, losses = train.Graph(made, (2, 2, 2000), test=False), []
        for step in range(5):
            batch = np.random.default_rng([k, step]).standard_normal((2, 2, 2, 2000)).astype(np.float32)
            with context.exclusive():  # the dropout depends on the seed alone
                train.seed_nnabla("dropout", seed=k, epoch=1, step=step)
                losses.append(float(train.train_step(graph, batch[0], batch[1][:, None], solver).data))
        parameters = made.get_parameters()
        assert weights.describe(parameters)["hidden_size"] == 8 + 2 * k
        again = trained.Model(made.description, model.OpenUnmix, parameters)
        valid = train.Graph(again, (1, 2, 3000), test=True)
        valid.forward(batch[0, :1, :, :1500].repeat(2, axis=2), batch[1, :1, None, :, :1500].repeat(2, axis=3))
        return losses, float(valid.loss.d), parameters

    def beside(k):
        for _ in range(5):
            for name, stem in separator(x, 8000).items():
                np.testing.assert_array_equal(stem, stems[name])

    expected = [work(k) for k in range(3)]
    for theirs, ours in zip(expected, in_threads(work, 3, beside)):
        assert theirs[:2] == ours[:2]
        assert theirs[2].keys() == ours[2].keys()
        for name in theirs[2]:
            np.testing.assert_array_equal(ours[2][name], theirs[2][name], err_msg=name)


def test_what_is_swapped_for_a_while_is_as_before():
    """A function and the log of NNabla's, its scopes, the path for imports."""
    made = [make_model(k, hidden_size=4 + 2 * k, max_bin=20) for k in range(4)]
    parameters = [one.get_parameters() for one in made]
    before = nn.parameter._create_parameter_by_initializer, nn.logger.disabled, list(sys.path)
    scope, file = nn.parameter.get_current_parameter_scope(), Path(networks.__file__)

    def work(k):
        for _ in range(10):
            weights.describe(parameters[k])
            context.extension_context(None)
            assert trained.read_network(f"{file}:Gru").name == "networks.py:Gru"
            with made[k].parameter_scope():
                shapes = {name: variable.shape for name, variable in nn.get_parameters(grad_only=False).items()}
            assert shapes == {name: value.shape for name, value in parameters[k].items()}

    in_threads(work, 4)
    assert before == (nn.parameter._create_parameter_by_initializer, nn.logger.disabled, sys.path)
    assert nn.parameter.get_current_parameter_scope() is scope
