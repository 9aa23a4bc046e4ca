"""Rollouts replay exactly, keep only what training needs, and never pass off a deterministic step as a random one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from align.kernels import CPS, ODE, Ancestral, DanceSDE, FlowSDE, Kernel
from align.trajectory import Trajectory, finish, join_steps, path_kl, replay, rollout, transition
from base_model.guidance import Guided
from base_model.paths import Path, RectifiedFlow, VariancePreserving
from base_model.types import Conditioning, LatentSpec
from tests.worlds import GaussianModel, GaussianWorld, ancestral_rule, conditions

KERNELS = [Ancestral(0.8), FlowSDE(0.7), DanceSDE(0.3), CPS(0.8)]


class TinyModel:
    """A convolutional velocity network on text-conditioned latents, float32."""

    latents = LatentSpec(channels=2, time_stride=1, space_stride=1)

    def __init__(self, path: Path) -> None:
        self.path = path
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), nn.SiLU(), nn.Conv3d(8, 2, 3, padding=1))
        self.calls: list[int] = []

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        self.calls.append(len(x_t))
        planes = torch.stack([t, cond.text.mean((1, 2))], 1)[:, :, None, None, None].expand(-1, -1, *x_t.shape[2:])
        return self.network(torch.cat([x_t, planes], 1)).float()

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        raise NotImplementedError

    def encode(self, video: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(self, x0: Tensor) -> Tensor:
        raise NotImplementedError


def cond(n: int) -> Conditioning:
    return Conditioning(tuple(map(str, range(n))), torch.linspace(-1, 1, n)[:, None, None], torch.ones(n, 1, dtype=torch.bool))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def start(n: int = 6) -> Tensor:
    return torch.randn(n, 2, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def grid(path: Path, num_steps: int = 5) -> Tensor:
    return torch.linspace(path.t_max, 0, num_steps + 1)


def roll(kernel: Kernel, path: Path | None = None, *, dtype: torch.dtype = torch.float32, stochastic: object = None) -> tuple[TinyModel, Trajectory]:
    model = TinyModel(path or RectifiedFlow())
    trajectory = rollout(model, kernel, start(), grid(model.path), cond(6), noise=seeded(), stochastic=stochastic, dtype=dtype)  # type: ignore[arg-type]
    return model, trajectory


@pytest.mark.parametrize("path", [RectifiedFlow(), VariancePreserving()], ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_the_first_ratio_is_exactly_one(kernel: Kernel, dtype: torch.dtype, path: Path) -> None:
    model, trajectory = roll(kernel, path, dtype=dtype)
    steps = trajectory.steps()
    assert len(steps) == 4
    for step in steps:
        now = transition(model, kernel, step.x, step.t, step.s, trajectory.cond).log_prob(step.x_next)
        assert now.requires_grad and step.x_next.dtype == dtype and step.x.dtype == dtype
        assert ((now - step.log_prob).exp() == 1).all()


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_the_first_ratio_is_one_to_a_millionth_in_other_micro_batches(kernel: Kernel) -> None:
    model, trajectory = roll(kernel)
    for step in trajectory.steps():
        for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
            some = step.select(part)
            now = transition(model, kernel, some.x, some.t, some.s, trajectory.cond[some.rows]).log_prob(some.x_next)
            assert_close(now, some.log_prob, atol=1e-6, rtol=0)


def test_scoring_before_rounding_would_be_seen() -> None:
    """The same rollout in float32 and bfloat16 storage: had the score been taken before rounding, both would agree in the first step."""
    _, wide = roll(Ancestral(0.3))
    _, narrow = roll(Ancestral(0.3), dtype=torch.bfloat16)
    assert float((wide.steps()[0].log_prob - narrow.steps()[0].log_prob).abs().max()) > 1e-5


def test_states_that_are_not_kept_are_not_rounded_and_the_model_never_sees_a_narrow_one() -> None:
    seen: list[torch.dtype] = []

    class Watched(TinyModel):
        def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
            seen.append(x_t.dtype)
            return super().__call__(x_t, t, cond)

    model = Watched(RectifiedFlow())
    narrow, wide = (rollout(model, ODE(), start(), grid(model.path), cond(6), noise=seeded(), dtype=dtype).x0 for dtype in (torch.bfloat16, torch.float32))
    assert not torch.equal(narrow, wide), "asked for noise, though there is none, the steps are kept"
    narrow, wide = (rollout(model, ODE(), start(), grid(model.path), cond(6), noise=seeded(), stochastic=[], dtype=dtype).x0 for dtype in (torch.bfloat16, torch.float32))
    assert torch.equal(narrow, wide) and narrow.dtype == torch.float32
    made = rollout(model, Ancestral(1.0), start(), grid(model.path), cond(6), noise=seeded(), dtype=torch.bfloat16)
    assert made.x0.dtype == torch.float32 and set(seen) == {torch.float32}
    step = made.steps()[0]
    transition(model, Ancestral(1.0), step.x, step.t, step.s, made.cond)
    assert step.x.dtype == torch.bfloat16 and set(seen) == {torch.float32}


def test_one_time_for_all_clips_is_as_good_as_one_each() -> None:
    model, (t, s) = TinyModel(RectifiedFlow()), torch.tensor([0.8, 0.6])
    alone = transition(model, Ancestral(1.0), start(), t, s, cond(6))
    each = transition(model, Ancestral(1.0), start(), t.expand(6), s.expand(6), cond(6))
    assert torch.equal(alone.mean, each.mean) and torch.equal(alone.std, each.std) and alone.std.shape == (6, 1, 1, 1, 1)


def test_only_states_beside_noisy_steps_are_kept() -> None:
    model, trajectory = roll(Ancestral(1.0), stochastic=[1])
    assert [x is not None for x in trajectory.x] == [False, True, True, False, False, True]
    assert [step.rows.tolist() for step in trajectory.steps()] == [list(range(6))]
    assert model.calls == [6] * 5 and trajectory.forward_passes == 30
    _, full = roll(Ancestral(1.0))
    assert all(x is not None for x in full.x)


def test_the_last_step_is_deterministic_and_equals_the_denoised_clip() -> None:
    model, trajectory = roll(DanceSDE(0.3))
    assert not trajectory.noisy[-1].any() and trajectory.log_prob[-1].isnan().all()
    assert trajectory.x[4] is not None
    with torch.no_grad():
        x0, _ = model.path.split(trajectory.x[4], model(trajectory.x[4], trajectory.t[4], trajectory.cond), trajectory.t[4])
    assert_close(trajectory.x0, x0, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="last step is always deterministic"):
        roll(DanceSDE(0.3), stochastic=[4])


def test_steps_without_noise_are_ode_steps_even_if_the_kernel_is_an_sde() -> None:
    _, trajectory = roll(FlowSDE(0.7), stochastic=[2])
    _, plain = roll(ODE())
    _, same = roll(FlowSDE(0.7), stochastic=[])
    assert torch.equal(plain.x0, same.x0) and not torch.equal(plain.x0, trajectory.x0)


@pytest.mark.parametrize("kernel", [ODE(), Ancestral(0.0), DanceSDE(0.0)], ids=str)
def test_a_rollout_without_noise_has_no_steps_to_train_on(kernel: Kernel) -> None:
    _, trajectory = roll(kernel)
    with pytest.raises(ValueError, match="no stochastic step to train on"):
        trajectory.steps()


def test_each_clip_may_be_noisy_at_its_own_step() -> None:
    chosen = torch.zeros(5, 6, dtype=torch.bool)
    chosen[torch.tensor([0, 0, 1, 1, 3, 3]), torch.arange(6)] = True
    model, trajectory = roll(Ancestral(1.0), stochastic=chosen)
    steps = trajectory.steps()
    assert [step.rows.tolist() for step in steps] == [[0, 1], [2, 3], [4, 5]]
    for step in steps:
        now = transition(model, Ancestral(1.0), step.x, step.t, step.s, trajectory.cond[step.rows]).log_prob(step.x_next)
        assert_close(now, step.log_prob, atol=1e-6, rtol=0)
    _, plain = roll(ODE())
    first = rollout(model, Ancestral(1.0), start()[:2], grid(model.path), cond(6)[:2], noise=seeded(), stochastic=[0])
    assert_close(trajectory.x0[:2], first.x0, atol=1e-6, rtol=0)
    assert not torch.equal(trajectory.x0, plain.x0)


def test_each_clip_may_have_its_own_times() -> None:
    model = TinyModel(RectifiedFlow())
    times = torch.stack([grid(model.path), grid(model.path).square()], 1)
    both = rollout(model, ODE(), start(2), times, cond(2), noise=seeded())
    for i in range(2):
        alone = rollout(model, ODE(), start(2)[i : i + 1], times[:, i], cond(2)[i : i + 1], noise=seeded())
        assert_close(both.x0[i : i + 1], alone.x0, atol=1e-6, rtol=0)


def test_noise_is_asked_for_noisy_steps_only_and_used_as_given() -> None:
    model, asked = TinyModel(RectifiedFlow()), []

    def noise(k: int) -> Tensor:
        asked.append(k)
        return torch.full_like(start(), float(k))

    trajectory = rollout(model, Ancestral(1.0), start(), grid(model.path), cond(6), noise=noise, stochastic=[1, 3])
    assert asked == [1, 3]
    for step, k in zip(trajectory.steps(), asked, strict=True):
        with torch.no_grad():
            gaussian = transition(model, Ancestral(1.0), step.x, step.t, step.s, trajectory.cond)
        assert_close(step.x_next, gaussian.mean + k * gaussian.std, atol=1e-6, rtol=0)


def test_the_same_generator_gives_the_same_rollout() -> None:
    assert torch.equal(roll(Ancestral(1.0))[1].x0, roll(Ancestral(1.0))[1].x0)


def test_a_step_keeps_its_own_states_in_order() -> None:
    """x and x_next are neighbours on the path: the mean of the world's exact step from x lies within 6 std of x_next, from no other state."""
    world = GaussianWorld()
    model = GaussianModel(world)
    x = torch.randn(2, 1, 1, 20, 20, generator=seeded(), dtype=torch.float64)
    trajectory = rollout(model, Ancestral(0.2), x, grid(world.path, 6).double(), conditions(2), noise=seeded(), dtype=torch.float64)
    for k, step in enumerate(trajectory.steps()):
        assert torch.equal(step.t, trajectory.t[k]) and torch.equal(step.s, trajectory.t[k + 1])
        gaussian = transition(model, Ancestral(0.2), step.x, step.t, step.s, trajectory.cond)
        z = ((step.x_next - gaussian.mean) / gaussian.std).detach()
        assert float(z.abs().max()) < 6 and abs(float(z.std()) - 1) < 0.1


def test_latents_that_are_not_numbers_are_not_taken_for_deterministic_steps() -> None:
    model = TinyModel(RectifiedFlow())
    x = start()
    x[2] = float("nan")
    steps = rollout(model, Ancestral(1.0), x, grid(model.path), cond(6), noise=seeded()).steps()
    assert len(steps) == 4 and all(step.log_prob.isnan().tolist() == [i == 2 for i in range(6)] for step in steps)


def test_bad_grids_and_masks_are_refused() -> None:
    model = TinyModel(RectifiedFlow())
    with pytest.raises(ValueError, match="decrease strictly"):
        rollout(model, ODE(), start(), grid(model.path).flip(0), cond(6), noise=seeded())
    with pytest.raises(ValueError, match="decrease strictly"):
        rollout(model, ODE(), start(), grid(model.path)[:-1], cond(6), noise=seeded())
    for odd in ([1.0, 0.3, 0.6, 0.0], [1.0, 0.5, 0.5, 0.0]):
        with pytest.raises(ValueError, match="decrease strictly"):
            rollout(model, ODE(), start(), torch.tensor(odd), cond(6), noise=seeded())
    with pytest.raises(ValueError, match="stochastic must be"):
        roll(ODE(), stochastic=torch.zeros(3, dtype=torch.bool))


def test_noisy_steps_may_be_named_or_masked() -> None:
    mask = torch.tensor([False, True, False, True, False])
    assert torch.equal(roll(Ancestral(1.0), stochastic=mask)[1].x0, roll(Ancestral(1.0), stochastic=[1, 3])[1].x0)


def branched(kernel: Kernel, stochastic: object, *, G: int = 3, noise: object = None, dtype: torch.dtype = torch.float32) -> tuple[TinyModel, Trajectory, Trajectory]:
    """Two rows of noise with G clips each: once by branching, once with every row G times."""
    model = TinyModel(RectifiedFlow())
    x, told = start(2), cond(2)
    per_clip = stochastic.repeat_interleave(G, 1) if isinstance(stochastic, Tensor) and stochastic.dim() == 2 else stochastic
    shared = rollout(model, kernel, x, grid(model.path), told, noise=noise or seeded(), stochastic=stochastic, branches=G, dtype=dtype)  # type: ignore[arg-type]
    calls, model.calls = model.calls, []
    plain = rollout(
        model, kernel, x.repeat_interleave(G, 0), grid(model.path), told.repeat(G), noise=noise or seeded(), stochastic=per_clip, dtype=dtype  # type: ignore[arg-type]
    )
    model.calls = calls
    return model, shared, plain


PER_PROMPT = torch.tensor([[False, False], [True, False], [False, False], [False, True], [False, False]])
LATER_ROW_FIRST = torch.tensor([[False, False], [False, True], [True, False], [False, False], [False, False]])


@pytest.mark.parametrize(
    ("stochastic", "rows"),
    [([2], [2, 2, 2, 6, 6]), ([0], [2, 6, 6, 6, 6]), ([1, 3], [2, 2, 6, 6, 6]), (None, [2, 6, 6, 6, 6]), (PER_PROMPT, [2, 2, 4, 4, 6]), (LATER_ROW_FIRST, [2, 2, 4, 6, 6])],
)
def test_clips_that_branch_off_are_the_clips_of_a_repeated_start_for_fewer_evaluations(stochastic: object, rows: list[int]) -> None:
    model, shared, plain = branched(Ancestral(0.8), stochastic)
    assert model.calls == rows and shared.forward_passes == sum(rows) and plain.forward_passes == 30
    assert_close(shared.x0, plain.x0, atol=1e-6, rtol=0)
    assert shared.cond.prompts == plain.cond.prompts == ("0",) * 3 + ("1",) * 3
    assert torch.equal(shared.noisy, plain.noisy) and torch.equal(shared.t, plain.t)
    assert torch.equal(shared.origin[-1], torch.arange(6)) and torch.equal(plain.origin, torch.arange(6).expand(6, -1))
    assert_close(shared.log_prob, plain.log_prob, atol=2e-6, rtol=0, equal_nan=True)
    for a, b in zip(shared.steps(), plain.steps(), strict=True):
        assert torch.equal(a.rows, b.rows)
        assert_close(a.x[a.origin], b.x[b.origin], atol=1e-6, rtol=0)
        assert_close(a.x_next, b.x_next, atol=1e-6, rtol=0)


def test_a_clip_of_a_group_costs_k_over_G_and_what_is_left() -> None:
    """K = 8 steps, noise at step 4, G = 16 clips: (4 + 1)/16 + 3 evaluations a clip, counted at the network, instead of 8; k/G + K - k = 4.25 would branch one step earlier."""
    model, seen = TinyModel(RectifiedFlow()), []
    model.network.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    made = rollout(model, FlowSDE(0.7), start(2), grid(model.path, 8), cond(2), noise=seeded(), stochastic=[4], branches=16)
    assert seen == [2] * 5 + [32] * 3 and len(made.x0) == 32
    assert sum(seen) / 32 == 5 / 16 + 3 and made.forward_passes == sum(seen)
    assert len(made.x0.flatten(1).unique(dim=0)) == 32, "no two clips are alike"
    seen.clear()
    replay(model, FlowSDE(0.7), made.steps()[0], made.cond)
    assert seen == [2], "what the group shares is replayed once, too"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stochastic", [[2], [1, 3], None])
def test_the_first_ratio_of_branched_clips_is_exactly_one(stochastic: object, dtype: torch.dtype) -> None:
    model, shared, _ = branched(FlowSDE(0.7), stochastic, dtype=dtype)
    for step in shared.steps():
        now = replay(model, FlowSDE(0.7), step, shared.cond)
        assert now.mean.requires_grad and now.mean.shape == step.x_next.shape
        assert torch.equal(now.log_prob(step.x_next), step.log_prob)


def test_the_gradient_of_a_shared_replay_is_that_of_every_clip_on_its_own() -> None:
    model, shared, plain = branched(Ancestral(0.8), [1, 2])
    advantage = torch.randn(6, generator=seeded())
    gradients = []
    for trajectory in (shared, plain):
        total = sum((replay(model, Ancestral(0.8), step, trajectory.cond).log_prob(step.x_next) * advantage).sum() for step in trajectory.steps())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.network.parameters()))]))
    print(float((gradients[0] - gradients[1]).abs().max()), float(gradients[1].abs().max()))
    assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_some_clips_of_a_shared_step_are_a_smaller_shared_step() -> None:
    model, shared, _ = branched(Ancestral(0.8), [2])
    step = shared.steps()[0]
    assert step.origin.tolist() == [0, 0, 0, 1, 1, 1] and len(step.x) == 2
    some = step.select(torch.tensor([5, 0, 3]))
    assert len(some.x) == 2 and some.rows.tolist() == [5, 0, 3]
    assert_close(replay(model, Ancestral(0.8), some, shared.cond).log_prob(some.x_next), step.log_prob[[5, 0, 3]], atol=1e-6, rtol=0)
    last = step.select(slice(4, None))
    assert len(last.x) == 1 and last.rows.tolist() == [4, 5] and torch.equal(last.t, step.t[4:]) and torch.equal(last.s, step.s[4:])
    assert torch.equal(last.x[0], step.x[1])
    assert_close(replay(model, Ancestral(0.8), last, shared.cond).log_prob(last.x_next), step.log_prob[4:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("branches", [1, 2])
def test_joined_steps_are_replayed_in_one_pass_with_the_log_probabilities_and_gradients_of_each(branches: int) -> None:
    model, kernel = TinyModel(RectifiedFlow()), Ancestral(0.8)
    taken = rollout(model, kernel, start(), torch.linspace(1, 0, 6), cond(6), noise=seeded(), stochastic=[1, 2, 3], branches=branches)
    apart = [step.select(torch.tensor([4, 1, 5])) for step in taken.steps()[:2]] + taken.steps()[2:]
    joined = join_steps(apart)
    model.calls.clear()
    together = replay(model, kernel, joined, taken.cond).log_prob(joined.x_next)
    each = torch.cat([replay(model, kernel, step, taken.cond).log_prob(step.x_next) for step in apart])
    assert model.calls == [len(joined.x), *(len(step.x) for step in apart)] and len(together) == 3 + 3 + 6 * branches
    assert_close(together, each, atol=1e-6, rtol=0)
    assert_close(joined.log_prob, each.detach(), atol=1e-6, rtol=0)
    weight = torch.arange(1.0, 1 + len(each))
    gradients = [torch.autograd.grad((found * weight).sum(), list(model.network.parameters())) for found in (together, each)]
    for ours, wanted in zip(*gradients, strict=True):
        assert_close(ours, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-4)
    (alone,) = taken.steps()[:1]
    assert torch.equal(join_steps([alone]).origin, alone.origin)
    with pytest.raises(ValueError, match="no step to join"):
        join_steps([])


def test_branches_take_the_noise_of_their_own_clip() -> None:
    given = torch.randn(5, 6, 2, 2, 4, 4, generator=seeded())
    _, shared, plain = branched(Ancestral(0.8), [1, 3], noise=lambda k: given[k])
    assert_close(shared.x0, plain.x0, atol=1e-6, rtol=0)


def test_a_prompt_whose_steps_are_all_deterministic_gives_equal_clips() -> None:
    only_first = torch.zeros(5, 2, dtype=torch.bool)
    only_first[2, 0] = True
    model, shared, _ = branched(Ancestral(0.8), only_first)
    assert model.calls == [2, 2, 2, 4, 4]
    assert torch.equal(shared.x0[3:], shared.x0[3:4].expand(3, -1, -1, -1, -1)) and len(shared.x0[:3].flatten(1).unique(dim=0)) == 3
    assert [step.rows.tolist() for step in shared.steps()] == [[0, 1, 2]]
    _, still, _ = branched(ODE(), [2])
    assert len(still.x0) == 6 and still.forward_passes == 10
    with pytest.raises(ValueError, match="no stochastic step"):
        still.steps()


def test_a_rollout_without_branches_is_refused() -> None:
    with pytest.raises(ValueError, match="branches must be at least 1"):
        branched(ODE(), [2], G=0)


def test_rows_that_branch_may_have_their_own_times() -> None:
    model = TinyModel(RectifiedFlow())
    times = torch.stack([grid(model.path), grid(model.path).square()], 1)
    both = rollout(model, Ancestral(1.0), start(2), times, cond(2), noise=seeded(), stochastic=[1], branches=2)
    plain = rollout(model, Ancestral(1.0), start(2).repeat_interleave(2, 0), times.repeat_interleave(2, 1), cond(2).repeat(2), noise=seeded(), stochastic=[1])
    assert_close(both.x0, plain.x0, atol=1e-6, rtol=0)
    assert torch.equal(both.t, plain.t)


@pytest.mark.parametrize("stochastic", [None, [1], PER_PROMPT])
def test_what_is_finished_again_is_what_was_made_and_carries_the_gradient_of_the_deterministic_end(stochastic: object) -> None:
    model, shared, _ = branched(Ancestral(0.8), stochastic)
    model.calls = []
    again = finish(model, shared)
    assert torch.equal(again, shared.x0) and again.requires_grad
    assert model.calls == [6] * (3 if stochastic == [1] else 1)
    with pytest.raises(ValueError, match="no stochastic step"):
        finish(model, rollout(model, ODE(), start(), grid(model.path), cond(6), noise=seeded()))


def test_replay_under_guidance_is_exactly_what_was_sampled_for_two_passes_a_step() -> None:
    model = TinyModel(RectifiedFlow())
    model.encode_text = lambda prompts: Conditioning(("",), torch.full((1, 1, 1), 3.0), torch.ones(1, 1, dtype=torch.bool))  # type: ignore[method-assign]
    gradients = {}
    for train_empty in (True, False):
        guided = Guided(model, 2.5, train_empty)
        model.calls = []
        made = rollout(guided, FlowSDE(0.7), start(2), grid(model.path), cond(2), noise=seeded(), stochastic=[2], branches=3)
        assert model.calls == [2, 2] * 3 + [6, 6] * 2, "two passes for every state"
        step = made.steps()[0]
        now = replay(guided, FlowSDE(0.7), step, made.cond).log_prob(step.x_next)
        assert torch.equal(now, step.log_prob)
        gradients[train_empty] = torch.autograd.grad(now.sum(), next(model.network.parameters()))[0]
        with torch.no_grad():
            unguided = replay(model, FlowSDE(0.7), step, made.cond).log_prob(step.x_next)
        assert float((unguided - step.log_prob).abs().max()) > 1e-3, "replay without guidance is another policy"
    assert not torch.allclose(gradients[True], gradients[False], rtol=0.1), "one of them trains one pass only"


@pytest.mark.gpu
def test_branches_selection_and_replay_work_where_the_noise_is_drawn_elsewhere() -> None:
    model = TinyModel(RectifiedFlow())
    model.network.cuda()
    x, told = start(2).cuda(), cond(2).to(torch.device("cuda"))
    made = rollout(model, Ancestral(0.8), x, grid(model.path), told, noise=seeded(), stochastic=PER_PROMPT, branches=3)
    for step in made.steps():
        some = step.select(torch.tensor([0, 2], device="cuda"))
        assert_close(replay(model, Ancestral(0.8), some, made.cond).log_prob(some.x_next), some.log_prob, atol=1e-5, rtol=0)
    assert torch.equal(finish(model, made), made.x0)


# How far a policy went


def paths(policy: GaussianModel, times: Sequence[float], clips: int) -> Trajectory:
    x = torch.randn(clips, 1, 2, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return rollout(policy, Ancestral(), x, torch.tensor(times, dtype=torch.float64), conditions(clips), noise=seeded(), dtype=torch.float64)


def by_hand(policy: GaussianWorld, prior: GaussianWorld, taken: Trajectory) -> Tensor:
    """The same in Python's own arithmetic: of each noisy step (difference of means)^2 / (2 variance), over all elements [B]."""
    total = torch.zeros(len(taken.cond), dtype=torch.float64)
    for step in taken.steps():
        t, s = float(step.t[0]), float(step.s[0])
        c_x0, c_eps, _, std = ancestral_rule(1.0)(policy, t, s)
        (p, q), (e, f) = policy.denoiser(t)
        (p0, q0), (e0, f0) = prior.denoiser(t)
        difference = (c_x0 * (p - p0) + c_eps * (e - e0)) * step.x[step.origin] + c_x0 * (q - q0) + c_eps * (f - f0)
        total += (difference**2 / (2 * std**2)).flatten(1).sum(1)
    return total


@pytest.mark.parametrize("path", [RectifiedFlow(), VariancePreserving()])
def test_the_kl_of_a_path_is_the_sum_of_its_steps(path: Path) -> None:
    policy, prior = GaussianWorld(path, 0.9, 0.4), GaussianWorld(path, 0.4, 0.5)
    taken = paths(GaussianModel(policy), policy.grid(12), 5)
    assert_close(path_kl(GaussianModel(policy), GaussianModel(prior), Ancestral(), taken), by_hand(policy, prior, taken), rtol=1e-9, atol=0)
    assert path_kl(GaussianModel(policy), GaussianModel(policy), Ancestral(), taken).tolist() == [0.0] * 5


@pytest.mark.parametrize("mean", [1.0, 0.3])
def test_with_fine_ancestral_steps_it_becomes_the_kl_of_the_clips_with_the_noise_that_is_left(mean: float) -> None:
    """The error is about proportional to the step, so two grids tell where it goes."""
    policy, prior, left = GaussianWorld(mean=mean), GaussianWorld(), 0.1
    ends = [GaussianWorld(mean=m, std=s) for m, s in (policy.marginal(left), prior.marginal(left))]
    coarse, fine = (
        float(path_kl(GaussianModel(policy), GaussianModel(prior), Ancestral(), paths(GaussianModel(policy), [*torch.linspace(1, left, k).tolist(), 0.0], 4)).mean()) / 32
        for k in (60, 240)
    )
    assert ends[0].kl(ends[1]) < fine < coarse and (4 * fine - coarse) / 3 == pytest.approx(ends[0].kl(ends[1]), rel=5e-3)


def test_the_kl_counts_the_clips_that_took_noise_and_nothing_without_noise_has_one() -> None:
    policy, prior = GaussianModel(GaussianWorld(mean=0.9)), GaussianModel(GaussianWorld())
    x, times = torch.zeros(3, 1, 1, 2, 2), torch.tensor([1.0, 0.5, 0.2, 0.0])
    some = rollout(policy, Ancestral(), x, times, conditions(3), noise=seeded(), stochastic=torch.tensor([[True, False, True], [False, False, True], [False] * 3]))
    found = path_kl(policy, prior, Ancestral(), some)
    assert found[1] == 0 and 0 < found[0] < found[2]
    with pytest.raises(ValueError, match="every step was deterministic"):
        path_kl(policy, prior, Ancestral(), rollout(policy, ODE(), x, times, conditions(3), noise=seeded()))
