"""Counter-based randomness: spread evenly, and a function of its counters alone."""

import math

import pytest
import torch
from torch import Tensor

from distkgd.common.random import Stream, bits, integers, normal, permutation, uniform

N = 20_000
INDEX = torch.arange(N)


def draw(kind: str, seed: int, stream: Stream, step: int, index: Tensor) -> Tensor:
    if kind == "integers":
        return integers(seed, stream, step, index, 1000)
    return {"bits": bits, "uniform": uniform, "normal": normal}[kind](seed, stream, step, index)


EVERY_KIND = pytest.mark.parametrize("kind", ["bits", "uniform", "integers", "normal"])


@EVERY_KIND
def test_a_number_depends_on_its_index_and_not_on_what_is_asked_beside_it(kind: str) -> None:
    whole = draw(kind, 1, Stream.NEGATIVES, 2, INDEX[:500])
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(kind, 1, Stream.NEGATIVES, 2, INDEX[:500][order]), whole[order])
    assert torch.equal(draw(kind, 1, Stream.NEGATIVES, 2, INDEX[100:103]), whole[100:103])
    assert torch.equal(draw(kind, 1, Stream.NEGATIVES, 2, INDEX[:500].reshape(20, 25)), whole.reshape(20, 25))


@EVERY_KIND
@pytest.mark.parametrize("changed", ["seed", "stream", "step"])
def test_seed_stream_and_step_each_give_other_numbers(kind: str, changed: str) -> None:
    other = {"seed": (2, Stream.SIDE, 3), "stream": (1, Stream.NEGATIVES, 3), "step": (1, Stream.SIDE, 4)}[changed]
    one, two = (draw(kind, *key, INDEX) for key in ((1, Stream.SIDE, 3), other))
    assert (one == two).double().mean() < 0.01
    correlation = torch.corrcoef(torch.stack([one.double(), two.double()]))[0, 1]
    assert abs(correlation) < 4 / math.sqrt(N)


def test_no_counter_repeats_a_word() -> None:
    words = torch.cat([bits(0, stream, step, INDEX[:2000]) for stream in Stream for step in range(3)])
    assert len(words.unique()) == len(words)


@pytest.mark.parametrize("bit", [0, 1, 31, 32, 52, 62, 63])
def test_every_bit_is_set_half_of_the_time(bit: int) -> None:
    ones = ((bits(5, Stream.SHUFFLE, 0, INDEX) >> bit) & 1).double()
    assert ones.mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(N))
    assert torch.corrcoef(torch.stack([ones[1:], ones[:-1]]))[0, 1].abs() < 4 / math.sqrt(N)


def test_uniform_numbers_fill_the_unit_interval_evenly() -> None:
    drawn = uniform(3, Stream.ENTITY_DROPOUT, 1, INDEX)
    assert drawn.dtype == torch.float64 and drawn.min() >= 0 and drawn.max() < 1
    counts = torch.histc(drawn, 20, 0, 1)
    chi_square = float(((counts - N / 20) ** 2 / (N / 20)).sum())
    assert 5 < chi_square < 44  # 19 degrees of freedom; too even would be wrong, too
    assert len(drawn.unique()) == N


@pytest.mark.parametrize("high", [1, 2, 7, 40_943])
def test_integers_stay_below_high_and_reach_every_value(high: int) -> None:
    drawn = integers(3, Stream.NEGATIVES, 1, INDEX, high)
    assert drawn.dtype == torch.int64 and drawn.min() >= 0 and drawn.max() < high
    assert drawn.double().mean() == pytest.approx((high - 1) / 2, abs=4 * high / math.sqrt(12 * N))
    if high < 10:
        assert sorted(drawn.unique().tolist()) == list(range(high))


def test_normal_numbers_have_the_moments_and_tails_of_a_standard_normal() -> None:
    drawn = normal(3, Stream.ENTITY_INIT, 0, INDEX)
    assert drawn.isfinite().all()
    assert drawn.mean() == pytest.approx(0.0, abs=4 / math.sqrt(N))
    assert drawn.std() == pytest.approx(1.0, abs=4 / math.sqrt(2 * N))
    assert (drawn**3).mean() == pytest.approx(0.0, abs=4 * math.sqrt(15 / N))
    assert (drawn**4).mean() == pytest.approx(3.0, abs=4 * math.sqrt(96 / N))
    assert (drawn.abs() < 1).double().mean() == pytest.approx(0.6827, abs=0.015)


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
def test_a_permutation_is_one(size: int) -> None:
    for epoch in range(3):
        order = permutation(1, epoch, size, torch.device("cpu"))
        assert sorted(order.tolist()) == list(range(size))


def test_permutations_differ_by_epoch_and_by_seed_and_repeat_otherwise() -> None:
    device = torch.device("cpu")
    one = permutation(1, 0, 50, device)
    assert torch.equal(permutation(1, 0, 50, device), one)
    assert not torch.equal(permutation(1, 1, 50, device), one)
    assert not torch.equal(permutation(2, 0, 50, device), one)


def test_a_permutation_puts_every_element_everywhere() -> None:
    seen = torch.zeros(6, 6)
    for epoch in range(3000):
        seen[permutation(0, epoch, 6, torch.device("cpu")), torch.arange(6)] += 1
    assert seen.min() > 400 and seen.max() < 600  # 500 each


WORD = (1 << 64) - 1


def finalise(x: int) -> int:
    """SplitMix64's mixer, in plain integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def splitmix(x: int) -> int:
    return finalise((x + 0x9E3779B97F4A7C15) & WORD)


def test_words_are_those_of_splitmix64_in_plain_integers() -> None:
    assert splitmix(0) == 0xE220A8397B1DCDAF  # the first word of the published generator with seed 0
    for seed, stream, step in ((0, Stream.SHUFFLE, 0), (7, Stream.SIDE, 3), (123_456_789, Stream.RELATION_INIT, 10**9)):
        key = splitmix(splitmix(splitmix(seed) ^ stream) ^ step)
        expected = [finalise((i * 0x9E3779B97F4A7C15 + key) & WORD) for i in (0, 1, 2, 10**12)]
        found = bits(seed, stream, step, torch.tensor([0, 1, 2, 10**12])).tolist()
        assert [word & WORD for word in found] == expected
