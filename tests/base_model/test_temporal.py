"""Temporal layers in an image DiT: nothing at the start, then places talk across frames and nothing else does."""

import itertools

import torch
from torch import Tensor

from base_model.networks.dit import DiT, DiTConfig, Told
from base_model.networks.packing import Packed, Segments, pack, regroup, unpack
from base_model.networks.temporal import Places, TemporalBlock, TemporalDiT

SMALL = DiTConfig(channels=4, width=24, depth=2, heads=2, text_width=10, rotary_axes=(4, 4, 4))
SHAPES = [(4, 3, 4, 4), (4, 3, 4, 4), (4, 1, 4, 6), (4, 5, 2, 4)]
TEXTS = (3, 5, 4, 1)


def shaken(network: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)


def image_model() -> DiT:
    dit = DiT(SMALL)
    shaken(dit, 0)
    return dit


def trained_looking() -> TemporalDiT:
    network = TemporalDiT(image_model())
    shaken(network.blocks, 1)
    return network


def inputs() -> tuple[list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(2)
    clips = [torch.randn(shape, generator=generator) for shape in SHAPES]
    texts = [torch.randn(length, 10, generator=generator) for length in TEXTS]
    return clips, texts, torch.rand(len(SHAPES), generator=generator)


def run(network: DiT | TemporalDiT, clips: list[Tensor], texts: list[Tensor], t: Tensor, *, stride: float = 1, begin: float = 0) -> list[Tensor]:
    packed = pack(clips, SMALL.patch)
    positions = packed.positions * torch.tensor([stride, 1, 1]) + torch.tensor([begin, 0, 0])
    out = network(packed.tokens, positions, packed.segments, t, torch.cat(texts), Segments(tuple(map(len, texts))))
    return unpack(out, clips, SMALL.patch)


def test_a_fresh_video_model_gives_what_the_image_model_gives_on_every_frame() -> None:
    image = image_model()
    clips, texts, t = inputs()
    video = run(TemporalDiT(image), clips, texts, t)
    for k, clip in enumerate(clips):
        for frame in range(clip.shape[1]):
            alone = run(image, [clip[:, frame : frame + 1]], [texts[k]], t[k : k + 1])[0]
            assert alone.abs().max() > 0.1
            assert (video[k][:, frame : frame + 1] - alone).abs().max() < 1e-5


def test_the_image_model_inside_stays_the_same_object_and_temporal_layers_alone_can_train() -> None:
    image = image_model().requires_grad_(False)
    network = TemporalDiT(image)
    clips, texts, t = inputs()
    assert network.image is image
    trainable = [name for name, p in network.named_parameters() if p.requires_grad]
    assert trainable and all(name.startswith("blocks.") for name in trainable)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1.0)
    before = {name: p.clone() for name, p in network.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        sum((x - 1).square().mean() for x in run(network, clips, texts, t)).backward()
        optimizer.step()
    moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trainable), "every temporal weight moves, no weight of the image model does"


def test_packed_clips_give_what_separate_clips_give() -> None:
    network = trained_looking()
    clips, texts, t = inputs()
    together = run(network, clips, texts, t)
    for k in range(len(clips)):
        assert (together[k] - run(network, [clips[k]], [texts[k]], t[k : k + 1])[0]).abs().max() < 1e-5


def test_one_noise_level_a_token_equals_one_a_clip_where_they_agree() -> None:
    network = trained_looking()
    clips, texts, t = inputs()
    per_token = pack(clips, SMALL.patch).segments.spread(t)
    for a, b in zip(run(network, clips, texts, t), run(network, clips, texts, per_token), strict=True):
        assert (a - b).abs().max() < 1e-5


def test_frames_are_told_how_far_apart_they_are_and_not_when_they_are() -> None:
    network = trained_looking()
    clips, texts, t = inputs()
    dense, sparse, later = (run(network, clips, texts, t, **how)[0] for how in ({}, {"stride": 4}, {"begin": 7}))
    assert (dense - sparse).abs().max() > 1e-3
    assert (dense - later).abs().max() < 1e-4


def groups_by_hand(packed: Packed, columns: list[int]) -> list[list[int]]:
    """Indices of tokens by (clip, the given columns of their positions), groups in that order."""
    keys = [(int(segment), *(float(row[c]) for c in columns)) for segment, row in zip(packed.segments.ids, packed.positions, strict=True)]
    ordered = sorted(range(len(keys)), key=lambda i: (keys[i], i))
    return [list(group) for _, group in itertools.groupby(ordered, key=lambda i: keys[i])]


def test_regrouping_makes_a_segment_of_every_frame_and_of_every_place() -> None:
    packed = pack(inputs()[0], SMALL.patch)
    for columns, keys in (([0], packed.positions[:, :1]), ([1, 2], packed.positions[:, 1:])):
        order, segments = regroup(packed.segments, keys)
        expected = groups_by_hand(packed, columns)
        assert segments.lengths == tuple(map(len, expected))
        assert order.tolist() == [i for group in expected for i in group]
    assert regroup(packed.segments, packed.positions[:, :1])[0].tolist() == list(range(packed.segments.total)), "tokens lie frame by frame already"


def test_a_temporal_layer_mixes_the_frames_of_a_place_and_nothing_else() -> None:
    block = TemporalBlock(SMALL)
    shaken(block, 3)
    network = TemporalDiT(image_model())
    packed = pack(inputs()[0], SMALL.patch)
    generator = torch.Generator().manual_seed(4)
    x, c = torch.randn(packed.segments.total, 24, generator=generator), torch.randn(packed.segments.total, 24, generator=generator)
    _, frames = regroup(packed.segments, packed.positions[:, :1])
    together = block(x, Told(c, torch.arange(len(c))), frames, network._places(packed.positions, packed.segments))
    for rows in groups_by_hand(packed, [1, 2]):
        positions, one = packed.positions[rows], Segments((len(rows),))
        places: Places = network._places(positions, one)
        alone = block(x[rows], Told(c[rows]), Segments.equal(len(rows), 1), places)
        assert (together[rows] - alone).abs().max() < 1e-5
