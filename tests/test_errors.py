"""Bad input: an error of the right type that names the argument, and nothing written.

Every function is called with arguments that are all good but for the one that is tested.
"""

import re
import warnings

import numpy as np
import pytest

import nbbn
from checks import bits

C = 5
DIMS = (4, C, 6)


class Bad:
    """A way to spoil a call: which argument, what with, what is raised, and what it must say."""

    def __init__(self, argument, name, make, error, *, says=None, **others):
        self.argument, self.make, self.error = argument, make, error
        self.says = argument if says is None else says
        self.others = others
        self.id = f"{argument}-{name}"


def as_type(dtype):
    return lambda a: np.nan_to_num(a).astype(dtype)


def as_matrix(a):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return np.matrix(a[:, :, 0])


def names(argument, error):
    """Whether the message of an error has the name of an argument, as a word."""
    return re.search(rf"\b{argument}\b", str(error.value)) is not None


def windows(a):
    """A writable array whose elements lie on one another."""
    return np.lib.stride_tricks.as_strided(a, strides=(a.itemsize, *a.strides[1:]))


# --- what can be wrong with each kind of argument --------------------------------------------------


def wrong_kinds(argument):
    """Neither NumPy arrays nor of a type that nbbn takes."""
    wrong = {
        "list": lambda a: a.tolist(),
        "number": lambda a: 3.0,
        "string": lambda a: "array",
        "memoryview": memoryview,
        "uint16": as_type(np.uint16),
        "int32": as_type(np.int32),
        "bool": as_type(bool),
        "complex64": as_type(np.complex64),
        "object": as_type(object),
        "longdouble": as_type(np.longdouble),
        "big_endian": as_type(">f4"),
        "masked": np.ma.masked_array,
        "record": lambda a: a.astype([("value", a.dtype)]),
    }
    if argument != "x":
        wrong["float16"] = as_type(np.float16)  # x is of another type
    return [Bad(argument, name, make, TypeError) for name, make in wrong.items()]


X = [
    *wrong_kinds("x"),
    Bad("x", "None", lambda a: None, TypeError),
    Bad("x", "matrix", as_matrix, TypeError),
    Bad("x", "scalar", lambda a: a.dtype.type(3), TypeError),
    Bad("x", "rank_0", lambda a: np.array(3, a.dtype), ValueError),
    Bad("x", "rank_1", lambda a: a[0, :, 0].copy(), ValueError),
    Bad("x", "rank_1_along_axis_0", lambda a: a[0, :, 0].copy(), ValueError, axis=0),
]


def columns(argument):
    """Everything that should have one number a channel."""
    return [
        *wrong_kinds(argument),
        Bad(argument, "short", lambda a: a[:-1], ValueError),
        Bad(argument, "long", lambda a: np.append(a, a[:1]), ValueError),
        Bad(argument, "one", lambda a: a[:1], ValueError),
        Bad(argument, "empty", lambda a: a[:0], ValueError),
        Bad(argument, "rank_0", lambda a: np.array(1, a.dtype), ValueError),
        Bad(argument, "rank_2", lambda a: a[None], ValueError),
        Bad(argument, "column", lambda a: a[:, None], ValueError),
    ]


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


UPDATED = [
    bad
    for name in ("running_mean", "running_var")
    for bad in (
        Bad(name, "read_only", read_only, ValueError),
        Bad(name, "one_cell", lambda a: np.lib.stride_tricks.as_strided(a, strides=(0,)), ValueError),
    )
]

AXIS = [
    Bad("axis", "too_large", lambda a: 3, ValueError),
    Bad("axis", "too_small", lambda a: -4, ValueError),
    Bad("axis", "huge", lambda a: 2**70, ValueError),
    Bad("axis", "float", lambda a: 1.0, TypeError),
    Bad("axis", "string", lambda a: "1", TypeError),
    Bad("axis", "None", lambda a: None, TypeError),
    Bad("axis", "tuple", lambda a: (0, 1), TypeError),
]


def numbers(argument):
    return [
        Bad(argument, "negative", lambda a: -1e-9, ValueError),
        Bad(argument, "nan", lambda a: float("nan"), ValueError),
        Bad(argument, "inf", lambda a: float("inf"), ValueError),
        Bad(argument, "minus_inf", lambda a: float("-inf"), ValueError),
        Bad(argument, "string", lambda a: "0.1", TypeError),
        Bad(argument, "bool", lambda a: True, TypeError),
        Bad(argument, "complex", lambda a: 1j, TypeError),
        Bad(argument, "list", lambda a: [0.1], TypeError),
        Bad(argument, "array", lambda a: np.full(3, 0.1), TypeError),
    ]


EPS = [*numbers("eps"), Bad("eps", "None", lambda a: None, TypeError)]

MOMENTUM = [
    *numbers("momentum"),
    Bad("momentum", "None", lambda a: None, ValueError),
    Bad("momentum", "above_one", lambda a: 1.0000001, ValueError),
]

TRAINING = [
    Bad("training", name, lambda a, value=value: value, TypeError)
    for name, value in (("string", "yes"), ("number", 1), ("None", None))
]

OUT = [
    *wrong_kinds("out"),
    Bad("out", "shape", lambda a: a[:, :, :-1].copy(), ValueError),
    Bad("out", "transposed", lambda a: a.transpose(2, 1, 0).copy(), ValueError),
    Bad("out", "rank", lambda a: a.reshape(4, -1), ValueError),
    Bad("out", "float64", as_type(np.float64), TypeError),
    Bad("out", "read_only", read_only, ValueError),
    Bad("out", "broadcast", lambda a: np.broadcast_to(a[:1], a.shape), ValueError),
    Bad("out", "on_itself", windows, ValueError),
]


# --- good calls ------------------------------------------------------------------------------------


def good(*wanted):
    """Return good arguments of these names."""
    rng = np.random.default_rng(7)
    arguments = {
        "grad_out": rng.normal(size=DIMS).astype(np.float32),
        "x": rng.normal(size=DIMS).astype(np.float32),
        **{
            name: rng.uniform(1, 2, C).astype(np.float32)
            for name in ("weight", "bias", "running_mean", "running_var", "mean", "invstd")
        },
        "out": np.full(DIMS, np.nan, np.float32),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
        "axis": 1,
    }
    return {name: arguments[name] for name in wanted}


FUNCTIONS = {
    "batch_norm": (
        ("x", "running_mean", "running_var", "weight", "bias", "training")
        + ("momentum", "eps", "axis", "out")
    ),
    "batch_norm_forward": ("x", "weight", "bias", "eps", "axis", "out"),
    "batch_norm_backward": (("grad_out", "x", "weight", "mean", "invstd", "axis", "training", "out")),
    "batch_stats": ("x", "axis"),
}

GRAD_OUT = [
    *wrong_kinds("grad_out"),
    Bad("grad_out", "None", lambda a: None, TypeError),
    Bad("grad_out", "shape", lambda a: a[:-1], ValueError),
    Bad("grad_out", "rank", lambda a: a[..., None], ValueError),
    Bad("grad_out", "broadcastable", lambda a: a[:1], ValueError),
    Bad("grad_out", "float64", as_type(np.float64), TypeError),
]

BY_ARGUMENT = {
    "x": X,
    "grad_out": GRAD_OUT,
    **{n: columns(n) for n in ("weight", "bias", "running_mean", "running_var", "mean", "invstd")},
    "axis": AXIS,
    "eps": EPS,
    "momentum": MOMENTUM,
    "training": TRAINING,
    "out": OUT,
}

# What only goes wrong together with another argument.
TOGETHER = {
    "batch_norm": [
        *UPDATED,
        Bad("running_mean", "missing", lambda a: None, ValueError, training=False),
        Bad("running_var", "missing", lambda a: None, ValueError, training=False),
        Bad("running_mean", "short_in_evaluation", lambda a: a[:2], ValueError, training=False),
        Bad("eps", "negative_in_evaluation", lambda a: -1.0, ValueError, training=False),
    ],
    "batch_norm_backward": [
        Bad("mean", "None", lambda a: None, (TypeError, ValueError)),
        Bad("invstd", "None", lambda a: None, (TypeError, ValueError)),
        Bad("mean", "short_in_evaluation", lambda a: a[:2], ValueError, training=False),
    ],
}

CASES = [
    (function, bad)
    for function, arguments in FUNCTIONS.items()
    for bad in [b for name in arguments for b in BY_ARGUMENT[name]] + TOGETHER.get(function, [])
]


def raises_and_writes_nothing(function, arguments, error, says):
    """Call, expect the error and what it says, and hold all arrays to their bits."""
    arrays = {k: v for k, v in arguments.items() if isinstance(v, np.ndarray)}
    before = {k: bits(v) for k, v in arrays.items()}
    with pytest.raises(error) as caught:
        function(**arguments)
    assert names(says, caught), f"{says!r} is not in {str(caught.value)!r}"
    for name, array in arrays.items():
        assert bits(array) == before[name], f"{name} was written"


@pytest.mark.parametrize(("function", "bad"), CASES, ids=[f"{function}-{bad.id}" for function, bad in CASES])
def test_one_bad_argument(function, bad):
    arguments = good(*FUNCTIONS[function]) | bad.others
    arguments[bad.argument] = bad.make(arguments[bad.argument])
    raises_and_writes_nothing(getattr(nbbn, function), arguments, bad.error, bad.says)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_good_arguments_are_good(function):
    """So that each of the above fails for its own reason."""
    result = getattr(nbbn, function)(**good(*FUNCTIONS[function]))
    assert result is not None


@pytest.mark.parametrize("dims", [(1, C), (1, C, 1), (1, C, 1, 1)], ids=str)
def test_one_value_a_channel_in_training(dims):
    x = np.ones(dims, np.float32)
    arguments = good("running_mean", "running_var", "weight", "bias") | {
        "x": x,
        "out": np.full(dims, np.nan, np.float32),
    }
    raises_and_writes_nothing(nbbn.batch_norm, arguments | {"training": True}, ValueError, "x")
    del arguments["running_mean"], arguments["running_var"]
    raises_and_writes_nothing(nbbn.batch_norm_forward, arguments, ValueError, "x")


def test_message_says_what_it_got_and_what_it_needs():
    for function, argument, value, words in (
        ("batch_norm_forward", "weight", np.ones(3, np.float32), ("weight", "(3,)", "5")),
        ("batch_norm_forward", "x", np.ones(DIMS, np.int32), ("x", "int32", "float32")),
        ("batch_norm_forward", "x", [[1.0, 2.0]], ("x", "list", "NumPy")),
        ("batch_norm_forward", "axis", 7, ("axis", "7", "3")),
        ("batch_norm_forward", "eps", -0.5, ("eps", "-0.5")),
        ("batch_norm_backward", "grad_out", np.ones((2, 2), np.float32), ("(2, 2)", "(4, 5, 6)")),
        ("batch_norm", "momentum", 1.5, ("momentum", "1.5")),
    ):
        arguments = good(*FUNCTIONS[function]) | {argument: value}
        with pytest.raises((TypeError, ValueError)) as caught:
            getattr(nbbn, function)(**arguments)
        assert all(word in str(caught.value) for word in words), str(caught.value)


# --- merge, warmup, set_recycling ------------------------------------------------------------------


def test_merge():
    stats = nbbn.batch_stats(np.ones(DIMS, np.float32))
    others = nbbn.batch_stats(np.ones((2, 3), np.float32))
    before = bits(stats.mean), bits(stats.var)
    with pytest.raises(ValueError, match="other"):
        stats.merge(others)
    for other in (None, 3.0, (stats.count, stats.mean, stats.var)):
        with pytest.raises(TypeError, match="other"):
            stats.merge(other)
    assert (bits(stats.mean), bits(stats.var)) == before


@pytest.mark.parametrize(
    ("norms", "error", "message"),
    [
        (["batch", "power"], ValueError, "norms must be among 'batch', 'layer', .* got 'power'"),
        ("layer", TypeError, "norms must be an iterable of str, got 'layer'"),
        ([1], TypeError, "norms must be an iterable of str, got one of int"),
        (None, TypeError, "norms must be an iterable of str, got None"),
    ],
)
def test_warmup_of_norms(norms, error, message):
    with pytest.raises(error, match=f"^{message}"):
        nbbn.warmup(norms=norms)


@pytest.mark.parametrize("dtype", ["float8", "int32", "no such type", 3])
def test_warmup(dtype):
    with pytest.raises((TypeError, ValueError), match="dtype"):
        nbbn.warmup([dtype])


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("activation", "tanh", ValueError),
        ("activation", 1, TypeError),
        ("residual", 1, TypeError),
        ("mask", np.ones(3, bool), TypeError),
        ("training", None, TypeError),
    ],
)
def test_warmup_of_what_is_to_come(name, value, error):
    with pytest.raises(error, match=f"^{name} must be"):
        nbbn.warmup(**{name: value})


@pytest.mark.parametrize("dtypes", ["float32", None, 1])
def test_warmup_of_what_is_no_list(dtypes):
    with pytest.raises(TypeError, match=r"^dtypes must be an iterable of types, got"):
        nbbn.warmup(dtypes)


@pytest.mark.parametrize("module", [nbbn.BatchNorm, nbbn.InstanceNorm])
@pytest.mark.parametrize(
    ("value", "error"), [(2.0, ValueError), (-0.1, ValueError), (np.nan, ValueError), ("0.1", TypeError)]
)
def test_momentum_is_checked_when_it_is_set(module, value, error):
    bn = module(3, momentum=0.3)
    with pytest.raises(error, match=r"^momentum must be "):
        bn.momentum = value
    assert bn.momentum == 0.3
    bn.momentum = None
    assert bn.momentum is None


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), (np.inf, ValueError), (None, TypeError)])
def test_correction_is_checked_when_it_is_set(value, error):
    bn = nbbn.BatchNorm(3)
    with pytest.raises(error, match=r"^correction must be "):
        bn.correction = value
    assert bn.correction == 1


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1, ValueError), (1.5, TypeError), (None, TypeError), ("1", TypeError), (np.True_, TypeError)],
)
def test_set_recycling(value, error):
    before = nbbn.set_recycling(1 << 20)
    try:
        with pytest.raises(error, match="max_bytes"):
            nbbn.set_recycling(value)
        assert nbbn.set_recycling(before) == 1 << 20
    finally:
        nbbn.set_recycling(before)


# --- BatchNorm -------------------------------------------------------------------------------------

OPTIONS = [
    Bad("num_features", "zero", lambda a: 0, ValueError),
    Bad("num_features", "negative", lambda a: -3, ValueError),
    Bad("num_features", "float", lambda a: 5.0, TypeError),
    Bad("num_features", "string", lambda a: "5", TypeError),
    Bad("num_features", "bool", lambda a: True, TypeError),
    Bad("num_features", "None", lambda a: None, TypeError),
    *EPS,
    *(bad for bad in MOMENTUM if bad.id != "momentum-None"),
    Bad("axis", "float", lambda a: 1.0, TypeError),
    Bad("axis", "None", lambda a: None, TypeError),
    Bad("correction", "negative", lambda a: -1, ValueError),
    Bad("correction", "nan", lambda a: float("nan"), ValueError),
    Bad("correction", "string", lambda a: "1", TypeError),
    Bad("dtype", "int16", lambda a: "int16", TypeError),
    Bad("dtype", "int32", lambda a: np.int32, TypeError),
    Bad("dtype", "unknown", lambda a: "single precision", TypeError),
    Bad("device", "cuda", lambda a: "cuda", nbbn.DeviceError),
    Bad("device", "cuda0", lambda a: "cuda:0", nbbn.DeviceError),
    Bad("device", "number", lambda a: 0, TypeError),
    Bad("affine", "string", lambda a: "yes", TypeError),
    Bad("track_running_stats", "None", lambda a: None, TypeError),
]


@pytest.mark.parametrize("bad", OPTIONS, ids=[bad.id for bad in OPTIONS])
def test_module_options(bad):
    options = {"num_features": C} | {bad.argument: bad.make(None)}
    with pytest.raises(bad.error) as caught:
        nbbn.BatchNorm(**options)
    assert names(bad.says, caught), str(caught.value)


@pytest.fixture
def trained():
    """A module after one step, and its state."""
    bn = nbbn.BatchNorm(C)
    bn(good("x")["x"])
    return bn, {k: bits(v) for k, v in bn.state_dict().items()}


def assert_state(trained):
    bn, before = trained
    assert {k: bits(v) for k, v in bn.state_dict().items()} == before


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("bad", X, ids=[bad.id for bad in X])
def test_module_input(trained, bad, mode):
    with pytest.raises(bad.error, match=r"\bx\b"):
        trained[0].train(mode)(bad.make(good("x")["x"]))
    assert_state(trained)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("channels", [0, 1, 4, 6])
def test_module_with_other_channels(trained, channels, mode):
    with pytest.raises(ValueError) as caught:
        trained[0].train(mode)(np.ones((4, channels, 6), np.float32))
    assert all(word in str(caught.value) for word in ("x", "5", str(channels)))
    assert_state(trained)


def test_module_axis_out_of_range():
    bn = nbbn.BatchNorm(C, axis=3)
    with pytest.raises(ValueError, match="axis"):
        bn(good("x")["x"])
    assert bn.num_batches_tracked == 0


def test_module_with_one_value_a_channel(trained):
    with pytest.raises(ValueError, match=r"\bx\b"):
        trained[0](np.ones((1, C), np.float32))
    assert_state(trained)
    assert np.isfinite(trained[0].eval()(np.ones((1, C), np.float32))).all()


@pytest.mark.parametrize("bad", GRAD_OUT, ids=[bad.id for bad in GRAD_OUT])
def test_module_backward(trained, bad):
    bn = trained[0]
    bn.backward(good("grad_out")["grad_out"])
    before = bits(bn.grad_weight), bits(bn.grad_bias)
    with pytest.raises(bad.error, match="grad_out"):
        bn.backward(bad.make(good("grad_out")["grad_out"]))
    assert (bits(bn.grad_weight), bits(bn.grad_bias)) == before
    assert_state(trained)


def test_module_backward_before_forward():
    with pytest.raises(RuntimeError):
        nbbn.BatchNorm(C).backward(good("grad_out")["grad_out"])


def test_module_to_a_device_that_is_not_there(trained):
    for device, error in (("cuda", nbbn.DeviceError), ("cuda:1", nbbn.DeviceError), (3, TypeError)):
        with pytest.raises(error, match="device"):
            trained[0].to(device)
    assert_state(trained)


def test_module_mode(trained):
    with pytest.raises(TypeError, match="mode"):
        trained[0].train("yes")
    assert trained[0].training


STATES = {
    "missing": (lambda s: s.pop("running_var"), ValueError, "running_var"),
    "unexpected": (lambda s: s.update(gamma=np.ones(C)), ValueError, "gamma"),
    "short": (lambda s: s.update(running_var=np.ones(3)), ValueError, "running_var"),
    "rank": (lambda s: s.update(bias=np.ones((1, C))), ValueError, "bias"),
    "scalar": (lambda s: s.update(bias=1.0), ValueError, "bias"),
    "counter": (lambda s: s.update(num_batches_tracked=np.ones(C)), ValueError, "num_batches_tracked"),
    "string": (lambda s: s.update(bias="ones"), (TypeError, ValueError), "bias"),
    "strings": (lambda s: s.update(bias=["one"] * C), (TypeError, ValueError), "bias"),
    "complex": (lambda s: s.update(bias=np.ones(C) * 1j), (TypeError, ValueError), "bias"),
    "None": (lambda s: s.update(bias=None), (TypeError, ValueError), "bias"),
    "ragged": (lambda s: s.update(bias=[[1], [1, 2]]), (TypeError, ValueError), "bias"),
}


@pytest.mark.parametrize("case", STATES)
def test_module_state(trained, case):
    """The bad entry comes last, all before it are good: none of them is taken."""
    spoil, error, says = STATES[case]
    state = {k: v + 1 for k, v in trained[0].state_dict().items()}
    spoil(state)
    with pytest.raises(error) as caught:
        trained[0].load_state_dict(state)
    assert names(says, caught), str(caught.value)
    assert_state(trained)


def test_module_state_of_another_kind(trained):
    for state in (None, [1, 2], 3):
        with pytest.raises(TypeError, match="state"):
            trained[0].load_state_dict(state)
    plain = nbbn.BatchNorm(C, affine=False)
    with pytest.raises(ValueError) as caught:
        trained[0].load_state_dict(plain.state_dict())
    assert "weight" in str(caught.value) and "bias" in str(caught.value)
    with pytest.raises(ValueError) as caught:
        plain.load_state_dict(trained[0].state_dict())
    assert "weight" in str(caught.value) and "bias" in str(caught.value)
    assert_state(trained)
