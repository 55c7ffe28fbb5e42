"""The contract: its fields are checked, and its fingerprint changes with each of them."""

import dataclasses
import string

import pytest

import jdet.contract
from jdet.contract import Contract


def test_fingerprint_changes_with_each_field_and_implementation(monkeypatch):
    prints = {Contract().fingerprint("portable"), Contract().fingerprint("xla")}
    for field in dataclasses.fields(Contract):
        other = dataclasses.replace(Contract(), **{field.name: getattr(Contract(), field.name) * 2})
        prints.add(other.fingerprint("portable"))
    monkeypatch.setattr(jdet.contract, "REVISION", jdet.contract.REVISION + 1)
    prints.add(Contract().fingerprint("portable"))
    assert len(prints) == 3 + len(dataclasses.fields(Contract))
    assert all(len(p) == 16 and set(p) <= set(string.hexdigits.lower()) for p in prints)


def test_fingerprint_is_that_of_equal_contracts():
    assert Contract(8, 64).fingerprint("xla") == Contract(8, 64).fingerprint("xla")


def test_fingerprint_of_this_revision():
    """A tree was changed? Raise REVISION, write a "Numerics" line, and change this line."""
    assert (jdet.contract.REVISION, Contract().fingerprint("portable")) == (1, FINGERPRINT)


FINGERPRINT = "9f68d2c05d17813a"


@pytest.mark.parametrize(
    ("field", "value", "low"),
    [
        *(("leaves", value, 1) for value in (0, -1, 3, 12, 1.0, "2", None, True)),
        *(("kv_split", value, 16) for value in (0, 8, 17, 255, 256.0)),
    ],
)
def test_field_out_of_range(field, value, low):
    with pytest.raises(ValueError, match=f"{field}={value!r}; allowed: powers of two from {low}"):
        Contract(**{field: value})


@pytest.mark.parametrize("fields", [{"leaves": 8}, {"kv_split": 16}, {"kv_split": 4096}])
def test_field_in_range(fields):
    assert dataclasses.asdict(Contract(**fields)).items() >= fields.items()


def test_contract_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Contract().leaves = 2  # pyright: ignore[reportAttributeAccessIssue]
