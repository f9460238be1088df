"""What was measured: rows, tables, intervals, equal terms."""
