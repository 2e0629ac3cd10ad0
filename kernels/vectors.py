"""Vectors of numbers in registers, in LLVM's instructions: where a compiler would not find them by itself."""

import math

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils

LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8  # float32 numbers of a vector
PANEL = 2 * LANES  # weights are rearranged into panels of two vectors' width

SINGLE, VECTOR = ir.FloatType(), ir.VectorType(ir.FloatType(), LANES)
INT32, INT64 = ir.IntType(32), ir.IntType(64)
ZEROS = ir.Constant(VECTOR, [0.0] * LANES)


def aligned(*shape: int) -> np.ndarray:
    """An array, not initialised, in which no vector lies in two lines of the cache."""
    memory = np.empty(math.prod(shape) + 16, np.float32)
    start = -memory.ctypes.data // 4 % 16
    return memory[start : start + math.prod(shape)].reshape(shape)


def shift(builder: ir.IRBuilder, address: ir.Value, *offsets: ir.Value) -> ir.Value:
    """The address of what lies the sum of some offsets, in numbers of four bytes, behind."""
    for offset in offsets:
        address = builder.add(address, builder.mul(offset, INT64(4)))
    return address


def load(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def everywhere(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """A vector whose lanes are all the same."""
    undefined = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    first = builder.insert_element(undefined, value, INT32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(INT32, LANES), [0] * LANES))


def fma(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """a · b + c, rounded once."""
    return _call(builder, f"llvm.fma.v{LANES}f32", a, b, c, result=VECTOR)


def first_lanes(builder: ir.IRBuilder, count: ir.Value) -> ir.Value:
    """The mask of a vector's first `count` lanes."""
    lanes = ir.Constant(ir.VectorType(INT32, LANES), list(range(LANES)))
    return builder.icmp_signed("<", lanes, everywhere(builder, builder.trunc(count, INT32)))


def load_masked(builder: ir.IRBuilder, address: ir.Value, mask: ir.Value) -> ir.Value:
    """Zeros where the mask is not; what would lie there is not read."""
    pointer = builder.inttoptr(address, VECTOR.as_pointer())
    return _call(builder, f"llvm.masked.load.v{LANES}f32.p0", pointer, INT32(4), mask, ZEROS, result=VECTOR)


def store_masked(builder: ir.IRBuilder, value: ir.Value, address: ir.Value, mask: ir.Value) -> None:
    pointer = builder.inttoptr(address, VECTOR.as_pointer())
    _call(builder, f"llvm.masked.store.v{LANES}f32.p0", value, pointer, INT32(4), mask, result=ir.VoidType())


def transpose(builder: ir.IRBuilder, vectors: list) -> list:
    """LANES vectors as the rows of a matrix: its columns."""
    half = LANES // 2
    merges = [[start + i // 2 + i % 2 * LANES for i in range(LANES)] for start in (0, half)]
    merges = [ir.Constant(ir.VectorType(INT32, LANES), merge) for merge in merges]
    for _ in range(LANES.bit_length() - 1):  # each time, the numbers of two in turn
        pairs = zip(vectors[:half], vectors[half:])
        vectors = [builder.shuffle_vector(*pair, merge) for pair in pairs for merge in merges]
    return vectors


def _call(builder, name, *arguments, result):
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)
