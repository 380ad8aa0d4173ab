"The command line as a person meets it: a subprocess, its output, its exit status."

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from transformer_course import cli, train_command
from transformer_course.checkpoint import load_model
from transformer_course.cli import parse
from transformer_course.data import CharTokenizer
from transformer_course.files import signed
from transformer_course.flags import choices_in, field_comments
from transformer_course.prepare import prepare

COMMAND = Path(sys.executable).with_name('transformer-course')
SMALL = (
    '--n_layer 1 --n_head 2 --n_embd 32 --block_size 16 --batch_size 4 --sample_tokens 20'.split()
)
TEXT = 'To be, or not to be, that is the question:\nWhether tis nobler in the mind to suffer\n' * 60


def command_in(folder):
    "Run the command in a folder."

    def call(*args, command=(COMMAND,), **kw):
        words = [*map(str, command), *map(str, args)]
        return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300, **kw)

    call.folder = folder
    return call


@pytest.fixture
def run(tmp_path):
    "The command in an empty folder that holds one text."
    (tmp_path / 'my.txt').write_text(TEXT)
    return command_in(tmp_path)


@pytest.fixture(scope='session')
def one_run(tmp_path_factory):
    "A folder with the same text and a short training run, and what the command said."
    run = command_in(tmp_path_factory.mktemp('trained'))
    (run.folder / 'my.txt').write_text(TEXT)
    result = run('train', '--text', 'my.txt', *SMALL, '--max_iters', 30, '--eval_interval', 10)
    assert result.returncode == 0, result.stderr
    return run.folder, result.stdout


@pytest.fixture
def trained(one_run, tmp_path):
    "The command in a copy of that folder."
    folder, output = one_run
    run = command_in(shutil.copytree(folder, tmp_path, dirs_exist_ok=True))
    run.output = output
    return run


def about(folder, out='out'):
    return json.loads((folder / out / 'checkpoint/checkpoint.json').read_text())


def lines(folder, out='out'):
    return [json.loads(line) for line in (folder / out / 'log.jsonl').read_text().splitlines()]


def losses(folder, out='out'):
    return [r['loss'] for r in lines(folder, out) if 'loss' in r]


def evaluations(folder, out='out'):
    return {r['step']: r['val'] for r in lines(folder, out) if 'val' in r}


def one_line(result):
    "What a mistake gets: status 2 and a single line."
    return (
        result.returncode == 2
        and result.stderr.count('\n') == 1
        and 'Traceback' not in result.stderr
    )


def test_train_says_what_it_does(trained):
    out = trained.output
    assert 'my.txt' in out and 'characters to train on' in out
    steps = re.findall(r'step +(\d+) +val loss (\d+\.\d{4})', out)
    assert [int(s) for s, _ in steps] == [0, 10, 20, 30]
    assert float(steps[-1][1]) < float(steps[0][1])
    assert (trained.folder / 'out/loss.png').read_bytes().startswith(b'\x89PNG')
    assert 'transformer-course sample' in out


def test_sample_continues_the_prompt_and_repeats_itself(trained):
    first, second, other = (
        trained('sample', '--prompt', 'To be', '--max_new_tokens', 40, '--seed', s).stdout
        for s in (1, 1, 2)
    )
    assert first == second != other
    assert first.startswith('To be') and len(first) == len('To be') + 40 + 1


def test_a_prompt_begins_with_a_newline_unless_told_otherwise(trained):
    assert trained('sample', '--max_new_tokens', 1).stdout.startswith('\n')


def test_a_prompt_is_taken_as_typed(run):
    "Dashes may stand for underscores in the names of flags, and nowhere else."
    (run.folder / 'my.txt').write_text(TEXT + '-- a-b-c \\\n' * 200)
    assert run('train', '--text', 'my.txt', *SMALL, '--max_iters', 1).returncode == 0
    for prompt in ('-- a-b-c', '--', 'b\\nub'):
        for words in (['--prompt', prompt], [f'--prompt={prompt}']):
            if words == ['--prompt', '--']:
                continue  # two dashes alone end the flags, as in every command
            out = run('sample', *words, '--max-new-tokens', 1).stdout
            assert out.startswith(prompt), words


def test_info_tells_what_the_checkpoint_holds(trained):
    out = trained('info').stdout
    assert '1 layer,' in out and '30 of 30 steps' in out and 'my.txt' in out


def test_info_reads_no_weights(trained):
    "Weights that are damaged behind the header do not matter, a header that is cut off does."
    file = trained.folder / 'out/checkpoint/model.safetensors'
    good, before = file.read_bytes(), trained('info').stdout
    file.write_bytes(good[:-8] + bytes(8))
    assert trained('info').stdout == before and one_line(trained('sample'))
    file.write_bytes(good[:20])
    result = trained('info')
    assert one_line(result) and 'damaged' in result.stderr


def test_info_and_version_need_no_checkpoint(run):
    assert 'none in' in run('info').stdout and run('info').returncode == 0
    assert run('--version').stdout.startswith('transformer_course ')


def test_resume_goes_on_where_the_run_ended(trained):
    result = trained('train', '--resume', '--text', 'my.txt', '--max_iters', 40)
    assert result.returncode == 0, result.stderr
    assert about(trained.folder)['step'] == 40 and len(losses(trained.folder)) == 40


def test_flags_win_over_the_file_and_the_file_over_defaults(run):
    settings = dict(n_layer=2, n_head=2, n_embd=32, max_iters=2, text='my.txt')
    (run.folder / 'c.json').write_text(json.dumps(settings))
    assert run('train', '--config', 'c.json', '--n_layer', 1, '--block_size', 16).returncode == 0
    config = about(run.folder)['config']
    assert config['n_layer'] == 1 and config['n_embd'] == 32 and config['position'] == 'rotary'


def test_flags_may_be_written_with_hyphens(run):
    flags = [*SMALL, '--max-iters=1', '--tie-weights']
    assert run('train', '--text', 'my.txt', *flags).returncode == 0
    assert about(run.folder)['config']['tie_weights'] is True


def test_help_explains_every_flag(run):
    result = run('train', '--help')
    flags = re.findall(r'^  (--\w+)(.*(?:\n {20,}.*)*)', result.stdout, re.M)
    assert result.returncode == 0 and len(flags) > 35
    for flag, rest in flags:
        assert len(rest.split()) > 2, f'{flag} has no explanation'
    for inherited in ('--n_layer', '--activation', '--dropout'):  # of BlockConfig
        assert inherited in dict(flags)


MY = ['train', '--text', 'my.txt']
BAD = [
    (['train', '--text', 'nope.txt'], ['nope.txt', 'no such file']),
    (['train', '--text', 'empty.txt'], ['empty.txt', 'empty']),
    (['train', '--text', 'short.txt'], ['block_size=64', 'longer text']),
    (['train', '--text', 'latin1.txt'], ['UTF-8', 'latin1.txt']),
    (['train', '--text', '.'], ['directory']),
    ([*MY, '--n_embd', '30', '--n_head', '4'], ['n_embd=30', 'n_head=4', 'multiple']),
    ([*MY, '--n_layer', 'many'], ['--n_layer', 'whole number']),
    ([*MY, '--n_layr', '2'], ['--n_layr', 'did you mean --n_layer']),
    ([*MY, '--n-layr=2'], ['--n-layr', 'did you mean --n_layer']),
    ([*MY, '--lr', '1e-3'], ['--lr', 'did you mean --learning_rate']),
    ([*MY, '--epochs=3'], ['--epochs', 'did you mean --max_iters']),
    ([*MY, 'stray'], ['stray', '--help']),
    ([*MY, '--position', 'gps'], ["position='gps'", 'rotary']),
    ([*MY, '--max_iters', '0'], ['max_iters=0', 'at least 1']),
    ([*MY, '--vocab_size', '3'], ['vocab_size=3', 'different characters']),
    ([*MY, '--val_fraction', '2'], ['val_fraction=2']),
    ([*MY, '--eval_tokens', '0'], ['eval_tokens=0', 'at least 1']),
    ([*MY, '--device', 'abacus'], ['--device abacus', 'cpu']),
    ([*MY, '--bias', 'perhaps'], ['--bias', 'true or false']),
    ([*MY, '--learning_rate', 'nan'], ['--learning_rate', 'finite number']),
    (['train', '--config', 'nope.json'], ['nope.json', 'No such file']),
    (['train', '--config', 'my.txt'], ['my.txt', 'not JSON']),
    (['train', '--config', 'odd.json'], ["'colour'", '--help']),
    (['train', '--config', 'list.json'], ['list.json', 'no object']),
    (['train', '--config', 'deep.json'], ['deep.json', 'too deeply']),
    (['train', '--config', 'whole.json'], ['max_iters=8.5', 'whole number']),
    ([*MY, '--data', 'x'], ['my.txt', 'one of the two']),
    (['train', '--data', 'x', '--val_fraction', '0.2'], ['--val_fraction', '--text']),
    ([*MY, '--resume', '--overwrite'], ['--resume', '--overwrite']),
    ([*MY, '--seed', '9' * 20], ['seed=', 'from 0 to']),
    ([*MY, '--mlp_ratio', '1e9'], ['GiB', 'mlp_ratio']),
    ([*MY, '--device', 'cpu:x'], ['cpu:x', 'auto']),
    ([*MY, '--vocab_size', '64'], ['vocab_size=64', 'too large']),
    (['train', '--config', 'type.json'], ["n_layer='two'", 'whole number']),
    (['train', '--resume'], ['no checkpoint', 'out']),
    (['sample'], ['no checkpoint', 'train one first']),
    ([*MY, '--parallel', 'fsdp'], ["parallel='fsdp'", 'torchrun']),
    ([*MY, '--parallel', 'carpool'], ["parallel='carpool'", 'ddp']),
    (['sample', '--int8', '--device', 'cuda'], ['--int8', 'CPU']),
    (['fly'], ['fly', 'train']),
]
FILES = {
    'empty.txt': b'',
    'short.txt': b'abc',
    'latin1.txt': b'caf\xe9 ' * 100,
    'odd.json': b'{"colour": 1}',
    'list.json': b'[4]',
    'deep.json': b'[' * 200_000,
    'whole.json': b'{"max_iters": 8.5}',
    'type.json': b'{"n_layer": "two", "text": "my.txt"}',
}


@pytest.mark.parametrize(
    'args, words', BAD, ids=lambda x: ' '.join(x) if isinstance(x, list) else None
)
def test_bad_input_gets_one_line_and_status_2(run, args, words):
    for name, content in FILES.items():
        (run.folder / name).write_bytes(content)
    result = run(*args)
    assert one_line(result), result.stderr
    for word in words:
        assert word in result.stderr


BAD_FOR_A_CHECKPOINT = [
    (['sample', '--prompt', '☃'], ['☃', 'vocabulary']),
    (['sample', '--prompt', ''], ['prompt is empty']),
    (['sample', '--temperature', '-1'], ['temperature=-1', 'must be 0']),
    (['sample', '--top_k', '0'], ['top_k=0', 'at least 1']),
    (['sample', '--top_p', '1.5'], ['top_p=1.5']),
    (['train', '--resume', '--n_layer', '2'], ['n_layer=1', 'without --resume']),
    (['train', '--resume', '--text', 'other.txt'], ['another text', 'my.txt']),
    (['train', '--resume', '--seed', '7'], ['seed=1337', 'cannot change']),
    (['train', '--resume', '--optimizer', 'adamw'], ['optimizer=muon', 'cannot change']),
    (['train', '--resume', '--val_fraction', '0.2'], ['val_fraction=0.1', 'cannot change']),
    (['train', '--resume', '--config', 'head.json'], ['n_head=2', 'cannot change']),
    (['train', '--text', 'my.txt'], ['holds a run already', '30 of 30 steps', '--overwrite']),
    (['sample', '--temperature', '1e-40'], ['temperature=1e-40', '0.001']),
    (['sample', '--num_samples', '-2'], ['num_samples=-2', 'at least 1']),
]


@pytest.mark.parametrize('args, words', BAD_FOR_A_CHECKPOINT)
def test_bad_input_to_a_checkpoint(trained, args, words):
    (trained.folder / 'other.txt').write_text('x' * 1000)
    (trained.folder / 'head.json').write_text('{"n_head": 4}')
    result = trained(*args)
    assert one_line(result), result.stderr
    for word in words:
        assert word in result.stderr
    assert '☃' not in result.stdout


def test_damaged_checkpoint(trained):
    weights = trained.folder / 'out/checkpoint/model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-10])
    result = trained('sample')
    assert one_line(result) and 'checksum' in result.stderr


def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(run):
    wild = '--optimizer adamw --learning_rate 1e30 --warmup_iters 0'.split()
    result = run(*MY, *SMALL, '--max_iters', 60, '--eval_interval', 1, *wild)
    assert one_line(result)
    step = int(re.search(r'at step (\d+)', result.stderr)[1])
    assert 'is kept' in result.stderr and about(run.folder)['step'] <= step


def test_a_full_disk_is_said_in_one_line(run):
    resource = pytest.importorskip('resource')

    def small_files_only():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    result = run(*MY, *SMALL, '--max_iters', 5, preexec_fn=small_files_only)
    assert one_line(result) and 'free some space' in result.stderr


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_the_update_in_hand_and_says_how_to_go_on(run, number):
    args = [*MY, *SMALL, '--max_iters', '100000', '--eval_interval', '10', '--out_dir', 'mine']
    process = subprocess.Popen(
        [COMMAND, *args], cwd=run.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith('step    20'):
            break
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'Traceback' not in err
    step = about(run.folder, 'mine')['step']
    hint = f'stopped after {step} updates, saved; go on with: transformer-course train --resume'
    assert err.strip().endswith(f'{hint} --out_dir mine') and step == len(
        losses(run.folder, 'mine')
    )


IMPATIENT = """
import signal, sys

class Pressed:
    def find_spec(self, name, path=None, target=None):
        if name == 'torch.nn':  # well inside the import of PyTorch
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
sys.meta_path.insert(0, Pressed())
sys.argv = ['transformer-course', 'info']
from importlib.metadata import entry_points
(command,) = entry_points(group='console_scripts', name='transformer-course')
sys.exit(command.load()())
"""


def test_ctrl_c_while_pytorch_is_being_imported_is_one_line(run):
    result = run('-c', IMPATIENT, command=[sys.executable])
    assert (result.returncode, result.stdout, result.stderr) == (130, '', '\nstopped\n')


def test_a_log_has_every_update_once_also_after_a_resume(trained):
    before = losses(trained.folder)
    assert trained('train', '--resume', '--max_iters', 40).returncode == 0
    updates = [r['step'] for r in lines(trained.folder) if 'loss' in r]
    assert updates == list(range(1, 41)) and losses(trained.folder)[:30] == before
    assert list(evaluations(trained.folder)) == [0, 10, 20, 30, 40]
    assert about(trained.folder)['history']['val'] == [
        *map(list, evaluations(trained.folder).items())
    ]


def test_without_a_log(run):
    assert run(*MY, *SMALL, '--max_iters', 1, '--log', 'no').returncode == 0
    assert not (run.folder / 'out/log.jsonl').exists()


def test_sample_with_weights_of_one_byte(trained):
    args = ['sample', '--prompt', 'To be', '--max_new_tokens', 20, '--int8']
    first, again = (trained(*args).stdout for _ in range(2))
    assert first == again and first.startswith('To be') and len(first) == len('To be') + 20 + 1


TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
TORCHRUN += ['--no-python', str(COMMAND)]
ONE_THREAD = {**os.environ, 'OMP_NUM_THREADS': '1'}


@pytest.mark.parametrize('how', ['ddp', 'fsdp'])
def test_two_processes_learn_what_one_does(run, how):
    """The whole command under torchrun: the same split, batches and losses (up to rounding), one
    voice, one checkpoint that samples. The validation windows, 31, cannot be halved."""
    args = [*MY, *SMALL, '--max_iters', '6', '--eval_interval', '3', '--device', 'cpu']
    assert run(*args, '--out_dir', 'one').returncode == 0
    two = run(*args, '--parallel', how, command=TORCHRUN, env=ONE_THREAD)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count('val loss') == 3 and two.stdout.count('wrote ') == 1
    assert '2 processes' in two.stdout
    assert losses(run.folder) == pytest.approx(losses(run.folder, 'one'), abs=1e-4)
    assert evaluations(run.folder) == pytest.approx(evaluations(run.folder, 'one'), abs=1e-4)
    assert run('sample', '--max_new_tokens', 5).returncode == 0


def test_a_mistake_under_torchrun_is_said_once(run):
    done = run(*MY, '--n_embd', '30', command=TORCHRUN, env=ONE_THREAD)
    assert done.returncode and done.stderr.count('n_embd=30') == 1


KILLED = """import os, signal, sys
from transformer_course import cli
from transformer_course.train_command import Reporter
report = Reporter.__call__
def report_and_die(self, step, history):
    report(self, step, history)
    if step == int(sys.argv[1]): os.kill(os.getpid(), signal.SIGKILL)
Reporter.__call__ = report_and_die
cli.main(sys.argv[2:])
"""


@pytest.mark.parametrize('kill_at', [20, 40])
def test_kill_and_resume_gives_the_same_losses(run, kill_at, tmp_path_factory):
    args = ['train', '--text', str(run.folder / 'my.txt'), *SMALL]
    args += ['--dropout', '0.1', '--max_iters', '60', '--eval_interval', '10']
    whole = tmp_path_factory.mktemp('whole')
    subprocess.run([COMMAND, *args], cwd=whole, check=True, capture_output=True)
    killed = run(*args, command=[sys.executable, '-c', KILLED, str(kill_at)])
    assert killed.returncode == -signal.SIGKILL and about(run.folder)['step'] == kill_at
    assert run('train', '--resume').returncode == 0
    assert losses(run.folder) == losses(whole) and len(losses(whole)) == 60
    model = [(f / 'out/checkpoint/model.safetensors').read_bytes() for f in (run.folder, whole)]
    assert model[0] == model[1]


STARTS = """import sys, torch
before = set(sys.modules)
import transformer_course.cli
new = {name for name in sys.modules.keys() - before if not name.startswith('transformer_course')}
print(sorted(n for n in new if n.startswith('torch.')))
print(sorted({n.split('.')[0] for n in new} - sys.stdlib_module_names))"""


def test_starts_as_fast_as_torch():
    "Beside torch itself, reading the command's modules reads few and small packages."
    done = subprocess.run([sys.executable, '-c', STARTS], capture_output=True, text=True)
    of_torch, packages = map(ast.literal_eval, done.stdout.splitlines())
    assert not of_torch
    assert set(packages) <= {'platformdirs', 'regex', 'safetensors', 'tiktoken', 'tiktoken_ext'}


# ---------------------------------------------------------------- what was asked for is in force


@pytest.mark.parametrize('how', ['flags', 'file'])
def test_settings_that_change_on_resume_take_effect(trained, how):
    "A step size of nothing teaches nothing: the weights stay, and log and checkpoint say why."
    still = dict(learning_rate=0.0, muon_lr=0.0, weight_decay=0.0, max_iters=40)
    (trained.folder / 'still.json').write_text(json.dumps(still))
    flags = [word for k, v in still.items() for word in (f'--{k}', v)]
    asked = flags if how == 'flags' else ['--config', 'still.json']
    before = load_model(trained.folder / 'out/checkpoint')[0].state_dict()
    result = trained('train', '--resume', *asked)
    assert result.returncode == 0 and 'changed learning_rate: 0.005 until now, 0.0' in result.stdout
    after = load_model(trained.folder / 'out/checkpoint')[0].state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert about(trained.folder)['train']['learning_rate'] == 0.0
    [noted] = [r['changed'] for r in lines(trained.folder) if 'changed' in r]
    assert noted['learning_rate'] == [0.005, 0.0]


def test_a_run_is_replaced_only_when_asked(trained):
    again = ['train', '--text', 'my.txt', *SMALL, '--max_iters', 2]
    assert one_line(trained(*again)) and about(trained.folder)['step'] == 30
    assert trained(*again, '--overwrite').returncode == 0 and about(trained.folder)['step'] == 2


def test_two_runs_in_one_folder(run):
    "The second is told who has it; when the first is killed, the folder is free."
    args = [*MY, *SMALL, '--max_iters', '100000', '--eval_interval', '10']
    first = subprocess.Popen([COMMAND, *args], cwd=run.folder, stdout=subprocess.PIPE, text=True)
    for line in first.stdout:
        if line.startswith('step    10'):
            break
    result = run(*MY, *SMALL, '--overwrite')
    assert one_line(result) and f'in use by process {first.pid}' in result.stderr
    first.kill()
    first.communicate()
    assert run(*MY, *SMALL, '--max_iters', 1, '--overwrite').returncode == 0


@pytest.mark.parametrize('env', [dict(PYTHONIOENCODING='cp1252'), dict(LC_ALL='C', PYTHONUTF8='0')])
def test_a_terminal_without_the_characters_of_the_text(run, env):
    (run.folder / 'my.txt').write_text('但是他們不知道 ☃\n' * 400, encoding='utf-8')
    result = run(*MY, *SMALL, '--max_iters', 2, env=os.environ | env)
    assert result.returncode == 0, result.stderr
    assert run('sample', '--max_new_tokens', 20, env=os.environ | env).returncode == 0


def test_a_pipe_that_closes_early(trained):
    words = f'{COMMAND} sample --max_new_tokens 2000 | head -c 20'
    result = subprocess.run(words, shell=True, cwd=trained.folder, capture_output=True, text=True)
    assert len(result.stdout) == 20 and result.stderr == ''


def test_a_text_without_a_newline_can_be_continued(run):
    (run.folder / 'my.txt').write_text('{"to": "be", "or": ["not"]}' * 200)
    assert run(*MY, *SMALL, '--max_iters', 1).returncode == 0
    assert run('sample', '--max_new_tokens', 5).returncode == 0


def test_a_long_text_is_scored_in_part_and_at_the_end_as_a_whole(run):
    result = run(*MY, *SMALL, '--max_iters', 2, '--eval_tokens', 100)
    assert 'to validate on (while training, the first 100)' in result.stdout
    assert re.search(r'whole   val loss \d\.\d+ nats per character over all of it', result.stdout)


@pytest.mark.parametrize('columns', [60, 80, 200])
def test_the_help_is_as_wide_as_the_terminal(run, columns):
    env = dict(os.environ, COLUMNS=str(columns))
    for command in cli.COMMANDS:
        flags = run(command, '--help', env=env).stdout.partition('examples:')[0]
        assert max(map(len, flags.splitlines())) <= min(columns, 100)
        assert not re.search(r'--\w+ \[?(STR|INT|FLOAT|BOOL)', flags)


def test_the_bare_command_helps(run):
    result = run()
    assert result.returncode == 2 and result.stdout == ''
    assert all(f'    {command}' in result.stderr for command in cli.COMMANDS)


def test_what_the_help_lists_is_taken_and_nothing_else():
    "Choices are read from the comments; the dataclasses must agree with them."
    lists = {}
    for part in {part for command in cli.COMMANDS.values() for part in command.parts}:
        for name, comment in field_comments(part).items():
            if choices := choices_in(comment):
                lists[name] = part, choices
    assert {'norm', 'position', 'activation', 'optimizer', 'lr_decay', 'dtype'} <= set(lists)
    for name, (part, choices) in lists.items():
        if name in ('device', 'parallel'):  # known only where the run begins
            continue
        for choice in choices:
            part(**{name: choice})
        with pytest.raises(ValueError, match=f'^{name}='):
            part(**{name: 'something else'})


def test_a_very_long_text_is_scored_at_the_end_from_all_over(monkeypatch, tmp_path, capsys):
    (tmp_path / 'long.txt').write_text(TEXT * 30)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_command, 'END_TOKENS', 64)
    words = ['train', '--text', 'long.txt', *map(str, SMALL), '--max_iters', '1']
    assert cli.main([*words, '--eval_tokens', '16']) == 0
    said = re.search(r'whole .* over ([\d,]+) of ([\d,]+), from all over', capsys.readouterr().out)
    scored, total = (int(word.replace(',', '')) for word in said.groups())
    assert 16 <= scored <= 64 < total


def test_a_bit_that_turned_over_in_the_shards_is_not_learned(run):
    prepare(run.folder / 'data', [TEXT] * 8, CharTokenizer.train(TEXT), val_fraction=0.3)
    args = ['train', '--data', 'data', *SMALL, '--max_iters', 1, '--overwrite']
    assert run(*args).returncode == 0
    for name in ('train/00000.bin', 'train/index.json', 'val/index.json', 'tokenizer.json'):
        path = run.folder / 'data' / name
        good = path.read_bytes()
        path.write_bytes(good[:30] + bytes([good[30] ^ 1]) + good[31:])
        result = run(*args)
        assert one_line(result) and path.name in result.stderr, name
        path.write_bytes(good)
    index = json.loads((run.folder / 'data/train/index.json').read_text())
    index['shards'][0]['file'] = '../../my.txt'
    (run.folder / 'data/train/index.json').write_text(json.dumps(signed(index)))
    result = run(*args)
    assert one_line(result) and 'damaged' in result.stderr


def commands_in(text):
    "The lines of shell in a page that call the command, as words after its name."
    for block in re.findall(r'```sh\n(.*?)```', text, re.S):
        for line in re.split(r'\n|&&', block):
            words = shlex.split(line, comments=True)
            if 'transformer-course' in words and '...' not in words:
                yield words[words.index('transformer-course') + 1 :]


def test_the_commands_that_pages_show_can_be_typed():
    pages = [ROOT / 'README.md', *(ROOT / 'nbs').rglob('*.ipynb')]
    typed = []
    for page in pages:
        cells = [page.read_text(encoding='utf-8')]
        if page.suffix == '.ipynb':
            cells = [''.join(c['source']) for c in json.loads(cells[0])['cells']]
        typed += [words for cell in cells for words in commands_in(cell)]
    assert len(typed) >= 10
    for words in typed:
        command, flags = parse(words)
        assert command in ('train', 'sample', 'chat', 'info') and all(f != 'command' for f in flags)
