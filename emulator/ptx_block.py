"""A running thread block and its accessible memory."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHARED_BASE = 1 << 10


class Fault(Exception):
    """An error that a GPU would, or might, show."""


class Memory:
    """Bytes that kernels may access; tensors are not copied. Shared memory starts with all bits set."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.starts = np.zeros(0, np.uint64)

    def add(self, name: str, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return
        known = next((r for r in self.regions if r.start == storage.data_ptr()), None)
        if known is None:
            content = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
            known = Region(name, storage.data_ptr(), content, np.zeros(len(content), np.bool_))
            self.regions.append(known)
            self.regions.sort(key=lambda r: r.start)
            self.starts = np.array([r.start for r in self.regions], np.uint64)
        marks = torch.from_numpy(known.allowed).view(torch.uint8)
        size = tensor.element_size()
        first = tensor.storage_offset() * size
        for byte in range(size):
            strides = [s * size for s in tensor.stride()]
            marks.as_strided(tuple(tensor.shape), strides, first + byte).fill_(1)

    def find(self, addresses: np.ndarray) -> Iterator[tuple["Region", np.ndarray]]:
        """Regions, each with a mask of the addresses in it."""
        where = np.searchsorted(self.starts, addresses, "right") - 1
        for index in np.unique(where):
            if index < 0:
                raise Fault(f"address {int(addresses[where < 0][0]):#x} lies before every tensor")
            yield self.regions[index], where == index


@dataclass
class Region:
    """A tensor's storage, or a block's shared memory."""

    name: str
    start: int
    content: np.ndarray  # (bytes,)
    allowed: np.ndarray  # (bytes,) bool
    # (bytes,) last writing and reading warp (-1: none, -2: several), and the barrier count then
    writer: np.ndarray = field(init=False)
    written: np.ndarray = field(init=False)
    reader: np.ndarray = field(init=False)
    read: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.clear_history()

    def clear_history(self) -> None:
        size = len(self.content)
        self.writer, self.reader = (np.full(size, -1, np.int64) for _ in range(2))
        self.written, self.read = (np.zeros(size, np.int64) for _ in range(2))

    def byte_indices(self, addresses: np.ndarray, size: int, what: str) -> np.ndarray:
        """(accesses, size) byte indices; raises if a byte is not allowed or an access is unaligned."""
        if (addresses % np.uint64(size)).any():
            bad = int(addresses[(addresses % np.uint64(size)) != 0][0])
            raise Fault(f"{what} of {size} bytes at {bad - self.start} of {self.name} is not aligned")
        byte_indices = (addresses - np.uint64(self.start)).astype(np.int64)[:, None] + np.arange(size)
        beyond = (byte_indices < 0) | (byte_indices >= len(self.content))
        if beyond.any():
            raise Fault(f"{what} at byte {int(byte_indices[beyond][0])} of {self.name}, which has {len(self.content)}")
        if not self.allowed[byte_indices].all():
            bad = int(byte_indices[~self.allowed[byte_indices]][0])
            raise Fault(f"{what} at byte {bad} of {self.name}, between the elements of the tensor")
        return byte_indices

    def check_load(self, byte_indices: np.ndarray, warps: np.ndarray, barrier: int, warps_per_block: int) -> None:
        warp = warps[:, None]
        writer, written = self.writer[byte_indices], self.written[byte_indices]
        same_block = writer // warps_per_block == warp // warps_per_block
        racing = (writer != -1) & (writer != warp) & (~same_block | (written == barrier))
        if racing.any():
            raise Fault(f"byte {int(byte_indices[racing][0])} of {self.name} is read while another warp writes it")
        several = (
            (self.reader[byte_indices] != -1)
            & (self.reader[byte_indices] != warp)
            & (self.read[byte_indices] == barrier)
        )
        self.reader[byte_indices] = np.where(several, -2, warp)
        together = byte_indices[self.reader[byte_indices] != np.where(several, -2, warp)]  # read by this instruction
        self.reader[together] = -2
        self.read[byte_indices] = barrier

    def store(
        self, byte_indices: np.ndarray, content: np.ndarray, warps: np.ndarray, barrier: int, warps_per_block: int
    ) -> None:
        """Warps of a block may write one byte only with equal values: Triton does, where a layout repeats elements."""
        warp = np.broadcast_to(warps[:, None], byte_indices.shape)
        writer, reader = self.writer[byte_indices], self.reader[byte_indices]
        other = (writer != -1) & (writer != warp)
        other_block = other & (writer // warps_per_block != warp // warps_per_block)
        differs = self.content[byte_indices] != content
        racing = (reader != -1) & (reader != warp) & (self.read[byte_indices] == barrier)
        racing |= other & differs & (self.written[byte_indices] == barrier)
        self.writer[byte_indices] = warp
        self.written[byte_indices] = barrier
        self.content[byte_indices] = content
        # what this instruction's other warps wrote
        racing |= (self.writer[byte_indices] != warp) & (self.content[byte_indices] != content)
        if other_block.any() or racing.any():
            bad = int(byte_indices[other_block | racing][0])
            raise Fault(f"byte {bad} of {self.name} is written while another warp or block uses it")


class Block:
    """Called by generated code."""

    def __init__(self, memory: Memory, threads: int, shared: int, index: int, parameters: dict[str, int]) -> None:
        self.memory, self.threads, self.index, self.parameters = memory, threads, index, parameters
        self.thread = np.arange(threads, dtype=np.uint32)
        self.block = np.full(threads, index, np.uint32)
        self.active = np.ones(threads, np.bool_)
        self.targets: np.ndarray | None = None
        self.warps_per_block = -(-threads // 32)
        self.warp = np.arange(threads) // 32 + index * self.warps_per_block
        content = np.full(shared, 0xFF, np.uint8)
        self.shared = Region("shared memory", SHARED_BASE, content, np.ones(shared, np.bool_))
        self.registers: dict[str, np.ndarray] = {}
        self.barrier_count = index * 1_000_000

    def barrier(self) -> None:
        self.require_convergence("a barrier")
        self.barrier_count += 1

    def require_convergence(self, what: str) -> None:
        if not self.active.all():
            raise Fault(f"not all threads of the block reach {what}")

    @staticmethod
    def flush(x: np.ndarray) -> np.ndarray:
        return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(np.zeros_like(x), x), x)

    @staticmethod
    def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Rounds towards zero."""
        if (b == 0).any():
            raise Fault("an integer is divided by zero")
        return ((abs(a) // abs(b)) * (np.sign(a) * np.sign(b))).astype(a.dtype)

    @staticmethod
    def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        bits = 8 * a.dtype.itemsize
        products = [(int(x) * int(y)) >> bits for x, y in zip(a, b, strict=True)]
        return np.array([p & ((1 << bits) - 1) for p in products], np.dtype(f"u{bits // 8}")).view(a.dtype)

    @staticmethod
    def round_to(x: np.ndarray, kind: str) -> np.ndarray:
        """The bits of bfloat16 or float16."""
        dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        return torch.from_numpy(np.ascontiguousarray(x)).to(dtype).view(torch.int16).numpy().view(np.uint16)

    @staticmethod
    def to_integer(x: np.ndarray, dtype: Any) -> np.ndarray:
        limits = np.iinfo(dtype)
        return np.clip(np.nan_to_num(x.astype(np.float64)), limits.min, limits.max).astype(dtype)

    @staticmethod
    def extract_bits(value: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        bits = 8 * value.dtype.itemsize
        up = (bits - position - length).astype(value.dtype)
        return (value << up) >> (up + position.astype(value.dtype))

    @staticmethod
    def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        pool = np.stack([*((a >> 8 * i) & 0xFF for i in range(4)), *((b >> 8 * i) & 0xFF for i in range(4))])
        result = np.zeros_like(a)
        for i in range(4):
            choice = (selector >> 4 * i) & 0xF
            byte = np.take_along_axis(pool, (choice & 7)[None].astype(np.int64), 0)[0]
            byte = np.where(choice & 8, np.where(byte & 0x80, 0xFF, 0), byte)
            result |= byte.astype(np.uint32) << np.uint32(8 * i)
        return result

    def shuffle(
        self, how: str, value: np.ndarray, lane: np.ndarray, clamp: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        self.require_convergence("a shuffle")
        own = (self.thread & 31).astype(np.int64)
        lane, limit = lane.astype(np.int64), (clamp & 31).astype(np.int64)
        inside = ((clamp >> 8) & 31).astype(np.int64)
        highest, lowest = (own & inside) | (limit & ~inside), own & inside
        if how == "up":
            source = own - lane
            valid = source >= highest
        else:
            source = {"down": own + lane, "bfly": own ^ lane, "idx": lowest | (lane & ~inside & 31)}[how]
            valid = source <= highest
        source = np.where(valid, source, own)
        return value[(self.thread & ~np.uint32(31)).astype(np.int64) + source], valid

    def reduce(self, ufunc: Any, value: np.ndarray) -> np.ndarray:
        self.require_convergence("a reduction")
        return np.repeat(ufunc.reduce(value.reshape(-1, 32), 1), 32).astype(value.dtype)

    def _matrix_rows(self, address: np.ndarray, matrix: int) -> np.ndarray:
        rows = address.reshape(-1, 32)[:, 8 * matrix : 8 * matrix + 8]
        return np.repeat(rows, 4, 1).reshape(-1)

    def load_matrix(self, address: np.ndarray, count: int, transposed: bool) -> list[np.ndarray]:
        """8 x 8 matrices of 16-bit elements; lane 8 i + r holds the address of row r of matrix i."""
        results = []
        for matrix in range(count):
            rows = self.load("shared", self._matrix_rows(address, matrix), self.active, 16)
            numbers = rows.view(np.uint16).reshape(-1, 8, 4, 8)[:, :, 0]  # (warps, 8, 8)
            numbers = numbers.transpose(0, 2, 1) if transposed else numbers
            results.append(np.ascontiguousarray(numbers).view(np.uint32).reshape(-1))
        return results

    def store_matrix(self, address: np.ndarray, values: list[np.ndarray], transposed: bool) -> None:
        for matrix, value in enumerate(values):
            numbers = np.ascontiguousarray(value).view(np.uint16).reshape(-1, 8, 8)
            numbers = np.ascontiguousarray(numbers.transpose(0, 2, 1) if transposed else numbers)
            content = np.repeat(numbers.view(np.uint8).reshape(-1, 8, 16), 4, 1).reshape(-1, 16)
            first = np.arange(self.threads) % 4 == 0
            self.store("shared", self._matrix_rows(address, matrix), first, content)

    def _parts(self, space: str, addresses: np.ndarray) -> Any:
        if space == "shared":
            return [(self.shared, np.ones(len(addresses), np.bool_))]
        return self.memory.find(addresses)

    def load(self, space: str, address: np.ndarray, active: np.ndarray, size: int) -> np.ndarray:
        """(threads, size) bytes, zero if inactive."""
        result = np.zeros((self.threads, size), np.uint8)
        address = address.astype(np.uint64)
        for region, part in self._parts(space, address[active]):
            threads = np.flatnonzero(active)[part]
            byte_indices = region.byte_indices(address[threads], size, "load")
            region.check_load(byte_indices, self.warp[threads], self.barrier_count, self.warps_per_block)
            result[threads] = region.content[byte_indices]
        return result

    def store(self, space: str, address: np.ndarray, active: np.ndarray, content: np.ndarray) -> None:
        address = address.astype(np.uint64)
        for region, part in self._parts(space, address[active]):
            threads = np.flatnonzero(active)[part]
            byte_indices = region.byte_indices(address[threads], content.shape[1], "store")
            region.store(byte_indices, content[threads], self.warp[threads], self.barrier_count, self.warps_per_block)

    def parameter(self, name: str, dtype: Any) -> np.ndarray:
        bits = self.parameters[name] & ((1 << 8 * np.dtype(dtype).itemsize) - 1)
        return np.full(self.threads, bits, np.dtype(f"u{np.dtype(dtype).itemsize}")).view(dtype)

    def previous_value(self, register: str, dtype: Any) -> np.ndarray:
        """All bits set if unwritten."""
        held = self.registers.get(register)
        if held is None:
            held = np.full(self.threads, True if dtype is np.bool_ else np.iinfo(dtype).max, dtype)
        return held

    def branch(self, predicate: np.ndarray, there: int, on: int) -> int:
        """The next basic block; if threads diverge, ``targets`` has one per thread."""
        taken = predicate[self.active]
        if taken.all():
            return there
        if taken.any():
            self.targets = np.where(predicate, there, on)
        return on
