"""A stand-in for torchaudio, over soundfile: what openunmix 1.3.0 needs of it to be imported and to read WAV.

torchaudio has no release for the torch that the reference runs on. This folder goes on ``sys.path`` before
openunmix is imported.
"""

from types import SimpleNamespace

import torch


def get_audio_backend():
    return "soundfile"


def set_audio_backend(backend):
    pass


def info(path):
    import soundfile  # where no file is read, it may be missing

    found = soundfile.info(path)
    return SimpleNamespace(sample_rate=found.samplerate, num_frames=found.frames, num_channels=found.channels)


def load(path, frame_offset=0, num_frames=-1):
    """Samples (nb_channels, nb_timesteps) float32, and their rate."""
    import soundfile

    samples, rate = soundfile.read(path, frames=num_frames, start=frame_offset, dtype="float32", always_2d=True)
    return torch.from_numpy(samples.T.copy()), rate


def save(path, src, sample_rate):
    import soundfile

    soundfile.write(path, src.T.numpy(), sample_rate)
