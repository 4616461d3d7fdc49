"""Tables of results as they are shown, and as other programs read them."""
import csv
import io

from singlestep.tables import Accuracy, aligned, as_csv, as_latex

TABLE = [["run", "images", "clean", "FGSM", "none", "best"],
         ["a_b, 50%", 1000, Accuracy([50.0], 2, (46.9, 53.1)), Accuracy([20.0, 30.0, 40.0]), "-", "x"],
         ["q < 0.7 & $c$", "10", Accuracy([51.23456], 2), Accuracy([]), Accuracy([]), Accuracy([7.0], note="@ 3")]]


def test_a_table_is_aligned_and_a_column_without_values_is_left_out():
    assert aligned(TABLE).splitlines() == [
        "run            images  clean                FGSM         best",
        "a_b, 50%       1000    50.00 (46.90-53.10)  30.0 ± 10.0  x",
        "q < 0.7 & $c$  10      51.23                -            7.0 @ 3"]


def test_csv_has_a_column_for_each_number():
    rows = list(csv.reader(io.StringIO(as_csv(TABLE))))
    assert rows == [
        ["run", "images", "clean", "clean low", "clean high", "FGSM", "FGSM deviation", "best", "best note"],
        ["a_b, 50%", "1000", "50.00", "46.90", "53.10", "30.0", "10.0", "x", ""],
        ["q < 0.7 & $c$", "10", "51.23", "", "", "", "", "7.0", "@ 3"]]


def test_latex_has_a_column_for_each_head_and_no_letter_that_is_a_command():
    lines = as_latex(TABLE, "in %").splitlines()
    assert lines[0] == "% in %" and r"\usepackage{booktabs}" in lines[1] and lines[2] == r"\begin{tabular}{lrrrr}"
    assert lines[6:8] == [r"a\_b, 50\% & 1000 & 50.00 (46.90--53.10) & 30.0 $\pm$ 10.0 & x \\",
                          r"q $<$ 0.7 \& \$c\$ & 10 & 51.23 & -- & 7.0 @ 3 \\"]
    assert lines[8:] == [r"\bottomrule", r"\end{tabular}"]
