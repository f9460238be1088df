"""What everything stands on: errors, files, shipped configs, signals."""
