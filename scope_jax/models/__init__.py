"""Language models as pure functions of a nested dict of stacked weights."""
