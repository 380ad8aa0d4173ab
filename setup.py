"Package metadata, read from `settings.ini`"

from configparser import ConfigParser
from pathlib import Path
import shlex

import setuptools

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here / 'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']
minor = lambda version: tuple(int(part) for part in version.split('.'))
pythons = [v for v in ('3.10', '3.11', '3.12', '3.13') if minor(v) >= minor(cfg['min_python'])]
extra = lambda name: shlex.split(cfg[f'{name}_requirements'])
readme = here / 'README.md'

setuptools.setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    author=cfg['author'],
    url=cfg['git_url'],
    license='Apache-2.0',
    classifiers=[
        'Development Status :: 3 - Alpha',
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ]
    + [f'Programming Language :: Python :: {v}' for v in pythons],
    packages=setuptools.find_packages(include=[cfg['lib_path'], cfg['lib_path'] + '.*']),
    package_data={cfg['lib_name']: ['course/*.json', 'course/runs/*.json']},
    install_requires=shlex.split(cfg['requirements']),
    extras_require={name: extra(name) for name in ('course', 'dev', 'bench')},
    python_requires='>=' + cfg['min_python'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
