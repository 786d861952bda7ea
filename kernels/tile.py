"""Vectors and the register tile: with the barrier, the only files that know LLVM.

It gives Numba

- a type, ``Vector``, of as many numbers as a register holds (`LANES`), with loads and stores, whole or in part, and
  arithmetic (``+ - * /``, `fma`, `absolute`, ...) that never reorders anything: the same equation gives the same bits
  wherever the code around it was compiled;
- `tile_product`, a block of up to `ROWS` rows by `VECS` vectors of a matrix product, whose sums stay in registers: the
  multiply-add units' peak is reached here or nowhere; and `row_and_tile_product`, for a single row;
- `at`, an element's address: inner functions take addresses and strides, a register each, where an array takes seven.

The tile's shape comes from the CPU that Numba compiles for (``NUMBA_CPU_NAME``, ``NUMBA_CPU_FEATURES``): three
quarters of the vector registers hold sums, the rest a row of the right factor and a broadcast number of the left.
"""

import operator
import re

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

I32, I64 = ir.IntType(32), ir.IntType(64)


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
# One row waits for its weights: several panels at once are several streams of them, and a tile of RIDER_ROWS by one
# vector rides along.
ROW_PANELS, RIDER_ROWS = (4, 12) if REGISTERS == 32 else (2, 4)

# Rows, vectors and panels of tiles.
SHAPES = [(r, v, 1) for r in range(1, ROWS + 1) for v in (1, 2, VECS)] + [(1, VECS, n) for n in {2, ROW_PANELS}]
SHAPES_OF_THREE = [(r, 3, 1) for r in range(1, ROWS + 1)] + [(1, 3, n) for n in {2, ROW_PANELS}]
ROW_SHAPES = [shape for shape in SHAPES + SHAPES_OF_THREE if shape[0] == 1]


class Vector(types.Type):
    def __init__(self, dtype):
        self.dtype, self.lanes = dtype, LANES[dtype]
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _vector(manager.lookup(kind.dtype).get_value_type()))


# What the code generators below are made of.


def _bits(element):
    return 32 if isinstance(element, ir.FloatType) else 64


def _vector(element):
    return ir.VectorType(element, VECTOR_BYTES * 8 // _bits(element))


def _splat(builder, scalar, count):
    undefined = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, count), [0] * count))


def _call(builder, name, result, *args):
    signature = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def _call_vector(builder, name, *vectors):
    vector = vectors[0].type
    return _call(builder, f"llvm.{name}.v{vector.count}f{_bits(vector.element)}", vector, *vectors)


def _fma(builder, x, y, z):
    return _call_vector(builder, "fma", x, y, z) if FUSED else builder.fadd(builder.fmul(x, y), z)


def _load(builder, pointer):
    vector = _vector(pointer.type.pointee)
    value = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    value.align = _bits(vector.element) // 8
    return value


def _store(builder, value, pointer):
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = _bits(value.type.element) // 8


def _mask(builder, vector, n):
    """The first ``n`` lanes."""
    lane = ir.Constant(ir.VectorType(I64, vector.count), list(range(vector.count)))
    return builder.icmp_signed("<", lane, _splat(builder, n, vector.count))


def _load_part(builder, pointer, n):
    vector = _vector(pointer.type.pointee)
    address = builder.bitcast(pointer, vector.as_pointer())
    name, align = f"llvm.masked.load.v{vector.count}f{_bits(vector.element)}.p0", I32(_bits(vector.element) // 8)
    return _call(builder, name, vector, address, align, _mask(builder, vector, n), ir.Constant(vector, None))


def _store_part(builder, value, pointer, n):
    vector = value.type
    address = builder.bitcast(pointer, vector.as_pointer())
    name, align = f"llvm.masked.store.v{vector.count}f{_bits(vector.element)}.p0", I32(_bits(vector.element) // 8)
    _call(builder, name, ir.VoidType(), value, address, align, _mask(builder, vector, n))


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
def pointer(typing, address, like):
    """An integer as the address of numbers of the array ``like``'s type."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(types.int64, like), codegen


@intrinsic
def lanes(typing, address):
    """How many numbers of the address's type a vector holds."""
    return types.int64(address), lambda context, builder, signature, args: I64(LANES[address.dtype])


@intrinsic
def width(typing, address):
    """How many numbers of the address's type a tile is wide."""
    return types.int64(address), lambda context, builder, signature, args: I64(VECS * LANES[address.dtype])


@intrinsic
def call(typing, function, arguments):
    """Call the C function at an address, with a tuple of arguments and no result."""

    def codegen(context, builder, signature, args):
        arguments_ = [builder.extract_value(args[1], i) for i in range(len(arguments))]
        kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments_])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), arguments_)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen


@intrinsic
def load_whole(typing, address):
    """The vector at ``address``, which need not be aligned."""
    return Vector(address.dtype)(address), lambda context, builder, signature, args: _load(builder, *args)


@intrinsic
def load_part(typing, address, n):
    """The first ``n`` numbers of the vector at ``address``: those past them are not read, and are 0."""

    def codegen(context, builder, signature, args):
        return _load_part(builder, *args)

    return Vector(address.dtype)(address, types.int64), codegen


@intrinsic
def store_whole(typing, vector, address):
    def codegen(context, builder, signature, args):
        _store(builder, *args)
        return context.get_dummy_value()

    return types.void(vector, address), codegen


@intrinsic
def store_part(typing, vector, address, n):
    """Write the first ``n`` numbers of a vector; memory past them stays as it is."""

    def codegen(context, builder, signature, args):
        _store_part(builder, *args)
        return context.get_dummy_value()

    return types.void(vector, address, types.int64), codegen


@intrinsic
def transpose(typing, source, source_row, target, target_row):
    """``target = source.T`` for a square of as many rows as a vector has lanes."""

    def codegen(context, builder, signature, args):
        source, source_row, target, target_row = args
        vector = _vector(source.type.pointee)
        n = vector.count
        rows = [_load(builder, builder.gep(source, [builder.mul(source_row, I64(i))])) for i in range(n)]
        d = n // 2
        while d:  # swap the two blocks of d by d beside the diagonal of every block of 2 d by 2 d
            upper = [lane if not lane & d else n + lane - d for lane in range(n)]
            lower = [lane + d if not lane & d else n + lane for lane in range(n)]
            for i in range(n):
                if not i & d:
                    pair = rows[i], rows[i + d]
                    for row, lanes in ((i, upper), (i + d, lower)):
                        rows[row] = builder.shuffle_vector(*pair, ir.Constant(ir.VectorType(I32, n), lanes))
            d //= 2
        for i, row in enumerate(rows):
            _store(builder, row, builder.gep(target, [builder.mul(target_row, I64(i))]))
        return context.get_dummy_value()

    return types.void(source, types.int64, target, types.int64), codegen


def _offset(builder, address, stride, n):
    return builder.gep(address, [builder.mul(stride, I64(n)) if isinstance(stride, ir.Value) else I64(stride * n)])


def _multiply_add(builder, sums, numbers, right):
    """``sums[i, j] += numbers[i] * right[j]``: sums in memory that LLVM turns into registers, numbers by address."""
    for i, number in enumerate(numbers):
        number = _splat(builder, builder.load(number), right[0].type.count)
        for j, vector in enumerate(right):
            s = sums[i * len(right) + j]
            builder.store(_fma(builder, number, vector, builder.load(s)), s)


def _tile_product(shapes, lanes):
    """The code generator of `tile_product` for some shapes: rows, vectors, panels."""

    def generate(builder, r, v, several, args):
        n, start, start_row, target, target_row, (a, a_row, a_k, blocks, a_block), p, p_panel, p_row, K = args
        places = [(i, j) for i in range(r) for j in range(v * several)]
        sums = [cgutils.alloca_once(builder, _vector(start.type.pointee)) for _ in places]

        def place(base, stride, i, j):
            return _offset(builder, _offset(builder, base, stride, i + j // v), lanes, j % v)

        def each(whole, part):
            """Do ``whole(sum, place)``, or ``part(sum, place, columns)`` where the matrix's edge cuts the tile."""
            if v < 3:
                for s, (i, j) in zip(sums, places):
                    part(s, (i, j), builder.sub(n, I64(j * lanes)))
                return
            with builder.if_else(builder.icmp_signed(">=", n, I64(v * several * lanes))) as (then, otherwise):
                with then:
                    for s, (i, j) in zip(sums, places):
                        whole(s, (i, j))
                with otherwise:
                    for s, (i, j) in zip(sums, places):
                        part(s, (i, j), builder.sub(n, I64(j * lanes)))

        each(
            lambda s, ij: builder.store(_load(builder, place(start, start_row, *ij)), s),
            lambda s, ij, n: builder.store(_load_part(builder, place(start, start_row, *ij), n), s),
        )
        with cgutils.for_range(builder, blocks) as q, cgutils.for_range(builder, K) as k:
            row = builder.gep(p, [builder.mul(builder.add(builder.mul(q.index, K), k.index), p_row)])
            right = [_load(builder, place(row, p_panel, 0, j)) for j in range(v * several)]
            column = builder.gep(a, [builder.add(builder.mul(q.index, a_block), builder.mul(k.index, a_k))])
            _multiply_add(builder, sums, [_offset(builder, column, a_row, i) for i in range(r)], right)
            if r > 1:
                # No code, but LLVM unrolls no loop with it: a tall tile gains nothing by it, and compiles for longer.
                builder.asm(ir.FunctionType(ir.VoidType(), []), "", "", [], True)
        each(
            lambda s, ij: _store(builder, builder.load(s), place(target, target_row, *ij)),
            lambda s, ij, n: _store_part(builder, builder.load(s), place(target, target_row, *ij), n),
        )

    def codegen(context, builder, signature, args):
        rows, vecs, panels, *rest = args
        rest[5] = [builder.extract_value(rest[5], i) for i in range(5)]
        done = builder.append_basic_block("done")
        shape = builder.add(builder.mul(builder.add(builder.mul(rows, I64(8)), vecs), I64(8)), panels)
        switch = builder.switch(shape, done)
        for r, v, several in shapes:
            block = builder.append_basic_block(f"tile.{r}.{v}.{several}")
            switch.add_case(I64((r * 8 + v) * 8 + several), block)
            builder.position_at_end(block)
            generate(builder, r, v, several, rest)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return codegen


@intrinsic
def tile_product(
    typing, rows, vecs, panels, n, start, start_row, target, target_row, left, packed, packed_panel, packed_row, K
):
    """``target = start + left @ packed``, one tile of ``rows`` rows and ``n`` columns, in ``vecs`` vectors a row.

    start, target: addresses of matrices with ``*_row`` numbers from row to row (0: one row for all).
    left: ``Left(address, row, k, blocks, block)`` as `gemm` describes it.
    packed: address of a panel of ``left.blocks * K`` rows, ``packed_row`` numbers apart.
    rows: at most `ROWS`. vecs: 1, 2 or `VECS`, enough for n. panels: 1; or, for one row and `VECS`, 2 or
    `ROW_PANELS` whole panels at once, which lie ``packed_panel`` numbers apart, and so do start's and target's,
    ``*_row`` numbers apart.

    A number of the product is one chain of multiply-adds, over k in ascending order.
    """
    kinds = (*(types.int64,) * 4, start, types.int64, target, types.int64, left, packed, *(types.int64,) * 3)
    return types.void(*kinds), _tile_product(SHAPES, LANES[packed.dtype])


@intrinsic
def tile_product_of_three(
    typing, rows, vecs, panels, n, start, start_row, target, target_row, left, packed, packed_panel, packed_row, K
):
    """`tile_product` for three vectors only: less code."""
    kinds = (*(types.int64,) * 4, start, types.int64, target, types.int64, left, packed, *(types.int64,) * 3)
    return types.void(*kinds), _tile_product(SHAPES_OF_THREE, LANES[packed.dtype])


@intrinsic
def row_product(
    typing, rows, vecs, panels, n, start, start_row, target, target_row, left, packed, packed_panel, packed_row, K
):
    """`tile_product` for one row only: less code."""
    kinds = (*(types.int64,) * 4, start, types.int64, target, types.int64, left, packed, *(types.int64,) * 3)
    return types.void(*kinds), _tile_product(ROW_SHAPES, LANES[packed.dtype])


def _row_and_tile_product(v, L):
    """The code generator of `row_and_tile_product` for panels of v vectors."""

    def codegen(context, builder, signature, args):
        target, target_panel, a, packed, packed_panel, packed_row, K, tile_start, tile, tile_row = args[:10]
        left, left_row, right, tile_K = args[10:]
        vector = _vector(target.type.pointee)
        sums = [cgutils.alloca_once(builder, vector) for _ in range(ROW_PANELS * v)]
        tile_sums = [cgutils.alloca_once(builder, vector) for _ in range(RIDER_ROWS)]

        def place(base, panel, j):
            return _offset(builder, _offset(builder, base, panel, j // v), L, j % v)

        def row_step(k):
            row = builder.gep(packed, [builder.mul(k, packed_row)])
            weights = [_load(builder, place(row, packed_panel, j)) for j in range(len(sums))]
            _multiply_add(builder, sums, [builder.gep(a, [k])], weights)

        def tile_step(k):
            numbers = [builder.gep(_offset(builder, left, left_row, i), [k]) for i in range(RIDER_ROWS)]
            _multiply_add(
                builder, tile_sums, numbers, [_load(builder, builder.gep(right, [builder.mul(k, packed_row)]))]
            )

        for j, s in enumerate(sums):
            builder.store(_load(builder, place(target, target_panel, j)), s)
        for s in tile_sums:
            builder.store(_load(builder, tile_start), s)
        both = builder.select(builder.icmp_signed("<", K, tile_K), K, tile_K)
        with cgutils.for_range(builder, both) as loop:
            row_step(loop.index)
            tile_step(loop.index)
        with cgutils.for_range(builder, builder.sub(K, both)) as loop:
            row_step(builder.add(loop.index, both))
        with cgutils.for_range(builder, builder.sub(tile_K, both)) as loop:
            tile_step(builder.add(loop.index, both))
        for j, s in enumerate(sums):
            _store(builder, builder.load(s), place(target, target_panel, j))
        for i, s in enumerate(tile_sums):
            _store(builder, builder.load(s), _offset(builder, tile, tile_row, i))
        return context.get_dummy_value()

    return codegen


@intrinsic
def row_and_tile_product(
    typing,
    target,
    target_panel,
    a,
    packed,
    packed_panel,
    packed_row,
    K,
    tile_start,
    tile,
    tile_row,
    left,
    left_row,
    right,
    tile_K,
):
    """Two products at once: one that waits for memory, and one that keeps the multiply-add units busy meanwhile.

    ``target += a @ packed`` for a row ``a`` of K numbers and `ROW_PANELS` panels of `VECS` vectors,
    ``packed_panel`` numbers apart, their rows ``packed_row`` apart.
    ``tile = tile_start + left @ right`` for `RIDER_ROWS` rows, ``tile_row`` and ``left_row`` numbers apart, and one
    vector of columns: tile_start is one vector, and right has ``tile_K`` rows, ``packed_row`` numbers apart.
    Each number is summed as in `tile_product`.
    """
    n = types.int64
    kinds = (target, n, a, packed, n, n, n, tile_start, tile, n, left, n, right, n)
    return types.void(*kinds), _row_and_tile_product(VECS, LANES[packed.dtype])


@intrinsic
def row_and_tile_product_of_three(
    typing,
    target,
    target_panel,
    a,
    packed,
    packed_panel,
    packed_row,
    K,
    tile_start,
    tile,
    tile_row,
    left,
    left_row,
    right,
    tile_K,
):
    """`row_and_tile_product` for panels of three vectors."""
    n = types.int64
    kinds = (target, n, a, packed, n, n, n, tile_start, tile, n, left, n, right, n)
    return types.void(*kinds), _row_and_tile_product(3, LANES[packed.dtype])


# Arithmetic. A Python number takes the vector's dtype, so that an equation reads as it is written.


@intrinsic
def dot_products(typing, w, row, rows, x, K):
    """``w @ x`` for as many rows of K numbers as a vector has lanes, ``row`` numbers apart; w and x are addresses.

    With fewer ``rows`` than lanes, the last one stands for those that are not there.
    """

    def codegen(context, builder, signature, args):
        w, row, rows, x, K = args
        n, vector = LANES[signature.return_type.dtype], _vector(w.type.pointee)
        last = builder.sub(rows, I64(1))
        places = []
        for i in range(n):
            i = builder.select(builder.icmp_signed("<", I64(i), last), I64(i), last)
            places.append(builder.gep(w, [builder.mul(i, row)]))
        sums = [cgutils.alloca_once_value(builder, ir.Constant(vector, None)) for _ in range(n)]
        whole = builder.and_(K, I64(-n))

        def add(k, load):
            right = load(builder.gep(x, [k]))
            for s, place in zip(sums, places):
                builder.store(_fma(builder, load(builder.gep(place, [k])), right, builder.load(s)), s)

        with cgutils.for_range_slice(builder, I64(0), whole, I64(n)) as (k, _):
            add(k, lambda address: _load(builder, address))
        with builder.if_then(builder.icmp_signed("<", whole, K)):
            add(whole, lambda address: _load_part(builder, address, builder.sub(K, whole)))
        return _sums_by_lane(builder, [builder.load(s) for s in sums])

    return Vector(x.dtype)(w, types.int64, types.int64, x, types.int64), codegen


def _sums_by_lane(builder, vectors):
    """The vector whose lane i is the sum of the i-th vector's lanes, of as many vectors as there are lanes."""
    n = vectors[0].type.count
    d = n // 2
    while len(vectors) > 1:  # vector i of a pair keeps lanes i, i + 2 d, ... of d each, to which the others are added
        half = len(vectors) // 2
        added = []
        for a, b in zip(vectors[:half], vectors[half:]):
            low = [lane if not lane & d else n + lane - d for lane in range(n)]
            high = [lane + d if not lane & d else n + lane for lane in range(n)]
            parts = [builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, n), at)) for at in (low, high)]
            added.append(builder.fadd(*parts))
        vectors, d = added, d // 2
    return vectors[0]


def _elementwise(function):
    """A code generator that applies ``function(builder, *vectors)`` to the arguments."""

    def codegen(context, builder, signature, args):
        vector = context.get_value_type(signature.return_type)
        operands = []
        for kind, value in zip(signature.args, args):
            if not isinstance(kind, Vector):
                value = value if value.type == vector.element else builder.fptrunc(value, vector.element)
                value = _splat(builder, value, vector.count)
            operands.append(value)
        return function(builder, *operands)

    return codegen


def _common(*kinds):
    """The vector type among arguments that are vectors of one type and float64 numbers, or None."""
    vectors = {kind for kind in kinds if isinstance(kind, Vector)}
    others = {kind for kind in kinds if not isinstance(kind, Vector)}
    return vectors.pop() if len(vectors) == 1 and others <= {types.float64} else None


def _lower_operator(operation, instruction):
    @type_callable(operation)
    def type_operation(context):
        return lambda x, y: _common(x, y)

    codegen = _elementwise(lambda builder, x, y: getattr(builder, instruction)(x, y))
    for kinds in ((Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
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

    def polynomial(builder, x, *c):
        total = c[-1]
        for term in reversed(c[:-1]):
            total = _fma(builder, total, x, term)
        return total

    def codegen(context, builder, signature, args):
        numbers = [builder.extract_value(args[1], i) for i in range(len(coefficients))]
        return _elementwise(polynomial)(context, builder, x(x, *coefficients), [args[0], *numbers])

    return x(x, coefficients), codegen


@intrinsic
def map_lanes(typing, function, x):
    """``function``, which Numba has compiled, of each number of a vector."""
    signature_ = typing.resolve_function_type(function, (x.dtype,), {})

    def codegen(context, builder, signature, args):
        call = context.get_function(function, signature_)
        context.add_linking_libs(getattr(call, "libs", ()))
        vector = args[1]
        for i in range(x.lanes):
            value = call(builder, [builder.extract_element(args[1], I32(i))])
            value = context.cast(builder, value, signature_.return_type, x.dtype)
            vector = builder.insert_element(vector, value, I32(i))
        return vector

    return x(function, x), codegen


@intrinsic
def absolute(typing, x):
    return x(x), _elementwise(lambda builder, x: _call_vector(builder, "fabs", x))


@intrinsic
def copysign(typing, x, sign):
    """``x`` with the sign of ``sign``."""
    return x(x, sign), _elementwise(lambda builder, x, sign: _call_vector(builder, "copysign", x, sign))


@intrinsic
def at_least(typing, x, least):
    """``max(x, least)``, and NaN where ``x`` is NaN."""
    select = _elementwise(lambda builder, x, least: builder.select(builder.fcmp_ordered("<", x, least), least, x))
    return x(x, least), select


@intrinsic
def where_negative(typing, x, a, b):
    """``a`` where ``x < 0``, else ``b``."""

    def select(builder, x, a, b):
        return builder.select(builder.fcmp_ordered("<", x, ir.Constant(x.type, None)), a, b)

    return x(x, a, b), _elementwise(select)


@intrinsic
def low_bits_to_exponent(typing, x):
    """Shift a number's low bits into its exponent's place.

    Adding 1.5 * 2**23 (float32) to a number rounds it to an integer n that then stands in the low bits, and so is
    2**n made without a conversion.
    """

    def shift(builder, x):
        integers = ir.VectorType(ir.IntType(_bits(x.type.element)), x.type.count)
        mantissa = ir.Constant(integers, [23 if _bits(x.type.element) == 32 else 52] * x.type.count)
        return builder.bitcast(builder.shl(builder.bitcast(x, integers), mantissa), x.type)

    return x(x), _elementwise(shift)
