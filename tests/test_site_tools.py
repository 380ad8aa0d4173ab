"What the site makes of notebooks: folds, rows, sentences for figures, links, copies, the order."

import base64
import html
import io
import json
import re
import textwrap
from collections import Counter

import pytest
from cells import ROOT, notebook_paths, read_cells, settings

from alt_texts import WRITTEN, alt_texts
from chapter_order import chapters, in_order
from dark_figures import dark_drawings, for_dark
from page_cells import (
    drawn,
    fold_drawing,
    folds,
    install_cell,
    is_check,
    measured_row,
    measured_rows,
    open_imports,
    source,
    to_run_elsewhere,
)
from page_frames import page_of
from prose_links import chapter_names, linked

from transformer_course.course.scoreboard import standings

every = pytest.mark.parametrize('path', notebook_paths(), ids=lambda path: path.stem)
PICTURE = {'output_type': 'display_data', 'data': {'image/png': ''}}


def code(text, *outputs):
    return {'cell_type': 'code', 'source': text, 'outputs': list(outputs)}


def prose(text):
    return {'cell_type': 'markdown', 'source': text}


def test_imports_follow_the_opening_words():
    early = code("claims = Claims('x')")
    cells = [prose('# T'), code('#| default_exp x'), code('#| export\nimport math'), early]
    nb = {'cells': [*cells, prose('By the end'), code('#| hide\nimport os'), code('x = 1')]}
    open_imports(nb)
    found = [source(cell) for cell in nb['cells']]
    fold = '#| course-fold: Setup\n'
    wanted = ['# T', '#| default_exp x', 'By the end', f'{fold}import math']
    assert found == [*wanted, f"{fold}claims = Claims('x')", f'{fold}import os', 'x = 1']


def test_no_fold_of_what_is_not_shown():
    "A page that shows no code has no Setup: its imports are not there to be copied."
    cells = [prose('# T'), prose('By the end'), code('#| echo: false\nimport math'), prose('x')]
    nb = {'cells': [dict(cell) for cell in cells]}
    open_imports(nb)
    assert nb['cells'] == cells and len(folds(nb['cells'])) == len(cells)
    example = [prose('# T'), prose('In use:'), code('import math'), code('math.pi')]
    nb = {'cells': [dict(cell) for cell in example]}
    open_imports(nb)
    assert nb['cells'] == example, 'an example without its imports'


REFUSED = (
    "try:\n    f(1)\nexcept ValueError as e:\n    print(e)\nelse:\n    raise AssertionError('x')"
)


def test_what_is_a_check():
    "Tests of messages; not a lesson's own assertion, nor a cell that prints or draws besides."
    assert is_check(code(REFUSED)) and is_check(code('x = 2\nrefused(f, x)'))
    assert is_check(code('def refused(f):\n' + textwrap.indent(REFUSED, '    ')))
    assert not is_check(code('assert f(1) == 2')) and not is_check(code('refused(f, 1)\nprint(2)'))
    assert not is_check(code('refused(f, 1)', PICTURE))


def test_cells_of_one_fold_share_it():
    made = folds([code('#| course-fold: Setup\nimport a'), code(REFUSED), code('refused(f)')])
    kinds = [cell['source'] for cell in made if cell['cell_type'] == 'markdown']
    assert [re.sub(r'<summary>.*', '', kind) for kind in kinds] == [
        '<details class="fold setup">',
        '</details>',
        '<details class="fold checks">',
        '</details>',
    ]


def test_only_drawing_is_folded():
    "Not where a later cell needs what it made."
    lines = (
        'y = [1]\nfig, ax = figure()\nax.plot(y)\nax.set_xlabel("a")\nax.set_ylabel("b")\nax.grid()'
    )
    alone, needed = [code(lines, PICTURE)], [code(lines, PICTURE), code('print(y)')]
    fold_drawing(alone)
    fold_drawing(needed)
    assert 'code-fold: true' in source(alone[0]) and 'fold' not in source(needed[0])


def test_a_row_is_what_was_printed():
    from transformer_course.course.records import KEYS, line

    kept = dict(claim='A2', name='a' * 60, value=0.5, unit='share', threshold={'at_least': 0.25})
    record = dict.fromkeys(KEYS) | kept | dict(verdict='holds')
    short = measured_row(line(record | dict(name='loops & <b>')), {'A2'}, 'ledger.html')
    assert '<a href="ledger.html#A2">A2</a>' in short and 'loops &amp; &lt;b&gt;' in short
    for part in ('0.5000 share', 'asked: at least 0.25', '"verdict holds">holds'):
        assert part in short
    assert measured_row('A2 or not A2, that is the question', {'A2'}, '') is None


def printed(cells):
    "The lines that `measured` printed, by the look of them."
    texts = [''.join(out.get('text', '')) for c in cells for out in c.get('outputs', [])]
    line = r'[A-Z]\d+ +\S.* (holds|weak|does not hold|recorded)'
    return [l for text in texts for l in text.splitlines() if re.fullmatch(line, l)]


@every
def test_every_measured_line_becomes_a_row(path):
    nb = {'cells': read_cells(path)}
    lines = printed(nb['cells'])
    measured_rows(nb, set(), '')
    outputs = [out.get('data', {}) for cell in nb['cells'] for out in cell.get('outputs', [])]
    made = ''.join(''.join(data.get('text/html', '')) for data in outputs)
    assert made.count('class="verdict') == len(lines)
    assert not printed(nb['cells'])


@every
def test_every_figure_has_a_sentence(path):
    "One that says what it shows, in words of its own; no two of a notebook say the same."
    nb = json.loads(path.read_text(encoding='utf-8'))
    alt_texts(nb)
    found = [source(cell) for cell in nb['cells'] if drawn(cell)]
    said = [re.match(r'#\| fig-alt: "(.*)"\n', text) for text in found]
    assert all(said), 'a figure without a sentence'
    texts = [match[1] for match in said]
    for text in texts:
        assert len(text.split()) >= 5 and len(text) >= 30, f'this says little: {text!r}'
        assert text[0].isupper() and not re.search(r'["`]|\(\)|“”', text), text
    assert len(set(texts)) == len(texts), 'two figures say the same'


def test_sentences_follow_what_a_cell_knows():
    "A name means what it meant there, a parameter what it was given, a loop's name nothing."
    draws = "def show(what):\n    plot_losses(all, ylabel=what, xlabel='place in the chain')"
    first = code(
        "axis = dict(xlabel='updates taken')\nplot_losses(c, **axis, ylabel='loss')", PICTURE
    )
    loop = code("for name in many:\n    ax.plot(x, label=name)\nax.set_title('t')", PICTURE)
    then = code("axis = dict(xlabel='examples')\nwhat = 'nothing'")
    before = code("name = 'a record'")
    last = code("show('squared error')", PICTURE)
    nb = {'cells': [code(draws), first, before, loop, then, last]}
    alt_texts(nb)
    found = [source(cell).splitlines()[0] for cell in nb['cells'] if drawn(cell)]
    assert 'against updates taken' in found[0] and 'examples' not in found[0]
    assert 'record' not in found[1] and 'squared error against place in the chain' in found[2]


def test_a_scoreboard_is_told_in_numbers():
    "As the picture has them: those before, those of the chapter, the two marks."
    nb = {'cells': [code("scoreboard('03_attention');", PICTURE)]}
    alt_texts(nb)
    told = source(nb['cells'][0]).splitlines()[0]
    rows = standings('03_attention')
    assert all(f'{r.name} {r.median:.3f}' in told for r in rows)
    before, own = told.split('New here, in orange: ')
    assert 'RNN' in before and own.startswith('one head') and '5-gram and the RNN' in own


def test_written_sentences_belong_to_figures():
    "Each text in tools/site/alt_texts.json is that of one figure, and is what its page says."
    cells = [c for path in notebook_paths() for c in read_cells(path)]
    shown = Counter(c['id'] for c in cells if c['cell_type'] == 'code' and drawn(c))
    assert not [id for id in WRITTEN if shown[id] != 1], 'of no figure, or of several'
    id = next(iter(WRITTEN))
    nb = {'cells': [code('plot(1)', PICTURE) | {'id': id}]}
    alt_texts(nb)
    assert source(nb['cells'][0]).startswith(f'#| fig-alt: "{WRITTEN[id]}"\n')


def blank_share(png):
    "The largest share of a picture's height or width that is a strip of one colour at an edge."
    import matplotlib.image

    shown = matplotlib.image.imread(io.BytesIO(png), format='png')[..., :3]
    shares = []
    for pixels in (shown, shown.transpose(1, 0, 2)):
        busy = [i for i, row in enumerate(pixels) if abs(row - shown[0, 0]).max() > 0.02]
        edges = (busy[0], len(pixels) - 1 - busy[-1]) if busy else (len(pixels), 0)
        shares.append(max(edges) / len(pixels))
    return max(shares)


@every
def test_figures_have_no_blank_strips(path):
    for cell in read_cells(path):
        for out in cell.get('outputs', []):
            if 'image/png' in out.get('data', {}):
                share = blank_share(base64.b64decode(''.join(out['data']['image/png'])))
                assert share <= 0.25, f'{share:.0%} blank: {cell["source"][:80]!r}'


def test_prose_is_linked():
    names = {'01': '01_bigram.ipynb', '07': '07_gpt.ipynb'}
    text = '`x = chapter 01`, [chapter 07](a), chapters 01 and 07, chapter 99. arXiv 1706.03762'
    one, seven = '[01](../01_bigram.ipynb)', '[07](../07_gpt.ipynb)'
    paper = '[arXiv 1706.03762](https://arxiv.org/abs/1706.03762)'
    wanted = f'`x = chapter 01`, [chapter 07](a), chapters {one} and {seven}, chapter 99. {paper}'
    assert linked(text, '03', '../', names) == wanted
    assert linked('# Chapter 01', '', '', names) == '# Chapter 01'
    assert linked('of chapter 01', '01', '', names) == 'of chapter 01'
    assert 'torch.nn.functional.softmax.html' in linked('`F.softmax`', '', '', names)
    assert (
        linked('[[`Claims`](c.html#claims)](claims.ipynb)', '', '', {})
        == '[`Claims`](claims.ipynb)'
    )
    assert linked('`F.no_such_name`', '', '', names) == '`F.no_such_name`'


def test_each_number_means_one_chapter():
    names = chapter_names()
    assert {path.name[:2] for path in (ROOT / 'nbs').glob('[0-9]*.ipynb')} == names.keys()
    assert names['09'] == '09_training.ipynb'


def test_the_order_of_one_number():
    "What is built on comes first; what nothing is said of, by the front page, then the alphabet."
    assert in_order(['b', 'a', 'c'], {'a': {'b'}, 'b': set(), 'c': set()}, {}) == ['b', 'a', 'c']
    assert in_order(['a', 'b'], {'a': set(), 'b': set()}, {'b': 0}) == ['b', 'a']
    names = [name for _, name in chapters(ROOT / 'nbs')]
    assert names.index('17_sets.ipynb') < names.index('17_alphafold.ipynb')
    assert names.index('15_sound.ipynb') < names.index('15_speech.ipynb')


def test_the_search_knows_pages_that_exist():
    words = json.loads((ROOT / 'tools/site/words.json').read_text(encoding='utf-8'))
    own = {page_of(path) for path in notebook_paths()}
    assert not words['pages'].keys() - own, 'tools/site/words.json has words for pages long gone'


def run_install(monkeypatch, there):
    "What the first cell of a copy asks pip for, with or without the course."
    import importlib.util

    from IPython.core.inputtransformer2 import TransformerManager

    text = TransformerManager().transform_cell(install_cell()['source'])
    asked = []

    class Shell:
        def run_line_magic(self, name, line):
            asked.append((name, line))

    spec = lambda name: object() if there else None
    monkeypatch.setattr(importlib.util, 'find_spec', spec)
    exec(compile(text, 'cell', 'exec'), {'get_ipython': Shell})
    return asked


def test_a_copy_installs_the_course_where_it_is_missing(monkeypatch):
    assert run_install(monkeypatch, there=True) == []
    ((magic, line),) = run_install(monkeypatch, there=False)
    assert magic == 'pip' and f'git+{settings()["git_url"]}@' in line and 'scikit-learn' in line
    assert 'jupyterlab' not in line and 'ipykernel' not in line  # Colab has its own


@every
def test_copies_are_the_notebooks_and_one_cell(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    copy = to_run_elsewhere(nb)
    first, install, *others = copy['cells']
    assert [first, *others] == nb['cells'] and install['cell_type'] == 'code'
    assert install['metadata']['jupyter'] == {'source_hidden': True} and len(nb['cells']) > 1


def test_a_picture_is_shown_at_its_size_and_stored_small():
    "Twice the dots, the same size; a palette where that is smaller."
    import matplotlib
    from execute import smaller
    from page_frames import size_of

    matplotlib.use('agg')
    from transformer_course.figures import figure

    fig, ax = figure(width=4, height=2)
    ax.plot([1, 2, 3])
    made = io.BytesIO()
    fig.savefig(made, dpi=220)
    png = base64.b64encode(made.getvalue()).decode()
    packed = base64.b64decode(smaller(png))
    assert len(packed) < 0.8 * len(made.getvalue()) and packed[25] == 3  # 3: it has a palette
    assert size_of(packed[:1500]) == size_of(made.getvalue()) == (440, 220)
    assert smaller(base64.b64encode(packed).decode()).strip() == base64.b64encode(packed).decode()


def drawn_png(draw):
    "A figure of the course as the notebooks store it."
    import matplotlib

    matplotlib.use('agg')
    from transformer_course.figures import figure, style

    with style():
        fig, ax = figure(width=3, height=2)
        draw(ax)
        made = io.BytesIO()
        fig.savefig(made, dpi=220)
    return made.getvalue()


def test_a_drawing_has_a_dark_version():
    "No paper, light text, the same hue for each name; a picture has none."
    from PIL import Image

    from transformer_course.figures import COLORS

    def draw(ax):
        for i, color in enumerate(COLORS):
            ax.barh(i, 1, color=color)
        ax.set_title('all of them')

    png = drawn_png(draw)
    before, after = (Image.open(io.BytesIO(p)) for p in (png, for_dark(png)))
    assert before.size == after.size and after.mode == 'P'
    before, after = before.convert('RGB'), after.convert('RGBA')
    assert after.getpixel((3, 3))[3] == 0, 'paper is left'
    for color in COLORS[:-1]:
        ink = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
        places = [(x, y) for x in (300,) for y in range(before.height)]
        ((r, g, b, a),) = {after.getpixel(p) for p in places if before.getpixel(p) == ink}
        order = lambda c: sorted(range(3), key=lambda i: c[i])
        assert a == 255 and order(ink)[0] == order((r, g, b))[0] and max(r, g, b) > 180
    text = after.crop((0, 0, 300, 40)).getcolors(2**16)
    assert all(min(c[:3]) > 230 for _, c in text if c[3] > 40), 'dark letters'

    photo = drawn_png(lambda ax: ax.imshow([[0, 1], [2, 3]], cmap='magma', aspect='auto'))
    assert for_dark(photo) is None


def test_only_what_is_ink_gets_a_dark_version(tmp_path):
    "A page keeps its pictures; the two versions have the same words and the same size."
    png = base64.b64encode(drawn_png(lambda ax: ax.plot([1, 2]))).decode()
    image = f'<img alt="A line." src="data:image/png;base64,{png}" width="3" class="img-fluid">'
    page = f'{image}<div class="ink"><div>{image}</div></div><div>{image}</div>'
    found = dark_drawings(page, tmp_path / 'dark', '../dark')
    (file,) = (tmp_path / 'dark').iterdir()
    assert found.count('<img') == 4 and found.startswith(image) and found.endswith(f'{image}</div>')
    dark = f'<img alt="A line." src="../dark/{file.name}" loading="lazy" width="3"'
    assert f'{dark} class="img-fluid on-dark">' in found and 'class="img-fluid on-light">' in found


def test_the_moving_picture_cuts_nothing_off():
    "A long line goes on in the next row, and the rows are as wide as the picture."
    from build_cast import COLUMNS, draw, played

    long = ''.join(chr(97 + i % 26) for i in range(2 * COLUMNS + 5))
    shown = played([[(0.0, '$ train'), (8.0, long), (8.0, '')], [(0.0, '$ sample')]])
    assert [line for _, line in shown][1:4] == [long[:COLUMNS], long[COLUMNS:-5], long[-5:]]
    assert [line for _, line in shown][4:] == ['', '$ sample']
    picture = draw(shown)
    written = re.findall(r'<text [^>]*>([^<]*)</text>', (ROOT / 'nbs' / 'train.svg').read_text())
    assert max(map(len, map(html.unescape, written))) <= COLUMNS
    assert any(line.endswith('parameters') for line in written), 'a line is cut off'
    assert (
        re.search(r'viewBox="0 0 (\d+)', picture)[1]
        == re.search(r'viewBox="0 0 (\d+)', (ROOT / 'nbs' / 'train.svg').read_text())[1]
    )
