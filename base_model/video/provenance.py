"""Where a clip comes from, signed into it: C2PA manifests in mp4 (C2PA 2.x, by `c2pa-python`, the extra `provenance`).

A manifest says what made the clip and is bound to the file's bytes, all but boxes that hold nothing (`free`, `skip`), which the library leaves out. It proves who signed, as far as
the signer's certificate is trusted, and that what plays was not changed since. It does not survive a re-encode or a remux: `rushes bench provenance` tells what does. A clip
without a manifest proves nothing.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from base_model.checkpoint import disk_errors
from base_model.errors import UserError
from base_model.video.files import write_atomic

GENERATION = "org.rushes.generation"
"""Label of the assertion that names model, adapter and run."""
MADE_BY_A_MODEL = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
DEVELOPMENT = "Rushes development certificate, no proof of origin"
LARGEST_FILE, LARGEST_CERTIFICATE = 2**31, 2**20  # bytes
DAYS = 365  # that a development certificate lasts
ALGORITHMS = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}  # of elliptic curves
OFFLINE = {"verify": {"verify_trust": True, "verify_after_sign": False, "remote_manifest_fetch": False, "ocsp_fetch": False}}
"""Nothing is fetched: a manifest elsewhere, and whether a certificate was revoked, are not asked for."""


class Credentials(NamedTuple):
    """Who signs."""

    certificates: bytes  # PEM, the signer's first, then those above it
    key: bytes  # PEM, unencrypted
    algorithm: str


class Checked(NamedTuple):
    """What a manifest says, and what of it holds."""

    generation: Mapping[str, Any] | None  # what `sign_mp4` was told; None where another program wrote the manifest
    generator: str  # program that wrote it
    signer: str
    signature_holds: bool
    content_holds: bool
    trusted: bool  # the signer, by the anchors that were given
    development: bool  # signed by a certificate that `development_credentials` made
    problems: tuple[str, ...]  # codes of C2PA

    @property
    def all_holds(self) -> bool:
        return self.signature_holds and self.content_holds and self.trusted


@contextmanager
def _library(what: str, advice: str) -> Iterator[Any]:
    """The c2pa library; its errors become a UserError about `what`, with that advice."""
    try:
        import c2pa
    except ImportError as error:
        raise UserError(f"{what} needs the package c2pa-python, which is not installed. Install the extra: pip install 'rushes[provenance]'") from error
    try:
        yield c2pa
    except c2pa.C2paError as error:
        raise UserError(f"{what}: {' '.join(str(error).split())}. {advice}") from error


def sign_mp4(content: bytes, generation: Mapping[str, Any], credentials: Credentials) -> bytes:
    """The mp4 with a manifest that says `generation` (plain values). Raises UserError where the library is missing, or refuses certificate, key or file."""
    from importlib.metadata import version

    agent = {"name": "rushes", "version": version("rushes")}
    made = {"action": "c2pa.created", "digitalSourceType": MADE_BY_A_MODEL, "softwareAgent": agent}
    assertions = [{"label": "c2pa.actions.v2", "data": {"actions": [made]}}, {"label": GENERATION, "data": dict(generation)}]
    signed = io.BytesIO()
    with _library("signing a clip", "Give an intact mp4, and a certificate that is made for signing") as c2pa:
        info = c2pa.C2paSignerInfo(alg=credentials.algorithm.encode(), sign_cert=credentials.certificates, private_key=credentials.key, ta_url=None)
        manifest = json.dumps({"claim_generator_info": [agent], "assertions": assertions})
        with c2pa.Context(c2pa.Settings.from_dict(OFFLINE)) as context, c2pa.Signer.from_info(info) as signer, c2pa.Builder(manifest, context=context) as builder:
            builder.sign(signer, "video/mp4", io.BytesIO(content), signed)
    return signed.getvalue()


def check_mp4(path: Path, anchors: bytes | None = None) -> Checked | None:
    """What the manifest in a file says and whether it holds; None where there is none. anchors: PEM certificates that are trusted, as well as those they signed.

    Raises UserError where the file is no mp4, cannot be read, or holds a manifest that cannot be parsed.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if file.read(12)[4:8] != b"ftyp":
                raise UserError(f"not an mp4, {path}. Manifests are looked for in mp4 files")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}. Give an mp4 file") from error
    if size > LARGEST_FILE:
        raise UserError(f"{path} has {size} bytes, more than {LARGEST_FILE}. Give a smaller file")
    settings = OFFLINE if anchors is None else {**OFFLINE, "trust": {"user_anchors": anchors.decode("ascii", "replace")}}
    with _library(f"reading the manifest of {path}", "Give an intact mp4. Name whom you trust by PEM certificates") as c2pa, open(path, "rb") as file:
        try:
            with c2pa.Context(c2pa.Settings.from_dict(settings)) as context, c2pa.Reader("video/mp4", file, context=context) as reader:
                found = json.loads(reader.json())
        except c2pa.C2paError.ManifestNotFound:
            return None
    return _checked(found)


def _checked(found: Mapping[str, Any]) -> Checked:
    manifest = found["manifests"][found["active_manifest"]]
    results = found.get("validation_results", {}).get("activeManifest", {})
    passed, failed = ({str(each["code"]) for each in results.get(kind, ())} for kind in ("success", "failure"))
    mine = next((each["data"] for each in manifest.get("assertions", ()) if each["label"] == GENERATION and isinstance(each["data"], dict)), None)
    about, signed = (manifest.get("claim_generator_info") or [{}])[0], manifest.get("signature_info") or {}
    broken = {code for code in failed if not code.startswith("signingCredential.")}
    hashes = {code for code in broken if "Hash" in code and not code.startswith("assertion.hashedURI")}
    return Checked(
        mine,
        " ".join(str(about[key]) for key in ("name", "version") if key in about),
        ", ".join(str(signed[key]) for key in ("common_name", "issuer") if key in signed),
        "claimSignature.validated" in passed and not broken - hashes,
        any(code.startswith("assertion.") and code.endswith("Hash.match") for code in passed) and not hashes,
        "signingCredential.trusted" in passed and not any(code.startswith("signingCredential.") for code in failed),
        signed.get("common_name") == DEVELOPMENT,
        tuple(sorted(failed)),
    )


# Certificates


def load_credentials(certificate: Path, key: Path) -> Credentials:
    """A signer's PEM certificate (those above it behind it) and its PEM key, unencrypted. Raises UserError where they are not such, or do not belong together."""
    chain, secret = _pem(certificate, "certificate"), _pem(key, "key")
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise UserError("signing a clip needs the package cryptography, which is not installed. Install the extra: pip install 'rushes[provenance]'") from error
    try:
        private, first = load_pem_private_key(secret, None), x509.load_pem_x509_certificates(chain)[0]
    except (ValueError, TypeError) as error:
        raise UserError(f"not a PEM certificate and an unencrypted PEM key, {certificate} and {key}: {' '.join(str(error).split())}. Give both as PEM") from error
    if private.public_key() != first.public_key():
        raise UserError(f"the key is not the one of the certificate, {key} and {certificate}. Give those that belong together")
    if isinstance(private, ec.EllipticCurvePrivateKey) and private.curve.name in ALGORITHMS:
        return Credentials(chain, secret, ALGORITHMS[private.curve.name])
    if isinstance(private, rsa.RSAPrivateKey):
        return Credentials(chain, secret, "ps256")
    if isinstance(private, ed25519.Ed25519PrivateKey):
        return Credentials(chain, secret, "ed25519")
    raise UserError(f"a key of a kind that C2PA does not know, {key}. Give an elliptic curve (P-256, P-384, P-521), RSA or Ed25519 key")


def _pem(path: Path, what: str) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST_CERTIFICATE + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the {what}, {path}: {getattr(error, 'strerror', None) or error}. Give a PEM file") from error
    if len(content) > LARGEST_CERTIFICATE or b"-----BEGIN" not in content:
        raise UserError(f"no PEM {what}, {path}. Give a PEM file")
    return content


def development_credentials(folder: Path) -> Credentials:
    """Those in `folder`, which only its owner may enter, made where there is none: `certificate.pem`, `key.pem` and `anchor.pem`, what a checker would have to trust. The
    certificate says of itself that it proves nothing. Raises UserError where the folder cannot be written."""
    if not folder.exists():
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        with disk_errors(folder):
            temporary.mkdir(parents=True, exist_ok=True, mode=0o700)
            for name, content in zip(("certificate.pem", "key.pem", "anchor.pem"), _made(), strict=True):
                write_atomic(temporary / name, content)
            try:
                os.rename(temporary, folder)
            except OSError as error:
                shutil.rmtree(temporary)
                if not folder.is_dir():  # else another process was first
                    raise error
    return load_credentials(folder / "certificate.pem", folder / "key.pem")


def _made() -> tuple[bytes, bytes, bytes]:
    """Certificate with its anchor, key, and anchor, PEM each; the key of the anchor is forgotten."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise UserError("making a certificate needs the package cryptography, which is not installed. Install the extra: pip install 'rushes[provenance]'") from error
    root, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Rushes development")
    names = [x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("Rushes development root", DEVELOPMENT)]
    now = datetime.now(UTC)

    def certificate(subject: x509.Name, public: ec.EllipticCurvePublicKey, *, authority: bool) -> x509.CertificateBuilder:
        begun = x509.CertificateBuilder(names[0], subject, public, x509.random_serial_number(), now - timedelta(minutes=5), now + timedelta(days=DAYS))
        usage = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only", "decipher_only"), False)
        return (
            begun.add_extension(x509.BasicConstraints(authority, None), True)
            .add_extension(x509.KeyUsage(digital_signature=not authority, key_cert_sign=authority, crl_sign=authority, **usage), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root.public_key()), False)
        )

    anchor = certificate(names[0], root.public_key(), authority=True).sign(root, hashes.SHA256())
    purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])  # one that C2PA accepts for signing
    signer = certificate(names[1], key.public_key(), authority=False).add_extension(purpose, False).sign(root, hashes.SHA256())
    anchored, signed = (each.public_bytes(Encoding.PEM) for each in (anchor, signer))
    return signed + anchored, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), anchored
