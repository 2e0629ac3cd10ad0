"""The arithmetic over arrays, called with what does not fit: compiled loops would write anywhere."""

import numpy as np
import pytest

import kernels.affine
import kernels.lstm
import kernels.normalization
import kernels.products
import kernels.spectra
import kernels.training
import kernels.wiener
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
    kernels.wiener.peak: {"x": pairs(C, T, F)},
}
FRAMES = {"n_fft": 16, "n_hop": 8}
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
    kernels.wiener.wiener: dict(iterations=1, softmask=False, residual=False, eps=1e-10, weight=1e-10, noise=1e-5),
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
