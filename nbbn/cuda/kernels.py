"""The kernels: the stages of batch normalization, each cut into blocks by the shape alone.

A kernel is compiled for a type, a width of access and a number of threads, which take the place of the
names below (`nbbn.cuda.target.specialize`). A block takes a tile of channels, and of each a part. Two
ways through an array:

* *rows*: a lane of MEMBERS threads has one channel, whose elements are counted in the order of the walk;
  a thread takes every MEMBERS-th access of WIDTH elements of it.
* *columns*: channels lie side by side, with nothing inside of them. LANES threads side by side have WIDTH
  channels each, and one outer step; a thread takes every MEMBERS-th step.

Values are loaded into registers, UNROLLED accesses at a time, summed up, looked at again there with
their own mean, and merged into what the block knows. So no sum is taken around a guess, and memory is
read once for the statistics. All sums have a fixed order.

The other normalizations (`nbbn.problem.Form`) are the same stages. What differs from batch normalization is
which parameters a channel has, how many channels are finished together, and whether each element has
parameters of its own.
"""

import numpy as np
from numba import cuda, float64, int32, int64, uint32, uint64

from nbbn.compiler import fma
from nbbn.cuda.target import (
    add_release,
    carried,
    load,
    load_acquire,
    load_vector,
    part,
    rounded,
    store,
    store_vector,
    unrounded,
    widened,
)
from nbbn.formulas import (
    LARGEST_UNIT32,
    LARGEST_UNIT64,
    about_mean,
    gradient,
    gradient_parameters,
    inverse_deviation,
    mean_of,
    mean_square,
    merge,
    normalized,
    power_of_two,
    relu,
    relu_gradient,
    running,
    shift_of,
    squared_deviation,
    two_sum,
    unbiased,
    variance,
)

# What a kernel is compiled for.
stored = np.float32  # what x, grad_out and the result are of; np.uint16 is bfloat16
STORED = np.dtype(stored)  # what is kept of them in shared memory: their bits, if 16
SIZE = 4  # bytes of an element
held = np.float32  # what they are in registers
real = np.float32  # what the result is computed in: float64 where terms that cancel would show in 16 bits
REAL = np.dtype(real)
REAL_SIZE = 4  # bytes
WIDTH = 4  # elements of an access: 1, or those of 16 bytes, or of 8 if they have 16 bits
ALIGNED = True  # whether those lie at multiples of that; who takes what does not depend on it
UNROLLED = 4  # accesses of a thread whose values are in registers at once
VALUES = 16  # WIDTH · UNROLLED
EVEN = True  # whether there is one outer dimension, all steps of which are equal
EXACT = False  # whether sums of `real` in float64 must be compensated to be good to their last bit
THREADS = 256  # of a block
COLUMNS = False  # whether channels lie side by side, with nothing inside of them
LANES = 1  # of a block; a power of two
MEMBERS = 256  # threads of a lane: THREADS / LANES
OWN = 1  # channels of a thread: WIDTH in columns
ALONG = 4  # elements of an access that are of one channel: WIDTH in rows
TILE = 1  # channels of a block: LANES · OWN, no more than THREADS
WORKERS = 256  # threads that sum up for a channel: THREADS / TILE
PITCH = 1  # threads from such a one to the next: TILE in columns
OWN_TABLES = 5  # 5 · OWN
TILE_TABLES = 5  # 5 · TILE
READS = 0  # arrays that stay in shared memory
TEAMS = False  # whether several blocks share a tile
RADIX = 8  # partial sums that one thread adds up; a power of two, as THREADS is

# What is normalized together, if it is not a channel with parameters of its own.
POOLED = False  # whether several channels, a pool, share their statistics
PERIODIC = False  # whether several channels share their parameters
CENTERED = True  # whether the mean is subtracted
ELEMENTWISE = False  # whether each element of a channel has parameters of its own
ACROSS = False  # whether statistics are of the steps, not of the channels: sums for elementwise parameters
ADDS = 0  # of gradients of parameters: 1, what is lost is kept; 2, they are added to what is there
TOGETHER = 0  # elementwise parameters of a vector; 1: each alone; 0: weight and bias differ in type
of_parameters = np.float32  # what they are stored as
PARAMETER_SIZE = 4  # bytes

# What goes along with batch normalization, if anything.
MASKED = False  # whether only some elements count, of all channels the same ones
ACTIVATION = ""  # what is applied to the result: the formulas below are those of `ACTIVATIONS` by its name
ACTIVATES = False  # whether there is one
RESIDUAL = False  # whether an array is added before that
AGAIN = False  # whether the gradient at the activation's argument, once summed up, is computed again
CONSTANT = False  # whether the statistics that grad_x is computed with are constants
activation, activation_gradient = relu, relu_gradient

# --- where things are --------------------------------------------------------------------------------


@part
def divided(a, b):
    """Return the quotient and the remainder of two integers that are not negative."""
    quotient = int64(uint64(a) // uint64(b))  # unsigned: without the cases of Python's own
    return quotient, a - quotient * b


@part
def share_of(block, count):
    """Return the quotient and the remainder of a block's number: these are small, as a grid is."""
    quotient = int64(uint32(block) // uint32(count))
    return quotient, block - quotient * count


@part
def split(count):
    """Return a thread's number divided by a power of two, and the remainder: few bits, few registers."""
    t = uint32(cuda.threadIdx.x)
    return int32(t // uint32(count)), int32(t % uint32(count))


@part
def lane_of():
    """Return which lane a thread is in, and which member of it the thread is."""
    if COLUMNS:
        member, lane = split(LANES)
        return lane, member
    return split(MEMBERS)


@part
def worker():
    """Return which channel of the tile a thread sums up for, and which of those that do so it is."""
    if COLUMNS:
        index, channel = split(TILE)
        return channel, index
    return lane_of()


@part
def span(cut, tile, piece):
    """Return a thread's first channel, and the elements of its block: the first, and that after the last.

    Then the latter as the thread sees it: nothing is left to one without a channel.
    """
    c = tile * TILE + lane_of()[0] * OWN
    first = piece * cut.part
    last = min(first + cut.part, cut.outer * cut.inner)
    if TILE == 1 or c < cut.channels:
        return c, first, last, last
    return c, first, last, first


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
def pool_of(cut, c):
    """Return which of the statistics are a channel's."""
    if POOLED:
        return divided(c, cut.pool)[0]
    return c


@part
def pools(cut):
    """Return how many statistics there are."""
    return pool_of(cut, cut.channels)


@part
def affine_index(cut, c):
    """Return which of the parameters are a channel's."""
    if PERIODIC:
        return divided(c, cut.period)[1]
    return c


@part
def parameter(where, c, missing):
    """Return element `c` of a parameter of any type, or `missing`."""
    if where.address == 0:
        return missing
    at = where.address + c * where.stride
    if where.code == 8:
        return load(at, np.float64)
    if where.code == 4:
        return float64(load(at, np.float32))
    if where.code == 2:
        return float64(load(at, np.float16))
    return float64(load(at, np.uint16))


@part
def set_parameter(where, c, value):
    """Set element `c` of a parameter of any type, rounded once."""
    at = where.address + c * where.stride
    if where.code == 8:
        store(at, value)
    elif where.code == 4:
        store(at, np.float32(value))
    elif where.code == 2:
        store(at, rounded(carried(value, np.float16), np.float16))
    else:
        store(at, rounded(carried(value, np.uint16), np.uint16))


@part
def put(address, row, pitch, c, value):
    """Set element [row, c] of float64[:, pitch]."""
    store(address + 8 * (row * pitch + c), value)


@part
def put_gradients(address, pitch, c, grad_weight, grad_bias):
    """Set those of a weight and a bias in float64[2, pitch], or add to them, with what is lost in [2:4]."""
    weight_lost = bias_lost = float64(0)
    if ADDS == 2:
        four = get_four(address, int64(0), pitch, c)
        total, lost = plus(four[0], four[2], grad_weight)
        grad_weight, weight_lost = two_sum(total, lost)
        total, lost = plus(four[1], four[3], grad_bias)
        grad_bias, bias_lost = two_sum(total, lost)
    put(address, 0, pitch, c, grad_weight)
    put(address, 1, pitch, c, grad_bias)
    if ADDS:
        put(address, 2, pitch, c, weight_lost)
        put(address, 3, pitch, c, bias_lost)


@part
def get_four(address, piece, pitch, c):
    """Return elements [piece, :, c] of float64[:, 4, pitch]: what is known of a part of a channel."""
    at = address + 8 * (piece * 4 * pitch + c)
    return (
        load(at, np.float64),
        load(at + 8 * pitch, np.float64),
        load(at + 16 * pitch, np.float64),
        load(at + 24 * pitch, np.float64),
    )


@part
def put_four(address, piece, pitch, c, four):
    """Set them."""
    at = address + 8 * (piece * 4 * pitch + c)
    store(at, four[0])
    store(at + 8 * pitch, four[1])
    store(at + 16 * pitch, four[2])
    store(at + 24 * pitch, four[3])


# --- a thread's elements -----------------------------------------------------------------------------


@part
def chunk():
    """Return how many elements of a channel are in a block's registers at once.

    In a way that the compiler does not know, which would unroll loops once more.
    """
    return int64(cuda.blockDim.x) // LANES * (ALONG * UNROLLED)


@part
def begin(cut, first):
    """Return where a thread's walk over a channel's elements begins: outer step and inner element."""
    if COLUMNS:
        return int64(0), int64(0)  # the element is the step
    return divided(first + lane_of()[1] * ALONG, cut.inner)


@part
def advance(cut, step, inner):
    """Return where the next access is."""
    if COLUMNS:
        return step, inner
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
def address_of(cut, operand, c, step, inner, element):
    """Return the address of an access, and the bytes from an element of it to the next."""
    if COLUMNS:
        return step_address(cut, operand, element) + c * SIZE, int64(SIZE)
    return step_address(cut, operand, step) + c * operand.channel + inner * operand.inner, operand.inner


@part
def take(where, values, u):
    """Load the elements of one access."""
    at, gap = where
    if ALIGNED:
        vector = load_vector(at, stored, WIDTH)
        for k in range(WIDTH):
            values[u * WIDTH + k] = vector[k]
    else:
        for k in range(WIDTH):
            values[u * WIDTH + k] = load(at + k * gap, stored)


@part
def pair_of(values, i):
    """Return two values as they are stored."""
    return rounded(values[i], stored), rounded(values[i + 1], stored)


@part
def four_of(values, i):
    """Return four."""
    return pair_of(values, i) + pair_of(values, i + 2)


@part
def vector_of(values, u):
    """Return the values of one access as they are stored."""
    if WIDTH == 8:
        return four_of(values, 8 * u) + four_of(values, 8 * u + 4)
    if WIDTH == 4:
        return four_of(values, 4 * u)
    return pair_of(values, 2 * u)


@part
def leave(where, values, u):
    """Store the elements of one access."""
    at, gap = where
    if ALIGNED:
        store_vector(at, vector_of(values, u))
    else:
        for k in range(WIDTH):
            store(at + k * gap, rounded(values[u * WIDTH + k], stored))


@part
def fetch(cut, operand, c, step, inner, element, stop, values):
    """Load what a thread has of the next elements of its channels into `values`, and zeros from `stop` on."""
    for u in range(UNROLLED):
        if element < stop:
            take(address_of(cut, operand, c, step, inner, element), values, u)
        else:
            for k in range(WIDTH):
                values[u * WIDTH + k] = held(0)
        element += MEMBERS * ALONG
        step, inner = advance(cut, step, inner)


@part
def write(cut, operand, c, step, inner, element, stop, values):
    """Store what `fetch` would load."""
    for u in range(UNROLLED):
        if element < stop:
            leave(address_of(cut, operand, c, step, inner, element), values, u)
        element += MEMBERS * ALONG
        step, inner = advance(cut, step, inner)


@part
def kept_at(first, element):
    """Return where in shared memory a thread keeps the accesses from that with `element` on."""
    return int64(cuda.threadIdx.x) + (element - first) * (READS * TILE)


@part
def keep(kept, array, place, element, stop, values):
    """Put a thread's values of one of READS arrays where no other thread looks, THREADS elements apart."""
    for u in range(UNROLLED):
        if element < stop:
            for k in range(WIDTH):
                its = unrounded(values[u * WIDTH + k], stored)
                kept[place + ((u * READS + array) * WIDTH + k) * THREADS] = its
        element += MEMBERS * ALONG


@part
def kept_values(kept, array, place, element, stop, values):
    """Get them back."""
    for u in range(UNROLLED):
        if element < stop:
            for k in range(WIDTH):
                its = kept[place + ((u * READS + array) * WIDTH + k) * THREADS]
                values[u * WIDTH + k] = widened(its, stored)
        element += MEMBERS * ALONG


@part
def elements_of(where, element, missing, numbers):
    """Get the parameters of the elements of one access, of a channel whose elements have their own."""
    if TOGETHER == 0 or where.address == 0:
        for k in range(ALONG):
            numbers[k] = parameter(where, element + k, missing)
    elif TOGETHER == 1:
        for k in range(ALONG):
            numbers[k] = load(where.address + (element + k) * where.stride, of_parameters)
    else:
        for first in range(0, ALONG, TOGETHER):
            at = where.address + (element + first) * PARAMETER_SIZE
            vector = load_vector(at, of_parameters, TOGETHER)
            for k in range(TOGETHER):
                numbers[first + k] = vector[k]


# --- which elements count ----------------------------------------------------------------------------


@part
def access_bits(arrays, element):
    """Return whether the elements of the access that begins with `element` count: a bit each, lowest first.

    The bits above these are of other elements.
    """
    return int64(load(arrays.mask + (element >> 3), np.uint8)) >> (element & 7)


@part
def bits_of(arrays, element, stop):
    """Return a bit for each element of a channel that a thread has loaded: whether it counts."""
    bits = int64(0)
    if MASKED:
        for u in range(UNROLLED):
            if element < stop:
                bits |= (access_bits(arrays, element) & ((1 << ALONG) - 1)) << (u * ALONG)
            element += MEMBERS * ALONG
    return bits


@part
def is_counted(bits, which):
    """Return whether one of them does."""
    if MASKED:
        return (bits >> which) & 1 != 0
    return True


@part
def blank(values, bits):
    """Set the values to 0 that do not count, of what a thread has loaded."""
    if MASKED:
        for i in range(VALUES):
            if not is_counted(bits, i // WIDTH * ALONG + i % ALONG):
                values[i] = held(0)


@part
def counted_before(arrays, element):
    """Return how many elements before this one count."""
    place = element >> 6 << 3
    below = load(arrays.mask + place, np.int64) & ((int64(1) << (element & 63)) - 1)
    return load(arrays.counts + place, np.int64) + int64(cuda.popc(below))


@part
def count_of(arrays, first, number):
    """Return how many count of so many elements, from the first one on."""
    if MASKED and number > 0:
        return counted_before(arrays, first + number) - counted_before(arrays, first)
    return number


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
def clear(numbers):
    """Set a thread's numbers, one for each of its channels, to 0."""
    for k in range(OWN):
        numbers[k] = 0.0


@part
def worker_sum(total, lost, high, low):
    """Return the sum over all that sum up for a channel, to each of them, and what it lost.

    `high` and `low` are shared memory. Sums of RADIX, in a fixed order, until few are left, which every
    thread adds up.
    """
    t = cuda.threadIdx.x
    _, index = worker()
    cuda.syncthreads()  # what was there before has been read
    high[t] = total
    low[t] = lost
    cuda.syncthreads()
    width = WORKERS
    while width > RADIX:
        width //= RADIX
        if index < width:
            total, lost = high[t], low[t]
            for k in range(1, RADIX):
                other = t + k * width * PITCH
                total, lost = plus(total, lost + low[other], high[other])
            high[t] = total
            low[t] = lost
        cuda.syncthreads()
    first = t - index * PITCH
    total, lost = high[first], low[first]
    for k in range(1, width):
        total, lost = plus(total, lost + low[first + k * PITCH], high[first + k * PITCH])
    return total, lost


@part
def block_sum(totals, losses, high, low):
    """Return the sum of all threads' numbers for the channel that a thread sums up for, and what it lost.

    The members of a lane hand their numbers out to those who sum up, as many at a time as there is room for.
    """
    if OWN == 1:
        return worker_sum(totals[0], losses[0], high, low)
    lane, member = lane_of()
    turn, row = member // WORKERS, member % WORKERS
    total = lost = float64(0)
    for now in range(OWN):
        cuda.syncthreads()  # what was there before has been read
        if turn == now:
            for k in range(OWN):
                high[row * TILE + lane * OWN + k] = totals[k]
                low[row * TILE + lane * OWN + k] = losses[k]
        cuda.syncthreads()
        total, lost = plus(total, lost + low[cuda.threadIdx.x], high[cuda.threadIdx.x])
    return worker_sum(total, lost, high, low)


@part
def own_numbers(number, shared, numbers):
    """Get the numbers of a thread's own channels from those that have summed up for them."""
    if COLUMNS:
        channel, index = worker()
        if index == 0:
            shared[channel] = number
        cuda.syncthreads()
        for k in range(OWN):
            numbers[k] = shared[lane_of()[0] * OWN + k]
    else:
        numbers[0] = number


@part
def kept_squares(arrays, kept, first, stop, means, totals, losses):
    """Set the sums of squared deviations from the means of what a thread has kept."""
    clear(totals)
    clear(losses)
    _, member = lane_of()
    place = kept_at(first, first)
    element = first + member * ALONG
    bits = int64(0)
    while element < stop:
        if MASKED:
            bits = access_bits(arrays, element)
        for i in range(WIDTH):
            k = i // ALONG
            if is_counted(bits, i % ALONG):
                square = squared_deviation(float64(widened(kept[place + i * THREADS], stored)), means[k])
                totals[k], losses[k] = plus_some(totals[k], losses[k], square)
        place += WIDTH * THREADS
        element += chunk() // UNROLLED


@part
def sum_of(values, k):
    """Return the sum of what a thread has of one of its channels, and what it lost."""
    total = lost = float64(0)
    for u in range(UNROLLED):
        for j in range(ALONG):
            total, lost = plus_some(total, lost, float64(values[u * WIDTH + k * ALONG + j]))
    return total, lost


@part
def squares_of(values, bits, k, mean, element, stop):
    """Return the sum of squared deviations from the mean of what counts, and what it lost."""
    total = lost = float64(0)
    for u in range(UNROLLED):
        if element < stop:
            for j in range(ALONG):
                if is_counted(bits, u * ALONG + j):
                    square = squared_deviation(float64(values[u * WIDTH + k * ALONG + j]), mean)
                    total, lost = plus_some(total, lost, square)
        element += MEMBERS * ALONG
    return total, lost


@part
def products_of(values, others, k, mean, element, stop):
    """Return Σ dy and Σ dy · (x - mean), each with what it lost."""
    total = lost = product = product_lost = float64(0)
    for u in range(UNROLLED):
        if element < stop:
            for j in range(ALONG):
                dy = float64(values[u * WIDTH + k * ALONG + j])
                deviation = float64(others[u * WIDTH + k * ALONG + j]) - mean
                total, lost = plus_some(total, lost, dy)
                product, product_lost = plus_product(product, product_lost, dy, deviation)
        element += MEMBERS * ALONG
    return total, lost, product, product_lost


@part
def weighted_products_of(arrays, values, others, k, mean, element, stop):
    """The same for g = dy · weight, where each element has a weight of its own."""
    weights = cuda.local.array(ALONG, np.float64)
    total = lost = product = product_lost = float64(0)
    for u in range(UNROLLED):
        if element < stop:
            elements_of(arrays.weight, element, float64(1), weights)
            for j in range(ALONG):
                dy = float64(values[u * WIDTH + k * ALONG + j])
                deviation = float64(others[u * WIDTH + k * ALONG + j]) - mean
                total, lost = plus_product(total, lost, dy, weights[j])
                product, product_lost = plus_product(product, product_lost, dy * weights[j], deviation)
        element += MEMBERS * ALONG
    return total, lost, product, product_lost


@part
def products_across(values, others, k, means, invstds, element, stop):
    """Return Σ dy and Σ dy · x_hat, each with what it lost, where each step has its mean and invstd."""
    total = lost = product = product_lost = float64(0)
    for u in range(UNROLLED):
        if element < stop:
            for j in range(ALONG):
                dy = float64(values[u * WIDTH + k * ALONG + j])
                x_hat = (float64(others[u * WIDTH + k * ALONG + j]) - means[u]) * invstds[u]
                total, lost = plus_some(total, lost, dy)
                product, product_lost = plus_product(product, product_lost, dy, x_hat)
        element += MEMBERS * ALONG
    return total, lost, product, product_lost


@part
def merged(count, known, more, others):
    """Pool two sets of statistics of which the first may be empty, and the second too."""
    if count == 0:
        return more, others
    if more == 0:
        return count, known
    return count + more, merge(float64(count), known, float64(more), others)


# --- what a block or a team knows of a tile ----------------------------------------------------------
#
# A team of blocks, of one or more, shares a tile: each block has a part of it, and learns from the others
# what theirs sum up to.


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
def notes(arrays, cut, turn, team):
    """Return where the blocks of a team leave what they know of their parts of a tile.

    Turns alternate between two places: who reads of one turn has not yet come to the barrier of the next.
    """
    return arrays.partials + 32 * TILE * ((turn * cut.teams + team) * cut.team)


@part
def part_count(arrays, cut, piece):
    """Return how many values of a channel are in a part, of those that count."""
    first = piece * cut.part
    return count_of(arrays, first, max(int64(0), min(cut.part, cut.outer * cut.inner - first)))


@part
def workers():
    """Return WORKERS in a way that the compiler does not know, which would unroll loops."""
    return int64(cuda.blockDim.x) // TILE


@part
def pieces(cut):
    """Return how many pieces a channel, or a pool of them, is put together from."""
    if POOLED:
        return cut.parts * cut.pool
    return cut.parts


@part
def channel_of(cut, c):
    """Return the channel, or the first one of a pool."""
    if POOLED:
        return c * cut.pool
    return c


@part
def place_of(cut, piece, c):
    """Return which part a piece of a pool is, and of which channel."""
    piece, its = divided(piece, cut.pool)
    return piece, c * cut.pool + its


@part
def in_three(known):
    """Return mean, rest and m2, with what m2 has lost in it."""
    mean, rest, m2, lost = known
    return mean, rest, m2 + lost


@part
def pool_statistics(arrays, cut, address, pitch, c, parts, counts, means, rests, m2s):
    """Return mean, rest and m2 of all parts of a channel: each worker merges some, and then as a tree."""
    t = cuda.threadIdx.x
    _, index = worker()
    count = int64(0)
    known = float64(0), float64(0), float64(0), float64(0)
    piece = int64(index)
    while piece < parts and channel_of(cut, c) < pitch:
        place, its = piece, c
        if POOLED:
            place, its = place_of(cut, piece, c)
        more = part_count(arrays, cut, place)
        count, known = merged(count, known, more, get_four(address, place, pitch, its))
        piece += workers()
    cuda.syncthreads()  # what was there before has been read
    counts[t] = count
    means[t], rests[t], m2s[t] = in_three(known)
    cuda.syncthreads()
    width = 1
    while width < min(parts, workers()):
        width *= 2
    while width > 1:
        width //= 2
        if index < width:
            other = t + width * PITCH
            known = means[t], rests[t], m2s[t], float64(0)
            others = means[other], rests[other], m2s[other], float64(0)
            counts[t], known = merged(counts[t], known, counts[other], others)
            means[t], rests[t], m2s[t] = in_three(known)
        cuda.syncthreads()
    first = t - index * PITCH
    return means[first], rests[first], m2s[first]


@part
def times(factor, total, lost):
    """Return factor · total, and what is lost with that added to factor · lost."""
    product = factor * total
    return product, fma(factor, total, -product) + factor * lost


@part
def get_sums(arrays, cut, address, piece, pitch, c):
    """Return the sums of a piece: of a pool those of g = dy · weight, with the weight of each channel."""
    if POOLED:
        piece, c = place_of(cut, piece, c)
    four = get_four(address, piece, pitch, c)
    if POOLED:
        weight = weight_of(arrays, cut, c)
        return times(weight, four[0], four[1]) + times(weight, four[2], four[3])
    return four


@part
def pool_sums(arrays, cut, address, pitch, c, parts, high, low):
    """Return what both sums of all parts of a channel sum up to, each with what it lost."""
    total = lost = product = product_lost = float64(0)
    piece = int64(worker()[1])
    while piece < parts and channel_of(cut, c) < pitch:
        four = get_sums(arrays, cut, address, piece, pitch, c)
        total, lost = plus(total, lost + four[1], four[0])
        product, product_lost = plus(product, product_lost + four[3], four[2])
        piece += workers()
    total, lost = worker_sum(total, lost, high, low)
    product, product_lost = worker_sum(product, product_lost, high, low)
    return total, lost, product, product_lost


# --- statistics --------------------------------------------------------------------------------------


def collect(arrays, cut):
    """Statistics of parts of tiles into the partials. Blocks: tiles × parts."""
    high = cuda.shared.array(THREADS, np.float64)
    low = cuda.shared.array(THREADS, np.float64)
    known = cuda.shared.array(TILE, np.float64)
    values = cuda.local.array(VALUES, held)
    means = cuda.local.array(OWN, np.float64)
    totals = cuda.local.array(OWN, np.float64)
    losses = cuda.local.array(OWN, np.float64)
    tile, piece = share_of(int64(cuda.blockIdx.x), cut.parts)
    c, first, last, stop = span(cut, tile, piece)
    channel, index = worker()
    count = int64(0)
    found = float64(0), float64(0), float64(0), float64(0)
    step, inner = begin(cut, first)
    start = first
    while start < last:
        element = start + lane_of()[1] * ALONG
        more = count_of(arrays, start, min(chunk(), last - start))
        fetch(cut, arrays.x, c, step, inner, element, stop, values)
        bits = bits_of(arrays, element, stop)
        blank(values, bits)
        for k in range(OWN):
            totals[k], losses[k] = sum_of(values, k)
        total, lost = block_sum(totals, losses, high, low)
        its_mean, its_rest = mean_of(total, lost, float64(more))
        own_numbers(its_mean, known, means)
        for k in range(OWN):
            totals[k], losses[k] = squares_of(values, bits, k, means[k], element, stop)
        total, lost = block_sum(totals, losses, high, low)
        its_m2 = about_mean(total + lost, its_rest, float64(more))
        count, found = merged(count, found, more, (its_mean, its_rest, its_m2, float64(0)))
        step, inner = advance_all(cut, step, inner)
        start += chunk()
    c = tile * TILE + channel
    if index == 0 and c < cut.channels:
        put_four(arrays.partials, piece, cut.channels, c, found)


@part
def affine_of(arrays, cut, c):
    """Return weight and bias of a channel.

    They may lie where the running statistics do: all threads have them before these are written.
    """
    if ELEMENTWISE or (TILE > 1 and c >= cut.channels):
        return float64(1), float64(0)
    c = affine_index(cut, c)
    return parameter(arrays.weight, c, float64(1)), parameter(arrays.bias, c, float64(0))


@part
def weight_of(arrays, cut, c):
    """Return the weight of a channel: 1 where each element has its own."""
    if ELEMENTWISE:
        return float64(1)
    return parameter(arrays.weight, affine_index(cut, c), float64(1))


@part
def to_normalize(affine, mean, rest, invstd, table):
    """Set what a channel is normalized with: mean, scale and shift."""
    weight, bias = affine
    scale = weight * invstd
    near = real(mean)
    lost = (mean - float64(near)) + rest
    table[0] = near
    table[1] = real(scale)
    table[2] = real(shift_of(bias, lost, scale))


@part
def value_count(arrays, cut):
    """Return how many values share statistics."""
    if MASKED:
        return float64(arrays.counted)
    if POOLED:
        return float64(cut.outer * cut.inner * cut.pool)
    return float64(cut.outer * cut.inner)


@part
def finish_channel(arrays, cut, numbers, affine, c, mean, rest, m2, report, table):
    """Set what a channel is normalized with; c is the channel, or the pool that it is in.

    To report it is to leave its statistics, and to update the running ones.
    """
    count = value_count(arrays, cut)
    var = variance(m2, count)
    if not CENTERED:
        var = mean_square(var, mean)
        mean = rest = float64(0)
    invstd = float64(inverse_deviation(var, numbers.eps))
    to_normalize(affine, mean, rest, invstd, table)
    if report:
        pitch = pools(cut)
        put(arrays.stats, 0, pitch, c, mean)
        put(arrays.stats, 1, pitch, c, var)
        put(arrays.stats, 2, pitch, c, invstd)
        if arrays.mean.address != 0:
            old = parameter(arrays.mean, c, float64(0))
            set_parameter(arrays.mean, c, running(old, mean, numbers.momentum))
        if arrays.var.address != 0:
            old = parameter(arrays.var, c, float64(0))
            new = unbiased(var, count, numbers.correction)
            set_parameter(arrays.var, c, running(old, new, numbers.momentum))


@part
def put_table(arrays, cut, c, rows, table):
    """Leave what a channel's results are computed with, for another kernel."""
    for row in range(rows):
        store(arrays.tables + REAL_SIZE * (row * cut.channels + c), table[row])


def finish_stats(arrays, cut, numbers):
    """Partials into mean, var, invstd, the tables and the running statistics. Blocks: tiles, or pools'."""
    counts = cuda.shared.array(THREADS, np.int64)
    means = cuda.shared.array(THREADS, np.float64)
    rests = cuda.shared.array(THREADS, np.float64)
    m2s = cuda.shared.array(THREADS, np.float64)
    table = cuda.local.array(5, real)
    channel, index = worker()
    c = int64(cuda.blockIdx.x) * TILE + channel
    mean, rest, m2 = pool_statistics(
        arrays, cut, arrays.partials, cut.channels, c, pieces(cut), counts, means, rests, m2s
    )
    if POOLED:
        its = int64(index)
        while its < cut.pool and c < pools(cut):
            affine = affine_of(arrays, cut, c * cut.pool + its)
            finish_channel(arrays, cut, numbers, affine, c, mean, rest, m2, its == 0, table)
            put_table(arrays, cut, c * cut.pool + its, 3, table)
            its += workers()
    elif index == 0 and c < cut.channels:
        affine = affine_of(arrays, cut, c)
        finish_channel(arrays, cut, numbers, affine, c, mean, rest, m2, True, table)
        put_table(arrays, cut, c, 3, table)


def use_running_stats(arrays, cut, numbers):
    """The tables from the running statistics, for evaluation. Threads: channels."""
    table = cuda.local.array(3, real)
    c = int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
    if c < cut.channels:
        its = affine_index(cut, c)
        invstd = float64(inverse_deviation(parameter(arrays.var, its, float64(1)), numbers.eps))
        affine = affine_of(arrays, cut, c)
        to_normalize(affine, parameter(arrays.mean, its, float64(0)), float64(0), invstd, table)
        put_table(arrays, cut, c, 3, table)


# --- normalization -----------------------------------------------------------------------------------


@part
def get_tables(arrays, cut, c, rows, numbers):
    """Get what the results of a thread's channels are computed with."""
    for row in range(rows):
        for k in range(OWN):
            numbers[row * OWN + k] = real(0)
            if TILE == 1 or c < cut.channels:
                numbers[row * OWN + k] = load(arrays.tables + REAL_SIZE * (row * cut.channels + c + k), real)


@part
def put_shared(tables, channel, rows, table):
    """Leave what a channel's results are computed with, for the threads of the block."""
    for row in range(rows):
        tables[row * TILE + channel] = table[row]


@part
def get_shared(tables, rows, numbers):
    """Get it for a thread's channels."""
    for row in range(rows):
        for k in range(OWN):
            numbers[row * OWN + k] = tables[row * TILE + lane_of()[0] * OWN + k]


@part
def normalize_elements(arrays, element, stop, numbers, values):
    """Normalize what a thread has loaded, where each element has a weight and a bias of its own."""
    weights = cuda.local.array(ALONG, real)
    biases = cuda.local.array(ALONG, real)
    for u in range(UNROLLED):
        if element < stop:
            elements_of(arrays.weight, element, float64(1), weights)
            elements_of(arrays.bias, element, float64(0), biases)
            for j in range(WIDTH):
                k, i = j // ALONG, u * WIDTH + j
                mean, scale, shift = numbers[k], numbers[OWN + k], numbers[2 * OWN + k]
                x_hat = normalized(real(values[i]), mean, scale, shift)
                its = normalized(x_hat, real(0), weights[j % ALONG], biases[j % ALONG])
                values[i] = carried(its, stored)
        element += MEMBERS * ALONG


@part
def activated(arrays, z):
    """Return the activation's result, if there is one; of 16 bits it is computed as what they are held in."""
    if ACTIVATES:
        return activation(z, held(arrays.slope))
    return z


@part
def normalize_part(arrays, cut, c, first, last, stop, kept, numbers, values):
    """Normalize a part of a thread's channels, add the residual, and apply the activation."""
    if RESIDUAL:
        residuals = cuda.local.array(VALUES, held)
    _, member = lane_of()
    step, inner = begin(cut, first)
    start = first
    while start < last:
        element = start + member * ALONG
        if READS:
            kept_values(kept, 0, kept_at(first, start), element, stop, values)
        else:
            fetch(cut, arrays.x, c, step, inner, element, stop, values)
        if RESIDUAL:
            fetch(cut, arrays.residual, c, step, inner, element, stop, residuals)
        if ELEMENTWISE:
            normalize_elements(arrays, element, stop, numbers, values)
        else:
            for i in range(VALUES):
                k = i % WIDTH // ALONG
                mean, scale, shift = numbers[k], numbers[OWN + k], numbers[2 * OWN + k]
                its = normalized(real(values[i]), mean, scale, shift)
                if RESIDUAL:
                    its += real(residuals[i])
                values[i] = activated(arrays, carried(its, stored))
        blank(values, bits_of(arrays, element, stop))
        write(cut, arrays.out, c, step, inner, element, stop, values)
        step, inner = advance_all(cut, step, inner)
        start += chunk()


@part
def reversed_block():
    """Return the block's number from the last: what was read last is still in the cache."""
    return int64(cuda.gridDim.x) - 1 - int64(cuda.blockIdx.x)


def normalize(arrays, cut):
    """The result, or grad_x in evaluation. Blocks: tiles × parts, the last first."""
    kept = cuda.shared.array(0, STORED)  # nothing
    values = cuda.local.array(VALUES, held)
    numbers = cuda.local.array(OWN_TABLES, real)
    tile, piece = share_of(reversed_block(), cut.parts)
    c, first, last, stop = span(cut, tile, piece)
    get_tables(arrays, cut, c, 3, numbers)
    normalize_part(arrays, cut, c, first, last, stop, kept, numbers, values)


def forward(arrays, cut, numbers):
    """Training forward. Blocks: teams, each of which takes every `teams`-th tile, a part each.

    A tile stays in shared memory between its one reading and its writing.
    """
    kept = cuda.shared.array(0, STORED)
    high = cuda.shared.array(THREADS, np.float64)
    low = cuda.shared.array(THREADS, np.float64)
    counts = cuda.shared.array(THREADS, np.int64)
    m2s = cuda.shared.array(THREADS, np.float64)
    known = cuda.shared.array(TILE, np.float64)
    tables = cuda.shared.array(TILE_TABLES, REAL)
    values = cuda.local.array(VALUES, held)
    table = cuda.local.array(5, real)
    mine = cuda.local.array(OWN_TABLES, real)
    means = cuda.local.array(OWN, np.float64)
    totals = cuda.local.array(OWN, np.float64)
    losses = cuda.local.array(OWN, np.float64)
    team, rank = share_of(int64(cuda.blockIdx.x), cut.team)
    channel, index = worker()
    turn = int64(0)
    tile = team
    while tile * TILE < cut.channels:
        c, first, last, stop = span(cut, tile, rank)
        clear(totals)
        clear(losses)
        step, inner = begin(cut, first)
        start = first
        while start < last:
            element = start + lane_of()[1] * ALONG
            fetch(cut, arrays.x, c, step, inner, element, stop, values)
            blank(values, bits_of(arrays, element, stop))
            keep(kept, 0, kept_at(first, start), element, stop, values)
            for k in range(OWN):
                total, lost = sum_of(values, k)
                totals[k], losses[k] = plus(totals[k], losses[k] + lost, total)
            step, inner = advance_all(cut, step, inner)
            start += chunk()
        total, lost = block_sum(totals, losses, high, low)
        count = float64(count_of(arrays, first, last - first))
        mean, rest = mean_of(total, lost, count)
        own_numbers(mean, known, means)
        kept_squares(arrays, kept, first, stop, means, totals, losses)
        affine = affine_of(arrays, cut, tile * TILE + channel)
        total, lost = block_sum(totals, losses, high, low)
        m2 = about_mean(total + lost, rest, count)
        if TEAMS:
            address = notes(arrays, cut, turn, team)
            if index == 0:
                put_four(address, rank, TILE, channel, (mean, rest, m2, float64(0)))
            team_barrier(arrays, cut, team, rank)
            mean, rest, m2 = pool_statistics(
                arrays, cut, address, TILE, channel, cut.team, counts, high, low, m2s
            )
        if index == 0 and tile * TILE + channel < cut.channels:
            its = tile * TILE + channel
            finish_channel(arrays, cut, numbers, affine, its, mean, rest, m2, rank == 0, table)
            put_shared(tables, channel, 3, table)
        cuda.syncthreads()
        get_shared(tables, 3, mine)
        normalize_part(arrays, cut, c, first, last, stop, kept, mine, values)
        tile += cut.teams
        turn = 1 - turn


# --- backward ----------------------------------------------------------------------------------------


@part
def own_means(arrays, cut, c, means):
    """Get the means of a thread's channels."""
    clear(means)
    if TILE == 1 or c < cut.channels:
        for k in range(OWN):
            means[k] = parameter(arrays.mean, pool_of(cut, c + k), float64(0))


@part
def step_statistics(arrays, element, stop, means, invstds):
    """Get mean and invstd of each step that a thread has loaded."""
    for u in range(UNROLLED):
        if element < stop:
            means[u] = parameter(arrays.mean, element, float64(0))
            invstds[u] = parameter(arrays.var, element, float64(1))
        element += MEMBERS * ALONG


@part
def own_normalization(arrays, cut, c, numbers):
    """Get what x was normalized with, in a thread's channels: mean, scale and shift."""
    table = cuda.local.array(3, real)
    for k in range(OWN):
        table[0] = table[1] = table[2] = real(0)
        if TILE == 1 or c < cut.channels:
            mean = parameter(arrays.mean, c + k, float64(0))
            invstd = parameter(arrays.var, c + k, float64(1))
            to_normalize(affine_of(arrays, cut, c + k), mean, float64(0), invstd, table)
        for row in range(3):
            numbers[row * OWN + k] = table[row]


@part
def pass_activation(arrays, cut, c, step, inner, element, stop, numbers, values, others):
    """Make the gradients at the activation's result that a thread has loaded those at its argument.

    That one is computed again, from x and the residual.
    """
    if RESIDUAL:
        residuals = cuda.local.array(VALUES, held)
        fetch(cut, arrays.residual, c, step, inner, element, stop, residuals)
    for i in range(VALUES):
        k = i % WIDTH // ALONG
        z = normalized(real(others[i]), numbers[k], numbers[OWN + k], numbers[2 * OWN + k])
        if RESIDUAL:
            z += real(residuals[i])
        values[i] = activation_gradient(values[i], carried(z, stored), held(arrays.slope))


@part
def leave_residual(arrays, cut, c, step, inner, element, stop, values):
    """Store the gradient of the residual; from there on it is what was stored, rounded."""
    for i in range(VALUES):
        values[i] = widened(rounded(values[i], stored), stored)
    write(cut, arrays.grad_residual, c, step, inner, element, stop, values)


@part
def reduce_part(
    arrays, cut, c, first, last, stop, kept, values, others, totals, losses, products, products_lost
):
    """Set a thread's Σ dy and Σ dy · (x - mean) of a part of its channels, and what each of them lost.

    Where each element has a weight, g = dy · weight takes the place of dy; and where batch norm is followed
    by an activation, the gradient at its argument.
    """
    if ACTIVATES:
        numbers = cuda.local.array(OWN_TABLES, real)
        own_normalization(arrays, cut, c, numbers)
    means = cuda.local.array(OWN, np.float64)
    step_means = cuda.local.array(UNROLLED, np.float64)
    step_invstds = cuda.local.array(UNROLLED, np.float64)
    clear(totals)
    clear(losses)
    clear(products)
    clear(products_lost)
    if not ACROSS:
        own_means(arrays, cut, c, means)
    _, member = lane_of()
    step, inner = begin(cut, first)
    start = first
    while start < last:
        element = start + member * ALONG
        fetch(cut, arrays.grad_out, c, step, inner, element, stop, values)
        fetch(cut, arrays.x, c, step, inner, element, stop, others)
        if READS and AGAIN:
            keep(kept, 0, kept_at(first, start), element, stop, values)
        if ACTIVATES:
            pass_activation(arrays, cut, c, step, inner, element, stop, numbers, values, others)
        if MASKED:
            bits = bits_of(arrays, element, stop)
            blank(values, bits)
            blank(others, bits)
        if RESIDUAL:
            leave_residual(arrays, cut, c, step, inner, element, stop, values)
        if READS and not AGAIN:
            keep(kept, 0, kept_at(first, start), element, stop, values)
        if READS:
            keep(kept, 1, kept_at(first, start), element, stop, others)
        if ACROSS:
            step_statistics(arrays, element, stop, step_means, step_invstds)
        for k in range(OWN):
            if ELEMENTWISE:
                total, lost, product, product_lost = weighted_products_of(
                    arrays, values, others, k, means[k], element, stop
                )
            elif ACROSS:
                total, lost, product, product_lost = products_across(
                    values, others, k, step_means, step_invstds, element, stop
                )
            else:
                total, lost, product, product_lost = products_of(values, others, k, means[k], element, stop)
            totals[k], losses[k] = plus(totals[k], losses[k] + lost, total)
            products[k], products_lost[k] = plus(products[k], products_lost[k] + product_lost, product)
        step, inner = advance_all(cut, step, inner)
        start += chunk()


def reduce(arrays, cut):
    """Σ dy and Σ dy · (x - mean) of parts of tiles into the partials. Blocks: tiles × parts."""
    kept = cuda.shared.array(0, STORED)  # nothing
    high = cuda.shared.array(THREADS, np.float64)
    low = cuda.shared.array(THREADS, np.float64)
    values = cuda.local.array(VALUES, held)
    others = cuda.local.array(VALUES, held)
    totals = cuda.local.array(OWN, np.float64)
    losses = cuda.local.array(OWN, np.float64)
    products = cuda.local.array(OWN, np.float64)
    products_lost = cuda.local.array(OWN, np.float64)
    tile, piece = share_of(int64(cuda.blockIdx.x), cut.parts)
    c, first, last, stop = span(cut, tile, piece)
    reduce_part(
        arrays, cut, c, first, last, stop, kept, values, others, totals, losses, products, products_lost
    )
    channel, index = worker()
    c = tile * TILE + channel
    total, lost = block_sum(totals, losses, high, low)
    product, product_lost = block_sum(products, products_lost, high, low)
    if index == 0 and c < cut.channels:
        put_four(arrays.partials, piece, cut.channels, c, (total, lost, product, product_lost))


@part
def finish_gradients(arrays, cut, c, four, report, table):
    """Set what grad_x of a channel is computed with; to report it is to leave its sums.

    The weights of a pool's channels are in its sums. A channel that shares its parameters leaves its sums
    for `sum_gradients`.
    """
    mean = parameter(arrays.mean, pool_of(cut, c), float64(0))
    invstd = parameter(arrays.var, pool_of(cut, c), float64(1))
    grad_bias = four[0] + four[1]
    grad_weight = (four[2] + four[3]) * invstd
    scale = weight_of(arrays, cut, c) * invstd
    near = real(mean)
    lost = mean - float64(near)
    unit = float64(power_of_two(invstd, LARGEST_UNIT64 if REAL_SIZE == 8 else LARGEST_UNIT32))
    slope, offset = gradient_parameters(
        invstd if POOLED else scale,
        lost,
        grad_bias if CENTERED else float64(0),
        grad_weight,
        invstd,
        unit,
        value_count(arrays, cut),
    )
    if arrays.training == 0:
        # The statistics are constants: grad_x = scale · dy, which is `normalize` of dy.
        near = real(0)
        slope = float64(0)
    if report:
        if PERIODIC:
            put_four(arrays.stats, int64(0), cut.channels, c, four)
        elif not ELEMENTWISE:
            put_gradients(arrays.stats, cut.channels, c, grad_weight, grad_bias)
    table[0] = near
    table[1] = real(scale)
    table[2] = real(slope)
    table[3] = real(offset)
    table[4] = real(unit)


def finish_backward(arrays, cut):
    """Partials into grad_weight, grad_bias and the tables of grad_x. Blocks: tiles, or pools'."""
    high = cuda.shared.array(THREADS, np.float64)
    low = cuda.shared.array(THREADS, np.float64)
    table = cuda.local.array(5, real)
    channel, index = worker()
    c = int64(cuda.blockIdx.x) * TILE + channel
    four = pool_sums(arrays, cut, arrays.partials, cut.channels, c, pieces(cut), high, low)
    if POOLED:
        its = int64(index)
        while its < cut.pool and c < pools(cut):
            finish_gradients(arrays, cut, c * cut.pool + its, four, False, table)
            put_table(arrays, cut, c * cut.pool + its, 5, table)
            its += workers()
    elif index == 0 and c < cut.channels:
        finish_gradients(arrays, cut, c, four, not PERIODIC, table)
        put_table(arrays, cut, c, 5, table)


def sum_gradients(arrays, cut):
    """Partials into grad_weight and grad_bias, over all channels that have a parameter.

    Blocks: tiles of parameters.
    """
    high = cuda.shared.array(THREADS, np.float64)
    low = cuda.shared.array(THREADS, np.float64)
    channel, index = worker()
    its = int64(cuda.blockIdx.x) * TILE + channel
    copies = divided(cut.channels, cut.period)[0]
    total = lost = product = product_lost = float64(0)
    piece = int64(index)
    while piece < cut.parts * copies and its < cut.period:
        place, copy = divided(piece, copies)
        c = copy * cut.period + its
        four = get_four(arrays.partials, place, cut.channels, c)
        invstd = float64(1)  # which sums across channels have in them
        if not ACROSS:
            invstd = parameter(arrays.var, pool_of(cut, c), float64(1))
        more, more_lost = times(invstd, four[2], four[3])
        total, lost = plus(total, lost + four[1], four[0])
        product, product_lost = plus(product, product_lost + more_lost, more)
        piece += workers()
    total, lost = worker_sum(total, lost, high, low)
    product, product_lost = worker_sum(product, product_lost, high, low)
    if index == 0 and its < cut.period:
        put_gradients(arrays.stats, cut.period, its, product + product_lost, total + lost)


@part
def apply_elements(arrays, element, stop, numbers, values, others):
    """Compute grad_x of what a thread has loaded, where each element has a weight of its own."""
    weights = cuda.local.array(ALONG, real)
    for u in range(UNROLLED):
        if element < stop:
            elements_of(arrays.weight, element, float64(1), weights)
            for j in range(WIDTH):
                k, i = j // ALONG, u * WIDTH + j
                mean, scale, slope = numbers[k], numbers[OWN + k], numbers[2 * OWN + k]
                offset, unit = numbers[3 * OWN + k], numbers[4 * OWN + k]
                grad_out = real(values[i]) * weights[j % ALONG]
                its = gradient(grad_out, real(others[i]), mean, unit, scale, slope, offset)
                values[i] = carried(its, stored)
        element += MEMBERS * ALONG


@part
def apply_part(arrays, cut, c, first, last, stop, kept, numbers, values, others):
    """Compute grad_x of a part of a thread's channels."""
    if AGAIN:
        before = cuda.local.array(OWN_TABLES, real)
        own_normalization(arrays, cut, c, before)
    _, member = lane_of()
    step, inner = begin(cut, first)
    start = first
    while start < last:
        element = start + member * ALONG
        if READS:
            kept_values(kept, 0, kept_at(first, start), element, stop, values)
            kept_values(kept, 1, kept_at(first, start), element, stop, others)
        else:
            fetch(cut, arrays.grad_out, c, step, inner, element, stop, values)
            fetch(cut, arrays.x, c, step, inner, element, stop, others)
        if AGAIN:
            pass_activation(arrays, cut, c, step, inner, element, stop, before, values, others)
        if ELEMENTWISE:
            apply_elements(arrays, element, stop, numbers, values, others)
        else:
            for i in range(VALUES):
                k = i % WIDTH // ALONG
                mean, scale, slope = numbers[k], numbers[OWN + k], numbers[2 * OWN + k]
                offset, unit = numbers[3 * OWN + k], numbers[4 * OWN + k]
                if CONSTANT:  # x may be infinite: it is not multiplied by a slope of 0
                    its = scale * real(values[i])
                else:
                    its = gradient(real(values[i]), real(others[i]), mean, unit, scale, slope, offset)
                values[i] = carried(its, stored)
        blank(values, bits_of(arrays, element, stop))
        write(cut, arrays.out, c, step, inner, element, stop, values)
        step, inner = advance_all(cut, step, inner)
        start += chunk()


def apply(arrays, cut):
    """grad_x. Blocks: tiles × parts, the last first."""
    kept = cuda.shared.array(0, STORED)  # nothing
    values = cuda.local.array(VALUES, held)
    others = cuda.local.array(VALUES, held)
    numbers = cuda.local.array(OWN_TABLES, real)
    tile, piece = share_of(reversed_block(), cut.parts)
    c, first, last, stop = span(cut, tile, piece)
    get_tables(arrays, cut, c, 5, numbers)
    apply_part(arrays, cut, c, first, last, stop, kept, numbers, values, others)


def backward(arrays, cut):
    """Training backward. Blocks: as in `forward`; x and dy stay in shared memory."""
    kept = cuda.shared.array(0, STORED)
    high = cuda.shared.array(THREADS, np.float64)
    low = cuda.shared.array(THREADS, np.float64)
    tables = cuda.shared.array(TILE_TABLES, REAL)
    values = cuda.local.array(VALUES, held)
    others = cuda.local.array(VALUES, held)
    table = cuda.local.array(5, real)
    mine = cuda.local.array(OWN_TABLES, real)
    totals = cuda.local.array(OWN, np.float64)
    losses = cuda.local.array(OWN, np.float64)
    products = cuda.local.array(OWN, np.float64)
    products_lost = cuda.local.array(OWN, np.float64)
    team, rank = share_of(int64(cuda.blockIdx.x), cut.team)
    channel, index = worker()
    turn = int64(0)
    tile = team
    while tile * TILE < cut.channels:
        c, first, last, stop = span(cut, tile, rank)
        reduce_part(
            arrays, cut, c, first, last, stop, kept, values, others, totals, losses, products, products_lost
        )
        total, lost = block_sum(totals, losses, high, low)
        product, product_lost = block_sum(products, products_lost, high, low)
        four = total, lost, product, product_lost
        if TEAMS:
            address = notes(arrays, cut, turn, team)
            if index == 0:
                put_four(address, rank, TILE, channel, four)
            team_barrier(arrays, cut, team, rank)
            four = pool_sums(arrays, cut, address, TILE, channel, cut.team, high, low)
        if index == 0 and tile * TILE + channel < cut.channels:
            finish_gradients(arrays, cut, tile * TILE + channel, four, rank == 0, table)
            put_shared(tables, channel, 5, table)
        cuda.syncthreads()
        get_shared(tables, 5, mine)
        apply_part(arrays, cut, c, first, last, stop, kept, mine, values, others)
        tile += cut.teams
        turn = 1 - turn
