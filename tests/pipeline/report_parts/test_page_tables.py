"""The tables of a report, cell by cell."""

from __future__ import annotations

from deltaclip.pipeline.report_parts.page_tables import bases_table


def test_candidates_of_bases_stand_best_first():
    figures = {
        "ridge on center": (0.5, 0.2),
        "kernel on stages": (0.7, 0.1),
        "mixture": (0.72, 0.09),
        "flat": (None, 0.3),
    }
    left_out = {name: {"srocc": srocc, "rmse": rmse} for name, (srocc, rmse) in figures.items()}
    mixed = {"shares": {"kernel on stages": 0.75, "ridge on center": 0.25}, "by": "srocc", "left_out": left_out}
    alone = {"shares": {"kernel on stages": 1.0}, "by": "rmse", "left_out": left_out}
    table = bases_table({"choice": {"quality": mixed, "colour": alone, "rare": None}})
    shown = [[cell.words for cell in row] for row in table.rows]
    assert shown[:4] == [
        ["quality: mixture", "0.720", "0.090", "all"],
        ["kernel on stages", "0.700", "0.100", "0.75"],
        ["ridge on center", "0.500", "0.200", "0.25"],
        ["flat", "–", "0.300", ""],
    ]
    assert [row[0] for row in shown[4:]] == ["colour: mixture", "kernel on stages", "ridge on center", "flat"]
    assert [row[3] for row in shown[4:]] == ["", "1.00", "", ""]
    assert bases_table(None) is None
    assert bases_table({"quality": {"num_rows": 3}}) is None
