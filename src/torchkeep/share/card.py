"""PLACEHOLDER by the lead: the sharing helper writes this file anew."""

from typing import Any


def model_card(facts: Any) -> str:
    return f"# {facts['name']}\n"
