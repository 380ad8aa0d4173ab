"""Notebooks as they are committed: clean, executed, documented, tested.

None is executed here. How long cells may be, and which way imports point, is in test_house.
"""

import ast
import json
import re
import subprocess
import sys

import pytest
from cells import FLAGS, directives, exported, read_cells, skips, tree
from conftest import ROOT
from notebooks import ALL, every_chapter, every_notebook
from times import stated

from transformer_course.course.readings import bibliography, reading_line

MACHINE_PATH = re.compile(
    r'/home/\w|/root\b|/Users/\w|/tmp/\w|/work/\w|/usr/lib/|site-packages|[A-Z]:\\\\?Users'
)
TEXTS = [*sorted(ROOT.glob('*.md')), ROOT / 'benchmarks' / 'README.md', *(nb.path for nb in ALL)]
DEFINITIONS = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
IMPORTS = ast.Import, ast.ImportFrom
SHOWN = (
    ast.Name,
    ast.Attribute,
    ast.Subscript,
    ast.Compare,
    ast.BinOp,
    ast.Tuple,
    ast.List,
    ast.Dict,
)


def test_in_sync():
    "Notebooks are clean; the modules, README.md and the sidebar are what the notebooks make them."
    command = [sys.executable, ROOT / 'tools' / 'test.py', 'sync']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@every_notebook
def test_first_cell_is_title_and_summary(nb):
    "It becomes the page's front matter."
    first, form = nb.cells[0], '"# Title", an empty line, "> one line", and nothing else'
    assert first['cell_type'] == 'markdown', form
    assert re.fullmatch(r'# [^\n]+\n+> [^\n]+\s*', first['source']), form


@every_notebook
def test_smaller_than_a_megabyte(nb):
    assert nb.path.stat().st_size < 1_000_000


# ---------------------------------------------------------------- which cells run


@every_notebook
def test_no_cell_exports(nb):
    "A reader who runs all cells writes no module."
    for cell in nb.code:
        assert 'nbdev_export' not in cell['source'], f'{nb.where(cell)} exports'


@every_notebook
def test_run_all_leaves_nothing_out(nb):
    "Directives mean nothing to Jupyter: what is long or needs a card is guarded in code."
    mend = 'use `long_run`, or ask `torch.cuda.is_available()`, as CONTRIBUTING.md says'
    for cell in nb.code:
        known = directives(cell['source'])
        never = known.get('eval', '').lower() == 'false'
        assert not known.keys() & {'slow', 'cuda'} and not never, f'{nb.where(cell)}: {mend}'


@every_chapter
def test_says_how_long_it_takes(nb):
    "In the opening, in words that `tools/run_all.py` reads: at most two minutes."
    form = 'say in the opening "It takes about 90 seconds on two CPU cores."'
    seconds = stated(nb.cells, cores=True)
    assert seconds, form
    assert seconds <= 120, f'{nb.name} says {seconds:g} s; a chapter has two minutes'


TIMES = {
    'It takes about half a minute on two CPU cores.': 30,
    'The notebook takes a minute and a quarter on two CPU cores; most of it': 75,
    'This notebook takes between one and two minutes on two CPU cores.': 120,
    'It takes about 90 seconds on two CPU cores, most of it for training.': 90,
    'Running all of it takes one and a half minutes on two cores.': 90,
    'It takes about a minute and 20 seconds on two CPU cores.': 80,
    'Work that takes two seconds on two CPU cores. It takes twelve seconds on two cores.': 12,
    'It takes its time.': None,
}


@pytest.mark.parametrize('text', TIMES)
def test_times_are_read(text):
    assert stated([dict(cell_type='markdown', source=text)], cores=True) == TIMES[text]


# ---------------------------------------------------------------- what is named

PLACES = 'tools|benchmarks|tests|nbs|results|transformer_course|configs'
KINDS = 'py|ipynb|jsonl?|md|ini|txt|toml'
NAMED = re.compile(rf'(?<![\w/.])(?:{PLACES})/[\w./-]+\.(?:{KINDS})\b')


@pytest.mark.parametrize('path', TEXTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_that_are_named_exist(path):
    "Commands and sentences name files of the repository; so do the links of a text."
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.ipynb':
        text = '\n'.join(cell['source'] for cell in read_cells(path))
    named = {name for name in NAMED.findall(text) if '/NN_' not in name}
    assert not [name for name in named if not (ROOT / name).exists()]
    links = re.findall(r'\]\(([^)\s#:]+)(?:#[^)]*)?\)', text) if path.suffix == '.md' else []
    assert not [link for link in links if not (path.parent / link).exists()]


@every_notebook
def test_what_runs_is_what_nbdev_runs(nb):
    "`cells.skips` reads directives without nbdev, and agrees with it."
    nbio, process = pytest.importorskip('execnb.nbio'), pytest.importorskip('nbdev.process')
    for cell in nb.code:
        known = process.extract_directives(nbio.NbCell(0, dict(cell)), remove=False)
        never = known.get('eval:', [''])[0].lower() == 'false'
        assert skips(cell['source']) == bool(never or set(FLAGS) & known.keys()), nb.where(cell)


# ---------------------------------------------------------------- outputs


@every_notebook
def test_outputs_are_clean(nb):
    "No errors, no warnings, nothing of the machine they were made on."
    for cell in nb.code:
        for out in cell['outputs']:
            where = nb.where(cell)
            assert out['output_type'] != 'error', f'{where} shows an error'
            said = ''.join(out.get('text', ''))
            assert out.get('name') != 'stderr', f'{where} writes to stderr: {said[:200]}'
            data = {k: v for k, v in out.get('data', {}).items() if not k.startswith('image/')}
            text = json.dumps([said, data])
            found = MACHINE_PATH.search(text)
            near = text[max(0, found.start() - 20) : found.end() + 40] if found else ''
            assert not found, f'{where} shows a machine path: {near}'


def calls_print(statement):
    "True for a line that is a call of `print`."
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and getattr(call.func, 'id', '') == 'print'


def shows_a_value(source):
    "True for a cell whose last line is a value, which the notebook shows; a semicolon hides it."
    body = tree(source).body
    last = body[-1] if body else None
    hidden = source.rstrip().endswith(';')
    return isinstance(last, ast.Expr) and isinstance(last.value, SHOWN) and not hidden


@every_notebook
def test_cells_that_print_have_outputs(nb):
    "The site shows committed outputs: what prints or ends in a value has been executed."
    mend = f'run `python tools/execute.py {nb.path.relative_to(ROOT)}`'
    for cell in nb.code:
        source = cell['source']
        if skips(source) or exported(source) or cell['outputs']:
            continue
        speaks = any(map(calls_print, tree(source).body)) or shows_a_value(source)
        assert not speaks, f'{nb.where(cell)} has no output: {mend}'


# ---------------------------------------------------------------- code


@every_notebook
def test_imports_stand_alone(nb):
    "Building the site executes cells that import: what else stands in one would be run there too."
    for cell in nb.code:
        if exported(cell['source']) or directives(cell['source']).get('eval') == 'false':
            continue
        kinds = {isinstance(node, IMPORTS) for node in tree(cell['source']).body}
        assert kinds != {True, False}, f'{nb.where(cell)} imports and does something else'


def public_definitions(nb):
    "The functions and classes that a notebook exports."
    for cell in nb.code:
        nodes = tree(cell['source']).body if exported(cell['source']) else []
        yield from (n for n in nodes if isinstance(n, DEFINITIONS) and n.name[0] != '_')


@every_notebook
def test_public_names_are_documented_and_tested(nb):
    "Each exported function and class has a docstring, and cells that are not exported use it."
    used = '\n'.join(c['source'] for c in nb.code if not exported(c['source']))
    for node in public_definitions(nb):
        assert ast.get_docstring(node), f'{node.name} has no docstring'
        tried = re.search(rf'\b{node.name}\b', used)
        assert tried, f'{node.name} is exported, but no cell of its notebook tries it'
    assert not nb.module or 'assert' in used, 'nothing is asserted'


@every_notebook
def test_library_needs_only_its_requirements(nb):
    "Exported cells need no development tools, and matplotlib and IPython only inside functions."
    for cell in nb.code:
        if not exported(cell['source']):
            continue
        parsed = tree(cell['source'])
        for node in ast.walk(parsed):
            if not isinstance(node, IMPORTS):
                continue
            names = [node.module or ''] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            banned = {'nbdev', 'fastcore', 'execnb', 'pytest'}
            banned |= {'IPython', 'matplotlib'} if node in parsed.body else set()
            found = {name.split('.')[0] for name in names} & banned
            assert not found, f'{nb.where(cell)} imports {found}'


def test_modules_come_from_notebooks():
    "Every module is exported by exactly one notebook."
    package = ROOT / 'transformer_course'
    modules = [nb.module for nb in ALL if nb.module]
    assert len(modules) == len(set(modules))
    paths = [p for p in package.rglob('*.py') if p.stem not in ('__init__', '_modidx')]
    files = {'.'.join(p.relative_to(package).with_suffix('').parts) for p in paths}
    assert files == set(modules)


def test_the_bibliography_is_what_the_chapters_name():
    "A new paper in a chapter: `python tools/execute.py nbs/bibliography.ipynb`."
    folder = ROOT / 'nbs'
    cells = json.loads((folder / 'bibliography.ipynb').read_text(encoding='utf-8'))['cells']
    (shown,) = [out['data']['text/markdown'] for c in cells for out in c.get('outputs', [])]
    now = '\n'.join(reading_line(paper, folder) for paper in bibliography(folder))
    assert ''.join(shown) == now and now.count('\n') > 100


@every_notebook
def test_no_switch_is_left_thrown(nb):
    "Tests run several notebooks in one process: what one switches off is off for the next."
    for cell in nb.code:
        for node in tree(cell['source']).body:
            call = node.value if isinstance(node, ast.Expr) else None
            name = ast.unparse(call.func) if isinstance(call, ast.Call) else ''
            thrown = name in ('torch.set_grad_enabled', 'torch.set_default_dtype')
            assert not thrown, f'{name} at the top of a cell: use it with `with`'
