"Clips: tubelets that are a convolution, digits that move as they say, models that read and draw."

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transformer_course.checkpoint import load_model, save_checkpoint
from transformer_course.training import TrainConfig, train
from transformer_course.video import (
    DIRECTIONS,
    FramePredictor,
    VideoConfig,
    VideoViT,
    moving_digits,
    tubelets,
)
from transformer_course.vision import POSITIONS, ViT

TINY = dict(n_layer=2, n_head=2, n_embd=24, image_size=8, patch_size=4, channels=2, n_class=8)
TINY |= dict(n_frames=4, tube=2)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def made(cls, **changes):
    "Random weights large enough for every part to matter."
    model, generator = cls(VideoConfig(**TINY | changes), rng()), rng(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    return model.eval()


def some(n=3):
    return torch.rand(n, 4, 2, 8, 8, generator=rng(2))


@pytest.mark.parametrize(('tube', 'p'), [(1, 4), (2, 2), (4, 8)])
def test_tubelets_are_a_convolution(tube, p):
    clips = some()
    conv = nn.Conv3d(2, 5, kernel_size=(tube, p, p), stride=(tube, p, p))
    ours = F.linear(tubelets(clips, tube, p), conv.weight.transpose(1, 2).flatten(1), conv.bias)
    theirs = conv(clips.transpose(1, 2)).flatten(2).mT
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_clip_of_one_frame_is_a_picture():
    "The model of the last chapter is the special case."
    video = made(VideoViT, n_frames=1, tube=1)
    shape = {k: v for k, v in TINY.items() if k not in ('n_frames', 'tube')}
    picture = ViT(ViT.config_class(**shape)).eval()
    picture.load_state_dict(video.state_dict())
    clips = some()[:, :1]
    assert torch.equal(video(clips)[0], picture(clips[:, 0])[0])


@pytest.mark.parametrize('position', POSITIONS)
def test_time_has_to_be_told(position):
    model, clips = made(VideoViT, position=position), some()
    other = clips[:, [2, 3, 0, 1]]
    same = torch.allclose(model(clips)[0], model(other)[0], atol=1e-5)
    assert same == (position == 'none')
    assert not torch.allclose(model(clips)[0], model(clips[:, [1, 0, 2, 3]])[0], atol=1e-5)


def test_places_are_time_then_row_then_column():
    "Tubelets of one slot share the vector of its time, whatever their row and column."
    config = VideoConfig(**TINY | dict(n_frames=6), position='axes')
    places = VideoViT(config, rng()).places
    assert config.grid == (3, 2, 2) and [len(table.weight) for table in places.tables] == [3, 2, 2]
    with torch.no_grad():
        for table in places.tables[1:]:
            table.weight.zero_()
    by_slot = places().view(3, 4, 24)
    assert torch.equal(by_slot, places.tables[0].weight[:, None].expand(3, 4, 24))


def test_every_frame_counts():
    for cls in (VideoViT, FramePredictor):
        clips = some(1).requires_grad_()
        made(cls)(clips)[0].square().sum().backward()
        assert (clips.grad != 0).all()


def test_the_drawn_patch_stands_where_its_tubelet_stands():
    "A head that copies: what the last slot knows of a place is drawn at that place."
    model = made(FramePredictor, n_layer=1, position='none', n_embd=32, pool='token')
    for block in model.h:
        for p in block.parameters():
            nn.init.zeros_(p)
    model.ln_f = nn.Identity()
    with torch.no_grad():
        model.patch.weight.zero_()
        model.patch.bias.zero_()
        model.patch.weight[:32, 32:] = torch.eye(32)  # the second frame of a tubelet
        model.head.weight.copy_(torch.eye(32))
        model.head.bias.zero_()
    clips = some()
    torch.testing.assert_close(model(clips)[0], clips[:, -1])


def test_drawing_is_scored_by_the_mean_square():
    model, clips = made(FramePredictor), some()
    drawn, loss = model(clips, clips[:, 0])
    torch.testing.assert_close(loss, (drawn - clips[:, 0]).square().mean())
    assert model(clips)[1] is None


@pytest.mark.parametrize('cls', [VideoViT, FramePredictor])
def test_checkpoint_round_trip(tmp_path, cls):
    model = made(cls, position='axes', pool='mean')
    save_checkpoint(tmp_path / 'c', model)
    again, _ = load_model(tmp_path / 'c')
    assert type(again) is cls and torch.equal(again(some())[0], model(some())[0])


# ---------------------------------------------------------------- the clips


def test_digits_move_as_they_say():
    "Each frame is the one before, rolled by the direction times the speed."
    images = torch.rand(5, 1, 8, 8, generator=rng())
    starts = torch.tensor([[0, 0], [13, 4]])
    clips, direction = moving_digits(images, starts, 64, 4, rng(1), size=16, speed=3)
    assert len(set(DIRECTIONS)) == 8 and set(direction.tolist()) == set(range(8))
    first = set()
    for clip, d in zip(clips, direction):
        dy, dx = DIRECTIONS[d]
        for before, after in zip(clip, clip[1:]):
            assert torch.equal(before.roll((3 * dy, 3 * dx), (-2, -1)), after)
        here = [
            (i, j)
            for i, image in enumerate(images)
            for j, (y, x) in enumerate(starts.tolist())
            if torch.equal(F.pad(image, (0, 8, 0, 8)).roll((y, x), (-2, -1)), clip[0])
        ]
        assert len(here) == 1  # one of the digits, at one of the starts
        first.add(here[0])
    assert len(first) == 10  # all of them occur


def test_the_first_frame_knows_nothing_of_the_direction():
    "The same start and digit go in every direction."
    dot, start = torch.ones(1, 1, 1, 1), torch.tensor([[5, 5]])
    clips, direction = moving_digits(dot, start, 400, 2, rng())
    assert len(set(direction.tolist())) == 8 and (clips[:, 0] == clips[0, 0]).all()
    share = direction.bincount(minlength=8) / 400
    assert share.min() > 0.06 and share.max() < 0.2


def test_learns_and_one_seed_gives_one_run():
    images, starts = torch.rand(3, 2, 4, 4, generator=rng()), torch.tensor([[0, 0], [3, 5]])
    ends = []
    for seed in (1, 1, 2):
        model = FramePredictor(VideoConfig(**TINY, pool='mean'), rng(seed))

        def batch(generator):
            clips, _ = moving_digits(images, starts, 16, 5, generator, size=8, speed=1)
            return clips[:, :4], clips[:, 4]

        history = train(model, batch, TrainConfig(max_iters=40, dtype='float32', seed=seed))
        assert sum(history.losses[-5:]) < 4 * history.losses[0]
        ends.append(history.losses)
    assert ends[0] == ends[1] != ends[2]


BAD = {
    'n_frames=5 is not divisible by tube=2': lambda: VideoConfig(**TINY | dict(n_frames=5)),
    'tube=0': lambda: VideoConfig(**TINY | dict(tube=0)),
    'not divisible by patch_size=3': lambda: VideoConfig(**TINY | dict(patch_size=3)),
    'n_embd=16 must be divisible by 6': lambda: VideoConfig(
        **TINY | dict(n_embd=16), position='sinusoidal'
    ),
    'tube=3 does not divide 4 frames': lambda: tubelets(some(), 3, 4),
    'clip[None]': lambda: tubelets(some()[0], 2, 4),
    'patch_size=3 does not divide': lambda: tubelets(some(), 2, 3),
    'give (B, 4, 2, 8, 8)': lambda: made(VideoViT)(some()[:, :2]),
    'at least one': lambda: made(VideoViT)(some()[:0]),
    'labels holds 8': lambda: made(VideoViT)(some(), torch.tensor([0, 1, 8])),
    'give (B, 2, 8, 8)': lambda: made(FramePredictor)(some(), some()),
    'dtype torch.int64': lambda: made(FramePredictor)(some().long()),
    'n=0': lambda: moving_digits(some()[0], torch.zeros(1, 2).long(), 0, 2, rng()),
    '0 starts': lambda: moving_digits(some()[0], torch.zeros(0, 2).long(), 2, 2, rng()),
    'size=4': lambda: moving_digits(some()[0], torch.zeros(1, 2).long(), 2, 2, rng(), size=4),
}


@pytest.mark.parametrize('words', BAD)
def test_bad_input_is_named(words):
    with pytest.raises(ValueError) as caught:
        BAD[words]()
    assert words in str(caught.value)
