"""The register tile: a block of SIMD vectors that LLVM keeps in registers. The only file that knows LLVM.

It gives Numba

- the type ``Tile(dtype, rows, vecs)``: ``rows`` rows of ``vecs`` vectors, each of `LANES[dtype]` numbers. The sizes
  are part of the type, so every loop over them is unrolled and a tile lives in registers. A tile of one row and one
  vector is simply a vector;
- `tile_load`, `tile_fma` and `tile_store`, and arithmetic on tiles (``+ - * /``, `fma`, `absolute`, ...), which never
  reorders anything: the same tile gives the same bits wherever the code around it was compiled;
- `at`, an element's address: inner functions take addresses and strides, a register each, where an array takes seven;
- the barrier at which threads meet, and `kernel`, the one decorator that owns every compile option.

The tile's shape comes from the CPU that Numba compiles for (``NUMBA_CPU_NAME``, ``NUMBA_CPU_FEATURES``): three
quarters of the vector registers accumulate, the rest hold a row of the packed matrix and a broadcast number.
"""

import hashlib
import operator
import re
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

I1, I32, I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)


def _source_stamp():
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()


SOURCE_STAMP = _source_stamp()
# No fastmath: arithmetic is done as written, with `fma` spelt out, and so gives the same bits everywhere.
OPTIONS = {"nogil": True, "boundscheck": False, "error_model": "numpy", "fastmath": False}


def kernel(function):
    """Compile ``function`` with the options that every kernel shares.

    What is compiled is kept in ``NUMBA_CACHE_DIR``, beside the source or in the user's cache folder; where none of
    these can be written, it is compiled anew in every process. Numba's cache looks at the file that a function stands
    in; here an edit of any kernel's file makes it stale.
    """
    try:
        dispatcher = numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # there is no folder to cache in
        return numba.njit(**OPTIONS)(function)
    cache_file = getattr(dispatcher._cache, "_cache_file", None)
    if cache_file is not None:
        cache_file._source_stamp = SOURCE_STAMP
    return dispatcher


def part(function=None, *, inline=True):
    """As `kernel`, for what only other kernels call: without a Python wrapper, and cached with its callers."""
    if function is None:
        return lambda function: part(function, inline=inline)
    return numba.njit(forceinline=inline, no_cpython_wrapper=True, no_cfunc_wrapper=True, **OPTIONS)(function)


def _probe():
    """The vector width in bytes, the number of vector registers, and whether multiply-add is fused: LLVM is asked."""
    module = llvm.parse_assembly("""
        declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
        define void @probe(ptr %p) {
          %x = load <16 x float>, ptr %p
          %y = call <16 x float> @llvm.fma.v16f32(<16 x float> %x, <16 x float> %x, <16 x float> %x)
          store <16 x float> %y, ptr %p
          ret void
        }""")
    module.triple = llvm.get_process_triple()
    assembly = cpu_target.target_context.codegen()._tm.emit_assembly(module)
    width = 64 if "zmm" in assembly else 32 if "ymm" in assembly else 16
    x86 = re.match(r"x86|i\d86", module.triple) is not None
    return width, 16 if x86 and width < 64 else 32, re.search(r"vfn?madd|fmla", assembly) is not None


VECTOR_BYTES, REGISTERS, FUSED = _probe()
LANES = {types.float32: VECTOR_BYTES // 4, types.float64: VECTOR_BYTES // 8}
LANES_OF = {np.dtype(str(dtype)): count for dtype, count in LANES.items()}
VECS = 4
ROWS = 6 if REGISTERS == 32 else 3 if FUSED else 2


class Tile(types.Type):
    def __init__(self, dtype, rows, vecs):
        self.dtype, self.rows, self.vecs, self.lanes = dtype, rows, vecs, LANES[dtype]
        super().__init__(name=f"Tile({dtype}, {rows}, {vecs})")


@register_model(Tile)
class _TileModel(models.PrimitiveModel):
    def __init__(self, manager, tile):
        vector = ir.VectorType(manager.lookup(tile.dtype).get_value_type(), tile.lanes)
        super().__init__(manager, tile, ir.ArrayType(vector, tile.rows * tile.vecs))


# What the code generators below are made of. A tile's value is an array of vectors, row after row.


def _vector(context, tile):
    return ir.VectorType(context.get_value_type(tile.dtype), tile.lanes)


def _splat(builder, scalar, lanes):
    undefined = ir.Constant(ir.VectorType(scalar.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, lanes), [0] * lanes))


def _gather(builder, vectors):
    value = ir.Constant(ir.ArrayType(vectors[0].type, len(vectors)), ir.Undefined)
    for i, vector in enumerate(vectors):
        value = builder.insert_value(value, vector, i)
    return value


def _spread(builder, value):
    return [builder.extract_value(value, i) for i in range(value.type.count)]


def _call(builder, name, result, *args):
    signature = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def _bits(vector):
    return 32 if isinstance(vector.element, ir.FloatType) else 64


def _call_vector(builder, name, *vectors):
    vector = vectors[0].type
    return _call(builder, f"llvm.{name}.v{vector.count}f{_bits(vector)}", vector, *vectors)


def _fma(builder, x, y, z):
    return _call_vector(builder, "fma", x, y, z) if FUSED else builder.fadd(builder.fmul(x, y), z)


def _addresses(builder, tile, vector, pointer, ld):
    """The address of each vector of a tile that lies in memory with ``ld`` numbers from row to row."""
    for i in range(tile.rows):
        row = builder.gep(pointer, [builder.mul(ld, I64(i))])
        for j in range(tile.vecs):
            yield builder.bitcast(builder.gep(row, [I64(j * tile.lanes)]), vector.as_pointer())


def _load(builder, address):
    value = builder.load(address)
    value.align = _bits(address.type.pointee) // 8
    return value


def _mask(builder, tile, i, n):
    """Which lanes of a tile's vector ``i`` lie before column ``n``."""
    first = i % tile.vecs * tile.lanes
    columns = ir.Constant(ir.VectorType(I64, tile.lanes), list(range(first, first + tile.lanes)))
    return builder.icmp_signed("<", columns, _splat(builder, n, tile.lanes))


def _sized(rows, vecs, pointer):
    if isinstance(rows, types.IntegerLiteral) and isinstance(vecs, types.IntegerLiteral):
        return Tile(pointer.dtype, rows.literal_value, vecs.literal_value)
    return None


# Addresses and memory.


@intrinsic
def at(typing, base, offset):
    """The address of element ``offset`` of a C-contiguous array, or ``offset`` numbers past another address."""

    def codegen(context, builder, signature, args):
        pointer, offset = args
        if isinstance(base, types.Array):
            pointer = context.make_array(base)(context, builder, pointer).data
        return builder.gep(pointer, [offset])

    return types.CPointer(base.dtype)(base, types.int64), codegen


@intrinsic
def lanes(typing, pointer):
    """How many numbers of the pointer's type a vector holds."""

    def codegen(context, builder, signature, args):
        return I64(LANES[pointer.dtype])

    return types.int64(pointer), codegen


@intrinsic
def tile_load(typing, rows, vecs, pointer, ld):
    """The ``rows x vecs`` tile at ``pointer``, ``ld`` numbers from row to row (0: the same row for all)."""
    tile = _sized(rows, vecs, pointer)
    if tile is None:
        return None

    def codegen(context, builder, signature, args):
        _, _, pointer, ld = args
        addresses = _addresses(builder, tile, _vector(context, tile), pointer, ld)
        return _gather(builder, [_load(builder, address) for address in addresses])

    return tile(rows, vecs, pointer, types.int64), codegen


@intrinsic
def tile_load_part(typing, rows, vecs, pointer, ld, n):
    """As `tile_load`, but of ``n`` columns: what lies past them is not read, and is 0."""
    tile = _sized(rows, vecs, pointer)
    if tile is None:
        return None

    def codegen(context, builder, signature, args):
        _, _, pointer, ld, n = args
        vector = _vector(context, tile)
        name = f"llvm.masked.load.v{tile.lanes}f{_bits(vector)}.p0"
        align, zero = I32(_bits(vector) // 8), ir.Constant(vector, None)
        vectors = [
            _call(builder, name, vector, address, align, _mask(builder, tile, i, n), zero)
            for i, address in enumerate(_addresses(builder, tile, vector, pointer, ld))
        ]
        return _gather(builder, vectors)

    return tile(rows, vecs, pointer, types.int64, types.int64), codegen


@intrinsic
def tile_store(typing, tile, pointer, ld):
    """Write a tile to ``pointer``, ``ld`` numbers from row to row."""

    def codegen(context, builder, signature, args):
        value, pointer, ld = args
        vector = _vector(context, tile)
        for v, address in zip(_spread(builder, value), _addresses(builder, tile, vector, pointer, ld)):
            builder.store(v, address).align = _bits(vector) // 8
        return context.get_dummy_value()

    return types.void(tile, pointer, types.int64), codegen


@intrinsic
def tile_store_part(typing, tile, pointer, ld, n):
    """As `tile_store`, but of ``n`` columns: what lies past them in memory stays as it is."""

    def codegen(context, builder, signature, args):
        value, pointer, ld, n = args
        vector = _vector(context, tile)
        name, align = f"llvm.masked.store.v{tile.lanes}f{_bits(vector)}.p0", I32(_bits(vector) // 8)
        for i, address in enumerate(_addresses(builder, tile, vector, pointer, ld)):
            mask = _mask(builder, tile, i, n)
            _call(builder, name, ir.VoidType(), builder.extract_value(value, i), address, align, mask)
        return context.get_dummy_value()

    return types.void(tile, pointer, types.int64, types.int64), codegen


@intrinsic
def tile_fma(typing, tile, a, ra, p):
    """``tile[i, :] + a[i * ra] * p[:]`` for every row ``i``: the step over ``k`` of a matrix product."""

    def codegen(context, builder, signature, args):
        value, a, ra, p = args
        one_row = Tile(tile.dtype, 1, tile.vecs)
        row = [_load(builder, address) for address in _addresses(builder, one_row, _vector(context, tile), p, I64(0))]
        sums = _spread(builder, value)
        for i in range(tile.rows):
            number = builder.load(builder.gep(a, [builder.mul(ra, I64(i))]))
            number = _splat(builder, number, tile.lanes)
            for j in range(tile.vecs):
                n = i * tile.vecs + j
                sums[n] = _fma(builder, number, row[j], sums[n])
        return _gather(builder, sums)

    return tile(tile, a, types.int64, p), codegen


# Arithmetic. A Python number takes the tile's dtype, so that an equation reads as it is written.


def _elementwise(function):
    """A code generator that applies ``function(builder, *vectors)`` to each vector of the arguments."""

    def codegen(context, builder, signature, args):
        tile = signature.return_type
        vector = _vector(context, tile)
        operands = []
        for kind, value in zip(signature.args, args):
            if isinstance(kind, Tile):
                operands.append(_spread(builder, value))
            else:
                number = value if value.type == vector.element else builder.fptrunc(value, vector.element)
                operands.append([_splat(builder, number, tile.lanes)] * (tile.rows * tile.vecs))
        return _gather(builder, [function(builder, *vectors) for vectors in zip(*operands)])

    return codegen


def _common(*kinds):
    """The tile type among arguments that are tiles of one type and float64 numbers, or None."""
    tiles = {kind for kind in kinds if isinstance(kind, Tile)}
    others = {kind for kind in kinds if not isinstance(kind, Tile)}
    return tiles.pop() if len(tiles) == 1 and others <= {types.float64} else None


def _lower_operator(operation, instruction):
    @type_callable(operation)
    def type_operation(context):
        return lambda x, y: _common(x, y)

    codegen = _elementwise(lambda builder, x, y: getattr(builder, instruction)(x, y))
    for kinds in ((Tile, Tile), (Tile, types.Float), (types.Float, Tile)):
        lower_builtin(operation, *kinds)(codegen)


_lower_operator(operator.add, "fadd")
_lower_operator(operator.sub, "fsub")
_lower_operator(operator.mul, "fmul")
_lower_operator(operator.truediv, "fdiv")


@intrinsic
def fma(typing, x, y, z):
    """``x * y + z``, rounded once where the CPU can."""
    return _common(x, y, z)(x, y, z), _elementwise(_fma)


@intrinsic
def horner(typing, x, coefficients):
    """The polynomial ``c[0] + c[1] x + c[2] x^2 + ...``."""

    def codegen(context, builder, signature, args):
        numbers = [builder.extract_value(args[1], i) for i in range(len(coefficients))]

        def polynomial(builder, v, *c):
            total = c[-1]
            for term in reversed(c[:-1]):
                total = _fma(builder, total, v, term)
            return total

        return _elementwise(polynomial)(context, builder, x(x, *coefficients), [args[0], *numbers])

    return x(x, coefficients), codegen


@intrinsic
def absolute(typing, x):
    return x(x), _elementwise(lambda builder, v: _call_vector(builder, "fabs", v))


@intrinsic
def copysign(typing, x, sign):
    """``x`` with the sign of ``sign``."""
    return x(x, sign), _elementwise(lambda builder, v, s: _call_vector(builder, "copysign", v, s))


@intrinsic
def at_least(typing, x, least):
    """``max(x, least)``, and NaN where ``x`` is NaN."""
    select = _elementwise(lambda builder, v, m: builder.select(builder.fcmp_ordered("<", v, m), m, v))
    return x(x, least), select


@intrinsic
def where_negative(typing, x, a, b):
    """``a`` where ``x < 0``, else ``b``."""

    def select(builder, v, a, b):
        return builder.select(builder.fcmp_ordered("<", v, ir.Constant(v.type, None)), a, b)

    return x(x, a, b), _elementwise(select)


@intrinsic
def low_bits_to_exponent(typing, x):
    """Shift a number's low bits into its exponent's place.

    Adding 1.5 * 2**23 (float32) to a number rounds it to an integer n that then stands in the low bits, and so is
    2**n made without a conversion.
    """

    def shift(builder, v):
        integers = ir.VectorType(ir.IntType(_bits(v.type)), v.type.count)
        mantissa = ir.Constant(integers, [23 if _bits(v.type) == 32 else 52] * v.type.count)
        return builder.bitcast(builder.shl(builder.bitcast(v, integers), mantissa), v.type)

    return x(x), _elementwise(shift)


# The barrier at which threads meet once a time step. It is an int64 array: arrivals, and a flag that calls it off.


@intrinsic
def _arrive(typing, barrier):
    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", args[0], I64(1), "acq_rel")

    return types.int64(barrier), codegen


@intrinsic
def _read(typing, barrier):
    def codegen(context, builder, signature, args):
        return builder.load_atomic(args[0], "acquire", 8)

    return types.int64(barrier), codegen


@intrinsic
def _pause(typing):
    """Tell the CPU that this is a spin loop."""

    def codegen(context, builder, signature, args):
        triple = builder.module.triple
        if triple.startswith("x86"):
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType())
        elif triple.startswith(("aarch64", "arm64")):
            _call(builder, "llvm.aarch64.hint", ir.VoidType(), I32(1))
        return context.get_dummy_value()

    return types.void(), codegen


_give_way = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())


@part(inline=False)
def meet(barrier, parties):
    """Wait until all ``parties`` threads have arrived. ``barrier``: int64 (2), zeros at first, shared by them.

    Spins, and gives the CPU away now and then in case a party waits for it. Returns at once, for good, when
    ``barrier[1]`` is set: whoever leaves the others in the lurch sets it.
    """
    if parties == 1:
        return
    arrived = _arrive(at(barrier, 0))
    target = (arrived // parties + 1) * parties
    spins = 0
    while _read(at(barrier, 0)) < target and _read(at(barrier, 1)) == 0:
        spins += 1
        if spins & 1023:
            _pause()
        else:
            _give_way()
