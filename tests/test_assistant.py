"An assistant: masked prompts, losses beside trl's, the optimum in closed form, one loop for all."

import math
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F

from transformer_course.assistant import (
    DPO,
    GRPO,
    dpo_loss,
    group_advantages,
    grpo_loss,
    instruction_rows,
    reply_logps,
    tilted,
)
from transformer_course.bigram import IGNORE_INDEX
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.training import TrainConfig, train

LENGTHS = torch.tensor([[5], [3], [1], [4], [2], [5]])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gpt(seed=0):
    "A small GPT with weights large enough for everything to matter."
    model = GPT(GPTConfig(vocab_size=9, block_size=12, n_layer=2, n_head=2, n_embd=16), rng(seed))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=rng(seed + p.numel()))
    return model.eval()


def six_replies():
    "Fixed log-probabilities of six replies: now, when they were drawn, by the reference."
    g, mask = rng(), torch.arange(5) < LENGTHS
    now = -3 * torch.rand(6, 5, generator=g)
    then = now + 0.4 * torch.randn(6, 5, generator=g)
    ref = now + 0.5 * torch.randn(6, 5, generator=g)
    advantages = torch.tensor([1.2, -0.3, -0.9, 0.7, 0.5, -1.2])
    return *(p.masked_fill(~mask, 0) for p in (now, then, ref)), advantages, mask


def with_slope(loss_of, logps):
    "A loss, and the length of its gradient."
    logps = logps.clone().requires_grad_()
    loss = loss_of(logps)
    (slope,) = torch.autograd.grad(loss, logps)
    return loss.item(), slope.norm().item()


# ---------------------------------------------------------------- beside trl

# what the loss code of trl 1.16.0 (torch 2.13.0) said: loss, length of its gradient
TRL_DPO = {0.1: (0.74236697, 0.09566557), 1.0: (1.34097481, 1.30874681)}
TRL_GRPO = {  # (KL weight, clip)
    (0.0, 0.2): (0.07634614, 0.21320748),
    (0.0, 0.05): (0.10605668, 0.20794161),
    (0.04, 0.2): (0.07998394, 0.21129686),
    (0.04, 0.05): (0.10969448, 0.20611520),
    (0.5, 0.2): (0.12181827, 0.19381681),
    (0.5, 0.05): (0.15152884, 0.18982288),
}


def our_dpo(beta):
    now, _, ref, _, _ = six_replies()
    return with_slope(lambda p: dpo_loss(*p.sum(1).chunk(2), *ref.sum(1).chunk(2), beta), now)


def our_grpo(weight, clip):
    now, then, ref, advantages, mask = six_replies()
    return with_slope(lambda p: grpo_loss(p, ref, advantages, mask, weight, then, clip), now)


@pytest.mark.parametrize('beta', TRL_DPO)
def test_dpo_is_what_trl_recorded(beta):
    assert our_dpo(beta) == pytest.approx(TRL_DPO[beta], rel=1e-5)


@pytest.mark.parametrize(('weight', 'clip'), TRL_GRPO)
def test_grpo_is_what_trl_recorded(weight, clip):
    assert our_grpo(weight, clip) == pytest.approx(TRL_GRPO[weight, clip], rel=1e-5)


class Output:
    "What trl asks of a model: log-probabilities, and statistics that do not enter the loss."

    def __init__(self, logps):
        self.log_probs = logps

    def __getattr__(self, name):
        return torch.zeros_like(self.log_probs, dtype=torch.bool if name == 'is_top1' else None)


def trainer(**fields):
    "What trl's loss code asks of its trainer."
    fake = MagicMock(aux_loss_enabled=False, **fields)
    fake.accelerator.gather = fake.accelerator.gather_for_metrics = lambda t: t
    fake.accelerator.device = torch.device('cpu')
    return fake


@pytest.mark.parametrize('beta', TRL_DPO)
def test_dpo_is_trls(beta):
    "Its own code, where it is installed."
    trl = pytest.importorskip('trl')
    now, _, ref, _, mask = six_replies()
    chosen, rejected = ref.sum(1).chunk(2)
    what = dict(loss_types=['sigmoid'], loss_weights=[1.0], f_divergence_type='reverse_kl')
    what |= dict(precompute_ref_logps=True, ld_alpha=None, use_weighting=False)
    whole = F.pad(mask.long(), (1, 0))
    inputs = dict(input_ids=torch.zeros_like(whole), attention_mask=torch.ones_like(whole))
    inputs |= dict(completion_mask=whole, ref_chosen_logps=chosen, ref_rejected_logps=rejected)

    def theirs(logps):
        fake = trainer(beta=beta, label_smoothing=0.0, **what)
        model = lambda **kw: Output(logps)
        return trl.DPOTrainer._compute_loss(fake, model, inputs, False)

    assert our_dpo(beta) == pytest.approx(with_slope(theirs, now), rel=1e-5)


@pytest.mark.parametrize(('weight', 'clip'), TRL_GRPO)
def test_grpo_is_trls(weight, clip):
    "Its own code, where it is installed."
    trl = pytest.importorskip('trl')
    now, then, ref, advantages, mask = six_replies()
    what = dict(loss_type='grpo', importance_sampling_level='token', top_entropy_quantile=1.0)
    what |= dict(off_policy_mask_threshold=None, use_vllm=False, _entropy_bonus_enabled=False)
    what |= dict(args=SimpleNamespace(delta=None, use_bias_correction_kl=False))
    one = torch.ones(6, 1, dtype=torch.long)
    inputs = dict(prompt_ids=one, prompt_mask=one, completion_ids=mask.long())
    inputs |= dict(completion_mask=mask.long(), advantages=advantages)
    inputs |= dict(old_per_token_logps=then, ref_per_token_logps=ref)

    def theirs(logps):
        fake = trainer(beta=weight, epsilon_low=clip, epsilon_high=clip, **what)
        fake.current_gradient_accumulation_steps = 1
        fake._get_per_token_logps_and_entropies = lambda *a, **kw: (logps, logps * 0, None)
        return trl.GRPOTrainer._compute_loss(fake, fake.model, inputs)

    assert our_grpo(weight, clip) == pytest.approx(with_slope(theirs, now), rel=1e-5)


# ---------------------------------------------------------------- rows


def random_pairs(n=8, seed=0):
    g = rng(seed)
    lengths = torch.randint(1, 6, (n, 2), generator=g).tolist()
    return zip(*[[torch.randint(1, 9, (k,), generator=g).tolist() for k in two] for two in lengths])


def test_only_the_reply_is_scored():
    prompts, replies = random_pairs()
    x, y = instruction_rows(prompts, replies, pad=0)
    for row_x, row_y, prompt, reply in zip(x.tolist(), y.tolist(), prompts, replies):
        whole = prompt + reply
        assert row_x[: len(whole) - 1] == whole[:-1] or len(whole) - 1 > len(row_x)
        scored = [t for t in row_y if t != IGNORE_INDEX]
        assert scored == reply
        assert row_y[len(prompt) - 1 : len(whole) - 1] == reply
        assert set(row_x[len(whole) :]) <= {0}


def test_padding_is_not_seen():
    prompts, replies = random_pairs()
    model = gpt()
    together = reply_logps(model, *instruction_rows(prompts, replies, pad=3)).sum(1)
    alone = [
        reply_logps(model, *instruction_rows([p], [r])).sum() for p, r in zip(prompts, replies)
    ]
    torch.testing.assert_close(together, torch.stack(alone))


def test_log_probabilities_are_the_loss():
    x, y = instruction_rows(*random_pairs())
    model = gpt()
    logps = reply_logps(model, x, y)
    assert (logps[y == IGNORE_INDEX] == 0).all() and (logps[y != IGNORE_INDEX] < 0).all()
    torch.testing.assert_close(-logps.sum() / (y != IGNORE_INDEX).sum(), model(x, y)[1])


def test_bad_rows_are_named():
    with pytest.raises(ValueError, match='prompts has 1 rows and replies 0'):
        instruction_rows([[1]], [])
    with pytest.raises(ValueError, match='at least one'):
        instruction_rows([], [])
    for prompts, replies in (([[1], []], [[2], [2]]), ([[1], [1]], [[2], []])):
        with pytest.raises(ValueError, match='empty in row 1'):
            instruction_rows(prompts, replies)
    x = torch.zeros(2, 3).long()
    with pytest.raises(ValueError, match=r'y has shape \(2, 2\) and x \(2, 3\)'):
        reply_logps(gpt(), x, x[:, 1:])


# ---------------------------------------------------------------- the optimum


@pytest.mark.parametrize('beta', [0.3, 1.0, 5.0])
def test_nothing_beats_the_tilted_model(beta):
    rewards = torch.randn(40, generator=rng(1), dtype=torch.double)
    reward, kl = tilted(rewards, beta)
    p = torch.rand(5000, 40, generator=rng(2), dtype=torch.double).pow(3)
    p = p / p.sum(1, keepdim=True)
    worth = (p * rewards).sum(1) - beta * (p * (40 * p).log()).sum(1)
    assert worth.max() < reward - beta * kl
    log_z = (rewards / beta).exp().mean().log().item()  # the value of the optimum
    assert math.isclose(reward - beta * kl, beta * log_z, rel_tol=1e-9)


def test_tilted_ends():
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert tilted(rewards, 1e9) == pytest.approx((0.5, 0.0), abs=1e-6)
    assert tilted(rewards, 1e-3) == pytest.approx((1.0, math.log(2)), abs=1e-6)
    for bad in (torch.tensor([]), torch.ones(2, 2), torch.tensor([math.inf])):
        with pytest.raises(ValueError, match='rewards has shape'):
            tilted(bad, 1.0)
    for beta in (0, -1):
        with pytest.raises(ValueError, match=f'beta={beta} must be above 0'):
            tilted(rewards, beta)


# ---------------------------------------------------------------- choices


def test_dpo_by_hand():
    "Up by 2, down by 1: a margin of 3."
    four = [torch.tensor([v]) for v in (-10.0, -11.0, -12.0, -10.0)]
    assert dpo_loss(*four, beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-1.5)))


def test_dpo_only_sees_differences():
    g = rng(3)
    four = [-10 * torch.rand(7, generator=g) for _ in range(4)]
    shift = torch.randn(7, generator=g)
    torch.testing.assert_close(dpo_loss(*(t + shift for t in four)), dpo_loss(*four))
    swapped = [four[i] for i in (1, 0, 3, 2)]
    margin = (four[0] - four[2]) - (four[1] - four[3])
    torch.testing.assert_close(dpo_loss(*swapped) - dpo_loss(*four), 0.1 * margin.mean())


def test_dpo_recovers_the_optimum():
    "Choices by a known reward, all pairs at their odds: the model ends where `tilted` says."
    old, rewards, beta = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.0, 1.0, 2.0]), 0.5
    odds = torch.sigmoid(rewards[:, None] - rewards)  # how often a is chosen over b
    logits = old.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn='strong_wolfe')
    a, b = torch.tensor([(i, j) for i in range(3) for j in range(3) if i != j]).T

    def loss():
        optimizer.zero_grad()
        logps, ref = logits.log_softmax(0), old.log()
        parts = [
            dpo_loss(
                *(t[i][None] for t in (logps,) for i in (x, y)),
                *(ref[i][None] for i in (x, y)),
                beta,
            )
            * odds[x, y]
            for x, y in zip(a, b)
        ]
        total = sum(parts)
        total.backward()
        return total

    optimizer.step(loss)
    best = old * (rewards / beta).exp()
    torch.testing.assert_close(logits.softmax(0).detach(), best / best.sum(), atol=2e-3, rtol=0)


def test_bad_choices_are_named():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match='four of one shape'):
        dpo_loss(one, one, one, two)
    with pytest.raises(ValueError, match='four of one shape'):
        dpo_loss(*[torch.zeros(0)] * 4)
    with pytest.raises(ValueError, match='beta=0 must be above 0'):
        dpo_loss(one, one, one, one, beta=0)
    x = torch.zeros(2, 2, 3).long()
    with pytest.raises(ValueError, match='the better answer first'):
        DPO(gpt())(x, torch.zeros(2), x)


# ---------------------------------------------------------------- rewards


def test_advantages_by_hand():
    ours = group_advantages(torch.tensor([[1.0, 0, 0, 1], [3, 3, 3, 3]]), eps=0.0)
    root = 0.5 / math.sqrt(1 / 3)
    assert ours[0].tolist() == pytest.approx([root, -root, -root, root])
    assert group_advantages(torch.full((2, 5), 0.7)).abs().max() < 1e-3
    for bad in (torch.ones(4), torch.ones(4, 1)):
        with pytest.raises(ValueError, match='n of at least 2'):
            group_advantages(bad)


def test_advantages_know_no_scale():
    rewards = torch.rand(6, 8, generator=rng(4))
    ours = group_advantages(rewards, eps=0.0)
    torch.testing.assert_close(group_advantages(5 * rewards - 3, eps=0.0), ours)
    torch.testing.assert_close(ours.mean(1), torch.zeros(6), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.std(1), torch.ones(6))


def test_the_first_gradient_is_the_policy_gradient():
    "With answers just drawn and no KL: advantage times the gradient of log p."
    now, _, ref, advantages, mask = six_replies()
    leaf = now.clone().requires_grad_()
    (slope,) = torch.autograd.grad(grpo_loss(leaf, ref, advantages, mask, 0.0), leaf)
    wanted = -advantages[:, None] * mask / mask.sum(1, keepdim=True) / 6
    torch.testing.assert_close(slope, wanted)


def test_kl_is_never_negative_and_zero_at_home():
    now, _, ref, _, mask = six_replies()
    none = torch.zeros(6)
    assert grpo_loss(now, now, none, mask, 1.0) == 0
    assert grpo_loss(now, ref, none, mask, 1.0) > 0
    d = (ref - now)[mask.nonzero(as_tuple=True)]
    each = (d.exp() - d - 1).split(LENGTHS[:, 0].tolist())
    wanted = torch.stack([row.mean() for row in each]).mean()
    torch.testing.assert_close(grpo_loss(now, ref, none, mask, 1.0), wanted)


def test_the_ratio_is_clipped_on_the_side_that_pays():
    mask, ref = torch.ones(1, 1).bool(), torch.zeros(1, 1)
    then = torch.zeros(1, 1)
    for ratio, advantage, wanted in (
        (1.5, 1, 1.2),
        (0.5, 1, 0.5),
        (1.5, -1, -1.5),
        (0.5, -1, -0.8),
    ):
        now = torch.tensor([[math.log(ratio)]])
        loss = grpo_loss(now, ref, torch.tensor([float(advantage)]), mask, 0.0, then)
        assert loss.item() == pytest.approx(-wanted)


def test_padding_costs_nothing():
    now, then, ref, advantages, mask = six_replies()
    wide = [F.pad(t, (0, 3), value=-7.0) for t in (now, ref)]
    ours = grpo_loss(*wide, advantages, F.pad(mask, (0, 3)), 0.3)
    torch.testing.assert_close(ours, grpo_loss(now, ref, advantages, mask, 0.3))


def test_bad_rewards_are_named():
    now, _, ref, advantages, mask = six_replies()
    with pytest.raises(ValueError, match='logps, ref, advantages, mask have shapes'):
        grpo_loss(now, ref, advantages[:2], mask)
    with pytest.raises(ValueError, match='kl_weight=-1 must be at least 0'):
        grpo_loss(now, ref, advantages, mask, -1)
    for clip in (0, 1):
        with pytest.raises(ValueError, match=f'clip={clip} in 0 .. 1'):
            grpo_loss(now, ref, advantages, mask, 0.1, clip=clip)


# ---------------------------------------------------------------- one loop

GENTLE = dict(optimizer='adamw', learning_rate=1e-2, weight_decay=0.0, eval_interval=100, seed=1)


def trained_by_choices(reference):
    "Prefer replies that begin with a 5."
    model = gpt()
    x, y = instruction_rows([[1], [1]], [[5, 0], [6, 0]])
    x, y = x[None], y[None]
    with torch.no_grad():
        ref = reply_logps(reference, x[0], y[0]).sum(1)[None]
    train(DPO(model, 0.5), lambda g: (x, ref, y), TrainConfig(max_iters=20, **GENTLE))
    return model


def trained_by_rewards(reference, kl_weight):
    "Reward a 5 among the next tokens, drawn one at a time."
    model = gpt()

    def batch(g):
        probs = model(torch.full((16, 1), 1))[0][:, -1].softmax(-1).detach()
        said = torch.multinomial(probs, 1, generator=g)
        x, y = instruction_rows([[1]] * 16, said.tolist())
        advantages = group_advantages((said[:, 0] == 5).float()[None])[0]
        with torch.no_grad():
            return x, reply_logps(reference, x, y), advantages, y

    train(GRPO(model, kl_weight), batch, TrainConfig(max_iters=30, **GENTLE))
    return model


def chance_of_5(model):
    return model(torch.tensor([[1]]))[0][0, -1].softmax(-1)[5].item()


def test_choices_train_and_one_seed_gives_one_run():
    reference = gpt()
    a, b = trained_by_choices(reference), trained_by_choices(reference)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    odds = lambda m: (m(torch.tensor([[1]]))[0][0, -1, [5, 6]].diff()).item()
    assert odds(a) < odds(reference) - 2


def test_rewards_train_and_a_kl_holds_back():
    reference = gpt()
    free, again, held = (trained_by_rewards(reference, w) for w in (0.0, 0.0, 5.0))
    assert all(torch.equal(p, q) for p, q in zip(free.parameters(), again.parameters()))
    assert chance_of_5(free) > 0.9 > chance_of_5(held) > chance_of_5(reference)


def test_a_mean_over_pairs_and_replies():
    "`train` weighs batches by what `count_targets` says."
    x, y = instruction_rows(*random_pairs())
    assert GRPO(gpt()).count_targets((x, None, None, y)) == 8
    assert DPO(gpt()).count_targets((x.view(4, 2, -1), None, y.view(4, 2, -1))) == 4
    with torch.no_grad():
        ref = reply_logps(gpt(1), x, y).sum(1).view(4, 2)
        x, y = x.view(4, 2, -1), y.view(4, 2, -1)
        margins, loss = DPO(gpt(), 0.3)(x, ref, y)
        alone = [DPO(gpt(), 0.3)(x[i : i + 1], ref[i : i + 1], y[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(loss, torch.stack([part[1] for part in alone]).mean())
    torch.testing.assert_close(margins, torch.cat([part[0] for part in alone]))
    torch.testing.assert_close(F.softplus(-0.3 * margins).mean(), loss)  # chosen over rejected
