"""Reading a recipe's YAML without guessing: what YAML 1.1 or pydantic would quietly take for
something else is an error."""

from difflib import get_close_matches
from typing import Any

import yaml
from pydantic import BaseModel


class Loader(yaml.SafeLoader):
    """No key twice in a mapping, of which YAML keeps the last; no 1:30, which it reads as 90."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        """An integer or a float, written in decimal."""
        text = self.construct_scalar(node)
        if ":" in text:
            raise yaml.constructor.ConstructorError(
                None, None, f"'{text}' is no plain number", node.start_mark
            )
        return (
            self.construct_yaml_float(node)
            if node.tag.endswith("float")
            else self.construct_yaml_int(node)
        )


for kind in ("int", "float"):
    Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.construct_number)


def refuse_conversion(value: Any, takes_bool: bool) -> None:
    """Refuses what would be turned into something else: true or "3" into a number, 1 or "yes" into
    true.

    Raises:
        ValueError: saying which.
    """
    if takes_bool and not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    for part in value if isinstance(value, list | tuple) else [value]:
        if isinstance(part, bool) and not takes_bool:
            raise ValueError(
                f"{str(part).lower()} is no value of this option; give a number or a name"
            )
        if isinstance(part, str):
            try:
                float(part)
            except ValueError:
                continue
            raise ValueError(f"'{part}' is text; write the number without quotes")


def nearest(model: type[BaseModel], place: tuple[int | str, ...]) -> str:
    """What may have been meant by an unknown key: ", did you mean 'window'?", or nothing.

    Args:
        model: the whole of the document.
        place: the path of the key.
    """
    fields = model.model_fields
    for part in place[:-1]:
        inner = fields[str(part)].annotation if str(part) in fields else None
        if not isinstance(inner, type) or not issubclass(inner, BaseModel):
            return ""
        fields = inner.model_fields
    near = get_close_matches(str(place[-1]), fields, 1, 0.5)
    return f", did you mean '{near[0]}'?" if near else f"; known are {', '.join(fields)}"
