"""The arithmetic of the fast graph functions, on arrays: neither NNabla nor any module of ours is imported.

Everything is float32 and C-contiguous unless said otherwise. Three layers:

* threads: a small pool; work is cut into tasks by shape and number of threads only, no two tasks write to
  the same place, and every sum has one fixed order. So results are bit-identical from run to run, and
  another number of threads changes them by rounding at most.
* products: large ones by SciPy's sgemm, with the rows spread over our pool; the small ones inside the LSTM,
  one per frame, by a kernel of our own.
* loops: Numba kernels, compiled when they are first called and then cached on disk.

Shapes: T = nb_frames, N = nb_samples, C = nb_channels, F = nb_bins, M = T · N rows, K features.
"""

import ctypes
import functools
import itertools
import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import scipy.fft
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.event import Listener, install_listener
from numba.extending import get_cython_function_address, intrinsic

log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------- threads

_nb_threads = None  # not chosen yet: all cores
_pool, _pool_key = None, None


def set_threads(nb_threads=None):
    """Number of threads of everything here; None: one per core that this process may use."""
    global _nb_threads
    if nb_threads is not None and nb_threads < 1:
        raise ValueError(f"{nb_threads} threads: at least one is needed")
    _nb_threads = nb_threads


def get_threads():
    if _nb_threads is not None:
        return _nb_threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def run(tasks):
    """Call every (function, *arguments) of the list, spread over the threads; the functions release the GIL.

    Whoever is free takes the next task: who computes what does not change the result.
    """
    global _pool, _pool_key
    helpers = min(get_threads(), len(tasks)) - 1
    queue = iter(tasks)  # next() on it is atomic

    def drain():
        for function, *arguments in queue:
            function(*arguments)

    if helpers > 0:
        key = (os.getpid(), get_threads())  # a forked child has lost its parent's threads
        if key != _pool_key:
            _pool, _pool_key = ThreadPoolExecutor(get_threads() - 1, "kernels"), key
        futures = [_pool.submit(drain) for _ in range(helpers)]
        drain()
        for future in futures:
            future.result()
    else:
        drain()


def _split(length, parts, multiple=1):
    """Cut range(length) into at most `parts` ranges (start, stop), the bounds multiples of `multiple`."""
    units = -(-length // multiple)
    parts = max(1, min(parts, units))
    bounds = [min(length, multiple * (units * i // parts)) for i in range(parts + 1)]
    return list(zip(bounds, bounds[1:]))


# ------------------------------------------------------------------------------------------- compiler

INT = types.intp
FLOAT = types.float32
SUMS = types.float64[:, ::1]
COMPLEX3 = types.complex64[:, :, ::1]


def IN(ndim):
    return types.Array(types.float32, ndim, "C", readonly=True)


def OUT(ndim):
    return types.Array(types.float32, ndim, "C")


# Loops run over whole slices, j = 0, 1, …: where the compiler cannot see that an index is not negative, it
# provides for Python's counting from the end, and that costs a factor of nine.
# No "nnan", "ninf": a diverging training must show its NaNs rather than hide them.
FASTMATH = {"contract", "reassoc", "nsz"}


_compiler = threading.Lock()


class _SayOnce(Listener):
    said = False

    def on_start(self, event):
        if not _SayOnce.said:
            _SayOnce.said = True
            log.warning("compiling the fast functions for this machine: once, several seconds")

    def on_end(self, event):
        pass


def kernel(function):
    """A Numba kernel without the GIL. Annotations are its argument types; it is compiled when first called."""
    compiled = None

    @functools.wraps(function)
    def call(*arguments):
        nonlocal compiled
        if compiled is None:
            with _compiler:  # one thread compiles, the others wait
                if compiled is None:
                    compiled = _compile(function)
        compiled(*arguments)

    return call


def _compile(function):
    options = {"nogil": True, "fastmath": FASTMATH, "error_model": "numpy"}
    try:
        dispatcher = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for the cache can be written to: compile in every process
        dispatcher = numba.njit(**options)(function)
    with install_listener("numba:compile", _SayOnce()):
        dispatcher.compile(tuple(function.__annotations__.values()))
    dispatcher.disable_compile()
    return dispatcher


inline = numba.njit(fastmath=FASTMATH, error_model="numpy")

# ------------------------------------------------------------------------------------------- products


@functools.lru_cache(None)
def _sgemm():
    """SciPy's sgemm, with BLAS's own threads switched off: the rows are spread over our pool instead."""
    import scipy.linalg.cython_blas

    library = ctypes.CDLL(scipy.linalg.cython_blas.__file__)  # its symbols and those of the BLAS it links to
    for name in ("scipy_openblas_set_num_threads", "openblas_set_num_threads", "MKL_Set_Num_Threads"):
        if hasattr(library, name):
            getattr(library, name)(ctypes.c_int(1))
            break
    address = get_cython_function_address("scipy.linalg.cython_blas", "sgemm")
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 13)(address)


def _operand(matrix):
    """(transposed, leading dimension) of a float32 matrix whose rows, or columns, are contiguous."""
    if matrix.dtype != np.float32:
        raise TypeError(f"a product of {matrix.dtype}: float32 is needed")
    rows, columns = matrix.shape
    if matrix.strides[1] == 4 or columns == 1 and matrix.strides[0] != 4:
        return b"N", matrix.strides[0] // 4 if rows > 1 else columns
    if matrix.strides[0] == 4 or rows == 1:
        return b"T", matrix.strides[1] // 4 if columns > 1 else rows
    raise ValueError(f"neither rows nor columns are contiguous: strides {matrix.strides}")


def _product(a, b, out, accumulate):
    (m, k), n = a.shape, b.shape[1]
    (trans_a, lda), (trans_b, ldb), (_, ldc) = _operand(a), _operand(b), _operand(out)
    whole = [ctypes.byref(ctypes.c_int(value)) for value in (n, m, k, ldb, lda, ldc)]
    n, m, k, ldb, lda, ldc = whole
    alpha, beta = ctypes.byref(ctypes.c_float(1)), ctypes.byref(ctypes.c_float(accumulate))
    # BLAS counts by columns: it sees every matrix transposed, and outᵀ = bᵀ aᵀ
    data = [matrix.ctypes.data for matrix in (a, b, out)]
    _sgemm()(trans_b, trans_a, n, m, k, alpha, data[1], ldb, data[0], lda, beta, data[2], ldc)


def products(a, b, out, accumulate=False):
    """The tasks, for `run`, of out = a @ b, or out += a @ b.

    Transposes and slices of rows or columns cost nothing: of a and b either the rows or the columns must be
    contiguous, of out the rows.

    Raises:
        ValueError, TypeError: shapes that do not fit, strides that BLAS cannot take, not float32
    """
    if a.shape[1] != b.shape[0] or out.shape != (a.shape[0], b.shape[1]):
        raise ValueError(f"product of {a.shape} and {b.shape} into {out.shape}")
    m, n = out.shape
    parts = get_threads()
    if m >= n // 4:
        return [(_product, a[i:j], b, out[i:j], accumulate) for i, j in _split(m, parts, 16)]
    return [(_product, a, b[:, i:j], out[:, i:j], accumulate) for i, j in _split(n, parts, 16)]


def matmul(a, b, out, accumulate=False):
    """out = a @ b, or out += a @ b: see `products`."""
    run(products(a, b, out, accumulate))


# A product for the LSTM: few rows (the batch), and the same weights in every frame. sgemm rearranges the
# weights on each call, which takes longer than to multiply; here they are rearranged once, into panels of
# two vectors' width, each panel (depth, PANEL) contiguous. A tile of up to 8 rows by one panel is kept in
# registers over the whole depth: per step two loads of weights and, for each row, one number of `a`.
LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
PANEL = 2 * LANES
DEPTH = 256  # a panel of this depth fits in the first-level cache, to be used by all tiles


def _tile(rows):
    """c (rows, PANEL) += a (rows, depth) @ panel (depth, PANEL), from addresses and row lengths."""
    vector, single, int32, int64 = ir.VectorType(ir.FloatType(), LANES), ir.FloatType(), ir.IntType(32), ir.IntType(64)
    undefined = ir.Constant(vector, ir.Undefined)
    to_all_lanes = ir.Constant(ir.VectorType(int32, LANES), [0] * LANES)

    def generate(context, builder, signature, arguments):
        a, a_row, panel, c, c_row, depth = arguments
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{LANES}f32"
        )

        def address(start, *offsets):  # start + 4 bytes · offsets
            for offset in offsets:
                start = builder.add(start, builder.mul(offset, int64(4)))
            return start

        def pointer(start, kind):
            return builder.inttoptr(start, kind.as_pointer())

        c_at = [
            [pointer(address(c, builder.mul(c_row, int64(r)), int64(LANES * v)), vector) for v in range(2)]
            for r in range(rows)
        ]
        a_at = [pointer(address(a, builder.mul(a_row, int64(r))), single) for r in range(rows)]
        first = [[builder.load(p, align=4) for p in row] for row in c_at]
        entry = builder.block
        loop, done = builder.append_basic_block("depth"), builder.append_basic_block("done")
        builder.branch(loop)

        builder.position_at_end(loop)
        k = builder.phi(int64)
        total = [[builder.phi(vector) for _ in range(2)] for _ in range(rows)]
        weights = address(panel, builder.mul(k, int64(PANEL)))
        w = [builder.load(pointer(address(weights, int64(LANES * v)), vector), align=4) for v in range(2)]
        sums = []
        for r in range(rows):
            number = builder.load(builder.gep(a_at[r], [k]))
            number = builder.insert_element(undefined, number, int32(0))
            number = builder.shuffle_vector(number, undefined, to_all_lanes)
            sums.append([builder.call(fma, [number, w[v], total[r][v]]) for v in range(2)])
        following = builder.add(k, int64(1))
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)
        k.add_incoming(int64(0), entry)
        k.add_incoming(following, loop)
        for r, v in itertools.product(range(rows), range(2)):
            total[r][v].add_incoming(first[r][v], entry)
            total[r][v].add_incoming(sums[r][v], loop)

        builder.position_at_end(done)
        for r, v in itertools.product(range(rows), range(2)):
            builder.store(sums[r][v], c_at[r][v], align=4)
        return context.get_dummy_value()

    @intrinsic
    def tile(typing, a, a_row, panel, c, c_row, depth):
        return types.void(*[types.intp] * 6), generate

    return tile


_tile8, _tile4, _tile2, _tile1 = _tile(8), _tile(4), _tile(2), _tile(1)


def _panels(matrix):
    """Weights (depth, columns) as panels (ceil(columns / PANEL), depth, PANEL), filled up with zeros."""
    depth, columns = matrix.shape
    padded = np.zeros((depth, -(-columns // PANEL) * PANEL), np.float32)
    padded[:, :columns] = matrix
    return np.ascontiguousarray(padded.reshape(depth, -1, PANEL).transpose(1, 0, 2))


@inline
def _small_product(a, a_row, rows, panels, c):
    """c (rows, panels · PANEL) += a @ weights; a: address of its first number, a_row: from row to row."""
    nb_panels, depth, _ = panels.shape
    weights, out, c_row = panels.ctypes.data, c.ctypes.data, c.shape[1]
    for p in range(nb_panels):
        for k in range(0, depth, DEPTH):
            panel = weights + 4 * PANEL * (p * depth + k)
            n = min(DEPTH, depth - k)
            r = 0
            while r < rows:
                a_at, c_at = a + 4 * (r * a_row + k), out + 4 * (r * c_row + p * PANEL)
                if rows - r >= 8:
                    _tile8(a_at, a_row, panel, c_at, c_row, n)
                    r += 8
                elif rows - r >= 4:
                    _tile4(a_at, a_row, panel, c_at, c_row, n)
                    r += 4
                elif rows - r >= 2:
                    _tile2(a_at, a_row, panel, c_at, c_row, n)
                    r += 2
                else:
                    _tile1(a_at, a_row, panel, c_at, c_row, n)
                    r += 1


@inline
def _tanh(x):
    """Rational approximation by Eigen (Eigen/src/Core/MathFunctionsImpl.h, ptanh_float): 3e-7 at most.

    Without branches or calls, so that the compiler makes vectors of it.
    """
    limit = np.float32(7.90531110763549805)  # where float32 tanh reaches 1
    x = -limit if x < -limit else (limit if x > limit else x)
    s = x * x
    p = np.float32(-2.76076847742355e-16)
    p = p * s + np.float32(2.00018790482477e-13)
    p = p * s + np.float32(-8.60467152213735e-11)
    p = p * s + np.float32(5.12229709037114e-08)
    p = p * s + np.float32(1.48572235717979e-05)
    p = p * s + np.float32(6.37261928875436e-04)
    p = p * s + np.float32(4.89352455891786e-03)
    q = np.float32(1.19825839466702e-06)
    q = q * s + np.float32(1.18534705686654e-04)
    q = q * s + np.float32(2.26843463243900e-03)
    q = q * s + np.float32(4.89352518554385e-03)
    return x * p / q


# ------------------------------------------------------------------------------------------- spectrogram


def hann(n_fft):
    """Periodic Hann window."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)).astype(np.float32)


def nb_frames(nb_timesteps, n_fft, n_hop, center):
    """Frames of an STFT.

    Raises:
        ValueError: the audio is too short for a frame, or for the reflection.
    """
    shortest = n_fft // 2 + 1 if center else n_fft
    if nb_timesteps < shortest:
        raise ValueError(f"{nb_timesteps} samples of audio are too short: n_fft {n_fft} needs {shortest}")
    return (nb_timesteps + (n_fft // 2 * 2 if center else 0) - n_fft) // n_hop + 1


def _spectra(x, window, n_hop, center, start, stop):
    """Complex spectra (C, stop − start, F) of some frames of audio (C, nb_timesteps)."""
    n_fft, nb_timesteps = len(window), x.shape[1]
    begin = start * n_hop - (n_fft // 2 if center else 0)
    end = begin + (stop - start - 1) * n_hop + n_fft
    if begin >= 0 and end <= nb_timesteps:
        x = x[:, begin:end]
    else:  # reflect the indices at both ends, which are not repeated
        last = nb_timesteps - 1
        x = x[:, last - np.abs(last - np.abs(np.arange(begin, end)))]
    frames = np.lib.stride_tricks.sliding_window_view(x, n_fft, axis=1)[:, ::n_hop]
    return scipy.fft.rfft(frames * window)


def _blocks(nb_frames, n_fft):
    """Ranges of frames that stay in the second-level cache."""
    length = max(1, 2**16 // n_fft)
    return [(start, min(start + length, nb_frames)) for start in range(0, nb_frames, length)]


@kernel
def _magnitude(spectra: COMPLEX3, power: FLOAT, mono: INT, out: OUT(4), start: INT, sample: INT):
    nb_channels, nb_frames, nb_bins = spectra.shape
    scale = np.float32(1 / nb_channels) if mono else np.float32(1)
    for t in range(nb_frames):
        for c in range(nb_channels):
            s = spectra[c, t]
            y = out[start + t, sample, 0 if mono else c]
            if c == 0 or not mono:
                y[:] = 0
            if power == 1:
                for f in range(nb_bins):
                    y[f] += scale * np.sqrt(s[f].real * s[f].real + s[f].imag * s[f].imag)
            else:
                for f in range(nb_bins):
                    y[f] += scale * (s[f].real * s[f].real + s[f].imag * s[f].imag) ** (power / 2)


def spectrogram(x, n_fft, n_hop, center, power, mono, out):
    """Magnitude to a power, block by block of frames, so that no complex spectrogram is ever held.

    Args:
        x: audio (N, C, nb_timesteps)
        out: (T, N, 1 if mono else C, F)
    """
    window = hann(n_fft)

    def block(sample, start, stop):
        spectra = _spectra(x[sample], window, n_hop, center, start, stop)
        _magnitude(spectra, power, mono, out, start, sample)

    run([(block, sample, *frames) for sample in range(x.shape[0]) for frames in _blocks(len(out), n_fft)])


# ------------------------------------------------------------------------------------------- input stage


@kernel
def _scale_rows(weight: IN(2), mean: IN(1), scale: IN(1), scaled: OUT(2), sums: SUMS, part: INT, start: INT, stop: INT):
    shift = sums[part]
    shift[:] = 0
    for i in range(start, stop):
        b = i % len(mean)
        w, s = weight[i], scaled[i]
        for j in range(len(w)):
            s[j] = scale[b] * w[j]
        for j in range(len(w)):
            shift[j] += mean[b] * s[j]


def _scaled(weight, mean, scale):
    """scale · W, and (mean · scale) W."""
    scaled = np.empty_like(weight)
    parts = _split(len(weight), get_threads())
    sums = np.empty((len(parts), weight.shape[1]))
    run([(_scale_rows, weight, mean, scale, scaled, sums, i, *part) for i, part in enumerate(parts)])
    return scaled, sums.sum(0)


def input_affine(x, mean, scale, weight, out):
    """((x + mean) · scale) W over the first B bins, as x (scale · W) + (mean · scale) W.

    Args:
        x: (M, C, F); mean, scale: (B,)
        weight: (C · B, K)
        out: (M, K)
    """
    nb_bins = len(mean)
    scaled, out[:] = _scaled(weight, mean, scale)
    for c in range(x.shape[1]):
        matmul(x[:, c, :nb_bins], scaled[c * nb_bins : (c + 1) * nb_bins], out, accumulate=True)


@kernel
def _input_gradients(
    weight: IN(2), mean: IN(1), scale: IN(1), total: IN(1), dw: OUT(2), sums: SUMS, start: INT, stop: INT
):
    for i in range(start, stop):
        b = i % len(mean)
        w, d = weight[i], dw[i]
        along, across = np.float64(0), np.float64(0)
        for j in range(len(d)):
            product = d[j] + mean[b] * total[j]
            along += w[j] * product
            across += w[j] * total[j]
            d[j] = scale[b] * product
        sums[0, i] = along
        sums[1, i] = across


def input_affine_backward(x, mean, scale, weight, dy):
    """Gradients (dmean, dscale, dW) of `input_affine`.

    With P = xᵀ dY, s the sum of dY's rows, and b the bin of W's row i = (channel, b):
        dW[i]     = scale[b] (P[i] + mean[b] s)
        dscale[b] = Σ over channels of W[i] · (P[i] + mean[b] s)
        dmean[b]  = Σ over channels of scale[b] W[i] · s
    """
    nb_bins, nb_channels = len(mean), x.shape[1]
    dw = np.empty_like(weight)
    tasks = []
    for c in range(nb_channels):
        tasks += products(x[:, c, :nb_bins].T, dy, dw[c * nb_bins : (c + 1) * nb_bins])
    run(tasks)
    total = column_sums(dy)[0].astype(np.float32)
    sums = np.empty((2, len(weight)))
    run([(_input_gradients, weight, mean, scale, total, dw, sums, *rows) for rows in _split(len(dw), get_threads())])
    along, across = sums.reshape(2, nb_channels, nb_bins).sum(1)
    return (scale * across).astype(np.float32), along.astype(np.float32), dw


def input_affine_backward_data(dy, mean, scale, weight, dx, accumulate):
    """Gradient of `input_affine` towards x (M, C, F); bins that it does not read have none."""
    nb_bins = len(scale)
    scaled, _ = _scaled(weight, mean, scale)
    if not accumulate:
        dx[:, :, nb_bins:] = 0
    for c in range(dx.shape[1]):
        matmul(dy, scaled[c * nb_bins : (c + 1) * nb_bins].T, dx[:, c, :nb_bins], accumulate)


# ------------------------------------------------------------------------------------------- normalisation

# What follows the normalisation. MASK is ReLU, then the product with the mixture.
IDENTITY, TANH, RELU, MASK = range(4)
COLUMNS = 1024  # per pass over the rows, so that the running sums stay in the first-level cache


@kernel
def _column_sums(x: IN(2), sums: SUMS, start: INT, stop: INT):
    sums[:, start:stop] = 0
    for begin in range(start, stop, COLUMNS):
        end = min(begin + COLUMNS, stop)
        plain, square = sums[0, begin:end], sums[1, begin:end]
        for r in range(x.shape[0]):
            row = x[r, begin:end]
            for j in range(end - begin):
                value = np.float64(row[j])
                plain[j] += value
                square[j] += value * value


def column_sums(x):
    """Sums over the rows of x and of x², float64 (2, K). In float64 squares may be summed as they are."""
    sums = np.empty((2, x.shape[1]))
    run([(_column_sums, x, sums, *columns) for columns in _split(x.shape[1], 2 * get_threads(), 64)])
    return sums


@kernel
def _normalize(x: IN(2), center: IN(1), slope: IN(1), shift: IN(1), kind: INT, mixture: IN(2), out: OUT(2)):
    for r in range(len(x)):
        row, y, factor = x[r], out[r], mixture[r]
        for j in range(len(y)):
            y[j] = (row[j] - center[j]) * slope[j] + shift[j]
        if kind == TANH:
            for j in range(len(y)):
                y[j] = _tanh(y[j])
        elif kind == RELU:
            for j in range(len(y)):
                y[j] = np.float32(0) if y[j] < 0 else y[j]
        elif kind == MASK:
            for j in range(len(y)):
                value = y[j] * factor[j]
                y[j] = np.float32(0) if y[j] < 0 else value


def normalize(x, center, slope, shift, kind, mixture, out):
    """kind((x − center) · slope + shift), and times the mixture if kind is MASK.

    Args:
        x, mixture, out: (M, K); the mixture is only read by MASK
        center, slope, shift: (K,)
    """
    run(
        [
            (_normalize, x[i:j], center, slope, shift, kind, mixture[i:j], out[i:j])
            for i, j in _split(len(x), 4 * get_threads())
        ]
    )


@inline
def _through(kind, dy, other, x, center, slope, shift, r):
    """r = gradient towards the normalisation's output, from dy behind the activation, of one row.

    `other` is the output itself for TANH, the mixture for MASK.
    """
    if kind == IDENTITY:
        for j in range(len(r)):
            r[j] = dy[j]
    elif kind == TANH:
        for j in range(len(r)):
            r[j] = dy[j] * (np.float32(1) - other[j] * other[j])
    else:
        for j in range(len(r)):
            value = dy[j]  # a load under a condition would not become part of a vector
            r[j] = value if (x[j] - center[j]) * slope[j] + shift[j] > 0 else np.float32(0)
        if kind == MASK:
            for j in range(len(r)):
                r[j] *= other[j]


@kernel
def _gradient_sums(
    x: IN(2), dy: IN(2), other: IN(2), center: IN(1), slope: IN(1), shift: IN(1), kind: INT,
    sums: SUMS, start: INT, stop: INT,
):  # fmt: skip
    sums[:, start:stop] = 0
    buffers = np.empty((3, COLUMNS), np.float32)
    for begin in range(start, stop, COLUMNS):
        end = min(begin + COLUMNS, stop)
        middle, a, b = center[begin:end], slope[begin:end], shift[begin:end]
        plain, product = sums[0, begin:end], sums[1, begin:end]
        r, p, q = buffers[0, : end - begin], buffers[1, : end - begin], buffers[2, : end - begin]
        for block in range(0, len(x), 64):  # float32 within a block, float64 over blocks
            p[:] = 0
            q[:] = 0
            for i in range(block, min(block + 64, len(x))):
                row = x[i, begin:end]
                _through(kind, dy[i, begin:end], other[i, begin:end], row, middle, a, b, r)
                # one array written per loop: with more, the compiler gives up proving that they do not overlap
                for j in range(len(r)):
                    p[j] += r[j]
                for j in range(len(r)):
                    q[j] += r[j] * (row[j] - middle[j])
            for j in range(len(r)):
                plain[j] += p[j]
            for j in range(len(r)):
                product[j] += q[j]


@kernel
def _normalize_backward(
    x: IN(2), dy: IN(2), other: IN(2), center: IN(1), slope: IN(1), shift: IN(1), kind: INT,
    along: IN(1), offset: IN(1), dx: OUT(2),
):  # fmt: skip
    for i in range(len(x)):
        row, out = x[i], dx[i]
        _through(kind, dy[i], other[i], row, center, slope, shift, out)
        for j in range(len(row)):
            out[j] = out[j] * slope[j] + (row[j] - center[j]) * along[j] + offset[j]


def normalize_backward(x, dy, other, center, slope, shift, kind, inverse_std, batch_statistics, dx):
    """Gradient of `normalize`, towards x and the sums that give those of its parameters.

    Let u = (x − center) / std, v = slope·std·u + shift and r the gradient towards v. Returned are, in
    float64 and over rows, Σ r and Σ r u, (K,) each. If center and std are those of the M rows themselves,
    they depend on x too (Ioffe & Szegedy 2015):
        dx = slope · (r − Σ r / M − u · Σ r u / M)

    Args:
        x, dy, other: (M, K); other: the output for TANH, the mixture for MASK, else not read
        dx: (M, K), or None if not wanted
    """
    sums = np.empty((2, x.shape[1]))
    common = (center, slope, shift, kind)
    columns = _split(x.shape[1], 2 * get_threads(), 64)
    run([(_gradient_sums, x, dy, other, *common, sums, *part) for part in columns])
    sums[1] *= inverse_std
    if dx is not None:
        along, offset = np.zeros((2, x.shape[1]), np.float32)
        if batch_statistics:
            along[:] = -slope * inverse_std * sums[1] / len(x)
            offset[:] = -slope * sums[0] / len(x)
        run(
            [
                (_normalize_backward, x[i:j], dy[i:j], other[i:j], *common, along, offset, dx[i:j])
                for i, j in _split(len(x), 4 * get_threads())
            ]
        )
    return sums


# ------------------------------------------------------------------------------------------- LSTM


@inline
def _hash(x):
    """Mixes the bits of 32-bit words (the finalizer of MurmurHash3)."""
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x85EBCA6B))
    x = np.uint32(x ^ (x >> np.uint32(13)))
    x = np.uint32(x * np.uint32(0xC2B2AE35))
    return np.uint32(x ^ (x >> np.uint32(16)))


@kernel
def _dropout(x: IN(1), p: FLOAT, seed: types.uint32, layer: types.uint32, out: OUT(1), start: INT):
    limit = np.uint32(np.float64(p) * 4294967296.0)
    scale = np.float32(1 / (1 - np.float64(p)))
    key = _hash(seed + np.uint32(0x9E3779B9) * layer)
    for i in range(len(x)):
        kept = _hash(_hash(np.uint32(start + i) ^ seed) + key) >= limit
        out[i] = x[i] * scale if kept else np.float32(0)


def dropout(x, p, seed, layer, out):
    """Zero a share p of the numbers, multiply the others by 1 / (1 − p); out may be x.

    Which ones is a function of (seed, layer, index) alone: nothing is stored for the way back, and the
    number of threads does not matter. x, out: flat; seed: 32 bits.
    """
    run([(_dropout, x[i:j], p, seed, layer, out[i:j], i) for i, j in _split(len(x), get_threads())])


@inline
def _quarters(row):
    """The gates i, f, g, o in a row of them."""
    size = len(row) // 4
    return row[:size], row[size : 2 * size], row[2 * size : 3 * size], row[3 * size :]


@kernel
def _lstm_forward(gates: OUT(4), bias: IN(2), panels: IN(3), c: OUT(4), h: OUT(4), d: INT, first: INT, last: INT):
    nb_frames, _, nb_directions, size = h.shape
    rows = last - first
    z = np.zeros((rows, panels.shape[0] * PANEL), np.float32)
    zeros = np.zeros(size, np.float32)
    for step in range(nb_frames):
        t = nb_frames - 1 - step if d else step
        before = t + 1 if d else t - 1
        for r in range(rows):
            row, preset, b = gates[t, first + r, d], z[r], bias[d]
            for j in range(len(row)):
                preset[j] = row[j] + b[j]
        if step > 0:
            _small_product(h[before, first, d].ctypes.data, h.strides[1] // 4, rows, panels, z)
        for r in range(rows):
            n = first + r
            row, preset = gates[t, n, d], z[r]
            for j in range(len(row)):  # sigmoid(x) = tanh(x / 2) / 2 + 1 / 2: one loop for all gates
                is_g = 2 * size <= j < 3 * size
                scale = np.float32(1) if is_g else np.float32(0.5)
                row[j] = (np.float32(1) - scale) + scale * _tanh(scale * preset[j])
            i, f, g, o = _quarters(row)
            c_before, c_now, h_now = c[before, n, d] if step > 0 else zeros, c[t, n, d], h[t, n, d]
            for j in range(size):
                c_now[j] = f[j] * c_before[j] + i[j] * g[j]
            for j in range(size):
                h_now[j] = o[j] * _tanh(c_now[j])


@kernel
def _lstm_backward(
    gates: OUT(4), panels: IN(3), c: IN(4), dy: IN(4), d: INT, first: INT, last: INT, sums: SUMS, part: INT
):
    nb_frames, _, nb_directions, size = dy.shape
    rows = last - first
    dbias = sums[part]
    dbias[:] = 0
    dh = np.zeros((rows, panels.shape[0] * PANEL), np.float32)
    dc, zeros = np.zeros((rows, size), np.float32), np.zeros(size, np.float32)
    one = np.float32(1)
    for step in range(nb_frames):
        t = step if d else nb_frames - 1 - step
        before, after = (t + 1, t - 1) if d else (t - 1, t + 1)
        for r in range(rows):
            source, target = dy[t, first + r, d], dh[r]
            for j in range(size):
                target[j] = source[j]
        if step > 0:
            _small_product(gates[after, first, d].ctypes.data, gates.strides[1] // 4, rows, panels, dh)
        for r in range(rows):
            n = first + r
            c_before, c_now = c[before, n, d] if step < nb_frames - 1 else zeros, c[t, n, d]
            row = gates[t, n, d]
            i, f, g, o = _quarters(row)  # each becomes its gradient
            dh_now, dc_now = dh[r, :size], dc[r]
            for j in range(size):  # h = o tanh(c)
                tanh_c = _tanh(c_now[j])
                dc_now[j] += dh_now[j] * o[j] * (one - tanh_c * tanh_c)
                o[j] = dh_now[j] * tanh_c * o[j] * (one - o[j])
            for j in range(size):  # c = f c_before + i g
                di = dc_now[j] * g[j] * i[j] * (one - i[j])
                g[j] = dc_now[j] * i[j] * (one - g[j] * g[j])
                i[j] = di
            for j in range(size):
                dc_before = dc_now[j] * f[j]
                f[j] = dc_before * c_before[j] * (one - f[j])
                dc_now[j] = dc_before
            for j in range(len(row)):
                dbias[j] += row[j]


def _recurrences(nb_directions, nb_samples):
    """(direction, first sample, last sample) of each task: samples do not depend on each other."""
    samples = _split(nb_samples, -(-get_threads() // nb_directions))
    return [(d, *part) for part in samples for d in range(nb_directions)]


def lstm_layer(x, weight, bias, gates, c, h):
    """One LSTM layer, initial states zero, gates in the order input, forget, cell, output.

    Args:
        x: (T, N, I)
        weight: (D, 4, size, I + size), bias: (D, 4, size)
        gates: (T, N, D, 4 · size), written: the gates behind their sigmoid and tanh
        c, h: (T, N, D, size), written: cell and output
    """
    nb_directions, size, nb_inputs = weight.shape[0], weight.shape[2], x.shape[2]
    nb_rows = x.shape[0] * x.shape[1]
    # towards all gates of both directions at once
    flat = weight.reshape(nb_directions * 4 * size, -1)
    matmul(x.reshape(nb_rows, -1), flat[:, :nb_inputs].T, gates.reshape(nb_rows, -1))
    panels = [_panels(w.reshape(4 * size, -1)[:, nb_inputs:].T) for w in weight]
    bias = bias.reshape(nb_directions, -1)
    run(
        [
            (_lstm_forward, gates, bias, panels[d], c, h, d, *part)
            for d, *part in _recurrences(nb_directions, x.shape[1])
        ]
    )


def lstm_layer_backward(x, weight, gates, c, h, dy, dx, dweight, accumulate=(False, False)):
    """Gradients of `lstm_layer`; the gates are overwritten with their own.

    Args:
        dy: (T, N, D, size)
        dx: like x, or None
        dweight: like weight, or None
        accumulate: whether to add to dx, to dweight
    Returns:
        dbias (D, 4, size)
    """
    nb_directions, size, nb_inputs = weight.shape[0], weight.shape[2], x.shape[2]
    nb_samples, nb_rows = x.shape[1], x.shape[0] * x.shape[1]
    panels = [_panels(w.reshape(4 * size, -1)[:, nb_inputs:]) for w in weight]
    recurrences = _recurrences(nb_directions, nb_samples)
    sums = np.empty((len(recurrences), 4 * size))  # of the gates' gradients, over frames and a task's samples
    run([(_lstm_backward, gates, panels[d], c, dy, d, *part, sums, i) for i, (d, *part) in enumerate(recurrences)])

    flat, x, d_gates = weight.reshape(nb_directions * 4 * size, -1), x.reshape(nb_rows, -1), gates.reshape(nb_rows, -1)
    tasks = []
    if dx is not None:
        tasks += products(d_gates, flat[:, :nb_inputs], dx.reshape(nb_rows, -1), accumulate[0])
    if dweight is not None:
        d_flat = dweight.reshape(nb_directions * 4 * size, -1)
        tasks += products(d_gates.T, x, d_flat[:, :nb_inputs], accumulate[1])
        h = h.reshape(nb_rows, -1)
        for d in range(nb_directions):
            # frame t reads the h of frame t − 1, or of t + 1 in the reverse direction
            reader, read = (slice(0, -nb_samples), slice(nb_samples, None))[:: 1 if d else -1]
            own = slice(4 * size * d, 4 * size * (d + 1))
            if nb_rows > nb_samples:
                tasks += products(
                    d_gates[reader, own].T, h[read, size * d : size * (d + 1)], d_flat[own, nb_inputs:], accumulate[1]
                )
            elif not accumulate[1]:
                d_flat[own, nb_inputs:] = 0
    run(tasks)
    # tasks alternate between the directions
    return sums.reshape(-1, nb_directions, 4, size).sum(0).astype(np.float32)


class Lstm:
    """Stacked LSTM with dropout between the layers, and the memory of what the way back needs."""

    def __init__(self):
        self.layers = []
        self.buffers = {}

    def _buffer(self, name, shape):
        """An array that is kept from step to step: memory fresh from the system costs a tenth of the time."""
        if name not in self.buffers or self.buffers[name].shape != shape:
            self.buffers[name] = np.empty(shape, np.float32)
        return self.buffers[name]

    def _input(self, h, layer):
        """The input of a layer > 0: the output of the one below, (T, N, D, size), with dropout."""
        h = h.reshape(h.shape[:2] + (-1,))
        if self.p == 0:
            return h
        out = self._buffer("input", h.shape)
        dropout(h.reshape(-1), self.p, self.seed, layer, out.reshape(-1))
        return out

    def forward(self, x, weights, biases, p, seed, out, keep):
        """Args:
        x: (T, N, I)
        weights: per layer (D, 4, size, inputs + size)
        biases: per layer (D, 4, size)
        p, seed: share of dropout, 0 for none, and its 32 bits
        out: (T, N, D · size), written
        keep: what `backward` needs; without, memory does not grow with the number of layers
        """
        self.p, self.seed = p, seed
        self.layers = []
        nb_directions, _, size, _ = weights[0].shape
        shape = x.shape[:2] + (nb_directions,)
        below = x
        for k, (weight, bias) in enumerate(zip(weights, biases)):
            last = k == len(weights) - 1
            slot = k if keep else 0
            gates = self._buffer(("gates", slot), shape + (4 * size,))
            c = self._buffer(("c", slot), shape + (size,))
            h = out.reshape(c.shape) if last else self._buffer(("h", k if keep else k % 2), c.shape)
            lstm_layer(below, weight, bias, gates, c, h)
            self.layers.append((gates, c, h))
            if not last:
                below = self._input(h, k + 1)
        if not keep:
            self.layers, self.buffers = [], {}

    def backward(self, x, weights, dy, dx, dweights, accumulate):
        """Gradients, into dx and dweights (None: not wanted); `forward` comes first each time.

        Args:
            dy: (T, N, D · size)
            accumulate: whether to add to dx, then to each of dweights
        Returns:
            gradients of the biases
        """
        dbiases = []
        for k in reversed(range(len(weights))):
            gates, c, h = self.layers.pop()
            if k == 0:
                below, d_below, add = x, dx, accumulate[0]
            else:
                below, add = self._input(self.layers[-1][2], k), False
                d_below = self._buffer(("d_below", k % 2), below.shape)
            options = (add, accumulate[1 + k])
            dy = dy.reshape(c.shape)
            dbiases.append(lstm_layer_backward(below, weights[k], gates, c, h, dy, d_below, dweights[k], options))
            if k > 0 and self.p > 0:
                dropout(d_below.reshape(-1), self.p, self.seed, k, d_below.reshape(-1))
            dy = d_below
        return dbiases[::-1]


# ------------------------------------------------------------------------------------------- loss and optimizer


@kernel
def _squared_error(a: IN(1), b: IN(1), sums: SUMS, part: INT):
    total = np.float64(0)
    for i in range(len(a)):
        difference = np.float64(a[i] - b[i])
        total += difference * difference
    sums[0, part] = total


def squared_error(a, b):
    """Mean of (a − b)² over flat arrays, accumulated in float64."""
    parts = _split(len(a), -(-len(a) // 2**18))  # by length alone: the same for any number of threads
    sums = np.empty((1, len(parts)))
    run([(_squared_error, a[i:j], b[i:j], sums, part) for part, (i, j) in enumerate(parts)])
    return sums.sum() / len(a)


@kernel
def _difference(a: IN(1), b: IN(1), factor: FLOAT, add: FLOAT, out: OUT(1)):
    if add:
        for i in range(len(a)):
            out[i] += factor * (a[i] - b[i])
    else:
        for i in range(len(a)):
            out[i] = factor * (a[i] - b[i])


def difference(a, b, factor, out, accumulate=False):
    """out (+)= factor · (a − b), flat arrays."""
    parts = _split(len(a), 4 * get_threads())
    run([(_difference, a[i:j], b[i:j], factor, accumulate, out[i:j]) for i, j in parts])


@kernel
def _adam(
    w: OUT(1), g: IN(1), m: OUT(1), v: OUT(1), rate: FLOAT, new_m: FLOAT, new_v: FLOAT, beta2: FLOAT,
    correction: FLOAT, eps: FLOAT, decay: FLOAT,
):  # fmt: skip
    for i in range(len(w)):
        gradient = g[i] + decay * w[i]
        m[i] += new_m * (gradient - m[i])
        v[i] = beta2 * v[i] + new_v * gradient * gradient
        w[i] -= rate * m[i] / (np.sqrt(v[i]) * correction + eps)


def adam(parameters, step, lr, beta1, beta2, eps, weight_decay):
    """One step of Adam with L2 weight decay, as torch.optim.Adam: eps is added after v's bias correction.

    Args:
        parameters: tuples (value, gradient, first moment, second moment) of flat arrays; all but the
            gradient are updated in place
        step: 1 for the first
    """
    rate = lr / (1 - beta1**step)
    correction = 1 / np.sqrt(1 - beta2**step)
    # 1 − β₂ in double precision: a float32 of 0.999 would put it off by 5e-5
    numbers = (rate, 1 - beta1, 1 - beta2, beta2, correction, eps, weight_decay)
    tasks = []
    for arrays in parameters:
        size = len(arrays[0])
        parts = _split(size, -(-size // 2**17))
        tasks += [(_adam, *(array[i:j] for array in arrays), *numbers) for i, j in parts]
    run(tasks)


# ------------------------------------------------------------------------------------------- separation


def stft(x, n_fft, n_hop, start, stop):
    """Frames start … stop of the centred STFT of audio (C, nb_timesteps): complex64 (C, stop − start, F)."""
    window = hann(n_fft)
    out = np.empty((len(x), stop - start, n_fft // 2 + 1), np.complex64)

    def block(begin, end):
        out[:, begin:end] = _spectra(x, window, n_hop, True, start + begin, start + end)

    run([(block, *part) for part in _split(stop - start, -(-(stop - start) // 16))])
    return out


def magnitude(spectra, mono):
    """Magnitude of complex64 spectra (C, T, F) in the network's layout, (T, 1, 1 if mono else C, F)."""
    nb_channels, nb_frames, nb_bins = spectra.shape
    out = np.empty((nb_frames, 1, 1 if mono else nb_channels, nb_bins), np.float32)
    _magnitude(spectra, 1, mono, out, 0, 0)
    return out


@kernel
def _overlap_add(frames: IN(2), window: IN(1), n_hop: INT, out: OUT(1), start: INT):
    for t in range(len(frames)):
        begin = (start + t) * n_hop
        frame, place = frames[t], out[begin : begin + len(window)]
        for i in range(len(window)):
            place[i] += frame[i] * window[i]


def overlap_add(y, n_fft, n_hop, sums, envelope):
    """Add windowed frames of audio, and their windows squared, from spectra.

    Args:
        y: complex64 (J, C, T, F)
        sums: (J, C, nb_timesteps), envelope: (nb_timesteps,), both added to; nb_timesteps = (T − 1) n_hop + n_fft
    """
    window = hann(n_fft)

    def row(spectra, out):
        for start in range(0, len(spectra), 16):
            frames = scipy.fft.irfft(spectra[start : start + 16], n_fft)
            _overlap_add(frames, window, n_hop, out, start)

    run([(row, y[j, c], sums[j, c]) for j in range(len(y)) for c in range(y.shape[1])])
    squares = window * window
    for t in range(y.shape[2]):
        envelope[t * n_hop : t * n_hop + n_fft] += squares


# ------------------------------------------------------------------------------------------- Wiener filter

# Complex numbers are read and written as pairs, and in between kept as planes: for n bins of one frame, four
# rows of n numbers, real and imaginary part of the left, then of the right channel. Mono is stereo whose right
# channel is silent. The arithmetic is in double precision, since the inverse of two nearly proportional channels
# needs it, and costs little beside reading and writing. Loops write one row each, as the compiler makes vectors of
# no loop in which too many arrays might overlap.

BINS = 180  # of a task, which filters them over all frames: enough for long rows, few enough for several tasks


@inline
def _load(row, real, imag):
    for f in range(len(real)):
        real[f] = row[2 * f]
        imag[f] = row[2 * f + 1]


@inline
def _store(real, imag, row):
    for f in range(len(real)):
        row[2 * f] = real[f]
        row[2 * f + 1] = imag[f]


@inline
def _initial_estimates(v, t, start, mix, nb_channels, softmask, residual, eps, y):
    """Frame t of the first estimates: magnitudes with the mixture's phases, or shares of the mixture.

    Zero has the phase that NumPy gives it: 0, or π if its real part is −0.

    Args:
        v: (J, T, C or 1, F); mix: (4, n) planes
        y: (J, 4, n) planes, written; or J + 1 sources, the last being what the others leave of the mixture
    """
    nb_sources, n = len(v), mix.shape[1]
    real, imag, share = np.empty(n), np.empty(n), np.ones(n)
    for c in range(nb_channels):
        at = min(c, v.shape[2] - 1)
        real[:] = mix[2 * c]
        imag[:] = mix[2 * c + 1]
        if residual:
            y[nb_sources, 2 * c] = real
            y[nb_sources, 2 * c + 1] = imag
        if softmask:
            share[:] = eps
            for j in range(nb_sources):
                row = v[j, t, at, start : start + n]
                for f in range(n):
                    share[f] += row[f]
            for f in range(n):
                share[f] = 1 / share[f]
        else:
            for f in range(n):
                magnitude = np.sqrt(real[f] * real[f] + imag[f] * imag[f])
                real[f] = real[f] / magnitude if magnitude > 0 else np.copysign(1.0, real[f])
                imag[f] = imag[f] / magnitude if magnitude > 0 else 0.0
        for j in range(nb_sources):
            row, y_real, y_imag = v[j, t, at, start : start + n], y[j, 2 * c], y[j, 2 * c + 1]
            for f in range(n):
                magnitude = row[f] * share[f]
                y_real[f] = magnitude * real[f]
                y_imag[f] = magnitude * imag[f]
        if residual:
            for j in range(nb_sources):
                for k in range(2 * c, 2 * c + 2):
                    for f in range(n):
                        y[nb_sources, k, f] -= y[j, k, f]


@inline
def _add_covariances(y, sums):
    """sums (J, 4, n) += |y₀|², |y₁|², real and imaginary part of y₀ ȳ₁."""
    for j in range(len(y)):
        a, b, c, d = y[j, 0], y[j, 1], y[j, 2], y[j, 3]
        left, right, real, imag = sums[j, 0], sums[j, 1], sums[j, 2], sums[j, 3]
        for f in range(len(a)):
            left[f] += a[f] * a[f] + b[f] * b[f]
        for f in range(len(a)):
            right[f] += c[f] * c[f] + d[f] * d[f]
        for f in range(len(a)):
            real[f] += a[f] * c[f] + b[f] * d[f]
        for f in range(len(a)):
            imag[f] += b[f] * c[f] - a[f] * d[f]


@inline
def _filter_frame(mix, R, nb_channels, noise, y):
    """y_j ← p_j R_j z with z = (Σ_i p_i R_i + noise)⁻¹ mix, where p_j is the mean of |y_j|² over channels.

    The matrices are Hermitian, and inverted in closed form:
        ⎡ a  b ⎤⁻¹          1      ⎡  d  −b ⎤
        ⎣ b̄  d ⎦    =  ─────────── ⎣ −b̄   a ⎦ ,    a and d real
                       a d − |b|²

    Args:
        mix: (4, n) planes; y: (J, 4, n) planes, read and overwritten
        R: (J, 4, n), ordered like the sums of `_add_covariances`
    """
    nb_sources, n = len(y), mix.shape[1]
    powers, total, z, scale = np.empty((nb_sources, n)), np.zeros((4, n)), np.empty((4, n)), np.empty(n)
    total[0] = noise
    total[1] = noise if nb_channels == 2 else 1  # the silent channel: any number but 0, as it cancels
    for j in range(nb_sources):
        p, y0, y1, y2, y3 = powers[j], y[j, 0], y[j, 1], y[j, 2], y[j, 3]
        for f in range(n):
            p[f] = (y0[f] * y0[f] + y1[f] * y1[f] + y2[f] * y2[f] + y3[f] * y3[f]) / nb_channels
        for k in range(4):
            r, out = R[j, k], total[k]
            for f in range(n):
                out[f] += p[f] * r[f]

    a, d, b, b_imag = total[0], total[1], total[2], total[3]
    x0, x1, x2, x3 = mix[0], mix[1], mix[2], mix[3]
    z0, z1, z2, z3 = z[0], z[1], z[2], z[3]
    for f in range(n):
        scale[f] = 1 / (a[f] * d[f] - b[f] * b[f] - b_imag[f] * b_imag[f])
    for f in range(n):
        z0[f] = scale[f] * (d[f] * x0[f] - b[f] * x2[f] + b_imag[f] * x3[f])
    for f in range(n):
        z1[f] = scale[f] * (d[f] * x1[f] - b[f] * x3[f] - b_imag[f] * x2[f])
    for f in range(n):
        z2[f] = scale[f] * (a[f] * x2[f] - b[f] * x0[f] - b_imag[f] * x1[f])
    for f in range(n):
        z3[f] = scale[f] * (a[f] * x3[f] - b[f] * x1[f] + b_imag[f] * x0[f])

    for j in range(nb_sources):
        p, y0, y1, y2, y3 = powers[j], y[j, 0], y[j, 1], y[j, 2], y[j, 3]
        left, right, real, imag = R[j, 0], R[j, 1], R[j, 2], R[j, 3]
        for f in range(n):
            y0[f] = p[f] * (left[f] * z0[f] + real[f] * z2[f] - imag[f] * z3[f])
        for f in range(n):
            y1[f] = p[f] * (left[f] * z1[f] + real[f] * z3[f] + imag[f] * z2[f])
        for f in range(n):
            y2[f] = p[f] * (right[f] * z2[f] + real[f] * z0[f] + imag[f] * z1[f])
        for f in range(n):
            y3[f] = p[f] * (right[f] * z3[f] + real[f] * z1[f] - imag[f] * z0[f])


@inline
def _wiener_bins(v, x, iterations, softmask, residual, eps, weight, noise, out, start, stop):
    """Some bins of `wiener`; x (C, T, 2 F) and out (J, C, T, 2 F) are seen as pairs."""
    nb_sources, nb_channels, nb_frames, _ = out.shape
    n = stop - start
    mix, y = np.zeros((4, n)), np.zeros((nb_sources, 4, n))
    sums, R = np.zeros((nb_sources, 4, n)), np.empty((nb_sources, 4, n))
    # Sweep 0 makes the initial estimates, each later one is an iteration, and every one adds up what the next
    # needs. The initial estimates are not kept for the first iteration: making them again is cheaper.
    for sweep in range(iterations + 1):
        for t in range(nb_frames):
            for c in range(nb_channels):
                _load(x[c, t, 2 * start : 2 * stop], mix[2 * c], mix[2 * c + 1])
            if sweep < 2:
                _initial_estimates(v, t, start, mix, nb_channels, softmask, residual, eps, y)
            else:
                for j in range(nb_sources):
                    for c in range(nb_channels):
                        _load(out[j, c, t, 2 * start : 2 * stop], y[j, 2 * c], y[j, 2 * c + 1])
            if sweep > 0:
                _filter_frame(mix, R, nb_channels, noise, y)
            if sweep > 0 or iterations == 0:
                for j in range(nb_sources):
                    for c in range(nb_channels):
                        _store(y[j, 2 * c], y[j, 2 * c + 1], out[j, c, t, 2 * start : 2 * stop])
            if sweep < iterations:
                _add_covariances(y, sums)
        for j in range(nb_sources):
            for f in range(n):
                scale = 1 / (weight + (sums[j, 0, f] + sums[j, 1, f]) / nb_channels)
                for k in range(4):
                    R[j, k, f] = scale * sums[j, k, f]
        sums[:] = 0


DOUBLE = types.float64


@kernel
def _wiener_single(
    v: IN(4), x: IN(3), iterations: INT, softmask: INT, residual: INT, eps: DOUBLE, weight: DOUBLE, noise: DOUBLE,
    out: OUT(4), start: INT, stop: INT,
):  # fmt: skip
    _wiener_bins(v, x, iterations, softmask, residual, eps, weight, noise, out, start, stop)


@kernel
def _wiener_double(
    v: types.Array(DOUBLE, 4, "C", readonly=True), x: types.Array(DOUBLE, 3, "C", readonly=True), iterations: INT,
    softmask: INT, residual: INT, eps: DOUBLE, weight: DOUBLE, noise: DOUBLE, out: types.Array(DOUBLE, 4, "C"),
    start: INT, stop: INT,
):  # fmt: skip
    _wiener_bins(v, x, iterations, softmask, residual, eps, weight, noise, out, start, stop)


def wiener(v, x, iterations, softmask, residual, eps, weight, noise, out):
    """Multichannel Wiener filter for one or two channels; `filtering.separate` explains what it computes.

    Two passes over the data for the first iteration, one for each further one. No bin depends on another one,
    and sums over frames have one order: the number of threads does not change a bit.

    Args:
        v: (J, T, C or 1, F) magnitudes
        x: (C, T, F) complex mixture
        iterations, softmask, residual: as in `filtering.separate`
        eps: added to the sum of magnitudes in the soft mask
        weight: added to the sum of powers that the covariances are divided by
        noise: added to the diagonal of the mixture's covariance
        out: (J, C, T, F) complex, written; J + 1 sources with a residual
    """
    function = _wiener_single if x.dtype == np.complex64 else _wiener_double
    numbers = (iterations, int(softmask), int(residual), eps, weight, noise)
    x, out = x.view(v.dtype), out.view(v.dtype)
    nb_bins = v.shape[3]
    run([(function, v, x, *numbers, out, *part) for part in _split(nb_bins, -(-nb_bins // BINS))])


def peak(x):
    """max |x| of a complex array (C, T, F), without an array of all magnitudes."""
    peaks = np.zeros((x.shape[0], x.shape[1]))

    def block(start, stop):
        np.abs(x[:, start:stop]).max(axis=2, initial=0, out=peaks[:, start:stop])

    run([(block, *part) for part in _split(x.shape[1], -(-x.shape[1] // 32))])
    return peaks.max(initial=0)
