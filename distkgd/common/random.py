"""Counter-based randomness: every number is a pure function of (seed, stream, step, index).

A sampler, a dropout mask or an initial row therefore has the same value whichever rank asks for it, and a resumed
run needs no generator state. The mixer is SplitMix64 (Steele, Lea & Flood, OOPSLA 2014), one round per key part.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

_WORD = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Stream(IntEnum):
    """What a number is for; two streams never share a counter."""

    SHUFFLE = 1
    SIDE = 2
    NEGATIVES = 3
    ENTITY_INIT = 4
    RELATION_INIT = 5
    ENTITY_DROPOUT = 6
    RELATION_DROPOUT = 7
    ROUNDING = 8
    SPLIT = 9
    NEGATIVE_ANCHORS = 10
    CORRUPTED = 11
    QUIZ = 21


def _signed(word: int) -> int:
    word %= _WORD
    return word - _WORD if word >= _WORD >> 1 else word


def _shift(x: Tensor, bits: int) -> Tensor:
    # torch's >> is arithmetic on int64; the mask makes it logical.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift(x, 27)) * _signed(_SECOND)
    return x ^ _shift(x, 31)


def _mix_int(x: int) -> int:
    x = (x + _GOLDEN) % _WORD
    x = ((x ^ (x >> 30)) * _FIRST) % _WORD
    x = ((x ^ (x >> 27)) * _SECOND) % _WORD
    return x ^ (x >> 31)


FACTORS = _signed(_GOLDEN), _signed(_FIRST), _signed(_SECOND)


def key_of(seed: int, stream: Stream, step: int) -> int:
    """What is added to the counters of a stream at a step, as a signed 64-bit number."""
    return _signed(_mix_int(_mix_int(_mix_int(seed) ^ int(stream)) ^ step))


def bits(seed: int, stream: Stream, step: int, index: Tensor) -> Tensor:
    """[...] int64: 64 random bits for each counter in `index` ([...] int64)."""
    return _mix(index * _signed(_GOLDEN) + key_of(seed, stream, step))


def uniform(seed: int, stream: Stream, step: int, index: Tensor) -> Tensor:
    """[...] float64 in [0, 1)."""
    return _shift(bits(seed, stream, step, index), 11).double() * 2.0**-53


def integers(seed: int, stream: Stream, step: int, index: Tensor, high: int) -> Tensor:
    """[...] int64 in [0, high); the modulo's bias is below high / 2^63."""
    return _shift(bits(seed, stream, step, index), 1) % high


def normal(seed: int, stream: Stream, step: int, index: Tensor) -> Tensor:
    """[...] float64, standard normal (Box-Muller on two counters per number)."""
    radius = torch.sqrt(-2.0 * torch.log1p(-uniform(seed, stream, step, 2 * index)))
    return radius * torch.cos(2.0 * math.pi * uniform(seed, stream, step, 2 * index + 1))


def permutation(seed: int, epoch: int, size: int, device: torch.device, key: int = 0) -> Tensor:
    """[size] int64: the order in which pass `epoch` visits the training triples; `key` tells several streams apart."""
    first = key << 40  # far beyond any number of triples
    keys = bits(seed, Stream.SHUFFLE, epoch, torch.arange(first, first + size, device=device))
    return torch.sort(keys, stable=True).indices
