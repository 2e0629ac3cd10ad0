"""The plain short-time Fourier transform and its inverse, against float64."""

import math

import nnabla as nn
import numpy as np
import pytest
from formulas import float64_magnitudes, float64_waveform

import context
import fourier
import functions

# n_fft, n_hop: the usual ones, and hops that do not divide a window, exceed it, or are short
FRAMES = [
    (4, 2), (8, 8), (64, 16), (512, 128), (512, 480), (1024, 256), (1024, 64), (2048, 512), (2048, 2080),
    (4096, 1024), (4096, 2048), (4096, 1536), (4096, 80), (8192, 2048), (16384, 4096), (16384, 1024),
]  # fmt: skip
OTHERS = [(60, 15), (54, 18), (1000, 250), (4096, 441), (64, 1), (2, 1)]


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(context, "_plain", True)


def audio(shape, n_fft, n_hop, more=3, seed=0):
    """Noise, and a tone that is louder: audio of some frames and `more` samples."""
    nb_timesteps = n_fft + 4 * n_hop + more
    x = np.random.default_rng(seed).uniform(-0.3, 0.3, (*shape, nb_timesteps))
    x += 0.5 * np.cos(0.1 * np.arange(nb_timesteps))
    return x.astype(np.float32)


def functions_of(*outputs):
    """The functions of a graph, in their order."""
    found = []
    nn.functions.sink(*outputs).visit(found.append)
    return found[:-1]


def names_of(*outputs):
    return {function.info.type_name for function in functions_of(*outputs)}


def multiplications(*outputs):
    """Multiply-adds of a graph's matrix products, from their shapes."""
    products = [f for f in functions_of(*outputs) if f.info.type_name in ("BatchMatmul", "Affine")]
    count = 0
    for f in products:
        *samples, rows, columns = f.outputs[0].shape
        inner = math.prod(f.inputs[0].shape[-2:]) // rows
        count += math.prod(samples) * rows * columns * inner
    return count


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("n_fft, n_hop", FRAMES)
def test_spectrogram_is_that_of_float64(n_fft, n_hop, center):
    """Within 1e-6 of its maximum, which powers and means keep."""
    assert fourier.factored(n_fft, n_hop)
    x = audio((2, 2), n_fft, n_hop)
    padded = np.pad(x, [(0, 0), (0, 0), (n_fft // 2,) * 2], mode="reflect") if center else x
    truth = np.stack([float64_magnitudes(some, n_fft, n_hop) for some in padded.astype(np.float64)], axis=1)
    v = nn.Variable.from_numpy_array(x)
    for power, mono in ((1, False), (2, False), (1, True), (2, True)):
        X = functions.spectrogram(v, n_fft, n_hop, center, power, mono)
        X.forward()
        expected = truth**power
        expected = expected.mean(2, keepdims=True) if mono else expected
        assert X.shape == expected.shape
        assert np.abs(X.d - expected).max() <= 1e-6 * power * expected.max()


@pytest.mark.parametrize("n_fft, n_hop", FRAMES)
def test_transform_and_its_gradient_are_those_of_float64(n_fft, n_hop):
    """Real and imaginary parts; as it is linear, ⟨dy, f(dx)⟩ is ⟨gradient, dx⟩."""
    x = audio((3,), n_fft, n_hop, more=n_hop // 2)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)

    def float64_transform(x):
        frames = np.lib.stride_tricks.sliding_window_view(np.asarray(x, np.float64), n_fft, axis=1)[:, ::n_hop]
        return np.fft.rfft(frames * window).transpose(2, 0, 1)

    v = nn.Variable.from_numpy_array(x).apply(need_grad=True)
    parts = fourier.transform(v, n_fft, n_hop)
    y = nn.functions.stack(*parts)
    y.forward()
    truth = float64_transform(x)
    assert np.abs(y.d[0] + 1j * y.d[1] - truth).max() <= 1e-6 * np.abs(truth).max()
    rng = np.random.default_rng(1)
    dy, dx = (rng.standard_normal(shape).astype(np.float32) for shape in (y.shape, x.shape))
    v.grad.zero()
    y.backward(dy)
    change = float64_transform(dx)
    products = v.g * np.float64(dx)
    assert abs(products.sum() - (dy[0] * change.real + dy[1] * change.imag).sum()) <= 2e-6 * np.abs(products).sum()


@pytest.mark.parametrize("n_fft, n_hop", [(64, 16), (512, 480), (2048, 512), (4096, 1024)])
@pytest.mark.parametrize("center, power, mono", [(False, 1, False), (True, 2, True)])
def test_gradient_of_a_spectrogram_by_finite_differences(n_fft, n_hop, center, power, mono):
    x = audio((1, 2), n_fft, n_hop)
    rng = np.random.default_rng(2)
    v = nn.Variable.from_numpy_array(x).apply(need_grad=True)
    X = functions.spectrogram(v, n_fft, n_hop, center, power, mono)
    weights = rng.uniform(0.5, 1, X.shape)
    X.forward()
    v.grad.zero()
    X.backward(weights.astype(np.float32))

    def value(x):
        x = np.pad(x, [(0, 0), (n_fft // 2,) * 2], mode="reflect") if center else x
        Y = float64_magnitudes(x, n_fft, n_hop)[:, None] ** power
        return (weights * (Y.mean(2, keepdims=True) if mono else Y)).sum()

    direction, step = rng.standard_normal(x.shape), 1e-5
    change = (value(x[0] + step * direction[0]) - value(x[0] - step * direction[0])) / (2 * step)
    assert abs((v.g * direction).sum() - change) <= 1e-5 * np.abs(v.g * direction).sum()


@pytest.mark.parametrize("n_fft, n_hop", [frames for frames in FRAMES if frames[0] // 2 % frames[1] == 0])
def test_inverse_and_its_gradient_are_those_of_float64(n_fft, n_hop):
    x = audio((2, 2), n_fft, n_hop)
    rng = np.random.default_rng(3)
    nb_frames = (x.shape[2] - n_fft) // n_hop + 1
    Y, dY = (rng.uniform(0, 1, (nb_frames, 2, 2, n_fft // 2 + 1)).astype(np.float32) for _ in range(2))
    v = nn.Variable.from_numpy_array(Y).apply(need_grad=True)
    (y,) = functions.waveforms([v], nn.Variable.from_numpy_array(x), n_fft, n_hop)
    y.forward()
    truth = float64_waveform(Y, x, n_fft, n_hop)
    assert np.abs(y.d - truth).max() <= 2e-6 * np.abs(truth).max()
    dy = rng.standard_normal(x.shape).astype(np.float32)
    v.grad.zero()
    y.backward(dy)
    products = v.g * np.float64(dY)
    assert abs(products.sum() - (dy * float64_waveform(dY, x, n_fft, n_hop)).sum()) <= 1e-5 * np.abs(products).sum()


@pytest.mark.parametrize("n_fft, n_hop", OTHERS)
def test_other_frames_are_f_stft_s(n_fft, n_hop):
    assert not fourier.factored(n_fft, n_hop)
    x = audio((1, 1), n_fft, n_hop)
    X = functions.spectrogram(nn.Variable.from_numpy_array(x), n_fft, n_hop)
    assert "STFT" in names_of(X)
    X.forward()
    truth = float64_magnitudes(x[0].astype(np.float64), n_fft, n_hop)
    assert np.abs(X.d[:, 0] - truth).max() <= 3e-6 * truth.max()


@pytest.mark.parametrize("n_fft, n_hop", [(4096, 1000), (16384, 128), (16384, 2048 + 16), (8192, 8)])
def test_matrices_and_graphs_that_would_be_large_are_avoided(n_fft, n_hop):
    """The first matrix has 2 N P numbers; each frame that a sample is part of is a node."""
    assert not fourier.factored(n_fft, n_hop)


def test_layout_of_the_transform():
    """(nb_samples, nb_channels, nb_bins, nb_frames), of which the spectrogram is the magnitude."""
    x = nn.Variable.from_numpy_array(audio((2, 3), 64, 16))
    real, imag = functions.stft(x, 64, 16, center=True)
    X = functions.spectrogram(x, 64, 16, center=True)
    nn.forward_all([real, imag, X])
    assert real.shape == imag.shape == (2, 3, 33, (x.shape[2] + 64 - 64) // 16 + 1)
    np.testing.assert_allclose(np.hypot(real.d, imag.d).transpose(3, 0, 1, 2), X.d, atol=1e-6)


@pytest.mark.parametrize("n_fft", [512, 1024, 2048, 4096, 8192, 16384])
def test_multiplications_are_counted(n_fft):
    """A hop of a quarter: 2 N (P + Q + 2) per frame, at 4096 a sixteenth of the N (N + 2) of F.stft's convolution."""
    nb_frames, p, q = 5, *fourier._factors(n_fft, n_fft // 4)
    x = nn.Variable((2, n_fft + (nb_frames - 1) * n_fft // 4))
    count = multiplications(*fourier.transform(x, n_fft, n_fft // 4)) / (2 * nb_frames)
    assert p * q == n_fft and p <= 2 * q
    assert count == 2 * n_fft * (p + q + 2)
    assert count <= n_fft * (n_fft + 2) / (15 if n_fft >= 4096 else 5)


@pytest.mark.parametrize("n_fft, n_hop", [(64, 16), (60, 15)])
@pytest.mark.parametrize("center", [False, True])
def test_pieces_of_long_audio_are_the_whole(n_fft, n_hop, center, monkeypatch):
    x = nn.Variable.from_numpy_array(audio((2, 2), n_fft, n_hop, more=1000)).apply(need_grad=True)
    results = []
    for block in (functions.BLOCK, 4 * n_fft * 7):  # seven frames of four signals
        monkeypatch.setattr(functions, "BLOCK", block)
        X = functions.spectrogram(x, n_fft, n_hop, center)
        outputs = [X, 2 * X] if center else [X, *functions.waveforms([X, 2 * X], x, n_fft, n_hop)]
        y = nn.functions.concatenate(*(nn.functions.reshape(v, (v.size,)) for v in outputs), axis=0)
        y.forward()
        x.grad.zero()
        y.backward(np.random.default_rng(0).standard_normal(y.shape).astype(np.float32))
        results.append((len(functions_of(X)), y.d.copy(), x.g.copy()))
    (few, *whole), (many, *pieces) = results
    assert many > 5 * few
    for one, other in zip(whole, pieces):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(one).max())


def test_memory_of_long_audio_is_bounded(monkeypatch):
    """Beyond audio and spectrograms, nothing in the graph of a track grows with its length."""
    monkeypatch.setattr(functions, "BLOCK", 2**18)
    largest = []
    for seconds in (4, 12):
        x = nn.Variable((1, 2, 44100 * seconds))
        X = functions.spectrogram(x, 4096, 1024)
        outputs = X, *functions.waveforms([X], x, 4096, 1024)
        sizes = [v.size for f in functions_of(*outputs) for v in f.outputs]
        largest.append(max(size for size in sizes if size not in (x.size, X.size)))
    assert largest[0] == largest[1] <= 3 * 2**18  # the first product, of complex numbers
