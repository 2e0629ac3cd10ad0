"""A network of one's own: masks from a layer of gated recurrent units (Cho et al. 2014, arXiv 1406.1078).

    python train.py --network examples/gru.py:Gru --network-options '{"size": 64}' --target bass --root songs --is-wav

This is all that a network needs. The lines to change are those between the comments; arguments after `n_hop` are its
options, whose values a trained model remembers.
"""

import nnabla as nn
import nnabla.functions as F
import nnabla.parametric_functions as PF


class Gru:
    domain = "spectrogram"  # what it reads and estimates; or "audio", as in conv_tasnet.py

    def __init__(self, targets, nb_channels, sample_rate, n_fft, n_hop, input_mean, input_scale, size=128):
        self.targets, self.size = targets, size
        # mean and standard deviation of the training mixtures, per bin: computed because the arguments are there
        self.mean, self.scale = input_mean, input_scale

    def __call__(self, x, test=False):  # magnitudes (nb_frames, nb_samples, nb_channels, nb_bins)
        nb_frames, nb_samples, nb_channels, nb_bins = x.shape
        mean, scale = (nn.Variable.from_numpy_array(a.reshape(1, 1, 1, -1)) for a in (self.mean, self.scale))
        h = (x - mean) / scale
        h = F.reshape(h, (nb_frames, nb_samples, nb_channels * nb_bins))
        # from here
        h = F.tanh(PF.affine(h, self.size, base_axis=2, name="in"))
        h, _ = PF.gru(h, F.constant(0, (1, 1, nb_samples, self.size)), training=not test, name="recurrent")
        # to here
        estimates = {}
        for target in self.targets:
            mask = F.sigmoid(PF.affine(h, nb_channels * nb_bins, base_axis=2, name=target))
            estimates[target] = F.reshape(mask, x.shape) * x
        return estimates
