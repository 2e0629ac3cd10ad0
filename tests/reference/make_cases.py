"""Makes the files that tests/test_reference.py compares with, by the reference itself: openunmix 1.3.0.

    python make_cases.py OUT_DIR [--golden] [--root FOLDER]

Runs in an environment with torch, openunmix, musdb, soundfile and scikit-learn (see `make reference`).
With --golden, tiny cases and the values that are committed as tests/data/golden_*.npz; without, networks of
realistic size for a live comparison. --root adds the dataset statistics of a folder of MUSDB18 in WAV.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile
import torch
from sklearn.preprocessing import StandardScaler
from torch.optim import swa_utils

sys.path.insert(0, str(Path(__file__).parent))  # our stand-in for torchaudio, before openunmix imports it

from openunmix import data, model, transforms, utils
from songs import RATE, noise_songs

NB_SAMPLES, NB_STEPS = 2, 3
LR, WEIGHT_DECAY = 1e-3, 1e-5

CASES = {  # channels of the model, unidirectional, cropped to max_bin, LSTM layers
    "stereo": (2, False, False, 3),
    "stereo-cropped": (2, False, True, 3),
    "stereo-unidirectional": (2, True, False, 3),
    "stereo-unidirectional-cropped": (2, True, True, 3),
    "mono": (1, False, False, 3),
    "mono-cropped": (1, False, True, 3),
    "mono-unidirectional": (1, True, False, 3),
    "mono-unidirectional-cropped": (1, True, True, 3),
    "stereo-cropped-1layer": (2, False, True, 1),
    "mono-unidirectional-1layer": (1, True, False, 1),
}
# n_fft, n_hop, hidden_size, nb_timesteps: taken in turn
GOLDEN_SIZES = [(64, 16, 8, 240), (64, 32, 10, 416), (128, 32, 8, 448)]
LIVE_SIZES = [(4096, 1024, 64, 44100), (2048, 512, 32, 44100), (4096, 1024, 32, 66150)]


# ----------------------------------------------------------------------------------- network


def music(rng, nb_timesteps):
    """Mixture and target (NB_SAMPLES, 2, nb_timesteps): chords with an envelope, over noise.

    Like in music, high frequencies are weak; a narrow band is near zero. (A wide one would drown the
    comparison in torch's own rounding: the bins of its STFT have an error that belongs to the loudest of
    them, and the network scales each bin to unit variance.) The last item ends in digital silence.
    """
    t = np.arange(nb_timesteps)
    shape = (NB_SAMPLES, 2, nb_timesteps)
    pitches = 2 * np.pi * rng.uniform(0.005, 0.05, (NB_SAMPLES, 1, 4, 1))
    partials = sum(np.sin(k * pitches * t + rng.uniform(0, 6, (NB_SAMPLES, 2, 4, 1))) / k for k in (1, 2, 3, 5, 8))
    envelope = np.exp(-((t * rng.uniform(3, 6) / nb_timesteps) % 1) * 3)
    target = partials.sum(axis=2) * envelope
    frequencies = np.linspace(0, 1, nb_timesteps // 2 + 1)
    spectrum = np.fft.rfft(rng.normal(size=shape)) / (frequencies + 0.05) * (np.abs(frequencies - 0.6) > 0.002)
    noise = np.fft.irfft(spectrum, nb_timesteps)
    mixture = target / target.std() + noise / noise.std()
    for audio in (mixture, target):
        audio *= 0.1 / audio.std()
        audio[-1, :, -nb_timesteps // 5 :] = 0
    return tuple(np.clip(np.round(audio * 32768) / 32768, -1, 1).astype(np.float32) for audio in (mixture, target))


def make_used(network, generator):
    """Replace the zeros and ones of a new network, which would hide a parameter that is mixed up or left out."""
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if name.startswith(("bn", "output")) and tensor.ndim:
                tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
                if name.endswith("running_var"):
                    tensor.clamp_(min=0.2)


def in_our_layout(spectrogram):
    """(nb_samples, nb_channels, nb_bins, nb_frames) to (nb_frames, nb_samples, nb_channels, nb_bins)."""
    return spectrogram.detach().permute(3, 0, 1, 2).numpy()


def arrays(prefix, tensors):
    return {f"{prefix}/{name}": tensor.detach().numpy().copy() for name, tensor in tensors.items()}


def make_case(seed, nb_channels, unidirectional, cropped, nb_layers, n_fft, n_hop, hidden_size, nb_timesteps):
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    x, y = (np.stack(audio) for audio in zip(*(music(rng, nb_timesteps) for _ in range(NB_STEPS))))
    encoder = torch.nn.Sequential(
        transforms.make_filterbanks(n_fft=n_fft, n_hop=n_hop)[0], model.ComplexNorm(mono=nb_channels == 1)
    )
    scaler = StandardScaler()
    for excerpt in x:
        for item in encoder(torch.from_numpy(excerpt)).mean(1).permute(0, 2, 1):
            scaler.partial_fit(item.numpy())
    input_mean, input_scale = scaler.mean_, floored(scaler.scale_)

    config = {
        "nb_channels": nb_channels,
        "hidden_size": hidden_size,
        "nb_layers": nb_layers,
        "unidirectional": unidirectional,
        "max_bin": utils.bandwidth_to_max_bin(RATE, n_fft, 16000).item() if cropped else None,
    }
    network = model.OpenUnmix(nb_bins=n_fft // 2 + 1, input_mean=input_mean, input_scale=input_scale, **config)
    network.lstm.dropout = 0
    make_used(network, generator)
    network.train()
    case = {
        "config": np.array(json.dumps({**config, "n_fft": n_fft, "n_hop": n_hop})),
        "lr": LR,
        "weight_decay": WEIGHT_DECAY,
        "x": x,
        "y": y,
        "input_mean": input_mean,
        "input_scale": input_scale,
        **arrays("initial", network.state_dict()),
    }

    optimizer = torch.optim.Adam(network.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    for step in range(NB_STEPS):
        optimizer.zero_grad()
        X, Y = encoder(torch.from_numpy(x[step])), encoder(torch.from_numpy(y[step]))
        Y_hat = network(X)
        loss = torch.nn.functional.mse_loss(Y_hat, Y)
        loss.backward()
        if step == 0:
            case["estimate"], case["loss"] = in_our_layout(Y_hat), loss.item()
            case.update(arrays("gradient", {name: p.grad for name, p in network.named_parameters()}))
            case.update(arrays("running", {n: b for n, b in network.named_buffers() if "running" in n}))
        # The batch normalisation undoes any shift of the input, so this gradient is zero; computed, it is
        # rounding noise, of which Adam makes full steps in random directions. Both sides take the true value.
        network.input_mean.grad.zero_()
        optimizer.step()
    case.update(arrays("trained", network.state_dict()))
    network.eval()
    case["trained_estimate"] = in_our_layout(network(encoder(torch.from_numpy(x[0]))))
    return case


# -------------------------------------------------------------------------------- statistics


def floored(std):
    return np.maximum(std, 1e-4 * np.max(std))


def statistics(root, n_fft, n_hop):
    """Mean and standard deviation per bin, as get_statistics of the reference's scripts/train.py."""
    encoder = torch.nn.Sequential(transforms.make_filterbanks(n_fft=n_fft, n_hop=n_hop)[0], model.ComplexNorm())
    dataset = data.MUSDBDataset(root=root, is_wav=True, split="train", seq_duration=None, samples_per_track=1)
    scaler = StandardScaler()
    for index in range(len(dataset)):
        mixture, _ = dataset[index]
        scaler.partial_fit(encoder(mixture[None]).mean(1)[0].T.numpy())
    assert scaler.n_samples_seen_ > 0, f"no songs in {root}"
    return {"mean": scaler.mean_, "std": floored(scaler.scale_), "n_fft": n_fft, "n_hop": n_hop}


def noise_statistics():
    with tempfile.TemporaryDirectory() as root:
        for number, song in enumerate(noise_songs()):
            folder = Path(root, "train", f"song {number}")
            folder.mkdir(parents=True)
            for name in ("mixture", "vocals", "drums", "bass", "other"):
                soundfile.write(folder / f"{name}.wav", song, RATE, subtype="PCM_16")
        return statistics(root, n_fft=1024, n_hop=256)


# ----------------------------------------------------------------------------------- helpers


def learning_rates(losses, lr, factor, patience):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=factor, patience=patience, cooldown=10)
    rates = []
    for loss in losses:
        scheduler.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def early_stops(losses, patience):
    """Per epoch: is the loss the best so far, and would training stop?"""
    stopping = utils.EarlyStopping(patience=patience)
    epochs = []
    for loss in losses:
        before = stopping.best
        stop = stopping.step(loss)
        epochs.append((stopping.best != before, stop))
    return epochs


def averages(values, decay):
    """After each of values (nb_steps, …), torch's moving average, from zero on, corrected as Adam corrects moments."""
    network = torch.nn.ParameterList([torch.zeros(values.shape[1:], dtype=torch.float64)])
    average = swa_utils.AveragedModel(network, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
    average.update_parameters(network)  # which copies the first, the zeros
    results = []
    for step, value in enumerate(values, 1):
        network[0].data.copy_(torch.from_numpy(value))
        average.update_parameters(network)
        results.append(average.module[0].detach().numpy() / (1 - decay**step))
    return np.stack(results)


def helpers():
    rng = np.random.default_rng(0)
    # Plateaus: each is lower than the last by less or by more than the scheduler's threshold, a relative 1e-4, and
    # in it losses repeat, or are higher. Between them two large falls, since a threshold could be meant absolutely.
    level, losses = 300.0, []
    while len(losses) < 3000:
        above = rng.choice([0, 1e-5, 1e-3], rng.choice([1, 2, 3, 10, 30, 150])) * rng.random()
        losses.extend(level * (1 + above))
        level *= 1 - rng.choice([0.5e-4, 0.9e-4, 1.1e-4, 2e-4])
        if len(losses) // 1000 > (len(losses) - len(above)) // 1000:
            level /= 100
    losses = np.array(losses[:3000])
    schedules = [(1e-3, 0.3, 80), (1e-3, 0.3, 8), (1e-2, 0.7, 20), (1e-3, 0.5, 0), (1e-3, 0.3, 2)]
    patiences = [140, 20, 12, 1]
    decays, values = [0.5, 0.9, 0.999], np.random.default_rng(1).normal(2, 1, (12, 7)).astype(np.float32)
    bands = [
        (rate, n_fft, bandwidth)
        for rate in (44100, 48000, 32000, 22050, 16000, 8000)
        for n_fft in (4096, 2048, 1000)
        for bandwidth in (0, 100, 4000, 8000, 15999.9, 16000, 22050, 30000)
    ]
    return {
        "losses": losses,
        "schedules": np.array(schedules),
        "learning_rates": np.array([learning_rates(losses, *schedule) for schedule in schedules]),
        "patiences": np.array(patiences),
        "early_stops": np.array([early_stops(losses, patience) for patience in patiences]),
        "values": values,
        "decays": np.array(decays),
        "averages": np.stack([averages(values, decay) for decay in decays]),
        "bands": np.array(bands),
        "max_bins": np.array([utils.bandwidth_to_max_bin(*band) for band in bands]),
    }


def packed_lstm(nb_inputs, hidden_size, lengths):
    """Recordings of several lengths through one LSTM, as torch does it: a packed sequence."""
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(nb_inputs, hidden_size, num_layers=3, bidirectional=True)
    recordings = [torch.randn(length, nb_inputs) for length in lengths]
    with torch.no_grad():
        y, _ = lstm(torch.nn.utils.rnn.pack_sequence(recordings, enforce_sorted=False))
    y = torch.nn.utils.rnn.unpack_sequence(y)
    arrays = {**lstm.state_dict(), **{f"x{k}": x for k, x in enumerate(recordings)}}
    return {name: array.numpy() for name, array in [*arrays.items(), *((f"y{k}", y) for k, y in enumerate(y))]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--golden", action="store_true", help="the small files that are committed")
    parser.add_argument("--root", help="folder of MUSDB18 in WAV whose statistics are wanted too")
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)

    prefix, sizes = ("golden_", GOLDEN_SIZES) if args.golden else ("", LIVE_SIZES)

    def save(name, content):
        np.savez_compressed(args.out_dir / f"{prefix}{name}.npz", **content)

    for seed, (name, settings) in enumerate(CASES.items()):
        save(f"case_{name}", make_case(seed, *settings, *sizes[seed % len(sizes)]))
    save("packed", packed_lstm(5, 6, [4, 1, 9, 9, 2]) if args.golden else packed_lstm(64, 32, [43, 500, 87, 1]))
    if args.golden:
        save("statistics", noise_statistics())
        save("helpers", helpers())
    if args.root:
        save("statistics", {**statistics(args.root, n_fft=4096, n_hop=1024), "root": str(Path(args.root).resolve())})


if __name__ == "__main__":
    main()
