"""The libraries that nbbn is timed against, each as its documentation says, into an output that is there.

What they return is read back in the order of memory that the case has.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from nbbn.bench.cases import EPS, MOMENTUM, Case, Data
from nbbn.bench.contenders import Contender, Group, Prepared, Unsupported, nothing
from nbbn.bench.oracle import Arrays


def cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _expressions(xp: Any, case: Case, data: Data, move: Callable[[Any], Any]) -> Callable[[], Arrays]:
    """Return batch norm as one writes it with NumPy, or with what has NumPy's functions.

    The large temporaries are used again, and the result goes where it should: who cares about time would do
    that much.
    """
    axes = tuple(d for d in range(data.x.ndim) if d != data.axis)
    shape = tuple(n if d == data.axis else 1 for d, n in enumerate(data.x.shape))
    count = data.x.size // data.x.shape[data.axis]
    x = move(data.x)
    running_mean, running_var, weight, bias = (move(a) for a in data.parameters)
    out = xp.empty_like(x) if data.out is None else move(data.out)
    own = weight.dtype

    def evaluation() -> Arrays:
        scale = weight / xp.sqrt(running_var + EPS)
        xp.multiply(x, scale.reshape(shape), out=out)
        xp.add(out, (bias - running_mean * scale).reshape(shape), out=out)
        return {"out": out}

    def forward() -> Arrays:
        mean = x.mean(axis=axes, keepdims=True)
        centred = xp.subtract(x, mean, out=out)
        var = xp.square(centred).mean(axis=axes, keepdims=True)
        xp.multiply(centred, weight.reshape(shape) / xp.sqrt(var + EPS), out=out)
        xp.add(out, bias.reshape(shape), out=out)
        running_mean[...] = (1 - MOMENTUM) * running_mean + MOMENTUM * mean.reshape(-1)
        unbiased = var.reshape(-1) * (count / (count - 1))
        running_var[...] = (1 - MOMENTUM) * running_var + MOMENTUM * unbiased
        return {"out": out, "running_mean": running_mean, "running_var": running_var}

    if case.mode != "backward":
        return forward if case.mode == "forward" else evaluation

    grad_out = move(data.grad_out)
    mean, invstd = (move(a.astype(own)).reshape(shape) for a in (data.oracle.mean, data.oracle.invstd))

    def backward() -> Arrays:
        x_hat = (x - mean) * invstd
        grad_bias = grad_out.sum(axis=axes, keepdims=True)
        grad_weight = (grad_out * x_hat).sum(axis=axes, keepdims=True)
        xp.multiply(x_hat, -grad_weight / count, out=out)
        xp.add(out, grad_out, out=out)
        xp.subtract(out, grad_bias / count, out=out)
        xp.multiply(out, weight.reshape(shape) * invstd, out=out)
        return {"grad_x": out, "grad_weight": grad_weight.reshape(-1), "grad_bias": grad_bias.reshape(-1)}

    return backward


class NumPy(Contender):
    """Plain NumPy, which computes on one thread whatever is set."""

    name, packages = "numpy", ("numpy",)
    threaded = False

    def prepare(self, case: Case, data: Data, group: Group) -> Prepared:
        """Return the expressions."""
        if group.cuda:
            raise Unsupported("NumPy has no arrays on GPUs")
        if data.dtype.itemsize < 4:
            raise Unsupported("plain expressions of 16 bits lose all accuracy")
        return Prepared(_expressions(np, case, data, lambda array: array), _as_it_is)


class CuPy(Contender):
    """The same expressions with CuPy."""

    name, packages = "cupy", ("cupy",)

    def prepare(self, case: Case, data: Data, group: Group) -> Prepared:
        """Return the expressions."""
        if not group.cuda:
            raise Unsupported("CuPy has no arrays in the host's memory")
        if data.dtype.itemsize < 4:
            raise Unsupported("plain expressions of 16 bits lose all accuracy")
        import cupy

        call = _expressions(cupy, case, data, cupy.asarray)
        return Prepared(
            call,
            lambda found: {name: cupy.asnumpy(array) for name, array in found.items()},
            cupy.cuda.get_current_stream().synchronize,
        )


def _as_it_is(found: Arrays) -> Arrays:
    return found


class Torch(Contender):
    """PyTorch: its operators with `out`, which its module calls; for new outputs `functional.batch_norm`."""

    name, packages = "torch", ("torch",)

    def enter(self, group: Group) -> None:
        """Set PyTorch's threads."""
        import torch

        torch.set_num_threads(group.threads)

    def prepare(self, case: Case, data: Data, group: Group) -> Prepared:
        """Return a call of PyTorch's operator, on tensors over the same memory on the CPU."""
        import torch

        device, wait = "cpu", nothing
        if group.cuda:
            if not torch.cuda.is_available():
                raise Unsupported("this PyTorch finds no GPU")
            device, wait = "cuda", torch.cuda.synchronize

        def tensor(array: np.ndarray) -> Any:
            if data.dtype.name == "bfloat16" and array.dtype == data.dtype:
                shared = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            else:
                shared = torch.from_numpy(array)
            if array.ndim > 1 and data.last:
                shared = shared.movedim(-1, 1)
            return shared.to(device)

        def array(tensor: Any) -> np.ndarray:
            large = tensor.ndim > 1
            host = tensor.detach().cpu()
            if large and data.last:
                host = host.movedim(1, -1)
            if host.dtype == torch.bfloat16:
                host = host.contiguous().view(torch.int16)
                return np.asarray(host.numpy()).view(data.dtype)
            result: np.ndarray = host.numpy()
            return result

        x = tensor(data.x)
        running_mean, running_var, weight, bias = map(tensor, data.parameters)
        saved = torch.empty_like(weight), torch.empty_like(weight)
        out = None if data.out is None else tensor(data.out)
        if case.mode == "backward":
            grad_out = tensor(data.grad_out)
            mean, invstd = (
                tensor(a.astype(data.weight.dtype)) for a in (data.oracle.mean, data.oracle.invstd)
            )
            into = {} if out is None else {"out0": out, "out1": saved[0], "out2": saved[1]}
            both = torch.ops.aten.native_batch_norm_backward
            operator = both.default if out is None else both.out
            return Prepared(
                lambda: operator(
                    grad_out,
                    x,
                    weight,
                    running_mean,
                    running_var,
                    mean,
                    invstd,
                    True,
                    EPS,
                    [True] * 3,
                    **into,
                ),
                lambda found: dict(
                    zip(("grad_x", "grad_weight", "grad_bias"), map(array, found), strict=True)
                ),
                wait,
            )
        training = case.mode == "forward"
        state = running_mean, running_var, weight, bias

        def read(found: Any) -> Arrays:
            results = {"out": array(found if out is None or group.cuda else out)}
            if training:
                results |= {"running_mean": array(running_mean), "running_var": array(running_var)}
            return results

        if out is None or group.cuda:  # this one takes cuDNN where it should
            function = torch.nn.functional.batch_norm
            return Prepared(lambda: function(x, *state, training, MOMENTUM, EPS), read, wait)
        into_out = torch.ops.aten.native_batch_norm.out
        mean_out, invstd_out = saved
        return Prepared(
            lambda: into_out(
                x, weight, bias, running_mean, running_var, training, MOMENTUM, EPS,
                out=out, save_mean=mean_out, save_invstd=invstd_out,
            ),
            read, wait,
        )  # fmt: skip


class JAX(Contender):
    """JAX: the expressions, compiled by XLA; it makes its own outputs, and takes all processors or none."""

    name, packages = "jax", ("jax",)

    def prepare(self, case: Case, data: Data, group: Group) -> Prepared:
        """Return a compiled function on arrays of JAX's own."""
        import jax
        import jax.numpy as jnp

        if data.dtype == np.float64 and not jax.config.jax_enable_x64:
            raise Unsupported("JAX has no float64 unless JAX_ENABLE_X64 is set")
        try:
            device = jax.devices("cuda" if group.cuda else "cpu")[0]
        except RuntimeError as error:
            raise Unsupported(f"JAX finds no such device ({' '.join(str(error).split())[:80]})") from error
        if not group.cuda and group.threads != cores():
            raise Unsupported(f"JAX computes on all {cores()} processors")
        axes = tuple(d for d in range(data.x.ndim) if d != data.axis)
        shape = tuple(n if d == data.axis else 1 for d, n in enumerate(data.x.shape))
        count = data.x.size // data.x.shape[data.axis]

        def wide(x: Any) -> Any:
            return x.astype(data.weight.dtype)

        def evaluation(x: Any, mean: Any, var: Any, weight: Any, bias: Any) -> dict[str, Any]:
            scale = weight * jax.lax.rsqrt(var + EPS)
            out = (wide(x) - mean.reshape(shape)) * scale.reshape(shape) + bias.reshape(shape)
            return {"out": out.astype(x.dtype)}

        def forward(x: Any, running_mean: Any, running_var: Any, weight: Any, bias: Any) -> dict[str, Any]:
            mean = wide(x).mean(axis=axes)
            var = jnp.square(wide(x) - mean.reshape(shape)).mean(axis=axes)
            unbiased = var * (count / (count - 1))
            return evaluation(x, mean, var, weight, bias) | {
                "running_mean": (1 - MOMENTUM) * running_mean + MOMENTUM * mean,
                "running_var": (1 - MOMENTUM) * running_var + MOMENTUM * unbiased,
            }

        def backward(grad_out: Any, x: Any, mean: Any, invstd: Any, weight: Any) -> dict[str, Any]:
            dy = wide(grad_out)
            x_hat = (wide(x) - mean.reshape(shape)) * invstd.reshape(shape)
            grad_bias, grad_weight = dy.sum(axis=axes), (dy * x_hat).sum(axis=axes)
            inner = dy - (grad_bias / count).reshape(shape) - x_hat * (grad_weight / count).reshape(shape)
            grad_x = (weight * invstd).reshape(shape) * inner
            return {"grad_x": grad_x.astype(x.dtype), "grad_weight": grad_weight, "grad_bias": grad_bias}

        own = data.weight.dtype
        if case.mode == "backward":
            saved = data.oracle.mean.astype(own), data.oracle.invstd.astype(own)
            arguments: tuple[np.ndarray, ...] = (data.grad_out, data.x, *saved, data.weight)
        else:
            arguments = (data.x, *data.parameters)
        given = [jax.device_put(argument, device) for argument in arguments]
        function = jax.jit({"forward": forward, "evaluation": evaluation, "backward": backward}[case.mode])
        return Prepared(
            lambda: jax.block_until_ready(function(*given)),
            lambda found: {name: np.asarray(array) for name, array in found.items()},
        )


class OnnxRuntime(Contender):
    """ONNX Runtime: its operator BatchNormalization, for evaluation; inputs and outputs are bound."""

    name, packages = "onnxruntime", ("onnxruntime", "onnx")

    def prepare(self, case: Case, data: Data, group: Group) -> Prepared:
        """Return a session that runs the one operator."""
        if case.mode != "evaluation":
            raise Unsupported("ONNX Runtime is for evaluation")
        if data.last:
            raise Unsupported("ONNX has the channels second")
        if data.dtype not in (np.float32, np.float64):
            raise Unsupported(f"ONNX Runtime has no such operator for {data.dtype.name} on CPUs")
        import onnx
        import onnxruntime

        provider = "CUDAExecutionProvider" if group.cuda else "CPUExecutionProvider"
        if provider not in onnxruntime.get_available_providers():
            raise Unsupported(f"this ONNX Runtime has no {provider}")
        kind = onnx.helper.np_dtype_to_tensor_dtype(data.dtype)
        running_mean, running_var, weight, bias = data.parameters
        constants = {"scale": weight, "B": bias, "input_mean": running_mean, "input_var": running_var}
        shape = list(data.x.shape)
        node = onnx.helper.make_node("BatchNormalization", ["X", *constants], ["Y"], epsilon=EPS)
        graph = onnx.helper.make_graph(
            [node],
            "batch_norm",
            [onnx.helper.make_tensor_value_info("X", kind, shape)],
            [onnx.helper.make_tensor_value_info("Y", kind, shape)],
            [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)], ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = group.threads
        options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
        device = "cuda" if group.cuda else "cpu"
        x = onnxruntime.OrtValue.ortvalue_from_numpy(data.x, device)
        binding = session.io_binding()
        binding.bind_ortvalue_input("X", x)
        if data.out is None:
            binding.bind_output("Y", device)
        else:
            binding.bind_ortvalue_output("Y", onnxruntime.OrtValue.ortvalue_from_numpy(data.out, device))
        return Prepared(
            lambda: session.run_with_iobinding(binding),
            lambda _: {"out": binding.copy_outputs_to_cpu()[0]},
        )


PEERS: tuple[Contender, ...] = (NumPy(), Torch(), JAX(), OnnxRuntime(), CuPy())
