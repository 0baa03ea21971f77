"""How a problem is cut into blocks: computed once per problem, from its shape and strides."""

from typing import NamedTuple

import numpy as np

from nbbn.cuda import target
from nbbn.cuda.call import Cut, Operand
from nbbn.geometry import Geometry, Layout

VECTOR_BYTES = 16  # of the widest access
THREADS = 256  # of a block
LANES = 32  # of them side by side in a tile of columns
BLOCKS = 2048  # about as many keep all of a large GPU busy
FINISHERS = (32, 256)  # threads that merge the parts of a channel, a part each
# The threads of a block that keeps a channel in shared memory, up to so many bytes of it.
RESIDENT_THREADS = ((8 << 10, 128), (64 << 10, 256), (1 << 62, 512))
RADIX = 8  # partial sums that one thread adds up


class Form(NamedTuple):
    """One way to go through the arrays."""

    threads: int  # of a block
    blocks: int
    cut: Cut
    shared: int = 0  # bytes that a block keeps of a channel

    @property
    def teams(self) -> int:
        """How many teams of several blocks there are."""
        return self.cut.teams if self.cut.team > 1 else 0


class Plan:
    """A problem, cut into blocks.

    Parameters
    ----------
    geometry : Geometry
        Of x; of x and out; or of x, grad_out and out.
    real : type
        numpy.float32 or numpy.float64.
    device : int
        The number of the device.
    """

    def __init__(self, geometry: Geometry, real: type, device: int) -> None:
        self.real = real
        self.device = device
        self.size = size = np.dtype(real).itemsize
        self.channels = geometry.channels
        self.outer = int(np.prod(geometry.sizes, dtype=np.int64))
        self.inner = geometry.inner
        layouts = geometry.layouts
        # Channels lie side by side, with nothing inside of them.
        side_by_side = geometry.inner == 1 and self.channels > 1
        self.columns = side_by_side and all(layout.channel == size for layout in layouts)
        self.width = self._width(geometry)
        self.unrolled = 4 if self.width > 1 else 8

        x, grad_out, out = layouts[0], layouts[len(layouts) // 2], layouts[-1]
        self._dims = dims = len(geometry.sizes)
        walk = [geometry.sizes, x.outer, grad_out.outer, out.outer]
        # Steps of one outer dimension need no table.
        self._walk = target.upload(np.array(walk, np.int64)) if dims > 1 else None
        at = 0 if self._walk is None else self._walk.address
        self._sizes = at
        self._layouts = [(layout, at + 8 * dims * k) for k, layout in enumerate((x, grad_out, out), start=1)]

        self.general = self._general()
        self.parts = self.general.cut.parts
        self.finishers = next(threads for threads in FINISHERS if threads >= self.parts)
        self.resident = None if self.columns else self._resident(max(1, len(layouts) - 1))
        # The memory that a call works in: barriers, partials, tables.
        blocks = self.parts * self.channels
        self.barriers = 0
        if self.resident is not None and self.resident.teams:
            self.barriers = self.resident.teams
            blocks = max(blocks, 2 * self.resident.blocks)
        self.partials = -(-4 * self.barriers // 16) * 16
        self.tables = self.partials + 8 * 4 * blocks
        self.nbytes = self.tables + 5 * self.size * self.channels

    def _width(self, geometry: Geometry) -> int:
        """Return how many elements a thread takes at once: those of 16 bytes, where they may lie so."""
        width = VECTOR_BYTES // self.size
        if (self.channels if self.columns else self.inner) % width:
            return 1
        for layout in geometry.layouts:
            steps = layout.outer if self.columns else (*layout.outer, layout.channel)
            together = self.columns or layout.inner == self.size
            if not together or any(step % VECTOR_BYTES for step in steps):
                return 1
        return width

    def _cut(self, part: int, parts: int, threads: int, team: int = 1, teams: int = 0) -> Cut:
        steps = divmod(threads * self.width, self.inner)
        return Cut(
            self.channels, self.inner, self.outer, self._dims, self._sizes, part, parts, *steps, team, teams
        )

    def _general(self) -> Form:
        """Several blocks a channel, or a tile of channels: as many as there is work for."""
        if self.columns:
            tiles = -(-self.channels // (LANES * self.width))
            chunk, amount = THREADS // LANES * self.unrolled, self.outer
        else:
            tiles = self.channels
            chunk, amount = THREADS * self.unrolled * self.width, self.outer * self.inner
        chunks = -(-amount // chunk)
        each = max(-(-chunks * tiles // BLOCKS), -(-chunks // FINISHERS[-1]))
        parts = -(-chunks // each)
        return Form(THREADS, tiles * parts, self._cut(each * chunk, parts, THREADS))

    def _resident(self, reads: int) -> Form | None:
        """A channel stays in shared memory, of one block or of a team; None where that does not pay."""
        device = target.properties(self.device)
        count = self.outer * self.inner
        room = device.shared - target.RESERVED
        least = -(-reads * count * self.size // room)  # blocks that hold a channel
        # Few channels need teams to keep the GPU busy, unless they are short.
        wanted = max(least, device.multiprocessors // self.channels if self.parts > 1 else 1)
        if wanted == 1:
            threads = next(threads for most, threads in RESIDENT_THREADS if count * self.size <= most)
            shared = reads * count * self.size
            return Form(threads, self.channels, self._cut(count, 1, threads, 1, self.channels), shared)
        threads = RESIDENT_THREADS[-1][1]
        if not device.cooperative or wanted > min(threads, device.multiprocessors):
            return None
        # One block of a team on a multiprocessor, so that all of them run at once.
        part = -(-count // wanted)
        part = -(-part // self.width) * self.width
        team = -(-count // part)
        shared = reads * part * self.size
        if team == 1 or shared > room:
            return None
        teams = min(self.channels, device.multiprocessors // team)
        return Form(threads, team * teams, self._cut(part, team, threads, team, teams), shared)

    def operands(self, x: int, grad_out: int, out: int) -> tuple[Operand, Operand, Operand]:
        """Return the arrays at these addresses, as the kernels see them."""
        first, second, third = (
            self._operand(layout, strides, address)
            for (layout, strides), address in zip(self._layouts, (x, grad_out, out), strict=True)
        )
        return first, second, third

    @staticmethod
    def _operand(layout: Layout, strides: int, address: int) -> Operand:
        return Operand(address + layout.offset, layout.channel, layout.inner, layout.outer[0], strides)

    def names(self, form: Form, aligned: bool) -> target.Names:
        """Return what a kernel is compiled for: see `nbbn.cuda.kernels`."""
        unrolled = 4 if form.shared else self.unrolled  # with more, these run out of registers
        return (
            ("real", self.real),
            ("KIND", np.dtype(self.real)),
            ("SIZE", self.size),
            ("WIDTH", self.width),
            ("UNROLLED", unrolled),
            ("VALUES", self.width * unrolled),
            ("EVEN", self._dims == 1),
            ("EXACT", self.size == 8),
            ("ALIGNED", aligned and self.width > 1),
            ("THREADS", form.threads),
            ("LANES", LANES),
            ("TEAMS", form.teams > 0),
            ("RADIX", RADIX),
        )
