"""BSSEval: equality with museval wherever museval is sure of itself, and what holds for any input."""

import doctest
import pickle
import subprocess
import tracemalloc
from pathlib import Path

import museval
import numpy as np
import pytest
import scipy.signal

import bsseval
import kernels.bsseval
import kernels.threads

WIN = 3000


def noise(*shape, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(shape)


def near(x, level=0.03, seed=1):
    """Estimates: interference and artifacts."""
    return x + 0.1 * x[::-1] + level * np.random.default_rng(seed).standard_normal(x.shape)


def rounded(x, seed):
    """The same, but for the last bit of its numbers."""
    x = np.asarray(x, float)
    drawn = np.random.default_rng(seed).choice([-np.inf, np.inf], x.shape)
    return np.where(x == 0, x, np.nextafter(x, drawn))


def difference(a, b):
    """The largest, in dB; where both are NaN, or infinite alike, is none."""
    assert np.shape(a) == np.shape(b)
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    with np.errstate(invalid="ignore"):
        return np.nanmax(np.where((a == b) | np.isnan(a), 0, np.abs(a - b)))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::RuntimeWarning")  # museval's
def assert_equals_museval(x, y, win=WIN, hop=WIN):
    """Within 1e-6 dB, or within ten times of how far museval moves when its input is rounded differently."""
    for audio in (x, y):
        if isinstance(audio, np.ndarray):
            audio.flags.writeable = False
    ours, expected = bsseval.evaluate(x, y, win, hop), museval.evaluate(x, y, win, hop)
    errors = [difference(a, b) for a, b in zip(ours, expected)]
    if max(errors) > 1e-6:
        others = [museval.evaluate(rounded(x, k), rounded(y, k + 5), win, hop) for k in range(4)]
        for metric, error, *values in zip(bsseval.METRICS, errors, expected, *others):
            moves = max(difference(values[0], value) for value in values[1:])
            assert error <= (10 * moves if moves > 1e-8 else 1e-6), f"{metric} is {error} off, museval moves by {moves}"
    return ours


# ----------------------------------------------------------------------------------------- museval


@pytest.mark.parametrize(
    "nb_sources, nb_channels",
    [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (4, 1), (4, 2)],
)
def test_sources_and_channels(nb_sources, nb_channels):
    x = noise(nb_sources, 9000, nb_channels)
    assert_equals_museval(x, near(x))


@pytest.mark.parametrize(
    "win, hop",
    [(4000, 2000), (2000, 4100), (700, 700), (20000, 20000), (19999, 1), (30000, 5000), (9000.5, 2000.3), (100, 5000)]
    + [(np.inf, np.inf), (18000, 18000), (1, 6000)],
)
def test_frames(win, hop):
    x = noise(2, 20000, 1)
    assert_equals_museval(x, near(x), win, hop)


@pytest.mark.parametrize("nb_timesteps", [1, 2, 5, 100, 300, 511, 512, 513, 514, 1000, 3000, 3001, 3585, 3586, 4096])
def test_lengths(nb_timesteps):
    x = noise(2, nb_timesteps, 1, seed=nb_timesteps)
    assert_equals_museval(x, near(x))


@pytest.mark.parametrize("nb_timesteps", [1, 100, 600, 1500, 2000])
def test_lengths_of_stereo(nb_timesteps):
    x = noise(2, nb_timesteps, 2, seed=nb_timesteps)
    assert_equals_museval(x, near(x))


TYPES = {
    "16 bits": lambda a: (a * 32768).astype(np.int16),
    "32 bits": lambda a: (a * 2**31).astype(np.int32),
    "bytes": lambda a: (128 + 128 * a).astype(np.uint8),
    "booleans": lambda a: a > 0,
    "half": lambda a: a.astype(np.float16),
    "single": lambda a: a.astype(np.float32),
    "long double": lambda a: a.astype(np.longdouble),
    "big endian": lambda a: a.astype(">f8"),
    "a list": lambda a: [*a],
    "by columns": np.asfortranarray,
    "channels first": lambda a: np.ascontiguousarray(a.transpose(0, 2, 1)).transpose(0, 2, 1),
    "backwards": lambda a: a[::-1, ::-1],
    "two dimensions": lambda a: a[:, :, 0],
}


@pytest.mark.parametrize("name", TYPES)
def test_types(name):
    x = noise(2, 7000, 1).clip(-0.9, 0.9)
    assert_equals_museval(TYPES[name](x), TYPES[name](near(x).clip(-0.9, 0.9)))


def put(x, index, value):
    x = x.copy()
    x[index] = value
    return x


def low(bits):
    """Low-passed noise of so many bits (2, 12000, 1), which fades in and out: an abrupt end has all frequencies."""
    filters = scipy.signal.butter(8, 0.6, output="sos")
    fading = scipy.signal.windows.tukey(10000)[:, None]
    x = scipy.signal.sosfiltfilt(filters, np.pad(fading * noise(2, 10000, 1), [(0, 0), (1000, 1000), (0, 0)]), axis=1)
    return np.round(x * 2 ** (bits - 1)) / 2 ** (bits - 1)


MONO, STEREO = noise(2, 7000, 1), noise(2, 7000, 2)
SINE = 0.3 * np.sin(0.1 * np.arange(12000))[None, :, None]
CENTRED = put(STEREO, np.s_[0, :, 1], STEREO[0, :, 0])
CASES = {
    "estimates are references": (MONO, MONO),
    "stereo estimates are references": (STEREO, STEREO),
    "one estimate is its reference": (MONO, put(near(MONO), 0, MONO[0])),
    "gain": (MONO, 2 * MONO),
    "inverted": (MONO, -MONO),
    "swapped": (MONO, MONO[::-1]),
    "channels swapped": (STEREO, STEREO[:, :, ::-1]),
    "delayed": (MONO, np.roll(MONO, 30, axis=1)),
    "delayed by more than a filter": (MONO, np.roll(MONO, 700, axis=1)),
    "early": (MONO, np.roll(MONO, -30, axis=1)),
    "mixture": (MONO, np.repeat(MONO.sum(axis=0, keepdims=True), 2, axis=0)),
    "unrelated": (MONO, noise(2, 7000, 1, seed=9)),
    "centred": (CENTRED, near(CENTRED)),
    "all centred": (np.repeat(MONO, 2, axis=2), near(STEREO)),
    "all centred, estimates too": (np.repeat(MONO, 2, axis=2), np.repeat(near(MONO), 2, axis=2)),
    "panned": (STEREO[:, :, :1] * [0.7, 0.3], near(STEREO)),
    "panned in 16 bits": (np.round(STEREO[:, :, :1] * [0.7, 0.3] * 2**15) / 2**15, near(STEREO)),
    "panned in single precision": ((STEREO[:, :, :1] * [0.7, 0.3]).astype(np.float32), near(STEREO)),
    "on the left": (put(STEREO, np.s_[0, :, 1], 0), near(STEREO)),
    "all on the left": (STEREO * [1, 0], near(STEREO) * [1, 0]),
    "three alike channels of four": (np.repeat(CENTRED, 2, axis=2)[:, :, :3], near(noise(2, 7000, 3))),
    "copies": (np.repeat(MONO[:1], 2, axis=0), near(MONO)),
    "stereo copies": (np.repeat(STEREO[:1], 2, axis=0), near(STEREO)),
    "a sum of others": (np.concatenate([MONO, MONO.sum(axis=0, keepdims=True)]), near(noise(3, 7000, 1))),
    "a delayed copy": (np.concatenate([MONO[:1], np.roll(MONO[:1], 50, axis=1)]), near(MONO)),
    "quiet beside loud": (MONO * [[[1]], [[1e-6]]], near(MONO) * [[[1]], [[1e-6]]]),
    "quiet": (1e-5 * MONO, 1e-5 * near(MONO)),
    "next to nothing": (1e-9 * MONO, 1e-9 * near(MONO)),
    "loud": (1e6 * MONO, 1e6 * near(MONO)),
    "estimates much louder": (MONO, 1e6 * near(MONO)),
    "constant": (1 + MONO, near(1 + MONO)),
    "a silent frame": (put(MONO, np.s_[0, :WIN], 0), near(MONO)),
    "a silent frame of an estimate": (MONO, put(near(MONO), np.s_[1, WIN : 2 * WIN], 0)),
    "a frame of channels that cancel": (put(STEREO, np.s_[0, :WIN, 1], -STEREO[0, :WIN, 0]), near(STEREO)),
    "silence but for a sample": (put(0 * MONO, np.s_[:, 100], [[1], [2]]), near(MONO)),
    "impulses": (put(put(0 * MONO, (0, 100), 1), (1, 4000), 1), near(MONO)),
    "never at the same time": (put(put(MONO, np.s_[0, 4000:], 0), np.s_[1, :4000], 0), near(MONO)),
    "shorter estimates": (MONO, near(MONO)[:, :5000]),
    "estimates without an end": (MONO, near(MONO)[:, :100]),
    "longer estimates": (MONO, near(noise(2, 9000, 1))),
    "low-passed": (low(50), near(low(50))),
    "low-passed in 28 bits": (low(28), near(low(28))),
    "low-passed in 24 bits": (low(24), near(low(24))),
    "low-passed in 16 bits": (low(16), near(low(16))),
    "a sine": (np.concatenate([SINE, noise(1, 12000, 1)]), near(noise(2, 12000, 1))),
    "sines in 16 bits": (np.round(np.concatenate([SINE, SINE**3]) * 2**15) / 2**15, near(noise(2, 12000, 1))),
}


@pytest.mark.parametrize("name", CASES)
def test_signals(name):
    x, y = CASES[name]
    assert_equals_museval(x.copy(), y.copy())


@pytest.mark.parametrize("seed", range(8))
def test_at_random(seed):
    """Sources that are filtered, gated and mixed at random, of any shape."""
    rng = np.random.default_rng(seed)
    nb_sources, nb_channels = [(1, 2), (2, 1), (3, 1), (2, 2), (4, 1)][rng.integers(5)]
    x = noise(nb_sources, rng.integers(2000, 15000), nb_channels, seed=seed + 50)
    x = scipy.signal.lfilter([1], [1, -rng.uniform(0, 0.95)], x, axis=1) * 10 ** rng.uniform(-2, 0, (nb_sources, 1, 1))
    start = rng.integers(x.shape[1])
    x[rng.integers(nb_sources), start : start + rng.integers(x.shape[1] // 2)] = 0
    y = np.tensordot(np.eye(nb_sources) + rng.uniform(-0.2, 0.2, (nb_sources, nb_sources)), x, 1)
    y += 10 ** rng.uniform(-4, -1) * rng.standard_normal(y.shape)
    assert_equals_museval(x, y[:, : rng.integers(1000, 20000)], rng.integers(500, 8000), rng.integers(500, 8000))


@pytest.fixture(scope="module")
def song():
    """A real one in AAC: vocals and drums, {format: (2, 60000, 2)}."""
    path = Path(pytest.importorskip("stempeg").__file__).parent / "data" / "The Easton Ellises - Falcon 69.stem.mp4"
    stems = {}
    for form, dtype, scale in (("s16le", "<i2", 2**15), ("f32le", "<f4", 1)):
        command = ["ffmpeg", "-v", "error", "-i", path, "-ss", "3", "-t", "2", "-f", form]
        outputs = [
            subprocess.run([*command, "-map", f"0:a:{k}", "-"], check=True, capture_output=True).stdout for k in (4, 1)
        ]
        stems[form] = np.array([np.frombuffer(raw, dtype).reshape(-1, 2)[:60000] / scale for raw in outputs])
    return stems


@pytest.mark.parametrize("form", ["s16le", "f32le"])
def test_a_real_song(song, form):
    x = song[form]
    scores = assert_equals_museval(x, near(x, 0.003), 20000, 20000)
    assert np.isfinite(scores).all()


# ----------------------------------------------------------------------------------- what is noise


@pytest.mark.parametrize(
    "name, noisy",
    [("low-passed", True), ("low-passed in 28 bits", True), ("low-passed in 16 bits", False), ("delayed", False)],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_marks_scores_that_rounding_moves(name, noisy):
    x, y = CASES[name]
    ours = bsseval.evaluate(x, y, WIN, WIN)
    one, other = (museval.evaluate(rounded(x, k), rounded(y, k + 5), WIN, WIN) for k in range(2))
    moves = {metric: difference(a, b) for metric, a, b in zip(bsseval.METRICS, one, other)}
    assert ours.doubtful["SIR"].any() == (moves["SIR"] > 0.01) == noisy
    assert not ours.doubtful["SDR"].any()
    assert moves["SDR"] < 1e-8
    assert ours.conditions.shape == (3,)
    for metric, values in zip(bsseval.METRICS, ours):
        assert ours.movement[metric].shape == values.shape
        assert ours.doubtful[metric].shape == (2,)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_movement_is_of_the_size_of_museval_s():
    x, y = CASES["low-passed in 24 bits"]
    ours = bsseval.evaluate(x, y, WIN, WIN)
    one, other = (museval.evaluate(rounded(x, k), rounded(y, k + 5), WIN, WIN) for k in range(2))
    for metric, a, b in zip(bsseval.METRICS[1:], one[1:], other[1:]):
        assert 0.5 < np.nanmax(ours.movement[metric]) / difference(a, b) < 30


def test_channels_that_are_nearly_alike_are_two():
    """The estimate is what little they differ by: with one of them only, nothing of it would be explained."""
    a, b = noise(2, 30000)
    assert bsseval.evaluate([np.stack([a, a + 3e-7 * b], 1)], [np.stack([b, b], 1)], 10000, 10000).SAR.min() > 25


def test_songs_shorter_than_filters_are_marked():
    x = noise(2, 300, 1)
    scores = bsseval.evaluate(x, near(x))
    assert np.isinf(scores.conditions[-1])
    assert scores.doubtful["SAR"].all()  # the projection is the estimate itself


def test_least_squares_where_a_matrix_cannot_be_factored(monkeypatch):
    def singular(*_):
        raise np.linalg.LinAlgError

    x = noise(2, 100, 1)
    scores = bsseval.evaluate(x, near(x))
    monkeypatch.setattr(np.linalg, "solve", singular)
    SDR, ISR, SIR, SAR = bsseval.evaluate(x, near(x))
    np.testing.assert_allclose([SDR, ISR, SIR], scores[:3], atol=1e-6)
    assert (SAR > 200).all()  # every signal this short is a filtered one


# -------------------------------------------------------------------------------------- invariants


def test_scores_are_a_tuple_that_knows_more():
    x = noise(2, 7000, 2)
    scores = bsseval.evaluate(x, near(x), WIN, WIN)
    SDR, ISR, SIR, SAR = scores
    assert SDR is scores.SDR and SAR is scores[3]
    again = pickle.loads(pickle.dumps(scores))
    np.testing.assert_array_equal(again, scores)
    np.testing.assert_array_equal(again.conditions, scores.conditions)


@pytest.mark.parametrize("name", ["estimates are references", "a delayed copy", "centred"])
def test_the_number_of_threads_changes_nothing(name):
    x, y = CASES[name]
    scores = []
    for threads in (1, 2, 3):
        kernels.threads.set_threads(threads)
        scores.append(bsseval.evaluate(x, y, 500, 300))
    for other in scores[1:]:
        np.testing.assert_array_equal(other, scores[0])


def test_the_order_of_sources_changes_nothing():
    x = noise(3, 9000, 1)
    y, order = near(x), [2, 0, 1]
    scores = np.array(bsseval.evaluate(x, y, WIN, WIN))
    np.testing.assert_allclose(bsseval.evaluate(x[order], y[order], WIN, WIN), scores[:, order], atol=1e-9)


def test_a_long_window_is_that_of_shorter_blocks(monkeypatch):
    x = noise(2, 30000, 2)
    scores = bsseval.evaluate(x, near(x), np.inf)
    monkeypatch.setattr(kernels.bsseval, "LONGEST", 1500)
    np.testing.assert_allclose(bsseval.evaluate(x, near(x), np.inf), scores, atol=1e-9)


@pytest.mark.parametrize("win", [44100, np.inf])
def test_memory_does_not_depend_on_the_length(win):
    kernels.threads.set_threads(2)
    peaks = []
    for seconds in (10, 40):
        x = noise(2, seconds * 44100, 1).astype(np.float32)
        y = near(x).astype(np.float32)
        tracemalloc.start()
        bsseval.evaluate(x, y, win)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.05 * peaks[0] < 40e6  # the song is 14 MB per signal, the matrix 8


@pytest.mark.parametrize(
    "x, y, message",
    [
        (MONO[0, :, 0], MONO[0, :, 0], "shape"),
        (MONO[None], MONO[None], "shape"),
        (MONO[:, :0], MONO[:, :0], "shape"),
        (MONO[:0], MONO[:0], "shape"),
        (MONO, MONO[:1], "same sources"),
        (MONO, STEREO, "same sources"),
        (MONO[0], MONO[0], "100 sources"),
        (MONO.astype(complex), MONO, "complex128"),
        (MONO, MONO.astype(object), "object"),
        (MONO.astype(str), MONO, "real numbers"),
        (put(MONO, (0, 5), np.nan), MONO, "NaN"),
        (MONO, put(MONO, (1, 6999), np.inf), "infinite"),
        (1e200 * MONO, MONO, "too large"),
        (put(MONO, 1, 0), MONO, "the reference of source 1 is silent"),
        (MONO, put(MONO, 0, 0), "the estimate of source 0 is silent"),
        (put(STEREO, np.s_[0, :, 1], -STEREO[0, :, 0]), STEREO, "the reference of source 0 is silent"),
    ],
)
def test_what_cannot_be_scored_is_refused(x, y, message):
    with pytest.raises(ValueError, match=message) as error:
        bsseval.evaluate(x, y)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("win, hop", [(0, 1), (1, 0), (-5, 5), (np.nan, 5), (5, np.nan)])
def test_frames_that_are_none_are_refused(win, hop):
    with pytest.raises(ValueError, match="positive"):
        bsseval.evaluate(MONO, MONO, win, hop)


# --------------------------------------------------------------------------------- without filters


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
@pytest.mark.parametrize("win", [np.inf, 3000])
def test_sdr_and_si_sdr_are_their_formulas(dtype, win):
    x = (100 * noise(3, 40000, 2)).astype(dtype)
    y = (100 * near(noise(3, 40000, 2))).astype(dtype)[:, :38500]
    sdr, si_sdr = bsseval.sdr(x, y, win, win), bsseval.si_sdr(x, y, win, win)
    padded = np.concatenate([y, np.zeros((3, 1500, 2))], axis=1)
    frames = [slice(None)] if win == np.inf else [slice(t, t + 3000) for t in range(0, 37001, 3000)]
    assert sdr.shape == si_sdr.shape == (3, len(frames))
    for j in range(3):
        for t, frame in enumerate(frames):
            s, e = (a[j, frame].astype(float).ravel() for a in (x, padded))
            assert sdr[j, t] == pytest.approx(10 * np.log10((s @ s + 1e-7) / ((s - e) @ (s - e) + 1e-7)), abs=1e-9)
            target = (e @ s) / (s @ s) * s
            ratio = (target @ target) / ((target - e) @ (target - e))
            assert si_sdr[j, t] == pytest.approx(10 * np.log10(ratio), abs=1e-9)


def test_what_a_silent_source_is_given():
    x, y = put(MONO, 0, 0), near(MONO)
    np.testing.assert_allclose(bsseval.sdr(x, y)[0], 10 * np.log10(1e-7 / (np.sum(y[0] ** 2) + 1e-7)))
    assert bsseval.sdr(x, x)[0] == 0
    assert np.isnan(bsseval.si_sdr(x, y)[0, 0])
    assert np.isnan(bsseval.si_sdr(y, x)[0, 0])
    assert np.isfinite(bsseval.si_sdr(x, y)[1, 0])


def test_si_sdr_does_not_depend_on_gains():
    np.testing.assert_allclose(bsseval.si_sdr(MONO, 7 * near(MONO)), bsseval.si_sdr(MONO, near(MONO)), atol=1e-9)
    np.testing.assert_allclose(bsseval.si_sdr(7 * MONO, near(MONO)), bsseval.si_sdr(MONO, near(MONO)), atol=1e-9)


def test_doctest():
    assert doctest.testmod(bsseval).failed == 0
