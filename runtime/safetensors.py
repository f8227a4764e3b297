"""safetensors: 8 bytes of header length, a JSON header, raw little-endian tensors. No pickle, so nothing to execute."""

import hashlib
import json
import math
import os
import struct
import zlib

import numpy as np
import torch

from .files import UserError, atomic, disk_errors, open_regular, parse_json
from .parallel import rank, sharded, whole, writes

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes, as in the safetensors package
MOST_DIMENSIONS = 64


def raw_bytes(tensor):
    """The memory of a tensor, gathered and copied to the CPU where needed, as a flat numpy uint8 array."""
    return whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def save_safetensors(path, tensors, metadata, mode=0o644):
    """Write {name: tensor} and {str: str} metadata atomically. A checksum of the tensors joins the metadata.

    Every rank calls this, and rank 0 writes. Sharded tensors are gathered one at a time.
    """
    if not writes(tensors.values()):
        return
    header, offset, crc = {}, 0, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + size]}
        offset += size

    def head():  # as long with one checksum as with another
        text = json.dumps({"__metadata__": {**metadata, "crc32": f"{crc:010d}"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    if rank() > 0:
        for tensor in tensors.values():
            if sharded(tensor):
                whole(tensor)
        return
    with atomic(path, mode) as file:
        file.write(head())
        for tensor in tensors.values():
            data = raw_bytes(tensor)
            crc = zlib.crc32(data, crc)
            file.write(data)
        file.seek(0)
        file.write(head())


def load_safetensors(path):
    """Read ({name: tensor}, metadata) onto the CPU. The tensors are views of the file; unused ones cost no memory.

    Raises UserError where the file is missing, is not safetensors, is cut short or fails its checksum.
    """
    unfit = UserError(f"{path} is no safetensors file, or is damaged: restore it from a copy")
    with disk_errors(path), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            begin = 8 + struct.unpack("<Q", file.read(8))[0]
            if begin > min(size, LARGEST_HEADER):
                raise unfit
            header = parse_json(file.read(begin - 8), path)
            metadata = header.pop("__metadata__", {})
            check_header(header, metadata, size - begin)
        except (UserError, struct.error, ValueError, KeyError, TypeError, AttributeError):
            raise unfit from None
        content = np.memmap(file, np.uint8, "c")  # copy on write: the file stays as it is, whatever becomes of a tensor
    data = torch.from_numpy(content[begin:])
    if "crc32" in metadata and zlib.crc32(data.numpy()) != int(metadata["crc32"]):
        raise UserError(f"{path} is damaged (its checksum is wrong): restore it from a copy")
    tensors = {}
    for name, entry in header.items():
        (start, end), dtype = entry["data_offsets"], DTYPES[entry["dtype"]]
        part = data[start:end]
        if (begin + start) % dtype.itemsize:
            part = part.clone()  # a copy is aligned to its element size, a slice of the file need not be
        tensors[name] = part.view(dtype).view(entry["shape"])
    return tensors, metadata


def check_header(header, metadata, size):
    """Raise ValueError, KeyError, TypeError or AttributeError for a header that does not describe `size` bytes.

    The ranges of the tensors follow each other without a gap, from the first byte to the last.
    """
    end = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        shape, (begin, stop) = entry["shape"], entry["data_offsets"]
        if type(shape) is not list or len(shape) > MOST_DIMENSIONS:
            raise ValueError("a shape is a short list")
        if any(type(number) is not int or not 0 <= number < 2**63 for number in (*shape, begin, stop)):
            raise ValueError("shapes and offsets are natural numbers")
        if math.prod(length or 1 for length in shape) >= 2**63:  # torch cannot count so far, empty tensor or not
            raise ValueError("a shape is too large")
        if begin != end or stop - begin != math.prod(shape) * DTYPES[entry["dtype"]].itemsize:
            raise ValueError("a tensor's bytes are not where they must be")
        end = stop
    if end != size:
        raise ValueError("the file is longer or shorter than its tensors")
    if not all(isinstance(word, str) for pair in metadata.items() for word in pair):
        raise ValueError("metadata is a map of strings")
    int(metadata.get("crc32", "0"))


def fingerprint(tensors):
    """sha256 (hex) over names, shapes and bytes of {name: tensor}, whatever their order: the identity of weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(raw_bytes(tensors[name]))
    return digest.hexdigest()
