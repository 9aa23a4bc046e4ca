"""The cache of features: encodes once, tells apart what differs, and loses nothing to other processes, kills, a full disk or damage."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from base_model import checkpoint
from base_model.errors import UserError
from reward.cache import FeatureCache, clip_tokens, feature_key, text_features
from reward.encoders import Encoder, Sampler, load_encoder
from tests.reward import tiny_encoders as tiny

ROOT = Path(__file__).parents[2]


def keys(*names: str) -> list[str]:
    return [feature_key("clip", name, "e@1", Sampler(8, 12.0), "float32") for name in names]


class Maker:
    """Makes [3] of a row, and notes which rows it was asked for."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, row: int) -> Tensor:
        self.rows.append(row)
        return torch.full((3,), float(row))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


# With encoders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("clip", tmp_path_factory.mktemp("encoder") / "clip")


def load(clip_id: str) -> Tensor:
    return torch.rand(5, 3, 32, 40, generator=torch.Generator().manual_seed(int(clip_id)))


def counted(encoder: Encoder) -> list[str]:
    calls: list[str] = []
    network = encoder.network
    network.vision_model.register_forward_hook(lambda *_: calls.append("clip"))  # type: ignore[union-attr]
    network.text_model.register_forward_hook(lambda *_: calls.append("text"))  # type: ignore[union-attr]
    return calls


def test_a_second_epoch_encodes_nothing_and_sees_the_same_bits(folder: Path, tmp_path: Path) -> None:
    encoder = load_encoder(folder, fps=12.0)
    calls, ids, prompts = counted(encoder), [str(i) for i in range(20)], ["a red circle", "a blue bar", "a red circle"]
    plain, plain_text = clip_tokens(encoder, ids, load, None), text_features(encoder, prompts, None)
    calls.clear()
    cache = FeatureCache(tmp_path / "cache")
    first, text = clip_tokens(encoder, ids, load, cache), text_features(encoder, prompts, cache)
    assert (calls.count("clip"), calls.count("text")) == (20, 2) and (cache.hits, cache.misses) == (0, 22)
    calls.clear()

    def forbidden(clip_id: str) -> Tensor:
        raise AssertionError("it is kept: no frames are needed")

    for again in (cache, FeatureCache(tmp_path / "cache")):
        assert torch.equal(clip_tokens(encoder, ids[::-1], forbidden, again), first.flip(0)) and torch.equal(text_features(encoder, prompts, again), text)
    assert calls == [] and (cache.hits, cache.misses) == (22, 22)
    assert torch.equal(first, plain) and torch.equal(text, plain_text) and first.dtype == torch.float32


def test_another_revision_sampler_rate_dtype_or_content_misses(folder: Path, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache")
    other = tiny.save("clip", tmp_path / "other")
    (other / "preprocessor_config.json").write_text((other / "preprocessor_config.json").read_text().replace("0.48", "0.49"))
    variants = [
        load_encoder(folder, fps=12.0),
        load_encoder(folder, fps=8.0),
        load_encoder(folder, fps=12.0, frames=3),
        load_encoder(folder, fps=12.0, dtype="float16"),
        load_encoder(other, fps=12.0),
    ]
    for n, encoder in enumerate(variants):
        tokens = clip_tokens(encoder, ["1"], load, cache)
        assert cache.misses == n + 1 and tokens.dtype == getattr(torch, encoder.dtype)
    assert torch.equal(clip_tokens(variants[3], ["1"], load, cache), clip_tokens(variants[0], ["1"], load, cache).half()) and cache.misses == len(variants)
    same = tiny.save("clip", tmp_path / "elsewhere")
    clip_tokens(load_encoder(same, fps=12.0), ["1"], load, cache)
    assert cache.misses == len(variants), "the same files in another place are the same encoder"
    clip_tokens(variants[0], ["2"], load, cache)
    assert cache.misses == len(variants) + 1


def test_a_text_and_a_clip_of_one_name_are_told_apart() -> None:
    given: list[tuple[str, str, str, Sampler | None, str]] = [
        ("clip", "a", "e", Sampler(8, 12.0), "float32"),
        ("text", "a", "e", None, "float32"),
        ("clip", "a", "e", None, "float32"),
        ("clip", "b", "e", Sampler(8, 12.0), "float32"),
        ("clip", "a", "f", Sampler(8, 12.0), "float32"),
        ("clip", "a", "e", Sampler(8, 12.5), "float32"),
        ("clip", "a", "e", Sampler(9, 12.0), "float32"),
        ("clip", "a", "e", Sampler(8, 12.0), "float16"),
        ("text", "ä 🎲", "e", None, "float32"),
    ]
    assert len({feature_key(*each) for each in given}) == len(given)


# By itself


def test_only_what_is_missing_is_made_once_and_in_order(tmp_path: Path) -> None:
    cache, make = FeatureCache(tmp_path / "c"), Maker()
    wanted = keys("a", "b", "a", "c")
    assert cache.fetch(wanted, make, together=2).tolist() == [[0.0] * 3, [1.0] * 3, [0.0] * 3, [3.0] * 3]
    assert make.rows == [0, 1, 3] and len(files(tmp_path / "c")) == 2 and (cache.hits, cache.misses) == (0, 3)
    assert cache.fetch(keys("d", "c"), make).tolist() == [[0.0] * 3, [3.0] * 3] and make.rows == [0, 1, 3, 0] and (cache.hits, cache.misses) == (1, 4)
    for path in files(tmp_path / "c"):
        assert path.stem == hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_another_process_wrote_is_found_without_opening_again(tmp_path: Path) -> None:
    first, second, make = FeatureCache(tmp_path), FeatureCache(tmp_path), Maker()
    first.fetch(keys("a", "b"), make)
    assert second.fetch(keys("b"), make).tolist() == [[1.0] * 3] and make.rows == [0, 1] and second.hits == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "pickle", "header"])
def test_a_damaged_file_is_noticed_deleted_and_made_again(tmp_path: Path, damage: str) -> None:
    FeatureCache(tmp_path).fetch(keys("a", "b"), Maker())
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-1] ^= 1
    elif damage == "header":
        content[20] ^= 255
    elif damage == "pickle":
        content = bytearray(b"\x80\x04.")
    path.write_bytes(content[: {"cut": -4, "empty": 0}.get(damage, len(content))])
    cache, make = FeatureCache(tmp_path), Maker()
    assert cache.fetch(keys("b", "x"), make).tolist() == [[0.0] * 3, [1.0] * 3]
    assert make.rows == [0, 1] and (cache.hits, cache.misses, cache.damaged) == (0, 2, 1) and not path.exists()
    assert FeatureCache(tmp_path).fetch(keys("b", "x"), Maker()).tolist() == [[0.0] * 3, [1.0] * 3]


@pytest.mark.parametrize(("damaged", "made"), [("one", []), ("two", [1])])
def test_a_copy_in_another_file_serves_where_one_is_damaged(tmp_path: Path, damaged: str, made: list[int]) -> None:
    FeatureCache(tmp_path / "one").fetch(keys("a"), Maker())
    FeatureCache(tmp_path / "two").fetch(keys("a", "b"), Maker())
    for name in ("one", "two"):
        (path,) = files(tmp_path / name)
        content = path.read_bytes()
        (tmp_path / path.name).write_bytes(content[:-1] + b"\xff" if name == damaged else content)
    make = Maker()
    assert FeatureCache(tmp_path).fetch(keys("a", "b"), make).tolist() == [[0.0] * 3, [1.0] * 3] and make.rows == made


def test_files_of_other_names_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not mine")
    cache = FeatureCache(tmp_path)
    cache.fetch(keys("a"), Maker())
    FeatureCache(tmp_path).fetch(keys("a"), Maker())
    assert (tmp_path / "model.safetensors").read_bytes() == b"not mine" and cache.damaged == 0


def test_a_file_that_goes_away_is_made_again(tmp_path: Path) -> None:
    cache, make = FeatureCache(tmp_path), Maker()
    cache.fetch(keys("a"), make)
    files(tmp_path)[0].unlink()
    assert cache.fetch(keys("a"), make).tolist() == [[0.0] * 3] and make.rows == [0, 0]


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, make = FeatureCache(tmp_path), Maker()
    write = checkpoint.write_synced

    def full(path: Path, content: bytes) -> None:
        if len(files(tmp_path)) == 2:
            write(path, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, content)

    monkeypatch.setattr(checkpoint, "write_synced", full)
    with pytest.raises(UserError, match="the disk is full") as error:
        cache.fetch(keys(*"abcdef"), make, together=2)
    assert "\n" not in str(error.value) and sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in files(tmp_path)]
    monkeypatch.undo()
    make.rows.clear()
    assert cache.fetch(keys(*"abcdef"), make).tolist() == [[float(i)] * 3 for i in range(6)] and make.rows == [4, 5]


def test_a_place_that_cannot_be_written_is_known_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, not a folder"):
        FeatureCache(tmp_path / "file" / "cache")


WRITER = """
import sys, time, torch
from pathlib import Path
from reward.cache import FeatureCache, feature_key
folder, first, last, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
keys = [feature_key("clip", str(i), "e@1", None, "float32") for i in range(first, last)]
def make(row):
    time.sleep(pause)
    return torch.full((3,), float(first + row))
FeatureCache(folder).fetch(keys, make, together=4)
"""


def writer(folder: Path, first: int, last: int, pause: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(first), str(last), str(pause)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(condition: Callable[[], bool]) -> None:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < 120, "it never came"
        time.sleep(0.01)


def values(cache: FeatureCache, numbers: Sequence[int]) -> list[float]:
    def unknown(row: int) -> Tensor:
        return torch.full((3,), -1.0)

    return cache.fetch([feature_key("clip", str(i), "e@1", None, "float32") for i in numbers], unknown)[:, 0].tolist()


def test_two_processes_write_at_once_and_a_third_is_killed(tmp_path: Path) -> None:
    both = [writer(tmp_path, 0, 40, 0.0), writer(tmp_path, 20, 60, 0.0)]
    killed = writer(tmp_path, 100, 2000, 0.02)
    try:
        assert [process.wait(timeout=120) for process in both] == [0, 0]
        wait_for(lambda: len(files(tmp_path)) >= 15 + 2)  # 60 features by fours, and two more files
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    cache = FeatureCache(tmp_path)
    assert values(cache, range(60)) == list(range(60)) and cache.misses == 0 and cache.damaged == 0
    found = values(cache, range(100, 2000))
    kept = sum(value >= 0 for value in found)
    assert found[:kept] == list(range(100, 100 + kept)) and 4 <= kept < 1900, "what was written before the kill is there and right"
