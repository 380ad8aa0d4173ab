"Regression in context: the textbook against closed forms, who hears whom, layers against loops, instructions against arithmetic."

import pytest
import torch
from torch import nn

from transformer_course.block import Block
from transformer_course.gpt import GPTConfig
from transformer_course.experiments.regression import (
    HandBlock,
    HandMLP,
    InContextRegressor,
    LinearAttention,
    SGDCycles,
    SGDProgram,
    baselines,
    division,
    gd_layer,
    gradient_descent,
    implicit_weights,
    linear_attention,
    linear_tasks,
    pair_tokens,
    ridge,
)
from transformer_course.training import TrainConfig, train

SHAPE = GPTConfig(
    n_layer=2,
    n_head=2,
    n_embd=16,
    mlp_ratio=2,
    norm='none',
    activation='relu',
    position='none',
    vocab_size=1,
    zero_init=True,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def lively(seed=0):
    "A regressor whose layers and head are not zero."
    model = InContextRegressor(3, SHAPE, rng(seed))
    for i, p in enumerate(model.parameters()):
        if p.dim() == 2:
            nn.init.normal_(p, std=0.3, generator=rng(seed + i))
    return model


def test_tasks_are_reproducible_and_linear():
    a, b = linear_tasks(5, 7, 3, 0.0, rng(4)), linear_tasks(5, 7, 3, 0.0, rng(4))
    assert all(torch.equal(i, j) for i, j in zip(a, b))
    x, y, w = a
    torch.testing.assert_close(y, torch.einsum('bnd,bd->bn', x, w))
    assert linear_tasks(500, 9, 3, 0.0, rng(), x_scale=3.0)[0].std() == pytest.approx(3, rel=0.03)


@pytest.mark.parametrize(
    'bad', [dict(batch=0), dict(n=0), dict(d=0), dict(sigma=-1.0), dict(active=0), dict(active=4)]
)
def test_tasks_refuse(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        linear_tasks(**(dict(batch=2, n=3, d=3, sigma=0.1, generator=rng()) | bad))


@pytest.mark.parametrize('lam', [1e-3, 0.25, 10.0])
@pytest.mark.parametrize('k', [1, 3, 12])
def test_ridge_is_least_squares_on_a_longer_table(k, lam):
    X, Y = noise(6, k, 4), noise(6, k, seed=1)
    table, answers = (
        torch.cat([X, lam**0.5 * torch.eye(4).double().expand(6, 4, 4)], 1),
        torch.cat([Y, torch.zeros(6, 4).double()], 1),
    )
    torch.testing.assert_close(
        ridge(X, Y, lam), torch.linalg.lstsq(table, answers[..., None]).solution[..., 0]
    )


def test_ridge_is_the_posterior_mean():
    "In function space: K (K + s I)^-1 y, the Gaussian process with a linear kernel."
    X, Y = noise(1, 4, 6)[0], noise(4, seed=2)
    torch.testing.assert_close(
        ridge(X, Y, 0.3), X.T @ torch.linalg.solve(X @ X.T + 0.3 * torch.eye(4).double(), Y)
    )


def test_ridge_refuses():
    with pytest.raises(ValueError, match='lam'):
        ridge(noise(2, 3, 4), noise(2, 3), 0.0)


def test_gradient_descent_takes_autograd_steps():
    X, Y, w = noise(5, 3), noise(5, seed=1), torch.zeros(3).double()
    for _ in range(4):
        w.requires_grad_(True)
        (grad,) = torch.autograd.grad(((X @ w - Y) ** 2).mean() / 2, w)
        w = (w - 0.3 * grad).detach()
    torch.testing.assert_close(gradient_descent(X, Y, 4, 0.3), w)
    torch.testing.assert_close(
        gradient_descent(X.expand(2, 5, 3), Y.expand(2, 5), 4, 0.3), w.expand(2, 3)
    )
    torch.testing.assert_close(
        gradient_descent(X.expand(2, 7, 5, 3), Y.expand(2, 7, 5), 4, 0.3), w.expand(2, 7, 3)
    )
    assert torch.equal(gradient_descent(X, Y, 0, 0.3), torch.zeros(3).double())


def test_baselines_do_not_look_ahead():
    x, y, _ = linear_tasks(3, 8, 2, 0.5, rng())
    other = y.clone()
    other[:, 5:] += 1
    for name, pred in baselines(x, y, 0.5).items():
        assert torch.equal(pred[:, :6], baselines(x, other, 0.5)[name][:, :6]), name
        assert pred.shape == (3, 8) and not pred[:, 0].any(), name


def test_tokens_come_in_pairs():
    x, y, _ = linear_tasks(2, 4, 3, 0.1, rng())
    tokens = pair_tokens(x, y)
    assert tokens.shape == (2, 8, 5)
    assert (
        torch.equal(tokens[:, ::2, :3], x)
        and torch.equal(tokens[:, 1::2, :3], x)
        and torch.equal(tokens[:, 1::2, 3], y)
    )
    assert not tokens[:, ::2, 3:].any() and tokens[:, 1::2, 4].eq(1).all()
    for bad in (y[:, :3], y[:1], y[..., None]):
        with pytest.raises(ValueError, match='shape'):
            pair_tokens(x, bad)


def test_regressor_is_causal_and_questions_are_silent():
    model, (x, y, _) = lively(), linear_tasks(3, 6, 3, 0.5, rng(1))
    base = model(x, y)[0]
    later = y.clone()
    later[:, 3] += 5
    assert torch.equal(model(x, later)[0][:, :4], base[:, :4]) and not torch.allclose(
        model(x, later)[0][:, 4:], base[:, 4:]
    )
    tokens, mask = pair_tokens(x, y), (torch.arange(12) % 2 == 1) | torch.eye(12, dtype=torch.bool)
    tokens[:, 4] += 3  # the third question only
    h = model.embed(tokens)
    for block in model.h:
        h = block(h, mask=mask)
    changed = (model.lm_head(h)[:, ::2, 0] - base).abs().amax(0)
    assert changed[2] > 1e-3 and changed[[0, 1, 3, 4, 5]].max() < 1e-6


def test_regressor_trains_the_same_twice():
    def run():
        model = InContextRegressor(3, SHAPE, rng(3))
        history = train(
            model,
            lambda g: linear_tasks(8, 5, 3, 0.1, g)[:2],
            TrainConfig(max_iters=5, eval_interval=100, grad_clip=1.0),
        )
        return history.losses, model.lm_head.weight

    (a, v), (b, w) = run(), run()
    assert a == b and torch.equal(v, w) and len(set(a)) == 5


def test_streams_end_in_the_prediction():
    model, (x, y, _) = lively(2), linear_tasks(2, 4, 3, 0.5, rng(1))
    streams = model.streams(x, y)
    assert len(streams) == 3 and all(s.shape == (2, 4, 16) for s in streams)
    torch.testing.assert_close(model.lm_head(model.ln_f(streams[-1]))[..., 0], model(x, y)[0])
    with pytest.raises(ValueError, match='d=3'):
        model(x[..., :2], y)


def test_implicit_weights_are_finite_differences():
    model, (x, y, _) = lively(5).double(), (t.double() for t in linear_tasks(2, 5, 3, 0.5, rng(2)))
    found = implicit_weights(model, x, y, 3)
    for i in range(3):
        step = torch.zeros_like(x)
        step[:, 3, i] = 1e-6
        torch.testing.assert_close(
            found[:, i],
            (model(x + step, y)[0] - model(x - step, y)[0])[:, 3] / 2e-6,
            atol=1e-6,
            rtol=1e-5,
        )
    assert not x.requires_grad
    for k in (-1, 5):
        with pytest.raises(ValueError, match=f'k={k}'):
            implicit_weights(model, x, y, k)


def test_linear_attention_is_a_double_loop():
    q, k, v = noise(2, 3, 4), noise(2, 5, 4, seed=1), noise(2, 5, 6, seed=2)
    slow = torch.stack(
        [
            torch.stack([sum((q[b, t] @ k[b, s]) * v[b, s] for s in range(5)) for t in range(3)])
            for b in range(2)
        ]
    )
    torch.testing.assert_close(linear_attention(q, k, v), slow)


def test_layers_leave_remainders_with_the_examples():
    x, y = noise(4, 9, 3), noise(4, 9, seed=1)
    z = torch.cat([x, y[..., None]], -1)
    for steps in (1, 2, 3):
        z = gd_layer(3, 0.2)(z, z)
        w = gradient_descent(x, y, steps, 0.2)
        torch.testing.assert_close(z[..., -1], y - (x * w[:, None]).sum(-1), atol=1e-12, rtol=0)
        assert torch.equal(z[..., :3], x)
    layer = LinearAttention(4)
    assert torch.equal(layer(z.float(), z.float()), z.float())


def test_order_of_examples_does_not_matter_to_a_layer():
    z, order = noise(2, 7, 4), torch.randperm(7, generator=rng(1))
    torch.testing.assert_close(
        gd_layer(3, 0.2, 0.1)(z, z)[:, order], gd_layer(3, 0.2, 0.1)(z[:, order], z[:, order])
    )


def test_written_blocks_start_as_the_identity_and_run_blocks_code():
    block, z = HandBlock(5, 8), noise(2, 3, 5)
    assert (
        torch.equal(block(z), z)
        and type(block).forward is Block.forward
        and not any(p.requires_grad for p in block.parameters())
    )


def test_instructions_are_arithmetic():
    z = noise(20, 3, 6) * 10
    got = (
        HandMLP(6, 12)
        .mul({0: 1.0}, {0: 1.0}, 3)
        .mul({0: 2.0, None: 1.0}, {1: -1.0, 2: 0.5}, 4, factor=3.0)(z)
        - z
    )
    torch.testing.assert_close(got[..., 3], z[..., 0] ** 2, atol=1e-10, rtol=0)
    torch.testing.assert_close(
        got[..., 4], 3 * (2 * z[..., 0] + 1) * (0.5 * z[..., 2] - z[..., 1]), atol=1e-10, rtol=0
    )
    assert not got[..., [0, 1, 2, 5]].any()
    torch.testing.assert_close(
        (HandBlock(6, 4).affine({5: -1.0}, 5)(z))[..., 5],
        torch.zeros(20, 3).double(),
        atol=1e-12,
        rtol=0,
    )
    with pytest.raises(ValueError, match='hidden=7'):
        HandMLP(6, 7).mul({0: 1.0}, {1: 1.0}, 2).mul({0: 1.0}, {1: 1.0}, 2)


def test_mov_moves_only_what_is_ordered():
    z = noise(4, 5, 9)
    z[:, 0], z[..., 4:] = 0, torch.eye(5).double()
    got, want = HandBlock(9, 4).mov([0, 1], [2, 3], range(4, 9), {2: 1, 4: 3})(z), z.clone()
    for t, s in {2: 1, 4: 3}.items():
        want[:, t, 2:4] += z[:, s, :2]
    assert torch.equal(got, want)


@pytest.mark.parametrize('b', [0.3, -0.5, 4.0, -20.0])
def test_division(b):
    a = noise(30)
    z = torch.zeros(30, 1, 9).double()
    z[:, 0, 0], z[:, 0, 1] = a, b
    assert (division()(z)[:, 0, 8] - a / b).abs().max() < 1e-10 and len(division(polish=False)) == 3


@pytest.mark.parametrize('d, k, decay', [(1, 1, 0.0), (3, 2, 0.0), (2, 6, 0.3)])
def test_program_is_torch_sgd(d, k, decay):
    x, y, start = noise(1, k + 1, d), noise(1, k, seed=1), noise(1, d, seed=2)
    w = nn.Parameter(start[0].clone())
    optimizer = torch.optim.SGD([w], lr=0.05)
    for i in range(k):
        optimizer.zero_grad()
        ((x[0, i] @ w - y[0, i]) ** 2 + decay * (w @ w)).backward()
        optimizer.step()
    got, pred = SGDProgram(d, k, 0.05, decay)(x, y, start)
    torch.testing.assert_close(got[0], w.detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(pred[0], x[0, -1] @ w.detach(), atol=1e-10, rtol=0)


def test_program_refuses_and_counts():
    program = SGDProgram(2, 3, 0.1)
    assert len(program.blocks) == 7 and SGDCycles(2, 3, 0.1).C == program.C == 14
    with pytest.raises(ValueError, match='give'):
        program(noise(1, 3, 2), noise(1, 3), noise(1, 2))
