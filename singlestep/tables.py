"""Tables of results: on the screen, as CSV, and for LaTeX.

A table is a list of rows of cells; the first row is the header.
"""
import argparse
import csv
import io
import statistics
from dataclasses import dataclass
from typing import Any

from .run.console import UsageError
from .run.folder import atomic_write

Table = list[list[Any]]  # of str, int and Accuracy


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of the networks in one table row, in %.

    Attributes:
        values: accuracies; of several, the table shows mean ± deviation.
        digits: digits after the decimal point.
        interval: 95% interval of a single value.
        note: text printed after the number.
    """

    values: list[float]
    digits: int = 1
    interval: tuple[float, float] | None = None
    note: str = ""

    def numbers(self) -> dict[str, str]:
        """Return the numbers and the note as text, keyed by the suffix of their CSV column, such as " deviation"."""
        if not self.values:
            return {}
        parts = {"": statistics.mean(self.values)}
        if len(self.values) > 1:
            parts[" deviation"] = statistics.stdev(self.values)
        elif self.interval:
            parts[" low"], parts[" high"] = self.interval
        numbers = {name: f"{value:.{self.digits}f}" for name, value in parts.items()}
        return {**numbers, " note": self.note} if self.note else numbers

    def __str__(self) -> str:
        parts = self.numbers()
        text = parts.get("", "-")
        if " deviation" in parts:
            text += f" ± {parts[' deviation']}"
        if " low" in parts:
            text += f" ({parts[' low']}-{parts[' high']})"
        return f"{text} {self.note}" if self.note else text


def filled(table: Table) -> Table:
    """Return the table without its empty columns."""
    columns = [column for column in zip(*table) if {str(cell) for cell in column[1:]} != {"-"}]
    return [list(row) for row in zip(*columns)]


def aligned(table: Table) -> str:
    """Format a table in aligned columns."""
    rows = [[str(cell) for cell in row] for row in filled(table)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def as_csv(table: Table) -> str:
    """Format a table as CSV; each number of an accuracy has a column of its own."""
    columns: dict[str, list[str]] = {}
    for head, *cells in zip(*filled(table)):
        parts = [cell.numbers() if isinstance(cell, Accuracy) else {"": str(cell)} for cell in cells]
        for end in dict.fromkeys(end for part in parts for end in part):
            columns[head + end] = [part.get(end, "") for part in parts]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([list(columns), *zip(*columns.values())])
    return text.getvalue()


# Characters to escape in LaTeX.
ESCAPES = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": "$<$",
    ">": "$>$", **{letter: f"\\{letter}" for letter in "&%$#_{}"}})


def as_latex(table: Table, caption: str) -> str:
    """Format a table for LaTeX, with the rules of the package booktabs. caption: text of a comment above the table."""
    def text(cell: Any) -> str:
        dashes = str(cell).replace("-", "--") if isinstance(cell, Accuracy) else str(cell)  # of intervals
        return dashes.translate(ESCAPES)

    head, *rows = [" & ".join(map(text, row)) + r" \\" for row in filled(table)]
    columns = "l" + "r" * (len(filled(table)[0]) - 1)
    return "\n".join([f"% {caption}", r"% needs \usepackage{booktabs}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
                      head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}", ""])


def write(table: Table, caption: str, args: argparse.Namespace) -> None:
    """Write the table to the files of --csv and --latex. Raises UsageError if one cannot be written."""
    for flag, file, text in (("--csv", args.csv, as_csv(table)), ("--latex", args.latex, as_latex(table, caption))):
        if file:
            try:
                with atomic_write(file) as out:
                    out.write(text.encode())
            except OSError as error:
                raise UsageError(f"{flag} {file} cannot be written ({error.strerror})") from None
