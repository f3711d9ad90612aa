"""Damaged and hostile variants of a safetensors file: what a test of any kind of file feeds to its reader.

Each variant comes with a name for the report, from a seeded generator. Containers are written by hand, since the
library writes none of these; `Layout` is a file taken apart.
"""

import json
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mendkit.mend.files import SEAL, SEALED, _digest, tensor_sha256

Variant = tuple[str, bytes]
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "U8",
    "BOOL",
    "U64",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "C64",
    "X",
)
HUGE = (2**63 - 1, 2**64 - 1, 2**40, 2**31, 10**30, -1)


def sealed(metadata: dict) -> dict:
    """The metadata with a checksum that is right for them, as an attacker would write."""
    told = {key: value for key, value in metadata.items() if key != SEAL}
    return told | {SEAL: _digest(told)}


@dataclass
class Layout:
    """A safetensors file in parts: the header, its tensors' bytes by name, and the kit's metadata."""

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
        told = json.loads(self.header["__metadata__"]["mendkit"])
        return {key: value for key, value in told.items() if key != SEAL}

    def text(self) -> str:
        return json.dumps(self.header)

    def bytes(self, text: str | None = None, length: int | None = None) -> bytes:
        header = (self.text() if text is None else text).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(header) if length is None else length) + header + self.data

    def changed(self, change: Callable[["Layout"], object]) -> bytes:
        """The file after a change, which may return the header's text or set what it likes."""
        other = Layout(json.loads(json.dumps(self.header)), self.data)
        text = change(other)
        return other.bytes(text if isinstance(text, str) else None)

    def retold(self, metadata: dict | str, *, checksum: str | None = "right") -> bytes:
        """The file with other metadata, by default with a checksum that is right for them, as an attacker would."""
        if (
            isinstance(metadata, dict)
            and checksum is None
            and isinstance(metadata.get("format"), str)
        ):
            metadata = metadata | {"format": metadata["format"].removesuffix(SEALED)}
        elif isinstance(metadata, dict):
            metadata = sealed(metadata) if checksum == "right" else metadata | {SEAL: checksum}
        text = metadata if isinstance(metadata, str) else json.dumps(metadata)
        return Layout(self.header | {"__metadata__": {"mendkit": text}}, self.data).bytes()


def truncated(whole: bytes, rng: random.Random, n: int) -> Iterator[Variant]:
    """Cut within the length, the header, at and beside every tensor's border, inside tensors."""
    layout = Layout.of(whole)
    start = len(whole) - len(layout.data)
    borders = sorted({at for name in layout.names for at in layout.header[name]["data_offsets"]})
    places = {*range(9), start - 1, start, start + 1, len(whole) - 1}
    places |= {start + at + shift for at in borders for shift in (-1, 0, 1)} - {
        len(whole),
        len(whole) + 1,
    }
    while len(places) < n:
        places.add(rng.randrange(len(whole)))
    yield from ((f"cut at {at}", whole[:at]) for at in sorted(places))
    yield from ((f"{extra} bytes more", whole + bytes(extra)) for extra in (1, 8, 4096))


def flipped(whole: bytes, rng: random.Random, n: int) -> Iterator[Variant]:
    """One bit of the length, the header and its metadata, or the tensors."""
    start = len(whole) - len(Layout.of(whole).data)
    regions = ((0, 8, 64), (8, start, n), (start, len(whole), n))
    for begin, end, count in regions:
        for _ in range(count):
            at, bit = rng.randrange(begin, end), rng.randrange(8)
            content = bytearray(whole)
            content[at] ^= 1 << bit
            yield f"bit {bit} of byte {at}", bytes(content)


def misdeclared(whole: bytes, rng: random.Random, n: int) -> Iterator[Variant]:
    """Lengths, offsets, shapes, kinds and names that are not those of the data."""
    layout = Layout.of(whole)
    for length in (*HUGE[:4], 100_000_001, len(whole), len(whole) - 8, 0, 1, 2):
        yield f"header of {length}", layout.bytes(length=length % 2**64)
    yield from (("no header at all", b"\xff" * 8), ("a header of blanks", layout.bytes(" " * 64)))
    yield "a header that nests", layout.bytes("[" * 50_000)
    for text in (
        "{}",
        "[]",
        "null",
        '"x"',
        '{"__metadata__": {}}',
        '{"__metadata__": 3}',
        '{"x": 3}',
    ):
        yield f"header {text}", layout.bytes(text)
    for _ in range(n):
        yield from _misdeclared_once(layout, rng)


def _misdeclared_once(layout: Layout, rng: random.Random) -> Iterator[Variant]:
    def edit(about: str, change: Callable[[Layout], object]) -> Variant:
        return about, layout.changed(change)

    name, other = rng.sample(layout.names, 2)
    a, b = layout.header[name], layout.header[other]
    huge, dtype, place = rng.choice(HUGE), rng.choice(DTYPES), rng.randrange(2)
    whole_size = max(end for own in layout.names for end in layout.header[own]["data_offsets"])
    yield edit(f"{name} is {dtype}", lambda x: x.header[name].update(dtype=dtype))
    yield edit(f"{name} is {huge} wide", lambda x: x.header[name].update(shape=[huge]))
    yield edit(f"{name} is 0 x {huge}", lambda x: x.header[name].update(shape=[0, huge]))
    yield edit(f"{name} is flat", lambda x: x.header[name].update(shape=[*a["shape"], 1]))
    yield edit(
        f"{name} is turned", lambda x: x.header[name].update(shape=a["shape"][::-1], dtype=dtype)
    )
    yield edit(
        f"{name} at {huge}", lambda x: x.header[name]["data_offsets"].__setitem__(place, huge)
    )
    yield edit(
        f"{name} to {whole_size}", lambda x: x.header[name].update(data_offsets=[0, whole_size])
    )
    yield edit(f"{name} and {other} swap data", lambda x: x.header.update({name: b, other: a}))
    yield edit(f"no {name}", lambda x: x.header.pop(name))
    yield edit(f"{name} renamed", lambda x: x.header.update({f"{name}.x": x.header.pop(name)}))
    yield edit(
        f"{name} twice",
        lambda x: f"{x.text()[:-1]}, {json.dumps(name)}: {json.dumps(rng.choice((a, b)))}}}",
    )
    yield edit("metadata twice", lambda x: x.text()[:-1] + ', "__metadata__": {"mendkit": "{}"}}')
    yield edit("a key more", lambda x: x.header["__metadata__"].update({f"k{rng.random()}": "x"}))


def swapped(whole: bytes) -> Iterator[Variant]:
    """The data of two tensors of one size exchanged, their places in the header as they were."""
    layout = Layout.of(whole)
    spans = {name: layout.header[name]["data_offsets"] for name in layout.names}
    for i, first in enumerate(layout.names):
        for second in layout.names[i + 1 :]:
            (a, b), (c, d) = sorted((spans[first], spans[second]))
            if b - a == d - c:
                data = (
                    layout.data[:a]
                    + layout.data[c:d]
                    + layout.data[b:c]
                    + layout.data[a:b]
                    + layout.data[d:]
                )
                yield f"{first} and {second} exchanged", Layout(layout.header, data).bytes()


def rehashed(
    path: Path, rng: random.Random, n: int
) -> Iterator[tuple[str, dict[str, torch.Tensor], dict]]:
    """Tensors that are wrong although every checksum is right: (name, tensors, metadata), to be written anew."""
    metadata, tensors = Layout.of(path.read_bytes()).metadata, load_file(path)

    def with_sums(values: dict[str, torch.Tensor]) -> dict:
        return metadata | {"sha256": {name: tensor_sha256(value) for name, value in values.items()}}

    for _ in range(n):
        name = rng.choice([name for name, value in tensors.items() if value.numel()])
        value = tensors[name]
        changes = {
            "cast": value.to(torch.float16 if value.is_floating_point() else torch.float32),
            "complex": value.to(torch.complex64),
            "one row more": torch.cat([value.reshape(1, -1), value.reshape(1, -1)]),
            "no row": value.flatten()[:0],
            "flat": value[None],
        }
        if value.is_floating_point():
            bad, at = value.clone().flatten(), rng.randrange(value.numel())
            bad[at] = rng.choice((float("nan"), float("inf"), float("-inf")))
            changes["not finite"] = bad.view(value.shape)
        for about, new in changes.items():
            own = tensors | {name: new.contiguous()}
            yield f"{name} {about}", own, with_sums(own)
        fewer = {key: other for key, other in tensors.items() if key != name}
        yield f"without {name}", fewer, with_sums(fewer)
        more = tensors | {f"{name}.more": value.clone()}
        yield f"{name} once more", more, with_sums(more)


ODD_VALUES = (None, True, -1, 0, 10**400, float("nan"), 1e999, "", "x", "\x00", "\ud800", "é🙂")
ODD_VALUES += ([], [[]], {}, {"name": {}})


def with_each_replaced(document: Any, odd: Any) -> Iterator[Any]:
    """A JSON document with each of its values in turn, at any depth, replaced by `odd`."""
    if not isinstance(document, dict | list):
        return
    for key, own in document.items() if isinstance(document, dict) else enumerate(document):
        for new in (odd, *with_each_replaced(own, odd)):
            changed = document.copy()
            changed[key] = new
            yield changed
