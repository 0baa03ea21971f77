"""The shapes that batch norm is timed on: those of named models' layers, and what the user names.

The channel axis is the second one here, whatever the layout in memory is.
"""

from pathlib import Path

Shape = tuple[int, ...]

# The different batch-norm layers of the models, in their order: channels, height = width.
_RESNET50 = (
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14),
    (512, 14), (512, 7), (2048, 7),
)  # fmt: skip
_INCEPTION3 = (
    (32, 149), (32, 147), (64, 147), (80, 73), (192, 71), (64, 35), (48, 35), (96, 35), (32, 35), (384, 17),
    (96, 17), (192, 17), (128, 17), (160, 17), (320, 8), (192, 8), (384, 8), (448, 8),
)  # fmt: skip

SHAPES: dict[str, tuple[Shape, ...]] = {
    "resnet50": tuple((32, c, s, s) for c, s in _RESNET50),
    "inception3": tuple((96, c, s, s) for c, s in _INCEPTION3),
    "small": ((1, 8, 4, 4), (8, 32, 8, 8), (1, 64, 56, 56)),
    "dense": ((256, 512), (3136, 256)),
}
"""By name, with the batch that is usual for it.

ResNet-50 v1.5 on images of 224 × 224, Inception v3 on 299 × 299, arrays on which the call costs more than
the work, and dense layers.
"""

QUICK: tuple[Shape, ...] = ((32, 64, 56, 56), (32, 256, 14, 14), (8, 32, 8, 8))
"""One that memory bounds, one that the caches hold, and one where the call costs more than the work."""


def shapes(text: str, batch: int | None = None) -> list[Shape]:
    """Return the shapes that a name, a list of numbers or a file stands for.

    Parameters
    ----------
    text : str
        A name in `SHAPES`; or the numbers of one shape, as ``8,64,32,32``, channels second; or a file with
        such a shape on each line, where ``#`` begins a comment.
    batch : int, optional
        The length of the first dimension, instead of the usual one.

    Raises
    ------
    ValueError
        If it is none of these, or a shape has fewer than two dimensions, one that is not at least 1, or
        only one value per channel.
    """
    if text in SHAPES:
        found = list(SHAPES[text])
    elif _is_file(text):
        try:
            lines = (line.partition("#")[0].strip() for line in Path(text).read_text().splitlines())
            found = [_shape(line) for line in lines if line]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"got the file {text!r}, which cannot be read ({error})") from error
        if not found:
            raise ValueError(f"got the file {text!r}, which holds no shape")
    elif text[:1].isdigit() or text[:1] == "-":
        found = [_shape(text)]
    else:
        names = ", ".join(SHAPES)
        raise ValueError(f"got {text!r}, needs one of {names}, a shape as 8,64,32,32, or a file of them")
    if batch is not None:
        found = [(batch, *shape[1:]) for shape in found]
    for shape in found:
        if _values(shape) < 2:
            raise ValueError(f"got {written(shape)}, which has one value per channel: needs at least two")
    return found


def written(shape: Shape) -> str:
    """Return a shape as tables have it."""
    return "×".join(map(str, shape))


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a name
        return False


def _values(shape: Shape) -> int:
    product = 1
    for n in (shape[0], *shape[2:]):
        product *= n
    return product


def _shape(text: str) -> Shape:
    try:
        shape = tuple(int(part) for part in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(
            f"got {text!r}, needs two or more whole numbers, each at least 1, with commas between: 8,64,32,32"
        )
    return shape
