"""Print the tables of methods, attacks and objectives, generated from the records in singlestep/methods.py.

    python docs/tables.py --write

writes them into README.md and docs/: each table replaces the one below its comment `<!-- table: NAME -->`.
"""
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from singlestep.methods import ATTACKS, METHODS, OBJECTIVES, Method
from singlestep.options import CIFAR10, DATA_SETS, Parser, arguments, as_flags, option

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/methods.md", "docs/comparisons.md")


def table(*rows: tuple[str, ...]) -> str:
    """Return a Markdown table; the first row has the column titles."""
    titles, *others = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (titles, ("---",) * len(titles), *others))


def methods() -> str:
    """Return the table of the methods."""
    return table(("`--method`", "what it is", "paper", "passes per training step (standard training: 1)"),
                 *((f"`{name}`", method.text, paper(method.source), method.passes) for name, method in METHODS.items()))


def settings() -> str:
    """Return the table of the flags that each method sets."""
    def cells(flags: dict[str, Any]) -> tuple[str, str, str]:
        others = {name: value for name, value in flags.items() if name not in ("attack", "objective")}
        return f"`{flags['attack']}`", f"`{flags.get('objective', 'ce')}`", f"`{as_flags(others)}`" if others else ""

    def on(method: Method) -> str:
        return ", ".join(f"{data_set}: `{as_flags(flags)}`" for data_set, flags in method.on.items())

    return table(("`--method`", "`--attack`", "`--objective`", "other flags that it sets", "on other data sets"),
                 *((f"`{name}`", *cells(method.flags), on(method)) for name, method in METHODS.items()))


def comparisons() -> str:
    """Return the table of what each method was compared with, and what differs."""
    return table(("`--method`", "compared with", "what differs from the authors' code"),
                 *((f"`{name}`", method.compared, method.differs or "nothing known")
                   for name, method in METHODS.items()))


def attacks() -> str:
    """Return the table of the attacks."""
    return table(("`--attack`", "starting point (eta)", "next delta", "clip", "flags and defaults"),
                 *((f"`{name}`", attack.starts_at, attack.step, attack.clip, flags(attack.flags, attack=name))
                   for name, attack in ATTACKS.items()))


def objectives() -> str:
    """Return the table of the objectives, without --label-smoothing, which all have."""
    return table(("`--objective`", "loss", "weight", "flags and defaults"),
                 *((f"`{name}`", objective.loss, objective.weighting,
                    flags([flag for flag in objective.flags if flag != "label_smoothing"], objective=name))
                   for name, objective in OBJECTIVES.items()))


def paper(source: str) -> str:
    """Return a source, with a link if it is on arXiv."""
    return re.sub(r"^arXiv (\S+)$", r"[\1](https://arxiv.org/abs/\1)", source)


def flags(names: list[str], **chosen: str) -> str:
    """Return flags with their defaults under the flags `chosen`: CIFAR-10's, then other data sets' that differ."""
    by_data_set = {dataset.name: arguments(dataset, chosen) for dataset in DATA_SETS.values()}
    return ", ".join(flag(name, {data_set: getattr(args, name) for data_set, args in by_data_set.items()})
                     for name in names)


def flag(name: str, values: dict[str, Any]) -> str:
    """Return a flag with its value on each data set."""
    written = {data_set: as_flags({name: value}) for data_set, value in values.items()}
    default = written.pop(CIFAR10.name)
    others = [f"{data_set}: {text.partition('=')[2]}" for data_set, text in written.items() if text != default]
    return f"`{default or option(name)}`" + (f" ({', '.join(others)})" if others else "" if default else " (off)")


TABLES = {"methods": methods, "settings": settings, "comparisons": comparisons, "attacks": attacks,
          "objectives": objectives}


def refreshed(text: str) -> str:
    """Return the text of a page with its tables generated again."""
    return re.sub(r"^(<!-- table: (\w+) -->\n)(?:\|.*\n)*", lambda found: found[1] + TABLES[found[2]](), text,
                  flags=re.M)


def main() -> None:
    p = Parser(__doc__)
    p.add_argument("--write", action="store_true", help="write the tables into the pages instead of printing them")
    if not p.parse_args().write:
        print("\n".join(make() for make in TABLES.values()), end="")
        return
    for page in PAGES:
        path = ROOT / page
        path.write_text(refreshed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
