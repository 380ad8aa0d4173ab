"Mixture of experts: against Hugging Face's Switch and Mixtral, and against a sum over all experts."

import copy
import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transformer_course.bigram import IGNORE_INDEX
from transformer_course.block import MLP, Block, BlockConfig
from transformer_course.checkpoint import load_model, save_checkpoint
from transformer_course.experts import (
    ExpertConfig,
    ExpertGPT,
    Experts,
    balance_loss,
    check_experts,
    route,
)
from transformer_course.generation import generate
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.training import TrainConfig, train

thorough = settings(deadline=None, derandomize=True, max_examples=25)
SMALL = dict(block_size=8, vocab_size=7, n_layer=2, n_head=2, n_embd=16)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def layer(*args, seed=0, **kw):
    torch.manual_seed(seed)
    return Experts(*args, **kw).double()


def expert_gpt(seed=0, **fields):
    return ExpertGPT(ExpertConfig(**SMALL | fields), rng(seed))


def ids(seed=1, shape=(3, 8)):
    return torch.randint(7, shape, generator=rng(seed))


def dense(module, x):
    "Every expert on every token, and the table of weights written out with a loop."
    out = torch.zeros_like(x)
    for at in torch.cartesian_prod(*map(torch.arange, x.shape[:-1])).view(-1, x.dim() - 1).tolist():
        token = x[tuple(at)]
        probs = (module.router.weight @ token).softmax(0)
        best = sorted(range(len(probs)), key=lambda e: -probs[e].item())[: module.top_k]
        total = sum(probs[e] for e in best) if module.top_k > 1 else 1
        out[tuple(at)] = sum(probs[e] / total * module.experts[e](token) for e in best)
    return out


def transformers():
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return pytest.importorskip(
            'transformers',
            reason='the reference implementation is not installed: pip install transformers',
        )


@thorough
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
def test_equals_a_loop_over_tokens_in_values_and_gradients(n_experts, k, seed):
    k = min(k, n_experts)
    module = layer(4, n_experts, k, ratio=2, seed=seed)
    x = torch.randn(2, 5, 4, generator=rng(seed), dtype=torch.double)
    torch.testing.assert_close(module(x), dense(module, x))
    module(x).sin().sum().backward()
    ours = [p.grad.clone() for p in module.parameters()]  # zeros, not None, if nobody asked
    module.zero_grad(set_to_none=True)
    dense(module, x).sin().sum().backward()
    for p, mine in zip(module.parameters(), ours):
        torch.testing.assert_close(mine, torch.zeros_like(p) if p.grad is None else p.grad)


@pytest.mark.parametrize('seed', range(3))
def test_equals_switch(seed):
    transformers()
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersSparseMLP,
        load_balancing_loss_func,
    )

    torch.manual_seed(seed)
    size = dict(d_model=8, d_ff=32, num_experts=5, expert_capacity=1000)
    config = SwitchTransformersConfig(**size, dropout_rate=0.0, router_jitter_noise=0.0)
    theirs = SwitchTransformersSparseMLP(config).eval()
    ours = Experts(8, 5, bias=False, activation='relu')
    ours.router.weight.data = theirs.router.classifier.weight.data
    for mine, other in zip(ours.experts, theirs.experts.values(), strict=True):
        mine.c_fc.weight.data = other.wi.weight.data
        mine.c_proj.weight.data = other.wo.weight.data
    x = torch.randn(3, 11, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    probs = ours.router(x).softmax(-1).view(1, 33, 5)
    balance = load_balancing_loss_func(probs, ours.chosen.view(1, 33))
    torch.testing.assert_close(ours.balance, balance)


@pytest.mark.parametrize('seed', range(3))
def test_routes_as_mixtral(seed):
    "The router, and the balance loss (theirs counts k questions for a token)."
    transformers()
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import (
        MixtralTopKRouter,
        load_balancing_loss_func,
    )

    config = MixtralConfig(hidden_size=8, num_local_experts=5, num_experts_per_tok=2)
    theirs = MixtralTopKRouter(config)
    nn.init.normal_(theirs.weight, generator=rng(seed))
    x = torch.randn(33, 8, generator=rng(seed + 10))
    logits, weights, chosen = theirs(x)
    probs, mine, who = route(logits, 2)
    torch.testing.assert_close(mine, weights)
    assert torch.equal(who, chosen)
    balance = load_balancing_loss_func((logits,), 5, 2)
    torch.testing.assert_close(2 * balance_loss(probs, who), balance)


@thorough
@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_even_routing_has_balance_one(n_experts, rounds, seed):
    n = n_experts * rounds
    chosen = torch.arange(n)[torch.randperm(n, generator=rng(seed)), None] % n_experts  # (n, 1)
    probs, even = torch.full((n, n_experts), 1 / n_experts), torch.tensor(1.0)
    torch.testing.assert_close(balance_loss(probs, chosen), even)
    everybody_asks_one = torch.zeros_like(chosen)  # even probabilities: 1, whoever is asked
    torch.testing.assert_close(balance_loss(probs, everybody_asks_one), even)
    certain = torch.eye(n_experts)[torch.zeros(7, dtype=torch.long)]
    assert balance_loss(certain, certain.argmax(-1, keepdim=True)) == n_experts


def test_descent_on_the_balance_loss_evens_the_load():
    logits = (torch.randn(200, 4, generator=rng()) + torch.tensor([2.0, 0, 0, 0])).requires_grad_()
    before = route(logits)[2].flatten().bincount(minlength=4).max().item()
    optimizer = torch.optim.SGD([logits], lr=20.0)
    for _ in range(50):
        probs, _, chosen = route(logits)
        optimizer.zero_grad()
        balance_loss(probs, chosen).backward()
        optimizer.step()
    assert before > 120 and route(logits)[2].flatten().bincount(minlength=4).max() < 75


def test_one_expert_is_the_mlp_bit_by_bit():
    module, x = layer(6, 1), torch.randn(2, 3, 6, dtype=torch.double)
    assert torch.equal(module(x), module.experts[0](x)) and module.load.tolist() == [1]


def test_names_of_experts_do_not_matter():
    module, x = layer(6, 4, 2), torch.randn(2, 9, 6, generator=rng(), dtype=torch.double)
    for names in ([1, 2, 3, 0], [3, 1, 0, 2]):
        other = copy.deepcopy(module)
        other.experts = nn.ModuleList(module.experts[i] for i in names)
        other.router.weight.data = module.router.weight.data[names]
        torch.testing.assert_close(other(x), module(x))
        assert torch.equal(torch.tensor(names)[other.chosen], module.chosen)
        assert torch.equal(other.load, module.load[names])


@pytest.mark.parametrize('k', [1, 2])
def test_the_router_learns(k):
    module, x = layer(6, 4, k), torch.randn(2, 9, 6, generator=rng(), dtype=torch.double)
    module(x).square().sum().backward()
    assert module.router.weight.grad.abs().amax(1).min() > 1e-6  # every row


@pytest.mark.parametrize('k', [1, 2])
def test_causal_and_deterministic(k):
    model, idx = expert_gpt(top_k=k).double().eval(), ids()
    with torch.no_grad():
        logits = model(idx)[0]
        assert torch.equal(logits, model(idx)[0])
        for t in range(8):
            other = idx.clone()
            other[:, t] = (other[:, t] + 1) % 7
            moved = (model(other)[0] - logits).abs().amax((0, 2)) > 1e-9
            assert moved.tolist()[:t] == [False] * t and moved[t]


def test_the_balance_loss_reaches_the_gradient_in_training_only():
    model, x, y = expert_gpt(alpha=0.0), ids(), ids(2)
    grads = []
    for alpha in (0.0, 10.0):
        model.config.alpha = alpha
        model.zero_grad()
        model(x, y)[1].backward()
        grads.append(model.layers[0].router.weight.grad.clone())
    assert (grads[1] - grads[0]).norm() > 0.01
    model.eval()
    plain = model(x, y)[1]
    model.config.alpha = 0.0
    assert torch.equal(plain, model(x, y)[1])
    assert model(x)[1] is None and model.train()(x)[1] is None


def test_is_a_gpt_that_trains_copies_and_writes():
    model, x, y = expert_gpt(), ids(), ids(2)
    model(x, y)
    assert not any(layer.balance.requires_grad for layer in model.layers)  # the graph is let go
    copy.deepcopy(model)
    config = TrainConfig(max_iters=80, warmup_iters=5, dtype='float32', compile=False)
    history = train(model, lambda generator: (x, y), config)
    assert history.losses[-1] < 0.5 * history.losses[0]
    prompt = x[:1, :3]
    assert generate(model, prompt, 5, temperature=0.0).shape == (1, 8)


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_parts_of_a_batch_add_up_to_the_whole(optimizer):
    "Without the balance loss, which is not a mean over tokens, accumulation changes nothing."
    x, y = ids(1, (8, 8)), ids(2, (8, 8))
    y[0, :5], y[5, 1:] = IGNORE_INDEX, IGNORE_INDEX  # parts score different numbers of targets
    how = dict(max_iters=5, warmup_iters=1, optimizer=optimizer, dtype='float32', compile=False)

    def trained(n_parts):
        parts = itertools.cycle(zip(x.chunk(n_parts), y.chunk(n_parts)))
        config = TrainConfig(gradient_accumulation_steps=n_parts, **how)
        model = expert_gpt(alpha=0.0).double()
        return model, train(model, lambda generator: next(parts), config).losses

    (whole, losses), (in_parts, same_losses) = trained(1), trained(4)
    assert same_losses == pytest.approx(losses, abs=1e-6)
    for p, q in zip(whole.parameters(), in_parts.parameters()):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=0)


def test_is_saved_and_opened_as_what_it_is(tmp_path):
    fields = dict(n_experts=3, top_k=2, alpha=0.5, gated=True, activation='silu', n_inner=20)
    model = expert_gpt(**fields).eval()
    save_checkpoint(tmp_path / 'checkpoint', model)
    opened, about = load_model(tmp_path / 'checkpoint')
    assert type(opened) is ExpertGPT and about['model'] == 'ExpertGPT'
    assert opened.config == model.config == ExpertConfig(**SMALL | fields)
    assert not opened.training and torch.equal(opened(ids())[0], model(ids())[0])


@pytest.mark.parametrize('k', [1, 2])
def test_counts(k):
    model, plain = expert_gpt(top_k=k), GPT(GPTConfig(**SMALL))
    mlp = sum(p.numel() for p in MLP(16).parameters())
    assert model.num_params() - plain.num_params() == 2 * (3 * mlp + 4 * 16)
    assert model.active_params() - plain.num_params() == 2 * ((k - 1) * mlp + 4 * 16)


def test_seeds_decide_the_weights():
    a, b, c = (expert_gpt(seed).state_dict() for seed in (0, 0, 1))
    first, last = (f'transformer.h.0.mlp.experts.{e}.c_fc.weight' for e in (0, 3))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a[last], c[last]) and not torch.equal(a[first], a[last])


@pytest.mark.parametrize('gated', [False, True])
def test_every_expert_is_an_mlp_of_the_config(gated):
    fields = dict(mlp_ratio=3.0, gated=gated, activation='relu2', bias=False)
    one = expert_gpt(n_experts=1, **fields).eval()
    plain = GPT(GPTConfig(**SMALL | fields)).eval()
    weights = {name.replace('.experts.0', ''): w for name, w in one.state_dict().items()}
    plain.load_state_dict({name: w for name, w in weights.items() if 'router' not in name})
    assert torch.equal(one(ids())[0], plain(ids())[0])


@pytest.mark.parametrize('k', [1, 2])
def test_no_expert_works_for_tokens_that_did_not_ask(k):
    module, seen = layer(6, 4, k), []
    for expert in module.experts:
        expert.register_forward_hook(lambda _, given, out: seen.append(len(given[0])))
    module(torch.randn(2, 9, 6, generator=rng(), dtype=torch.double))
    assert seen == module.chosen.flatten().bincount(minlength=4).tolist() and sum(seen) == 18 * k


def test_experts_in_a_block_of_their_own():
    block = Block(BlockConfig(n_embd=16, n_head=2), mlp=Experts(16, 3))
    x = torch.randn(2, 5, 16, generator=rng())
    assert block(x).shape == x.shape and block.mlp.chosen.shape == (2, 5, 1)


def test_sixteen_bit_inputs_keep_their_type():
    module = Experts(8, 3)
    x = torch.randn(2, 4, 8, generator=rng())
    assert module.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast('cpu', torch.bfloat16):
        assert module.float()(x).dtype == torch.float32


@pytest.mark.parametrize(
    'bad, word',
    [
        (lambda: Experts(8, 0), 'n_experts=0'),
        (lambda: Experts(8, 2.0), 'n_experts=2.0'),
        (lambda: Experts(8, 2, 3), 'top_k=3'),
        (lambda: Experts(8, 2, 0), 'top_k=0'),
        (lambda: route(torch.zeros(1, 2), 3), 'n_experts=2'),
        (lambda: check_experts(4, -1), 'top_k=-1'),
        (lambda: Experts(8, True), 'n_experts=True'),
        (lambda: ExpertConfig(n_experts=-1), 'n_experts=-1'),
        (lambda: ExpertConfig(n_experts=2.0), 'n_experts=2.0'),
        (lambda: ExpertConfig(n_experts=2, top_k=3), 'top_k=3'),
        (lambda: ExpertConfig(alpha=-0.1), 'alpha=-0.1'),
        (lambda: ExpertConfig(alpha=float('nan')), 'alpha=nan'),
        (lambda: ExpertConfig(n_embd=10, n_head=4), 'n_embd=10'),
        (lambda: ExpertGPT(GPTConfig(**SMALL)), 'ExpertConfig'),
        (lambda: Experts(8, 2, activation='tanh'), "activation='tanh'"),
        (lambda: Experts(8, 2).load, 'chosen'),
    ],
)
def test_bad_input_is_named(bad, word):
    with pytest.raises(ValueError, match=word):
        bad()
