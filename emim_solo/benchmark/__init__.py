"""The benchmark: cost (time per step), plan (which runs), runner (resumes)."""
