"""Arithmetic over arrays: neither NNabla nor any module of ours outside this folder is imported here.

Everything is float32 and C-contiguous unless said otherwise. Three layers:

* threads: work is cut into tasks by shape and number of threads only, no two tasks write to the same place, and
  every sum has one fixed order. So results are bit-identical from run to run, and another number of threads
  changes them by rounding at most.
* products: large ones in blocks, spread over our pool, and the small ones inside the LSTM, one per frame; both with
  all of the processor's vectors, which not every build or setting of BLAS uses.
* loops: Numba kernels, compiled when they are first called and then cached on disk.

Shapes: T = nb_frames, N = nb_samples, C = nb_channels, F = nb_bins, M = T · N rows, K features.

The rooms, each importing only those above it:

    shapes         what is checked of arguments
    threads        a small pool, and how work is cut
    compiler       how loops are compiled and cached; the types of their arguments; tanh
    parts          steps whose parts several threads share
    blas           routines of SciPy's BLAS and LAPACK, without threads of their own
    vectors        a vector's loads, stores and products
    blocks         a large product on one thread
    products       products of matrices, large and small
    spectra        audio to spectrogram and back
    normalization  normalisation with the activation or mask that follows it
    affine         the network's input stage: shift, scale and affine map in one
    training       dropout, the loss, Adam
    lstm           stacked LSTM
    wiener         the multichannel Wiener filter
    bsseval        correlations, filters and energies of BSSEval, in float64
"""
