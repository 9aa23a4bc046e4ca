"""What survives of a signed clip's provenance: copies, other names, metadata, remuxes, trims and re-encodes, each read as `rushes verify` does.

A C2PA manifest lies in the mp4 beside the frames and is bound to its bytes. Whoever encodes a clip again, as every video platform does, leaves it behind.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from base_model.errors import UserError
from base_model.video.files import mp4_bytes, read_video, write_lossless
from base_model.video.provenance import Checked, check_mp4, development_credentials, sign_mp4
from recipes.bench._results import Bench, Row, check_can_end, here, write
from recipes.shapes.dataset import draw_clips
from recipes.shapes.render import DEMO_CLIP

FPS = 12.0
GENERATION = {"model_sha256": "0" * 64, "adapter_sha256": None, "run_sha256": None}


class Config(Bench):
    """What is measured takes seconds; `quick` changes nothing."""


def again(content: bytes, *, crf: int = 18, frames: int | None = None, codec: str = "libx264", metadata: Mapping[str, str] | None = None) -> bytes:
    """Decoded and encoded anew, the first `frames` of it."""
    import av

    out = io.BytesIO()
    with av.open(io.BytesIO(content)) as source, av.open(out, "w", format="mp4") as target:
        first = source.streams.video[0]
        stream = target.add_stream(codec, rate=Fraction(FPS), options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = first.width, first.height, "yuv420p"
        target.metadata.update(metadata or {})
        for index, frame in enumerate(source.decode(first)):
            if frames is None or index < frames:
                frame.pts, frame.time_base = index, Fraction(1, round(FPS))
                target.mux(stream.encode(frame))
        target.mux(stream.encode())
    return out.getvalue()


def remuxed(content: bytes, kind: str, *, packets: int | None = None, metadata: Mapping[str, str] | None = None) -> bytes:
    """The same packets in a new file of that kind, the first `packets` of them."""
    import av

    out = io.BytesIO()
    with av.open(io.BytesIO(content)) as source, av.open(out, "w", format=kind) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        target.metadata.update(metadata or {})
        for index, packet in enumerate(source.demux(source.streams.video[0])):
            if packet.dts is not None and (packets is None or index < packets):
                packet.stream = stream
                target.mux(packet)
    return out.getvalue()


def flipped(content: bytes) -> bytes:
    """One bit of the last frame is another."""
    return content[:-20] + bytes([content[-20] ^ 1]) + content[-19:]


CHANGES: Mapping[str, Callable[[bytes], bytes]] = {
    "nothing: a copy under another name": lambda content: content,
    "an empty box behind it": lambda content: content + b"\x00\x00\x00\x08free",
    "one bit of a frame": flipped,
    "cut off in the middle": lambda content: content[: len(content) // 2],
    "remux to mp4, frames untouched": lambda content: remuxed(content, "mp4"),
    "remux to mp4 with a title": lambda content: remuxed(content, "mp4", metadata={"title": "mine"}),
    "trim without encoding, half of it": lambda content: remuxed(content, "mp4", packets=6),
    "h264 again, crf 18": lambda content: again(content, crf=18),
    "h264 again, crf 28": lambda content: again(content, crf=28),
    "h264 again, first half": lambda content: again(content, frames=6),
    "h265, crf 23": lambda content: again(content, crf=23, codec="libx265"),
}
"""What happens to files on their way -> what comes out."""


def read(folder: Path, content: bytes, anchors: bytes) -> tuple[Checked | None, str]:
    """What the checker says, and why it could say nothing."""
    file = folder / "changed.mp4"
    file.write_bytes(content)
    try:
        return check_mp4(file, anchors), ""
    except UserError as error:
        return None, str(error).replace(str(folder), "").partition(". ")[0]


def rows_of(signed: bytes, anchors: bytes, folder: Path) -> list[Row]:
    """One row a change."""
    rows = []
    for name, change in CHANGES.items():
        content = change(signed)
        found, why = read(folder, content, anchors)
        row: dict[str, Any] = {"what_happened": name, "plays": plays(folder, content), "manifest": found is not None}
        row |= {"signature_holds": found and found.signature_holds, "content_holds": found and found.content_holds, "signer_trusted": found and found.trusted}
        rows.append({**row, "verifies": bool(found and found.all_holds), "said": why or None})
    return rows


def plays(folder: Path, content: bytes) -> bool:
    """Whether it can be decoded."""
    file = folder / "changed.mp4"
    file.write_bytes(content)
    try:
        return bool(len(read_video(file).frames))
    except UserError:
        return False


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing."""
    check_can_end(cfg)
    with tempfile.TemporaryDirectory(prefix="rushes-bench-") as temporary:
        folder = Path(temporary)
        signer = development_credentials(folder / "development")
        clip = draw_clips("curated", 1, seed=0, shape=DEMO_CLIP).videos[0].float() / 255  # [T,3,H,W]
        plain = mp4_bytes(clip, FPS)
        signed = sign_mp4(plain, GENERATION, signer)
        rows = rows_of(signed, (folder / "development" / "anchor.pem").read_bytes(), folder)
        write_lossless(folder / "record.mkv", clip, FPS)
        size = [{"clip_bytes": len(plain), "signed_bytes": len(signed), "record_bytes": (folder / "record.mkv").stat().st_size}]
    if cfg.write:
        kept = [row["what_happened"] for row in rows if row["verifies"]]
        lost = [row["what_happened"] for row in rows if not row["manifest"]]
        remarks = [f"Still verifies after: {'; '.join(kept)}.", f"No manifest is read after: {'; '.join(lost)}. To trace such clips takes a watermark; there is none here."]
        sections = {"What happened to a signed clip": rows, "Bytes": size}
        write(cfg, "provenance", here("provenance", cfg), "What survives of a clip's provenance", sections, remarks=remarks)
    return {"rows": rows}
