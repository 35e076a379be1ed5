"""The clock that expiry is held against: never back, whatever the wall clock does."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from agentd.grants import Clock

SECOND = 10**9


@dataclass
class Hands:
    """A wall clock that is put forward and back, and time that just passes."""

    wall: int = 1_000 * SECOND
    steady: int = 0
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(0, lambda: self.wall, lambda: self.steady)

    def passes(self, ns: int) -> None:
        self.wall += ns
        self.steady += ns


def test_it_follows_the_wall_clock():
    """Also when that is put forward, as it is when a board without a battery learns the time."""
    hands = Hands()
    assert hands.clock.now() == hands.wall
    hands.passes(5 * SECOND)
    assert hands.clock.now() == hands.wall
    hands.wall += 10**18
    assert hands.clock.now() == hands.wall


def test_what_has_expired_does_not_come_back():
    """The wall clock is set back a year: time goes on from where it was."""
    hands = Hands()
    hands.passes(100 * SECOND)
    before = hands.clock.now()
    hands.wall -= 365 * 86400 * SECOND
    hands.passes(7 * SECOND)
    assert hands.clock.now() == before + 7 * SECOND


def test_an_hour_lasts_an_hour_after_a_jump_that_was_a_mistake():
    """Forward ten years, a grant for an hour, and back: it ends after an hour."""
    hands = Hands()
    hands.wall += 10**18
    expire = hands.clock.now() + 3600 * SECOND
    hands.wall -= 10**18
    hands.passes(3599 * SECOND)
    assert hands.clock.now() < expire
    hands.passes(2 * SECOND)
    assert hands.clock.now() >= expire


def test_a_restart_in_the_past_goes_on_from_the_newest_record():
    """No battery, no network: the log knows that it was later."""
    clock = Clock(5_000 * SECOND, lambda: 10 * SECOND, lambda: 0)
    assert clock.now() == 5_000 * SECOND


@given(st.lists(st.tuples(st.integers(-(10**18), 10**18), st.integers(0, 10**12)), max_size=30))
def test_it_never_goes_back_and_never_stands_still(moves: list[tuple[int, int]]):
    """Whatever jumps the wall clock makes, at least the time that has passed has passed."""
    hands = Hands()
    last = hands.clock.now()
    for jump, passed in moves:
        hands.wall += jump
        hands.passes(passed)
        now = hands.clock.now()
        assert now >= last + passed
        last = now
