"""Which prompts stay together, and what is held out: train, val and test that do not leak.

Two prompts *hang together* where they share

    normalised text | a cluster id | a clip | a first frame | their seed family, if asked | a component they were in before | nearly the same text

and a component, all that hangs together directly or through others, goes whole to one split by a hash of its name. Whether two prompts hang together depends on
these two alone, never on what else there is, so components only ever grow together, in whatever order data come. A component that has a split keeps it; where data tie
two of different splits together, see `assign_splits`.

*Nearly the same text*: the Jaccard resemblance of their sets of word triples (Broder 1997) is at least 4/5, and the longer one has at least `LONG` words. So a long prompt
with a word exchanged (from 29 words on), or with three words appended (from 22), stays with its original. In short prompts one word is the difference between two
prompts: "a red circle moves left" is not "a blue circle moves left". They hang together where they are the same up to case, punctuation and spaces. Give prompts a
`cluster_id` where you know better.

The pairs are found exactly, by prefix filtering (Chaudhuri et al. 2006; Bayardo et al. 2007): sets that resemble each other share one of their few rarest triples.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from base_model.errors import UserError

if TYPE_CHECKING:
    from reward.comparisons import Clip, Comparisons, Prompt, RankingEvent

SPLITS = ("train", "val", "test")
LONG = 22  # words
_SIGNS = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"  # Thai, Lao, Burmese, Khmer, Japanese and Chinese write without spaces: each sign is a word
_WORD = re.compile(rf"[{_SIGNS}]|[^\s{_SIGNS}]+")  # of a normalised text
_LONE_MARK = re.compile(r"(?<=\s)[\u0300-\u036f]+")  # an accent by itself, which NFKC puts behind a space
_SAME = {**dict.fromkeys(range(0xFE00, 0xFE10)), ord("´"): "'"}  # variants of one sign, a heart in black or in colour; an accent typed for an apostrophe


# Components


def components_of(
    prompts: Iterable[Prompt],
    events: Iterable[RankingEvent] = (),
    clips: Iterable[Clip] = (),
    *,
    before: Mapping[str, str] | None = None,
    seed_families: bool = False,
) -> dict[str, str]:
    """prompt_id -> component (see the top of this file).

    A component is named by the smallest hash of its members' normalised texts, so the name survives new wordings of the same text.

    before: components of an earlier call; what was together stays together.
    seed_families: clips of one generator, revision and seed start from the same noise, whatever their prompts, and often share layout and colours; with this their prompts
    hang together (a clip of unknown generator has no family). Right where prompts have seeds of their own, or a few share them. Wrong where every prompt was sampled with
    the seeds 0 to 3: all would be one component, and nothing left to hold out.
    """
    prompts = list(prompts)
    texts = {prompt.prompt_id: normalised(prompt.text) for prompt in prompts}
    sets = _DisjointSets()
    for prompt in prompts:
        sets.join(("prompt", prompt.prompt_id), ("text", texts[prompt.prompt_id]))
        if prompt.cluster_id:
            sets.join(("prompt", prompt.prompt_id), ("cluster", prompt.cluster_id))
    for event in events:
        for clip_id in event.clip_ids:
            sets.join(("prompt", event.prompt_id), ("clip", clip_id))
    for clip in clips:
        sets.join(("prompt", clip.prompt_id), ("clip", clip.clip_id))
        if clip.first_frame_hash:
            sets.join(("prompt", clip.prompt_id), ("frame", clip.first_frame_hash))
        if seed_families and clip.generator:
            sets.join(("prompt", clip.prompt_id), ("seed", clip.generator, clip.generator_rev, str(clip.seed)))
    for prompt_id, component in (before or {}).items():
        sets.join(("prompt", prompt_id), ("before", component))
    _join_near_duplicates(sets, set(texts.values()))
    name: dict[tuple[str, ...], str] = {}
    for prompt_id, text in texts.items():
        root = sets.find(("prompt", prompt_id))
        name[root] = min(name.get(root, "g"), _digest(text))  # "g" comes after every hexadecimal digit
    return {prompt_id: name[sets.find(("prompt", prompt_id))] for prompt_id in texts}


def assign_splits(components: Mapping[str, str], previous: Mapping[str, str], *, salt: str, shares: tuple[float, float, float] = (0.6, 0.15, 0.25)) -> dict[str, str]:
    """prompt_id -> split. A component's split is decided by hash(component, salt) once and kept when data grow.

    Where new data tie together components of different splits, the whole goes to train if any part ever was there (moving it to val or test
    would leak what was trained on), else to val. Raises ValueError where the shares do not sum to one.
    """
    if abs(sum(shares) - 1) > 1e-9 or min(shares) < 0:
        raise ValueError(f"shares of train, val and test must be >= 0 and sum to 1, got {shares}")
    earlier: dict[str, set[str]] = {}
    for prompt_id, component in components.items():
        if previous.get(prompt_id):
            earlier.setdefault(component, set()).add(previous[prompt_id])
    decided = {component: min(splits, key=SPLITS.index) for component, splits in earlier.items()}
    for component in set(components.values()) - set(decided):
        place = int(_digest(f"{salt}/{component}")[:13], 16) / 16**13  # uniform in [0,1)
        decided[component] = "train" if place < shares[0] else "val" if place < shares[0] + shares[1] else "test"
    return {prompt_id: decided[component] for prompt_id, component in components.items()}


def normalised(text: str) -> str:
    """Case, accents' encoding, punctuation and spaces do not make a prompt another one; vowel signs (Hindi, Thai), emoji and arrows do."""
    plain = _LONE_MARK.sub(" ", unicodedata.normalize("NFKC", text.translate(_SAME)).casefold())
    return " ".join("".join(sign if _of_a_word(sign) else " " for sign in plain).split())


# Leaving out


class Fold(NamedTuple):
    """What to learn from and what to test on; together they need not be all answers."""

    name: str  # who is left out
    train: tuple[RankingEvent, ...]
    held_out: tuple[RankingEvent, ...]


def leave_one_generator_out(data: Comparisons, *, apart: bool = True) -> Iterator[Fold]:
    """One fold a generator, by name: held out is every answer that ranks *any* of its clips, and training sees none of them.

    So a fold asks what a newcomer would: how well are its clips ranked, among themselves and against the known ones? An answer with a clip of unknown generator is in no
    training part (it could be the one left out) and held out only with a known one.

    apart: training is from the splits train and val, what is held out from test; then no clip, no prompt and no component of prompts is in both. Without it all answers
    are used, and clips of other generators that met the one left out can be in both.

    Raises UserError where the clips name fewer than two generators.
    """
    of = {clip.clip_id: clip.generator for clip in data.clips.values()}
    names = sorted(set(of.values()) - {""})
    if len(names) < 2:
        raise UserError(f"the clips name {len(names)} generators ({', '.join(names)}); leaving one out takes two. Fill the column generator of clips.parquet")
    for name in names:
        yield _fold(data, name, lambda event: {of[clip_id] for clip_id in event.clip_ids}, {name}, never={""}, apart=apart)


def leave_annotators_out(data: Comparisons, *, folds: int | None = None, apart: bool = True) -> Iterator[Fold]:
    """One fold a person, whose answers are held out; training sees those of all others.

    folds: this many groups of people instead, dealt by a hash of their ids; a group is left out together, and a person stays in the same group when others join.
    Empty groups give no fold. apart: as in `leave_one_generator_out`; without it the same clips can be in both, judged by other people: does the model know these people's
    taste, or only these clips?

    Raises UserError where fewer than two people (or groups) answered.
    """
    groups: dict[str, set[str]] = defaultdict(set)
    for person in sorted({event.annotator_id for event in data.events}):
        groups[person if folds is None else f"group {int(_digest(person)[:13], 16) % folds}"].add(person)
    if len(groups) < 2:
        raise UserError(f"{len(groups)} people (or groups of people) answered; leaving one out takes two. Collect answers of more people")
    for name in sorted(groups):
        yield _fold(data, name, lambda event: {event.annotator_id}, groups[name], never=set(), apart=apart)


def _fold(data: Comparisons, name: str, of: Callable[[RankingEvent], set[str]], out: Collection[str], *, never: Collection[str], apart: bool) -> Fold:
    """`of` names whom an answer touches; who is in `out` is held out, who is in `never` is not learned from either."""
    train, held_out = [], []
    for event in data.events:
        touched, tested = of(event), data.split[event.prompt_id] == "test"
        if not touched.isdisjoint(out):
            if tested or not apart:
                held_out.append(event)
        elif touched.isdisjoint(never) and not (tested and apart):
            train.append(event)
    return Fold(name, tuple(train), tuple(held_out))


# Parts


def _join_near_duplicates(sets: _DisjointSets, texts: Collection[str]) -> None:
    """Joins ("text", a) and ("text", b) wherever the normalised texts a and b are nearly the same.

    Two sets of sizes n >= m that share s elements resemble each other by s / (n + m - s) >= 4/5 only if s >= 4/5 n. With the elements in any order that is common to
    all, they then share one of the first n - ceil(4/5 n) + 1 of each. Rarest first, few others do. Texts that are joined already are not compared, so thousands of
    variants of one text cost little.
    """
    words = {text: _WORD.findall(text) for text in texts}
    triples = {text: {tuple(found[i : i + 3]) for i in range(max(1, len(found) - 2))} for text, found in words.items()}
    number = Counter(triple for found in triples.values() for triple in found)
    holders: dict[tuple[str, ...], dict[tuple[str, ...], list[str]]] = defaultdict(lambda: defaultdict(list))  # triple -> {set of texts: its members}
    for text in sorted(texts, key=lambda text: (len(words[text]), text)):
        mine = triples[text]
        prefix = sorted(mine, key=lambda triple: (number[triple], triple))[: len(mine) - -(-4 * len(mine) // 5) + 1]
        if len(words[text]) >= LONG:
            for triple in prefix:
                for root, others in holders[triple].items():
                    if sets.find(root) != sets.find(("text", text)) and any(_resemble(mine, triples[other]) for other in others):
                        sets.join(("text", text), root)
        for triple in prefix:
            holders[triple][sets.find(("text", text))].append(text)


def _of_a_word(sign: str) -> bool:
    """Letters, marks, numbers, emoji and arrows; other symbols (+ ~ °) are taken for punctuation."""
    kind = unicodedata.category(sign)
    return sign == "_" or kind[0] in "LMN" or (kind == "So" and sign >= "\u2000") or "\u2190" <= sign <= "\u21ff"


def _resemble(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> bool:
    if 5 * min(len(a), len(b)) < 4 * max(len(a), len(b)):
        return False
    shared = len(a & b)
    return 5 * shared >= 4 * (len(a) + len(b) - shared)


class _DisjointSets:
    """Union-find with path halving."""

    def __init__(self) -> None:
        self._parent: dict[tuple[str, ...], tuple[str, ...]] = {}

    def find(self, x: tuple[str, ...]) -> tuple[str, ...]:
        parent = self._parent
        parent.setdefault(x, x)
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    def join(self, x: tuple[str, ...], y: tuple[str, ...]) -> None:
        self._parent[self.find(x)] = self.find(y)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
