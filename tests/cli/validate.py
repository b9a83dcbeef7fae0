"""Validates answers against the schemas of a directory: `validate.py DIRECTORY`, with [[schema, answer], ...] on stdin.

Strictly: users must ignore fields that they do not know, but what the program says has to be in its schema. Prints what is
wrong, a line each; the exit status is 1 if anything is.
"""

import json
import pathlib
import sys

try:
    from jsonschema import Draft202012Validator, RefResolver
except ImportError:
    sys.exit("python3 has no jsonschema: install the Debian package python3-jsonschema")


def strict(schema):
    """The same schema, in which nothing but what it names may occur."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    # Conditions name only what they ask for.
    result = {key: part if key in ("if", "then", "else", "allOf") else strict(part) for key, part in schema.items()}
    if "properties" in result and result.get("type") == "object":
        result["additionalProperties"] = False
    return result


schemas = {}
for path in pathlib.Path(sys.argv[1]).glob("*.json"):
    schema = json.loads(path.read_text())
    Draft202012Validator.check_schema(schema)
    name = schema["$id"].rsplit("/", 1)[1]
    assert name == path.name and "/v1/" in schema["$id"], f"{path}: its $id is {schema['$id']}"
    schemas[schema["$id"]] = strict(schema)
by_name = {identity.rsplit("/", 1)[1].removesuffix(".json"): schema for identity, schema in schemas.items()}

wrong = 0
for name, answer in json.load(sys.stdin):
    schema = by_name[name]
    validator = Draft202012Validator(schema, resolver=RefResolver(schema["$id"], schema, store=schemas))
    for error in validator.iter_errors(answer):
        wrong = 1
        print(f"{name}: {'/'.join(map(str, error.absolute_path))}: {error.message}"[:400])
sys.exit(wrong)
