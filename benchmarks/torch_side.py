"""torch's side of the measurements: openunmix, in the environment of tests/reference."""

import argparse
import contextlib
import functools
import json
import multiprocessing
import runpy
import sys
import time
from pathlib import Path

import openunmix.utils
import torch
import work
from openunmix.data import load_datasets
from openunmix.model import OpenUnmix
from openunmix.transforms import ComplexNorm, make_filterbanks
from openunmix.utils import load_separator
from torch.nn.functional import mse_loss


def make_net(input_mean=None, input_scale=None):
    sizes = {"nb_channels": 2, "hidden_size": work.HIDDEN_SIZE, "max_bin": work.MAX_BIN}
    return OpenUnmix(nb_bins=work.N_FFT // 2 + 1, input_mean=input_mean, input_scale=input_scale, **sizes)


def make_encoder():
    stft, _ = make_filterbanks(work.N_FFT, work.N_HOP, sample_rate=work.RATE)
    return torch.nn.Sequential(stft, ComplexNorm(mono=False))


def use(clock, threads, device="cpu", tf32=True):
    """The device; without `tf32`, cuDNN does not round to 10 bits, as it does by default."""
    torch.set_num_threads(threads or torch.get_num_threads())
    if device != "cpu":
        clock.wait = torch.cuda.synchronize
        torch.backends.cudnn.allow_tf32 = tf32
    return torch.device(device)


def make_training(clock, nb_samples, seconds, threads, **options):
    device = use(clock, threads, **options)
    encoder = make_encoder().to(device)
    x, y = (torch.from_numpy(work.audio(nb_samples, seconds, seed)) for seed in (1, 2))
    net = make_net().to(device)
    return net, torch.optim.Adam(net.parameters(), lr=work.LR, weight_decay=work.WEIGHT_DECAY), encoder, x, y


def train_step(net, optimizer, encoder, x, y):
    device = net.input_mean.device
    x, y = x.to(device), y.to(device)
    optimizer.zero_grad()
    loss = mse_loss(net(encoder(x)), encoder(y))
    loss.backward()
    optimizer.step()
    return loss.item()


def step(clock, nb_samples, seconds, warm_up, repeat, threads, **options):
    """Training steps as openunmix' scripts/train.py does them."""
    net, optimizer, encoder, x, y = make_training(clock, nb_samples, seconds, threads, **options)

    for i in range(warm_up + repeat):
        if i == warm_up:
            clock.times.clear()
        clock("step", train_step, net, optimizer, encoder, x, y)


def functions(clock, nb_samples, seconds, warm_up, repeat, threads, **options):
    """Each function alone, cut from OpenUnmix.forward, on inputs of the memory layout that it gets there."""
    net, optimizer, encoder, x, y = make_training(clock, nb_samples, seconds, threads, **options)
    x, y = (audio.to(net.input_mean.device) for audio in (x, y))
    X, Y = encoder(x).permute(3, 0, 1, 2), encoder(y)
    nb_frames, K = X.shape[0], work.HIDDEN_SIZE
    h = torch.randn(nb_frames, nb_samples, K, device=x.device)
    rows, bins = h.reshape(-1, K), torch.randn(nb_frames * nb_samples, 2 * X.shape[-1], device=x.device)

    def alone(name, function, *inputs):
        inputs = [x.detach().requires_grad_() for x in inputs]
        output = clock(f"{name} forward", function, *inputs)
        # not backward(): it would copy the gradients of inputs, which in the whole network are no leaves
        backward = functools.partial(torch.autograd.grad, output, inputs + list(net.parameters()), allow_unused=True)
        clock(f"{name} backward", backward, torch.ones_like(output))
        return output

    def reduce():
        h = (X[..., : work.MAX_BIN] + net.input_mean) * net.input_scale
        return net.fc1(h.reshape(-1, 2 * work.MAX_BIN))

    def mask(z):
        mixture = X.detach().clone()
        z = net.bn3(z).reshape(X.shape)
        z *= net.output_scale
        z += net.output_mean
        return (torch.relu(z) * mixture).permute(1, 2, 3, 0)

    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    for i in range(warm_up + repeat):
        if i == warm_up:
            clock.times.clear()
        clock("spectrogram forward", lambda: (encoder(x), encoder(y)))
        alone("input_affine fc1", reduce)
        alone("batch_normalization fc1", lambda h: torch.tanh(net.bn1(h)), rows)
        alone("lstm", lambda h: net.lstm(h)[0], h)
        alone("affine fc2", lambda *h: net.fc2(torch.cat(h, -1).reshape(-1, 2 * K)), h, h)
        alone("batch_normalization fc2", lambda h: torch.relu(net.bn2(h)), rows)
        alone("affine fc3", net.fc3, rows)
        Y_hat = alone("mask fc3", mask, bins)
        alone("squared_error", lambda Y_hat: mse_loss(Y_hat, Y), Y_hat)
        clock("Adam forward", optimizer.step)


def weights(clock, folder):
    """Models of all targets with random weights, as files that either side's separator loads."""
    torch.manual_seed(0)
    for target in work.TARGETS:
        net = make_net()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if "bn" in name or "output" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        save(net, folder, target)


def save(net, folder, target):
    """The files of a model, as openunmix' load_separator and our Separator.load read them."""
    folder, config = Path(folder), {"nfft": work.N_FFT, "nhop": work.N_HOP, "nb_channels": 2}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), folder / f"{target}.pth")
    (folder / f"{target}.json").write_text(json.dumps({"args": {**config, "hidden_size": work.HIDDEN_SIZE}}))
    (folder / "separator.json").write_text(json.dumps({**config, "sample_rate": work.RATE}))


def train(clock, songs, output, target, initial, dropout, lr, epochs, threads, python, perturb=0, **recipe):
    """A training as openunmix' scripts/train.py does it, but for where its excerpts come from.

    Without `initial`, a file of weights, it starts untrained. `perturb` multiplies each weight by a random factor
    of this distance from 1. Without epochs, the output is what it starts from. `python` is our interpreter.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(recipe["seed"])
    excerpts, encoder = work.ServedExcerpts(python, songs=songs, target=target, **recipe), make_encoder()
    if initial:
        net = make_net()
        net.load_state_dict(torch.load(initial))
    else:
        from make_cases import statistics  # not above: scikit-learn would count in the memory of other works

        found = statistics(songs, work.N_FFT, work.N_HOP)
        net = make_net(found["mean"], found["std"])
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 1 + perturb * torch.randn_like(parameter)
    net.lstm.dropout = dropout
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, weight_decay=work.WEIGHT_DECAY)

    def step(x, y):
        return train_step(net, optimizer, encoder, torch.from_numpy(x), torch.from_numpy(y[:, 0]))

    @torch.no_grad()
    def validate():
        net.eval()
        pairs = [(torch.from_numpy(x[None]), torch.from_numpy(y)) for x, y in excerpts.validation()]
        losses = [mse_loss(net(encoder(x)), encoder(y)).item() for x, y in pairs]
        net.train()
        return sum(losses) / len(losses)

    result = work.train(clock, excerpts, epochs, step, validate)
    save(net, output, target)
    return result


def evaluate(clock, arguments):
    """The command ``python -m openunmix.evaluate``; returns seconds per minute of audio and process, by part."""
    import museval  # not above, see train

    spent = {part: multiprocessing.Value("d", 0) for part in ("audio", "separation", "scoring")}  # of all processes
    load_separator, score, started = openunmix.utils.load_separator, museval.eval_mus_track, []

    def add(part, seconds):
        with spent[part].get_lock():
            spent[part].value += seconds

    def timed_load(*arguments, **options):  # the first thing that is done for a track
        started.append(time.perf_counter())
        return load_separator(*arguments, **options)

    def timed_score(track, *arguments, **options):
        scoring = time.perf_counter()
        scores = score(track, *arguments, **options)
        add("audio", track.duration)
        add("separation", scoring - started[-1])
        add("scoring", time.perf_counter() - scoring)
        return scores

    openunmix.utils.load_separator, museval.eval_mus_track = timed_load, timed_score
    sys.argv[1:] = arguments
    runpy.run_module("openunmix.evaluate", run_name="__main__", alter_sys=True)
    return {part: 60 * spent[part].value / spent["audio"].value for part in ("separation", "scoring")}


def read(clock, arguments, batch_size, nb_workers, nb_batches):
    """So many batches of a training set, given by options of openunmix' scripts/train.py, loaded as there."""
    parser = argparse.ArgumentParser()  # to which load_datasets adds those of the dataset
    for name, kind in {"dataset": str, "root": str, "target": str, "seed": int, "seq-dur": float}.items():
        parser.add_argument(f"--{name}", type=kind, default=42 if kind is int else None)
    sys.argv[1:] = arguments
    with contextlib.redirect_stdout(sys.stderr):
        dataset, _, _ = clock("open", load_datasets, parser, parser.parse_known_args()[0])
    nb_batches = nb_batches["torch"]
    dataset = torch.utils.data.Subset(dataset, range(nb_batches * batch_size))
    dataset[0]
    batches = torch.utils.data.DataLoader(dataset, batch_size, shuffle=True, num_workers=nb_workers)
    return work.read(batches, nb_batches)


@torch.no_grad()
def separate(clock, folder, seconds, threads, nb_songs=1, **options):
    """Songs of so many seconds, one after the other; returns some samples of all stems."""
    start = time.perf_counter()
    device = use(clock, threads, **options)
    separator = load_separator(folder, work.TARGETS, niter=1, device=device)
    separator.freeze()
    songs = torch.from_numpy(work.audio(nb_songs, seconds, 1)).to(device)
    separator(songs[:1, :, : work.RATE])
    clock.add("first", time.perf_counter() - start)
    stems = clock("separate", lambda: [separator(song) for song in songs.split(1)])
    return [song[0, :, :, :: work.RATE].tolist() for song in stems]


if __name__ == "__main__":
    works = {"step": step, "functions": functions, "weights": weights, "separate": separate}
    works.update(train=train, evaluate=evaluate, read=read)
    work.main(works, ["openunmix", "torch", "numpy"])
