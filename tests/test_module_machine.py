"""BatchNorm in any order of its methods, against a model that keeps all of its numbers in float64.

After each step a module has the model's numbers, within the tolerance of that step, and the model takes them
over; what a step does not change keeps its bits.
"""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

import nbbn
import reference
from cases import DTYPES, Shape, activations, parameter, running_statistics
from checks import assert_within, bits, check_running
from test_properties import examples, laid, read_laid

PARAMETERS = "weight", "bias"
STATISTICS = "running_mean", "running_var"
COUNTER = "num_batches_tracked"
GRADIENTS = "grad_weight", "grad_bias"
NAMES = (*PARAMETERS, *STATISTICS, COUNTER, *GRADIENTS)
CHANNELS = 3
MODULES = 3  # at once: more of them would see less of each other

OPTIONS = st.fixed_dictionaries(
    {
        "affine": st.sampled_from([True, True, False]),
        "track_running_stats": st.sampled_from([True, True, False]),
        "momentum": st.sampled_from([None, 0.0, 0.1, 0.7, 1.0]),
        "eps": st.sampled_from([1e-5, 0.1]),
        "correction": st.sampled_from([0, 1, 2.5]),
        "axis": st.sampled_from([1, -1, 0]),
        "dtype": st.sampled_from([np.float32, np.float64]),  # which go with inputs of every type
    }
)


class Model:
    """What a BatchNorm is: options, a mode, numbers, and what is kept for `backward`.

    The numbers are float64 arrays. They are shared between copies as a module's own are.
    """

    def __init__(self, **options):
        self.options = options
        self.training = True
        self.saved = None
        self.grad_weight = self.grad_bias = None
        self.reset_parameters()

    def reset_running_stats(self):
        self.running_mean = self.running_var = self.num_batches_tracked = None
        if self.options["track_running_stats"]:
            self.running_mean, self.running_var = np.zeros(CHANNELS), np.ones(CHANNELS)
            self.num_batches_tracked = np.zeros((), np.int64)

    def reset_parameters(self):
        self.reset_running_stats()
        self.weight = self.bias = None
        if self.options["affine"]:
            self.weight, self.bias = np.ones(CHANNELS), np.zeros(CHANNELS)

    def copied(self, how):
        twin = how(self)
        twin.saved = None
        return twin

    def names(self):
        return [name for name in NAMES[:5] if getattr(self, name) is not None]

    def batch_statistics(self):
        """Whether a call normalizes with the batch's own statistics."""
        return self.training or self.running_mean is None

    def refuses(self, x):
        count = x.size // CHANNELS
        tracks = self.training and self.running_mean is not None
        return (
            self.batch_statistics()
            and x.size > 0
            and (count < 2 or (tracks and count <= self.options["correction"]))
        )


class Machine(RuleBasedStateMachine):
    modules = Bundle("modules")
    states = Bundle("states")

    def __init__(self):
        super().__init__()
        self.pairs = []

    def add(self, bn, model):
        self.pairs.append((bn, model))
        return bn, model

    @initialize(target=modules, options=OPTIONS, seed=st.integers(0, 2**32 - 1))
    def first(self, options, seed):
        self.rng = np.random.default_rng(seed)
        return self.new(options)

    @rule(target=modules, options=OPTIONS)
    def another(self, options):
        return self.new(options) if len(self.pairs) < MODULES else multiple()

    def new(self, options):
        return self.add(nbbn.BatchNorm(CHANNELS, **options), Model(**options))

    # --- the mathematics ---

    @rule(
        module=modules,
        data=st.data(),
        dims=st.lists(st.integers(1, 4), min_size=1, max_size=3),
        dtype=st.sampled_from(DTYPES),
        empty=st.sampled_from([False] * 9 + [True]),
        mode=st.sampled_from([None, True, False]),
    )
    def call(self, module, data, dims, dtype, empty, mode):
        bn, model = module
        if mode is not None:
            self.set_mode_of(bn, model, mode)
        axis = model.options["axis"]
        dims = [0 if empty else dims[0], *dims[1:]]
        dims.insert(axis if axis >= 0 else len(dims), CHANNELS)
        shape = Shape(tuple(dims), axis)
        x = (
            np.zeros(dims, dtype)
            if empty
            else read_laid(data.draw, activations(self.rng, shape, dtype, offset=2.0))
        )
        if model.refuses(x):
            with pytest.raises(ValueError):
                bn(x)
            return
        out = bn(x)
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        eps = model.options["eps"]
        if not empty:
            self.check_output(model, x, out)
        if model.batch_statistics():
            forward = nbbn.batch_norm_forward(x, eps=eps, axis=axis)
            mean, invstd = forward.mean, forward.invstd
            if model.training and model.running_mean is not None and not empty:
                self.check_update(bn, model, x)
        else:
            mean, invstd = model.running_mean.copy(), 1.0 / np.sqrt(model.running_var + eps)
        model.saved = x, mean, invstd, model.batch_statistics()

    def check_output(self, model, x, out):
        options = {"eps": model.options["eps"], "axis": model.options["axis"]}
        if model.batch_statistics():
            expected = reference.forward(x, model.weight, model.bias, **options)
        else:
            statistics = model.running_mean, model.running_var
            expected = reference.evaluate(x, *statistics, model.weight, model.bias, **options)
        tolerance = reference.out_tolerance(expected, x.dtype)
        assert_within("out", reference.rows(out, options["axis"]), expected.out, tolerance)

    def check_update(self, bn, model, x):
        expected = reference.forward(x, axis=model.options["axis"])
        correction, momentum = model.options["correction"], model.options["momentum"]
        model.num_batches_tracked += 1
        momentum = 1.0 / model.num_batches_tracked if momentum is None else momentum
        factor = expected.count / (expected.count - correction)
        for name, new, tolerance in (
            ("running_mean", expected.mean, reference.mean_tolerance(expected)),
            (
                "running_var",
                reference.unbiased(expected.var, expected.count, correction),
                factor * reference.var_tolerance(expected, x.dtype),
            ),
        ):
            check_running(name, getattr(bn, name), getattr(model, name), new, tolerance, momentum)
            getattr(model, name)[...] = getattr(bn, name)

    @rule(module=modules, data=st.data(), stirred=st.booleans())
    def backward(self, module, data, stirred):
        """Of the last call: with its statistics, whatever those of the module are by now."""
        called = [pair for pair in self.pairs if pair[1].saved is not None]
        bn, model = data.draw(st.sampled_from([module, *3 * called]), "module")
        if stirred:
            self.write_to(bn, model)
        if model.saved is None:
            with pytest.raises(RuntimeError):
                bn.backward(np.zeros((2, CHANNELS), np.float32))
            return
        x, mean, invstd, training = model.saved
        axis = model.options["axis"]
        if x.size == 0:
            assert bn.backward(x).shape == x.shape
            model.grad_weight = model.grad_bias = np.zeros(CHANNELS) if model.options["affine"] else None
            return
        dy = read_laid(data.draw, self.rng.normal(size=x.shape).astype(x.dtype))
        expected = reference.backward(
            dy, x, model.weight, mean=mean, invstd=invstd, axis=axis, training=training
        )
        grad_x = bn.backward(dy)
        tolerance = reference.grad_x_tolerance(expected, x.dtype)
        assert_within("grad_x", reference.rows(grad_x, axis), expected.x, tolerance)
        if not model.options["affine"]:
            return
        # One rounding more, to the module's type.
        u = reference.unit(bn.dtype)
        for name, value, tolerance in (
            ("grad_weight", expected.weight, reference.grad_weight_tolerance(expected, x.dtype)),
            ("grad_bias", expected.bias, reference.grad_bias_tolerance(expected, x.dtype)),
        ):
            actual = getattr(bn, name)
            assert_within(name, actual[:, None], value, tolerance + u * np.abs(value.hi))
            setattr(model, name, actual.astype(np.float64))

    @rule(module=modules, data=st.data())
    def bad_call(self, module, data):
        bn, model = module
        dims = [2, 4, 2]
        x = data.draw(st.sampled_from([None, np.ones(dims), np.ones(dims, int), np.ones(CHANNELS), [[1.0]]]))
        with pytest.raises((TypeError, ValueError)):
            data.draw(st.sampled_from([bn] if model.saved is None else [bn, bn.backward]))(x)

    # --- modes and numbers ---

    @rule(module=modules, mode=st.sampled_from(["train", "eval", True, False]))
    def set_mode(self, module, mode):
        self.set_mode_of(*module, mode)

    def set_mode_of(self, bn, model, mode):
        assert (bn.train(mode) if isinstance(mode, bool) else getattr(bn, mode)()) is bn
        assert bn.to("cpu") is bn  # where it is
        model.training = mode in ("train", True)

    @rule(module=modules, method=st.sampled_from(["reset_running_stats", "reset_parameters"]))
    def reset(self, module, method):
        for each in module:
            getattr(each, method)()

    @rule(module=modules)
    def write(self, module):
        self.write_to(*module)

    def write_to(self, bn, model):
        """What an optimizer does, or a person by hand: new numbers in the arrays that are there."""
        for name in model.names():
            if name != COUNTER:
                getattr(bn, name)[...] = np.abs(parameter(self.rng, CHANNELS, bn.dtype)) + 0.1
                getattr(model, name)[...] = getattr(bn, name)

    # --- states and copies ---

    @rule(target=states, module=modules)
    def state_dict(self, module):
        bn, model = module
        state = bn.state_dict()
        assert list(state) == model.names()
        return state

    @rule(target=states, data=st.data())
    def foreign_state(self, data):
        """Of another type, in another layout, as lists, without the counter."""
        mean, var = running_statistics(self.rng, CHANNELS)
        state = dict(zip(NAMES[:4], (*self.rng.normal(size=(2, CHANNELS)), mean, var), strict=True))
        how = data.draw(st.sampled_from([np.ndarray.tolist, np.float16, lambda a: laid(data.draw, a)]))
        state = {name: how(value) for name, value in state.items()}
        if data.draw(st.booleans()):
            state[COUNTER] = data.draw(st.sampled_from([0, 5, np.array([7]), np.uint8(200)]))
        return state

    @rule(module=modules, state=states, data=st.data())
    def load_state_dict(self, module, state, data):
        """All that the module has and nothing else, or nothing is taken; the counter may be missing."""
        bn, model = module
        if set(state) | {COUNTER} != set(model.names()) | {COUNTER} or not set(state) <= set(model.names()):
            with pytest.raises(ValueError):
                bn.load_state_dict(state)
            return
        before = {name: copy.copy(value) for name, value in state.items()}
        bad = data.draw(st.sampled_from([None, None, None, *state]))
        if bad is not None:
            with pytest.raises(ValueError):
                bn.load_state_dict(state | {bad: np.ones(CHANNELS + 1)})
            return
        held = {name: getattr(bn, name) for name in state}
        bn.load_state_dict(state)
        for name, value in state.items():
            assert getattr(bn, name) is held[name]
            assert np.array_equal(value, before[name]), "the state was written to"
            dtype = np.int64 if name == COUNTER else bn.dtype
            getattr(model, name)[...] = np.asarray(value).astype(dtype).reshape(getattr(model, name).shape)

    @rule(
        target=modules,
        module=modules,
        how=st.sampled_from([copy.copy, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))]),
    )
    def copied(self, module, how):
        if len(self.pairs) >= MODULES:
            return multiple()
        bn, model = module
        twin = how(bn)
        for name in NAMES:
            own, other = getattr(bn, name), getattr(twin, name)
            assert (own is other) if how is copy.copy or own is None else not np.shares_memory(own, other)
        assert repr(twin) == repr(bn)
        return self.add(twin, model.copied(how))

    @invariant()
    def numbers_are_the_models(self):
        for bn, model in self.pairs:
            assert bn.training == model.training
            for name in NAMES:
                actual, expected = getattr(bn, name), getattr(model, name)
                if expected is None:
                    assert actual is None, name
                else:
                    dtype = np.int64 if name == COUNTER else bn.dtype
                    assert bits(actual) == bits(expected.astype(dtype)), name


TestMachine = Machine.TestCase
TestMachine.settings = settings(examples(2), stateful_step_count=50)
