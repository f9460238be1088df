"""What is EMIM's loss, when is it a bound, and what do features show without labels? The method itself is here too."""
