"""Signed copies of a store's clips, what `rushes verify` says of them and with which status, and what survives of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from align.config import load
from base_model.errors import UserError
from base_model.video.files import mp4_bytes
from base_model.video.provenance import check_mp4, development_credentials, sign_mp4
from base_model.video.store import ClipStore
from recipes import cli
from recipes.provenance import Export, credentials_of, export, origin_of
from recipes.weights import file_hash
from tests.recipes.small import save_small_network


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    file = tmp_path / "plain.mp4"
    file.write_bytes(mp4_bytes(np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8), 12.0))
    return file


def test_a_network_is_named_by_its_hash_its_adapter_and_its_run(tmp_path: Path) -> None:
    network = save_small_network(tmp_path / "network.safetensors")
    assert origin_of(network) == {"model_sha256": file_hash(network), "recipe": None, "adapter_sha256": None, "run_sha256": None, "run_commit": None, "run_seed": None}
    (tmp_path / "adapter.safetensors").write_bytes(b"adapter")
    (tmp_path / "network.json").write_text('{"recipe": "nft"}')
    (tmp_path / "run.json").write_text('{"commit": "abc", "seed": 3}')
    found = origin_of(network)
    assert found["recipe"] == "nft" and found["run_commit"] == "abc" and found["run_seed"] == 3 and found["adapter_sha256"] == file_hash(tmp_path / "adapter.safetensors")


def test_without_a_manifest_or_the_library_it_says_so_in_one_line(clip: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(clip.parent / "missing.mp4")]) == 2 and cli.main(["verify"]) == 2
    monkeypatch.setitem(sys.modules, "c2pa", None)
    assert cli.main(["verify", str(clip)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("Install the extra: pip install 'rushes[provenance]'")


def test_certificate_and_key_go_together() -> None:
    with pytest.raises(ValueError, match="one needs the other"):
        Export(certificate=Path("a.pem"))


class TestSigned:
    """What needs the library."""

    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        pytest.importorskip("c2pa", reason="the extra `provenance` is not installed")

    def test_only_what_the_filters_allow_is_exported_and_the_prompt_is_not_told(self, tmp_path: Path) -> None:
        store = ClipStore(tmp_path / "store")
        told = {"prompt": "my secret prompt", "prompt_id": "p", "sampler": {"steps": 6}, "lineage": "m", "fps": 12.0}
        rows = [
            store.add(torch.full((2, 3, 32, 32), k / 10), seed=k, safety=safety, preview=False, **told)  # type: ignore[arg-type]
            for k, safety in enumerate(({"verdict": "allow"}, {"verdict": "block"}, {"verdict": "review"}, {"verdict": "error"}, {}))
        ]
        cfg = Export(folder=tmp_path / "out")
        files = export(cfg, store, [*rows, rows[0]], {"model_sha256": "m" * 64}, credentials_of(cfg, tmp_path))
        assert [file.stem for file in files] == [rows[0].clip_id] and b"secret" not in files[0].read_bytes()
        found = check_mp4(files[0])
        assert found is not None and dict(found.generation or {}) == {"model_sha256": "m" * 64, "clip_id": rows[0].clip_id, "seed": 0, "sampler": {"steps": 6}}

    def test_status_is_0_only_where_signature_content_and_signer_hold(self, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = clip.parent / "development"
        signed = clip.parent / "signed ✓.mp4"
        signed.write_bytes(sign_mp4(clip.read_bytes(), {"model_sha256": "m"}, development_credentials(folder)))
        trust = ["--trust", str(folder / "anchor.pem"), "--json"]
        assert cli.main(["verify", str(signed), *trust]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["says"] == {"model_sha256": "m"} and told["signature_holds"] and told["content_unchanged"] and told["signer_trusted"] and told["development_certificate"]
        assert cli.main(["verify", str(signed)]) == 3
        assert "a development certificate signed it" in capsys.readouterr().err
        content = signed.read_bytes()
        signed.write_bytes(content[:-40] + bytes([content[-40] ^ 1]) + content[-39:])
        assert cli.main(["verify", str(signed), *trust]) == 3
        out, err = capsys.readouterr()
        assert "the content was changed after it was signed" in err and json.loads(out)["result"]["content_unchanged"] is False
        assert cli.main(["verify", str(clip), *trust]) == 2 and "no C2PA manifest" in capsys.readouterr().err
        for wrong in (clip, clip.parent, clip.parent / "missing.pem"):
            assert cli.main(["verify", str(signed), "--trust", str(wrong)]) == 2

    def test_a_generated_clip_is_exported_signed(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["generate", "--out", str(tmp_path / "store"), "--export.folder", str(tmp_path / "out"), "--prompts", "a red circle moves left", "--clips_per_prompt", "2"]
        assert cli.main([*words, "--json"]) == 0
        signed = json.loads(capsys.readouterr().out)["signed"]
        assert len(signed) == 2 and {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()} == {".mp4"}, "no key among what goes out"
        for file in signed:
            found = check_mp4(Path(file), (tmp_path / "store" / "development" / "anchor.pem").read_bytes())
            assert found is not None and found.all_holds and (found.generation or {})["model_sha256"] == origin_of(None)["model_sha256"]

    def test_the_bench_reports_what_is_lost_when_clips_are_encoded_again(self) -> None:
        from recipes.bench import provenance

        rows = {row["what_happened"]: row for row in provenance.main(load(provenance.Config, None, []))["rows"]}  # type: ignore[attr-defined]
        assert rows["nothing: a copy under another name"]["verifies"] and rows["an empty box behind it"]["verifies"]
        changed = rows["one bit of a frame"]
        assert changed["manifest"] and changed["signature_holds"] and not changed["content_holds"] and not changed["verifies"]
        again = [row for name, row in rows.items() if name.startswith(("h264", "h265", "remux", "trim"))]
        assert len(again) == 7 and all(row["plays"] and not row["manifest"] for row in again), "a clip that plays and says nothing: loss is reported"


def test_export_needs_a_folder_that_can_be_written(tmp_path: Path) -> None:
    pytest.importorskip("c2pa", reason="the extra `provenance` is not installed")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        credentials_of(Export(folder=tmp_path / "out"), tmp_path / "file")
