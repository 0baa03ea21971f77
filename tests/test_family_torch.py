"""PyTorch's layer, RMS, instance and group norm: the same outputs, gradients, running statistics and state.

With the bounds of test_torch.py, for PyTorch's own rounding is part of every difference.
"""

import itertools

import numpy as np
import pytest

import nbbn
from cases import type_id
from checks import assert_same_bits
from family import CASES, ONE_OF_EACH, Case, check_backward, check_forward
from test_torch import WIDE, assert_same_state, close, tensor

torch = pytest.importorskip("torch")
functional = torch.nn.functional

IN_EVERY_TYPE = pytest.mark.parametrize("dtype", WIDE, ids=type_id)
CHANNELS_SECOND = [case for case in CASES if case.along or case.axis == 1]


def theirs(case, x, weight, bias, eps):
    """Call PyTorch's function with the arguments by position, as nbbn's."""
    function = getattr(functional, f"{case.norm}_norm")
    if case.norm == "rms":
        return function(x, case.normalized_shape, weight, eps)
    if case.norm == "instance":
        return function(x, None, None, weight, bias, True, 0.1, eps)
    return function(x, *case.positional, weight, bias, eps)


def ours(case, x, weight, bias, eps):
    function = getattr(nbbn, f"{case.norm}_norm")
    if case.norm == "rms":
        return function(x, case.normalized_shape, weight, eps)
    if case.norm == "instance":
        return function(x, None, None, weight, bias, True, 0.1, eps)
    return function(x, *case.positional, weight, bias, eps)


def near_one(result):
    """How large an error of the mean, of one u, may be in x_hat: a scale for the bounds."""
    return 1 + float(np.asarray(result.invstd).max())


@IN_EVERY_TYPE
@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("case", CHANNELS_SECOND, ids=str)
def test_functions(rng, case, eps, dtype):
    """Outputs and gradients, with a weight, with a bias, with both and with neither."""
    x, cotangent = (rng.normal(2.0, 3.0, case.dims).astype(dtype) for _ in range(2))
    for given in itertools.product((True, False), repeat=2):
        parameters = [v if g else None for v, g in zip(case.pair(rng, dtype), given, strict=True)]
        leaves = [None if v is None else tensor(v).requires_grad_() for v in (x, *parameters)]
        if given == (False, True):
            leaves[1] = torch.ones(case.parameters, dtype=leaves[0].dtype)  # with a bias alone PyTorch fails
        expected = theirs(case, *leaves, eps)
        expected.backward(tensor(cotangent))
        forward = case.forward(x, *parameters, eps=eps)
        scale = near_one(forward)
        for actual in (forward.out, ours(case, x, *parameters, eps)):
            close(actual, expected, dtype, scale)
        used = {"mean": forward.mean, "invstd": forward.invstd}
        gradients = case.backward(cotangent, x, parameters[0], **used)
        for actual, leaf, factor in zip(gradients, leaves, (4, 10, 10), strict=True):
            if leaf is not None and leaf.requires_grad:
                close(actual, leaf.grad, dtype, factor * scale**2)


@IN_EVERY_TYPE
@pytest.mark.parametrize("given", [(), (None,), (1e-3,)], ids=str)
def test_rms_eps(rng, given, dtype):
    """Left out, it is that of the type that is computed with: for x so small that it shows."""
    x = (np.finfo(dtype).eps ** 0.5 * rng.normal(size=(5, 16))).astype(dtype)
    weight = rng.normal(size=16).astype(dtype)
    expected = functional.rms_norm(tensor(x), (16,), tensor(weight), *given)
    close(nbbn.rms_norm(x, 16, weight, *given), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_eps_of_sixteen_bits(rng, dtype):
    """It is float32's, which they are computed in: theirs would be of the size of these results."""
    x = torch.from_numpy(2.0**-10 * rng.normal(size=(5, 16))).to(dtype)
    expected = functional.rms_norm(x, (16,)).double()
    tolerance = 2 * torch.finfo(dtype).eps * expected.abs()
    assert ((nbbn.rms_norm(x, 16).double() - expected).abs() <= tolerance).all()


@pytest.mark.parametrize("norm", ["layer", "instance", "group"])
def test_default_eps(rng, norm):
    """For values so small that it shows."""
    case = {c.norm: c for c in ONE_OF_EACH}[norm]
    x = 1e-3 * rng.normal(size=case.dims)
    function = getattr(functional, f"{norm}_norm")
    close(case.call(x), function(tensor(x), *case.positional), np.float64)
    close(case.forward(x).out, function(tensor(x), *case.positional), np.float64)


@IN_EVERY_TYPE
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("use_input_stats", [True, False])
@pytest.mark.parametrize("dims", [(4, 6, 5), (3, 6, 4, 7), (2, 6, 3, 2, 2), (1, 6, 2)], ids=str)
def test_running_statistics(rng, dims, use_input_stats, momentum, dtype):
    """torch.nn.functional.instance_norm, with arguments by position, over what may be left out."""
    for affine in (True, False):
        x = rng.normal(2, 3, dims).astype(dtype)
        weight, bias = rng.normal(size=(2, 6)).astype(dtype) if affine else (None, None)
        mean, var = rng.uniform(1, 2, (2, 6)).astype(dtype)
        statistics = tensor(mean), tensor(var)
        parameters = [None if v is None else tensor(v) for v in (weight, bias)]
        expected = functional.instance_norm(
            tensor(x), *statistics, *parameters, use_input_stats, momentum, 1e-3
        )
        actual = nbbn.instance_norm(x, mean, var, weight, bias, use_input_stats, momentum, 1e-3)
        close(actual, expected, dtype, scale=10)
        close(mean, statistics[0], dtype)
        close(var, statistics[1], dtype)


# --- tensors as arguments --------------------------------------------------------------------------

TENSOR_LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "sliced": lambda t: torch.cat([t, t + 1], dim=3)[..., : t.shape[3]],
    "every_second": lambda t: torch.stack([t, t - 7], dim=-1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", TENSOR_LAYOUTS)
@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.norm)
def test_tensors(rng, case, layout, dtype):
    """Tensors in, tensors out, with the bits of the same call on arrays of the same strides."""
    kind = getattr(torch, dtype)
    x, dy = (TENSOR_LAYOUTS[layout](torch.from_numpy(rng.normal(size=case.dims)).to(kind)) for _ in range(2))
    weight, bias = (None if v is None else torch.from_numpy(v) for v in case.pair(rng))

    def array(t):
        if t is None:
            return None
        if t.dtype == torch.bfloat16:
            import ml_dtypes

            return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return t.numpy()

    result = case.forward(x, weight, bias)
    expected = case.forward(array(x), array(weight), array(bias))
    assert result.count == expected.count
    assert result.out.dtype == kind
    assert array(result.out).strides == expected.out.strides
    alone = case.call(x, weight, bias)
    into = torch.full(case.dims, torch.nan, dtype=kind)
    assert case.call(x, weight, bias, out=into) is into
    used = {"mean": result.mean, "invstd": result.invstd}
    gradients = case.backward(dy, x, weight, **used)
    arrays = {"mean": expected.mean, "invstd": expected.invstd}
    expected_gradients = case.backward(array(dy), array(x), array(weight), **arrays)
    pairs = [
        *zip(result[:4], expected[:4], strict=True),
        *zip(gradients, expected_gradients, strict=True),
        (alone, case.call(array(x), array(weight), array(bias))),
        (into, case.call(array(x), array(weight), array(bias), out=np.zeros_like(array(into)))),
    ]
    for actual, wanted in pairs:
        assert (actual is None) == (wanted is None)
        if actual is not None:
            assert isinstance(actual, torch.Tensor)
            assert_same_bits(array(actual).copy(), wanted.copy())
    check_forward(case, array(x), array(weight), array(bias))
    check_backward(case, array(dy), array(x), array(weight), **arrays)


def test_running_statistics_that_are_tensors(rng):
    x = torch.from_numpy(rng.normal(size=(3, 4, 5)))
    mean, var = torch.zeros(4), torch.ones(4, dtype=torch.float64)
    expected = torch.zeros(4), torch.ones(4, dtype=torch.float64)
    out = nbbn.instance_norm(x, mean, var, momentum=0.25)
    functional.instance_norm(x.clone(), expected[0].double(), expected[1], momentum=0.25)
    assert isinstance(out, torch.Tensor)
    close(var.numpy(), expected[1], np.float64)
    close(mean.numpy(), 0.25 * x.mean(dim=(0, 2)), np.float32)


# --- modules ---------------------------------------------------------------------------------------


def twins(case, dtype, **options):
    """Return a module of nbbn and PyTorch's, with the same arguments by position."""
    names = {"layer": "LayerNorm", "rms": "RMSNorm", "instance": "InstanceNorm", "group": "GroupNorm"}
    name = names[case.norm]
    arguments = {
        "layer": (case.normalized_shape,),
        "rms": (case.normalized_shape,),
        "instance": (case.channels,),
        "group": (case.option, case.channels),
    }[case.norm]
    kind = f"{name}{len(case.dims) - 2}d" if case.norm == "instance" else name
    other = getattr(torch.nn, kind)(*arguments, dtype=getattr(torch, np.dtype(dtype).name), **options)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    return getattr(nbbn, name)(*arguments, dtype=dtype, **options), other


MODULES = [
    *(
        (Case("layer", (4, 3, 5, 6), k), {"eps": 1e-3, "elementwise_affine": affine, "bias": bias})
        for k, affine, bias in ((1, True, True), (3, True, False), (2, False, True))
    ),
    *(
        (Case("rms", (4, 3, 5, 6), k), {"eps": eps, "elementwise_affine": affine})
        for k, eps, affine in ((1, None, True), (2, 1e-3, True), (3, 0.1, False))
    ),
    *(
        (Case("group", (4, 6, 5), groups), {"eps": eps, "affine": affine, "bias": bias})
        for groups, eps, affine, bias in (
            (1, 1e-5, True, True),
            (3, 1e-3, True, False),
            (6, 0.1, False, True),
        )
    ),
    *(
        (
            Case("instance", dims),
            {
                "eps": 1e-3,
                "momentum": momentum,
                "affine": affine,
                "track_running_stats": tracked,
                "bias": bias,
            },
        )
        for dims in ((4, 6, 5), (3, 6, 4, 5), (2, 6, 2, 3, 2))
        for momentum, affine, tracked, bias in (
            (0.1, False, False, True),
            (0.3, True, True, True),
            (1.0, False, True, False),
            (0.1, True, False, False),
        )
    ),
    (Case("layer", (4, 6)), {}),
    (Case("rms", (4, 6)), {}),
    (Case("group", (4, 6, 5), 2), {}),
    (Case("instance", (4, 6, 5)), {}),
]


@IN_EVERY_TYPE
@pytest.mark.parametrize(("case", "options"), MODULES, ids=str)
def test_modules(rng, case, options, dtype):
    """Three steps of training and one of evaluation: outputs, gradients and states."""
    our, their = twins(case, dtype, **options)
    our.load_state_dict(their.state_dict())
    for step in range(4):
        our.train(step < 3)
        their.train(step < 3)
        their.zero_grad()
        x, cotangent = (tensor(rng.normal(1, 2, case.dims).astype(dtype)) for _ in range(2))
        x.requires_grad_()
        expected = their(x)
        expected.backward(cotangent)
        close(our(x.detach().numpy()), expected, dtype, scale=10)
        close(our.backward(cotangent.numpy()), x.grad, dtype, scale=40)
        for name in ("weight", "bias"):
            parameter = getattr(their, name, None)
            gradient = getattr(our, f"grad_{name}", None)
            assert (getattr(our, name, None) is None) == (parameter is None)
            if parameter is not None:
                assert gradient.dtype == np.dtype(dtype) and gradient.shape == tuple(parameter.shape)
                close(gradient, parameter.grad, dtype, scale=40)
        our_state, their_state = our.state_dict(), their.state_dict()
        # PyTorch's instance norm has a counter, and counts nothing.
        if "num_batches_tracked" in their_state:
            their_state["num_batches_tracked"].fill_(int(our_state["num_batches_tracked"]))
        assert_same_state(our_state, their_state, dtype)


@IN_EVERY_TYPE
@pytest.mark.parametrize(("case", "options"), MODULES, ids=str)
def test_states_in_both_directions(rng, case, options, dtype):
    """The same keys, and the same numbers; and a module that goes on where the other ended."""
    our, their = twins(case, dtype, **options)
    assert list(our.state_dict()) == list(their.state_dict())
    for _ in range(2):
        their(torch.from_numpy(rng.normal(size=case.dims).astype(dtype)))
    our.load_state_dict(their.state_dict())
    for name, value in their.state_dict().items():
        assert_same_bits(our.state_dict()[name], value.numpy())
    our(rng.normal(size=case.dims).astype(dtype))
    _, again = twins(case, dtype, **options)
    again.load_state_dict({name: torch.from_numpy(value) for name, value in our.state_dict().items()})
    if options.get("track_running_stats"):
        assert int(again.num_batches_tracked) == int(our.num_batches_tracked)
    x = rng.normal(size=case.dims).astype(dtype)
    close(our.eval()(x), again.eval()(torch.from_numpy(x)), dtype, scale=10)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.norm)
def test_new_modules(case):
    """What parameters start with: the same as PyTorch's, which twins() has since made random."""
    our, _ = twins(case, "float32")
    for name, value in our.state_dict().items():
        assert value.dtype == np.float32
        assert (value == (1 if name == "weight" else 0)).all()


# --- errors ----------------------------------------------------------------------------------------


def both_raise(their_call, our_call, match, kinds=(ValueError,)):
    """Where PyTorch raises an error of some kind, nbbn raises one of these."""
    with pytest.raises((ValueError, RuntimeError, TypeError, ZeroDivisionError)):
        their_call()
    with pytest.raises(kinds, match=match):
        our_call()


ONES = np.ones((4, 6, 5), np.float32)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("shape", [(4,), (5, 6), (6,), (1, 5), (2, 4, 6, 5), ()], ids=str)
def test_errors_of_normalized_shape(norm, shape):
    their, our = getattr(functional, f"{norm}_norm"), getattr(nbbn, f"{norm}_norm")
    both_raise(lambda: their(torch.from_numpy(ONES), shape), lambda: our(ONES, shape), "normalized_shape")


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("length", [4, 6, 1, 0])
def test_errors_of_the_weight_of_a_layer(norm, length):
    their, our = getattr(functional, f"{norm}_norm"), getattr(nbbn, f"{norm}_norm")
    weight = np.ones(length, np.float32)
    x = torch.from_numpy(ONES)
    both_raise(
        lambda: their(x, (5,), torch.from_numpy(weight)), lambda: our(ONES, (5,), weight), r"\bweight\b"
    )


@pytest.mark.parametrize("length", [5, 7, 1, 0])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_errors_of_the_parameters_of_channels(name, length):
    x, values = torch.from_numpy(ONES), np.ones(length, np.float32)
    theirs, our = {name: torch.from_numpy(values)}, {name: values}
    both_raise(
        lambda: functional.group_norm(x, 2, **theirs), lambda: nbbn.group_norm(ONES, 2, **our), rf"\b{name}\b"
    )
    both_raise(
        lambda: functional.instance_norm(x, **theirs),
        lambda: nbbn.instance_norm(ONES, **our),
        rf"\b{name}\b",
    )


@pytest.mark.parametrize("num_groups", [4, 5, 7, 12, 0, -1])
def test_errors_of_num_groups(num_groups):
    both_raise(
        lambda: functional.group_norm(torch.from_numpy(ONES), num_groups),
        lambda: nbbn.group_norm(ONES, num_groups),
        "num_groups",
    )


def test_errors_of_shapes():
    """Too few dimensions, and one value an instance."""
    line, one = np.ones(6, np.float32), np.ones((4, 6, 1), np.float32)
    both_raise(
        lambda: functional.group_norm(torch.from_numpy(line), 1),
        lambda: nbbn.group_norm(line, 1),
        r"\bx\b.*dimension",
    )
    both_raise(
        lambda: functional.instance_norm(torch.from_numpy(one)),
        lambda: nbbn.instance_norm(one),
        "more than (1|one) value",
    )


@pytest.mark.parametrize("missing", ["running_mean", "running_var", "both"])
def test_errors_of_missing_statistics(missing):
    """PyTorch says so where both are missing."""
    given = {
        name: None if missing in (name, "both") else np.ones(6, np.float32)
        for name in ("running_mean", "running_var")
    }
    name = "running_mean" if missing == "both" else missing
    with pytest.raises(ValueError, match=name):
        nbbn.instance_norm(ONES, *given.values(), use_input_stats=False)
    if missing == "both":
        with pytest.raises((ValueError, RuntimeError)):
            functional.instance_norm(torch.from_numpy(ONES), None, None, use_input_stats=False)


def test_errors_of_modules():
    both_raise(lambda: torch.nn.GroupNorm(4, 6), lambda: nbbn.GroupNorm(4, 6), "num_groups|num_channels")
    both_raise(
        lambda: torch.nn.LayerNorm(4)(torch.from_numpy(ONES)),
        lambda: nbbn.LayerNorm(4)(ONES),
        "normalized_shape",
    )
    both_raise(
        lambda: torch.nn.InstanceNorm1d(5, affine=True)(torch.from_numpy(ONES)),
        lambda: nbbn.InstanceNorm(5, affine=True)(ONES),
        r"\bx\b|num_features|weight",
    )
    both_raise(
        lambda: torch.nn.GroupNorm(2, 8)(torch.from_numpy(ONES)),
        lambda: nbbn.GroupNorm(2, 8)(ONES),
        r"\bx\b|num_channels|weight",
    )


@pytest.mark.parametrize(("case", "options"), [MODULES[0], MODULES[3], MODULES[7], MODULES[10]], ids=str)
def test_errors_of_states(case, options):
    """A key too few, a key too many, another shape: nothing is loaded."""
    our, their = twins(case, "float32", **options)
    state = their.state_dict()
    before = our.state_dict()
    wrong = [{}, {k: v for k, v in state.items() if k != "weight"}, state | {"gamma": torch.ones(3)}]
    wrong.append(state | {"weight": torch.ones(4)})
    for bad in wrong:
        both_raise(
            lambda bad=bad: their.load_state_dict(bad), lambda bad=bad: our.load_state_dict(bad), "state"
        )
        for name, value in our.state_dict().items():
            assert_same_bits(value, before[name])
