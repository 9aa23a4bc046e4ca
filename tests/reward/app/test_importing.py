"""Clips of runs and folders into projects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sqlalchemy import select

from base_model.errors import UserError
from base_model.video.files import digest_of, mp4_bytes, read_lossless, to_uint8
from base_model.video.store import ClipStore
from reward.app import importing
from reward.app.deleting import delete_clip
from reward.app.importing import folder_below, folders_below, import_run, ruled
from reward.app.media import VARIANTS, missing_of, path_of
from reward.app.schema import clip, event, prompt
from reward.app.security import Denied
from reward.app.store import Store
from reward.app.web import AppSettings
from tests.reward.app.conftest import Client, add_member, add_project, film

RULING = {"verdict": "allow", "policy": "P17", "score": 0.1, "reasons": [], "filter": "flash 3", "threshold": 0.5, "policy_version": "2"}
ALLOWED = {"verdict": "allow", "rulings": [RULING]}
BLOCKED = {"verdict": "block", "rulings": [{**RULING, "verdict": "block", "score": 0.9}]}
CHILD = {"verdict": "block", "rulings": [{**RULING, "verdict": "block", "policy": "P04", "score": 0.9}]}


def render(content: bytes) -> Mapping[str, bytes]:
    """Stands in for the worker: what it makes of a clip is the content itself."""
    if not content:
        raise UserError("no video")
    facts = {"width": 16, "height": 16, "fps": 8.0, "frames": 5, "seconds": 0.625}
    return {**dict.fromkeys(VARIANTS, b"grey"), "clip.mp4": content, "facts.json": json.dumps(facts).encode()}


def a_run(folder: Path, decisions: list[dict[str, Any]]) -> ClipStore:
    """A run with one clip a decision, two takes a prompt."""
    made = ClipStore(folder)
    for number, decision in enumerate(decisions):
        video = torch.full((5, 3, 16, 16), number / 16)
        made.add(video, prompt=f"prompt {number // 2}", prompt_id=f"p{number // 2}", seed=number, sampler={}, lineage="x", fps=8, safety=decision, preview=False)
    return made


def clips_of(store: Store, project_id: str) -> list[Any]:
    with store.reading() as db:
        return list(db.execute(select(clip).where(clip.c.project_id == project_id).order_by(clip.c.created_at, clip.c.id)))


def test_a_run_comes_with_its_decisions_prompts_and_media(each_store: Store, tmp_path: Path) -> None:
    project_id, folder = add_project(each_store), tmp_path / "run"
    made = a_run(folder, [ALLOWED, BLOCKED, {}, CHILD])
    counts = import_run(each_store, project_id, folder, "first", "person-1", render=render)
    assert (counts["rows"], counts["added"], counts["refused"], counts["unreadable"]) == (4, 4, 0, 0)
    found = {row.clip_id: row for row in clips_of(each_store, project_id)}
    told = [(found[row.clip_id].verdict, found[row.clip_id].score, found[row.clip_id].state) for row in made.rows()]
    assert told == [("allow", 0.1, "live"), ("block", 0.9, "live"), ("error", None, "live"), ("block", 0.9, "restricted")]
    for row in made.rows():
        held = found[row.clip_id]
        assert (held.prompt_id, held.run, held.row["seed"], held.row["num_frames"], held.row["fps"]) == (row.prompt_id, "first", row.seed, 5, 8.0)
        media = path_of(each_store, row.clip_id)
        assert digest_of(read_lossless(media).frames) == row.clip_id == digest_of(to_uint8(made.load(row.clip_id)))
    with each_store.reading() as db:
        assert {key: value for key, value in db.execute(select(prompt.c.prompt_id, prompt.c.text))} == {"p0": "prompt 0", "p1": "prompt 1"}
        bodies = " ".join(db.execute(select(event.c.body)).scalars())
    assert "first" not in bodies and "prompt 0" not in bodies and each_store.verify_log()["events"] >= 3


@pytest.mark.parametrize("gone", VARIANTS)
def test_importing_again_makes_what_is_missing_of_a_clip(store: Store, tmp_path: Path, gone: str) -> None:
    project_id, folder = add_project(store), tmp_path / "run"
    digest = a_run(folder, [ALLOWED]).rows()[0].clip_id
    import_run(store, project_id, folder, "first", "person-1", render=render)
    path_of(store, digest, gone).unlink()
    assert missing_of(store, digest) == [gone]
    counts = import_run(store, project_id, folder, "again", "person-1", render=render)
    assert missing_of(store, digest) == [] and (counts["already"], counts["unreadable"]) == (1, 0)
    path_of(store, digest, gone).unlink()
    counts = import_run(store, project_id, folder, "again", "person-1", render=lambda content: {name: b"x" for name in VARIANTS if name != gone})
    (row,) = clips_of(store, project_id)
    assert (row.verdict, counts["unreadable"]) == ("error", 1), "what cannot be shown whole is shown to no labeler"


@pytest.mark.parametrize("decision", [ALLOWED, CHILD])
def test_what_was_deleted_does_not_come_back_with_another_import(each_store: Store, tmp_path: Path, decision: dict[str, Any]) -> None:
    project_id, folder = add_project(each_store), tmp_path / "run"
    digest = a_run(folder, [decision]).rows()[0].clip_id
    import_run(each_store, project_id, folder, "first", "person-1", render=render)
    (row,) = clips_of(each_store, project_id)
    delete_clip(each_store, project_id, row.id, "person-1", restricted=True)
    counts = import_run(each_store, project_id, folder, "again", "person-1", render=render)
    (row,) = clips_of(each_store, project_id)
    assert row.state == "deleted" and (counts["added"], counts["already"], counts["ruled_again"]) == (0, 1, 0)
    assert missing_of(each_store, digest) == list(VARIANTS) and not list(each_store.media.rglob(f"{digest}*"))


@pytest.mark.parametrize(
    ("column", "value"),
    [("width", "wide"), ("width", 10**400), ("fps", float("inf")), ("fps", float("nan")), ("fps", True), ("seed", None), ("prompt", 5), ("prompt_id", [1]),
     ("clip_id", 7), ("path", {}), ("safety_json", 0), ("generator", "\ud800")],
)  # fmt: skip
def test_a_row_with_a_column_of_the_wrong_kind_is_refused_and_the_others_come(store: Store, tmp_path: Path, column: str, value: object) -> None:
    project_id, folder = add_project(store), tmp_path / "run"
    a_run(folder, [ALLOWED, ALLOWED])
    first, second = map(json.loads, (folder / "clips.jsonl").read_text().splitlines())
    (folder / "clips.jsonl").write_text(json.dumps({**first, column: value}) + "\n" + json.dumps(second) + "\n")
    counts = import_run(store, project_id, folder, "first", "person-1", render=render)
    assert (counts["rows"], counts["added"], counts["refused"]) == (2, 1, 1) and "clip" in counts["first_refused"]
    assert [row.clip_id for row in clips_of(store, project_id)] == [second["clip_id"]]


def test_importing_again_adds_what_is_new_and_renders_nothing_twice(each_store: Store, tmp_path: Path) -> None:
    project_id, folder, rendered = add_project(each_store), tmp_path / "run", []

    def counted(content: bytes) -> Mapping[str, bytes]:
        rendered.append(content)
        return render(content)

    a_run(folder, [ALLOWED, ALLOWED])
    import_run(each_store, project_id, folder, "first", "person-1", render=counted)
    before = clips_of(each_store, project_id)
    a_run(folder, [ALLOWED, ALLOWED, BLOCKED])
    counts = import_run(each_store, project_id, folder, "first", "person-1", render=counted)
    assert (counts["added"], counts["already"]) == (1, 2) and len(rendered) == 3
    after = clips_of(each_store, project_id)
    assert [row for row in after if row.id in {each.id for each in before}] == before and len(after) == 3
    other = add_project(each_store, "other")
    assert import_run(each_store, other, folder, "first", "person-1", render=counted)["added"] == 3 and len(rendered) == 3


def test_an_import_that_is_killed_goes_on_where_it_was(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project_id, folder, seen = add_project(store), tmp_path / "run", []
    monkeypatch.setattr(importing, "BATCH", 2)
    a_run(folder, [ALLOWED] * 5)

    class Killed(BaseException):
        pass

    def dies(content: bytes) -> Mapping[str, bytes]:
        seen.append(content)
        if len(seen) == 4:
            raise Killed
        return render(content)

    with pytest.raises(Killed):
        import_run(store, project_id, folder, "first", "person-1", render=dies)
    assert len(clips_of(store, project_id)) == 2
    counts = import_run(store, project_id, folder, "first", "person-1", render=dies)
    assert (counts["added"], counts["already"], len(clips_of(store, project_id))) == (3, 2, 5)
    assert len(seen) == 6  # the third clip's media had been written before


def test_what_filters_say_anew_takes_the_place_of_what_they_said(each_store: Store, tmp_path: Path) -> None:
    project_id, folder = add_project(each_store), tmp_path / "run"
    made = a_run(folder, [ALLOWED, ALLOWED])
    import_run(each_store, project_id, folder, "first", "person-1", render=render)
    made.rule_again(made.rows(), [BLOCKED, CHILD])
    counts = import_run(each_store, project_id, folder, "first", "person-1", render=render)
    assert (counts["added"], counts["ruled_again"]) == (0, 2)
    assert sorted((row.verdict, row.state) for row in clips_of(each_store, project_id)) == [("block", "live"), ("block", "restricted")]


def test_a_clip_whose_file_cannot_be_shown_is_an_error_until_it_can(store: Store, tmp_path: Path) -> None:
    project_id, folder = add_project(store), tmp_path / "run"
    made = a_run(folder, [ALLOWED, BLOCKED])
    paths = [made.record_path(row.clip_id) for row in made.rows()]
    kept = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(b"")
    counts = import_run(store, project_id, folder, "first", "person-1", render=render)
    assert counts["unreadable"] == 2 and sorted(row.verdict for row in clips_of(store, project_id)) == ["block", "error"]
    for path, content in zip(paths, kept, strict=True):
        path.write_bytes(content)
    assert import_run(store, project_id, folder, "first", "person-1", render=render)["ruled_again"] == 2
    assert sorted(row.verdict for row in clips_of(store, project_id)) == ["allow", "block"]


def test_media_of_a_clip_are_never_written_over_by_another_file_that_claims_its_id(store: Store, tmp_path: Path) -> None:
    project_id, other, folder = add_project(store), add_project(store, "other"), tmp_path / "run"
    made = a_run(folder, [ALLOWED])
    (row,) = made.rows()
    import_run(store, project_id, folder, "first", "person-1", render=render)
    before = path_of(store, row.clip_id).read_bytes()
    made.record_path(row.clip_id).write_bytes(film(0))
    assert import_run(store, other, folder, "first", "person-1", render=render)["unreadable"] == 1
    assert path_of(store, row.clip_id).read_bytes() == before and [each.verdict for each in clips_of(store, other)] == ["error"]


def test_video_files_with_captions_come_as_errors_because_nobody_judged_them(each_store: Store, tmp_path: Path) -> None:
    project_id, folder = add_project(each_store), tmp_path / "films"
    folder.mkdir()
    lines: list[dict[str, Any]] = [{"file_name": f"{take}.mp4", "text": "a bar moves"} for take in range(2)]
    for take in range(2):
        (folder / f"{take}.mp4").write_bytes(film(take))
    (tmp_path / "secret.mp4").write_bytes(mp4_bytes(np.zeros((13, 32, 32, 3), np.uint8), 12.0))
    (folder / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    bad = [{"file_name": name, "text": "x"} for name in ("../secret.mp4", "link.mp4", str(tmp_path / "secret.mp4"), "gone.mp4", ".", "a\u0000b")]
    text = [json.dumps(each) for each in [*lines, *bad, {"file_name": "0.mp4"}, {"file_name": "1.mp4", "text": "z\u0000"}, "no object"]] + ["{", ""]
    (folder / "metadata.jsonl").write_text("\n".join(text))
    counts = import_run(each_store, project_id, folder, "films", "person-1", render=render)
    assert (counts["added"], counts["refused"]) == (2, len(bad) + 4)
    rows = clips_of(each_store, project_id)
    assert {(row.verdict, row.row["fps"], row.row["num_frames"]) for row in rows} == {("error", 8.0, 5)} and len({row.prompt_id for row in rows}) == 1


def test_a_video_file_that_is_replaced_while_others_are_imported_is_not_shown_under_the_old_ones_id(store: Store, tmp_path: Path) -> None:
    project_id, folder = add_project(store), tmp_path / "films"
    folder.mkdir()
    for take in range(2):
        (folder / f"{take}.mp4").write_bytes(film(take))
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{take}.mp4", "text": "a bar moves"}) + "\n" for take in range(2)))

    def slowly(content: bytes) -> Mapping[str, bytes]:
        (folder / "1.mp4").write_bytes(film(2))
        return render(content)

    assert import_run(store, project_id, folder, "films", "person-1", render=slowly)["unreadable"] == 1
    first, second = (next(row for row in clips_of(store, project_id) if row.row["path"] == f"{take}.mp4") for take in range(2))
    assert path_of(store, first.clip_id).read_bytes() == film(0) and not path_of(store, second.clip_id).exists()
    (reason,) = second.decision["rulings"][-1]["reasons"]
    assert reason["text"] == "import: the file was changed while it was imported"


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ({"lang": "pt-BR", "kind": "benign"}, ("pt-BR", "benign")),
        ({}, ("", "")),
        ({"lang": "zh-Hant-TW"}, ("zh-Hant-TW", "")),
        ({"lang": "en-" + "x" * 14, "kind": ["benign"]}, ("", "")),
        ({"lang": '"><b', "kind": "Benign\n"}, ("", "")),
    ],
)
def test_the_language_and_kind_of_a_prompt_are_what_the_folder_says_or_unknown(store: Store, tmp_path: Path, told: dict[str, Any], kept: tuple[str, str]) -> None:
    project_id = add_project(store)
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mp4").write_bytes(film(0))
    (tmp_path / "films" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "text": "of a file", **told}))
    made = ClipStore(tmp_path / "run")
    made.add(torch.zeros(5, 3, 16, 16), prompt="of a run", prompt_id="p", seed=0, sampler={}, lineage="x", fps=8, safety=ALLOWED, preview=False, extra=told)
    for name in ("films", "run"):
        import_run(store, project_id, tmp_path / name, name, "person-1", render=render)
    with store.reading() as db:
        assert {(row.text, row.lang, row.kind) for row in db.execute(select(prompt))} == {("of a file", *kept), ("of a run", *kept)}
    (tmp_path / "films" / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "text": "of a file", "lang": "de", "kind": "benign"}))
    import_run(store, project_id, tmp_path / "films", "films", "person-1", render=render)
    with store.reading() as db:  # what was not known is filled in, what was stays
        (row,) = db.execute(select(prompt).where(prompt.c.text == "of a file")).all()
    assert (row.lang, row.kind) == (kept[0] or "de", kept[1] or "benign")


@pytest.mark.parametrize(
    ("told", "verdict"),
    [
        (None, "error"),
        ({}, "error"),
        ("allow", "error"),
        ({"verdict": "allow", "rulings": []}, "error"),
        ({"verdict": "allow"}, "error"),
        ({"verdict": "block"}, "block"),
        ({"verdict": "allow", "rulings": [{**RULING, "verdict": "block"}]}, "block"),
        ({"verdict": "review", "rulings": [RULING]}, "review"),
        ({"verdict": "allow", "rulings": [{**RULING, "score": float("nan")}]}, "error"),
        ({"verdict": "allow", "rulings": [{**RULING, "score": 3}]}, "error"),
        ({"verdict": "allow", "rulings": [{**RULING, "verdict": "ALLOW"}]}, "error"),
        ({"verdict": "allow", "rulings": [{**RULING, "filter": ""}]}, "error"),
        ({"verdict": "allow", "rulings": [RULING, {**RULING, "policy": None}]}, "error"),
        ({"verdict": "fine", "rulings": [RULING]}, "error"),
        (ALLOWED, "allow"),
    ],
)
def test_a_decision_that_makes_no_sense_is_never_an_allow(told: Any, verdict: str) -> None:
    assert ruled(told).verdict == verdict and ruled(told).decision["verdict"] == verdict
    assert ruled(told, "broken").verdict == max(verdict, "error", key=importing.ORDER.index)


def test_only_folders_below_the_roots_can_be_named_by_whatever_name(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "a" / "run", root / "plain", outside):
        folder.mkdir(parents=True)
    for folder in (root / "a" / "run", outside):
        (folder / "clips.jsonl").touch()
    (root / "link").symlink_to(outside)
    (root / "a" / "inner").symlink_to(root / "a" / "run")
    assert folders_below([root]) == ["0/a/run"] and folder_below([root], "0/a/run") == root / "a" / "run"
    names = ["0/link", "0/../outside", "0/a/inner", "0/plain", "0/a/../a/run", "1/a/run", "-1/a/run", "a/run", "", "0", str(outside), "0/" + str(outside), "0/a/run/\0", "²/a/run"]
    for name in names:
        with pytest.raises(Denied):
            folder_below([root], name)


def test_an_import_through_the_app_tells_how_far_it_is(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project_id = add_project(store)
    add_member(store, "ada", "lead", project_id=project_id)
    a_run(tmp_path / "root" / "run", [ALLOWED, BLOCKED])
    client = Client(store, "ada", AppSettings(import_roots=(tmp_path / "root",)))
    api = f"/api/projects/{project_id}/lead/import"
    assert client.get(api).json()["folders"] == ["0/run"] and client.get(api).json()["job"] is None
    assert client.post(api, json={"folder": "0/../run", "run": "x"}).status_code == 404
    kept, threads = importing.begin_import, []

    def begin(*told: Any) -> None:
        threads.append(kept(*told, render=render))

    monkeypatch.setattr(importing, "begin_import", begin)
    assert client.post(api, json={"folder": "0/run", "run": "the first"}).status_code == 200
    threads[0].join()
    job = client.get(api).json()["job"]
    assert (job["state"], job["counts"]["added"], job["done"]) == ("done", 2, 2)
    assert "the first" in client.get(api.removeprefix("/api"), headers={"accept": "text/html"}).text


def test_a_project_that_is_not_there_takes_no_clips(store: Store, tmp_path: Path) -> None:
    a_run(tmp_path / "run", [ALLOWED])
    with pytest.raises(Denied):
        import_run(store, "j_none", tmp_path / "run", "x", "person-1", render=render)
    with pytest.raises(UserError, match="neither"):
        import_run(store, add_project(store), tmp_path, "x", "person-1", render=render)
