"""solo-learn 1.0.2, the registry's release, on today's torch and Lightning."""
