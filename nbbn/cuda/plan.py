"""How a problem is cut into blocks: computed once per problem, from its shape and strides."""

from typing import NamedTuple

import numpy as np

from nbbn import problem
from nbbn.cuda import target
from nbbn.cuda.call import Cut, FormCut, Operand, Parameter
from nbbn.dtypes import BFLOAT16, FLOAT32, STORAGES, Storage
from nbbn.geometry import Geometry, Layout

VECTOR_BYTES = 16  # of the widest access
THREADS = 256  # of a block
LANES = 32  # of them side by side in a tile of columns, at most
BLOCKS = 2048  # about as many keep all of a large GPU busy
WARP = 32  # threads, the fewest of a block
FINISHERS = (1, 8, 32, 256)  # threads that merge the parts of a channel
# The threads of a block that keeps channels in shared memory, up to so many bytes of it.
RESIDENT_THREADS = ((8 << 10, 128), (64 << 10, 256), (1 << 62, 512))
ACCESSES = 4  # to a channel for which a thread is worth while
TILE_BYTES = 64  # of an outer step that a block reads at least where it keeps a tile of columns
TEAM_BYTES = 32 << 10  # of an array that a block of a team has at least, where fewer could keep it
RADIX = 8  # partial sums that one thread adds up


def power_above(number: int) -> int:
    """Return the smallest power of two that is not less."""
    return 1 << (max(1, number) - 1).bit_length()


class Grid(NamedTuple):
    """One way to go through the arrays."""

    threads: int  # of a block
    lanes: int  # of threads, in a block
    columns: bool  # whether the threads of different lanes lie side by side, rather than those of one
    own: int  # channels of a thread
    blocks: int
    cut: Cut
    reads: int = 0  # arrays that stay in shared memory
    shared: int = 0  # bytes of it that they take in a block

    @property
    def teams(self) -> int:
        """How many teams of several blocks there are."""
        return self.cut.teams if self.cut.team > 1 else 0


class Plan:
    """A problem, cut into blocks.

    Parameters
    ----------
    geometry : Geometry
        Of the arrays that a problem has, without a mask: see `nbbn.problem.Problem`.
    storage : Storage
        Of the arrays' elements.
    device : int
        The number of the device.
    form : nbbn.problem.Form
        What is normalized together.
    across : bool
        The problem is to sum up over the steps for the parameters of a form that has them along the elements:
        these are the channels here, and each step has statistics.
    """

    def __init__(
        self,
        geometry: Geometry,
        storage: Storage,
        device: int,
        form: problem.Form = problem.BATCH,
        across: bool = False,
    ) -> None:
        self.storage = storage
        self._across = across
        # Parameters of channels: fewer than these where several channels have the same.
        self.parameters = form.period or geometry.channels
        if self.parameters == geometry.channels:
            form = form._replace(period=0)
        self.form = form
        self.device = device
        self.size = size = storage.dtype.itemsize
        # A result that is stored in 16 bits is computed in float64: it is right then where terms cancel.
        self.real = np.dtype(np.float64 if size == 2 else storage.real)
        self.channels = geometry.channels
        self.outer = geometry.steps
        self.inner = geometry.inner
        layouts = geometry.layouts
        # Channels lie side by side, with nothing inside of them.
        side_by_side = geometry.inner == 1 and self.channels > 1
        self.columns = side_by_side and all(layout.channel == size for layout in layouts)
        self.width = self._width(geometry)
        self.access = self.width * size  # bytes
        # As many accesses at once as there are registers for.
        self.unrolled = (6 if size == 2 else 8, 4, 4, 2)[self.width.bit_length() - 1]

        self._dims = dims = len(geometry.sizes)
        walk = [geometry.sizes, *(layout.outer for layout in layouts)]
        # Steps of one outer dimension need no table.
        self._walk = target.upload(np.array(walk, np.int64)) if dims > 1 else None
        at = 0 if self._walk is None else self._walk.address
        self._sizes = at
        self._layouts = [(layout, at + 8 * dims * k) for k, layout in enumerate(layouts, start=1)]

        self.own = self.width if self.columns else 1
        self.along = self.width // self.own  # elements of an access that are of one channel
        self.general = self._general()
        self.pools = self.channels // form.pool
        self.finish = self._finish()
        self.resident = None
        if form.pool == 1 and not across:
            backward = len(layouts) == (5 if form.residual else 3)
            self.resident = self._resident(2 if backward else 1)
        # Where channels share parameters or statistics, the gradients of parameters are summed up apart.
        self.shares = form.pool > 1 or form.period > 0
        kept = self.shares and self.resident is not None
        self.gradients = self._gradients(1 if kept else self.general.cut.parts)
        # The memory that a call works in: barriers, partials, tables.
        partials = self.general.cut.parts * self.channels
        self.barriers = 0
        if self.resident is not None and self.resident.teams:
            self.barriers = self.resident.teams
            partials = max(partials, 2 * self.resident.blocks * self.resident.lanes * self.own)
        self.partials = -(-4 * self.barriers // 16) * 16
        self.tables = self.partials + 8 * 4 * partials
        self.sums = self.tables + 5 * self.real.itemsize * self.channels
        self.nbytes = self.sums + 8 * 4 * self.channels * kept

    def _width(self, geometry: Geometry) -> int:
        """Return how many elements a thread takes at once: those of 16 bytes, where they may lie so.

        Or else 4 of 16 bits; of columns no more than 4, each of which takes registers for its sums.
        """
        widest = VECTOR_BYTES // self.size
        for width in (4,) if widest == 8 and self.columns else (8, 4) if widest == 8 else (widest,):
            if self._divides(width, geometry):
                return width
        return 1

    def _divides(self, width: int, geometry: Geometry) -> bool:
        """Whether all accesses can be of so many elements, at multiples of the bytes that they take."""
        if (self.channels if self.columns else self.inner) % width:
            return False
        for layout in geometry.layouts:
            steps = layout.outer if self.columns else (*layout.outer, layout.channel)
            together = self.columns or layout.inner == self.size
            if not together or any(step % (width * self.size) for step in steps):
                return False
        return True

    def _grid(
        self, threads: int, lanes: int, part: int, parts: int, reads: int = 0, team: int = 1, teams: int = 0
    ) -> Grid:
        """Return a grid whose blocks take `part` elements of each channel of a tile, and keep them or not."""
        steps = divmod(threads // lanes * self.along, self.inner)
        tiles = self._tiles(lanes)
        cut = Cut(
            self.channels, self.inner, self.outer, self._dims, self._sizes, part, parts, *steps, team,
            teams or tiles,
        )  # fmt: skip
        if self.form.alone != problem.BATCH or self._across:
            cut = FormCut(*cut, self.form.pool, self.parameters)
        shared = self._room(reads, threads) * -(-part // (threads // lanes * self.along))
        return Grid(threads, lanes, self.columns, self.own, team * teams or tiles * parts, cut, reads, shared)

    def _room(self, reads: int, threads: int) -> int:
        """Return how many bytes of shared memory it takes to keep an access of every thread."""
        return reads * threads * self.width * self.size

    def _capacity(self, reads: int, threads: int, lanes: int) -> int:
        """Return how many elements of each channel of a tile a block can keep."""
        # Beside that: 4 or 2 numbers of 8 bytes a thread, one of these and 5 others a channel, and gaps.
        other = (4, 2)[reads - 1] * 8 * threads + (8 + 5 * self.real.itemsize) * lanes * self.own + 64
        room = target.properties(self.device).shared - other
        return room // self._room(reads, threads) * (threads // lanes) * self.along

    def _tiles(self, lanes: int) -> int:
        return -(-self.channels // (lanes * self.own))

    def _lanes(self, threads: int, members: int) -> int:
        """Return how many lanes a block has: of channels that lie side by side, or of `members` threads."""
        if self.columns:
            return min(LANES, threads, power_above(-(-self.channels // self.own)))
        return min(threads // min(threads, members), power_above(self.channels))

    def _general(self) -> Grid:
        """Several blocks a tile of channels: as many as there is work for."""
        amount = self.outer * self.inner
        lanes = self._lanes(THREADS, self._useful(amount))
        chunk = THREADS // lanes * self.along * self.unrolled
        chunks = -(-amount // chunk)
        each = max(-(-chunks * self._tiles(lanes) // BLOCKS), -(-chunks // FINISHERS[-1]))
        return self._grid(THREADS, lanes, each * chunk, -(-chunks // each))

    def _finish(self) -> Grid:
        """The parts of each channel, or of a pool of them, are pooled."""
        return self._finishing(self.pools, self.general.cut.parts * self.form.pool)

    def _finishing(self, count: int, parts: int) -> Grid:
        """Each of `count` has a thread for each of its parts, while there are threads."""
        members = next((threads for threads in FINISHERS if threads >= parts), FINISHERS[-1])
        threads = max(WARP, members)
        lanes = threads // members
        blocks = -(-count // lanes)
        return self.general._replace(threads=threads, lanes=lanes, columns=True, own=1, blocks=blocks)

    def _gradients(self, parts: int) -> Grid:
        """The parts of all channels that have a parameter are pooled likewise."""
        grid = self._finishing(self.parameters, parts * (self.channels // self.parameters))
        return grid._replace(cut=grid.cut._replace(parts=parts))

    def _resident_lanes(self, reads: int, count: int) -> int:
        """Return how many lanes a block has that keeps `count` elements of each of its channels."""
        most = target.properties(self.device).multiprocessors
        if self.columns:
            # As wide as leaves every multiprocessor a tile that it can keep.
            lanes = self._lanes(LANES, 1)
            while lanes * self.own * self.size > TILE_BYTES and (
                self._tiles(lanes) < most or self._capacity(reads, RESIDENT_THREADS[-1][1], lanes) < count
            ):
                lanes //= 2
            return lanes
        threads = RESIDENT_THREADS[0][1]
        members = self._useful(count)
        if members > threads:
            return 1
        # A short channel has a warp where there are more channels than as many threads as run at once.
        if members * self.channels > target.RESIDENT * most:
            members = min(members, WARP)
        return self._lanes(threads, members)

    def _useful(self, count: int) -> int:
        """Return how many threads it is worth while to give to so many elements of a channel."""
        return power_above(-(-count // (self.along * ACCESSES)))

    def _resident(self, reads: int) -> Grid | None:
        """Channels stay in shared memory, of one block or of a team; None where they do not fit."""
        device = target.properties(self.device)
        count = self.outer * self.inner
        lanes = self._resident_lanes(reads, count)
        tiles = self._tiles(lanes)
        nbytes = count * lanes * self.own * self.size  # of a tile of one array
        threads = RESIDENT_THREADS[-1][1]
        least = -(-count // max(1, self._capacity(reads, threads, lanes)))  # blocks that hold a tile
        if least > device.multiprocessors:
            return None
        # As many rounds as the fewest blocks a tile take, and then as many blocks as there are for it.
        rounds = -(-tiles // (device.multiprocessors // least))
        teams = -(-tiles // rounds)
        team = max(least, min(device.multiprocessors // teams, nbytes // TEAM_BYTES))
        if team == 1:
            threads = next(threads for most, threads in RESIDENT_THREADS if nbytes <= most)
            threads = max(WARP, lanes * self.own, min(threads, lanes * self._useful(count)))
            grid = self._grid(threads, lanes, count, 1, reads)
            return grid if self._capacity(reads, threads, lanes) >= count else None
        if not device.cooperative:
            return None
        # One block of a team on a multiprocessor, so that all of them run at once.
        part = -(-count // team)
        part = -(-part // self.along) * self.along
        grid = self._grid(threads, lanes, part, 1, reads, -(-count // part), teams)
        return grid if grid.cut.team > 1 else None

    def operands(self, *addresses: int) -> list[Operand]:
        """Return the problem's arrays, which are at these addresses, as the kernels see them."""
        return [
            self._operand(layout, strides, address)
            for (layout, strides), address in zip(self._layouts, addresses, strict=True)
        ]

    @staticmethod
    def _operand(layout: Layout, strides: int, address: int) -> Operand:
        return Operand(address + layout.offset, layout.channel, layout.inner, layout.outer[0], strides)

    def _unrolled(self, grid: Grid) -> int:
        """Return how many accesses to an array a thread has under way: with more, registers run out."""
        if grid.reads == 0:
            return self.unrolled
        if self.width == 8:
            return 3 - grid.reads
        if grid.reads == 1:
            return 4 - (grid.teams > 0) * (1 + self.form.masked)
        return 2 if self.width > 1 else 4

    def names(self, grid: Grid, aligned: bool) -> target.Names:
        """Return what a kernel is compiled for: see `nbbn.cuda.kernels`."""
        unrolled = self._unrolled(grid)
        variant = (
            ("POOLED", self.form.pool > 1),
            ("PERIODIC", self.form.period > 0),
            ("CENTERED", self.form.centered),
            ("ELEMENTWISE", self.form.along),
            ("ACROSS", self._across),
            ("MASKED", self.form.masked),
        )
        members, along = grid.threads // grid.lanes, self.width // grid.own
        tile = grid.lanes * grid.own
        return (
            ("stored", np.uint16 if self.storage is BFLOAT16 else self.storage.dtype.type),
            ("STORED", np.dtype(np.uint16) if self.size == 2 else self.storage.dtype),
            ("SIZE", self.size),
            ("held", self.storage.real),
            ("real", self.real.type),
            ("REAL", self.real),
            ("REAL_SIZE", self.real.itemsize),
            ("WIDTH", self.width),
            ("UNROLLED", unrolled),
            ("VALUES", self.width * unrolled),
            ("EVEN", self._dims == 1),
            ("EXACT", self.size == 8),
            ("ALIGNED", aligned and self.width > 1),
            ("THREADS", grid.threads),
            ("COLUMNS", grid.columns),
            ("LANES", grid.lanes),
            ("MEMBERS", members),
            ("OWN", grid.own),
            ("ALONG", along),
            ("TILE", tile),
            ("WORKERS", grid.threads // tile),
            ("PITCH", tile if grid.columns else 1),
            ("OWN_TABLES", 5 * grid.own),
            ("TILE_TABLES", 5 * tile),
            ("READS", grid.reads),
            ("TEAMS", grid.teams > 0),
            ("RADIX", RADIX),
            *variant,
        )

    def affine_names(self, weight: Parameter, bias: Parameter) -> target.Names:
        """Return how a kernel reads the parameters of elements: as vectors where they lie so."""
        codes = {one.code for one in (weight, bias) if one.address} or {FLOAT32.code}
        storage = next(storage for storage in STORAGES if storage.code in codes)
        size = storage.dtype.itemsize
        together = min(self.along, VECTOR_BYTES // size)
        for one in (weight, bias):
            if one.address and (one.stride != size or one.address % (together * size)):
                together = 1
        return (
            ("TOGETHER", together if len(codes) == 1 else 0),
            ("of_parameters", np.uint16 if storage is BFLOAT16 else storage.dtype.type),
            ("PARAMETER_SIZE", size),
        )

    def fused_names(self, grid: Grid) -> target.Names:
        """Return what a kernel does beside batch norm."""
        # Kept in 16 bits, the gradient at the argument would be rounded.
        kept = grid.reads > 0 and self.size > 2
        return (
            ("ACTIVATION", self.form.activation),
            ("RESIDUAL", self.form.residual),
            ("AGAIN", self.form.through and not kept),
        )
