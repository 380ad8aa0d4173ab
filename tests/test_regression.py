"Regression in context: the textbook against closed forms, who hears whom, the weights it acts by."

import pytest
import torch
from torch import nn

from transformer_course.block import run_blocks
from transformer_course.checkpoint import load_model, save_checkpoint
from transformer_course.experiments.regression import (
    InContextRegressor,
    RegressorConfig,
    baselines,
    gradient_descent,
    implicit_weights,
    linear_tasks,
    newton,
    pair_tokens,
    ridge,
)
from transformer_course.training import TrainConfig, train

SIZES = dict(d=3, n_layer=2, n_head=2, n_embd=16, mlp_ratio=2)
SHAPE = RegressorConfig(**SIZES, norm='none', activation='relu', zero_init=True)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def lively(seed=0):
    "A regressor whose layers and head are not zero."
    model = InContextRegressor(SHAPE, rng(seed))
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
    penalty = lam**0.5 * torch.eye(4).double()
    table = torch.cat([X, penalty.expand(6, 4, 4)], 1)
    answers = torch.cat([Y, torch.zeros(6, 4).double()], 1)
    expected = torch.linalg.lstsq(table, answers[..., None]).solution[..., 0]
    torch.testing.assert_close(ridge(X, Y, lam), expected)


def test_ridge_is_the_posterior_mean():
    "In function space: K (K + s I)^-1 y, the Gaussian process with a linear kernel."
    X, Y = noise(1, 4, 6)[0], noise(4, seed=2)
    expected = X.T @ torch.linalg.solve(X @ X.T + 0.3 * torch.eye(4).double(), Y)
    torch.testing.assert_close(ridge(X, Y, 0.3), expected)


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
    for batch in ((2,), (2, 7)):
        many = gradient_descent(X.expand(*batch, 5, 3), Y.expand(*batch, 5), 4, 0.3)
        torch.testing.assert_close(many, w.expand(*batch, 3))
    assert torch.equal(gradient_descent(X, Y, 0, 0.3), torch.zeros(3).double())


@pytest.mark.parametrize('scale', [0.5, 1.0, 2.0])
def test_newton_squares_what_is_still_wrong(scale):
    "In the basis of S the iteration is 1 - (1 - m s)^(2^j) over s, by hand for each direction."
    X, Y = noise(3, 9, 4), noise(3, 9, seed=1)
    size, axes = torch.linalg.eigh(X.mT @ X)  # (3, 4)
    wrong = 1 - scale * size**2 / size.square().sum(-1, keepdim=True)
    moment = (axes.mT @ (X.mT @ Y[..., None]))[..., 0]
    for steps in range(5):
        along = (1 - wrong ** (2**steps)) / size * moment
        expected = (axes @ along[..., None])[..., 0]
        torch.testing.assert_close(newton(X, Y, steps, scale), expected)


def test_newton_arrives_at_least_squares_and_refuses():
    X, Y = noise(3, 9, 4), noise(3, 9, seed=1)
    expected = torch.linalg.lstsq(X, Y[..., None]).solution[..., 0]
    torch.testing.assert_close(newton(X, Y, 25, 1.5), expected, atol=1e-9, rtol=1e-7)
    for scale in (0.0, 2.1):
        with pytest.raises(ValueError, match='scale'):
            newton(X, Y, 3, scale)


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
    assert torch.equal(tokens[:, ::2, :3], x) and torch.equal(tokens[:, 1::2, :3], x)
    assert torch.equal(tokens[:, 1::2, 3], y)
    assert not tokens[:, ::2, 3:].any() and tokens[:, 1::2, 4].eq(1).all()
    for bad in (y[:, :3], y[:1], y[..., None]):
        with pytest.raises(ValueError, match='shape'):
            pair_tokens(x, bad)


def test_regressor_is_causal_and_questions_are_silent():
    model, (x, y, _) = lively(), linear_tasks(3, 6, 3, 0.5, rng(1))
    base = model(x, y)[0]
    later = y.clone()
    later[:, 3] += 5
    moved = model(x, later)[0]
    assert torch.equal(moved[:, :4], base[:, :4])
    assert not torch.allclose(moved[:, 4:], base[:, 4:])
    tokens, mask = pair_tokens(x, y), (torch.arange(12) % 2 == 1) | torch.eye(12, dtype=torch.bool)
    tokens[:, 4] += 3  # the third question only
    h = run_blocks(model.h, model.embed(tokens), mask=mask)
    changed = (model.lm_head(h)[:, ::2, 0] - base).abs().amax(0)
    assert changed[2] > 1e-3 and changed[[0, 1, 3, 4, 5]].max() < 1e-6


def test_regressor_trains_the_same_twice():
    def run():
        model = InContextRegressor(SHAPE, rng(3))
        config = TrainConfig(max_iters=5, eval_interval=100, grad_clip=1.0)
        history = train(model, lambda g: linear_tasks(8, 5, 3, 0.1, g)[:2], config)
        return history.losses, model.lm_head.weight

    (a, v), (b, w) = run(), run()
    assert a == b and torch.equal(v, w) and len(set(a)) == 5


def test_regressor_is_opened_by_name_as_it_was_saved(tmp_path):
    model, (x, y, _) = lively(4), linear_tasks(3, 6, 3, 0.5, rng(1))
    config = TrainConfig(max_iters=3, eval_interval=100)
    train(model, lambda g: linear_tasks(8, 5, 3, 0.1, g)[:2], config)
    save_checkpoint(tmp_path / 'regressor', model)
    opened, about = load_model(tmp_path / 'regressor')
    assert type(opened) is InContextRegressor and about['model'] == 'InContextRegressor'
    assert opened.config == SHAPE and not opened.training
    assert torch.equal(opened(x, y)[0], model(x, y)[0])


def test_streams_end_in_the_prediction():
    model, (x, y, _) = lively(2), linear_tasks(2, 4, 3, 0.5, rng(1))
    streams = model.streams(x, y)
    assert len(streams) == 3 and all(s.shape == (2, 8, 16) for s in streams)
    torch.testing.assert_close(
        model.lm_head(model.ln_f(streams[-1][:, ::2]))[..., 0], model(x, y)[0]
    )
    with pytest.raises(ValueError, match='d=3'):
        model(x[..., :2], y)
    with pytest.raises(ValueError, match='d=0'):
        RegressorConfig(d=0)


def test_implicit_weights_are_finite_differences():
    model, (x, y, _) = lively(5).double(), (t.double() for t in linear_tasks(2, 5, 3, 0.5, rng(2)))
    found = implicit_weights(model, x, y, 3)
    for i in range(3):
        step = torch.zeros_like(x)
        step[:, 3, i] = 1e-6
        slope = (model(x + step, y)[0] - model(x - step, y)[0])[:, 3] / 2e-6
        torch.testing.assert_close(found[:, i], slope, atol=1e-6, rtol=1e-5)
    assert not x.requires_grad
    for k in (-1, 5):
        with pytest.raises(ValueError, match=f'k={k}'):
            implicit_weights(model, x, y, k)
