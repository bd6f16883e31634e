"""Tables of few bits with many zeros in safetensors files, laid out in whichever of two ways takes fewer bytes.

bitmap  NAME.bitmap [rows, columns / 8, rounded up]: bit i of a row, lowest first, is 1 where number i is not 0;
        NAME.codes [bytes, 1]: of each row the codes of those numbers, as `kernels.quantiser` packs them, in whole bytes
level   NAME.codes [rows, bytes]: 0 is one level more, so that there are L = 2^b + 1: 16 bits hold as many numbers as
        powers of L fit there, the first times 1, the next times L, and so on; little-endian

NAME.step and NAME.bias are those of `formats.packed`. On loading, rows are widened.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distkgd.distributed.checkpoint.tables import Rows, rows_in, write_table
from distkgd.distributed.ranks import Ranks
from distkgd.errors import ModelError
from distkgd.kernels.quantiser import Quantiser, pack_codes, unpack_codes
from distkgd.models.formats.parts import read_part

_ROWS_AT_ONCE = 1 << 12
_WORD = 1 << 16


def write_zeros(folder: Path, name: str, rows: Rows, quantiser: Quantiser, peers: Ranks) -> dict[str, list[str]]:
    """Every rank writes its rows; {table: its files}, in the order of their rows."""
    levels, step = quantiser.levels(rows.tensor)
    kept, columns = levels != 0, levels.shape[1]
    codes = (levels + (2 ** (quantiser.bits - 1) - 0.5)).to(torch.uint8) * kept
    sizes = _code_bytes(kept, quantiser.bits)
    taken = peers.all_reduce(sizes.sum().reshape(1).to(peers.device))
    word_bytes = 2 * -(-columns // _numbers_of_word(quantiser.bits))
    if int(taken) + rows.total * -(-columns // 8) < rows.total * word_bytes:
        pieces = zip(codes.split(_ROWS_AT_ONCE), kept.split(_ROWS_AT_ONCE), sizes.split(_ROWS_AT_ONCE), strict=True)
        flat = torch.cat([_without_zeros(*piece, quantiser.bits) for piece in pieces]).unsqueeze(1)
        before = sum(peers.gather_objects(len(flat))[: peers.rank])
        tables = {"bitmap": Rows(pack_codes(kept.to(torch.uint8), 1), rows.lo, rows.total)}
        tables["codes"] = Rows(flat, before, int(taken))
    else:
        numbers = (codes.int() + kept).split(_ROWS_AT_ONCE)
        tables = {"codes": Rows(torch.cat([_words(piece, quantiser.bits) for piece in numbers]), rows.lo, rows.total)}
    tables["step"] = Rows(step.bfloat16(), rows.lo, rows.total)
    if quantiser.biases:
        tables["bias"] = Rows(rows.tensor[:, : quantiser.biases].bfloat16(), rows.lo, rows.total)
    return {f"{name}.{part}": write_table(folder, f"{name}.{part}", one, peers) for part, one in tables.items()}


def read_zeros(
    folder: Path, files: Mapping[str, Sequence[str]], name: str, quantiser: Quantiser, width: int, lo: int, hi: int
) -> Tensor:
    """[hi - lo, width] float32: rows lo … hi - 1 of a table of `width` numbers; ModelError names a bad file."""
    bits, columns = quantiser.bits, width - quantiser.biases

    def read(part: str, size: int, start: int, stop: int) -> Tensor:
        return read_part(folder, files, f"{name}.{part}", start, stop, size)

    if f"{name}.bitmap" in files:
        kept = unpack_codes(read("bitmap", -(-columns // 8), 0, hi), 1, columns).bool()
        sizes = _code_bytes(kept, bits)
        start, kept, sizes = int(sizes[:lo].sum()), kept[lo:], sizes[lo:]
        whole = hi == sum(rows_in(folder / file) for file in files[f"{name}.bitmap"])
        _check_bytes(folder, files[f"{name}.codes"], start + int(sizes.sum()), whole)
        flat = read("codes", 1, start, start + int(sizes.sum())).squeeze(1)
        codes, at = torch.zeros(kept.shape, dtype=torch.uint8), 0
        for into, where, size in zip(*(x.split(_ROWS_AT_ONCE) for x in (codes, kept, sizes)), strict=True):
            into.copy_(_with_zeros(flat[at : at + int(size.sum())], where, size, bits))
            at += int(size.sum())
    else:
        words = read("codes", 2 * -(-columns // _numbers_of_word(bits)), lo, hi)
        numbers = torch.cat([_numbers_of(piece, bits) for piece in words.split(_ROWS_AT_ONCE)])
        if len(numbers) and int(numbers.amax()) > 2**bits:
            raise ModelError(f"{folder / files[f'{name}.codes'][0]}: words that no levels make; write the model again.")
        kept, codes = numbers[:, :columns] > 0, (numbers[:, :columns] - 1).clamp_min(0)
    step = read("step", quantiser.groups(width), lo, hi).float()
    levels = (codes.float() - (2 ** (bits - 1) - 0.5)) * kept
    rows = (levels.unflatten(1, (step.shape[1], -1)) * step.unsqueeze(-1)).flatten(1)
    return torch.cat([read("bias", quantiser.biases, lo, hi).float(), rows], 1) if quantiser.biases else rows


def _code_bytes(kept: Tensor, bits: int) -> Tensor:
    # [n] of each row's codes, of kept [n, columns] bool.
    return -(-kept.sum(1) * bits // 8)


def _without_zeros(codes: Tensor, kept: Tensor, sizes: Tensor, bits: int) -> Tensor:
    # [bytes] of each row [n, columns] the codes that are kept.
    first = torch.zeros_like(codes)
    first[_places(kept)] = codes[kept]
    packed = pack_codes(first, bits)
    return packed[torch.arange(packed.shape[1], device=codes.device) < sizes.unsqueeze(1)]


def _with_zeros(flat: Tensor, kept: Tensor, sizes: Tensor, bits: int) -> Tensor:
    # [n, columns]: what `_without_zeros` was given.
    packed = torch.zeros(len(kept), -(-kept.shape[1] * bits // 8), dtype=torch.uint8)
    packed[torch.arange(packed.shape[1]) < sizes.unsqueeze(1)] = flat
    codes = torch.zeros(kept.shape, dtype=torch.uint8)
    codes[kept] = unpack_codes(packed, bits, kept.shape[1])[_places(kept)]
    return codes


def _places(kept: Tensor) -> Tensor:
    # [n, columns] bool: as many from the left as are kept.
    return torch.arange(kept.shape[1], device=kept.device) < kept.sum(1, keepdim=True)


def _check_bytes(folder: Path, files: Sequence[str], wanted: int, whole: bool) -> None:
    # whole: these are all that there should be.
    found = sum(rows_in(folder / file) for file in files)
    if found < wanted or (whole and found > wanted):
        raise ModelError(f"{folder / files[0]}: other codes than the bitmap names; write the model again.")


def _numbers_of_word(bits: int) -> int:
    num, levels = 1, 2**bits + 1
    while levels ** (num + 1) <= _WORD:
        num += 1
    return num


def _powers(bits: int) -> Tensor:
    powers: Tensor = (2**bits + 1) ** torch.arange(_numbers_of_word(bits))
    return powers


def _words(numbers: Tensor, bits: int) -> Tensor:
    # [n, bytes] uint8 of numbers [n, columns] in 0 … 2^bits.
    powers = _powers(bits).to(numbers.device)
    padded = torch.nn.functional.pad(numbers.long(), (0, -numbers.shape[1] % len(powers)))
    words = (padded.unflatten(1, (-1, len(powers))) * powers).sum(-1)
    halves: Tensor = torch.stack([words & 255, words >> 8], -1).to(torch.uint8)
    return halves.flatten(1)


def _numbers_of(words: Tensor, bits: int) -> Tensor:
    # [n, at least columns] int32: what `_words` was given, then 0; more than 2^bits where it made no such word.
    low, high = words.int().unflatten(1, (-1, 2)).unbind(-1)
    numbers = (low + 256 * high).unsqueeze(-1) // _powers(bits).int()
    numbers[..., :-1] %= 2**bits + 1  # the last would say what is too large
    found: Tensor = numbers.flatten(1)
    return found
