"""The objective, its theory, measures of features, and the method."""
