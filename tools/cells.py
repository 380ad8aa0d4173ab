"""Notebooks as files: their cells, which of them run, and a fingerprint of the code that does.

Nothing is executed here, and nbdev is not needed. The tools and the tests share it, so that they
agree on what a cell is.
"""

import ast
import configparser
import functools
import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIRECTIVE = re.compile(r'\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)')
DOCUMENTED = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef


def settings(root=ROOT):
    "What settings.ini says."
    config = configparser.ConfigParser(delimiters=['='])
    config.read(root / 'settings.ini', encoding='utf-8')
    return config['DEFAULT']


FLAGS = tuple(settings()['tst_flags'].split())  # cells of these are left out


def notebook_paths(root=ROOT):
    "Every notebook of the course."
    found = (root / 'nbs').rglob('*.ipynb')
    hidden = lambda path: any(part[0] in '._' for part in path.relative_to(root).parts)
    return sorted(path for path in found if not hidden(path))


def read_cells(path):
    "The cells of a notebook, each source one string."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    for cell in cells:
        cell['source'] = ''.join(cell['source'])
    return cells


def code_of(cells):
    "The code cells that are not empty."
    return [c for c in cells if c['cell_type'] == 'code' and c['source'].strip()]


# ---------------------------------------------------------------- what stands in a cell


def directives(source):
    "The `#|` lines at the top of a cell, as {name: what follows it}."
    found = {}
    for line in source.splitlines():
        match = DIRECTIVE.match(line)
        if match:
            found[match[1]] = match[2].strip()
        elif line.strip() and not line.startswith('%%'):
            break
    return found


def exported(source):
    "True for a cell that goes into a module."
    return bool(directives(source).keys() & {'export', 'exports', 'exporti'})


def skips(source):
    "True for a cell that neither nbdev_test nor tools/execute.py runs; Jupyter runs it."
    known = directives(source)
    if known.get('eval', '').lower() == 'false':
        return True
    return bool(set(FLAGS) & known.keys())


def module_of(cells):
    "The module that a notebook exports to, such as 'course.claims', or None."
    names = [directives(c['source']).get('default_exp') for c in code_of(cells)]
    return next(filter(None, names), None)


def tree(source):
    "A cell's syntax tree; a shell line or magic stands in it as a string."
    lines = source.splitlines()
    return ast.parse('\n'.join(repr(l) if re.match(r'[!%]', l) else l for l in lines))


def code_lines(source):
    "The lines of a cell that count: not empty, no directive."
    return [l for l in source.splitlines() if l.strip() and not l.startswith('#|')]


# ---------------------------------------------------------------- a fingerprint of the code


def meaning(node):
    """A syntax tree as nested lists: what the code does, not how it is written.

    Comments, docstrings, line breaks, brackets that change nothing and strings in pieces leave no
    trace, so formatting alone changes nothing. `ast.dump` would do, if it wrote the same in every
    version of Python.
    """
    if isinstance(node, list):
        return [meaning(n) for n in node]
    if not isinstance(node, ast.AST):
        return f'{type(node).__name__} {node!r}'
    fields = dict(ast.iter_fields(node))
    fields.pop('kind', None)  # of a constant: u'' is ''
    if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
        fields['body'] = node.body[1:]
    if isinstance(node, ast.JoinedStr):
        fields['values'] = [v for v in node.values if getattr(v, 'value', None) != '']
    kept = [[name, meaning(value)] for name, value in fields.items() if value not in (None, [])]
    return [type(node).__name__, *kept]


def fingerprint(cells):
    "A sha256 of the code that a run of these cells executes, in order; prose does not count."
    run = [told(c['source']) for c in code_of(cells) if not skips(c['source'])]
    return hashlib.sha256('\n'.join(filter(None, run)).encode()).hexdigest()


@functools.cache
def told(source):
    "The meaning of a cell, as a line of text; none for a cell of comments."
    statements = meaning(tree(source).body)
    return json.dumps(statements) if statements else ''
