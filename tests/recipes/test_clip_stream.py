"""Clips out of a stream: the very next example after any interruption, bad rows counted and passed over, no pixels kept."""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import IterableDataset
from datasets.utils.logging import disable_progress_bar

from align.state import flatten, unflatten
from base_model.errors import UserError
from base_model.video.files import LOCAL, decode_video, mp4_bytes
from recipes.clip_folder import Windows, cut_for
from recipes.clip_stream import ClipStream, Stream, open_rows, stream_of
from tests.recipes.small import small_model

MODEL = small_model()
CUT = cut_for(MODEL, Windows(frames=9))


def clip(seed: int, frames: int = 9) -> bytes:
    return mp4_bytes(torch.rand(frames, 3, 16, 24, generator=torch.Generator().manual_seed(seed)), 12.0, upscale=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of rows: 11 clips, one of them of four examples, and four rows that cannot be used."""
    disable_progress_bar()
    folder = tmp_path_factory.mktemp("parquet")
    odd: dict[tuple[int, int], tuple[bytes | None, str]] = {(0, 1): (b"", "empty"), (1, 0): (clip(90)[:-200], "cut off"), (1, 4): (clip(91), " "), (2, 2): (None, "nothing")}
    for f in range(3):
        rows = [odd.get((f, k), (clip(10 * f + k, 31 if (f, k) == (0, 3) else 9), f"clip {f}.{k}")) for k in range(5)]
        videos = pa.array([{"bytes": content, "path": f"{f}.{k}.mp4" if content is not None else None} for k, (content, _) in enumerate(rows)])
        pq.write_table(pa.table({"video": videos, "text": [text for _, text in rows]}), folder / f"{f}.parquet", row_group_size=2)
    return folder


def stream(files: Path, buffer: int = 4, seed: int = 0) -> ClipStream:
    return stream_of(Stream(path="parquet", files=str(files / "*.parquet"), buffer=buffer), MODEL, CUT, seed=seed)


def examples_of(source: ClipStream, number: int, at_once: int = 1) -> list[tuple[str, str, bytes, bytes]]:
    found = []
    while len(found) < number:
        some = source.take(at_once)
        assert [some.shapes[k] for k in range(len(some))] == [tuple(some.latent(k).shape) for k in range(len(some))]
        found += [(some.texts[k], some.sources[k], some.latent(k).numpy().tobytes(), some.cond(k).text.numpy().tobytes()) for k in range(len(some))]
    return found[:number]


def test_an_epoch_holds_every_example_of_every_usable_row_once_and_the_next_one_again(files: Path) -> None:
    source = stream(files)
    epochs = [Counter(example[:2] for example in examples_of(source, 14)) for _ in range(2)]
    assert epochs[0] == epochs[1] and epochs[0].total() == 14
    usable = [(f, k) for f in range(3) for k in range(5) if (f, k) not in ((0, 1), (1, 0), (1, 4), (2, 2))]
    assert epochs[0] == Counter({(f"clip {f}.{k}", f"{f}.{k}.mp4"): 4 if (f, k) == (0, 3) else 1 for f, k in usable})
    source.take(1)
    assert source.rows > 30 and source.dropped["no caption"] >= 2 and source.dropped["neither bytes nor a file"] >= 2
    assert len(source.dropped) == 4 and source.dropped["neither mp4 nor Matroska"] >= 2


def test_examples_are_what_the_model_makes_of_the_clip(files: Path) -> None:
    some = stream(files).take(14)
    row = some.texts.index("clip 2.1")
    frames = torch.from_numpy(decode_video(clip(21), "clip", LOCAL).frames).permute(0, 3, 1, 2)[None].float() / 255
    assert torch.equal(some.latent(row), MODEL.encode(frames)[0])
    cond, own = some.cond(row), MODEL.encode_text(["clip 2.1"])
    assert cond.prompts == own.prompts and torch.equal(cond.text, own.text) and torch.equal(cond.mask, own.mask)
    assert torch.equal(some.cond(None).text, MODEL.encode_text([""]).text)
    with pytest.raises(UserError, match="a stream keeps no pixels"):
        some.video(row)


@pytest.mark.parametrize("buffer", [1, 4, 100])
def test_after_any_example_a_killed_run_goes_on_with_the_very_next_one(buffer: int, files: Path) -> None:
    """At every place of an epoch and behind its end, in the middle of a buffer too; the counts go on as well. The state goes through a checkpoint's own form."""
    whole, states = stream(files, buffer), list[tuple[Any, int, Counter[str]]]()
    expected = []
    for _ in range(17):
        states.append((flatten(whole.state_dict()), whole.rows, whole.dropped.copy()))
        expected += examples_of(whole, 1)
    expected += examples_of(whole, 5)
    for place, (kept, *_) in enumerate(states):
        skeleton, tensors = kept
        again = stream(files, buffer)
        again.load_state_dict(unflatten(json.loads(json.dumps(skeleton)), tensors))
        assert examples_of(again, 5) == expected[place : place + 5], place
        if place + 5 < len(states):
            assert (again.rows, again.dropped) == states[place + 5][1:]


def test_how_many_are_taken_at_once_changes_nothing_and_the_seed_changes_the_order_alone(files: Path) -> None:
    one, three, other = examples_of(stream(files), 12), examples_of(stream(files), 12, at_once=3), examples_of(stream(files, seed=1), 14)
    assert one == three and other[:12] != one and Counter(other) == Counter(examples_of(stream(files), 14))


def test_examples_are_mixed_within_a_buffer(files: Path) -> None:
    straight = sorted(examples_of(stream(files, 100), 14), key=lambda example: example[1])
    assert examples_of(stream(files, 100), 14) != straight


def test_only_a_buffer_of_examples_is_held(files: Path) -> None:
    source = stream(files, 3)
    for _ in range(20):
        source.take(1)
        assert source._held is None or len(source._held) <= 3 + 3  # a row of four examples came last


def test_clips_lie_in_tar_files_and_folders_too(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for k in range(3):
            for suffix, content in (("mp4", clip(k)), ("txt", f"clip {k}".encode())):
                info = tarfile.TarInfo(f"{k}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    folder = tmp_path / "clips"
    folder.mkdir()
    for k in range(3):
        (folder / f"{k}.mp4").write_bytes(clip(k))
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{k}.mp4", "text": f"clip {k}"}) + "\n" for k in range(3)))
    tar_stream = Stream(path="webdataset", files=str(tmp_path / "a.tar"), video="mp4", text="txt", buffer=2)
    found = [
        sorted((text, bits) for text, _, bits, _ in examples_of(stream_of(each, MODEL, CUT, seed=0), 3)) for each in (tar_stream, Stream(path="videofolder", files=str(folder)))
    ]
    assert found[0] == found[1] and [text for text, _ in found[0]] == ["clip 0", "clip 1", "clip 2"]


def test_a_file_on_the_hub_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    asked: list[str] = []
    monkeypatch.setattr(fsspec, "open", lambda path, mode: asked.append(path) or io.BytesIO(clip(3)))
    source = from_rows([{"video": {"bytes": None, "path": "hf://datasets/a/b/c.mp4"}, "text": "clip"}])
    assert source.take(1).texts == ["clip"] and asked == ["hf://datasets/a/b/c.mp4"]


def from_rows(rows: list[dict[str, Any]], **told: Any) -> ClipStream:
    def make() -> Iterator[dict[str, Any]]:
        yield from rows

    return ClipStream(lambda: IterableDataset.from_generator(make), MODEL, CUT, **told)


def test_a_stream_without_anything_to_use_is_an_error_that_says_why() -> None:
    with pytest.raises(UserError, match=r"none of 2 rows of the stream can be used, stream: no caption"):
        from_rows([{"video": clip(0), "text": ""}, {"video": clip(0), "text": None}]).take(1)
    with pytest.raises(UserError, match="it has no rows"):
        from_rows([]).take(1)


def test_a_codec_that_makes_nan_is_no_fault_of_the_row() -> None:
    model = small_model()
    with torch.no_grad():
        model.codec.normaliser.mean.fill_(float("nan"))
    source = ClipStream(lambda: IterableDataset.from_generator(lambda: iter([{"video": clip(0), "text": "a"}])), model, CUT)
    with pytest.raises(UserError, match="nan or infinite"):
        source.take(1)


def test_a_stream_that_breaks_off_is_one_line() -> None:
    def broken() -> Iterator[dict[str, Any]]:
        yield {"video": clip(0), "text": "a"}
        raise ConnectionError("gone\naway")

    source = ClipStream(lambda: IterableDataset.from_generator(broken), MODEL, CUT, buffer=2)
    with pytest.raises(UserError, match="cannot read the stream behind row 1") as error:
        source.take(2)
    assert "\n" not in str(error.value)


def test_a_stream_that_does_not_come_back_to_where_it_was_is_refused() -> None:
    """Because rows changed, or because datasets' own shuffling forgets what was in its buffer."""
    rows = [{"video": clip(k), "text": f"clip {k}"} for k in range(8)]

    def shuffled() -> ClipStream:
        return ClipStream(lambda: IterableDataset.from_generator(lambda: iter(rows)).shuffle(seed=0, buffer_size=4), MODEL, CUT, buffer=3)

    for source, again in ((from_rows(rows, buffer=3), from_rows(rows[1:], buffer=3)), (shuffled(), shuffled())):
        source.take(4)
        again.load_state_dict(source.state_dict())
        with pytest.raises(UserError, match="does not come back to where the run was saved"):
            again.take(1)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ({"video": "movie"}, "no column 'movie'.*It has video, text"),
        ({"files": "none/*.parquet"}, "cannot open the stream parquet"),
        ({"path": "nobody/nothing"}, "cannot open the stream nobody/nothing"),
    ],
)
def test_a_stream_that_is_not_there_is_one_line(told: dict[str, str], says: str, files: Path) -> None:
    with pytest.raises(UserError, match=says) as error:
        open_rows(Stream(**{"path": "parquet", "files": str(files / "*.parquet"), **told}))
    assert "\n" not in str(error.value)


def test_processes_share_a_stream_by_its_files(files: Path) -> None:
    from datasets.distributed import split_dataset_by_node

    told = Stream(path="parquet", files=str(files / "*.parquet"))
    parts = [ClipStream(lambda rank=rank: split_dataset_by_node(open_rows(told), rank=rank, world_size=3), MODEL, CUT, buffer=4) for rank in range(3)]  # type: ignore[misc]
    numbers = (7, 3, 4)
    found = [examples_of(part, number) for part, number in zip(parts, numbers, strict=True)]
    assert Counter(example for some in found for example in some) == Counter(examples_of(stream(files), 14))
    assert np.sum(numbers) == 14
