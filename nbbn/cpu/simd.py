"""Vectors of LANES numbers in registers, as a Numba type: loads, stores, arithmetic.

Elements of 16 bits are widened to float32 as they are loaded and rounded as they are stored: to nearest,
ties to even, subnormal numbers and all.

Formulas written with + - * / work on a `Vector` as they work on a number, so the kernels decide
themselves what is vectorized, and the order of every sum is the same on every machine: LLVM splits
a vector into the registers there are (two of 256 bits for 16 float32 on AVX2, one on AVX-512).

A `pointer` is a bare address with an element type: no bounds, no wraparound of negative indices. All
indices count elements.
"""

import contextlib
import math
import operator
import platform
import sys
from typing import NamedTuple

from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, register_model

from nbbn.compiler import CONTRACT, broadcast

LANES = 16
STREAM_BYTES = 64  # a streaming store writes whole cache lines


class Vector(types.Type):
    """The type of LANES elements in registers."""

    def __init__(self, element: types.Float) -> None:
        self.element = element
        super().__init__(name=f"Vector({element}, {LANES})")


class Half(types.Type):
    """The type of an element of 16 bits in memory; in registers it is a float32."""

    bitwidth = 16

    def __init__(self, name: str) -> None:
        super().__init__(name=f"Half({name})")


@register_model(Half)
class _HalfModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, _BITS)


class Way(NamedTuple):
    """What kernels are compiled for, beside the elements of the arrays.

    Attributes
    ----------
    parameters : str
        Which way they go: "" by channel, ALONG, DOWN or ACROSS.
    activation : str
        See `nbbn.problem.Form`.
    residual, masked : bool
        See `nbbn.problem.Form`.
    """

    parameters: str = ""
    activation: str = ""
    residual: bool = False
    masked: bool = False

    @property
    def through(self) -> bool:
        """As that of `nbbn.problem.Form`."""
        return self.activation != "" and not self.residual

    @property
    def alone(self) -> "Way":
        """The same without an activation and a residual."""
        return self._replace(activation="", residual=False)


PLAIN = Way()


class Kind(types.NumberClass):
    """A class of elements, for a kernel that is not the plain one (`stored_as`)."""

    def __init__(self, element: types.Type, way: Way) -> None:
        self.way = way
        super().__init__(element)
        self.name: str = f"class({element}, {', '.join(map(str, way))})"

    @property
    def key(self):  # noqa: D102
        return self.instance_type, self.way


register_model(Kind)(models.OpaqueModel)

_BITS = ir.IntType(16)
_WORD = ir.IntType(32)
_LLVM = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
_VECTORS = {element: Vector(element) for element in _LLVM}
_INDEX = ir.IntType(32)
_BYTES = ir.IntType(8).as_pointer()
_FLOAT16, BFLOAT16 = Half("float16"), Half("bfloat16")
SMALLEST_NORMAL = 2.0**-126  # of float32, and of bfloat16
# What the elements of an array are to a kernel, by the name of their storage (`nbbn.dtypes`).
ELEMENTS: dict[str, types.Type] = {
    "float32": types.float32,
    "float64": types.float64,
    "float16": _FLOAT16,
    "bfloat16": BFLOAT16,
}


ALONG = "along"
"""A parameter for each element of a channel: each row of the array has all of them."""
DOWN = "down"
"""The same where a row has one element of each of many channels: all of them have the row's."""
ACROSS = "across"
"""The gradients of such: of each column, and each row was normalized with numbers of its own."""


def stored_as(name: str, way: Way = PLAIN) -> types.Type:
    """Return what a kernel is compiled for: a storage type, and what else there is to know."""
    element = ELEMENTS[name]
    return types.NumberClass(element) if way == PLAIN else Kind(element, way)


def way_of(stored: types.Type) -> Way:
    """Return what a kernel is compiled for beside the elements."""
    return getattr(stored, "way", PLAIN)


def _real(element):
    """Return what elements of a type are in registers."""
    return types.float32 if isinstance(element, Half) else element


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


def _function(function, name):
    """Let a function of `math` take vectors, by LLVM's instruction of that name."""

    @infer_global(function)
    class Template(ConcreteTemplate):
        cases = [signature(vector, vector) for vector in _VECTORS.values()]

    @lower_builtin(function, Vector)
    def lower(context, builder, signature, args):
        bits = 64 if signature.return_type.element == types.float64 else 32
        kind = args[0].type
        called = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(kind, [kind]), f"llvm.{name}.v{LANES}f{bits}"
        )
        return builder.call(called, args)


_function(math.sqrt, "sqrt")
_function(math.fabs, "fabs")


# --- pointers --------------------------------------------------------------------------------------


@intrinsic
def pointer(typingctx, address, real):
    """Return `address` as a pointer to elements of type `real`."""
    kind = types.CPointer(real.dtype)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(kind))

    return kind(types.int64, real), codegen


@intrinsic
def pointer_like(typingctx, pointer, address):
    """Return `address` as a pointer to elements of the type that another one points to."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[1], context.get_value_type(pointer))

    return pointer(pointer, types.int64), codegen


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


def _type_named(element):
    @intrinsic
    def name(typingctx):
        kind = types.NumberClass(element)
        return kind(), lambda context, builder, signature, args: context.get_dummy_value()

    return name


float16, bfloat16 = _type_named(_FLOAT16), _type_named(BFLOAT16)


@intrinsic
def wide(typingctx, stored):
    """Return the type that elements stored as `stored` are computed with."""
    kind = types.NumberClass(_real(stored.dtype))
    return kind(stored), lambda context, builder, signature, args: context.get_dummy_value()


@intrinsic
def size_of(typingctx, pointer):
    """Return how many bytes an element has."""
    number = pointer.dtype.bitwidth // 8
    return types.int64(pointer), lambda context, builder, signature, args: ir.Constant(ir.IntType(64), number)


def in_line_of(size):
    """Return how many elements of `size` bytes `stream` writes: a line, and a vector at least."""
    return max(LANES, STREAM_BYTES // size)


@intrinsic
def line_of(typingctx, pointer):
    """Return how many elements `stream` writes."""
    number = in_line_of(pointer.dtype.bitwidth // 8)
    return types.int64(pointer), lambda context, builder, signature, args: ir.Constant(ir.IntType(64), number)


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

    def codegen(context, builder, signature, args):
        return on_stack(context, builder, count.literal_value, kind)

    return kind(count, real), codegen


def on_stack(context, builder, number, kind):
    """Return a pointer of type `kind` to room on the stack for `number` elements."""
    with builder.goto_entry_block():
        room = builder.alloca(ir.ArrayType(context.get_value_type(kind.dtype), number))
        room.align = STREAM_BYTES
    return builder.bitcast(room, context.get_value_type(kind))


# --- elements of 16 bits ----------------------------------------------------------------------------


def _shaped(like, element):
    """Return an LLVM type of such elements, a vector where `like` is one."""
    return ir.VectorType(element, like.count) if isinstance(like, ir.VectorType) else element


def _constant(kind, value):
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _converts(context):
    """Whether this CPU converts float16; LLVM would call functions that are not there."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    return _has(context, "f16c")


def _has(context, feature):
    """Whether this CPU has it."""
    return f"+{feature}" in context.codegen()._tm_features.split(",")


def _by_avx512(context, vector):
    """Whether a whole vector is converted between float16 and float32 by an instruction of AVX-512.

    By name: where a CPU has arithmetic of float16, LLVM would widen to float64 in one step, three times as
    slow as two are, and would not stream what it narrows.
    """
    return isinstance(vector.type, ir.VectorType) and _has(context, "avx512f")


def _named(builder, name, result, operands):
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def _widened(context, builder, bits, element):
    """Return what was loaded as the number, or vector of numbers, that it stands for."""
    if not isinstance(element, Half):
        return bits
    kind, number = _shaped(bits.type, _WORD), _shaped(bits.type, ir.FloatType())
    if element is _FLOAT16 and _by_avx512(context, bits):
        operands = [bits, ir.Constant(number, ir.Undefined), ir.Constant(_BITS, -1), ir.Constant(_WORD, 4)]
        return _named(builder, "llvm.x86.avx512.mask.vcvtph2ps.512", number, operands)
    if element is _FLOAT16 and _converts(context):
        return builder.fpext(builder.bitcast(bits, _shaped(bits.type, ir.HalfType())), number)
    word = builder.zext(bits, kind)
    if element is BFLOAT16:
        return builder.bitcast(builder.shl(word, _constant(kind, 16)), number)
    # The exponent is moved to its place, and the rest of its bias made up for by a product that is exact.
    magnitude = builder.and_(word, _constant(kind, 0x7FFF))
    moved = builder.shl(magnitude, _constant(kind, 13))
    scaled = builder.fmul(builder.bitcast(moved, number), _constant(number, 2.0**112))
    infinite = builder.icmp_unsigned(">=", magnitude, _constant(kind, 0x7C00))
    special = builder.or_(moved, _constant(kind, 0x7F800000))
    result = builder.select(infinite, special, builder.bitcast(scaled, kind))
    sign = builder.shl(builder.and_(word, _constant(kind, 0x8000)), _constant(kind, 16))
    return builder.bitcast(builder.or_(result, sign), number)


def _bfloat16_above(builder, number):
    """Return the bits of a float32, or a vector of them, whose upper half is what it is as bfloat16.

    A NaN whose lower half says something may overflow: of a number it is made quiet, and vectors have
    none (`quieted`).
    """
    kind = _shaped(number.type, _WORD)
    word = builder.bitcast(number, kind)
    odd = builder.and_(builder.lshr(word, _constant(kind, 16)), _constant(kind, 1))
    rounded = builder.add(word, builder.add(odd, _constant(kind, 0x7FFF)))
    if isinstance(kind, ir.VectorType):
        return rounded
    nan = builder.fcmp_unordered("uno", number, number)
    return builder.select(nan, builder.or_(word, _constant(kind, 0x400000)), rounded)


def _narrowed(context, builder, number, element):
    """Return a float32, or a vector of them, rounded to what is stored."""
    if not isinstance(element, Half):
        return number
    bits, kind = _shaped(number.type, _BITS), _shaped(number.type, _WORD)
    if element is _FLOAT16 and _by_avx512(context, number):
        operands = [number, ir.Constant(_WORD, 8), ir.Constant(bits, ir.Undefined), ir.Constant(_BITS, -1)]
        return _named(builder, "llvm.x86.avx512.mask.vcvtps2ph.512", bits, operands)
    if element is _FLOAT16 and _converts(context):
        return builder.bitcast(builder.fptrunc(number, _shaped(number.type, ir.HalfType())), bits)
    word = builder.bitcast(number, kind)
    one = _constant(kind, 1)
    if element is BFLOAT16:
        return builder.trunc(builder.lshr(_bfloat16_above(builder, number), _constant(kind, 16)), bits)
    magnitude = builder.and_(word, _constant(kind, 0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, _constant(kind, 13)), one)
    moved = builder.add(builder.sub(magnitude, _constant(kind, 112 << 23)), _constant(kind, 0xFFF))
    result = builder.lshr(builder.add(moved, odd), _constant(kind, 13))
    # Below the smallest normal number: added to 1/2, a float32 is rounded to multiples of 2**-24.
    half = builder.bitcast(_constant(number.type, 0.5), kind)
    lifted = builder.fadd(builder.bitcast(magnitude, number.type), _constant(number.type, 0.5))
    subnormal = builder.sub(builder.bitcast(lifted, kind), half)
    small = builder.icmp_unsigned("<", magnitude, _constant(kind, 113 << 23))
    result = builder.select(small, subnormal, result)
    large = builder.icmp_unsigned(">=", magnitude, _constant(kind, 143 << 23))
    result = builder.select(large, _constant(kind, 0x7C00), result)
    nan = builder.icmp_unsigned(">", magnitude, _constant(kind, 255 << 23))
    result = builder.select(nan, _constant(kind, 0x7E00), result)
    sign = builder.lshr(builder.xor(word, magnitude), _constant(kind, 16))
    return builder.trunc(builder.or_(result, sign), bits)


def _narrowed_pair(context, builder, first, second, element):
    """Return two vectors, one after the other, rounded to what is stored."""
    order = range(2 * LANES)
    if element is BFLOAT16:
        kind = ir.VectorType(_BITS, 2 * LANES)
        halves = [builder.bitcast(_bfloat16_above(builder, part), kind) for part in (first, second)]
        order = [2 * k + (sys.byteorder == "little") for k in order]
    else:
        halves = [_narrowed(context, builder, part, element) for part in (first, second)]
    return builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(_INDEX, 2 * LANES), list(order)))


def _sure_pair(context, builder, first, second, element):
    """The same where no number but 0 is below the smallest normal one."""
    if element is not BFLOAT16 or not _has(context, "avx512bf16"):
        return _narrowed_pair(context, builder, first, second, element)
    # LLVM's own type of a bfloat16 is none of llvmlite's, and vectors of it would not be streamed.
    binding.initialize_native_asmparser()
    kind = ir.FunctionType(ir.VectorType(_BITS, 2 * LANES), [first.type, second.type])
    return builder.call(ir.InlineAsm(kind, "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v"), [first, second])


def _rounded_to_odd(builder, number):
    """Return a float64 as a float32 that rounds to fewer bits as it does itself."""
    near = builder.fptrunc(number, ir.FloatType())
    back = builder.fpext(near, number.type)
    bits = builder.bitcast(near, _WORD)
    absolute = [
        builder.and_(builder.bitcast(a, ir.IntType(64)), ir.Constant(ir.IntType(64), (1 << 63) - 1))
        for a in (number, back)
    ]
    beyond = builder.icmp_unsigned(">", absolute[1], absolute[0])
    below = builder.sub(bits, builder.zext(beyond, _WORD))
    inexact = builder.fcmp_unordered("!=", back, number)
    odd = builder.or_(below, ir.Constant(_WORD, 1))
    return builder.bitcast(builder.select(inexact, odd, bits), ir.FloatType())


@intrinsic
def number(typingctx, pointer, index):
    """Return pointer[index], in the type that it is computed with."""
    element = pointer.dtype

    def codegen(context, builder, signature, args):
        return _widened(context, builder, builder.load(builder.gep(args[0], [args[1]])), element)

    return _real(element)(pointer, types.int64), codegen


@intrinsic
def set_number(typingctx, pointer, index, value):
    """pointer[index] = value, a float64, rounded once"""
    element = pointer.dtype

    def codegen(context, builder, signature, args):
        value = args[2]
        if isinstance(element, Half):
            value = _narrowed(context, builder, _rounded_to_odd(builder, value), element)
        elif element == types.float32:
            value = builder.fptrunc(value, ir.FloatType())
        builder.store(value, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.float64), codegen


# --- loads and stores ------------------------------------------------------------------------------


def _stored(element):
    """The LLVM type of LANES elements in memory."""
    return ir.VectorType(_BITS if isinstance(element, Half) else _LLVM[element], LANES)


def _place(builder, pointer, index, element):
    return builder.bitcast(builder.gep(pointer, [index]), _stored(element).as_pointer())


def _first(builder, count):
    """The mask of the first `count` lanes."""
    kind = ir.VectorType(ir.IntType(64), LANES)
    lanes = ir.Constant(kind, list(range(LANES)))
    return builder.icmp_signed("<", lanes, broadcast(builder, count, kind))


def _masked(builder, name, element, result, operands):
    letter = "i" if isinstance(element, Half) else "f"
    lanes = operands[2 if name == "load" else 3].type.count
    full = f"llvm.masked.{name}.v{lanes}{letter}{element.bitwidth}.p0"
    kind = ir.FunctionType(result, [operand.type for operand in operands])
    function = cgutils.get_or_insert_function(builder.module, kind, full)
    return builder.call(function, operands)


_UNALIGNED = ir.Constant(_INDEX, 1)


@intrinsic
def load(typingctx, pointer, index):
    """Return pointer[index : index + LANES]."""
    element = pointer.dtype

    def codegen(context, builder, signature, args):
        bits = builder.load(_place(builder, *args, element), align=1)
        return _widened(context, builder, bits, element)

    return _VECTORS[_real(element)](pointer, types.int64), codegen


@intrinsic
def load_first(typingctx, pointer, index, count):
    """Return pointer[index : index + count] and zeros; reads nothing beyond."""
    element = pointer.dtype

    def codegen(context, builder, signature, args):
        where = _place(builder, args[0], args[1], element)
        zeros = ir.Constant(_stored(element), [0 if isinstance(element, Half) else 0.0] * LANES)
        operands = [where, _UNALIGNED, _first(builder, args[2]), zeros]
        bits = _masked(builder, "load", element, zeros.type, operands)
        return _widened(context, builder, bits, element)

    return _VECTORS[_real(element)](pointer, types.int64, types.int64), codegen


@intrinsic
def load_apart(typingctx, pointer, index, apart, count):
    """Return `count` elements, each `apart` after the one before, and zeros; reads nothing beyond."""
    element = pointer.dtype
    if element != types.float64:
        return None

    def codegen(context, builder, signature, args):
        words, floats = ir.VectorType(ir.IntType(64), LANES), _llvm(element)
        lanes = builder.mul(ir.Constant(words, list(range(LANES))), broadcast(builder, args[2], words))
        lanes = builder.add(lanes, broadcast(builder, args[1], words))
        start = broadcast(builder, builder.ptrtoint(args[0], ir.IntType(64)), words)
        bytes_on = builder.shl(lanes, ir.Constant(words, [3] * LANES))
        where = builder.inttoptr(builder.add(start, bytes_on), ir.VectorType(args[0].type, LANES))
        kind = ir.FunctionType(floats, [where.type, _INDEX, ir.VectorType(ir.IntType(1), LANES), floats])
        name = f"llvm.masked.gather.v{LANES}f64.v{LANES}p0"
        gather = cgutils.get_or_insert_function(builder.module, kind, name)
        zeros = ir.Constant(floats, [0.0] * LANES)
        return builder.call(gather, [where, ir.Constant(_INDEX, 8), _first(builder, args[3]), zeros])

    return _VECTORS[element](pointer, types.int64, types.int64, types.int64), codegen


@intrinsic
def store(typingctx, pointer, index, vector):
    """pointer[index : index + LANES] = vector"""

    def codegen(context, builder, signature, args):
        bits = _narrowed(context, builder, args[2], pointer.dtype)
        builder.store(bits, _place(builder, args[0], args[1], pointer.dtype), align=1)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, vector), codegen


@intrinsic
def store_first(typingctx, pointer, index, vector, count):
    """pointer[index : index + count] = the first `count` lanes; writes nothing beyond."""

    def codegen(context, builder, signature, args):
        where = _place(builder, args[0], args[1], pointer.dtype)
        bits = _narrowed(context, builder, args[2], pointer.dtype)
        operands = [bits, where, _UNALIGNED, _first(builder, args[3])]
        _masked(builder, "store", pointer.dtype, ir.VoidType(), operands)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, vector, types.int64), codegen


@intrinsic
def stream(typingctx, pointer, index, vector):
    """Store past the caches; the place must be aligned to STREAM_BYTES. End with `fence`.

    Half a line at a time would take longer than not to: of 16 bits it takes two vectors (`stream_both`),
    and this is `store`.
    """

    def codegen(context, builder, signature, args):
        where = _place(builder, args[0], args[1], pointer.dtype)
        if isinstance(pointer.dtype, Half):
            builder.store(_narrowed(context, builder, args[2], pointer.dtype), where, align=1)
        else:
            _stream(builder, where, args[2])
        return context.get_dummy_value()

    return types.void(pointer, types.int64, vector), codegen


def _pair_store(streaming):
    @intrinsic
    def store_pair(typingctx, pointer, index, first, second, sure):
        def codegen(context, builder, signature, args):
            operands = context, builder, args[2], args[3], pointer.dtype
            bits = builder.select(args[4], _sure_pair(*operands), _narrowed_pair(*operands))
            where = _place(builder, args[0], args[1], pointer.dtype)
            if streaming:
                _stream(builder, where, bits)
            else:
                builder.store(bits, builder.bitcast(where, bits.type.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.void(pointer, types.int64, first, second, types.boolean), codegen

    return store_pair


# Store two vectors, rounded to 16 bits: a line. The second as `stream`. It may be `sure` that no number is
# subnormal, which can save half of the work.
store_both, stream_both = _pair_store(streaming=False), _pair_store(streaming=True)


def _stream(builder, where, bits):
    where = builder.bitcast(where, bits.type.as_pointer())
    stored = builder.store(bits, where, align=STREAM_BYTES)
    mark = builder.module.add_metadata([ir.Constant(_INDEX, 1)])
    stored.set_metadata("nontemporal", mark)


def _prefetch(builder, where, write, level):
    """Ask for the line that a pointer to bytes points into; the levels are LLVM's, from 3 for L1 down."""
    kind = ir.FunctionType(ir.VoidType(), [where.type, _INDEX, _INDEX, _INDEX])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [where, *(ir.Constant(_INDEX, k) for k in (int(write), level, 1))])


@intrinsic
def prefetch(typingctx, pointer, index, ahead):
    """Ask for what lies `ahead` bytes after a vector to be brought into L2; any address will do."""

    def codegen(context, builder, signature, args):
        start = builder.bitcast(builder.gep(args[0], [args[1]]), _BYTES)
        for line in range(0, LANES * pointer.dtype.bitwidth // 8, STREAM_BYTES):
            where = builder.gep(start, [builder.add(args[2], ir.Constant(args[2].type, line))])
            _prefetch(builder, where, write=False, level=2)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int64), codegen


@intrinsic
def ask_to_write(typingctx, address):
    """Ask for the line at an address, of which only a part will be written, to be brought into L1."""

    def codegen(context, builder, signature, args):
        _prefetch(builder, builder.inttoptr(args[0], _BYTES), write=True, level=3)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def fence(typingctx):
    """Make what was streamed visible to other threads before anything stored later."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


# --- elements that lie across --------------------------------------------------------------------------

TURNED = LANES // 2
"""How many elements of each of LANES runs `turn_in` and `turn_out` move at most."""
AHEAD_IN, AHEAD_OUT = 256, 128  # bytes: how far ahead they ask for more of each run


def _transposed(builder, vectors):
    """Return the vectors, the square of elements in their lower lanes transposed, and that in the upper."""
    for distance in (4, 2, 1):
        lanes = range(LANES)
        of_first = [LANES + k - distance if k & distance else k for k in lanes]
        of_second = [LANES + k if k & distance else k + distance for k in lanes]
        orders = [ir.Constant(ir.VectorType(_INDEX, LANES), order) for order in (of_first, of_second)]
        for i in range(TURNED):
            if i & distance == 0:
                pair = vectors[i], vectors[i + distance]
                vectors[i], vectors[i + distance] = (builder.shuffle_vector(*pair, order) for order in orders)
    return vectors


def _further(builder, pointer, distance):
    """Return a pointer to what lies some bytes further on."""
    return builder.gep(builder.bitcast(pointer, _BYTES), [ir.Constant(_INDEX, distance)])


def _inside(builder, count):
    """The mask of the elements that runs of `count` have."""
    kind = ir.VectorType(ir.IntType(64), TURNED)
    return builder.icmp_signed("<", ir.Constant(kind, list(range(TURNED))), broadcast(builder, count, kind))


def _turning(move):
    """Return what copies LANES runs of elements to where they lie across, or back, by way of `move`.

    That is move(builder, element, run, across, count), where run(i) is a pointer to run i, across(k) one to
    element k of all of them, and `count` how many elements they have, or None where they have TURNED.
    """

    @intrinsic
    def turn(typingctx, address, pitch, count, buffer, apart):
        element = buffer.dtype

        def codegen(context, builder, signature, args):
            address, pitch, count, buffer, apart = args
            kind = ir.VectorType(_stored(element).element, TURNED).as_pointer()

            def run(i):
                at = builder.add(address, builder.mul(pitch, ir.Constant(pitch.type, i)))
                return builder.inttoptr(at, kind)

            def across(k):
                return _place(builder, buffer, builder.mul(apart, k), element)

            whole = builder.icmp_signed("==", count, ir.Constant(count.type, TURNED))
            with builder.if_else(whole) as (then, otherwise):
                with then:
                    move(builder, element, run, across, None)
                with otherwise:
                    move(builder, element, run, across, count)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64, buffer, types.int64), codegen

    return turn


def _move_in(builder, element, run, across, count):
    runs = []
    mask = None if count is None else _inside(builder, count)
    for i in range(LANES):
        where = run(i)
        _prefetch(builder, _further(builder, where, AHEAD_IN), write=False, level=2)
        if mask is None:
            runs.append(builder.load(where, align=1))
        else:
            kind = where.type.pointee
            operands = [where, _UNALIGNED, mask, ir.Constant(kind, ir.Undefined)]
            runs.append(_masked(builder, "load", element, kind, operands))
    both = ir.Constant(ir.VectorType(_INDEX, LANES), list(range(LANES)))
    pairs = zip(runs[:TURNED], runs[TURNED:], strict=True)
    for k, vector in enumerate(_transposed(builder, [builder.shuffle_vector(*pair, both) for pair in pairs])):
        k = ir.Constant(ir.IntType(64), k)
        there = count is None or builder.icmp_signed("<", k, count)
        with contextlib.nullcontext() if there is True else builder.if_then(there):
            builder.store(vector, across(k), align=1)


def _move_out(builder, element, run, across, count):
    vectors = []
    mask = None if count is None else _inside(builder, count)
    for k in range(TURNED):
        k = ir.Constant(ir.IntType(64), k)
        if count is not None:  # some vector there is, too, where no element k is: the last that there is
            last = builder.sub(count, ir.Constant(count.type, 1))
            k = builder.select(builder.icmp_signed("<", k, count), k, last)
        vectors.append(builder.load(across(k), align=1))
    vectors = _transposed(builder, vectors)
    for i in range(LANES):
        where = run(i)
        for ahead in (builder.bitcast(run(LANES + i), _BYTES), _further(builder, where, AHEAD_OUT)):
            _prefetch(builder, ahead, write=True, level=3)
        half = list(range(TURNED)) if i < TURNED else list(range(TURNED, LANES))
        order = ir.Constant(ir.VectorType(_INDEX, TURNED), half)
        vector = vectors[i % TURNED]
        its = builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), order)
        if mask is None:
            builder.store(its, where, align=1)
        else:
            _masked(builder, "store", element, ir.VoidType(), [its, where, _UNALIGNED, mask])


turn_in = _turning(_move_in)
"""turn_in(address, pitch, count, buffer, apart): copy LANES runs of `count` elements, at most TURNED.

They begin `pitch` bytes apart, and element k of run i goes to buffer[k * apart + i].
"""
turn_out = _turning(_move_out)
"""Copy back what `turn_in` copied, and ask for where more of these runs, and the next ones, go to."""


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
def unzipped(typingctx, a, b):
    """Return of two vectors, one after the other, every second lane from the first on, and the others."""

    def codegen(context, builder, signature, args):
        kind = ir.VectorType(_INDEX, LANES)
        orders = [ir.Constant(kind, list(range(first, 2 * LANES, 2))) for first in (0, 1)]
        halves = [builder.shuffle_vector(*args, order) for order in orders]
        return context.make_tuple(builder, signature.return_type, halves)

    return types.UniTuple(a, 2)(a, a), codegen


def _comparison(relation):
    @intrinsic
    def compare(typingctx, a, b):
        def codegen(context, builder, signature, args):
            bits = builder.fcmp_ordered(relation, args[0], args[1])
            return builder.zext(builder.bitcast(bits, ir.IntType(LANES)), ir.IntType(64))

        return types.int64(a, b), codegen

    return compare


# These return a bit for each lane where it is so, and never where either is NaN.
at_most = _comparison("<=")
below = _comparison("<")


def _extreme(builder, a, b, which):
    """Return in each lane the smaller (0b1010) or larger (0b1011) magnitude; where one is NaN, the other."""
    operands = [a, b, ir.Constant(_WORD, which), ir.Constant(a.type, ir.Undefined)]
    operands += [ir.Constant(_BITS, -1), ir.Constant(_WORD, 4)]
    return _named(builder, "llvm.x86.avx512.mask.range.ps.512", a.type, operands)


@intrinsic
def either_below(typingctx, a, b, bound, other):
    """Whether a lane of |a| is below `bound` or one of |b| below `other`, of float32; never where it is NaN.

    Or, where the bounds are not the same, where it is below the other one.
    """

    def codegen(context, builder, signature, args):
        a, b, bound, other = args
        if _has(context, "avx512dq"):
            bound = _extreme(builder, bound, other, 0b1011)
            lanes = builder.fcmp_ordered("<", _extreme(builder, a, b, 0b1010), bound)
        else:
            parts = [_named(builder, f"llvm.fabs.v{LANES}f32", a.type, [part]) for part in (a, b)]
            lanes = [builder.fcmp_ordered("<", *pair) for pair in zip(parts, (bound, other), strict=True)]
            lanes = builder.or_(*lanes)
        bits = builder.bitcast(lanes, ir.IntType(LANES))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return types.boolean(a, b, bound, other), codegen


@intrinsic
def lowest(typingctx, bits):
    """Return which is the lowest bit that is set; there is one."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return bits(bits), codegen


@intrinsic
def rarely(typingctx, condition):
    """Return the condition, which the compiler may take for false where it decides what to be quick at."""

    def codegen(context, builder, signature, args):
        bit = ir.IntType(1)
        expect = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(bit, [bit, bit]), "llvm.expect.i1"
        )
        return builder.call(expect, [args[0], ir.Constant(bit, 0)])

    return types.boolean(types.boolean), codegen


@intrinsic
def choose(typingctx, bits, a, b):
    """Return the lanes of a where the bit is set, those of b elsewhere."""

    def codegen(context, builder, signature, args):
        mask = builder.trunc(args[0], ir.IntType(LANES))
        mask = builder.bitcast(mask, ir.VectorType(ir.IntType(1), LANES))
        return builder.select(mask, args[1], args[2])

    return a(bits, a, b), codegen


# --- words of bits ---------------------------------------------------------------------------------


def _words(builder, address, count, bits):
    kind = ir.IntType(bits) if count == 1 else ir.VectorType(ir.IntType(bits), count)
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def word(typingctx, address):
    """Return the 32 bits at an address."""

    def codegen(context, builder, signature, args):
        return builder.zext(builder.load(_words(builder, args[0], 1, 32), align=1), ir.IntType(64))

    return types.int64(types.int64), codegen


@intrinsic
def set_word(typingctx, address, bits):
    """Write the lowest 32 bits to an address."""

    def codegen(context, builder, signature, args):
        builder.store(builder.trunc(args[1], _WORD), _words(builder, args[0], 1, 32), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def set_long(typingctx, address, bits):
    """Write 64 bits to an address."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], _words(builder, args[0], 1, 64), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def set_longs(typingctx, address, bits):
    """Write 64 bits for each of LANES bits, all like it."""

    def codegen(context, builder, signature, args):
        bits = builder.bitcast(builder.trunc(args[1], ir.IntType(LANES)), ir.VectorType(ir.IntType(1), LANES))
        longs = ir.VectorType(ir.IntType(64), LANES)
        builder.store(builder.sext(bits, longs), builder.inttoptr(args[0], longs.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _nonzero(number):
    """Return what looks at so many bytes at an address: a bit for each, whether it is not 0."""

    @intrinsic
    def nonzero(typingctx, address):
        def codegen(context, builder, signature, args):
            taken = builder.load(_words(builder, args[0], number, 8), align=1)
            bits = builder.icmp_unsigned("!=", taken, ir.Constant(taken.type, [0] * number))
            bits = builder.bitcast(bits, ir.IntType(number))
            return builder.zext(bits, ir.IntType(64)) if number < 64 else bits

        return types.int64(types.int64), codegen

    return nonzero


nonzero, nonzero_of_long = _nonzero(LANES), _nonzero(64)


@intrinsic
def ones(typingctx, bits):
    """Return how many bits are set."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.int64(types.int64), codegen
