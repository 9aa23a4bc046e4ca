"""Two processes that score a rollout together: with a reward model of their own each, or by one server that both ask. All are told the scores of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from base_model.prompts.text import TextEncoder
from recipes.feedback import standardised
from reward.model import load_reward_model
from tests.forked import ranks_environment
from tests.recipes.served import served
from tests.recipes.small import save_small_reward_model

ASK = """
import json, sys
from pathlib import Path
import torch
from align.config import Config
from align.run import Run
from recipes.feedback import Assessor, standardised
from recipes.generate import safety_runner
from recipes.scorers import load_scorer
from reward.judges.exchange import Endpoint
from reward.judges.remote import RemoteReward
from reward.mixture import Mixture, Term

given = json.loads(sys.argv[1])
run = Run(Path(given["out"]), Config(), seed=0, resume=False, metrics={}, quiet=True)
video = torch.rand(4, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
prompts = [f"a clip {k}" for k in range(len(video))]
own = load_scorer(Path(given["model"]), fps=8.0)
remote = RemoteReward(Endpoint(given["url"]), fps=8.0)
one = standardised(own).terms[0]
found = {}
for name, scorer in (("resident", own), ("server", remote)):
    rows = run.share(range(len(video)))
    assess = Assessor(Mixture({"people": scorer}, (one,)), safety_runner(), 8.0)
    found[name] = assess(video[rows], [prompts[row] for row in rows], gather=run.gather).reward.tolist()
print("FOUND " + json.dumps({"rows": list(rows), **found}))
"""


def test_two_processes_hold_a_scorer_each_or_ask_one_server_and_know_the_scores_of_one(tmp_path: Path) -> None:
    model = save_small_reward_model(tmp_path / "model")
    video = torch.rand(4, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255
    with torch.no_grad():
        wanted = standardised(load_reward_model(model, TextEncoder()))(video, [f"a clip {k}" for k in range(4)]).reward
    with served("serve-reward", "--model", str(model), "--port", "0", "--fps", "8") as (_, url):
        given = json.dumps({"out": str(tmp_path / "run"), "model": str(model), "url": url})
        shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
        words = [sys.executable, "-c", ASK, given]
        started = [subprocess.Popen(words, env={**shared, **told}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for told in ranks_environment(2)]
        said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    told = [json.loads(out.split("FOUND ")[1]) for out, _ in said]
    assert [each["rows"] for each in told] == [[0, 1], [2, 3]]
    for each in told:
        assert each["resident"] == pytest.approx(wanted.tolist(), abs=1e-5) and each["server"] == pytest.approx(wanted.tolist(), abs=1e-5)
    assert float(wanted.std()) > 0
