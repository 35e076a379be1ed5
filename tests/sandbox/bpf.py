"""A small interpreter of classic BPF, as seccomp runs it on struct seccomp_data (seccomp(2), linux/bpf_common.h)."""

from __future__ import annotations

import struct

_DATA = struct.Struct("<IIQ6Q")
_INSTRUCTION = struct.Struct("<HBBI")


def evaluate(program: bytes, number: int, arch: int, arguments: tuple[int, ...] = (0,) * 6) -> int:
    """The return value of the filter for one system call."""
    data = _DATA.pack(number & 0xFFFFFFFF, arch, 0, *arguments)
    code = list(_INSTRUCTION.iter_unpack(program))
    accumulator, at = 0, 0
    while True:
        operation, jump_true, jump_false, k = code[at]
        at += 1
        match operation:
            case 0x20:  # ld [k]
                (accumulator,) = struct.unpack_from("<I", data, k)
            case 0x54:  # and #k
                accumulator &= k
            case 0x05:  # ja
                at += k
            case 0x15:  # jeq
                at += jump_true if accumulator == k else jump_false
            case 0x25:  # jgt
                at += jump_true if accumulator > k else jump_false
            case 0x35:  # jge
                at += jump_true if accumulator >= k else jump_false
            case 0x45:  # jset
                at += jump_true if accumulator & k else jump_false
            case 0x06:  # ret #k
                return k
            case _:
                raise AssertionError(f"unexpected instruction {operation:#x}")
