"""rank_pattern and alpha_pattern: matched as PEFT matches them, and never without end."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from linlora import CorruptFileError
from linlora.formats.patterns import Patterns

PIECES = st.sampled_from(
    ["a", "b", "ab", "q", r"\.", ".", "^", "a|b", "(a)", "a*", ".*", "[ab]+", "b?", "$", r"\d", "0"]
)
PATTERN = st.lists(PIECES, min_size=1, max_size=5).map("".join)
LAYER = st.lists(st.sampled_from(["a", "b", "ab", "q", "0", "1"]), min_size=1, max_size=5).map(".".join)


@settings(max_examples=300, deadline=None)
@given(patterns=st.lists(PATTERN, max_size=4, unique=True), layers=st.lists(LAYER, min_size=1, max_size=4))
def test_the_first_pattern_that_matches_counts_as_in_peft(patterns, layers):
    values = {pattern: place for place, pattern in enumerate(patterns)}
    try:
        expected = [values.get(get_pattern_key(values.keys(), layer), -1) for layer in layers]
    except re.error:
        return
    found = Patterns(values, "config")
    assert [found.get(layer, -1) for layer in layers] == expected


@pytest.mark.parametrize(
    "pattern", ["([a-z.0-9]+)+!", "(a|aa|a.)+(b|c)+(x.*)*y", "(.*)(.*)(.*)(.*)(.*)(.*)\\1\\3z", "(x+x+)+y"]
)
def test_a_pattern_without_end_is_refused_by_name(pattern):
    start = time.process_time()
    found = Patterns({pattern: 1}, "adapter_config.json: alpha_pattern")
    for layer in ("bert.encoder.layer.0.query", "a" * 60, "x" * 60, "a.b" * 40):
        try:
            assert found.get(layer, 0) == 0
        except CorruptFileError as error:
            assert "adapter_config.json: alpha_pattern: the pattern" in str(error)  # noqa: PT017
    assert time.process_time() - start < 30  # re takes years


@pytest.mark.parametrize("pattern", ["(", "[", "*", ".a" * 9_999, "(" * 5000, "(?P<n>a)(?P<n>b)"], ids=lambda p: p[:9])
def test_what_is_no_expression_is_refused_by_name(pattern):
    with pytest.raises(CorruptFileError, match="rank_pattern: "):
        Patterns({pattern: 1}, "rank_pattern")
