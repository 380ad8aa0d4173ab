"""Checkpoints: every model of the course comes back by its name, no stranger's module is imported,
and a failure leaves the old one."""

import json
import sys
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

from transformer_course import checkpoint, files
from transformer_course.checkpoint import (
    MODELS,
    build_model,
    load_model,
    read_checkpoint,
    restore_checkpoint,
    save_checkpoint,
)
from transformer_course.manifest import FILES, read_about, verified_checkpoint
from transformer_course.files import signed
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.int8 import load_int8

BERT = dict(pad_id=0, mask_id=1, cls_id=2, sep_id=None)
SHAPE = dict(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=16)
GPTS = [
    dict(),
    dict(position='rotary', norm='rms', activation='silu', gated=True, bias=False, n_kv_head=1),
    dict(position='sinusoidal', tie_weights=False, embed_norm='plain', smear=True),
    dict(position='alibi', norm='plain', norm_first=False, window=4, n_inner=24),
]


def weights(seed=0, **kw):
    return GPT(GPTConfig(**(SHAPE | kw)), torch.Generator().manual_seed(seed))


SMALL = dict(n_layer=1, n_head=2, n_embd=8)
PICTURES = dict(image_size=4, patch_size=2, channels=1, n_class=3, n_frames=2, tube=1)
ARGUMENTS = dict(  # of the smallest model of each class
    AlignmentTransformer=SMALL | dict(n_pair=4),
    BERT=SHAPE | BERT,
    BERTClassifier=SHAPE | BERT | dict(n_classes=3, pool='mean'),
    BigramLanguageModel=dict(vocab_size=5),
    DecisionTransformer=SMALL | dict(state_size=2, block_size=3, max_steps=9),
    DiffusionLM=SHAPE,
    ExpertGPT=SHAPE | dict(n_experts=3, top_k=2),
    FramePredictor=SMALL | PICTURES,
    GPT=SHAPE,
    InContextRegressor=dict(d=3, n_layer=1, n_head=2, n_embd=8),
    MLPLanguageModel=dict(vocab_size=5, context=2, n_embd=4, n_hidden=6),
    MaskedLM=SHAPE | BERT | dict(pooler=False),
    MemoryGPT=SHAPE | dict(segment=4),
    NeuralGPU=dict(channels=4, steps=3),
    RecurrentLanguageModel=dict(vocab_size=5, n_embd=4, n_hidden=6, kind='gru'),
    Seq2Seq=dict(vocab_size=5, n_embd=4, n_hidden=6, attention=True),
    SpeechTransformer=SMALL | dict(n_mels=4, n_frames=8, block_size=4, vocab_size=5),
    TokenSetTransformer=SMALL | dict(kinds='dot:2 line:3'),
    Transformer=dict(vocab_size=5, source_size=3, block_size=4, n_layer=1, n_head=2, n_embd=8),
    ViT=SMALL | dict(image_size=4, patch_size=2, channels=1, n_class=3),
    VideoViT=SMALL | PICTURES,
)


def same(a: nn.Module, b: nn.Module) -> bool:
    "Whether two models have the same names and bits."
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


CLASSES = {
    name: getattr(import_module(f'transformer_course.{module}'), name)
    for name, module in MODELS.items()
}


@pytest.mark.parametrize('name', CLASSES)
def test_every_model_of_the_course_comes_back(tmp_path, name):
    model = build_model(CLASSES[name], ARGUMENTS[name])
    save_checkpoint(tmp_path / 'c', model, state=dict(step=7))
    loaded, about = load_model(tmp_path / 'c')
    assert type(loaded) is type(model) and same(loaded, model)
    assert loaded.config == model.config and not loaded.training
    assert about['step'] == 7 and about['model'] == name


CHOICES = {  # model and field -> a class of settings, settings that are right, a field
    f'{name}: {field.name}': (cls.config_class, ARGUMENTS[name], field.name)
    for name, cls in CLASSES.items()
    if hasattr(cls, 'config_class')
    for field in fields(cls.config_class)
    if field.type is str
}


@pytest.mark.parametrize('case', CHOICES)
def test_a_wrong_choice_is_refused_under_its_own_name(case):
    cls, right, name = CHOICES[case]
    with pytest.raises(ValueError, match=f"^{name}='no such thing' "):
        cls(**right | {name: 'no such thing'})


@pytest.mark.parametrize('kw', GPTS, ids=str)
def test_a_gpt_of_any_shape_comes_back(tmp_path, kw):
    model = weights(**kw).eval()
    save_checkpoint(tmp_path / 'c', model)
    loaded, _ = load_model(tmp_path / 'c')
    idx = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(1))
    assert loaded.config == model.config and same(loaded, model)
    assert torch.equal(loaded(idx)[0], model(idx)[0])


class Foreign(nn.Module):
    "A class that the course does not know, with a dict as its config."

    def __init__(self, width: int, depth: int = 1):
        super().__init__()
        self.config = dict(width=width, depth=depth)
        self.layers = nn.Sequential(*[nn.Linear(width, width) for _ in range(depth)])


def test_a_foreign_class_is_passed_by_the_caller(tmp_path):
    model = Foreign(3, depth=2)
    save_checkpoint(tmp_path / 'c', model)
    with pytest.raises(ValueError, match=r"model='Foreign'.*model_class=MyModel"):
        load_model(tmp_path / 'c')
    assert same(load_model(tmp_path / 'c', model_class=Foreign)[0], model)
    ready = Foreign(3, 2)
    assert load_model(tmp_path / 'c', model_class=ready)[0] is ready and same(ready, model)
    with pytest.raises(ValueError, match='layers.1.bias'):
        load_model(tmp_path / 'c', model_class=Foreign(3))


def test_a_model_without_config_is_saved_and_brought(tmp_path):
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path / 'c', model)
    about = read_checkpoint(tmp_path / 'c')[0]
    assert about['model'] == 'Linear' and about['config'] is None
    assert same(load_model(tmp_path / 'c', model_class=lambda: nn.Linear(2, 2))[0], model)
    with pytest.raises(ValueError, match='made already'):
        load_model(tmp_path / 'c', model_class=nn.Linear)


def rewrite(folder, **changes):
    "Change checkpoint.json as a stranger could who knows how it is signed."
    path = folder / 'checkpoint.json'
    about = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(signed({k: v for k, v in about.items() if v is not Ellipsis})))


@pytest.mark.parametrize('name', ['evil', 'evil.GPT', 'os', '..evil', ''])
def test_a_checkpoint_cannot_name_a_module(tmp_path, monkeypatch, name):
    (tmp_path / 'evil.py').write_text('raise SystemExit("a stranger ran code")')
    monkeypatch.syspath_prepend(tmp_path)
    save_checkpoint(tmp_path / 'c', weights())
    rewrite(tmp_path / 'c', model=name, module='evil')
    with pytest.raises(ValueError, match='not of this course'):
        load_model(tmp_path / 'c')
    assert 'evil' not in sys.modules


def test_old_checkpoints_are_gpts(tmp_path):
    "Format 1 named no class, and `embed_norm` was true or false."
    model = weights(embed_norm='plain')
    save_checkpoint(tmp_path / 'c', model)
    config = read_checkpoint(tmp_path / 'c')[0]['config'] | dict(embed_norm=True)
    for new in ('norm_eps', 'gated', 'n_inner'):
        del config[new]
    rewrite(tmp_path / 'c', format=1, model=..., config=config)
    loaded, _ = load_model(tmp_path / 'c')
    assert same(loaded, model) and loaded.config == model.config


def test_a_config_that_does_not_fit_is_found_before_memory_is_taken(tmp_path):
    "A hundred million rows would take 6 GB; names and shapes are compared first."
    save_checkpoint(tmp_path / 'c', weights())
    config = read_checkpoint(tmp_path / 'c')[0]['config']
    rewrite(tmp_path / 'c', config=config | dict(vocab_size=10**12))
    with pytest.raises(ValueError, match='wte.weight has shape .11, 16., the model needs'):
        load_model(tmp_path / 'c')
    rewrite(tmp_path / 'c', config=config | dict(colour='red'))
    with pytest.raises(ValueError, match="no field 'colour'"):
        load_model(tmp_path / 'c')


def test_a_wrong_model_is_left_as_it_was(tmp_path):
    save_checkpoint(tmp_path / 'c', weights(n_embd=32))
    other = weights(seed=3)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(ValueError, match='another model'):
        restore_checkpoint(tmp_path / 'c', other)
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def test_optimisers_come_back_with_their_pairs(tmp_path):
    model = weights()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9))
    model(torch.zeros(1, 8).long(), torch.zeros(1, 8).long())[1].backward()
    optimizer.step()
    save_checkpoint(tmp_path / 'c', model, [optimizer], rng=dict(batches=torch.get_rng_state()))
    twin = torch.optim.AdamW(weights(1).parameters())
    _, rng = restore_checkpoint(tmp_path / 'c', weights(1), [twin])
    assert twin.param_groups[0]['betas'] == (0.9, 0.999) and list(rng) == ['batches']
    ours, theirs = (o.state_dict()['state'] for o in (optimizer, twin))
    assert all(torch.equal(ours[p][k], theirs[p][k]) for p in ours for k in ours[p])
    with pytest.raises(ValueError, match='of 1 optimisers, there are 2'):
        restore_checkpoint(tmp_path / 'c', weights(1), [twin, twin])


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    "The order of fsync and rename, as the operating system is asked for them."
    calls, rename = [], Path.rename
    monkeypatch.setattr(files, 'sync', lambda path: calls.append(('sync', path.name)))

    def watched(self, to):
        calls.append(('rename', self.name, Path(to).name))
        return rename(self, to)

    save_checkpoint(tmp_path / 'c', weights())
    calls.clear()
    monkeypatch.setattr(Path, 'rename', watched)
    save_checkpoint(tmp_path / 'c', weights())
    names = ('checkpoint.json', 'model.safetensors', 'training.safetensors')
    assert sorted(calls[:3]) == [('sync', name) for name in names]
    assert calls[3:] == [
        ('sync', '.c-new'),
        ('rename', 'c', '.c-old'),
        ('rename', '.c-new', 'c'),
        ('sync', tmp_path.name),
    ]


@pytest.mark.parametrize('what', ['save_file', 'checksum', 'sync'])
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(tmp_path, monkeypatch, what):
    model = weights()
    save_checkpoint(tmp_path / 'c', model)

    def full(*args, **kw):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(files if what == 'sync' else checkpoint, what, full)
    with pytest.raises(OSError, match='No space left.*free some space'):
        save_checkpoint(tmp_path / 'c', weights(1))
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ['c']
    assert same(load_model(tmp_path / 'c')[0], model)


@pytest.mark.parametrize(
    'state, words',
    [
        (dict(config=3), "state holds 'config'"),
        (dict(sha256={}), "state holds 'sha256'"),
        (dict(when=Path('today')), 'cannot be written as JSON'),
        (dict(weights=torch.zeros(2)), 'cannot be written as JSON'),
    ],
    ids=['config', 'sha256', 'path', 'tensor'],
)
def test_a_state_that_cannot_be_kept_makes_nothing(tmp_path, state, words):
    with pytest.raises(ValueError, match=words):
        save_checkpoint(tmp_path / 'runs' / 'c', weights(), state=state)
    assert not (tmp_path / 'runs').exists()


@pytest.mark.parametrize('lost', ['format', 'sha256', 'checksum of a file', 'the braces'])
def test_damaged_json_is_named(tmp_path, lost):
    save_checkpoint(tmp_path / 'c', weights())
    about = read_checkpoint(tmp_path / 'c')[0]
    hashes = {name: sha for name, sha in about['sha256'].items() if 'training' not in name}
    if lost == 'the braces':
        (tmp_path / 'c/checkpoint.json').write_text('[1, 2]')
    else:
        rewrite(tmp_path / 'c', **({'sha256': hashes} if ' ' in lost else {lost: ...}))
    words = 'checkpoint.json.*(lacks|no object)|has format None|lacks its list of files'
    with pytest.raises(ValueError, match=words):
        load_model(tmp_path / 'c')


@pytest.mark.parametrize('name', FILES)
def test_one_changed_bit_in_a_tensor_file_is_noticed(tmp_path, name):
    model = nn.Linear(3, 2)
    save_checkpoint(tmp_path / 'run', model, rng=dict(batches=torch.ones(8)))
    path = tmp_path / 'run' / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # of a number: the file can still be read
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f'{name} is missing, truncated or changed'):
        verified_checkpoint(tmp_path / 'run')


def test_every_bit_of_checkpoint_json_counts(tmp_path):
    "A description with one bit turned over is refused or means the same."
    model = weights(n_layer=1, n_head=1)
    save_checkpoint(tmp_path / 'c', model, state=dict(step=3, text=dict(source='é')))
    path, about = tmp_path / 'c/checkpoint.json', read_checkpoint(tmp_path / 'c')[0]
    whole, same = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        byte, flip = divmod(bit, 8)
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1 << flip]) + whole[byte + 1 :])
        try:
            assert read_about(tmp_path / 'c')[0] == about
            same += 1
        except ValueError as e:
            assert '\n' not in str(e)
    assert same < len(whole) / 50


@pytest.mark.parametrize(
    'change',
    [
        dict(n_head=2),
        dict(n_layer=10**7),
        dict(block_size=10**9),
        dict(n_embd=-16),
        dict(norm='plain'),
        dict(n_layer='1'),
        dict(tie_weights=False),
    ],
    ids=str,
)
def test_a_signed_config_that_does_not_fit_the_weights_is_refused(tmp_path, change):
    save_checkpoint(tmp_path / 'c', weights(n_layer=1, n_head=1, position='rotary'))
    about = read_about(tmp_path / 'c')[0]
    rewrite(tmp_path / 'c', config=about['config'] | change)
    if change == dict(n_head=2):  # heads leave no trace in the shapes: what is signed is believed
        assert load_model(tmp_path / 'c')[0].config.n_head == 2
        return
    with pytest.raises(ValueError):
        load_model(tmp_path / 'c')


def test_an_unsigned_change_is_refused(tmp_path):
    "Four heads for two: the shapes are the same, the model would write something else."
    save_checkpoint(tmp_path / 'c', weights(n_layer=1, n_head=1))
    path = tmp_path / 'c/checkpoint.json'
    text = path.read_text()
    assert '"n_head": 1' in text
    path.write_text(text.replace('"n_head": 1', '"n_head": 2'))
    for read in (load_model, read_checkpoint, verified_checkpoint, read_about, load_int8):
        with pytest.raises(ValueError, match='was changed'):
            read(tmp_path / 'c')
    path.write_text(text.replace('"sha256": {', '"sha256": {"/dev/zero": "0", '))
    with pytest.raises(ValueError, match='was changed'):
        load_model(tmp_path / 'c')


def test_a_reader_is_overtaken(tmp_path, monkeypatch):
    "A new checkpoint comes between the description and the weights: all is read again."
    old, new = weights(n_layer=1, n_head=1), weights(n_layer=1, n_head=1)
    nn.init.ones_(new.lm_head.weight)
    save_checkpoint(tmp_path / 'c', old, state=dict(step=1))
    plain, times = checkpoint.TensorFile, []

    def overtaken(path):
        if not times:
            save_checkpoint(tmp_path / 'c', new, state=dict(step=2))
        times.append(path)
        return plain(path)

    monkeypatch.setattr(checkpoint, 'TensorFile', overtaken)
    model, about = load_model(tmp_path / 'c')
    assert about['step'] == 2 and torch.equal(model.lm_head.weight, new.lm_head.weight)
    assert len(times) == 2


def test_all_files_may_be_read_by_those_whom_the_umask_lets(tmp_path):
    save_checkpoint(tmp_path / 'c', nn.Linear(2, 2))
    (tmp_path / 'plain').touch()
    modes = {p.stat().st_mode for p in (tmp_path / 'c').iterdir()}
    assert modes == {(tmp_path / 'plain').stat().st_mode}


def test_settings_of_an_optimiser_are_those_it_was_made_with(tmp_path):
    "Who goes on with another step size gets it, with the averages of before."
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path / 'c', model, [optimizer])
    bolder = torch.optim.AdamW(model.parameters(), lr=0.5, betas=(0.8, 0.9))
    restore_checkpoint(tmp_path / 'c', model, [bolder])
    group = bolder.param_groups[0]
    assert group['lr'] == 0.5 and group['betas'] == (0.8, 0.9)
    for p in model.parameters():
        assert torch.equal(bolder.state[p]['exp_avg'], optimizer.state[p]['exp_avg'])
