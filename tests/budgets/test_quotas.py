"""What a principal may use in an hour or a day."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from agentd.budgets import Quota, Quotas, QuotaSpent, Usage
from agentd.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HOUR = 3600
NOON = 500_000 * HOUR


class Clock:
    now = float(NOON)

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(tmp_path)
    yield opened
    opened.close()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.mark.parametrize(
    ("quota", "used"),
    [
        (Quota("*", "day", tokens=100), Usage(tokens=100)),
        (Quota("unix:*", "day", seconds=1.5), Usage(seconds=2)),
        (Quota("unix:pi", "hour", calls=1), Usage(calls=1)),
        (Quota("*", "hour", joules=10), Usage(joules=10.1)),
        (Quota("*", "day", tokens=0), Usage()),
    ],
)
def test_what_is_spent_is_refused_with_what_and_when(store: Store, clock: Clock, quota: Quota, used: Usage):
    quotas = Quotas([quota], store, clock)
    quotas.spend("unix:pi", used)
    with pytest.raises(QuotaSpent) as caught:
        (quotas.require if quota.calls is None else quotas.call)("unix:pi")
    assert caught.value.metadata["per"] == quota.per
    assert 0 < caught.value.retry_s <= quota.hours * HOUR


def test_spent_calls_forbid_calls_and_nothing_else(store: Store, clock: Clock):
    quotas = Quotas([Quota("*", "day", calls=0)], store, clock)
    quotas.require("unix:pi")
    with pytest.raises(QuotaSpent):
        quotas.call("unix:pi")


def test_one_principal_spends_nothing_of_anothers(store: Store, clock: Clock):
    """Nor does one that no quota is for."""
    quotas = Quotas([Quota("token:*", "day", tokens=10)], store, clock)
    quotas.spend("token:a", Usage(tokens=10))
    quotas.spend("unix:pi", Usage(tokens=10**9))
    quotas.require("token:b")
    quotas.require("unix:pi")
    assert (quotas.tokens_left("token:a"), quotas.tokens_left("token:b")) == (0, 10)
    assert quotas.tokens_left("unix:pi") == float("inf")


def test_an_hour_ends_and_a_day_is_the_last_24(store: Store, clock: Clock):
    quotas = Quotas([Quota("*", "hour", calls=2), Quota("*", "day", calls=3)], store, clock)
    quotas.call("p")
    quotas.call("p")
    with pytest.raises(QuotaSpent) as caught:
        quotas.call("p")
    clock.now += caught.value.retry_s
    quotas.call("p")
    with pytest.raises(QuotaSpent) as caught:
        quotas.call("p")
    assert caught.value.metadata["per"] == "day"
    clock.now += caught.value.retry_s
    quotas.call("p")


def test_a_restart_forgets_nothing(store: Store, clock: Clock):
    """But what is older than a day is forgotten for good."""
    made = Quotas([Quota("*", "day", tokens=10)], store, clock)
    made.spend("p", Usage(tokens=4, seconds=1.25))
    made.spend("p", Usage(tokens=3))
    store.write(lambda _db: None)
    again = Quotas(made.quotas, store, clock)
    again.load()
    assert again.tokens_left("p") == 3
    clock.now += 25 * HOUR
    again.spend("p", Usage(tokens=1))
    store.write(lambda _db: None)
    assert store.read(lambda db: db.execute("SELECT count(*) FROM used").get) == 1
    assert again.tokens_left("p") == 9
