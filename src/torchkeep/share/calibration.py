"""PLACEHOLDER by the lead: the evaluate helper writes this file anew."""
from typing import Any


def calibrated(logits: Any, labels: Any, loss: str) -> Any:
    return {}
