"""A recipe: which transformations, formats and solver a compile uses. A method is a few lines here.

The axes are independent: *transforms* rewrite the float model without changing its function, *formats* say what the
stored codes mean, the *solver* chooses them, *overrides* change formats for some sites.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qcompile.errors import RecipeError
from qcompile.formats import ActivationFormat, Format, parse_activation, parse_format


@dataclass(frozen=True)
class Step:
    """One transformation by name, with options."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        inside = ", ".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.name}({inside})" if inside else self.name


@dataclass(frozen=True)
class Override:
    """Different settings for the sites whose name matches a shell pattern."""

    pattern: str
    weight: str | None = None
    activation: str | None = None
    solver: str | None = None

    def matches(self, name: str) -> bool:
        """Whether the override applies to the site ``name``."""
        return fnmatch.fnmatch(name, self.pattern)


@dataclass(frozen=True)
class Recipe:
    """Choices along the axes.

    Attributes:
        name, description, source: for people; ``source`` names the paper.
        weight: format of linear weights, or ``none``.
        activation: format of their inputs: ``int8/token``, ``int8/tensor`` or ``none``.
        solver: name of the solver; ``solver_options`` are its fields.
        hessian: inputs that second-order solvers minimise against: ``float`` (of the float model, measured once),
            ``quantized`` (of each layer behind the layers quantized before it, rounded as the layer will see them) or
            ``corrected`` (the same, and weights are refitted first to give the float model's outputs on these inputs).
        embedding_bits: 8 for int8 rows with one scale each, 0 for float tables.
        transforms: applied in order before quantization; names and asks (`qcompile.passes.asks`) become steps.
        overrides: the first whose pattern matches a site wins.
    """

    name: str
    description: str = ""
    source: str = ""
    weight: str = "int8"
    activation: str = "int8/token"
    solver: str = "rtn"
    solver_options: dict[str, Any] = field(default_factory=dict)
    hessian: str = "float"
    embedding_bits: int = 8
    transforms: tuple[Step, ...] = ()
    overrides: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "transforms", tuple(map(_step, self.transforms)))
        for spelling in [self.weight, *(o.weight for o in self.overrides if o.weight)]:
            if spelling != "none":
                parse_format(spelling)
        for spelling in [self.activation, *(o.activation for o in self.overrides if o.activation)]:
            parse_activation(spelling)
        if self.hessian not in ("float", "quantized", "corrected"):
            raise RecipeError(f"recipe {self.name!r}: hessian is float, quantized or corrected, not {self.hessian!r}")
        if self.embedding_bits not in (0, 8):
            raise RecipeError(f"recipe {self.name!r}: embedding_bits is 0 or 8, not {self.embedding_bits}")

    def weight_format(self, site: str) -> Format | None:
        """Format of the weight of a site, None to leave it float."""
        spelling = next((o.weight for o in self.overrides if o.weight and o.matches(site)), self.weight)
        return None if spelling == "none" else parse_format(spelling)

    def activation_format(self, site: str) -> ActivationFormat:
        """Format of the input of a site."""
        found = next((o.activation for o in self.overrides if o.activation and o.matches(site)), self.activation)
        return parse_activation(found)

    def solver_name(self, site: str) -> str:
        """Solver of a site."""
        return next((o.solver for o in self.overrides if o.solver and o.matches(site)), self.solver)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return dataclasses.asdict(self)


def _step(transform: Any) -> Step:
    if isinstance(transform, (Step, str)):
        return Step(transform) if isinstance(transform, str) else transform
    from qcompile.transforms import step_of

    return step_of(transform)


_RECIPES: dict[str, Recipe] = {}


def register_recipe(recipe: Recipe) -> Recipe:
    """Make a recipe known by its name.

    Raises:
        RecipeError: the name is taken.
    """
    if recipe.name in _RECIPES:
        raise RecipeError(f"a recipe named {recipe.name!r} exists already")
    _RECIPES[recipe.name] = recipe
    return recipe


def list_recipes() -> list[Recipe]:
    """All known recipes, by name."""
    return sorted(_RECIPES.values(), key=lambda r: r.name)


def get_recipe(spec: str | Path | Recipe, **changes: Any) -> Recipe:
    """Return a recipe by name, from a TOML file, or as given, with some fields changed.

    Raises:
        RecipeError: there is no such recipe, or the file holds unknown fields.
    """
    if isinstance(spec, Recipe):
        recipe = spec
    elif str(spec) in _RECIPES:
        recipe = _RECIPES[str(spec)]
    elif str(spec).endswith(".toml"):
        recipe = read_recipe(Path(spec))
    else:
        raise RecipeError(f"unknown recipe {str(spec)!r}; known: {', '.join(sorted(_RECIPES))}, or a .toml file")
    changes = {k: v for k, v in changes.items() if v is not None}
    return dataclasses.replace(recipe, **changes) if changes else recipe


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from TOML; ``base = "name"`` starts from a known one.

    Raises:
        RecipeError: the file is missing, is not TOML, or holds unknown fields.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {error}") from None
    base = raw.pop("base", None)
    known = {f.name for f in dataclasses.fields(Recipe)}
    if strange := raw.keys() - known:
        raise RecipeError(f"{path}: unknown field {sorted(strange)[0]!r}; known: {', '.join(sorted(known))}")
    try:
        if "transforms" in raw:
            steps = (({"name": t} if isinstance(t, str) else dict(t)) for t in raw["transforms"])
            raw["transforms"] = tuple(Step(t.pop("name"), t) for t in steps)
        if "overrides" in raw:
            raw["overrides"] = tuple(Override(**o) for o in raw["overrides"])
        raw.setdefault("name", path.stem)
        return dataclasses.replace(get_recipe(base), **raw) if base else Recipe(**raw)
    except (TypeError, KeyError) as error:
        raise RecipeError(f"{path}: {error}") from None
