"""People in place of the panel: the app opens on a run's takes, waits, and what they ranked is what the reward model learns from."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from sqlalchemy import insert

from base_model.errors import Interrupted, UserError
from base_model.video.store import ClipStore, NewClip
from recipes import app, demo
from recipes.app import have_people_rank
from recipes.listening import address
from recipes.rankings import ruling_of
from recipes.shapes.prompts import make_prompts
from recipes.shapes.render import DEMO_CLIP, render, sample_scene
from reward.app import exporting
from reward.app.people import first_invitation
from reward.app.schema import clip, project, prompt, task
from reward.app.store import Store, new_id
from reward.comparisons import Clip, load_comparisons

RULING = {"verdict": "allow", "policy": "P17", "score": 0.01, "reasons": [], "filter": "flash 3", "threshold": 0.5, "policy_version": "2"}
TAKES = 2


@pytest.fixture(scope="module")
def takes(tmp_path_factory: pytest.TempPathFactory) -> ClipStore:
    """Three prompts with two takes each, which the filters allow."""
    import numpy as np

    rng = np.random.default_rng(0)
    allowed = {"verdict": "allow", "rulings": [RULING]}
    new = [
        NewClip(render(sample_scene(each, rng, clip=DEMO_CLIP), DEMO_CLIP), each.text, each.prompt_id, seed, {"steps": 1}, "test", 12.0, safety=allowed)
        for each in make_prompts(3, seed=5, split="train")
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

    def make_project(store: Store, name: str, by: str) -> str:
        with store.writing() as db:
            db.execute(insert(project), {"id": (made := new_id("j")), "name": name, "state": "open", "settings": {}, "created_at": 0})
        return made

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
            about = {"id": f"t{number}", "project_id": project_id, "prompt_id": prompt_id, "clips": [row.id for row in group], "kind": "rank", "wanted": 2, "taken": 0}
            db.execute(insert(task), {**about, "answered": 0, "priority": 0.0, "shuffle": 0.5, "state": "open", "created_at": 0})
            ids = [row.clip_id for row in group]
            for who in ("person-a", "person-b"):
                ready.append({"event_id": f"{number}-{who}", "task_id": f"t{number}", "prompt_id": prompt_id, "annotator_id": who, "clip_ids": ids, "ranks": [1, 2]})
        ready.insert(0, {**ready[0], "event_id": "skipped", "ranks": [None, None], "skipped_reason": "undecidable"})
        ready.reverse()
        return len(groups)

    def events_of(store: Store, project_id: str) -> Iterator[dict[str, Any]]:
        if len(said) < 5:
            said.append(ready.pop())
        return iter([*said])

    made = {"leading": SimpleNamespace(make_project=make_project), "importing": SimpleNamespace(import_run=import_run), "labeling": SimpleNamespace(make_tasks=make_tasks)}
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
    assert re.search(r"people rank 6 clips in the app: http://127\.0\.0\.1:\d+/join/[\w-]{32}\n", said)
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


def test_the_demo_learns_from_peoples_rankings_and_its_report_says_so(takes: ClipStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = demo.Config(out=tmp_path, human=5, candidate_prompts=3, seed=5)
    asked = make_prompts(3, seed=5, split="train")
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


def test_people_rank_in_the_real_app(takes: ClipStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP, as their browsers do: join by the link, agree, rank until nothing is asked any more."""
    for room in ("labeling", "importing", "leading", "worker"):
        pytest.importorskip(f"reward.app.{room}")
    problems: list[str] = []
    links: list[str] = []
    opened = threading.Event()
    serve, count = app.in_background, app.ranked

    def told_where(made: Any, listener: Any, stop_seconds: int) -> Any:
        links.extend((address(*listener.getsockname()), f"/join/{first_invitation(made.state.store, ('lead', 'labeler', 'reviewer'))}"))
        opened.set()
        return serve(made, listener, stop_seconds)

    def counted(store: Store, project_id: str) -> list[tuple[str, str]]:
        assert not problems, problems
        return count(store, project_id)

    monkeypatch.setattr(app, "in_background", told_where)
    monkeypatch.setattr(app, "ranked", counted)

    def person() -> None:
        try:
            rank_everything()
        except Exception as error:
            problems.append(repr(error))

    def rank_everything() -> None:
        assert opened.wait(60)
        with httpx2.Client(base_url=links[0], trust_env=False, timeout=30) as client:
            client.post(f"/api{links[1]}", json={"login": "ada", "name": "Ada L.", "password": "correct horse battery"}).raise_for_status()
            client.headers["x-csrf"] = re.search(r'data-csrf="([^"]+)"', client.get("/", headers={"accept": "text/html"}).text)[1]  # type: ignore[index]
            (room,) = client.get("/api/").json()["projects"]
            assert {"labeler", "lead"} <= set(room["roles"])
            client.post(f"/api/projects/{room['id']}/label/consent", json={}).raise_for_status()
            for number in range(3):
                go = client.post(f"/api/projects/{room['id']}/label/next", json={}).json()["go"]
                places = len(client.get(f"/api{go}").json()["clips"])
                about = {"id": f"answer-of-ada-number-{number}", "watched": [1.0] * places, "watch_ms": [2_000] * places, "lead_time_ms": 5_000}
                client.post(f"/api{go}/answer", json={**about, "ranks": {"overall": list(range(1, places + 1))}}).raise_for_status()

    thread = threading.Thread(target=person, daemon=True)
    thread.start()
    told = have_people_rank(tmp_path / "app", takes.folder, tmp_path / "rankings", 3, name="demo", port=0)
    thread.join()
    assert not problems and told == {"rankings": 3, "people": 1}
    data = load_comparisons(tmp_path / "rankings")
    assert {event.annotator_id for event in data.events} <= {name for name in data.annotators if name.startswith("person-")}
    assert all(sorted(event.ranks, key=str) == [1, 2] for event in data.events)
    assert set(data.clips) == {row.clip_id for row in takes.rows()}
