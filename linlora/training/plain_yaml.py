"""YAML 1.2 by ruamel.yaml, safe and plain: `1e-5` is a number, `no` a word, a key that stands twice an error.

Flags of the command line are read by the same rule. A date is a word. Aliases whose values multiply are refused.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import CollectionNode, Node

_LARGEST = 100_000
"""Values in a YAML text; a recipe has some hundreds."""


class _Constructor(SafeConstructor):
    pass


_Constructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


def _yaml() -> YAML:
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Constructor
    yaml.default_flow_style, yaml.sort_base_mapping_type_on_output, yaml.width = False, False, 100  # type: ignore[assignment]
    return yaml


def parse(text: str, where: str = "YAML") -> Any:
    """The value of a YAML text.

    >>> parse("{learning_rate: 1e-5, answers: [no, yes], bf16: true}")
    {'learning_rate': 1e-05, 'answers': ['no', 'yes'], 'bf16': True}
    >>> parse("{seed: 1, seed: 2}")
    Traceback (most recent call last):
    ValueError: YAML, line 1: found duplicate key "seed" with value "2" (original value: "1")
    """
    yaml = _yaml()
    try:
        node = yaml.compose(text)
        _check_size(node, {})
        return None if node is None else yaml.constructor.construct_document(node)
    except MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ValueError(f"{where}{line}: {error.problem}") from None
    except YAMLError as error:
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
    if content is None:
        raise ValueError(f"{path} is empty: expected 'key: value' lines")
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected 'key: value' lines, got {type(content).__name__}")
    return content


def dump(content: dict[str, Any]) -> str:
    """The YAML text of plain values, keys in their order.

    >>> parse(dump({"learning_rate": 1e-5, "answers": ["no", "1", "2020-01-01"]}))
    {'learning_rate': 1e-05, 'answers': ['no', '1', '2020-01-01']}
    """
    file = io.StringIO()
    _yaml().dump(content, file)
    return file.getvalue()


def _check_size(node: Node | None, known: dict[int, int]) -> int:
    """How many values a node holds, those of an alias (`*name`, and `<<` of it) counted wherever it stands."""
    if node is None or id(node) in known:
        return known.get(id(node), 1)
    known[id(node)] = _LARGEST + 1  # an alias to what it stands in never ends
    inside = node.value if isinstance(node, CollectionNode) else []
    each = [child for pair in inside for child in (pair if isinstance(pair, tuple) else (pair,))]
    known[id(node)] = 1 + sum(_check_size(child, known) for child in each)
    if known[id(node)] > _LARGEST:
        raise MarkedYAMLError(problem=f"aliases make more than {_LARGEST:,} values", problem_mark=node.start_mark)
    return known[id(node)]
