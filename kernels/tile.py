"""The register tile: products whose sums stay in registers, where the multiply-add units' peak is reached or nowhere.

`tile_product` is a block of up to `ROWS` rows by `VECS` vectors of a matrix product, `row_and_tile_product` one for a
single row, `dot_products` those of rows as they lie. The tile's shape comes from the CPU's registers: three quarters of
them hold sums, the rest a row of the right factor and a broadcast number of the left.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .vector import (
    FUSED,
    I32,
    I64,
    LANES,
    MASKED,
    REGISTERS,
    Vector,
    fma_of,
    load_of,
    mask_of,
    splat,
    store_of,
    vector_of,
)

VECS = 4
ROWS = 6 if REGISTERS == 32 else 3 if FUSED else 2
# One row waits for its weights: several panels at once are several streams of them, and a tile of RIDER_ROWS by one
# vector rides along.
ROW_PANELS, RIDER_ROWS = (4, 12) if REGISTERS == 32 else (2, 4)

# Rows, vectors and panels of tiles.
SHAPES = [(r, v, 1) for r in range(1, ROWS + 1) for v in (1, 2, VECS)] + [(1, VECS, n) for n in {2, ROW_PANELS}]
SHAPES_OF_THREE = [(r, 3, 1) for r in range(1, ROWS + 1)] + [(1, 3, n) for n in {2, ROW_PANELS}]
ROW_SHAPES = [shape for shape in SHAPES + SHAPES_OF_THREE if shape[0] == 1]


@intrinsic
def width(typing, address):
    """How many numbers of the address's type a tile is wide."""
    return types.int64(address), lambda context, builder, signature, args: I64(VECS * LANES[address.dtype])


def _offset(builder, address, stride, n):
    return builder.gep(address, [builder.mul(stride, I64(n)) if isinstance(stride, ir.Value) else I64(stride * n)])


def _multiply_add(builder, sums, numbers, vectors):
    """``sums[i, j] += numbers[i] * vectors[j]``: all by address, and the sums in memory that LLVM turns into registers.

    Of the numbers and the vectors the fewer stay in registers while the others pass, so that most are left for sums.
    """
    n, lanes = len(vectors), sums[0].type.pointee.count

    def add(i, j, x, y):
        s = sums[i * n + j]
        builder.store(fma_of(builder, x, y, builder.load(s)), s)

    def number(i):
        return splat(builder, builder.load(numbers[i]), lanes)

    def vector(j):
        return load_of(builder, vectors[j])

    if len(numbers) < n:
        column = [number(i) for i in range(len(numbers))]
        for j in range(n):
            y = vector(j)
            for i, x in enumerate(column):
                add(i, j, x, y)
    else:
        row = [vector(j) for j in range(n)]
        for i in range(len(numbers)):
            x = number(i)
            for j, y in enumerate(row):
                add(i, j, x, y)


def _tile_product(shapes, lanes, apart):
    """The code generator of `tile_product` for some shapes: rows, vectors, panels.

    apart: each shape is a function, for LLVM takes more than twice as long for all of them in one.
    """

    def generate(r, v, several, builder, args):
        n, start, start_row, target, target_row, a, a_row, a_k, blocks, a_block, p, p_panel, p_row, K = args
        number = start.type.pointee
        sums = [cgutils.alloca_once(builder, vector_of(number)) for _ in range(r * several * v)]
        # So many vectors of a row are whole in any case: with fewer columns there would be fewer vectors, but for 3.
        whole = v if several > 1 else {1: 0, 2: 1, 3: 0, 4: 2}[v]
        masks = {j: mask_of(builder, number, builder.sub(n, I64(j * lanes))) for j in range(whole, v)}

        def every(base, stride, do):
            """``do(sum, place, mask)``, of every sum, where its vector begins, and the mask or None."""

            def with_masks(masks):
                for i in range(r * several):
                    row = _offset(builder, base, stride, i)
                    for j in range(v):
                        do(sums[i * v + j], _offset(builder, row, lanes, j), masks.get(j))

            if not masks or MASKED:
                with_masks(masks)
                return
            with builder.if_else(builder.icmp_signed(">=", n, I64(v * lanes))) as (then, otherwise):
                with then:
                    with_masks({})
                with otherwise:
                    with_masks(masks)

        every(start, start_row, lambda s, place, mask: builder.store(load_of(builder, place, mask), s))
        left = [_offset(builder, a, a_row, i) for i in range(r)]
        right = [_offset(builder, p, p_panel, i) for i in range(several)]
        with cgutils.for_range(builder, blocks) as q, cgutils.for_range(builder, K) as k:
            row = builder.mul(builder.add(builder.mul(q.index, K), k.index), p_row)
            row = [_offset(builder, builder.gep(panel, [row]), lanes, j) for panel in right for j in range(v)]
            column = builder.add(builder.mul(q.index, a_block), builder.mul(k.index, a_k))
            _multiply_add(builder, sums, [builder.gep(a_i, [column]) for a_i in left], row)
            if r > 1:
                # No code, but LLVM unrolls no loop with it: a tall tile gains nothing by it, and compiles for longer.
                builder.asm(ir.FunctionType(ir.VoidType(), []), "", "", [], True)
        every(target, target_row, lambda s, place, mask: store_of(builder, builder.load(s), place, mask))

    def codegen(context, builder, signature, args):
        rows, vecs, panels, n, *matrices, left, packed, packed_panel, packed_row, K = args
        left = [builder.extract_value(left, i) for i in range(5)]
        args = [n, *matrices, *left, packed, packed_panel, packed_row, K]
        kind = ir.FunctionType(ir.VoidType(), [a.type for a in args])
        done = builder.append_basic_block("done")
        shape = builder.add(builder.mul(builder.add(builder.mul(rows, I64(8)), vecs), I64(8)), panels)
        switch = builder.switch(shape, done)
        for r, v, several in shapes:
            name = f"tile.{r}.{v}.{several}"
            block = builder.append_basic_block(name)
            switch.add_case(I64((r * 8 + v) * 8 + several), block)
            builder.position_at_end(block)
            if apart:
                function = ir.Function(builder.module, kind, builder.module.get_unique_name(name))
                function.linkage = "internal"
                function.attributes.add("noinline")
                inside = ir.IRBuilder(function.append_basic_block())
                generate(r, v, several, inside, function.args)
                inside.ret_void()
                builder.call(function, args)
            else:
                generate(r, v, several, builder, args)
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
    rows: at most `ROWS`. vecs: of 1, 2 and `VECS` the first that is enough for n. panels: 1; or, for one row and
    `VECS`, 2 or `ROW_PANELS` whole panels at once, which lie ``packed_panel`` numbers apart, and so do start's and
    target's, ``*_row`` numbers apart.

    A number of the product is one chain of multiply-adds, over k in ascending order.
    """
    kinds = (*(types.int64,) * 4, start, types.int64, target, types.int64, left, packed, *(types.int64,) * 3)
    return types.void(*kinds), _tile_product(SHAPES, LANES[packed.dtype], True)


@intrinsic
def tile_product_of_three(
    typing, rows, vecs, panels, n, start, start_row, target, target_row, left, packed, packed_panel, packed_row, K
):
    """`tile_product` for three vectors only: less code."""
    kinds = (*(types.int64,) * 4, start, types.int64, target, types.int64, left, packed, *(types.int64,) * 3)
    return types.void(*kinds), _tile_product(SHAPES_OF_THREE, LANES[packed.dtype], True)


@intrinsic
def row_product(
    typing, rows, vecs, panels, n, start, start_row, target, target_row, left, packed, packed_panel, packed_row, K
):
    """`tile_product` for one row only: less code."""
    kinds = (*(types.int64,) * 4, start, types.int64, target, types.int64, left, packed, *(types.int64,) * 3)
    return types.void(*kinds), _tile_product(ROW_SHAPES, LANES[packed.dtype], False)


def _row_and_tile_product(v, L):
    """The code generator of `row_and_tile_product` for panels of v vectors."""

    def codegen(context, builder, signature, args):
        target, target_panel, a, packed, packed_panel, packed_row, K, tile_start, tile, tile_row = args[:10]
        left, left_row, right, tile_K = args[10:]
        vector = vector_of(target.type.pointee)
        sums = [cgutils.alloca_once(builder, vector) for _ in range(ROW_PANELS * v)]
        tile_sums = [cgutils.alloca_once(builder, vector) for _ in range(RIDER_ROWS)]

        def place(base, panel, j):
            return _offset(builder, _offset(builder, base, panel, j // v), L, j % v)

        def row_step(k):
            row = builder.gep(packed, [builder.mul(k, packed_row)])
            weights = [place(row, packed_panel, j) for j in range(len(sums))]
            _multiply_add(builder, sums, [builder.gep(a, [k])], weights)

        def tile_step(k):
            numbers = [builder.gep(_offset(builder, left, left_row, i), [k]) for i in range(RIDER_ROWS)]
            _multiply_add(builder, tile_sums, numbers, [builder.gep(right, [builder.mul(k, packed_row)])])

        for j, s in enumerate(sums):
            builder.store(load_of(builder, place(target, target_panel, j)), s)
        for s in tile_sums:
            builder.store(load_of(builder, tile_start), s)
        both = builder.select(builder.icmp_signed("<", K, tile_K), K, tile_K)
        with cgutils.for_range(builder, both) as loop:
            row_step(loop.index)
            tile_step(loop.index)
        with cgutils.for_range(builder, builder.sub(K, both)) as loop:
            row_step(builder.add(loop.index, both))
        with cgutils.for_range(builder, builder.sub(tile_K, both)) as loop:
            tile_step(builder.add(loop.index, both))
        for j, s in enumerate(sums):
            store_of(builder, builder.load(s), place(target, target_panel, j))
        for i, s in enumerate(tile_sums):
            store_of(builder, builder.load(s), _offset(builder, tile, tile_row, i))
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


@intrinsic
def dot_products(typing, w, row, rows, x, K):
    """``w @ x`` for as many rows of K numbers as a vector has lanes, ``row`` numbers apart; w and x are addresses.

    With fewer ``rows`` than lanes, the last one stands for those that are not there.
    """

    def codegen(context, builder, signature, args):
        w, row, rows, x, K = args
        n, vector = LANES[signature.return_type.dtype], vector_of(w.type.pointee)
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
                builder.store(fma_of(builder, load(builder.gep(place, [k])), right, builder.load(s)), s)

        with cgutils.for_range_slice(builder, I64(0), whole, I64(n)) as (k, _):
            add(k, lambda address: load_of(builder, address))
        with builder.if_then(builder.icmp_signed("<", whole, K)):
            mask = mask_of(builder, w.type.pointee, builder.sub(K, whole))
            add(whole, lambda address: load_of(builder, address, mask))
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
