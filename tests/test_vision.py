"Vision: cuts that can be undone, a ViT that is Hugging Face's, what positions do, bad input."

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transformer_course.checkpoint import load_model, save_checkpoint
from transformer_course.pictures import load_images, plot_pictures, shifted, split_three
from transformer_course.training import TrainConfig, train
from transformer_course.vision import (
    POSITIONS,
    Places,
    ViT,
    ViTConfig,
    accuracy,
    attention_maps,
    patchify,
    rollout,
    unpatchify,
)

TINY = dict(n_layer=2, n_head=2, n_embd=16, image_size=8, patch_size=2, channels=1, n_class=5)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def large_weights(model):
    "Random weights large enough for every part to matter."
    generator = rng(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    return model.eval()


def vit(**changes):
    return large_weights(ViT(ViTConfig(**TINY | changes)))


def pictures(n=4, **changes):
    c = ViTConfig(**TINY | changes)
    return torch.rand(n, *c.input_shape, generator=rng(3))


# ---------------------------------------------------------------- squares


@pytest.mark.parametrize(('shape', 'p'), [((3, 12, 8), 4), ((1, 6, 9), 3), ((2, 5, 5), 1)])
def test_cut_and_put_together(shape, p):
    "unfold and a convolution say the same, and the way back gives the picture."
    x = torch.rand(2, *shape, generator=rng())
    cut = patchify(x, p)
    assert torch.equal(cut, F.unfold(x, p, stride=p).mT)
    assert torch.equal(unpatchify(cut, shape, p), x)
    conv = nn.Conv2d(shape[0], 7, p, stride=p)
    ours = F.linear(cut, conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(ours, conv(x).flatten(2).mT, atol=1e-6, rtol=1e-5)


def test_squares_are_read_row_by_row():
    cut = patchify(torch.arange(24.0).view(1, 1, 4, 6), 2)
    assert cut[0, 1].tolist() == [2, 3, 8, 9] and cut[0, 3].tolist() == [12, 13, 18, 19]


# ---------------------------------------------------------------- the model

NAMES = (  # ours, Hugging Face's
    ('ln_1', 'layernorm_before'),
    ('attn.c_proj', 'attention.o_proj'),
    ('ln_2', 'layernorm_after'),
    ('mlp.c_fc', 'mlp.fc1'),
    ('mlp.c_proj', 'mlp.fc2'),
)


def from_hugging_face(state, n_layer):
    "The weights of a `ViTForImageClassification` under our names."
    s = {name.removeprefix('vit.'): tensor for name, tensor in state.items()}
    places = s['embeddings.position_embeddings'][0]
    ours = {'places.tables.0.weight': places[1:]}
    ours['token.weight'] = s['embeddings.cls_token'][0] + places[:1]
    for end in ('weight', 'bias'):
        ours[f'patch.{end}'] = s[f'embeddings.patch_embeddings.projection.{end}']
        ours[f'ln_f.{end}'], ours[f'head.{end}'] = s[f'layernorm.{end}'], s[f'classifier.{end}']
        for i in range(n_layer):
            at = f'layers.{i}'
            qkv = [s[f'{at}.attention.{part}_proj.{end}'] for part in 'qkv']
            ours[f'h.{i}.attn.c_attn.{end}'] = torch.cat(qkv)
            ours |= {f'h.{i}.{a}.{end}': s[f'{at}.{b}.{end}'] for a, b in NAMES}
    ours['patch.weight'] = ours['patch.weight'].flatten(1)
    return ours


def test_equals_hugging_face():
    "Same weights, same logits: class token, positions, pre-norm, GELU, epsilon (2010.11929)."
    hf = pytest.importorskip('transformers')
    config = hf.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=12,
        patch_size=4,
        num_channels=3,
        num_labels=5,
    )
    theirs = large_weights(hf.ViTForImageClassification(config))
    shape = dict(image_size=12, patch_size=4, channels=3)
    ours = vit(**shape)
    ours.load_state_dict(from_hugging_face(theirs.state_dict(), 2))
    x = pictures(**shape)
    expected = theirs(x).logits
    assert expected.std() > 0.1  # the comparison can fail
    torch.testing.assert_close(ours(x)[0], expected, atol=1e-5, rtol=0)


def test_base_has_the_published_size():
    with torch.device('meta'):
        model = ViT()
    assert sum(p.numel() for p in model.parameters()) == 86_567_656 - 768


@pytest.mark.parametrize('pool', ['token', 'mean'])
def test_without_positions_a_picture_is_a_bag_of_squares(pool):
    "Shuffled squares change nothing without positions, and something with any kind of them."
    order, x = torch.randperm(16, generator=rng(5)), pictures()
    mixed = unpatchify(patchify(x, 2)[:, order], (1, 8, 8), 2)
    for position in POSITIONS:
        model = vit(position=position, pool=pool)
        same = torch.allclose(model(x)[0], model(mixed)[0], atol=1e-5)
        assert same == (position == 'none'), position


def test_a_shuffle_of_squares_is_a_shuffle_of_the_table():
    "With learned 1-D positions no order of the squares is better than another."
    order, x = torch.randperm(16, generator=rng(5)), pictures()
    model, other = vit(), vit()
    with torch.no_grad():
        other.places.tables[0].weight.copy_(model.places.tables[0].weight[order])
    mixed = unpatchify(patchify(x, 2)[:, order], (1, 8, 8), 2)
    torch.testing.assert_close(other(mixed)[0], model(x)[0], atol=1e-5, rtol=1e-5)


def test_places_know_rows_and_columns():
    axes = Places('axes', (2, 3), 8)()
    torch.testing.assert_close(axes[4] - axes[1], axes[5] - axes[2])
    waves = Places('sinusoidal', (2, 3), 8)()
    assert torch.equal(waves[3, :4], waves[5, :4]) and torch.equal(waves[2, 4:], waves[5, 4:])
    assert len({tuple(w.tolist()) for w in waves}) == 6


def test_every_pixel_and_every_square_counts():
    model, x = vit(), pictures(1).requires_grad_()
    model(x)[0].square().sum().backward()
    assert (x.grad != 0).all()


def test_dropout_only_in_training():
    model = ViT(ViTConfig(**TINY, dropout=0.5, attn_dropout=0.5), rng())
    model = large_weights(model)
    x = pictures()
    assert torch.equal(model(x)[0], model(x)[0])
    model.train()
    assert not torch.equal(model(x)[0], model(x)[0])


# ---------------------------------------------------------------- looking


def test_maps_are_what_the_model_does():
    "Rows sum to one; values mixed by them give what attention wrote."
    for norm_first in (True, False):
        model, x = vit(norm_first=norm_first), pictures()
        maps = attention_maps(model, x)
        assert maps.shape == (4, 2, 2, 17, 17)
        torch.testing.assert_close(maps.sum(-1), torch.ones(4, 2, 2, 17))
        block, stream = model.h[0], model.embed(x)
        read = block.ln_1(stream) if norm_first else stream
        q, k, v = block.attn.heads(read)
        mixed = (maps[:, 0] @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(block.attn.c_proj(mixed), block.attn(read))
        last = block(stream)
        q, k, v = model.h[1].attn.heads(model.h[1].ln_1(last) if norm_first else last)
        scores = (q @ k.mT / 8**0.5).softmax(-1)
        torch.testing.assert_close(maps[:, 1], scores, atol=1e-5, rtol=1e-4)


def test_rollout_by_hand():
    "Half the attention and half the stream, layer on layer (Abnar 2020, arXiv 2005.00928)."
    a = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 1, 0]])
    b = torch.tensor([[0.0, 0, 1], [0, 1, 0], [0, 0, 1]])
    maps = torch.stack([a, b])[None, :, None]  # one picture, two layers, one head
    one, two = (a + torch.eye(3)) / 2, (b + torch.eye(3)) / 2
    expected = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.75, 0], [0, 0.5, 0.5]])
    torch.testing.assert_close(two @ one, expected)
    torch.testing.assert_close(rollout(maps)[0], expected)
    two_heads = torch.stack([torch.stack([a, b]), torch.stack([b, a])], 1)[None]
    mean = ((a + b) / 2 + torch.eye(3)) / 2
    torch.testing.assert_close(rollout(two_heads)[0], mean @ mean)


# ---------------------------------------------------------------- training, checkpoints


def test_learns_and_one_seed_gives_one_run():
    x, y = load_images('digits')
    shape = TINY | dict(n_class=10, pool='mean')
    ends = []
    for seed in (4, 4, 5):
        model = ViT(ViTConfig(**shape), rng(seed))

        def batch(generator):
            i = torch.randint(len(x), (32,), generator=generator)
            return shifted(x[i], 1, generator), y[i]

        history = train(model, batch, TrainConfig(max_iters=60, dtype='float32', seed=seed))
        assert sum(history.losses[-10:]) < 10 * history.losses[0] - 0.5
        ends.append(history.losses)
    assert ends[0] == ends[1] != ends[2]


def test_accuracy_counts():
    model = vit()
    x = pictures(7)
    said = model(x)[0].argmax(-1)
    assert accuracy(model, x, said) == 1.0
    wrong = said.clone()
    wrong[:2] = (wrong[:2] + 1) % 5
    assert accuracy(model, x, wrong) == pytest.approx(5 / 7)
    for training in (True, False):  # a model is left in the mode in which it came
        model.train(training)
        accuracy(model, x, said)
        assert model.training == training


@pytest.mark.parametrize('position', POSITIONS)
def test_checkpoint_round_trip(tmp_path, position):
    model = vit(position=position, pool='mean')
    save_checkpoint(tmp_path / 'c', model)
    again, _ = load_model(tmp_path / 'c')
    assert torch.equal(again(pictures())[0], model(pictures())[0])


# ---------------------------------------------------------------- pictures


def test_shifts_move_whole_pictures():
    x = torch.rand(50, 2, 5, 6, generator=rng())
    moved = shifted(x, 2, rng(1))
    padded = F.pad(x, [2] * 4)
    for one, frame in zip(moved, padded):
        found = [
            torch.equal(one, frame[:, r : r + 5, c : c + 6]) for r in range(5) for c in range(5)
        ]
        assert sum(found) == 1


def test_parts_do_not_overlap():
    n = torch.arange(100)
    parts = [set(x.tolist()) for x, _ in split_three(n, n, 20, 30)]
    assert [len(p) for p in parts] == [50, 20, 30] and len(set.union(*parts)) == 100


# ---------------------------------------------------------------- bad input

BAD = {
    'not divisible by patch_size=3': lambda: ViTConfig(**TINY | dict(patch_size=3)),
    "position='rope'": lambda: ViTConfig(**TINY, position='rope'),
    "pool='max'": lambda: ViTConfig(**TINY, pool='max'),
    'n_class=0': lambda: ViTConfig(**TINY | dict(n_class=0)),
    'n_embd=6 must be divisible by 4': lambda: ViTConfig(
        **TINY | dict(n_embd=6, n_head=1), position='sinusoidal'
    ),
    'images[None]': lambda: vit()(pictures()[0]),
    'for a single one images[None]': lambda: vit()(pictures()[:0]),
    'shape (4, 3, 8, 8)': lambda: vit()(pictures(channels=3)),
    'shape (4, 1, 12, 12)': lambda: vit()(pictures(image_size=12)),
    'images.float() / 255': lambda: vit()((255 * pictures()).to(torch.uint8)),
    'labels holds 5': lambda: vit()(pictures(), torch.tensor([0, 1, 2, 5])),
    'labels holds -1': lambda: vit()(pictures(), torch.tensor([0, 1, 2, -1])),
    'labels.long()': lambda: vit()(pictures(), torch.rand(4)),
    'does not divide': lambda: patchify(pictures(), 3),
    'give (B, channels, height, width), at least': lambda: patchify(pictures()[0], 2),
    '(B, 16, 4)': lambda: unpatchify(torch.rand(1, 15, 4), (1, 8, 8), 2),
    "name='cats'": lambda: load_images('cats'),
    'leave each of the three parts': lambda: split_three(torch.zeros(9), torch.zeros(9), 4, 5),
    'reach=-1': lambda: shifted(pictures(), -1, rng()),
    'rows has 1 names': lambda: plot_pictures([[0], [0]], ['a']),
}


@pytest.mark.parametrize('words', BAD)
def test_bad_input_is_named(words):
    with pytest.raises(ValueError) as caught:
        BAD[words]()
    assert words in str(caught.value)
