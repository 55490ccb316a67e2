"""A model over a set of cases: prompts drawn from the truth, scores, tables and the report."""
