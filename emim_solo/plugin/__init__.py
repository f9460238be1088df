"""How solo-learn comes to know EMIM."""
