"""States under the names of other libraries, and training that goes on as theirs would.

Every convention is held to its definition, written down here once more. Where a library is installed (`pip
install ".[peers]"`), its own layers are held to the same: their states, outputs and running statistics.
"""

import os
import pathlib
import re
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import pytest

import nbbn
import reference
from cases import DTYPES, type_id
from checks import assert_same_bits, assert_within
from nbbn.conventions import CONVENTIONS, options
from reference import column, rows

C = 4
OWN = ("weight", "bias", "running_mean", "running_var")
# None of them anybody's default, and momentum not the same from both sides.
MOMENTUM, EPS = 0.7, 0.01
SHAPES = [(2, C), (3, C), (5, C, 12)]  # with 2 and 3 values a channel correction shows most
NARROW = (np.float32, np.float64)


class Meant(NamedTuple):
    """What a library's names and defaults are."""

    names: tuple  # of OWN
    momentum: float
    momentum_of_new: bool
    eps: float
    correction: int
    axis: int


MEANT = {
    "torch": Meant(OWN, 0.1, True, 1e-5, 1, 1),
    "keras": Meant(("gamma", "beta", "moving_mean", "moving_variance"), 0.99, False, 1e-3, 0, -1),
    "flax": Meant(
        ("params/scale", "params/bias", "batch_stats/mean", "batch_stats/var"), 0.99, False, 1e-5, 0, -1
    ),
    "onnx": Meant(("scale", "B", "input_mean", "input_var"), 0.9, False, 1e-5, 0, 1),
}
NESTED = {"params": ("scale", "bias"), "batch_stats": ("mean", "var")}


def flat(state):
    """Return a state without nesting."""
    result = {}
    for name, value in state.items():
        if isinstance(value, dict):
            result |= {f"{name}/{inner}": v for inner, v in value.items()}
        else:
            result[name] = value
    return result


def nested(state):
    """Return a state with its mappings, if it is Flax's."""
    result = {}
    for name, value in state.items():
        outer, _, inner = name.partition("/")
        if inner:
            result.setdefault(outer, {})[inner] = value
        else:
            result[name] = value
    return result


def random_columns(rng):
    """Return parameters and statistics, float32, under nbbn's names."""
    low_high = {"weight": (0.5, 2), "bias": (-2, 2), "running_mean": (-2, 2), "running_var": (0.5, 3)}
    return {name: rng.uniform(*bounds, C).astype(np.float32) for name, bounds in low_high.items()}


def batch(rng, shape, axis):
    return np.moveaxis(rng.normal(1, 2, shape), 1, axis).astype(np.float32)


# --- layers ------------------------------------------------------------------------------------------
#
# Each is made of columns, None for a parameter that it does without. It evaluates, takes a step of training,
# gives its state as its library does, and takes one.


class Defined:
    """A layer as the convention has it: the oracle, rounded to float32 after each step."""

    def __init__(self, convention, columns):
        self.convention, self.columns, self.meant = convention, dict(columns), MEANT[convention]

    def state(self):
        pairs = zip(self.meant.names, OWN, strict=True)
        return nested({name: self.columns[own] for name, own in pairs if self.columns[own] is not None})

    def load(self, state):
        self.columns = dict(zip(self.meant.names, OWN, strict=True))
        self.columns = {own: flat(state)[name] for name, own in self.columns.items()}

    def evaluate(self, x):
        c = self.columns
        wanted = reference.evaluate(
            x, c["running_mean"], c["running_var"], c["weight"], c["bias"], eps=EPS, axis=self.meant.axis
        )
        first = np.moveaxis(x, self.meant.axis, 0)
        return np.moveaxis(wanted.out.rounded().reshape(first.shape), 0, self.meant.axis)

    def step(self, x):
        count, mean, var = reference.statistics(x, self.meant.axis)
        new = {"running_mean": mean, "running_var": reference.unbiased(var, count, self.meant.correction)}
        weight = MOMENTUM if self.meant.momentum_of_new else 1 - MOMENTUM
        for own, value in new.items():
            after = reference.running(self.columns[own], value, weight)
            self.columns[own] = after.rounded()[:, 0].astype(np.float32)


def defined(convention):
    def make(columns):
        return Defined(convention, columns)

    make.convention = convention
    return make


class Torch:
    convention = "torch"

    def __init__(self, columns):
        self.torch = pytest.importorskip("torch")
        self.layer = self.torch.nn.BatchNorm1d(C, eps=EPS, momentum=MOMENTUM)
        self.load(columns)

    @classmethod
    def defaults(cls):
        layer = pytest.importorskip("torch").nn.BatchNorm1d(C)
        return layer.momentum, layer.eps, 1

    def state(self):
        return self.layer.state_dict()

    def load(self, state):
        tensors = {name: self.torch.as_tensor(value) for name, value in state.items()}
        self.layer.load_state_dict(tensors, strict=False)

    def evaluate(self, x):
        return self.layer.eval()(self.torch.from_numpy(x)).detach().numpy()

    def step(self, x):
        self.layer.train()(self.torch.from_numpy(x))


def keras():
    os.environ.setdefault("KERAS_BACKEND", "jax" if find_spec("jax") else "torch")
    return pytest.importorskip("keras")


class Keras:
    convention = "keras"

    def __init__(self, columns):
        given = {"center": columns["bias"] is not None, "scale": columns["weight"] is not None}
        self.layer = keras().layers.BatchNormalization(momentum=MOMENTUM, epsilon=EPS, **given)
        self.layer.build((None, C))  # and from then on only for this rank
        names = dict(zip(OWN, MEANT["keras"].names, strict=True))
        self.load({names[own]: value for own, value in columns.items() if value is not None})

    @classmethod
    def defaults(cls):
        layer = keras().layers.BatchNormalization()
        return layer.momentum, layer.epsilon, layer.axis

    def state(self):
        return {weight.name: weight.numpy() for weight in self.layer.weights}

    def load(self, state):
        self.layer.set_weights(list(state.values()))

    def evaluate(self, x):
        return np.array(self.layer(x.reshape(-1, C), training=False)).reshape(x.shape)

    def step(self, x):
        self.layer(x.reshape(-1, C), training=True)


class Linen:
    convention = "flax"

    def __init__(self, columns):
        self.linen = pytest.importorskip("flax.linen")
        self.options = {"use_bias": columns["bias"] is not None, "use_scale": columns["weight"] is not None}
        names = dict(zip(OWN, MEANT["flax"].names, strict=True))
        self.load(nested({names[own]: value for own, value in columns.items() if value is not None}))

    @classmethod
    def defaults(cls):
        layer = pytest.importorskip("flax.linen").BatchNorm()
        return layer.momentum, layer.epsilon, layer.axis

    def layer(self, training):
        return self.linen.BatchNorm(
            use_running_average=not training, momentum=MOMENTUM, epsilon=EPS, **self.options
        )

    def state(self):
        return self.variables

    def load(self, state):
        self.variables = state

    def evaluate(self, x):
        return np.array(self.layer(training=False).apply(self.variables, x))

    def step(self, x):
        _, updated = self.layer(training=True).apply(self.variables, x, mutable=["batch_stats"])
        self.variables = {**self.variables, **updated}


class Nnx:
    convention = "flax"

    def __init__(self, columns):
        self.nnx = pytest.importorskip("flax.nnx")
        given = {"use_bias": columns["bias"] is not None, "use_scale": columns["weight"] is not None}
        self.layer = self.nnx.BatchNorm(C, momentum=MOMENTUM, epsilon=EPS, rngs=self.nnx.Rngs(0), **given)
        names = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
        self.load({"all": {names[own]: value for own, value in columns.items() if value is not None}})

    @classmethod
    def defaults(cls):
        nnx = pytest.importorskip("flax.nnx")
        layer = nnx.BatchNorm(C, rngs=nnx.Rngs(0))
        return layer.momentum, layer.epsilon, layer.axis

    def state(self):
        _, params, stats = self.nnx.split(self.layer, self.nnx.Param, self.nnx.BatchStat)
        return {"params": params, "batch_stats": stats}

    def load(self, state):
        for values in state.values():
            self.nnx.update(self.layer, values)

    def evaluate(self, x):
        return np.array(self.layer(x, use_running_average=True))

    def step(self, x):
        self.layer(x, use_running_average=False)


class Onnx:
    """A model of one node, in the reference evaluator: the statistics are its inputs and outputs."""

    convention = "onnx"

    def __init__(self, columns):
        self.onnx = pytest.importorskip("onnx")
        self.reference = pytest.importorskip("onnx.reference")
        names = dict(zip(OWN, MEANT["onnx"].names, strict=True))
        self.load({names[own]: value for own, value in columns.items()})

    @classmethod
    def defaults(cls):
        schema = pytest.importorskip("onnx").defs.get_schema("BatchNormalization", 15)
        assert tuple(given.name for given in schema.inputs[1:]) == MEANT["onnx"].names
        read = {name: float(np.float32(a.default_value.f)) for name, a in schema.attributes.items()}
        # Attributes are float32.
        return round(read["momentum"], 7), round(read["epsilon"], 12), 1

    def run(self, x, outputs, training):
        helper, kind = self.onnx.helper, self.onnx.TensorProto.FLOAT
        inputs = ["X", *MEANT["onnx"].names]
        node = helper.make_node(
            "BatchNormalization", inputs, outputs, epsilon=EPS, momentum=MOMENTUM, training_mode=training
        )
        tensors = [
            [helper.make_tensor_value_info(n, kind, None) for n in names] for names in (inputs, outputs)
        ]
        graph = helper.make_graph([node], "one", *tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
        return self.reference.ReferenceEvaluator(model).run(None, {"X": x, **self.columns})

    def state(self):
        return self.columns

    def load(self, state):
        self.columns = dict(state)

    def evaluate(self, x):
        return self.run(x, ["Y"], 0)[0]

    def step(self, x):
        _, mean, var = self.run(x, ["Y", "running_mean", "running_var"], 1)
        self.columns |= {"input_mean": mean, "input_var": var}


LIBRARIES = [Torch, Keras, Linen, Nnx, Onnx]
LAYERS = [*map(defined, MEANT), *LIBRARIES]
LONE = [defined("keras"), defined("flax"), Keras, Linen, Nnx]


def layer_id(make):
    return getattr(make, "__name__", "") if isinstance(make, type) else f"defined-{make.convention}"


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(flax|jax|keras|onnx).*")
every_layer = pytest.mark.parametrize("make", LAYERS, ids=layer_id)
every_convention = pytest.mark.parametrize("convention", MEANT)


# --- against layers ----------------------------------------------------------------------------------


def module_like(layer, dtype, **others):
    """Return a module with the layer's options, which its state does not have."""
    given = options(layer.convention, momentum=MOMENTUM, eps=EPS) | others
    return nbbn.BatchNorm(C, dtype=dtype, **given)


def assert_same_outputs(bn, layer, x):
    """In evaluation, within 16 u of what is added up, u = 2⁻²⁴.

    x is float32, so both compute in it, whatever the type of the module: four roundings in invstd and its
    product with weight, and four more in the rest. Some take x · scale + (bias - mean · scale), so the terms
    are those. Twice 8 u: theirs and nbbn's.
    """
    actual, expected = bn.eval()(x), layer.evaluate(x)
    assert actual.shape == expected.shape and actual.dtype == np.float32
    weight, bias = (0.0 if v is None else v.astype(np.float64) for v in (bn.weight, bn.bias))
    weight = 1.0 if bn.weight is None else weight
    scale = column(np.abs(weight) / np.sqrt(bn.running_var.astype(np.float64) + EPS), 1.0, C)
    terms = scale * (np.abs(rows(x, bn.axis)) + column(np.abs(bn.running_mean), 0.0, C))
    terms = terms + column(np.abs(bias) + np.zeros(C), 0.0, C)
    tolerance = 16 * reference.unit(np.float32) * terms
    assert_within("out", rows(actual, bn.axis), rows(expected, bn.axis).astype(np.float64), tolerance)


def statistics_bound(before, x, axis, power):
    """(m + 8) u (|old| + mean |x|^p): m terms added up in any order, as E[x²] - E[x]² by some, in float32."""
    values = np.abs(rows(x, axis).astype(np.float64))
    factor = values.shape[1] / (values.shape[1] - 1)
    sizes = np.abs(before) + factor * (values**power).mean(axis=1)
    return (values.shape[1] + 8) * reference.unit(np.float32) * sizes


def assert_same_step(bn, layer, x):
    """After a step of both the running statistics agree; with another correction they would not."""
    other = nbbn.BatchNorm(
        C, eps=bn.eps, momentum=bn.momentum, affine=bn.affine, axis=bn.axis, correction=1 - bn.correction
    )
    other.load_state_dict(bn.state_dict())
    before = {name: np.asarray(getattr(bn, name), np.float64) for name in OWN[2:]}
    for one in (bn, other):
        one.train()(x)
    layer.step(x)
    twin = nbbn.BatchNorm(C, affine=bn.affine, dtype="float64")  # only to read the layer's names
    twin.load_state_dict(layer.state(), convention=layer.convention)
    for name, power in (("running_mean", 1), ("running_var", 2)):
        bound = statistics_bound(before[name], x, bn.axis, power)
        expected = getattr(twin, name)
        assert_within(name, getattr(bn, name).astype(np.float64), expected, bound)
    # Not in every channel: two values may happen to be the same.
    assert (np.abs(other.running_var - twin.running_var) > 10 * bound).any()


@every_layer
@pytest.mark.parametrize("dtype", NARROW, ids=type_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_from_a_library(rng, make, dtype, shape):
    """A layer's state: the same outputs, and one more step of training with the same running statistics."""
    layer = make(random_columns(rng))
    axis = MEANT[layer.convention].axis
    for _ in range(2):
        layer.step(batch(rng, shape, axis))
    bn = module_like(layer, dtype)
    bn.load_state_dict(layer.state(), convention=layer.convention)
    assert_same_outputs(bn, layer, batch(rng, shape, axis))
    assert_same_step(bn, layer, batch(rng, shape, axis))
    assert_same_outputs(bn, layer, batch(rng, shape, axis))


@every_layer
@pytest.mark.parametrize("dtype", NARROW, ids=type_id)
def test_to_a_library(rng, make, dtype):
    """And the other way; a float64 state is rounded by who takes it."""
    layer = make(random_columns(rng))
    axis = MEANT[layer.convention].axis
    bn = module_like(layer, dtype)
    bn.load_state_dict(random_columns(rng))
    bn(batch(rng, SHAPES[-1], axis))
    bn.load_state_dict({name: value.astype(np.float32) for name, value in bn.state_dict().items()})
    state = flat(bn.state_dict(convention=layer.convention))
    layer.load(nested({name: value.astype(np.float32) for name, value in state.items()}))
    assert_same_outputs(bn, layer, batch(rng, SHAPES[-1], axis))
    assert_same_step(bn, layer, batch(rng, SHAPES[-1], axis))


@pytest.mark.parametrize("make", LONE, ids=layer_id)
@pytest.mark.parametrize("absent", ["weight", "bias"])
def test_layers_with_one_parameter(rng, make, absent):
    """Where it is missing there are ones, or zeros, whatever the module had before."""
    layer = make(random_columns(rng) | {absent: None})
    bn = module_like(layer, np.float32)
    bn.load_state_dict(random_columns(rng))
    bn.load_state_dict(layer.state(), convention=layer.convention)
    neutral = {"weight": 1, "bias": 0}[absent]
    np.testing.assert_array_equal(getattr(bn, absent), np.full(C, neutral, np.float32))
    assert_same_outputs(bn, layer, batch(rng, SHAPES[-1], -1))


@pytest.mark.parametrize("make", LONE, ids=layer_id)
def test_layers_without_parameters(rng, make):
    """They are modules without: a state that lost its parameters must not pass for one of ones and zeros."""
    layer = make(random_columns(rng) | {"weight": None, "bias": None})
    bn = module_like(layer, np.float32, affine=False)
    bn.load_state_dict(layer.state(), convention=layer.convention)
    assert_same_outputs(bn, layer, batch(rng, SHAPES[-1], -1))
    with pytest.raises(ValueError, match="missing") as caught:
        nbbn.BatchNorm(C).load_state_dict(layer.state(), convention=layer.convention)
    for name in MEANT[layer.convention].names[:2]:
        assert repr(name) in str(caught.value)


@pytest.mark.parametrize("make", LIBRARIES, ids=layer_id)
def test_defaults_of_libraries(make):
    meant = MEANT[make.convention]
    assert make.defaults() == (meant.momentum, meant.eps, meant.axis)


# --- names -------------------------------------------------------------------------------------------


def trained(rng, dtype="float32", **given):
    bn = nbbn.BatchNorm(C, dtype=dtype, **given)
    columns = random_columns(rng)
    for name in OWN:
        if getattr(bn, name) is not None:
            getattr(bn, name)[...] = columns[name]
    if bn.track_running_stats:
        bn.num_batches_tracked.fill(3)
    return bn


def kept(bn):
    return {name: (v.dtype, v.shape, v.tobytes()) for name, v in bn.state_dict().items()}


@every_convention
@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_round_trip(rng, convention, dtype, affine, tracked):
    """Names as they are meant, values to the bit; the counter stays behind where a library has none."""
    given = {"affine": affine, "track_running_stats": tracked}
    bn, twin = trained(rng, dtype, **given), nbbn.BatchNorm(C, dtype=dtype, **given)
    state = bn.state_dict(convention=convention)
    assert flat(state).keys() == flat(nested(flat(state))).keys()
    own = (OWN[:2] if affine else ()) + (OWN[2:] if tracked else ())
    names = dict(zip(OWN, MEANT[convention].names, strict=True))
    counter = ["num_batches_tracked"] if convention == "torch" and tracked else []
    assert list(flat(state)) == [names[name] for name in own] + counter
    for name in own:
        assert_same_bits(flat(state)[names[name]], getattr(bn, name))
        assert not np.may_share_memory(flat(state)[names[name]], getattr(bn, name))
    if convention == "flax":
        assert list(state) == ["params"] * affine + ["batch_stats"] * tracked
        assert all(tuple(state[outer]) == NESTED[outer] for outer in state)
    twin.load_state_dict(state, convention=convention)
    if tracked:
        assert twin.num_batches_tracked == (3 if counter else 0)
        twin.num_batches_tracked.fill(3)
    assert kept(twin) == kept(bn)
    if convention == "flax":
        twin = nbbn.BatchNorm(C, dtype=dtype, **given)
        twin.load_state_dict(flat(state), convention="flax")
        assert tracked is False or twin.num_batches_tracked.fill(3) is None
        assert kept(twin) == kept(bn)


def test_the_default_is_torch(rng):
    bn, twin = trained(rng), nbbn.BatchNorm(C)
    assert list(bn.state_dict()) == list(bn.state_dict(convention="torch"))
    twin.load_state_dict(bn.state_dict(convention="torch"))
    assert kept(twin) == kept(bn)


def test_a_state_is_not_changed(rng):
    state = trained(rng).state_dict(convention="keras")
    del state["gamma"]
    before = {name: value.tobytes() for name, value in state.items()}
    nbbn.BatchNorm(C).load_state_dict(state, convention="keras")
    assert {name: value.tobytes() for name, value in state.items()} == before


def test_loading_keeps_the_arrays(rng):
    """Also where a parameter that is missing is filled in."""
    bn = nbbn.BatchNorm(C)
    weight = bn.weight
    state = trained(rng).state_dict(convention="keras")
    del state["gamma"]
    weight[...] = 5
    bn.load_state_dict(state, convention="keras")
    assert bn.weight is weight and (weight == 1).all()


# --- errors ------------------------------------------------------------------------------------------


def without(name):
    return lambda state: {k: v for k, v in state.items() if k != name}


def with_value(name, value):
    return lambda state: state | {name: value}


@every_convention
@pytest.mark.parametrize("own", OWN)
def test_errors_name_what_the_library_names(rng, convention, own):
    """And nothing has changed, though all the others are good."""
    name = dict(zip(OWN, MEANT[convention].names, strict=True))[own]
    bn = trained(rng)
    before = kept(bn)
    state = flat(nbbn.BatchNorm(C).state_dict(convention=convention))
    quoted = re.escape(repr(name))
    bad = [
        (with_value(name, np.ones(C + 1)), ValueError, rf"state\[{quoted}\] must have shape \({C},\), got"),
        (with_value(name, ["one"] * C), TypeError, rf"state\[{quoted}\] must be an array of numbers"),
        (with_value(name, np.ma.ones(C)), TypeError, rf"state\[{quoted}\] .* masked"),
        (with_value("other", np.ones(C)), ValueError, r"missing: \[\], unexpected: \['other'\]"),
    ]
    # A parameter alone may be missing where there are such layers, but not under another's name.
    if convention in ("torch", "onnx") or own in OWN[2:]:
        bad.append((without(name), ValueError, rf"missing: \[{quoted}\], unexpected: \[\]"))
    renamed = lambda state: without(name)(state) | {"x" + name: np.ones(C)}  # noqa: E731
    bad.append((renamed, ValueError, rf"unexpected: \[{re.escape(repr('x' + name))}\]"))
    for spoil, error, says in bad:
        with pytest.raises(error, match=says):
            bn.load_state_dict(nested(spoil(state)), convention=convention)
        assert kept(bn) == before


@pytest.mark.parametrize("convention", ["keras", "flax"])
def test_a_module_of_one_parameter_does_not_lose_it(rng, convention):
    """A state without parameters is not that of a layer with only the other one."""
    bn = nbbn.BatchNorm(C, bias=False)
    bn.weight[:] = rng.normal(size=C)
    before = kept(bn)
    state = nbbn.BatchNorm(C, affine=False).state_dict(convention=convention)
    with pytest.raises(ValueError, match=r"missing: \['.*(gamma|scale)'\], unexpected: \[\]"):
        bn.load_state_dict(state, convention=convention)
    assert kept(bn) == before


@every_convention
def test_states_of_others(rng, convention):
    """Under a convention only its own names will do, and the counter only PyTorch's."""
    bn = trained(rng)
    before = kept(bn)
    for other in MEANT:
        if other != convention:
            with pytest.raises(ValueError, match="state must have the keys") as caught:
                bn.load_state_dict(trained(rng).state_dict(convention=other), convention=convention)
            assert str(list(MEANT[convention].names))[:-1] in str(caught.value)
    if convention != "torch":
        state = bn.state_dict(convention=convention) | {"num_batches_tracked": 1}
        with pytest.raises(ValueError, match=r"unexpected: \['num_batches_tracked'\]"):
            bn.load_state_dict(state, convention=convention)
    assert kept(bn) == before


def test_a_whole_model_of_flax_is_refused(rng):
    """Its layers are one level further down."""
    one = trained(rng).state_dict(convention="flax")
    state = {outer: {"BatchNorm_0": inner} for outer, inner in one.items()}
    with pytest.raises(ValueError, match=r"unexpected: \['params/BatchNorm_0', 'batch_stats/BatchNorm_0'\]"):
        nbbn.BatchNorm(C).load_state_dict(state, convention="flax")


@pytest.mark.parametrize("unknown", ["tensorflow", "Torch", "", " keras"])
def test_unknown_conventions(rng, unknown):
    bn = trained(rng)
    before = kept(bn)
    for call in (
        lambda: bn.state_dict(convention=unknown),
        lambda: bn.load_state_dict(nbbn.BatchNorm(C).state_dict(), convention=unknown),
        lambda: options(unknown),
    ):
        with pytest.raises(ValueError, match=re.escape(f"one of {list(MEANT)}, got {unknown!r}")):
            call()
    assert kept(bn) == before


@pytest.mark.parametrize("bad", [None, 1, ["torch"], b"torch"])
def test_conventions_that_are_no_str(bad):
    bn = nbbn.BatchNorm(C)
    for call in (
        lambda: bn.state_dict(convention=bad),
        lambda: bn.load_state_dict(bn.state_dict(), convention=bad),
        lambda: options(bad),
    ):
        with pytest.raises(TypeError, match="convention must be a str"):
            call()


# --- options -----------------------------------------------------------------------------------------


@every_convention
def test_options(convention):
    meant = MEANT[convention]
    new = meant.momentum if meant.momentum_of_new else 1 - meant.momentum
    assert options(convention) == {
        "eps": meant.eps,
        "momentum": new,
        "correction": meant.correction,
        "axis": meant.axis,
    }
    given = options(convention, momentum=0.75, eps=0.5, axis=2)
    assert given["momentum"] == (0.75 if meant.momentum_of_new else 0.25)
    assert (given["eps"], given["axis"], given["correction"]) == (0.5, 2, meant.correction)
    bn = nbbn.BatchNorm(C, **given)
    assert (bn.eps, bn.momentum, bn.axis, bn.correction) == (0.5, given["momentum"], 2, meant.correction)
    if convention == "torch":
        assert options(convention, momentum=None)["momentum"] is None
    # 0 is a value, and not none.
    assert options(convention, momentum=0.0, eps=0.0, axis=0) == {
        "eps": 0.0,
        "momentum": 0.0 if meant.momentum_of_new else 1.0,
        "correction": meant.correction,
        "axis": 0,
    }


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"momentum": 1.5}, ValueError),
        ({"momentum": np.nan}, ValueError),
        ({"momentum": "0.9"}, TypeError),
        ({"eps": -1}, ValueError),
        ({"eps": "small"}, TypeError),
        ({"axis": 1.0}, TypeError),
        ({"momentum": None}, TypeError),  # a cumulative average, which only PyTorch has
    ],
)
def test_bad_options(given, error):
    (name,) = given
    with pytest.raises(error, match=f"{name} must be"):
        options("keras", **given)


def test_the_page_has_the_same_table():
    """docs/how-to/weights.md, in words of its own: names, momentum, eps, correction and axis."""
    assert list(CONVENTIONS) == list(MEANT)
    page = (pathlib.Path(__file__).parent.parent / "docs" / "how-to" / "weights.md").read_text()
    lines = [re.split(r" *\| *", line)[1:-1] for line in page.splitlines() if line.startswith("| ")]
    table = {what: dict(zip(MEANT, cells, strict=True)) for what, *cells in lines}
    for convention, meant in MEANT.items():
        assert f'`"{convention}"`' == table["`convention=`"][convention]
        told = [
            name
            for what in ("γ, β", "running mean, variance")
            for name in re.findall(r"`([\w/]+)`", table[what][convention])
        ]
        assert told == list(meant.names)
        which = "new" if meant.momentum_of_new else "old"
        assert (
            table["`momentum`, by default, is the weight of"][convention]
            == f"the **{which}** value, {meant.momentum}"
        )
        assert float(table["ε by default"][convention].strip("*")) == meant.eps
        biased = "biased" if meant.correction == 0 else "unbiased"
        assert table["running variance"][convention] == f"{biased}: `correction={meant.correction}`"
        assert int(table["channel axis by default"][convention]) == meant.axis
