"""What the network's parameters are called and shaped, written out: `model.py` is compared with it."""

BN = ("beta", "gamma", "mean", "var")


def open_unmix(nb_channels, hidden_size, nb_layers, nb_bins, max_bin, unidirectional):
    """Name -> shape of every parameter of one OpenUnmix."""
    shapes = {"input_mean": (max_bin,), "input_scale": (max_bin,)}
    shapes.update({"output_mean": (nb_bins,), "output_scale": (nb_bins,)})
    layers = {
        "fc1": (nb_channels * max_bin, hidden_size),
        "fc2": (2 * hidden_size, hidden_size),  # the LSTM's input beside its output
        "fc3": (hidden_size, nb_channels * nb_bins),
    }
    for name, shape in layers.items():
        shapes[f"{name}/affine/W"] = shape
        shapes.update({f"{name}/bn/{parameter}": (1, 1, shape[1]) for parameter in BN})
    directions = 1 if unidirectional else 2
    gates = (directions, 4, hidden_size // directions)
    for k in range(nb_layers):
        shapes[f"lstm/weight_l{k}"] = gates + (hidden_size + gates[2],)  # input and state side by side
        shapes[f"lstm/bias_ih_l{k}"] = shapes[f"lstm/bias_hh_l{k}"] = gates
    return shapes
