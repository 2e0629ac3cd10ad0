"""Joint training: one LSTM listens to the mixture for all targets, each of which has layers of its own behind it.

    python train.py --network examples/shared.py:Shared --targets vocals drums bass other --root songs --is-wav

Networks side by side have an LSTM for each target, where most of the time goes; this has one for all. It changes what
`model.JointOpenUnmix` shares: the lines to change are those of `encode`, where a layer that is called with a target is
its own, and one without is everybody's. So it has the options of ours (hidden_size, max_bin, …) and their speed,
starts from the statistics of the training mixtures, and separates long recordings in little memory.
"""

import model


class Shared(model.JointOpenUnmix):
    def encode(self, X, test=False):  # magnitudes of the mixture (nb_frames, nb_samples, nb_channels, nb_bins)
        h = self._reduce(X, test)
        s = self._recur(h, test)
        return {target: self._combine(h, s, test, target) for target in self.targets}  # decode makes them masks
