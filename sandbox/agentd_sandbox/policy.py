"""The system calls of a worker, as one table. Whatever it does not name is refused with EPERM.

Compiled by `compile.py` for every architecture and checked in under `profiles/`; the running code only
loads the result. Reasons follow seccomp(2), seccomp_unotify(2) and the manual page of each call. Names that an
architecture does not have (open on aarch64, stat64 on x86_64) are left out there.
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
    REFUSE = "refuse"
    """EPERM, as for whatever the table does not name: ordinary programs ask for it and live without."""
    KILL = "kill"
    """Only an attack asks for it: the worker dies and the call is an incident."""


@dataclass(frozen=True, slots=True)
class Check:
    """`(argument & mask) == value`, compared by value, never behind a pointer. With `differs`, the opposite of it."""

    argument: int
    value: int
    mask: int = 0xFFFF_FFFF_FFFF_FFFF
    differs: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One group of calls. With `checks`, any one tuple of them must hold in full, else the call is refused."""

    action: Action
    reason: str
    calls: tuple[str, ...]
    checks: tuple[tuple[Check, ...], ...] = ()
    free_alone: bool = False
    """Of what is mediated: allowed where there is no broker, instead of refused."""


_LOW = 0xFFFF_FFFF  # int arguments: the upper half of the register is noise
_NEW_NAMESPACES = 0x7E02_0080  # every CLONE_NEW* flag of clone(2)
_THREAD = 0x0001_0000
_SIGCHLD = 17  # on all three: signal(7)
_VM, _VFORK = 0x100, 0x4000
_F_SETFL, _APPEND = 4, 0x400
_SHARED, _PRIVATE, _SHARED_VALIDATE, _MAPPED, _ANONYMOUS = 1, 2, 3, 0xF, 0x20  # mmap(2)
# What a new process may be given beside its exit signal: settid and cleartid addresses, TLS, a pidfd. Not: a share of
# memory (but for vfork, whose parent waits), of descriptors or of the working folder; another parent; a namespace.
_PROCESS = _LOW & ~(0xFF | 0x0100_0000 | 0x0020_0000 | 0x0010_0000 | 0x0008_0000 | 0x1000)


def _any_of(argument: int, values: tuple[int, ...]) -> tuple[tuple[Check, ...], ...]:
    return tuple((Check(argument, value, _LOW),) for value in values)


def _stream(family: int) -> tuple[tuple[Check, ...], ...]:
    # SOCK_STREAM beneath the SOCK_CLOEXEC/SOCK_NONBLOCK bits; protocol 0 or TCP, so that MPTCP stays out.
    return tuple((Check(0, family, _LOW), Check(1, 1, 0xF), Check(2, protocol, _LOW)) for protocol in (0, 6))


def _options(level: int, names: tuple[int, ...]) -> tuple[tuple[Check, ...], ...]:
    return tuple((Check(1, level, _LOW), Check(2, name, _LOW)) for name in names)


TABLE: tuple[Rule, ...] = (
    Rule(
        Action.ALLOW,
        "input and output on descriptors the broker handed out",
        tuple(
            """read write readv writev pread64 pwrite64 preadv pwritev preadv2 lseek _llseek close close_range fstat
            fstat64 fstatfs fstatfs64 getdents getdents64 fsync fdatasync sync_file_range arm_sync_file_range fadvise64
            arm_fadvise64_64 sendfile sendfile64 splice tee copy_file_range dup dup2 dup3 pipe
            pipe2 eventfd eventfd2 poll ppoll ppoll_time64 select _newselect pselect6 pselect6_time64
            epoll_ctl epoll_wait epoll_pwait epoll_pwait2""".split()
        ),
    ),
    Rule(
        Action.ALLOW,
        "not with RWF_NOAPPEND (Linux 6.9), which writes elsewhere into what was opened to be appended to",
        ("pwritev2",),
        ((Check(5, 0, 0x20),),),
    ),
    Rule(
        Action.MEDIATE,
        "what was opened to be appended to is recorded in full before it may be changed otherwise; then let through",
        ("ftruncate", "ftruncate64"),
        free_alone=True,
    ),
    Rule(
        Action.MEDIATE,
        "F_SETFL without O_APPEND, in the same way",
        ("fcntl", "fcntl64"),
        ((Check(1, _F_SETFL, _LOW), Check(2, 0, _APPEND)),),
        free_alone=True,
    ),
    Rule(
        Action.ALLOW, "F_SETFL with O_APPEND", ("fcntl", "fcntl64"), ((Check(1, _F_SETFL, _LOW), Check(2, _APPEND, _APPEND)),)
    ),
    Rule(
        Action.MEDIATE,
        "to make a file longer: counted, and let through by value; other modes take room that RLIMIT_FSIZE does not count",
        ("fallocate",),
        ((Check(1, 0, _LOW),),),
        free_alone=True,
    ),
    Rule(
        Action.MEDIATE,
        "counted: what they watch counts against all that the user runs",
        ("epoll_create", "epoll_create1"),
        free_alone=True,
    ),
    Rule(Action.ALLOW, "a lock that others may have, too, and to give one up", ("flock",), _any_of(1, (1, 5, 8, 12))),
    Rule(
        Action.MEDIATE,
        "a lock that keeps others out: the broker takes it, of what may be written to",
        ("flock",),
        _any_of(1, (2, 6)),
    ),
    Rule(
        Action.ALLOW,
        "own memory, all of which RLIMIT_AS counts",
        tuple("munmap mremap brk mprotect madvise mincore msync mlock munlock membarrier cacheflush".split()),
    ),
    Rule(
        Action.ALLOW,
        "private memory, and memory of no file",
        ("mmap", "mmap2"),
        ((Check(3, _PRIVATE, _MAPPED),), (Check(3, _ANONYMOUS, _ANONYMOUS),)),
    ),
    Rule(
        Action.MEDIATE,
        "a file that is written to by memory: not once a device is open, which may only be read and written; let through",
        ("mmap", "mmap2"),
        ((Check(3, _SHARED, _MAPPED | _ANONYMOUS),), (Check(3, _SHARED_VALIDATE, _MAPPED | _ANONYMOUS),)),
    ),
    Rule(
        Action.ALLOW,
        "own threads, signals to be received, time, waiting for children",
        tuple(
            """rt_sigprocmask rt_sigreturn sigreturn rt_sigpending rt_sigtimedwait rt_sigtimedwait_time64
            rt_sigsuspend sigaltstack restart_syscall futex futex_time64 futex_waitv set_robust_list rseq
            set_tid_address set_tls sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max
            sched_get_priority_min getcpu arch_prctl nanosleep clock_nanosleep clock_nanosleep_time64 clock_gettime
            clock_gettime64 clock_getres clock_getres_time64 gettimeofday time times getitimer setitimer alarm pause
            timer_create timer_settime timer_settime64 timer_gettime timer_gettime64 timer_getoverrun timer_delete
            timerfd_create timerfd_settime timerfd_settime64 timerfd_gettime timerfd_gettime64 wait4 waitid exit
            exit_group""".split()
        ),
    ),
    Rule(Action.ALLOW, "what its own signals do", ("rt_sigaction",), ((Check(0, _SIGCHLD, differs=True),),)),
    Rule(
        Action.MEDIATE,
        "SIGCHLD: its handler is made to restart what it interrupts, as a fork or an open that waits for the broker",
        ("rt_sigaction",),
        ((Check(0, _SIGCHLD),),),
        free_alone=True,
    ),
    Rule(
        Action.ALLOW,
        "who and where it is; harmless to know",
        tuple(
            """getpid getppid gettid getuid getuid32 geteuid geteuid32 getgid getgid32 getegid getegid32 getresuid
            getresuid32 getresgid getresgid32 getgroups getgroups32 getpgrp getpgid getsid getpriority getrusage getrlimit
            ugetrlimit getcwd uname sysinfo umask getrandom""".split()
        ),
    ),
    Rule(Action.ALLOW, "process groups within its own session, as timeout(1) makes them", ("setpgid",)),
    Rule(Action.ALLOW, "to a folder that the broker opened; relative paths are resolved anew at every use", ("fchdir",)),
    Rule(
        Action.ALLOW,
        "a connected socket",
        ("recvfrom", "recvmsg", "recv", "send", "getsockopt", "getsockname", "getpeername", "shutdown"),
    ),
    Rule(
        Action.ALLOW,
        "send without an address: MSG_FASTOPEN would connect past connect(2)",
        ("sendto",),
        ((Check(4, 0),),),
    ),
    Rule(Action.ALLOW, "TCP only: no datagrams, so no name look-ups", ("socket",), _stream(2) + _stream(10)),
    Rule(
        Action.MEDIATE,
        "a pipe in both directions, to nobody else: counted, as its buffers are in nobody's account",
        ("socketpair",),
        ((Check(0, 1, _LOW),),),
        free_alone=True,
    ),
    Rule(
        Action.ALLOW,
        "SO_REUSEADDR SO_ERROR SO_KEEPALIVE SO_LINGER SO_RCVTIMEO SO_SNDTIMEO, and of TCP: NODELAY CORK "
        "KEEPIDLE KEEPINTVL KEEPCNT USER_TIMEOUT, IPV6_V6ONLY: nothing that connects, binds, marks or makes buffers larger",
        ("setsockopt",),
        _options(1, (2, 4, 9, 13, 20, 21, 66, 67)) + _options(6, (1, 3, 4, 5, 6, 18)) + _options(41, (26,)),
    ),
    Rule(
        Action.MEDIATE,
        "threads of its own: counted; no namespace",
        ("clone",),
        ((Check(0, _THREAD, _NEW_NAMESPACES | _THREAD),),),
        free_alone=True,
    ),
    Rule(
        Action.MEDIATE,
        "a process of its own: counted, and let through by value",
        ("clone",),
        ((Check(0, 0, _PROCESS),), (Check(0, _VM | _VFORK, _PROCESS),), (Check(0, _VFORK, _PROCESS),)),
    ),
    Rule(Action.MEDIATE, "a process of its own: counted", ("fork", "vfork")),
    Rule(
        Action.ALLOW,
        "own descriptors: no signal owner, no leases, no notification",
        ("fcntl", "fcntl64"),
        _any_of(1, (0, 1, 2, 3, 5, 6, 7, 12, 13, 14, 36, 37, 38, 1030, 1031, 1032, 1034)),
    ),
    Rule(
        Action.ALLOW,
        "FIONREAD FIOCLEX FIONCLEX FIONBIO TCGETS TIOCGWINSZ TIOCGPGRP: terminal injection and reflinks stay out",
        ("ioctl",),
        _any_of(1, (0x541B, 0x5451, 0x5450, 0x5421, 0x5401, 0x5413, 0x540F)),
    ),
    Rule(
        Action.ALLOW,
        "PR_SET_PDEATHSIG PR_SET_NAME PR_GET_NAME PR_GET_DUMPABLE PR_CAPBSET_READ PR_SET_NO_NEW_PRIVS PR_GET_NO_NEW_PRIVS "
        "PR_SET_VMA",
        ("prctl",),
        _any_of(0, (1, 15, 16, 3, 23, 38, 39, 0x53564D41)),
    ),
    Rule(Action.ALLOW, "reading its own limits", ("prlimit64",), ((Check(0, 0, _LOW), Check(2, 0)),)),
    Rule(
        Action.MEDIATE,
        "names a path: the broker resolves it against the scopes of this call",
        tuple(
            """open openat creat stat stat64 lstat lstat64 newfstatat fstatat64 access faccessat readlink readlinkat statfs
            statfs64 truncate truncate64 unlink unlinkat rmdir mkdir mkdirat rename renameat renameat2 link linkat symlink
            symlinkat chmod fchmodat chown chown32 lchown lchown32 fchownat utime utimes futimesat utimensat
            utimensat_time64 setxattr lsetxattr getxattr lgetxattr listxattr llistxattr removexattr lremovexattr""".split()
        ),
    ),
    Rule(
        Action.MEDIATE,
        "changes what a file is called or known by: recorded like a change of its content",
        ("fchmod", "fchown", "fchown32", "fsetxattr", "fgetxattr", "flistxattr", "fremovexattr"),
    ),
    Rule(Action.MEDIATE, "names an address: the broker connects in the worker's place", ("connect",)),
    Rule(Action.MEDIATE, "let through once the broker has seen that nobody can change the path meanwhile", ("chdir", "execve")),
    Rule(Action.MEDIATE, "to processes of its own session only, by value", ("kill", "tkill", "tgkill")),
    Rule(
        Action.ABSENT,
        "the C library falls back to a form that can be checked",
        (
            *("clone3", "statx", "openat2", "faccessat2", "fchmodat2"),
            *("io_uring_setup", "io_uring_enter", "io_uring_register"),
        ),
    ),
    Rule(
        Action.REFUSE,
        "leaves the session by which the descendants of a call are found",
        ("setsid",),
    ),
    Rule(Action.REFUSE, "memory or code that no limit counts and no path names", ("memfd_create", "memfd_secret", "execveat")),
    Rule(Action.REFUSE, "passes descriptors or names an address behind a pointer", ("sendmsg", "sendmmsg", "recvmmsg")),
    Rule(Action.REFUSE, "listens", ("bind", "listen", "accept", "accept4")),
    Rule(Action.REFUSE, "signals by other ways", ("rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal", "pidfd_open")),
    Rule(Action.REFUSE, "gives away an address of another process", ("get_robust_list",)),
    Rule(
        Action.REFUSE,
        "ordinary programs ask out of habit",
        ("personality", "name_to_handle_at", "inotify_init", "inotify_init1"),
    ),
    Rule(
        Action.KILL,
        "reaches into other processes, the kernel or the namespaces",
        tuple(
            """ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd bpf userfaultfd perf_event_open
            keyctl add_key request_key mount umount2 pivot_root chroot setns move_mount open_tree fsopen fsmount
            fsconfig fspick mount_setattr unshare kexec_load init_module finit_module delete_module open_by_handle_at seccomp
            iopl ioperm modify_ldt landlock_create_ruleset landlock_add_rule landlock_restrict_self""".split()
        ),
    ),
)
