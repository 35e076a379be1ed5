"""The system calls of a worker, as one table. Whatever it does not name is refused with EPERM.

Compiled by `compile.py` for every architecture and checked in under `profiles/`; the running code only
loads the result. Reasons follow seccomp(2), seccomp_unotify(2) and the manual page of each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Action(Enum):
    ALLOW = "allow"
    """The kernel runs it: it works on descriptors or memory that the worker already has."""
    MEDIATE = "mediate"
    """The broker does it, from its own copy of the arguments."""
    ABSENT = "absent"
    """ENOSYS, so that the C library falls back to a call that is mediated."""
    KILL = "kill"
    """Only an attack asks for it: the worker dies and the call is an incident."""


@dataclass(frozen=True, slots=True)
class Check:
    """`(argument & mask) == value`, compared by value, never behind a pointer."""

    argument: int
    value: int
    mask: int = 0xFFFF_FFFF_FFFF_FFFF


@dataclass(frozen=True, slots=True)
class Rule:
    """One group of calls. With `checks`, any one tuple of them must hold in full, else the call is refused."""

    action: Action
    reason: str
    calls: tuple[str, ...]
    checks: tuple[tuple[Check, ...], ...] = ()


_LOW = 0xFFFF_FFFF  # int arguments: the upper half of the register is noise
_NEW_NAMESPACES = 0x7E02_0080  # every CLONE_NEW* flag of clone(2)
_THREAD = 0x0001_0000


def _any_of(argument: int, values: tuple[int, ...]) -> tuple[tuple[Check, ...], ...]:
    return tuple((Check(argument, value, _LOW),) for value in values)


def _stream(family: int) -> tuple[tuple[Check, ...], ...]:
    # SOCK_STREAM beneath the SOCK_CLOEXEC/SOCK_NONBLOCK bits; protocol 0 or TCP, so that MPTCP stays out.
    return tuple((Check(0, family, _LOW), Check(1, 1, 0xF), Check(2, protocol, _LOW)) for protocol in (0, 6))


TABLE: tuple[Rule, ...] = (
    Rule(
        Action.ALLOW,
        "input and output on descriptors the broker handed out",
        tuple(
            """read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range fstat fstatfs
            getdents64 fsync fdatasync sync_file_range flock fadvise64 sendfile splice tee copy_file_range ftruncate fallocate
            dup dup2 dup3 pipe pipe2 eventfd2 poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait
            epoll_pwait epoll_pwait2""".split()
        ),
    ),
    Rule(
        Action.ALLOW,
        "own memory",
        tuple("mmap munmap mremap brk mprotect madvise mincore msync mlock munlock membarrier memfd_create".split()),
    ),
    Rule(
        Action.ALLOW,
        "own threads, signals to be received, time",
        tuple(
            """rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack restart_syscall
            futex futex_waitv set_robust_list get_robust_list rseq set_tid_address sched_yield sched_getaffinity
            sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min getcpu arch_prctl
            nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getitimer setitimer alarm pause
            timerfd_create timerfd_settime timerfd_gettime wait4 waitid exit exit_group""".split()
        ),
    ),
    Rule(
        Action.ALLOW,
        "who and where it is; harmless to know",
        tuple(
            """getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid
            getpriority getrusage getrlimit getcwd uname sysinfo umask getrandom""".split()
        ),
    ),
    Rule(
        Action.ALLOW,
        "a connected socket",
        ("recvfrom", "recvmsg", "getsockopt", "getsockname", "getpeername", "shutdown"),
    ),
    Rule(
        Action.ALLOW,
        "send without an address: MSG_FASTOPEN would connect past connect(2)",
        ("sendto",),
        ((Check(4, 0),),),
    ),
    Rule(Action.ALLOW, "TCP only: no datagrams, so no name look-ups", ("socket",), _stream(2) + _stream(10)),
    Rule(
        Action.ALLOW,
        "threads of its own; no process, no namespace",
        ("clone",),
        ((Check(0, _THREAD, _NEW_NAMESPACES | _THREAD),),),
    ),
    Rule(
        Action.ALLOW,
        "own descriptors: no signal owner, no leases, no notification",
        ("fcntl",),
        _any_of(1, (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032, 1034)),
    ),
    Rule(
        Action.ALLOW,
        "FIONREAD FIOCLEX FIONCLEX FIONBIO TCGETS TIOCGWINSZ: terminal injection and reflinks stay out",
        ("ioctl",),
        _any_of(1, (0x541B, 0x5451, 0x5450, 0x5421, 0x5401, 0x5413)),
    ),
    Rule(
        Action.ALLOW,
        "PR_SET_NAME PR_GET_NAME PR_GET_DUMPABLE PR_GET_NO_NEW_PRIVS PR_SET_VMA",
        ("prctl",),
        _any_of(0, (15, 16, 3, 39, 0x53564D41)),
    ),
    Rule(Action.ALLOW, "reading its own limits", ("prlimit64",), ((Check(0, 0, _LOW), Check(2, 0)),)),
    Rule(
        Action.MEDIATE,
        "names a path: the broker resolves it against the scopes of this call",
        tuple(
            """open openat creat stat lstat newfstatat access faccessat readlink readlinkat statfs
            truncate unlink unlinkat rmdir mkdir mkdirat rename renameat renameat2""".split()
        ),
    ),
    Rule(Action.MEDIATE, "names an address: the broker connects the worker's own socket", ("connect",)),
    Rule(
        Action.ABSENT,
        "the C library falls back to a form that can be checked",
        (
            *("clone3", "statx", "openat2", "faccessat2", "fchmodat2"),
            *("io_uring_setup", "io_uring_enter", "io_uring_register"),
        ),
    ),
    Rule(
        Action.KILL,
        "reaches into other processes, the kernel or the namespaces",
        tuple(
            """ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd bpf userfaultfd perf_event_open
            keyctl add_key request_key mount umount2 pivot_root chroot setns unshare kexec_load init_module finit_module
            delete_module open_by_handle_at name_to_handle_at seccomp iopl ioperm modify_ldt personality""".split()
        ),
    ),
)
