"""The one exception of nbbn's own; everything else is ValueError, TypeError or MemoryError."""


class DeviceError(RuntimeError):
    """Arrays lie on different devices, or the device asked for is not to be had."""
