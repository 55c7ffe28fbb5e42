"""An H100 to compile for, without one."""

import pathlib

import pytest

from jdet.certify import without_device

TARGET = pathlib.Path(__file__).with_name("h100.txtpb")


@pytest.fixture(scope="session")
def on_h100():
    """on_h100(tree): its arrays as shapes on one H100."""
    return without_device(TARGET.read_text())
