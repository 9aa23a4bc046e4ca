"""Splits that do not leak: what hangs together, what a fold holds out, and that both survive growing data in any order."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from base_model.errors import UserError
from recipes.shapes.prompts import make_prompts
from reward.comparisons import Clip, Comparisons, Prompt, RankingEvent, load_comparisons, write_comparisons
from reward.splits import LONG, SPLITS, assign_splits, components_of, leave_annotators_out, leave_one_generator_out, normalised

WORDS = [f"{a}{b}" for a in "bcdfgklmnprst" for b in ("a", "e", "ol", "umi")]


def components(*texts: str) -> list[str]:
    return list(components_of([Prompt(f"p{i}", text) for i, text in enumerate(texts)]).values())


def sentence(rng: random.Random, words: int) -> list[str]:
    return [rng.choice(WORDS) for _ in range(words)]


def edited(rng: random.Random, words: list[str], edits: int) -> list[str]:
    out = list(words)
    for _ in range(edits):
        place = rng.randrange(len(out))
        out[place : place + rng.randint(0, 1)] = [rng.choice(WORDS)] * rng.randint(0, 2)
        out = out or ["x"]
    return out


# Components


def test_prompts_that_share_text_cluster_clip_or_first_frame_stay_together() -> None:
    prompts = [
        *[Prompt("p0", "a red circle moves left"), Prompt("p1", "a blue bar grows"), Prompt("p2", "A red circle, moves LEFT!")],
        *[Prompt("p3", "a blue plank grows", cluster_id="x"), Prompt("p4", "something else", cluster_id="x"), Prompt("p5", "alone")],
    ]
    clips = [Clip("c", "", "p1", first_frame_hash="f"), Clip("d", "", "p3", first_frame_hash="f")]
    component = components_of(prompts, clips=clips)
    assert component["p0"] == component["p2"]
    assert component["p1"] == component["p3"] == component["p4"]
    assert len(set(component.values())) == 3
    shared = components_of(prompts, [RankingEvent("e", "t", "p0", "ann", ("k", "l"), (1, 2)), RankingEvent("f", "t", "p5", "ann", ("l", "m"), (1, 2))])
    assert shared["p0"] == shared["p5"]


def test_seed_families_hang_together_only_where_asked_and_only_of_known_generators() -> None:
    prompts = [Prompt(f"p{i}", f"number {i}") for i in range(6)]
    maker = {"generator": "wan", "generator_rev": "1"}
    clips = [Clip("a", "", "p0", seed=3, **maker), Clip("b", "", "p1", seed=3, **maker), Clip("c", "", "p2", seed=4, **maker)]
    clips += [replace(clips[0], clip_id="d", prompt_id="p3", generator_rev="2"), Clip("e", "", "p4"), Clip("f", "", "p5")]
    assert len(set(components_of(prompts, clips=clips).values())) == 6
    found = components_of(prompts, clips=clips, seed_families=True)
    assert found["p0"] == found["p1"] and len(set(found.values())) == 5


def test_splits_hold_when_data_grow_and_follow_the_salt() -> None:
    prompts = [Prompt(f"p{i}", f"prompt number {i}") for i in range(3000)]
    component = components_of(prompts)
    split = assign_splits(component, {}, salt="s")
    half = assign_splits(components_of(prompts[:1500]), {}, salt="s")
    assert all(split[key] == value for key, value in half.items())
    shares = [list(split.values()).count(name) / 3000 for name in SPLITS]
    assert shares == pytest.approx([0.6, 0.15, 0.25], abs=0.03)
    assert sum(split[key] != value for key, value in assign_splits(component, {}, salt="other").items()) > 1000
    with pytest.raises(ValueError, match="sum to 1"):
        assign_splits(component, {}, salt="s", shares=(0.5, 0.2, 0.2))


def test_components_that_grow_together_never_move_training_data_into_a_test() -> None:
    previous = {"a": "test", "b": "train", "c": "val"}
    assert assign_splits({"a": "x", "b": "x", "c": "y", "d": "y"}, previous, salt="s") == {"a": "train", "b": "train", "c": "val", "d": "val"}


def test_normalising_ignores_case_punctuation_and_width() -> None:
    assert normalised("  A RED   circle,\tmoves! ") == "a red circle moves" == normalised("ａ red circle moves")


@pytest.mark.parametrize(
    "texts", [("add ½ cup of sugar", "add 1/2 cup of sugar"), ("LEGO® car", "LEGO car"), ("200°C", "200 C"), ("−5", "-5"), ("a ¨b", "a b"), ("a¯b", "a b"), ("2 × 2", "2 2")]
)
def test_signs_beside_words_make_no_prompt_another_one(texts: tuple[str, str]) -> None:
    assert normalised(texts[0]) == normalised(texts[1])


@pytest.mark.parametrize(
    "texts",
    [("दिन", "दान", "देन"), ("กิน", "กัน", "กน"), ("a ball moves →", "a ball moves ←", "a ball moves"), ("🔴", "🟦", ""), ("שָׁלוֹם", "שִׁלֵּם")],
)
def test_texts_that_differ_in_a_vowel_sign_an_arrow_or_an_emoji_are_not_the_same(texts: tuple[str, ...]) -> None:
    assert len(set(components(*texts))) == len(texts)


def test_what_is_read_the_same_is_the_same() -> None:
    assert normalised("the dog´s ❤️ café") == normalised("THE dog's ❤ cafe\u0301") and normalised("a|b + c ~ d_e $5") == "a b c d_e 5"
    assert [normalised(prompt) for prompt in ("दिन, रात!", "  दिन रात")] == ["दिन रात"] * 2


# Nearly the same text


def test_a_long_prompt_stays_with_its_near_copies_and_a_short_one_only_with_itself() -> None:
    rng = random.Random(1)
    words = rng.sample(WORDS, 40)
    exchanged = [*words[:20], "other", *words[21:]]
    assert len(set(components(" ".join(words), " ".join(exchanged), " ".join([*words, "4k", "highly", "detailed"]), " ".join(words).upper() + "!"))) == 1
    assert len(set(components(" ".join(words), " ".join(exchanged[:19] + ["x", "other", "y", "z"] + exchanged[24:])))) == 2
    for n in (1, 2, 5, LONG - 1):
        short = words[:n]
        assert len(set(components(" ".join(short), " ".join([*short[:-1], "other"])))) == 2
    assert len(set(components("a red circle moves left", "a blue circle moves left", "a panda drinks coffee, pan left", "a panda drinks coffee, pan right"))) == 4


def test_the_bounds_that_are_documented() -> None:
    """One word exchanged in the middle: from 29 words on. Three words appended: from 22."""
    words = random.Random(2).sample(WORDS, 40)
    for n in range(LONG, 36):
        exchanged = [*words[: n // 2], "other", *words[n // 2 + 1 : n]]
        assert (len(set(components(" ".join(words[:n]), " ".join(exchanged)))) == 1) == (n >= 29), n
        assert len(set(components(" ".join(words[:n]), " ".join([*words[:n], "in", "pixel", "art"])))) == 1
    for n in (LONG - 1, LONG):
        assert (len(set(components(" ".join(words[:n]), " ".join([*words[: n - 1], "other"])))) == 1) == (n == LONG)
    for more in range(1, 10):  # 20 triples of 20 + more: 4/5 with five
        assert (len(set(components(" ".join(words[:22]), " ".join([*words[:22], *map(str, range(more))])))) == 1) == (more <= 5), more


def test_prompts_in_a_script_without_spaces_are_compared_sign_by_sign() -> None:
    text = "一只戴着红色围巾的小猫坐在窗台上看着外面飘落的雪花房间里点着温暖的灯光桌上放着一杯热茶"
    assert len(set(components(text, text.replace("小猫", "小狗"), text[: len(text) // 2] + "完全不同的另外一个故事发生在很远的海边"))) == 2


def test_words_of_a_script_with_vowel_signs_are_whole_and_thai_is_compared_sign_by_sign() -> None:
    story = "एक छोटी लड़की नदी के किनारे बैठी हुई है और पानी में पत्थर फेंक रही है"
    hindi = story.split()
    assert len(hindi) == 16 < LONG
    assert len(set(components(" ".join(hindi), " ".join([*hindi, "अभी"])))) == 2, "too short to be told from another prompt"
    twice = [*hindi, *hindi[::-1]]
    assert len(set(components(" ".join(twice), " ".join([*twice, "अभी"])))) == 1
    thai = "แมวตัวเล็กสวมผ้าพันคอสีแดงนั่งอยู่บนขอบหน้าต่างมองดูหิมะที่ตกลงมาข้างนอกในห้องมีแสงไฟอบอุ่น"
    assert len(set(components(thai, thai.replace("แดง", "เขียว"), thai[: len(thai) // 2]))) == 2


def test_exactly_the_pairs_that_resemble_each_other_are_joined() -> None:
    """Against every pair by brute force, with fractions, on sentences from few words and their edits."""
    rng = random.Random(3)
    first = [sentence(rng, rng.randint(10, 45)) for _ in range(60)]
    texts = [" ".join(words) for words in first + [edited(rng, rng.choice(first), rng.randint(0, 3)) for _ in range(240)]]
    rng.shuffle(texts)
    words = [text.split() for text in texts]
    triples = [{" ".join(some[i : i + 3]) for i in range(len(some) - 2)} for some in words]
    graph: dict[int, set[int]] = {i: set() for i in range(len(texts))}
    for i, j in combinations(range(len(texts)), 2):
        a, b = triples[i], triples[j]
        long = max(len(words[i]), len(words[j])) >= LONG
        if texts[i] == texts[j] or (long and Fraction(len(a & b), len(a | b)) >= Fraction(4, 5)):
            graph[i].add(j)
            graph[j].add(i)
    expected: list[int] = [-1] * len(texts)
    for start in graph:
        todo = [start]
        while todo:
            i = todo.pop()
            if expected[i] < 0:
                expected[i] = start
                todo += graph[i]
    found = components(*texts)
    assert 60 < len(set(expected)) < 250
    assert [[x == y for y in found] for x in found] == [[x == y for y in expected] for x in expected]


def test_components_depend_neither_on_the_order_of_prompts_nor_on_the_process() -> None:
    rng = random.Random(4)
    words = sentence(rng, 30)
    prompts = [Prompt(f"p{i}", " ".join(edited(rng, words, i % 4))) for i in range(60)]
    found = components_of(prompts)
    assert 1 < len(set(found.values())) < 50 and components_of(iter(prompts)) == found
    for _ in range(5):
        rng.shuffle(prompts)
        assert components_of(prompts) == found
    rows = [(prompt.prompt_id, prompt.text) for prompt in prompts]
    code = "import sys; from types import SimpleNamespace as P; from reward.splits import components_of; " + (
        f"print(sorted(components_of([P(prompt_id=a, text=b, cluster_id='') for a, b in {rows}]).items())); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(sorted(found.items()))


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize(("two_objects", "strobe"), [(0.0, 0.0), (1.0, 0.0), (0.5, 0.5)])
def test_the_built_in_world_keeps_every_caption_apart(split: str, two_objects: float, strobe: float) -> None:
    """Its captions differ by a word, and in that word by what is asked."""
    prompts = make_prompts(1000, seed=0, split=split, two_objects=two_objects, strobe=strobe)
    found = components_of([Prompt(prompt.prompt_id, prompt.text) for prompt in prompts])
    assert len(set(found.values())) == len({normalised(prompt.text) for prompt in prompts}) > 990
    assert max(len(prompt.text.split()) for prompt in prompts) < LONG


@pytest.mark.parametrize(("file", "together"), [("vbench.txt", 18), ("vbench_long.txt", 1)])
def test_real_prompts_do_not_chain(real_data: Path, file: str, together: int) -> None:
    """VBench asks for one long scene in 20 styles, of which 18 hang together; nothing else does."""
    texts = (real_data / "prompts" / file).read_text().splitlines()
    sizes = Counter(components(*texts))
    print(file, len(texts), "prompts,", len({normalised(text) for text in texts}), "texts,", len(sizes), "components, the largest of", max(sizes.values()))
    assert len(texts) == 946 and max(sizes.values()) == together and len(sizes) >= 926
    both = Counter(components(*texts, *(text + " Shot on film, 4k, highly detailed." for text in texts)))
    assert len(both) < 2 * len(sizes) and max(both.values()) <= 2 * together


@pytest.mark.timed
def test_thousands_of_prompts_are_split_in_a_moment() -> None:
    rng = random.Random(5)
    first = [" ".join(sentence(rng, rng.randint(15, 60))) for _ in range(1500)]
    copies = [" ".join(edited(rng, text.split(), 1)) for text in first]
    begun = time.process_time()
    found = components(*first, *copies)
    seconds = time.process_time() - begun
    variants = time.process_time()
    clique = components(*(" ".join(edited(rng, first[0].split() * 3, 1)) for _ in range(3000)))
    print(f"3,000 prompts {seconds:.2f} s, 3,000 variants of one {time.process_time() - variants:.2f} s")
    assert 1500 < len(set(found)) < 2400 and len(set(clique)) == 1
    assert seconds < 5


# Growing


def made_up_data(rng: random.Random) -> tuple[list[Prompt], list[Clip], list[RankingEvent]]:
    """120 prompts, some near copies, some in clusters; clips that share a first frame or a seed now and then."""
    long = [sentence(rng, 32) for _ in range(12)]
    texts = [" ".join(edited(rng, rng.choice(long), rng.randint(0, 3)) if rng.random() < 0.4 else sentence(rng, 3)) for _ in range(120)]
    prompts = [Prompt(f"p{i}", text, cluster_id=f"x{rng.randrange(8)}" if rng.random() < 0.1 else "") for i, text in enumerate(texts)]
    clips = [
        Clip(f"c{i}{k}", "", f"p{i}", generator="g", seed=rng.randrange(400), first_frame_hash=f"f{rng.randrange(30)}" if rng.random() < 0.06 else "")
        for i in range(120)
        for k in range(3)
    ]
    events = [RankingEvent(f"e{i}", "t", f"p{i}", "ann", tuple(f"c{i}{k}" for k in range(3)), (1, 2, 3)) for i in range(120)]
    return prompts, clips, events


@pytest.mark.parametrize("seed", range(20))
def test_however_data_come_nothing_moves_toward_the_test_and_components_only_join(seed: int) -> None:
    rng = random.Random(seed)
    prompts, clips, _ = made_up_data(rng)
    rng.shuffle(prompts)
    there: list[Prompt] = []
    split: dict[str, str] = {}
    component: dict[str, str] = {}
    moved = 0
    while prompts:
        for _ in range(min(len(prompts), rng.randint(1, 50))):
            there.append(prompts.pop())
        ids = {prompt.prompt_id for prompt in there}
        rng.shuffle(there)
        found = components_of(there, (), [clip for clip in clips if clip.prompt_id in ids], before=component, seed_families=rng.random() < 0.5)
        new = assign_splits(found, split, salt="s")
        assert all(SPLITS.index(new[key]) <= SPLITS.index(old) for key, old in split.items())
        moved += sum(new[key] != old for key, old in split.items())
        for name in set(component.values()):
            assert len({found[key] for key in component if component[key] == name}) == 1, "what was together stays together"
        assert len(set(zip(found.values(), new.values(), strict=False))) == len(set(found.values())), "a component is in one split"
        split, component = {key: new[key] for key in found}, found
    if seed == 0:
        assert moved, "the data never tied two splits together: the test tests nothing"


def test_a_folder_that_grows_keeps_its_splits_and_never_leaks(tmp_path: Path) -> None:
    rng = random.Random(9)
    prompts, clips, events = made_up_data(rng)
    order = list(range(120))
    rng.shuffle(order)
    before: dict[str, str] = {}
    together: dict[str, list[str]] = {}
    for start in range(0, 120, 30):
        rows = order[start : start + 30]
        write_comparisons(
            tmp_path, [events[i] for i in rows], clips=[clip for i in rows for clip in clips[3 * i : 3 * i + 3]], prompts=[prompts[i] for i in rows], seed_families=start == 0
        )
        data = load_comparisons(tmp_path)
        assert len(data.events) == start + 30 and all(SPLITS.index(data.split[key]) <= SPLITS.index(split) for key, split in before.items())
        assert all(data.component[a] == data.component[b] for a in together for b in together[a]), "a family found at the first writing holds"
        before = dict(data.split)
        together = {a: [b for b in data.component if data.component[b] == data.component[a]] for a in data.component}
    frames: dict[str, set[str]] = {}
    for clip in data.clips.values():
        frames.setdefault(clip.first_frame_hash, set()).add(data.split[clip.prompt_id])
    assert len(frames) > 5 and all(len(splits) == 1 for frame, splits in frames.items() if frame)


# Folds


def judged(seed: int = 0, **changes: Any) -> Comparisons:
    """300 answers of 6 people about pairs and triples of clips of three generators and, now and then, of an unknown one."""
    rng = random.Random(seed)
    prompts = {f"p{i}": Prompt(f"p{i}", f"number {i}") for i in range(80)}
    makers = ("wan", "ltx", "mochi", "")
    clips = {f"c{i}{k}": Clip(f"c{i}{k}", "", f"p{i}", generator=maker) for i in range(80) for k, maker in enumerate(makers)}
    events = []
    for n in range(300):
        i, k = rng.randrange(80), rng.sample((0, 1, 2) if rng.random() < 0.8 else (0, 1, 2, 3), rng.choice((2, 2, 3)))
        events.append(RankingEvent(f"e{n}", "t", f"p{i}", f"person{rng.randrange(6)}", tuple(f"c{i}{j}" for j in k), tuple(range(1, len(k) + 1))))
    component = components_of(prompts.values(), events, clips.values())
    data = Comparisons(tuple(events), clips, prompts, {}, assign_splits(component, {}, salt="s"), component)
    return replace(data, **changes)


@pytest.mark.parametrize("apart", [True, False])
def test_a_generator_left_out_is_seen_by_no_training_answer(apart: bool) -> None:
    data = judged()
    folds = list(leave_one_generator_out(data, apart=apart))
    assert [fold.name for fold in folds] == ["ltx", "mochi", "wan"]
    for name, train, held_out in folds:
        makers = [{data.clips[clip].generator for clip in event.clip_ids} for event in train]
        assert train and held_out and not any(name in some or "" in some for some in makers)
        assert all(name in {data.clips[clip].generator for clip in event.clip_ids} for event in held_out)
        assert {event.event_id for event in train}.isdisjoint(event.event_id for event in held_out)
        touching = [event for event in data.events if name in {data.clips[clip].generator for clip in event.clip_ids}]
        assert list(held_out) == [event for event in touching if not apart or data.split[event.prompt_id] == "test"]
        shared = {clip for event in train for clip in event.clip_ids} & {clip for event in held_out for clip in event.clip_ids}
        tied = {data.component[event.prompt_id] for event in train} & {data.component[event.prompt_id] for event in held_out}
        assert (not shared and not tied) if apart else tied


@pytest.mark.parametrize("folds", [None, 3])
@pytest.mark.parametrize("apart", [True, False])
def test_people_left_out_are_heard_by_no_training_answer(folds: int | None, apart: bool) -> None:
    data = judged()
    found = list(leave_annotators_out(data, folds=folds, apart=apart))
    held = [{event.annotator_id for event in fold.held_out} for fold in found]
    assert sum(map(len, held)) == len(set.union(*held)) == 6, "everybody is left out once"
    assert len(found) == 6 if folds is None else 1 < len(found) <= 3
    for fold, people in zip(found, held, strict=True):
        assert fold.train and people.isdisjoint(event.annotator_id for event in fold.train)
        tied = {data.component[event.prompt_id] for event in fold.train} & {data.component[event.prompt_id] for event in fold.held_out}
        assert not tied if apart else tied
        if not apart:
            assert len(fold.train) + len(fold.held_out) == len(data.events)


def test_groups_of_people_hold_when_others_join() -> None:
    data = judged()
    groups = {person: fold.name for fold in leave_annotators_out(data, folds=2, apart=False) for person in {event.annotator_id for event in fold.held_out}}
    more = replace(data, events=(*data.events, *(replace(data.events[0], event_id=f"n{i}", annotator_id=f"new{i}") for i in range(20))))
    after = {person: fold.name for fold in leave_annotators_out(more, folds=2, apart=False) for person in {event.annotator_id for event in fold.held_out}}
    assert len(after) == 26 and all(after[person] == name for person, name in groups.items())


def test_one_generator_or_one_person_cannot_be_left_out() -> None:
    data = judged()
    one = {key: replace(clip, generator="wan") for key, clip in data.clips.items()}
    with pytest.raises(UserError, match=r"1 generators \(wan\)"):
        next(leave_one_generator_out(replace(data, clips=one)))
    with pytest.raises(UserError, match="0 people"):
        next(leave_annotators_out(replace(data, events=())))
