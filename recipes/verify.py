"""What a clip's C2PA manifest says, whether its signature and the content hold, and whether the signer is trusted (`rushes verify FILE`).

Ends with status 0 only where all three hold; anybody can sign, so that a signer nobody vouches for proves nothing. `--trust FILE` names the certificates you trust.
"""

from __future__ import annotations

from pathlib import Path

from align.config import Config as BaseConfig
from base_model.errors import GuardStop, UserError
from base_model.video.provenance import LARGEST_CERTIFICATE, Checked, check_mp4


class Config(BaseConfig):
    file: Path | None = None
    """The mp4."""
    trust: Path | None = None
    """PEM certificates of the signers, or of those above them, that you trust; none trusts nobody."""


class NotVerified(GuardStop):
    """Something does not hold; `result` says what."""

    def __init__(self, message: str, result: dict[str, object]) -> None:
        super().__init__(message)
        self.result = result


def told(file: Path, found: Checked) -> dict[str, object]:
    """What the command prints."""
    return {
        "file": str(file),
        "says": dict(found.generation) if found.generation is not None else None,
        "written_by": found.generator,
        "signed_by": found.signer,
        "development_certificate": found.development,
        "signature_holds": found.signature_holds,
        "content_unchanged": found.content_holds,
        "signer_trusted": found.trusted,
        "problems": list(found.problems),
    }


def main(cfg: Config, *, resume: bool = False) -> dict[str, object]:
    """`resume` changes nothing. Raises UserError where there is no manifest, NotVerified where one does not hold."""
    if cfg.file is None:
        raise UserError("which file? Write rushes verify FILE")
    anchors = None
    if cfg.trust is not None:
        try:
            with open(cfg.trust, "rb") as file:
                anchors = file.read(LARGEST_CERTIFICATE)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {cfg.trust}: {getattr(error, 'strerror', None) or error}. Give --trust FILE.pem") from error
        if b"-----BEGIN CERTIFICATE" not in anchors:
            raise UserError(f"no PEM certificates, {cfg.trust}. Give --trust FILE.pem")
    found = check_mp4(cfg.file, anchors)
    if found is None:
        raise UserError(f"no C2PA manifest, {cfg.file}. Nothing is known of where it comes from: it was never signed, or the manifest was lost when it was encoded again")
    result = told(cfg.file, found)
    wrong = [
        *([] if found.signature_holds else ["the signature does not hold"]),
        *([] if found.content_holds else ["the content was changed after it was signed"]),
        *([] if found.trusted else ["a development certificate signed it" if found.development else "the signer is not trusted"]),
    ]
    if wrong:
        raise NotVerified(f"{', and '.join(wrong)}, {cfg.file}. Do not rely on it{'' if found.trusted else ', or name whom you trust: --trust FILE.pem'}", result)
    return result
