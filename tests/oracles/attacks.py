"""Damaged and hostile variants of a safetensors file, for the readers of all kinds of file.

Each variant has a name for the report, and comes from a seeded generator. Containers are written by
hand, since the library writes none of these.
"""

import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load, save

from mendkit.mend.files import CHECKSUM, content_sha256, old_checksums

Variant = tuple[str, bytes]
DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X"]
HUGE = (2**63 - 1, 2**64 - 1, 2**40, 2**31, 10**30, -1)


class Canary:
    """What unpickling runs if it runs anything: `call` with `arguments`."""

    def __init__(self, call: Callable, *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple:
        return self.call, self.arguments


def signed(metadata: dict, tensors: dict[str, torch.Tensor]) -> dict:
    """The metadata with a checksum that is right for them, as an attacker would write."""
    told = {key: value for key, value in metadata.items() if key != CHECKSUM}
    return told | {CHECKSUM: content_sha256(told, tensors)}


def signed_as_first(metadata: dict, tensors: dict[str, torch.Tensor]) -> dict:
    """The same as the very first files were: a checksum for each tensor, none for the metadata."""
    first = str(metadata.get("format")).replace("-3", "-1").replace("-2", "-1")
    return metadata | {"format": first, CHECKSUM: old_checksums(tensors)}


@dataclass
class Layout:
    """A safetensors file in parts: the header, and its tensors' bytes."""

    header: dict = field(repr=False)
    data: bytes = field(repr=False)

    @classmethod
    def of(cls, whole: bytes) -> "Layout":
        (length,) = struct.unpack("<Q", whole[:8])
        return cls(json.loads(whole[8 : 8 + length]), whole[8 + length :])

    @property
    def names(self) -> list[str]:
        return [name for name in self.header if name != "__metadata__"]

    @property
    def metadata(self) -> dict:
        return json.loads(self.header["__metadata__"]["mendkit"])

    def bytes(self, text: str | None = None, length: int | None = None) -> bytes:
        text = json.dumps(self.header) if text is None else text
        header = text.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(header) if length is None else length) + header + self.data

    def changed(self, change: Callable[[dict], object]) -> bytes:
        """The file after a change of its header, which may return the header's text."""
        header = json.loads(json.dumps(self.header))
        text = change(header)
        return Layout(header, self.data).bytes(text if isinstance(text, str) else None)

    def retold(self, metadata: dict | str, sign: Callable[[dict, dict], dict] = signed) -> bytes:
        """The file with other metadata, by default with a checksum that is right for them."""
        if isinstance(metadata, dict):
            metadata = json.dumps(sign(metadata, load(self.bytes())))
        return Layout(self.header | {"__metadata__": {"mendkit": metadata}}, self.data).bytes()


def damage(whole: bytes, seed: int, n: int) -> Iterator[Variant]:
    """All kinds of damage to a file's bytes; `n` sets how much of each."""
    rng = random.Random(seed)
    yield from truncated(whole, rng, n)
    yield from flipped(whole, rng, n)
    yield from misdeclared(whole, rng, max(n // 10, 1))


def truncated(whole: bytes, rng: random.Random, n: int) -> Iterator[Variant]:
    """Cut within the length, the header, at and beside tensors' borders, inside tensors."""
    layout = Layout.of(whole)
    start = len(whole) - len(layout.data)
    places = {*range(9), start - 1, start, start + 1, len(whole) - 1}
    for name in layout.names:
        border = start + layout.header[name]["data_offsets"][0]
        places |= {border - 1, border, border + 1}
    while len(places) < n:
        places.add(rng.randrange(len(whole)))
    for at in sorted(places):
        yield f"cut at {at}", whole[:at]
    yield "8 bytes more", whole + bytes(8)


def flipped(whole: bytes, rng: random.Random, n: int) -> Iterator[Variant]:
    """One bit of the length, the header and its metadata, or the tensors."""
    start = len(whole) - len(Layout.of(whole).data)
    for begin, end in ((0, 8), (8, start), (start, len(whole))):
        for _ in range(n):
            at, bit = rng.randrange(begin, end), rng.randrange(8)
            content = bytearray(whole)
            content[at] ^= 1 << bit
            yield f"bit {bit} of byte {at}", bytes(content)


def misdeclared(whole: bytes, rng: random.Random, n: int) -> Iterator[Variant]:
    """Lengths, offsets, shapes, kinds and names that are not those of the data."""
    layout = Layout.of(whole)
    for length in (*HUGE[:4], 100_000_001, len(whole), 0, 1):
        yield f"header of {length}", layout.bytes(length=length % 2**64)
    for text in ("{}", "null", '{"__metadata__": 3}', '{"x": 3}', " " * 64, "[" * 50_000):
        yield f"header {text[:20]}", layout.bytes(text)
    for _ in range(n):
        name, other = rng.sample(layout.names, 2)
        huge, dtype = rng.choice(HUGE), rng.choice(DTYPES)
        for what, change in _false_declarations(name, other, huge, dtype).items():
            yield f"{what}: {name}, {other}, {huge}, {dtype}", layout.changed(change)


def _false_declarations(
    name: str, other: str, huge: int, dtype: str
) -> dict[str, Callable[[dict], object]]:
    def swap(header: dict) -> None:
        header[name], header[other] = header[other], header[name]

    def twice(header: dict) -> str:
        return f"{json.dumps(header)[:-1]}, {json.dumps(name)}: {json.dumps(header[other])}}}"

    return {
        "dtype": lambda header: header[name].update(dtype=dtype),
        "wide": lambda header: header[name].update(shape=[huge]),
        "empty and wide": lambda header: header[name].update(shape=[0, huge]),
        "turned": lambda header: header[name].update(shape=header[name]["shape"][::-1], dtype="U8"),
        "far": lambda header: header[name]["data_offsets"].__setitem__(1, huge),
        "swapped": swap,
        "missing": lambda header: header.pop(name),
        "renamed": lambda header: header.update({f"{name}.x": header.pop(name)}),
        "twice": twice,
        "a key more": lambda header: header["__metadata__"].update(k="x"),
    }


def rehashed(whole: bytes, rng: random.Random, n: int) -> Iterator[Variant]:
    """Tensors that are wrong although every checksum is right."""
    metadata, tensors = Layout.of(whole).metadata, load(whole)
    names = sorted(name for name, value in tensors.items() if value.numel())
    numbers = [name for name in names if not tensors[name].dim()][:1]  # torch unpacks these
    for name in [*rng.choices(names, k=n), *numbers]:
        value, rest = tensors[name], {key: v for key, v in tensors.items() if key != name}
        bad = value.double().clone()
        bad.flatten()[rng.randrange(value.numel())] = float(rng.choice(("nan", "inf", "-inf")))
        changes = {
            "cast": {name: value.half() if value.is_floating_point() else value.float()},
            "complex": {name: value.to(torch.complex64)},
            "one row more": {name: torch.cat([value.reshape(1, -1), value.reshape(1, -1)])},
            "no row": {name: value.flatten()[:0]},
            "flat": {name: value[None]},
            "not finite": {name: bad.to(value) if value.is_floating_point() else bad},
            "missing": {},
            "twice": {name: value, f"{name}.more": value.clone()},
        }
        for about, change in changes.items():
            told = {"mendkit": json.dumps(signed(metadata, rest | change))}
            yield f"{name} {about}", save(rest | change, metadata=told)


ODD_VALUES = (None, True, -1, 0, 10**400, float("nan"), 1e999, "", "x", "\x00", "\ud800", "é🙂")
ODD_VALUES += ([], [[]], {}, {"name": {}})


def with_each_replaced(document: Any, odd: Any) -> Iterator[Any]:
    """A JSON document with each of its values in turn, at any depth, replaced by `odd`."""
    if not isinstance(document, dict | list):
        return
    items = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in items:
        for new in (odd, *with_each_replaced(value, odd)):
            changed = document.copy()
            changed[key] = new
            yield changed
