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


def work(x, dy):
    """A digest of all bits of the results."""
    digest = hashlib.sha256()
    for array in results(x, dy):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
