"""The comparison: plan (which runs), runner (resumes), statistics, report (HTML)."""
