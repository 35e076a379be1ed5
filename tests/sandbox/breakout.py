"""A hostile tool program that aims at the broker and the daemon rather than at files."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import socket
import struct
import time
from typing import Any

from agentd_sandbox.sdk import tool

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def channel() -> int:
    for descriptor in range(3, 64):
        try:
            os.fstat(descriptor)
        except OSError:
            continue
        return descriptor
    raise LookupError


def page_end(content: bytes) -> int:
    """The address of `content`, right before memory that is not mapped."""
    libc.mmap.restype = ctypes.c_void_p
    size = mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = libc.mmap(None, ctypes.c_size_t(2 * size), mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, ctypes.c_long(0))
    libc.munmap(ctypes.c_void_p(start + size), ctypes.c_size_t(size))
    ctypes.memmove(start + size - len(content), content, len(content))
    return int(start + size - len(content))


@tool("answer")
def answer(text: str) -> dict[str, Any]:
    body = text.encode()
    os.write(channel(), struct.pack("=I", len(body)) + body)
    time.sleep(5)
    return {}


@tool("half_answer")
def half_answer() -> dict[str, Any]:
    os.write(channel(), struct.pack("=I", 100) + b"{")
    os._exit(0)


@tool("close_channel")
def close_channel() -> dict[str, Any]:
    os.close(channel())
    time.sleep(30)
    return {}


@tool("truncate")
def truncate(path: str, length: int) -> dict[str, Any]:
    os.truncate(path, length)
    return {}


@tool("short_address")
def short_address(length: int) -> dict[str, Any]:
    """connect(2) with an address of which only `length` bytes can be read."""
    with socket.socket() as connection:
        address = page_end(struct.pack("=H", 2)[:length] + bytes(max(0, length - 2)))
        result = libc.connect(connection.fileno(), ctypes.c_void_p(address), 16)
        return {"result": result, "errno": ctypes.get_errno()}


@tool("unterminated")
def unterminated() -> dict[str, Any]:
    """open(2) of a path without an end."""
    result = libc.open(ctypes.c_void_p(page_end(b"/" * 10)), 0)
    return {"result": result, "errno": ctypes.get_errno()}


@tool("connect")
def connect(host: str, port: int) -> dict[str, Any]:
    with socket.socket() as connection:
        connection.connect((host, port))
    return {}


@tool("random_calls")
def random_calls(numbers: list[int], seed: int, count: int, path: str) -> dict[str, Any]:
    chance = random.Random(seed)
    buffer = ctypes.create_string_buffer(1 << 16)
    name = ctypes.create_string_buffer(path.encode(), 4096)  # room for what calls may write there
    inner = ctypes.create_string_buffer(path.encode() + b"/x", 4096)
    addresses = [ctypes.addressof(name), ctypes.addressof(inner), ctypes.addressof(buffer) + 4096, page_end(b"/x"), 1]
    odd = [
        0,
        1,
        3,
        5,
        -1,
        -100,
        16,
        128,
        0o100,
        0o1101,
        0x1000,
        (1 << 31) - 1,
        1 << 31,
        (1 << 32) - 1,
        (1 << 63) - 1,
        -(1 << 63),
    ]
    for _ in range(count):
        arguments = [chance.choice(addresses if chance.random() < 0.5 else odd) for _ in range(6)]
        libc.syscall(ctypes.c_long(chance.choice(numbers)), *(ctypes.c_long(a) for a in arguments))
        buffer[4096:8192] = bytes(4096)
    return {"done": count}


@tool("sleep")
def sleep(seconds: float) -> dict[str, Any]:
    time.sleep(seconds)
    return {}


@tool("leave")
def leave(how: str) -> dict[str, Any]:
    if how == "exit":
        raise SystemExit(3)
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "recursion":
        return leave(how)
    if how == "object":
        return {"value": object()}
    if how == "deep":
        deep: dict[str, Any] = {}
        for _ in range(100_000):
            deep = {"d": deep}
        return deep
    if how == "crash":
        ctypes.string_at(8)
    return {}


@tool("remove")
def remove(path: str) -> dict[str, Any]:
    os.unlink(path)
    return {}


@tool("rename")
def rename(path: str, to: str) -> dict[str, Any]:
    os.rename(path, to)
    return {}
