"""Any object for any argument: an error of the three kinds and nothing written, or the right result.

`contract.fault` says which calls are good. So what should be refused must not be taken, what should be taken
must not be refused, and what is taken for a number or an axis is taken for the right one.
"""

import array
import copy
import datetime
import decimal
import fractions
import math
import operator
import pathlib
import re

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st

import contract
import nbbn
from cases import DTYPES, LAYOUTS, VECTOR_LAYOUTS
from checks import (
    assert_same_bits,
    bits,
    check_backward,
    check_evaluation,
    check_forward,
    check_statistics,
    check_training,
)
from reference import finfo
from reference import forward as statistics_of
from test_errors import FUNCTIONS, windows
from test_properties import examples

ERRORS = (ValueError, TypeError, nbbn.DeviceError)


# --- odd objects -----------------------------------------------------------------------------------


class Subclass(np.ndarray):
    """An array as good as any."""


class Untold:
    """What an array could tell, told wrongly."""

    def __init__(self, **told):
        self.__dict__.update(told)

    def __dlpack__(self, **_):
        raise BufferError("no memory")

    def __dlpack_device__(self):
        return 1, 0


class NoCapsule(Untold):
    def __dlpack__(self, **_):
        return "capsule"


class Interface:
    """Says that it lies on a GPU."""

    def __init__(self, interface):
        self.__cuda_array_interface__ = interface


class Index:
    """An int, to whom it asks."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


SCALAR_TYPES = "?bhilqBHILQefdgFDGOSUVmM"

SCALARS = [
    *(None, True, False, 0, 1, 2, -1, -2, 3, 5, 2**31, 2**63, -(2**63), 2**70, 10**400, -(10**400)),
    *(0.0, -0.0, 0.1, 0.5, 1.0, 1.5, -1e-9, 1e-320, 1e308, math.nan, math.inf, -math.inf),
    *(1j, "", "1", "0.1", "cpu", "cuda", "cuda:0", "float32", "yes", "é\0", b"0.1", bytearray(b"0.1")),
    *((), [], {}, set(), frozenset(), [0.1], (0, 1), {"x": 1}, {0.1}, [None], [[1.0], [1.0, 2.0]], ...),
    *(NotImplemented, object, int, np.float32, np.ndarray, np.dtype("f4"), len, slice(1), math, range(5)),
    *(fractions.Fraction(1, 3), fractions.Fraction(10**400), fractions.Fraction(10**400, 10**401)),
    *(decimal.Decimal("0.1"), decimal.Decimal("nan"), decimal.Decimal("snan"), decimal.Decimal("1e999")),
    *(datetime.date(2020, 1, 1), datetime.timedelta(1), pathlib.Path("x"), re.compile("x"), ValueError("x")),
    *(np.bool_(True), np.int8(1), np.uint64(2**63), np.float16(0.5), np.float32(0.1), np.float64(1e-5)),
    *(np.longdouble("0.5"), np.longdouble("1e4000"), np.complex64(0.5), np.complex128(0.5 + 1j)),
    *(np.str_("0.5"), np.bytes_(b"0.5"), np.void(b"0.5"), np.datetime64(0, "s"), np.timedelta64(0, "s")),
    *(np.ma.masked, np.ma.array(0.5), np.ma.array(0.5, mask=True), np.ma.array(1), np.array("0.5")),
    *(np.array(0.5), np.array(1), np.array(True), np.array(0.5, ">f8"), np.array(1, ">i2"), np.array(1j)),
    *(np.array(0.5, object), np.array(None), np.array(0, "m8[s]"), np.array(0, "M8[s]"), np.array([0.5])),
    *(np.array((1.0,), "f4,"), np.array([1]), np.array([[0.5]]), np.array([]), memoryview(b"0.5")),
    *(array.array("d", [0.5]), Untold(), NoCapsule(), Index(1), Index(10**30)),
    *map(Interface, [None, {}, {"shape": (4, 5), "typestr": "<f4", "data": (64, False), "version": 3}]),
    *(Untold(dtype=np.dtype("f4"), shape=(4, 5)), nbbn.BatchStats(1, 2.0, 3.0), nbbn.BatchNorm),
]
"""Drawn as copies, so that one that is written to does not spoil the next call."""


def copied(value):
    try:
        return copy.deepcopy(value)
    except (TypeError, NotImplementedError):
        return value  # a module, a memoryview: not to be written


def of_type(dtype):
    """The same values in another type, as far as they have a meaning there."""

    def spoil(a):
        if np.dtype(dtype).kind in "mMV":
            return np.zeros(a.shape, dtype)
        with np.errstate(invalid="ignore", over="ignore"):
            return np.abs(np.nan_to_num(a)).astype(dtype)

    return spoil


def first(a):
    return a[(0,) * a.ndim]


def one_nan(a):
    a = a.copy()
    a.reshape(-1)[:1] = np.nan
    return a


def with_metadata(a):
    return a.astype(np.dtype(a.dtype, metadata={"unit": "m"}))


SPOILS = [
    *map(of_type, [*SCALAR_TYPES.replace("O", ""), object, *DTYPES, ">f4", ">f8", ">i4", "<f8", "i4,f4"]),
    lambda a: np.zeros(a.shape, [("value", a.dtype)]),
    lambda a: np.zeros(a.shape, {"names": ["v"], "formats": [a.dtype], "offsets": [3], "itemsize": 11}),
    *(np.ndarray.tolist, lambda a: tuple(a), memoryview, lambda a: a.tobytes(), lambda a: bytearray(a), iter),
    lambda a: array.array("d", a.astype(np.float64).tobytes()),
    *(np.ma.masked_array, lambda a: np.ma.masked_array(a, mask=True), lambda a: np.ma.masked_less(a, 1.2)),
    lambda a: a.reshape(len(a), -1).view(np.matrix),
    *(one_nan, first, lambda a: np.array(first(a))),
    *(lambda a: a[:-1], lambda a: a[:1], lambda a: a[:0], lambda a: a[..., :-1], lambda a: a[..., :0]),
    *(lambda a: a[None], lambda a: a[..., None], lambda a: a.reshape(-1), lambda a: a.T, lambda a: a[0]),
    *(lambda a: np.concatenate([a, a[:1]]), lambda a: a[:, None], lambda a: np.repeat(a, 2, -1)),
    lambda a: np.broadcast_to(first(a), a.shape),
    lambda a: np.broadcast_to(a[:1], a.shape),
    lambda a: np.lib.stride_tricks.as_strided(a, strides=(0,) * a.ndim),
    windows,
]
"""What an argument could be mistaken for."""

AS_GOOD = [
    *(*LAYOUTS.values(), *VECTOR_LAYOUTS.values()),
    *(lambda a: a[...], np.copy, with_metadata, lambda a: a.view(Subclass), lambda a: a.view(np.recarray)),
]
"""Most of the time."""

NUMPY_ARRAYS = hnp.arrays(
    st.one_of(
        hnp.scalar_dtypes(),
        hnp.byte_string_dtypes(),
        hnp.array_dtypes(),
        st.sampled_from([np.float32, np.float64]),
    ),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
)
ANYTHING = st.one_of(
    st.sampled_from(SCALARS).map(copied),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.lists(st.floats(), max_size=5),
    NUMPY_ARRAYS,
)


@st.composite
def spoiled(draw, arguments, name):
    """Something in the place of an argument, made from it, from another one, or from nothing."""
    value = arguments[name]
    how = draw(st.sampled_from(["anything", "spoiled", "as good", "as good", "another"]))
    if how == "another":
        value = arguments[draw(st.sampled_from(sorted(arguments)))]
        if draw(st.booleans()):
            return value
    if how == "anything" or not isinstance(value, np.ndarray):
        return draw(ANYTHING)
    spoil = draw(st.sampled_from(SPOILS if how == "spoiled" else AS_GOOD))
    try:
        return spoil(value)
    except (
        TypeError,
        ValueError,
        IndexError,
        NotImplementedError,
        RuntimeWarning,
    ):  # there is no such thing of this one
        return draw(ANYTHING)


def good(seed, dtype, column_type):
    """All arguments that there are, good ones, of few elements."""
    rng = np.random.default_rng(seed)
    dims, axis = [((4, 5), 1), ((5, 2), 0), ((2, 5, 3), 1), ((2, 3, 2, 5), -1)][rng.integers(4)]
    return {
        **{name: rng.normal(size=dims).astype(dtype) for name in ("x", "grad_out")},
        **{name: rng.uniform(1, 2, 5).astype(column_type) for name in contract.COLUMNS},
        "out": np.full(dims, np.nan, dtype),
        "training": bool(rng.integers(2)),
        "momentum": 0.25,
        "eps": 1e-3,
        "axis": axis,
    }


# --- what must not change --------------------------------------------------------------------------


def snapshot(value):
    """What can be told of an object without changing it: an array's whole memory, a list's values."""
    if isinstance(value, np.ma.MaskedArray):
        return bits(value.data), bits(np.ma.getmaskarray(value))
    if isinstance(value, np.ndarray):
        owner = value
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        return bits(np.asarray(value)), bits(np.asarray(owner))
    if isinstance(value, (bytearray, memoryview, array.array)):
        return bytes(value)
    if isinstance(value, (list, tuple, set, dict)):
        return repr(value)
    return None


class kept:
    """Hold these objects to what they are where the block raises, one of ERRORS; say what it raised."""

    def __init__(self, values, names):
        self.values, self.names, self.error = values, names, None

    def __enter__(self):
        self.before = list(map(snapshot, self.values))
        return self

    def __exit__(self, kind, error, _):
        if kind is None:
            return False
        if not isinstance(error, ERRORS):
            return False  # not to be hidden
        self.error = error
        assert list(map(snapshot, self.values)) == self.before, f"something was written before: {error}"
        message = str(error)
        assert any(re.search(rf"\b{name}\b", message) for name in self.names), f"names nothing: {message}"
        return True


# --- the functions ---------------------------------------------------------------------------------

SEEDS = st.integers(0, 2**32 - 1)
TYPES = st.sampled_from(DTYPES)
WIDE = st.sampled_from([np.float32, np.float64])


def check(function, arguments):
    """Hold a call with these plain arguments against the oracle, and return what the call returns."""
    a = dict(arguments)
    training = a.pop("training", None)
    if function == "batch_stats":
        expected = statistics_of(a["x"], axis=a["axis"])
        result = nbbn.batch_stats(a["x"], axis=a["axis"])
        check_statistics(result, expected, a["x"].dtype)
        return result
    if function == "batch_norm_backward":
        return check_backward(a.pop("grad_out"), a.pop("x"), a.pop("weight"), training=training, **a)
    if function == "batch_norm_forward":
        return check_forward(**a)
    if training:
        return check_training(**a)
    a.pop("momentum")
    return check_evaluation(**a)


def plain(arguments):
    """The same arguments as those types that are beyond doubt."""
    numbers = {"eps": float, "momentum": float, "axis": int, "training": bool}
    result = dict(arguments)
    for name, kind in numbers.items():
        if arguments.get(name) is not None:
            result[name] = kind(arguments[name])
    return result


def ordinary_values(arguments):
    """Whether all numbers are such that nothing on the way to a result overflows, or gets lost."""
    for name, value in arguments.items():
        if isinstance(value, np.ndarray) and name != "out":
            sizes = np.abs(value[value != 0].astype(np.float64))
            if not ((sizes > 1e-6) & (sizes < 1e6)).all() or (name.endswith("var") and (value < 0).any()):
                return False
    return 1e-6 < arguments.get("eps", 1.0) < 1e300


@pytest.mark.parametrize("function", FUNCTIONS)
@examples(5)
@given(st.data(), SEEDS, TYPES, TYPES)
def test_functions(function, data, seed, dtype, column_type):
    names = FUNCTIONS[function]
    arguments = {k: v for k, v in good(seed, dtype, column_type).items() if k in names}
    originals = dict(arguments)
    for name in data.draw(st.permutations(names))[: data.draw(st.sampled_from([1, 1, 1, 2, 3]))]:
        arguments[name] = data.draw(spoiled(originals, name))
    wrong = contract.fault(function, arguments)
    event(wrong or "computed")
    values = [v for v in (*arguments.values(), *originals.values()) if v is not None]
    arrays = {k: v for k, v in arguments.items() if isinstance(v, np.ndarray) and v.flags.writeable}
    before = {k: v.copy() for k, v in arrays.items()}
    with kept(values, names) as call:
        result = getattr(nbbn, function)(**arguments)
    assert (call.error is None) == (wrong is None), f"{wrong or 'good'}, and yet: {call.error or result}"
    if wrong is None:
        compare(function, arguments, result, before)


def compare(function, arguments, result, before):
    """Hold a result against that of the same call with plain arguments, and that one against the oracle."""
    x, out = arguments["x"], arguments.get("out")
    written = {k: arguments[k] for k in ("out", "running_mean", "running_var") if k in before}
    after = {k: v.copy() for k, v in written.items()}
    values = _copied(result)
    for name, array_before in before.items():
        arguments[name][...] = array_before
    ordinary = plain(arguments)
    if out is not None and contract.overlap(x, out):
        ordinary["out"] = ordinary["x"]
    for name in written.keys() - {"out"}:  # which may be a weight, too
        ordinary[name] = before[name].copy()
    if x.size and ordinary_values(ordinary):
        repeated = check(function, ordinary)
    else:
        repeated = getattr(nbbn, function)(**ordinary)
    assert_same_bits(_copied(repeated), values)
    for name, array_after in after.items():
        assert_same_bits(np.asarray(ordinary[name]).copy(), np.asarray(array_after))


def _copied(result):
    """A result as plain arrays that lie in order."""
    if isinstance(result, tuple):
        return tuple(map(_copied, result))
    return np.array(result) if isinstance(result, np.ndarray) else result


# --- BatchNorm -------------------------------------------------------------------------------------

OPTIONS = {
    "num_features": 5,
    "eps": 1e-3,
    "momentum": 0.25,
    "affine": True,
    "track_running_stats": True,
    "axis": 1,
    "correction": 1,
    "dtype": "float32",
    "device": "cpu",
}


def is_dtype(value):
    try:
        return value is not None and any(np.dtype(value) == np.dtype(dtype) for dtype in DTYPES)
    except Exception:  # NumPy reads a small language here
        return False


MODULE_RULES = {
    "num_features": lambda v: contract.is_int(v) and 1 <= int(v) <= 10**5,
    "eps": contract.is_number,
    "momentum": lambda v: v is None or contract.is_number(v, high=1.0),
    "affine": contract.is_bool,
    "track_running_stats": contract.is_bool,
    "axis": contract.is_int,
    "correction": contract.is_number,
    "dtype": is_dtype,
    "device": lambda v: isinstance(v, str) and v == "cpu",
}
DTYPE_NAMES = st.sampled_from(
    [
        *DTYPES,
        *SCALAR_TYPES,
        "f4,",
        "(1,2f4",
        [("a", "f4"), ("a", "f4")],
        {"names": ["a"]},
        ">f4",
        "=f8",
        float,
    ]
)


@examples(2)
@given(st.data(), st.sets(st.sampled_from(sorted(OPTIONS)), min_size=1, max_size=3))
def test_module_options(data, names):
    options = dict(OPTIONS)
    for name in sorted(names):
        options[name] = data.draw(st.one_of(ANYTHING, DTYPE_NAMES) if name == "dtype" else ANYTHING, name)
    features = options["num_features"]
    assume(not contract.is_int(features) or not 10**5 < int(features) <= 2**59)  # gigabytes, all of these
    assume(not str(options["device"]).startswith("cuda"))  # there may be one
    wrong = [name for name, rule in MODULE_RULES.items() if not rule(options[name])]
    event(f"wrong: {len(wrong)}")
    with kept(list(options.values()), OPTIONS) as call:
        bn = nbbn.BatchNorm(**options)
    assert (call.error is None) == (not wrong), f"{wrong}, and yet: {call.error}"
    if wrong:
        return
    assert (bn.num_features, bn.axis, bn.device) == (int(features), int(options["axis"]), "cpu")
    for name in ("eps", "momentum", "correction"):
        assert getattr(bn, name) == (None if options[name] is None else float(options[name]))
    given_arrays = (bn.weight, options["affine"]), (bn.running_var, options["track_running_stats"])
    for column, wanted in given_arrays:
        assert column.dtype == np.dtype(options["dtype"]) if wanted else column is None
        assert column is None or column.tolist() == [1.0] * int(features)


WORDS = {
    "activation": ("relu", "leaky_relu", "silu", "gelu", "gelu_tanh"),
    "single_value": ("error", "running"),
    "nonfinite": ("propagate", "skip", "raise"),
}
NEWER_RULES = {
    "activation": lambda v: v is None or (isinstance(v, str) and v in WORDS["activation"]),
    "negative_slope": lambda v: contract.is_number(v, -np.inf, np.inf),
    "renorm": lambda v: isinstance(v, bool),
    "virtual_batch_size": lambda v: v is None or (contract.is_int(v) and int(v) >= 1),
    "single_value": lambda v: isinstance(v, str) and v in WORDS["single_value"],
    "nonfinite": lambda v: isinstance(v, str) and v in WORDS["nonfinite"],
}
WORD = st.sampled_from(sorted({word for words in WORDS.values() for word in words}))


@examples(2)
@given(st.data(), st.sampled_from(sorted(NEWER_RULES)), SEEDS)
def test_newer_module_options(data, name, seed):
    """Each is refused, or does what it says in a step of training and one of evaluation."""
    value = data.draw(st.one_of(ANYTHING, WORD))
    with kept([value], [name]) as call:
        bn = nbbn.BatchNorm(5, **{name: value})
    assert (call.error is None) == bool(NEWER_RULES[name](value)), call.error
    if call.error is None:
        x = np.random.default_rng(seed).normal(size=(4, 5, 2)).astype(np.float32)
        for mode in (True, False):
            assert np.isfinite(bn.train(mode)(x)).all()
            assert np.isfinite(bn.backward(x)).all()
        assert bn.num_batches_tracked >= 1


@examples(2)
@given(st.data(), SEEDS, st.sampled_from(["activation", "negative_slope", "residual", "mask", "lengths"]))
def test_what_goes_along(data, seed, name):
    """It is refused by name, and nothing is written; or what does not count is 0, and all else finite."""
    x = np.random.default_rng(seed).normal(size=(4, 5, 3)).astype(np.float32)
    mean, var = np.zeros(5), np.ones(5)
    made = {
        "residual": x.copy(),
        "mask": np.random.default_rng(seed).random((4, 3)) < 0.7,
        "lengths": np.array([3, 0, 2, 1]),
    }
    value = data.draw(spoiled(made, name) if name in made else st.one_of(ANYTHING, WORD))
    with kept([x, mean, var, value], ["x", *made, name]) as call:
        out = nbbn.batch_norm(x, mean, var, training=True, **{name: value})
    event(f"{name}: {'refused' if call.error else 'computed'}")
    if name in NEWER_RULES:
        assert (call.error is None) == bool(NEWER_RULES[name](value)), call.error
    if call.error is None:
        assert out.shape == x.shape and out.dtype == x.dtype
        if name == "mask" and value is not None:
            which = np.broadcast_to(np.asarray(value), (4, 3))
            assert not out.transpose(0, 2, 1)[~which].any()
        elif name == "lengths" and value is not None:
            assert not any(out[k, :, int(length) :].any() for k, length in enumerate(np.asarray(value)))


def trained(seed, options):
    """A module after a step, with an x and a grad_out like that step's."""
    arguments = good(seed, np.float32, np.float32)
    bn = nbbn.BatchNorm(5, axis=arguments["axis"], **options)
    if bn.affine:
        bn.weight[...], bn.bias[...] = arguments["weight"], arguments["bias"]
    bn(arguments["x"])
    return bn, arguments


def state(bn):
    gradients = bits(bn.grad_weight), bits(bn.grad_bias)
    return {name: bits(value) for name, value in bn.state_dict().items()}, gradients, bn.training


MODULES = st.fixed_dictionaries({"affine": st.booleans(), "track_running_stats": st.booleans()})


@examples(2)
@given(st.data(), SEEDS, MODULES, st.booleans())
def test_module_calls(data, seed, options, mode):
    bn, arguments = trained(seed, options)
    dy = arguments["grad_out"]
    gradient = bits(bn.backward(dy))
    bn.train(mode)
    x = data.draw(spoiled({k: arguments[k] for k in ("x", "grad_out", "weight")}, "x"))
    call = {"x": x, "axis": bn.axis, "weight": bn.weight, "bias": bn.bias, "training": mode}
    if bn.track_running_stats:
        call |= {"running_mean": bn.running_mean.copy(), "running_var": bn.running_var.copy()}
    else:
        call["training"] = True
    wrong = contract.fault("batch_norm", call)
    if wrong is None and x.shape[bn.axis] != 5:
        wrong = "x has other channels"
    event(wrong or "computed")
    before = state(bn)
    with kept([x], ["x", "axis"]) as attempt:
        out = bn(x)
    assert (attempt.error is None) == (wrong is None), f"{wrong}, and yet: {attempt.error}"
    if wrong is None:
        assert_same_bits(np.array(out), np.array(nbbn.batch_norm(**call)))
        if bn.track_running_stats:
            assert_same_bits(bn.running_mean, call["running_mean"])
            assert_same_bits(bn.running_var, call["running_var"])
            assert bn.num_batches_tracked == 1 + (mode and x.size > 0)
    else:
        assert state(bn) == before
        assert bits(bn.backward(dy)) == gradient  # still that of the call before


@examples(2)
@given(st.data(), SEEDS, MODULES)
def test_module_backward(data, seed, options):
    bn, arguments = trained(seed, options)
    x = arguments["x"]
    bn.backward(arguments["grad_out"])
    dy = data.draw(spoiled({k: arguments[k] for k in ("x", "grad_out", "weight")}, "grad_out"))
    forward = nbbn.batch_norm_forward(x, axis=bn.axis)
    call = {"grad_out": dy, "x": x, "weight": bn.weight, "axis": bn.axis, "mean": forward.mean}
    call["invstd"] = nbbn.batch_norm_forward(x, eps=bn.eps, axis=bn.axis).invstd
    wrong = contract.fault("batch_norm_backward", call)
    event(wrong or "computed")
    before = state(bn)
    with kept([dy, x], ["grad_out"]) as attempt:
        grad_x = bn.backward(dy)
    assert (attempt.error is None) == (wrong is None), f"{wrong}, and yet: {attempt.error}"
    if wrong is None:
        expected = nbbn.batch_norm_backward(**call)
        assert_same_bits(np.array(grad_x), np.array(expected.x))
        if bn.affine:
            assert_same_bits(bn.grad_weight, expected.weight.astype(np.float32))
            assert_same_bits(bn.grad_bias, expected.bias.astype(np.float32))
    else:
        assert state(bn) == before


def loaded(name, value, dtype):
    """What a value of a state is as an array, or None if it is none."""
    try:
        result = np.asarray(value)
    except Exception:  # whatever an object raises when it is asked for its values
        return None
    if isinstance(value, np.ma.MaskedArray):
        return None
    if name == "num_batches_tracked":
        if result.size != 1 or result.dtype.kind not in "iuf" or not 0 <= result.item() <= 2**62:
            return None
        return np.array(int(result.item())) if result.item() == int(result.item()) else None
    if result.shape != (5,) or not np.can_cast(result.dtype, dtype, "same_kind"):
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        return result.astype(dtype)


@examples(3)
@given(st.data(), SEEDS, MODULES, WIDE)
def test_load_state_dict(data, seed, options, dtype):
    bn, arguments = trained(seed, options | {"dtype": dtype})
    names = list(bn.state_dict())
    whole = {k: arguments[k] for k in ("weight", "bias", "running_mean", "running_var") if k in names}
    whole |= {"num_batches_tracked": np.array(3)} if bn.track_running_stats else {}
    new = dict(whole)
    for name in data.draw(st.permutations(names))[: data.draw(st.sampled_from([0, 1, 1, 2]))]:
        new[name] = data.draw(spoiled(whole, name))
    change = data.draw(st.sampled_from(["none", "none", "none", "remove", "add", "anything"]))
    if change == "remove" and names:
        del new[data.draw(st.sampled_from(names))]
    elif change == "add":
        new[data.draw(st.one_of(st.sampled_from(["gamma", None, 1, ("weight",)]), st.text()))] = 1
    given_state = data.draw(ANYTHING) if change == "anything" else new
    expected = None
    if isinstance(given_state, dict) and set(names) >= set(given_state) >= set(names) - {
        "num_batches_tracked"
    }:
        expected = {name: loaded(name, value, dtype) for name, value in given_state.items()}
        if any(value is None for value in expected.values()):
            expected = None
    event("refused" if expected is None else "loaded")
    before, arrays = state(bn), [getattr(bn, name) for name in names]
    values = list(given_state.values()) if isinstance(given_state, dict) else [given_state]
    with kept(values, ["state"]) as call, np.errstate(over="ignore", invalid="ignore"):
        bn.load_state_dict(given_state)
    assert (call.error is None) == (expected is not None), f"{expected}, and yet: {call.error}"
    assert all(getattr(bn, name) is a for name, a in zip(names, arrays, strict=True))
    if expected is None:
        assert state(bn) == before
    else:
        after = bn.state_dict()
        assert all(bits(after[name]) == bits(value) for name, value in expected.items())


@given(ANYTHING)
def test_module_modes_and_devices(value):
    bn, _ = trained(0, {})
    before = state(bn)
    for method, name, rule in (
        (bn.train, "mode", contract.is_bool),
        (bn.to, "device", MODULE_RULES["device"]),
    ):
        if method == bn.to and str(value).startswith("cuda"):
            continue
        with kept([value], [name]) as call:
            assert method(value) is bn
        assert (call.error is None) == rule(value)
    assert state(bn.train(before[2])) == before


# --- merge, warmup, set_recycling ------------------------------------------------------------------


def are_statistics(stats):
    return (
        contract.is_int(stats.count)
        and 0 <= int(stats.count) <= 2**63
        and all(contract.is_array(v) and v.ndim == 1 for v in stats[1:])
        and stats.mean.shape == stats.var.shape
    )


def pooled(first, second):
    """Mean and variance of both together, with the digits of a longdouble, and their tolerances."""
    (n, mean, var), (m, other_mean, other_var) = (
        (np.longdouble(int(s.count)), *(np.asarray(v).astype(np.longdouble) for v in s[1:]))
        for s in (first, second)
    )
    delta = other_mean - mean
    result = (
        mean + delta * (m / (n + m)),
        (n * var + m * other_var) / (n + m) + delta**2 * (n / (n + m)) * (m / (n + m)),
    )
    u = max(float(finfo(v.dtype).eps) for s in (first, second) for v in s[1:])
    # A dozen roundings of what is added up; the difference of the means is rounded, too, and squared.
    sizes = np.abs(mean) + np.abs(other_mean)
    return result, (12 * u * sizes, 12 * u * (np.abs(var) + np.abs(other_var) + np.abs(delta) * sizes))


@examples(3)
@given(st.data(), SEEDS, WIDE, st.booleans())
def test_merge(data, seed, dtype, reverse):
    a = good(seed, np.float32, dtype)
    fields = {"count": 7, "mean": a["mean"], "var": a["invstd"]}
    odd = dict(fields, count=data.draw(st.sampled_from([7, 0, 1, 2**40])))
    for name in data.draw(st.permutations(sorted(fields)))[: data.draw(st.sampled_from([0, 1, 1, 2]))]:
        odd[name] = data.draw(spoiled(fields, name))
    other = nbbn.BatchStats(**odd)
    if data.draw(st.sampled_from([False] * 5 + [True])):
        other, reverse = data.draw(ANYTHING), False
    stats = nbbn.BatchStats(5, a["weight"], a["running_var"])
    is_good = isinstance(other, nbbn.BatchStats) and are_statistics(other) and len(other.mean) == 5
    event("computed" if is_good else "refused")
    pair = (other, stats) if reverse else (stats, other)
    with kept([*stats, *odd.values()], ["other", "self"]) as call:
        result = pair[0].merge(pair[1])
    assert (call.error is None) == is_good, call.error
    if is_good and ordinary_values(other._asdict()):
        assert result.count == 5 + int(other.count)
        if int(other.count) > 0:
            expected, tolerances = pooled(stats, other)
            for actual, value, tolerance in zip(result[1:], expected, tolerances, strict=True):
                assert (np.abs(actual - value) <= tolerance).all()
        else:
            assert result is stats


@given(st.data(), ANYTHING)
def test_warmup_and_set_recycling(data, value):
    name = data.draw(st.sampled_from(["dtypes", "norms", "training", "evaluation", "backward"]))
    value = data.draw(st.sampled_from([value, [value]])) if name in ("dtypes", "norms") else value
    arguments = {"dtypes": (), "training": False} | {name: value}
    try:
        assert nbbn.warmup(**arguments) is None
    except ERRORS:
        pass
    else:
        assert name in ("dtypes", "norms") or contract.is_bool(value)
    bound = nbbn.set_recycling(1 << 20)
    try:
        with kept([value], ["max_bytes"]) as call:
            assert nbbn.set_recycling(value) == 1 << 20
        is_good = contract.is_int(value) and operator.index(value) >= 0
        assert (call.error is None) == is_good
        assert nbbn.set_recycling(bound) == (operator.index(value) if is_good else 1 << 20)
    finally:
        nbbn.set_recycling(bound)
