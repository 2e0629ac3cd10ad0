"""torch's side of the benchmark: openunmix, in the environment of tests/reference."""

import functools
import json
import time
from pathlib import Path

import torch
import work
from openunmix.model import OpenUnmix
from openunmix.transforms import ComplexNorm, make_filterbanks
from openunmix.utils import load_separator
from torch.nn.functional import mse_loss

NB_BINS = work.N_FFT // 2 + 1


def make_net():
    return OpenUnmix(nb_bins=NB_BINS, nb_channels=2, hidden_size=work.HIDDEN_SIZE, max_bin=work.MAX_BIN)


def make_training(nb_samples, seconds, threads):
    torch.set_num_threads(threads)
    stft, _ = make_filterbanks(work.N_FFT, work.N_HOP, sample_rate=work.RATE)
    encoder = torch.nn.Sequential(stft, ComplexNorm(mono=False))
    x, y = (torch.from_numpy(work.audio(nb_samples, seconds, seed)) for seed in (1, 2))
    net = make_net()
    return net, torch.optim.Adam(net.parameters(), lr=work.LR, weight_decay=work.WEIGHT_DECAY), encoder, x, y


def step(clock, nb_samples, seconds, warm_up, repeat, threads):
    """Training steps as openunmix' scripts/train.py does them."""
    net, optimizer, encoder, x, y = make_training(nb_samples, seconds, threads)

    def one():
        optimizer.zero_grad()
        Y_hat = net(encoder(x))
        loss = mse_loss(Y_hat, encoder(y))
        loss.backward()
        optimizer.step()
        return loss.item()

    for i in range(warm_up + repeat):
        if i == warm_up:
            clock.times.clear()
        clock("step", one)


def functions(clock, nb_samples, seconds, warm_up, repeat, threads):
    """Each function alone, cut from OpenUnmix.forward, on inputs of the memory layout that it gets there."""
    net, optimizer, encoder, x, y = make_training(nb_samples, seconds, threads)
    X, Y = encoder(x).permute(3, 0, 1, 2), encoder(y)
    nb_frames, K = X.shape[0], work.HIDDEN_SIZE
    h = torch.randn(nb_frames, nb_samples, K)
    rows, bins = h.reshape(-1, K), torch.randn(nb_frames * nb_samples, 2 * NB_BINS)

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
    folder, config = Path(folder), {"nfft": work.N_FFT, "nhop": work.N_HOP, "nb_channels": 2}
    for target in work.TARGETS:
        net = make_net()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if "bn" in name or "output" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        torch.save(net.state_dict(), folder / f"{target}.pth")
        (folder / f"{target}.json").write_text(json.dumps({"args": {**config, "hidden_size": work.HIDDEN_SIZE}}))
    (folder / "separator.json").write_text(json.dumps({**config, "sample_rate": work.RATE}))


@torch.no_grad()
def separate(clock, folder, seconds, threads):
    start = time.perf_counter()
    torch.set_num_threads(threads)
    separator = load_separator(folder, work.TARGETS, niter=1)
    separator.freeze()
    x = torch.from_numpy(work.audio(1, seconds, 1))
    separator(x[..., : work.RATE])
    clock.add("first", time.perf_counter() - start)
    return clock("separate", separator, x)[0, :, :, :: work.RATE].tolist()


if __name__ == "__main__":
    works = {"step": step, "functions": functions, "weights": weights, "separate": separate}
    work.main(works, ["openunmix", "torch", "numpy"])
