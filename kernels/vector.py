"""Vectors, as many numbers as a register holds: a type for Numba, with loads, stores and arithmetic.

Arithmetic (``+ - * /``, `fma`, `absolute`, ...) never reorders anything: the same equation gives the same bits wherever
the code around it was compiled. Inner functions take addresses and strides (`at`), a register each, where an array
takes seven. How wide vectors are is up to the CPU that Numba compiles for (``NUMBA_CPU_NAME``, ``NUMBA_CPU_FEATURES``).

This file, `tile`, `barrier` and `denormals` are all that knows LLVM.
"""

import operator
import re

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, errors
from numba.core.compiler import DEFAULT_FLAGS
from numba.core.registry import cpu_target
from numba.core.targetconfig import ConfigStack
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
# Whether part of a vector is loaded or stored by one instruction, as x86 has them from AVX on.
MASKED = VECTOR_BYTES > 16
LANES = {types.float32: VECTOR_BYTES // 4, types.float64: VECTOR_BYTES // 8}
LANES_OF = {np.dtype(str(dtype)): count for dtype, count in LANES.items()}


class Vector(types.Type):
    def __init__(self, dtype):
        self.dtype, self.lanes = dtype, LANES[dtype]
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, vector_of(manager.lookup(kind.dtype).get_value_type()))


# What the code generators below are made of.


def _bits(element):
    return 32 if isinstance(element, ir.FloatType) else 64


def vector_of(element):
    return ir.VectorType(element, VECTOR_BYTES * 8 // _bits(element))


def splat(builder, scalar, count):
    undefined = ir.Constant(ir.VectorType(scalar.type, count), ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, count), [0] * count))


def _call(builder, name, result, *args):
    signature = ir.FunctionType(result, [a.type for a in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


def _call_vector(builder, name, *vectors):
    vector = vectors[0].type
    return _call(builder, f"llvm.{name}.v{vector.count}f{_bits(vector.element)}", vector, *vectors)


def fma_of(builder, x, y, z):
    return _call_vector(builder, "fma", x, y, z) if FUSED else builder.fadd(builder.fmul(x, y), z)


def mask_of(builder, number, n):
    """The first ``n`` lanes of a vector of such numbers."""
    count = vector_of(number).count
    lanes = ir.Constant(ir.VectorType(I64, count), list(range(count)))
    return builder.icmp_signed("<", lanes, splat(builder, n, count))


def load_of(builder, pointer, mask=None, rest=None):
    """The vector at an address; past the mask nothing is read, and is ``rest``, or 0."""
    vector = vector_of(pointer.type.pointee)
    address, align = builder.bitcast(pointer, vector.as_pointer()), _bits(vector.element) // 8
    if mask is not None:
        name = f"llvm.masked.load.v{vector.count}f{_bits(vector.element)}.p0"
        return _call(builder, name, vector, address, I32(align), mask, rest or ir.Constant(vector, None))
    value = builder.load(address)
    value.align = align
    return value


def store_of(builder, value, pointer, mask=None):
    vector = value.type
    address, align = builder.bitcast(pointer, vector.as_pointer()), _bits(vector.element) // 8
    if mask is not None:
        name = f"llvm.masked.store.v{vector.count}f{_bits(vector.element)}.p0"
        _call(builder, name, ir.VoidType(), value, address, I32(align), mask)
    else:
        builder.store(value, address).align = align


# Addresses and memory.


@intrinsic
def at(typing, base, offset):
    """The address of element ``offset`` of a C-contiguous array, or ``offset`` numbers past another address."""
    if isinstance(base, types.Array) and base.layout != "C":
        raise errors.NumbaTypeError(f"expected a C-contiguous array, got {base}")

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
def smaller(typing, a, b):
    """The smaller one of two integers; for its own ``min``, Numba compiles a function first."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.icmp_signed("<", *args), *args)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def larger(typing, a, b):
    """The larger one of two integers."""

    def codegen(context, builder, signature, args):
        return builder.select(builder.icmp_signed(">", *args), *args)

    return types.int64(types.int64, types.int64), codegen


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
    return Vector(address.dtype)(address), lambda context, builder, signature, args: load_of(builder, *args)


@intrinsic
def load_part(typing, address, n):
    """The first ``n`` numbers of the vector at ``address``: those past them are not read, and are 0."""

    def codegen(context, builder, signature, args):
        address, n = args
        return load_of(builder, address, mask_of(builder, address.type.pointee, n))

    return Vector(address.dtype)(address, types.int64), codegen


@intrinsic
def store_whole(typing, vector, address):
    def codegen(context, builder, signature, args):
        store_of(builder, *args)
        return context.get_dummy_value()

    return types.void(vector, address), codegen


@intrinsic
def store_part(typing, vector, address, n):
    """Write the first ``n`` numbers of a vector; memory past them stays as it is."""

    def codegen(context, builder, signature, args):
        vector, address, n = args
        store_of(builder, vector, address, mask_of(builder, vector.type.element, n))
        return context.get_dummy_value()

    return types.void(vector, address, types.int64), codegen


@intrinsic
def transpose(typing, source, source_row, target, target_row):
    """``target = source.T`` for a square of as many rows as a vector has lanes."""

    def codegen(context, builder, signature, args):
        source, source_row, target, target_row = args
        vector = vector_of(source.type.pointee)
        n = vector.count
        rows = [load_of(builder, builder.gep(source, [builder.mul(source_row, I64(i))])) for i in range(n)]
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
            store_of(builder, row, builder.gep(target, [builder.mul(target_row, I64(i))]))
        return context.get_dummy_value()

    return types.void(source, types.int64, target, types.int64), codegen


@intrinsic
def load_part_or(typing, address, n, other):
    """The first ``n`` numbers of the vector at ``address``; past them the number ``other``, and nothing is read."""

    def codegen(context, builder, signature, args):
        address, n, other = args
        number = address.type.pointee
        other = other if other.type == number else builder.fptrunc(other, number)
        rest = splat(builder, other, vector_of(number).count)
        return load_of(builder, address, mask_of(builder, number, n), rest)

    return Vector(address.dtype)(address, types.int64, types.float64), codegen


# Arithmetic. A Python number takes the vector's dtype, so that an equation reads as it is written.


def _elementwise(function):
    """A code generator that applies ``function(builder, *vectors)`` to the arguments."""

    def codegen(context, builder, signature, args):
        vector = context.get_value_type(signature.return_type)
        operands = []
        for kind, value in zip(signature.args, args):
            if not isinstance(kind, Vector):
                value = value if value.type == vector.element else builder.fptrunc(value, vector.element)
                value = splat(builder, value, vector.count)
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
    return _common(x, y, z)(x, y, z), _elementwise(fma_of)


@intrinsic
def horner(typing, x, coefficients):
    """The polynomial ``c[0] + c[1] x + c[2] x^2 + ...``."""

    def polynomial(builder, x, *c):
        total = c[-1]
        for term in reversed(c[:-1]):
            total = fma_of(builder, total, x, term)
        return total

    def codegen(context, builder, signature, args):
        numbers = [builder.extract_value(args[1], i) for i in range(len(coefficients))]
        return _elementwise(polynomial)(context, builder, x(x, *coefficients), [args[0], *numbers])

    return x(x, coefficients), codegen


@intrinsic
def map_lanes(typing, function, x, n):
    """``function``, which Numba has compiled, of each of the first ``n`` numbers of a vector; past them x itself."""
    with ConfigStack().enter(DEFAULT_FLAGS):  # it is compiled as it would be by itself, not with the kernels' options
        signature_ = typing.resolve_function_type(function, (x.dtype,), {})

    def codegen(context, builder, signature, args):
        call = context.get_function(function, signature_)
        context.add_linking_libs(getattr(call, "libs", ()))
        result = cgutils.alloca_once_value(builder, args[1])
        for i in range(x.lanes):
            with builder.if_then(builder.icmp_signed("<", I64(i), args[2])):
                value = call(builder, [builder.extract_element(args[1], I32(i))])
                value = context.cast(builder, value, signature_.return_type, x.dtype)
                builder.store(builder.insert_element(builder.load(result), value, I32(i)), result)
        return builder.load(result)

    return x(function, x, types.int64), codegen


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


def _folded(function):
    """A code generator of ``function`` over all numbers of a vector, as float64: of halves, their halves, and so on."""

    def codegen(context, builder, signature, args):
        (x,), n = args, signature.args[0].lanes
        if isinstance(x.type.element, ir.FloatType):
            x = builder.fpext(x, ir.VectorType(ir.DoubleType(), n))
        while n > 1:
            n //= 2
            low, high = ([I32(i) for i in range(first, first + n)] for first in (0, n))
            halves = [builder.shuffle_vector(x, x, ir.Constant(ir.VectorType(I32, n), half)) for half in (low, high)]
            x = function(builder, *halves)
        return builder.extract_element(x, I32(0))

    return codegen


@intrinsic
def largest_lane(typing, x):
    """The largest number of a vector, as float64; if there is a NaN among them, that or another one."""
    larger = _folded(lambda builder, x, y: builder.select(builder.fcmp_ordered("<", x, y), y, x))
    return types.float64(x), larger


@intrinsic
def sum_of_lanes(typing, x):
    """The sum of a vector's numbers, in float64."""
    return types.float64(x), _folded(lambda builder, x, y: builder.fadd(x, y))


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
