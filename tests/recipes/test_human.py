"""People in place of the panel: the app opens on a run's takes, waits, and what they ranked is what the reward model learns from."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from sqlalchemy import insert

from align.config import load
from base_model.errors import Interrupted, UserError
from base_model.video.store import ClipStore, NewClip
from recipes import app, demo
from recipes.app import have_people_rank
from recipes.listening import address
from recipes.rankings import ruling_of
from recipes.shapes.prompts import make_prompts
from recipes.shapes.render import DEMO_CLIP, render, sample_scene
from reward.app import exporting, labeling, leading
from reward.app.people import first_invitation
from reward.app.schema import clip, prompt, task
from reward.app.store import Store, new_id
from reward.comparisons import Clip, load_comparisons
from tests.reward.app.test_labeling import answer_all, as_labeler

RULING = {"verdict": "allow", "policy": "P17", "score": 0.01, "reasons": [], "filter": "flash 3", "threshold": 0.5, "policy_version": "2"}
PROMPTS, TAKES = 6, 2
PASSWORD = "correct horse battery"
TOY = Path(demo.__file__).parent / "configs" / "tiny" / "toy.yaml"


@pytest.fixture(scope="module")
def takes(tmp_path_factory: pytest.TempPathFactory) -> ClipStore:
    """Six prompts with two takes each, which the filters allow."""
    import numpy as np

    rng = np.random.default_rng(0)
    allowed = {"verdict": "allow", "rulings": [RULING]}
    new = [
        NewClip(render(sample_scene(each, rng, clip=DEMO_CLIP), DEMO_CLIP), each.text, each.prompt_id, seed, {"steps": 1}, "test", 12.0, safety=allowed)
        for each in make_prompts(PROMPTS, seed=5, split="train")
        for seed in range(TAKES)
    ]
    store = ClipStore(tmp_path_factory.mktemp("run") / "candidates")
    store.add_many(new, preview=False)
    return store


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "LOOK_SECONDS", 0.01)
    monkeypatch.delenv(app.SECRET, raising=False)


@pytest.fixture
def rooms(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand-ins for the rooms of the app: clips come in with their rows, a task each prompt, and people rank one task whenever somebody looks."""
    said: list[dict[str, Any]] = []
    ready: list[dict[str, Any]] = []

    def import_run(store: Store, project_id: str, folder: Path, run: str, by: str) -> dict[str, Any]:
        rows = ClipStore(folder).rows()
        with store.writing() as db:
            if not db.execute(clip.select()).first():
                for text, prompt_id in {(row.prompt, row.prompt_id) for row in rows}:
                    db.execute(insert(prompt), {"project_id": project_id, "prompt_id": prompt_id, "text": text, "lang": "en", "kind": ""})
                for row in rows:
                    about = {"id": new_id("c"), "project_id": project_id, "clip_id": row.clip_id, "prompt_id": row.prompt_id, "run": run, "row": vars(Clip.of(row))}
                    db.execute(insert(clip), {**about, "verdict": "allow", "score": 0.0, "decision": ruling_of(row), "state": "live", "created_at": 0})
        return {"rows": len(rows)}

    def make_tasks(store: Store, db: Any, project_id: str, by: Any) -> int:
        assert by.pseudonym == "system"
        groups: dict[str, list[Any]] = {}
        for row in db.execute(clip.select()).all():
            groups.setdefault(row.prompt_id, []).append(row)
        if db.execute(task.select()).first():
            return 0
        for number, (prompt_id, group) in enumerate(sorted(groups.items())):
            about = {"id": f"t{number}", "project_id": project_id, "prompt_id": prompt_id, "clips": [row.id for row in group], "kind": "rank", "wanted": 1, "taken": 0}
            db.execute(insert(task), {**about, "answered": 0, "priority": 0.0, "shuffle": 0.5, "state": "open", "created_at": 0})
            ids, who = [row.clip_id for row in group], ("person-a", "person-b")[number % 2]
            ready.append({"event_id": f"{number}-{who}", "task_id": f"t{number}", "prompt_id": prompt_id, "annotator_id": who, "clip_ids": ids, "ranks": [1, 2]})
        ready.insert(0, {**ready[0], "event_id": "skipped", "ranks": [None, None], "skipped_reason": "undecidable"})
        ready.reverse()
        return len(groups)

    def events_of(store: Store, project_id: str) -> Iterator[dict[str, Any]]:
        if len(said) < 5:
            said.append(ready.pop())
        return iter([*said])

    made = {"leading": leading, "importing": SimpleNamespace(import_run=import_run), "labeling": SimpleNamespace(make_tasks=make_tasks)}
    monkeypatch.setattr(app, "room", made.__getitem__)
    monkeypatch.setattr(exporting, "labeling", lambda: SimpleNamespace(events_of=events_of))
    return said


def test_the_app_opens_on_the_takes_and_what_people_ranked_is_left_for_the_reward_model(
    takes: ClipStore, rooms: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rankings").mkdir()
    (tmp_path / "rankings" / "half").write_text("of an earlier try")
    told = have_people_rank(tmp_path / "app", takes.folder, tmp_path / "rankings", 4, name="demo", port=0)
    data = load_comparisons(tmp_path / "rankings")
    assert told == {"rankings": 4, "people": 2} and sum(not event.skipped_reason for event in data.events) == 4
    assert {event.event_id for event in data.events} <= {row["event_id"] for row in rooms} and not (tmp_path / "rankings" / "half").exists()
    assert {name for name in data.split.values()} == {"train"}, "a few rankings are all learned from"
    said = capsys.readouterr().err
    assert re.search(r"people rank 12 clips in the app: http://127\.0\.0\.1:\d+/join/[\w-]{32}\n", said)
    assert "2 of 4 rankings\n" in said and "4 of 4 rankings: thank you" in said


def test_interrupted_it_keeps_what_was_ranked_and_goes_on_with_the_same_store(
    takes: ClipStore, rooms: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(count: Any, wanted: int) -> None:
        count()
        raise Interrupted("terminated", 15)

    with monkeypatch.context() as patch:
        patch.setattr(app, "wait_for", stop)
        with pytest.raises(Interrupted):
            have_people_rank(tmp_path / "app", takes.folder, tmp_path / "rankings", 3, name="demo", port=0)
    assert not (tmp_path / "rankings").exists() and len(rooms) == 1
    assert have_people_rank(tmp_path / "app", takes.folder, tmp_path / "rankings", 3, name="demo", port=0)["rankings"] >= 3
    assert capsys.readouterr().err.count("/join/") == 2, "nobody had joined yet"


def test_more_rankings_than_there_are_tasks_for_are_refused_at_once(takes: ClipStore, rooms: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"7 rankings are more than the 6 "):
        have_people_rank(tmp_path / "app", takes.folder, tmp_path / "rankings", 7, name="demo", port=0)


def test_one_person_alone_is_given_as_many_tasks_as_rankings_are_waited_for(
    takes: ClipStore, rooms: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the app's own tasks and leases."""
    asked = app.room
    monkeypatch.setattr(app, "room", lambda name: labeling if name == "labeling" else asked(name))

    def rank_all(_count: Any, wanted: int) -> None:
        with app.opened(app.Config(out=tmp_path / "app")) as store:
            project_id, ann = app.project_called(store, "demo"), as_labeler(store, "ann", app.project_called(store, "demo"))
            assert len(answer_all(store, ann, project_id, lambda row: (1, 2))) >= wanted
        raise Interrupted("enough was seen", 15)

    monkeypatch.setattr(app, "wait_for", rank_all)
    with pytest.raises(Interrupted):
        have_people_rank(tmp_path / "app", takes.folder, tmp_path / "rankings", PROMPTS, name="demo", port=0)
    with pytest.raises(UserError, match=r"7 rankings are more than the 6 tasks"):
        have_people_rank(tmp_path / "app", takes.folder, tmp_path / "rankings", PROMPTS + 1, name="demo", port=0)


def test_the_demo_learns_from_peoples_rankings_and_its_report_says_so(takes: ClipStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = demo.Config(out=tmp_path, human=5, candidate_prompts=PROMPTS, seed=5)
    asked = make_prompts(PROMPTS, seed=5, split="train")
    monkeypatch.setattr(demo, "candidate_prompts", lambda cfg: asked)
    shutil.copytree(takes.folder, tmp_path / "candidates")
    given: list[Any] = []

    def people(folder: Path, clips: Path, target: Path, wanted: int, *, name: str, port: int) -> dict[str, int]:
        given.append((folder, clips, target, wanted))
        return {"rankings": 5, "people": 2}

    monkeypatch.setattr(app, "have_people_rank", people)
    result = demo.rank_candidates(cfg, tmp_path / "rankings")
    assert given == [(tmp_path / "app", tmp_path / "candidates", tmp_path / "rankings" / "reward", 5)]
    assert result["labelers"] == "people" and result["ranked_by"] == {"rankings": 5, "people": 2} and "reward_events" not in result
    assert load_comparisons(tmp_path / "rankings" / "guard").annotators, "the guard is still the simulated panel's"
    assert demo.whose_rankings(result) == "The reward model learnt from 5 rankings by 2 people; the guard learnt from simulated labelers."
    assert demo.whose_rankings({"labelers": "simulated"}) == "All rankings come from simulated labelers."


def test_a_folder_of_a_demo_without_people_is_the_same_as_before(tmp_path: Path) -> None:
    assert "human" not in demo.stages_of(demo.Config(out=tmp_path)).settings
    assert demo.stages_of(demo.Config(out=tmp_path, human=7, port=1)).settings["human"] == 7
    assert demo.stages_of(demo.Config(out=tmp_path, human=7, port=1)).settings == demo.stages_of(demo.Config(out=tmp_path, human=7, port=2)).settings


class Person:
    """Somebody at a browser: joins by a link or logs in, agrees, ranks."""

    def __init__(self, login: str) -> None:
        self.login, self.answers = login, 0
        self.client = httpx2.Client()

    def __enter__(self) -> Person:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def join(self, link: str) -> None:
        url, path = re.fullmatch(r"(http://[^/]+)(/join/.+)", link).groups()  # type: ignore[union-attr]
        self._begin(url, f"/api{path}", {"login": self.login, "name": self.login.title(), "password": PASSWORD})
        self.client.post(f"/api/projects/{self.project()}/label/consent", json={}).raise_for_status()

    def come_back(self, url: str) -> None:
        self._begin(url, "/api/login", {"login": self.login, "password": PASSWORD})

    def _begin(self, url: str, path: str, body: dict[str, str]) -> None:
        self.client.close()
        self.client = httpx2.Client(base_url=url, trust_env=False, timeout=30)
        self.client.post(path, json=body).raise_for_status()
        self.client.headers["x-csrf"] = re.search(r'data-csrf="([^"]+)"', self.client.get("/", headers={"accept": "text/html"}).text)[1]  # type: ignore[index]

    def project(self) -> str:
        (room,) = self.client.get("/api/").json()["projects"]
        return str(room["id"])

    def invite(self) -> str:
        """A link for another labeler."""
        answer = self.client.post(f"/api/projects/{self.project()}/lead/invitations", json={"roles": ["labeler"]})
        return str(answer.json()["link"])

    def rank(self, number: int) -> None:
        for _ in range(number):
            go = self.client.post(f"/api/projects/{self.project()}/label/next", json={}).json()["go"]
            places = len(self.client.get(f"/api{go}").json()["clips"])
            assert all(self.client.get(f"/media/{go.rpartition('/')[2]}/{place}", headers={"range": "bytes=0-"}).status_code == 206 for place in range(places))
            self.answers += 1
            about = {"id": f"answer-of-{self.login}-number-{self.answers}", "watched": [1.0] * places, "watch_ms": [2_000] * places, "lead_time_ms": 5_000}
            self.client.post(f"/api{go}/answer", json={**about, "ranks": {"overall": list(range(1, places + 1))}}).raise_for_status()


def report_of(folder: Path) -> tuple[dict[str, Any], str]:
    return json.loads((folder / "report" / "report.json").read_text()), (folder / "report" / "index.html").read_text()


QUICK = ("--pairs", "16", "--fit.iterations", "2", "--candidate-prompts", "5")
NOTHING = dict.fromkeys(("judge", "judge_gain", "judge_gain_ddpo", "flash_rate", "diversity"), "not measured")


def test_the_demo_waits_for_people_learns_from_what_they_ranked_and_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own takes, through the app, two people over HTTP, on to what the report is told. RL and its measuring, which know nothing of labelers, are in the long form below."""
    problems: list[str] = []
    serve, count, opened = app.in_background, app.ranked, threading.Event()
    url: list[str] = []

    def told_where(made: Any, listener: Any, stop_seconds: int) -> Any:
        here = address(*listener.getsockname())
        url.append(f"{here}/join/{first_invitation(made.state.store, ('lead', 'labeler', 'reviewer'))}")
        opened.set()
        return serve(made, listener, stop_seconds)

    def counted(store: Store, project_id: str) -> list[tuple[str, str]]:
        assert not problems, problems
        return count(store, project_id)

    def people() -> None:
        try:
            assert opened.wait(120)
            with Person("ada") as ada, Person("bob") as bob:
                ada.join(url[0])
                bob.join(ada.invite())
                ada.rank(2)
                bob.rank(2)
        except Exception as error:
            problems.append(repr(error))

    reported: list[dict[str, Any]] = []

    def report(evaluation: Any, told: Any) -> dict[str, Any]:
        assert evaluation.guard == tmp_path / "reward" / "guard"
        reported.append(told())
        return NOTHING | reported[0]

    monkeypatch.setattr(demo, "align_policy", lambda cfg, out: {})
    monkeypatch.setattr(demo.evaluate, "report", report)
    monkeypatch.setattr(app, "in_background", told_where)
    monkeypatch.setattr(app, "ranked", counted)
    thread = threading.Thread(target=people, daemon=True)
    thread.start()
    cfg = load(demo.Config, TOY, ["--out", str(tmp_path), "--human", "4", "--port", "0", *QUICK])
    demo.main(cfg)
    thread.join()
    (results,) = reported
    assert results["ranked_by"] == {"rankings": 4, "people": 2}
    assert results["notes"] == ["The reward model learnt from 4 rankings by 2 people; the guard learnt from simulated labelers."]
    data = load_comparisons(tmp_path / "rankings" / "reward")
    card = json.loads((tmp_path / "reward" / "reward" / "reward_card.json").read_text())
    assert card["annotators"] == sorted({event.annotator_id for event in data.events}) and all(name.startswith("person-") for name in card["annotators"])
    assert {clip_id for event in data.events for clip_id in event.clip_ids} <= {row.clip_id for row in ClipStore(tmp_path / "candidates").rows()}
    assert results["commands"] == [f"rushes demo{demo.command_line(cfg)}"] and "--human 4" in results["commands"][0]


@pytest.mark.slow
def test_the_demo_killed_while_it_waits_for_people_goes_on_with_what_they_ranked(tmp_path: Path) -> None:
    """As processes, with SIGKILL between the third and the fourth ranking."""
    words = [sys.executable, "-m", "recipes.cli", "demo", str(TOY), "--out", str(tmp_path / "out"), "--human", "6", "--port", "0"]
    with Person("ada") as ada, Person("bob") as bob:
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as first:
            ada.join(said_where(first))
            bob.join(ada.invite())
            ada.rank(2)
            bob.rank(1)
            first.kill()
        assert first.returncode == -signal.SIGKILL and not (tmp_path / "out" / "rankings" / "stage.json").exists()
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as second:
            where = said_where(second)
            ada.come_back(where)
            bob.come_back(where)
            ada.rank(2)
            bob.rank(1)
            _, said = second.communicate(timeout=300)
    assert second.returncode == 0, said
    results, page = report_of(tmp_path / "out")
    assert results["ranked_by"] == {"rankings": 6, "people": 2} and "The reward model learnt from 6 rankings by 2 people" in page
    data = load_comparisons(tmp_path / "out" / "rankings" / "reward")
    assert sorted(Counter(event.annotator_id for event in data.events).values()) == [2, 4]
    told = app.main(app.Config(action="verify-log", out=tmp_path / "out" / "app"))
    assert told["events"] > 6


def said_where(process: subprocess.Popen[str]) -> str:
    """The link, or the address, that a demo prints once the app is open; what it says before is read."""
    assert process.stderr is not None
    for line in process.stderr:
        found = re.search(r"clips in the app: (http://[^\s,]+)", line)
        if found:
            return found[1]
    raise AssertionError("the app was not opened")
