"""The arithmetic over arrays, called with what does not fit: compiled loops would write anywhere."""

import threading
import time

import numpy as np
import pytest
from formulas import float64_lstm

import kernels.affine
import kernels.lstm
import kernels.normalization
import kernels.products
import kernels.spectra
import kernels.threads
import kernels.training
import kernels.wiener
from kernels.compiler import INT, INTS, kernel
from kernels.parts import give, progress, shared, take
from kernels.shapes import check

T, N, C, F, K, S, I, J = 5, 2, 2, 9, 6, 3, 4, 2  # noqa: E741


def real(*shape):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def pairs(*shape):
    return (real(*shape) + 1j * real(*shape)).astype(np.complex64)


LSTM = {"x": real(T, N, I), "weight": real(2, 4, S, I + S), "gates": real(T, N, 2, 4 * S), "c": real(T, N, 2, S)}
ROWS = {"x": real(T, K), "mean": real(K), "slope": real(K), "shift": real(K)}
INPUT = {"mean": real(4), "scale": real(4), "weight": real(8, K)}
CASES = {
    kernels.spectra.spectrogram: {"x": real(N, C, 40), "out": real(4, N, C, 9)},
    kernels.spectra.stft: {"x": real(C, 40)},
    kernels.spectra.magnitude: {"spectra": pairs(C, T, F)},
    kernels.spectra.overlap_add: {"y": pairs(J, C, T, 9), "sums": real(J, C, 48), "envelope": real(48)},
    kernels.normalization.column_sums: {"x": real(T, K)},
    kernels.normalization.normalize: {**ROWS, "mixture": real(T, K), "out": real(T, K)},
    kernels.normalization.normalize_backward: {
        **{name: real(T, K) for name in ("x", "dy", "other", "dx")},
        **{name: real(K) for name in ("mean", "slope", "shift", "inverse_std")},
    },
    kernels.affine.input_affine: {"x": real(T, C, F), **INPUT, "out": real(T, K)},
    kernels.affine.input_affine_backward: {"x": real(T, C, F), **INPUT, "dy": real(T, K)},
    kernels.affine.input_affine_backward_data: {**INPUT, "dy": real(T, K), "dx": real(T, C, F)},
    kernels.training.dropout: {"x": real(40), "out": real(40)},
    kernels.training.squared_error: {"a": real(40), "b": real(40)},
    kernels.training.difference: {"a": real(40), "b": real(40), "out": real(40)},
    kernels.lstm.lstm_layer: {**LSTM, "bias": real(2, 4, S), "h": real(T, N, 2, S)},
    kernels.lstm.lstm_layer_backward: {
        **LSTM,
        **{name: real(T, N, 2, S) for name in ("h", "dy")},
        "dx": real(T, N, I),
        "dweight": real(2, 4, S, I + S),
    },
    kernels.products.matmul: {"a": real(4, 5), "b": real(5, 6), "out": real(4, 6)},
    kernels.wiener.wiener: {"v": real(J, T, C, F) ** 2, "x": pairs(C, T, F), "out": pairs(J, C, T, F)},
    kernels.wiener.causal: {
        "v": real(J, T, C, F) ** 2,
        "x": pairs(C, T, F),
        "sums": np.zeros((J, 4, F)),
        "out": pairs(J, C, T, F),
    },
    kernels.wiener.peak: {"x": pairs(C, T, F)},
}
FRAMES = {"n_fft": 16, "n_hop": 8}
FILTER = {"softmask": False, "residual": False, "eps": 1e-10, "weight": 1e-10, "noise": 1e-5}
NUMBERS = {
    kernels.spectra.spectrogram: {**FRAMES, "center": False, "power": 1, "mono": False},
    kernels.spectra.stft: {**FRAMES, "start": 1, "stop": 4},
    kernels.spectra.magnitude: {"mono": False},
    kernels.spectra.overlap_add: FRAMES,
    kernels.normalization.normalize: {"kind": 3},
    kernels.normalization.normalize_backward: {"kind": 3, "batch_statistics": True},
    kernels.affine.input_affine_backward_data: {"accumulate": True},
    kernels.training.dropout: {"p": 0.5, "seed": 1, "layer": 2},
    kernels.training.difference: {"factor": 2.0},
    kernels.wiener.wiener: {"iterations": 1, **FILTER},
    kernels.wiener.causal: {"forgetting": 0.9, **FILTER},
}
WRITTEN = {"out", "dx", "dweight", "gates", "c", "h", "sums", "envelope"}


def others(array):
    """Arrays that are not what was asked for: of other sizes, types, orders."""
    for axis in range(array.ndim):
        yield np.repeat(array, 2, axis)
        yield array[(slice(None),) * axis + (slice(0, 1),)].copy()
        yield array[(slice(None),) * axis + (slice(0, 0),)].copy()
        yield array[(slice(None),) * axis + (slice(None, None, 2),)]
    yield array[None]
    yield array[..., None]
    yield array[0]
    yield np.array(0, array.dtype)
    yield from (array.astype(kind) for kind in (np.float64, np.complex128, np.int64, np.float16, bool, object, ">f4"))
    yield np.asfortranarray(array)
    yield array[::-1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", CASES, ids=lambda function: function.__name__)
def test_arguments_that_do_not_fit(function):
    """They work, or are a ValueError of one line; what is only read stays as it is."""
    numbers, refused = NUMBERS.get(function, {}), 0
    for name, array in CASES[function].items():
        for other in others(array):
            arrays = {key: value.copy() for key, value in CASES[function].items()}
            arrays[name] = other
            before = {key: np.array(value) for key, value in arrays.items() if key not in WRITTEN}
            try:
                function(**arrays, **numbers)
            except ValueError as error:
                assert "\n" not in str(error)
                refused += 1
            for key, value in before.items():
                np.testing.assert_array_equal(arrays[key], value)
    assert refused > 3
    function(**{key: value.copy() for key, value in CASES[function].items()}, **numbers)


def test_shapes():
    check(a=(np.ones((2, 3)), "T K"), b=(np.ones((3, 8, 5)), "K 4*T T+K"), c=(np.ones(7), "7"))
    with pytest.raises(ValueError, match=r"b of shape \(4,\): expected \(K\), where T = 2, K = 3"):
        check(a=(np.ones((2, 3)), "T K"), b=(np.ones(4), "K"))
    with pytest.raises(ValueError, match=r"a of shape \(\): expected \(T\), where any size is right"):
        check(a=(np.ones(()), "T"))


@pytest.mark.parametrize("shapes", [[], [(9, 1)], [(3, 3), (2, 1)], [(7, 2), (-2, 2)], [(11, 1), (1, -1)]])
def test_recordings_that_are_not_there(shapes):
    arrays = {**LSTM, "bias": real(2, 4, S), "h": real(T, N, 2, S)}
    with pytest.raises(ValueError, match="10 rows are not those of recordings"):
        kernels.lstm.lstm_layer(**arrays, shapes=shapes)


@pytest.mark.parametrize("options", [{"n_hop": 0}, {"n_fft": 0}, {"start": -1}, {"stop": 99}, {"start": 4, "stop": 1}])
def test_frames_that_are_not_there(options):
    with pytest.raises(ValueError):
        kernels.spectra.stft(real(C, 40), **{**FRAMES, "start": 1, "stop": 4, **options})
    assert kernels.spectra.stft(real(C, 40), 16, 8, 2, 2).shape == (C, 0, 9)


# ------------------------------------------------------------------------------ steps that threads share


@kernel
def follow(out: INTS, progress: INTS, own: INT, most: INT):
    """out (steps + 1, parts): each step reads all parts of the one before."""
    for _ in range(most):
        step, part = take(progress, own, len(out) - 1)
        if part < 0:
            return step == len(out) - 1
        out[step + 1, part] = (out[step].sum() + part) % 1000003
        give(progress)
    return False


def job(nb_steps, nb_parts):
    """(out, progress) of a job for `follow`, and what it is to find."""
    out, expected = np.zeros((nb_steps + 1, nb_parts), np.intp), np.zeros((nb_steps + 1, nb_parts), np.intp)
    for step in range(nb_steps):
        expected[step + 1] = (expected[step].sum() + np.arange(nb_parts)) % 1000003
    return (out, progress(nb_parts)), expected


@pytest.mark.parametrize("nb_threads, nb_parts", [(1, 3), (2, 2), (2, 5), (3, 2), (5, 5), (16, 8), (16, 16)])
def test_a_step_begins_when_the_one_before_is_done(nb_threads, nb_parts):
    """With more threads than parts, and fewer, and than cores: each part is done once, in its step."""
    kernels.threads.set_threads(nb_threads)
    jobs, expected = zip(*(job(2000 + k, nb_parts) for k in range(2)))
    kernels.threads.run(shared(follow, list(jobs), nb_parts))
    for (out, done), right in zip(jobs, expected):
        np.testing.assert_array_equal(out, right)
        assert done[-1, 0] == nb_parts * (len(out) - 1)


def test_who_waits_for_a_part_helps_with_another_job():
    """Whose core was taken away in the midst of a part is waited for, not replaced; nothing else waits."""
    jobs, expected = zip(*(job(300, 2) for _ in range(2)))
    (out, done), (_, other) = jobs
    done[0, 0] = 1  # another thread has taken a part, and does not go on
    waiting = threading.Thread(target=kernels.threads.run, args=(shared(follow, list(jobs), 2)[1:2],))
    waiting.start()
    try:
        end = time.monotonic() + 20
        while other[-1, 0] < 600 and time.monotonic() < end:
            time.sleep(0.01)
        assert waiting.is_alive() and done[-1, 0] == 1 and not out[1, 0]
    finally:
        out[1, 0] = expected[0][1, 0]
        done[-1, 0] += 1  # it is back
        waiting.join(20)
    for (found, _), right in zip(jobs, expected):
        np.testing.assert_array_equal(found, right)


@pytest.fixture(params=[1, 2, 3, 5, 8, 16])
def nb_threads(request, monkeypatch):
    """Numbers of threads, recurrent weights of any width being cut into parts for them."""
    kernels.threads.set_threads(request.param)
    monkeypatch.setattr(kernels.lstm, "CACHE", 1)
    monkeypatch.setattr(kernels.lstm, "FEW", 99)
    return request.param


@pytest.mark.parametrize("D, S", [(1, 5), (2, 37), (2, 70)])
def test_parts_of_recurrent_weights(nb_threads, D, S):
    """Recordings that end at different frames, through one layer: as the formula says of each alone."""
    shapes = [(5, 2), (9, 1), (1, 1), (9, 3)]
    recordings = [real(*shape, I) for shape in shapes]
    weight, bias = real(D, 4, S, I + S) * np.float32(0.3), real(D, 4, S)
    nb_rows = sum(T * N for T, N in shapes)
    gates, c, h = (np.empty((nb_rows, 1, D, size), np.float32) for size in (4 * S, S, S))
    x = np.concatenate([one.reshape(-1, 1, I) for one in recordings])
    kernels.lstm.lstm_layer(x, weight, bias, gates, c, h, shapes)
    expected = [float64_lstm(one, [weight.astype(float)], [bias], np.ones(1)) for one in recordings]
    np.testing.assert_allclose(h.ravel(), np.concatenate([one.ravel() for one in expected]), atol=2e-6)


@pytest.mark.parametrize("D, S", [(1, 5), (2, 37), (2, 70)])
def test_the_way_back_of_parts(nb_threads, D, S):
    """Gradients along a random direction in all of input, weights and biases: f'(v) = imag f(v + ih) / h."""
    x, dy, weight, bias = real(T, N, I), real(T, N, D, S), real(D, 4, S, I + S) * np.float32(0.3), real(D, 4, S)
    gates, c, h, dx, dweight = (np.empty(shape, np.float32) for shape in (
        (T, N, D, 4 * S), (T, N, D, S), (T, N, D, S), x.shape, weight.shape
    ))  # fmt: skip
    kernels.lstm.lstm_layer(x, weight, bias, gates, c, h)
    dbias = kernels.lstm.lstm_layer_backward(x, weight, gates, c, h, dy, dx, dweight)
    rng = np.random.default_rng(0)
    for _ in range(5):
        along = [rng.standard_normal(one.shape) for one in (x, weight, bias)]
        shifted = [one + 1e-20j * way for one, way in zip((x, weight, bias), along)]
        y = float64_lstm(shifted[0], shifted[1:2], shifted[2:], np.ones(1))
        derivative = (y.imag / 1e-20 * dy.reshape(y.shape)).sum()
        terms = [gradient * way for gradient, way in zip((dx, dweight, dbias), along)]
        size = np.sqrt(sum((term**2).sum() for term in terms))
        assert abs(sum(term.sum() for term in terms) - derivative) < 2e-6 * size


def test_a_thread_that_never_comes(monkeypatch):
    """The others do its parts."""
    arrays = {"x": real(7, N, I), "weight": real(2, 4, 40, I + 40), "bias": real(2, 4, 40)}
    written = {name: np.zeros((7, N, 2, size), np.float32) for name, size in (("gates", 160), ("c", 40), ("h", 40))}
    kernels.lstm.lstm_layer(**arrays, **written)
    expected = written["h"].copy()
    written["h"][:] = 0
    monkeypatch.setattr(kernels.lstm, "CACHE", 1)
    monkeypatch.setattr(kernels.lstm, "FEW", 99)
    monkeypatch.setattr(kernels.lstm, "shared", lambda *arguments: kernels.parts.shared(*arguments)[1::3])
    kernels.threads.set_threads(3)
    kernels.lstm.lstm_layer(**arrays, **written)
    np.testing.assert_allclose(written["h"], expected, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_a_recording_comes_out_as_it_does_alone_bit_for_bit(shared, monkeypatch):
    """Whether tiles have one row or eight, and its weights one part or several."""
    if shared:
        monkeypatch.setattr(kernels.lstm, "CACHE", 1)
    kernels.threads.set_threads(3)
    size, lengths = 260, [9, 1, 5, 5, 12, 7, 3, 9, 2, 6, 12]  # deeper than what a cache holds of a panel
    arrays = {"weight": real(2, 4, size, I + size), "bias": real(2, 4, size)}

    def layer(x, shapes):
        c, h = (np.zeros((len(x), 1, 2, size), np.float32) for _ in range(2))
        kernels.lstm.lstm_layer(
            x, **arrays, gates=np.zeros((len(x), 1, 2, 4 * size), np.float32), c=c, h=h, shapes=shapes
        )
        return h

    recordings = [real(length, 1, I) for length in lengths]
    together = layer(np.concatenate(recordings), [(length, 1) for length in lengths])
    for got, recording in zip(np.split(together, np.cumsum(lengths)[:-1]), recordings):
        np.testing.assert_array_equal(got, layer(recording, None))


@pytest.mark.parametrize(
    "arguments, cut",
    [
        ((1, 2, 1, 512), (512, 1)),
        ((2, 2, 1, 256), (256, 1)),  # what fits is not shared
        ((8, 2, 16, 256), (256, 4)),
        ((2, 2, 1, 512), (256, 1)),
        ((3, 2, 1, 512), (176, 1)),
        ((5, 2, 2, 512), (128, 1)),  # four caches hold a direction
        ((5, 2, 3, 512), (512, 3)),  # not few
        ((16, 2, 1, 512), (64, 1)),  # both directions at once
        ((16, 1, 1, 512), (32, 1)),
        ((16, 2, 1, 1024), (64, 1)),
    ],
)
def test_how_recurrent_weights_are_cut(arguments, cut):
    """(threads, directions, samples, size): (units of a part, groups of samples)."""
    nb_threads, *sizes = arguments
    kernels.threads.set_threads(nb_threads)
    units, groups = kernels.lstm._cut(*sizes, 8)
    assert (units, len(groups)) == cut
