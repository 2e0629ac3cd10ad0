"""Stems from recordings: ``python separate.py song.mp3``, or `Separator` from Python."""

import collections
import contextlib
import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nnabla as nn
import nnabla_ext.cpu
import numpy as np
import soundfile
import soxr
from tqdm import tqdm

import filtering
import functions
import kernels
import pretrained
import utils
import weights
from args import TARGETS, separate_parser
from model import JointOpenUnmix, OpenUnmix
from utils import UsageError

AUDIO_FILES = {".wav", ".flac", ".ogg", ".mp3", ".m4a", ".mp4", ".aac", ".opus", ".aif", ".aiff", ".wma"}
SONY = {"nhop": 1024, "sample_rate": 44100}  # what Sony's files do not say


# --------------------------------------------------------------------------------- trained models


class SpectrogramModel:
    """A trained network, of one target or a joint one of several, with parameters of its own.

    ``model(X)`` is a graph like that of `model.OpenUnmix`, in test mode unless told otherwise: from a mixture's
    spectrogram (nb_frames, nb_samples, nb_channels, nb_bins) to the target's, or to a list of all targets'.
    """

    def __init__(self, parameters, targets, n_hop, sample_rate):
        sizes = weights.describe(parameters)
        options = {key: sizes[key] for key in ("hidden_size", "nb_channels", "nb_layers", "max_bin", "unidirectional")}
        options.update(n_fft=2 * (sizes["nb_bins"] - 1), n_hop=n_hop, sample_rate=sample_rate)
        options.update(input_is_spectrogram=True)
        self.targets = list(targets)
        self.joint = len(self.targets) > 1
        self.net = JointOpenUnmix(targets, **options) if self.joint else OpenUnmix(**options)
        self.scope = collections.OrderedDict()
        with self.parameter_scope():
            weights.set_parameters(parameters)

    def parameter_scope(self):
        return nn.parameter_scope("model", self.scope)

    def __call__(self, X, test=True):
        with self.parameter_scope():
            return self.net(X, test)

    def encode(self, X):
        """Features of frames, a variable per target, from a spectrogram (nb_frames, 1, nb_channels, nb_bins)."""
        with self.parameter_scope():
            features = self.net.encode(X, test=True)
        return features if self.joint else [features]

    def decode(self, target, h, X):
        """The estimate of a target from its features and the mixture's spectrogram of the same frames."""
        with self.parameter_scope():
            return self.net.decode(h, X, test=True, suffix=f"_{target}" if self.joint else "")


def _read_config(path):
    """What a separator.json says of the STFT; `UsageError` if that is missing or cannot be."""
    config = utils.read_json(path)
    if not isinstance(config, dict):
        raise UsageError(f"{path} is not what a training writes")
    if missing := [key for key in SONY if key not in config]:
        raise UsageError(f"{path} lacks {' and '.join(missing)}")
    for key in config.keys() & {"nfft", "nhop", "sample_rate", "nb_channels"}:
        value = config[key]
        if type(value) not in (int, float) or not 0 < value < 2**31 or value != int(value):
            raise UsageError(f"{path} has {key} {value!r}, which is not a positive whole number")
        config[key] = int(value)  # openunmix writes sample rates as 44100.0
    targets = config.get("targets")
    if targets is not None and not (isinstance(targets, list) and all(isinstance(name, str) for name in targets)):
        raise UsageError(f"{path} has targets {targets!r}, which is not a list of names")
    return config


def _folder_models(folder, targets):
    """Files of a folder of ours, of openunmix, or of Sony's, {target: path}; and its separator.json."""
    path = folder / "separator.json"
    config = _read_config(path) if path.exists() else dict(SONY)

    def file(target):
        exact = [folder / f"{target}{suffix}" for suffix in (".h5", ".pth")]
        found = [path for path in exact if path.exists()] or sorted(folder.glob(f"{glob.escape(target)}[-_]*.pth"))
        if len(found) > 1 and found != exact:
            raise UsageError(f"several files of the target {target!r}: {', '.join(map(str, found))}")
        return found[0] if found else None

    if targets is None:
        trained = sorted(path.stem for path in folder.glob("*.json"))
        targets = config.get("targets") or [name for name in dict.fromkeys([*TARGETS, *trained]) if file(name)]
    if not targets:
        raise UsageError(f"no weights (<target>.h5 or <target>*.pth) in {folder}")
    if missing := [target for target in targets if not file(target)]:
        raise UsageError(f"no weights of the target {missing[0]!r} ({missing[0]}.h5 or {missing[0]}*.pth) in {folder}")
    targets = sorted(targets, key=lambda target: TARGETS.index(target) if target in TARGETS else len(TARGETS))
    return {target: file(target) for target in targets}, config


def load_models(model, targets=None, model_dir=None, quiet=True):
    """Trained models by name, folder or file.

    Args:
        model: "umx", "umxhq", "umxl" or "umxse"; a folder of ours or of openunmix; a file of weights, also
            Sony's of a single target (whose name must hold the target's) or of the joint model X-UMX
        targets: names, or a single one, or None for all that are there
        model_dir: where the files of a named model are; None: the user's cache folder, downloaded if missing
    Returns:
        list of SpectrogramModel, and the dict that separator.json holds
    Raises:
        UsageError: no such model or target, damaged or unfitting weights.
    """
    path = Path(model).expanduser()
    targets = [targets] if isinstance(targets, str) else targets
    if path.is_dir():
        files, config = _folder_models(path, targets)
    elif path.is_file():
        files, config = {None: path}, dict(SONY)
    elif str(model) in pretrained.MODELS:
        config = dict(pretrained.MODELS[model].config)
        files = pretrained.fetch(model, targets, model_dir, quiet)
        if pretrained.MODELS[model].note:
            print(pretrained.MODELS[model].note, file=sys.stderr)
    else:
        raise UsageError(f"unknown model {str(model)!r}: neither a folder, a file, nor {', '.join(pretrained.MODELS)}")

    models = []
    for target, file in files.items():
        try:
            parameters = weights.load(file)
            names = list(weights.by_target(parameters))  # of a joint model, else [""]
            if names == [""]:
                names = [target or next((name for name in TARGETS if name in file.stem), file.stem)]
            models.append(SpectrogramModel(parameters, names, config["nhop"], config["sample_rate"]))
        except (ValueError, OSError) as error:
            line = str(error)
            raise UsageError(line if str(file) in line else f"{file}: {line}") from None
    nets = [one.net for one in models]
    shared = {"nfft": nets[0].n_fft, "nb_channels": nets[0].nb_channels}
    for one, file in zip(nets, files.values()):
        for key, value in {"nfft": one.n_fft, "nb_channels": one.nb_channels}.items():
            if config.get(key, shared[key]) != value:
                raise UsageError(f"{file} has {key} {value}, the separator {config.get(key, shared[key])}")
    available = [target for one in models for target in one.targets]
    if unknown := [target for target in targets or () if target not in available]:
        raise UsageError(f"{model} has no target {', '.join(unknown)}: it has {', '.join(available)}")
    return models, {**config, **shared}


def _published(name, targets, model_dir):
    return {one.targets[0]: one for one in load_models(name, targets, model_dir)[0]}


def umx_spec(targets=None, model_dir=None):
    """Open-Unmix trained on MUSDB18, {target: SpectrogramModel}; arguments as of `load_models`."""
    return _published("umx", targets, model_dir)


def umxhq_spec(targets=None, model_dir=None):
    """Open-Unmix trained on MUSDB18-HQ, {target: SpectrogramModel}."""
    return _published("umxhq", targets, model_dir)


def umxl_spec(targets=None, model_dir=None):
    """Open-Unmix trained on more music, for non-commercial use only, {target: SpectrogramModel}."""
    return _published("umxl", targets, model_dir)


def umxse_spec(targets=None, model_dir=None):
    """Open-Unmix for speech in noise, mono, 16 kHz, {target: SpectrogramModel}."""
    return _published("umxse", targets, model_dir)


# -------------------------------------------------------------------------------------- separator


class Separator:
    """Separates recordings into stems: the models' estimates, a multichannel Wiener filter, the inverse STFT.

    With the same weights, the stems equal those of openunmix 1.3.0's Separator. Recordings longer than `segment`
    are worked through in segments that overlap by `overlap`, with a crossfade, so that memory stays bounded.

    Args:
        models: list of SpectrogramModel with the same STFT
        targets: which of their targets to estimate, in this order; None: all
        niter: iterations of the Wiener filter's EM; of no use, so left out, if there is only one source
        softmask: start the EM from a soft mask rather than from the mixture's phase
        alpha: exponent of the estimates in the soft mask
        residual: True or a name: one more stem, what the estimates leave of the mixture
        wiener_win_len: frames that are filtered together; None: all (of a segment)
        context: "cpu", "cudnn" or None for cudnn where it works
        segment, overlap: in seconds, made whole windows of the filter (13.9 s of overlap for the defaults at 44.1 kHz)
    """

    def __init__(
        self,
        models,
        targets=None,
        niter=1,
        softmask=False,
        alpha=1.0,
        residual=False,
        wiener_win_len=300,
        context=None,
        device_id="0",
        segment=480.0,
        overlap=10.0,
    ):
        self.models = models
        self.targets = list(targets) if targets else [target for one in models for target in one.targets]
        self.sources = self.targets + ([residual if isinstance(residual, str) else "residual"] if residual else [])
        if len(set(self.sources)) < len(self.sources):
            raise UsageError(f"two stems of one name: {', '.join(self.sources)}")
        if niter < 0 or (wiener_win_len is not None and wiener_win_len < 1) or not segment > 2 * overlap >= 0:
            raise UsageError("niter cannot be negative, a window must have a frame, a segment two overlaps")
        if not all(map(_is_file_name, self.sources)):
            raise UsageError(f"stems become files, but {', '.join(map(repr, self.sources))} are not all names of files")
        if alpha != 1 and not softmask:
            raise UsageError("alpha is the exponent in the soft mask: it has no effect without softmask")
        net = models[0].net
        if net.n_hop > net.n_fft // 2:
            raise UsageError(f"a hop of {net.n_hop} leaves gaps between windows of {net.n_fft} samples")
        self.n_fft, self.n_hop, self.nb_channels, self.sample_rate = (
            net.n_fft,
            net.n_hop,
            net.nb_channels,
            net.sample_rate,
        )
        self.niter = niter if len(self.sources) > 1 else 0
        self.softmask, self.alpha, self.residual = softmask, alpha, bool(residual)
        self.wiener_win_len = wiener_win_len
        self.context = utils.extension_context(context, device_id)
        # whole windows of the filter, so that a segment's windows are those of the whole recording
        unit = (wiener_win_len or 1) * self.n_hop
        self.overlap = -(round(overlap * self.sample_rate) // -unit) * unit  # rounded up
        self.segment = max(self.overlap, round(segment * self.sample_rate / unit) * unit, unit) + self.overlap

    @classmethod
    def load(
        cls,
        model="umxl",
        targets=None,
        niter=1,
        softmask=False,
        residual=False,
        wiener_win_len=300,
        context=None,
        *,
        model_dir=None,
        quiet=True,
        **options,
    ):
        """A Separator of a named, or of one's own, model; arguments as of `load_models` and Separator."""
        targets = [targets] if isinstance(targets, str) else targets
        models, _ = load_models(model, targets, model_dir, quiet)
        options.update(niter=niter, softmask=softmask, residual=residual)
        return cls(models, targets, wiener_win_len=wiener_win_len, context=context, **options)

    def __call__(self, audio, rate):
        """Separate a recording.

        Args:
            audio: floats within ±1 (nb_channels, nb_timesteps); more channels than two are separated in pairs,
                a single one by a stereo model as two equal ones
            rate: its sample rate in Hz; resampled to the model's and back
        Returns:
            dict of stems float32, of the shape and rate of `audio`
        Raises:
            UsageError: not floats of that shape, empty, with samples that are not finite (or huge), or no rate.
        """
        audio = np.asarray(audio)
        if audio.ndim != 2 or not audio.size or audio.dtype.kind != "f":
            raise UsageError(f"audio {audio.dtype} {audio.shape}: expected floats (nb_channels, nb_timesteps)")
        if not 0 < rate < float("inf"):
            raise UsageError(f"a sample rate of {rate} Hz")
        audio = np.asarray(audio, np.float32)
        _check_samples(audio, "the audio")
        x = _resample(audio, rate, self.sample_rate)
        stems = np.empty((len(self.sources), len(x), x.shape[1]), np.float32)
        for start, block in self.stream(lambda start, stop: x[:, start:stop], *x.shape):
            stems[:, :, start : start + block.shape[2]] = block
        return {
            name: _resample(stem, self.sample_rate, rate, audio.shape[1]) for name, stem in zip(self.sources, stems)
        }

    def stream(self, read, nb_channels, nb_timesteps):
        """Separate a recording at the model's rate, piece by piece.

        Args:
            read: function of (start, stop) that returns these samples, float32 (nb_channels, stop − start)
        Yields:
            start, stems (nb_sources, nb_channels, …): consecutive pieces of all stems
        """
        # Flat where it begins: an estimate is worst at the end of its segment.
        fade = (np.sin(np.linspace(0, np.pi / 2, self.overlap + 2)[1:-1]) ** 2).astype(np.float32)
        tail = None  # the end of the segment before, faded out
        start = 0
        while True:
            stop = min(start + self.segment, nb_timesteps)
            last = stop == nb_timesteps
            following = np.zeros((len(self.sources), nb_channels, 0 if last else self.overlap), np.float32)
            keep = stop - start - following.shape[2]  # from here on, the next segment takes over
            for position, block in self._segment(read(start, stop)):
                end = position + block.shape[2]
                if tail is not None and position < self.overlap:
                    both = slice(position, min(end, self.overlap))
                    block[:, :, : both.stop - position] *= fade[both]
                    block[:, :, : both.stop - position] += tail[:, :, both]
                if end > keep:
                    begin = max(position, keep)
                    part = slice(begin - keep, end - keep)
                    following[:, :, part] = block[:, :, begin - position :] * fade[::-1][part]
                    block = block[:, :, : begin - position]
                if block.shape[2]:
                    yield start + position, block
            if last:
                return
            tail, start = following, start + keep

    def _segment(self, x):
        """Pairs (0, …) of start and stems of audio x (nb_channels, nb_timesteps), window by window."""
        length = x.shape[1]
        # shorter audio cannot be reflected at its ends, which the centred STFT does
        if length <= self.n_fft // 2:
            x = np.pad(x, ((0, 0), (0, self.n_fft // 2 + 1 - length)))
        pairs = [self._estimates(x[k : k + 2]) for k in range(0, len(x), 2)]
        overlap_add = OverlapAdd(self.n_fft, self.n_hop, length)
        for parts in zip(*pairs):
            y = np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
            for position, block in overlap_add(y):
                yield position, block
        for position, block in overlap_add.end():
            yield position, block

    def _estimates(self, x):
        """Spectra of all stems of one or two channels: (nb_sources, nb_channels, window, nb_bins) per window."""
        nb_channels = len(x)
        if self.nb_channels == 2 and nb_channels == 1:
            x = np.concatenate([x, x])
        # The scopes must not span a yield: what runs in between has contexts of its own.
        with nn.context_scope(self.context), nn.auto_forward(False):
            features = self._encode(x)
        nb_frames = kernels.nb_frames(x.shape[1], self.n_fft, self.n_hop, center=True)
        window = self.wiener_win_len or nb_frames
        y = None
        for start in range(0, nb_frames, window):
            spectra = kernels.stft(x, self.n_fft, self.n_hop, start, min(start + window, nb_frames))
            X = kernels.magnitude(spectra, self.nb_channels == 1)
            with nn.context_scope(self.context), nn.auto_forward(False):
                v = self._decode(X, features, start)
            if y is None or y.shape[2] != v.shape[1]:
                y = np.empty((len(self.sources),) + spectra.shape, np.complex64)  # the memory of all windows
            filtering.separate(v, spectra, self.niter, self.softmask, self.residual, out=y)
            del spectra, X, v  # before the next ones come
            yield y.mean(axis=1, keepdims=True) if nb_channels < len(x) else y

    def _encode(self, x):
        """{target: (its model, features of all frames)}."""
        audio = nn.Variable.from_numpy_array(x[None])
        X = functions.spectrogram(audio, self.n_fft, self.n_hop, center=True, mono=self.nb_channels == 1)
        X.forward()
        X = X.get_unlinked_variable(need_grad=False)  # an input of the graphs to come
        features = {}
        for one in self.models:
            if any(target in self.targets for target in one.targets):
                hidden = one.encode(X)
                nn.forward_all(hidden, clear_buffer=True)
                for target, h in zip(one.targets, hidden):
                    features[target] = one, h.data.get_data("r", np.float32).copy()
                del hidden
        del audio, X
        nnabla_ext.cpu.clear_memory_cache()  # the spectrogram's memory: it is the largest, and comes only once
        return features

    def _decode(self, X, features, start):
        """Estimates (nb_targets, window, nb_channels, nb_bins) of the frames X of the mixture, from `start` on."""
        v = np.empty((len(self.targets), len(X)) + X.shape[2:], np.float32)
        mixture = nn.Variable.from_numpy_array(X)
        for estimate, target in zip(v, self.targets):
            one, h = features[target]
            Y = one.decode(target, nn.Variable.from_numpy_array(h[start : start + len(X)]), mixture)
            Y.forward(clear_buffer=True)
            estimate[...] = Y.data.get_data("r", np.float32)[:, 0]
        return v ** np.float32(self.alpha) if self.alpha != 1 else v


class OverlapAdd:
    """The inverse of the centred STFT, for frames that come in pieces: torch.istft's formula.

    Each frame is windowed once more, and the sum divided by that of the squared windows.
    """

    def __init__(self, n_fft, n_hop, nb_timesteps):
        self.n_fft, self.n_hop, self.nb_timesteps = n_fft, n_hop, nb_timesteps
        self.position = -(n_fft // 2)  # of the first sample that is not finished
        self.open = None

    def __call__(self, y):
        """Add the next frames (nb_sources, nb_channels, nb_frames, nb_bins); yields start and finished samples."""
        size = (y.shape[2] - 1) * self.n_hop + self.n_fft
        sums, envelope = np.zeros(y.shape[:2] + (size,), np.float32), np.zeros(size, np.float32)
        if self.open is not None:
            sums[..., : self.open[1].size], envelope[: self.open[1].size] = self.open
        kernels.overlap_add(y, self.n_fft, self.n_hop, sums, envelope)
        done = min(size, y.shape[2] * self.n_hop)
        self.open = sums[..., done:].copy(), envelope[done:].copy()
        yield from self._finish(sums[..., :done], envelope[:done])

    def end(self):
        """Yields what the last frames leave."""
        yield from self._finish(*self.open)

    def _finish(self, sums, envelope):
        start = self.position
        self.position += envelope.size
        cut = slice(max(0, -start), max(0, min(envelope.size, self.nb_timesteps - start)))
        if cut.start < cut.stop:
            sums = sums[..., cut]
            sums /= np.maximum(envelope[cut], 1e-11)  # where no frame reaches: zeros
            yield start + cut.start, sums


def _check_samples(samples, name):
    # squares of larger ones leave single precision: the stems would not be finite
    if not np.abs(samples).max(initial=0) <= 1e9:
        raise UsageError(f"{name} has samples that are not finite, or larger than 1e9")


def _resample(audio, rate, new_rate, nb_timesteps=None):
    """Audio (nb_channels, …) at another rate; cut or filled with zeros to `nb_timesteps` if given."""
    if rate != new_rate:
        audio = soxr.resample(np.array(audio.T, order="C"), rate, new_rate).T
        if nb_timesteps is not None:
            audio = np.pad(audio[:, :nb_timesteps], ((0, 0), (0, max(0, nb_timesteps - audio.shape[1]))))
    return np.ascontiguousarray(audio)


# ------------------------------------------------------------------------------------------ files

BLOCK = 2**18  # samples that are read, resampled or written at a time
# How libsndfile notes that a header promises more than the file holds, and that an Ogg ends within a page
TRUNCATED = ("should be", "Last page lacks an end-of-stream bit", "Junk after the last page")


def _soundfile_blocks(path, file, first, count):
    """Blocks (samples, nb_channels) of an open sound file, from sample `first` on; count None: to the end."""
    with file:
        first = min(first, file.frames)
        count = file.frames - first if count is None else min(count, file.frames - first)
        file.seek(first)
        while count > 0:
            block = file.read(min(BLOCK, count), dtype="float32", always_2d=True)
            if not len(block):  # formats that tell only then
                raise UsageError(f"{path} is truncated")
            yield block
            count -= len(block)


def _ffmpeg_blocks(path, nb_channels, first, count):
    trim = f"atrim=start_sample={first}" + ("" if count is None else f":end_sample={first + count}")
    # -xerror: a damaged file is no input, rather than one with gaps
    command = ["ffmpeg", "-v", "error", "-xerror", "-nostdin", "-i", f"file:{path}", "-map", "0:a:0", "-af", trim]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen([*command, "-f", "f32le", "-"], stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        while data := process.stdout.read(BLOCK * nb_channels * 4):
            whole = len(data) // (4 * nb_channels) * (4 * nb_channels)
            yield np.frombuffer(data[:whole], "<f4").reshape(-1, nb_channels)
        if process.wait():
            errors.seek(0)
            raise UsageError(f"cannot decode {path}: {_last_line(errors.read(), path)}")


def _is_file_name(name):
    return bool(name) and name == Path(name).name and "\0" not in name


@contextlib.contextmanager
def _no_stderr():
    """What libmpg123 has to say about a damaged file, it writes there by itself."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def _is_guessed(path):
    """Whether an mp3 does not say how long it is. libsndfile then guesses, and stops there, wherever that is."""
    with open(path, "rb") as stream:
        header = stream.read(10)
        if header.startswith(b"ID3"):  # tags come first, with a length of seven bits per byte
            stream.seek(10 + sum((byte & 127) << shift for byte, shift in zip(header[6:], (21, 14, 7, 0))))
            header = b""
        frame = header + stream.read(4096)
    return not any(name in frame for name in (b"Xing", b"Info", b"VBRI"))


def _last_line(output, path):
    line = (output.decode(errors="replace").strip().splitlines() or ["no reason given"])[-1]
    return line.replace(f"file:{path}: ", "")


def _open_audio(path, start, duration):
    """Sample rate, channels and blocks of an audio file, by soundfile or else by ffmpeg."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    ffmpeg = shutil.which("ffmpeg") is not None and shutil.which("ffprobe") is not None

    def span(rate):
        return round(start * rate), None if duration is None else round(duration * rate)

    try:
        with _no_stderr():
            file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        if not ffmpeg:
            raise UsageError(f"cannot read {path} ({error.error_string}), and there is no ffmpeg to try") from None
    else:
        if any(sign in file.extra_info for sign in TRUNCATED):
            raise UsageError(f"{path} is truncated")
        if not (ffmpeg and file.format == "MP3" and _is_guessed(path)):
            return file.samplerate, file.channels, _soundfile_blocks(path, file, *span(file.samplerate))
    command = ["ffprobe", "-v", "error", "-select_streams", "a:0", "-show_entries", "stream=sample_rate,channels"]
    result = subprocess.run([*command, "-of", "json", f"file:{path}"], capture_output=True)
    streams = json.loads(result.stdout or "{}").get("streams")
    if not streams or not int(streams[0].get("channels", 0)):
        reason = f": {_last_line(result.stderr, path)}" if result.stderr else ""
        raise UsageError(f"{path} is not audio{reason}")
    rate, nb_channels = int(streams[0]["sample_rate"]), int(streams[0]["channels"])
    return rate, nb_channels, _ffmpeg_blocks(path, nb_channels, *span(rate))


class RawAudio:
    """Float32 samples in a file, (nb_timesteps, nb_channels): what memory need not hold."""

    def __init__(self, path, rate, nb_channels):
        self.path, self.rate, self.nb_channels = path, rate, nb_channels
        self.nb_timesteps, self.peak = 0, 0.0
        self.stream = open(path, "w+b")  # noqa: SIM115, closed by close()

    def append(self, block):
        """Add samples (n, nb_channels)."""
        self.nb_timesteps += len(block)
        self.peak = max(self.peak, float(np.abs(block).max(initial=0)))
        self.stream.write(np.ascontiguousarray(block, np.float32).data)

    def read(self, start, stop):
        """Samples (nb_channels, stop − start)."""
        self.stream.seek(start * self.nb_channels * 4)
        samples = np.fromfile(self.stream, np.float32, (stop - start) * self.nb_channels)
        return np.ascontiguousarray(samples.reshape(-1, self.nb_channels).T)

    def blocks(self):
        for start in range(0, self.nb_timesteps, BLOCK):
            yield self.read(start, min(start + BLOCK, self.nb_timesteps)).T

    def resampled(self, rate, nb_timesteps):
        """The same at another rate, `nb_timesteps` long; replaces this one."""
        other = RawAudio(self.path.with_suffix(".resampled"), rate, self.nb_channels)
        for block in _resampled(self.blocks(), self.rate, rate, self.nb_channels):
            other.append(block[: nb_timesteps - other.nb_timesteps])
        while other.nb_timesteps < nb_timesteps:
            other.append(np.zeros((min(BLOCK, nb_timesteps - other.nb_timesteps), self.nb_channels), np.float32))
        self.close()
        return other

    def close(self):
        self.stream.close()
        self.path.unlink()


def _resampled(blocks, rate, new_rate, nb_channels):
    if rate == new_rate:
        yield from blocks
        return
    resampler = soxr.ResampleStream(rate, new_rate, nb_channels, dtype="float32")
    for block in blocks:
        yield resampler.resample_chunk(np.array(block, order="C"))
    yield resampler.resample_chunk(np.zeros((0, nb_channels), np.float32), last=True)


def decode(path, rate, folder, start=0.0, duration=None):
    """Decode a recording into `folder`, at the given rate.

    Returns:
        RawAudio at `rate`; the recording's own rate; its number of samples at that rate
    Raises:
        UsageError: not audio, truncated, empty, or with samples that are not finite (or huge).
    """
    own_rate, nb_channels, blocks = _open_audio(path, start, duration)
    audio, nb_timesteps = RawAudio(folder / "input", rate, nb_channels), 0

    def counted():
        nonlocal nb_timesteps
        for block in blocks:
            _check_samples(block, path)
            nb_timesteps += len(block)
            yield block

    try:
        for block in _resampled(counted(), own_rate, rate, nb_channels):
            audio.append(block)
    except soundfile.LibsndfileError as error:
        raise UsageError(f"cannot decode {path}, it is damaged or truncated: {error.error_string}") from None
    if not nb_timesteps:
        raise UsageError(f"{path} has no samples" + (f" after {start} s" if start else ""))
    return audio, own_rate, nb_timesteps


def separate_file(
    separator, path, outdir, start=0.0, duration=None, aggregate=None, ext="wav", subtype=None, quiet=True
):
    """Write the stems of a recording to <outdir>/<stem>.<ext>, at its own rate and of its length.

    Memory does not grow with the recording. Stems that would clip in an integer format are all scaled down alike.

    Args:
        aggregate: {name: stems that are added to make it}; None: the separator's stems
        subtype: "16", "24" or "float"; None: float for wav, 24 for flac
    Returns:
        the factor that the stems are scaled with
    Raises:
        UsageError: the recording cannot be used; nothing is written.
    """
    aggregate = aggregate or {name: [name] for name in separator.sources}
    subtype = {"16": "PCM_16", "24": "PCM_24", "float": "FLOAT"}[subtype or ("float" if ext == "wav" else "24")]
    is_new = not Path(outdir).exists()
    outdir = utils.writable_folder(outdir)
    try:
        with tempfile.TemporaryDirectory(prefix=".separate.", dir=outdir) as folder:
            stems = _raw_stems(separator, Path(path), Path(folder), start, duration, aggregate, quiet)
            peak = max(stem.peak for stem in stems)
            factor = 0.999 / peak if peak > 0.999 and subtype != "FLOAT" else 1.0
            with contextlib.ExitStack() as renamed_together:
                for name, stem in zip(aggregate, stems):
                    temporary = renamed_together.enter_context(utils.atomic_path(outdir / f"{name}.{ext}"))
                    _write_audio(temporary, stem, ext.upper(), subtype, factor)
                    stem.close()
    finally:
        if is_new and not any(outdir.iterdir()):
            outdir.rmdir()
    return factor


def _raw_stems(separator, path, folder, start, duration, aggregate, quiet):
    """The stems of a recording at its own rate, a RawAudio in `folder` for each of `aggregate`."""
    audio, rate, nb_timesteps = decode(path, separator.sample_rate, folder, start, duration)
    stems = [RawAudio(folder / f"stem{k}", audio.rate, audio.nb_channels) for k in range(len(aggregate))]
    parts = [[separator.sources.index(name) for name in names] for names in aggregate.values()]
    with tqdm(total=round(audio.nb_timesteps / audio.rate), desc=path.name, unit="s", disable=quiet) as bar:
        for _, block in separator.stream(audio.read, audio.nb_channels, audio.nb_timesteps):
            for stem, part in zip(stems, parts):
                stem.append(block[part].sum(axis=0).T)
            bar.update(round(stems[0].nb_timesteps / audio.rate) - bar.n)
    audio.close()
    return [stem.resampled(rate, nb_timesteps) for stem in stems] if rate != audio.rate else stems


def _write_audio(path, audio, form, subtype, factor):
    if form == "WAV" and audio.nb_timesteps * audio.nb_channels * 4 > 2**32 - 2**16:  # WAV counts bytes in 32 bits
        form = "RF64"
    try:
        with soundfile.SoundFile(path, "w", audio.rate, audio.nb_channels, subtype, format=form) as file:
            for block in audio.blocks():
                file.write(block * np.float32(factor) if factor < 1 else block)
    except soundfile.LibsndfileError as error:
        raise UsageError(f"cannot write {form.lower()} of {audio.nb_channels} channels: {error.error_string}") from None


# ------------------------------------------------------------------------------------ command line


def _recordings(inputs):
    """Input files, those of folders included, and a name for each: its own without the ending, if that is unique."""
    paths = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(file for file in path.glob("[!.]*") if file.suffix.lower() in AUDIO_FILES)
            if not found:
                raise UsageError(f"no audio files in the folder {path}")
            paths += found
        else:
            paths.append(path)
    count = collections.Counter(path.stem for path in paths)
    names = [path.stem if count[path.stem] == 1 else path.name for path in paths]
    if repeated := [name for name, number in collections.Counter(names).items() if number > 1]:
        raise UsageError(f"several inputs named {repeated[0]}: separate them with an --outdir each")
    return list(zip(paths, names))


def checked_aggregate(separator, text):
    """What --aggregate says, {name: stems to add up}, or None if it is not given.

    Raises:
        UsageError: it does not fit the separator; or, for both commands alike, a soft mask of a single target, which
            would be all of the mixture (the class computes it, as the reference does).
    """
    if separator.softmask and len(separator.targets) == 1:
        raise UsageError("--softmask shares the mixture out among targets: it needs two of them")
    if not text:
        return None
    sources = separator.sources
    try:
        aggregate = json.loads(text)
        fits = all(names and set(names) <= set(sources) and _is_file_name(name) for name, names in aggregate.items())
    except (ValueError, AttributeError, TypeError):
        fits = False
    if not fits or not aggregate:
        example = json.dumps({"accompaniment": sources[1:]})
        raise UsageError(f"--aggregate {text}: expected stems ({', '.join(sources)}) by name, as {example}")
    return aggregate


@utils.command
def main(argv=None):
    args = separate_parser().parse_args(argv)
    if args.ext == "flac" and args.subtype == "float":
        raise UsageError("flac holds integers: --subtype 16 or 24")
    recordings = _recordings(args.inputs)
    kernels.set_threads(args.threads)
    utils.set_plain(args.plain)
    separator = Separator.load(
        args.model,
        args.targets,
        model_dir=args.model_dir,
        quiet=args.quiet,
        niter=args.niter,
        softmask=args.softmask,
        alpha=args.alpha,
        residual=args.residual or False,
        wiener_win_len=args.wiener_win_len or None,
        context=args.context,
        device_id=args.device_id,
        segment=args.segment,
    )
    aggregate = checked_aggregate(separator, args.aggregate)
    failed = 0
    for path, name in recordings:
        outdir = Path(args.outdir, name) if args.outdir else Path(f"{name}_{Path(args.model).resolve().stem}")
        try:
            factor = separate_file(
                separator, path, outdir, args.start, args.duration, aggregate, args.ext, args.subtype, args.quiet
            )
        except UsageError as error:
            print(f"separate.py: {error}", file=sys.stderr)
            failed += 1
            continue
        if not args.quiet:
            print(f"{path} -> {outdir}")
        if factor < 1:
            print(
                f"{path}: stems scaled by {factor:.3f}, or they would clip; --subtype float keeps levels",
                file=sys.stderr,
            )
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    main()
