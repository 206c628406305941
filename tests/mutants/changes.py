"""One-point changes of the package: every place where one can be made, and a seeded sample of them."""

from __future__ import annotations

import ast
import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from . import REPO

# what each operator may become: the boundary and the opposite of a comparison, the next number, the neighbouring operator
CHANGES = [
    *("ReplaceComparisonOperator_" + pair for pair in ["Eq_NotEq", "NotEq_Eq", "Lt_LtE", "Lt_GtE", "LtE_Lt", "LtE_Gt"]),
    *("ReplaceComparisonOperator_" + pair for pair in ["Gt_GtE", "Gt_LtE", "GtE_Gt", "GtE_Lt", "Is_IsNot", "IsNot_Is"]),
    *(
        "ReplaceBinaryOperator_" + pair
        for pair in ["Add_Sub", "Sub_Add", "Mul_Div", "Div_Mul", "FloorDiv_Mul", "Mod_Mul"]
    ),
    *("ReplaceBinaryOperator_" + pair for pair in ["Pow_Mul", "BitOr_BitAnd", "BitAnd_BitOr"]),
    *("NumberReplacer", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
]


@dataclass(frozen=True, kw_only=True)
class Place:
    """One operator, number or word that can be changed, and what it can become."""

    module: str  # below hf_dataopt/
    line: int
    column: int
    text: str  # the line as it stands
    twin: int  # how many of the same line and column of the module come before it
    changes: tuple[tuple[str, int], ...]  # operator and its occurrence in the module

    @property
    def key(self) -> str:
        """The same as long as the line is, wherever it moves to."""
        return "\n".join([self.module, self.text.strip(), str(self.column - _indent(self.text)), str(self.twin)])


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change at one place."""

    module: str
    line: int
    column: int
    operator: str
    text: str
    changed: str  # what the line becomes
    key: str
    code: str = field(repr=False)  # the module with the change made


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _left_out(tree: ast.AST) -> Iterator[tuple[int, int, int, int]]:
    """Spans that no test can notice: annotations, and what only words a message."""
    for node in ast.walk(tree):
        inner = [getattr(node, name, None) for name in ("annotation", "returns")]
        inner += [node] if isinstance(node, ast.JoinedStr) else []
        for one in filter(None, inner):
            yield one.lineno, one.col_offset, one.end_lineno, one.end_col_offset


def places_of(module: str) -> list[Place]:
    """Every place of one module at which a change can be made, in the order of its lines."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator

    source = (REPO / "hf_dataopt" / module).read_text(encoding="utf-8")
    left_out, lines = list(_left_out(ast.parse(source))), source.splitlines()
    nodes = list(ast_nodes(get_ast(source)))
    found: dict[tuple[int, int], list[tuple[str, int]]] = {}
    for name in CHANGES:
        operator = get_operator(f"core/{name}")()
        spans = [(node, span) for node in nodes for span in operator.mutation_positions(node)]
        for occurrence, (node, ((line, column), _)) in enumerate(spans):
            if any((a, b) <= (line, column) < (c, d) for a, b, c, d in left_out):
                continue
            if name == "NumberReplacer" and node.value not in ("0", "1", "2"):
                continue
            if node.parent is not None and node.parent.type in ("parameters", "lambdef"):
                continue  # the lone star of a signature
            found.setdefault((line, column), []).append((name, occurrence))
    places: list[Place] = []
    seen: Counter[tuple[str, int]] = Counter()
    for (line, column), changes in sorted(found.items()):
        text = lines[line - 1]
        where = text.strip(), column - _indent(text)
        places.append(
            Place(module=module, line=line, column=column, text=text, twin=seen[where], changes=tuple(changes))
        )
        seen[where] += 1
    return places


def changed_at(place: Place) -> list[Mutant]:
    """Every change of one place that Python can read."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    source, mutants = (REPO / "hf_dataopt" / place.module).read_bytes(), []
    for name, occurrence in place.changes:
        code = mutate_code(source, get_operator(f"core/{name}")(), occurrence)
        with contextlib.suppress(SyntaxError):
            compile(code, place.module, "exec")
            changed = code.splitlines()[place.line - 1].strip()
            mutants.append(
                Mutant(
                    module=place.module,
                    line=place.line,
                    column=place.column,
                    operator=name,
                    text=place.text.strip(),
                    changed=changed,
                    key=f"{place.key}\n{changed}",
                    code=code,
                )
            )
    return mutants


def sample(modules: Sequence[str], size: int, seed: int) -> list[Mutant]:
    """`size` places with one of their changes each, in the order of the modules.

    The seed and a place's own words give it a number, and the lowest are drawn, so that an edited line changes nothing
    about the rest of the sample.
    """

    def number(words: str) -> bytes:
        return hashlib.sha256(f"{seed}\n{words}".encode()).digest()

    drawn: list[Mutant] = []
    for place in sorted((one for module in modules for one in places_of(module)), key=lambda place: number(place.key)):
        if len(drawn) == size:
            break
        drawn += sorted(changed_at(place), key=lambda mutant: number(mutant.key))[:1]
    return sorted(drawn, key=lambda mutant: (modules.index(mutant.module), mutant.line, mutant.column))


def chosen_modules(patterns: Sequence[str]) -> list[str]:
    """Module paths below hf_dataopt/, in the order of the patterns."""
    root, found = REPO / "hf_dataopt", []
    for pattern in patterns:
        found += [path.relative_to(root).as_posix() for path in sorted(root.glob(pattern))]
    return [name for name in dict.fromkeys(found) if not name.endswith("__init__.py")]
