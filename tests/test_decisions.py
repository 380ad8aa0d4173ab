"The Decision Transformer: against Hugging Face's, a loop over steps, and games played one by one."

import copy
import math
import sys
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from transformer_course.bigram import IGNORE_INDEX
from transformer_course.checkpoint import load_model, save_checkpoint
from transformer_course.decisions import (
    DecisionConfig,
    DecisionTransformer,
    Episodes,
    make_envs,
    play,
    returns_to_go,
    rollout,
    sample_windows,
)
from transformer_course.training import TrainConfig, train

gymnasium = pytest.importorskip('gymnasium')
thorough = settings(deadline=None, derandomize=True, max_examples=25)
SMALL = dict(n_layer=2, n_head=2, n_embd=16, dropout=0.0, block_size=6, max_steps=30)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def shaken(seed=0, **fields):
    "A model in which every weight matters."
    model = DecisionTransformer(DecisionConfig(**SMALL | fields), rng(seed)).eval()
    for i, p in enumerate(model.parameters()):
        nn.init.normal_(p, std=0.3, generator=rng(seed + i))
    return model


def steps(seed=1, B=3, K=6, S=4, A=2):
    "Random returns, states, actions and timesteps."
    g = rng(seed)
    start = torch.randint(20, (B, 1), generator=g)
    returns, states = torch.randn(B, K, generator=g), torch.randn(B, K, S, generator=g)
    return returns, states, torch.randint(A, (B, K), generator=g), start + torch.arange(K)


def coin(seed):
    g = rng(seed)
    return lambda rows, *past: torch.randint(2, rows.shape, generator=g)


def small_log(n=12, seed=0, T=30):
    return play(make_envs('CartPole-v1', n, T), coin(seed), seed, T)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize('kind', ['gelu_tanh', 'relu'])
@pytest.mark.parametrize('seed', range(2))
def test_equals_hugging_face(seed, kind):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        transformers = pytest.importorskip('transformers')
    torch.manual_seed(seed)
    name = dict(gelu_tanh='gelu_new', relu='relu')[kind]
    world = dict(state_dim=5, act_dim=3, max_ep_len=30, action_tanh=False)
    size = dict(hidden_size=24, n_layer=2, n_head=3, activation_function=name)
    ends = dict(bos_token_id=0, eos_token_id=0)
    config = transformers.DecisionTransformerConfig(**world, **size, **ends)
    theirs = transformers.DecisionTransformerModel(config).eval()
    for p in theirs.parameters():
        p.data += 0.2 * torch.randn_like(p)
    fields = dict(n_head=3, n_embd=24, activation=kind, state_size=5, n_actions=3)
    ours = shaken(**fields)
    with torch.no_grad():
        for part in ('timestep', 'return', 'state'):
            getattr(ours, f'embed_{part}').load_state_dict(
                getattr(theirs, f'embed_{part}').state_dict()
            )
        ours.embed_action.weight.copy_(theirs.embed_action.weight.T + theirs.embed_action.bias)
        ours.embed_ln.weight.copy_(theirs.embed_ln.weight)
        ours.embed_ln.bias.copy_(theirs.embed_ln.bias + theirs.encoder.wpe.weight[0])
        ours.ln_f.load_state_dict(theirs.encoder.ln_f.state_dict())
        ours.predict_action.load_state_dict(theirs.predict_action[0].state_dict())
        body = theirs.encoder.h.state_dict()
        ours.h.load_state_dict(
            {k: v.T if v.dim() == 2 and k.endswith('weight') else v for k, v in body.items()}
        )
        returns, states, actions, timesteps = steps(seed, S=5, A=3)
        one_hot = nn.functional.one_hot(actions, 3).float()
        wanted = dict(returns_to_go=returns[..., None], timesteps=timesteps)
        expected = theirs(states=states, actions=one_hot, **wanted).action_preds
        found = ours(returns, states, actions, timesteps)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize('conditioned', [True, False])
def test_a_guess_sees_its_return_and_state_but_not_its_action(conditioned):
    model, batch = shaken(conditioned=conditioned), steps()
    before = model(*batch)[0]

    def moved(which, change):
        other = list(batch)
        other[which] = batch[which].clone()
        other[which][:, 2] = change(batch[which][:, 2])
        return (model(*other)[0] - before).abs().amax((0, 2)).gt(1e-7).nonzero()[:, 0].tolist()

    assert moved(0, lambda r: r + 1) == ([2, 3, 4, 5] if conditioned else [])
    assert moved(1, lambda s: s + 1) == [2, 3, 4, 5]
    assert moved(2, lambda a: 1 - a) == [3, 4, 5]
    assert moved(3, lambda t: t + 1) == [2, 3, 4, 5]


def test_reads_the_steps_one_by_one_as_it_reads_them_together():
    model, batch = shaken(), steps()
    whole = model(*batch)[0]
    for t in range(6):
        alone = model(*(x[:, : t + 1] for x in batch))[0][:, -1]
        torch.testing.assert_close(alone, whole[:, t], atol=1e-5, rtol=1e-5)


def test_steps_count_from_zero_where_no_timesteps_are_given():
    model, (returns, states, actions, _) = shaken(), steps()
    counted = torch.arange(6).expand(3, -1)
    expected = model(returns, states, actions, counted)[0]
    assert torch.equal(model(returns, states, actions)[0], expected)


def test_the_scale_and_the_states_are_taken_as_said():
    batch, log = steps(), small_log()
    plain = shaken()
    scaled = DecisionTransformer(replace(plain.config, return_scale=50.0)).eval()
    scaled.load_state_dict(plain.state_dict())
    torch.testing.assert_close(scaled(50 * batch[0], *batch[1:])[0], plain(*batch)[0])
    with torch.no_grad():
        expected = plain(*batch)[0]
        assert plain.standardize(log) is plain
        seen = torch.cat([log.states[i, :n] for i, n in enumerate(log.lengths.tolist())])
        torch.testing.assert_close(plain.state_mean, seen.mean(0))
        torch.testing.assert_close(plain.state_std, seen.std(0, correction=0))
        states = batch[1] * plain.state_std + plain.state_mean
        found = plain(batch[0], states, *batch[2:])[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_targets_that_are_not_scored_change_nothing():
    model, batch = shaken(), steps()
    targets = batch[2].clone()
    targets[:, 4:] = IGNORE_INDEX
    short = tuple(x[:, :4] for x in batch)
    expected = model(*short, batch[2][:, :4])[1]
    torch.testing.assert_close(model(*batch, targets)[1], expected)


# ---------------------------------------------------------------- episodes


@thorough
@given(st.lists(st.lists(st.integers(-9, 9), min_size=4, max_size=4), min_size=1, max_size=3))
def test_returns_to_go_are_sums_of_what_comes(rewards):
    expected = [[sum(row[t:]) for t in range(4)] for row in rewards]
    assert returns_to_go(torch.tensor(rewards)).tolist() == expected


def test_play_is_what_one_environment_does_alone():
    log = play(make_envs('FrozenLake-v1', 5, 30), lambda rows, *past: rows * 0 + 1, 7, 30)
    for i in range(5):
        env = gymnasium.make('FrozenLake-v1', max_episode_steps=30)
        state, _ = env.reset(seed=7 + i)  # so gymnasium seeds a vector
        for t in range(int(log.lengths[i])):
            assert log.states[i, t].argmax() == state and log.states[i, t].sum() == 1
            state, reward, ended, cut, _ = env.step(1)
            assert log.rewards[i, t] == reward
        assert ended or cut
    assert not log.states[~log.real].any() and not log.rewards[~log.real].any()


def test_cartpole_ends_where_it_falls_or_is_cut():
    log = small_log(40)
    assert log.lengths.min() < 30 and log.lengths.max() == 30
    assert torch.equal(log.returns, log.lengths.float())
    fallen = log.lengths < 30
    last = log.states[torch.arange(40), log.lengths - 1]
    assert (last[:, 2].abs() < 0.2095).all()  # the state before the last push still stood
    assert (last[fallen, 2].abs() > 0.1).all()


def test_windows_are_pieces_of_the_log():
    log = small_log()
    returns, states, actions, at, targets = sample_windows(log, 300, 6, rng(3))
    togo = returns_to_go(log.rewards)
    seen = set()
    for i in range(300):
        match = (log.states[:, :, 0] == states[i, 0, 0]) & log.real
        [[episode, start]] = match.nonzero().tolist()
        assert at[i, 0] == start
        left = int(log.lengths[episode]) - start
        seen.add(min(left, 6))
        for k in range(min(left, 6)):
            assert torch.equal(states[i, k], log.states[episode, start + k])
            assert returns[i, k] == togo[episode, start + k] and at[i, k] == start + k
            assert actions[i, k] == targets[i, k] == log.actions[episode, start + k]
        assert (targets[i, left:] == IGNORE_INDEX).all() and not actions[i, left:].any()
    assert seen == {1, 2, 3, 4, 5, 6}


def test_every_step_of_the_log_is_drawn():
    log = small_log(4)
    _, states, *_ = sample_windows(log, 5000, 1, rng(0))
    assert len(set(states[:, 0, 0].tolist())) == int(log.lengths.sum())


# ---------------------------------------------------------------- asking


class Spy(nn.Module):
    "Notes what it is given, and pushes to the left and to the right in turn."

    config = DecisionConfig(block_size=3, max_steps=30)

    def __init__(self):
        super().__init__()
        self.given = []

    def forward(self, *batch):
        self.given.append([x.clone() for x in batch])
        right = batch[3][:, -1] % 2 == 1
        return torch.stack([~right, right], -1).float()[:, None] * 50, None


def test_an_order_counts_down_by_what_was_received():
    spy, asked = Spy(), torch.tensor([8.0, -2.0])
    log = rollout(spy, make_envs('CartPole-v1', 2, 30), asked, 5)
    assert log.actions[0, :4].tolist() == [0, 1, 0, 1]
    together = int(log.lengths.min())
    for t, (returns, states, actions, at) in enumerate(spy.given[:together]):
        window = range(max(0, t - 2), t + 1)
        assert at.tolist() == [list(window)] * 2
        assert returns.tolist() == [[wanted - k for k in window] for wanted in asked.tolist()]
        assert torch.equal(states, log.states[:, window])
        assert torch.equal(actions[:, :-1], log.actions[:, window][:, :-1])
    assert len(spy.given[-1][0]) == 1 or log.lengths[0] == log.lengths[1]  # who is done is left out


def test_one_seed_is_one_game():
    model, envs = shaken(), make_envs('CartPole-v1', 4, 30)
    first, again, other = (rollout(model, envs, 20.0, seed) for seed in (3, 3, 4))
    assert torch.equal(first.states, again.states) and torch.equal(first.actions, again.actions)
    assert not torch.equal(first.states, other.states)
    cold = rollout(model, envs, 20.0, 3, temperature=0), rollout(model, envs, 20.0, 3)
    assert torch.equal(cold[0].states[:, 0], cold[1].states[:, 0])
    assert not torch.equal(cold[0].actions, cold[1].actions)


def test_the_likeliest_action_is_taken_at_temperature_zero():
    model = shaken()
    log = rollout(model, make_envs('CartPole-v1', 3, 30), 9.0, 2, temperature=0)
    n = int(log.lengths.min())
    K, returns = min(n, 6), 9.0 - torch.arange(n).float().expand(3, -1)
    batch = returns[:, :K], log.states[:, :K], log.actions[:, :K]
    assert torch.equal(model(*batch)[0].argmax(-1), log.actions[:, :K])


def test_learns_what_a_return_means(tmp_path):
    "Push to the right for 1, to the left for 0; saved, opened, and the same run twice."
    g = rng(0)
    actions = torch.randint(2, (200, 5), generator=g)
    rewards = torch.zeros(200, 5)
    rewards[:, -1] = actions[:, :1].float().squeeze(1)
    actions[:] = actions[:, :1]
    states = torch.randn(200, 5, 4, generator=g)
    log = Episodes(states, actions, rewards, torch.full((200,), 5))
    config = DecisionConfig(**SMALL | dict(block_size=1))
    size = dict(max_iters=80, batch_size=32, eval_interval=100)
    how = TrainConfig(**size, warmup_iters=5, learning_rate=2e-2, muon_lr=0.05, seed=1)

    def fit():
        model = DecisionTransformer(config, rng(1))
        history = train(model, lambda g: sample_windows(log, 32, 1, g), how)
        return model, history.losses

    (model, losses), (_, same) = fit(), fit()
    assert losses == same and losses[0] > 0.6 and losses[-1] < 0.1
    for wanted in (0.0, 1.0):
        returns = torch.full((200, 1), wanted)
        logits = model(returns, states[:, :1], actions[:, :1], torch.zeros(200, 1).long())[0]
        assert (logits[:, 0].argmax(-1) == wanted).all()
    model.standardize(log)
    save_checkpoint(tmp_path / 'run', model)
    opened, about = load_model(tmp_path / 'run')
    assert type(opened) is DecisionTransformer and opened.config == config and not opened.training
    assert all(torch.equal(a, b) for a, b in zip(opened.buffers(), model.buffers(), strict=True))
    batch = tuple(x[:, :1] for x in steps())
    assert torch.equal(opened(*batch)[0], model(*batch)[0])


# ---------------------------------------------------------------- bad input


def replaced(which, value):
    batch = list(steps())
    batch[which] = value(batch[which])
    return batch


BAD = {
    'states has shape': replaced(1, lambda s: s[0]),
    'at least|states has shape': replaced(1, lambda s: s[:0]),
    'state_size=4': replaced(1, lambda s: s[..., :2]),
    'block_size=6': [x.repeat_interleave(2, 1) for x in steps()],
    r'returns has shape \(3, 5\)': replaced(0, lambda r: r[:, 1:]),
    r'actions has shape \(3, 6, 1\)': replaced(2, lambda a: a[..., None]),
    'actions runs from 0 to 2, but n_actions=2': replaced(2, lambda a: a * 2),
    'actions runs from -1': replaced(2, lambda a: a - 1),
    'actions.*whole numbers': replaced(2, lambda a: a.float()),
    'max_steps=30': replaced(3, lambda t: t + 30),
    'not finite': replaced(0, lambda r: r * math.inf),
}


@pytest.mark.parametrize('said', BAD)
def test_bad_batches_are_named(said):
    with pytest.raises(ValueError, match=said):
        shaken()(*BAD[said])


@pytest.mark.parametrize(
    'fields', [dict(state_size=0), dict(n_actions=0), dict(max_steps=0), dict(return_scale=0.0)]
)
def test_bad_configs_are_named(fields):
    [(name, value)] = fields.items()
    with pytest.raises(ValueError, match=f'{name}={value}'):
        DecisionConfig(**fields)


def test_bad_episodes_and_orders_are_named():
    log, envs = small_log(), make_envs('CartPole-v1', 2, 30)
    with pytest.raises(ValueError, match='the log is empty'):
        log.pick(log.lengths < 0)
    for name, value in dict(states=log.rewards, rewards=log.rewards[:, 1:]).items():
        with pytest.raises(ValueError, match=r'give \(N, T, S\)'):
            replace(copy.copy(log), **{name: value})
    for lengths in (log.lengths * 0, log.lengths + 30):
        with pytest.raises(ValueError, match='lengths runs from'):
            replace(log, lengths=lengths)
    for asked in (math.nan, math.inf, torch.tensor([1.0, math.nan])):
        with pytest.raises(ValueError, match='must be finite'):
            rollout(shaken(), envs, asked, 0)
    with pytest.raises(ValueError, match='temperature=-1'):
        rollout(shaken(), envs, 1.0, 0, temperature=-1)
    with pytest.raises(ValueError, match='n=0'):
        make_envs('CartPole-v1', 0, 5)


def test_an_episode_longer_than_the_model_knows_is_named():
    log = small_log(T=40)
    with pytest.raises(ValueError, match='max_steps=10'):
        shaken(max_steps=10)(*sample_windows(log, 64, 6, rng(0)))


def test_without_gymnasium_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gymnasium', None)
    with pytest.raises(ImportError, match=r"pip install 'transformer_course\[course\]'"):
        make_envs('CartPole-v1', 1, 5)
