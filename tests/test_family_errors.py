"""Bad input to layer, RMS, instance and group norm: the right error, and nothing written.

The error names the argument. Every function is called with arguments that are all good but for the one that
is tested, as in test_errors.py, which has what can be wrong with an array or a number. `out` is full of NaN,
and must stay so.
"""

import inspect

import numpy as np
import pytest

import nbbn
from checks import bits
from contract import COLUMNS
from test_errors import (
    AXIS,
    EPS,
    GRAD_OUT,
    MOMENTUM,
    OUT,
    TRAINING,
    UPDATED,
    Bad,
    X,
    columns,
    names,
    numbers,
    raises_and_writes_nothing,
    wrong_kinds,
)
from test_out import OVERLAPS, overlapping_x

DIMS = (4, 6, 5)
NORMALIZED = {"layer": (6, 5), "rms": (5,)}
PARAMETERS = {**NORMALIZED, "instance": (6,), "group": (6,)}
STATISTICS = {"layer": (4,), "rms": (4, 6), "instance": (4, 6), "group": (4, 3)}

NEEDED = inspect.Parameter.empty
SIGNATURES = {
    "layer_norm": (
        {"x": NEEDED, "normalized_shape": NEEDED, "weight": None, "bias": None, "eps": 1e-5},
        {"out": None},
    ),
    "layer_norm_forward": (
        {"x": NEEDED, "normalized_shape": NEEDED, "weight": None, "bias": None},
        {"eps": 1e-5, "out": None},
    ),
    "layer_norm_backward": (
        {"grad_out": NEEDED, "x": NEEDED, "normalized_shape": NEEDED, "weight": None},
        {"mean": NEEDED, "invstd": NEEDED, "out": None},
    ),
    "rms_norm": ({"x": NEEDED, "normalized_shape": NEEDED, "weight": None, "eps": None}, {"out": None}),
    "rms_norm_forward": (
        {"x": NEEDED, "normalized_shape": NEEDED, "weight": None},
        {"eps": None, "out": None},
    ),
    "rms_norm_backward": (
        {"grad_out": NEEDED, "x": NEEDED, "normalized_shape": NEEDED, "weight": None},
        {"invstd": NEEDED, "out": None},
    ),
    "instance_norm": (
        {"x": NEEDED, "running_mean": None, "running_var": None, "weight": None, "bias": None}
        | {"use_input_stats": True, "momentum": 0.1, "eps": 1e-5},
        {"axis": 1, "out": None},
    ),
    "instance_norm_forward": (
        {"x": NEEDED, "weight": None, "bias": None},
        {"eps": 1e-5, "axis": 1, "out": None},
    ),
    "instance_norm_backward": (
        {"grad_out": NEEDED, "x": NEEDED, "weight": None},
        {"mean": NEEDED, "invstd": NEEDED, "axis": 1, "out": None},
    ),
    "group_norm": (
        {"x": NEEDED, "num_groups": NEEDED, "weight": None, "bias": None, "eps": 1e-5},
        {"axis": 1, "out": None},
    ),
    "group_norm_forward": (
        {"x": NEEDED, "num_groups": NEEDED, "weight": None, "bias": None},
        {"eps": 1e-5, "axis": 1, "out": None},
    ),
    "group_norm_backward": (
        {"grad_out": NEEDED, "x": NEEDED, "num_groups": NEEDED, "weight": None},
        {"mean": NEEDED, "invstd": NEEDED, "axis": 1, "out": None},
    ),
}
"""What may be given by position, and what by name alone, with the defaults."""


@pytest.mark.parametrize("function", SIGNATURES)
def test_signatures(function):
    parameters = inspect.signature(getattr(nbbn, function)).parameters.values()
    for kind, expected in zip(
        (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY),
        SIGNATURES[function],
        strict=True,
    ):
        found = {p.name: p.default for p in parameters if p.kind == kind}
        assert list(found.items()) == list(expected.items())


# --- one bad argument ------------------------------------------------------------------------------


def values(argument, name, makers, error):
    return [Bad(argument, f"{name}{i}", lambda a, v=v: v, error) for i, v in enumerate(makers)]


NORMALIZED_SHAPE = {
    norm: values("normalized_shape", "value", wrong, ValueError)
    + values(
        "normalized_shape",
        "type",
        [None, 5.0, "5", True, (6, 5.0), (6, None), (6, True), ("6", "5"), np.float64(5), 1j, [[6, 5]]],
        TypeError,
    )
    for norm, wrong in {
        "layer": [6, (5, 6), (6,), 0, -5, (6, -5), (), [], (4, 6), (1, 6, 5), (2, 4, 6, 5), 30, 2**70],
        "rms": [6, (5, 5), (6,), 0, -1, (-5,), (), (4, 6, 6), (1, 4, 6, 5), 1, 2**70],
    }.items()
}

NUM_GROUPS = [
    *values("num_groups", "value", [0, -1, -6, 4, 5, 7, 12, 2**70], ValueError),
    *values("num_groups", "type", [None, 2.0, "2", True, (2,), [2], np.float64(2), 1j], TypeError),
]


def parameters_of(argument, norm):
    """Everything of the parameters' shape, or of the statistics'."""
    shape = (STATISTICS if argument in ("mean", "invstd") else PARAMETERS)[norm]
    wrong = columns(argument)
    if len(shape) > 1:
        wrong.append(Bad(argument, "flat", lambda a: a.reshape(-1), ValueError))
        wrong.append(Bad(argument, "transposed", lambda a: a.T, ValueError))
        wrong.append(Bad(argument, "row", lambda a: a[0], ValueError))
    if argument in ("mean", "invstd"):
        wrong.append(Bad(argument, "None", lambda a: None, (TypeError, ValueError)))
        wrong.append(Bad(argument, "of_channels", lambda a: np.ones(7, np.float32), ValueError))
    return wrong


def of_x(norm):
    """Bad ranks differ: a layer is of all axes that there are, an instance is more than one value."""
    wrong = [bad for bad in X if not bad.id.startswith("x-rank_1")]
    wrong = [bad for bad in wrong if bad.id != "x-rank_0"]
    says = r"(x|normalized_shape)" if norm in NORMALIZED else "x"
    wrong.append(Bad("x", "rank_0", lambda a: np.array(3, a.dtype), ValueError, says=says))
    wrong.append(Bad("x", "rank_1", lambda a: a[0, :, 0].copy(), ValueError, says=says))
    if norm == "instance":
        wrong.append(Bad("x", "rank_2", lambda a: a[:, :, 0].copy(), ValueError))
        wrong.append(Bad("x", "one_value", lambda a: a[:, :, :1].copy(), ValueError, out=None, grad_out=None))
    return wrong


def of_axis(norm):
    return AXIS if norm in ("instance", "group") else []


def cases_of(function):
    norm = function.partition("_norm")[0]
    own = {
        "x": of_x(norm),
        "grad_out": GRAD_OUT,
        "normalized_shape": NORMALIZED_SHAPE.get(norm),
        "num_groups": NUM_GROUPS,
        "axis": of_axis(norm),
        "eps": numbers("eps") if norm == "rms" else EPS,
        "momentum": MOMENTUM,
        "use_input_stats": [
            Bad("use_input_stats", bad.id.partition("-")[2], bad.make, bad.error) for bad in TRAINING
        ],
        "out": OUT,
    }
    for name in COLUMNS:
        own[name] = parameters_of(name, norm)
    wanted = [name for part in SIGNATURES[function] for name in part]
    cases = [bad for name in wanted for bad in own[name]]
    if function == "instance_norm":
        cases += UPDATED
        for name in ("running_mean", "running_var"):
            cases += [
                Bad(name, "missing", lambda a: None, ValueError, use_input_stats=False),
                Bad(name, "short_in_evaluation", lambda a: a[:2], ValueError, use_input_stats=False),
            ]
        cases.append(Bad("eps", "negative_in_evaluation", lambda a: -1.0, ValueError, use_input_stats=False))
        cases.append(
            Bad(
                "momentum",
                "above_one_in_evaluation",
                lambda a: 1.5,
                ValueError,
                use_input_stats=False,
            )
        )
    return cases


CASES = [(function, bad) for function in SIGNATURES for bad in cases_of(function)]


def good(function):
    """Return good arguments, all of them."""
    norm = function.partition("_norm")[0]
    rng = np.random.default_rng(7)
    arguments = {
        **{name: rng.normal(size=DIMS).astype(np.float32) for name in ("x", "grad_out")},
        **{
            name: rng.uniform(1, 2, PARAMETERS[norm]).astype(np.float32)
            for name in ("weight", "bias", "running_mean", "running_var")
        },
        **{name: rng.uniform(1, 2, STATISTICS[norm]).astype(np.float32) for name in ("mean", "invstd")},
        "normalized_shape": NORMALIZED.get(norm),
        "num_groups": 3,
        "out": np.full(DIMS, np.nan, np.float32),
        "use_input_stats": True,
        "momentum": 0.1,
        "eps": 1e-5,
        "axis": 1,
    }
    return {name: arguments[name] for part in SIGNATURES[function] for name in part}


@pytest.mark.parametrize(("function", "bad"), CASES, ids=[f"{function}-{bad.id}" for function, bad in CASES])
def test_one_bad_argument(function, bad):
    arguments = good(function)
    arguments |= {k: v for k, v in bad.others.items() if k in arguments}
    arguments[bad.argument] = bad.make(arguments[bad.argument])
    if bad.id == "x-one_value":  # all that is of x's shape, of this one
        for name in {"grad_out", "out"} & arguments.keys():
            arguments[name] = np.full(arguments["x"].shape, np.nan, np.float32)
    raises_and_writes_nothing(getattr(nbbn, function), arguments, bad.error, bad.says)


@pytest.mark.parametrize("function", SIGNATURES)
def test_good_arguments_are_good(function):
    """So that each of the above fails for its own reason; and without what may be left out."""
    call, arguments = getattr(nbbn, function), good(function)
    assert call(**arguments) is not None
    assert not np.isnan(arguments["out"]).any()
    needed = {
        name: value
        for part in SIGNATURES[function]
        for name, value in part.items()
        if value is NEEDED and name in arguments
    }
    assert call(**{name: arguments[name] for name in needed}) is not None


def test_evaluation_of_one_value_an_instance():
    """In training it is an error, as is one of no instance; with the running statistics it is none."""
    x = np.ones((4, 6, 1), np.float32)
    out = nbbn.instance_norm(x, np.ones(6), np.ones(6), use_input_stats=False)
    assert (out == 0).all()
    assert nbbn.instance_norm(x, np.ones(6), np.ones(6), None, None, False, None) is not None


def test_messages_say_what_they_got_and_what_they_need():
    for function, argument, value, words in (
        ("layer_norm", "weight", np.ones(3, np.float32), ("weight", "(3,)", "(6, 5)")),
        ("layer_norm", "normalized_shape", (5, 6), ("normalized_shape", "(5, 6)", "(4, 6, 5)")),
        ("layer_norm", "normalized_shape", 6.5, ("normalized_shape", "float")),
        ("layer_norm_forward", "x", np.ones(DIMS, np.int32), ("x", "int32", "float32")),
        ("layer_norm_backward", "mean", np.ones(6), ("mean", "(6,)", "(4,)")),
        ("rms_norm_forward", "eps", -0.5, ("eps", "-0.5")),
        ("rms_norm_backward", "invstd", np.ones(4), ("invstd", "(4,)", "(4, 6)")),
        ("instance_norm", "x", np.ones((4, 6), np.float32), ("x", "3", "(4, 6)")),
        ("instance_norm", "momentum", 1.5, ("momentum", "1.5")),
        ("instance_norm", "running_var", np.ones(5), ("running_var", "(5,)", "6")),
        ("instance_norm_backward", "grad_out", np.ones((2, 2), np.float32), ("(2, 2)", "(4, 6, 5)")),
        ("group_norm", "num_groups", 4, ("num_groups", "4", "6")),
        ("group_norm", "num_groups", 0, ("num_groups", "0")),
        ("group_norm_forward", "axis", 7, ("axis", "7", "3")),
        ("group_norm_backward", "invstd", np.ones((4, 6)), ("invstd", "(4, 6)", "(4, 3)")),
    ):
        arguments = good(function) | {argument: value}
        with pytest.raises((TypeError, ValueError)) as caught:
            getattr(nbbn, function)(**arguments)
        message = str(caught.value)
        assert all(word in message for word in words), f"{words} in {message}"
        assert np.isnan(arguments["out"]).all()


# --- arrays that overlap ---------------------------------------------------------------------------


def arguments_for(function, x, other):
    """Good arguments for any x of three axes, in float64."""
    norm = function.partition("_norm")[0]
    channels = x.shape[1]
    shapes = {"layer": x.shape[:1], "rms": x.shape[:1], "group": (len(x), 1), "instance": (len(x), channels)}
    result = {
        "x": x,
        "grad_out": other,
        "normalized_shape": x.shape[1:],
        "num_groups": 1,
        "mean": np.zeros(shapes[norm]),
        "invstd": np.ones(shapes[norm]),
    }
    return {name: result[name] for part in SIGNATURES[function] for name in part if name in result}


@pytest.mark.parametrize("name", OVERLAPS)
@pytest.mark.parametrize("function", SIGNATURES)
def test_out_that_overlaps_x(rng, name, function):
    """Only x itself may be written over; and not grad_out, be it ever so much itself."""
    buffer = rng.normal(size=3 * 120)
    x, out = overlapping_x(buffer)[name]
    before = bits(buffer)
    pairs = [(x, rng.normal(size=x.shape))]
    if "grad_out" in SIGNATURES[function][0]:
        pairs.append(pairs[0][::-1])
    for first, other in pairs:
        with pytest.raises(ValueError, match=r"\bout\b"):
            getattr(nbbn, function)(**arguments_for(function, first, other), out=out)
    assert bits(buffer) == before


@pytest.mark.parametrize("function", [name for name in SIGNATURES if name.endswith("backward")])
def test_out_that_is_grad_out(rng, function):
    x, dy = rng.normal(size=(2, *DIMS))
    before = bits(dy)
    with pytest.raises(ValueError, match=r"\bout\b.*\bgrad_out\b"):
        getattr(nbbn, function)(**arguments_for(function, x, dy), out=dy)
    assert bits(dy) == before


@pytest.mark.parametrize("place", ["first", "last", "strided"])
@pytest.mark.parametrize(
    ("function", "name"),
    [(f, name) for f in SIGNATURES for name in COLUMNS if name in SIGNATURES[f][0] | SIGNATURES[f][1]],
)
def test_out_that_overlaps_a_parameter(rng, function, name, place):
    """Nor if out is x itself."""
    arguments = good(function)
    shape = arguments[name].shape
    flat = np.abs(rng.normal(size=120)) + 1
    length = int(np.prod(shape))
    some = {"first": flat[:length], "last": flat[-length:], "strided": flat[3 : 3 + 3 * length : 3]}[place]
    arguments = {k: v.astype(np.float64) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    arguments |= {name: some.reshape(shape), "out": flat.reshape(DIMS)}
    for x in (arguments["x"], arguments["out"]):
        arguments["x"] = x
        raises_and_writes_nothing(getattr(nbbn, function), arguments, ValueError, name)


def test_running_statistics_that_overlap():
    both = np.ones(9)
    arguments = good("instance_norm") | {"running_mean": both[:6], "running_var": both[3:]}
    raises_and_writes_nothing(nbbn.instance_norm, arguments, ValueError, "running_var")
    arguments["running_var"] = arguments["running_mean"]
    raises_and_writes_nothing(nbbn.instance_norm, arguments, ValueError, "running_var")


def test_inputs_may_overlap_one_another(rng):
    """They are only read."""
    x = rng.normal(size=DIMS)
    weight = x[0, :, 0]
    expected = nbbn.group_norm(x, 3, weight.copy(), weight.copy())
    assert bits(nbbn.group_norm(x, 3, weight, weight)) == bits(expected)
    expected = nbbn.layer_norm(x, (6, 5), x[0].copy(), x[1].copy())
    assert bits(nbbn.layer_norm(x, (6, 5), x[0], x[1])) == bits(expected)


# --- modules ---------------------------------------------------------------------------------------

GOOD_OPTIONS = {
    "LayerNorm": {"normalized_shape": (6, 5), "eps": 1e-5, "elementwise_affine": True, "bias": True},
    "RMSNorm": {"normalized_shape": (5,), "eps": None, "elementwise_affine": True},
    "InstanceNorm": {"num_features": 6, "eps": 1e-5, "momentum": 0.1, "affine": True}
    | {"track_running_stats": True, "bias": True, "axis": 1},
    "GroupNorm": {"num_groups": 3, "num_channels": 6, "eps": 1e-5, "affine": True, "bias": True, "axis": 1},
}
COMMON = {"dtype": "float32", "device": "cpu"}
POSITIONAL = {
    "LayerNorm": (NEEDED, 1e-5, True, True),
    "RMSNorm": (NEEDED, None, True),
    "InstanceNorm": (NEEDED, 1e-5, 0.1, False, False),
    "GroupNorm": (NEEDED, NEEDED, 1e-5, True),
}

WRONG_OPTIONS = {
    "normalized_shape": [(ValueError, (), (-5,), -5, (6, -5)), (TypeError, None, 5.0, "5", True, (5.0,))],
    "num_features": [(ValueError, 0, -3), (TypeError, 5.0, "5", True, None)],
    "num_channels": [(ValueError, 0, -6, 5), (TypeError, 6.0, "6", True, None)],
    "num_groups": [(ValueError, 0, -3, 4, 12), (TypeError, 3.0, "3", True, None)],
    "eps": [(ValueError, -1e-9, float("nan"), float("inf")), (TypeError, "0.1", True, 1j, [0.1])],
    "momentum": [(ValueError, -0.1, 1.1, float("nan")), (TypeError, "0.1", True)],
    "elementwise_affine": [(TypeError, "yes", 1, None)],
    "affine": [(TypeError, "yes", 1, None)],
    "bias": [(TypeError, "yes", 1, None)],
    "track_running_stats": [(TypeError, "yes", 1, None)],
    "axis": [(TypeError, 1.0, "1", None)],
    "dtype": [(TypeError, "int16", np.int32, "single precision")],
    "device": [(nbbn.DeviceError, "cuda", "cuda:0"), (TypeError, 0)],
}


@pytest.mark.parametrize("kind", GOOD_OPTIONS)
def test_signatures_of_modules(kind):
    parameters = inspect.signature(getattr(nbbn, kind)).parameters.values()
    found = {p.name: p.default for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD}
    keywords = {"bias": True, "axis": 1} if "axis" in GOOD_OPTIONS[kind] else {}
    wanted = [name for name in GOOD_OPTIONS[kind] if name not in keywords]
    assert list(found.items()) == list(zip(wanted, POSITIONAL[kind], strict=True))
    found = {p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY}
    assert found == keywords | COMMON


OPTIONS = [
    pytest.param(kind, name, value, group[0], id=f"{kind}-{name}-{value!r}")
    for kind, options in GOOD_OPTIONS.items()
    for name in (*options, *COMMON)
    for group in WRONG_OPTIONS[name]
    for value in group[1:]
]


@pytest.mark.parametrize(("kind", "name", "value", "error"), OPTIONS)
def test_options_of_modules(kind, name, value, error):
    with pytest.raises(error) as caught:
        getattr(nbbn, kind)(**GOOD_OPTIONS[kind] | {name: value})
    said = "(num_groups|num_channels)" if name.startswith("num_") and kind == "GroupNorm" else name
    assert names(said, caught), str(caught.value)


def state(module):
    gradients = bits(module.grad_weight), bits(getattr(module, "grad_bias", None))
    return {name: bits(value) for name, value in module.state_dict().items()}, gradients


@pytest.fixture(params=GOOD_OPTIONS)
def module(request, rng):
    """A module after a step and its gradient."""
    result = getattr(nbbn, request.param)(**GOOD_OPTIONS[request.param])
    result(rng.normal(size=DIMS).astype(np.float32))
    result.backward(rng.normal(size=DIMS).astype(np.float32))
    return result


@pytest.mark.parametrize("bad", wrong_kinds("x"), ids=lambda bad: bad.id)
def test_input_of_modules(module, rng, bad):
    before = state(module)
    with pytest.raises(bad.error, match=r"\bx\b"):
        module(bad.make(rng.normal(size=DIMS).astype(np.float32)))
    assert state(module) == before


@pytest.mark.parametrize("dims", [(4, 5, 6), (4, 3, 5, 4), (4,), (4, 0, 4), (4, 7, 7)], ids=str)
def test_shapes_of_modules(module, dims):
    before = state(module)
    with pytest.raises(ValueError, match=r"\bx\b"):
        module(np.ones(dims, np.float32))
    assert state(module) == before


@pytest.mark.parametrize("bad", GRAD_OUT, ids=lambda bad: bad.id)
def test_backward_of_modules(module, rng, bad):
    before = state(module)
    with pytest.raises(bad.error, match="grad_out"):
        module.backward(bad.make(rng.normal(size=DIMS).astype(np.float32)))
    assert state(module) == before


@pytest.mark.parametrize("kind", GOOD_OPTIONS)
def test_backward_before_forward(kind):
    with pytest.raises(RuntimeError):
        getattr(nbbn, kind)(**GOOD_OPTIONS[kind]).backward(np.ones(DIMS, np.float32))


STATES = {
    "unexpected": (lambda s: s.update(gamma=np.ones(5)), ValueError, "gamma"),
    "missing": (lambda s: s.pop("weight"), ValueError, "weight"),
    "short": (lambda s: s.update(weight=np.ones(3)), ValueError, "weight"),
    "rank": (lambda s: s.update(weight=s["weight"][None]), ValueError, "weight"),
    "scalar": (lambda s: s.update(weight=1.0), ValueError, "weight"),
    "string": (lambda s: s.update(weight="ones"), (TypeError, ValueError), "weight"),
    "complex": (lambda s: s.update(weight=s["weight"] * 1j), (TypeError, ValueError), "weight"),
    "None": (lambda s: s.update(weight=None), (TypeError, ValueError), "weight"),
}


@pytest.mark.parametrize("wrong", STATES)
def test_states_of_modules(module, wrong):
    """The bad entry comes last, all before it are good: none of them is taken."""
    spoil, error, says = STATES[wrong]
    before = state(module)
    changed = {name: value + 1 for name, value in reversed(module.state_dict().items())}
    spoil(changed)
    with pytest.raises(error) as caught:
        module.load_state_dict(changed)
    assert names(says, caught), str(caught.value)
    assert state(module) == before


def test_states_of_another_kind(module):
    before = state(module)
    for wrong in (None, [1, 2], 3):
        with pytest.raises(TypeError, match="state"):
            module.load_state_dict(wrong)
    assert state(module) == before


def test_modes_and_devices(module):
    before = state(module)
    for device, error in (("cuda", nbbn.DeviceError), ("cuda:1", nbbn.DeviceError), (3, TypeError)):
        with pytest.raises(error, match="device"):
            module.to(device)
    with pytest.raises(TypeError, match="mode"):
        module.train("yes")
    assert module.training and state(module) == before


def test_evaluation_of_instances_says_what_it_needs():
    x = np.ones((4, 6, 5), np.float32)
    with pytest.raises(ValueError, match=r"^running_mean must be given with use_input_stats=False"):
        nbbn.instance_norm(x, use_input_stats=False)
    with pytest.raises(ValueError, match=r"^x must have at least 3 dimensions, got 2"):
        nbbn.instance_norm(x[0], np.ones(5), np.ones(5), use_input_stats=False)
    module = nbbn.InstanceNorm(5, track_running_stats=True).eval()
    with pytest.raises(ValueError, match=r"^x must have at least 3 dimensions, got 2"):
        module(x[0])


def test_normalized_shape_is_no_array():
    with pytest.raises(TypeError, match=r"^normalized_shape must be an int or a sequence of ints"):
        nbbn.layer_norm(np.ones((4, 3, 5)), np.array([3, 5]))
    assert nbbn.layer_norm(np.ones((4, 3, 5)), np.int64(5)).shape == (4, 3, 5)
