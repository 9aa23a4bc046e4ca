"""The schedule of the learning rate."""

import numpy as np
import pytest
import torch

from align.optimizers import warmup_cosine


def test_the_schedule_rises_falls_and_follows_a_longer_run_after_a_resume() -> None:
    def rates(steps: int, total: int, state: dict[str, object] | None = None) -> tuple[list[float], dict[str, object]]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = warmup_cosine(optimizer, total, warmup=10)
        if state is not None:
            schedule.load_state_dict(state)
        found = []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found, schedule.state_dict()

    whole, _ = rates(400, 400)
    assert whole[0] == pytest.approx(0.02) and max(whole) == whole[10] == pytest.approx(1.0)
    assert whole[205] == pytest.approx(0.51) and whole == [*sorted(whole[:11]), *sorted(whole[11:], reverse=True)]
    _, state = rates(200, 200)
    longer, _ = rates(200, 400, state)
    np.testing.assert_allclose(longer[1:], whole[201:], rtol=1e-12)
