"""Native sizes against square crops: what is cut is known to be cut, both arms see equally many tokens, and what is finished is not trained again."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from align.config import commit, load
from base_model.errors import UserError
from base_model.tiny import LatentVideoModel, save_codec
from base_model.types import ClipShape
from recipes import cli
from recipes.bench import _results, _trained, native
from recipes.fit import Fit, held_out_errors, held_out_losses
from recipes.pairs import Pairs
from recipes.shapes.judge import in_frame
from recipes.statistics import Interval
from tests.recipes.small import noting_device, save_small_network, small_model

FIT = ["--fit.iterations", "2", "--fit.capacity", "512", "--fit.held_out", "4"]
TOY = ["--network", "{width: 32, depth: 2, heads: 2}", "--clips", "24", "--prompts", "3", "--sampler.steps", "2", *FIT]


def config(*more: str) -> native.Config:
    return load(native.Config, None, [*TOY, *more])


# In the frame


def test_drawn_clips_are_in_the_frame_and_their_crops_mostly_are_not() -> None:
    cfg = config("--prompts", "60", "--sizes", "[[13, 24, 48]]")
    assert np.mean(native.drawn(cfg)["13x24x48"]["in_frame"]) >= 0.9
    wide = [video.float() / 255 for video in native.draw_native(240, seed=0).videos if video.shape[-1] >= 1.6 * video.shape[-2]]
    cut = [in_frame(native.crop_square(video)) for video in wide]
    assert len(wide) > 20 and np.mean([in_frame(video) is True for video in wide]) >= 0.9
    assert np.mean([each is not True for each in cut]) > 0.4


def test_crops_are_called_cut_after_the_autoencoder_as_well() -> None:
    codec = native.load_codec(_trained.CODEC)
    cropped = [native.crop_square(video.float() / 255) for video in native.draw_native(160, seed=1).videos if video.shape[-1] >= 1.6 * video.shape[-2]]
    cut = [clip for clip in cropped if in_frame(clip) is False]
    after = [in_frame(native.through(codec, clip[None])[0]) for clip in cut]
    assert len(cut) > 10 and np.mean([each is False for each in after]) >= 0.8


def test_the_ceiling_is_measured_after_the_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "through", lambda codec, video: torch.zeros_like(video))
    assert native.drawn(config("--sizes", "[[5, 16, 16]]"))["5x16x16"]["in_frame"] == [None] * 3


# Data


@pytest.mark.parametrize(("shape", "side", "place"), [((24, 48), 24, (0, 12)), ((48, 32), 32, (8, 0)), ((16, 16), 16, (0, 0)), ((20, 44), 16, (2, 14))])
def test_the_crop_is_the_square_in_the_middle(shape: tuple[int, int], side: int, place: tuple[int, int]) -> None:
    y, x = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    clip = torch.stack([y, x, 0 * x]).expand(5, 3, *shape)
    cropped = native.crop_square(clip)
    assert cropped.shape == (5, 3, side, side)
    assert cropped[0, :2, 0, 0].tolist() == list(place) and cropped[0, :2, -1, -1].tolist() == [place[0] + side - 1, place[1] + side - 1]


def test_both_arms_see_the_same_clips_of_many_aspects() -> None:
    clips = native.draw_native(200, seed=3)
    square = native.as_seen("square", clips)
    assert native.as_seen("native", clips) is clips and square.texts == clips.texts
    shapes = [ClipShape(len(video), *video.shape[-2:]) for video in clips.videos]
    aspects = [shape.width / shape.height for shape in shapes]
    assert min(aspects) == 0.5 and max(aspects) == 2 and np.mean([aspect != 1 for aspect in aspects]) > 0.65 and min(shape.frames for shape in shapes) == 5
    assert all(len(a) == len(b) and b.shape[-1] == b.shape[-2] == min(a.shape[-2:]) for a, b in zip(clips.videos, square.videos, strict=True))
    assert native.draw_native(5, seed=3).fingerprint() == type(clips)(clips.texts[:5], clips.videos[:5]).fingerprint()


def test_packs_of_both_arms_hold_equally_many_tokens_at_the_default_size() -> None:
    cfg, model, rng = native.Config(), small_model(), np.random.default_rng(0)
    shapes = [shape for shape in native.native_clips()[0] if shape.frames >= 5]
    drawn = [shapes[int(k)] for k in rng.integers(len(shapes), size=cfg.clips)]

    def pairs(arm: native.Arm) -> Pairs:
        sizes = [(shape.frames, *((shape.height, shape.width) if arm == "native" else (min(shape.height, shape.width),) * 2)) for shape in drawn]
        return Pairs(("",) * len(sizes), tuple(torch.empty(32, 1 + (f - 1) // 4, h // 4, w // 4, device="meta") for f, h, w in sizes), ())

    native.check_tokens(cfg, model, pairs, 0)
    tokens = {arm: native.tokens_of(pairs(arm), cfg.fit, 0, model) for arm in native.ARMS}
    assert abs(tokens["square"] / tokens["native"] - 1) <= native.CLOSE
    assert 0.85 < tokens["native"] / (cfg.fit.iterations * cfg.fit.packs * cfg.fit.capacity) <= 1
    few = {arm: Pairs(("",) * 12, pairs(arm).latents[:12], ()) for arm in native.ARMS}  # packs are not full, and the crops fill less of them
    with pytest.raises(UserError, match=r"square sees 0\.\d+ times the tokens of native; they must agree within 1%"):
        native.check_tokens(cfg, model, few.__getitem__, 0)


# Numbers


def test_differences_are_paired_and_unknown_clips_are_left_out() -> None:
    def results(values: list[float | None]) -> list[native.Results]:
        found = {name: [1.0 if value is None else value for value in values] for name in native.MEASURES} | {"in_frame": values}
        return [native.Results(_trained.Trained(Path("x"), 1.0, 100), {"13x32x32": found})]

    cfg = config("--seeds", "[0]", "--sizes", "[[13, 32, 32]]")
    ceiling: dict[str, dict[str, list[float | None]]] = {"13x32x32": {name: [1.0] * 4 for name in native.MEASURES if name != "loss"}}
    rows = native.compare(cfg, {"native": results([1.0, 1.0, 0.0, None]), "square": results([0.0, 1.0, None, 1.0])}, ceiling)
    row = next(row for row in rows if row["measure"] == "object in the frame")
    assert row["native"] == pytest.approx(2 / 3) and row["square"] == pytest.approx(2 / 3) and row["native_minus_square"] == pytest.approx(0.5)
    found = next(row for row in rows if row["measure"] == "an object is found")
    assert (found["native"], found["square"], found["drawn_clips"]) == (0.75, 0.75, 1.0)
    assert found["native_low"] < 0.75 < found["native_high"] and found["native_minus_square_low"] < 0 < found["native_minus_square_high"]
    both = next(row for row in rows if row["measure"] == "adherence and in the frame")
    assert (both["native"], both["square"], both["native_minus_square"]) == (0.5, 0.5, 0.0)
    assert rows[0]["measure"] == "found and in the frame"
    assert (rows[0]["native"], rows[0]["square"], rows[0]["native_minus_square"], rows[0]["drawn_clips"]) == (0.5, 0.5, 0.0, 1.0)


def test_losses_of_clips_average_to_the_loss() -> None:
    model = small_model()
    pairs = native.encode_pairs(model, native.draw_clips("curated", 4, seed=0, shape=ClipShape(5, 16, 24)))
    errors, losses = (measure(model, pairs, torch.Generator().manual_seed(0)) for measure in (held_out_errors, held_out_losses))
    assert errors.shape == (8, 4) and torch.allclose(errors.mean(1), losses)


# Keeping


def test_what_is_kept_is_made_once_and_only_for_its_settings(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"value": len(made)}

    file = tmp_path / "new" / "found.json"
    assert _trained.kept(file, {"a": (1, 2)}, make) == _trained.kept(file, {"a": (1, 2)}, make) == {"value": 1}
    with pytest.raises(UserError, match=r"was made with another a\. Give the same values, another --out"):
        _trained.kept(file, {"a": (1, 3)}, make)
    assert made == [1]


def test_a_table_names_the_commits_and_threads_that_made_what_was_kept(tmp_path: Path) -> None:
    cfg, file = config("--results", str(tmp_path)), tmp_path / "found.json"
    _results.check_can_end(cfg)
    _trained.kept(file, {"a": 1}, lambda: {"value": 1})
    own = _results.here("native", cfg)
    assert (own.commit, own.hardware["threads"]) == _results.maker() and own.commit == commit()
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"made": {"commit": "c0ffee", "threads": "7"}}))
    del content["made"]  # as it was kept before anybody noted it
    (tmp_path / "older.json").write_text(json.dumps(content))
    assert _trained.kept(file, {"a": 1}, dict) == _trained.kept(tmp_path / "older.json", {"a": 1}, dict) == {"value": 1}
    told = _results.here("native", cfg)
    assert told.commit == f"{own.commit}, c0ffee, unknown" and told.hardware["threads"] == f"{torch.get_num_threads()}, 7, unknown"
    _results.check_can_end(cfg)
    assert _results.here("native", cfg) == own, "another measurement read nothing of it"


def test_the_bench_trains_each_arm_once_and_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "CLOSE", 1.0)
    cfg = config("--out", str(tmp_path / "out"), "--seeds", "[0, 1]", "--sizes", "[[5, 16, 32], [5, 16, 16]]", "--sheet", str(tmp_path / "sheet.png"))
    trained: list[Path] = []
    train = _trained.train

    def counted(fit: Fit, run: Any, *more: Any) -> None:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(run.out)
        train(fit, run, *more)

    monkeypatch.setattr(_trained, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        native.main(cfg)
    first = {path: path.read_bytes() for path in (tmp_path / "out").rglob("network.safetensors")}
    assert len(first) == 3
    trained.clear()
    rows = native.main(cfg)["rows"]
    assert [out.relative_to(tmp_path / "out") for out in trained] == [Path("seed-1/square/run")]
    assert all(path.read_bytes() == content for path, content in first.items())
    monkeypatch.setattr(_trained, "train", None)
    assert native.main(cfg)["rows"] == rows
    assert (tmp_path / "sheet.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="made with another fit"):
        native.main(cfg.model_copy(update={"fit": cfg.fit.model_copy(update={"lr": 1e-3})}))
    told = [json.loads((tmp_path / "out" / "seed-0" / arm / "trained.json").read_text())["settings"]["data"] for arm in native.ARMS]
    assert told == ["native clips", "square crops of native clips"]
    with monkeypatch.context() as other:
        other.setattr(_trained, "LOOKS_VERSION", _trained.LOOKS_VERSION + 1)
        with pytest.raises(UserError, match=r"result\.json was made with another measure\."):
            native.main(cfg)
    with monkeypatch.context() as other:
        save_codec(tmp_path / "vae.safetensors", native.load_codec(_trained.CODEC), {"trained": "again"})
        other.setattr(_trained, "CODEC", tmp_path / "vae.safetensors")
        with pytest.raises(UserError, match=r"trained\.json was made with another codec\."):
            native.main(cfg)
    save_small_network(tmp_path / "out" / "seed-0" / "native" / "network.safetensors")
    with pytest.raises(UserError, match=r"result\.json was made with another network\."):
        native.main(cfg)


def test_a_killed_training_goes_on_under_the_same_settings_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = native.encode_pairs(small_model(), native.draw_clips("curated", 4, seed=0, shape=ClipShape(5, 16, 16)))
    fit = Fit(iterations=3, lr=1e-3, capacity=64, held_out=2, save_every=1)
    train = _trained.train

    def killed(fit: Fit, run: Any, *more: Any) -> None:
        iterations = run.iterations

        def once(n: int, **settings: Any) -> Any:
            for i in iterations(n, **settings):
                if i == 1:
                    raise KeyboardInterrupt
                yield i

        run.iterations = once
        train(fit, run, *more)

    def again(fit: Fit, seed: int = 0) -> _trained.Trained:
        what = _trained.training("some", 4, native.Size(width=32, depth=1, heads=2), None, fit)
        return _trained.train_kept(tmp_path, what, seed, None, lambda: pairs, pairs)

    with monkeypatch.context() as change, pytest.raises(KeyboardInterrupt):
        change.setattr(_trained, "train", killed)
        again(fit)
    for other, seed, key in ((fit.model_copy(update={"iterations": 5}), 0, "fit.iterations"), (fit.model_copy(update={"lr": 1e-2}), 0, "fit.lr"), (fit, 1, "seed")):
        with pytest.raises(UserError, match=f"a training was killed in .*run that had another {key}. Give the same values, another --out, or delete that folder"):
            again(other, seed)
    again(fit)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "loss" in line] == [0, 1, 2]


def test_both_arms_of_a_seed_begin_with_the_network_that_is_given(tmp_path: Path) -> None:
    base = save_small_network(tmp_path / "base.safetensors")
    what = _trained.training("native clips", 4, native.Size(width=32, depth=2, heads=2), base, native.Config().fit)
    given, fresh = _trained.first_model(what, 0, base).network.state_dict(), _trained.first_model(what, 0, None).network.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in small_model().network.state_dict().items())
    again, other = (_trained.first_model(what, seed, None).network.state_dict() for seed in (0, 1))
    assert all(torch.equal(value, again[name]) for name, value in fresh.items()) and any(not torch.equal(value, other[name]) for name, value in fresh.items())


def test_the_quick_form_runs_in_flat_rows_keeps_nothing_and_writes_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["bench", "native", "--quick", "--json", "--write", "--results", "results", "--date", "2026-11", *TOY, "--sizes", "[[5, 16, 32], [5, 16, 16]]"]
    assert cli.main(words) == 0
    captured = capsys.readouterr()
    rows = json.loads(captured.out)["rows"]
    assert all(set(row) == set(rows[0]) for row in rows)
    compared = [row for row in rows if row["part"] == "comparison"]
    assert {row["size"] for row in compared} == {"5x16x32", "5x16x16", native.POOLED} and len(compared) == 3 * len(native.MEASURES)
    assert [(row["seed"], row["arm"]) for row in rows if row["part"] == "training"] == [(0, "native"), (0, "square")]
    loss = [row["native"] for row in compared if row["measure"] == "held-out loss"]
    assert loss[2] == pytest.approx((loss[0] + loss[1]) / 2)
    assert "native 2/2" in captured.err and not (tmp_path / "runs").exists()
    assert "native minus square" in next((tmp_path / "results").glob("2026-11_*_native.md")).read_text()


def test_seeds_that_repeat_and_heads_that_do_not_divide_are_the_users_error() -> None:
    with pytest.raises(UserError, match=r"expected different seeds, got \[0, 1, 0\]"):
        config("--seeds", "[0, 1, 0]")
    with pytest.raises(UserError, match=r"network: 4 heads do not divide a width of 50 .* Give another --network\.width"):
        native.main(config("--quick", "--network", "{width: 50, depth: 2}"))


def test_clips_are_sampled_on_the_best_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    monkeypatch.setattr(native, "best_device", lambda: torch.device("meta"))
    for name, answer in (("looks", {}), ("held_out_errors", torch.zeros(8, 3)), ("sample", [torch.zeros(3, 5, 3, 16, 16)])):
        monkeypatch.setattr(native, name, noting_device(seen, answer))
    monkeypatch.setattr(LatentVideoModel, "encode_text", lambda *_: None)
    cfg, weights = config("--sizes", "[[5, 16, 16]]"), save_small_network(tmp_path / "network.safetensors")
    native.measured(cfg, weights, {"5x16x16": Pairs((), (), ())})
    native.write_sheet(cfg, tmp_path / "sheet.png", {"native": weights, "square": weights})
    assert seen == ["meta"] * 4


def test_sizes_off_the_grid_are_the_users_error() -> None:
    with pytest.raises(UserError, match="expected frames of 1 \\+ a multiple of 4"):
        config("--sizes", "[[12, 24, 48]]")


def test_an_interval_without_numbers_stays_null_in_rows() -> None:
    assert native._flat({"a": Interval(0.5, float("nan"), float("nan"))}) == {"a": 0.5, "a_low": None, "a_high": None}
