"""The frozen filters do what the table says, for every call number and architecture."""

from __future__ import annotations

import errno
import json
import os

import pytest
from agentd_sandbox.filters import PROFILES
from agentd_sandbox.forms import FORMS
from agentd_sandbox.policy import TABLE, Action, Check, Rule
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sandbox.bpf import evaluate

ALLOW, NOTIFY, KILL = 0x7FFF0000, 0x7FC00000, 0x80000000
EPERM, ENOSYS = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
EACCES = 0x50000 | errno.EACCES
RESULT = {Action.ALLOW: ALLOW, Action.MEDIATE: NOTIFY, Action.ABSENT: ENOSYS, Action.REFUSE: EPERM, Action.KILL: KILL}
X86_64, AARCH64, I386, ARM = 0xC000003E, 0xC00000B7, 0x40000003, 0x40000028
AUDIT = {"x86_64": X86_64, "aarch64": AARCH64, "arm": ARM}
BAD = (0xFFFFFFFF,) * 6

seccomp = pytest.importorskip("pyseccomp", reason="libseccomp names the calls: apt-get install libseccomp2")


def numbers(architecture: str) -> dict[str, int]:
    arch = getattr(seccomp.Arch, architecture.upper())
    found = {call: seccomp.resolve_syscall(arch, call) for rule in TABLE for call in rule.calls}
    return {call: number for call, number in found.items() if number >= 0}


@pytest.fixture(params=sorted(AUDIT))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def bpf(architecture: str) -> bytes:
    return (PROFILES / f"{architecture}.bpf").read_bytes()


ALL_NUMBERS = (*range(1200), *range(0xF0000, 0xF0010))  # the second range: calls of 32-bit arm's own


def fits(check: Check, arguments: tuple[int, ...]) -> bool:
    return ((arguments[check.argument] & check.mask) == check.value) != check.differs


def rule_for(call: str | None, arguments: tuple[int, ...]) -> Rule | None:
    """What the table says, read by itself: the rules that name the call, and what they ask of its arguments."""
    for rule in (rule for rule in TABLE if call in rule.calls):
        if not rule.checks or any(all(fits(check, arguments) for check in checks) for checks in rule.checks):
            return rule
    return None


def said(call: str | None, arguments: tuple[int, ...]) -> int:
    rule = rule_for(call, arguments)
    return RESULT[rule.action] if rule else EPERM


# Values that rules name, one beside each, and their like with noise in the upper half.
NAMED = sorted({check.value for rule in TABLE for checks in rule.checks for check in checks})
REGISTER = st.builds(
    lambda value, beside, upper: (value + beside) & 0xFFFF_FFFF | upper << 32,
    st.sampled_from(NAMED),
    st.integers(-1, 1),
    st.sampled_from((0, 1, 0xFFFF_FFFF)),
)


@pytest.mark.parametrize("arguments", [BAD, (0,) * 6, (17,) * 6])
def test_every_number_gets_what_the_table_says(architecture: str, bpf: bytes, arguments: tuple[int, ...]):
    """Named calls get their action, all others EPERM."""
    by_number = {number: call for call, number in numbers(architecture).items()}
    for number in ALL_NUMBERS:
        got = evaluate(bpf, number, AUDIT[architecture], arguments)
        assert got == said(by_number.get(number), arguments), (architecture, number, by_number.get(number))


@given(st.sampled_from(sorted({call for rule in TABLE if rule.checks for call in rule.calls})), st.tuples(*[REGISTER] * 6))
@settings(max_examples=2000, deadline=None)
def test_arguments_that_come_near_a_rule_get_what_the_table_says(call: str, arguments: tuple[int, ...]):
    """On every architecture that has the call; 32-bit registers hold no more."""
    for architecture, audit in AUDIT.items():
        number = numbers(architecture).get(call)
        held = tuple(argument & 0xFFFF_FFFF for argument in arguments) if architecture == "arm" else arguments
        if number is not None:
            frozen = (PROFILES / f"{architecture}.bpf").read_bytes()
            assert evaluate(frozen, number, audit, held) == said(call, held), (architecture, call)


def test_without_a_broker_what_is_mediated_is_refused_and_nothing_else_differs(architecture: str, bpf: bytes):
    """Kernels that can't hand a call over get the same table, with nobody to ask. Some calls are not worth asking then."""
    by_number = {number: call for call, number in numbers(architecture).items()}
    alone = (PROFILES / f"{architecture}.alone.bpf").read_bytes()
    for arguments in (BAD, (0,) * 6):
        for number in ALL_NUMBERS:
            told = evaluate(bpf, number, AUDIT[architecture], arguments)
            rule = rule_for(by_number.get(number), arguments)
            refused = ALLOW if rule and rule.free_alone else EACCES
            assert evaluate(alone, number, AUDIT[architecture], arguments) == (refused if told == NOTIFY else told)


def test_every_mediated_call_has_a_form_and_every_form_a_call():
    """A call that the filter hands over and nobody knows would wait for ever."""
    mediated = {call for rule in TABLE if rule.action is Action.MEDIATE for call in rule.calls}
    assert mediated == set(FORMS)


def test_no_call_stands_in_two_rules_unless_its_arguments_tell_them_apart():
    """Each call has one action and one reason; clone(2) makes threads or processes, by its flags."""
    calls = [call for rule in TABLE for call in rule.calls if not rule.checks]
    checked = [call for rule in TABLE for call in rule.calls if rule.checks]
    assert len(calls) == len(set(calls))
    assert not set(calls) & set(checked)
    assert {call for call in checked if checked.count(call) > 1} == {
        *("clone", "rt_sigaction", "fcntl", "fcntl64", "flock", "mmap", "mmap2")
    }
    assert all(rule.reason for rule in TABLE)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (17, NOTIFY),  # fork: SIGCHLD alone
        (0x1200011, NOTIFY),  # fork as glibc does it
        (0x4111, NOTIFY),  # vfork and posix_spawn
        (0x111, EPERM),  # memory shared with a parent that does not wait
        (0x8011, EPERM),  # CLONE_PARENT: the zygote's child
        (0x611, EPERM),  # shared descriptors and folder
        (0x10000011, EPERM),  # CLONE_NEWUSER
        (0x20011, EPERM),  # CLONE_NEWNS
        (0x40000011, EPERM),  # CLONE_NEWNET
        (0x2011, EPERM),  # CLONE_PTRACE
        (0x3D0F00, NOTIFY),  # pthread_create
        (0x3D0F00 | 0x10000000, EPERM),
    ],
)
def test_new_processes_and_threads_are_counted_and_namespaces_refused(architecture: str, bpf: bytes, flags: int, expected: int):
    """By the flags of clone(2), whatever stands in the upper half of the register."""
    number = numbers(architecture)["clone"]
    alone = (PROFILES / f"{architecture}.alone.bpf").read_bytes()
    without_broker = {NOTIFY: ALLOW if flags & 0x10000 else EACCES}
    for upper in (0, 0xFFFFFFFF << 32):
        arguments = (upper | flags, 0, 0, 0, 0, 0)
        assert evaluate(bpf, number, AUDIT[architecture], arguments) == expected
        assert evaluate(alone, number, AUDIT[architecture], arguments) == without_broker.get(expected, expected)


def test_what_was_opened_to_be_appended_to_is_not_changed_otherwise_behind_the_brokers_back(architecture: str, bpf: bytes):
    """ftruncate(2), F_SETFL that takes O_APPEND away (on 32-bit arm fcntl64), RWF_NOAPPEND."""
    known = numbers(architecture)
    for call in {"ftruncate", "ftruncate64"} & set(known):
        assert evaluate(bpf, known[call], AUDIT[architecture], (3, 0, 0, 0, 0, 0)) == NOTIFY
    for call in {"fcntl", "fcntl64"} & set(known):
        for flags, expected in ((0, NOTIFY), (0o4000, NOTIFY), (os.O_APPEND, ALLOW), (os.O_APPEND | 0o4000, ALLOW)):
            assert evaluate(bpf, known[call], AUDIT[architecture], (3, 4, flags, 0, 0, 0)) == expected
    for flags, expected in ((0, ALLOW), (0x10, ALLOW), (0x20, EPERM), (0x30, EPERM)):
        assert evaluate(bpf, known["pwritev2"], AUDIT[architecture], (3, 0, 1, 0, 0, flags)) == expected


@pytest.mark.parametrize("foreign", [I386, ARM, X86_64, AARCH64, 0])
def test_calls_of_another_architecture_are_fatal(architecture: str, bpf: bytes, foreign: int):
    """int 0x80 and compat calls have other numbers: nothing of them is let through."""
    if foreign != AUDIT[architecture]:
        for number in range(0, 700, 7):
            assert evaluate(bpf, number, foreign) == KILL


def test_x32_calls_are_fatal():
    """The x32 bit would name the same calls by other numbers."""
    bpf = (PROFILES / "x86_64.bpf").read_bytes()
    for number in range(600):
        assert evaluate(bpf, 0x40000000 | number, X86_64) == KILL


@pytest.mark.parametrize(
    ("call", "good", "bad"),
    [
        ("setsockopt", (3, 6, 1, 0, 0, 0), (3, 6, 2, 0, 0, 0)),  # TCP_NODELAY; TCP_MAXSEG
        ("setsockopt", (3, 1, 9, 0, 0, 0), (3, 1, 36, 0, 0, 0)),  # SO_KEEPALIVE; SO_MARK
        ("socket", (2, 1, 0, 0, 0, 0), (2, 2, 0, 0, 0, 0)),  # TCP; UDP
        ("socket", (10, 1 | 0o2000000, 6, 0, 0, 0), (1, 1, 0, 0, 0, 0)),  # TCP over IPv6, close-on-exec; AF_UNIX
        ("socket", (2, 1, 6, 0, 0, 0), (2, 1, 262, 0, 0, 0)),  # TCP; MPTCP
        ("socket", (2, 1, 0, 0, 0, 0), (16, 3, 0, 0, 0, 0)),  # TCP; netlink
        ("sendto", (3, 1, 1, 0x20000000, 0, 0), (3, 1, 1, 0x20000000, 1, 16)),  # no address; MSG_FASTOPEN with one
        ("sendto", (3, 1, 1, 0, 0, 0), (3, 1, 1, 0, 1 << 32, 16)),  # the upper half of a pointer counts
        ("fcntl", (3, 3, 0, 0, 0, 0), (3, 8, 0, 0, 0, 0)),  # F_GETFL; F_SETOWN
        ("ioctl", (0, 0x5401, 0, 0, 0, 0), (0, 0x5412, 0, 0, 0, 0)),  # TCGETS; TIOCSTI
        ("prctl", (15, 0, 0, 0, 0, 0), (22, 2, 0, 0, 0, 0)),  # PR_SET_NAME; PR_SET_SECCOMP
        ("prlimit64", (0, 7, 0, 1, 0, 0), (0, 7, 1, 0, 0, 0)),  # reading; setting
        ("prlimit64", (0, 7, 0, 1, 0, 0), (99, 7, 0, 1, 0, 0)),  # own; another's
    ],
)
def test_arguments_are_compared_by_value(architecture: str, bpf: bytes, call: str, good: tuple[int, ...], bad: tuple[int, ...]):
    """What the table allows for some arguments is refused for others."""
    if architecture == "arm" and max(bad) >> 32:
        pytest.skip("its registers have 32 bits")
    number = numbers(architecture)[call]
    assert evaluate(bpf, number, AUDIT[architecture], good) == ALLOW
    assert evaluate(bpf, number, AUDIT[architecture], bad) == EPERM


def test_the_frozen_numbers_are_those_of_libseccomp(architecture: str):
    """The broker and the filter speak of the same calls."""
    frozen = json.loads((PROFILES / f"{architecture}.json").read_text())["numbers"]
    wanted = numbers(architecture)
    assert {call: number for call, number in frozen.items() if call in wanted} == {
        call: wanted[call] for call in frozen if call in wanted
    }
