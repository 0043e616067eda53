"""Checks of weight files by their headers, in milliseconds for a file of any size. Imports no torch."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from rlhfkernels.errors import ModelError

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_SAFETENSORS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # of safetensors' own reader
_GGUF_VERSIONS = (2, 3)
# Bytes of a value by its type in the metadata of a GGUF file.
_GGUF_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_ALIGNMENT = 32


class _FileError(Exception):
    """The rest of a sentence that begins with the file."""


def check_weights(model: str, folder: Path) -> None:
    """Checks that the folder of a checkpoint has weights, and the safetensors files that transformers would load.

    Raises:
        ModelError: there are none; or a safetensors file is absent, empty, truncated or malformed, or holds no tensors.
    """
    name = _SAFETENSORS
    try:
        if (folder / name).is_file():
            _read_safetensors(folder / name)
        elif (folder / _INDEX).is_file():
            name = _INDEX
            for name in _shards(folder / _INDEX):
                _read_safetensors(folder / name)
        elif not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
            raise ModelError(f"model '{model}' is a folder without weights ({', '.join(_WEIGHTS)}): a plan needs none.")
    except (_FileError, OSError) as error:
        raise _invalid(model, name, error) from error


def check_gguf(model: str, path: Path) -> None:
    """Checks that a GGUF file holds all tensors that its header lists.

    Raises:
        ModelError: the file is empty, truncated or malformed, or holds no tensors.
    """
    try:
        with path.open("rb") as file:
            _read_gguf(file)
    except (_FileError, OSError) as error:
        raise _invalid(model, path.name, error) from error


def _invalid(model: str, name: str, error: Exception) -> ModelError:
    reason = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else str(error)
    return ModelError(f"model '{model}' is invalid: its {name} {reason}.")


def _shards(index: Path) -> list[str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        shards = list(dict.fromkeys(names))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _FileError("has no weight_map from tensors to files") from None
    if not shards or not all(isinstance(name, str) and name and "\0" not in name for name in shards):
        raise _FileError("has no weight_map from tensors to files")
    return shards


def _read_safetensors(path: Path) -> None:
    """Reads the header: 8 bytes with its length, then JSON with the range of bytes of each tensor."""
    size = path.stat().st_size
    if size == 0:
        raise _FileError("is empty")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER_BYTES:
            raise _FileError("is not a safetensors file")
        if 8 + length > size:
            raise _FileError(f"is truncated: its header ends at byte {8 + length}, the file at byte {size}")
        ends = _ends(file.read(length))
    if not ends:
        raise _FileError("holds no tensors")
    if 8 + length + max(ends) > size:
        raise _FileError(f"is truncated: its tensors end at byte {8 + length + max(ends)}, the file at byte {size}")


def _ends(header: bytes) -> list[int]:
    """The end of each tensor, counted from the end of the header."""
    try:
        entries: dict[str, Any] = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _FileError("is not a safetensors file") from None
    if not all(type(end) is int and end >= 0 for end in ends):
        raise _FileError("is not a safetensors file")
    return ends


def _read_gguf(file: BinaryIO) -> None:
    """Reads the header: counts, metadata, then the name, shape, type and offset of each tensor."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise _FileError("is empty")
    if file.read(4) != b"GGUF":
        raise _FileError("is not a GGUF file")
    version, num_tensors, num_values = _unpack(file, "IQQ")
    if version not in _GGUF_VERSIONS:
        raise _FileError(f"has GGUF version {version}: it must be 2 or 3, little-endian")
    if num_tensors == 0:
        raise _FileError("holds no tensors")
    alignment = _GGUF_ALIGNMENT
    for _ in range(num_values):
        key = _string(file)
        (kind,) = _unpack(file, "I")
        if key == b"general.alignment" and _GGUF_VALUE_BYTES.get(kind) == 4:
            (alignment,) = _unpack(file, "I")
        else:
            _skip_value(file, kind)
    offset = 0
    for _ in range(num_tensors):
        _string(file)
        (num_dims,) = _unpack(file, "I")
        _skip(file, 8 * num_dims + 4)
        offset = max(offset, *_unpack(file, "Q"))
    data = -(-file.tell() // max(1, alignment)) * max(1, alignment)
    if data + offset >= size:
        raise _FileError(f"is truncated: its last tensor begins at byte {data + offset}, the file ends at byte {size}")


def _unpack(file: BinaryIO, fields: str) -> tuple[int, ...]:
    layout = struct.Struct("<" + fields)
    data = file.read(layout.size)
    if len(data) < layout.size:
        raise _FileError("is truncated: it ends in its header")
    return layout.unpack(data)


def _string(file: BinaryIO) -> bytes:
    """Reads a string, or the beginning of one that is too long to be a key."""
    (length,) = _unpack(file, "Q")
    text = file.read(min(length, 64))
    _skip(file, length - len(text))
    return text


def _skip(file: BinaryIO, num_bytes: int) -> None:
    if num_bytes > os.fstat(file.fileno()).st_size - file.tell():
        raise _FileError("is truncated: it ends in its header")
    file.seek(num_bytes, os.SEEK_CUR)


def _skip_value(file: BinaryIO, kind: int) -> None:
    """Skips a value of the metadata. Arrays of arrays do not exist in models."""
    count = 1
    if kind == _GGUF_ARRAY:
        kind, count = _unpack(file, "IQ")
    if kind == _GGUF_STRING:
        for _ in range(count):
            _string(file)
    elif kind in _GGUF_VALUE_BYTES:
        _skip(file, count * _GGUF_VALUE_BYTES[kind])
    else:
        raise _FileError(f"has metadata of an unknown type, {kind}")
