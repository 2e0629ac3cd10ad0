"""Streams: equality with the separator's stems for blocks of any size, latency, bounded memory, and the command."""

import io
import math
import signal
import subprocess
import sys
import time
import tracemalloc
import types

import networks
import numpy as np
import pytest
from test_separate import (
    N_FFT,
    N_HOP,
    RATE,
    SIZES,
    joint_params,
    make_folder,
    random_models,
    random_params,
    song,
    stack,
)

import kernels.threads
import live
import separate
import trained
from args import TARGETS
from separate import Separator, Stream
from utils import UsageError


def one_way(nb_models=1, **sizes):
    return random_models(TARGETS[:nb_models], unidirectional=True, **sizes)


def bridged():
    """X-UMX of all targets."""
    return [trained.described(joint_params(**SIZES, unidirectional=True), TARGETS, N_HOP, RATE)]


def streamed(separator, audio, sizes):
    """Stems of a stream of blocks whose sizes come in turn, and how far they were behind at most."""
    stream, pieces, start, behind = Stream(separator), [], 0, 0
    while start < audio.shape[1]:
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream(audio[:, start : start + size]))
        start = min(start + size, audio.shape[1])
        behind = max(behind, start - sum(piece.shape[2] for piece in pieces))
    return np.concatenate([*pieces, stream.flush()], axis=2), behind


def compare(separator, audio, sizes):
    stems, behind = streamed(separator, audio, sizes)
    expected = stack(separator(audio, separator.sample_rate))
    assert stems.shape == expected.shape and stems.dtype == np.float32
    np.testing.assert_allclose(stems, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    return behind


@pytest.mark.parametrize("sizes", [[1], [37], [512], [44100], [1, 44, 0, 700, 64, 5000, 3]], ids=str)
def test_stems_are_those_of_the_separator(sizes):
    separator = Separator(one_way(2), niter=0, context="cpu")
    nb_timesteps = 2000 if sizes == [1] else 50000
    behind = compare(separator, song(nb_timesteps), sizes)
    assert behind <= Stream(separator).latency == N_FFT - 1
    assert behind == N_FFT - 1 or sizes != [1]  # it is not less


@pytest.mark.parametrize("nb_timesteps", [1, N_FFT // 2, N_FFT // 2 + 1, N_FFT // 2 + N_HOP, N_FFT, 1000 + N_HOP // 2])
def test_lengths_around_the_first_and_the_last_frame(nb_timesteps):
    separator = Separator(one_way(), niter=0, context="cpu")
    for size in (1, N_HOP, 5000):
        behind = compare(separator, song(nb_timesteps), [size])
        assert size != N_HOP or nb_timesteps % N_HOP or behind <= N_FFT - N_HOP


@pytest.mark.parametrize("n_fft, n_hop", [(N_FFT, 100), (N_FFT, N_FFT // 2), (16, 4), (16, 3), (2, 1)])
def test_other_windows_and_hops(n_fft, n_hop):
    """Of short windows, the outermost samples are heard."""
    sizes = {"nb_bins": n_fft // 2 + 1, "max_bin": n_fft // 2}
    model = trained.described(random_params(unidirectional=True, **sizes), ["bass"], n_hop, RATE)
    separator = Separator([model], context="cpu")
    for nb_timesteps in (1, 2, n_fft // 2 + 1, 2 * n_fft, 4 * n_fft + 1, 9 * n_fft - 1):
        compare(separator, song(nb_timesteps), [5, 1, 2 * n_fft])


def test_real_size():
    """`pytest -s` shows the real-time factor of one core; it depends on what else the machine does."""
    params = random_params(nb_bins=2049, max_bin=1487, hidden_size=512, unidirectional=True)
    for name in params:
        if name.endswith("/W") or "weight" in name:
            params[name] *= np.float32(0.1)
    separator = Separator([trained.described(params, ["bass"], 1024, 44100)], context="cpu")
    for size in (1, 37, 512, 44100):
        compare(separator, song(8000 if size == 1 else 66150, rate=44100), [size])
    kernels.threads.set_threads(1)
    stream, audio = Stream(separator), song(50 * 1024, rate=44100)
    stream(audio[:, : 10 * 1024])
    begin = time.perf_counter()
    for start in range(10 * 1024, audio.shape[1], 1024):
        stream(audio[:, start : start + 1024])
    factor = (time.perf_counter() - begin) / (40 * 1024 / 44100)
    print(f"\nreal-time factor {factor:.3f}, latency {stream.latency} samples")
    assert factor < 0.5


@pytest.mark.parametrize(
    "options",
    [{"residual": "rest"}, {"softmask": True, "alpha": 2.0}, {"targets": ["drums"], "residual": True}],
    ids=str,
)
def test_options_of_the_separator(options):
    compare(Separator(one_way(2), niter=0, context="cpu", **options), song(3000), [100])


@pytest.mark.parametrize("options", [{"residual": True}, {"residual": True, "softmask": True, "targets": ["drums"]}])
def test_a_causal_filter_that_forgets_nothing_ends_as_that_of_the_whole(options):
    """At the last frame, both have the covariances of all; with hops of half a window, its samples are its alone."""
    models = [
        trained.described(random_params(seed, unidirectional=True), [target], N_FFT // 2, RATE)
        for seed, target in enumerate(TARGETS[:2])
    ]
    audio = song(3000)
    whole = stack(Separator(models, niter=1, wiener_win_len=None, context="cpu", **options)(audio, RATE))
    stream = Stream(Separator(models, niter=0, context="cpu", **options), wiener=math.inf)
    for _ in range(2):  # it begins anew
        stems = np.concatenate([stream(audio[:, :1000]), stream(audio[:, 1000:]), stream.flush()], axis=2)
        difference = np.abs(stems - whole).max(axis=(0, 1)) / np.abs(whole).max()
        assert difference[3000 // (N_FFT // 2) * (N_FFT // 2) :].max() < 1e-5 < 1e-3 < difference.max()


def test_a_causal_filter_forgets_and_is_the_same_for_all_blocks():
    separator, audio = Separator(one_way(2), niter=0, context="cpu"), song(3000)
    stems = {}
    for seconds in (0.05, 0.5, 1e9):
        first, second = Stream(separator, seconds), Stream(separator, seconds)
        stems[seconds] = np.concatenate([first(audio), first.flush()], axis=2)
        pieces = [second(audio[:, start : start + 77]) for start in range(0, 3000, 77)]
        np.testing.assert_array_equal(np.concatenate([*pieces, second.flush()], axis=2), stems[seconds])
    largest = np.abs(stems[0.5]).max()
    assert min(np.abs(stems[0.5] - stems[other]).max() for other in (0.05, 1e9)) > 0.001 * largest
    nb_frames = 0.5 * separator.sample_rate / separator.n_hop
    assert Stream(separator, 0.5)._filter.forgetting ** nb_frames == pytest.approx(1 / math.e)
    alone = Separator(one_way(), context="cpu")
    np.testing.assert_array_equal(Stream(alone, 0.5)(audio), Stream(alone)(audio))  # of one source, no filter
    for seconds in (0, -1, math.nan, "1"):
        with pytest.raises(UsageError, match="expected seconds"):
            Stream(separator, seconds)


def test_mono_models():
    compare(Separator(one_way(nb_channels=1), context="cpu"), song(3000, 1), [100])


@pytest.mark.parametrize("targets", [TARGETS[:2], TARGETS[1:2]])
def test_bridges_and_averages(targets):
    """Through the bridges of a joint network go those of all its targets; of several models, estimates are averaged."""
    models = [*bridged(), *one_way(2)]
    compare(Separator(models[:1], targets, niter=0, context="cpu"), song(3000), [100])
    compare(Separator(models, targets, niter=0, context="cpu"), song(3000), [100])


def test_after_the_end_comes_another_recording():
    separator = Separator(one_way(), context="cpu")
    stream = Stream(separator)
    for seed in range(2):
        audio = song(1000, seed=seed)
        stems = np.concatenate([stream(audio), stream.flush()], axis=2)
        np.testing.assert_allclose(stems, stack(separator(audio, RATE)), atol=1e-6)
    assert stream.flush().shape == (1, 2, 0)


def test_threads_change_nothing():
    separator, audio = Separator(one_way(hidden_size=80), context="cpu"), song(2000)
    kernels.threads.set_threads(1)
    one, _ = streamed(separator, audio, [500])
    kernels.threads.set_threads(3)
    np.testing.assert_array_equal(streamed(separator, audio, [500])[0], one)


def test_memory_does_not_grow():
    """Over 3200 frames by less than what a third of the samples of one channel would take, now and at its peak."""
    stream, block = Stream(Separator(one_way(), context="cpu")), song(512)

    def traced(nb_blocks):
        tracemalloc.reset_peak()
        for _ in range(nb_blocks):
            stream(block)
        return np.array(tracemalloc.get_traced_memory())

    tracemalloc.start()
    try:
        traced(100)  # Python fills its free lists
        few, many = traced(100), traced(400)
    finally:
        tracemalloc.stop()
    assert (many - few < 400 * 512 * 4 / 3).all()


@pytest.mark.parametrize(
    "block, message",
    [
        (np.zeros(5, np.float32), "expected floats"),
        (np.zeros((1, 5), np.float32), "expected floats"),
        (np.zeros((2, 5), np.int16), "expected floats"),
        (np.full((2, 5), np.nan), "not finite"),
        (np.full((2, 5), 1e300), "not finite"),
    ],
)
def test_blocks_that_are_none_are_not_taken(block, message):
    separator, audio = Separator(one_way(), context="cpu"), song(1000)
    stream = Stream(separator)
    first = stream(audio[:, :400])
    with pytest.raises(UsageError, match=message):
        stream(block)
    stems = np.concatenate([first, stream(audio[:, 400:]), stream.flush()], axis=2)
    np.testing.assert_allclose(stems, stack(separator(audio, RATE)), atol=1e-6)


def test_models_that_need_the_whole_recording():
    own = trained.Model({**one_way()[0].description, "class": "networks.py:Deeper"}, networks.Deeper)
    description = {"class": "networks.py:Wave", "options": {}, "targets": ["bass"]}
    wave = trained.Model(
        {**description, **dict.fromkeys(("n_fft", "n_hop"), 64), "nb_channels": 2, "sample_rate": RATE}, networks.Wave
    )
    for models, niter, message in [
        (random_models(["bass"]), 0, "the network of bass is bidirectional: it needs the whole recording"),
        (one_way(2), 1, "niter=0"),
        ([own], 0, "networks.py:Deeper is a network of one's own"),
        ([wave], 0, "networks.py:Wave is a network of one's own"),
    ]:
        with pytest.raises(UsageError, match=message):
            Stream(Separator(models, niter=niter, context="cpu"))


# ------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("models") / "live", ["vocals", "bass"], unidirectional=True)


def command(folder, *options):
    return [sys.executable, separate.__file__, "--stream", "--model", str(folder), *options]


def raw(audio):
    return audio.T.astype("<f4").tobytes()


class Sink(io.BytesIO):
    """Which knows how many bytes have gone on."""

    flushed = 0

    def flush(self):
        self.flushed = self.tell()


class Trickle(io.BytesIO):
    """Of which a few bytes are there at a time, when the sink holds none back."""

    def __init__(self, data, sink):
        super().__init__(data)
        self.sink = sink

    def read1(self, size):
        assert self.sink.flushed == self.sink.tell()
        return super().read1(min(size, 1001))


def test_raw_samples_in_and_out(folder):
    audio = song(3000)
    separator = Separator.load(folder, niter=0, context="cpu")
    stems = stack(separator(audio, RATE))
    sink = Sink()
    live.copy_stem(Stream(separator), [0, 1], Trickle(raw(audio), sink), sink)
    found = np.frombuffer(sink.getvalue(), "<f4").reshape(-1, 2).T
    np.testing.assert_allclose(found, stems.sum(axis=0), atol=1e-6)
    sink = io.BytesIO()
    with pytest.raises(UsageError, match="ends within a sample"):
        live.copy_stem(Stream(separator), [0], io.BytesIO(raw(audio)[:-3]), sink)
    assert len(sink.getvalue()) == len(raw(audio)) - 8


def test_the_command_in_a_pipe(folder):
    """Stems come while samples still come; at the end, all of them are there."""
    audio = song(3000)
    expected = Separator.load(folder, ["vocals"], residual="rest", context="cpu", niter=0)(audio, RATE)["rest"]
    aggregate = ["--residual", "rest", "--aggregate", '{"quiet": ["rest"]}']
    run = command(folder, "--targets", "vocals", *aggregate, "--threads", "1")
    with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(raw(audio[:, :2000]))
        process.stdin.flush()
        first = process.stdout.read(8 * (2000 - N_FFT + 1))
        process.stdin.write(raw(audio[:, 2000:]))
        process.stdin.close()
        rest, error = process.stdout.read(), process.stderr.read()
    assert process.returncode == 0
    assert f"quiet: float32, 2 channels, {RATE} Hz, {N_FFT - 1} samples (32 ms) late" in error.decode()
    np.testing.assert_allclose(np.frombuffer(first + rest, "<f4").reshape(-1, 2).T, expected, atol=1e-6)


@pytest.mark.parametrize("ending", ["interrupted", "standard output: Broken pipe"])
def test_ends_of_the_command_are_a_line(folder, ending):
    run = command(folder, "--targets", "vocals", "--quiet")
    with subprocess.Popen(run, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(raw(song(3000)))
        process.stdin.flush()
        process.stdout.read(1)  # it is at work
        if ending == "interrupted":
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
        else:
            process.stdout.close()
            process.stdin.write(raw(song(3000)))
            process.stdin.close()
        error = process.stderr.read().decode()
        assert process.wait() == (130 if ending == "interrupted" else 1)
    assert [line for line in error.splitlines() if "compiling" not in line] == [error.splitlines()[-1]]
    assert ending in error


@pytest.mark.parametrize(
    "options, message",
    [
        (["--wiener-eps", "0"], "--wiener-eps has no effect on a stream without --causal-wiener"),
        ([], "a stream has one stem, not vocals, bass: choose it by --targets, or --aggregate"),
        (["--niter", "1"], "--niter has no effect on a stream"),
        (["--outdir", "out"], "--outdir has no effect on a stream"),
        (["--sum-to-mixture"], "--sum-to-mixture has no effect on a stream"),
        (["--network", "a.py:A"], "--network has no effect on a stream"),
        (["song.wav"], "--stream separates what comes, not song.wav"),
        (["--karaoke", "--targets", "bass"], "leave out --targets"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_a_stream(folder, capsys, options, message, monkeypatch):
    monkeypatch.setattr("os.isatty", lambda number: False)
    with pytest.raises(SystemExit) as stop:
        separate.main([*options, *command(folder)[2:]])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1


def test_no_terminal_and_no_bidirectional_model(folder, tmp_path, capsys, monkeypatch):
    for is_terminal, model, message in [
        (True, folder, "not a terminal"),
        (False, make_folder(tmp_path / "both", ["bass"]), "bidirectional"),
    ]:
        monkeypatch.setattr("os.isatty", lambda number, value=is_terminal: value)
        with pytest.raises(SystemExit) as stop:
            separate.main(command(model)[2:])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize("option", [["--play"], ["--causal-wiener", "2"]])
def test_options_of_a_stream_alone(folder, capsys, option):
    """Without one, --play makes one; what else comes before a device is looked for is refused all the same."""
    with pytest.raises(SystemExit) as stop:
        separate.main(["song.wav", "--model", str(folder), *option])
    error = capsys.readouterr().err
    expected = {"--play": "what comes, not song.wav", "--causal-wiener": "--causal-wiener is an option of --stream"}
    assert stop.value.code == 2 and expected[option[0]] in error and error.count("\n") == 1


def test_the_command_with_a_causal_filter(folder):
    audio = song(2000)
    separator = Separator.load(folder, ["vocals"], residual=True, niter=0, context="cpu")
    stream = Stream(separator, 0.5)
    expected = np.concatenate([stream(audio), stream.flush()], axis=2)[1]
    run = command(folder, "--karaoke", "--quiet", "--causal-wiener", "0.5")
    done = subprocess.run(run, input=raw(audio), capture_output=True, check=True)
    np.testing.assert_allclose(np.frombuffer(done.stdout, "<f4").reshape(-1, 2).T, expected, atol=1e-6)


# ---------------------------------------------------------------------------------- sound devices


class PortAudioError(Exception):
    pass


class Device:
    """A stand-in for sounddevice.Stream: plays `audio` in, keeps what comes out; Ctrl-C is pressed at the end."""

    audio, refusal = song(3000), None

    def __init__(self, samplerate, channels, dtype, blocksize):
        if self.refusal:
            raise PortAudioError(self.refusal)
        assert (samplerate, channels, dtype, blocksize) == (RATE, 2, "float32", N_HOP)
        self.at, self.played, Device.last = 0, [], self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def read(self, nb_frames):
        assert sum(map(len, self.played)) >= self.at, "what plays has nothing left"
        block = self.audio[:, self.at : self.at + nb_frames].T
        if len(block) < nb_frames:
            raise KeyboardInterrupt
        self.at += nb_frames
        return block, self.at in (640, 1280)

    def write(self, data):
        assert data.dtype == np.float32 and data.flags.c_contiguous and data.shape[1] == 2
        self.played.append(data)
        return True


@pytest.fixture
def sounddevice(monkeypatch):
    module = types.SimpleNamespace(Stream=Device, PortAudioError=PortAudioError)
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    return module


def test_from_device_to_device(folder, sounddevice, capsys):
    with pytest.raises(SystemExit) as stop:
        separate.main(["--play", "--karaoke", "--model", str(folder), "--threads", "1"])
    assert stop.value.code == 130
    separator = Separator.load(folder, ["vocals"], residual=True, niter=0, context="cpu")
    expected = separator(Device.audio, RATE)["residual"]
    played = np.concatenate(Device.last.played).T
    late = N_FFT - N_HOP  # for whole hops, as documented
    assert played.shape[1] == Device.last.at and not played[:, :late].any()
    np.testing.assert_allclose(played[:, late:], expected[:, : played.shape[1] - late], atol=1e-6)
    error = capsys.readouterr().err
    assert "accompaniment: float32, 2 channels" in error and error.count("samples were lost") == 1


def test_devices_that_are_not_there(folder, sounddevice, capsys, monkeypatch):
    def status(message):
        with pytest.raises(SystemExit) as stop:
            separate.main(["--play", "--karaoke", "--quiet", "--model", str(folder)])
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        return stop.value.code

    def fails(self, nb_frames):
        raise PortAudioError("Unanticipated host error")

    monkeypatch.setattr(Device, "read", fails)
    assert status("--play: Unanticipated host error") == 1
    monkeypatch.setattr(Device, "refusal", "Error querying device -1")
    assert status("--play: Error querying device -1: python -m sounddevice lists the devices") == 2
    monkeypatch.setitem(sys.modules, "sounddevice", None)  # as if it were not installed
    assert status("--play needs the package sounddevice: pip install sounddevice") == 2


def test_a_package_without_its_library(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "sounddevice.py").write_text("raise OSError('PortAudio library not found')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sounddevice", raising=False)
    with pytest.raises(SystemExit) as stop:
        separate.main(["--play", "--karaoke", "--model", str(folder)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "--play: PortAudio library not found: install it" in error


def test_karaoke_is_the_accompaniment(folder):
    audio = song(2000)
    expected = Separator.load(folder, ["vocals"], residual=True, niter=0, context="cpu")(audio, RATE)["residual"]
    done = subprocess.run(command(folder, "--karaoke", "--quiet"), input=raw(audio), capture_output=True, check=True)
    np.testing.assert_allclose(np.frombuffer(done.stdout, "<f4").reshape(-1, 2).T, expected, atol=1e-6)
