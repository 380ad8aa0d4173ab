"""What the site makes of a notebook's cells, so that a page can be read alone.

The notebooks stay as they are: `tools/build_docs.py` calls `open_imports` on its copies before
nbdev prepares them, and `for_readers` on what nbdev has prepared. Nothing is executed.
"""

import ast
import functools
import html
import json
import re

from cells import ROOT, directives, settings, tree

IMPORTS = ast.Import, ast.ImportFrom
DRAWN = 'image/png', 'image/svg+xml', 'image/gif', 'image/jpeg'
SETUP, CHECKS, CODE = 'Setup', 'Checks', 'Code of the figure'


def source(cell):
    "A cell's source as one string."
    return ''.join(cell['source'])


def statements(cell):
    "The statements of a code cell; none of what is no Python."
    try:
        return tree(source(cell)).body if cell['cell_type'] == 'code' else []
    except SyntaxError:
        return []


def only_imports(cell):
    "True for a cell of imports and nothing else."
    body = statements(cell)
    return bool(body) and all(isinstance(node, IMPORTS) for node in body)


def opens_claims(cell):
    "True for a cell that opens the chapter's list of claims."
    made = [node.value for node in statements(cell) if isinstance(node, ast.Assign)]
    calls = [node.func for node in made if isinstance(node, ast.Call)]
    return any(getattr(function, 'id', '') == 'Claims' for function in calls)


def drawn(cell):
    "How many pictures a cell shows."
    return sum(bool(set(DRAWN) & set(out.get('data', {}))) for out in cell.get('outputs', []))


# ---------------------------------------------------------------- before nbdev prepares a notebook


def silent(cell):
    "True for a cell whose code the page does not show, also where it stands."
    return bool(re.search(r'^#\| *echo: *false', source(cell), re.M))


def open_imports(nb):
    """Show the imports that a page's code needs, below its opening words.

    A reader who copies code needs them; `#| export` and `#| hide` keep them off the page. Cells
    between the title and the opening words, such as the list of claims, follow the words. On a page
    that is no module's, such as the front page, the imports of an example stay open beside it.
    """
    cells, previous, hidden = nb['cells'], False, re.compile(r'^#\| *(export|hide) *\n', re.M)
    module = any('default_exp' in directives(source(c)) for c in cells)
    for cell in cells:
        setup = only_imports(cell) or (previous and opens_claims(cell))
        if setup and not silent(cell) and (module or hidden.search(source(cell))):
            cell['source'] = f'#| course-fold: {SETUP}\n{hidden.sub("", source(cell))}'
        previous = setup
    words = next((i for i, c in enumerate(cells[1:], 1) if c['cell_type'] == 'markdown'), 0)
    early = [c for c in cells[1:words] if 'default_exp' not in directives(source(c))]
    for cell in early:
        if 'course-fold' not in source(cell) and not silent(cell):
            cell['source'] = f'#| course-fold: {SETUP}\n{source(cell)}'
    kept = [c for c in cells[1:words] if not any(c is e for e in early)]
    nb['cells'] = [cells[0], *kept, *cells[words : words + 1], *early, *cells[words + 1 :]]
    if not words:
        nb['cells'] = cells


# ---------------------------------------------------------------- folds


def called(node):
    "The name of the function that a statement calls, if it is a call and nothing else."
    call = node.value if isinstance(node, ast.Expr) else None
    return getattr(call.func, 'id', '') if isinstance(call, ast.Call) else ''


def refuses(node):
    "Whether a statement tests that something is refused with an error."
    if called(node).startswith('refus'):
        return True
    if isinstance(node, ast.Try):
        return any('Error' in ast.unparse(h.type) for h in node.handlers if h.type)
    inside = isinstance(node, (ast.For, ast.With, ast.FunctionDef))
    return inside and any(refuses(child) for child in node.body)


def is_check(cell):
    "A cell that tests messages of errors and does nothing else that a reader would look at."
    if 'code-fold' in source(cell) or drawn(cell):
        return False
    body = statements(cell)
    preparing = ast.Assign, ast.FunctionDef, ast.Assert, *IMPORTS
    known = all(refuses(node) or isinstance(node, preparing) for node in body)
    return known and any(refuses(node) for node in body)


def fold_of(cell):
    "The name of the fold that a cell belongs into, or None."
    if cell['cell_type'] != 'code':
        return None
    if match := re.search(r'^#\| course-fold: (.+)$', source(cell), re.M):
        return match[1]
    return CHECKS if is_check(cell) else None


def markdown(text):
    "A cell of Markdown, as nbdev leaves them."
    return {'cell_type': 'markdown', 'metadata': {}, 'source': text}


def folds(cells):
    "The cells, with those of one fold that follow each other inside it."
    out, inside = [], None
    for cell in [*cells, markdown('')]:
        name = fold_of(cell)
        if inside and name != inside:
            out.append(markdown('</details>'))
        if name and name != inside:
            kind = name.lower().replace(' ', '-')
            out.append(markdown(f'<details class="fold {kind}"><summary>{name}</summary>'))
        if cell['cell_type'] == 'code':
            cell['source'] = re.sub(r'^#\| course-fold: .+\n', '', source(cell), flags=re.M)
        out.append(cell)
        inside = name
    return out[:-1]


def names(body, kind):
    "The names that statements use: of one kind, `ast.Store` or `ast.Load`."
    found = (n for node in body for n in ast.walk(node))
    return {n.id for n in found if isinstance(n, ast.Name) and isinstance(n.ctx, kind)}


def fold_drawing(cells):
    "Fold the code of a cell that only draws: of what it makes nothing is used further down."
    used = set()
    for cell in reversed(cells):
        body, lines = statements(cell), source(cell).count('\n') + 1
        busy = [n for n in body if isinstance(n, (ast.Assert, ast.FunctionDef, ast.ClassDef))]
        alone = not (names(body, ast.Store) - {'fig', 'ax', 'axes'}) & used
        plain = 'fold' not in source(cell) and 'measured(' not in source(cell)
        if drawn(cell) and lines > 5 and alone and plain and not busy:
            fold = f'#| code-fold: true\n#| code-summary: "{CODE}"'
            cell['source'] = f'{fold}\n{source(cell)}'
        used |= names(body, ast.Load)


# ---------------------------------------------------------------- what was measured, as rows

VERDICTS = 'holds', 'weak', 'does not hold', 'recorded'
MEASURED = re.compile(
    r'^(?P<claim>[A-Z]\d{1,2}) +(?P<rest>\S.*?) {2,}(?:\((?P<asked>[^()]+)\))? *'
    rf'(?P<verdict>{"|".join(VERDICTS)})$'
)


@functools.cache
def known_names():
    "The names of all that the chapters have recorded, the longest first."
    found = set()
    for path in sorted((ROOT / 'results' / 'claims').glob('*.jsonl')):
        lines = path.read_text(encoding='utf-8').splitlines()
        found |= {json.loads(line)['name'] for line in lines}
    return sorted(found, key=len, reverse=True)


def name_and_value(rest):
    "What was measured and its figure: a printed line has two spaces between them, or one."
    name, gap, value = rest.rpartition('  ')
    if gap:
        return name.rstrip(), value
    for name in known_names():
        if rest.startswith(f'{name} '):
            return name, rest[len(name) + 1 :]
    return None


def measured_row(line, claims, ledger):
    "A line that `measured` printed as a row of HTML; None for another line."
    match = MEASURED.match(line)
    both = match and name_and_value(match['rest'])
    if not both:
        return None
    told = [html.escape(text) for text in (*both, match['asked'] or '', match['verdict'])]
    claim, kind = match['claim'], match['verdict'].replace(' ', '-')
    link = f'<a href="{ledger}#{claim}">{claim}</a>' if claim in claims else claim
    asked = f'<span class="asked">asked: {told[2]}</span>' if told[2] else ''
    what = f'<span class="claim">{link}</span><span class="name">{told[0]}</span>'
    value = f'<span class="value">{told[1]}</span>'
    verdict = f'<span class="verdict {kind}">{told[3]}</span>'
    return f'<li>{what}{value}{asked}{verdict}</li>'


def measured_rows(nb, claims, ledger):
    "Give each run of lines that `measured` printed the form of rows; text stays text."
    for cell in nb['cells']:
        outputs = []
        for out in cell.get('outputs', []):
            text = ''.join(out.get('text', ''))
            printed = out['output_type'] == 'stream' and out.get('name') == 'stdout'
            outputs += split_rows(out, text, claims, ledger) if printed else [out]
        if outputs:
            cell['outputs'] = outputs


def split_rows(out, text, claims, ledger):
    "The outputs that one stream becomes: text and rows, in their order."
    parts = []  # (rows?, lines)
    for line in text.rstrip('\n').split('\n'):
        row = measured_row(line, claims, ledger)
        if not parts or parts[-1][0] is not bool(row):
            parts.append((bool(row), []))
        parts[-1][1].append(row or line)
    made = []
    for rows, lines in parts:
        if rows:
            page = f'<ul class="measured">{"".join(lines)}</ul>'
            shown = {'output_type': 'display_data', 'metadata': {}, 'data': {'text/html': page}}
            made.append(shown)
        elif any(line.strip() for line in lines):
            made.append(out | {'text': '\n'.join(lines)})
    return made


# ---------------------------------------------------------------- API entries, and figures


def unlisted(nb):
    "Names of the API leave the contents, where lessons stand; the page lists them by themselves."
    for cell in nb['cells']:
        for out in cell.get('outputs', []):
            data = out.get('data', {})
            if 'show_doc(' in source(cell) and 'text/markdown' in data:
                text = ''.join(data['text/markdown'])
                mark = r'\1 {.unlisted .unnumbered .api}'
                data['text/markdown'] = re.sub(
                    r'^(#{2,5} [^{\n]+)$', mark, text, count=1, flags=re.M
                )


PHOTOS = {'imshow', 'matshow', 'plot_matrix', 'plot_attention', 'plot_bigram', 'plot_pictures'}


def on_dark(cells):
    """Mark the cells whose figures are ink on paper: a dark page shows them light on dark.

    Not pictures and heat maps: the text says which of their colours means what.
    """
    out = []
    for cell in cells:
        plain = not any(re.search(rf'\b{name}\b', source(cell)) for name in PHOTOS)
        if drawn(cell) and plain:
            out += [markdown('<div class="ink">'), cell, markdown('</div>')]
        else:
            out.append(cell)
    return out


def for_readers(nb, claims, ledger):
    "All that a page makes of the cells that nbdev has prepared."
    unlisted(nb)
    measured_rows(nb, claims, ledger)
    fold_drawing(nb['cells'])
    nb['cells'] = on_dark(folds(nb['cells']))


# ---------------------------------------------------------------- copies to run elsewhere


def addresses(path, title):
    "Where a notebook can be run, read and changed, as {text: (icon, address)}: from settings.ini."
    known = settings()
    git, branch, repo = known['git_url'], known['branch'], f'{known["user"]}/{known["repo"]}'
    about = re.sub(r'\W+', '+', title).strip('+')
    colab = 'https://colab.research.google.com/github'
    return {
        'Open in Colab': ('play-circle', f'{colab}/{repo}/blob/{COLAB_BRANCH}/{path}'),
        'Download': ('download', f'notebooks/{path.removeprefix("nbs/")}'),
        'GitHub': ('github', f'{git}/blob/{branch}/{path}'),
        'Edit': ('pencil', f'{git}/edit/{branch}/{path}'),
        'Report a problem': ('chat-right', f'{git}/issues/new?title={about}:+'),
    }


COLAB_BRANCH = 'colab'  # written by the deployment: copies that install the course where needed


def install_cell():
    "A cell that installs the course where it is missing, and does nothing where it is not."
    known = settings()
    extra = [
        r for r in known['course_requirements'].split() if not r.startswith(('jupyter', 'ipyk'))
    ]
    course = f'{known["lib_name"]} @ git+{known["git_url"]}@{known["branch"]}'
    wanted = ' '.join(f'"{what}"' for what in (course, *extra))
    text = '\n'.join(
        [
            '#@title Install the course where it is missing, such as in Colab',
            'import importlib.util',
            f"if importlib.util.find_spec('{known['lib_name']}') is None:",
            f'    %pip install -q {wanted}',
        ]
    )
    hidden = {'cellView': 'form', 'jupyter': {'source_hidden': True}}
    made = {'cell_type': 'code', 'id': 'install', 'metadata': hidden, 'source': text}
    return made | {'execution_count': None, 'outputs': []}


def to_run_elsewhere(nb):
    "A copy of a notebook that also runs where the course is not installed."
    first, *others = nb['cells']
    kernel = {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}
    metadata = {**nb['metadata'], 'kernelspec': kernel}
    return nb | {'cells': [first, install_cell(), *others], 'metadata': metadata}
