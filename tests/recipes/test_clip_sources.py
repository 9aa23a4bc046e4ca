"""Sources of clips: everything that is there comes once, with what is told of it; what must not be opened is told and not opened."""

from __future__ import annotations

import http.server
import io
import json
import os
import random
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from base_model.errors import UserError
from recipes.clip_openers import AtAddress, Held, OnDisk, Within, on_disk
from recipes.clip_rows import Columns, Input, Keys, Source
from recipes.clip_sources import count, sources


def listed(place: Path | str, **given: Any) -> dict[str, Source]:
    found = list(sources(Input(str(place), **given)))
    assert len({source.id for source in found}) == len(found)
    return {source.id: source for source in found}


def content(source: Source) -> bytes:
    assert source.opener is not None
    with source.opener.open() as file:
        return file.read()


def lines(path: Path, *rows: Any) -> Path:
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.mp4", "b.mp4", "sub/c.webm", "sub/d.png", ".hidden.mp4", "e.xyz"):
        (folder / name).write_bytes(name.encode())
    (tmp_path / "outside.mp4").write_bytes(b"outside")
    return folder


def test_a_folder_without_texts_gives_every_clip_below_it(clips: Path) -> None:
    found = listed(clips)
    assert list(found) == ["a.mp4", "b.mp4", "sub/c.webm", "sub/d.png"]
    assert all(content(source) == name.encode() and not source.error and source.remarks == "no caption" for name, source in found.items())
    assert count(Input(str(clips))) == 4


def test_texts_beside_clips_are_their_captions(clips: Path) -> None:
    (clips / "a.txt").write_text("a cat\n")
    (clips / "sub" / "c.txt").write_bytes(b"caf\xe9")
    (clips / "b.txt").symlink_to(clips.parent / "secret.txt")
    (clips.parent / "secret.txt").write_text("secret")
    found = listed(clips)
    assert found["a.mp4"].text == "a cat" and found["sub/d.png"].text == ""
    assert found["sub/c.webm"].error == "the caption is not UTF-8" and found["sub/c.webm"].text == r"caf\udce9" and found["sub/c.webm"].opener is None
    assert "outside its folder" in found["b.mp4"].error and not found["b.mp4"].text


def test_tables_in_a_folder_name_clips_from_where_they_lie_and_others_are_told(clips: Path) -> None:
    lines(clips / "metadata.jsonl", {"file_name": "a.mp4", "text": "one", "license": "CC0", "source": "web", "shot": 3}, {"file_name": "sub/d.png", "caption": "two"})
    lines(clips / "sub" / "metadata.jsonl", {"file_name": "c.webm", "prompt": "three"})
    found = listed(clips)
    assert list(found) == ["a.mp4", "sub/d.png", "sub/c.webm", "b.mp4"]
    assert [found[name].text for name in found] == ["one", "two", "three", ""]
    assert (found["a.mp4"].licence, found["a.mp4"].source, found["a.mp4"].extra) == ("CC0", "web", {"shot": 3})
    assert found["b.mp4"].error == "not in metadata.jsonl" and content(found["sub/c.webm"]) == b"sub/c.webm"


def test_bad_rows_of_a_manifest_are_rows_with_an_error(clips: Path) -> None:
    (clips / "link.mp4").symlink_to(clips.parent / "outside.mp4")
    table = lines(
        clips / "pairs.jsonl",
        {"file_name": "a.mp4", "text": "one", "id": "x"},
        b'{"file_name": "b.mp4", ',
        {"text": "no clip"},
        {"file_name": "b.mp4", "text": "two", "id": "x"},
        b'{"file_name": "b.mp4", "text": "caf\xe9"}',
        {"file_name": "../outside.mp4", "text": "three"},
        {"file_name": "/etc/hostname", "text": "four"},
        {"file_name": "link.mp4", "text": "five"},
        {"url": "file:///etc/hostname", "text": "six"},
        {"url": "simplecache::file:///etc/hostname", "text": "seven"},
        {"file_name": "b.mp4", "text": ["a", "list"]},
        {"file_name": "b.mp4", "text": "\ud800 half a character"},
        {"file_name": "", "text": "eight"},
        {"file_name": "a" * 5000, "text": "nine"},
    )
    found = list(sources(Input(str(table))))
    assert [source.error.partition(" (")[0] for source in found] == [
        "",
        "not a JSON object",
        "no column for the clip",
        "the id 'x' stands in an earlier row",
        "the caption is not UTF-8",
        "'../outside.mp4' lies outside its folder",
        "'/etc/hostname' lies outside its folder",
        "'link.mp4' lies outside its folder",
        "'file:///etc/hostname' is an address that rows must not name",
        "'simplecache::file:///etc/hostname' is an address that rows must not name",
        "the caption is no text",
        "the caption is not UTF-8",
        "the row names no clip",
        f"no clip can be named {'a' * 5000!r}",
    ]
    assert all((source.opener is None) == bool(source.error) for source in found)
    assert len({source.id for source in found}) == len({source.key for source in found}) == len(found) == count(Input(str(table)))
    assert all(field.encode() is not None for source in found for field in (source.id, source.text, source.error, source.file))  # UTF-8, every one


def test_long_and_right_to_left_captions_are_kept_as_they_are(clips: Path) -> None:
    long, hebrew, tricky = "word " * 2000, "\u05d7\u05ea\u05d5\u05dc \u05e9\u05d7\u05d5\u05e8 1-2", "a \u202ecat\u202c \u200fok"
    table = lines(clips / "p.jsonl", {"path": "a.mp4", "text": long}, {"path": "b.mp4", "text": hebrew}, {"path": "sub/d.png", "text": tricky})
    found = list(sources(Input(str(table))))
    assert [source.text for source in found] == [long, hebrew, tricky] and len(long) == 10_000
    assert [source.remarks for source in found] == ["", "", "3 marks of writing direction in the caption"] and not any(source.error for source in found)


def test_nan_captions_of_a_csv_are_no_captions(clips: Path) -> None:
    (clips / "p.csv").write_text("video,caption,licence\na.mp4,NaN,\nb.mp4,a cat,CC0\n")
    one, two = sources(Input(str(clips / "p.csv")))
    assert (one.text, one.remarks, one.error, one.licence) == ("", "no caption", "", "") and (two.text, two.licence) == ("a cat", "CC0")


def test_columns_of_other_names_are_named_and_a_missing_one_is_told_at_once(clips: Path) -> None:
    (clips / "p.csv").write_text("clip,words\na.mp4,a cat\n")
    with pytest.raises(UserError, match=r"no column for the clip .*p\.csv\. It has clip, words: name one, --columns\.video NAME"):
        list(sources(Input(str(clips / "p.csv"))))
    (source,) = sources(Input(str(clips / "p.csv"), Columns(video="clip", text="words")))
    assert (source.text, content(source)) == ("a cat", b"a.mp4")


def test_names_begin_in_the_root_that_is_given(clips: Path, tmp_path: Path) -> None:
    table = lines(tmp_path / "p.jsonl", *({"file_name": str(name)} for name in ("a.mp4", clips / "b.mp4", tmp_path / "outside.mp4")))
    one, two, three = sources(Input(str(table), root=clips))
    assert content(one) == b"a.mp4" and content(two) == b"b.mp4" and "outside its folder" in three.error


def test_one_clip_may_have_several_captions_and_the_same_twice_is_told(clips: Path) -> None:
    table = lines(clips / "p.jsonl", *({"file_name": "a.mp4", "text": text} for text in ("one", "two", "one")))
    one, two, three = sources(Input(str(table)))
    assert not one.error and not two.error and three.error == "an earlier row has the same clip and caption"
    assert [source.text for source in sources(Input(str(table)))] == ["one", "two", "one"] and len({one.id, two.id, three.id}) == 3


def test_keys_change_with_a_row_or_its_file_and_not_with_a_link_to_it(clips: Path, tmp_path: Path) -> None:
    before = {name: source.key for name, source in listed(clips).items()}
    os.link(clips / "a.mp4", tmp_path / "linked.mp4")
    (clips / "b.mp4").write_bytes(b"other bytes")
    (clips / "sub" / "d.txt").write_text("a caption")
    after = {name: source.key for name, source in listed(clips).items()}
    assert {name for name in before if before[name] != after[name]} == {"b.mp4", "sub/d.png"}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def shard(path: Path, first: int = 0, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for k in range(first, first + 3):
            add(tar, f"d/{k:03d}.mp4", f"clip {k}".encode() * 100)
            add(tar, f"d/{k:03d}.txt", f"caption {k}".encode())
        add(tar, "d/j.json", json.dumps({"caption": "of json", "license": "CC0", "id": f"named-{first}", "n": 1}).encode())
        add(tar, "d/j.webm", b"j")
        add(tar, "d/bad.json", b"{")
        add(tar, "d/bad.mp4", b"x")
        add(tar, "d/alone.txt", b"no clip")
    return path


@pytest.mark.parametrize(("name", "mode"), [("s.tar", "w"), ("s.tar.gz", "w:gz")])
def test_members_of_a_tar_file_are_clips_with_the_texts_of_their_names(name: str, mode: str, tmp_path: Path) -> None:
    found = listed(shard(tmp_path / name, mode=mode))
    assert list(found) == [*(f"{name}::d/{k:03d}.mp4" for k in range(3)), "named-0", f"{name}::d/bad.mp4", f"{name}::d/alone"]
    assert [source.text for source in found.values()] == ["caption 0", "caption 1", "caption 2", "of json", "", ""]
    assert content(found[f"{name}::d/001.mp4"]) == b"clip 1" * 100 and content(found["named-0"]) == b"j"
    assert found["named-0"].licence == "CC0" and found["named-0"].extra == {"n": 1}
    assert found[f"{name}::d/bad.mp4"].error == "not a JSON object" and found[f"{name}::d/alone"].error == "no clip of that name in the tar file"
    assert {type(source.opener) for source in found.values() if source.opener} == {Within if name == "s.tar" else Held}


def test_a_truncated_tar_file_keeps_what_can_be_read_and_says_that_there_is_no_more(tmp_path: Path) -> None:
    whole = shard(tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[: 512 * 3 + 100])
    found = listed(tmp_path / "s.tar")
    assert "s.tar::d/000.mp4" in found and "cannot be read to its end" in found["s.tar::end"].error
    (tmp_path / "n.tar").write_bytes(b"no tar file")
    assert "cannot be read to its end" in listed(tmp_path / "n.tar")["n.tar::end"].error


def test_numbered_and_starred_shards_are_read_one_after_another(tmp_path: Path) -> None:
    shard(tmp_path / "s-00.tar"), shard(tmp_path / "s-01.tar", 3)
    texts = [source.text for source in listed(tmp_path / "s-{00..01}.tar").values()]
    assert texts == [source.text for source in listed(tmp_path / "s-*.tar").values()] == [source.text for source in listed(tmp_path).values()]
    assert texts[:3] == ["caption 0", "caption 1", "caption 2"] and "caption 5" in texts
    assert count(Input(str(tmp_path / "s-*.tar"))) == 12
    with pytest.raises(UserError, match="no file is called"):
        list(sources(Input(str(tmp_path / "t-*.tar"))))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = tmp_path / "www"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.func.log_message = lambda *_: None  # type: ignore[method-assign, assignment]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_tar_files_and_manifests_are_read_over_http(served: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = served
    shard(folder / "s.tar")
    found = listed(f"{address}/s.tar")
    assert content(found["s.tar::d/002.mp4"]) == b"clip 2" * 100 and found["named-0"].licence == "CC0"
    (folder / "a.mp4").write_bytes(b"over http")
    lines(folder / "p.jsonl", {"url": f"{address}/a.mp4", "text": "x"}, {"url": "a.mp4", "text": "y"}, {"url": f"{address}/none.mp4", "text": "z"}, {"url": "../a.mp4"})
    one, two, three, four = sources(Input(f"{address}/p.jsonl"))
    assert content(one) == content(two) == b"over http" and one.opener == AtAddress(f"{address}/a.mp4") and "outside its folder" in four.error
    assert three.opener is not None
    with pytest.raises(UserError, match=r"cannot be fetched: .*404"), on_disk(three.opener, tmp_path):
        pass
    with on_disk(one.opener, tmp_path) as path:
        assert path.read_bytes() == b"over http" and path.parent == tmp_path
    assert not path.exists()


def test_any_address_of_fsspec_is_a_folder_or_a_file() -> None:
    system = fsspec.filesystem("memory")
    for name, text in {"/set/a.mp4": b"a", "/set/a.txt": b"a cat", "/set/sub/b.mp4": b"b", "/tars/s.tar": b""}.items():
        system.pipe(name, text)
    found = listed("memory://set")
    assert [(source.text, content(source)) for source in found.values()] == [("a cat", b"a"), ("", b"b")]
    system.pipe("/set/metadata.jsonl", json.dumps({"file_name": "sub/b.mp4", "text": "b cat"}).encode())
    (source,) = sources(Input("memory://set"))
    assert source.text == "b cat" and content(source) == b"b" and count(Input("memory://set")) is None
    with pytest.raises(UserError, match="no clips, memory://nothing"):
        list(sources(Input("memory://nothing")))


def test_parquet_rows_may_hold_the_clips_themselves(tmp_path: Path) -> None:
    videos = [{"bytes": b"one", "path": "1.mp4"}, {"bytes": None, "path": "a.mp4"}, None]
    pq.write_table(pa.table({"video": videos, "text": ["x", "y", "z"]}), tmp_path / "p.parquet")
    (tmp_path / "a.mp4").write_bytes(b"beside")
    one, two, three = sources(Input(str(tmp_path / "p.parquet")))
    assert content(one) == b"one" and one.file == "1.mp4" and one.suffix == ".mp4" and content(two) == b"beside" and three.error == "the row names no clip"
    assert count(Input(str(tmp_path / "p.parquet"))) == 3


def test_a_saved_dataset_is_read_without_decoding(tmp_path: Path) -> None:
    from datasets import Dataset, Features, Value, Video

    features = Features({"video": Video(decode=False), "caption": Value("string"), "n": Value("int64")})
    Dataset.from_list([{"video": {"bytes": b"one", "path": "1.mp4"}, "caption": "x", "n": 1}], features=features).save_to_disk(str(tmp_path / "set"))
    (source,) = sources(Input(str(tmp_path / "set")))
    assert content(source) == b"one" and (source.text, source.extra) == ("x", {"n": 1})


def test_a_dataset_of_the_hub_is_streamed_by_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub is not reached: what `datasets` is asked for, and what becomes of its rows."""
    import datasets

    features = datasets.Features({"video": datasets.Video(), "caption": datasets.Value("string"), "license": datasets.Value("string")})
    rows = [{"video": {"bytes": b"one", "path": "1.mp4"}, "caption": "x", "license": "CC0"}, {"video": {"bytes": b"two", "path": None}, "caption": "y", "license": None}]
    asked: list[tuple[str, dict[str, Any]]] = []

    def load(path: str, **how: Any) -> Any:
        asked.append((path, how))
        return datasets.IterableDataset.from_generator(lambda: iter(rows), features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    one, two = sources(Input("people/clips", split="test"))
    assert content(one) == b"one" and (one.text, one.licence, one.source) == ("x", "CC0", "people/clips") and content(two) == b"two" and two.text == "y"
    ((path, how),) = asked
    assert path == "people/clips" and how["split"] == "test" and how["streaming"] is True and count(Input("people/clips")) is None


def test_what_is_nothing_of_a_known_kind_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for place, told in ((tmp_path / "notes.txt", "nothing here can be read"), (tmp_path / "none.jsonl", "cannot read"), (tmp_path / "no" / "such" / "place", "nothing here")):
        with pytest.raises(UserError, match=told):
            list(sources(Input(str(place))))
    with pytest.raises(UserError, match=r"neither a file or folder here nor a dataset, clipz: .*\. Check the path; for a dataset on the hub set HF_HUB_OFFLINE=0"):
        list(sources(Input("clipz")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no clips"):
        list(sources(Input(str(tmp_path / "empty"))))


def test_a_clip_in_hand_is_never_copied(clips: Path, tmp_path: Path) -> None:
    with on_disk(OnDisk(clips / "a.mp4"), tmp_path) as path:
        assert path == clips / "a.mp4"
    assert path.exists()


def test_a_set_of_keys_holds_what_a_set_holds() -> None:
    chosen, keys, plain = random.Random(0), Keys(4), set[int]()
    for _ in range(5000):
        key = chosen.choice((chosen.getrandbits(64) | 1, chosen.randrange(1, 500)))
        assert keys.add(key) == (key not in plain)
        plain.add(key)
    assert len(keys) == len(plain) and all(key in keys for key in plain)
    assert not any(key in keys for key in (chosen.getrandbits(64) | 1 for _ in range(1000)) if key not in plain)
