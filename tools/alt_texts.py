"""A sentence for each figure that has none of its own, from the code that draws it.

What a figure shows is written in its cell: the kind of plot, its title, its axes with their units,
the names of its curves. `#| fig-alt: "..."` at the top of a cell says it better, and is kept.
"""

import ast
import functools
import importlib
import inspect
import re

from page_cells import drawn, source, statements

KINDS = {  # what a call draws; the first that a cell calls names the figure
    'datum_walk': 'Map of the walk of one datum through the model, with this step lit',
    'plot_attention': 'Heat maps of attention weights, a row for each query, a column for each key',
    'plot_matrix': 'Heat map',
    'plot_bigram': 'Heat map of how often each character follows each other',
    'plot_graph': 'Graph with an arrow from each node that speaks to each that listens',
    'plot_room': 'Map of a room with what is in it',
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

    def call(self, call):
        "Read one call."
        name = getattr(call.func, 'id', None) or getattr(call.func, 'attr', '')
        if name in self.functions and self.depth < 2:
            self.depth += 1
            self.read(self.functions[name].body)
            self.depth -= 1
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
        "Read statements."
        for node in body:
            for inner in ast.walk(node):
                if isinstance(inner, ast.Call):
                    self.call(inner)

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
    values, functions = assigned(nb['cells'])
    heading, prose, seen = '', '', set()
    for cell in nb['cells']:
        text = source(cell)
        if cell['cell_type'] == 'raw':
            heading = plain((re.findall(r'^title: (.+)$', text, re.M) or [''])[0]).strip("'")
        if cell['cell_type'] == 'markdown':
            heading = plain([heading, *re.findall(r'^#+ (.+?)(?: \{.*\})?$', text, re.M)][-1])
            prose = last_sentence(text) or prose
        if not drawn(cell) or 'fig-alt:' in text:
            continue
        reader = Reader(values, functions)
        reader.read(statements(cell))
        alt = reader.sentence() or f'Figure of the section “{heading}”: {prose}'
        if alt in seen or len(alt) < 50:
            alt = f'{alt[:-1]}, in the section “{heading}”: {prose}'
        seen.add(alt)
        alt = shortened(plain(alt))
        cell['source'] = f'#| fig-alt: "{alt}"\n{text}'
