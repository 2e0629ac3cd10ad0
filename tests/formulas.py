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
