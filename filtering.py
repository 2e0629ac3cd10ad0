"""The multichannel Wiener filter: from magnitude estimates of the sources and a mixture to complex spectra.

`wiener` and `residual_model` are drop-ins for those of norbert 0.2.1, in its layout (nb_frames, nb_bins,
nb_channels, nb_sources). `source_spectra` is the same filter in the layout of the network and of the inverse STFT,
bins last, with the conventions of openunmix.filtering 1.3.0. Arrays in, arrays out; inputs are never modified.
"""

from __future__ import annotations  # unions, on Python 3.9

import numpy as np

import kernels.wiener
from utils import finite, whole


def source_spectra(
    v: np.ndarray,
    x: np.ndarray,
    iterations: int = 1,
    softmask: bool = False,
    residual: bool = False,
    eps: float | None = 1e-10,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Source spectra by the multichannel Wiener filter, as openunmix.filtering.wiener computes them.

    The first estimates y_j have the magnitudes v_j and the phases of the mixture x; or, with a soft mask, are
    y_j = v_j / (eps + Σ_i v_i) · x. A residual x − Σ_j y_j can be appended to them.

    Then each iteration of an expectation maximization (EM) models the sources as Gaussian: in frame t and bin
    f, source j has the covariance p_j R_j, with the power p_j(t, f) = mean of |y_j|² over channels and a spatial
    covariance matrix that does not depend on t,

        R_j(f) = Σ_t y_j y_jᴴ / (eps + Σ_t p_j).

    Given the mixture, the expected source, which becomes the new estimate, is

        y_j = p_j R_j (Σ_i p_i R_i + √eps · 1)⁻¹ x.

    So the estimates sum to the mixture but for what the regularisation √eps takes away. It is meant for
    mixtures of at most 10: a larger one, of maximum 10 s, is filtered as if it were divided by s. There is no
    need to divide: dividing all of x and y by s amounts to multiplying eps and √eps above by s².

    Where the mixture is zero, the first estimates have phase zero, and later ones are zero. (The reference
    replaces such a mixture by one; that is not copied.)

    Args:
        v: non-negative magnitudes (nb_sources, nb_frames, nb_channels or 1, nb_bins)
        x: complex mixture (nb_channels, nb_frames, nb_bins); complex64 is filtered in single precision and
            everything else in double. One or two channels are fast, more are not.
        iterations: of the EM; 0 returns the first estimates
        softmask: whether to start from a soft mask
        residual: whether to append a source, what the estimates leave of the mixture
        eps: regularisation; None for the precision of x, as in norbert
        out: C-contiguous array for the result, of its shape and type
    Returns:
        (nb_sources, nb_channels, nb_frames, nb_bins) complex; one source more with a residual
    Raises:
        ValueError: shapes or types do not fit, or iterations or eps cannot be.

    Based on S. Uhlich et al., "Improving music source separation based on deep neural networks through data
    augmentation and network blending", ICASSP 2017, and A. Nugraha, A. Liutkus and E. Vincent, "Multichannel music
    separation with deep neural networks", EUSIPCO 2016.

    >>> v = np.ones((4, 30, 2, 65), np.float32)  # 4 sources, 30 frames, 2 channels, 65 bins
    >>> x = np.full((2, 30, 65), 3 + 4j, np.complex64)
    >>> source_spectra(v, x).shape
    (4, 2, 30, 65)
    """
    v, x = np.asarray(v), np.asarray(x)
    if v.ndim != 4 or x.ndim != 3 or v.shape[1::2] != x.shape[1:] or v.shape[2] not in (1, x.shape[0]):
        raise ValueError(
            f"v of shape {v.shape} and x of shape {x.shape}: expected (nb_sources, nb_frames, nb_channels or 1, "
            "nb_bins) and (nb_channels, nb_frames, nb_bins)"
        )
    _check_types(v, x)
    iterations = whole("iterations", iterations, 0)
    x = np.ascontiguousarray(x, np.complex64 if x.dtype == np.complex64 else np.complex128)
    v = np.ascontiguousarray(v, x.real.dtype)
    if eps is None:
        eps = np.finfo(x.dtype).eps
    finite("eps", eps, 0)
    nb_channels, nb_frames, nb_bins = x.shape
    shape = (len(v) + bool(residual), nb_channels, nb_frames, nb_bins)
    if out is None:
        out = np.empty(shape, x.dtype)
    elif not isinstance(out, np.ndarray) or (out.shape, out.dtype) != (shape, x.dtype) or not out.flags.carray:
        raise ValueError(
            f"out of shape {np.shape(out)} and type {getattr(out, 'dtype', None)}: expected {shape} and {x.dtype}, "
            f"C-contiguous and writable, for v of shape {v.shape} and x of shape {x.shape}"
        )
    elif np.may_share_memory(out, v) or np.may_share_memory(out, x):
        raise ValueError("out shares memory with v or x, which are not modified")
    weight, noise = _regularisation(eps, nb_channels, kernels.wiener.peak(x) if iterations > 0 else 0)
    run = kernels.wiener.wiener if nb_channels <= 2 else _any_number_of_channels
    run(v, x, iterations, bool(softmask), bool(residual), float(eps), weight, noise, out)
    return out


class Causal:
    """One iteration of the EM of `source_spectra` for frames that come one after another, of one or two channels.

    Its sums over all frames become sums over those that have come, the older the less they weigh: with the first
    estimates y_j, and λ to be less than 1 if older frames are to be forgotten,

        S_j(t) = λ S_j(t − 1) + y_j(t) y_j(t)ᴴ,    P_j(t) = λ P_j(t − 1) + p_j(t),    R_j(t) = S_j(t) / (eps + P_j(t)),

    and the estimate is y_j = p_j R_j(t) (Σ_i p_i R_i(t) + √eps · 1)⁻¹ x, once. The maximum of x, which eps depends on,
    is that of the frames that have come, and forgotten alike. If λ is 1, the last frame of a recording becomes what
    `source_spectra` makes of it with one iteration.

    After O. Cappé and E. Moulines, "On-line expectation-maximization algorithm for latent data models", JRSS B 2009,
    and L. Simon and E. Vincent, "A general framework for online audio source separation", LVA/ICA 2012.

    Args:
        nb_sources, nb_channels, nb_bins: of what comes; with a residual, one source more goes
        forgetting: λ, from 0 to 1
        softmask, residual, eps: as of `source_spectra`
    Raises:
        ValueError: numbers that cannot be.
    """

    def __init__(
        self,
        nb_sources: int,
        nb_channels: int,
        nb_bins: int,
        forgetting: float,
        softmask: bool = False,
        residual: bool = False,
        eps: float = 1e-10,
    ):
        self.softmask, self.residual, self.eps = bool(softmask), bool(residual), float(finite("eps", eps, 0))
        self.forgetting = float(finite("forgetting", forgetting, 0, 1))
        self.out = np.empty((nb_sources + self.residual, nb_channels, 1, nb_bins), np.complex64)
        self.sums = np.empty((len(self.out), 4, nb_bins))
        self.reset()

    def reset(self) -> None:
        """As if nothing had come yet."""
        self.sums[:], self.peak = 0, 0.0

    def __call__(self, v: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The next frame.

        Args:
            v: float32 (nb_sources, 1, nb_channels or 1, nb_bins)
            x: complex64 (nb_channels, 1, nb_bins)
        Returns:
            (nb_sources, nb_channels, 1, nb_bins) complex64, which the next call overwrites
        """
        self.peak = max(self.forgetting * self.peak, kernels.wiener.peak(x))
        weight, noise = _regularisation(self.eps, len(x), self.peak)
        numbers = (self.eps, weight, noise, self.forgetting)
        kernels.wiener.causal(v, x, self.softmask, self.residual, *numbers, self.sums, self.out)
        return self.out


def _regularisation(eps, nb_channels, peak):
    """What is added to sums of powers, and to the diagonal of the mixture's covariance, if that is its maximum."""
    square = max(1.0, peak / 10) ** 2
    # with one channel, norbert adds eps as well; without it, as in the reference, nothing changes at 1e-10
    noise = np.sqrt(eps) + (eps if nb_channels == 1 else 0)
    return float(eps * square), float(noise * square)


def wiener(
    v: np.ndarray, x: np.ndarray, iterations: int = 1, use_softmask: bool = True, eps: float | None = None
) -> np.ndarray:
    """Source spectra by the multichannel Wiener filter: a drop-in for norbert.wiener.

    Unlike norbert's, it does not modify x, and a complex64 mixture gives complex64 estimates. `source_spectra` says
    what is computed.

    Args:
        v: non-negative magnitudes (nb_frames, nb_bins, nb_channels or 1, nb_sources)
        x: complex mixture (nb_frames, nb_bins, nb_channels)
        iterations: of the EM; 0 returns the first estimates
        use_softmask: whether to start from a soft mask rather than from v with the mixture's phases
        eps: regularisation; None for the precision of x
    Returns:
        (nb_frames, nb_bins, nb_channels, nb_sources) complex
    Raises:
        ValueError: shapes or types do not fit, or iterations or eps cannot be.

    >>> v = np.ones((30, 65, 2, 4))  # 30 frames, 65 bins, 2 channels, 4 sources
    >>> x = np.full((30, 65, 2), 3 + 4j)
    >>> wiener(v, x).shape
    (30, 65, 2, 4)
    """
    v, x = _check_layout(v, x)
    y = source_spectra(v.transpose(3, 0, 2, 1), x.transpose(2, 0, 1), iterations, use_softmask, eps=eps)
    return y.transpose(2, 3, 1, 0)


def residual_model(v: np.ndarray, x: np.ndarray, alpha: float = 1) -> np.ndarray:
    """Append the magnitudes of a residual to those of the sources: a drop-in for norbert.residual_model.

    The residual is what the sum of v leaves of |x|**alpha, or zero where it leaves nothing. In the result, the
    sources are scaled, per bin and channel, such that their sum fits |x|**alpha best in the sense of least
    squares; like norbert's, the residual is that of the sources before scaling.

    `source_spectra(…, residual=True)` has another notion of a residual, that of openunmix: complex, and only
    after the first estimates.

    Args:
        v: non-negative magnitudes to the power alpha (nb_frames, nb_bins, nb_channels or 1, nb_sources)
        x: complex mixture (nb_frames, nb_bins, nb_channels)
        alpha: exponent of v
    Returns:
        (nb_frames, nb_bins, nb_channels, nb_sources + 1)
    Raises:
        ValueError: shapes or types do not fit.

    >>> residual_model(np.ones((30, 65, 1, 4)), np.full((30, 65, 2), 3 + 4j))[0, 0, 0]
    array([1.25, 1.25, 1.25, 1.25, 1.  ])
    """
    v, x = _check_layout(v, x)
    _check_types(v, x)
    if not np.issubdtype(v.dtype, np.floating):
        v = v.astype(x.real.dtype)
    finite("alpha", alpha, 0)
    eps = np.finfo(v.dtype).eps  # against division by zero
    mixture = np.maximum(eps, np.abs(x) ** alpha)
    total = v.sum(axis=-1)
    gain = (mixture * total).sum(axis=0) / (eps + (total**2).sum(axis=0))
    residual = np.maximum(0, mixture - total)
    return np.concatenate([v * gain[..., None], residual[..., None]], axis=-1)


def _check_layout(v, x):
    """Both as arrays; ValueError unless they have the shapes of norbert's layout."""
    v, x = np.asarray(v), np.asarray(x)
    if v.ndim != 4 or x.ndim != 3 or v.shape[:2] != x.shape[:2] or v.shape[2] not in (1, x.shape[2]):
        raise ValueError(
            f"v of shape {v.shape} and x of shape {x.shape}: expected (nb_frames, nb_bins, nb_channels or 1, "
            "nb_sources) and (nb_frames, nb_bins, nb_channels)"
        )
    return v, x


def _check_types(v, x):
    if v.dtype.kind not in "fiub" or x.dtype.kind != "c":
        raise ValueError(f"v of type {v.dtype} and x of type {x.dtype}: expected real magnitudes, a complex mixture")


def _any_number_of_channels(v, x, iterations, softmask, residual, eps, weight, noise, out):
    """What `kernels.wiener.wiener` computes, for any number of channels, by NumPy; for large arrays slow.

    Singular values below eps times the largest count as zero in the inverse, as in norbert.
    """
    v = v.transpose(0, 2, 1, 3).astype(np.float64)  # like out
    x = x.astype(np.complex128)
    y = v / (eps + v.sum(axis=0)) * x if softmask else v * np.exp(1j * np.angle(x))
    if residual:
        y = np.concatenate([y, [x - y.sum(axis=0)]])
    noise = noise * np.eye(len(x))
    for _ in range(iterations):
        p = np.mean(np.abs(y) ** 2, axis=1)
        R = np.einsum("jatf,jbtf->jfab", y, y.conj()) / (weight + p.sum(axis=1))[..., None, None]
        for t in range(x.shape[1]):
            inverse = np.linalg.pinv(np.einsum("jf,jfab->fab", p[:, t], R) + noise, eps, hermitian=True)
            y[:, :, t] = np.einsum("jf,jfab,fbc,cf->jaf", p[:, t], R, inverse, x[:, t], optimize=True)
    out[:] = y
