"""Reads and writes safetensors files, one tensor at a time, and keeps none.

The metadata of a file written here hold a CRC-32 of every tensor, so that an altered value is found by the name of its
tensor, and a SHA-256 of the header with all metadata: nothing in the file is without a checksum. Checksums find
accidents; whoever alters a file on purpose can alter them too.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from linlora.storage.ahead import one_thread
from linlora.storage.files import CorruptFileError, install_file, parse_json
from linlora.storage.staging import unfinished_file
from linlora.storage.tensors import StoredTensors, finite, memory, shapes

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_CHECKSUMS, _HEADER_CHECKSUM = "checksums", "header_checksum"
_CHUNK = 2**18
"""Bytes written at once. Writes of 2 MiB take five times the CPU time on Linux 6.18, which looks for pages as large."""


@dataclass(frozen=True)
class Entry:
    """The place of a tensor in its file, in bytes from the start, with its dtype and shape."""

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A safetensors file, opened: its names, shapes and metadata are known, a tensor is read when it is asked for.

    The file stays open, so one that is replaced meanwhile is read as it was. Values are copied: nothing stays mapped.

    Raises FileNotFoundError, and CorruptFileError for a file that is truncated or no safetensors file.

    >>> save_tensors("weights.safetensors", {"w": torch.ones(2, 3)}, {"kind": "example"})
    >>> file = TensorFile("weights.safetensors")
    >>> file.entries["w"].shape, file.metadata["kind"], file.read("w").sum().item()
    ((2, 3), 'example', 6.0)
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            with safe_open(self.path, framework="pt"):  # checks the header and the size of the file
                pass
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(f"{path}: not a whole safetensors file ({error}); it may be truncated") from error
        self._file = open(self.path, "rb")  # noqa: SIM115
        self._reading = threading.Lock()  # the file has one position, and `copy` runs beside `read_rows`
        self.size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        parsed = parse_json(self._file.read(length), f"{path}: its header")
        self.metadata: dict[str, str] = parsed.pop("__metadata__", None) or {}
        self.entries = {
            name: Entry(e["dtype"], tuple(e["shape"]), *(8 + length + offset for offset in e["data_offsets"]))
            for name, e in parsed.items()
        }
        checksum = self.metadata.pop(_HEADER_CHECKSUM, None)
        self.has_header_checksum = checksum is not None
        described = {name: (entry.code, entry.shape) for name, entry in self.entries.items()}
        if checksum is not None and checksum != _digest(described, self.metadata):
            raise CorruptFileError(f"{path}: its header does not match its checksum; the file was altered")
        try:
            self._checksums: dict[str, str] = dict(parse_json(self.metadata.pop(_CHECKSUMS, "{}"), _CHECKSUMS))
        except CorruptFileError:  # another program's
            self._checksums = {}
        self._unchecked = set(self.entries)
        self.has_tensor_checksums = self.entries.keys() <= self._checksums.keys()

    def like(self, name: str) -> Tensor:
        """A tensor of the shape and dtype, without values (on the meta device)."""
        return torch.empty(self.entries[name].shape, dtype=self._dtype(name), device="meta")

    def tensors(self) -> StoredTensors:
        """All tensors by name, each read when it is asked for."""
        return StoredTensors({name: self.like(name) for name in self.entries}, self.read)

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU. Raises CorruptFileError where it holds NaN or infinity or fails its checksum.

        The first read checks both; an open file stays as it is.
        """
        tensor = torch.empty(self.entries[name].shape, dtype=self._dtype(name))
        self._fill(memory(tensor), self.entries[name].start, name)
        if name in self._unchecked:
            self._check(name, tensor)
            self._unchecked.discard(name)
        return tensor

    def read_rows(self, name: str, rows: slice) -> Tensor:
        """Some rows of a tensor, unchecked."""
        entry = self.entries[name]
        block = torch.empty((rows.stop - rows.start, *entry.shape[1:]), dtype=self._dtype(name))
        row = (entry.stop - entry.start) // entry.shape[0]
        self._fill(memory(block), entry.start + rows.start * row, name)
        return block

    def copy(self, start: int, stop: int, out: int) -> None:
        """Append bytes of the file to an open file descriptor; the kernel moves them, or shares them where it can."""
        source = self._file.fileno()
        while start < stop:
            try:
                copied = os.copy_file_range(source, out, stop - start, offset_src=start)
            except (OSError, AttributeError):  # between file systems, or on a system without it
                with self._reading:
                    self._file.seek(start)
                    content = self._file.read(min(_CHUNK, stop - start))
                copied = os.write(out, content)
            if not copied:
                raise CorruptFileError(f"{self.path}: cut short; the file was truncated meanwhile")
            start += copied

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, name: str, tensor: Tensor) -> None:
        if name in self._checksums and f"{zlib.crc32(memory(tensor)):08x}" != self._checksums[name]:
            raise CorruptFileError(f"{self.path}: tensor '{name}' does not match its checksum; the file was altered")
        with one_thread():
            diverged = not finite(tensor)
        if diverged:
            raise CorruptFileError(
                f"{self.path}: tensor '{name}' holds NaN or infinity; the run that wrote it diverged"
            )

    def _fill(self, buffer: memoryview, start: int, name: str) -> None:
        with self._reading:
            self._file.seek(start)
            filled = self._file.readinto(buffer)
        if filled != len(buffer):
            raise CorruptFileError(f"{self.path}: tensor '{name}' is cut short; the file was truncated meanwhile")

    def _dtype(self, name: str) -> torch.dtype:
        code = self.entries[name].code
        if code not in DTYPES:
            raise CorruptFileError(f"{self.path}: tensor '{name}' is of the unknown dtype {code}")
        return DTYPES[code]


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file beside its place and rename it there; one tensor at a time is asked for and held.

    Raises ValueError for a tensor with NaN or infinity, which would be refused on reading; nothing is written then.
    """
    like = dict(sorted(shapes(tensors).items(), key=lambda item: -item[1].element_size()))  # so each starts aligned
    checksums = dict.fromkeys(like, "0" * 8)
    with unfinished_file(Path(path)) as (file, temporary):
        write(file, _header(like, checksums, metadata))
        for name in like:
            tensor = tensors[name].detach().to("cpu").contiguous()
            if not finite(tensor):
                raise ValueError(f"{path}: tensor '{name}' holds NaN or infinity; nothing was written")
            buffer = memory(tensor)
            checksums[name] = f"{zlib.crc32(buffer):08x}"
            write(file, buffer)
        file.seek(0)
        write(file, _header(like, checksums, metadata))
        install_file(temporary, path)


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors, on the CPU, and its metadata. NaN and infinity are refused by name."""
    with TensorFile(path) as file:
        return {name: file.read(name) for name in file.entries}, file.metadata


def _header(like: Mapping[str, Tensor], checksums: Mapping[str, str], metadata: Mapping[str, str]) -> bytes:
    metadata = {**metadata, _CHECKSUMS: json.dumps(checksums)}
    described = {name: (_CODES[tensor.dtype], tuple(tensor.shape)) for name, tensor in like.items()}
    entries: dict[str, Any] = {"__metadata__": {**metadata, _HEADER_CHECKSUM: _digest(described, metadata)}}
    stop = 0
    for name, tensor in like.items():
        start, stop = stop, stop + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned, as the format asks
    return len(text).to_bytes(8, "little") + text


def _digest(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> str:
    """SHA-256 of what a header says, in whatever order and spelling."""
    content = [sorted((name, code, list(shape)) for name, (code, shape) in tensors.items()), sorted(metadata.items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def write(file: FileIO, content: bytes | memoryview) -> None:
    """Write all of a buffer to a file that is not buffered."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest[:_CHUNK]) :]
