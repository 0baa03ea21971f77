"""Vectors of LANES numbers in registers, as a Numba type: loads, stores, arithmetic.

Formulas written with + - * / work on a `Vector` as they work on a number, so the kernels decide
themselves what is vectorized, and the order of every sum is the same on every machine: LLVM splits
a vector into the registers there are (two of 256 bits for 16 float32 on AVX2, one on AVX-512).

A `pointer` is a bare address with an element type: no bounds, no wraparound of negative indices. All
indices count elements.
"""

import math
import operator

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, overload, register_model

from nbbn.compiler import CONTRACT, broadcast

LANES = 16
STREAM_BYTES = 64  # a streaming store writes whole cache lines


class Vector(types.Type):
    """The type of LANES elements in registers."""

    def __init__(self, element: types.Float) -> None:
        self.element = element
        super().__init__(name=f"Vector({element}, {LANES})")


_LLVM = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
_VECTORS = {element: Vector(element) for element in _LLVM}
_INDEX = ir.IntType(32)


def _llvm(element):
    return ir.VectorType(_LLVM[element], LANES)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _llvm(kind.element))


def _arithmetic(operation, instruction):
    mixes = [
        signature(vector, *operands)
        for element, vector in _VECTORS.items()
        for operands in ((vector, vector), (vector, element), (element, vector))
    ]

    @infer_global(operation)
    class Template(ConcreteTemplate):
        cases = mixes

    def lower(context, builder, signature, args):
        kind = context.get_value_type(signature.return_type)
        operands = [a if a.type == kind else broadcast(builder, a, kind) for a in args]
        return getattr(builder, instruction)(*operands, flags=CONTRACT)

    for operands in ((Vector, Vector), (Vector, types.Float), (types.Float, Vector)):
        lower_builtin(operation, *operands)(lower)


_arithmetic(operator.add, "fadd")
_arithmetic(operator.sub, "fsub")
_arithmetic(operator.mul, "fmul")
_arithmetic(operator.truediv, "fdiv")


@infer_global(operator.neg)
class _Negation(ConcreteTemplate):
    cases = [signature(vector, vector) for vector in _VECTORS.values()]


@lower_builtin(operator.neg, Vector)
def _negate(context, builder, signature, args):
    return builder.fneg(args[0])


@overload(math.sqrt)
def _sqrt(x):
    if isinstance(x, Vector):
        return lambda x: _vector_sqrt(x)
    return None


@intrinsic
def _vector_sqrt(typingctx, x):
    def codegen(context, builder, signature, args):
        bits = 64 if x.element == types.float64 else 32
        kind = args[0].type
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(kind, [kind]), f"llvm.sqrt.v{LANES}f{bits}"
        )
        return builder.call(function, args)

    return x(x), codegen


# --- pointers --------------------------------------------------------------------------------------


@intrinsic
def pointer(typingctx, address, real):
    """Return `address` as a pointer to elements of type `real`."""
    kind = types.CPointer(real.dtype)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64, real), codegen


@intrinsic
def plain(typingctx, value):
    """Return a value, but not as a literal: Numba compiles what takes one for each literal anew."""
    kind = types.unliteral(value)

    def codegen(context, builder, signature, args):
        return args[0]

    return kind(kind), codegen


@intrinsic
def address(typingctx, pointer):
    """Return where a pointer points, as an integer."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(pointer), codegen


@intrinsic
def after(typingctx, pointer, count):
    """Return the pointer moved on by `count` elements."""

    def codegen(context, builder, signature, args):
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, types.int64), codegen


@intrinsic(prefer_literal=True)
def scratch(typingctx, count, real):
    """Return a pointer to room on the stack for `count` (a literal) elements of type `real`."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    kind = types.CPointer(real.dtype)
    number = count.literal_value

    def codegen(context, builder, signature, args):
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(context.get_value_type(real.dtype), number))
            room.align = STREAM_BYTES
        return builder.bitcast(room, context.get_value_type(kind))

    return kind(count, real), codegen


# --- loads and stores ------------------------------------------------------------------------------


def _place(builder, pointer, index, element):
    return builder.bitcast(builder.gep(pointer, [index]), _llvm(element).as_pointer())


def _first(builder, count):
    """The mask of the first `count` lanes."""
    kind = ir.VectorType(ir.IntType(64), LANES)
    lanes = ir.Constant(kind, list(range(LANES)))
    return builder.icmp_signed("<", lanes, broadcast(builder, count, kind))


def _masked(builder, name, element, result, operands):
    full = f"llvm.masked.{name}.v{LANES}f{element.bitwidth}.p0"
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    function = cgutils.get_or_insert_function(builder.module, kind, full)
    return builder.call(function, operands)


_UNALIGNED = ir.Constant(_INDEX, 1)


@intrinsic
def load(typingctx, pointer, index):
    """Return pointer[index : index + LANES]."""
    element = pointer.dtype

    def codegen(context, builder, signature, args):
        return builder.load(_place(builder, *args, element), align=1)

    return _VECTORS[element](pointer, types.int64), codegen


@intrinsic
def load_first(typingctx, pointer, index, count):
    """Return pointer[index : index + count] and zeros; reads nothing beyond."""
    element = pointer.dtype

    def codegen(context, builder, signature, args):
        where = _place(builder, args[0], args[1], element)
        zeros = ir.Constant(_llvm(element), [0.0] * LANES)
        operands = [where, _UNALIGNED, _first(builder, args[2]), zeros]
        return _masked(builder, "load", element, zeros.type, operands)

    return _VECTORS[element](pointer, types.int64, types.int64), codegen


@intrinsic
def store(typingctx, pointer, index, vector):
    """pointer[index : index + LANES] = vector"""

    def codegen(context, builder, signature, args):
        builder.store(args[2], _place(builder, args[0], args[1], pointer.dtype), align=1)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, vector), codegen


@intrinsic
def store_first(typingctx, pointer, index, vector, count):
    """pointer[index : index + count] = the first `count` lanes; writes nothing beyond."""

    def codegen(context, builder, signature, args):
        where = _place(builder, args[0], args[1], pointer.dtype)
        operands = [args[2], where, _UNALIGNED, _first(builder, args[3])]
        _masked(builder, "store", pointer.dtype, ir.VoidType(), operands)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, vector, types.int64), codegen


@intrinsic
def stream(typingctx, pointer, index, vector):
    """Store past the caches; the place must be aligned to STREAM_BYTES. End with `fence`."""

    def codegen(context, builder, signature, args):
        where = _place(builder, args[0], args[1], pointer.dtype)
        stored = builder.store(args[2], where, align=STREAM_BYTES)
        mark = builder.module.add_metadata([ir.Constant(_INDEX, 1)])
        stored.set_metadata("nontemporal", mark)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, vector), codegen


@intrinsic
def prefetch(typingctx, pointer, index, ahead):
    """Ask for what lies `ahead` bytes after a vector to be brought into L2; any address will do."""

    def codegen(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        start = builder.bitcast(builder.gep(args[0], [args[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, _INDEX, _INDEX, _INDEX])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, level2, data = (ir.Constant(_INDEX, k) for k in (0, 2, 1))
        for line in range(0, LANES * pointer.dtype.bitwidth // 8, STREAM_BYTES):
            where = builder.gep(start, [builder.add(args[2], ir.Constant(args[2].type, line))])
            builder.call(function, [where, read, level2, data])
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int64), codegen


@intrinsic
def fence(typingctx):
    """Make what was streamed visible to other threads before anything stored later."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


# --- between numbers and vectors -------------------------------------------------------------------


@intrinsic
def splat(typingctx, number):
    """Return a vector whose every lane is `number`."""

    def codegen(context, builder, signature, args):
        return broadcast(builder, args[0], _llvm(number))

    return _VECTORS[number](number), codegen


@intrinsic
def widen(typingctx, vector):
    """Return the vector in float64."""

    def codegen(context, builder, signature, args):
        if vector.element == types.float64:
            return args[0]
        return builder.fpext(args[0], _llvm(types.float64))

    return _VECTORS[types.float64](vector), codegen


@intrinsic
def narrow(typingctx, vector, real):
    """Return a float64 vector rounded to type `real`."""
    element = real.dtype

    def codegen(context, builder, signature, args):
        if element == types.float64:
            return args[0]
        return builder.fptrunc(args[0], _llvm(element))

    return _VECTORS[element](vector, real), codegen


@intrinsic
def keep_first(typingctx, vector, count):
    """Return the vector with zeros from lane `count` on."""

    def codegen(context, builder, signature, args):
        zeros = ir.Constant(args[0].type, [0.0] * LANES)
        return builder.select(_first(builder, args[1]), args[0], zeros)

    return vector(vector, types.int64), codegen


def _halves(builder, vector):
    """Return the lower and the upper half of the lanes."""
    half = vector.type.count // 2
    kind = ir.VectorType(_INDEX, half)
    undefined = ir.Constant(vector.type, ir.Undefined)
    return tuple(
        builder.shuffle_vector(vector, undefined, ir.Constant(kind, list(range(first, first + half))))
        for first in (0, half)
    )


@intrinsic
def fold(typingctx, vector):
    """Return the lanes' sum, halves added to halves in a fixed order, and what it lost."""

    def codegen(context, builder, signature, args):
        total = args[0]
        lost = ir.Constant(total.type, [0.0] * LANES)
        while total.type.count > 1:
            a, b = _halves(builder, total)
            low, high = _halves(builder, lost)
            # formulas.two_sum, on vectors that grow shorter.
            total = builder.fadd(a, b)
            part = builder.fsub(total, a)
            more = builder.fadd(builder.fsub(a, builder.fsub(total, part)), builder.fsub(b, part))
            lost = builder.fadd(builder.fadd(low, high), more)
        zero = ir.Constant(_INDEX, 0)
        pair = [builder.extract_element(part, zero) for part in (total, lost)]
        return context.make_tuple(builder, signature.return_type, pair)

    element = vector.element
    return types.UniTuple(element, 2)(vector), codegen


@intrinsic
def at_most(typingctx, a, b):
    """Return a bit for each lane where a <= b (never where either is NaN)."""

    def codegen(context, builder, signature, args):
        bits = builder.fcmp_ordered("<=", args[0], args[1])
        return builder.zext(builder.bitcast(bits, ir.IntType(LANES)), ir.IntType(64))

    return types.int64(a, b), codegen


@intrinsic
def choose(typingctx, bits, a, b):
    """Return the lanes of a where the bit is set, those of b elsewhere."""

    def codegen(context, builder, signature, args):
        mask = builder.trunc(args[0], ir.IntType(LANES))
        mask = builder.bitcast(mask, ir.VectorType(ir.IntType(1), LANES))
        return builder.select(mask, args[1], args[2])

    return a(bits, a, b), codegen
