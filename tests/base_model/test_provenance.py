"""Manifests in mp4 files, read back by the real library: what they say, what breaks them, whose certificates pass, and what is refused in one line."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest

from base_model.errors import UserError
from base_model.video.files import mp4_bytes, read_video
from base_model.video.provenance import DEVELOPMENT, Credentials, check_mp4, development_credentials, load_credentials, sign_mp4

pytest.importorskip("c2pa", reason="the extra `provenance` is not installed")

SAID = {"model_sha256": "a" * 64, "adapter_sha256": None, "run_sha256": "b" * 64, "note": "Unicode, ✓ 動画"}


@pytest.fixture(scope="module")
def plain() -> bytes:
    return mp4_bytes(np.random.default_rng(0).integers(0, 255, (5, 32, 32, 3), dtype=np.uint8), 12.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("signer") / "development"


@pytest.fixture(scope="module")
def signer(folder: Path) -> Credentials:
    return development_credentials(folder)


@pytest.fixture(scope="module")
def signed(plain: bytes, signer: Credentials, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("signed") / "clip.mp4"
    file.write_bytes(sign_mp4(plain, SAID, signer))
    return file


def test_what_was_signed_is_read_back_and_the_frames_are_the_same(signed: Path, folder: Path, plain: bytes, tmp_path: Path) -> None:
    found = check_mp4(signed, (folder / "anchor.pem").read_bytes())
    assert found is not None and dict(found.generation or {}) == SAID and found.all_holds and found.problems == ()
    assert found.generator == "rushes 0.1.0" and DEVELOPMENT in found.signer and found.development
    (tmp_path / "plain.mp4").write_bytes(plain)
    assert (read_video(signed).frames == read_video(tmp_path / "plain.mp4").frames).all()
    assert check_mp4(tmp_path / "plain.mp4") is None, "a file without a manifest says nothing"


def test_a_signer_is_trusted_only_by_an_anchor_that_signed_it(signed: Path, tmp_path: Path) -> None:
    nobody = check_mp4(signed)
    assert nobody is not None and nobody.signature_holds and nobody.content_holds and not nobody.trusted and not nobody.all_holds
    development_credentials(tmp_path / "other")
    other = check_mp4(signed, (tmp_path / "other" / "anchor.pem").read_bytes())
    assert other is not None and not other.trusted and other.problems == ("signingCredential.untrusted",)
    with pytest.raises(UserError, match="Name whom you trust by PEM certificates"):
        check_mp4(signed, b"-----BEGIN CERTIFICATE-----\nnot one\n-----END CERTIFICATE-----\n")


def test_every_byte_of_the_frames_is_bound(signed: Path, folder: Path, tmp_path: Path) -> None:
    content, file = signed.read_bytes(), tmp_path / "changed.mp4"
    start = content.index(b"mdat") + 4
    for place in np.linspace(start + 8, len(content) - 1, 12).astype(int):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        found = check_mp4(file, (folder / "anchor.pem").read_bytes())
        assert found is not None and not found.content_holds and found.signature_holds and not found.all_holds, place


def test_what_the_manifest_says_cannot_be_rewritten(signed: Path, folder: Path, tmp_path: Path) -> None:
    content = signed.read_bytes()
    assert content.count(b"a" * 64) == 1
    (tmp_path / "forged.mp4").write_bytes(content.replace(b"a" * 64, b"c" * 64))
    found = check_mp4(tmp_path / "forged.mp4", (folder / "anchor.pem").read_bytes())
    assert found is not None and not found.signature_holds and not found.all_holds


def test_a_manifest_does_not_hold_on_another_clip(signed: Path, plain: bytes, signer: Credentials, folder: Path, tmp_path: Path) -> None:
    other = sign_mp4(mp4_bytes(np.zeros((5, 32, 32, 3), np.uint8), 12.0), SAID, signer)
    content = signed.read_bytes()
    grafted = content[: content.index(b"mdat") - 4] + other[other.index(b"mdat") - 4 :]
    (tmp_path / "grafted.mp4").write_bytes(grafted)
    found = check_mp4(tmp_path / "grafted.mp4", (folder / "anchor.pem").read_bytes())
    assert found is not None and found.signature_holds and not found.content_holds and not found.all_holds


def test_a_development_certificate_is_made_once_and_only_its_owner_may_enter(folder: Path, signer: Credentials) -> None:
    assert development_credentials(folder) == signer and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not list(folder.parent.glob(".*tmp")), "nothing is left behind"


def test_keys_of_other_kinds_sign_too_and_strange_ones_are_refused(tmp_path: Path, plain: bytes, signer: Credentials, folder: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat, load_pem_private_key

    stranger = ec.generate_private_key(ec.SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    locked = load_pem_private_key(signer.key, None).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    for name, content, said in (
        ("stranger.pem", stranger, "not the one of the certificate"),
        ("locked.pem", locked, "not a PEM certificate and an unencrypted PEM key"),
        ("junk.pem", b"-----BEGIN nonsense", "not a PEM certificate and an unencrypted PEM key"),
        ("empty.pem", b"", "no PEM key"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=said) as error:
            load_credentials(folder / "certificate.pem", tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot read the certificate"):
        load_credentials(tmp_path / "missing.pem", folder / "key.pem")
    with pytest.raises(UserError, match="signing a clip"):
        sign_mp4(b"no clip", SAID, signer)
    with pytest.raises(UserError, match="signing a clip"):
        sign_mp4(plain, SAID, signer._replace(certificates=b"-----BEGIN CERTIFICATE-----\n"))


def test_files_that_are_no_clips_are_refused_in_one_line(tmp_path: Path, signed: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_bytes(b"#EXTM3U\nhttp://localhost/evil\n")
    (tmp_path / "cut.mp4").write_bytes(signed.read_bytes()[:3000])
    for file in ("empty.mp4", "text.mp4", "cut.mp4", "missing.mp4", ".", "nul\0.mp4"):
        with pytest.raises(UserError) as error:
            check_mp4(tmp_path / file)
        assert "\n" not in str(error.value)
