"""What the tests compare with: textbook formulas in double precision, written to be read rather than to be fast."""

import numpy as np


def float64_magnitudes(audio, n_fft, n_hop):
    """Audio (nb_channels, nb_timesteps) to magnitudes (nb_frames, nb_channels, nb_bins) of uncentred frames."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    starts = range(0, audio.shape[1] - n_fft + 1, n_hop)
    return np.array([np.abs(np.fft.rfft(audio[:, start : start + n_fft] * window)) for start in starts])


def float64_lstm(x, weights, biases, masks):
    """The formula, layer by layer; complex numbers pass, for derivatives."""
    sigmoid = lambda v: 1 / (1 + np.exp(-v))  # noqa: E731
    for k, (weight, bias) in enumerate(zip(weights, biases)):
        x = x * masks[k]
        D, _, H, _ = weight.shape
        out = np.zeros(x.shape[:2] + (D * H,), x.dtype)
        for d in range(D):
            h = c = np.zeros((x.shape[1], H), x.dtype)
            for t in range(len(x))[:: -1 if d else 1]:
                i, f, g, o = np.einsum("ni,ghi->gnh", np.concatenate([x[t], h], 1), weight[d]) + bias[d][:, None]
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
                out[t, :, d * H : (d + 1) * H] = h
        x = out
    return x


def float64_estimate(parameters, X):
    """Open-Unmix as it separates: X (nb_frames, nb_samples, nb_channels, nb_bins) to the target's.

    Stöter et al., Open-Unmix, JOSS 2019, figure 1, and openunmix.model; `parameters` is a dict of ours.
    """
    p = {name: array.astype(np.float64) for name, array in parameters.items()}
    nb_layers = sum(name.startswith("lstm/weight") for name in p)

    def normalized(h, name):
        h = (h - p[f"{name}/bn/mean"]) / np.sqrt(p[f"{name}/bn/var"] + 1e-5)
        return h * p[f"{name}/bn/gamma"] + p[f"{name}/bn/beta"]

    h = (X[..., : len(p["input_mean"])] + p["input_mean"]) * p["input_scale"]
    h = np.tanh(normalized(h.reshape(*X.shape[:2], -1) @ p["fc1/affine/W"], "fc1"))
    weights = [p[f"lstm/weight_l{k}"] for k in range(nb_layers)]
    biases = [p[f"lstm/bias_ih_l{k}"] + p[f"lstm/bias_hh_l{k}"] for k in range(nb_layers)]
    h = np.concatenate([h, float64_lstm(h, weights, biases, np.ones(nb_layers))], axis=-1)
    h = np.maximum(normalized(h @ p["fc2/affine/W"], "fc2"), 0)
    h = normalized(h @ p["fc3/affine/W"], "fc3").reshape(X.shape)
    return np.maximum(h * p["output_scale"] + p["output_mean"], 0) * X


def float64_loss(parameters, x, y, n_fft, n_hop):
    """Mean squared error of the magnitudes that are estimated from x, both (nb_channels, nb_timesteps)."""
    X, Y = (float64_magnitudes(audio, n_fft, n_hop)[:, None] for audio in (x, y))
    if parameters["fc3/affine/W"].shape[1] == X.shape[3]:  # a mono model
        X, Y = X.mean(axis=2, keepdims=True), Y.mean(axis=2, keepdims=True)
    return ((float64_estimate(parameters, X) - Y) ** 2).mean()


def float64_waveform(Y, x, n_fft, n_hop):
    """Magnitudes (T, N, C or 1, F) with the phase of audio (N, C, nb_timesteps), as audio of its shape.

    torch.istft's formula, of uncentred frames, with silent frames before and behind them.
    """
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    x, more = x.astype(np.float64), n_fft  # samples before and behind, in which silent frames begin
    out, squares = np.zeros((*x.shape[:2], x.shape[2] + 2 * more)), np.zeros(x.shape[2] + 2 * more)
    for k in range(-(more // n_hop), (x.shape[2] + more - n_fft) // n_hop + 1):
        place = slice(more + k * n_hop, more + k * n_hop + n_fft)
        squares[place] += window**2
        if 0 <= k < len(Y):
            spectrum = np.fft.rfft(x[:, :, k * n_hop : k * n_hop + n_fft] * window)
            out[:, :, place] += np.fft.irfft(Y[k] * np.exp(1j * np.angle(spectrum)), n_fft) * window
    end = more + (len(Y) - 1) * n_hop + n_fft
    out[:, :, more:end] /= squares[more:end]
    return out[:, :, more : more + x.shape[2]]


def float64_sdr(y_hat, y):
    """SDR in dB of samples (N, C, nb_timesteps), with 1e-7 added to both mean squares; mean over samples."""
    error, energy = (np.mean(v**2, axis=(1, 2)) + 1e-7 for v in (y - y_hat, y))
    return np.mean(10 * np.log10(energy / error))


def float64_weighted_sdr(x, p, y):
    """Sawata et al., equation 4, plus 1: of mixture, estimate and target, whose last axis is time; mean over others."""

    def size(v):
        return np.sqrt((v * v).sum(-1) + 1e-10)

    def cosine(a, b):
        return (a * b).sum(-1) / (size(a) * size(b) + 1e-10)

    energy, rest = (y * y).sum(-1), ((x - y) ** 2).sum(-1)
    rho = energy / (energy + rest + 1e-10)
    return np.mean(1 - rho * cosine(y, p) - (1 - rho) * cosine(x - y, x - p))
