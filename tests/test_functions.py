"""The fast graph functions against their plain form, and the kernels against float64."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nnabla as nn
import nnabla.functions as F
import numba
import numpy as np
import pytest
import scipy.signal
from formulas import float64_lstm, float64_sdr, float64_waveform, float64_weighted_sdr
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import context
import functions
import kernels.compiler
import kernels.correlations
import kernels.lstm
import kernels.products
import kernels.threads
import kernels.training
import losses
import solvers

SIZES = st.fixed_dictionaries(
    {
        "T": st.integers(1, 9), "N": st.integers(1, 11), "C": st.integers(1, 2), "F": st.integers(1, 40),
        "H": st.integers(1, 40), "seed": st.integers(0, 10**6), "test": st.booleans(), "threads": st.integers(1, 3),
    }
)  # fmt: skip
shapes = settings(max_examples=25, deadline=None)


def variables(**arrays):
    return {name: nn.Variable.from_numpy_array(np.array(a, np.float32)) for name, a in arrays.items()}


def run(build, arrays, fixed, dy, plain, times=1):
    """Output and gradients of build(**variables) in one of the forms; `times` > 1 adds the gradients up.

    What `build` needs as parameters it finds, by the names of `arrays`, in the parameter scope.
    """
    nn.clear_parameters()
    v = variables(**arrays)
    for name, variable in v.items():
        variable.need_grad = name not in fixed
        if "/" in name:
            nn.parameter.set_parameter(name, variable)
    context.set_plain(plain)
    try:
        y = build(**{name: variable for name, variable in v.items() if "/" not in name})
    finally:
        context.set_plain(False)
    for variable in v.values():
        if variable.need_grad:
            variable.grad.zero()
    for _ in range(times):
        y.forward(clear_no_need_grad=True)
        value = y.d.copy()
        y.backward(dy, clear_buffer=True)
    gradients = {f"gradient of {name}": x.g.copy() for name, x in v.items() if x.need_grad}
    return {"y": value, **gradients, **{name: x.d.copy() for name, x in v.items() if name.endswith(("/mean", "/var"))}}


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name in expected:
        scale = max(np.abs(expected[name]).max(), 0.1)  # numbers of size 1 may happen to cancel
        error = np.abs(actual[name] - expected[name]).max() / scale
        assert error < tolerance, f"{name}: {error}"


def compare(build, arrays, shape, rng, fixed=(), tolerance=2e-5):
    """Both forms agree; and gradients of two backward passes add up."""
    dy = rng.standard_normal(shape).astype(np.float32)
    got = run(build, arrays, fixed, dy, plain=False)
    assert_close(got, run(build, arrays, fixed, dy, plain=True), tolerance)
    twice = run(build, arrays, fixed, dy, plain=False, times=2)
    for name in got:
        if name.startswith("gradient"):
            np.testing.assert_allclose(twice[name], 2 * got[name], rtol=1e-4, atol=1e-4 * np.abs(got[name]).max())


def poison(shapes):
    """Fill the memory that NNabla has released, and would use again, with NaN."""
    for shape in shapes:
        for array in [nn.NdArray(shape) for _ in range(20)]:
            array.cast(np.float32)[...] = np.nan


def released(build, arrays, fixed, dy, clear):
    """Gradients, with or without memory released as early as the graph allows; inputs and output are intermediates."""
    nn.clear_parameters()
    v = variables(**arrays)
    for name, variable in v.items():
        variable.need_grad = name not in fixed
        if variable.need_grad:
            variable.grad.zero()
        if "/" in name:
            nn.parameter.set_parameter(name, variable)
    inputs = {name: 2 * variable for name, variable in v.items() if "/" not in name}
    y = 3 * build(**inputs)
    shapes = {variable.shape for variable in [*inputs.values(), y]}
    y.forward(clear_no_need_grad=clear)
    if clear:
        poison(shapes)
    y.backward(dy, clear_buffer=clear, function_post_hook=(lambda _: poison(shapes)) if clear else None)
    return {name: variable.g.copy() for name, variable in v.items() if variable.need_grad}


def numbers(rng, *shape, scale=1.0):
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def draw(sizes):
    kernels.threads.set_threads(sizes["threads"])
    return np.random.default_rng(sizes["seed"]), *(sizes[k] for k in "TNCFH")


@shapes
@given(
    SIZES, st.sampled_from([1, 2, 1.5]), st.booleans(), st.booleans(), st.sampled_from([(64, 16), (60, 15), (32, 9)])
)
def test_spectrogram(sizes, power, center, mono, transform):
    rng, T, N, C, _, _ = draw(sizes)
    n_fft, n_hop = transform
    x = numbers(rng, N, C, n_fft + 30 * T)
    got = functions.spectrogram(nn.Variable.from_numpy_array(x), n_fft, n_hop, center, power, mono)
    got.forward()
    pad = n_fft // 2 if center else 0
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), (pad, pad)], mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft, axis=2)[:, :, ::n_hop]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    truth = (np.abs(np.fft.rfft(frames * window)) ** power).transpose(2, 0, 1, 3)
    truth = truth.mean(2, keepdims=True) if mono else truth
    assert_close({"y": got.d}, {"y": truth}, 2e-6)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("center, shortest", [(False, 64), (True, 33)])
def test_spectrogram_of_audio_that_is_too_short(plain, center, shortest, monkeypatch):
    """For a window, or to be reflected by half of one."""
    monkeypatch.setattr(context, "_plain", plain)
    assert functions.spectrogram(nn.Variable((1, 2, shortest)), 64, 16, center).shape[1:] == (1, 2, 33)
    with pytest.raises(ValueError, match=f"n_fft 64 needs {shortest}"):
        functions.spectrogram(nn.Variable((1, 2, shortest - 1)), 64, 16, center)


def test_spectrogram_of_audio_that_needs_a_gradient():
    """The fast form has none; so the plain one steps in, and agrees."""
    x = nn.Variable.from_numpy_array(numbers(np.random.default_rng(0), 2, 2, 1000))
    fixed = functions.spectrogram(x, 64, 16)
    x.need_grad = True
    moving = functions.spectrogram(x, 64, 16)
    nn.forward_all([fixed, moving])
    assert_close({"y": fixed.d}, {"y": moving.d}, 1e-5)
    x.grad.zero()
    moving.backward(1)
    assert np.abs(x.g).max() > 0


TRANSFORMS = [(64, 16), (60, 15), (32, 16), (54, 18)]


@shapes
@given(SIZES, st.sampled_from(TRANSFORMS), st.lists(st.booleans(), min_size=1, max_size=3))
def test_waveforms(sizes, transform, are_mono):
    """Both forms are the formula; as it is linear, so are the gradients: ⟨dy, f(dv)⟩ is ⟨gradient, dv⟩."""
    rng, T, N, C, _, _ = draw(sizes)
    n_fft, n_hop = transform
    x = numbers(rng, N, C, n_fft + (T - 1) * n_hop + rng.integers(n_hop))
    x[:, :, ::2] += 0.6  # a constant, and half the sample rate, so that these bins, which are real, keep their signs
    x[:, :, :n_hop] = 0
    x[0] = 0 if N > 1 else x[0]  # digital silence has the phase 0
    frames = np.lib.stride_tricks.sliding_window_view(x, n_fft, axis=2)[:, :, ::n_hop]
    levels = np.abs(np.fft.rfft(frames * scipy.signal.windows.hann(n_fft, sym=False)))
    assume((levels > 0.007 * levels.max())[levels > 0].all())  # else phases are those of rounding
    shapes = [(T, N, 1 if mono else C, n_fft // 2 + 1) for mono in are_mono]
    arrays = {f"Y{k}": np.abs(numbers(rng, *shape)) for k, shape in enumerate(shapes)}

    def build(x, **magnitudes):
        return F.stack(*functions.waveforms(list(magnitudes.values()), x, n_fft, n_hop))

    compare(build, {"x": x, **arrays}, (len(arrays), *x.shape), rng, fixed=("x",))
    dy = numbers(rng, len(arrays), *x.shape)
    for plain in (False, True):
        got = run(build, {"x": x, **arrays}, ("x",), dy, plain)
        for (name, Y), y, gradient in zip(arrays.items(), got["y"], dy):
            assert_close({"y": y}, {"y": float64_waveform(Y, x, n_fft, n_hop)}, 2e-6)
            direction = rng.standard_normal(Y.shape)
            change = (gradient * float64_waveform(direction, x, n_fft, n_hop)).sum()
            products = got[f"gradient of {name}"] * direction
            assert abs(products.sum() - change) < 1e-5 * np.abs(products).sum()


@pytest.mark.parametrize("plain", [False, True])
def test_waveforms_undo_the_spectrogram(plain, monkeypatch):
    """Where no frames are missing, and as though it were faded where they are."""
    monkeypatch.setattr(context, "_plain", plain)
    x = nn.Variable.from_numpy_array(numbers(np.random.default_rng(0), 2, 2, 64 + 16 * 20 + 5))
    (y,) = functions.waveforms([functions.spectrogram(x, 64, 16)], x, 64, 16)
    y.forward()
    whole = slice(48, 16 * 21)
    np.testing.assert_allclose(y.d[..., whole], x.d[..., whole], atol=1e-5)
    assert (np.abs(y.d) <= np.abs(x.d) + 1e-5).all() and not y.d[..., -5:].any()
    np.testing.assert_array_equal(np.abs(y.d[..., 0]), 0)


@pytest.mark.parametrize("plain", [False, True])
def test_waveforms_have_no_gradient_towards_the_mixture(plain):
    rng = np.random.default_rng(0)
    arrays = {"x": numbers(rng, 1, 2, 160), "Y": np.abs(numbers(rng, 7, 1, 2, 33))}
    got = run(lambda x, Y: functions.waveforms([Y], x, 64, 16)[0], arrays, (), numbers(rng, 1, 2, 160), plain)
    assert got["gradient of Y"].any() and not got["gradient of x"].any()


@pytest.mark.parametrize(
    "shape, n_hop, message",
    [
        ((7, 1, 2, 32), 16, "magnitude of shape"),
        ((6, 1, 2, 33), 16, "magnitude of shape"),
        ((7, 1, 3, 33), 16, "magnitude of shape"),
        ((4, 1, 2, 33), 30, "several hops"),
        ((2, 1, 2, 33), 64, "several hops"),
    ],
)
def test_waveforms_of_what_does_not_fit(shape, n_hop, message):
    with pytest.raises(ValueError, match=message):
        functions.waveforms([nn.Variable(shape)], nn.Variable((1, 2, 160)), 64, n_hop)


@shapes
@given(SIZES)
def test_input_affine(sizes):
    rng, T, N, C, n, H = draw(sizes)
    B = rng.integers(1, n + 1)
    arrays = {
        "x": np.abs(numbers(rng, T, N, C, n)),
        "mean": numbers(rng, B),
        "scale": numbers(rng, B),
        "fc/affine/W": numbers(rng, C * B, H),
    }
    build = lambda **v: functions.input_affine(**v, n_outmaps=H, name="fc")  # noqa: E731
    # Of mean and scale the gradient is a sum over everything, which may nearly cancel: its rounding is that of the
    # numbers added. Both forms are held to that against float64, and to each other wherever the sum is no tiny rest.
    dy = rng.standard_normal((T, N, H)).astype(np.float32)
    x, mean, scale, W = (array.astype(np.float64) for array in arrays.values())
    dh = (dy @ W.T).reshape(T, N, C, B)
    terms = {"mean": dh * scale, "scale": dh * (x[..., :B] + mean)}
    sums = {name: term.sum((0, 1, 2)) for name, term in terms.items()}
    weights = np.abs(dy).astype(np.float64) @ np.abs(W).T
    sizes = {"mean": np.abs(scale), "scale": np.abs(x[..., :B]) + np.abs(mean)}
    sizes = {name: (weights.reshape(T, N, C, B) * size).sum((0, 1, 2)).max() for name, size in sizes.items()}
    for plain in (False, True):
        got = run(build, arrays, (), dy, plain)
        for name, expected in sums.items():
            assert np.abs(got[f"gradient of {name}"] - expected).max() < 1e-6 * sizes[name], name
    assume(all(np.abs(sums[name]).max() > 0.01 * sizes[name] for name in sums))
    compare(build, arrays, (T, N, H), rng)


BN_NAMES = ("beta", "gamma", "mean", "var")


def bn_arrays(rng, K):
    shape = (1, 1, K)
    arrays = {name: numbers(rng, *shape) for name in ("beta", "gamma", "mean")}
    arrays["var"] = rng.uniform(0.5, 2, shape)
    return {f"fc/bn/{name}": array for name, array in arrays.items()}


BN_FIXED = ("fc/bn/mean", "fc/bn/var")


@shapes
@given(SIZES, st.sampled_from([F.identity, F.tanh, F.relu, F.sigmoid]))
def test_batch_normalization(sizes, activation):
    rng, T, N, _, _, H = draw(sizes)
    T += 8  # with few rows the gradient nearly vanishes, and rounding stands out
    arrays = {"x": 3 + numbers(rng, T, N, H), **bn_arrays(rng, H)}

    def build(x):
        return functions.batch_normalization(x, activation, sizes["test"], "fc")

    compare(build, arrays, (T, N, H), rng, BN_FIXED, tolerance=5e-5)


@shapes
@given(SIZES)
def test_mask(sizes):
    rng, T, N, C, n, _ = draw(sizes)
    T += 8
    arrays = {
        "z": numbers(rng, T, N, C * n),
        "scale": numbers(rng, n),
        "mean": numbers(rng, n),
        "mixture": np.abs(numbers(rng, T, N, C, n)),
        **bn_arrays(rng, C * n),
    }
    build = lambda **v: functions.mask(**v, test=sizes["test"], name="fc")  # noqa: E731
    compare(build, arrays, (T, N, C, n), rng, (*BN_FIXED, "mixture"), tolerance=5e-5)


@pytest.mark.parametrize("test", [False, True])
def test_mask_is_the_network_s_formula(test):
    """relu(normalised z · scale + mean) · mixture; the plain form folds scale and mean into gamma and beta.

    Values, gradients of all that is learnt, also of two passes, and running statistics.
    """
    rng = np.random.default_rng(4)
    T, N, C, n = 20, 3, 2, 30
    arrays = {"z": 5 + numbers(rng, T, N, C * n), "scale": numbers(rng, n), "mean": numbers(rng, n)}
    arrays.update(mixture=np.abs(numbers(rng, T, N, C, n)), **bn_arrays(rng, C * n))

    def formula(z, scale, mean, mixture):
        beta, gamma, *running = (nn.get_parameters(grad_only=False)[f"fc/bn/{name}"] for name in BN_NAMES)
        h = F.batch_normalization(z, beta, gamma, *running, [2], 0.9, 1e-5, batch_stat=not test)
        h = F.reshape(h, mixture.shape)
        return F.relu(h * F.reshape(scale, (1, 1, 1, n)) + F.reshape(mean, (1, 1, 1, n))) * mixture

    dy = numbers(rng, T, N, C, n)
    fixed = (*BN_FIXED, "mixture")
    for times in (1, 2):
        got = run(lambda **v: functions.mask(**v, test=test, name="fc"), arrays, fixed, dy, True, times)
        assert_close(got, run(formula, arrays, fixed, dy, True, times), 5e-6)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("test", [False, True])
def test_mask_has_no_gradient_towards_the_mixture(plain, test):
    """As in the reference, whose forward pass multiplies with a detached copy."""
    rng = np.random.default_rng(0)
    arrays = {"z": numbers(rng, 9, 2, 10), "scale": numbers(rng, 5), "mean": numbers(rng, 5)}
    arrays.update(mixture=1 + np.abs(numbers(rng, 9, 2, 2, 5)), **bn_arrays(rng, 10))
    got = run(lambda **v: functions.mask(**v, test=test, name="fc"), arrays, BN_FIXED, numbers(rng, 9, 2, 2, 5), plain)
    assert got["gradient of z"].any() and not got["gradient of mixture"].any()


def lstm_arrays(rng, inputs, H, nb_layers, D):
    arrays = {}
    for k in range(nb_layers):
        arrays[f"lstm/weight_l{k}"] = numbers(rng, D, 4, H, inputs + H, scale=(inputs + H) ** -0.5)
        arrays[f"lstm/bias_ih_l{k}"] = numbers(rng, D, 4, H)
        arrays[f"lstm/bias_hh_l{k}"] = numbers(rng, D, 4, H)
        inputs = D * H
    return arrays


@shapes
@given(SIZES, st.integers(1, 3), st.booleans())
def test_lstm(sizes, nb_layers, bidirectional):
    rng, T, N, _, K, H = draw(sizes)
    D = 2 if bidirectional else 1
    arrays = {"x": numbers(rng, T, N, K), **lstm_arrays(rng, K, H, nb_layers, D)}

    def build(x):  # test=False: nnabla's own has a backward pass only then
        return functions.lstm(x, H, nb_layers, bidirectional, 0.0, False, "lstm")

    compare(build, arrays, (T, N, D * H), rng)


def test_lstm_has_a_way_back_in_test_mode():
    rng = np.random.default_rng(0)
    arrays = {"x": numbers(rng, 7, 3, 4), **lstm_arrays(rng, 4, 5, 2, 2)}
    dy = numbers(rng, 7, 3, 10)
    results = [
        run(lambda x: functions.lstm(x, 5, 2, True, 0.0, test, "lstm"), arrays, (), dy, plain=False)  # noqa: B023
        for test in (False, True)
    ]
    assert_close(results[1], results[0], 1e-6)


@shapes
@given(SIZES, st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3)), min_size=1, max_size=5), st.booleans())
def test_lstm_of_several_recordings(sizes, lengths, bidirectional):
    """Each is a sequence of its own, in both forms: as the formula says of each alone."""
    rng, _, _, _, K, H = draw(sizes)
    D = 2 if bidirectional else 1
    arrays = lstm_arrays(rng, K, H, 2, D)
    recordings = [numbers(rng, *shape, K) for shape in lengths]
    weights = [arrays[f"lstm/weight_l{k}"].astype(float) for k in range(2)]
    biases = [arrays[f"lstm/bias_ih_l{k}"].astype(float) + arrays[f"lstm/bias_hh_l{k}"] for k in range(2)]
    truth = [float64_lstm(x.astype(float), weights, biases, np.ones(2)) for x in recordings]
    nn.clear_parameters()
    for name, array in arrays.items():
        nn.parameter.set_parameter(name, nn.Variable.from_numpy_array(array))
    for plain in (False, True):
        context.set_plain(plain)
        try:
            y = functions.lstm(
                list(variables(**dict(zip("abcde", recordings))).values()), H, 2, D == 2, 0.4, True, "lstm"
            )
        finally:
            context.set_plain(False)
        nn.forward_all(y)
        assert [one.shape for one in y] == [one.shape for one in truth]
        assert max(np.abs(one.d - expected).max() for one, expected in zip(y, truth)) < 2e-6


def test_lstm_of_several_recordings_has_a_way_back():
    """The gradients of each, added up."""
    rng = np.random.default_rng(0)
    arrays, shapes = lstm_arrays(rng, 4, 5, 2, 2), {"a": (7, 1), "b": (3, 2), "c": (9, 1)}
    recordings = {name: numbers(rng, *shape, 4) for name, shape in shapes.items()}
    dy = {name: numbers(rng, *shape, 10) for name, shape in shapes.items()}

    def build(**x):  # what has dy for its gradient, with a gradient of 1
        together = functions.lstm(list(x.values()), 5, 2, True, 0.0, True, "lstm")
        return sum(F.sum(y * nn.Variable.from_numpy_array(dy[name])) for name, y in zip(x, together))

    got = run(build, {**recordings, **arrays}, (), 1, plain=False)
    alone = [run(build, {name: x, **arrays}, (), 1, plain=False) for name, x in recordings.items()]
    expected = {name: sum(one[name] for one in alone if name in one) for name in got}
    assert_close(got, expected, 1e-5)


@pytest.mark.parametrize(
    "shapes, test, message",
    [([(3, 1, 4), (2, 1, 4)], False, "test mode only"), ([(3, 1, 4), (2, 1, 5)], True, "equal"), ([], True, "equal")],
)
def test_recordings_that_do_not_go_together(shapes, test, message):
    with pytest.raises(ValueError, match=message):
        functions.lstm([nn.Variable(shape) for shape in shapes], 5, 2, True, 0.0, test, "lstm")


@pytest.mark.parametrize("D, N", [(1, 1), (2, 3)])
def test_lstm_with_dropout_against_float64(D, N):
    T, K, H, layers, seed = 12, 5, 7, 3, 11
    rng = np.random.default_rng(0)
    arrays = lstm_arrays(rng, K, H, layers, D)
    x, dy = numbers(rng, T, N, K), numbers(rng, T, N, D * H)
    weights = [arrays[f"lstm/weight_l{k}"] for k in range(layers)]
    biases = [arrays[f"lstm/bias_ih_l{k}"] for k in range(layers)]
    out, dx, dweights = np.empty_like(dy), np.empty_like(x), [np.empty_like(w) for w in weights]
    stack = kernels.lstm.Lstm()
    stack.forward(x, weights, biases, 0.4, seed, out, keep=True)
    dbiases = stack.backward(x, weights, dy, dx, dweights, [False] * 4)

    masks = [np.ones(())]
    for k in range(1, layers):
        ones = np.ones(out.size, np.float32)
        kernels.training.dropout(ones, 0.4, seed, k, ones)
        masks.append(ones.reshape(out.shape).astype(np.float64))
    truth = [x, *weights, *biases]
    assert_close({"y": out}, {"y": float64_lstm(x.astype(float), weights, biases, masks)}, 1e-6)
    for number, gradient in enumerate([dx, *dweights, *dbiases]):
        for index in rng.integers(gradient.size, size=12):  # f'(v) = imag f(v + ih) / h, exactly
            shifted = [a.astype(complex) for a in truth]
            shifted[number].flat[index] += 1e-20j
            y = float64_lstm(shifted[0], shifted[1 : 1 + layers], shifted[1 + layers :], masks)
            derivative = (y.imag / 1e-20 * dy).sum()
            assert abs(gradient.flat[index] - derivative) < 5e-6 * np.abs(gradient).max()


def test_lstm_of_the_published_width():
    """Whose products are done in several parts."""
    rng = np.random.default_rng(0)
    T, N, H = 3, 5, 256
    arrays = {"x": numbers(rng, T, N, 20), **lstm_arrays(rng, 20, H, 1, 2)}
    compare(lambda x: functions.lstm(x, H, 1, True, 0.0, False, "lstm"), arrays, (T, N, 2 * H), rng)


def test_lstm_adds_to_some_gradients_only():
    """As a graph asks for, where some of several weights are shared."""
    rng = np.random.default_rng(0)
    T, N, D, size = 5, 3, 2, 4
    x, dy = numbers(rng, T, N, size), numbers(rng, T, N, D * size)
    weights = [numbers(rng, D, 4, size, (size if layer == 0 else D * size) + size) for layer in range(3)]
    biases = [numbers(rng, D, 4, size) for _ in range(3)]
    stack = kernels.lstm.Lstm()

    def gradients(accumulate):
        stack.forward(x, weights, biases, 0.0, 0, np.empty_like(dy), keep=True)
        dx, dweights = np.ones_like(x), [np.ones_like(weight) for weight in weights]
        stack.backward(x, weights, dy, dx, dweights, accumulate)
        return [dx, *dweights]

    alone = gradients([False] * 4)
    for accumulate in ([True, False, False, True], [False, True, False, False], [False, False, True, False]):
        for added, gradient, one in zip(accumulate, gradients(accumulate), alone):
            np.testing.assert_allclose(gradient, one + added, rtol=1e-4, atol=1e-5)


def test_dropout():
    ones = np.ones(10**6, np.float32)
    masks = []
    for threads, seed, layer in [(1, 5, 1), (3, 5, 1), (1, 5, 2), (1, 6, 1)]:
        kernels.threads.set_threads(threads)
        out = np.empty_like(ones)
        kernels.training.dropout(ones, 0.4, seed, layer, out)
        kept = out != 0
        assert abs(kept.mean() - 0.6) < 3e-3
        assert np.allclose(out[kept], 1 / 0.6)
        masks.append(kept)
    assert (masks[0] == masks[1]).all()
    for other in masks[2:]:  # independent: both kept with 0.36
        assert abs((masks[0] & other).mean() - 0.36) < 3e-3
    assert abs((masks[0][1:] & masks[0][:-1]).mean() - 0.36) < 3e-3


def test_dropout_seed_comes_from_nnabla():
    x = nn.Variable.from_numpy_array(numbers(np.random.default_rng(0), 5, 3, 4))
    y = functions.lstm(x, 6, 2, True, 0.4, False, "lstm")
    values = []
    for seed in (1, 1, 2):
        nn.random.prng = np.random.RandomState(seed)
        y.forward()
        values.append(y.d.copy())
    assert (values[0] == values[1]).all() and (values[0] != values[2]).any()


@shapes
@given(SIZES, st.integers(1, 3))
def test_affine(sizes, nb_inputs):
    rng, T, N, _, n, H = draw(sizes)
    widths = rng.integers(1, n + 1, nb_inputs)
    arrays = {f"x{i}": numbers(rng, T, N, width) for i, width in enumerate(widths)}
    arrays["fc/affine/W"] = numbers(rng, sum(widths), H)
    compare(lambda **x: functions.affine(list(x.values()), H, "fc"), arrays, (T, N, H), rng)


@shapes
@given(SIZES)
def test_squared_error(sizes):
    rng, T, N, C, n, _ = draw(sizes)
    arrays = {"y_hat": numbers(rng, T, N, C, n), "y": numbers(rng, T, N, C, n)}
    compare(functions.squared_error, arrays, (), rng)


@shapes
@given(SIZES)
def test_absolute_error(sizes):
    rng, T, N, C, n, _ = draw(sizes)
    arrays = {"y_hat": numbers(rng, T, N, C, n), "y": numbers(rng, T, N, C, n)}
    truth = np.abs(arrays["y_hat"].astype(np.float64) - arrays["y"]).mean()
    got = run(functions.absolute_error, arrays, ("y",), 1, plain=False)
    np.testing.assert_allclose(got["y"], truth, rtol=1e-6)
    expected = np.sign(arrays["y_hat"] - arrays["y"]) / arrays["y"].size
    np.testing.assert_allclose(got["gradient of y_hat"], expected, rtol=1e-6)


def assert_loss(build, arrays, fixed, formula, rng):
    """Both forms have the value of a float64 formula, and its derivative, by differences, in a random direction."""
    arrays = {name: np.float32(array) for name, array in arrays.items()}
    truth = {name: array.astype(np.float64) for name, array in arrays.items()}
    directions = {name: rng.standard_normal(array.shape) for name, array in truth.items() if name not in fixed}
    step, around = 1e-5, []
    for sign in (1, -1):
        moved = {name: truth[name] + sign * step * direction for name, direction in directions.items()}
        around.append(formula(**{**truth, **moved}))
    for plain in (False, True):
        got = run(build, arrays, fixed, 1, plain)
        np.testing.assert_allclose(got["y"], formula(**truth), rtol=2e-6, atol=2e-6)
        change = sum((got[f"gradient of {name}"] * direction).sum() for name, direction in directions.items())
        size = sum(np.abs(got[f"gradient of {name}"] * direction).sum() for name, direction in directions.items())
        assert abs(change - (around[0] - around[1]) / (2 * step)) < 2e-5 * max(size, 1e-3)
    compare(build, arrays, (), rng, fixed, tolerance=1e-4)


@shapes
@given(SIZES)
def test_negative_sdr(sizes):
    rng, T, N, C, n, H = draw(sizes)
    start, stop = n, n + 10 * T
    y = numbers(rng, N, C, stop + H)
    y[0] *= rng.integers(2)  # silent, perhaps
    arrays = {"y_hat": y + numbers(rng, *y.shape, scale=0.3), "y": y}

    def formula(y_hat, y):
        return -float64_sdr(y_hat[..., start:stop], y[..., start:stop])

    assert_loss(lambda **v: losses.negative_sdr(**v, start=start, stop=stop), arrays, ("y",), formula, rng)


@shapes
@given(SIZES, st.integers(1, 4))
def test_weighted_sdr(sizes, nb_targets):
    rng, T, N, C, n, H = draw(sizes)
    start, stop = n, n + 10 * T
    sets = [tuple(np.flatnonzero(members)) for members in rng.integers(0, 2, (5, nb_targets)) if members.any()]
    sets = sets or [(0,)]
    arrays = {f"y{k}": numbers(rng, N, C, stop + H) for k in range(nb_targets)}
    arrays["y0"][0] *= rng.integers(2)  # silent, perhaps
    fixed = ("x", *arrays)
    arrays["x"] = sum(arrays.values()) + rng.integers(2) * numbers(rng, N, C, stop + H)
    arrays.update({f"p{k}": arrays[f"y{k}"] + numbers(rng, N, C, stop + H) for k in range(nb_targets)})

    def parts(v):
        return [v["x"], *([v[f"{name}{k}"] for k in range(nb_targets)] for name in "py")]

    def formula(**v):
        x, p, y = parts({name: array[..., start:stop] for name, array in v.items()})
        return np.mean([float64_weighted_sdr(x, *(sum(some[i] for i in one) for some in (p, y))) for one in sets])

    assert_loss(lambda **v: losses.weighted_sdr(*parts(v), sets, start, stop), arrays, fixed, formula, rng)


@pytest.mark.parametrize("plain", [False, True])
def test_losses_in_time_have_no_gradient_towards_targets(plain):
    rng = np.random.default_rng(0)
    arrays = {name: numbers(rng, 1, 2, 50) for name in ("x", "p", "y")}
    got = run(lambda x, p, y: losses.weighted_sdr(x, [p], [y], [(0,)]), arrays, ("x", "y"), 1, plain)
    assert got["gradient of p"].any()
    with pytest.raises(ValueError, match="nothing to compare"):
        losses.negative_sdr(nn.Variable((1, 2, 50)), nn.Variable((1, 2, 50)), 20, 20)
    with pytest.raises(ValueError, match="estimate of shape"):
        losses.negative_sdr(nn.Variable((1, 2, 50)), nn.Variable((1, 1, 50)))


def test_inner_products_are_exact():
    """Of signals so alike that single precision would leave nothing of their difference."""
    rng = np.random.default_rng(0)
    y = numbers(rng, 1, 1, 300_000)
    x = (y * np.float32(1 + 1e-5)).astype(np.float32)
    products = kernels.correlations.gram([x, y], 1000, 299_000)[0, 0]
    truth = ((x.astype(np.float64) - y)[..., 1000:299_000] ** 2).sum()
    assert abs(products[0, 0] - 2 * products[0, 1] + products[1, 1] - truth) < 1e-3 * truth


@pytest.mark.parametrize("plain", [False, True])
def test_released_memory_is_not_read(plain, monkeypatch):
    """What a function declares that its gradients do not depend on (grad_depends_…) is gone by then."""
    monkeypatch.setattr(context, "_plain", plain)
    rng = np.random.default_rng(0)
    T, N, C, n, H = 20, 3, 2, 8, 16
    x = {"x": numbers(rng, T, N, H)}
    spectrogram = np.abs(numbers(rng, T, N, C, n))
    bn = {
        activation: (lambda x, activation=activation: functions.batch_normalization(x, activation, False, "fc"))
        for activation in (F.identity, F.tanh, F.relu)
    }
    cases = [
        *((build, {**x, **bn_arrays(rng, H)}, (T, N, H)) for build in bn.values()),
        (
            lambda **v: functions.mask(**v, test=False, name="fc"),
            {"z": numbers(rng, T, N, C * n), "scale": numbers(rng, n), "mean": numbers(rng, n), "mixture": spectrogram}
            | bn_arrays(rng, C * n),
            (T, N, C, n),
        ),
        (
            lambda **v: functions.input_affine(**v, n_outmaps=H, name="fc"),
            {
                "x": spectrogram,
                "mean": numbers(rng, n),
                "scale": numbers(rng, n),
                "fc/affine/W": numbers(rng, C * n, H),
            },
            (T, N, H),
        ),
        (
            lambda x: functions.lstm(x, H, 2, True, 0.0, False, "lstm"),
            {**x, **lstm_arrays(rng, H, H, 2, 2)},
            (T, N, 2 * H),
        ),
        (
            lambda **x: functions.affine(list(x.values()), H, "fc"),
            {"a": numbers(rng, T, N, n), "b": numbers(rng, T, N, H), "fc/affine/W": numbers(rng, n + H, H)},
            (T, N, H),
        ),
        (functions.squared_error, {"y_hat": spectrogram, "y": numbers(rng, T, N, C, n)}, ()),
        (
            lambda x, a, b: F.stack(*functions.waveforms([a, b], x, 14, 7)),
            {"x": numbers(rng, N, C, 147), "a": spectrogram, "b": spectrogram},
            (2, N, C, 147),
        ),
        (losses.negative_sdr, {"y_hat": numbers(rng, N, C, 90), "y": numbers(rng, N, C, 90)}, ()),
        (
            lambda x, p, y: losses.weighted_sdr(x, [p], [y], [(0,)]),
            {name: numbers(rng, N, C, 90) for name in "xpy"},
            (),
        ),
    ]
    for build, arrays, shape in cases:
        dy = numbers(rng, *shape)
        kept, gone = (released(build, arrays, BN_FIXED, dy, clear) for clear in (False, True))
        for name in kept:
            np.testing.assert_array_equal(gone[name], kept[name], err_msg=f"{name} of {list(arrays)}")


@pytest.mark.parametrize("plain", [False, True])
def test_squared_error_of_shapes_that_differ(plain, monkeypatch):
    """Which NumPy, or NNabla, would fit to each other."""
    monkeypatch.setattr(context, "_plain", plain)
    with pytest.raises(ValueError, match="estimate of shape"):
        functions.squared_error(nn.Variable((3, 1, 2, 5)), nn.Variable((3, 1, 1, 5)))


def test_squared_error_is_exact():
    a, b = (np.random.default_rng(i).random(3_000_000, np.float32) for i in range(2))
    truth = ((a.astype(np.float64) - b) ** 2).mean()
    assert abs(kernels.training.squared_error(a, b) / truth - 1) < 1e-9


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_torch_s(decay, plain, monkeypatch):
    monkeypatch.setattr(context, "_plain", plain)
    rng = np.random.default_rng(0)
    start = numbers(rng, 1000)
    v = nn.Variable.from_numpy_array(start, need_grad=True)
    solver = solvers.Adam({"v": v}, 1e-2, decay)
    w, m, s = start.astype(np.float64), 0, 0
    for step in range(1, 6):
        g = numbers(rng, 1000, scale=1e-7 if decay == 0 else 1.0)
        v.g = g
        solver.update()
        if step == 3:  # goes on from its state
            state, solver = solver.get_state(), solvers.Adam({"v": v}, 1e-2, decay)
            solver.set_state(state)
        g = g + decay * w
        m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g**2
        w = w - 1e-2 * (m / (1 - 0.9**step)) / (np.sqrt(s / (1 - 0.999**step)) + 1e-8)
    np.testing.assert_allclose(v.d, w, atol=1e-6)


@pytest.mark.parametrize("plain", [False, True])
def test_the_state_of_adam_is_a_copy(plain, monkeypatch):
    monkeypatch.setattr(context, "_plain", plain)
    v = nn.Variable.from_numpy_array(np.ones(3, np.float32), need_grad=True)
    solver = solvers.Adam({"v": v})
    v.g = 1
    solver.update()
    state = solver.get_state()
    solver.update()
    np.testing.assert_allclose(state["v/mean"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(solver.get_state()["v/mean"], 0.19, rtol=1e-6)


def test_same_threads_same_bits_other_threads_same_rounding():
    rng = np.random.default_rng(0)
    arrays = {"x": numbers(rng, 30, 6, 20), **lstm_arrays(rng, 20, 24, 2, 2), **bn_arrays(rng, 48)}

    def build(x):
        h = functions.lstm(x, 24, 2, True, 0.4, False, "lstm")
        h = functions.batch_normalization(h, F.tanh, False, "fc")
        return functions.squared_error(h, nn.Variable.from_numpy_array(np.zeros(h.shape)))

    results = []
    for threads in (1, 1, 2, 2, 5):
        kernels.threads.set_threads(threads)
        nn.random.prng = np.random.RandomState(0)
        results.append(run(build, arrays, BN_FIXED, 1, plain=False))
    for a, b in ((0, 1), (2, 3)):
        assert all((results[a][name] == results[b][name]).all() for name in results[0])
    for other in results[2:]:
        assert_close(other, results[0], 1e-5)


def test_nan_stays_visible():
    arrays = bn_arrays(np.random.default_rng(0), 5)
    arrays["x"] = numbers(np.random.default_rng(0), 4, 3, 5)
    arrays["x"][0, 0, 0] = np.nan
    for activation in (F.tanh, F.relu):
        build = lambda x: functions.batch_normalization(x, activation, True, "fc")  # noqa: B023, E731
        y = run(build, arrays, BN_FIXED, 1, plain=False)["y"]
        assert np.isnan(y[0, 0, 0]) and np.isnan(y).sum() == 1


def test_tanh_and_sigmoid():
    f = numba.vectorize(["float32(float32)"])(lambda x: kernels.compiler.tanh(x))
    x = np.linspace(-12, 12, 100001).astype(np.float32)
    assert np.abs(f(x) - np.tanh(x.astype(np.float64))).max() < 4e-7


def test_product_of_views():
    rng = np.random.default_rng(0)
    a, b = numbers(rng, 50, 70), numbers(rng, 60, 80)
    for threads in (1, 2, 7):
        kernels.threads.set_threads(threads)
        for left, right in (
            (a[:, :40], b[:40, 3:33]),
            (a[:20].T, b[3:23]),
            (a[:, 5:6], b[:1]),
            (a[:1], b.T[:70, :9]),
            (a[:1, :1], b[:1]),
            (a[:, np.newaxis, 5], b[:1]),
        ):
            out = np.ones((left.shape[0] + 2, right.shape[1] + 3), np.float32)
            view = out[1:-1, 1:-2]
            kernels.products.matmul(left, right, view)
            np.testing.assert_allclose(view, left @ right, atol=1e-4)
            kernels.products.matmul(left, right, view, accumulate=True)
            np.testing.assert_allclose(view, 2 * (left @ right), atol=1e-4)
            view[:] = 1
            assert (out == 1).all()
    with pytest.raises(ValueError):
        kernels.products.matmul(a, b, np.empty((50, 80), np.float32))
    with pytest.raises(ValueError, match="float64"):
        kernels.products.matmul(a[:, :60].astype(np.float64), b, np.empty((50, 80), np.float32))


ROOT = Path(functions.__file__).parent
TANH = """
import numpy as np
from kernels import normalization
zero, one, x, y = (np.full((1, 1), value, np.float32) for value in (0, 1, 0.5, 0))
normalization.normalize(x, zero[0], one[0], zero[0], normalization.TANH, x, y)
print(y.item())
"""
SMALL_STEP = """
import sys
import nnabla as nn, numpy as np
import functions, model, solvers
nn.set_default_context(nn.Context(["cpu:float"], "CpuCachedArray"))
nn.random.prng = np.random.RandomState(0)
net = model.OpenUnmix(n_fft=256, n_hop=64, hidden_size=32, max_bin=90)
x, y = (nn.Variable.from_numpy_array(np.random.RandomState(k).randn(3, 2, 4000)) for k in range(2))
loss = functions.squared_error(net(x), net.spectrogram(y))
solver = solvers.Adam(nn.get_parameters())
loss.forward()
solver.zero_grad()
loss.backward()
solver.update()
np.savez(sys.argv[1], loss=loss.d, **{name.replace("/", "."): v.d for name, v in nn.get_parameters().items()})
"""


def python(script, *arguments, root=ROOT, **environment):
    """Runs a script in a process of its own, with the modules in root; returns what it wrote to stdout, to stderr."""
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, env={**os.environ, **environment})
    assert result.returncode == 0, result.stderr
    return result.stdout, result.stderr


def small_step(path, **environment):
    """A training step in a process of its own; returns its results and what it said."""
    _, said = python(SMALL_STEP, str(path), **environment)
    with np.load(path) as archive:
        return dict(archive), said


def test_other_machines(tmp_path):
    """A cold cache says once that it compiles, a warm one nothing; a processor without AVX-512 computes alike."""
    cold, said = small_step(tmp_path / "cold.npz", NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert said.count("compiling") == 1
    warm, said = small_step(tmp_path / "warm.npz", NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert "compiling" not in said
    assert all((cold[name] == warm[name]).all() for name in cold)
    generic = {"NUMBA_CACHE_DIR": str(tmp_path / "generic"), "NUMBA_CPU_NAME": "generic"}
    other, said = small_step(tmp_path / "generic.npz", **generic)
    assert said.count("compiling") == 1
    assert abs(other["loss"] / cold["loss"] - 1) < 1e-5


def test_a_change_in_one_file_reaches_the_compiled_functions_of_others(tmp_path):
    """normalization.py inlines the tanh of compiler.py: machine code with the former tanh must not be used again."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    options = {"root": tmp_path, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert abs(float(python(TANH, **options)[0]) - np.tanh(0.5)) < 1e-6
    compiler = tmp_path / "kernels" / "compiler.py"
    text = compiler.read_text()
    assert text.count("return x * p / q") == 1
    compiler.write_text(text.replace("return x * p / q", "return x + x"))
    assert float(python(TANH, **options)[0]) == 1
    assert "compiling" not in python(TANH, **options)[1]


def test_without_a_folder_for_the_cache(monkeypatch):
    """Numba then raises RuntimeError; the functions are compiled all the same."""
    njit = numba.njit

    def no_cache(*arguments, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*arguments, **options)

    monkeypatch.setattr(numba, "njit", no_cache)

    @kernels.compiler.kernel
    def double(x: kernels.compiler.OUT(1)):
        x *= 2

    x = np.ones(3, np.float32)
    double(x)
    assert (x == 2).all()
