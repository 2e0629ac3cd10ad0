"""The validation loss of a trained model, by openunmix 1.3.0: of its folder, exported to torch.

    python validate.py MODEL_FOLDER TARGET SONG_FOLDER...

Prints the mean over songs of the mean squared error, of spectrograms of whole songs with their own mixtures.
"""

import json
import sys
from pathlib import Path

import soundfile
import torch
from openunmix import transforms, utils

folder, target, *songs = sys.argv[1:]
config = json.loads(Path(folder, "separator.json").read_text())
network = utils.load_target_models(target, folder)[target].eval()
stft, _ = transforms.make_filterbanks(config["nfft"], config["nhop"], center=False, sample_rate=config["sample_rate"])
spectrogram = torch.nn.Sequential(stft, transforms.ComplexNorm(mono=config["nb_channels"] == 1))
losses = []
with torch.no_grad():
    for song in songs:
        x, y = (
            spectrogram(torch.as_tensor(soundfile.read(Path(song, f"{name}.wav"), dtype="float32")[0].T[None]))
            for name in ("mixture", target)
        )
        losses.append(torch.nn.functional.mse_loss(network(x), y).item())
print(sum(losses) / len(losses))
