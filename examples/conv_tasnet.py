"""A network in the time domain: Conv-TasNet (Luo and Mesgarani 2019, arXiv 1809.07454), stereo as in arXiv 1911.13254.

    python train.py --network examples/conv_tasnet.py:ConvTasNet --target bass --root songs --is-wav --seq-dur 1

A learnt basis of short frames takes the place of the STFT, a stack of dilated convolutions makes masks over it, one
for each target, and another basis leads back to audio. All is as in the paper, except that normalisations have no
gains and biases of their own: they are left to the convolutions that follow. The sizes are small, for a CPU; the
paper's are filters 512, bottleneck 128, hidden 512, blocks 8, repeats 3. The lines to change are those of `_block`, or
the sizes.
"""

import nnabla as nn
import nnabla.functions as F
import nnabla.parametric_functions as PF


class ConvTasNet:
    domain = "audio"

    def __init__(
        self, targets, nb_channels, sample_rate, n_fft, n_hop, filters=64, bottleneck=32, hidden=64, blocks=6, repeats=2
    ):
        self.targets, self.nb_channels, self.filters = targets, nb_channels, filters
        self.bottleneck, self.hidden = bottleneck, hidden
        self.dilations = [2**block for block in range(blocks)] * repeats
        self.hop = round(0.001 * sample_rate)  # half a frame, of the paper's 2 ms

    def __call__(self, x, test=False):  # (nb_samples, nb_channels, nb_timesteps)
        nb_timesteps, hop = x.shape[2], self.hop
        frames = {"kernel": (2 * hop,), "stride": (hop,), "with_bias": False}
        x = F.pad(x, (0, 0, 0, 0, hop, hop + -nb_timesteps % hop))  # every sample is in two frames
        w = PF.convolution(x, self.filters, name="encoder", **frames)  # (nb_samples, filters, nb_frames)
        h, sums = PF.convolution(_normalize(w), self.bottleneck, (1,), name="bottleneck"), 0
        for number, dilation in enumerate(self.dilations):
            with nn.parameter_scope(f"block{number}"):
                y = self._block(h, dilation)
                sums = sums + PF.convolution(y, self.bottleneck, (1,), name="skip")
                if number + 1 < len(self.dilations):  # nothing comes after the last
                    h = h + PF.convolution(y, self.bottleneck, (1,), name="residual")
        sums, estimates = PF.prelu(sums), {}
        for target in self.targets:
            mask = F.sigmoid(PF.convolution(sums, self.filters, (1,), name=target))
            y = PF.deconvolution(mask * w, self.nb_channels, name="decoder", **frames)
            estimates[target] = y[:, :, hop : hop + nb_timesteps]
        return estimates

    def _block(self, h, dilation):
        h = _normalize(PF.prelu(PF.convolution(h, self.hidden, (1,), name="in"), name="in"))
        h = PF.depthwise_convolution(h, (3,), pad=(dilation,), dilation=(dilation,), name="depth")
        return _normalize(PF.prelu(h, name="depth"))


def _normalize(h):
    """Each item of a batch over its channels and frames: the paper's gLN."""
    return F.layer_normalization(h, None, None, batch_axis=0)
