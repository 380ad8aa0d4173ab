"Sets of sensors: against PyTorch's encoder layer, order, missing tokens, new kinds, the world."

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transformer_course.checkpoint import load_model, save_checkpoint
from transformer_course.sets import (
    FOCAL,
    HEIGHT,
    HORIZON,
    PIXELS,
    RETURNS,
    STOPPING,
    SetConfig,
    TokenSetTransformer,
    between,
    covered,
    cut_patches,
    draw_scenes,
    drop_kinds,
    pack,
    picture,
    radar_returns,
    right_action,
)
from transformer_course.training import TrainConfig, train

thorough = settings(deadline=None, derandomize=True, max_examples=25)
SMALL = dict(n_layer=2, n_head=2, n_embd=8, kinds='dot:2 line:4', n_classes=3)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def loud(seed=0, **fields):
    "A model whose weights are all of some size, in double precision."
    model = TokenSetTransformer(SetConfig(**SMALL | fields), rng(seed))
    for p in model.parameters():
        nn.init.normal_(p, std=0.4, generator=rng(seed + p.numel()))
    return model.double().eval()


def some_set(seed=1, B=3, N=6, width=4):
    g = rng(seed)
    tokens = torch.randn(B, N, width, generator=g, dtype=torch.double)
    mask = torch.rand(B, N, generator=g) < 0.7
    return tokens, torch.randint(2, (B, N), generator=g), mask


def torch_layer(block, C, H):
    "PyTorch's own encoder layer with the weights of a block."
    hidden = block.mlp.c_fc.out_features
    layer = nn.TransformerEncoderLayer(C, H, hidden, 0.0, 'relu', batch_first=True, norm_first=True)
    attention = layer.self_attn
    pairs = [(attention.in_proj_weight, block.attn.c_attn.weight)]
    pairs += [(attention.in_proj_bias, block.attn.c_attn.bias)]
    ours = (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj, block.ln_1, block.ln_2)
    theirs = (attention.out_proj, layer.linear1, layer.linear2, layer.norm1, layer.norm2)
    for a, b in zip(theirs, ours):
        pairs += [(a.weight, b.weight), (a.bias, b.bias)]
    layer = layer.double()
    with torch.no_grad():
        for a, b in pairs:
            a.data = b.detach().clone()
    return layer.train()  # the fast path of `eval` drops masked rows


def test_equals_the_encoder_of_torch():
    model = loud(activation='relu')
    tokens, kind, mask = some_set()
    x = torch.stack(
        [
            torch.stack([model.maps[k](t[: model.config.widths[k]]) for t, k in zip(row, kinds)])
            for row, kinds in zip(tokens, kind.tolist())
        ]
    )
    x = torch.cat([model.readout.expand(3, 1, -1), x], 1)
    missing = torch.cat([torch.zeros(3, 1, dtype=torch.bool), ~mask], 1)
    for block in model.blocks:
        x = torch_layer(block, 8, 2)(x, src_key_padding_mask=missing)
    torch.testing.assert_close(model.lm_head(model.ln_f(x[:, 0])), model(tokens, kind, mask)[0])


@thorough
@given(st.integers(1, 9), st.integers(0, 999))
def test_order_changes_nothing(N, seed):
    tokens, kind, mask = some_set(seed, N=N)
    model, order = loud(seed), torch.randperm(N, generator=rng(seed))
    moved = model(tokens[:, order], kind[:, order], mask[:, order])[0]
    torch.testing.assert_close(model(tokens, kind, mask)[0], moved, atol=1e-10, rtol=0)


@thorough
@given(st.integers(0, 999))
def test_what_is_missing_is_not_there(seed):
    model, (tokens, kind, mask) = loud(seed), some_set(seed)
    spoiled = tokens.masked_fill(~mask[..., None], math.nan)
    before = model(tokens, kind, mask)[0]
    assert torch.equal(model(spoiled, kind, mask)[0], before)
    for b in range(3):
        if mask[b].any():
            alone = model(
                tokens[b : b + 1, mask[b]], kind[b : b + 1, mask[b]], mask[b : b + 1, mask[b]]
            )
            torch.testing.assert_close(alone[0][0], before[b])


def test_what_is_there_counts():
    model, (tokens, kind, mask) = loud(), some_set()
    mask = torch.ones_like(mask)
    before = model(tokens, kind, mask)[0]
    for n in range(6):
        without = mask.clone()
        without[:, n] = False
        assert (model(tokens, kind, without)[0] - before).abs().amax(1).min() > 1e-4
    assert (model(tokens, 1 - kind, mask)[0] - before).abs().max() > 1e-2  # kinds matter


def test_no_sensor_at_all_gives_an_answer():
    model, (tokens, kind, mask) = loud(), some_set()
    logits = model(tokens, kind, torch.zeros_like(mask))[0]
    assert logits.isfinite().all()
    torch.testing.assert_close(logits, logits[:1].expand(3, -1))
    model(tokens, kind, torch.zeros_like(mask), torch.tensor([0, 1, 2]))[1].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


BAD = {
    'tokens has shape': lambda t, k, m: (t[0], k[0], m[0]),
    'at least one token': lambda t, k, m: (t[:, :0], k[:, :0], m[:, :0]),
    'kind holds 2': lambda t, k, m: (t, k + 1, m),
    'kind holds -1': lambda t, k, m: (t, k - 1, m),
    'kind has shape': lambda t, k, m: (t, k[:, 1:], m),
    'mask has shape': lambda t, k, m: (t, k, m.double()),
    'too few': lambda t, k, m: (t[..., :3], k, m),
}


@pytest.mark.parametrize('words', BAD)
def test_bad_sets(words):
    with pytest.raises(ValueError, match=words):
        loud()(*BAD[words](*some_set()))


@pytest.mark.parametrize(
    'wrong',
    [
        dict(kinds=''),
        dict(kinds='a'),
        dict(kinds='a:0'),
        dict(kinds='a:2 a:3'),
        dict(kinds='a:2,b:3'),
        dict(n_classes=1),
        dict(window=3),
        dict(n_embd=10, n_head=4),
        dict(kinds=3),
    ],
)
def test_bad_configs(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong)).split('_')[0]):
        SetConfig(**wrong)


def test_pack_and_drop():
    a, b = torch.ones(2, 3, 2), torch.ones(2, 1, 4)
    exist = torch.tensor([[True, False, True], [False, False, False]])
    tokens, kind, mask = pack([(a, exist), (b, None)])
    assert tokens.shape == (2, 4, 4) and not tokens[:, :3, 2:].any()
    assert kind.tolist() == [[0, 0, 0, 1]] * 2
    assert mask.tolist() == [[True, False, True, True], [False, False, False, True]]
    left = drop_kinds(kind, mask, torch.tensor([[True, False]]))
    assert left.tolist() == [[True, False, True, False], [False] * 4]
    for wrong in ([(a[0], None)], [(a, exist[:, :2])]):
        with pytest.raises(ValueError, match='parts holds values'):
            pack(wrong)


def test_a_new_kind_leaves_the_old_model_alone(tmp_path):
    model, (tokens, kind, mask) = loud(), some_set()
    before, old = model(tokens, kind, mask)[0], {n: p.clone() for n, p in model.named_parameters()}
    model.add_kind('map', 3, rng(5))
    model.double()
    assert model.config.widths == [2, 4, 3]
    torch.testing.assert_close(model(tokens, kind, mask)[0], before)
    assert all(torch.equal(model.get_parameter(name), p) for name, p in old.items())
    assert set(dict(model.named_parameters())) - set(old) == {'maps.2.weight', 'maps.2.bias'}
    new = (tokens, torch.full_like(kind, 2), torch.ones_like(mask))
    assert (model(*new)[0] - before).abs().max() > 1e-3
    save_checkpoint(tmp_path / 'a', model)
    back, _ = load_model(tmp_path / 'a')
    assert isinstance(back, TokenSetTransformer) and back.config == model.config
    torch.testing.assert_close(back.double()(*new)[0], model(*new)[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match='kinds'):
        model.add_kind('dot', 3)
    assert len(model.maps) == 3


def test_one_seed_is_one_run():
    def batch(generator):
        tokens, kind, mask = some_set(int(torch.randint(99, (1,), generator=generator)))
        return tokens.float(), kind, mask, kind.sum(1) % 3

    def run(seed):
        model = TokenSetTransformer(SetConfig(**SMALL), rng(seed))
        return train(model, batch, TrainConfig(max_iters=5, seed=seed)).losses

    assert run(1) == run(1) and run(1) != run(2)


# ---------------------------------------------------------------- the world


def test_two_sources_give_the_third():
    scene = draw_scenes(500, rng()) | dict(fog=torch.zeros(500, dtype=torch.bool))
    seen = picture(scene, rng(), noise=0.0)
    foot = HORIZON + FOCAL * HEIGHT[scene['vehicle']] / scene['distance']
    lowest = (seen.sum(2) > 1e-6) * torch.arange(1, PIXELS + 1)
    assert (lowest.amax(1)[foot < PIXELS] == foot.ceil()[foot < PIXELS]).all()
    inside = (foot < PIXELS) & (scene['angle'].abs() < 0.03)
    distance = FOCAL * HEIGHT[scene['vehicle']] / (foot - HORIZON)
    torch.testing.assert_close(distance, scene['distance'])
    area = seen.sum((1, 2))[inside & (foot > 3)]
    assert area.min() > 0


def test_actions_by_hand():
    scene = dict(distance=torch.tensor([9.9, 10, 20, 55, 56, 112]))
    scene |= dict(vehicle=torch.tensor([0, 0, 0, 2, 2, 2]), wet=torch.zeros(6, dtype=torch.bool))
    assert right_action(scene).tolist() == [0, 1, 2, 0, 1, 2]
    assert right_action(scene | dict(wet=~scene['wet'])).tolist() == [0, 0, 1, 0, 0, 1]
    assert STOPPING.tolist() == [10, 24, 56]


def test_radar_has_one_thing_and_posts():
    scene = draw_scenes(2000, rng(3))
    returns, exist = radar_returns(scene, rng(4))
    assert returns.shape == (2000, RETURNS, 3) and exist.any(1).all()
    slow = exist & (returns[..., 2] < 0.5)
    assert (slow.sum(1) == 1).all()
    off = returns[..., 0][slow] - (scene['distance'] / 30).log()
    assert off.abs().max() < 0.1 and abs(off.mean()) < 0.003
    counts = exist.sum(1).bincount(minlength=6)
    assert counts[0] == 0 and counts[1:].min() > 300
    where = slow.int().argmax(1).bincount(minlength=5)
    assert where.min() > 300  # in no order


def test_patches_and_pixels():
    image = torch.arange(256.0).view(1, 16, 16)
    cut = cut_patches(image)
    assert cut.shape == (1, 16, 18)
    assert cut[0, 7, :16].tolist() == (2 * image[0, 4:8, 12:16]).flatten().tolist()
    assert cut[0, 0, 16:].tolist() == [-1, -1] and cut[0, 15, 16:].tolist() == [1, 1]
    share = covered(torch.tensor([-3.0, 2.25]), torch.tensor([0.5, 40]))
    assert share[0].tolist() == [0.5] + [0.0] * 15
    assert share[1].tolist() == [0, 0, 0.75] + [1.0] * 13
    with pytest.raises(ValueError, match='pictures has shape'):
        cut_patches(image[0])
    drawn = between(1000, 2, 3, rng())
    assert drawn.min() >= 2 and drawn.max() <= 3 and drawn.std() > 0.25
