"""Draw nbs/train.svg, the moving picture of README.md: a real run of the two commands it names.

    python tools/build_cast.py                    run them (two minutes or so) and draw
    python tools/build_cast.py --max_iters 20     a short run, to try the drawing

Each line appears SPEED times sooner than it came. A browser that is asked for less motion shows the
end.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from html import escape
from itertools import groupby

from cells import ROOT

sys.path.insert(0, str(ROOT))
from transformer_course.files import write_file

COLUMNS, ROWS, LINE, SPEED, REST = 84, 10, 19, 8, 6.0  # LINE in pixels, REST in seconds
STYLE = """
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #d6deeb;
       white-space: pre }
.typed { fill: #7fdbca }
.l { opacity: 0 }
@media (prefers-reduced-motion: reduce) { * { animation: none !important } .l { opacity: 1 } }
"""


def watched(folder, words):
    "Run a command; [(seconds, line)], what was typed first."
    begin = time.monotonic()
    env = {**os.environ, 'PYTHONUNBUFFERED': '1', 'TRANSFORMER_COURSE_PROGRESS': '0'}
    command = [sys.executable, '-m', 'transformer_course', *words]
    found = [(0.0, '$ transformer-course ' + ' '.join(words))]
    how = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder, env=env)
    with subprocess.Popen(command, **how) as process:
        for line in process.stdout:
            found.append((time.monotonic() - begin, line.rstrip('\n')))
    if process.returncode:
        sys.exit(f'build_cast: {" ".join(words)} ended with status {process.returncode}')
    return [*found, (time.monotonic() - begin, '')]


def rows(line):
    "A line as a terminal shows it: what is longer than its width goes on below."
    return [line[i : i + COLUMNS] for i in range(0, max(len(line), 1), COLUMNS)]


def played(runs):
    "The lines of all runs, at the times when they are shown."
    start, shown = 0.5, []
    for lines in runs:
        for seconds, line in lines:
            shown += [(start + seconds / SPEED, row) for row in rows(line)]
        start = shown[-1][0] + 0.8
    return shown


def scrolls(shown, total):
    "Keyframes that move the lines up by one when the last row is full."
    frames = ['0% { transform: translateY(0) }']
    for at, group in groupby(enumerate(shown), key=lambda pair: pair[1][0]):
        last = max(i for i, _ in group)
        if last >= ROWS:
            y = (ROWS - 1 - last) * LINE
            frames.append(f'{100 * at / total:.2f}% {{ transform: translateY({y}px) }}')
    end = min(0, (ROWS - len(shown)) * LINE)
    frames.append(f'100% {{ transform: translateY({end}px) }}')
    move = f'animation: up {total:.1f}s step-end infinite; transform: translateY({end}px)'
    return f'@keyframes up {{ {" ".join(frames)} }}\n.up {{ {move} }}'


def draw(shown):
    "The SVG."
    total = shown[-1][0] + REST
    rules, lines = [STYLE, scrolls(shown, total)], []
    for i, (at, line) in enumerate(shown):
        at = 100 * at / total
        rules.append(f'@keyframes k{i} {{ 0% {{ opacity: 0 }} {at:.2f}%, 100% {{ opacity: 1 }} }}')
        rules.append(f'#t{i} {{ animation: k{i} {total:.1f}s step-end infinite }}')
        kind = 'l typed' if line.startswith('$') else 'l'
        y = 16 + (i + 1) * LINE
        lines.append(f'<text id="t{i}" class="{kind}" x="16" y="{y}">{escape(line)}</text>')
    width, height = COLUMNS * 8.5 + 32, ROWS * LINE + 36
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img" '
        'aria-label="transformer-course train, then transformer-course sample, in a terminal">'
        f'<style>{chr(10).join(rules)}</style>'
        f'<rect width="100%" height="100%" rx="8" fill="#11182a"/>'
        f'<svg y="8" width="{width:.0f}" height="{height - 16}"><g class="up">'
        f'{"".join(lines)}</g></svg></svg>\n'
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--max_iters', help='updates, instead of the default')
    args = parser.parse_args()
    short = ['--max_iters', args.max_iters] if args.max_iters else []
    with tempfile.TemporaryDirectory() as folder:
        train = watched(folder, ['train', *short])
        write = ['sample', '--prompt', 'ROMEO:', '--max_new_tokens', '300']
        picture = draw(played([train, watched(folder, write)]))
    write_file(ROOT / 'nbs' / 'train.svg', picture.encode())
    print(f'nbs/train.svg: {len(picture):,} bytes')


if __name__ == '__main__':
    main()
