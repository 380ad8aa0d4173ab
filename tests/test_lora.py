"LoRA: nothing changes at the start, thin matrices alone are trained, merged and saved exactly."

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from transformer_course.bert import BERT, BERTConfig
from transformer_course.checkpoint import load_model, save_checkpoint
from transformer_course.encoder_decoder import Transformer, TransformerConfig
from transformer_course.generation import generate
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.int8 import to_int8
from transformer_course.lora import (
    PLACES,
    LoRALinear,
    add_lora,
    drop_lora,
    load_lora,
    lora_layers,
    lora_places,
    lora_state,
    merge_lora,
    save_lora,
)
from transformer_course.training import TrainConfig, train

V, C = 11, 12
IDS = torch.tensor([[1, 5, 2, 8, 3], [0, 9, 9, 4, 10]])
LLAMA = dict(position='rotary', norm='rms', bias=False, n_kv_head=1, gated=True, activation='silu')
KINDS = [LLAMA, dict(), dict(position='alibi', qk_norm=True, smear=True, tie_weights=False)]
every_kind = pytest.mark.parametrize('kind', KINDS, ids=['llama', 'gpt2', 'alibi'])
close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def some_model(kind=LLAMA, **changes):
    "Random weights large enough for every part to matter."
    shape = dict(block_size=16, vocab_size=V, n_layer=2, n_head=3, n_embd=C)
    model = GPT(GPTConfig(**shape | kind | changes), rng())
    for i, p in enumerate(model.parameters()):
        nn.init.normal_(p, std=0.3, generator=rng(i))
    return model.eval()


def tuned_model(kind=LLAMA, rank=3, alpha=6.0, where=('q', 'v')):
    "A model whose thin matrices are not zero any more."
    model = some_model(kind)
    add_lora(model, rank, alpha, where, rng(1))
    for i, p in enumerate(lora_state(model).values()):
        p.normal_(std=0.4, generator=rng(50 + i))
    return model


def bits(model):
    return {name: p.clone() for name, p in model.state_dict().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def draw(g):
    ids = torch.randint(V, (4, 9), generator=g)
    return ids[:, :-1], ids[:, 1:]


@every_kind
@pytest.mark.parametrize('where', [('q', 'v'), ('k',), PLACES])
def test_at_the_start_nothing_has_changed(kind, where):
    model = some_model(kind)
    before = model(IDS)[0]
    add_lora(model, rank=2, where=where, generator=rng())
    assert torch.equal(model(IDS)[0], before)


@every_kind
def test_it_is_a_product_added_to_some_rows(kind):
    "By hand: rows of q, k and v counted here, weights changed one by one, no LoRA in the model."
    model, by_hand = tuned_model(kind, where=('q', 'k', 'v')), some_model(kind)
    kv = 4 if kind is LLAMA else 12  # one head of size 4, or three
    rows = dict(q=(0, 12), k=(12, 12 + kv), v=(12 + kv, 12 + 2 * kv))
    thin = lora_state(model)
    assert len(thin) == 2 * 2 * 3
    with torch.no_grad():
        for i, block in enumerate(by_hand.transformer.h):
            for name, (start, end) in rows.items():
                A, B = (thin[f'transformer.h.{i}.attn.c_attn.{kind}.{name}'] for kind in 'AB')
                for o in range(start, end):
                    for r in range(3):
                        block.attn.c_attn.weight[o] += 6.0 / 3 * B[o - start, r] * A[r]
    close(model(IDS)[0], by_hand(IDS)[0])
    assert (model(IDS)[0] - some_model(kind)(IDS)[0]).abs().max() > 0.1


@pytest.mark.parametrize('place', PLACES)
def test_each_place_changes_its_own_map(place):
    model, plain = tuned_model(where=(place,)), some_model()
    touched = {'o': ['attn.c_proj'], 'mlp': ['mlp.c_fc', 'mlp.c_gate', 'mlp.c_proj']}
    touched = touched.get(place, ['attn.c_attn'])
    assert sorted(lora_layers(model)) == [f'transformer.h.{i}.{n}' for i in (0, 1) for n in touched]
    merged = bits(merge_lora(model))
    changed = {name for name, p in plain.state_dict().items() if not torch.equal(p, merged[name])}
    assert changed == {f'transformer.h.{i}.{n}.weight' for i in (0, 1) for n in touched}
    if place in 'qkv':
        name = 'transformer.h.0.attn.c_attn.weight'
        moved = (merged[name] != plain.state_dict()[name]).any(1).nonzero()[:, 0].tolist()
        assert moved == list(dict(q=range(12), k=range(12, 16), v=range(16, 20))[place])


def test_the_order_of_places_is_no_matter():
    a, b = some_model(), some_model()
    add_lora(a, where=('v', 'q'), rank=2, generator=rng())
    add_lora(b, where=('q', 'v'), rank=2, generator=rng())
    assert same_bits(bits(a), bits(b))


def test_alpha_over_rank_scales_the_change():
    model = tuned_model(alpha=6.0)
    layer = model.transformer.h[0].attn.c_attn
    change = layer.change()
    layer.alpha = 12.0
    close(layer.change(), 2 * change)
    assert torch.linalg.matrix_rank(change[:C]) == 3
    assert not change[C : C + 4].any()  # keys


def test_only_thin_matrices_are_trained():
    model = some_model()
    before, thin = bits(model), add_lora(model, rank=2, generator=rng())
    assert [p.requires_grad for p in model.parameters()].count(True) == len(thin) == 8
    model(IDS, IDS)[1].backward()
    layer = model.transformer.h[0].attn.c_attn
    assert layer.base.weight.grad is None and model.lm_head.weight.grad is None
    for name in ('q', 'v'):
        assert not layer.A[name].grad.any() and layer.B[name].grad.any()
    how = dict(max_iters=30, eval_interval=30, learning_rate=0.02, optimizer='adamw')
    history = train(model, draw, TrainConfig(**how))
    assert len(history.losses) == 30 and layer.A['q'].grad is None
    assert any(p.abs().max() > 0 for name, p in lora_state(model).items() if '.B.' in name)
    assert same_bits(before, bits(drop_lora(model)))


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_training_learns_and_one_seed_is_one_run(optimizer):
    def run(seed):
        model = some_model()
        add_lora(model, rank=4, where=('q', 'v', 'o', 'mlp'), generator=rng(seed))
        fixed = draw(rng(3))
        how = dict(max_iters=25, eval_interval=25, optimizer=optimizer, learning_rate=0.02)
        train(model, lambda g: fixed, TrainConfig(**how, weight_decay=0.0, seed=seed))
        return model(*fixed)[1].item(), lora_state(model)

    loss, thin = run(1)
    assert loss < 0.8 * some_model()(*draw(rng(3)))[1].item()
    again, other = run(1)[1], run(2)[1]
    assert same_bits(thin, again) and not same_bits(thin, other)


def test_a_killed_run_goes_on(tmp_path):
    def run(n, **how):
        model = some_model()
        add_lora(model, rank=2, generator=rng())
        config = TrainConfig(max_iters=12, eval_interval=6, warmup_iters=2, learning_rate=0.01)
        stop = (lambda: len(steps) >= n) if n else None
        steps = []
        try:
            train(model, draw, config, on_step=lambda i, r: steps.append(i), stop=stop, **how)
        except BaseException as e:
            assert type(e).__name__ == 'Stopped'
        return lora_state(model)

    whole = run(0)
    run(6, folder=tmp_path / 'run')
    assert same_bits(run(0, folder=tmp_path / 'run', resume=True), whole)


@every_kind
def test_merged_is_the_same_function_in_the_old_class(kind, tmp_path):
    model = tuned_model(kind, where=PLACES)
    said, names = model(IDS)[0], list(some_model(kind).state_dict())
    merge_lora(model)
    close(model(IDS)[0], said)
    assert list(model.state_dict()) == names and not lora_layers(model)
    assert type(model.transformer.h[1].attn.c_attn) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())
    save_checkpoint(tmp_path / 'merged', model)
    assert torch.equal(load_model(tmp_path / 'merged')[0](IDS)[0], model(IDS)[0])


@every_kind
def test_dropped_is_the_old_model_to_the_bit(kind):
    assert same_bits(bits(drop_lora(tuned_model(kind, where=PLACES))), bits(some_model(kind)))


def test_an_untrained_change_merges_to_the_bit():
    model = some_model()
    add_lora(model, rank=2)
    assert same_bits(bits(merge_lora(model)), bits(some_model()))


def test_a_file_holds_the_thin_matrices_and_no_more(tmp_path):
    model = tuned_model(where=('v', 'mlp'), alpha=5.0)
    path = tmp_path / 'new' / 'thin.safetensors'
    save_lora(path, model)
    assert same_bits(load_file(path), lora_state(model))
    fresh = some_model()
    thin = load_lora(fresh, path)
    assert torch.equal(fresh(IDS)[0], model(IDS)[0])
    assert {id(p) for p in thin} == {id(p) for p in fresh.parameters() if p.requires_grad}
    assert fresh.transformer.h[0].mlp.c_gate.alpha == 5.0


def test_a_file_of_another_model_is_refused_and_nothing_changes(tmp_path):
    path = tmp_path / 'thin.safetensors'
    save_lora(path, tuned_model())
    for other in (some_model(n_layer=1), some_model(n_kv_head=3), some_model(n_embd=24)):
        before = bits(other)
        with pytest.raises(ValueError, match='was made for another model'):
            load_lora(other, path)
        assert same_bits(before, bits(other)) and not lora_layers(other)
        assert all(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize(
    'about',
    [
        None,
        dict(rank='3', alpha='6'),
        dict(rank='three', alpha='6', where='q v'),
        dict(rank='3', alpha='6', where='q w'),
        dict(rank='3', alpha='6', where=''),
        dict(rank='3', alpha='nan', where='q v'),
        dict(rank='99999999999', alpha='6', where='q v'),
    ],
)
def test_strange_files_are_refused(tmp_path, about):
    path, model = tmp_path / 'thin.safetensors', some_model()
    save_file(lora_state(tuned_model()), path, about)
    with pytest.raises(ValueError, match='save_lora|another model|alpha'):
        load_lora(model, path)
    assert not lora_layers(model)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / 'thin.safetensors'
    save_lora(path, tuned_model())
    whole = path.read_bytes()
    for n in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match='thin.safetensors.*cannot be read'):
            load_lora(some_model(), path)
    for place in (tmp_path, tmp_path / 'nowhere'):
        with pytest.raises(ValueError, match='cannot be read'):
            load_lora(some_model(), place)


def test_cross_attention_takes_rows_of_the_changed_matrix():
    shape = dict(n_layer=1, n_head=3, n_embd=C, dropout=0.0, source_size=8, block_size=8)
    model = Transformer(TransformerConfig(vocab_size=V, **shape), rng()).eval()
    src, tgt = IDS[:, :4].clamp(min=3), torch.tensor([[3, 9, 4, 1], [5, 5, 7, 1]])
    before = model(src, tgt)[0]
    add_lora(model, rank=2, generator=rng(1))
    assert torch.equal(model(src, tgt)[0], before)
    for i, p in enumerate(lora_state(model).values()):
        p.normal_(generator=rng(i))
    model(src, tgt)[1].backward()
    crossing = [m for path, m in lora_layers(model).items() if 'cross' in path]
    assert crossing and all(m.B['v'].grad.any() for m in crossing)
    said = model(src, tgt)[0]
    assert (said - before).abs().max() > 0.01
    close(merge_lora(model)(src, tgt)[0], said)


def test_a_layer_alone_and_a_model_that_is_no_gpt():
    layer = some_model().transformer.h[0].attn
    x = torch.randn(2, 5, C, generator=rng())
    before = layer(x)
    add_lora(layer, rank=1, where=('q', 'o'))
    assert list(lora_layers(layer)) == ['c_attn', 'c_proj'] and torch.equal(layer(x), before)
    special = dict.fromkeys(('mask_id', 'cls_id', 'sep_id'))
    bert = BERT(
        BERTConfig(n_layer=2, n_head=3, n_embd=C, block_size=8, vocab_size=V, **special), rng()
    )
    assert len(add_lora(bert, where=PLACES, rank=2)) == 2 * (3 + 1 + 2) * 2


def test_writing_with_a_cache():
    model = tuned_model(where=PLACES)
    told = generate(model, IDS[:1], 8, temperature=0)
    assert torch.equal(generate(merge_lora(model), IDS[:1], 8, temperature=0), told)


@pytest.mark.parametrize('rank', [0, -1, 5, 2.0, None])
def test_ranks_that_do_not_fit(rank):
    with pytest.raises(ValueError, match='rank=.* from 1 to 4'):
        add_lora(model := some_model(), rank=rank)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('where', [(), ('q', 'x'), 'q', 'qv', ['w'], None])
def test_unknown_places(where):
    with pytest.raises(ValueError, match='where=.*mlp'):
        add_lora(some_model(), rank=2, where=where)


@pytest.mark.parametrize('alpha', [0, -1.0, math.inf, math.nan])
def test_scales_that_change_nothing_or_everything(alpha):
    with pytest.raises(ValueError, match='alpha='):
        add_lora(some_model(), rank=2, alpha=alpha)


def test_models_that_cannot_have_it(tmp_path):
    with pytest.raises(ValueError, match='no map at these places'):
        add_lora(nn.Linear(3, 4))
    with pytest.raises(ValueError, match='in bytes'):
        add_lora(to_int8(some_model()), rank=2)
    with pytest.raises(ValueError, match='already'):
        add_lora(tuned_model(), rank=2)
    save_lora(tmp_path / 'thin', tuned_model())
    with pytest.raises(ValueError, match='already'):
        load_lora(tuned_model(), tmp_path / 'thin')
    for call in (merge_lora, drop_lora):
        with pytest.raises(ValueError, match='has no LoRA'):
            call(some_model())
        with pytest.raises(ValueError, match='before to_int8'):
            call(to_int8(tuned_model()))
    with pytest.raises(ValueError, match='nothing to save'):
        save_lora(tmp_path / 'none', some_model())


def test_a_bias_stays_and_halves_stay_halves():
    base = nn.Linear(6, 4).bfloat16()
    thin = LoRALinear(base, {'o': (0, 4)}, rank=2)
    x = torch.randn(3, 6, generator=rng()).bfloat16()
    assert torch.equal(thin(x), base(x)) and thin.A['o'].dtype == torch.bfloat16
    assert thin.bias is base.bias and thin.weight.dtype == torch.bfloat16


def test_places_of_a_model_are_its_own():
    assert lora_places(some_model(), ('v',))['transformer.h.1.attn.c_attn'] == {'v': (16, 20)}
    assert lora_places(some_model(dict()), ('k',))['transformer.h.0.attn.c_attn'] == {'k': (12, 24)}
    assert 'transformer.h.0.mlp.c_gate' not in lora_places(some_model(dict()), ('mlp',))
