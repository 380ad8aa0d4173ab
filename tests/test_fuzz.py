"""Odd input of every kind: one line or the right thing, never a traceback, never a hang.

What is tried is drawn with fixed seeds. `COURSE_FUZZ=20 pytest tests/test_fuzz.py` tries twenty
times as much.
"""

import json
import os
import random
import shutil
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import typed
from torch import nn

from transformer_course import cli, train_command
from transformer_course.checkpoint import load_model, save_checkpoint
from transformer_course.data import CharTokenizer
from transformer_course.files import signed
from transformer_course.gpt import GPT, GPTConfig
from transformer_course.manifest import FILES
from transformer_course.prepare import prepare
from transformer_course.sample_command import describe_checkpoint
from transformer_course.shards import Shards
from transformer_course.tokenizer import BPETokenizer
from transformer_course.train_settings import PARTS, train_defaults

MORE = int(os.environ.get('COURSE_FUZZ', '1'))
SIZES = dict(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16)
ODD = [None, True, False, 0, 1, -1, 3, 8.5, 1e-40, 1e300, 10**20, -(10**9), '', '3', 'no', 'auto']
ODD += ['cpu:x', '\0', '☃', '../x', '-- a', '\n', [], [1], {}, {'a': 1}, 'learned', 'adamw', 'rms']


@pytest.fixture
def no_run(monkeypatch, tmp_path):
    "The command up to the point where a run would begin: all settings are made and checked."
    monkeypatch.chdir(tmp_path)

    def stop_there(values, resume=False):
        for part in PARTS:
            given = {f.name: values[f.name] for f in fields(part)}
            if part is GPTConfig:
                given['vocab_size'] = given['vocab_size'] or 11
            part(**given)

    monkeypatch.setattr(cli, 'run_train', stop_there)
    return tmp_path


def status(words, capsys):
    "The exit status of a command line; an error must be one line."
    return outcome_of([str(w) for w in words], capsys)[0]


def test_config_files(no_run, capsys):
    dice, names, codes = random.Random(0), [*train_defaults(), 'colour', ''], []
    for _ in range(400 * MORE):
        drawn = {dice.choice(names): dice.choice(ODD) for _ in range(dice.choice((1, 1, 2)))}
        (no_run / 'c.json').write_text(json.dumps(drawn))
        codes.append(status(['train', '--config', 'c.json'], capsys))
    assert 0 in codes and 2 in codes


def test_broken_config_files(no_run, capsys):
    dice, good = random.Random(1), b'\xef\xbb\xbf{"n_layer": 2, "max_iters": 3, "text": null}'
    (no_run / 'c.json').write_bytes(good)
    assert status(['train', '--config', 'c.json'], capsys) == 0
    for _ in range(200 * MORE):
        data = bytearray(good[: dice.randint(0, len(good))])
        for _ in range(dice.randint(1, 4)):
            data.insert(dice.randint(0, len(data)), dice.randrange(256))
        (no_run / 'c.json').write_bytes(data)
        status(['train', '--config', 'c.json'], capsys)


def test_flags(no_run, capsys):
    dice, flags = random.Random(2), [f'--{name}' for name in train_defaults()]
    words = [str(odd) for odd in ODD if '\0' not in str(odd)] + ['--', '-', '1e9', '0x10', 'nan']
    for _ in range(400 * MORE):
        flag, word = dice.choice(flags), dice.choice(words)
        command = dice.choice((['train', f'{flag}={word}'], ['train', flag, word]))
        status(command + dice.choice(([], ['--max_iters', '2'])), capsys)


def edited(about, dice):
    "A description with one entry changed, somewhere."
    about = json.loads(json.dumps(about))
    place = about
    while True:
        key = dice.choice([*place])
        if isinstance(place[key], dict) and place[key] and dice.random() < 0.7:
            place = place[key]
            continue
        place[key] = dice.choice(ODD)
        return about


def test_edited_checkpoints(tmp_path):
    "Signed by somebody who knows how: the model that opens is one that its weights fit."
    model = GPT(GPTConfig(**SIZES), torch.Generator().manual_seed(0))
    tokenizer = dict(kind='char', chars='abcdefghijk')
    state = dict(step=3, train=dict(max_iters=9), text=dict(source='x', sha256='y'))
    state |= dict(tokenizer=tokenizer, history=dict(val=[[0, 2.5]], seconds=1.0, tokens=9))
    save_checkpoint(tmp_path / 'c', model, state=state)
    path, dice = tmp_path / 'c/checkpoint.json', random.Random(3)
    about = json.loads(path.read_text())
    for _ in range(200 * MORE):
        path.write_text(json.dumps(signed(edited(about, dice))))
        for read in (load_model, describe_checkpoint):
            try:
                found = read(tmp_path / 'c')
            except ValueError as e:
                assert '\n' not in str(e)
                continue
            if read is load_model:
                assert isinstance(found[0], nn.Module)


def flipped(data, dice):
    "Bytes with one bit of one of them turned over."
    i = dice.randrange(len(data))
    return data[:i] + bytes([data[i] ^ 1 << dice.randrange(8)]) + data[i + 1 :]


@pytest.mark.parametrize('cls', [CharTokenizer, BPETokenizer])
def test_flipped_bits_in_tokenizers(tmp_path, cls):
    "One line, or the tokenizer that was saved."
    text, path, dice = (
        'to be or not to be, that is 那个问题 \\ " ☃' * 9,
        tmp_path / 't.json',
        random.Random(5),
    )
    tokenizer = cls.train(text, *([300] if cls is BPETokenizer else []))
    tokenizer.save(path)
    good, ids, same = path.read_bytes(), tokenizer.encode(text), 0
    for _ in range(300 * MORE):
        path.write_bytes(flipped(good, dice))
        try:
            assert cls.load(path).encode(text) == ids
            same += 1
        except ValueError as e:
            assert '\n' not in str(e)
    assert same <= 30 * MORE  # in the name of the checksum, or a space that became another


def test_flipped_bits_in_shards(tmp_path):
    prepare(
        tmp_path / 'd',
        ['to be or not to be '] * 30,
        CharTokenizer.train('to be rn'),
        val_fraction=0.2,
    )
    files = [p for p in (tmp_path / 'd').rglob('*') if p.suffix in ('.bin', '.json')]
    dice, same = random.Random(4), 0
    for _ in range(200 * MORE):
        path = dice.choice([p for p in files if p.parent.name == 'train'])
        good = path.read_bytes()
        path.write_bytes(flipped(good, dice))
        try:
            Shards(tmp_path / 'd' / 'train', verify=True)
            same += 1
        except ValueError as e:
            assert '\n' not in str(e)
        path.write_bytes(good)
    assert same <= 2 * MORE  # a space in the index that became another one


TINY = '--block_size 8 --n_layer 1 --n_head 2 --n_embd 8 --batch_size 2 --eval_interval 2'
TINY += ' --optimizer adamw --device cpu --sample_tokens 1'


def outcome_of(words, capsys):
    "What a command leaves behind: its exit status and, where that is 0, what it printed."
    code, out, err = typed(words, capsys)
    assert code in (0, 2) and (code == 0 or err.count('\n') == 1), err
    return code, out if code == 0 else None


def test_flipped_bits_in_a_run(tmp_path, capsys, monkeypatch):
    "One bit of any file of a run: sample, info and --resume refuse it, or do what they did before."
    monkeypatch.chdir(tmp_path)
    (tmp_path / 't.txt').write_text('to be or not to be, ' * 30)
    train = ['train', '--text', 't.txt', *TINY.split(), '--out_dir', 'run']
    assert outcome_of([*train, '--max_iters', '2'], capsys)[0] == 0
    shutil.copytree('run', 'good')
    commands = dict(
        sample='sample --out_dir run --max_new_tokens 9 --device cpu'.split(),
        info='info --out_dir run'.split(),
        resume=[*train, '--max_iters', '3', '--resume'],
    )
    files = [p.relative_to('good') for p in Path('good').rglob('*') if p.stat().st_size]
    files = [p for p in files if (Path('good') / p).is_file()]
    assert {p.name for p in files} >= {'checkpoint.json', *FILES, 'log.jsonl'}

    def after(name):  # what a command says, and which weights it leaves
        code, said = outcome_of(commands[name], capsys)
        left = Path('run/checkpoint/model.safetensors').read_bytes()
        return code, None if name == 'resume' or code else said, None if code else left

    right, dice, refused = {}, random.Random(6), 0
    for name in commands:
        shutil.rmtree('run')
        shutil.copytree('good', 'run')
        right[name] = after(name)
        assert right[name][0] == 0
    for _ in range(20 * MORE):
        file, name = dice.choice(files), dice.choice([*commands])
        shutil.rmtree('run')
        shutil.copytree('good', 'run')
        place = Path('run') / file
        place.write_bytes(flipped(place.read_bytes(), dice))
        found = after(name)
        refused += found[0] == 2
        reads_weights = name != 'info' or file.name == 'checkpoint.json'
        if found[0] == 0 and file.name != 'log.jsonl' and reads_weights:
            assert found == right[name], (file, name)
    assert refused >= 5 * MORE


def test_memory_is_asked_for_before_it_is_taken():
    with mock.patch.object(train_command.torch.cuda, 'is_available', return_value=False):
        with pytest.raises(ValueError, match='GiB'):
            train_command.check_memory(GPTConfig(n_embd=2**17, n_head=1))
