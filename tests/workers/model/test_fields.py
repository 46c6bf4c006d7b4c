"""Checked access to JSON fields: null is missing, booleans are no numbers, keys are dotted."""

import pytest

from penstock.workers.errors import ModelError
from penstock.workers.model.fields import FieldReader


def test_values_and_defaults():
    fields = FieldReader({"a": 3, "b": None, "c": 1, "d": {"e": False}}, "f.json")
    assert fields.integer("a", 0, 5) == 3
    assert fields.integer("b", 0, 5, default=2) == 2
    assert fields.number("c", 0, 5) == 1.0
    assert fields.section("d").boolean("e", default=True) is False
    assert fields.boolean("b", default=True) is True


def test_null_and_missing_are_two_things_where_a_value_is_optional():
    fields = FieldReader({"a": 3, "b": None}, "f.json")
    assert fields.optional_integer("a", 0, 5, default=4) == 3
    assert fields.optional_integer("b", 0, 5, default=4) is None
    assert fields.optional_integer("c", 0, 5, default=4) == 4
    assert fields.optional_integer("c", 0, 5, default=None) is None
    assert fields.optional_number("a", 0, 5) == 3.0
    assert fields.optional_number("b", 0, 5, default=4.0) is None
    with pytest.raises(ModelError, match=r"f.json: a: 3 is not in 4 .. 5"):
        fields.optional_number("a", 4, 5)


def test_errors_carry_the_dotted_key():
    inner = FieldReader({"d": {"e": "x"}}, "f.json").section("d")
    with pytest.raises(ModelError, match=r"f.json: d.e: 'x' is not an integer"):
        inner.integer("e", 0, 5)
    with pytest.raises(ModelError, match=r"f.json: d.z: missing"):
        inner.number("z", 0, 5)
