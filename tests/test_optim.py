"Schedules, Muon, and which weights go to which optimiser."

import math
from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch import nn

from transformer_course import optim
from transformer_course.bigram import BigramLanguageModel
from transformer_course.block import Block, BlockConfig
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.multihead import MultiHeadAttention
from transformer_course.optim import (
    Muon,
    OptimConfig,
    hidden_matrices,
    lr_factor,
    make_optimizers,
    muon_groups,
    muon_updates,
    orthogonalize,
    set_step_sizes,
    step_sizes,
)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gpt(**more):
    sizes = dict(block_size=8, vocab_size=11, n_layer=2, n_head=4, n_embd=16)
    return GPT(GPTConfig(**(sizes | more)), torch.Generator().manual_seed(0))


# --- the schedule ---


@pytest.mark.parametrize(
    'settings, expected',
    [
        (dict(max_iters=5, warmup_iters=1), [1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]),
        (dict(max_iters=4, warmup_iters=0), [1, 3 / 4, 2 / 4, 1 / 4]),
        (dict(max_iters=1, warmup_iters=0), [1]),
        (dict(max_iters=1, warmup_iters=20), [1 / 21]),
        (dict(max_iters=3, warmup_iters=3), [1 / 4, 2 / 4, 3 / 4]),
        (dict(max_iters=2, warmup_iters=3), [1 / 4, 2 / 4]),
        (dict(max_iters=4, warmup_iters=1, lr_decay='none'), [1 / 2, 1, 1, 1]),
        (dict(max_iters=5, warmup_iters=1, lr_decay='none', min_lr_ratio=0.5), [1 / 2, 1, 1, 1, 1]),
        (dict(max_iters=5, warmup_iters=1, min_lr_ratio=0.2), [1 / 2, 1, 0.8, 0.6, 0.4]),
        (dict(max_iters=3, warmup_iters=0, lr_decay='cosine'), [1, 3 / 4, 1 / 4]),
        (
            dict(max_iters=3, warmup_iters=0, lr_decay='cosine', min_lr_ratio=0.2),
            [1, 0.2 + 0.8 * 3 / 4, 0.2 + 0.8 / 4],
        ),
    ],
)
def test_the_schedule_is_the_one_on_paper(settings, expected):
    config = OptimConfig(**settings)
    factors = [lr_factor(step, config) for step in range(config.max_iters)]
    assert factors == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize('decay', ['linear', 'cosine'])
def test_the_peak_is_exact_and_the_last_update_learns(decay):
    for max_iters, warmup in ((1, 0), (50, 0), (50, 7), (50, 49), (1000, 20)):
        config = OptimConfig(max_iters=max_iters, warmup_iters=warmup, lr_decay=decay)
        factors = [lr_factor(step, config) for step in range(max_iters)]
        assert factors[warmup] == 1.0 == max(factors) and min(factors) > 0
        assert all(a < b for a, b in pairwise(factors[: warmup + 1]))
        assert all(a > b for a, b in pairwise(factors[warmup:]))


def test_beyond_its_end_the_schedule_stays_at_the_end():
    config = OptimConfig(max_iters=10, warmup_iters=2, min_lr_ratio=0.25)
    assert lr_factor(10, config) == lr_factor(99, config) == 0.25
    assert lr_factor(5, OptimConfig(max_iters=2, warmup_iters=3)) == 0


def test_step_sizes_follow_the_schedule_from_the_highest():
    config = OptimConfig(max_iters=4, warmup_iters=1, learning_rate=0.8, muon_lr=0.4)
    optimizers = make_optimizers(gpt(), config)
    seen = []
    for step in range(4):
        set_step_sizes(optimizers, step, config)
        seen.append(step_sizes(optimizers))
        assert len({group['lr'] for group in optimizers[0].param_groups}) == 1  # of every group
    assert [s['lr'] for s in seen] == pytest.approx([0.4, 0.8, 0.8 * 2 / 3, 0.8 / 3])
    assert [s['muon_lr'] for s in seen] == pytest.approx([0.2, 0.4, 0.4 * 2 / 3, 0.4 / 3])


# --- settings ---


@pytest.mark.parametrize(
    'wrong',
    [
        dict(max_iters=0),
        dict(max_iters=2.5),
        dict(learning_rate=-0.1),
        dict(learning_rate=math.nan),
        dict(muon_lr=-1.0),
        dict(weight_decay=-1.0),
        dict(warmup_iters=-1),
        dict(grad_clip=-1.0),
        dict(min_lr_ratio=-0.1),
        dict(min_lr_ratio=1.1),
        dict(beta1=1.0),
        dict(beta2=-0.5),
        dict(optimizer='sgd'),
        dict(lr_decay='steep'),
    ],
)
def test_wrong_settings_are_named(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=f'^{name}={value!r}'):
        OptimConfig(**wrong)


# --- Muon ---


def muon_steps(params, n=3, sizes=None, **how):
    "Muon on random gradients for the rows of one matrix, which `params` share out."
    start = torch.cat([p.detach() for p in params])
    optimizer = Muon([dict(params=params, sizes=sizes)], **(dict(lr=0.1, weight_decay=0.1) | how))
    for step in range(n):
        grads = randn(*start.shape, seed=step).split([len(p) for p in params])
        for p, grad in zip(params, grads):
            p.grad = grad
        optimizer.step()
    return torch.cat([p.detach() for p in params])


@pytest.mark.parametrize('shape', [(16, 16), (48, 16), (16, 48)])
def test_muon_is_torchs_muon_in_float32(shape):
    if not hasattr(torch.optim, 'Muon'):
        pytest.skip('torch has its own Muon since 2.9')
    w = randn(*shape, seed=9)
    theirs = nn.Parameter(w.clone())
    optimizer = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, momentum=0.9)
    with mock.patch('torch.Tensor.bfloat16', torch.Tensor.clone):
        for step in range(3):
            theirs.grad = randn(*shape, seed=step)
            optimizer.step()
    ours = muon_steps([nn.Parameter(w.clone())], momentum=0.9, momentum_warmup=0)
    assert (ours - theirs).norm() < 1e-5 * (theirs - w).norm()


def test_each_part_of_a_cut_matrix_is_stepped_alone():
    w = randn(16, 8, seed=9)
    for sizes in ([8, 4, 4], [16], [4, 4, 8]):
        cut = muon_steps([nn.Parameter(w.clone())], sizes=sizes)
        apart = muon_steps([nn.Parameter(part.clone()) for part in w.split(sizes)])
        torch.testing.assert_close(cut, apart, rtol=1e-5, atol=1e-6)
    whole = muon_steps([nn.Parameter(w.clone())])
    assert (whole - cut).norm() > 0.1 * (cut - w).norm()


def test_grouped_heads_are_cut_by_the_sizes_of_their_layer():
    model, config = gpt(n_kv_head=2), OptimConfig(warmup_iters=0, weight_decay=0.0)
    weight = model.transformer.h[1].attn.c_attn.weight  # 16 rows of queries, 8 of keys, 8 of values
    muon = make_optimizers(model, config)[0]
    weight.grad, before = randn(32, 16), weight.detach().clone()
    muon.step()
    for part, rows in zip((before - weight).split([16, 8, 8]), weight.grad.split([16, 8, 8])):
        torch.testing.assert_close(part, 0.02 * muon_updates([rows])[0], rtol=1e-3, atol=1e-5)


def test_one_call_for_each_shape():
    matrices = [randn(*shape) for shape in ((4, 4), (8, 4), (4, 4), (4, 8), (8, 4))]
    with mock.patch.object(optim, 'orthogonalize', side_effect=orthogonalize) as calls:
        muon_updates(matrices)
    assert sorted(call.args[0].shape for call in calls.call_args_list) == [
        (1, 4, 8),
        (2, 4, 4),
        (2, 8, 4),
    ]
    with mock.patch.object(optim, 'orthogonalize', side_effect=orthogonalize) as calls:
        muon_steps([nn.Parameter(randn(12, 4)), nn.Parameter(randn(12, 4))], n=1, sizes=[4] * 3)
    assert [call.args[0].shape for call in calls.call_args_list] == [(6, 4, 4)]


def test_buffers_are_made_once():
    params = [nn.Parameter(randn(6, 4)), nn.Parameter(randn(4, 4))]
    optimizer = Muon(params)
    with mock.patch('torch.zeros_like', side_effect=torch.zeros_like) as made:
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
    assert made.call_count == 2
    assert [list(optimizer.state[p]) for p in params] == [['momentum_buffer']] * 2


def test_momentum_rises_to_its_value():
    p = nn.Parameter(torch.zeros(2, 2))
    optimizer, shares = Muon([p], momentum=0.95, momentum_warmup=4), []
    for _ in range(6):
        optimizer.state[p]['momentum_buffer'] = torch.zeros(2, 2)
        p.grad = torch.eye(2)
        optimizer.step()
        shares.append(1 - optimizer.state[p]['momentum_buffer'][0, 0].item())
    assert shares == pytest.approx([0.875, 0.9, 0.925, 0.95, 0.95, 0.95])


def test_a_parameter_without_a_gradient_stays():
    moved, still = nn.Parameter(randn(4, 4)), nn.Parameter(randn(4, 4))
    before = still.detach().clone()
    moved.grad = randn(4, 4)
    Muon([moved, still], weight_decay=0.5).step()
    assert torch.equal(still, before)


@pytest.mark.parametrize(
    'shape, sizes, words', [((5,), None, 'takes matrices'), ((6, 2), [2, 2], r'sizes=\[2, 2\]')]
)
def test_muon_refuses_what_it_cannot_take(shape, sizes, words):
    with pytest.raises(ValueError, match=words):
        Muon([dict(params=[nn.Parameter(torch.zeros(shape))], sizes=sizes)])


def test_settings_from_before_sizes_are_read():
    muon = Muon(muon_groups(gpt()))
    saved = muon.state_dict()
    for group in saved['param_groups']:
        group['parts'] = 3 if group.pop('sizes') else 1
    again = Muon(muon_groups(gpt()))
    again.load_state_dict(saved)
    assert [group['sizes'] for group in again.param_groups] == [[16, 16, 16], None]
    assert not any('parts' in group for group in again.param_groups)


def test_muon_steps_a_sharded_matrix_like_a_whole_one():
    if not torch.distributed.is_available():
        pytest.skip('torch was built without torch.distributed')
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group(
        'gloo', store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh, w = init_device_mesh('cpu', (1,)), randn(12, 4)
        shared = lambda t: distribute_tensor(t.clone(), mesh, [Shard(0)])
        plain, sharded = nn.Parameter(w.clone()), nn.Parameter(shared(w))
        for p, cut in ((plain, torch.clone), (sharded, shared)):
            optimizer = Muon([dict(params=[p], sizes=[4, 4, 4])], lr=0.1, weight_decay=0.1)
            for step in range(2):
                p.grad = cut(randn(12, 4, seed=step))
                optimizer.step()
        assert torch.equal(sharded.full_tensor(), plain) and not torch.equal(plain, w)
    finally:
        torch.distributed.destroy_process_group()


# --- which weights go where ---


def names(model, params):
    own = {id(p): name for name, p in model.named_parameters()}
    return [own[id(p)] for p in params]


class Reader(nn.Module):
    "An encoder with a head in the middle, a table in each block, and no single decoder."

    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(7, 8)
        self.head = nn.Linear(8, 3)
        self.block = Block(BlockConfig(n_embd=8, n_head=2), causal=False)
        self.block.table = nn.Embedding(4, 8)


def test_in_a_model_of_blocks_muon_takes_the_matrices_in_them():
    model = Reader()
    assert names(model, hidden_matrices(model)) == [
        f'block.{name}.weight' for name in ('attn.c_attn', 'attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')
    ]


def test_in_a_model_without_blocks_muon_takes_the_linear_layers_but_the_head():
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte = nn.Embedding(7, 8)
            self.attn = MultiHeadAttention(8, 4, n_kv_head=2)
            self.own = nn.Parameter(torch.zeros(8, 8))  # nobody knows what it does: AdamW
            self.tied = nn.Linear(8, 7)
            self.tied.weight = self.wte.weight
            self.head = nn.Linear(8, 7)

    model = Old()
    assert names(model, hidden_matrices(model)) == ['attn.c_attn.weight', 'attn.c_proj.weight']
    assert [group['sizes'] for group in muon_groups(model)] == [[8, 4, 4], None]


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize(
    'make', [gpt, Reader, lambda: BigramLanguageModel(5), lambda: nn.Linear(3, 1)]
)
def test_every_weight_that_learns_has_one_optimiser(make, frozen, optimizer):
    model = make()
    if frozen:
        for p in list(model.parameters())[1::2]:
            p.requires_grad_(False)
    optimizers = make_optimizers(model, OptimConfig(optimizer=optimizer))
    found = [p for o in optimizers for group in o.param_groups for p in group['params']]
    assert sorted(map(id, found)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [type(o) for o in optimizers][-1] is torch.optim.AdamW


def test_what_decays():
    decay = lambda o: {
        name: group['weight_decay']
        for group in o.param_groups
        for name in names(model, group['params'])
    }
    model = gpt()
    muon, adamw = map(decay, make_optimizers(model, OptimConfig(weight_decay=0.3)))
    assert set(muon.values()) == {0.3} and set(adamw.values()) == {0.0}
    [only] = map(decay, make_optimizers(model, OptimConfig(optimizer='adamw', weight_decay=0.3)))
    assert only['transformer.wte.weight'] == 0.3 and only['transformer.ln_f.weight'] == 0.0


def test_the_settings_reach_the_optimisers():
    config = OptimConfig(learning_rate=0.3, muon_lr=0.2, beta1=0.7, beta2=0.8)
    muon, adamw = make_optimizers(gpt(), config)
    assert {g['lr'] for g in muon.param_groups} == {0.2}
    assert [(g['lr'], g['betas']) for g in adamw.param_groups] == [(0.3, (0.7, 0.8))]


@pytest.mark.parametrize('device, fused', [('cpu', False), ('cuda', True)])
def test_fused_adamw_is_for_gpus(device, fused):
    class There(nn.Parameter):
        "A parameter that says it is on another device."

        @property
        def device(self):
            return torch.device(device)

    model, asked = gpt(), []
    there = [There(p.data) for p in model.parameters()]
    with (
        mock.patch.object(model, 'parameters', lambda: iter(there)),
        mock.patch('torch.optim.AdamW', lambda *a, fused=False, **kw: asked.append(fused)),
    ):
        make_optimizers(model, OptimConfig())
    assert asked == [fused]
