r"""The sets of 8-bit numbers that operands are rounded to, in plain PyTorch: the definition, on any device.

A group of entries is written as a scale times such numbers. Both sets are rounded to stochastically, by one rule:
an entry at fraction f of the way between two neighbours becomes the upper one with probability f.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from backsketch.torch_private import float8_matmul

__all__ = [
    "BLOCK",
    "FLOAT8",
    "INT8",
    "NUMBERS",
    "Floats",
    "Integers",
    "Numbers",
    "depth_of",
    "padded",
    "up",
]

BLOCK = 256  # rows that share the scale of a column of integers in grad_weight
_RIGHT = 64  # columns of a panel of packed codes
_ALL = 1 << 60
_LEAST = 32


def up(n: int, to: int) -> int:
    return (n + to - 1) // to * to


def padded(n: int) -> int:
    """A dimension of an operand as products on a GPU want it."""
    return max(up(n, 16), _LEAST)


def depth_of(n: int) -> int:
    """Rows of the packed codes of ``n`` rows."""
    return up(n, 4)


class Numbers(ABC):
    """A set of 8-bit numbers: how a group is scaled, rounded, multiplied and kept.

    Attributes:
        block: rows of ``grad_weight`` that share the scale of a column.
        depth: terms of ``grad_input`` that are summed before they are scaled.
    """

    block: int
    depth: int

    @abstractmethod
    def scale(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and rate of groups with these largest magnitudes; NaN and 0 where that is not finite."""

    @abstractmethod
    def spacing(self, levels: Tensor) -> Tensor:
        """Distance between the two numbers around each of ``levels``, which are entries over their scale."""

    @abstractmethod
    def round(self, x: Tensor, rate: Tensor, dither: Tensor) -> Tensor:
        """Codes of ``x``: numbers of the set with mean ``x / scale`` to 2^-17 of their spacing.

        ``dither`` holds random integers below 65536.
        """

    @abstractmethod
    def product(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """The product of two matrices of codes, as a float."""

    @abstractmethod
    def to_bytes(self, codes: Tensor) -> Tensor:
        """Codes ``(rows, columns)`` as uint8, flat, filled up to multiples of 4 and 16."""

    @abstractmethod
    def from_bytes(self, flat: Tensor, rows: int, columns: int) -> Tensor:
        """Undo :meth:`to_bytes`."""

    @abstractmethod
    def to_byte(self, codes: Tensor) -> Tensor:
        """Codes as uint8 by their bits, in their shape."""

    @abstractmethod
    def from_byte(self, encoded: Tensor) -> Tensor:
        """Undo :meth:`to_byte`."""

    @abstractmethod
    def encode(self, codes: Tensor) -> Tensor:
        """Codes as uint8, in their shape."""

    @abstractmethod
    def decode(self, encoded: Tensor) -> Tensor:
        """Undo :meth:`encode`."""

    def num_blocks(self, rows: int) -> int:
        """Blocks of rows in ``grad_weight``."""
        return (rows + self.block - 1) // self.block

    def blocks(self, rows: int) -> list[slice]:
        """These blocks."""
        return [
            slice(i * self.block, min((i + 1) * self.block, rows))
            for i in range(self.num_blocks(rows))
        ]


def _of_groups(largest: Tensor, scale: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and rate of live groups; for others 0 or NaN, and 0."""
    live = (largest > 0) & largest.isfinite()
    return (
        torch.where(live, scale, torch.where(largest == 0, 0.0, torch.nan)),
        torch.where(live, rate, 0.0),
    )


class Integers(Numbers):
    """-127 to 127, the largest entry of a group at the end: summed exactly in 32 bits."""

    block = BLOCK
    depth = 2048

    _LEVELS = 127.0 * 65536  # entries are rounded in units of 2^-16
    _HALF = 128.0 * 65536
    _TINY = 2.5e-32  # below it _LEVELS / x would overflow

    def scale(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        bounded = largest.clamp(min=self._TINY)
        # Tensors on both sides: a number PyTorch would turn into its reciprocal, on some device or other.
        rate = torch.full_like(bounded, self._LEVELS) / bounded
        return _of_groups(largest, bounded / torch.full_like(bounded, 127.0), rate)

    def spacing(self, levels: Tensor) -> Tensor:
        return torch.ones_like(levels)

    def round(self, x: Tensor, rate: Tensor, dither: Tensor) -> Tensor:
        units = (x * rate + self._HALF).nan_to_num_(self._HALF + self._LEVELS)
        units = units.clamp_(max=self._HALF + self._LEVELS).to(torch.int32)
        return ((units + dither) >> 16) - 128

    def product(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        return (a.to(torch.float64) @ b.to(torch.float64)).to(dtype)

    def to_bytes(self, codes: Tensor) -> Tensor:
        """Panels of 64 columns; in each, four rows next to each other for each column."""
        padded = F.pad(codes, (0, -codes.shape[1] % 16, 0, -codes.shape[0] % 4))
        panels = [
            panel.reshape(-1, 4, panel.shape[1]).transpose(1, 2).flatten() & 0xFF
            for panel in padded.split(_RIGHT, 1)
        ]
        return torch.cat(panels).to(torch.uint8)

    def from_bytes(self, flat: Tensor, rows: int, columns: int) -> Tensor:
        depth, wide = depth_of(rows), up(columns, 16)
        panels = [
            flat[start * depth : (start + width) * depth]
            .view(-1, width, 4)
            .transpose(1, 2)
            .reshape(-1, width)
            for start in range(0, columns, _RIGHT)
            for width in [min(_RIGHT, wide - start)]
        ]
        codes = torch.cat(panels, 1)[:rows, :columns]
        return codes.contiguous().view(torch.int8).to(torch.int32)

    def to_byte(self, codes: Tensor) -> Tensor:
        return (codes & 0xFF).to(torch.uint8)

    def from_byte(self, encoded: Tensor) -> Tensor:
        return encoded.view(torch.int8).to(torch.int32)

    def encode(self, codes: Tensor) -> Tensor:
        return (codes + 128).to(torch.uint8)

    def decode(self, encoded: Tensor) -> Tensor:
        return encoded.to(torch.int32) - 128


class Floats(Numbers):
    r"""8-bit floats of the format e4m3, up to 448: three bits of mantissa, spacing :math:`2^{-9}` below 2^-6.

    Scales are powers of two, so that scaling is exact; each number has a spacing of its own, so that a column
    needs one scale only. e4m3 serves cotangents too: with the largest entry of a group at the top of the range,
    its levels are twice as dense as those of e5m2 for all entries above 2e-5 of the largest.
    """

    block = depth = _ALL

    _LARGEST_MANTISSA = 0.875  # 448 = 0.875 * 2^9
    _TINY = (
        2.0**-100
    )  # smaller groups are scaled as this one, for the smallest spacing is a normal float32

    def scale(self, largest: Tensor) -> tuple[Tensor, Tensor]:
        mantissa, exponent = torch.frexp(largest.clamp(min=self._TINY).nan_to_num(1.0, 1.0))
        power = exponent - 9 + (mantissa > self._LARGEST_MANTISSA).to(exponent.dtype)
        return _of_groups(
            largest, _power_of_two(power, largest.dtype), _power_of_two(-power, largest.dtype)
        )

    def spacing(self, levels: Tensor) -> Tensor:
        exponent = torch.frexp(levels).exponent - 1
        return _power_of_two(exponent.clamp(min=-6) - 3, levels.dtype)

    def round(self, x: Tensor, rate: Tensor, dither: Tensor) -> Tensor:
        levels = (x * rate).nan_to_num_(0.0)
        spacing = self.spacing(levels)
        units = (levels.abs() / spacing * 65536.0 + 0.5).to(torch.int32)
        rounded = ((units + dither) >> 16).to(x.dtype) * spacing
        return torch.copysign(rounded, levels)

    def product(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        own = padded_product(a, b) if has_float8_product(a.device) else None
        if own is not None:
            return own.to(dtype)
        with torch.autocast(a.device.type, enabled=False):
            return a.to(dtype) @ b.to(dtype)

    def to_bytes(self, codes: Tensor) -> Tensor:
        padded = F.pad(codes, (0, -codes.shape[1] % 16, 0, -codes.shape[0] % 4))
        return padded.to(torch.float8_e4m3fn).view(torch.uint8).flatten()

    def from_bytes(self, flat: Tensor, rows: int, columns: int) -> Tensor:
        codes = flat.view(torch.float8_e4m3fn).view(-1, up(columns, 16))
        return codes.to(torch.float32)[:rows, :columns]

    def to_byte(self, codes: Tensor) -> Tensor:
        return codes.to(torch.float8_e4m3fn).view(torch.uint8)

    def from_byte(self, encoded: Tensor) -> Tensor:
        return encoded.view(torch.float8_e4m3fn).to(torch.float32)

    encode, decode = to_byte, from_byte


def _power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """``2 ** exponent`` for integers in the range of normal numbers, by their bits: exact on any device."""
    if dtype == torch.float64:
        return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def padded_product(a: Tensor, b: Tensor) -> Tensor | None:
    """The product of two matrices of e4m3 numbers by the library's product, in the layout that it wants."""
    rows, columns = a.shape[0], b.shape[1]
    left = F.pad(a, (0, -a.shape[1] % 16, 0, -rows % 16)).to(torch.float8_e4m3fn)
    right = F.pad(b.T, (0, -b.shape[0] % 16, 0, -columns % 16)).to(torch.float8_e4m3fn)
    product = float8_matmul(left.contiguous(), right.contiguous().T)
    return None if product is None else product[:rows, :columns]


@lru_cache
def has_float8_product(device: torch.device) -> bool:
    """Whether this GPU multiplies 8-bit floats (compute capability 8.9), and rightly so."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9) and multiplies_floats(device)


def multiplies_floats(device: torch.device | str) -> bool:
    """The self-test: sums of numbers of all magnitudes, against those of float64."""
    numbers = torch.tensor([448.0, -448.0, 15.0, 1.0, -0.5, 2.0**-6, 2.0**-9, 0.0], device=device)
    a, b = numbers.expand(33, 8).contiguous(), numbers.roll(3).expand(19, 8).T.contiguous()
    try:
        ours = padded_product(a, b)
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    if ours is None:
        return False
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    return bool(((ours - exact).abs() <= 2.0**-10 * size).all())


INT8, FLOAT8 = Integers(), Floats()
NUMBERS: dict[str, Numbers] = {"int8": INT8, "float8": FLOAT8}
