"""A sentence for each figure that has none of its own, from the code that draws it.

What a figure shows is written in its cell: the kind of plot, its title, its axes with their units,
the names of its curves. `#| fig-alt: "..."` at the top of a cell says it better, and is kept. So
does a text in `tools/site/alt_texts.json`, by the cell's id, which may be longer than a line.
"""

import ast
import functools
import importlib
import inspect
import json
import re
import sys
from pathlib import Path

from cells import ROOT
from page_cells import drawn, source, statements

sys.path.insert(0, str(ROOT))
from transformer_course.course.scoreboard import MARKS, standings

KINDS = {  # what a call draws; the first that a cell calls names the figure
    'datum_walk': 'Map of the walk of one datum through the model, with this step lit',
    'plot_attention': 'Heat maps of attention weights, a row for each query, a column for each key',
    'plot_matrix': 'Heat map',
    'plot_bigram': 'Heat map of how often each character follows each other',
    'plot_graph': 'Graph with an arrow from each node that speaks to each that listens',
    'plot_room': 'A row of marks for each claim, how many times better than asked',
    'plot_hist': 'Histograms',
    'plot_bars': 'Bars',
    'plot_pictures': 'Pictures in rows',
    'plot_by_depth': 'Curves over the layers',
    'plot_losses': 'Curves',
    'imshow': 'Pictures',
    'matshow': 'Heat map',
    'barh': 'Bars',
    'bar': 'Bars',
    'hist': 'Histogram',
    'scatter': 'Points',
    'quiver': 'Arrows',
    'step': 'Curves',
    'semilogy': 'Curves',
    'plot': 'Curves',
    'figure': 'Drawing',
}
TEXTS = Path(__file__).resolve().parent / 'site' / 'alt_texts.json'
WRITTEN = json.loads(TEXTS.read_text(encoding='utf-8'))  # id of a cell -> what its figure shows
ROOMS = 'plots', 'matrices', 'graphs', 'pictures', 'course.walk'
LABELS = {'set_title': 'title', 'set_xlabel': 'xlabel', 'set_ylabel': 'ylabel', 'suptitle': 'title'}
SHOWN = 'curves', 'bars', 'samples', 'hlines', 'levels', 'rows', 'titles', 'label', 'lit', 'legend'


@functools.cache
def drawing_functions():
    "The signatures of the course's own functions that draw, by name."
    found = {}
    for room in ROOMS:
        module = importlib.import_module(f'transformer_course.{room}')
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name in KINDS:
                found[name] = inspect.signature(function)
    return found


class Reader:
    "Reads what a cell's code says of its figure; `known` are the notebook's assignments."

    def __init__(self, known, functions):
        self.known, self.functions = known, functions
        self.kinds, self.said, self.depth = [], {}, 0

    def texts(self, node):
        "The words that an expression stands for, as far as the code shows them."
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else []
        if isinstance(node, ast.JoinedStr):
            parts = [p.value if isinstance(p, ast.Constant) else '…' for p in node.values]
            return [''.join(map(str, parts))]
        if isinstance(node, ast.Name) and node.id in self.known:
            value = self.known.pop(node.id)  # a name in its own value has no words
            words = self.texts(value)
            self.known[node.id] = value
            return words
        if isinstance(node, (ast.List, ast.Tuple)):
            return [text for item in node.elts for text in self.texts(item)]
        if isinstance(node, (ast.Dict, ast.DictComp)):
            keys = node.keys if isinstance(node, ast.Dict) else [node.key]
            return [text for key in keys if key for text in self.texts(key)]
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'dict':
            return [k.arg for k in node.keywords if k.arg]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return self.texts(node.left) + self.texts(node.right)
        return []

    def keywords(self, call):
        "The keyword arguments of a call, those of a named dict(...) among them."
        for keyword in call.keywords:
            value = keyword.value
            if keyword.arg:
                yield keyword.arg, value
                continue
            value = self.known.get(value.id) if isinstance(value, ast.Name) else value
            if isinstance(value, ast.Call):
                yield from ((k.arg, k.value) for k in value.keywords if k.arg)

    def say(self, what, node):
        "Note what an argument says of the figure."
        if what in ('title', 'xlabel', 'ylabel', *SHOWN):
            kept = self.said.setdefault('shown' if what in SHOWN else what, [])
            kept += [t for t in self.texts(node) if t.strip() and t not in kept]

    def inside(self, function, call):
        "Read the body of a function of the notebook, its parameters being what the call gives."
        names = [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]
        outside = self.known
        self.known = {name: value for name, value in outside.items() if name not in names}
        self.known |= dict(zip(names, call.args)) | dict(self.keywords(call))
        self.depth += 1
        self.read(function.body)
        self.depth -= 1
        self.known = outside

    def call(self, call):
        "Read one call."
        name = getattr(call.func, 'id', None) or getattr(call.func, 'attr', '')
        if name in self.functions and self.depth < 2:
            self.inside(self.functions[name], call)
        if name in KINDS:
            self.kinds.append(name)
        given = dict(self.keywords(call))
        if name in drawing_functions():
            asked = drawing_functions()[name]
            named = list(asked.parameters)
            given = dict(zip(named, call.args)) | given
            for what, parameter in asked.parameters.items():
                if what in ('xlabel', 'ylabel') and isinstance(parameter.default, str):
                    given.setdefault(what, ast.Constant(parameter.default))
        if name in LABELS and call.args:
            given = {LABELS[name]: call.args[0]}
        if name == 'datum_walk' and call.args:
            given = {'lit': call.args[0]}
        for what, node in given.items():
            self.say(what, node)

    def read(self, body):
        "Read statements; what runs through a loop has no words of its own."
        nodes = [inner for node in body for inner in ast.walk(node)]
        loops = [n.target for n in nodes if isinstance(n, (ast.For, ast.comprehension))]
        run = {n.id for t in loops for n in ast.walk(t) if isinstance(n, ast.Name)}
        outside = self.known
        self.known = {name: value for name, value in outside.items() if name not in run}
        for inner in nodes:
            if isinstance(inner, ast.Call):
                self.call(inner)
        self.known = outside

    def sentence(self):
        "What was read, as a sentence; empty where the code does not say what it draws."
        said = {key: ', '.join(texts[:8]) for key, texts in self.said.items() if texts}
        if not self.kinds or not said:
            return ''
        text = KINDS[min(self.kinds, key=list(KINDS).index)]
        axes = [' and '.join(self.said[key][:3]) for key in ('ylabel', 'xlabel') if key in said]
        text += f' of {" against ".join(axes)}' if axes else ''
        if 'title' in said:
            text += f' (“{said["title"]}”)'
        return f'{text}: {said["shown"]}.' if 'shown' in said else f'{text}.'


def scores(cell):
    "What a scoreboard shows, model by model, from the records it is drawn from; or nothing."
    calls = [node.value for node in statements(cell) if isinstance(node, ast.Expr)]
    named = [c for c in calls if getattr(getattr(c, 'func', 0), 'id', '') == 'scoreboard']
    if not named:
        return ''
    chapter = named[0].args[0].value
    rows = standings(chapter)
    models = ', '.join(f'{r.name} {r.median:.3f}' for r in rows if r.chapter != chapter[:2])
    own = ', '.join(f'{r.name} {r.median:.3f}' for r in rows if r.chapter == chapter[:2])
    before = f'{models}. ' if models else ''
    new = f'New here, in orange: {own}. ' if own else ''
    marks = ' and the '.join(r.name for r in rows if r.name in MARKS)
    drawn_through = f'Upright lines mark the {marks}.' if marks else ''
    start = 'The scoreboard: a dot for each model, the held-out loss in nats per character. '
    return f'{start}{before}{new}{drawn_through}'.strip()


def assigned(cells):
    "The values and the functions that a notebook's cells define, as syntax trees."
    values, functions = {}, {}
    for node in (node for cell in cells for node in statements(cell)):
        if isinstance(node, ast.FunctionDef):
            functions[node.name] = node
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = node.value
    return values, functions


def plain(text):
    "Prose without its marks."
    text = re.sub(r'<!--.*?-->|<[^>]+>', '', text, flags=re.S)
    text = re.sub(r'\[([^\]]+)\]\([^)]*\)', r'\1', text)
    return re.sub(r'\s+', ' ', re.sub(r'[`"*$\\#|>]', '', text)).strip()


def last_sentence(text):
    "The last sentence of a piece of prose."
    paragraphs = [p for p in text.split('\n\n') if not re.match(r'\s*(#|\||---|:::|<)', p)]
    ends = re.split(r'(?<=[.:?!]) +(?=[A-Z])', plain(paragraphs[-1])) if paragraphs else ['']
    return re.sub(r':$', '.', ends[-1])


def shortened(text, most=300):
    "A text that ends like a sentence, and where it is long at a word."
    if len(text) > most:
        text = f'{text[:most].rpartition(" ")[0]} …'
    return text if text[-1] in '.?!…' else f'{text}.'


def alt_texts(nb):
    "Give each figure without a description a sentence; the cells are as nbdev prepared them."
    values, functions, heading, prose, seen = {}, {}, '', '', set()
    for cell in nb['cells']:
        text = source(cell)
        for known, new in zip((values, functions), assigned([cell])):
            known |= new
        if cell['cell_type'] == 'raw':
            heading = plain((re.findall(r'^title: (.+)$', text, re.M) or [''])[0]).strip("'")
        if cell['cell_type'] == 'markdown':
            heading = plain([heading, *re.findall(r'^#+ (.+?)(?: \{.*\})?$', text, re.M)][-1])
            prose = last_sentence(text) or prose
        if not drawn(cell) or 'fig-alt:' in text:
            continue
        alt = WRITTEN.get(cell.get('id')) or scores(cell)
        if not alt:
            reader = Reader(values, functions)
            reader.read(statements(cell))
            alt = reader.sentence() or f'Figure of the section “{heading}”: {prose}'
            if alt in seen or len(alt) < 50:
                alt = f'{alt[:-1]}, in the section “{heading}”: {prose}'
            alt = shortened(plain(alt))
        seen.add(alt)
        cell['source'] = f'#| fig-alt: "{alt}"\n{text}'
