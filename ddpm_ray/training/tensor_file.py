"""Tensors in one block of memory that has the layout of a safetensors file, so it is written as is.

`safetensors.save` makes a second copy of all tensors and holds the interpreter's lock meanwhile:
1.7 s of CPU for 572 MB, in which no other thread runs, the heartbeat's neither. Here the copy that
a snapshot needs anyway is laid out as the file. The bytes are those that `safetensors.save` writes.
"""

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_ray.training.optimizer_moments import Tensors

# Names in a file's header, in the order of the data: wide types first, which aligns all of them.
DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ORDER = {dtype: place for place, dtype in enumerate(DTYPES)}
ALIGNMENT = 8  # bytes; of the header


@dataclass(frozen=True)
class FileLayout:
    """Places of the tensors of a group in their file."""

    header: bytes
    offsets: dict[str, int]  # in bytes from the file's begin, by name
    size: int  # of the file in bytes

    @classmethod
    def of(cls, tensors: Tensors) -> "FileLayout":
        """Return the layout of `tensors`. Raises KeyError for a dtype that files do not store."""
        names = sorted(tensors, key=lambda name: (ORDER[tensors[name].dtype], name))
        entries, offsets, end = {}, {}, 0
        for name in names:
            tensor, begin = tensors[name], end
            end += tensor.numel() * tensor.element_size()
            shape, dtype = list(tensor.shape), DTYPES[tensor.dtype]
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
            offsets[name] = begin
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % ALIGNMENT)
        header = len(text).to_bytes(ALIGNMENT, "little") + text
        offsets = {name: len(header) + offset for name, offset in offsets.items()}
        return cls(header, offsets, len(header) + end)

    def place(self, tensors: Tensors, block: Tensor) -> Tensors:
        """Write the header to `block` [size] uint8; return views of it for copies of `tensors`."""
        block[: len(self.header)] = torch.frombuffer(bytearray(self.header), dtype=torch.uint8)
        return {name: _view(block, self.offsets[name], tensors[name]) for name in tensors}


def packed(tensors: Tensors) -> Tensors:
    """Copy `tensors`, on any device, to one block of memory with the layout of a file."""
    layout = FileLayout.of(tensors)
    views = layout.place(tensors, torch.empty(layout.size, dtype=torch.uint8))
    copy_all(views, tensors)
    return views


def copy_all(targets: Tensors, sources: Tensors, non_blocking: bool = False) -> None:
    """Copy each tensor to the one of its name, in one call that releases the interpreter's lock."""
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(
                list(targets.values()), [sources[name] for name in targets], non_blocking
            )


def file_bytes(tensors: Tensors) -> memoryview:
    """Return the file of CPU tensors as safetensors writes it; no copy if they are `packed`."""
    layout = FileLayout.of(tensors)
    block = _block(tensors, layout)
    if block is None:
        block = _block(packed(tensors), layout)
    return memoryview(layout.header) if block is None else block.numpy().data


def _block(tensors: Tensors, layout: FileLayout) -> Tensor | None:
    """The block of memory that these tensors fill with this layout, or None if they do not."""
    for name, tensor in tensors.items():
        place = tensor.storage_offset() * tensor.element_size()
        if place != layout.offsets[name] or not tensor.is_contiguous():
            return None
    memory = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in tensors.values()}
    if len(memory) != 1:
        return None
    (storage,) = memory.values()
    if storage.nbytes() != layout.size or storage.device.type != "cpu":
        return None
    block = torch.empty(0, dtype=torch.uint8).set_(storage)
    header = block[: len(layout.header)].numpy().tobytes()
    return block if header == layout.header else None


def _view(block: Tensor, offset: int, like: Tensor) -> Tensor:
    """Return the part of `block` from `offset` on as a contiguous tensor of dtype and shape."""
    size = like.numel() * like.element_size()
    return block[offset : offset + size].view(like.dtype).view(like.shape)
