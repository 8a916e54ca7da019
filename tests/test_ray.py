"""Two replicas on a local cluster, one killed under load."""

from __future__ import annotations

import pytest
from postgresql import postgresql

from benchmarks.serving.replicas import CLIENTS, EACH, replicas


@pytest.mark.slow
def test_a_killed_replica_loses_no_request_and_none_is_drawn_twice() -> None:
    pytest.importorskip("ray")
    with postgresql() as url:
        found = replicas(url, "emoji-diffusion", 0)
    assert found["killed"] and found["statuses"] == {"200": CLIENTS * EACH}
    assert found["answered_once"] == found["recorded"] == found["answered_and_recorded"] == CLIENTS * EACH
    assert found["problems"] == []
