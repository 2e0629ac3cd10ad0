"""Products of matrices: large ones by SciPy's sgemm over our threads, small ones, for loops, by a kernel of our own."""

import ctypes
import itertools
import math

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.blas import one_thread, routine
from kernels.compiler import inline
from kernels.shapes import check
from kernels.threads import get_threads, run, split


def _operand(matrix):
    """(transposed, leading dimension) of a float32 matrix whose rows, or columns, are contiguous."""
    if matrix.dtype != np.float32:
        raise ValueError(f"a product of {matrix.dtype}: float32 is needed")
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
    sgemm = routine("cython_blas", "sgemm", 13)
    with one_thread:
        sgemm(trans_b, trans_a, n, m, k, alpha, data[1], ldb, data[0], lda, beta, data[2], ldc)


def products(a: np.ndarray, b: np.ndarray, out: np.ndarray, accumulate: bool = False) -> list[tuple]:
    """The tasks, for `run`, of out = a @ b, or out += a @ b.

    Transposes and slices of rows or columns cost nothing: of a and b either the rows or the columns must be
    contiguous, of out the rows.

    Raises:
        ValueError: shapes that do not fit, strides that BLAS cannot take, not float32
    """
    check(a=(a, "M K"), b=(b, "K L"), out=(out, "M L"))
    for matrix in (a, b, out):
        _operand(matrix)  # raises
    m, n = out.shape
    parts = get_threads()
    if m >= n // 4:
        return [(_product, a[i:j], b, out[i:j], accumulate) for i, j in split(m, parts, 16)]
    return [(_product, a, b[:, i:j], out[:, i:j], accumulate) for i, j in split(n, parts, 16)]


def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b: see `products`."""
    run(products(a, b, out, accumulate))


# A product for the LSTM: few rows (the batch), and the same weights in every frame. sgemm rearranges the
# weights on each call, which takes longer than to multiply; here they are rearranged once, into panels of
# two vectors' width, each panel (depth, PANEL) contiguous. A tile of up to 8 rows by one panel is kept in
# registers over the depth: per step two loads of weights and, for each row, one number of `a`. An addition waits
# for the one before it, so SUMS sums take turns over the depth: with few rows all at once, with more one after the
# other, so that a row's rounding does not depend on how many there are.
LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
PANEL = 2 * LANES
SUMS = 4  # the depth is filled up to a multiple of it
DEPTH = 256  # a panel of this depth fits in the first-level cache, to be used by all tiles


def _tile(rows):
    """c (rows, PANEL) += a (rows, depth) @ panel (depth, PANEL), from addresses and row lengths."""
    vector, single, int32, int64 = ir.VectorType(ir.FloatType(), LANES), ir.FloatType(), ir.IntType(32), ir.IntType(64)
    at_once = max(1, SUMS // rows)
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
        zero = ir.Constant(vector, [0.0] * LANES)
        sums = {(0, r, v): builder.load(c_at[r][v], align=4) for r, v in itertools.product(range(rows), range(2))}
        for begin in range(0, SUMS, at_once):
            places = list(itertools.product(range(begin, begin + at_once), range(rows), range(2)))
            entry = builder.block
            loop, done = builder.append_basic_block("depth"), builder.append_basic_block("done")
            builder.branch(loop)

            builder.position_at_end(loop)
            k = builder.phi(int64)
            before = {place: builder.phi(vector) for place in places}
            for place in places:
                before[place].add_incoming(sums.get(place, zero), entry)
            for number in range(begin, begin + at_once):
                row = builder.add(k, int64(number))
                weights = address(panel, builder.mul(row, int64(PANEL)))
                w = [builder.load(pointer(address(weights, int64(LANES * v)), vector), align=4) for v in range(2)]
                for r in range(rows):
                    one = builder.load(builder.gep(a_at[r], [row]))
                    one = builder.insert_element(undefined, one, int32(0))
                    one = builder.shuffle_vector(one, undefined, to_all_lanes)
                    for v in range(2):
                        sums[number, r, v] = builder.call(fma, [one, w[v], before[number, r, v]])
            following = builder.add(k, int64(SUMS))
            builder.cbranch(builder.icmp_signed("<", following, depth), loop, done)
            k.add_incoming(int64(0), entry)
            k.add_incoming(following, loop)
            for place in places:
                before[place].add_incoming(sums[place], loop)
            builder.position_at_end(done)

        for r, v in itertools.product(range(rows), range(2)):
            whole = [sums[number, r, v] for number in range(SUMS)]
            while len(whole) > 1:
                whole = [builder.fadd(*pair) for pair in zip(whole[::2], whole[1::2])]
            builder.store(whole[0], c_at[r][v], align=4)
        return context.get_dummy_value()

    @intrinsic
    def tile(typing, a, a_row, panel, c, c_row, depth):
        return types.void(*[types.intp] * 6), generate

    return tile


_tile8, _tile4, _tile2, _tile1 = _tile(8), _tile(4), _tile(2), _tile(1)


def panels(matrices: list[np.ndarray]) -> np.ndarray:
    """Weights, each (depth, columns) or with several axes for columns, as panels (len, nb_panels, depth, PANEL).

    Filled up with zeros: the depth to a multiple of SUMS, the columns to as many panels as the widest needs.
    """
    depth, columns = len(matrices[0]), max(matrix[0].size for matrix in matrices)
    shape = len(matrices), -(-columns // PANEL), -(-depth // SUMS) * SUMS, PANEL
    memory = np.empty(math.prod(shape) + LANES, np.float32)
    start = -memory.ctypes.data // 4 % LANES  # no vector lies in two lines of the cache
    out = memory[start : start + math.prod(shape)].reshape(shape)
    run([(_pack, *pair) for pair in zip(matrices, out)])
    return out


def _pack(matrix, out):
    matrix = matrix.reshape(len(matrix), -1)
    depth, columns = matrix.shape
    whole = columns // PANEL
    out[:, depth:] = 0
    out[whole:] = 0
    out[:whole, :depth] = matrix[:, : whole * PANEL].reshape(depth, whole, PANEL).transpose(1, 0, 2)
    if columns % PANEL:
        out[whole, :depth, : columns % PANEL] = matrix[:, whole * PANEL :]


@inline
def small_product(a, a_row, rows, panels, c, back):
    """c (rows, panels · PANEL) += a @ weights; a: address of its first number, a_row: from row to row.

    What exceeds a cache is read anew each time, if always from the start: walked to and fro, the panels that come first
    are those that came last before.
    """
    nb_panels, depth, _ = panels.shape
    weights, out, c_row = panels.ctypes.data, c.ctypes.data, c.shape[1]
    for number in range(nb_panels):
        p = nb_panels - 1 - number if back else number
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
