"""Parts of the report: rows, plots, tables, gallery and page."""
