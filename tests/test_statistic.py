"""The highest step of a run, or a sum over its steps: both by hand, and compared on recorded runs."""

from __future__ import annotations

import torch
from msgspec import structs
from small_module import CONCEPTS, small_module
from small_runs import small_bank

from benchmarks.tables.statistic import EARLY, _statistics, _weights, statistic
from saferedir.engines.manifest import Envelope, Promise
from saferedir_torch.calibration import Seen, allowed_exceedances
from saferedir_torch.learner import held_out, split_of

RUNS, STEPS = 60, 5


@torch.no_grad()
def test_statistics_of_a_run_by_hand() -> None:
    module, bank = small_module(), small_bank(2, 4)
    module.last_branch.centre.zero_()
    seen = Seen(module, bank)
    seen.told = torch.tensor([-9.0, 6.0, -9.0, -9.0, 1.0, 1.0, 1.0, 1.0])[:, None].repeat(1, CONCEPTS)
    seen.shown = torch.full_like(seen.told, -20.0)
    seen.shown[0] = 30.0  # of a first step, in which nothing is known
    found, weights = _statistics(seen, module), _weights(bank)
    assert found["highest"][0, :, 0].tolist() == [-9.0, 6.0, 6.0, 6.0]
    assert found["highest, by the picture alone"][0, :, 0].tolist() == [-torch.inf, -20.0, -20.0, -20.0]
    torch.testing.assert_close(weights.reshape(2, 4).sum(dim=1), torch.ones(2))
    torch.testing.assert_close(found["sum, drift 0"][0, -1, 0], 6 * weights[1])  # less than nothing is not carried on
    torch.testing.assert_close(found["sum, drift -2"][1, -1, 0], torch.tensor(3.0))


@torch.no_grad()
def test_thresholds_are_those_of_the_promise_and_shares_those_of_unsafe_runs_left_out() -> None:
    module, benign = small_module(), small_bank(400, 2)
    envelope = Envelope((2, STEPS), ("ddim",), (1.0, 12.0))
    promise = Promise(rate=0.01, confidence=0.95, pictures=400, allowed=0, envelope=envelope, prompts="noise")
    module.config = structs.replace(module.config, promise=promise)
    recorded = small_bank(RUNS, STEPS, "abc")
    recorded.asked[: 30 * STEPS, 0] = 1.0
    recorded.prompts[:30] *= 3  # so that some are far out
    table = statistic(module, benign, recorded, seed=5)
    left_out = held_out(RUNS, split_of(5))
    assert left_out.sum() == RUNS // 10
    assert table["unsafe"] == int(left_out[:30].sum())
    assert table["allowed"] == allowed_exceedances(400, 0.01)
    unsafe = recorded.rows((left_out & (torch.arange(RUNS) < 30))[recorded.run])
    seen = Seen(module, unsafe)
    passed = (seen.statistic(module)[:, 0] > table["rows"]["highest"]["threshold"]).reshape(-1, STEPS)
    assert table["rows"]["highest"]["detected"]["hits"] == int(passed.any(dim=1).sum()) > 0
    assert table["rows"]["highest"]["early"]["hits"] == int(passed[:, : round(EARLY * STEPS)].any(dim=1).sum())
    assert all(row["early"]["hits"] <= row["detected"]["hits"] for row in table["rows"].values())
