"""The page of what was curated: every rule with its clips, thresholds in the charts, and nobody sees what must not be seen."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from base_model.errors import UserError
from base_model.video.files import mp4_bytes
from recipes import curate
from recipes.charts import histogram
from recipes.curation_page import PAGE, render_page, tokens
from recipes.weights import file_hash


def clip(seed: int, *, frames: int = 24, cut: bool = False, black: bool = False) -> bytes:
    """A moving texture, 96 x 128."""
    rng = np.random.default_rng(seed)
    grounds = [rng.integers(0, 255, (12, 40, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8) for _ in range(2)]
    film = np.stack([grounds[int(cut and k >= frames // 2)][:, 3 * k : 3 * k + 128] for k in range(frames)])
    return mp4_bytes(np.zeros_like(film) if black else film, 12.0, upscale=False)


@pytest.fixture(scope="module")
def curated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips that are kept; one with a cut, one that is black, one that is broken, one that somebody opted out of, and one whose caption a filter blocks."""
    folder = tmp_path_factory.mktemp("curated")
    clips = folder / "clips"
    clips.mkdir()
    made = {"good": clip(0), "other <b>": clip(1), "cut": clip(2, cut=True), "black": clip(3, black=True), "broken": clip(4)[:300], "private": clip(5), "blocked": clip(6)}
    for name, content in made.items():
        (clips / f"{name}.mp4").write_bytes(content)
    texts = {name: "a nude woman, explicit porn" if name == "blocked" else f"a texture & {name}" for name in made}
    (clips / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{name}.mp4", "text": text}) + "\n" for name, text in texts.items()))
    (folder / "list.txt").write_text(file_hash(clips / "private.mp4") + "\n")
    out = folder / "out"
    curate.main(curate.Config(input=str(clips), out=out, workers=1, safety=True, opt_out=folder / "list.txt", keep=curate.Keep(motion=curate.Range(least=0.01))))
    return out


def test_the_page_says_what_was_kept_and_what_every_rule_spoke_against(curated: Path) -> None:
    page = render_page(curated)
    assert "<dd>7</dd>" in page and "<dd>2</dd>" in page and "<dd>5</dd>" in page
    for rule, clips in {"cuts": "1 clip", "black_share": "1 clip", "error": "1 clip", "opt_out": "1 clip", "safety": "2 clips"}.items():
        assert f"<h3>{rule}: {clips}</h3>" in page, rule
    assert "a texture &amp; good" in page and "other &lt;b&gt;" in page and "<b>other <b>" not in page, "names and captions are text"
    assert (curated / PAGE).exists(), "curating writes it"


def test_clips_that_must_not_be_seen_are_counted_and_not_shown(curated: Path) -> None:
    page = render_page(curated)
    shown = page.count("data:image/jpeg")
    assert shown == 3 * 3, "three pictures of each of the two kept and of the cut one; filters ask people to look at the black one first"
    hidden = page.split("<h3>opt_out")[1].split("</div>")[0] + page.split("<h3>safety")[1].split("</div>")[0]
    assert "data:image" not in hidden and "private" not in page and hidden.count("They are not shown.") == 2


def test_thresholds_are_drawn_into_the_charts_and_charts_with_one_come_first(curated: Path) -> None:
    titles = re.findall(r'<div class="card"><h3>(\w+)</h3><p>[^<]*?(Asked for: [^<]*)?</p><svg', render_page(curated))
    assert ("motion", "Asked for: at least 0.01.") in titles
    asked = [bool(told) for _, told in titles]
    assert asked == sorted(asked, reverse=True) and 3 < sum(asked) < len(asked)


def test_what_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rushes curate"):
        render_page(tmp_path)


def test_tokens_are_those_of_wans_examples() -> None:
    whole = {"height": 480, "width": 832, "fps": 16.0, "frames": 81, "seconds": 81 / 16}
    assert tokens(whole) == 21 * 30 * 52, "81 frames are 21 latent ones of 30 x 52 patches"
    longer = {"height": 1080, "width": 1920, "fps": 24.0, "frames": 243, "seconds": 243 / 24}
    assert tokens(longer) == 2 * 21 * 30 * 52, "ten seconds are 162 frames at 16 a second, at 480 x 832"
    assert tokens({**whole, "frames": 1, "fps": float("nan"), "seconds": 0.0}) in (0, 30 * 52)
    assert tokens({**whole, "height": 8}) == 0


def test_a_histogram_has_a_bar_for_every_filled_bin_and_a_line_for_every_limit() -> None:
    rng = np.random.default_rng(0)
    kept, dropped = rng.normal(0, 1, 500), rng.normal(4, 1, 100)
    drawn = histogram(kept, np.append(dropped, np.nan), name="motion", x_label="px", limits=[-2.0, 3.0])
    told = {tuple(tip) for tip in re.findall(r"<title>(\S+) to \S+: (\d+) kept, (\d+) dropped</title>", drawn)}
    assert sum(int(count) for _, count, _ in told) == 500 and sum(int(count) for *_, count in told) == 100, "every clip is in one bar"
    assert drawn.count('class="limit"') == 2
    assert histogram(np.full(9, 1e-17), np.zeros(3), name="cuts", x_label="cuts").count("<rect") == 2, "numbers that are all the same have a bar too"
    with pytest.raises(ValueError, match="nothing to draw"):
        histogram(np.array([np.nan]), np.array([]), name="motion", x_label="px")
