"""DDPO beside trl: our log-probabilities, gradients and step against trl's published formulas, written here once more in float64; passes, rows, verdicts, errors."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from align.config import load
from align.kernels import Ancestral
from base_model.errors import UserError
from base_model.guidance import Guided
from base_model.predictions import convert
from recipes import cli
from recipes.bench import _ddpo_worker, _stable_diffusion, ddpo_trl
from recipes.bench._ddpo_worker import Arm, Spec
from recipes.bench._stable_diffusion import StableDiffusion
from recipes.bench.ddpo_trl import Config, Told
from tests.recipes.test_bench import assert_flat

PROMPTS = ("a red circle moves left", "a blue bar grows")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    _stable_diffusion.save_tiny(made, PROMPTS)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> StableDiffusion:
    return _stable_diffusion.load(folder)


def arm(folder: Path, out: Path, **settings: Any) -> Arm:
    return Arm(Spec(model=folder, out=out, prompts=PROMPTS, clips=4, rollout_batch=4, steps=3, **settings))


def ddim(table: Tensor, eps: Tensor, x: Tensor, n: Tensor, m: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Mean [B,C,H,W] and std [B,1,1,1] of x at row m given x at row n, in float64: Song et al. 2021, arXiv 2010.02502, eq. 12 and 16."""
    a, b = (table.double()[row].reshape(-1, 1, 1, 1) for row in (n, m))
    std = eta * ((1 - b) / (1 - a)).sqrt() * (1 - a / b).sqrt()
    x0 = (x.double() - (1 - a).sqrt() * eps.double()) / a.sqrt()
    return b.sqrt() * x0 + (1 - b - std**2).sqrt() * eps.double(), std


def log_prob(mean: Tensor, std: Tensor, x: Tensor) -> Tensor:
    """Mean over the elements [B]."""
    return torch.distributions.Normal(mean, std).log_prob(x.double()).mean((1, 2, 3))


# The kernel and the adapter


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_log_probabilities_are_those_of_the_ddim_formula(model: StableDiffusion, eta: float) -> None:
    table, generator = model.scheduler.alphas_cumprod, torch.Generator().manual_seed(0)
    n = torch.arange(1, 1000, 37)
    for stride in (20, 100, 500):
        m = (n - stride).clamp_min(0)
        x, eps, z = torch.randn(3, len(n), 4, 8, 8, generator=generator)
        mean, std = ddim(table, eps, x, n, m, eta)
        x_next = (mean + std * z).float()
        wide = [tensor[:, :, None] for tensor in (x, eps)]
        t, s = model.angles[n], model.angles[m]
        step = Ancestral(eta)(model.path, wide[0], convert(model.path, wide[1], wide[0], t, kind="eps", to="u"), t, s)
        assert (step.log_prob(x_next[:, :, None]) - log_prob(mean, std, x_next)).abs().max() < 5e-6
        assert (step.mean[:, :, 0] - mean).abs().max() < 2e-5 * eps.abs().max() / table[-1].sqrt()


def test_times_are_the_schedulers_rows_as_angles_and_end_at_zero(model: StableDiffusion) -> None:
    table = model.scheduler.alphas_cumprod.double()
    assert torch.equal(model.whole_step(model.angles), torch.arange(1000))
    assert (model.path.alpha(model.angles.double()).square() / table - 1).abs().max() < 2e-5
    times = model.times(10)
    assert model.whole_step(times[:-1]).tolist() == list(range(901, 0, -100)) and times[-1] == 0 and bool((times.diff() < 0).all())


def test_the_velocity_says_the_noise_that_the_unet_predicts(model: StableDiffusion) -> None:
    cond, x, n = model.encode_text(PROMPTS), torch.randn(2, 4, 1, 32, 32), torch.tensor([901, 1])
    with torch.no_grad():
        _, eps = model.path.split(x, model(x, model.angles[n], cond), model.angles[n])
        assert (eps[:, :, 0] - model.network(x[:, :, 0], n, cond.text).sample).abs().max() < 1e-5
        video = model.decode(x)
    assert video.shape == (2, 1, 3, 64, 64) and 0 <= float(video.min()) <= float(video.max()) <= 1
    assert model.encode(video).shape == x.shape == (2, *model.latents.shape(_stable_diffusion.CLIP))


# An epoch


def trls_epoch(folder: Path, file: Path, *, train: str, guidance: float, arm: Arm) -> None:
    """An epoch by trl's formulas, in plain loops in float64 but for the UNet, as `_trl_worker.capture` writes it: two micro-batches of two samples, two steps one by one."""
    model, generator = _stable_diffusion.load(folder), torch.Generator().manual_seed(1)
    network = copy.deepcopy(arm.model.network)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)  # with 0, as at the start, A would have no gradient
    trained = {name.removeprefix(_ddpo_worker.PEFT): parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    tensors = {f"before.{name}": parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=3e-4, weight_decay=1e-4)
    empty, told = model.encode_text([""]).text.repeat(2, 1, 1), model.encode_text(PROMPTS).text
    advantages = torch.tensor([[1.2, -0.4], [0.3, -1.1]], dtype=torch.float64)
    for number in range(4):
        batch, stride = number // 2, 1000 // 3
        n = torch.tensor([[667, 1], [334, 667]])[number % 2]
        x, z = torch.randn(2, 2, 4, 32, 32, generator=generator)
        eps = network(x, n, told, return_dict=False)[0]
        if guidance > 1:
            without = network(x, n, empty, return_dict=False)[0]
            eps = without + guidance * (eps - without)
        mean, std = ddim(model.scheduler.alphas_cumprod, eps, x, n, (n - stride).clamp_min(0), 1.0)
        x_next = (mean + std * z).detach().float()
        now = log_prob(mean, std, x_next)
        old = now.detach() + torch.tensor([5e-5, -2e-4])  # within and without the clip range
        ratio = (now - old).exp()
        loss = torch.maximum(-advantages[batch] * ratio, -advantages[batch] * ratio.clamp(1 - 1e-4, 1 + 1e-4)).mean()
        (loss / 4).backward()
        embeds = torch.cat([empty, told]) if guidance > 1 else told
        call = {"latents": x, "timesteps": n, "next_latents": x_next, "log_probs": old.float(), "advantages": advantages[batch], "embeds": embeds, "eps": eps, "now": now.float()}
        tensors |= {f"{number:04d}.{name}": tensor.detach().clone() for name, tensor in call.items()}
    tensors |= {f"gradient.{name}": parameter.grad.clone() for name, parameter in trained.items() if parameter.grad is not None}
    torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
    optimizer.step()
    tensors |= {f"after.{name}": parameter.detach() for name, parameter in trained.items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


@pytest.mark.parametrize(("train", "guidance", "together"), [("lora", 5.0, 1), ("lora", 1.0, 2), ("full", 5.0, 2), ("full", 1.0, 1)])
def test_an_epoch_of_ours_learns_what_trls_formulas_say(folder: Path, tmp_path: Path, train: str, guidance: float, together: int) -> None:
    ours = arm(folder, tmp_path / "run", train=train, guidance=guidance, steps_a_pass=together)
    trls_epoch(folder, tmp_path / "epoch.safetensors", train=train, guidance=guidance, arm=ours)
    found = ours.compare(str(tmp_path / "epoch.safetensors"))
    print(found)
    assert found["kernel_difference"] < 2e-6 and found["log_prob_difference"] < 2e-6
    assert found["gradient_difference"] < 1e-3 and found["update_difference"] < 3e-2, "AdamW's first step is a sign, also of rounding"
    assert found["parameter_difference"] <= 2.01 * 3e-4


def test_an_epoch_of_ours_passes_as_many_images_whatever_goes_together(folder: Path, tmp_path: Path) -> None:
    for together, threads, calls in ((1, 1, 4), (2, 1, 2)):
        ours = arm(folder, tmp_path / f"{together}-{threads}", steps_a_pass=together)
        before = copy.deepcopy(dict(ours.model.network.named_parameters()))
        said = ours.epoch()
        assert (said["rolled_rows"], said["trained_rows"], said["trained_calls"]) == (4 * 3 * 2, 4 * 2 * 2, calls)
        assert said["seconds"] >= said["rollout"] + said["update"] > 0
        moved = {name for name, p in ours.model.network.named_parameters() if not torch.equal(p, before[name])}
        assert moved and all("lora_" in name for name in moved)


def test_samples_at_once_are_shared_among_threads(folder: Path, tmp_path: Path) -> None:
    ours = arm(folder, tmp_path / "run")
    ours.spec = ours.spec.model_copy(update={"threads": 2})
    assert [ours.each(n) for n in (4, 2, 1)] == [2, 1, 1]


def test_guidance_of_ours_is_one_pass_of_both_halves(model: StableDiffusion) -> None:
    sizes: list[int] = []
    handle = model.network.register_forward_pre_hook(lambda network, given: sizes.append(len(given[0])))
    with torch.no_grad():
        Guided(model, 5.0, joined=True)(torch.randn(2, 4, 1, 32, 32), torch.tensor(0.5), model.encode_text(PROMPTS))
    handle.remove()
    assert sizes == [4]


# Rows


def epoch(seconds: float, peak: int) -> dict[str, Any]:
    passes = {"rolled_rows": 320, "trained_rows": 288, "trained_calls": 72}
    return {"seconds": seconds, "rollout": seconds / 4, "update": seconds / 2, "cpu": 2 * seconds, **passes, "peak_bytes": peak}


def told(seconds: list[float], peak: int, apart: float | None) -> Told:
    compared = {} if apart is None else dict.fromkeys(ddpo_trl.DIFFERENCES, apart)
    return Told({"peak_bytes": peak // 2}, [epoch(each, peak) for each in seconds], compared)


def rows(fast: list[float], apart: float = 1e-7, peak: int = 2**29) -> list[dict[str, Any]]:
    trl, ours, batched = ddpo_trl.arms(Config())
    assert (trl.name, ours.name, batched.name) == ("trl", "ours", "ours, 3 steps a pass")
    spec = Spec(model=Path(), out=Path(), prompts=PROMPTS)
    return ddpo_trl.rows_of(spec, {trl: told([4.0, 12.0, 4.0], 2**29, None), ours: told([4.0, 10.0, 4.0], peak, apart), batched: told(fast, 2**30, apart)})


def test_rows_pair_the_rounds_of_trl_and_ours() -> None:
    trl, ours, batched = rows([2.0, 6.0, 2.5])
    assert_flat([trl, ours, batched])
    assert trl["seconds"] == 4 and trl["times_faster"] is None and trl["times_less_memory"] is None and trl["log_prob_difference"] is None
    assert [ours[f"times_faster{end}"] for end in ("", "_low", "_high")] == [1.0, 1.0, 1.2]
    assert [batched[f"{part}times_faster{end}"] for part in ("", "rollout_", "update_") for end in ("", "_low", "_high")] == pytest.approx([2.0, 1.6, 2.0] * 3)
    assert ours["times_less_memory"] == 1 and batched["times_less_memory"] == 0.5 and ours["memory_before_bytes"] == 2**28
    cells = ddpo_trl.in_file([batched])[0]
    assert cells["times_faster"] == "2 [1.6, 2]" and cells["peak_memory_MiB"] == 1024 and cells["log_prob_difference"] == 1e-7


def test_a_verdict_needs_the_whole_interval() -> None:
    good = ddpo_trl.verdicts(rows([2.0, 6.0, 2.5]))
    assert [line.partition(": ")[2].partition(" (")[0].partition(",")[0] for line in good] == ["holds", "holds", "holds", "holds", "does not hold"]
    assert "lora with guidance 5: 2.00 [1.60, 2.00]" in good[2]
    unsure, slow = (ddpo_trl.verdicts(rows(fast))[2] for fast in ([2.0, 10.0, 2.0], [3.0, 10.0, 3.0]))
    assert ": cannot be told (" in unsure and ": does not hold (" in slow
    bad = ddpo_trl.verdicts(rows([2.0, 6.0, 2.5], apart=2e-5, peak=2**29 + 1))
    assert bad[0] == "Log-probabilities equal to 1e-05: does not hold, 2.0e-05 apart at most." and "does not hold" in bad[3]


# Processes and the environment


def test_a_worker_answers_orders_and_says_why_it_ended(tmp_path: Path) -> None:
    spec = Spec(model=Path(), out=Path(), prompts=PROMPTS)
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from recipes.bench._serve import serve; serve(lambda spec: {'half': lambda of: {'is': of / spec['clips']}})"
    with ddpo_trl.worker("one", [sys.executable, "-c", code, str(ROOT)], spec, tmp_path / "one.log") as one:
        assert one.answer()["peak_bytes"] > 2**20
        assert one.ask("half", of=8) == {"is": 0.5} and one.ask("half", of=16) == {"is": 1.0}
        with pytest.raises(UserError, match=r"'one' ended: KeyError: 'nothing'.*one\.log"):
            one.ask("nothing")
    assert one.process.returncode is not None


def test_an_environment_that_cannot_be_made_is_one_line_and_exit_status_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def offline(*words: str) -> None:
        (tmp_path / "out" / "environment").mkdir(parents=True, exist_ok=True)
        if "pip" in words:
            raise subprocess.CalledProcessError(1, words, stderr="WARNING: Retrying\nERROR: No matching distribution found for torch==2.13.0\n")

    monkeypatch.setattr(ddpo_trl, "_do", offline)
    assert cli.main(["bench", "ddpo-trl", "--quick", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot make an environment for trl" in said and "No matching distribution found for torch==2.13.0" in said and "--python FILE" in said
    assert not (tmp_path / "out" / "environment").exists()


def test_an_environment_is_made_once_for_the_same_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, ...]] = []

    def note(*words: str) -> None:
        done.append(words)
        (tmp_path / "environment").mkdir(exist_ok=True)

    monkeypatch.setattr(ddpo_trl, "_do", note)
    cfg = Config(out=tmp_path)
    assert ddpo_trl.environment(cfg) == ddpo_trl.environment(cfg) == tmp_path / "environment" / "bin" / "python"
    assert len(done) == 3 and done[1][-1].startswith("torch==") and "trl==0.23.1" in done[2] and "torchvision" not in str(done)
    monkeypatch.setattr(ddpo_trl, "PINS", ("trl==0.23.0",))
    ddpo_trl.environment(cfg)
    assert len(done) == 6


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--clips", "6"], "each must be a multiple"),
        (["--guidance", "[0.5]"], "guidance below 1"),
        (["--train", "[]"], "nothing to measure"),
        (["--width", "48"], "groups of channels"),
        (["--python", "no_such_python"], "there is no no_such_python"),
    ],
)
def test_what_cannot_be_measured_is_the_users_error(tmp_path: Path, words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        ddpo_trl.main(load(Config, None, ["--out", str(tmp_path / "out"), *words]))


def trls_python() -> Path:
    """The environment that the bench made, or the one that RUSHES_TRL_PYTHON names."""
    named = os.environ.get("RUSHES_TRL_PYTHON")
    python = Path(named) if named else ROOT / Config().out / "environment" / "bin" / "python"
    if not python.exists():
        pytest.skip("no environment with trl 0.23: `rushes bench ddpo-trl` makes one, or RUSHES_TRL_PYTHON names its Python")
    return python


def test_log_probabilities_and_gradients_are_those_of_trl_itself(tmp_path: Path) -> None:
    words = ["--quick", "--python", str(trls_python()), "--out", str(tmp_path / "out"), "--threads", "1", "--write", "--results", str(tmp_path / "results"), "--date", "2026-11"]
    found = ddpo_trl.main(load(Config, None, words))["rows"]
    assert isinstance(found, list)
    assert_flat(found)
    trl, *ours = found
    assert [row["arm"] for row in ours] == ["ours", "ours, 3 steps a pass"]
    for row in ours:
        assert row["log_prob_difference"] < 1e-5 and row["kernel_difference"] < 1e-5
        assert row["gradient_difference"] < 1e-2 and row["update_difference"] < 1e-2 and math.isfinite(row["times_faster"])
        assert (row["rolled_rows"], row["trained_rows"]) == (trl["rolled_rows"], trl["trained_rows"]) == (2 * 3 * 2, 2 * 2 * 2)
    (file,) = (tmp_path / "results").iterdir()
    assert "Log-probabilities equal to 1e-05: holds" in file.read_text()
