"""Networks of one's own, as a user would write them: nothing of this project is imported but what the second shows."""

import nnabla as nn
import nnabla.functions as F
import nnabla.parametric_functions as PF

import functions
import model


class Gru:
    """A recurrent network of several targets, with statistics and an option."""

    domain = "spectrogram"

    def __init__(self, targets, nb_channels, sample_rate, n_fft, n_hop, size=12, input_mean=None, input_scale=None):
        self.targets, self.size, self.mean, self.scale = targets, size, input_mean, input_scale

    def __call__(self, x, test=False):
        nb_frames, nb_samples, nb_channels, nb_bins = x.shape
        h = F.reshape(x, (nb_frames, nb_samples, nb_channels * nb_bins))
        h = F.tanh(PF.affine(h, self.size, base_axis=2, name="in"))
        state = F.constant(0, (1, 1, nb_samples, self.size))
        h = PF.gru(h, state, training=not test, name="recurrent")[0]
        h = PF.batch_normalization(h, axes=[2], batch_stat=not test)
        estimates = {}
        for target in self.targets:
            mask = F.sigmoid(PF.affine(h, nb_channels * nb_bins, base_axis=2, name=f"{target}/mask"))
            estimates[target] = F.reshape(mask, x.shape) * x
        return estimates


class Deeper(model.OpenUnmix):
    """Ours with one more layer."""

    def _combine(self, h, s, test, target=None):
        h = functions.affine([super()._combine(h, s, test, target)], self.hidden_size, name="fc2b")
        return functions.batch_normalization(h, F.relu, test, name="fc2b")


class Temporal:
    """A convolution in time over frames; negative estimates, no statistics, parameters of other names."""

    domain = "spectrogram"

    def __init__(self, targets, nb_channels, sample_rate, n_fft, n_hop, **options):
        self.targets, self.width = targets, options.pop("width", 3)
        if options:
            raise ValueError(f"unknown options {options}")

    def __call__(self, x, test=False):
        nb_frames, nb_samples, nb_channels, nb_bins = x.shape
        h = F.reshape(F.transpose(x, (1, 2, 3, 0)), (nb_samples, nb_channels * nb_bins, nb_frames))
        h = F.tanh(PF.convolution(h, 4, (2 * self.width + 1,), pad=(self.width,), name="time/conv"))
        h = PF.convolution(h, nb_channels * nb_bins, (1,), name="time/out")
        h = F.transpose(F.reshape(h, (nb_samples, nb_channels, nb_bins, nb_frames)), (3, 0, 1, 2))
        return {self.targets[0]: h}


class Wave:
    """In the time domain."""

    domain = "audio"

    def __init__(self, targets, nb_channels, sample_rate, n_fft, n_hop):
        self.targets, self.nb_channels = targets, nb_channels

    def __call__(self, x, test=False):
        h = F.tanh(PF.convolution(x, 4, (15,), pad=(7,), name="first"))
        return {target: PF.convolution(h, self.nb_channels, (15,), pad=(7,), name=target) for target in self.targets}


class Changed(model.OpenUnmix):
    """Changes the call alone: what it inherits of encode and decode is then not its own."""

    def __call__(self, x, test=False):
        return super().__call__(x, test) * 0.5


class Identity:
    """Without parameters."""

    def __init__(self, targets, **sizes):
        self.targets = targets

    def __call__(self, x, test=False):
        return {target: x for target in self.targets}


class Twice:
    def __init__(self, targets, nb_channels, sample_rate, n_fft, n_hop):
        pass

    def __call__(self, x, test=False):
        return F.concatenate(x, x, axis=0)


class Broken:
    def __init__(self, targets, nb_channels, sample_rate, n_fft, n_hop):
        self.nothing = None

    def __call__(self, x, test=False):
        return self.nothing.shape


class Constant:
    """Statistics that are no parameters, and without which it cannot be made; dropout of NNabla's."""

    domain = "spectrogram"

    def __init__(self, targets, nb_channels, sample_rate, n_fft, n_hop, input_mean, input_scale):
        self.targets = targets
        self.mean, self.std = (nn.Variable.from_numpy_array(v.reshape(1, 1, 1, -1)) for v in (input_mean, input_scale))

    def __call__(self, x, test=False):
        h = F.reshape((x - self.mean) / self.std, x.shape[:2] + (x.shape[2] * x.shape[3],))
        h = PF.affine(h, 6, base_axis=2, name="down")
        h = h if test else F.dropout(h, 0.3) + 0.1 * F.randn(shape=h.shape)
        mask = F.sigmoid(PF.affine(h, x.shape[2] * x.shape[3], base_axis=2, name="up"))
        return {self.targets[0]: F.reshape(mask, x.shape) * x}


class Frozen:
    """What it computes of an item depends on that item alone: no dropout, running statistics that stay as they are."""

    domain = "spectrogram"

    def __init__(self, targets, nb_channels, sample_rate, n_fft, n_hop, input_mean=None, input_scale=None):
        self.targets = targets

    def __call__(self, x, test=False):
        h = F.reshape(x, x.shape[:2] + (x.shape[2] * x.shape[3],))
        h = PF.batch_normalization(PF.affine(h, 8, base_axis=2, name="down"), axes=[2], batch_stat=False)
        mask = F.sigmoid(PF.affine(F.tanh(h), x.shape[2] * x.shape[3], base_axis=2, name="up"))
        return {self.targets[0]: F.reshape(mask, x.shape) * x}
