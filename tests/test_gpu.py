"""The public functions on a GPU, on the arrays of every framework that is installed: pytest -m gpu.

Held against the same oracle as the CPU path. Nothing here runs without a GPU: what does is in
test_cuda_kernels.py (the kernels, simulated), test_cuda_code.py (their machine code) and test_devices.py.
"""

import importlib

import numpy as np
import pytest

import nbbn
import reference
from cases import DTYPES, HALF, LARGE, SMALL, Shape, activations, parameter, running_statistics, type_id
from checks import assert_same_bits, assert_within
from nbbn.cuda import target
from reference import rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        target.SIMULATED or target.why_not() is not None, reason=f"no GPU: {target.why_not()}"
    ),
]

BFLOAT16 = np.dtype(HALF[1])
MODELS = [
    Shape((32, 64, 56, 56)),
    Shape((32, 256, 14, 14)),
    Shape((32, 512, 7, 7)),
    Shape((8, 3, 224, 224)),
    Shape((32, 28, 28, 128), -1),
    Shape((4, 7, 7, 2048), -1),
    Shape((256, 512)),
    Shape((8, 32, 8, 8)),
    Shape((256, 512, 2, 2)),
    Shape((64, 2048, 1, 7)),
    Shape((20000, 72)),
]


class Torch:
    """Tensors."""

    def __init__(self):
        self.torch = pytest.importorskip("torch")
        if not self.torch.cuda.is_available():
            pytest.skip("this PyTorch has no CUDA")

    def put(self, array):
        # The memory layout goes along: the axes are put in order, copied, and put back.
        axes = sorted(range(array.ndim), key=lambda d: -abs(array.strides[d]))
        values = np.ascontiguousarray(array.transpose(axes))
        if values.dtype == BFLOAT16:  # which goes to and from NumPy by its bits
            copy = self.torch.from_numpy(values.view(np.int16)).cuda().view(self.torch.bfloat16)
        else:
            copy = self.torch.from_numpy(values).cuda()
        return copy.permute(*[int(d) for d in np.argsort(axes)])

    def get(self, array):
        if array.dtype == self.torch.bfloat16:
            return array.cpu().view(self.torch.int16).numpy().view(BFLOAT16)
        return array.cpu().numpy()


class Cupy(Torch):
    """CuPy's arrays."""

    def __init__(self):
        self.cupy = pytest.importorskip("cupy")

    def put(self, array):
        try:
            return self.cupy.array(array, order="K")
        except (TypeError, ValueError):
            if array.dtype != BFLOAT16:
                raise
            pytest.skip("this CuPy has no bfloat16")

    def get(self, array):
        return self.cupy.asnumpy(array)


class Numba(Torch):
    """Numba's device arrays."""

    def __init__(self):
        self.cuda = importlib.import_module("numba.cuda")

    def put(self, array):
        if array.dtype == BFLOAT16:
            pytest.skip("Numba's device arrays have no bfloat16")
        axes = sorted(range(array.ndim), key=lambda d: -abs(array.strides[d]))
        copy = self.cuda.to_device(np.ascontiguousarray(array.transpose(axes)))
        return copy.transpose([int(d) for d in np.argsort(axes)]) if array.ndim > 1 else copy

    def get(self, array):
        return array.copy_to_host()


class Jax(Torch):
    """JAX's arrays."""

    def __init__(self):
        self.jax = pytest.importorskip("jax")
        if self.jax.default_backend() != "gpu":
            pytest.skip("this JAX has no CUDA")
        self.jax.config.update("jax_enable_x64", True)

    def put(self, array):
        return self.jax.numpy.asarray(array)

    def get(self, array):
        return np.asarray(array)


@pytest.fixture(scope="module", params=[Torch, Cupy, Numba, Jax], ids=lambda kind: kind.__name__)
def gpu(request):
    """One framework's way to a GPU and back."""
    return request.param()


def layouts(array, axis):
    """The same values, contiguous and with the channels last in memory."""
    last = np.moveaxis(np.ascontiguousarray(np.moveaxis(array, axis, -1)), -1, axis)
    return (np.ascontiguousarray(array), last)


def check(gpu, rng, shape, dtype, x):
    """Hold every operation on `x` against the oracle."""
    axis = shape.axis
    dy = activations(rng, shape, dtype, offset=1)
    weight, bias = (parameter(rng, shape.channels, dtype) for _ in range(2))
    mean, var = running_statistics(rng, shape.channels, DTYPES)
    on_gpu = [gpu.put(a) for a in (x, dy, weight, bias, mean, var)]
    gx, gdy, gweight, gbias, gmean, gvar = on_gpu

    result = nbbn.batch_norm_forward(gx, gweight, gbias, axis=axis)
    assert type(result.out) is type(gx) and result.count == shape.count
    expected = reference.forward(x, weight, bias, axis=axis)
    tolerance = reference.out_tolerance(expected, dtype)
    assert_within("out", rows(gpu.get(result.out), axis), expected.out, tolerance)
    found = {name: gpu.get(getattr(result, name)) for name in ("mean", "var", "invstd")}
    for name, tolerance in (
        ("mean", reference.mean_tolerance(expected)),
        ("var", reference.var_tolerance(expected, dtype)),
    ):
        oracle = getattr(expected, name)
        assert_within(name, found[name][:, None], oracle, tolerance)

    out = nbbn.batch_norm(gx, gmean, gvar, gweight, gbias, axis=axis)
    evaluated = reference.evaluate(x, mean, var, weight, bias, axis=axis)
    tolerance = reference.out_tolerance(evaluated, dtype)
    assert_within("out", rows(gpu.get(out), axis), evaluated.out, tolerance)

    for training in (True, False):
        used = {"mean": result.mean, "invstd": result.invstd}
        gradients = nbbn.batch_norm_backward(gdy, gx, gweight, **used, axis=axis, training=training)
        oracle = reference.backward(
            dy, x, weight, mean=found["mean"], invstd=found["invstd"], axis=axis, training=training
        )
        tolerance = reference.grad_x_tolerance(oracle, dtype)
        assert_within("grad_x", rows(gpu.get(gradients.x), axis), oracle.x, tolerance)
        for name, tolerance in (
            ("weight", reference.grad_weight_tolerance(oracle, dtype)),
            ("bias", reference.grad_bias_tolerance(oracle, dtype)),
        ):
            values, one = gpu.get(getattr(gradients, name)), getattr(oracle, name)
            assert_within(f"grad_{name}", values[:, None], one, tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("shape", SMALL + MODELS, ids=str)
def test_against_the_oracle(gpu, rng, shape, dtype):
    for x in layouts(activations(rng, shape, dtype, offset=4), shape.axis):
        check(gpu, rng, shape, dtype, x)


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large(rng, shape):
    check(Numba(), rng, shape, np.float32, activations(rng, shape, np.float32, offset=4))


@pytest.mark.parametrize("offset", [0, 10, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
def test_offsets(rng, dtype, offset):
    for shape in (Shape((8, 5, 40, 41)), Shape((300, 70)), Shape((2, 3, 300, 300))):
        for x in layouts(activations(rng, shape, dtype, offset=offset), 1):
            check(Torch() if dtype == BFLOAT16 else Numba(), rng, shape, dtype, x)


def test_twenty_runs_give_equal_bits(gpu, rng):
    for shape in MODELS:
        x = gpu.put(activations(rng, shape, np.float32, offset=4))
        dy = gpu.put(activations(rng, shape, np.float32))
        found = []
        for _ in range(20):
            result = nbbn.batch_norm_forward(x, axis=shape.axis)
            used = {"mean": result.mean, "invstd": result.invstd}
            gradients = nbbn.batch_norm_backward(dy, x, **used, axis=shape.axis)
            found.append(tuple(gpu.get(a) for a in (*result[:4], *gradients)))
        for one in found[1:]:
            assert_same_bits(one, found[0])


def test_jax_arrays_that_are_gone_at_once(rng):
    """JAX computes them late, and takes their memory again before anybody has read it, or them."""
    gpu = Jax()
    jnp = gpu.jax.numpy
    values = activations(rng, Shape((64, 256, 28, 28)), np.float32, offset=4)
    kept = gpu.put(values)
    expected = gpu.get(nbbn.batch_norm_forward(kept).out)
    found = []
    for step in range(30):
        x = kept + 0  # a new array
        out = nbbn.batch_norm_forward(x).out
        del x
        junk = [jnp.full(values.shape, jnp.nan, jnp.float32) for _ in range(2)]
        found.append((jnp.abs(out - expected)).max())
        del out, junk
        if step % 5 == 4:
            nbbn.batch_norm_forward(kept)
    assert [float(value) for value in found] == [0.0] * len(found)


def test_an_object_trains_and_moves(gpu, rng):
    x = activations(rng, Shape((16, 12, 9, 9)), np.float32, offset=2)
    bn, twin = nbbn.BatchNorm(12, device="cuda"), nbbn.BatchNorm(12)
    for _ in range(3):
        out, expected = bn(gpu.put(x)), twin(x)
        np.testing.assert_allclose(gpu.get(out), expected, rtol=1e-5, atol=1e-5)
        grad_x, expected = bn.backward(gpu.put(x)), twin.backward(x)
        np.testing.assert_allclose(gpu.get(grad_x), expected, rtol=1e-4, atol=1e-5)
    state = bn.state_dict()
    for name, value in twin.state_dict().items():
        np.testing.assert_allclose(state[name], value, rtol=1e-5, atol=1e-6)
    moved = bn.to("cpu").eval()
    np.testing.assert_allclose(moved(x), twin.eval()(x), rtol=1e-5, atol=1e-5)
