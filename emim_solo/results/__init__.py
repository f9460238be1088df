"""Results: rows, tables, intervals, equal terms."""
