"""The kernels: the stages of batch normalization, each cut into blocks by the shape alone.

A kernel is compiled for a type, a width of access and a number of threads, which take the place of the
names below (`nbbn.cuda.target.specialize`). Two ways through an array:

* *rows*: a block takes a part of one channel, its elements counted in the order of the walk; a thread
  takes every THREADS-th access of WIDTH elements of it.
* *columns*: channels lie side by side, with nothing inside of them. A block takes a tile of channels,
  LANES threads wide, and some outer steps.

Values are loaded into registers, UNROLLED accesses at a time, summed up, looked at again there with
their own mean, and merged into what the block knows. So no sum is taken around a guess, and memory is
read once for the statistics. All sums have a fixed order.
"""

import numpy as np
from numba import cuda, float64, int64, uint32, uint64

from nbbn.compiler import fma
from nbbn.cuda.target import (
    add_release,
    load,
    load_acquire,
    load_vector,
    part,
    store,
    store_vector,
)
from nbbn.formulas import (
    about_mean,
    gradient,
    gradient_parameters,
    inverse_deviation,
    mean_of,
    merge,
    normalized,
    power_of_two,
    running,
    shift_of,
    squared_deviation,
    two_sum,
    unbiased,
    variance,
)

# What a kernel is compiled for.
real = np.float32
KIND = np.dtype(real)
SIZE = 4  # bytes of an element
WIDTH = 4  # elements of an access: 1, or those of 16 bytes
ALIGNED = True  # whether those lie at multiples of 16 bytes; who takes what does not depend on it
UNROLLED = 4  # accesses of a thread whose values are in registers at once
VALUES = 16  # WIDTH · UNROLLED
EVEN = True  # whether there is one outer dimension, all steps of which are equal
EXACT = False  # whether sums of `real` in float64 must be compensated to be good to their last bit
THREADS = 256  # of a block
LANES = 32  # threads side by side in a tile of columns
TEAMS = False  # whether several blocks share a channel
RADIX = 8  # partial sums that one thread adds up; a power of two, as THREADS is

# --- where things are --------------------------------------------------------------------------------


@part
def divided(a, b):
    """Return the quotient and the remainder of two integers that are not negative."""
    quotient = int64(uint64(a) // uint64(b))  # unsigned: without the cases of Python's own
    return quotient, a - quotient * b


@part
def step_address(cut, operand, step):
    """Return the address of an outer step."""
    if EVEN:
        return operand.address + step * operand.outer
    at = operand.address
    for d in range(cut.dims - 1, -1, -1):
        step, index = divided(step, load(cut.sizes + 8 * d, np.int64))
        at += index * load(operand.strides + 8 * d, np.int64)
    return at


@part
def parameter(where, c, missing):
    """Return element `c` of a parameter of either float type, or `missing`."""
    if where.address == 0:
        return missing
    at = where.address + c * where.stride
    if where.size == 8:
        return load(at, np.float64)
    return float64(load(at, np.float32))


@part
def set_parameter(where, c, value):
    """Set element `c` of a parameter of either float type."""
    at = where.address + c * where.stride
    if where.size == 8:
        store(at, value)
    else:
        store(at, np.float32(value))


@part
def get(address, row, cut, c):
    """Return element [row, c] of float64[:, channels]."""
    return load(address + 8 * (row * cut.channels + c), np.float64)


@part
def put(address, row, cut, c, value):
    """Set element [row, c] of float64[:, channels]."""
    store(address + 8 * (row * cut.channels + c), value)


@part
def table(arrays, row, cut, c):
    """Return number `row` of what a channel's result is computed with."""
    return load(arrays.tables + SIZE * (row * cut.channels + c), real)


@part
def set_table(arrays, row, cut, c, value):
    """Set it."""
    store(arrays.tables + SIZE * (row * cut.channels + c), real(value))


@part
def partial(piece, row):
    """Return the row of the partials where a part leaves its number `row`."""
    return piece * 4 + row


@part
def begin(cut, first):
    """Return where a thread's walk over the elements of a channel begins: outer step and inner element."""
    return divided(first + cuda.threadIdx.x * WIDTH, cut.inner)


@part
def advance(cut, step, inner):
    """Return where the next access is."""
    step += cut.step_outer
    inner += cut.step_inner
    if inner >= cut.inner:
        return step + 1, inner - cut.inner
    return step, inner


@part
def advance_all(cut, step, inner):
    """Return where the accesses after the next UNROLLED begin."""
    for _ in range(UNROLLED):
        step, inner = advance(cut, step, inner)
    return step, inner


@part
def take(at, step, values, u):
    """Load the elements of one access, `step` bytes apart."""
    if ALIGNED:
        vector = load_vector(at, real)
        for k in range(WIDTH):
            values[u * WIDTH + k] = vector[k]
    else:
        for k in range(WIDTH):
            values[u * WIDTH + k] = load(at + k * step, real)


@part
def leave(at, step, values, u):
    """Store the elements of one access, `step` bytes apart."""
    if ALIGNED:
        store_vector(at, vector_of(values, u))
    else:
        for k in range(WIDTH):
            store(at + k * step, values[u * WIDTH + k])


@part
def fetch(cut, operand, c, step, inner, element, last, values):
    """Load what a thread has of the next elements of a channel into `values`, and zeros beyond `last`."""
    for u in range(UNROLLED):
        if element < last:
            at = step_address(cut, operand, step) + c * operand.channel + inner * operand.inner
            take(at, operand.inner, values, u)
        else:
            for k in range(WIDTH):
                values[u * WIDTH + k] = real(0)
        element += THREADS * WIDTH
        step, inner = advance(cut, step, inner)


@part
def vector_of(values, u):
    """Return the values of one access."""
    if WIDTH == 4:
        return values[4 * u], values[4 * u + 1], values[4 * u + 2], values[4 * u + 3]
    return values[2 * u], values[2 * u + 1]


@part
def write(cut, operand, c, step, inner, element, last, values):
    """Store what `fetch` would load."""
    for u in range(UNROLLED):
        if element < last:
            at = step_address(cut, operand, step) + c * operand.channel + inner * operand.inner
            leave(at, operand.inner, values, u)
        element += THREADS * WIDTH
        step, inner = advance(cut, step, inner)


# --- sums --------------------------------------------------------------------------------------------


@part
def plus(total, lost, x):
    """Return total + x, and what the sums lost."""
    total, more = two_sum(total, x)
    return total, lost + more


@part
def plus_some(total, lost, x):
    """The same for a few values: the sum of a few float32 is as good as exact in float64."""
    if EXACT:
        return plus(total, lost, x)
    return total + x, lost


@part
def plus_product(total, lost, a, b):
    """Return total + a · b for a few values, and what the sums lost."""
    product = a * b
    if EXACT:
        return plus(total, lost + fma(a, b, -product), product)
    return total + product, lost


@part
def block_sum(total, lost, high, low):
    """Return the sum over all threads of a block, to each of them, and what it lost.

    `high` and `low` are shared memory. Sums of RADIX, in a fixed order, until few are left, which every
    thread adds up.
    """
    t = cuda.threadIdx.x
    cuda.syncthreads()  # what was there before has been read
    high[t] = total
    low[t] = lost
    cuda.syncthreads()
    width = THREADS
    while width > RADIX:
        width //= RADIX
        if t < width:
            total, lost = high[t], low[t]
            for k in range(1, RADIX):
                total, lost = plus(total, lost + low[t + k * width], high[t + k * width])
            high[t] = total
            low[t] = lost
        cuda.syncthreads()
    total, lost = high[0], low[0]
    for k in range(1, width):
        total, lost = plus(total, lost + low[k], high[k])
    return total, lost


@part
def sum_of(values):
    """Return the sum of a thread's values, and what it lost."""
    total = lost = float64(0)
    for k in range(VALUES):
        total, lost = plus_some(total, lost, float64(values[k]))
    return total, lost


@part
def merged(count, mean, rest, m2, more, more_mean, more_rest, more_m2):
    """Pool two sets of statistics of which the first may be empty, and the second too."""
    if count == 0:
        return more, more_mean, more_rest, more_m2
    if more == 0:
        return count, mean, rest, m2
    mean, rest, m2 = merge(float64(count), mean, rest, m2, float64(more), more_mean, more_rest, more_m2)
    return count + more, mean, rest, m2


# --- statistics --------------------------------------------------------------------------------------


@part
def look(cut, operand, c, first, last, high, low):
    """Return count, mean, its rest, and m2 of the elements first … last - 1 of a channel."""
    values = cuda.local.array(VALUES, real)
    step, inner = begin(cut, first)
    count = int64(0)
    mean = float64(0)
    rest = float64(0)
    m2 = float64(0)
    for start in range(first, last, THREADS * VALUES):
        element = start + cuda.threadIdx.x * WIDTH
        more = min(int64(THREADS * VALUES), last - start)
        fetch(cut, operand, c, step, inner, element, last, values)
        total, lost = sum_of(values)
        total, lost = block_sum(total, lost, high, low)
        its_mean, its_rest = mean_of(total, lost, float64(more))
        total = lost = float64(0)
        for u in range(UNROLLED):
            if element < last:
                for k in range(WIDTH):
                    square = squared_deviation(float64(values[u * WIDTH + k]), its_mean)
                    total, lost = plus_some(total, lost, square)
            element += THREADS * WIDTH
            step, inner = advance(cut, step, inner)
        total, lost = block_sum(total, lost, high, low)
        its_m2 = about_mean(total + lost, its_rest, float64(more))
        count, mean, rest, m2 = merged(count, mean, rest, m2, more, its_mean, its_rest, its_m2)
    return count, mean, rest, m2


def collect_rows(arrays, cut):
    """Statistics of parts of channels into the partials. Blocks: channels × parts."""
    high = cuda.shared.array(THREADS, np.float64)
    low = cuda.shared.array(THREADS, np.float64)
    c, piece = divided(int64(cuda.blockIdx.x), cut.parts)
    first = piece * cut.part
    last = min(first + cut.part, cut.outer * cut.inner)
    _, mean, rest, m2 = look(cut, arrays.x, c, first, last, high, low)
    if cuda.threadIdx.x == 0:
        put_statistics(arrays, cut, piece, c, mean, rest, m2)


@part
def part_count(cut, piece):
    """Return how many values of a channel are in a part; of rows, or of columns, whose inner is 1."""
    return max(int64(0), min(cut.part, cut.outer * cut.inner - piece * cut.part))


@part
def statistics_of(cut, numbers, m2):
    """Return the variance of a channel, and what it is normalized with."""
    var = variance(m2, float64(cut.outer * cut.inner))
    return var, float64(inverse_deviation(var, numbers.eps))


@part
def put_results(arrays, cut, numbers, c, mean, var, invstd):
    """Leave a channel's statistics; update the running ones."""
    put(arrays.stats, 0, cut, c, mean)
    put(arrays.stats, 1, cut, c, var)
    put(arrays.stats, 2, cut, c, invstd)
    if arrays.mean.address != 0:
        old = parameter(arrays.mean, c, float64(0))
        set_parameter(arrays.mean, c, running(old, mean, numbers.momentum))
    if arrays.var.address != 0:
        old = parameter(arrays.var, c, float64(0))
        new = unbiased(var, float64(cut.outer * cut.inner), numbers.correction)
        set_parameter(arrays.var, c, running(old, new, numbers.momentum))


@part
def affine_of(arrays, c):
    """Return weight and bias of a channel.

    They may lie where the running statistics do: all threads have them before `put_results`.
    """
    return parameter(arrays.weight, c, float64(1)), parameter(arrays.bias, c, float64(0))


@part
def tables_of(affine, mean, rest, invstd):
    """Return what a channel is normalized with: mean, scale and shift."""
    weight, bias = affine
    scale = weight * invstd
    rounded = real(mean)
    lost = (mean - float64(rounded)) + rest
    shift = shift_of(bias, lost, scale)
    return rounded, real(scale), real(shift)


@part
def set_tables(arrays, cut, c, tables):
    """Leave it for `normalize`."""
    set_table(arrays, 0, cut, c, tables[0])
    set_table(arrays, 1, cut, c, tables[1])
    set_table(arrays, 2, cut, c, tables[2])


@part
def merge_parts(parts, counts, means, rests, m2s):
    """Merge the statistics of parts, in shared memory, into the first: as a tree, a thread for each pair."""
    t = cuda.threadIdx.x
    cuda.syncthreads()
    width = 1
    while width < parts:  # not known to the compiler, which would write out every step
        width *= 2
    while width > 1:
        width //= 2
        if t < width and t + width < parts:
            counts[t], means[t], rests[t], m2s[t] = merged(
                counts[t], means[t], rests[t], m2s[t],
                counts[t + width], means[t + width], rests[t + width], m2s[t + width],
            )  # fmt: skip
        cuda.syncthreads()


def finish_stats(arrays, cut, numbers):
    """Partials into mean, var, invstd, the tables and the running statistics. Blocks: channels."""
    counts = cuda.shared.array(THREADS, np.int64)
    means = cuda.shared.array(THREADS, np.float64)
    rests = cuda.shared.array(THREADS, np.float64)
    m2s = cuda.shared.array(THREADS, np.float64)
    t = int64(cuda.threadIdx.x)
    c = int64(cuda.blockIdx.x)
    if t < cut.parts:
        counts[t] = part_count(cut, t)
        means[t] = get(arrays.partials, partial(t, 0), cut, c)
        rests[t] = get(arrays.partials, partial(t, 1), cut, c)
        m2s[t] = get(arrays.partials, partial(t, 2), cut, c)
    merge_parts(cut.parts, counts, means, rests, m2s)
    if t == 0:
        var, invstd = statistics_of(cut, numbers, m2s[0])
        set_tables(arrays, cut, c, tables_of(affine_of(arrays, c), means[0], rests[0], invstd))
        put_results(arrays, cut, numbers, c, means[0], var, invstd)


def use_running_stats(arrays, cut, numbers):
    """The tables from the running statistics, for evaluation. Threads: channels."""
    c = int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if c < cut.channels:
        invstd = float64(inverse_deviation(parameter(arrays.var, c, float64(1)), numbers.eps))
        mean = parameter(arrays.mean, c, float64(0))
        set_tables(arrays, cut, c, tables_of(affine_of(arrays, c), mean, float64(0), invstd))


# --- normalization -----------------------------------------------------------------------------------


def normalize_rows(arrays, cut):
    """Blocks: channels × parts, the last first: what was read last is still in the cache."""
    values = cuda.local.array(VALUES, real)
    c, piece = divided(int64(cuda.gridDim.x) - 1 - int64(cuda.blockIdx.x), cut.parts)
    first = piece * cut.part
    last = min(first + cut.part, cut.outer * cut.inner)
    mean = table(arrays, 0, cut, c)
    scale = table(arrays, 1, cut, c)
    shift = table(arrays, 2, cut, c)
    step, inner = begin(cut, first)
    for start in range(first, last, THREADS * VALUES):
        element = start + cuda.threadIdx.x * WIDTH
        fetch(cut, arrays.x, c, step, inner, element, last, values)
        for k in range(VALUES):
            values[k] = normalized(values[k], mean, scale, shift)
        write(cut, arrays.out, c, step, inner, element, last, values)
        step, inner = advance_all(cut, step, inner)


# --- backward ----------------------------------------------------------------------------------------


@part
def products_of(values, others, mean, element, last):
    """Return Σ dy and Σ dy · (x - mean) of a thread's values, each with what it lost."""
    total = lost = product = product_lost = float64(0)
    for u in range(UNROLLED):
        if element < last:
            for k in range(WIDTH):
                dy = float64(values[u * WIDTH + k])
                deviation = float64(others[u * WIDTH + k]) - mean
                total, lost = plus_some(total, lost, dy)
                product, product_lost = plus_product(product, product_lost, dy, deviation)
        element += THREADS * WIDTH
    return total, lost, product, product_lost


@part
def multiply(cut, arrays, c, first, last, mean):
    """Return a thread's Σ dy and Σ dy · (x - mean) of a part of a channel, each with what it lost."""
    values = cuda.local.array(VALUES, real)
    others = cuda.local.array(VALUES, real)
    step, inner = begin(cut, first)
    total = lost = product = product_lost = float64(0)
    for start in range(first, last, THREADS * VALUES):
        element = start + cuda.threadIdx.x * WIDTH
        fetch(cut, arrays.grad_out, c, step, inner, element, last, values)
        fetch(cut, arrays.x, c, step, inner, element, last, others)
        more, more_lost, both, both_lost = products_of(values, others, mean, element, last)
        total, lost = plus(total, lost + more_lost, more)
        product, product_lost = plus(product, product_lost + both_lost, both)
        step, inner = advance_all(cut, step, inner)
    return total, lost, product, product_lost


@part
def put_sums(arrays, cut, piece, c, total, lost, product, product_lost):
    """Leave the sums of a part of a channel among the partials."""
    put(arrays.partials, partial(piece, 0), cut, c, total)
    put(arrays.partials, partial(piece, 1), cut, c, lost)
    put(arrays.partials, partial(piece, 2), cut, c, product)
    put(arrays.partials, partial(piece, 3), cut, c, product_lost)


@part
def put_statistics(arrays, cut, piece, c, mean, rest, m2):
    """Leave the statistics of a part of a channel among the partials."""
    put(arrays.partials, partial(piece, 0), cut, c, mean)
    put(arrays.partials, partial(piece, 1), cut, c, rest)
    put(arrays.partials, partial(piece, 2), cut, c, m2)


def reduce_rows(arrays, cut):
    """Σ dy and Σ dy · (x - mean) of parts of channels into the partials. Blocks: channels × parts."""
    high = cuda.shared.array(THREADS, np.float64)
    low = cuda.shared.array(THREADS, np.float64)
    c, piece = divided(int64(cuda.blockIdx.x), cut.parts)
    first = piece * cut.part
    last = min(first + cut.part, cut.outer * cut.inner)
    mean = parameter(arrays.mean, c, float64(0))
    total, lost, product, product_lost = multiply(cut, arrays, c, first, last, mean)
    total, lost = block_sum(total, lost, high, low)
    product, product_lost = block_sum(product, product_lost, high, low)
    if cuda.threadIdx.x == 0:
        put_sums(arrays, cut, piece, c, total, lost, product, product_lost)


@part
def gradients_of(arrays, cut, c, grad_bias, product):
    """Return grad_weight of a channel, and what its grad_x is computed with."""
    mean = parameter(arrays.mean, c, float64(0))
    invstd = parameter(arrays.var, c, float64(1))
    grad_weight = product * invstd
    scale = parameter(arrays.weight, c, float64(1)) * invstd
    rounded = real(mean)
    lost = mean - float64(rounded)
    unit = float64(power_of_two(invstd))
    slope, offset = gradient_parameters(
        scale, lost, grad_bias, grad_weight, invstd, unit, float64(cut.outer * cut.inner)
    )
    if arrays.training == 0:
        # The statistics are constants: grad_x = scale · dy, which is `normalize` of dy.
        rounded = real(0)
        slope = float64(0)
    return grad_weight, (rounded, real(scale), real(slope), real(offset), real(unit))


def finish_backward(arrays, cut):
    """Partials into grad_weight, grad_bias and the tables of grad_x. Blocks: channels."""
    high = cuda.shared.array(THREADS, np.float64)
    low = cuda.shared.array(THREADS, np.float64)
    t = int64(cuda.threadIdx.x)
    c = int64(cuda.blockIdx.x)
    total = lost = product = product_lost = float64(0)
    if t < cut.parts:
        total = get(arrays.partials, partial(t, 0), cut, c)
        lost = get(arrays.partials, partial(t, 1), cut, c)
        product = get(arrays.partials, partial(t, 2), cut, c)
        product_lost = get(arrays.partials, partial(t, 3), cut, c)
    total, lost = block_sum(total, lost, high, low)
    product, product_lost = block_sum(product, product_lost, high, low)
    if t == 0:
        grad_weight, tables = gradients_of(arrays, cut, c, total + lost, product + product_lost)
        put(arrays.stats, 0, cut, c, grad_weight)
        put(arrays.stats, 1, cut, c, total + lost)
        set_table(arrays, 0, cut, c, tables[0])
        set_table(arrays, 1, cut, c, tables[1])
        set_table(arrays, 2, cut, c, tables[2])
        set_table(arrays, 3, cut, c, tables[3])
        set_table(arrays, 4, cut, c, tables[4])


@part
def to_gradients(values, others, numbers):
    """Turn the values of dy, with those of x, into grad_x."""
    mean, scale, slope, offset, unit = numbers
    for k in range(VALUES):
        values[k] = gradient(values[k], others[k], mean, unit, scale, slope, offset)


@part
def gradient_tables(arrays, cut, c):
    """Return what grad_x of a channel is computed with."""
    return (
        table(arrays, 0, cut, c),
        table(arrays, 1, cut, c),
        table(arrays, 2, cut, c),
        table(arrays, 3, cut, c),
        table(arrays, 4, cut, c),
    )


def apply_rows(arrays, cut):
    """grad_x. Blocks: channels × parts, the last first."""
    values = cuda.local.array(VALUES, real)
    others = cuda.local.array(VALUES, real)
    c, piece = divided(int64(cuda.gridDim.x) - 1 - int64(cuda.blockIdx.x), cut.parts)
    first = piece * cut.part
    last = min(first + cut.part, cut.outer * cut.inner)
    numbers = gradient_tables(arrays, cut, c)
    step, inner = begin(cut, first)
    for start in range(first, last, THREADS * VALUES):
        element = start + cuda.threadIdx.x * WIDTH
        fetch(cut, arrays.grad_out, c, step, inner, element, last, values)
        fetch(cut, arrays.x, c, step, inner, element, last, others)
        to_gradients(values, others, numbers)
        write(cut, arrays.out, c, step, inner, element, last, values)
        step, inner = advance_all(cut, step, inner)


# --- resident: a channel stays in shared memory between its one reading and its writing --------------
#
# A team of blocks, of one or more, shares a channel: each block keeps a part of it, and learns from the
# others what theirs sum up to.


@part
def keep(kept, room, place, values):
    """Put a thread's values where no other thread looks: a plane of shared memory for each of them."""
    for u in range(UNROLLED):
        if place < room:
            for k in range(WIDTH):
                kept[k * room + place] = values[u * WIDTH + k]
        place += THREADS


@part
def kept_values(kept, room, place, values):
    """Get them back."""
    for u in range(UNROLLED):
        if place < room:
            for k in range(WIDTH):
                values[u * WIDTH + k] = kept[k * room + place]
        place += THREADS


@part
def team_barrier(arrays, cut, team, rank):
    """Wait until all blocks of a team have come here; what each wrote before, all can read after.

    The word's top bit is turned over when the last one comes, and its other bits are 0 again then. All
    blocks of the launch run at once: it is a cooperative one.
    """
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        word = arrays.barriers + 4 * team
        step = uint32(1)
        if rank == 0:
            step = uint32(uint32(0x80000001) - uint32(cut.team))
        before = add_release(word, step)
        while (load_acquire(word) ^ before) & uint32(0x80000000) == uint32(0):
            pass
    cuda.syncthreads()


@part
def place_of(arrays, cut, turn, team, rank):
    """Return the address of four numbers that a block of a team leaves for the others; turns alternate."""
    return arrays.partials + 32 * ((turn % 2 * cut.teams + team) * cut.team + rank)


@part
def tell(arrays, cut, turn, team, rank, numbers):
    """Leave what a block knows to its team, and wait until all have done so."""
    if cuda.threadIdx.x == 0:
        at = place_of(arrays, cut, turn, team, rank)
        store(at, numbers[0])
        store(at + 8, numbers[1])
        store(at + 16, numbers[2])
        store(at + 24, numbers[3])
    team_barrier(arrays, cut, team, rank)


@part
def told(arrays, cut, turn, team, rank):
    """Return what a block of the team has left."""
    at = place_of(arrays, cut, turn, team, rank)
    return (
        load(at, np.float64),
        load(at + 8, np.float64),
        load(at + 16, np.float64),
        load(at + 24, np.float64),
    )


def forward_rows(arrays, cut, numbers):
    """Training forward. Blocks: teams, each of which takes every `teams`-th channel, a part each."""
    kept = cuda.shared.array(0, KIND)
    high = cuda.shared.array(THREADS, np.float64)
    low = cuda.shared.array(THREADS, np.float64)
    counts = cuda.shared.array(THREADS, np.int64)
    m2s = cuda.shared.array(THREADS, np.float64)
    values = cuda.local.array(VALUES, real)
    t = int64(cuda.threadIdx.x)
    team, rank = divided(int64(cuda.blockIdx.x), cut.team)
    first = rank * cut.part
    last = min(first + cut.part, cut.outer * cut.inner)
    room = (last - first) // WIDTH  # accesses
    turn = int64(0)
    for c in range(team, cut.channels, cut.teams):
        step, inner = begin(cut, first)
        total = lost = float64(0)
        for start in range(first, last, THREADS * VALUES):
            fetch(cut, arrays.x, c, step, inner, start + t * WIDTH, last, values)
            keep(kept, room, (start - first) // WIDTH + t, values)
            more, more_lost = sum_of(values)
            total, lost = plus(total, lost + more_lost, more)
            step, inner = advance_all(cut, step, inner)
        total, lost = block_sum(total, lost, high, low)
        mean, rest = mean_of(total, lost, float64(last - first))
        total = lost = float64(0)
        for place in range(t, room, int64(cuda.blockDim.x)):
            for k in range(WIDTH):
                square = squared_deviation(float64(kept[k * room + place]), mean)
                total, lost = plus_some(total, lost, square)
        affine = affine_of(arrays, c)
        total, lost = block_sum(total, lost, high, low)
        m2 = about_mean(total + lost, rest, float64(last - first))
        if TEAMS:
            tell(arrays, cut, turn, team, rank, (mean, rest, m2, float64(0)))
            if t < cut.team:
                counts[t] = part_count(cut, t)
                high[t], low[t], m2s[t], _ = told(arrays, cut, turn, team, t)
            merge_parts(cut.team, counts, high, low, m2s)
            mean, rest, m2 = high[0], low[0], m2s[0]
        var, invstd = statistics_of(cut, numbers, m2)
        rounded, scale, shift = tables_of(affine, mean, rest, invstd)
        if rank == 0 and t == 0:
            put_results(arrays, cut, numbers, c, mean, var, invstd)
        step, inner = begin(cut, first)
        for start in range(first, last, THREADS * VALUES):
            kept_values(kept, room, (start - first) // WIDTH + t, values)
            for k in range(VALUES):
                values[k] = normalized(values[k], rounded, scale, shift)
            write(cut, arrays.out, c, step, inner, start + t * WIDTH, last, values)
            step, inner = advance_all(cut, step, inner)
        turn += 1


def backward_rows(arrays, cut):
    """Training backward. Blocks: as in `forward_rows`; x and dy stay in shared memory."""
    kept = cuda.shared.array(0, KIND)
    high = cuda.shared.array(THREADS, np.float64)
    low = cuda.shared.array(THREADS, np.float64)
    values = cuda.local.array(VALUES, real)
    others = cuda.local.array(VALUES, real)
    t = int64(cuda.threadIdx.x)
    team, rank = divided(int64(cuda.blockIdx.x), cut.team)
    first = rank * cut.part
    last = min(first + cut.part, cut.outer * cut.inner)
    room = (last - first) // WIDTH  # accesses
    turn = int64(0)
    for c in range(team, cut.channels, cut.teams):
        mean = parameter(arrays.mean, c, float64(0))
        step, inner = begin(cut, first)
        total = lost = product = product_lost = float64(0)
        for start in range(first, last, THREADS * VALUES):
            element = start + t * WIDTH
            fetch(cut, arrays.grad_out, c, step, inner, element, last, values)
            fetch(cut, arrays.x, c, step, inner, element, last, others)
            keep(kept, room, (start - first) // WIDTH + t, values)
            keep(kept[last - first :], room, (start - first) // WIDTH + t, others)
            more, more_lost, both, both_lost = products_of(values, others, mean, element, last)
            total, lost = plus(total, lost + more_lost, more)
            product, product_lost = plus(product, product_lost + both_lost, both)
            step, inner = advance_all(cut, step, inner)
        total, lost = block_sum(total, lost, high, low)
        product, product_lost = block_sum(product, product_lost, high, low)
        if TEAMS:
            tell(arrays, cut, turn, team, rank, (total, lost, product, product_lost))
            total = lost = product = product_lost = float64(0)
            if t < cut.team:
                total, lost, product, product_lost = told(arrays, cut, turn, team, t)
            total, lost = block_sum(total, lost, high, low)
            product, product_lost = block_sum(product, product_lost, high, low)
        grad_weight, numbers = gradients_of(arrays, cut, c, total + lost, product + product_lost)
        if rank == 0 and t == 0:
            put(arrays.stats, 0, cut, c, grad_weight)
            put(arrays.stats, 1, cut, c, total + lost)
        step, inner = begin(cut, first)
        for start in range(first, last, THREADS * VALUES):
            kept_values(kept, room, (start - first) // WIDTH + t, values)
            kept_values(kept[last - first :], room, (start - first) // WIDTH + t, others)
            to_gradients(values, others, numbers)
            write(cut, arrays.out, c, step, inner, start + t * WIDTH, last, values)
            step, inner = advance_all(cut, step, inner)
        turn += 1


# --- columns: channels lie side by side --------------------------------------------------------------


@part
def tile_column(cut):
    """Return a thread's first channel: blocks go over the parts of one tile after the other."""
    tile, _ = divided(int64(cuda.blockIdx.x), cut.parts)
    return (tile * LANES + cuda.threadIdx.x % LANES) * WIDTH


@part
def fetch_columns(cut, operand, c, step, last, values):
    """Load what a thread has of the next outer steps into `values`, and zeros beyond `last`."""
    for u in range(UNROLLED):
        if step < last and c < cut.channels:
            at = step_address(cut, operand, step) + c * SIZE
            take(at, SIZE, values, u)
        else:
            for k in range(WIDTH):
                values[u * WIDTH + k] = real(0)
        step += THREADS // LANES


@part
def write_columns(cut, operand, c, step, last, values):
    """Store what `fetch_columns` would load."""
    for u in range(UNROLLED):
        if step < last and c < cut.channels:
            at = step_address(cut, operand, step) + c * SIZE
            leave(at, SIZE, values, u)
        step += THREADS // LANES


@part
def column_sum(total, lost, high, low):
    """Return the sum over all threads of a column, to each of them, and what it lost."""
    t = cuda.threadIdx.x
    cuda.syncthreads()  # what was there before has been read
    high[t] = total
    low[t] = lost
    cuda.syncthreads()
    lane = t % LANES
    total, lost = high[lane], low[lane]
    for k in range(LANES, THREADS, LANES):
        total, lost = plus(total, lost + low[lane + k], high[lane + k])
    return total, lost


@part
def piece_of(cut):
    """Return which part of its tile a block takes."""
    return divided(int64(cuda.blockIdx.x), cut.parts)[1]


@part
def step_of(cut):
    """Return the first outer step of a thread, and that after the last of its block."""
    first = piece_of(cut) * cut.part
    return first + cuda.threadIdx.x // LANES, min(first + cut.part, cut.outer)


def collect_columns(arrays, cut):
    """Statistics of parts of tiles of channels into the partials. Blocks: tiles × parts."""
    high = cuda.shared.array(THREADS, np.float64)
    low = cuda.shared.array(THREADS, np.float64)
    values = cuda.local.array(VALUES, real)
    mean = cuda.local.array(WIDTH, np.float64)
    rest = cuda.local.array(WIDTH, np.float64)
    m2 = cuda.local.array(WIDTH, np.float64)
    c = tile_column(cut)
    mine, last = step_of(cut)
    first = mine - cuda.threadIdx.x // LANES
    count = int64(0)
    for k in range(WIDTH):
        mean[k] = 0.0
        rest[k] = 0.0
        m2[k] = 0.0
    for start in range(first, last, THREADS // LANES * UNROLLED):
        more = min(int64(THREADS // LANES * UNROLLED), last - start)
        step = start + cuda.threadIdx.x // LANES
        fetch_columns(cut, arrays.x, c, step, last, values)
        for k in range(WIDTH):
            total = lost = float64(0)
            for u in range(UNROLLED):
                total, lost = plus_some(total, lost, float64(values[u * WIDTH + k]))
            total, lost = column_sum(total, lost, high, low)
            its_mean, its_rest = mean_of(total, lost, float64(more))
            total = lost = float64(0)
            for u in range(UNROLLED):
                if step + u * (THREADS // LANES) < last:
                    square = squared_deviation(float64(values[u * WIDTH + k]), its_mean)
                    total, lost = plus_some(total, lost, square)
            total, lost = column_sum(total, lost, high, low)
            its_m2 = about_mean(total + lost, its_rest, float64(more))
            _, mean[k], rest[k], m2[k] = merged(
                count, mean[k], rest[k], m2[k], more, its_mean, its_rest, its_m2
            )
        count += more
    if cuda.threadIdx.x < LANES and c < cut.channels:
        piece = piece_of(cut)
        for k in range(WIDTH):
            put_statistics(arrays, cut, piece, c + k, mean[k], rest[k], m2[k])


@part
def column_table(arrays, row, cut, c, numbers):
    """Load number `row` of what the results of a thread's channels are computed with."""
    for k in range(WIDTH):
        numbers[k] = table(arrays, row, cut, c + k) if c < cut.channels else real(0)


def normalize_columns(arrays, cut):
    """Blocks: tiles × parts."""
    values = cuda.local.array(VALUES, real)
    means = cuda.local.array(WIDTH, real)
    scales = cuda.local.array(WIDTH, real)
    shifts = cuda.local.array(WIDTH, real)
    c = tile_column(cut)
    mine, last = step_of(cut)
    column_table(arrays, 0, cut, c, means)
    column_table(arrays, 1, cut, c, scales)
    column_table(arrays, 2, cut, c, shifts)
    for step in range(mine, last, THREADS // LANES * UNROLLED):
        fetch_columns(cut, arrays.x, c, step, last, values)
        for u in range(UNROLLED):
            for k in range(WIDTH):
                j = u * WIDTH + k
                values[j] = normalized(values[j], means[k], scales[k], shifts[k])
        write_columns(cut, arrays.out, c, step, last, values)


def reduce_columns(arrays, cut):
    """Σ dy and Σ dy · (x - mean) of parts of tiles into the partials. Blocks: tiles × parts."""
    high = cuda.shared.array(THREADS, np.float64)
    low = cuda.shared.array(THREADS, np.float64)
    values = cuda.local.array(VALUES, real)
    others = cuda.local.array(VALUES, real)
    means = cuda.local.array(WIDTH, np.float64)
    totals = cuda.local.array(WIDTH, np.float64)
    losses = cuda.local.array(WIDTH, np.float64)
    products = cuda.local.array(WIDTH, np.float64)
    products_lost = cuda.local.array(WIDTH, np.float64)
    c = tile_column(cut)
    mine, last = step_of(cut)
    for k in range(WIDTH):
        means[k] = parameter(arrays.mean, c + k, float64(0)) if c < cut.channels else float64(0)
        totals[k] = 0.0
        losses[k] = 0.0
        products[k] = 0.0
        products_lost[k] = 0.0
    for step in range(mine, last, THREADS // LANES * UNROLLED):
        fetch_columns(cut, arrays.grad_out, c, step, last, values)
        fetch_columns(cut, arrays.x, c, step, last, others)
        for k in range(WIDTH):
            total = lost = product = product_lost = float64(0)
            for u in range(UNROLLED):
                if step + u * (THREADS // LANES) < last:
                    dy = float64(values[u * WIDTH + k])
                    deviation = float64(others[u * WIDTH + k]) - means[k]
                    total, lost = plus_some(total, lost, dy)
                    product, product_lost = plus_product(product, product_lost, dy, deviation)
            totals[k], losses[k] = plus(totals[k], losses[k] + lost, total)
            products[k], products_lost[k] = plus(products[k], products_lost[k] + product_lost, product)
    piece = piece_of(cut)
    for k in range(WIDTH):
        total, lost = column_sum(totals[k], losses[k], high, low)
        product, product_lost = column_sum(products[k], products_lost[k], high, low)
        if cuda.threadIdx.x < LANES and c < cut.channels:
            put_sums(arrays, cut, piece, c + k, total, lost, product, product_lost)


def apply_columns(arrays, cut):
    """grad_x. Blocks: tiles × parts."""
    values = cuda.local.array(VALUES, real)
    others = cuda.local.array(VALUES, real)
    means = cuda.local.array(WIDTH, real)
    scales = cuda.local.array(WIDTH, real)
    slopes = cuda.local.array(WIDTH, real)
    offsets = cuda.local.array(WIDTH, real)
    units = cuda.local.array(WIDTH, real)
    c = tile_column(cut)
    mine, last = step_of(cut)
    column_table(arrays, 0, cut, c, means)
    column_table(arrays, 1, cut, c, scales)
    column_table(arrays, 2, cut, c, slopes)
    column_table(arrays, 3, cut, c, offsets)
    column_table(arrays, 4, cut, c, units)
    for step in range(mine, last, THREADS // LANES * UNROLLED):
        fetch_columns(cut, arrays.grad_out, c, step, last, values)
        fetch_columns(cut, arrays.x, c, step, last, others)
        for u in range(UNROLLED):
            for k in range(WIDTH):
                j = u * WIDTH + k
                values[j] = gradient(
                    values[j], others[j], means[k], units[k], scales[k], slopes[k], offsets[k]
                )
        write_columns(cut, arrays.out, c, step, last, values)
