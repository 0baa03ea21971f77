"""Batch norm in a recurrent network, with the statistics of each time step: see recurrent-networks.md.

The network is T. Cooijmans et al., "Recurrent Batch Normalization", arXiv 1603.09025, with a plain tanh
cell for the LSTM: at step t

    h = tanh(BN(x W_x; weight_x, t) + BN(h W_h; weight_h, t) + b)
"""

import argparse

import numpy as np
from sklearn.datasets import load_digits

import nbbn


# --- sequences
def inked_columns(image):
    """Return the columns of an image, left to right, from the first with ink to the last: (length, 8)."""
    inked = np.flatnonzero(image.any(axis=0))
    return image[:, inked[0] : inked[-1] + 1].T


def padded(sequences, dtype=np.float32):
    """Return x (steps, n, features), the longest sequence first, the lengths, and which is where."""
    order = sorted(range(len(sequences)), key=lambda k: -len(sequences[k]))
    lengths = np.array([len(sequences[k]) for k in order])
    x = np.zeros((lengths[0], len(order), sequences[0].shape[1]), dtype)
    for place, k in enumerate(order):
        x[: lengths[place], place] = sequences[k]
    return x, lengths, order


# --- batch norm
class StepNorm:
    """Batch norm with one weight and no bias, and running statistics of each step up to a last one."""

    def __init__(self, steps, features, dtype=np.float32, momentum=0.1):
        self.weight = np.full(features, 0.1, dtype)
        self.running_mean = np.zeros((steps, features))
        self.running_var = np.ones((steps, features))
        self.batches = np.zeros(steps, int)  # that each step has seen
        self.momentum = momentum

    def forward(self, x, t, training):
        """Normalize x (running, features) of step t; return the output, and what `backward` needs."""
        t = min(t, len(self.batches) - 1)
        if training and len(x) > 1:
            out, mean, var, invstd, count = nbbn.batch_norm_forward(x, self.weight)
            self.batches[t] += 1
            # The first batch replaces 0 and 1: steps that few sequences reach would keep them for long.
            momentum = max(self.momentum, 1 / self.batches[t])
            self.running_mean[t] += momentum * (mean - self.running_mean[t])
            self.running_var[t] += momentum * (var * count / (count - 1) - self.running_var[t])
            return out, (x, mean, invstd, True)
        while t > 0 and not self.batches[t]:
            t -= 1  # later than any step that was seen in training: the last of those
        mean, var = self.running_mean[t].copy(), self.running_var[t]
        return nbbn.batch_norm(x, mean, var, self.weight), (x, mean, 1 / np.sqrt(var + 1e-5), False)

    def backward(self, grad_out, kept):
        """Return the gradients by x and by the weight."""
        x, mean, invstd, training = kept
        gradients = nbbn.batch_norm_backward(
            grad_out, x, self.weight, mean=mean, invstd=invstd, training=training
        )
        return gradients.x, gradients.weight


class Plain:
    """No batch norm, in its place."""

    weight = None

    def forward(self, x, t, training):
        """Return x."""
        return x, None

    def backward(self, grad_out, kept):
        """Return the gradient by x, and none by a weight."""
        return grad_out, 0.0


# --- the network
class Recurrent:
    """A recurrent layer, of whose last state of each sequence a dense layer makes the scores."""

    def __init__(self, seed, features=8, hidden=48, classes=10, steps=None, dtype=np.float32):
        random = np.random.default_rng(seed)
        orthogonal, _ = np.linalg.qr(random.normal(size=(hidden, hidden)))
        self.parameters = {
            "w_x": random.normal(0, features**-0.5, (features, hidden)).astype(dtype),
            "w_h": orthogonal.astype(dtype),
            "b": np.zeros(hidden, dtype),
            "w_out": random.normal(0, hidden**-0.5, (hidden, classes)).astype(dtype),
            "b_out": np.zeros(classes, dtype),
        }
        if steps is None:
            self.norm_x = self.norm_h = Plain()
        else:
            self.norm_x, self.norm_h = (StepNorm(steps, hidden, dtype) for _ in range(2))
            self.parameters |= {"weight_x": self.norm_x.weight, "weight_h": self.norm_h.weight}

    def forward(self, x, lengths, training):
        """Return the scores of sequences: x (steps, n, features), of which the longest is first."""
        p = self.parameters
        h = np.zeros((len(lengths), len(p["b"])), x.dtype)
        self.tape = []
        for t in range(len(x)):
            running = int((lengths > t).sum())  # all others have ended, and have no values at this step
            before = h[:running].copy()
            of_x, kept_x = self.norm_x.forward(x[t, :running] @ p["w_x"], t, training)
            of_h, kept_h = 0.0, None
            if t > 0:  # before, all states are 0, and there is nothing to normalize
                of_h, kept_h = self.norm_h.forward(before @ p["w_h"], t, training)
            h[:running] = np.tanh(of_x + of_h + p["b"])
            self.tape.append((x[t, :running], before, h[:running].copy(), kept_x, kept_h))
        self.last = h
        return h @ p["w_out"] + p["b_out"]

    def backward(self, grad_scores):
        """Return the gradients by all parameters, through all steps of the last `forward`."""
        p = self.parameters
        grads = {name: np.zeros_like(value) for name, value in p.items()}
        grads["w_out"] += self.last.T @ grad_scores
        grads["b_out"] += grad_scores.sum(axis=0)
        grad_h = grad_scores @ p["w_out"].T  # of each sequence by its latest state: at first, its last one
        for t in reversed(range(len(self.tape))):
            x, before, after, kept_x, kept_h = self.tape[t]
            running = len(x)
            grad_sum = grad_h[:running] * (1 - after**2)
            grads["b"] += grad_sum.sum(axis=0)
            grad_x, grad_weight = self.norm_x.backward(grad_sum, kept_x)
            grads["w_x"] += x.T @ grad_x
            if "weight_x" in grads:
                grads["weight_x"] += grad_weight
            if t > 0:
                grad_state, grad_weight = self.norm_h.backward(grad_sum, kept_h)
                grads["w_h"] += before.T @ grad_state
                grad_h[:running] = grad_state @ p["w_h"].T
                if "weight_h" in grads:
                    grads["weight_h"] += grad_weight
        return grads


# --- training
def cross_entropy(scores, labels):
    """Return the mean loss, and its gradient by the scores."""
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = -np.log(p[rows, labels] + 1e-30).mean()
    p[rows, labels] -= 1
    return float(loss), p / len(labels)


def accuracy(network, sequences, labels):
    """Return which part of the sequences is recognized, in evaluation."""
    x, lengths, order = padded(sequences)
    return float((network.forward(x, lengths, training=False).argmax(axis=1) == labels[order]).mean())


def train(network, sequences, labels, steps, rate, seed, watch, batch_size=64):
    """Train by Adam; call watch(step) now and then."""
    random = np.random.default_rng(seed)
    first = {name: np.zeros_like(value) for name, value in network.parameters.items()}
    second = {name: np.zeros_like(value) for name, value in network.parameters.items()}
    for step in range(1, steps + 1):
        chosen = random.choice(len(labels), batch_size, replace=False)
        x, lengths, order = padded([sequences[k] for k in chosen])
        _, grad_scores = cross_entropy(network.forward(x, lengths, training=True), labels[chosen[order]])
        grads = network.backward(grad_scores)
        norm = np.sqrt(sum(float((g**2).sum()) for g in grads.values()))
        for name, value in network.parameters.items():
            g = grads[name] * min(1.0, 1.0 / norm)  # gradients are clipped, with batch norm and without
            first[name] += 0.1 * (g - first[name])
            second[name] += 0.001 * (g**2 - second[name])
            value -= (
                rate * (first[name] / (1 - 0.9**step)) / (np.sqrt(second[name] / (1 - 0.999**step)) + 1e-8)
            )
        if step % 50 == 0:
            watch(step)


def main():
    """Train with batch norm and without, from the same weights and on the same batches."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=0.003)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="what pixels, from 0 to 16, are divided by")
    parser.add_argument("--check", action="store_true", help="fail where batch norm is no better")
    options = parser.parse_args()
    digits = load_digits()
    order = np.random.default_rng(options.seed).permutation(len(digits.target))
    sequences, labels = [inked_columns(digits.images[k] / options.scale) for k in order], digits.target[order]
    lengths = np.array([len(sequence) for sequence in sequences])
    print("length    ", *(f"{k:4d}" for k in range(1, 9)))
    print("sequences ", *(f"{(lengths == k).sum():4d}" for k in range(1, 9)), end="\n\n")
    seen = {}
    for name, steps in (("with", 8), ("without", None)):
        network, found = Recurrent(options.seed, steps=steps), []

        def watch(step, network=network, found=found):
            found.append(accuracy(network, sequences[-400:], labels[-400:]))

        train(network, sequences[:-400], labels[:-400], options.steps, options.rate, options.seed, watch)
        seen[name] = found
    print("step  with batch norm  without")
    for k, (with_norm, without) in enumerate(zip(seen["with"], seen["without"], strict=True)):
        print(f"{50 * (k + 1):4d}  {with_norm:15.3f}  {without:7.3f}")
    if options.check:
        assert seen["with"][-1] > 0.8, seen
        assert seen["with"][2] > seen["without"][-1], seen  # in half of the steps


if __name__ == "__main__":
    main()
