"""How far two computations of one thing may end apart: the bound of every test that compares them, in one place.

The order of a sum is not part of what a test claims. It differs between one process and two, between micro-batches,
and between the instructions of one processor (AVX2, AVX-512) and of another, and so do the last bits of the sum.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

# A gradient passes through some 50 sums on its way, forward and backward, of up to 1,000 numbers each. Roundings are as
# often up as down, so those of n numbers grow with the root of n: 50 x 1,000 of them make about 220, and 500 leave room.
# Measured were 50 at the most: every product and sum moved by one unit in the last place, at random, 40 runs.
ROUNDINGS = 500

# AdamW divides a gradient by its own size plus epsilon. Where a weight's gradient is nearly 0, the usual 1e-8 turns the
# rounding of that gradient into a step of up to the whole learning rate: of 20,000 weights a few, and other ones on
# every processor. Above the gradient's root mean square (0.007, once its length is cut to 1) a rounding stays one. It
# also lets a gradient that is k times too long show, which AdamW would otherwise divide out.
EPSILON = 1e-2


def rounding(size, dtype=torch.float32):
    """How far apart two orders of one computation may end: a bound on the absolute difference.

    size: the largest number among those that were added up, since each of them is rounded in proportion to itself. A
    number rounded to dtype is off by half a unit in the last place at the most, 2^-24 of itself in float32.
    """
    return ROUNDINGS * torch.finfo(dtype).eps / 2 * size


def assert_close(found, wanted, size=None):
    """Fails unless two tensors or numbers, or dicts of them, are one computation in two orders.

    size: see rounding; None: the largest number of `wanted`, in a dict that of each entry. Where the terms of a sum
    cancel, they are larger than the sum, and size is theirs.
    """
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert_close(found[name], wanted[name], size)
        return
    found, wanted = (torch.as_tensor(x).detach().double() for x in (found, wanted))
    size = float(wanted.abs().max()) if size is None else size
    torch.testing.assert_close(found, wanted, rtol=0, atol=rounding(size))


def rounding_of_run(folder):
    """How far any weight of the run in `folder` may end from the same run in another order: an absolute difference.

    It is the sum over the steps of two parts. The update is off by no more than ROUNDINGS roundings of the learning rate,
    since with EPSILON it is a number of about 1 at the most, times that rate, and off in proportion as its gradient is.
    And adding it rounds the weight itself, once in each of the two runs.
    """
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    weights = load_file(Path(folder) / "model.safetensors").values()
    largest = max(float(weight.abs().max()) for weight in weights)
    return rounding(sum(rates)) + len(rates) * 2 * torch.finfo(torch.float32).eps / 2 * largest
