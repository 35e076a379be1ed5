"""What a context is reckoned to take is what it takes; and what is made of that."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentd.engine.link import Footprint
from agentd.models import locate

CHILD = """
import json, sys
from pathlib import Path
import os
from agentd.engine.meter import anonymous_mib
from agentd.engine.footprint import footprint
from agentd.engine.model import Model, Row, Shape
from agentd.engine.pace import Pacer
path, said = Path(sys.argv[1]), {}
def fit(model, context):
    reckoned = footprint(path, model.parameters_of_context, context, 1024)
    said.update(mib=reckoned.mib, middle=reckoned.of(65536), before=anonymous_mib(os.getpid()))
    return int(sys.argv[2])
model = Model(
    path, Shape(131072, 128), threads=1, repack=False, should_stop=lambda: False, pacer=Pacer(lambda: False), fit=fit
)
for start in range(0, 2048, 128):
    model.decode([Row(5, 0, start + i) for i in range(128)])
print(json.dumps({**said, "after": anonymous_mib(os.getpid()), "context": model.shape.context}))
"""


@pytest.mark.parametrize(("context", "name"), [(131072, "mib"), (65536, "middle")])
def test_what_is_reckoned_is_what_it_takes(context: int, name: str):
    """Allocated by the real library; its pages are touched as far as they are used, so it may be less."""
    command = [sys.executable, "-c", CHILD, str(locate("pocket")), str(context)]
    said = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout.splitlines()[-1])
    taken = said["after"] - said["before"]
    assert said["context"] == context
    assert taken <= said[name] * 1.1 + 8
    assert taken >= said[name] * 0.3


@given(st.integers(256, 262144), st.integers(256, 4096), st.floats(0, 5000), st.floats(0, 500), st.floats(0, 6000))
def test_the_largest_context_that_fits(context: int, least: int, more: float, base: float, room: float):
    """It fits, it is no larger than asked and no smaller than the least; if none fits, the least does not."""
    least = min(least, context)
    known = Footprint(context=context, mib=base + more, least=least, least_mib=base if context > least else base + more)
    found = known.largest(room)
    if found:
        assert least <= found <= context
        assert known.of(found) <= room
    else:
        assert known.of(least) > room
