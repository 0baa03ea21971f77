"""The mutation check: plants known bugs in nbbn, one at a time, and shows that the tests catch each.

    python tests/mutations.py [NAME ...] [--report docs/mutations.md]

A bug is planted in a copy of the tree, which keeps its compiled kernels to itself. There the tests run that
are most likely to see it, and then, if they pass, all of them. First the likely ones run without any bug.
"""

import argparse
import ast
import datetime
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
# Seconds. A test that waits for ever has a limit of its own; here one ends that has none.
LIKELY_LIMIT, ALL_LIMIT = 1800, 7200
TEST = re.compile(r"tests/\w+\.py(?:::\w+)+(?:\[.*?\](?=\s|$))?")


class Mutation(NamedTuple):
    """A bug, and who should see it.

    Attributes
    ----------
    name, bug : str
        For the command line, and in words.
    file, old, new : str
        A file in nbbn/, text that occurs once there, and what takes its place.
    row : int or None
        The row of the bug bank (test_bugbank.py).
    tests : tuple of str
        Those in tests/ that are most likely to fail.
    """

    name: str
    bug: str
    file: str
    old: str
    new: str
    row: int | None
    tests: tuple[str, ...]

    def planted(self) -> str:
        """Return the file with the bug in it."""
        source = (ROOT / "nbbn" / self.file).read_text()
        assert source.count(self.old) == 1, (
            f"{self.name}: {self.old!r} is there {source.count(self.old)} times"
        )
        return source.replace(self.old, self.new)

    def place(self) -> str:
        """Return the file, and the function in it."""
        source = (ROOT / "nbbn" / self.file).read_text()
        line = source[: source.index(self.old) + len(self.old.rstrip())].count("\n") + 1
        names = [
            node.name
            for node in ast.walk(ast.parse(source))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.lineno <= line <= node.end_lineno
        ]
        return f"{self.file}: {'.'.join(names)}" if names else self.file


MUTATIONS = [
    # --- accuracy ---
    Mutation(
        "raw-moments",
        "variances are merged as E[x²] - E[x]²",
        "formulas.py",
        "return mean, rest, delta * (delta * (count_a * share))",
        "return mean, rest, count_a * mean_a * mean_a + count_b * mean_b * mean_b - count * mean * mean",
        1,
        ("test_stats.py::test_merged_parts_are_the_whole",),
    ),
    Mutation(
        "lost-squares",
        "what the sum of squared deviations loses from block to block is forgotten",
        "formulas.py",
        "return mean, rest, m2, (lost_a + lost_b) + (lost + more)",
        "return mean, rest, m2, 0.0 * lost",
        None,
        ("test_schedules.py::test_many_blocks",),
    ),
    Mutation(
        "trusted-guess",
        "squares around a guess that an outlier spoilt are taken for good",
        "cpu/sums.py",
        "at_most(least, squares)",
        "at_most(squares, squares)",
        1,
        ("test_accuracy.py::test_one_outlier",),
    ),
    Mutation(
        "folded-output",
        "out is a · x + b",
        "formulas.py",
        "return (x - mean) * scale + shift",
        "return x * scale + (shift - mean * scale)",
        1,
        ("test_evaluation.py::test_large_means[100000.0-float32-float32]",),
    ),
    Mutation(
        "not-again",
        "squares of a short row that are too large or too small for float32 are taken for good",
        "cpu/short.py",
        "if good | (-1 << here) != -1:",
        "if good < 0:",
        None,
        ("test_schedules.py::test_rows_that_are_looked_at_again[float32]",),
    ),
    Mutation(
        "short-padding",
        "the zeros behind a short row are among the values whose squares are summed up",
        "cpu/short.py",
        "square = square + (keep_first(here, end - j) if j + LANES > end else here)",
        "square = square + here",
        23,
        ("test_family.py::test_values[layer-2x65-last1-float32]",),
    ),
    Mutation(
        "short-lost",
        "what the sums of a short row lose is forgotten where its lanes are added up",
        "cpu/short.py",
        "store(lost, i * LANES, (rest + other) + more)",
        "store(lost, i * LANES, 0.0 * more)",
        None,
        ("test_accuracy.py::test_constant_channels_are_exact[49-0.1-float64]",),
    ),
    Mutation(
        "last-rows",
        "gradients of the parameters of columns are those of the last rows of each task",
        "cpu/short.py",
        "    if not begins:\n        total, product",
        "    if begins < 0:\n        total, product",
        None,
        ("test_family.py::test_values[layer-150x4x24-last2-float32]",),
    ),
    Mutation(
        "low-part-forward",
        "the low part of the mean is left out of the output",
        "cpu/fused.py",
        "lost = (mean - doubled(rounded)) + rest",
        "lost = 0.0 * rest",
        2,
        ("test_bugbank.py::test_row_02_small_steps[contiguous-float32]",),
    ),
    Mutation(
        "low-part-backward",
        "the low part of the mean is left out of grad_x",
        "cpu/kernels.py",
        "lost = mean - widen(rounded)",
        "lost = mean * 0.0",
        1,
        ("test_bugbank.py::test_row_01_offsets[contiguous-float32]",),
    ),
    Mutation(
        "low-part-squares",
        "squares around the high part of the mean are not corrected by the low one",
        "formulas.py",
        "return squares - rest * rest * count",
        "return squares",
        2,
        ("test_bugbank.py::test_row_02_small_steps[contiguous-float64]", "test_nist.py::test_nist_sets"),
    ),
    Mutation(
        "rounded-mean",
        "the mean of a block is rounded, and its rest lost",
        "formulas.py",
        "return two_sum(mean, (fma(-mean, count, total) + lost) / count)",
        "return mean, 0.0 * mean",
        3,
        ("test_bugbank.py::test_row_03_constants[contiguous-float64]",),
    ),
    Mutation(
        "plain-sums",
        "what a sum loses is forgotten",
        "formulas.py",
        "return total, (a - (total - part)) + (b - part)",
        "return total, 0.0 * part",
        4,
        ("test_accuracy.py::test_four_million_uniform_values",),
    ),
    Mutation(
        "merge-weights",
        "means are merged with each other's weights",
        "formulas.py",
        "share = count_b / count\n",
        "share = count_a / count\n",
        None,
        ("test_stats.py::test_merged_parts_are_the_whole",),
    ),
    Mutation(
        "unscaled-deviation",
        "in grad_x, x - mean is not brought into range",
        "formulas.py",
        "power_above(invstd), most)",
        "like(invstd, 1.0), most)",
        8,
        ("test_accuracy.py::test_tiny_and_huge_values[8x3x100@1-1e-30-float32]",),
    ),
    # --- the formulas ---
    Mutation(
        "unbiased-output",
        "the unbiased variance normalizes",
        "formulas.py",
        "return m2 / count",
        "return m2 / (count - 1.0)",
        33,
        ("test_stats.py::test_every_shape[2x3@1-float32]",),
    ),
    Mutation(
        "biased-running-var",
        "running_var tracks the biased variance",
        "formulas.py",
        "return var * (count / (count - correction))",
        "return var",
        33,
        ("test_running.py::test_few_values[2x3@1-float32]",),
    ),
    Mutation(
        "momentum-flipped",
        "momentum is the weight of the old statistics",
        "formulas.py",
        "return (1.0 - momentum) * old + momentum * new",
        "return momentum * old + (1.0 - momentum) * new",
        34,
        ("test_running.py::test_few_values[2x3@1-float32]",),
    ),
    Mutation(
        "momentum-one",
        "at momentum 1 an old NaN stays",
        "formulas.py",
        "if momentum == 1.0:",
        "if momentum > 1.0:",
        34,
        ("test_running.py::test_momentum_one_replaces",),
    ),
    Mutation(
        "momentum-zero",
        "at momentum 0 a batch of NaN is written",
        "functional.py",
        "if momentum == 0.0:",
        "if momentum < 0.0:",
        34,
        ("test_running.py::test_momentum_zero_keeps_every_bit",),
    ),
    Mutation(
        "cumulative-count",
        "the cumulative average counts one batch too many",
        "base.py",
        "[1.0 / (tracked + k) for",
        "[1.0 / (tracked + k + 1) for",
        34,
        ("test_running.py::test_cumulative_average",),
    ),
    Mutation(
        "torn-state",
        "a state is read while another thread writes it",
        "base.py",
        "with self._lock:\n            return {\n                name: getattr",
        "with threading.RLock():\n            return {\n                name: getattr",
        None,
        ("test_processes.py::test_what_is_seen_of_a_module_in_training_is_of_one_batch",),
    ),
    Mutation(
        "swapped-bfloat16",
        "bfloat16 in the other byte order is taken for native",
        "dtypes.py",
        'and dtype == dtype.newbyteorder("=")',
        "and dtype.itemsize == 2",
        None,
        ("test_half.py::test_the_other_byte_order_is_refused",),
    ),
    Mutation(
        "rounded-twice",
        "float64 goes to bfloat16 by way of float32",
        "dtypes.py",
        "if storage_of(dtype) is not BFLOAT16:",
        "if dtype is not BFLOAT16.dtype:",
        None,
        ("test_half.py::test_modules_of_bfloat16_round_once",),
    ),
    Mutation(
        "eps-outside",
        "eps is added outside the root",
        "formulas.py",
        "return 1.0 / math.sqrt(var + eps)",
        "return 1.0 / (math.sqrt(var) + eps)",
        10,
        ("test_bugbank.py::test_row_10_eps[contiguous-float32]",),
    ),
    Mutation(
        "eps-in-evaluation",
        "eps is left out in evaluation",
        "cpu/kernels.py",
        "inverse_deviation(several(call.var, c, here, call.channels, 1.0), call.eps)",
        "inverse_deviation(several(call.var, c, here, call.channels, 1.0), 0.0)",
        10,
        ("test_bugbank.py::test_row_10_eps[contiguous-float32]",),
    ),
    Mutation(
        "eps-in-running-var",
        "eps is kept in running_var",
        "cpu/kernels.py",
        "unbiased(stats[call.channels + c], count",
        "unbiased(stats[call.channels + c] + call.eps, count",
        10,
        ("test_bugbank.py::test_row_10_eps[contiguous-float32]",),
    ),
    Mutation(
        "eps-raised",
        "eps is raised to 1e-5 at least",
        "formulas.py",
        "math.sqrt(var + eps)",
        "math.sqrt(var + max(eps, 1e-5))",
        11,
        ("test_bugbank.py::test_row_11_zero_eps[contiguous-float32]",),
    ),
    Mutation(
        "evaluation-gradient",
        "the gradient in evaluation is that of training",
        "functional.py",
        "gamma, mu, sigma, training",
        "gamma, mu, sigma, True",
        35,
        ("test_bugbank.py::test_row_35_the_two_formulas[contiguous-float32]",),
    ),
    Mutation(
        "training-gradient",
        "the gradient in training is that of evaluation",
        "functional.py",
        "gamma, mu, sigma, training",
        "gamma, mu, sigma, False",
        35,
        ("test_bugbank.py::test_row_35_the_two_formulas[contiguous-float32]",),
    ),
    Mutation(
        "grad-weight",
        "grad_weight is not multiplied by invstd",
        "cpu/kernels.py",
        "load_first(gradients, c, here) * invstd,",
        "load_first(gradients, c, here),",
        None,
        ("test_backward.py::test_every_shape[2x3@1-float32-training]",),
    ),
    Mutation(
        "grad-bias-accumulates",
        "grad_bias is added to what was there",
        "cpu/kernels.py",
        "total[0] + total[1], here)",
        "total[0] + total[1] + load_first(stats, call.channels + c, here), here)",
        36,
        ("test_bugbank.py::test_row_36_nothing_accumulates[contiguous-float32]",),
    ),
    Mutation(
        "no-weight",
        "a weight that is not given is 0",
        "cpu/parameters.py",
        "weight = several(call.weight, channel, here, call.parameters, 1.0)",
        "weight = several(call.weight, channel, here, call.parameters, 0.0)",
        None,
        ("test_bugbank.py::test_row_33_biased_and_unbiased[contiguous-float32]",),
    ),
    Mutation(
        "no-weight-again",
        "where z is computed again for an activation's gradient, a weight that is not given is 0",
        "cpu/parameters.py",
        "return parameter(call.weight, index, 1.0), parameter(call.bias, index, 0.0)",
        "return parameter(call.weight, index, 0.0), parameter(call.bias, index, 0.0)",
        None,
        ("test_fused.py::test_parameters_that_are_not_given[float32-True]",),
    ),
    # --- what goes along ---
    Mutation(
        "relu-gradient",
        "a relu's gradient goes by the sign of grad_out",
        "formulas.py",
        "return at_most_zero(z, like(z, 0.0), grad)",
        "return at_most_zero(grad, like(z, 0.0), grad)",
        None,
        ("test_fused.py::test_relu_is_exact[float32]",),
    ),
    Mutation(
        "activation-bias",
        "z is computed again without the bias",
        "cpu/fused.py",
        "numbers = normalization(mean, 0.0, scale, bias, real)",
        "numbers = normalization(mean, 0.0, scale, 0.0 * bias, real)",
        None,
        ("test_fused.py::test_relu_is_exact[float32]",),
    ),
    Mutation(
        "residual-rounding",
        "sums are of the residual's gradient before it is rounded",
        "cpu/fused.py",
        "return some(kept, j, last)",
        "return gradient",
        None,
        ("test_fused.py::test_gradient_of_the_residual[bfloat16-silu+residual]",),
    ),
    Mutation(
        "mask-squares",
        "squares of what does not count are in the variance",
        "cpu/sums.py",
        "only(bits, add_squared_deviation(square, x, guess), square)",
        "add_squared_deviation(square, x, guess)",
        None,
        ("test_masks.py::test_against_what_counts[float32-0.6]",),
    ),
    Mutation(
        "mask-count",
        "the gradient is divided by how many values there are, counting or not",
        "cpu/kernels.py",
        "scale, scale, product, total, call.count",
        "scale, scale, product, total, float(call.outer * call.inner)",
        None,
        ("test_masks.py::test_against_what_counts[float32-0.6]",),
    ),
    Mutation(
        "mask-runs",
        "all rows of a run have the bits of the first",
        "cpu/results.py",
        "            number += 1\n            into = 0",
        "            into = 0",
        None,
        ("test_schedules.py::test_masks_where_channels_lie_side_by_side[threads]",),
    ),
    Mutation(
        "mask-spread",
        "of 64 positions of a few channels the first eight are taken eight times",
        "cpu/masks.py",
        "spread[bits >> 8 * k & 255]",
        "spread[bits & 255]",
        None,
        ("test_schedules.py::test_masks_where_channels_lie_side_by_side[threads]",),
    ),
    Mutation(
        "mask-follows",
        "rows' bits are taken to follow each other where there is room between them",
        "cpu/masks.py",
        "return call.bits_pitch * 8 == call.fold * call.channels",
        "return call.bits_pitch * 8 >= call.fold * call.channels",
        None,
        ("test_schedules.py::test_masks_where_channels_lie_side_by_side[threads]",),
    ),
    Mutation(
        "mask-block",
        "of the last steps of a block nobody asks whether they count",
        "cpu/masks.py",
        "            set_before(end, to + f * size + i, bits)\n        total -= bits",
        "            set_before(end, to + f * size + i, bits)",
        None,
        ("test_schedules.py::test_masks_where_channels_lie_side_by_side[threads]",),
    ),
    Mutation(
        "together-rest",
        "short rows that a last task, of fewer, does not look at another one for are not written",
        "cpu/kernels.py",
        "if task > first else call.tiles, call.tiles):\n            tile = tile_before(call, task, part, 3",
        "if task == first else call.tiles, call.tiles):\n            tile = tile_before(call, task, part, 3",
        None,
        ("test_schedules.py::test_schedules_keep_the_bits_of_layer_norm[together-5-float32-1]",),
    ),
    Mutation(
        "shared-vector",
        "a vector that two long channels share is normalized as if it were all of the first one",
        "cpu/results.py",
        "return place + min(LANES, max(0, j + LANES - last))",
        "return place + min(LANES, max(0, j + LANES - last)) // LANES * LANES",
        None,
        ("test_schedules.py::test_channels_that_share_lines[instance_norm-float32-1]",),
    ),
    Mutation(
        "weights-of-the-first",
        "of several long rows in a tile, those after the first are beside other columns' weights",
        "cpu/results.py",
        "            read = begun_at(read, first)\n            end",
        "            end",
        None,
        ("test_schedules.py::test_channels_that_share_lines[layer_norm-float32-1]",),
    ),
    Mutation(
        "weights-go-on",
        "sums of a second long row in a tile are taken with the weights of the columns behind the first",
        "cpu/parameters.py",
        "rows[ROWS + k] = address(after(weights, -call.inner))",
        "rows[ROWS + k] = address(after(weights, 0))",
        None,
        ("test_schedules.py::test_channels_that_share_lines[layer_norm-float32-1]",),
    ),
    # --- layouts ---
    Mutation(
        "last-column",
        "the last value of a row is not read",
        "cpu/rows.py",
        "return load_first(p, j, count - j)",
        "return load_first(p, j, count - j - 1)",
        23,
        ("test_bugbank.py::test_row_23_tails[contiguous-float32]",),
    ),
    Mutation(
        "beyond-the-row",
        "a row is read beyond its end",
        "cpu/rows.py",
        "return load_first(p, j, count - j)",
        "return load(p, j)",
        23,
        ("test_bugbank.py::test_row_23_tails[contiguous-float32]",),
    ),
    Mutation(
        "unwritten-tail",
        "the last value of a row is not written",
        "cpu/results.py",
        "store_first(out, j, value(call, place, its, j, j + here, numbers), here)",
        "store_first(out, j, value(call, place, its, j, j + here, numbers), here - 1)",
        23,
        ("test_bugbank.py::test_row_23_tails[contiguous-float32]",),
    ),
    Mutation(
        "last-group",
        "the last group of channels, of fewer than the others, is left out",
        "cpu/plan.py",
        "self.groups = -(-self.channels // group)",
        "self.groups = max(1, self.channels // group)",
        24,
        ("test_bugbank.py::test_row_24_channels[contiguous-float32]",),
    ),
    Mutation(
        "count-of-31-bits",
        "values are counted in 31 bits",
        "cpu/rows.py",
        "return row // call.pieces * call.inner + row % call.pieces * call.width",
        "return (row // call.pieces * call.inner + row % call.pieces * call.width) & 0x7FFFFFFF",
        22,
        ("test_bugbank.py::test_row_22_statistics_of_more_values_than_32_bits_count[planes]",),
    ),
    Mutation(
        "negative-strides",
        "an axis is turned round one array at a time",
        "geometry.py",
        "steps = [-step for step in steps]",
        "steps = [abs(step) for step in steps]",
        25,
        ("test_bugbank.py::test_row_27_pairs_of_layouts[reversed-contiguous]",),
    ),
    Mutation(
        "joined-axes",
        "axes are joined that continue each other in x, and not in grad_out",
        "geometry.py",
        "if all(a == b * size for a, b in zip(slower_steps, steps, strict=True)):",
        "if slower_steps[0] == steps[0] * size:",
        27,
        ("test_bugbank.py::test_row_27_pairs_of_layouts[contiguous-inside]",),
    ),
    Mutation(
        "strided-x",
        "values that are not side by side are read as if they were",
        "cpu/plan.py",
        "inner = geometry.inner == 1 or layout.inner == size",
        "inner = True",
        28,
        ("test_layouts.py::test_x_in_every_layout[3x1x4x7@1-every_second-float32]",),
    ),
    Mutation(
        "strided-out",
        "out is written with the strides of x",
        "cpu/results.py",
        "call.at_out, row, number",
        "call.at_x, row, number",
        27,
        ("test_layouts.py::test_out_in_every_layout[every_second-float32]",),
    ),
    Mutation(
        "strided-statistics",
        "the stride of running statistics is ignored",
        "arrays.py",
        "return address(value), stride, code",
        "return address(value), value.itemsize, code",
        31,
        ("test_running.py::test_buffers_of_any_stride_are_updated[every_second]",),
    ),
    # --- half precision ---
    Mutation(
        "half-rounded-twice",
        "running statistics of 16 bits are rounded to float32 first",
        "cpu/simd.py",
        "_rounded_to_odd(builder, value), element)",
        "builder.fptrunc(value, ir.FloatType()), element)",
        None,
        ("test_half.py::test_running_statistics_are_rounded_once",),
    ),
    Mutation(
        "half-truncated",
        "a bfloat16 is cut off, not rounded",
        "cpu/simd.py",
        "rounded = builder.add(word, builder.add(odd, _constant(kind, 0x7FFF)))",
        "rounded = word",
        None,
        ("test_half.py::test_conversions",),
    ),
    Mutation(
        "half-subnormal",
        "without F16C, half of the subnormal float16 are rounded as if they were normal",
        "cpu/simd.py",
        'small = builder.icmp_unsigned("<", magnitude, _constant(kind, 113 << 23))',
        'small = builder.icmp_unsigned("<", magnitude, _constant(kind, 112 << 23))',
        None,
        ("test_half.py::test_conversions_of_other_processors[]",),
    ),
    Mutation(
        "half-output-cancels",
        "out of 16 bits is computed in float32 also where terms cancel",
        "formulas.py",
        "fma(math.fabs(shift), like(shift, part), doubt)",
        "fma(math.fabs(shift), like(shift, 0.0), doubt)",
        None,
        ("test_half.py::test_terms_that_cancel",),
    ),
    Mutation(
        "half-gradient-cancels",
        "grad_x of 16 bits is computed in float32 also where terms cancel",
        "formulas.py",
        "like(x, 2.0 * part), doubt)",
        "like(x, 0.0), like(x, 0.0))",
        None,
        ("test_half.py::test_gradient_terms_that_cancel",),
    ),
    Mutation(
        "half-second-vector",
        "of the two vectors of 16 bits that are a line, one is not looked at for results in doubt",
        "cpu/results.py",
        "doubted(row, first, doubt) | doubted(row, second, more_doubt) != 0",
        "doubted(row, first, doubt) != 0",
        None,
        ("test_half.py::test_terms_that_cancel_beside_poison",),
    ),
    Mutation(
        "merged-set",
        "of a set whose statistics are taken at once, the last channel is left out",
        "cpu/run.py",
        "pool * geometry.inner\n        strides = ((pool * x.channel",
        "(pool - 1) * geometry.inner\n        strides = ((pool * x.channel",
        None,
        ("test_schedules.py::test_sets_as_rows[no_rows-float32]",),
    ),
    Mutation(
        "set-grad-weight",
        "grad_weight of a set of channels is not multiplied by invstd",
        "cpu/kernels.py",
        "its = load_first(gradients, c, here) * invstd",
        "its = load_first(gradients, c, here)",
        None,
        ("test_family.py::test_values[group-4x6-@1-2groups-float32]",),
    ),
    Mutation(
        "last-columns",
        "of a row that is copied, the last columns are taken for a whole vector",
        "cpu/copies.py",
        "                j = min(j, columns - LANES)  # the last ones a second time\n",
        "",
        None,
        ("test_schedules.py::test_sets_as_rows[no_rows-float32]",),
    ),
    Mutation(
        "part-of-a-run",
        "as many elements of a run are copied as can be, not as there are",
        "cpu/copies.py",
        "here = min(TURNED, number - k)",
        "here = TURNED",
        None,
        ("test_schedules.py::test_side_by_side_in_other_layouts[float32]",),
    ),
    Mutation(
        "steps-together",
        "rows of another step of a slower dimension are taken to follow at once",
        "cpu/copies.py",
        "together = min(last - row, steps_of_last - step % steps_of_last)",
        "together = last - row",
        None,
        ("test_schedules.py::test_against_the_oracle[2x301x2x3@1-threads-float32]",),
    ),
    Mutation(
        "turned-back",
        "short channels are not copied, nor copied back, where those of a row lie side by side already",
        "cpu/rows.py",
        "    invoke(kernel, row, row + number, address(job))\n",
        "    if operand.gather != TOGETHER:\n        invoke(kernel, row, row + number, address(job))\n",
        None,
        ("test_schedules.py::test_side_by_side_in_other_layouts[float32]",),
    ),
    Mutation(
        "shared-count",
        "values of a set that is summed up as one channel are counted as those of one of its channels",
        "cpu/kernels.py",
        "values_before(call, first, stored)) * shared\n        fill",
        "values_before(call, first, stored))\n        fill",
        None,
        ("test_schedules.py::test_sets_as_rows[no_rows-float32]",),
    ),
    Mutation(
        "doubt-of-two",
        "a vector of two channels is taken for one of the first where all of it is in doubt",
        "cpu/results.py",
        "doubtful != ALL_LANES or begin + LANES > columns",
        "doubtful != ALL_LANES",
        None,
        ("test_half.py::test_gradients_that_are_nothing_but_roundings[shape0-float16]",),
    ),
    Mutation(
        "half-parameters",
        "a parameter of bfloat16 is read as float16",
        "cpu/parameters.py",
        "if code == CODE16:",
        "if code != CODE64:",
        37,
        (
            "test_bugbank.py::test_row_37_types_of_parameters[contiguous-bfloat16]",
            "test_half.py::test_module",
        ),
    ),
    Mutation(
        "half-running-var",
        "a running_var beyond 65504 is cut down to it",
        "cpu/kernels.py",
        "invstd = inverse_deviation(several(call.var, c, here, call.channels, 1.0), call.eps)",
        "var = several(call.var, c, here, call.channels, 1.0)\n"
        "        var = choose(at_most(var, splat(65504.0)), var, splat(65504.0))\n"
        "        invstd = inverse_deviation(var, call.eps)",
        6,
        ("test_bugbank.py::test_row_06_large_variances[contiguous-float16]",),
    ),
    # --- reproducibility ---
    Mutation(
        "chunks-by-threads",
        "how sums are cut up depends on the number of threads",
        "cpu/plan.py",
        "self._tiling = tiling = tile(geometry, self._size, not (across or turned))\n",
        "self._tiling = tiling = tile(geometry, self._size, not (across or turned))\n"
        "        if threads == 1:\n"
        '            self._tiling = tiling = Tiling(**vars(tiling) | {"chunk": tiling.rows, "chunks": 1})\n',
        44,
        ("test_reproducible.py::test_every_number_of_threads[32x3x112x112@1-float32]",),
    ),
    Mutation(
        "lost-tasks",
        "the tasks that are left over from equal shares are not done",
        "compiler.py",
        "share * tasks // shares, (share + 1) * tasks // shares",
        "share * (tasks // shares), (share + 1) * (tasks // shares)",
        40,
        ("test_bugbank.py::test_row_40_every_task_is_done_once",),
    ),
    # --- isolation ---
    Mutation(
        "clamped-nan",
        "a NaN for a variance is clamped to 0",
        "formulas.py",
        "math.sqrt(var + eps)",
        "math.sqrt(at_most_zero(-var, var, like(var, 0.0)) + eps)",
        38,
        ("test_reproducible.py::test_poison_in_a_parameter_stays_in_its_channel[nan-running_var]",),
    ),
    Mutation(
        "fastmath",
        "fastmath may assume that there is no NaN, and add up in any order",
        "compiler.py",
        'CONTRACT = ("contract",)',
        'CONTRACT = ("fast",)',
        38,
        (
            "test_reproducible.py::test_poison_stays_in_its_channel[6x5x7@1-all]",
            "test_bugbank.py::test_row_03_constants[contiguous-float64]",
        ),
    ),
    Mutation(
        "neighbours",
        "where one channel's squares are taken again, so are those of its neighbours",
        "cpu/kernels.py",
        "store(squares, g, choose(trust[g], load(squares, g), anew))",
        "store(squares, g, anew)",
        None,
        ("test_reproducible.py::test_poison_stays_in_its_channel[6x5x7@1-nan]",),
    ),
    # --- atomicity ---
    Mutation(
        "counted-first",
        "a batch is counted before it is checked",
        "module.py",
        "            with self._lock:\n                out, stats",
        "            with self._lock:\n                self._counting()[0]()\n                out, stats",
        None,
        ("test_errors.py::test_module_input",),
    ),
    Mutation(
        "steps-apart",
        "an interrupt may come between two writes to the state",
        "compiler.py",
        "collections.deque(map(partial.__call__, steps), maxlen=0)",
        "for step in steps:\n        step()",
        None,
        ("test_faults.py::test_interrupt_at_every_point[one_thread]",),
    ),
    Mutation(
        "cleared-out",
        "out is cleared before x is read",
        "functional.py",
        "stats = here.empty((3, channels))\n    if momentum",
        "stats = here.empty((3, channels))\n    out[...] = 0\n    if momentum",
        30,
        ("test_out.py::test_in_place[4x5x7@1-float32]",),
    ),
    Mutation(
        "not-counted",
        "num_batches_tracked does not count",
        "base.py",
        "min(tracked + batches, _MOST_BATCHES)",
        "min(tracked, _MOST_BATCHES)",
        None,
        ("test_module.py::test_training[1-float32-float32]",),
    ),
    Mutation(
        "counter-reset",
        "a state without the counter resets it",
        "base.py",
        "state[key]) for name, key in keys.items() if key in state}",
        "state.get(key, 0)) for name, key in keys.items()}",
        39,
        ("test_module.py::test_state_without_the_counter",),
    ),
    Mutation(
        "loaded-into-copies",
        "a state is loaded into new arrays",
        "base.py",
        "            self._set(written, counting, self._columns.write)\n",
        "            vars(self).update({name: self._columns.new(loaded[name]) for name in columns})\n",
        None,
        ("test_module.py::test_loading_writes_into_the_arrays_that_are_there",),
    ),
    Mutation(
        "live-statistics",
        "a gradient in evaluation sees the running statistics of later steps",
        "module.py",
        "_Saved(x, *constants, training=False, fused=fused)",
        "_Saved(x, self.running_mean, constants[1], training=False, fused=fused)",
        None,
        ("test_module.py::test_evaluation_gradient_uses_the_statistics_of_its_own_forward",),
    ),
    # --- bad input ---
    Mutation(
        "one-value",
        "one value a channel is accepted in training",
        "functional.py",
        "    if count == 1:",
        "    if x.size and count < 1:",
        13,
        ("test_errors.py::test_one_value_a_channel_in_training",),
    ),
    Mutation(
        "empty-batch",
        "the statistics of an empty batch are NaN",
        "functional.py",
        "stats = np.zeros((3, channels))",
        "stats = np.full((3, channels), np.nan)",
        14,
        ("test_forward.py::test_empty_input",),
    ),
    Mutation(
        "empty-launch",
        "an empty array is computed with",
        "functional.py",
        "    if x.size:\n        recording",
        "    if True:\n        recording",
        15,
        ("test_devices.py::test_empty",),
    ),
    Mutation(
        "features",
        "fewer channels than num_features are accepted",
        "functional.py",
        "channels != features:",
        "channels > features:",
        16,
        ("test_errors.py::test_module_with_other_channels",),
    ),
    Mutation(
        "short-parameter",
        "the length of a parameter is not checked",
        "arrays.py",
        "if value.shape != shape:",
        "if value.ndim != len(shape):",
        17,
        ("test_errors.py::test_one_bad_argument[batch_norm-running_mean-short]",),
    ),
    Mutation(
        "no-statistics",
        "evaluation without running statistics takes others",
        "functional.py",
        'if value is None:\n            raise ValueError(f"{name} must be given with',
        'if value is ...:\n            raise ValueError(f"{name} must be given with',
        18,
        ("test_errors.py::test_one_bad_argument[batch_norm-running_mean-missing]",),
    ),
    Mutation(
        "rank-one",
        "one dimension is accepted",
        "arrays.py",
        "if ndim < least:",
        "if ndim < least - 1:",
        19,
        ("test_errors.py::test_one_bad_argument[batch_stats-x-rank_1_along_axis_0]",),
    ),
    Mutation(
        "overlap-x",
        "out may overlap x in part",
        "arrays.py",
        "if other is None or other is x is array or not overlap(array, other):",
        'if other is None or name == "x" or not overlap(array, other):',
        30,
        ("test_out.py::test_out_that_overlaps_x",),
    ),
    Mutation(
        "overlap-others",
        "out may overlap grad_out",
        "arrays.py",
        'in (("x", x), ("residual", replaced), *inputs.items()):',
        'in (("x", x), ("residual", replaced)):',
        30,
        ("test_out.py::test_out_that_is_grad_out",),
    ),
    Mutation(
        "overlap-columns",
        "out may overlap the parameters",
        "arrays.py",
        "if before < at < end or",
        "if before == at or",
        30,
        ("test_out.py::test_out_that_overlaps_a_column",),
    ),
    Mutation(
        "read-only-out",
        "out may be read-only",
        "arrays.py",
        "if not array.flags.writeable:",
        "if not array.flags.aligned and not array.flags.writeable:",
        43,
        ("test_bugbank.py::test_row_43_read_only[float32]",),
    ),
    # --- threads and processes ---
    Mutation(
        "flush-to-zero",
        "the import turns on flush-to-zero",
        "compiler.py",
        'log = logging.getLogger("nbbn")\n',
        'log = logging.getLogger("nbbn")\n'
        "_environment, _c = (ctypes.c_uint32 * 8)(), ctypes.CDLL(None)\n"
        "_c.fegetenv(_environment)\n"
        "_environment[7] |= 0x8040  # MXCSR, in glibc on x86-64\n"
        "_c.fesetenv(_environment)\n",
        12,
        ("test_processes.py::test_subnormal_numbers_stay_numbers",),
    ),
    Mutation(
        "threads-at-import",
        "the import starts threads",
        "compiler.py",
        "\npool = _Pool()\n",
        "\npool = _Pool()\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n",
        None,
        ("test_processes.py::test_import_has_no_side_effects",),
    ),
    Mutation(
        "fork",
        "a child after a fork uses the threads of its parent",
        "compiler.py",
        'if layer and not (layer == "tbb" and alone):',
        'if not layer and not (layer == "tbb" and alone):',
        41,
        ("test_processes.py::test_fork[workqueue-after_use]",),
    ),
    Mutation(
        "workqueue",
        "two threads enter workqueue at once",
        "compiler.py",
        'alone = self.layer == "workqueue" and threads > 1',
        "alone = False",
        41,
        ("test_processes.py::test_threads_at_once[workqueue]",),
    ),
    # --- start-up and cost ---
    Mutation(
        "stale-cache",
        "a kernel in the cache is used after an edit to a helper",
        "compiler.py",
        "self._cache_file._version += sources_version()",
        'self._cache_file._version += ""',
        42,
        ("test_cache.py::test_edited_helper_is_compiled_anew",),
    ),
    Mutation(
        "unwritable-cache",
        "where nothing can be written, nothing is computed",
        "compiler.py",
        "except (OSError, RuntimeError) as error:  # Numba",
        "except OSError as error:  # Numba",
        None,
        ("test_cache.py::test_package_in_a_folder_that_is_read_only",),
    ),
    Mutation(
        "copied-x",
        "x is copied where it is not contiguous",
        "functional.py",
        "channels = _channels(x, axis, features)\n    gamma",
        "channels = _channels(x, axis, features)\n    x = np.ascontiguousarray(x)\n    gamma",
        None,
        ("test_memory.py::test_peak_memory[8x3x300x301@1-every_second-float64]",),
    ),
    Mutation(
        "seen-memory",
        "memory is used again while an array sees it",
        "memory.py",
        "return np.asarray(_Owner(nbytes)).view(dtype).reshape(shape)",
        "return _Owner(nbytes)._block[:nbytes].view(dtype).reshape(shape)",
        None,
        ("test_memory.py::test_memory_that_is_seen_is_not_used",),
    ),
    # --- on GPUs ---
    Mutation(
        "cuda-running-var",
        "running_var tracks the biased variance, on GPUs alone",
        "cuda/kernels.py",
        "new = unbiased(var, count, numbers.correction)",
        "new = var",
        33,
        ("test_bugbank.py::test_cuda[row_33]",),
    ),
    Mutation(
        "cuda-alias",
        "parameters are read after the running statistics are written",
        "cuda/kernels.py",
        "finish_channel(arrays, cut, numbers, affine, its, mean, rest, m2, rank == 0, table)",
        "affine = affine_of(arrays, cut, its)\n"
        "            finish_channel(arrays, cut, numbers, affine, its, mean, rest, m2, rank == 0, table)",
        32,
        ("test_bugbank.py::test_cuda_properties[row_32]",),
    ),
    Mutation(
        "cuda-barrier",
        "a barrier of a block's sum is left out",
        "cuda/kernels.py",
        "    cuda.syncthreads()\n    width = WORKERS",
        "    width = WORKERS",
        None,
        ("test_cuda_kernels.py::test_interleaved_blocks[shapes({seed})]",),
    ),
    Mutation(
        "cuda-team-barrier",
        "blocks do not wait for what the others of their team know",
        "cuda/kernels.py",
        "team_barrier(arrays, cut, team, rank)\n            mean",
        "mean",
        None,
        ("test_cuda_kernels.py::test_interleaved_blocks[teams({seed})]",),
    ),
    Mutation(
        "cuda-turns",
        "a block that is ahead overwrites what others of its team still read",
        "cuda/kernels.py",
        "32 * TILE * ((turn * cut.teams + team) * cut.team)",
        "32 * TILE * (team * cut.team)",
        None,
        ("test_cuda_kernels.py::test_interleaved_blocks[teams({seed})]",),
    ),
    Mutation(
        "cuda-last-part",
        "a last part is counted as if it were whole",
        "cuda/kernels.py",
        "max(int64(0), min(cut.part, cut.outer * cut.inner - first))",
        "cut.part",
        23,
        ("test_cuda_kernels.py::test_interleaved_blocks[shapes({seed})]",),
    ),
    Mutation(
        "cuda-lost-part",
        "parts beyond a power of two are not merged",
        "cuda/kernels.py",
        "while width < min(parts, workers()):",
        "while 2 * width <= min(parts, workers()):",
        23,
        ("test_cuda_kernels.py::test_interleaved_blocks[shapes({seed})]",),
    ),
    Mutation(
        "cuda-tail",
        "what is beyond the end is summed up",
        "cuda/kernels.py",
        "values[u * WIDTH + k] = held(0)",
        "pass",
        23,
        ("test_cuda_kernels.py::test_interleaved_blocks[shapes({seed})]",),
    ),
    Mutation(
        "cuda-channels",
        "the last channels have no tables in evaluation",
        "cuda/run.py",
        "blocks=-(-plan.channels // THREADS)",
        "blocks=max(1, plan.channels // THREADS)",
        21,
        ("test_bugbank.py::test_cuda_launches[row_21]",),
    ),
    Mutation(
        "pieces-tables",
        "pieces of all channels of a tile are written with the numbers of the first",
        "cpu/results.py",
        "after(tile[2], number * LANES)",
        "tile[2]",
        None,
        ("test_schedules.py::test_channels_that_share_lines[layer_norm-float32-1]",),
    ),
    Mutation(
        "pieces-border",
        "where a piece goes on in the next, a line has numbers of the next channel",
        "cpu/results.py",
        "if tile[1] == 1:  # its row may go on behind its end, in the next piece",
        "if tile[1] == 0:",
        None,
        ("test_schedules.py::test_channels_that_share_lines[layer_norm-float32-1]",),
    ),
    Mutation(
        "cuda-mask-squares",
        "deviations of what does not count are summed up",
        "cuda/kernels.py",
        "                if is_counted(bits, u * ALONG + j):",
        "                if True:",
        None,
        ("test_cuda_masks.py::test_kernels[1-cases]",),
    ),
    Mutation(
        "cuda-mask-count",
        "all values of a part are said to count",
        "cuda/kernels.py",
        "        return counted_before(arrays, first + number) - counted_before(arrays, first)",
        "        return number",
        None,
        ("test_cuda_masks.py::test_kernels[1-cases]",),
    ),
    Mutation(
        "cuda-residual-unrounded",
        "grad_x is computed from a residual's gradient that is not rounded yet",
        "cuda/kernels.py",
        "values[i] = widened(rounded(values[i], stored), stored)\n    write(",
        "pass\n    write(",
        None,
        ("test_cuda_fused.py::test_properties[bits({0})]",),
    ),
    Mutation(
        "cuda-half-rounded-twice",
        "results of 16 bits are rounded to float32 first",
        "cuda/kernels.py",
        "values[i] = activated(arrays, carried(its, stored))",
        "values[i] = activated(arrays, held(its))",
        None,
        ("test_cuda_kernels.py::test_sixteen_bits[roundings]",),
    ),
    Mutation(
        "cuda-half-running",
        "running statistics of float16 are rounded to float32 first",
        "cuda/kernels.py",
        "carried(value, np.float16)",
        "np.float32(value)",
        None,
        ("test_cuda_kernels.py::test_properties[running({seed})]",),
    ),
    Mutation(
        "cuda-half-cancels",
        "results of 16 bits are computed in float32 where terms cancel",
        "cuda/plan.py",
        "np.float64 if size == 2 else storage.real",
        "storage.real",
        None,
        ("test_cuda_kernels.py::test_sixteen_bits[cancellation]",),
    ),
    Mutation(
        "repeat-strides",
        "a call is made again on arrays with other strides",
        "cpu/repeat.py",
        "strides[axis] != known[ndim + axis]",
        "strides[axis] != strides[axis]",
        None,
        ("test_repeats.py::test_what_is_not_alike",),
    ),
    Mutation(
        "repeat-dtype",
        "a call is made again on arrays of another type",
        "cpu/repeat.py",
        "array[_DTYPE] != its.dtype",
        "its.dtype == -1",
        None,
        ("test_repeats.py::test_what_is_not_alike",),
    ),
    Mutation(
        "repeat-read-only",
        "where a call is made again, read-only arrays are written",
        "cpu/repeat.py",
        "_WRITEABLE * role.written",
        "_WRITEABLE * 0",
        None,
        ("test_repeats.py::test_what_is_not_alike",),
    ),
    Mutation(
        "repeat-overlap",
        "where a call is made again, out may overlap what is read",
        "cpu/repeat.py",
        "its.begin - that.end < ahead < its.end - that.begin",
        "ahead < ahead",
        None,
        ("test_repeats.py::test_what_is_not_alike",),
    ),
    Mutation(
        "repeat-records",
        "where a call with several records is made again, only the first one has the new addresses",
        "cpu/repeat.py",
        "itertools.product(role.fields, calls)",
        "itertools.product(role.fields, calls[:1])",
        None,
        ("test_repeats.py::test_the_same_bits[layer backward-contiguous-float32]",),
    ),
    Mutation(
        "repeat-counters",
        "where a call is made again, the batch is not counted",
        "cpu/repeat.py",
        "elif then:\n                in_one(*steps, *then)",
        "elif then:\n                in_one(*steps)",
        None,
        ("test_repeats.py::test_modules",),
    ),
    Mutation(
        "repeat-count",
        "where a call with a mask is made again, as many values count as in the one before",
        "cpu/repeat.py",
        "self._counted.set_count(count)\n",
        "pass\n",
        None,
        ("test_repeats.py::test_the_same_bits[masked training-contiguous-float32]",),
    ),
    Mutation(
        "repeat-few",
        "where a call with a mask is made again, one value that is left is not refused",
        "cpu/repeat.py",
        "if count <= self._above:",
        "if count < 0:",
        None,
        ("test_repeats.py::test_gradients_of_few_values",),
    ),
    Mutation(
        "repeat-threads",
        "a call is made again on as many threads as before, however many are set",
        "functional.py",
        "return 1 if x.size * operands <= SERIAL_ELEMENTS else pool.threads()",
        "return 1 if x.size * operands <= SERIAL_ELEMENTS else 2",
        None,
        ("test_repeats.py::test_as_many_threads_as_are_set",),
    ),
    Mutation(
        "cuda-streams",
        "a stream does not wait for the one that makes an array",
        "frameworks.py",
        "        _wait(name, theirs, stream)\n",
        "        pass\n",
        45,
        ("test_devices.py::test_numba_arrays_of_two_streams",),
    ),
]


def copy(directory: pathlib.Path) -> pathlib.Path:
    """Copy the files of the tree that git does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, directory / name)
    return directory


def run_tests(tree: pathlib.Path, arguments: tuple[str, ...], limit: int) -> tuple[int | None, str]:
    """Run pytest in a tree; return its exit status, None if it ran out of time, and what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "NUMBA_CACHE_DIR": str(tree / "compiled")}
    command = [sys.executable, "-m", "pytest", "-x", "-v", "--tb=short", "-p", "no:cacheprovider", *arguments]
    with (tree / "log").open("w+") as log:
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        return status, log.read()


def likely_tests(mutations: list[Mutation]) -> tuple[str, ...]:
    """Return the tests that are most likely to see one of these bugs, each once."""
    return tuple(dict.fromkeys(f"tests/{test}" for mutation in mutations for test in mutation.tests))


def first_failure(output: str) -> str | None:
    """Return the first test that failed; the last one that began, if the process came to its end in it."""
    lines = [(test[0], line) for line in output.splitlines() if (test := TEST.match(line))]
    failed = [test for test, line in lines if re.search(r" (FAILED|ERROR) ", line)]
    return failed[0] if failed else lines[-1][0] if lines else None


def check(mutation: Mutation, seed: str) -> tuple[str, str]:
    """Plant a bug and run tests; return who caught it, or nothing, and a word on how it went."""
    with tempfile.TemporaryDirectory(prefix="nbbn-mutation-") as directory:
        tree = copy(pathlib.Path(directory))
        (tree / "nbbn" / mutation.file).write_text(mutation.planted())
        for arguments, limit in (
            (likely_tests([mutation]), LIKELY_LIMIT),
            (("tests", "--ignore=tests/test_cuda_code.py"), ALL_LIMIT),
        ):
            status, output = run_tests(tree, (seed, *arguments), limit)
            test = first_failure(output)
            if status is None:
                return "", f"HUNG in {test}"
            if status and (test is None or re.search("TypingError|LoweringError|SyntaxError", output)):
                return "", f"BROKEN, not caught: {output[-2000:]}"
            if status:
                reasons = re.findall(r"^E +([\w.]*(?:Error|Failed|Warning)\b.*)", output, re.MULTILINE)
                return test.removeprefix("tests/"), reasons[-1] if reasons else f"exit {status}"
        return "", "SURVIVED"


INTRO = """\
# The mutation check

`python tests/mutations.py --report docs/mutations.md` plants {count} known bugs, one at a time, in copies of
the tree, and runs the tests there. A row is that of `tests/test_bugbank.py`: the bug, or one like it, was in
another batch normalization once. Bugs in `cuda/` are seen in the simulator.

Run on {date}: {machine}, {cores} cores, Python {python}.

| bug planted | where | row | caught by |
|---|---|---|---|
"""


def report(found: list[tuple[Mutation, str]]) -> str:
    """Return docs/mutations.md."""
    about = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    lines = [INTRO.format(count=len(found), date=datetime.date.today(), **about)]
    for mutation, test in found:
        caught = f"`{test}`" if test else "**nothing**"
        lines.append(f"| {mutation.bug} | `{mutation.place()}` | {mutation.row or ''} | {caught} |\n")
    return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="the bugs to plant (default: all)")
    parser.add_argument("--report", type=pathlib.Path, metavar="FILE.md", help="where to write the table")
    parser.add_argument("--seed", default="0", help="of the random data, the same with and without a bug")
    options = parser.parse_args()
    if unknown := set(options.names) - {mutation.name for mutation in MUTATIONS}:
        parser.error(f"no such bugs: {', '.join(sorted(unknown))}")
    chosen = [mutation for mutation in MUTATIONS if not options.names or mutation.name in options.names]
    seed = f"--seed={options.seed}"
    with tempfile.TemporaryDirectory(prefix="nbbn-mutation-") as directory:
        status, output = run_tests(copy(pathlib.Path(directory)), (seed, *likely_tests(chosen)), ALL_LIMIT)
    if status != 0:
        print(output[-5000:], f"without any bug: exit {status}", sep="\n")
        return 1
    print(f"without any bug: {output.splitlines()[-1].strip('= ')}", flush=True)

    found = []
    with ThreadPoolExecutor(2) as pool:
        for mutation, (test, word) in zip(
            chosen, pool.map(lambda one: check(one, seed), chosen), strict=True
        ):
            print(f"{mutation.name}: {test or 'NOT CAUGHT'} ({word})", flush=True)
            found.append((mutation, test))
    if options.report:
        options.report.write_text(report(found))
    return int(not all(test for _, test in found))


if __name__ == "__main__":
    sys.exit(main())
