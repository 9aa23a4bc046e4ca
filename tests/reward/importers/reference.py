"""What the rows of a file say, worked out a second time: short, slow, and sharing no code with `reward.importers`. The oracle of the tests of mutated files.

`answers(name, rows)` gives the answers a reader must find in parsed rows, as a multiset; `Illegal` is raised where it must refuse the file. Clips are known
by their paths, for no test of mutations gives a media folder.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

Row = dict[str, Any]


class Illegal(Exception):
    pass


class Fact(NamedTuple):
    prompt: str
    paths: tuple[str, ...]
    dimension: str
    kind: str
    choice: str | None = None
    ranks: tuple[int | None, ...] = ()
    likert: tuple[float, ...] = ()
    flags: tuple[str, ...] = ()
    person: str = "unknown"
    created_at: str = ""
    lead_time_ms: int | None = None


class Said(NamedTuple):
    clips: dict[str, tuple[str, float, int]]  # path -> generator, fps, frames
    prompt: str
    facts: list[tuple[object, Fact]]  # what identifies the answer (None: nothing does), and the answer


COLUMNS = {
    "videogen-rewardbench": ["path_A", "path_B", "A_model", "B_model", "prompt", "VQ", "MQ", "TA", "Overall", "fps_A", "num_frames_A", "fps_B", "num_frames_B"],
    "videoalign": ["path_A", "path_B", "prompt", "VQ", "MQ", "TA", "fps_A", "num_frames_A", "fps_B", "num_frames_B"],
    "safesora": ["pair_id", "prompt_text", "video_0", "video_1"],
    "safesora-label": ["prompt_text", "video_id", "video_path"],
    "videofeedback": ["id", "text prompt", "video link", "visual quality", "temporal consistency", "dynamic degree", "text-to-video alignment", "factual consistency"],
    "visionreward-train": ["video_path", "internal_id", "prompt", "annotation"],
    "visionreward-pairs": ["internal_id", "prompt", "standard_answer", "video1_path", "video2_path"],
    "genai-bench": ["prompt", "left_video", "right_video", "vote_type"],
    "pickapic": ["caption", "has_label", "image_0_uid", "image_1_uid", "label_0", "label_1", "ranking_id"],
    "pickapic-rankings": ["ranking_id", "best_image_uid", "prompt", "image_1_uid", "image_2_uid", "image_3_uid", "image_4_uid"],
    "hpdv2-train": ["human_preference", "prompt", "file_path"],
    "hpdv2-test": ["prompt", "image_path", "rank"],
    "datapoint-motion": ["prompt", "video1", "video2"]
    + [f"weighted_results{i}_{dimension}" for i in (1, 2) for dimension in ("Coherence", "Aesthetic", "Prompt_Adherence")],
    "label-studio": ["id", "data", "annotations"],
    "trl": ["prompt", "chosen", "rejected"],
}
WRITTEN = ("videogen-rewardbench", "videoalign")
PAIR = {"A": (1, 2), "B": (2, 1), "invalid": (None, None)}
HARMS = ["porn", "violence", "hate", "terrorism", "contraband", "controversial", "racism", "other_discrimination", "animal_abuse", "child_abuse", "crime", "other_harmful"]
VISION = {
    (1, 5): "alignment,color,lighting aes,object motion dynamic,camera motion dynamic,clear,image quality stability,detail refinement,physics law,unsafe type,safety",
    (1, 3): "composition,focus,camera movement,camera stability",
    (1, 4): "lighting accurate,letters",
    (0, 3): "shape at beginning",
    (0, 4): "shape throughout,movement smoothness,movement reality",
}


def answers(name: str, rows: list[Any]) -> Counter[Fact]:
    """The answers in rows, in any order."""
    if not rows:
        raise Illegal("no rows")
    memory: dict[Any, Any] = {}
    clips: dict[str, tuple[tuple[str, float, int], str]] = {}
    keyed: dict[object, Fact] = {}
    found: Counter[Fact] = Counter()
    for row in rows:
        if not isinstance(row, dict) or not all(name in row for name in COLUMNS[name]):
            raise Illegal("columns")
        said = READERS[name](row, memory)
        if said is None or any(len(set(fact.paths)) < len(fact.paths) for _, fact in said.facts):
            continue
        joined = {}
        for path, facts in said.clips.items():
            old, prompt = clips.get(path, (facts, said.prompt))
            if prompt != said.prompt or any(a != b and a and b for a, b in zip(old, facts, strict=True)):
                break
            joined[path] = (tuple(a or b for a, b in zip(old, facts, strict=True)), prompt)
        else:
            if any(key is not None and keyed.get(key, fact) != fact for key, fact in said.facts):
                raise Illegal("contradiction")
            new = {key: fact for key, fact in said.facts if key is not None and key not in keyed}
            keyed |= new
            found.update([*new.values(), *(fact for key, fact in said.facts if key is None)])
            if new or any(key is None for key, _ in said.facts):
                clips |= joined  # type: ignore[arg-type]
    return found


# Cells


def there(row: Row, name: str) -> Any:
    value = row.get(name)
    return None if value is None or value != value or (isinstance(value, str) and not value.strip()) else value


def text(row: Row, name: str) -> str:
    value = there(row, name)
    if value is None:
        return ""
    if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
        raise Illegal(name)
    return value


def must(value: str) -> str:
    if not value.strip():
        raise Illegal("empty")
    return value


def name_of(row: Row, name: str) -> str:
    value = there(row, name)
    return str(value) if type(value) is int and -(2**63) < value < 2**63 else text(row, name)


def number(row: Row, name: str, low: float, high: float) -> float | None:
    value = there(row, name)
    if value is None:
        return None
    if type(value) not in (int, float) or not low <= value <= high:
        raise Illegal(name)
    return float(value)


def written(row: Row, name: str, low: float, high: float, *, whole: bool = False) -> float | None:
    """A number in a cell of CSV."""
    cell = there(row, name)
    if cell is None:
        return None
    if not re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", cell, flags=re.ASCII) or not low <= float(cell) <= high or (whole and float(cell) % 1):
        raise Illegal(name)
    return float(cell)


def one_of(row: Row, name: str, *legal: str) -> str | None:
    value = there(row, name)
    if value is None:
        return None
    if not isinstance(value, str) or value not in legal:
        raise Illegal(name)
    return value


def yes(row: Row, name: str) -> bool | None:
    value = there(row, name)
    if value not in (None, True, False) or type(value) in (int, float):
        raise Illegal(name)
    return value


def items(row: Row, name: str) -> list[Any]:
    value = there(row, name)
    if value is not None and not isinstance(value, list):
        raise Illegal(name)
    return value or []


def inner(value: Any, *needed: str) -> Row:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value) or not all(name in value for name in needed):
        raise Illegal("part")
    return value


def place(path: str) -> str:
    return posixpath.normpath(must(path)) if "://" not in path else path


def ranks_of(choice: str) -> tuple[int | None, ...]:
    return PAIR.get(choice, (1, 1))


def pair(prompt: str, paths: list[str], dimension: str, choice: str, **more: Any) -> Fact:
    return Fact(prompt, tuple(paths), dimension, "pair", choice, ranks_of(choice), **more)


def bare(paths: list[str], generators: list[str] | None = None, frames: int = 0) -> dict[str, tuple[str, float, int]]:
    return {path: (generator, 0.0, frames) for path, generator in zip(paths, generators or [""] * len(paths), strict=True)}


# Formats: each returns None where the row says nothing


def videogen(row: Row, memory: dict[Any, Any]) -> Said | None:
    return _kling(row, ["VQ", "MQ", "TA", "Overall"], ["A", "B", "same"], [text(row, "A_model"), text(row, "B_model")])


def videoalign(row: Row, memory: dict[Any, Any]) -> Said | None:
    said = _kling(row, ["VQ", "MQ", "TA"], ["A", "B", "same", "invalid"], ["", ""])
    for dimension in ("VQ", "MQ", "TA") if said else ():
        rated = [(place(row[f"path_{s}"]), written({"MOS": row.get(f"MOS_{s}_{dimension}", "")}, "MOS", 1, 5)) for s in "AB"]
        kept = [(path, score) for path, score in rated if score is not None]
        if kept and said:
            paths, scores = zip(*kept, strict=True)
            said.facts.append((None, Fact(row["prompt"], paths, dimension, "likert", None, (None,) * len(paths), scores)))
    return said


def _kling(row: Row, dimensions: list[str], labels: list[str], models: list[str]) -> Said | None:
    if not row["prompt"].strip():
        return None
    paths = [place(row[f"path_{side}"]) for side in "AB"]
    facts = [(written(row, f"fps_{s}", 0, 1000) or 0.0, int(written(row, f"num_frames_{s}", 0, 10**7, whole=True) or 0)) for s in "AB"]
    clips = {path: (model, *about) for path, model, about in zip(paths, models, facts, strict=True)}
    said = [(d, one_of({d: row[d] or None}, d, *labels)) for d in dimensions]
    if len(clips) < 2:
        clips = {paths[0]: (models[0], *facts[0])}
    return Said(clips, row["prompt"], [(None, pair(row["prompt"], paths, d, {"same": "tie"}.get(label, label))) for d, label in said if label])


def safesora(row: Row, memory: dict[Any, Any]) -> Said | None:
    one_of(row, "prompt_type", "safety_critical", "safety_neutral")
    prompt = text(row, "prompt_text")
    if not prompt.strip():
        return None
    clips: dict[str, tuple[str, float, int]] = {}
    facts: list[tuple[object, Fact]] = []
    paths = []
    for name in ("video_0", "video_1"):
        video = inner(there(row, name), "prompt_text", "video_id", "video_path")
        if text(video, "prompt_text") != prompt:
            return None
        path, about, tags = _video(video, prompt)
        old = clips.setdefault(path, about)
        if old != about:
            clips[path] = about
        paths.append(path)
        facts += tags
    key = must(name_of(row, "pair_id"))
    sub = there(row, "sub_preferences")
    sub = {} if sub is None else inner(sub)
    sides = ("video_0", "video_1")
    spelled = {one_of(sub, "information", *sides), one_of(sub, "informativeness", *sides)} - {None}
    if len(spelled) > 1:
        raise Illegal("spellings")
    said = {d: one_of(row, d, *sides) for d in ("helpfulness", "harmlessness")}
    said |= {d: one_of(sub, d, *sides) for d in ("instruction_following", "correctness", "aesthetics")} | {"informativeness": next(iter(spelled), None)}
    facts += [((key, d), pair(prompt, paths, d, "AB"[sides.index(side)])) for d, side in said.items() if side]
    return Said(clips, prompt, facts)


def safesora_label(row: Row, memory: dict[Any, Any]) -> Said | None:
    one_of(row, "prompt_type", "safety_critical", "safety_neutral")
    prompt = text(row, "prompt_text")
    if not prompt.strip():
        return None
    path, about, tags = _video(row, prompt)
    return Said({path: about}, prompt, tags) if tags else None


def _video(video: Row, prompt: str) -> tuple[str, tuple[str, float, int], list[tuple[object, Fact]]]:
    key = must(name_of(video, "video_id"))
    path = place(text(video, "video_path") or f"{must(name_of(video, 'prompt_id'))}/{key}.mp4")
    safe, labels, tags = yes(video, "is_safe"), there(video, "video_labels"), []
    if safe is not None:
        tags.append((("video", key, "safety"), Fact(prompt, (path,), "safety", "tag", None, (None,), (), ("safe" if safe else "unsafe",))))
    if labels is not None:
        known = {harm: yes(inner(labels), harm) for harm in HARMS}
        flags = tuple(harm if is_there else f"unknown:{harm}" for harm, is_there in known.items() if is_there is not False)
        tags.append((("video", key, "harm"), Fact(prompt, (path,), "harm", "tag", None, (None,), (), flags)))
    return path, (text(video, "generated_from"), 0.0, 0), tags  # type: ignore[return-value]


def videofeedback(row: Row, memory: dict[Any, Any]) -> Said | None:
    prompt = text(row, "text prompt")
    if not prompt.strip():
        return None
    key = must(name_of(row, "id"))
    path = place(text(row, "video link") or key)
    scores = {d: number(row, d, 1, 4) for d in COLUMNS["videofeedback"][3:]}
    return Said(bare([path]), prompt, [((key, d), Fact(prompt, (path,), d, "likert", None, (None,), (score,))) for d, score in scores.items() if score is not None])


def visionreward_train(row: Row, memory: dict[Any, Any]) -> Said | None:
    prompt = text(row, "prompt")
    if not prompt.strip():
        return None
    path, key = place(text(row, "video_path")), must(name_of(row, "internal_id"))
    ranges = {d: limits for limits, names in VISION.items() for d in names.split(",")}
    ratings, facts = inner(there(row, "annotation"), *ranges), []
    for d, (low, high) in ranges.items():
        score = number(ratings, d, low, high)
        if score is not None and score % 1:
            raise Illegal(d)
        if score is not None:
            about = {"kind": "tag", "flags": (f"type {score:g}",)} if d == "unsafe type" else {"kind": "likert", "likert": (score,)}
            facts.append(((key, path, d), Fact(prompt, (path,), d, ranks=(None,), **about)))  # type: ignore[arg-type]
    return Said(bare([path]), prompt, facts)  # type: ignore[arg-type]


def visionreward_pairs(row: Row, memory: dict[Any, Any]) -> Said | None:
    prompt = text(row, "prompt")
    if not prompt.strip():
        return None
    paths, key = [place(text(row, f"video{i}_path")) for i in (1, 2)], must(name_of(row, "internal_id"))
    said = one_of(row, "standard_answer", "video1", "video2", "tie")
    choice = {"video1": "A", "video2": "B"}.get(said or "", said)
    return Said(bare(paths), prompt, [((key, *paths), pair(prompt, paths, "overall", choice))] if choice else [])


def genai_bench(row: Row, memory: dict[Any, Any]) -> Said | None:
    prompt = text(row, "prompt")
    if not prompt.strip():
        return None
    paths, models = [place(text(row, f"{side}_video")) for side in ("left", "right")], [text(row, f"{side}_model") for side in ("left", "right")]
    said = one_of(row, "vote_type", "leftvote", "rightvote", "tievote", "bothbad_vote")
    choice = {"leftvote": "A", "rightvote": "B", "tievote": "tie", "bothbad_vote": "both_bad"}.get(said or "")
    return Said(bare(paths, models), prompt, [(None, pair(prompt, paths, "overall", choice))] if choice else [])


def pickapic(row: Row, memory: dict[Any, Any]) -> Said | None:
    if not yes(row, "has_label"):
        return None
    prompt = text(row, "caption")
    if not prompt.strip():
        return None
    uids = [must(text(row, f"image_{i}_uid")) for i in (0, 1)]
    models = [text(row, f"model_{i}") for i in (0, 1)]
    labels = [number(row, f"label_{i}", 0, 1) for i in (0, 1)]
    if None in labels:
        return None
    if labels not in ([1, 0], [0, 1], [0.5, 0.5]):
        raise Illegal("labels")
    choice = "A" if labels[0] == 1 else "B" if labels[1] == 1 else "tie"
    best = text(row, "best_image_uid")
    if choice != "tie" and best in uids and labels[uids.index(best)] != 1:
        return None
    key = (must(name_of(row, "ranking_id")), *uids)
    person = name_of(row, "user_id") or "unknown"
    paths = [place(uid) for uid in uids]
    return Said(bare(paths, models, 1), prompt, [((*key, person), pair(prompt, paths, "overall", choice, person=person, created_at=_moment(row)))])


def _moment(row: Row) -> str:
    value = there(row, "created_at")
    return value.isoformat() if hasattr(value, "isoformat") else text(row, "created_at")


def pickapic_rankings(row: Row, memory: dict[Any, Any]) -> Said | None:
    prompt = text(row, "prompt")
    if not prompt.strip():
        return None
    uids = [must(uid) for uid in (text(row, f"image_{i}_uid") for i in (1, 2, 3, 4)) if uid]
    best = text(row, "best_image_uid")
    if not best:
        return None
    if best not in uids:
        raise Illegal("best")
    paths = [place(uid) for uid in uids]
    key, person = must(name_of(row, "ranking_id")), name_of(row, "user_id") or "unknown"
    when = _moment(row)
    if len(uids) < 2:
        return None
    ranks = tuple(1 if i == uids.index(best) else None for i in range(len(uids)))
    return Said(bare(paths, frames=1), prompt, [((key, person), Fact(prompt, tuple(paths), "overall", "best", None, ranks, person=person, created_at=when))])


def hpdv2_train(row: Row, memory: dict[Any, Any]) -> Said | None:
    prompt = text(row, "prompt")
    if not prompt.strip():
        return None
    paths = [place(text({"path": path}, "path")) for path in items(row, "file_path")]
    marks = items(row, "human_preference")
    if any(type(mark) not in (int, float) for mark in marks) or len(marks) != len(paths) or sorted(marks) != [0] * (len(paths) - 1) + [1]:
        raise Illegal("marks")
    person = name_of(row, "user_hash") or "unknown"
    index = marks.index(1)
    if len(paths) == 2:
        return Said(bare(paths, frames=1), prompt, [(None, pair(prompt, paths, "overall", "AB"[index], person=person))])
    if len(paths) < 2:
        return None
    ranks = tuple(1 if i == index else None for i in range(len(paths)))
    return Said(bare(paths, frames=1), prompt, [(None, Fact(prompt, tuple(paths), "overall", "best", None, ranks, person=person))])


def hpdv2_test(row: Row, memory: dict[Any, Any]) -> Said | None:
    prompt = text(row, "prompt")
    if not prompt.strip():
        return None
    paths = [place(text({"path": path}, "path")) for path in items(row, "image_path")]
    if len(paths) < 2:
        return None

    def dense(values: Any) -> tuple[int, ...]:
        if not isinstance(values, list) or len(values) != len(paths) or any(type(value) is not int or not 0 <= value <= 1000 for value in values):
            raise Illegal("rank")
        return tuple(1 + len({other for other in values if other < value}) for value in values)

    averaged = dense(items(row, "rank"))
    facts = []
    for value in items(row, "raw_annotation") or items(row, "raw_annotations"):
        answer = inner(value, "user_hash")
        given = there(answer, "rank")
        ranks = dense(given if given is not None else there(answer, "annotation"))
        facts.append((None, Fact(prompt, tuple(paths), "overall", "rank", None, ranks, person=must(name_of(answer, "user_hash")))))
    return Said(bare(paths, frames=1), prompt, facts or [(None, Fact(prompt, tuple(paths), "overall", "rank", None, averaged, flags=("aggregated",)))])  # type: ignore[arg-type]


def datapoint(row: Row, memory: dict[Any, Any]) -> Said | None:
    prompt = text(row, "prompt")
    if not prompt.strip():
        return None
    paths, models, facts = [], [], []
    for i in (1, 2):
        models.append(text(row, f"model{i}"))
        video = there(row, f"video{i}")
        if isinstance(video, dict):
            if there(inner(video), "bytes") is not None:
                raise Illegal("bytes cannot be in JSON")
            paths.append(place(text(video, "path")))
        else:
            paths.append(place(text(row, f"video{i}")))
    for d in ("Coherence", "Aesthetic", "Prompt_Adherence"):
        one, two = (number(row, f"weighted_results{i}_{d}", 0, 1) for i in (1, 2))
        if one is None or two is None or one + two == 0:
            continue
        if one + two > 1.011:
            raise Illegal("shares")
        facts.append((None, pair(prompt, paths, d, "A" if one > two else "B" if one < two else "tie", likert=(one, two), flags=("aggregated",))))
    return Said(bare(paths, models), prompt, facts)  # type: ignore[arg-type]


def trl(row: Row, memory: dict[Any, Any]) -> Said | None:
    prompt = text(row, "prompt")
    if not prompt.strip():
        return None
    paths = [place(text(row, name)) for name in ("chosen", "rejected")]
    return Said(bare(paths), prompt, [(None, pair(prompt, paths, "overall", "A"))])


def label_studio(row: Row, memory: dict[Any, Any]) -> Said | None:
    task, data = must(name_of(row, "id")), inner(there(row, "data"), "prompt")
    if memory.setdefault(("data", task), data) != data:
        raise Illegal("two tasks of one id")
    prompt = text(data, "prompt")
    if not prompt.strip():
        return None
    two = [place(text(data, f"video{i}")) for i in (1, 2)] if text(data, "video1") or text(data, "video2") else []
    listed: dict[str, str] = {}
    for value in items(data, "items"):
        item = inner(value, "id")
        key = must(name_of(item, "id"))
        if key in listed:
            raise Illegal("item")
        listed[key] = place(text(item, "video") or key)
    if not two and not listed:
        raise Illegal("no clips")
    facts: list[tuple[object, Fact]] = []
    for value in items(row, "annotations"):
        annotation = inner(value, "result")
        key = ("annotation", task, name_of(annotation, "id"))
        if key[2] and key in memory:
            if memory[key] != annotation:
                raise Illegal("annotation twice")
            continue
        memory[key] = annotation
        if yes(annotation, "was_cancelled"):
            continue
        by = there(annotation, "completed_by")
        person = must(name_of(inner(by, "id"), "id")) if isinstance(by, dict) else name_of(annotation, "completed_by")
        seconds = number(annotation, "lead_time", 0, 1e9)
        about = {
            "person": person or "unknown",
            "created_at": text(annotation, "created_at"),
            "lead_time_ms": None if seconds is None else round(seconds * 1000),
            "flags": ("ground_truth",) if yes(annotation, "ground_truth") else (),
        }
        tags = set()
        for value in items(annotation, "result"):
            result = inner(value, "type")
            dimension, kind = text(result, "from_name"), must(text(result, "type"))
            if kind not in ("pairwise", "choices", "ranker"):
                continue
            must(dimension)
            if kind == "pairwise":
                side = one_of(inner(there(result, "value"), "selected"), "selected", "left", "right")
                choice = {"left": "A", "right": "B"}[must(side or "")]
            elif kind == "choices":
                value = there(result, "value")
                chosen = [] if value is None else items(inner(value, "choices"), "choices")
                legal = [c for c in chosen if isinstance(c, str) and c in ("left", "right", "tie", "both_bad", "both_good", "invalid")]
                if not legal:
                    continue
                if len(chosen) > 1:
                    raise Illegal("choices")
                choice = {"left": "A", "right": "B"}.get(legal[0], legal[0])
            if dimension in tags:
                raise Illegal("twice")
            tags.add(dimension)
            if kind == "ranker":
                ranks = _ranker(inner(there(result, "value"), "ranker")["ranker"], dimension, list(listed))
                facts.append((None, Fact(prompt, tuple(listed.values()), dimension, "rank", None, ranks, **about)))  # type: ignore[arg-type]
                continue
            to_name = there(result, "to_name")
            if not two or (to_name.replace(" ", "").split(",") if isinstance(to_name, str) else to_name) == ["video2", "video1"]:
                raise Illegal("sides")
            facts.append((None, pair(prompt, two, dimension, choice, **about)))
    return Said(bare(list(dict.fromkeys([*two, *listed.values()]))), prompt, facts)


def _ranker(ranker: Any, dimension: str, ids: list[str]) -> tuple[int | None, ...]:
    if isinstance(ranker, dict) and list(ranker) == [dimension]:
        if dimension.isdecimal():
            raise Illegal("number")
        ranker = ranker[dimension]
    if isinstance(ranker, list):
        ranker = {str(i): [item] for i, item in enumerate(ranker, 1)}
    if not isinstance(ranker, dict):
        raise Illegal("ranker")
    got: dict[str, int | None] = {}
    for bucket, inside in ranker.items():
        if not re.fullmatch("_|[1-9][0-9]{0,4}", bucket, flags=re.ASCII) or not isinstance(inside, list):
            raise Illegal("bucket")
        for item in inside:
            if type(item) not in (int, str) or str(item) in got or str(item) not in ids:
                raise Illegal("item")
            got[str(item)] = None if bucket == "_" else int(bucket)
    ranks = tuple(got.get(i) for i in ids)
    if len(ids) < 2 or any(rank and rank > len(ids) for rank in ranks):
        raise Illegal("places")
    return ranks


READERS: dict[str, Callable[[Row, dict[Any, Any]], Said | None]] = {
    "videogen-rewardbench": videogen,
    "videoalign": videoalign,
    "safesora": safesora,
    "safesora-label": safesora_label,
    "videofeedback": videofeedback,
    "visionreward-train": visionreward_train,
    "visionreward-pairs": visionreward_pairs,
    "genai-bench": genai_bench,
    "pickapic": pickapic,
    "pickapic-rankings": pickapic_rankings,
    "hpdv2-train": hpdv2_train,
    "hpdv2-test": hpdv2_test,
    "datapoint-motion": datapoint,
    "label-studio": label_studio,
    "trl": trl,
}


def csv_rows(content: bytes) -> list[Row]:
    """A CSV file by RFC 4180, character by character: a byte order mark, any line ends, empty lines left out."""
    try:
        left = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise Illegal("UTF-8") from error
    lines: list[list[str]] = [[]]
    cell, quoted, was_quoted, i = "", False, False, 0
    while i <= len(left):
        c = left[i] if i < len(left) else "\n"
        if quoted and i == len(left):
            raise Illegal("open quote")
        if quoted and c == '"' and left[i + 1 : i + 2] == '"':
            cell += '"'
            i += 1
        elif quoted and c == '"':
            quoted = False
        elif quoted:
            cell += c
        elif c == '"' and not cell and not was_quoted:
            quoted = was_quoted = True
        elif c in ",\n\r":
            if c == "," or cell or was_quoted or lines[-1]:
                lines[-1].append(cell)
            cell, was_quoted = "", False
            if c != ",":
                lines.append([])
                i += left[i : i + 2] == "\r\n"
        elif was_quoted:
            raise Illegal("after a quote")
        else:
            cell += c
        i += 1
    header, *rows = [line for line in lines if line] or [[]]
    if len(set(header)) < len(header) or any(len(row) != len(header) for row in rows):
        raise Illegal("cells")
    return [dict(zip(header, row, strict=True)) for row in rows]
