"""Write the tables of docs/recipe.md from the recipe's JSON schema, so that the page cannot drift from the code.

    python docs/make_recipe_page.py

The text between a line ``<!-- keys of SECTION -->`` and the next ``<!-- end -->`` is replaced; all other text stays.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parent / "recipe.md"
TOP = "top"

_TABLE = re.compile(r"(<!-- keys of (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_TYPES = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "object": "table",
}
_BOUNDS = {
    "exclusiveMinimum": "above {}", "minimum": "from {}", "exclusiveMaximum": "below {}", "maximum": "up to {}",
}  # fmt: skip


def section_of(schema: dict[str, Any], field: dict[str, Any]) -> dict[str, Any] | None:
    """The section that a field is; None for a plain key."""
    parts = [field, *field.get("allOf", []), *field.get("anyOf", [])]
    reference = next((part["$ref"] for part in parts if "$ref" in part), None)
    return schema["$defs"][reference.rpartition("/")[2]] if reference else None


def sections(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every section by name; ``top`` holds the keys above the first section."""
    found = {name: section_of(schema, field) for name, field in schema["properties"].items()}
    top = {name: field for name, field in schema["properties"].items() if found[name] is None}
    return {TOP: {"properties": top}, **{name: section for name, section in found.items() if section is not None}}


def type_text(field: dict[str, Any]) -> str:
    """A JSON type in words. "null" is left out: in TOML a key that is not set is not written."""
    if "$ref" in field:
        return "table"
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return " or ".join(f"`{json.dumps(value)}`" for value in field["enum"])
    if "anyOf" in field:
        parts = [type_text(part) for part in field["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(parts))
    if field.get("type") == "array":
        if "prefixItems" in field:
            return f"list of {len(field['prefixItems'])}, each {type_text(field['prefixItems'][0])}"
        return f"list of {type_text(field['items'])}"
    bounds = [text.format(f"{field[key]:g}") for key, text in _BOUNDS.items() if key in field]
    return " ".join([_TYPES[field["type"]], *bounds])


def default_text(name: str, field: dict[str, Any], required: list[str]) -> str:
    if name in required:
        return "must be set"
    default = field.get("default", [] if field.get("type") == "array" else {})
    return "not set" if default is None else f"`{json.dumps(default)}`"


def table(section: dict[str, Any]) -> str:
    """The Markdown table of one section's keys."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section["properties"].items():
        meaning = " ".join(field.get("description", "").replace("``", "`").replace("|", "\\|").split())
        cells = (f"`{name}`", type_text(field), default_text(name, field, section.get("required", [])), meaning)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def filled(text: str, schema: dict[str, Any]) -> str:
    """The page with every table as the schema has it.

    Raises:  ValueError where a section has no table, or a table no section
    """
    tables = {name: table(section) for name, section in sections(schema).items()}
    marked = [match[2] for match in _TABLE.finditer(text)]
    if sorted(marked) != sorted(tables):
        raise ValueError(f"tables {sorted(marked)} on the page, sections {sorted(tables)} in the schema")
    return _TABLE.sub(lambda match: f"{match[1]}{tables[match[2]]}\n{match[3]}", text)


def main() -> None:
    from torchkeep.training.recipe import schema

    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), schema()), encoding="utf-8", newline="\n")
    print(f"{PAGE.name} holds every key of the recipe")


if __name__ == "__main__":
    main()
