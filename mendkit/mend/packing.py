"""How an archive's tensors are stored: equal ones once, symmetric matrices as triangles.

Both keep every bit. `compact` also rounds matrices, to 8 bits or, triangles, to 12: blocks of 64
numbers share the largest one's size, of which the error is at most 1/254 or 1/4094. Vectors
(means, variances, biases, step sizes) keep every bit.
"""

# Keys M x are small beside |M| |x|, so that the error of M grows in them: 12 bits of M change ΔW by
# 1.3e-3 of its size on SmolLM2, 8 bits by 2e-2. Neither a low rank nor bfloat16 does as well.

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

from .files import old_checksums

BLOCK = 64
LARGEST = "/size"  # end of the name of the blocks' largest sizes
NEAR = 1e-6  # asymmetry that `compact` rounds away, as a share of the largest number

Forms = Mapping[str, tuple[torch.dtype, torch.Size]]


def packed(
    tensors: Mapping[str, Tensor], *, compact: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors to store, and what `unpacked` must know of them, for JSON."""
    stored: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    first: dict[str, str] = {}  # tensor of each content
    triangles = []
    digests = old_checksums(tensors)
    for name, value in tensors.items():
        # 1. Equal tensors.
        other = first.setdefault(digests[name], name)
        if other != name:
            same[name] = other
            continue
        # 2. Symmetric matrices.
        is_matrix = value.dim() > 1 and value.is_floating_point()
        bits = 8
        if is_matrix and _is_symmetric(value, NEAR if compact else 0.0):
            triangles.append(name)
            value, bits = _triangle(value), 12
        # 3. Fewer bits; statistics that run on (float64) keep theirs.
        if compact and is_matrix and value.dtype != torch.float64:
            stored[name], stored[name + LARGEST] = _rounded(value, bits)
        else:
            stored[name] = value
    return stored, {"same": same, "triangles": triangles}


def unpacked(
    stored: Mapping[str, Tensor], packing: Mapping[str, Any], forms: Forms
) -> dict[str, Tensor]:
    """The tensors by name; `forms` are the dtypes and shapes that they must have.

    A damaged file raises one of `DAMAGE`, before more is allocated than the forms say.
    """
    tensors = dict(stored)
    for name in (*packing["triangles"], *packing["same"]):
        if name not in forms:
            raise KeyError(name)
    # 1. Fewer bits: what is left of the last block is cut off.
    for name in [name.removesuffix(LARGEST) for name in stored if name.endswith(LARGEST)]:
        shape = forms[name][1]
        if name in packing["triangles"]:
            shape = torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))
        flat = _widened(tensors[name], tensors.pop(name + LARGEST))
        tensors[name] = flat[: shape.numel()].view(shape)
    # 2. Symmetric matrices.
    for name in packing["triangles"]:
        tensors[name] = _square(tensors[name], forms[name][1][-1])
    # 3. Equal tensors, each in memory of its own.
    for name, other in packing["same"].items():
        if tensors[other].shape != forms[name][1]:
            raise ValueError(f"{name} is not as {other}")
        tensors[name] = tensors[other].clone()
    return tensors


def _is_symmetric(x: Tensor, tolerance: float) -> bool:
    if x.shape[-1] != x.shape[-2]:
        return False
    return bool((x - x.mT).abs().max() <= tolerance * x.abs().max())


def _triangle(x: Float[Tensor, "*k n n"]) -> Float[Tensor, "*k m"]:
    """The upper triangle, row after row."""
    return torch.cat([x[..., i, i:] for i in range(x.shape[-1])], -1)


def _square(x: Float[Tensor, "*k m"], n: int) -> Float[Tensor, "*k n n"]:
    rows = x.split(list(range(n, 0, -1)), -1)  # raises for another length than n (n + 1) / 2
    made = x.new_empty(*x.shape[:-1], n, n)
    for i, row in enumerate(rows):
        made[..., i, i:] = made[..., i:, i] = row
    return made


def _rounded(x: Tensor, bits: int) -> tuple[UInt8[Tensor, "b k"], Float[Tensor, " b"]]:
    """Blocks of whole numbers in 8 or 12 bits, and each block's largest size."""
    flat = x.float().flatten()
    blocks = pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    sizes, most = blocks.abs().amax(1), 2 ** (bits - 1) - 1
    shares = blocks / sizes.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    whole = (shares * most).round().to(torch.int16)
    if bits == 8:
        return whole.to(torch.int8).view(torch.uint8), sizes
    # the upper 8 bits of each number, then the lower 4, two numbers in a byte
    upper, lower = (whole >> 4).to(torch.int8).view(torch.uint8), whole & 15
    pairs = (lower[:, ::2] | lower[:, 1::2] << 4).to(torch.uint8)
    return torch.cat([upper, pairs], 1), sizes


def _widened(stored: UInt8[Tensor, "b k"], sizes: Float[Tensor, " b"]) -> Float[Tensor, " n"]:
    """What `_rounded` made of its numbers."""
    if (stored.dtype, sizes.dtype) != (torch.uint8, torch.float32):
        raise TypeError(f"rounded numbers are {stored.dtype} of {sizes.dtype}")
    whole, most = stored[:, :BLOCK].view(torch.int8).to(torch.int16), 127
    if stored.shape[1] > BLOCK:
        pairs = stored[:, BLOCK:].to(torch.int16)
        whole, most = whole * 16 + torch.stack([pairs & 15, pairs >> 4], 2).flatten(1), 2047
    return (whole * (sizes / most)[:, None]).flatten()
