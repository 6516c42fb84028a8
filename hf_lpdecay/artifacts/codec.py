"""A piece of a sparse tensor in few bytes, and back: a bit mask, and the bytes of the non-zero values by significance.

The values' exponents take few of their possible values and are compressed well, their mantissas hardly at all: so the
bytes are sorted into planes, one for each place in a value, and each plane goes through Zstandard by itself. Zero means
that all bits are: -0.0 is a value.
"""

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import numpy as np


# Entries per piece: small enough for several at a time, large enough for the compressor.
PIECE = 1 << 22
_FILLED = 1 << 18
_MASK_LEVEL, _PLANE_LEVEL = 3, 1
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Piece:
    """What is kept of a piece.

    Args:
        nonzeros (`int`): How many entries have a bit that is set.
        parts (`list[bytes]`): The mask, or the gaps between the values if these are fewer than one in 16 (empty if all
            entries are zero or none is), then the planes from the most significant byte down. A part that Zstandard
            does not make smaller is kept as it is, but for gaps.
    """

    nonzeros: int
    parts: list[bytes]


@cache
def zstandard() -> ModuleType:
    """The compressor's module, imported when an archive is first written or read: nothing else needs it.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import zstandard
    except ImportError as error:
        raise ImportError("Archives need the package zstandard: pip install zstandard.") from error
    return zstandard


def encode(data: bytes | memoryview, size: int, is_float: bool) -> Piece:
    """Compress some entries of a tensor.

    Args:
        data (`bytes`): The entries, little endian.
        size (`int`): Bytes per entry: 1, 2, 4 or 8.
        is_float (`bool`): Whether the highest bit is a sign, which is better off beside the mantissa.
    """
    words = np.frombuffer(data, _WORDS[size])
    mask = words != 0
    places = np.flatnonzero(mask)  # a quarter of the time of a mask as an index
    nonzeros, values = len(places), words[places]
    mask_part = b""
    if 0 < nonzeros < len(words):
        if _is_rare(nonzeros, len(words)):
            mask_part = zstandard().ZstdCompressor(level=_PLANE_LEVEL).compress(_gaps(places).tobytes())
        else:
            mask_part = _compress(np.packbits(mask, bitorder="little").tobytes(), _MASK_LEVEL)
    if is_float:
        bits = 8 * size
        values = (values << values.dtype.type(1)) | (values >> values.dtype.type(bits - 1))
    planes = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
    parts = [_compress(np.ascontiguousarray(planes[:, i]).tobytes(), _PLANE_LEVEL) for i in reversed(range(size))]
    return Piece(nonzeros, [mask_part, *parts])


def decode(piece: Piece, count: int, size: int, is_float: bool) -> bytes:
    """The entries that [`encode`] was given.

    Args:
        piece (`Piece`): What was kept.
        count (`int`): Number of entries.
        size, is_float: See [`encode`].

    Raises:
        ValueError: If the piece is damaged.
    """
    _check(piece, count, size)
    words = np.zeros(count, _WORDS[size])
    if piece.nonzeros == 0:
        return words.tobytes()
    values = _values(piece, size, is_float)
    if piece.nonzeros == count:
        return values.tobytes()
    if _is_rare(piece.nonzeros, count):
        words[_places(piece.parts[0], piece.nonzeros, count)] = values
        return words.tobytes()
    fill(words, _mask(piece, count), values)
    return words.tobytes()


def fill(words: np.ndarray, mask: np.ndarray, values: np.ndarray) -> None:
    """Put values in their places, some entries at a time: the numbers of the places take four times the values' memory.

    Args:
        words (`np.ndarray`): Zeros.
        mask (`np.ndarray`): One bit for each of them, lowest first, as bytes.
        values (`np.ndarray`): As many as bits are set.
    """
    taken = 0
    for first in range(0, len(words), _FILLED):
        part = words[first : first + _FILLED]
        places = np.flatnonzero(_bits(mask[first // 8 : (first + _FILLED) // 8], len(part)))
        part[places] = values[taken : taken + len(places)]
        taken += len(places)


def decode_packed(piece: Piece, count: int, size: int, is_float: bool) -> tuple[np.ndarray, np.ndarray]:
    """As [`decode`], but the zeros are not written out.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: One bit for each entry, lowest first, as bytes; and the values that are not
            zero, as unsigned integers of `size` bytes.
    """
    _check(piece, count, size)
    values = _values(piece, size, is_float) if piece.nonzeros else np.zeros(0, _WORDS[size])
    if 0 < piece.nonzeros < count and not _is_rare(piece.nonzeros, count):
        return _mask(piece, count), values
    bits = np.full(count, piece.nonzeros == count)
    if 0 < piece.nonzeros < count:
        bits[_places(piece.parts[0], piece.nonzeros, count)] = True
    return np.packbits(bits, bitorder="little"), values


def _check(piece: Piece, count: int, size: int) -> None:
    if not 0 <= piece.nonzeros <= count or len(piece.parts) != size + 1:
        raise ValueError(f"{piece.nonzeros} values in {len(piece.parts)} parts do not make {count} entries")


def _values(piece: Piece, size: int, is_float: bool) -> np.ndarray:
    planes = np.empty((piece.nonzeros, size), np.uint8)
    for i, part in zip(reversed(range(size)), piece.parts[1:]):
        planes[:, i] = np.frombuffer(_decompress(part, piece.nonzeros), np.uint8)
    values = planes.view(_WORDS[size]).reshape(-1)
    if is_float:
        bits = 8 * size
        values = (values >> values.dtype.type(1)) | (values << values.dtype.type(bits - 1))
    return values


def _mask(piece: Piece, count: int) -> np.ndarray:
    packed = np.frombuffer(_decompress(piece.parts[0], -(-count // 8)), np.uint8)
    found = int(np.bitwise_count(packed).sum())
    if found != piece.nonzeros or (count % 8 and packed[-1] >> count % 8):
        raise ValueError(f"the mask has {found} bits set for {piece.nonzeros} values")
    return packed


def _bits(packed: np.ndarray, count: int) -> np.ndarray:
    return np.unpackbits(packed, count=count, bitorder="little").view(bool)


def _is_rare(nonzeros: int, count: int) -> bool:
    """Whether values are so few that the gaps between them are fewer bytes than a mask."""
    return nonzeros * 16 < count


def _gaps(places: np.ndarray) -> np.ndarray:
    """The zeros in front of each value, a byte for each; 255 stands for as many zeros, and the gap goes on."""
    gaps = np.diff(places, prepend=-1) - 1
    longer = gaps // 255
    coded = np.full(len(gaps) + int(longer.sum()), 255, np.uint8)
    coded[np.cumsum(longer + 1) - 1] = gaps - 255 * longer
    return coded


def _places(part: bytes, nonzeros: int, count: int) -> np.ndarray:
    """Where the values are, from the gaps."""
    try:
        size = zstandard().frame_content_size(part)
        if not nonzeros <= size <= nonzeros + count // 255:  # before memory is taken for it
            raise ValueError(f"{size} gaps for {nonzeros} values among {count} entries")
    except zstandard().ZstdError as error:
        raise ValueError(str(error)) from error
    coded = np.frombuffer(_decompress(part, size), np.uint8)
    ends = np.flatnonzero(coded != 255)
    places = np.cumsum(coded, dtype=np.int64)[ends] + np.arange(len(ends))
    if len(places) != nonzeros or places[-1] >= count:
        raise ValueError(f"{len(places)} gaps do not place {nonzeros} values among {count} entries")
    return places


def _compress(data: bytes, level: int) -> bytes:
    compressed = zstandard().ZstdCompressor(level=level).compress(data)
    return compressed if len(compressed) < len(data) else data


def _decompress(data: bytes, size: int) -> bytes:
    if len(data) == size:
        return data
    try:
        if zstandard().frame_content_size(data) != size:  # before memory is taken for it
            raise ValueError(f"a part does not hold {size} bytes")
        return zstandard().ZstdDecompressor().decompress(data)
    except zstandard().ZstdError as error:
        raise ValueError(str(error)) from error
