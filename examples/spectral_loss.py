"""A loss of one's own: relative and logarithmic errors of magnitudes (Arık, Jun and Diamos 2018, arXiv 1808.06719).

    python train.py --loss examples/spectral_loss.py:spectral --target bass --root songs --is-wav

The squared error of Open-Unmix is mostly that of the loudest bins of the loudest songs; here all count. A loss is a
function of `losses.Signals`: mixture, targets and estimates, as audio and as the network reads them. The lines to
change are those of `error`; its caller chooses what is compared.
"""

import nnabla.functions as F

import functions
import losses

FLOOR = 0.01  # magnitudes far below it count as silence


def spectral(signals):
    """Sum over targets of the paper's first two terms, spectral convergence and log-scale magnitude."""
    if signals.model.domain != "spectrogram":
        raise ValueError("magnitudes are compared, but the network estimates audio")
    return losses.sum_over_targets(error, signals.Y_hat, signals.Y)


def error(estimate, target):  # magnitudes (nb_frames, nb_samples, nb_channels, nb_bins)
    energy = functions.squared_error(target, F.constant(0, target.shape))
    relative = ((functions.squared_error(estimate, target) + FLOOR**2) / (energy + FLOOR**2)) ** 0.5
    return relative + functions.absolute_error(F.log(estimate + FLOOR), F.log(target + FLOOR))
