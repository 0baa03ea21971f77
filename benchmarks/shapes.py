"""The layers that batch norm is timed on: shapes of named models, in NCHW."""

RESNET50 = [
    (64, 112),
    (64, 56),
    (256, 56),
    (128, 56),
    (128, 28),
    (512, 28),
    (256, 28),
    (256, 14),
    (1024, 14),
    (512, 14),
    (512, 7),
    (2048, 7),
]
"""The 12 different batch-norm layers of ResNet-50 v1.5: channels, height = width."""

SMALL = [(8, 32, 8, 8), (1, 8, 4, 4)]
"""Where the call costs more than the work."""

DENSE = [(256, 512), (3136, 256)]


def resnet50(batch: int = 32) -> list[tuple[int, ...]]:
    """Return the shapes for a batch of that many images."""
    return [(batch, channels, size, size) for channels, size in RESNET50]
