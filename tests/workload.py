"""What processes compute in tests of threads and forks: large enough for several threads."""

import hashlib

import numpy as np

import nbbn


def arrays(k=0):
    """An x and a grad_out; others for another k."""
    rng = np.random.default_rng(k)
    x, dy = rng.normal(3, 2, (2, 16, 8, 60, 61)).astype(np.float32)
    return x, dy


def results(x, dy):
    """Every array that training, backward and evaluation make of them."""
    mean, var = np.zeros(x.shape[1]), np.ones(x.shape[1])
    out = nbbn.batch_norm(x, mean, var, training=True)
    forward = nbbn.batch_norm_forward(x)
    backward = nbbn.batch_norm_backward(dy, x, mean=forward.mean, invstd=forward.invstd)
    evaluated = nbbn.batch_norm(x, mean, var)
    return out, mean, var, *forward[:4], *backward, evaluated


def batch(k):
    """What a worker of a data loader sends back: arrays."""
    return results(*arrays(k))


def results_of_others(x, dy):
    """Every array that the other normalizations make of them, and what goes along with batch norm."""
    shape = x.shape[1:]
    mask = dy[:, 0] > 2.0
    layer, group = nbbn.layer_norm_forward(x, shape), nbbn.group_norm_forward(x, 2)
    mean, var = np.zeros(x.shape[1]), np.ones(x.shape[1])
    instance = nbbn.instance_norm(x, mean, var)
    alone = nbbn.batch_norm_forward(x, mask=mask, activation="silu", residual=dy)
    found = {"mean": alone.mean, "invstd": alone.invstd}
    return (
        *layer[:4],
        *nbbn.layer_norm_backward(dy, x, shape, mean=layer.mean, invstd=layer.invstd),
        nbbn.rms_norm(x, shape),
        *group[:4],
        *nbbn.group_norm_backward(dy, x, 2, mean=group.mean, invstd=group.invstd),
        *(instance, mean, var),
        *alone[:4],
        *nbbn.batch_norm_backward(dy, x, **found, mask=mask, activation="silu", residual=dy),
    )


def work(x, dy):
    """A digest of all bits of the results."""
    return _digest(results(x, dy))


def work_of_others(x, dy):
    """The same of the other normalizations."""
    return _digest(results_of_others(x, dy))


def _digest(arrays):
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
