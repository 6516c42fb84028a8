"""One AdamW step with the p-norm decay in one pass over the memory: what `one_pass.cpp` does, in Triton, for a GPU.

Two kernels for any number of parameters: `prepare` counts the step and works out the scalars of each parameter,
`update` runs over all their elements. `triton_kernel.py` launches them; nothing else imports this file, since it needs
Triton.

The table has a row of 24 words of 8 bytes for each parameter::

    0 weights     4 factors of rows       8 elements           12 learning rate     16 log2(beta2)     20 p - 2
    1 gradient    5 factors of columns    9 columns            13 weight decay      17 1 - beta2       21 threshold
    2 exp_avg     6 step                 10 seed               14 log2(beta1)       18 eps             22 frozen
    3 exp_avg_sq  7 learning rate        11 stochastic or not  15 1 - beta1         19 log2(lambda)    23 nothing

0 to 7 are addresses (0 for what there is not), 8 to 11 integers, the others float64. `prepare` turns them into 12
numbers in float32, which `update` reads.
"""

import triton
import triton.language as tl


@triton.jit
def _hash(x):
    # functional.random_bits, in unsigned numbers
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _number(entry, column, live):
    return tl.load(entry + column, live, 0).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["count"])
def prepare(table, numbers, count, CAPTURED: tl.constexpr, BLOCK: tl.constexpr):
    """Count the step of each parameter, and turn its row of the table into the numbers that `update` reads."""
    task = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = task < count
    entry = table + task * 24
    address = tl.load(entry + 6, live, 0)
    counter, counts = address.to(tl.pointer_type(tl.float32)), address != 0
    step = tl.load(counter, counts, 0.0) + 1.0
    tl.store(counter, step, counts)
    address = tl.load(entry + 7, live, 0)
    lr = tl.load(address.to(tl.pointer_type(tl.float32)), address != 0, 0.0).to(tl.float64)
    lr = tl.where(address != 0, lr, _number(entry, 12, live))
    # In float64: 1 - beta2 ** step would lose most of its digits.
    step_size = lr / (1.0 - tl.exp2(step.to(tl.float64) * _number(entry, 14, live)))
    bias = 1.0 / tl.sqrt(1.0 - tl.exp2(step.to(tl.float64) * _number(entry, 16, live)))
    seed = tl.load(entry + 10, live, 0).to(tl.uint32)
    if CAPTURED:  # A graph repeats the seed, but not the step.
        seed = _hash(seed + step.to(tl.uint32))
    log2_strength = tl.log2(lr) + _number(entry, 19, live)
    # Nothing is below a threshold of 0: without a strength nothing decays.
    threshold = tl.where(log2_strength > -1e300, _number(entry, 21, live), 0.0)
    number = numbers + task * 12
    tl.store(number, (1.0 - lr * _number(entry, 13, live)).to(tl.float32), live)
    tl.store(number + 1, _number(entry, 15, live).to(tl.float32), live)
    tl.store(number + 2, _number(entry, 17, live).to(tl.float32), live)
    tl.store(number + 3, step_size.to(tl.float32), live)
    tl.store(number + 4, bias.to(tl.float32), live)
    tl.store(number + 5, _number(entry, 18, live).to(tl.float32), live)
    tl.store(number + 6, log2_strength.to(tl.float32), live)
    tl.store(number + 7, _number(entry, 20, live).to(tl.float32), live)
    tl.store(number + 8, threshold.to(tl.float32), live)
    tl.store(number + 9, _number(entry, 22, live).to(tl.float32), live)
    tl.store(number.to(tl.pointer_type(tl.uint32)) + 10, seed, live)


@triton.jit
def _load(word, start, lane, mask, BF16: tl.constexpr, ALIGNED: tl.constexpr):
    # Where the elements are that the table gives the address of, and their values.
    if BF16:
        first = tl.load(word).to(tl.pointer_type(tl.uint16)) + start
    else:
        first = tl.load(word).to(tl.pointer_type(tl.float32)) + start
    if ALIGNED:  # then 16 bytes are loaded at once
        first = tl.multiple_of(first, 16)
    pointer = first + lane
    x = tl.load(pointer, mask, 0)
    if BF16:  # the upper half of a float32
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return pointer, x


@triton.jit
def _store(pointer, x, random, stochastic, mask, BF16: tl.constexpr):
    if BF16:
        bits = x.to(tl.uint32, bitcast=True)
        # Adding 16 random bits rounds stochastically, adding half of the last place (a little less, if that place is
        # even) to nearest.
        up = tl.where(stochastic, random, 0x7FFF + ((bits >> 16) & 1))
        rounded = (bits + up) >> 16
        tl.store(pointer, tl.where(x == x, rounded, 0x7FC0).to(tl.uint16), mask)
    else:
        tl.store(pointer, x, mask)


@triton.jit
def update(
    programs,
    table,
    numbers,
    WEIGHT_BF16: tl.constexpr,
    MOMENT_BF16: tl.constexpr,
    FACTORS: tl.constexpr,
    POST_STEP: tl.constexpr,
    ALONE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one block of one parameter, which the program looks up by its id."""
    program = programs + tl.program_id(0).to(tl.int64) * 2
    task = tl.load(program)
    # A parameter may have more elements than an int32 counts; a block has not.
    start = tl.load(program + 1).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    entry, number = table + task * 24, numbers + task * 12
    left = tl.minimum(tl.load(entry + 8) - start, BLOCK).to(tl.int32)
    if ALIGNED:
        left = tl.multiple_of(left, 16)
    mask = lane < left

    param, w_hat = _load(entry, start, lane, mask, WEIGHT_BF16, ALIGNED)
    _, g = _load(entry + 1, start, lane, mask, WEIGHT_BF16, ALIGNED)
    size = tl.abs(g if ALONE else w_hat)
    if not ALONE:
        exp_avg, m = _load(entry + 2, start, lane, mask, MOMENT_BF16, ALIGNED)
        exp_avg_sq, v = _load(entry + 3, start, lane, mask, MOMENT_BF16, ALIGNED)
        m += tl.load(number + 1) * (g - m)
        v += tl.load(number + 2) * (g * g - v)
        u = m / (tl.sqrt(v) * tl.load(number + 4) + tl.load(number + 5))
        w_hat = tl.load(number) * w_hat - tl.load(number + 3) * u

    r = tl.abs(w_hat) if POST_STEP else size
    if FACTORS:
        # Divisions of 64 bits once in a block, not for each element.
        cols = tl.load(entry + 9)
        first_row, first_col = start // cols, (start % cols).to(tl.int32) + lane
        row, col = first_col // cols.to(tl.int32), first_col % cols.to(tl.int32)
        rows = tl.load(entry + 4).to(tl.pointer_type(tl.float32)) + first_row
        columns = tl.load(entry + 5).to(tl.pointer_type(tl.float32))
        r *= tl.load(rows + row, mask, 0.0) * tl.load(columns + col, mask, 0.0)
    # Where p is 2, 0 * log2(0) would be NaN.
    power = tl.load(number + 7)
    exponent = tl.where(power == 0.0, 0.0, power * tl.log2(r)) + tl.load(number + 6)
    exempt = r >= tl.load(number + 8)
    decayed = w_hat / (1.0 + tl.exp2(exponent))
    # A subnormal weight becomes zero, as in functional.lp_decay_.
    decayed = tl.where(tl.abs(decayed) < 1.1754944e-38, 0.0, decayed)
    w_hat = tl.where(exempt, w_hat, decayed)
    w_hat = tl.where(size <= tl.load(number + 9), 0.0, w_hat)

    random = _hash(lane.to(tl.uint32) + (start.to(tl.uint32) + tl.load(number.to(tl.pointer_type(tl.uint32)) + 10)))
    stochastic = tl.load(entry + 11) != 0
    if not ALONE:
        _store(exp_avg, m, random, False, mask, MOMENT_BF16)
        _store(exp_avg_sq, v, random >> 16, stochastic, mask, MOMENT_BF16)
    _store(param, w_hat, random & 0xFFFF, stochastic, mask, WEIGHT_BF16)
