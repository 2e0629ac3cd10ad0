"""Products of matrices: large ones by SciPy's sgemm over our threads, small ones, for loops, by a kernel of our own."""

import ctypes
import itertools

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


def panels(matrix: np.ndarray) -> np.ndarray:
    """Weights (depth, columns) as panels (ceil(columns / PANEL), depth, PANEL), filled up with zeros."""
    depth, columns = matrix.shape
    padded = np.zeros((depth, -(-columns // PANEL) * PANEL), np.float32)
    padded[:, :columns] = matrix
    return np.ascontiguousarray(padded.reshape(depth, -1, PANEL).transpose(1, 0, 2))


@inline
def small_product(a, a_row, rows, panels, c):
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
