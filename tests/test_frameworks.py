"""Arrays of other libraries in the memory of the host: viewed, computed with, and given back.

Each result is held against NumPy's, bit by bit, and that one against the oracle.
"""

import ctypes
import sys

import numpy as np
import pytest

import nbbn
from cases import (
    HALF,
    LAYOUTS,
    PARAMETER_TYPES,
    Shape,
    activations,
    parameter,
    permutations,
    running_statistics,
    type_id,
)
from checks import assert_same_bits, bits, check_backward, check_evaluation, check_forward
from nbbn import dlpack, frameworks


class Standard:
    """An array of the array API standard, of a library that nbbn knows nothing of."""

    old = False  # whether it speaks DLPack of before version 1.0

    def __init__(self, array):
        self.array = array

    def __dlpack_device__(self):
        return 1, 0

    def __dlpack__(self, **options):
        if self.old and options:
            raise TypeError(f"unexpected {options}")
        return self.array.__dlpack__(**options)

    def __array_namespace__(self):
        return StandardNamespace


class StandardNamespace:
    @staticmethod
    def from_dlpack(array):
        return Standard(array)


class Old(Standard):
    old = True


class Library:
    """How a test makes arrays of a library, and looks at them."""

    immutable = False

    def of(self, array):
        """Return an array over the same memory."""
        return array

    def numpy(self, array):
        return np.asarray(array)

    def layouts(self):
        return LAYOUTS


class StandardLibrary(Library):
    kind = Standard

    def of(self, array):
        return Standard(array)

    def numpy(self, array):
        return array.array

    def layouts(self):
        # Strides that are no multiple of an element, DLPack has none of.
        return {k: v for k, v in LAYOUTS.items() if k != "record_field"}


class TorchLibrary(Library):
    def __init__(self):
        self.torch = pytest.importorskip("torch")
        self.kind = self.torch.Tensor

    def of(self, array):
        return self.torch.from_numpy(array)

    def numpy(self, array):
        return array.numpy()

    def layouts(self):
        refused = ("reversed", "backwards", "unaligned", "record_field")
        return {k: v for k, v in LAYOUTS.items() if not k.startswith(refused)}


class JaxLibrary(Library):
    immutable = True

    def __init__(self):
        self.jax = pytest.importorskip("jax")
        self.jax.config.update("jax_enable_x64", True)
        self.kind = self.jax.Array

    def of(self, array):
        return self.jax.numpy.array(array)

    def layouts(self):
        return {"contiguous": np.ascontiguousarray}


WIDE = (np.float32, np.float64)
LIBRARIES = {"torch": TorchLibrary, "jax": JaxLibrary, "standard": StandardLibrary}


@pytest.fixture(params=LIBRARIES)
def library(request):
    return LIBRARIES[request.param]()


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def jax():
    library = JaxLibrary().jax
    yield library
    library.config.update("jax_enable_x64", True)


def lies(array):
    return array.__array_interface__["data"][0]


def same(library, result, expected):
    """Hold a result, of the library's kind throughout, to NumPy's."""
    if not isinstance(expected, tuple):
        result, expected = (result,), (expected,)
    assert len(result) == len(expected)
    for value, other in zip(result, expected, strict=True):
        if isinstance(other, int):
            assert value == other and type(value) is int
        else:
            assert isinstance(value, library.kind)
            assert_same_bits(library.numpy(value).view(np.ndarray), other)


SHAPES = [
    Shape((23, 6)),
    Shape((5, 6, 11)),
    Shape((4, 33, 7, 5)),
    Shape((3, 6, 4, 5, 2)),
    Shape((4, 8, 8, 17), -1),
    Shape((33, 17), 0),
    Shape((2, 70, 60, 60)),
]


@pytest.mark.parametrize("dtype", WIDE, ids=type_id)
@pytest.mark.parametrize("types", PARAMETER_TYPES, ids=type_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_functions(rng, library, shape, types, dtype):
    channels, axis = shape.channels, shape.axis
    x, dy = activations(rng, shape, dtype), activations(rng, shape, dtype)
    weight, bias = (parameter(rng, channels, kind) for kind in types)
    statistics = running_statistics(rng, channels)
    some = np.array([0, channels - 1])
    forward = check_forward(x, weight, bias, axis=axis, channels=some)
    evaluated = check_evaluation(x, *statistics, weight, bias, axis=axis, channels=some)
    used = {"mean": forward.mean, "invstd": forward.invstd}
    backward = check_backward(dy, x, weight, axis=axis, channels=some, **used)

    of_x, of_dy, of_weight, of_bias, *of_statistics = (
        None if a is None else library.of(a) for a in (x, dy, weight, bias, *statistics)
    )
    result = nbbn.batch_norm_forward(of_x, of_weight, of_bias, axis=axis)
    same(library, result, forward)
    same(library, nbbn.batch_norm(of_x, *of_statistics, of_weight, of_bias, axis=axis), evaluated)
    stats = nbbn.batch_stats(of_x, axis=axis)
    same(library, stats, nbbn.batch_stats(x, axis=axis))
    assert type(stats) is nbbn.BatchStats
    gradients = nbbn.batch_norm_backward(
        of_dy, of_x, of_weight, mean=result.mean, invstd=result.invstd, axis=axis
    )
    same(library, gradients, backward)


@pytest.mark.parametrize("dtype", WIDE, ids=type_id)
def test_training_updates_in_place(rng, library, dtype):
    x = activations(rng, Shape((4, 5, 7)), dtype)
    expected = running_statistics(rng, 5)
    statistics = [library.of(s.copy()) for s in expected]
    if library.immutable:
        kept = [bits(library.numpy(s)) for s in statistics]
        for given in ({"running_mean": statistics[0]}, {"running_var": statistics[1]}):
            with pytest.raises(TypeError, match=r"^running_.*immutable.*batch_norm_forward"):
                nbbn.batch_norm(library.of(x), **given, training=True)
        assert [bits(library.numpy(s)) for s in statistics] == kept
        return
    out = nbbn.batch_norm(x, *expected, training=True)
    same(library, nbbn.batch_norm(library.of(x), *statistics, training=True), out)
    for one, other in zip(statistics, expected, strict=True):
        assert_same_bits(library.numpy(one), other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(rng, library, layout):
    """Any layout that the library has, of x, is also that of the results."""
    if layout not in library.layouts():
        pytest.skip("this library has no such arrays")
    x = LAYOUTS[layout](activations(rng, Shape((3, 5, 4, 7)), np.float32))
    dy = activations(rng, Shape((3, 5, 4, 7)), np.float32)
    expected = nbbn.batch_norm_forward(x)
    of_x = library.of(x)
    result = nbbn.batch_norm_forward(of_x)
    same(library, result, expected)
    used = {"mean": expected.mean, "invstd": expected.invstd}
    gradients = nbbn.batch_norm_backward(library.of(dy), of_x, **used)
    same(library, gradients, nbbn.batch_norm_backward(dy, x, **used))
    for array, other in ((result.out, expected.out), (gradients.x, expected.out)):
        assert library.numpy(array).strides == other.strides
    if not library.immutable:
        out, other = (LAYOUTS[layout](np.full(x.shape, np.nan, np.float32)) for _ in range(2))
        of_out = library.of(out)
        assert nbbn.batch_norm_forward(of_x, out=of_out).out is of_out
        assert_same_bits(out, nbbn.batch_norm_forward(x, out=other).out)
        assert nbbn.batch_norm_forward(of_x, out=of_x).out is of_x
        assert_same_bits(x, other)


@pytest.mark.parametrize("order", permutations(4))
def test_torch_permuted(rng, torch, order):
    x = torch.from_numpy(permutations(4)[order](activations(rng, Shape((3, 5, 4, 7)), np.float32)))
    out = nbbn.batch_norm(x, training=True)
    assert out.stride() == x.stride()
    torch.testing.assert_close(
        out, torch.nn.functional.batch_norm(x, None, None, training=True), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("dims", [(4, 6, 7, 5), (4, 6, 1, 1), (1, 6, 3, 4), (4, 1, 3, 3)], ids=str)
def test_torch_channels_last(rng, torch, dims):
    x = torch.from_numpy(rng.normal(size=dims)).contiguous(memory_format=torch.channels_last)
    out = nbbn.batch_norm(x, training=True)
    assert out.is_contiguous(memory_format=torch.channels_last)
    bn = nbbn.BatchNorm(dims[1])
    assert bn(x).is_contiguous(memory_format=torch.channels_last)
    assert bn.backward(x).is_contiguous(memory_format=torch.channels_last)


# --- without a copy --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 300_000])
def test_views_and_results_are_not_copied(rng, library, monkeypatch, size):
    x = library.of(activations(rng, Shape((2, 3, size)), np.float32))
    for framework in frameworks.FRAMEWORKS:
        if framework.owns(x):
            break
    view = framework.read("x", x, None)
    made = []

    def note(function):
        def noted(*arguments):
            made.append(function(*arguments))
            return made[-1]

        return noted

    monkeypatch.setattr(framework, "empty_like", note(framework.empty_like))
    result = nbbn.batch_norm_forward(x)
    address = {"Tensor": lambda a: a.data_ptr(), "Standard": lambda a: lies(a.array)}.get(
        library.kind.__name__, lambda a: a.unsafe_buffer_pointer()
    )
    assert lies(view) == address(x)
    assert lies(made[0]) == address(result.out)


def test_results_keep_their_memory(rng, library):
    """Memory is recycled when the last array that can see it is gone, of whatever kind."""
    x = activations(rng, Shape((2, 3, 300_000)), np.float32)
    kept = nbbn.batch_norm_forward(library.of(x)).out
    expected = library.numpy(kept).copy()
    for _ in range(3):
        nbbn.batch_norm_forward(library.of(x + 1))
    assert_same_bits(library.numpy(kept).view(np.ndarray), expected)


def test_no_library_is_imported(python):
    program = """
import sys, numpy as np, nbbn
class Array:
    def __init__(self, array): self.array = array
    def __dlpack__(self, **options): return self.array.__dlpack__(**options)
    def __dlpack_device__(self): return 1, 0
    def __array_namespace__(self): return np
before = set(sys.modules)
nbbn.batch_norm_forward(Array(np.ones((4, 3))))
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(new & {"torch", "jax", "cupy", "cuda"}, "numba.cuda" in sys.modules)
"""
    assert python(program).strip() == "set() False"


# --- kinds that are mixed --------------------------------------------------------------------------


def test_x_decides_on_the_kind(rng, library):
    x = activations(rng, Shape((4, 5, 7)), np.float32)
    weight, bias = rng.normal(size=(2, 5))
    expected = nbbn.batch_norm_forward(x, weight, bias)
    same(library, nbbn.batch_norm_forward(library.of(x), weight, bias), expected)
    same(library, nbbn.batch_norm_forward(library.of(x), library.of(weight), bias), expected)
    result = nbbn.batch_norm_forward(x, library.of(weight), library.of(bias))
    assert all(type(a) is np.ndarray for a in result[:-1])
    assert_same_bits(tuple(result), tuple(expected))
    out = np.full_like(x, np.nan)
    result = nbbn.batch_norm_forward(library.of(x), weight, bias, out=out)
    assert result.out is out and isinstance(result.mean, library.kind)
    assert_same_bits(out, expected.out)
    if not library.immutable:
        out = library.of(np.full_like(x, np.nan))
        assert nbbn.batch_norm_forward(x, weight, bias, out=out).out is out
        assert_same_bits(library.numpy(out), expected.out)


def test_old_dlpack(rng):
    """Of before version 1.0, which has no flags."""
    x = rng.normal(size=(4, 3))
    expected = nbbn.batch_norm_forward(x)
    result = nbbn.batch_norm_forward(Old(x), out=Old(x))
    assert_same_bits(x, expected.out)
    assert_same_bits(result.mean.array, expected.mean)


@pytest.mark.parametrize("duplicate", [False, True], ids=["one", "two"])
def test_overlaps(rng, library, duplicate):
    if library.immutable:
        pytest.skip("nothing can be written to")
    buffer = rng.normal(size=200)
    x, out = (library.of(buffer[k : k + 120].reshape(4, 5, 6)) for k in (0, 1))
    before = bits(buffer)
    with pytest.raises(ValueError, match="out must not overlap x"):
        nbbn.batch_norm_forward(x, out=buffer[1:121].reshape(4, 5, 6) if duplicate else out)
    assert bits(buffer) == before


@pytest.mark.parametrize("dtype", WIDE, ids=type_id)
def test_module(rng, library, dtype):
    """Parameters are NumPy's; outputs and gradients of x are of x's kind."""
    ours, other = nbbn.BatchNorm(5, dtype=dtype), nbbn.BatchNorm(5, dtype=dtype)
    for step in range(4):
        x, dy = (activations(rng, Shape((4, 5, 7)), dtype, offset=step) for _ in range(2))
        ours.train(step < 3)
        other.train(step < 3)
        same(library, ours(library.of(x)), other(x))
        same(library, ours.backward(library.of(dy)), other.backward(dy))
        for name in ("grad_weight", "grad_bias", "running_mean", "running_var"):
            assert_same_bits(getattr(ours, name), getattr(other, name))
    with pytest.raises(ValueError, match=r"x must have 5 channels"):
        ours(library.of(x[:, :4].copy()))


def test_empty(library):
    x = library.of(np.zeros((0, 5, 3), np.float32))
    same(library, nbbn.batch_norm_forward(x), nbbn.batch_norm_forward(np.zeros((0, 5, 3), np.float32)))
    assert nbbn.batch_stats(x).count == 0


def test_merge(rng, library):
    if library.kind is Standard:
        pytest.skip("these arrays have no arithmetic")
    x = rng.normal(size=(8, 5))
    expected = nbbn.batch_stats(x[:3]).merge(nbbn.batch_stats(x[3:]))
    merged = nbbn.batch_stats(library.of(x[:3])).merge(nbbn.batch_stats(library.of(x[3:])))
    assert (merged.count == 8 and isinstance(merged.mean, library.kind)) or library.kind is Standard
    np.testing.assert_allclose(library.numpy(merged.mean), expected.mean, rtol=1e-15, atol=1e-15)


# --- 16 bits ---------------------------------------------------------------------------------------


def as_torch(array):
    torch = pytest.importorskip("torch")
    kind = getattr(torch, array.dtype.name)
    return torch.from_numpy(np.ascontiguousarray(array).view(np.int16)).view(kind), kind


def as_jax(array):
    jax = pytest.importorskip("jax")
    return jax.numpy.asarray(array), jax.numpy.dtype(array.dtype)


def bits_of(array):
    """Return the bits of a tensor, or of an array of JAX."""
    if hasattr(array, "detach"):
        return array.contiguous().view(sys.modules["torch"].int16).numpy().view(np.uint16)
    return np.asarray(array).view(np.uint16)


@pytest.mark.parametrize("to", [as_torch, as_jax])
@pytest.mark.parametrize("dtype", HALF, ids=type_id)
@pytest.mark.parametrize("dims", [(6, 5, 4, 3), (2, 3), (3, 40, 61, 160)], ids=str)
def test_half_precision(rng, dims, dtype, to):
    """The same bits as NumPy's arrays have; those are held against the oracle elsewhere."""
    shape = Shape(dims)
    x, dy = activations(rng, shape, dtype, 3.0), activations(rng, shape, dtype)
    weight, bias = (parameter(rng, shape.channels, dtype) for _ in range(2))
    expected = nbbn.batch_norm_forward(x, weight, bias)
    (their_x, kind), (their_dy, _), (their_weight, _), (their_bias, _) = map(to, (x, dy, weight, bias))
    result = nbbn.batch_norm_forward(their_x, their_weight, their_bias)
    assert type(result.out) is type(their_x) and result.out.dtype == kind
    np.testing.assert_array_equal(bits_of(result.out), expected.out.view(np.uint16))
    np.testing.assert_allclose(np.asarray(result.mean), expected.mean, rtol=1e-6)
    used = {"mean": expected.mean, "invstd": expected.invstd}
    gradients = nbbn.batch_norm_backward(their_dy, their_x, their_weight, **used)
    assert type(gradients.x) is type(their_x) and gradients.x.dtype == kind
    found = nbbn.batch_norm_backward(dy, x, weight, **used)
    np.testing.assert_array_equal(bits_of(gradients.x), found.x.view(np.uint16))
    bn = nbbn.BatchNorm(shape.channels)
    np.testing.assert_array_equal(bits_of(bn(their_x)), nbbn.BatchNorm(shape.channels)(x).view(np.uint16))


def test_half_precision_into_a_tensor(rng, torch):
    x = activations(rng, Shape((6, 5, 4, 3)), np.float32)
    for kind in (torch.float16, torch.bfloat16):
        tensor = torch.from_numpy(x).to(kind)
        out = torch.full_like(tensor, torch.nan)
        assert nbbn.batch_norm_forward(tensor, out=out).out is out
        np.testing.assert_array_equal(bits_of(out), bits_of(nbbn.batch_norm_forward(tensor).out))
        with pytest.raises(TypeError, match=r"^out must have x's dtype (b?float16), got float32"):
            nbbn.batch_norm_forward(tensor, out=out.float())


# --- what is refused -------------------------------------------------------------------------------


def bad_tensors(torch):
    plain = torch.ones(3, 4)
    return {
        "requires_grad": (plain.clone().requires_grad_(), r"requires grad.*detach\(\)"),
        "result_of_grad": (plain.clone().requires_grad_() * 2, r"requires grad.*detach\(\)"),
        "sparse": (plain.to_sparse(), "layout"),
        "sparse_csr": (plain.to_sparse_csr(), "layout"),
        "meta": (torch.empty(3, 4, device="meta"), "meta tensor has no memory"),
        "negative": (torch.imag(torch.ones(3, 4, dtype=torch.complex64).conj()), r"resolve_neg\(\)"),
        "conjugate": (torch.ones(3, 4, dtype=torch.complex64).conj(), "conj"),
        "quantized": (torch.quantize_per_tensor(plain, 0.1, 0, torch.quint8), "QInt"),
        "float8": (plain.to(torch.float8_e5m2), "float32, float64, float16 or bfloat16.*torch.float8_e5m2"),
        "complex": (plain.to(torch.complex64), "float32, float64, float16 or bfloat16.*complex64"),
        "int64": (plain.long(), "float32, float64, float16 or bfloat16.*int64"),
        "bool": (plain.bool(), "float32, float64, float16 or bfloat16.*bool8"),
        "zero": (torch._efficientzerotensor((3, 4)), "no memory"),
    }


BAD_TENSORS = [
    "requires_grad", "result_of_grad", "sparse", "sparse_csr", "meta", "negative", "conjugate", "quantized",
    "float8", "complex", "int64", "bool", "zero",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_bad_tensors(torch, name):
    bad, says = bad_tensors(torch)[name]
    good, column = torch.ones(3, 4), torch.ones(4)
    with pytest.raises(TypeError, match=rf"^x .*{says}"):
        nbbn.batch_norm_forward(bad)
    with pytest.raises(TypeError, match=rf"^out .*{says}"):
        nbbn.batch_norm_forward(good, out=bad)
    with pytest.raises(TypeError, match=rf"^grad_out .*{says}"):
        nbbn.batch_norm_backward(bad, good, mean=column, invstd=column)
    with pytest.raises(TypeError, match=rf"^weight .*{says}"):
        nbbn.batch_norm_forward(good, bad)
    assert (good == 1).all() and (column == 1).all()


def test_tensors_larger_than_their_storage(torch):
    """Their memory is not all theirs; a part of it that is will do."""
    x, good = torch.ones(4, 3), torch.ones(4, 3)
    x.untyped_storage().resize_(30)
    for call in (
        lambda: nbbn.batch_norm_forward(x),
        lambda: nbbn.batch_norm_forward(good, out=x),
    ):
        with pytest.raises(TypeError, match=r"^(x|out) cannot be used where it lies.*storage"):
            call()
    assert nbbn.batch_norm_forward(x[:2]).out.shape == (2, 3)
    assert nbbn.batch_norm_forward(torch.ones(1, 3).expand(4, 3)).out.shape == (4, 3)


def test_tensors_with_tangents(torch):
    """Of forward-mode differentiation, which would be lost without a word."""
    x, column = torch.ones(3, 4), torch.ones(4)
    with torch.autograd.forward_ad.dual_level():
        for name, plain in (("x", x), ("running_mean", column)):
            dual = torch.autograd.forward_ad.make_dual(plain.clone(), plain)
            given = {"x": x, "running_mean": column.clone(), "running_var": column.clone()} | {name: dual}
            with pytest.raises(TypeError, match=rf"^{name} .*has a tangent.*detach\(\)"):
                nbbn.batch_norm(**given, training=True)
            assert (given["running_var"] == 1).all()
        assert torch.equal(nbbn.batch_norm_forward(x).out, torch.zeros(3, 4))


def test_tensors_without_values(torch):
    """Inside of vmap, and fake ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def refused(x):
        with pytest.raises(TypeError, match=r"^x cannot be used where it lies"):
            nbbn.batch_norm_forward(x)
        return x

    torch.vmap(refused)(torch.ones(2, 3, 4))
    with FakeTensorMode():
        refused(torch.ones(3, 4))


def test_parameters_of_a_torch_module(torch):
    """nn.Parameter is a tensor on the tape; its detach() is not."""
    theirs = torch.nn.BatchNorm1d(4)
    x = torch.randn(5, 4)
    with pytest.raises(TypeError, match=r"^weight .*requires grad.*detach\(\)"):
        nbbn.batch_norm_forward(x, theirs.weight)
    out = nbbn.batch_norm(
        x, theirs.running_mean, theirs.running_var, theirs.weight.detach(), theirs.bias.detach(), True
    )
    other = torch.nn.BatchNorm1d(4)
    torch.testing.assert_close(out, other(x).detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.running_mean, other.running_mean)
    torch.testing.assert_close(theirs.running_var, other.running_var)


def test_read_only():
    """As DLPack 1.0 tells it."""
    x = np.ones((3, 4))
    column = np.ones(4)
    x.flags.writeable = column.flags.writeable = False
    assert nbbn.batch_norm_forward(Standard(x)).count == 3
    with pytest.raises(ValueError, match=r"^out must be writable"):
        nbbn.batch_norm_forward(Standard(x), out=Standard(x))
    with pytest.raises(ValueError, match=r"^running_mean must be writable.*_forward write to nothing"):
        nbbn.batch_norm(Standard(x), Standard(column), training=True)


def test_out_of_jax(jax):
    x = jax.numpy.ones((3, 4))
    for call in (
        lambda: nbbn.batch_norm_forward(x, out=x),
        lambda: nbbn.batch_norm_backward(x, x, mean=x[0], invstd=x[0], out=x),
        lambda: nbbn.batch_norm(x, x[0], x[0], out=x),
    ):
        with pytest.raises(TypeError, match=r"^out must be an array that can be written to.*immutable"):
            call()
    assert (x == 1).all()


def test_jax_without_x64(rng, jax):
    """Statistics are float32, as all of JAX is."""
    jax.config.update("jax_enable_x64", False)
    values = rng.normal(size=(5, 3)).astype(np.float32)
    x, expected = jax.numpy.array(values), nbbn.batch_norm_forward(values)
    result = nbbn.batch_norm_forward(x)
    assert_same_bits(np.asarray(result.out), expected.out)
    for name in ("mean", "var", "invstd"):
        assert_same_bits(np.asarray(getattr(result, name)), getattr(expected, name).astype(np.float32))
    gradients = nbbn.batch_norm_backward(x, x, mean=result.mean, invstd=result.invstd)
    assert {str(g.dtype) for g in gradients} == {"float32"}
    bn, other = nbbn.BatchNorm(3), nbbn.BatchNorm(3)
    assert_same_bits(np.asarray(bn(x)), other(values))
    assert_same_bits(np.asarray(bn.backward(x)), other.backward(values))


def test_jax_result_that_is_still_computed(rng, jax):
    """JAX computes ahead; its array is waited for."""
    x = jax.numpy.array(rng.normal(size=(600, 600)))
    later = x
    for _ in range(20):
        later = later @ x / 600
    result = nbbn.batch_norm_forward(later)
    assert_same_bits(np.asarray(result.out), nbbn.batch_norm_forward(np.asarray(later)).out)


def test_traced_and_deleted_arrays_of_jax(jax):
    def traced(x):
        with pytest.raises(TypeError, match=r"^x .*traced array.*outside of jax.jit"):
            nbbn.batch_norm_forward(x)
        return x

    jax.jit(traced)(jax.numpy.ones((3, 4)))
    x = jax.numpy.ones((3, 4))
    x.delete()
    with pytest.raises(TypeError, match=r"^x cannot be used where it lies"):
        nbbn.batch_norm_forward(x)
    with pytest.raises(TypeError, match=r"^x must be float32, float64, float16 or bfloat16.*int32"):
        nbbn.batch_norm_forward(jax.numpy.ones((3, 4), jax.numpy.int32))


class Elsewhere(Standard):
    def __dlpack_device__(self):
        return 8, 0  # Metal


class NoNamespace(Standard):
    __array_namespace__ = None

    def __getattribute__(self, name):
        if name == "__array_namespace__":
            raise AttributeError(name)
        return super().__getattribute__(name)


class Unwilling(Standard):
    def __dlpack__(self, **options):
        raise BufferError("not now")


class Future(Standard):
    """Of a version of DLPack that is to come."""

    def __dlpack__(self, **options):
        capsule = super().__dlpack__(max_version=(1, 0))
        at = dlpack.pointer(capsule, b"dltensor_versioned")
        ctypes.c_uint32.from_address(at).value = 2
        return capsule


class NoCapsule(Standard):
    def __dlpack__(self, **options):
        return self.array


class Used(Standard):
    """Gives one capsule twice, after somebody has taken the array out of it."""

    capsule = None

    def __dlpack__(self, **options):
        if self.capsule is None:
            self.capsule = super().__dlpack__(max_version=(1, 0))
            np.from_dlpack(self)
        return self.capsule


class Copied(Standard):
    """Says that it has made a copy."""

    def __dlpack__(self, **options):
        capsule = super().__dlpack__(max_version=(1, 0))
        at = dlpack.pointer(capsule, b"dltensor_versioned")
        ctypes.c_uint64.from_address(at + 24).value |= 2
        return capsule


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        (Elsewhere, nbbn.DeviceError, "must lie on the CPU or on a CUDA device.*type 8"),
        (Unwilling, TypeError, "not now"),
        (Future, TypeError, "version 2 of DLPack"),
        (NoCapsule, TypeError, "PyCapsule"),
        (Used, TypeError, "capsule named b'used_dltensor_versioned'"),
        (Copied, TypeError, "only be had as a copy"),
    ],
)
def test_other_producers(kind, error, says):
    x, column = np.ones((3, 4)), np.ones(4)
    with pytest.raises(error, match=rf"^x .*{says}"):
        nbbn.batch_norm_forward(kind(x))
    with pytest.raises(error, match=rf"^weight .*{says}"):
        nbbn.batch_norm_forward(x, kind(column))
    with pytest.raises(error, match=rf"^running_var .*{says}"):
        nbbn.batch_norm(x, column, kind(column), training=True)
    assert (column == 1).all()


def test_result_that_cannot_be_wrapped():
    """As x; as another argument it will do."""
    x = np.ones((3, 4))
    with pytest.raises(TypeError, match=r"^x .*NoNamespace.*result cannot be wrapped"):
        nbbn.batch_norm_forward(NoNamespace(x), out=x)
    assert nbbn.batch_norm_forward(x, NoNamespace(x[0])).count == 3


def test_interface_of_the_wrong_kind(monkeypatch):
    """What speaks neither protocol, or one of them badly."""

    class Nonsense:
        __cuda_array_interface__ = {"shape": (3, 4)}  # noqa: RUF012

    for x in (Nonsense(), object(), np.float32(3), [[1.0]], np.ndarray, Standard):
        with pytest.raises((TypeError, nbbn.DeviceError), match=r"^x "):
            nbbn.batch_norm_forward(x)


def test_a_half_imported_library(monkeypatch):
    """Another thread may be importing it."""
    for name in ("torch", "jax", "cupy"):
        monkeypatch.setitem(sys.modules, name, object())
    x = np.ones((3, 4))
    assert nbbn.batch_norm_forward(Standard(x)).count == 3
