"""YAML as one expects it: `1e-5` is a number, `no` is a word, and a key that stands twice is an error.

PyYAML reads YAML 1.1, where `1e-5` is a string and `no`, `off` and `y` are booleans. Here numbers and booleans are
those of YAML 1.2, which is also what flags of the command line are read by.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    pass


_LARGEST = 100_000
"""Values in a YAML text; a recipe has some hundreds."""
_FLOAT = re.compile(r"^[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\.inf|\.Inf|\.INF|\.nan|\.NaN|\.NAN)$")
_INT = re.compile(r"^[-+]?\d+$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), None)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", _INT, None)
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, None)


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value if not key.tag.endswith(":merge")]
    twice = sorted({str(key) for key in keys if keys.count(key) > 1})
    if twice:
        raise yaml.constructor.ConstructorError(
            None, None, f"the key '{twice[0]}' stands twice in one section", node.start_mark
        )
    loader.flatten_mapping(node)
    return yaml.constructor.BaseConstructor.construct_mapping(loader, node, deep=True)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def _size(node: yaml.Node | None, known: dict[int, int]) -> int:
    """The values in a node, with those of its aliases (`*name`, and `<<` of them) counted where they stand."""
    if node is None or id(node) in known:
        return known.get(id(node), 1)
    known[id(node)] = _LARGEST + 1  # of an alias to a node inside of which it stands, which never ends
    inside = node.value if isinstance(node, yaml.CollectionNode) else []
    each = [child for pair in inside for child in (pair if isinstance(pair, tuple) else (pair,))]
    known[id(node)] = 1 + sum(_size(child, known) for child in each)
    if known[id(node)] > _LARGEST:
        raise yaml.constructor.ConstructorError(
            None, None, f"aliases make more than {_LARGEST:,} values of it", node.start_mark
        )
    return known[id(node)]


def parse(text: str, where: str = "YAML") -> Any:
    """The value of a YAML text.

    >>> parse("{learning_rate: 1e-5, answers: [no, yes], bf16: true}")
    {'learning_rate': 1e-05, 'answers': ['no', 'yes'], 'bf16': True}
    >>> parse("{seed: 1, seed: 2}")
    Traceback (most recent call last):
    ValueError: YAML, line 1: the key 'seed' stands twice in one section
    """
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            _size(node, {})
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ValueError(f"{where}{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML ({error})") from None
    except RecursionError:
        raise ValueError(f"{where}: not YAML that can be meant: it nests too deep") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ValueError(f"{where}: {error}") from None


def read(path: str | Path) -> dict[str, Any]:
    """The mapping a YAML file holds."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = parse(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a text file") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected 'key: value' lines, got {type(content).__name__}")
    return content


def dump(content: dict[str, Any]) -> str:
    """The YAML text of plain values, keys in their order.

    >>> parse(dump({"learning_rate": 1e-5, "answers": ["no", "1"]}))
    {'learning_rate': 1e-05, 'answers': ['no', '1']}
    """
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
