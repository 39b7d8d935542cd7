"""Recipes are scripts: their folder goes on the path, as it does when python runs one."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
sys.path.insert(0, str(RECIPES))


@pytest.fixture
def tokenizer():
    from pretrain_tiny import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def offline(monkeypatch):
    """No test may look for the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
