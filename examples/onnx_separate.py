"""Separate a song with an .onnx file of export.py, on any Python from 3.9 on; nothing else of this project is needed.

pip install onnxruntime numpy scipy soundfile
python onnx_separate.py model.onnx song.wav stems
"""

import argparse
import json
import math
import pathlib

import numpy as np
import onnxruntime
import scipy.fft
import scipy.signal
import soundfile

EPS, FRAMES = 1e-10, 300  # of the Wiener filter: regularisation, frames that are filtered together


def transform(x, window, hop):
    """Audio (nb_channels, nb_timesteps), reflected at its ends, to its STFT (nb_frames, nb_channels, nb_bins)."""
    half = len(window) // 2
    x = np.pad(np.pad(x, ((0, 0), (0, max(0, half + 1 - x.shape[1])))), ((0, 0), (half, half)), mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(x, len(window), axis=1)[:, ::hop]
    return scipy.fft.rfft(frames * window).swapaxes(0, 1)


def add(Y, window, hop, y, squares):
    """The way back: frames are windowed once more and added to y, to be divided by the sum of the squared windows."""
    for k, frame in enumerate(scipy.fft.irfft(Y.swapaxes(0, 1), len(window)) * window):
        y[..., k * hop : k * hop + len(window)] += frame
        squares[k * hop : k * hop + len(window)] += window**2


def filtered(y, X, niter):
    """The multichannel Wiener filter: estimates y (nb_sources, …), and the mixture X (nb_frames, 2, nb_bins)."""
    y, scale = y.astype(np.complex128), max(1, np.abs(X).max() / 10) ** 2
    for _ in range(niter):
        p = np.mean(np.abs(y) ** 2, axis=2)  # power, and spatial covariance
        R = np.einsum("jtaf,jtbf->jabf", y, y.conj()) / (EPS * scale + p.sum(axis=1))[:, None, None]
        ((a, b), (c, d)) = np.einsum("jtf,jabf->abtf", p, R) + math.sqrt(EPS) * scale * np.eye(2)[:, :, None, None]
        z = np.stack([d * X[:, 0] - b * X[:, 1], a * X[:, 1] - c * X[:, 0]]) / (a * d - b * c)
        y = p[:, :, None] * np.einsum("jabf,btf->jtaf", R, z)
    return y


def main():
    parser = argparse.ArgumentParser()
    for name in ("model", "song", "folder"):
        parser.add_argument(name)
    parser.add_argument("--niter", type=int, default=1, help="iterations of the Wiener filter")
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    config = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    song, rate = soundfile.read(args.song, dtype="float32", always_2d=True)
    if song.shape[1] > 2:
        raise SystemExit(f"{args.song} has {song.shape[1]} channels: expected one or two")
    up, down = (int(value) // math.gcd(rate, int(config["sample_rate"])) for value in (config["sample_rate"], rate))
    x = scipy.signal.resample_poly(np.repeat(song, 3 - song.shape[1], axis=1).T, up, down, axis=1)
    window, hop = scipy.signal.get_window("hann", config["n_fft"]).astype(np.float32), config["n_hop"]
    X = transform(x, window, hop)
    magnitude = np.abs(X) if config["nb_channels"] == 2 else np.abs(X).mean(axis=1, keepdims=True)
    estimates = session.run(config["targets"], {"mixture": magnitude[:, None]})
    y = np.zeros((len(estimates), 2, len(X) * hop + len(window)), np.float32)
    squares = np.zeros(y.shape[2], np.float32)
    for start in range(0, len(X), FRAMES):
        part = slice(start, start + FRAMES)
        Y = np.stack([v[part, 0] for v in estimates]) * np.exp(1j * np.angle(X[part]))
        Y = filtered(Y, X[part], args.niter) if len(Y) > 1 else Y
        add(Y, window, hop, y[:, :, start * hop :], squares[start * hop :])
    y = (y / np.maximum(squares, 1e-11))[:, :, len(window) // 2 :][:, :, : x.shape[1]]
    folder = pathlib.Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for target, stem in zip(config["targets"], y):
        stem = scipy.signal.resample_poly(stem, down, up, axis=1)[:, : len(song)]
        stem = stem if song.shape[1] == 2 else stem.mean(axis=0, keepdims=True)
        soundfile.write(folder / f"{target}.wav", stem.T, rate, subtype="FLOAT")


if __name__ == "__main__":
    main()
