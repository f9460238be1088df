"""What all other modules use: errors, files, settings, shipped configs, signals."""
