"""Pure integers: shapes and strides to the one form that the kernels work on.

Whatever the rank, the channel axis and the strides, an operation over channels sees three things:
*outer* dimensions, the *channel* dimension, and one *inner* dimension, the one whose elements lie
closest together. Dimensions that continue each other in memory are joined; what remains of the outer
ones is a list of sizes and strides. Statistics do not depend on the order of the elements, so the
dimensions are taken in the order of memory and walked forwards, whatever the view does.
"""

import math
from dataclasses import dataclass, replace

Strides = tuple[int, ...]  # bytes


@dataclass(frozen=True)
class Layout:
    """How one array is walked.

    Attributes
    ----------
    offset : int
        Bytes from the array's first element to where the walk begins (negative strides are turned).
    outer : tuple of int
        Bytes per step of each outer dimension.
    channel, inner : int
        Bytes from a channel, or an inner element, to the next.
    """

    offset: int
    outer: Strides
    channel: int
    inner: int


@dataclass(frozen=True)
class Geometry:
    """The dimensions that several arrays of one shape are walked in, together.

    Attributes
    ----------
    sizes : tuple of int
        The outer dimensions; at least one.
    channels, inner : int
        The other two.
    layouts : tuple of Layout
        One for each array.
    """

    sizes: tuple[int, ...]
    channels: int
    inner: int
    layouts: tuple[Layout, ...]

    @property
    def steps(self) -> int:
        """How many steps the outer dimensions have together."""
        return math.prod(self.sizes)

    def downwards(self) -> "Geometry":
        """Return the same with the inner dimension as the last outer one: a row is of channels alone."""
        outer = 0 if self.sizes == (1,) else len(self.sizes)
        return Geometry(
            sizes=(*self.sizes[:outer], self.inner),
            channels=self.channels,
            inner=1,
            layouts=tuple(
                replace(layout, outer=(*layout.outer[:outer], layout.inner), inner=0)
                for layout in self.layouts
            ),
        )


def canonical(shape: tuple[int, ...], axis: int, *strides: Strides) -> Geometry:
    """Return the canonical walk over arrays of one shape, the first of which decides on the order.

    Parameters
    ----------
    shape : tuple of int
        No dimension is 0.
    axis : int
        The channel axis, not negative.
    *strides : tuple of int
        The strides of each array, in bytes.
    """
    offsets = [0] * len(strides)
    dimensions = []  # (size, stride of each array), of the other axes that are longer than 1
    for d, size in enumerate(shape):
        if d == axis or size == 1:
            continue
        steps = [s[d] for s in strides]
        if steps[0] < 0:
            offsets = [o + (size - 1) * step for o, step in zip(offsets, steps, strict=True)]
            steps = [-step for step in steps]
        dimensions.append((size, steps))
    # Slowest first; a broadcast dimension (stride 0) is slowest of all, so that what lies together is
    # read together. The sort is stable: axes of equal stride stay in the order of the shape.
    dimensions.sort(key=lambda d: [abs(step) or 1 << 62 for step in d[1]], reverse=True)

    joined: list[tuple[int, list[int]]] = []
    for size, steps in dimensions:
        if joined:
            slower, slower_steps = joined[-1]
            if all(a == b * size for a, b in zip(slower_steps, steps, strict=True)):
                joined[-1] = (slower * size, steps)
                continue
        joined.append((size, steps))

    channels = shape[axis]
    channel_steps = [s[axis] if channels > 1 else 0 for s in strides]
    inner, inner_steps = 1, [0] * len(strides)
    if joined:
        nearest = joined[-1][1][0] or 1 << 62
        if channel_steps[0] == 0 or nearest <= abs(channel_steps[0]):
            inner, inner_steps = joined.pop()
    if not joined:
        joined.append((1, [0] * len(strides)))
    return Geometry(
        sizes=tuple(size for size, _ in joined),
        channels=channels,
        inner=inner,
        layouts=tuple(
            Layout(
                offset=offsets[k],
                outer=tuple(steps[k] for _, steps in joined),
                channel=channel_steps[k],
                inner=inner_steps[k],
            )
            for k in range(len(strides))
        ),
    )
