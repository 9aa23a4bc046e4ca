"""Crafted files, offered wherever something is loaded: no code of theirs is run, nobody is called, and what would fill memory or time is refused before it does."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from base_model.errors import UserError
from base_model.stages import load_frames, load_stage
from base_model.tiny import load_codec, load_tiny
from base_model.video.files import read_video, write_lossless
from recipes.pairs import load_pairs
from recipes.shapes.eye import Eye
from reward.encoders import load_encoder
from reward.importers.tables import columns, typed_rows
from reward.matcher import load_matcher
from reward.model import load_reward_model
from reward.pooled import load_pooled
from reward.quality import load_quality
from reward.vlm.files import load_vlm_reward
from reward.vlm.model import load_base
from tests.reward import tiny_encoders
from tests.reward.vlm.tiny import save_tiny

ROOT = Path(__file__).parents[1]


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.path),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def pickles(canary: Path, folder: Path) -> dict[str, bytes]:
    """Files that make the canary when they are opened, in every form that weights have had."""
    bomb, zipped, old = Touch(canary), folder / "zip", folder / "old"
    torch.save({"weight": bomb}, zipped)
    torch.save({"weight": bomb}, old, _use_new_zipfile_serialization=False)
    return {"pickle": pickle.dumps({"weight": bomb}), "torch": zipped.read_bytes(), "torch before 1.6": old.read_bytes(), "protocol 0": pickle.dumps(bomb, protocol=0)}


def test_the_canary_sings(canary: Path, tmp_path: Path) -> None:
    for content in list(pickles(canary, tmp_path).values())[::3]:
        pickle.loads(content)
        canary.unlink()
    torch.load(tmp_path / "zip", weights_only=False)
    assert canary.exists()


CARD = {"sha256": "x", "dims": ["overall"], "tier": "vlm"}
FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "base model": ("w.safetensors", lambda folder: load_tiny(folder / "w.safetensors")),
    "codec": ("w.safetensors", lambda folder: load_codec(folder / "w.safetensors")),
    "frame model": ("w.safetensors", lambda folder: load_frames(folder / "w.safetensors")),
    "upsampler": ("w.safetensors", lambda folder: load_stage(folder / "w.safetensors")),
    "matcher": ("w.safetensors", lambda folder: load_matcher(folder / "w.safetensors")),
    "quality": ("w.safetensors", lambda folder: load_quality(folder / "w.safetensors")),
    "eye": ("w.safetensors", lambda folder: Eye.load(folder / "w.safetensors")),
    "reward model": ("reward_model.safetensors", lambda folder: load_reward_model(folder, lambda prompts: None)),  # type: ignore[arg-type, return-value]
    "pooled reward": ("reward_model.safetensors", lambda folder: load_pooled(folder, fps=12.0)),
    "vision-language adapter": ("vlm_reward.safetensors", lambda folder: load_vlm_reward(folder, clip_fps=12.0)),
    "pairs": ("videos.safetensors", load_pairs),
}


@pytest.mark.parametrize("what", FILES)
def test_no_pickle_is_opened_wherever_weights_are_loaded(what: str, canary: Path, tmp_path: Path) -> None:
    name, load = FILES[what]
    for form, content in pickles(canary, tmp_path).items():
        folder = tmp_path / form
        folder.mkdir()
        (folder / name).write_bytes(content)
        (folder / "reward_card.json").write_text(json.dumps(CARD))
        with pytest.raises(UserError) as error:
            load(folder)
        assert "pickle" in str(error.value) or "not a safetensors file" in str(error.value)
        assert not canary.exists()


def poisoned(folder: Path, canary: Path, forms: Path) -> list[Path]:
    """The published model in `folder`, its weights replaced by a pickle of each form and under each name that loaders know."""
    made = []
    for form, content in pickles(canary, forms).items():
        for name in ("model.safetensors", "pytorch_model.bin", "model.pth"):
            copy = forms / f"{form}-{name}"
            shutil.copytree(folder, copy)
            (copy / "model.safetensors").unlink()
            (copy / name).write_bytes(content)
            made.append(copy)
    return made


def test_no_pickle_is_opened_of_a_published_model(canary: Path, tmp_path: Path) -> None:
    encoder, base = tiny_encoders.save("clip", tmp_path / "clip"), save_tiny(tmp_path / "base", "qwen2_vl")
    for kind, folder, load in (("e", encoder, lambda path: load_encoder(path, fps=12.0)), ("b", base, load_base)):
        (tmp_path / kind).mkdir()
        for copy in poisoned(folder, canary, tmp_path / kind):
            with pytest.raises(UserError) as error:
                load(copy)
            assert "\n" not in str(error.value) and not canary.exists()


def test_code_that_a_model_brings_along_is_not_run(canary: Path, tmp_path: Path) -> None:
    encoder, base = tiny_encoders.save("clip", tmp_path / "clip"), save_tiny(tmp_path / "base", "qwen2_vl")
    for folder, load in ((encoder, lambda path: load_encoder(path, fps=12.0)), (base, load_base)):
        load(folder)
        (folder / "modeling_own.py").write_text(f"import os\nos.mknod({str(canary)!r})\nclass Own: ...\n")
        for name in ("config.json", "tokenizer_config.json"):
            if not (folder / name).exists():
                continue
            before = (folder / name).read_text()
            for key in ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoModelForImageTextToText"):
                (folder / name).write_text(json.dumps(json.loads(before) | {"auto_map": {key: "modeling_own.Own"}}))
                with pytest.raises(UserError, match="auto_map"):
                    load(folder)
            (folder / name).write_text(before)
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path), "peft_type": "LORA"}))
        with pytest.raises(UserError, match="adapter"):
            load(folder)
        assert not canary.exists()


def test_transformers_is_told_to_run_no_code_of_a_model_under_a_hub_id_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    told: dict[str, Any] = {}
    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForImageTextToText"):
        before = getattr(transformers, name).from_pretrained

        def asked(*given: Any, name: str = name, plain: Any = before, **words: Any) -> Any:
            told.setdefault(name, words.get("trust_remote_code"))
            return plain(*given, **words)

        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", asked)
    load_base(save_tiny(tmp_path / "base", "qwen2_vl"))
    assert list(told.values()) == [False] * 3


def in_a_child(script: str, *words: object, **environment: str) -> list[dict[str, Any]]:
    """JSON lines that a process of its own writes."""
    command, around = [sys.executable, "-c", textwrap.dedent(script), *map(str, words)], os.environ | {"PYTHONPATH": str(ROOT)} | environment
    told = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=around, timeout=300)
    assert told.returncode == 0, told.stderr[-2000:]
    return [json.loads(line) for line in told.stdout.splitlines() if line.startswith("{")]


UNPLUGGED = """
    import json, socket, sys
    from pathlib import Path

    called = []

    def refused(*given, **words):
        called.append(str(given)[:200])
        raise OSError("no network here")

    socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refused
    from base_model.tiny import load_tiny
    from reward.encoders import load_encoder
    from reward.vlm.model import load_base

    load_tiny().encode_text(["a red circle"])
    load_encoder(Path(sys.argv[1]), fps=12.0)
    load_base(Path(sys.argv[2]))
    print(json.dumps({"called": called}))
"""


def test_loading_what_is_here_calls_nobody_even_where_the_hub_may_be_asked(tmp_path: Path) -> None:
    encoder, base = tiny_encoders.save("clip", tmp_path / "clip"), save_tiny(tmp_path / "base", "qwen2_vl")
    assert in_a_child(UNPLUGGED, encoder, base, HF_HUB_OFFLINE="0", TRANSFORMERS_OFFLINE="0") == [{"called": []}]


# Bombs

MEASURED = """
    import json, sys, time
    from pathlib import Path
    from base_model.errors import UserError
    from base_model.video import files
    from recipes.imported_clips import Form, LeftOut, read_clip
    from reward import parquet
    from reward.comparisons import load_comparisons
    from reward.importers.tables import columns, typed_rows

    files.KEPT_BYTES = 64 << 20
    parquet.MOST_ROWS, parquet.MEMORY = 1_000_000, 300 << 20

    def table(path):
        return [record.text("text") for record in typed_rows(path, columns("text"), set())]

    def own(path):
        return load_comparisons(path)

    def peak():
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) << 10  # ru_maxrss begins with that of the parent

    read = {"video": files.read_video, "import": lambda path: read_clip(path, Form(4, 16, 16, 8.0)), "table": table, "comparisons": own}
    for word in sys.argv[1:]:
        kind, _, path = word.partition("=")
        begun, before = time.monotonic(), peak()
        try:
            read[kind](Path(path))
            said = ""
        except (UserError, LeftOut) as error:
            said = str(error)
        print(json.dumps({"file": f"{kind} {Path(path).name}", "said": said, "seconds": time.monotonic() - begun, "more": peak() - before}))
"""


def check_refused(bombs: dict[str, str]) -> None:
    """Every bomb, "kind=path" -> a word of its error, is refused within seconds and within a GiB."""
    found = in_a_child(MEASURED, *bombs)
    assert len(found) == len(bombs)
    for row, word in zip(found, bombs.values(), strict=True):
        print(row)
        assert word in row["said"] and "\n" not in row["said"], row
        assert row["seconds"] < 20 and row["more"] < 1 << 30, row


def repeated(path: Path, count: int, side: int) -> None:
    """A tiny file of very many frames, all of them the same packet."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24, options={"preset": "ultrafast"})
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), format="rgb24")
        (packet,) = [*stream.encode(frame), *stream.encode()]
        content = bytes(packet)
        for number in range(count):
            again = av.Packet(content)
            again.stream, again.time_base, again.is_keyframe = stream, Fraction(1, 24), True
            again.pts = again.dts = number
            container.mux(again)


def many_streams(path: Path, count: int) -> None:
    """One frame of video, and a tenth of a second of sound in each of so many streams."""
    import av

    with av.open(str(path), "w") as container:
        picture = container.add_stream("mpeg4", rate=8)
        picture.width, picture.height, picture.pix_fmt = 16, 16, "yuv420p"
        sounds = [container.add_stream("pcm_s16le", rate=8000) for _ in range(count)]
        container.mux([*picture.encode(av.VideoFrame(16, 16, "yuv420p")), *picture.encode()])
        for stream in sounds:
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
            sound.sample_rate = 8000
            container.mux([*stream.encode(sound), *stream.encode()])


def test_video_bombs_are_refused_in_bounded_time_and_memory(tmp_path: Path) -> None:
    import av

    write_lossless(tmp_path / "small.mkv", np.zeros((2, 256, 256, 3), np.uint8), 8)
    small = (tmp_path / "small.mkv").read_bytes()
    assert b"\xb0\x82\x01\x00" in small and b"\xba\x82\x01\x00" in small
    (tmp_path / "wide.mkv").write_bytes(small.replace(b"\xb0\x82\x01\x00", b"\xb0\x82\x7f\xff").replace(b"\xba\x82\x01\x00", b"\xba\x82\x7f\xff"))
    repeated(tmp_path / "long.mp4", 110_000, 16)
    repeated(tmp_path / "black.mp4", 400, 512)
    for name, count in (("few.mkv", 5), ("streams.mkv", 200), ("streams.mov", 200)):
        many_streams(tmp_path / name, count)
    write_lossless(tmp_path / "target.mkv", np.zeros((9, 16, 16, 3), np.uint8), 8)
    target = tmp_path / "target.mkv"
    playlists = {
        "hls.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{target}\n#EXT-X-ENDLIST\n",
        "hls-web.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/secret.ts\n#EXT-X-ENDLIST\n",
        "concat.mp4": "ffconcat version 1.0\nfile target.mkv\n",
        "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "dash.mp4": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"><Period><AdaptationSet><BaseURL>{target}</BaseURL></AdaptationSet></Period></MPD>',
    }
    for name, text in playlists.items():
        (tmp_path / name).write_text(text)
    with av.open(str(tmp_path / "concat.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9, "a script that is followed where nothing is limited"
    assert len(read_video(target).frames) == 9 and len(read_video(tmp_path / "few.mkv").frames) == 1
    streams = {"streams.mkv": "more than 32 streams", "streams.mov": "cannot read"}
    bombs = {"wide.mkv": "cannot read", "long.mp4": "more than the limit", "black.mp4": "GiB", **streams, **dict.fromkeys(playlists, "cannot read")}
    check_refused({f"video={tmp_path / name}": word for name, word in bombs.items()} | {f"import={tmp_path / name}": "cannot be decoded" for name in ("wide.mkv", *playlists)})


def test_parquet_bombs_are_refused_in_bounded_time_and_memory(tmp_path: Path) -> None:
    long = pa.array(["x" * (16 << 20)])
    repeated_text = pa.DictionaryArray.from_arrays(pa.array(np.zeros(4_000, np.int32)), long)
    pq.write_table(pa.table({"text": repeated_text}), tmp_path / "repeated.parquet", compression="zstd", dictionary_pagesize_limit=64 << 20)
    pq.write_table(pa.table({"text": pa.array(np.zeros(1_100_000, np.int8))}), tmp_path / "rows.parquet")
    pq.write_table(pa.table({"text": pa.array(["x" * (80 << 20)])}), tmp_path / "tight.parquet", compression="zstd", use_dictionary=False)
    pq.write_table(pa.table({"text": pa.array([[[[[[["a"]]]]]]])}), tmp_path / "nested.parquet")
    listed = pa.ListArray.from_arrays(pa.array([0, 40_000_000], pa.int32()), pa.array(np.zeros(40_000_000, np.int64)))
    pq.write_table(pa.table({"text": listed}), tmp_path / "list.parquet")
    pq.write_table(pa.table({f"c{i}": pa.array([1]) for i in range(1_100)}), tmp_path / "wide.parquet")
    bombs = {"repeated": "at most 1,000,000", "rows": "rows are more", "tight": "packed more than", "nested": "lists in lists"}
    bombs |= {"list": "of size", "wide": "columns are more"}
    for name in bombs:
        folder = tmp_path / name
        folder.mkdir()
        assert (tmp_path / f"{name}.parquet").stat().st_size < 2 << 20
        shutil.copy(tmp_path / f"{name}.parquet", folder / "comparisons-00000.parquet")
    own = {f"comparisons={tmp_path / name}": word for name, word in bombs.items() if name not in ("repeated", "wide")}
    check_refused({f"table={tmp_path / name}.parquet": word for name, word in bombs.items()} | own | {f"comparisons={tmp_path / 'repeated'}": "GiB"})


def test_a_footer_that_lies_is_no_way_around_the_limit(tmp_path: Path) -> None:
    """The same bomb, every count of its footer cut down: pyarrow meets the truth in the pages, and what it says of it is one line."""
    pq.write_table(pa.table({"text": pa.array(["x" * 5_000, "y"])}), tmp_path / "plain.parquet", compression="none", use_dictionary=False)
    content = (tmp_path / "plain.parquet").read_bytes()
    for at in range(4, len(content) - 8, 7):
        damaged = bytearray(content)
        damaged[at] = 0xFF
        (tmp_path / "damaged.parquet").write_bytes(damaged)
        try:
            for record in typed_rows(tmp_path / "damaged.parquet", columns("", "text"), set()):
                record.text("text")
        except UserError as error:
            assert "\n" not in str(error)


def test_a_gzip_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reward.importers.tables.MOST_UNPACKED", 1 << 20)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'[{"text": "' + b"x" * (4 << 20) + b'"}]'))
    with pytest.raises(UserError, match="are packed into"):
        list(typed_rows(tmp_path / "a.json.gz", columns("text"), set()))
