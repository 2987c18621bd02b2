"""Configurations on disk: shipped presets, a user's file, what a journal recorded, and an explanation of every key."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, NamedTuple, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from esper_simic.config import Config, parse, parse_mapping, section_in
from esper_simic.errors import ConfigError

PRESETS: Final = resources.files("supervisor") / "presets"
SUFFIX: Final = ".yaml"


def preset_names() -> tuple[str, ...]:
    """Names of the shipped presets."""
    names = (entry.name for entry in PRESETS.iterdir())
    return tuple(sorted(name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)))


def load(preset: str, path: Path | None = None, assignments: Sequence[str] = ()) -> Config:
    """The defaults, overlaid by a preset, a file and assignments, in this order.

    Raises:
        ConfigError: No such preset or file, or the configuration cannot be obeyed.
    """
    if preset not in preset_names():
        raise ConfigError(f"unknown preset {preset!r}; shipped: {', '.join(preset_names())}")
    base = parse_mapping((PRESETS / f"{preset}{SUFFIX}").read_text("utf-8"))
    return _anchored(parse(_read(path) if path else "", base=base, assignments=assignments))


def _anchored(config: Config) -> Config:
    """The same with absolute paths: a run goes on from wherever it is told to."""
    trainer, environment = config.simic_trainer, config.environment
    named = {"initial_policy": trainer.initial_policy, "initial_adapters": trainer.initial_adapters}
    absolute = {key: str(Path(path).absolute()) for key, path in named.items() if path is not None}
    trainer = trainer.model_copy(update=absolute)
    records = tuple(str(Path(directory).absolute()) for directory in environment.records)
    environment = environment.model_copy(update={"records": records})
    return config.model_copy(update={"simic_trainer": trainer, "environment": environment})


def _read(path: Path) -> str:
    """The text of a configuration file, known to be YAML: later complaints are about keys, which name themselves."""
    try:
        text = path.read_text("utf-8")
        parse_mapping(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return text


def config_of(recorded: dict[str, Any]) -> Config:
    """The configuration that a journal's first event recorded.

    Raises:
        ConfigError: It was written by a version with other keys.
    """
    return parse(yaml.safe_dump(recorded), is_recorded=True)


class Explained(NamedTuple):
    """One key in words, as a person would write its values."""

    path: str
    value: str
    default: str
    allowed: str
    description: str


def explain(preset: str, part: str = "") -> list[Explained]:
    """Explain every key whose dotted path contains `part`, with the preset's value.

    Raises:
        ConfigError: There is no such preset or key.
    """
    explained = [key for key in _explained(Config(), load(preset)) if part in key.path]
    if not explained:
        raise ConfigError("no such key; `config explain` lists all", part)
    return explained


def _explained(default: BaseModel, effective: BaseModel, prefix: str = "") -> Iterator[Explained]:
    for name, field in type(default).model_fields.items():
        one, other = getattr(default, name), getattr(effective, name)
        if isinstance(one, BaseModel):
            yield from _explained(one, other, f"{prefix}{name}.")
        else:
            described = field.description or ""
            yield Explained(f"{prefix}{name}", _words(other), _words(one), allowed_words(field), described)
            yield from _of_items(field, f"{prefix}{name}[].")


def _of_items(field: FieldInfo, prefix: str) -> Iterator[Explained]:
    """The keys of what a list of sections is made of; nothing of any other key."""
    section = section_in(field.annotation)
    for name, inner in section.model_fields.items() if section else ():
        default = "required" if inner.is_required() else _words(inner.get_default(call_default_factory=True))
        described = inner.description or ""
        yield Explained(f"{prefix}{name}", "of each", default, allowed_words(inner), described)


def _words(value: object) -> str:
    """A value as it stands in a YAML file; `unset` for none."""
    if value is None:
        return "unset"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_words, value))}]"
    if isinstance(value, BaseModel):
        return _words(value.model_dump(exclude_defaults=True))
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_words(inner)}' for name, inner in value.items())}}}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def allowed_words(field: FieldInfo) -> str:
    """What a key accepts: `in [1e-06, 0.01]`, `>= 1`, `one of a, b`; empty where its description says it.

    A square bracket includes the bound, a round one does not. Of a list or a mapping it is what each of its values
    accepts: `each in [0, 1]`.
    """
    return _allowed(field.annotation, field.metadata)


def _allowed(annotation: object, rules: Iterable[object]) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        # Pydantic takes the outermost annotation apart itself, and leaves what stands within.
        described = FieldInfo.from_annotation(annotation)  # type: ignore[arg-type]
        return _allowed(described.annotation, described.metadata)
    if origin in (Union, UnionType):
        present = [one for one in inner if one is not NoneType]
        if len(present) == 1 and not _bounds_words(rules):
            return _allowed(present[0], rules)
    if origin is Literal:
        return f"{'one of' if len(inner) > 1 else 'only'} {', '.join(map(str, inner))}"
    if origin in (tuple, dict) and inner:
        each = _allowed(inner[0] if origin is tuple else inner[1], ())
        return f"each {each}" if each else ""
    return "true or false" if annotation is bool else _bounds_words(rules)


def _bounds_words(rules: Iterable[object]) -> str:
    bounds = {name: getattr(rule, name) for rule in rules for name in _BOUNDS if hasattr(rule, name)}
    low = next(((name, bounds[name]) for name in ("ge", "gt") if name in bounds), None)
    high = next(((name, bounds[name]) for name in ("le", "lt") if name in bounds), None)
    if low and high:
        opening, closing = "[" if low[0] == "ge" else "(", "]" if high[0] == "le" else ")"
        return f"in {opening}{low[1]}, {high[1]}{closing}"
    one = low or high
    return f"{_BOUNDS[one[0]]} {one[1]}" if one else ""


_BOUNDS: Final = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
