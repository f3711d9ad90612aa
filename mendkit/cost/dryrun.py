"""Memory and arithmetic of code that runs on shapes alone, and how fast this machine does such arithmetic.

Within a `DryRun` tensors on the meta device have shapes and no values. Everything the code makes there is counted
while it lives, autograd's saved tensors included. Freed blocks below `MAPPED` stay with the process for its next ones,
while larger ones go back to the system at once (glibc's malloc), so the peak is that of the small blocks and that of
the large ones together. Products of matrices are counted by the rows of their left factor,
since thin ones run slower, and all other operations by the bytes that they read and write. Where code asks for a
value, it gets 1. Index tensors may be real: masks then choose as many rows as they would.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
_INDEXED = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
ROWS = (4, 32, 256, 2048)
"""Rows of the left factor at which a machine's rates are measured."""
MAPPED = 2**25
"""Bytes from which on glibc gives a block pages of its own (its largest threshold, which it soon reaches)."""
SIZES = (2**12, 2**16, 2**20, 2**25)
"""Bytes that an operation of the other kind makes or changes, at which they are measured."""


@dataclass(frozen=True)
class Machine:
    """What one machine does in a second."""

    flops: dict[tuple[torch.dtype, int], float]  # by dtype and rows of the left factor, one of ROWS
    bytes: dict[
        int, float
    ]  # read and written by operations that only move or map values, by one of SIZES
    hashed: float  # bytes of SHA-256

    @classmethod
    def measured(cls, dtypes: Sequence[torch.dtype], *, seconds: float = 2.0) -> Machine:
        """Measure this machine (CPU, with the threads that torch uses here) for about so many seconds."""
        share = seconds / (len(dtypes) * len(ROWS) + len(SIZES) + 1)
        flops = {}
        for dtype in dtypes:
            right = torch.ones(1024, 1024, dtype=dtype)
            for rows in ROWS:
                left = torch.ones(rows, 1024, dtype=dtype)
                flops[dtype, rows] = (
                    2 * rows * 1024**2 / _seconds(lambda a=left, b=right: a @ b, share)
                )
        moved = {}
        for size in SIZES:
            value = torch.ones(size // 4)
            moved[size] = 2 * size / _seconds(lambda x=value: x * 2.0, share)
        text = bytes(2**20)
        hashed = len(text) / _seconds(lambda: hashlib.sha256(text).digest(), share)
        return cls(flops, moved, hashed)


def _seconds(call: Callable[[], Any], budget: float) -> float:
    """The median time of a call, as often as fits into the budget; a hundred small ones count as one."""
    call()
    times, end, many = [], time.perf_counter() + budget, 1
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(many):
            call()
        times.append((time.perf_counter() - start) / many)
        many = 100 if times[-1] < 1e-5 else 1
    return statistics.median(times)


@dataclass(frozen=True)
class Work:
    """What was done: floating-point operations by (dtype, one of ROWS), bytes moved by the rest, by one of SIZES."""

    flops: dict[tuple[torch.dtype, int], float]
    bytes: dict[int, float]

    def seconds(self, machine: Machine) -> float:
        """How long `machine` takes for it."""
        products = sum(count / machine.flops[kind] for kind, count in self.flops.items())
        return products + sum(count / machine.bytes[size] for size, count in self.bytes.items())


class DryRun(TorchDispatchMode):
    """Counts what happens on the meta device while it is entered; `given` tensors are there before and not counted."""

    def __init__(self, given: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._live, self._most = (
            [0, 0],
            [0, 0],
        )  # bytes of small blocks and of large ones: now, and at most
        self.flops: Counter[tuple[torch.dtype, int]] = Counter()
        self.bytes: Counter[int] = Counter()
        self._known = {value.untyped_storage()._cdata for value in given}
        self._values = _Values()

    def __enter__(self) -> DryRun:
        self._values.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._values.__exit__(*error)

    @property
    def live(self) -> int:
        """Bytes that live now."""
        return sum(self._live)

    @property
    def peak(self) -> int:
        """The most bytes since the last restart that the process had to hold."""
        return sum(self._most)

    def restart(self, *, trimmed: bool = True) -> int:
        """Start counting anew: the peak from what lives now, or with all small blocks that there were if the process
        does not give them back (not `trimmed`). Returns what lives."""
        self._most = [self._live[0] if trimmed else self._most[0], self._live[1]]
        self.flops, self.bytes = Counter(), Counter()
        return self.live

    def work(self) -> Work:
        """What was done since the last restart."""
        return Work(dict(self.flops), dict(self.bytes))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        hollow = any(x.is_meta for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        if hollow and func is aten._local_scalar_dense.default:
            return 1.0
        if hollow and func in _INDEXED:
            args = (args[0], _positions(args[1]), *args[2:])
        if hollow:
            place = lambda x: x if x.is_meta else x.to("meta")  # noqa: E731
            args, kwargs = tree_map_only(Tensor, place, (args, kwargs))
            if (
                func is aten._to_copy.default and "device" in kwargs
            ):  # what has no values lies on every device
                kwargs["device"] = torch.device("meta")
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_meta]
        if made or (hollow and func._schema.name.endswith("_")):
            self._count(func, args, kwargs, out, made)
        return out

    def _count(self, func: Any, args: tuple, kwargs: dict, out: Any, made: list[Tensor]) -> None:
        fresh = 0
        for value in made:
            storage = value.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
                kind = storage.nbytes() >= MAPPED
                self._live[kind] += storage.nbytes()
                self._most[kind] = max(self._most[kind], self._live[kind])
                fresh += value.nbytes
        packet, name = func._overloadpacket, func._schema.name
        if packet in flop_registry:
            left = next(
                x for x in args if isinstance(x, Tensor) and x.dim() > 1 and x.is_floating_point()
            )
            rows = made[0].shape[-2] if "backward" not in name else left.shape[-2]
            self.flops[left.dtype, _nearest(rows, ROWS)] += flop_registry[packet](
                *args, **kwargs, out_val=out
            )
        elif packet is aten.linalg_inv_ex:
            self.flops[made[0].dtype, ROWS[-1]] += 2 * made[0].shape[-1] ** 3
        elif fresh or name.endswith("_"):
            given = sum(x.nbytes for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            size = sum(value.nbytes for value in made) or given  # a fused optimiser returns nothing
            moved = size + given
            self.bytes[_nearest(size, SIZES)] += max(
                moved, SIZES[0]
            )  # the smallest take as long as a small one

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live[size >= MAPPED] -= size


def _nearest(count: int, measured: Sequence[int]) -> int:
    return min(measured, key=lambda own: abs(math.log(own / max(count, 1))))


def _positions(index: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Masks as positions, as many as they have where they are real."""
    out: list[Tensor | None] = []
    for own in index:
        out += [own] if own is None or own.dtype != torch.bool else own.nonzero().unbind(1)
    return out


class _Values(TorchFunctionMode):
    """Gives zeros to those who ask a meta tensor for a list, and keeps the values of indices and masks."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.tolist and args[0].is_meta:
            kind = (
                float
                if args[0].is_floating_point()
                else bool
                if args[0].dtype == torch.bool
                else int
            )
            return np.zeros(args[0].shape, kind).tolist()
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type == "meta":
            value = torch.tensor(*args, **{**kwargs, "device": "cpu"})
            return value.to("meta") if value.is_floating_point() else value
        if func is Tensor.to and not args[0].is_floating_point() and torch.device("meta") in args:
            return args[0]
        return func(*args, **kwargs)
