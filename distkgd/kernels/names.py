"""Triples as text, read into numbers by one pass of names.cpp; for where it is missing, data/reading/folders.py has
polars."""

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor

from distkgd.kernels.build import address, library


class NameTables:
    """Entities and relations, numbered in the order in which `read` meets them."""

    def __init__(self, code: ctypes.CDLL) -> None:
        self._code = code
        for name in ("names_lines", "names_read", "names_count", "names_bytes", "names_sort"):
            getattr(code, name).restype = ctypes.c_int64
        code.names_new.restype = ctypes.c_void_p
        made = code.names_new()
        if made is None:
            raise MemoryError("no memory for a table of names")
        self._tables = ctypes.c_void_p(made)

    @classmethod
    @contextmanager
    def open(cls) -> Iterator[Self | None]:
        """Empty tables, or None where nothing can be compiled or kept."""
        try:
            code = library("names")
        except OSError:  # of a home that cannot be written to, say: a graph can be read all the same
            code = None
        if code is None:
            yield None
            return
        tables = cls(code)
        try:
            yield tables
        finally:
            code.names_delete(tables._tables)

    def read(self, text: bytes, start: int, separator: str) -> Tensor | None:
        """[n, 3] numbers of the lines of text[start:], or None.

        None: some line is not UTF-8 without NUL and carriage return, in three fields none of which is empty; the tables
        are then as they were before. Line ends at the end do not count.
        """
        whole = ctypes.cast(ctypes.c_char_p(text), ctypes.c_void_p)
        begin = ctypes.c_void_p((whole.value or 0) + start)
        size = ctypes.c_int64(len(text) - start)
        lines = self._code.names_lines(begin, ctypes.byref(size))
        rows = torch.empty(lines, 3, dtype=torch.int64)
        mark = ctypes.c_char(separator.encode())
        read = self._code.names_read(self._tables, begin, size, mark, address(rows))
        if read == -2:
            raise MemoryError("no memory for a table of names")
        return rows if lines and read == lines else None

    def sort(self, rows: Iterable[Tensor]) -> tuple[bytes, bytes]:
        """Renumber what `read` gave by the sorted names, in place; the names of entities and relations as lines."""
        (entities, entity_rank), (relations, relation_rank) = self._sorted(0), self._sorted(1)
        for part in rows:
            ranks = address(entity_rank), address(relation_rank)
            self._code.names_renumber(address(part), ctypes.c_int64(len(part)), *ranks)
        return entities, relations

    def _sorted(self, column: int) -> tuple[bytes, Tensor]:
        text = ctypes.create_string_buffer(self._code.names_bytes(self._tables, column))
        rank = torch.empty(self._code.names_count(self._tables, column), dtype=torch.int64)
        if self._code.names_sort(self._tables, column, text, address(rank)):
            raise MemoryError("no memory to sort the names in")
        return text.raw, rank
