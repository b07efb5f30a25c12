"""Cuts the attention of a packed batch into few products of equal shape, on the host.

A tile is a range of query rows together with the earlier ranges they also see: shared prefixes, and
earlier blocks of a long segment. Tiles of like size make a stack, which is one batched product.

Shape letters: T tokens, n tiles of a stack, L query rows of a tile (padded), S key rows of a tile
(padded), H query heads, K key/value heads, G = H / K query heads of one key/value head.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch

from tunesmith.types import Segments

BLOCK = 256
"""Query rows of a tile at most: a long segment's blocks skip what causality hides."""

STEP = 32
"""Tiles are padded to multiples of it: oneDNN builds a kernel (1-12 ms) for every new shape."""

STACK_SCORES = 2**16
"""Scores of a stack and head at most, so that a processor's cache holds them between passes."""

Range = tuple[int, int]


@dataclass(frozen=True)
class Tile:
    """Query rows `[start, start + length)`, which also see the tokens of `path`."""

    path: tuple[Range, ...]
    start: int
    length: int

    @property
    def num_before(self) -> int:
        """Tokens of the path."""
        return sum(stop - start for start, stop in self.path)


@dataclass(frozen=True)
class Stack:
    """Tiles that are padded to one size: keys are [path, own rows, padding]."""

    tiles: tuple[Tile, ...]
    num_before: int
    num_rows: int
    num_keys: int

    def shared_paths(self) -> list[tuple[int, int, tuple[Range, ...]]]:
        """Neighbors of one path as (first tile, one past the last, path)."""
        found: list[tuple[int, int, tuple[Range, ...]]] = []
        for path, members in groupby(self.tiles, key=lambda tile: tile.path):
            first = found[-1][1] if found else 0
            found.append((first, first + len(list(members)), path))
        return found


def tiles_of(segments: Segments, window: int | None) -> list[Tile]:
    """All tiles of a batch; with a window, paths reach back only as far as it does."""
    tiles: list[Tile] = []
    for number, (start, length) in enumerate(zip(segments.starts, segments.lengths, strict=False)):
        ancestors = [
            (segments.starts[one], segments.starts[one + 1]) for one in segments.ancestors(number)
        ]
        # Blocks of equal size, so that segments of like length give stacks.
        num_blocks = -(-length // BLOCK)
        size = _padded(-(-length // num_blocks)) if num_blocks else 0
        for first in range(start, start + length, max(size, 1)):
            path = _merged([*ancestors, (start, first)])
            if window is not None:
                path = _last(path, window - 1)
            tiles.append(Tile(path, first, min(size, start + length - first)))
    return tiles


def stacks_of(tiles: list[Tile], most_scores: int = STACK_SCORES) -> list[Stack]:
    """Stacks tiles of like size whose paths are equally long.

    Stacks hold 1, 2, 4, ... tiles, for few shapes; a tile is padded by less than a quarter or by
    less than `STEP` rows.

    Args:
        tiles: in any order.
        most_scores: scores of a stack and head at most, if it has more than one tile.
    """
    rest = sorted(tiles, key=lambda tile: (tile.num_before, -tile.length, tile.path, tile.start))
    stacks: list[Stack] = []
    first = 0
    while first < len(rest):
        before, rows = rest[first].num_before, _padded(rest[first].length)
        keys = _padded(before + rows)
        most = max(1, most_scores // (rows * keys))
        shortest = rows - max(STEP, rows // 4)
        count = 1
        for tile in rest[first + 1 : first + most]:
            if tile.num_before != before or tile.length <= shortest:
                break
            count += 1
        count = 1 << (count.bit_length() - 1)
        members = sorted(rest[first : first + count], key=lambda tile: (tile.path, tile.start))
        stacks.append(Stack(tuple(members), before, rows, keys))
        first += count
    return stacks


@dataclass(frozen=True)
class TileTable:
    """The stacks of a batch and the index tables that lay its rows out for them.

    A row is one head of one token: row `t * H + h` of a `[T, H, D]` tensor. Query rows are laid out
    as `[n, K, L, G]` stack after stack, key rows as `[n, K, S]`.

    Args:
        stacks: in the order of both layouts.
        num_heads: H.
        num_kv: K.
        window: tokens that a token sees at most, itself included, or None.
        query_rows: the row of each place of the query layout; padding repeats some real row.
        query_places: the place of each query row.
        key_rows: the row of each place of the key layout.
        key_places: the place of each key row among its own tile's keys.
    """

    stacks: tuple[Stack, ...]
    num_heads: int
    num_kv: int
    window: int | None
    query_rows: torch.Tensor
    query_places: torch.Tensor
    key_rows: torch.Tensor
    key_places: torch.Tensor

    @property
    def groups(self) -> int:
        """Query heads of one key/value head."""
        return self.num_heads // self.num_kv

    @property
    def most_before(self) -> int:
        """Tokens of the longest path."""
        return max(stack.num_before for stack in self.stacks)

    def rows_of(self, x_THD: torch.Tensor) -> torch.Tensor:
        """Queries, or what has their shape, in the query layout."""
        return x_THD.reshape(-1, x_THD.shape[2]).index_select(0, self.query_rows)

    def keys_of(self, x_TKD: torch.Tensor) -> torch.Tensor:
        """Keys or values in the key layout."""
        return x_TKD.reshape(-1, x_TKD.shape[2]).index_select(0, self.key_rows)

    def split_queries(self, x_RD: torch.Tensor) -> list[torch.Tensor]:
        """Each stack's part of the query layout, `[n * K, L * G, D]`."""
        sizes = [len(stack.tiles) * stack.num_rows * self.num_heads for stack in self.stacks]
        return self._split(x_RD, sizes)

    def split_keys(self, x_RD: torch.Tensor) -> list[torch.Tensor]:
        """Each stack's part of the key layout, `[n * K, S, D]`."""
        sizes = [len(stack.tiles) * stack.num_keys * self.num_kv for stack in self.stacks]
        return self._split(x_RD, sizes)

    def _split(self, x_RD: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
        return [
            part.view(len(stack.tiles) * self.num_kv, -1, x_RD.shape[1])
            for stack, part in zip(self.stacks, x_RD.split(sizes), strict=True)
        ]


def tile_table(
    segments: Segments, window: int | None, heads: tuple[int, int], device: torch.device
) -> TileTable:
    """The table for (query, key/value) heads, made once per batch and device."""
    key = ("tiles", window, heads, device)
    if key not in segments.memo:
        segments.memo[key] = _make_table(segments, window, heads, device)
    return cast("TileTable", segments.memo[key])


def _make_table(
    segments: Segments, window: int | None, heads: tuple[int, int], device: torch.device
) -> TileTable:
    # A card is better off with fewer and larger calls.
    most_scores = STACK_SCORES if device.type == "cpu" else 16 * STACK_SCORES
    stacks = stacks_of(tiles_of(segments, window), most_scores)
    num_heads, num_kv = heads
    groups = num_heads // num_kv
    head_KG = torch.arange(num_heads).view(1, num_kv, 1, groups)
    head_K = torch.arange(num_kv).view(1, num_kv, 1)
    query_rows: list[torch.Tensor] = []
    key_rows: list[torch.Tensor] = []
    is_real: list[torch.Tensor] = []
    is_own: list[torch.Tensor] = []
    for stack in stacks:
        token_nL, real_nL = _query_tokens(stack)
        token_nS, own_nS = _key_tokens(stack, token_nL, real_nL)
        shape = (len(stack.tiles), num_kv, stack.num_rows, groups)
        query_rows.append((token_nL[:, None, :, None] * num_heads + head_KG).flatten())
        is_real.append(real_nL[:, None, :, None].expand(shape).flatten())
        key_rows.append((token_nS[:, None, :] * num_kv + head_K).flatten())
        is_own.append(own_nS[:, None, :].expand(-1, num_kv, -1).flatten())
    query, real = torch.cat(query_rows), torch.cat(is_real)
    keys, own = torch.cat(key_rows), torch.cat(is_own)
    tables = (query, _inverse(query, real), keys, _inverse(keys, own))
    return TileTable(
        tuple(stacks), num_heads, num_kv, window, *(table.to(device) for table in tables)
    )


def _query_tokens(stack: Stack) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each query row, `[n, L]`, and whether it is real; padding repeats the last."""
    start_n1 = torch.tensor([[tile.start] for tile in stack.tiles])
    length_n1 = torch.tensor([[tile.length] for tile in stack.tiles])
    order_1L = torch.arange(stack.num_rows)[None]
    return start_n1 + order_1L.minimum(length_n1 - 1), order_1L < length_n1


def _key_tokens(
    stack: Stack, token_nL: torch.Tensor, real_nL: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each key row, `[n, S]`, and whether it is one of the tile's own tokens."""
    count = len(stack.tiles)
    num_left = stack.num_keys - stack.num_before - stack.num_rows
    path_nP = torch.tensor(
        [[t for start, stop in tile.path for t in range(start, stop)] for tile in stack.tiles],
        dtype=torch.int64,
    ).view(count, stack.num_before)
    left = token_nL[:, -1:].expand(-1, num_left)
    no = torch.zeros(count, 1, dtype=torch.bool)
    own_nS = torch.cat([no.expand(-1, stack.num_before), real_nL, no.expand(-1, num_left)], dim=1)
    return torch.cat([path_nP, token_nL, left], dim=1), own_nS


def _inverse(rows: torch.Tensor, is_wanted: torch.Tensor) -> torch.Tensor:
    places = is_wanted.nonzero()[:, 0]
    return torch.empty_like(places).scatter_(0, rows[places], places)


def _padded(length: int) -> int:
    return -(-length // STEP) * STEP


def _merged(ranges: list[Range]) -> tuple[Range, ...]:
    """The same tokens in the same order, with neighbors joined and empty ranges left out."""
    merged: list[Range] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def _last(ranges: tuple[Range, ...], count: int) -> tuple[Range, ...]:
    """The last `count` tokens of the ranges."""
    kept: list[Range] = []
    for start, stop in reversed(ranges):
        if count <= 0:
            break
        kept.append((max(start, stop - count), stop))
        count -= stop - start
    return tuple(reversed(kept))
