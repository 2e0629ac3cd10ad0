"""The Wiener filter: equality with norbert and with openunmix, and what holds for any input."""

import doctest
import itertools
from pathlib import Path

import norbert
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bsseval
import filtering
import kernels.spectra
import kernels.threads
import kernels.wiener
import music

TOLERANCE = {0: 1e-5, 1: 1e-5, 2: 5e-5}  # by iterations, in single precision, relative to the maximum
TYPES = [np.complex64, np.complex128]


def spectra(
    nb_frames=20, nb_bins=9, nb_channels=2, nb_sources=4, v_channels=None, dtype=np.complex128, seed=0, peak=40
):
    """Magnitudes v and a mixture x in norbert's layout, over a range as wide as that of music."""
    rng = np.random.default_rng(seed)
    v_channels = nb_channels if v_channels is None else v_channels
    x = rng.normal(size=(nb_frames, nb_bins, nb_channels, 2)) @ (1, 1j)
    x *= np.exp(rng.normal(0, 1.5, (nb_frames, nb_bins, 1)))
    x *= peak / np.abs(x).max()
    level = np.abs(x) if v_channels == nb_channels else np.abs(x).mean(axis=2, keepdims=True)
    v = level[..., None] * rng.uniform(0, 1, (nb_frames, nb_bins, v_channels, nb_sources))
    x = x.astype(dtype)
    return v.astype(x.real.dtype), x


def error(ours, expected):
    assert ours.shape == expected.shape
    return np.abs(ours - expected).max() / max(np.abs(expected).max(), 1e-30)


def assert_equals_norbert(v, x, iterations, use_softmask, eps=None):
    """norbert computes in double precision: its rounding is not to be copied. √eps alone it rounds to single."""
    v_before, x_before = v.copy(), x.copy()
    y = filtering.wiener(v, x, iterations, use_softmask, eps)
    np.testing.assert_array_equal(v, v_before)
    np.testing.assert_array_equal(x, x_before)
    assert y.dtype == x.dtype
    eps = np.finfo(x.dtype).eps if eps is None else eps
    expected = norbert.wiener(v.astype(float), x.astype(complex), iterations, use_softmask, eps)
    assert error(y, expected) < (TOLERANCE[iterations] if x.dtype == np.complex64 else 1e-6)  # singular covariances


def causal(v, x, forgetting, use_softmask=False, residual=False, eps=1e-10):
    """Frames of `filtering.Causal`, in norbert's layout."""
    v, x = (np.ascontiguousarray(a) for a in (v.transpose(3, 0, 2, 1), x.transpose(2, 0, 1)))
    one = filtering.Causal(len(v), len(x), x.shape[2], forgetting, use_softmask, residual, eps)
    frames = [one(v[:, t : t + 1].copy(), x[:, t : t + 1].copy()).copy() for t in range(x.shape[1])]
    return np.concatenate(frames, axis=2).transpose(2, 3, 1, 0)


# ------------------------------------------------------------------------------------ norbert


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("use_softmask", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("nb_channels, v_channels", [(1, 1), (2, 2), (2, 1), (3, 3), (3, 1)])
@pytest.mark.parametrize("silence", ["none", "source", "mixture", "both", "everything"])
def test_wiener_equals_norbert(dtype, use_softmask, iterations, nb_channels, v_channels, silence):
    v, x = spectra(nb_channels=nb_channels, v_channels=v_channels, dtype=dtype)
    if silence in ("source", "both", "everything"):
        v[..., 1] = 0
        v[:, :4, :, 2] = 0
    if silence in ("mixture", "both", "everything"):
        x[5:9] = 0
        x[9:12, :, -1] *= 0  # zeros of both signs, in one channel
    if silence in ("both", "everything"):
        v[5:9] = 0
    if silence == "everything":
        v[:], x[:] = 0, 0
    assert_equals_norbert(v, x, iterations, use_softmask)


@given(
    nb_frames=st.integers(1, 8),
    nb_bins=st.sampled_from([1, 2, 7, kernels.wiener.BINS + 1]),
    nb_channels=st.integers(1, 2),
    nb_sources=st.integers(1, 5),
    iterations=st.integers(0, 2),
    use_softmask=st.booleans(),
    eps=st.sampled_from([None, 2**-34, 2**-10, 1.0]),
    dtype=st.sampled_from(TYPES),
    peak=st.sampled_from([1e-4, 1.0, 10.0, 3e3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_wiener_equals_norbert_for_any_size(
    nb_frames, nb_bins, nb_channels, nb_sources, iterations, use_softmask, eps, dtype, peak, seed
):
    # With fewer frames than channels, or with one source, covariances are singular but for the regularisation.
    v, x = spectra(nb_frames, nb_bins, nb_channels, nb_sources, dtype=dtype, seed=seed, peak=peak)
    assert_equals_norbert(v, x, iterations, use_softmask, eps)


@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("use_softmask", [False, True])
def test_single_precision_equals_norberts(iterations, use_softmask):
    v, x = spectra(nb_frames=60, dtype=np.complex64)
    y = filtering.wiener(v, x, iterations, use_softmask)
    assert error(y, norbert.wiener(v, x.copy(), iterations, use_softmask)) < TOLERANCE[iterations]


@pytest.mark.parametrize("iterations", [1, 2])
def test_equal_channels_need_double_precision_inside(iterations):
    """A mono song on two channels: its covariances are singular, and norbert and openunmix, in single precision,
    are wrong by more than 1 %. So are they where the channels are nearly equal."""
    v, x = spectra(nb_frames=60, nb_channels=1, dtype=np.complex64)
    v, x = v.repeat(2, axis=2), x.repeat(2, axis=2)
    assert_equals_norbert(v, x, iterations, False)
    expected = norbert.wiener(v.astype(float), x.astype(complex), iterations, False, np.finfo(np.float32).eps)
    assert error(norbert.wiener(v, x.copy(), iterations, False), expected) > 1e-3


@pytest.mark.parametrize("alpha", [1, 2, 0.5])
@pytest.mark.parametrize("nb_channels, v_channels", [(1, 1), (2, 2), (2, 1), (3, 1)])
@pytest.mark.parametrize("dtype", TYPES)
def test_residual_model_equals_norbert(dtype, nb_channels, v_channels, alpha):
    v, x = spectra(nb_channels=nb_channels, v_channels=v_channels, dtype=dtype)
    v **= alpha
    v[:, 3], x[4:6] = 0, 0
    v_before, x_before = v.copy(), x.copy()
    ours = filtering.residual_model(v, x, alpha)
    np.testing.assert_array_equal(v, v_before)
    np.testing.assert_array_equal(x, x_before)
    expected = norbert.residual_model(v.copy(), x.copy(), alpha)
    assert ours.dtype == expected.dtype and error(ours, expected) < 1e-6


# ---------------------------------------------------------------------------------- openunmix


def golden():
    with np.load(Path(__file__).parent / "data" / "golden_wiener.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("case", [key for key in golden() if key[-1] not in "vx"])
def test_source_spectra_equal_openunmix(case, dtype):
    """Cases of tests/reference/make_wiener.py; `case` is size/iterations[-softmask][-residual]."""
    arrays = golden()
    name, (iterations, *options) = case.split("/")[0], case.split("/")[1].split("-")
    softmask, residual, iterations = "softmask" in options, "residual" in options, int(iterations)
    v, x, expected = arrays[f"{name}/v"], arrays[f"{name}/x"].astype(dtype), arrays[case]
    y = filtering.source_spectra(v.transpose(3, 0, 2, 1), x.transpose(2, 0, 1), iterations, softmask, residual)
    y = y.transpose(2, 3, 1, 0)
    assert y.dtype == dtype
    if residual and not softmask:
        # To get phases, the reference replaces a mixture of exactly zero (in bins 0 to 2) by one. The other
        # sources stay zero there, but the residual becomes that one, and so spoils the covariances of the bin.
        assert np.abs(expected[3:5, :3, :, -1]).max() > 0.5
        assert (y[3:5, :3] == 0).all()
        y, expected = y[:, 3:], expected[:, 3:]
    assert error(y, expected) < (TOLERANCE[iterations] if dtype == np.complex64 else 3e-7)


def test_wiener_is_source_spectra_in_norberts_layout():
    v, x = spectra(dtype=np.complex64)
    y = filtering.source_spectra(v.transpose(3, 0, 2, 1), x.transpose(2, 0, 1), iterations=1, softmask=True, eps=1e-10)
    np.testing.assert_array_equal(y.transpose(2, 3, 1, 0), filtering.wiener(v, x, eps=1e-10))


# --------------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("nb_channels", [1, 2, 3])
@pytest.mark.parametrize("iterations", [0, 1, 2])
@pytest.mark.parametrize("softmask", [False, True])
def test_estimates_with_a_residual_sum_to_the_mixture(nb_channels, iterations, softmask):
    v, x = spectra(nb_channels=nb_channels)
    y = filtering.source_spectra(v.transpose(3, 0, 2, 1), x.transpose(2, 0, 1), iterations, softmask, residual=True)
    # but for what the regularisation takes away
    assert error(y.sum(axis=0), x.transpose(2, 0, 1)) < (1e-3 if iterations else 1e-14)


@pytest.mark.parametrize("nb_channels", [1, 2, 3])
@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_a_soft_mask_sums_to_the_mixture(nb_channels, iterations):
    v, x = spectra(nb_channels=nb_channels)
    assert error(filtering.wiener(v, x, iterations, eps=1e-14).sum(axis=-1), x) < (1e-3 if iterations else 1e-12)


@pytest.mark.parametrize("nb_channels", [1, 2, 3])
@pytest.mark.parametrize("iterations, softmask, residual", itertools.product([0, 1, 2], [False, True], [False, True]))
def test_silence_stays_silence(nb_channels, iterations, softmask, residual):
    v, x = spectra(nb_channels=nb_channels, dtype=np.complex64)
    v[..., 1] = 0
    v[3:6], x[3:6] = 0, 0
    y = filtering.source_spectra(v.transpose(3, 0, 2, 1), x.transpose(2, 0, 1), iterations, softmask, residual)
    assert np.isfinite(y).all()
    assert (y[1] == 0).all() and (y[:, :, 3:6] == 0).all()
    assert (np.abs(y[0]).max(axis=(0, 2)) > 0).sum() == len(x) - 3


@given(seed=st.integers(0, 99), factor=st.floats(1, 1e3), iterations=st.integers(0, 2), residual=st.booleans())
@settings(max_examples=30, deadline=None)
def test_loud_mixtures_are_filtered_alike(seed, factor, iterations, residual):
    v, x = spectra(seed=seed, peak=10)
    v, x = v.transpose(3, 0, 2, 1), x.transpose(2, 0, 1)
    y, louder = (filtering.source_spectra(a * v, a * x, iterations, residual=residual) for a in (1, factor))
    assert error(louder, factor * y) < 1e-7


@given(order=st.permutations(range(4)), swap=st.booleans(), iterations=st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_sources_and_channels_may_be_exchanged(order, swap, iterations):
    v, x = spectra()
    channels = [1, 0] if swap else [0, 1]
    y = filtering.wiener(v, x, iterations)
    exchanged = filtering.wiener(v[:, :, channels][..., order], x[:, :, channels], iterations)
    assert error(exchanged, y[:, :, channels][..., order]) < 1e-8


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_threads_and_other_bins_do_not_change_a_bit(iterations):
    v, x = spectra(nb_bins=3 * kernels.wiener.BINS + 1, dtype=np.complex64, peak=5)  # below 10, where nothing is scaled
    try:
        kernels.threads.set_threads(1)
        y = filtering.wiener(v, x, iterations)
        kernels.threads.set_threads(3)
        np.testing.assert_array_equal(filtering.wiener(v, x, iterations), y)
    finally:
        kernels.threads.set_threads(None)
    part = slice(kernels.wiener.BINS // 2, 2 * kernels.wiener.BINS)
    assert error(filtering.wiener(v[:, part], x[:, part], iterations), y[:, part]) < 1e-6


@pytest.mark.parametrize("nb_channels", [1, 2])
@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_closed_form_equals_the_general_one(nb_channels, iterations):
    v, x = spectra(nb_channels=nb_channels)
    v, x = np.ascontiguousarray(v.transpose(3, 0, 2, 1)), np.ascontiguousarray(x.transpose(2, 0, 1))
    for softmask, residual in itertools.product([False, True], [False, True]):
        options = (iterations, softmask, residual, 1e-10, 2e-10, 3e-5)
        closed, general = (np.empty((4 + residual,) + x.shape, x.dtype) for _ in range(2))
        kernels.wiener.wiener(v, x, *options, closed)
        filtering._any_number_of_channels(v, x, *options, general)
        assert error(closed, general) < 1e-8


def test_the_result_is_written_into_a_given_array():
    v, x = spectra(dtype=np.complex64)
    v, x = v.transpose(3, 0, 2, 1), x.transpose(2, 0, 1)
    out = np.full((4, 2, 20, 9), np.nan, np.complex64)
    assert filtering.source_spectra(v, x, out=out) is out
    np.testing.assert_array_equal(out, filtering.source_spectra(v, x))


@pytest.mark.parametrize("nb_channels", [1, 2, 3])
def test_nothing_gives_nothing(nb_channels):
    for nb_frames, nb_bins in [(0, 9), (20, 0)]:
        v, x = np.ones((nb_frames, nb_bins, nb_channels, 4)), np.ones((nb_frames, nb_bins, nb_channels), complex)
        assert filtering.wiener(v, x).shape == v.shape


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("function", [filtering.wiener, filtering.residual_model])
@pytest.mark.parametrize(
    "v_shape, x_shape",
    [
        ((20, 9, 4), (20, 9, 2)),
        ((20, 9, 2, 4), (20, 9, 2, 1)),
        ((20, 9, 2, 4), (19, 9, 2)),
        ((20, 9, 2, 4), (20, 8, 2)),
        ((20, 9, 2, 4), (20, 9, 3)),
        ((20, 9, 2, 4), (20, 9, 1)),
    ],
)
def test_errors_print_both_shapes(function, v_shape, x_shape):
    with pytest.raises(ValueError) as caught:
        function(np.ones(v_shape), np.ones(x_shape, complex))
    assert str(v_shape) in str(caught.value) and str(x_shape) in str(caught.value)


def test_source_spectra_refuses_norberts_layout():
    v, x = spectra()
    with pytest.raises(ValueError, match=r"\(20, 9, 2, 4\) and x of shape \(20, 9, 2\).*nb_sources, nb_frames"):
        filtering.source_spectra(v, x)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"v": np.ones((20, 9, 2, 4), complex)}, "complex128"),
        ({"x": np.ones((20, 9, 2))}, "float64"),
        ({"iterations": -1}, "iterations -1 is not"),
        ({"eps": -1e-3}, "eps -0.001"),
        ({"eps": np.nan}, "eps nan"),
        ({"eps": np.inf}, "eps inf"),
        ({"eps": "1"}, "eps '1'"),
        ({"iterations": 10**20}, "iterations 1000"),
        ({"iterations": 1.5}, "iterations 1.5"),
        ({"iterations": None}, "iterations None"),
        ({"v": np.ones((20, 9, 2, 4), object)}, "type object"),
        ({"v": np.full((20, 9, 2, 4), "1")}, "type <U1"),
        ({"v": None}, "v of shape"),
    ],
    ids=str,
)
def test_other_errors(options, message):
    v, x = spectra()
    with pytest.raises(ValueError, match=message):
        filtering.wiener(**{"v": v, "x": x, **options})


@pytest.mark.parametrize(
    "out",
    [
        np.empty((4, 2, 20, 9), np.complex128),
        np.empty((5, 2, 20, 9), np.complex64),
        np.empty((4, 2, 9, 20), np.complex64).transpose(0, 1, 3, 2),
        np.broadcast_to(np.complex64(0), (4, 2, 20, 9)),
        [1],
    ],
    ids=["type", "shape", "order", "read-only", "list"],
)
def test_arrays_that_cannot_hold_the_result(out):
    v, x = spectra(dtype=np.complex64)
    with pytest.raises(ValueError, match="out of shape"):
        filtering.source_spectra(v.transpose(3, 0, 2, 1), x.transpose(2, 0, 1), out=out)


def test_the_result_is_not_written_into_the_inputs():
    x = np.ones((2, 20, 9), np.complex64)
    v = np.ones((1, 20, 2, 9), np.float32)
    with pytest.raises(ValueError, match="out shares memory"):
        filtering.source_spectra(v, x, out=x[None])


@pytest.mark.parametrize("alpha", [np.nan, -1, 10**20, "1", None, 2j])
def test_exponents_that_cannot_be(alpha):
    with pytest.raises(ValueError, match="alpha"):
        filtering.residual_model(*spectra(), alpha)


def test_examples_in_docstrings():
    assert doctest.testmod(filtering) == (0, 7)


# -------------------------------------------------------------------------------------- causal


@pytest.mark.parametrize("use_softmask", [False, True])
@pytest.mark.parametrize("nb_channels, v_channels", [(1, 1), (2, 2), (2, 1)])
def test_what_forgets_nothing_is_norbert_of_the_frames_so_far(nb_channels, v_channels, use_softmask):
    v, x = spectra(nb_channels=nb_channels, v_channels=v_channels, dtype=np.complex64)
    y = causal(v, x, 1, use_softmask)
    for t in (0, 7, len(x) - 1):
        so_far = v[: t + 1].astype(float), x[: t + 1].astype(complex)
        expected = norbert.wiener(*so_far, 1, use_softmask, 1e-10)[-1]
        assert error(y[t], expected) < 1e-5


@pytest.mark.parametrize("loud, eps", [(1, 1e-10), (300, 1e-3)])
def test_covariances_of_the_past_are_forgotten(loud, eps):
    """By the formula, with the residual as a source; so is what was loud, on which the regularisation depends."""
    v, x = spectra(dtype=np.complex64, peak=5)
    v[0], x[0] = loud * v[0], loud * x[0]
    forgetting = 0.7
    found = causal(v, x, forgetting, residual=True, eps=eps)
    y = v * np.exp(1j * np.angle(x.astype(complex)))[..., None]
    y = np.concatenate([y, x[..., None] - y.sum(axis=3, keepdims=True)], axis=3)
    p = np.mean(np.abs(y) ** 2, axis=2)
    S, P, peak = 0, 0, 0
    for t in range(len(x)):
        S = forgetting * S + np.einsum("fcj,fdj->fjcd", y[t], y[t].conj())
        P = forgetting * P + p[t]
        peak = max(forgetting * peak, np.abs(x[t]).max())
        square = max(1, peak / 10) ** 2
        C = p[t][..., None, None] * S / (eps * square + P)[..., None, None]
        z = np.linalg.solve(C.sum(axis=1) + np.sqrt(eps) * square * np.eye(2), x[t][..., None].astype(complex))
        assert error(found[t], np.einsum("fjcd,fd->fcj", C, z[..., 0])) < 1e-5


def test_numbers_that_no_causal_filter_has():
    for options in ({"forgetting": 1.1}, {"forgetting": np.nan}, {"forgetting": 1, "eps": -1}):
        with pytest.raises(ValueError, match="is not a number within"):
            filtering.Causal(2, 2, 9, **options)


def test_what_filters_gain_where_magnitudes_are_true():
    """`pytest -s` shows it: SDR of the four stems of a synthetic song, from its mixture's phase on."""
    sources = music.song(np.random.default_rng(1), 6, 44100)
    truth = np.stack(list(sources.values()))
    nb_timesteps, n_fft, n_hop = truth.shape[2], 4096, 1024

    def spectra_of(x):
        return kernels.spectra.stft(np.ascontiguousarray(x), n_fft, n_hop, 0, nb_timesteps // n_hop + 1)

    def score(y):
        overlap_add = kernels.spectra.OverlapAdd(n_fft, n_hop, nb_timesteps)
        pieces = [*overlap_add(np.ascontiguousarray(y)), *overlap_add.end()]
        stems = np.concatenate([piece for _, piece in pieces], axis=2)
        return bsseval.sdr(truth.transpose(0, 2, 1), stems.transpose(0, 2, 1)).mean()

    x = spectra_of(truth.sum(axis=0))
    v = np.stack([np.abs(spectra_of(source)).transpose(1, 0, 2) for source in truth])
    found = {"none": score(filtering.source_spectra(v, x, 0)), "whole": score(filtering.source_spectra(v, x, 1))}
    for seconds in (0.5, 2, 8):
        y = causal(v.transpose(1, 3, 2, 0), x.transpose(1, 2, 0), np.exp(-n_hop / (44100 * seconds)))
        found[f"causal, {seconds} s"] = score(y.transpose(3, 2, 0, 1))
    print("\n", {name: f"{value:.2f} dB" for name, value in found.items()})
    assert found["whole"] - found["none"] > 1
    assert found["causal, 2 s"] - found["none"] > 0.6 * (found["whole"] - found["none"])
